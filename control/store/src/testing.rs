//! A PostgreSQL of one's own, for tests.
//!
//! It listens on a socket in a directory that only its user may enter, so it needs no password and no port, and it
//! writes through to the disk as a real one. A small process beside it waits for the end of the tests, however they
//! end, then stops it and removes the directory.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where Debian installs PostgreSQL: a directory for each version.
const INSTALLED: &str = "/usr/lib/postgresql";
/// How long its processes may take to be gone after they were killed.
const GONE_WITHIN: Duration = Duration::from_secs(20);

/// A running PostgreSQL. Dropping it stops it and removes all that it wrote.
pub struct TestPostgres {
    programs: PathBuf,
    directory: PathBuf,
    /// PostgreSQL refuses to run as root; who we are then instead.
    user: Option<(u32, u32)>,
    /// More of its settings, as `-c name=value`.
    settings: String,
    /// Removes everything when its input ends.
    janitor: Child,
}

impl TestPostgres {
    /// Starts one; `None`, said on standard error, if PostgreSQL is not installed.
    ///
    /// # Panics
    /// It is installed and does not start: the tests cannot tell anything then.
    #[must_use]
    pub fn start() -> Option<TestPostgres> {
        TestPostgres::start_with(&[], &[])
    }

    /// The same with settings, `name=value`, and files in its data directory, which only its user can read.
    ///
    /// # Panics
    /// It is installed and does not start.
    #[must_use]
    pub fn start_with(settings: &[String], files: &[(&str, &str)]) -> Option<TestPostgres> {
        let Some(programs) = installed() else {
            let _ = writeln!(io::stderr(), "skipped: PostgreSQL is not installed; scripts/setup test installs it");
            return None;
        };
        let user = Path::new("/proc/self").metadata().expect("the process has an owner").uid();
        let user = (user == 0).then(unprivileged);
        let directory = directory(user);
        let mut postgres = TestPostgres {
            janitor: janitor(&programs, &directory, user),
            programs,
            directory,
            user,
            settings: settings.iter().map(|setting| format!(" -c {setting}")).collect(),
        };
        postgres.run("initdb", &["-D", "data", "-U", "keepwall", "-A", "trust", "--no-locale", "-E", "UTF8"]);
        for (name, text) in files {
            postgres.write(name, text);
        }
        postgres.launch();
        postgres.create_database("keepwall");
        Some(postgres)
    }

    /// How to connect.
    #[must_use]
    pub fn config(&self) -> String {
        self.config_of("keepwall")
    }

    fn config_of(&self, database: &str) -> String {
        format!("host={} port={} user=keepwall dbname={database}", self.directory.display(), self.running(3))
    }

    /// A line of what PostgreSQL writes about itself while it runs: its process is in the first, its port in the
    /// fourth.
    fn running(&self, line: usize) -> String {
        let lines = fs::read_to_string(self.directory.join("data/postmaster.pid")).expect("it runs");
        lines.lines().nth(line).expect("the file is whole").to_owned()
    }

    /// Makes an empty database; how to connect to it.
    ///
    /// # Panics
    /// It exists, or PostgreSQL is away.
    pub fn create_database(&self, name: &str) -> String {
        let host = self.directory.to_string_lossy();
        self.run("createdb", &["-h", &host, "-p", &self.running(3), "-U", "keepwall", "-T", "template0", name]);
        self.config_of(name)
    }

    /// Stops it as an administrator does, who does not wait for clients, and starts it again.
    ///
    /// # Panics
    /// It does not come back.
    pub fn restart(&self) {
        drop(self.stop());
    }

    /// Stops it until the answer is dropped, which starts it again.
    ///
    /// # Panics
    /// It does not stop.
    pub fn stop(&self) -> Away<'_> {
        self.run("pg_ctl", &["stop", "-D", "data", "-m", "fast", "-w"]);
        Away(self)
    }

    /// Kills all its processes at once, as a loss of power would, and starts it again.
    ///
    /// # Panics
    /// It does not come back.
    pub fn kill9(&self) {
        let (pid, port) = (self.running(0), self.running(3));
        let mut all = children(&pid);
        all.insert(0, pid);
        // Those that were gone meanwhile are no failure.
        let kill = Command::new("sh").args(["-c", "kill -9 \"$@\"", "sh"]).args(&all).stderr(Stdio::null()).status();
        kill.expect("there is a shell");
        let deadline = Instant::now() + GONE_WITHIN;
        while all.iter().any(|pid| alive(pid)) {
            assert!(Instant::now() < deadline, "PostgreSQL outlives being killed");
            std::thread::sleep(Duration::from_millis(5));
        }
        // Where nobody collects the dead, PostgreSQL takes its own for alive. We have looked.
        for name in ["data/postmaster.pid".to_owned(), format!(".s.PGSQL.{port}.lock")] {
            fs::remove_file(self.directory.join(name)).expect("it was killed, so it left the file");
        }
        self.launch();
    }

    fn launch(&self) {
        let socket = self.directory.to_string_lossy();
        // What a test gives comes later and wins.
        let options = format!("-c listen_addresses= -k {socket} -c max_connections=200{}", self.settings);
        self.run("pg_ctl", &["start", "-D", "data", "-w", "-s", "-l", "log", "-o", &options]);
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let mut command = Command::new(self.programs.join(program));
        command.args(arguments).current_dir(&self.directory).stdin(Stdio::null()).stdout(Stdio::null());
        become_user(&mut command, self.user);
        // Not a pipe: PostgreSQL itself would keep it open.
        let errors = self.directory.join("errors");
        command.stderr(fs::File::create(&errors).expect("the directory is ours"));
        let status = command.status().expect("it is installed");
        if !status.success() {
            let read = |name| fs::read_to_string(self.directory.join(name)).unwrap_or_default();
            panic!("{program} failed: {}{}", read("errors"), read("log"));
        }
    }

    fn write(&mut self, name: &str, text: &str) {
        let path = self.directory.join("data").join(name);
        let mut file = fs::File::create(&path).expect("the directory is ours");
        file.write_all(text.as_bytes()).expect("there is room");
        let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o600);
        fs::set_permissions(&path, mode).expect("the file is ours");
        own(&path, self.user);
    }
}

impl Drop for TestPostgres {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}

/// PostgreSQL stands still until this is dropped.
pub struct Away<'a>(&'a TestPostgres);

impl Drop for Away<'_> {
    fn drop(&mut self) {
        self.0.launch();
    }
}

/// The programs of the newest version.
fn installed() -> Option<PathBuf> {
    let versions = fs::read_dir(INSTALLED).ok()?.filter_map(Result::ok);
    let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
    let programs = versions.map(|entry| entry.path()).filter(|path| path.join("bin/initdb").exists());
    Some(programs.max_by_key(|path| version(path))?.join("bin"))
}

/// User and group of `postgres`, which its package makes.
fn unprivileged() -> (u32, u32) {
    let users = fs::read_to_string("/etc/passwd").expect("there are users");
    let fields = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut postgres = fields.filter(|fields| fields[0] == "postgres");
    let fields = postgres.next().expect("PostgreSQL's package makes a user `postgres`");
    (fields[2].parse().expect("a number"), fields[3].parse().expect("a number"))
}

/// A directory of our own, with a name short enough for a socket in it.
fn directory(user: Option<(u32, u32)>) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("keepwall-pg-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let directory = std::env::temp_dir().join(name);
    fs::DirBuilder::new().mode(0o700).create(&directory).expect("the name is new");
    own(&directory, user);
    directory
}

fn own(path: &Path, user: Option<(u32, u32)>) {
    if let Some((user, group)) = user {
        chown(path, Some(user), Some(group)).expect("root may");
    }
}

fn become_user(command: &mut Command, user: Option<(u32, u32)>) {
    if let Some((user, group)) = user {
        command.uid(user).gid(group);
    }
}

/// Waits until its input ends, which it does when we end, then stops PostgreSQL and removes its directory.
fn janitor(programs: &Path, directory: &Path, user: Option<(u32, u32)>) -> Child {
    let script = "cat; \"$1\" stop -D data -m immediate -w; cd / && rm -rf \"$2\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(programs.join("pg_ctl")).arg(directory).current_dir(directory);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // A group of its own, so that who interrupts the tests does not interrupt it.
    command.process_group(0);
    become_user(&mut command, user);
    command.spawn().expect("there is a shell")
}

/// The state of a process and its parent, from `PID (name) S PPID …`.
fn parent(pid: &str) -> Option<(char, String)> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = line.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.to_owned()))
}

fn alive(pid: &str) -> bool {
    parent(pid).is_some_and(|(state, _)| state != 'Z')
}

fn children(of: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").expect("there is /proc").filter_map(Result::ok);
    let names = processes.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|pid| parent(pid).is_some_and(|(_, parent)| parent == of)).collect()
}
