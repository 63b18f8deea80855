//! Processes: kill exactly the one that is meant, and decide whether children outlive their parent.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

/// Signals that are sent here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Please end.
    Terminate,
    /// End at once.
    Kill,
}

/// A handle on one process. It never means another one, however process ids are used again.
#[derive(Debug)]
pub struct Process {
    fd: OwnedFd,
}

impl Process {
    /// The process that has this id now.
    ///
    /// # Errors
    /// There is none (`ESRCH`).
    pub fn open(pid: u32) -> io::Result<Process> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no process has this id"))?;
        Ok(Process { fd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended (`ESRCH`), or it is not ours to signal (`EPERM`).
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let signal = match signal {
            Signal::Terminate => rustix::process::Signal::TERM,
            Signal::Kill => rustix::process::Signal::KILL,
        };
        Ok(pidfd_send_signal(&self.fd, signal)?)
    }

    /// Waits until it has ended; `false` if the time is over before.
    ///
    /// # Errors
    /// None that is known.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        crate::netlink::wait_readable(&self.fd, timeout)
    }
}

/// The child is killed when the thread that starts it ends, however it ends. (The kernel means the thread, not the
/// process: start such children from a thread that lives on.)
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let parent = rustix::process::getpid();
    let before_exec = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // The parent may have ended before the kernel knew whom to tell.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe things are allowed: the closure makes two plain system
    // calls, and allocates nothing.
    #[expect(unsafe_code, reason = "pre_exec is the only place where a child can ask for this")]
    unsafe {
        command.pre_exec(before_exec)
    }
}

/// User and group of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Whom this process runs as (effective ids).
#[must_use]
pub fn user() -> User {
    User { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
}

/// The child runs as `user`, for good: without further groups, without a way back through set-user-id programs, and
/// with none of our descriptors but its standard streams. Needs root.
pub fn unprivileged(command: &mut Command, user: User) -> &mut Command {
    // std takes the other groups away when root changes the user.
    command.uid(user.uid).gid(user.gid);
    let before_exec = || {
        rustix::thread::set_no_new_privs(true)?;
        // Linux 5.11 has this flag; before, what our own parent left open without the flag is inherited.
        // SAFETY: the call takes three numbers and marks descriptors; it touches no memory of ours.
        #[expect(unsafe_code, reason = "neither std nor rustix has close_range")]
        let _ = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe things are allowed: the closure makes two plain system
    // calls, and allocates nothing.
    #[expect(unsafe_code, reason = "pre_exec is the only place where a child can give these up")]
    unsafe {
        command.pre_exec(before_exec)
    }
}

/// Starts a program that belongs to nobody: in a session of its own, adopted by init, so that it outlives whoever
/// started it, its terminal, and `kill` of its process group. Give it its own standard streams first. Returns its
/// process id.
///
/// # Errors
/// The program cannot be started.
pub fn spawn_detached(command: &mut Command) -> io::Result<u32> {
    let (told, tells) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let before_exec = move || {
        rustix::process::setsid()?;
        // SAFETY: the process was made by fork and has one thread, so nothing else is cut in two by another fork; fork
        // is async-signal-safe.
        #[expect(unsafe_code, reason = "std starts direct children only; a second fork hands the child to init")]
        let child = unsafe { libc::fork() };
        match child {
            -1 => Err(io::Error::last_os_error()),
            0 => Ok(()),
            child => {
                // Four bytes into an empty pipe are never written in part.
                let _ = rustix::io::write(&tells, &child.to_ne_bytes());
                // SAFETY: _exit is async-signal-safe and runs no destructors of the parent's.
                #[expect(unsafe_code, reason = "the one in the middle must not run what the parent has at exit")]
                unsafe {
                    libc::_exit(0)
                }
            }
        }
    };
    // SAFETY: between fork and exec only async-signal-safe things are allowed: the closure makes plain system calls,
    // and allocates nothing.
    #[expect(unsafe_code, reason = "pre_exec is the only place between fork and exec")]
    unsafe {
        command.pre_exec(before_exec);
    }
    // What is spawned is the one in the middle, which ends at once; an exec that fails is still reported, by the
    // grandchild, through the pipe that it inherited.
    let status = command.spawn()?.wait()?;
    if !status.success() {
        return Err(io::Error::other("the intermediate process failed"));
    }
    let mut pid = [0; 4];
    std::fs::File::from(told).read_exact(&mut pid)?;
    u32::try_from(i32::from_ne_bytes(pid)).map_err(io::Error::other)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use std::process::Stdio;

    #[test]
    fn a_process_is_killed_by_its_handle_and_only_once() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        assert!(!process.wait(Some(Duration::ZERO)).unwrap());
        process.signal(Signal::Kill).unwrap();
        assert!(process.wait(Some(Duration::from_secs(10))).unwrap());
        child.wait().unwrap();
        assert!(process.signal(Signal::Kill).is_err());
    }

    #[test]
    fn a_bound_child_dies_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            die_with_parent(command.arg("60")).spawn().unwrap()
        })
        .join()
        .unwrap();
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn a_detached_program_is_no_child_of_ours_and_a_missing_one_is_reported() {
        let file = std::env::temp_dir().join(format!("keepwall-detached-{}", std::process::id()));
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo "$PPID $$" > "$0.new" && mv "$0.new" "$0""#]).arg(&file).stdin(Stdio::null());
        let pid = spawn_detached(&mut command).unwrap();
        while !file.exists() {
            std::thread::yield_now();
        }
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        let ids: Vec<u32> = text.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_ne!(ids[0], std::process::id());
        assert_eq!(ids[1], pid);
        assert!(spawn_detached(&mut Command::new("/no/such/program")).is_err());
    }

    #[test]
    fn an_unprivileged_child_has_nothing_of_ours() {
        if user().uid != 0 {
            return;
        }
        // A descriptor that a careless parent left open.
        let (_read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::empty()).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "id -u; id -G; grep -e NoNewPrivs -e CapEff /proc/self/status; ls /proc/$$/fd"]);
        let output = unprivileged(&mut command, User { uid: 64_000, gid: 64_001 }).output().unwrap();
        drop(write);
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..2], ["64000", "64001"], "{text}");
        assert!(lines[2].ends_with("0000000000000000") && lines[3].ends_with('1'), "{text}");
        assert_eq!(lines[4..], ["0", "1", "2"], "{text}");
    }
}
