//! Programs that outlive the command that starts them: the agent, the uplink, the server.
//!
//! Where systemd runs and has their units, they are its. Elsewhere (containers, other inits, several machines in
//! namespaces of one host) they are started here, each in a session of its own. A file with process id and start time,
//! beside the agent's socket, finds them again; it never means a later process with the same id.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use keepwall_host::process::{self, Process, Signal, User};
use keepwall_sensors::processes;

use crate::failure::Failure;

/// What is asked to end and has not by then hangs.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
/// The logs of what is started at the usual places.
const LOGS: &str = "/var/log/keepwall";
/// How much our programs say.
const LOG_LEVEL: &str = "KEEPWALL_LOG";
/// The last words of a log are within its last bytes.
const LAST_BYTES: usize = 16 * 1024;

/// A program in the background.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Of the program, its unit, its files.
    name: &'static str,
    run: PathBuf,
    pub log: PathBuf,
}

impl Daemon {
    /// The program `name` of the machine whose agent listens at `socket`. Its log is in `/var/log/keepwall`, or beside
    /// a socket that is not at its usual place.
    pub fn of(name: &'static str, socket: &Path) -> Daemon {
        let run = socket.parent().unwrap_or(Path::new("/")).to_owned();
        let logs = if usual(socket) { Path::new(LOGS) } else { &run };
        Daemon { name, log: logs.join(format!("{name}.log")), run }
    }

    fn file(&self) -> PathBuf {
        self.run.join(format!("{}.pid", self.name))
    }

    /// The process, if it lives.
    pub fn running(&self) -> Option<Process> {
        let text = fs::read_to_string(self.file()).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        let (pid, started): (u32, u64) = (pid.parse().ok()?, started.parse().ok()?);
        // First the handle, then the question whom it means.
        let process = Process::open(pid).ok()?;
        let lives = processes::started(pid) == Some(started) && !process.wait(Some(Duration::ZERO)).ok()?;
        lives.then_some(process)
    }

    /// Starts the program, which outlives this command.
    pub fn start(&self, command: &mut Command) -> Result<(), Failure> {
        let cannot = |what: &Path, error: std::io::Error| {
            Failure::new(format!("cannot write {}: {error}", what.display()), "run this as root (sudo keepwall …)")
        };
        for directory in [Some(self.run.as_path()), self.log.parent()].into_iter().flatten() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(directory);
            made.map_err(|error| cannot(directory, error))?;
        }
        let log =
            File::options().create(true).append(true).open(&self.log).map_err(|error| cannot(&self.log, error))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let pid = process::spawn_detached(command).map_err(|error| not_started(self.name, &error))?;
        let started = processes::started(pid).unwrap_or_default();
        let beside = self.run.join(format!("{}.pid.new", self.name));
        let written = fs::write(&beside, format!("{pid} {started}\n")).and_then(|()| fs::rename(&beside, self.file()));
        written.map_err(|error| cannot(&self.file(), error))
    }

    /// Ends it. False if it did not run.
    pub fn stop(&self) -> Result<bool, Failure> {
        let Some(process) = self.running() else { return Ok(false) };
        process.signal(Signal::Terminate)?;
        if !process.wait(Some(ENDS_WITHIN))? {
            process.signal(Signal::Kill)?;
            process.wait(Some(ENDS_WITHIN))?;
        }
        let _ = fs::remove_file(self.file());
        Ok(true)
    }

    /// The last line of its log.
    pub fn last_words(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LAST_BYTES)..]).into_owned();
        text.lines().last().map_or_else(|| "it said nothing".to_owned(), |line| processes::clean(line.as_bytes()))
    }
}

/// True for the socket of a machine that is all of its host.
pub fn usual(socket: &Path) -> bool {
    socket == Path::new(keepwall_link::SOCKET)
}

pub fn not_started(name: &str, error: &std::io::Error) -> Failure {
    Failure::new(format!("cannot start {name}: {error}"), "install it beside keepwall, or build the workspace")
}

/// Where a program of ours is: beside this one, or on the path.
pub fn program(name: &str) -> PathBuf {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(name));
    beside.filter(|path| path.exists()).unwrap_or_else(|| name.into())
}

/// A program of ours, to be started as somebody without privilege and without our environment.
pub struct Unprivileged {
    pub command: Command,
    /// The program, if its user cannot go to it: a build in somebody's home.
    _by_handle: Option<File>,
}

/// Prepares a program of ours for another user. Start it while the value lives.
pub fn unprivileged(name: &str, user: User) -> Unprivileged {
    let path = program(name);
    // What everybody may run can still stand where not everybody may go. A handle needs no way.
    let handle = if path.is_absolute() && !passable(&path) { File::open(&path).ok() } else { None };
    let mut command = match &handle {
        Some(file) => Command::new(format!("/proc/self/fd/{}", file.as_raw_fd())),
        None => Command::new(path),
    };
    command.arg0(name).current_dir("/").env_clear();
    if let Some(level) = std::env::var_os(LOG_LEVEL) {
        command.env(LOG_LEVEL, level);
    }
    process::unprivileged(&mut command, user);
    Unprivileged { command, _by_handle: handle }
}

/// True if everybody may go to this file.
fn passable(path: &Path) -> bool {
    path.ancestors().skip(1).all(|directory| fs::metadata(directory).is_ok_and(|m| m.mode() & 0o001 != 0))
}

/// The user that a program without privilege runs as: the account of its name, which the package makes; else the first
/// id from `first` on that no account has.
///
/// `first` is from the range that systemd gives to services for as long as they run (61184-65519). Without an account,
/// that is where an id belongs that nobody else owns files by.
pub fn account(name: &str, first: u32) -> User {
    find_account(&fs::read_to_string("/etc/passwd").unwrap_or_default(), name, first)
}

fn find_account(passwd: &str, name: &str, first: u32) -> User {
    let accounts: Vec<(&str, u32, u32)> = (passwd.lines())
        .filter_map(|line| {
            let mut fields = line.split(':');
            Some((fields.next()?, fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
        })
        .collect();
    match accounts.iter().find(|(account, uid, _)| *account == name && *uid != 0) {
        Some((_, uid, gid)) => User { uid: *uid, gid: *gid },
        None => {
            let free = (first..).find(|id| accounts.iter().all(|(_, uid, gid)| uid != id && gid != id));
            let id = free.unwrap_or(first);
            User { uid: id, gid: id }
        }
    }
}

/// A directory that is `user`'s alone, with what is in it; everybody may pass the one above.
pub fn give(directory: &Path, user: User) -> Result<(), Failure> {
    let work = || -> std::io::Result<()> {
        if let Some(above) = directory.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(above)?;
            let mode = fs::metadata(above)?.mode();
            fs::set_permissions(above, fs::Permissions::from_mode((mode | 0o011) & 0o7777))?;
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let before = fs::symlink_metadata(directory)?;
        if !before.is_dir() {
            return Err(std::io::ErrorKind::NotADirectory.into());
        }
        let (uid, gid) = (Some(user.uid), Some(user.gid));
        // Files of the user that had it before; a link to somebody else's file is not that.
        for entry in fs::read_dir(directory)?.flatten() {
            let file = entry.metadata()?;
            if file.is_file() && file.nlink() == 1 && file.uid() == before.uid() {
                std::os::unix::fs::lchown(entry.path(), uid, gid)?;
            }
        }
        std::os::unix::fs::lchown(directory, uid, gid)
    };
    work().map_err(|error| {
        Failure::new(
            format!("cannot prepare {}: {error}", directory.display()),
            "run this as root (sudo keepwall …), on a disk with room",
        )
    })
}

/// True if systemd runs this machine and has the program's unit.
pub fn has_unit(name: &str) -> bool {
    Path::new("/run/systemd/system").exists() && systemctl(&["cat", &format!("{name}.service")]).is_ok()
}

/// Asks systemd.
pub fn systemctl(arguments: &[&str]) -> Result<(), Failure> {
    let output = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| Failure::plain(format!("systemctl: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Failure::new(format!("systemctl {}: {words}", arguments.join(" ")), "look at `journalctl -u keepwall-*`"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_account_is_the_packages_or_an_id_that_nobody_has() {
        let passwd = "root:x:0:0::/:/bin/sh\nkeepwall-uplink:x:990:991::/:/bin/false\nold:x:64917:64918::/:\nbroken\n";
        assert_eq!(find_account(passwd, "keepwall-uplink", 64_917), User { uid: 990, gid: 991 });
        assert_eq!(find_account(passwd, "keepwall-server", 64_917), User { uid: 64_919, gid: 64_919 });
        assert_eq!(find_account("x:x:0:0::/:", "x", 64_917).uid, 64_917, "never root");
    }

    #[test]
    fn a_daemon_is_found_by_its_file_and_no_other_process_is() {
        let directory = std::env::temp_dir().join(format!("keepwall-daemons-{}", std::process::id()));
        let daemon = Daemon::of("sleep", &directory.join("agent.sock"));
        assert!(daemon.running().is_none());
        daemon.start(Command::new("sleep").arg("60")).unwrap();
        assert!(daemon.running().is_some());
        let text = fs::read_to_string(daemon.file()).unwrap();
        // Another process with its id.
        fs::write(daemon.file(), format!("{} 1\n", text.split(' ').next().unwrap())).unwrap();
        assert!(daemon.running().is_none() && !daemon.stop().unwrap());
        fs::write(daemon.file(), text).unwrap();
        assert!(daemon.stop().unwrap());
        assert!(daemon.running().is_none() && !daemon.stop().unwrap());
        fs::remove_dir_all(directory).unwrap();
    }
}
