//! Processes: kill exactly the one that is meant, and decide whether children outlive their parent.

use std::io;
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

/// Starts a program that belongs to nobody: in a session of its own, adopted by init, so that it outlives whoever
/// started it, its terminal, and `kill` of its process group. Give it its own standard streams first.
///
/// # Errors
/// The program cannot be started.
pub fn spawn_detached(command: &mut Command) -> io::Result<()> {
    let before_exec = || {
        rustix::process::setsid()?;
        // SAFETY: the process was made by fork and has one thread, so nothing else is cut in two by another fork; fork
        // is async-signal-safe.
        #[expect(unsafe_code, reason = "std starts direct children only; a second fork hands the child to init")]
        let child = unsafe { libc::fork() };
        match child {
            -1 => Err(io::Error::last_os_error()),
            0 => Ok(()),
            _ => {
                // SAFETY: _exit is async-signal-safe and runs no destructors of the parent's.
                #[expect(unsafe_code, reason = "the one in the middle must not run what the parent has at exit")]
                unsafe {
                    libc::_exit(0)
                }
            }
        }
    };
    // SAFETY: between fork and exec only async-signal-safe things are allowed: the closure makes three plain system
    // calls, and allocates nothing.
    #[expect(unsafe_code, reason = "pre_exec is the only place between fork and exec")]
    unsafe {
        command.pre_exec(before_exec);
    }
    // What is spawned is the one in the middle, which ends at once; an exec that fails is still reported, by the
    // grandchild, through the pipe that it inherited.
    let status = command.spawn()?.wait()?;
    if status.success() { Ok(()) } else { Err(io::Error::other("the intermediate process failed")) }
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
        command.args(["-c", r#"echo "$PPID" > "$0.new" && mv "$0.new" "$0""#]).arg(&file).stdin(Stdio::null());
        spawn_detached(&mut command).unwrap();
        while !file.exists() {
            std::thread::yield_now();
        }
        let parent: u32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_ne!(parent, std::process::id());
        assert!(spawn_detached(&mut Command::new("/no/such/program")).is_err());
    }
}
