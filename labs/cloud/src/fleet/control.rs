//! The programs of the drill: the server, the operator at it, and each machine's own commands.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use keepwall_sys::process::{self, Process, Signal};
use serde_json::Value;

use crate::machine::{directory, inside, said, socket, state};
use crate::{Error, Programs};

const SERVER: &str = "server";
/// Key, authority and store are made within this also on a slow disk.
const STARTS_WITHIN: Duration = Duration::from_secs(20);

/// Where the server of the drill reads its configuration.
#[must_use]
pub fn config() -> PathBuf {
    directory(SERVER).join("server.toml")
}

/// What a command said.
pub(super) struct Told {
    /// True if it ended well.
    pub(super) good: bool,
    command: String,
    out: String,
    err: String,
}

impl Told {
    fn new(command: &[&str], output: &Output) -> Told {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        Told {
            good: output.status.success(),
            command: command.join(" "),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    /// An error unless it ended well.
    pub(super) fn success(&self) -> Result<(), Error> {
        match self.good {
            true => Ok(()),
            false => Err(format!("keepwall {}: {} {}", self.command, self.out, self.err)),
        }
    }

    pub(super) fn json(&self) -> Result<Value, Error> {
        self.success()?;
        serde_json::from_str(&self.out).map_err(|error| format!("keepwall {}: {error}: {}", self.command, self.out))
    }

    fn lines(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.out.lines().chain(self.err.lines()).map(str::trim).filter(|line| !line.is_empty())
    }

    pub(super) fn first_line(&self) -> String {
        self.lines().next().unwrap_or("nothing").to_owned()
    }

    pub(super) fn last_line(&self) -> String {
        self.out.lines().last().or(self.err.lines().last()).unwrap_or("nothing").trim().to_owned()
    }
}

/// The server: its files, and its process while it lives.
pub(super) struct Server {
    process: Option<Process>,
}

impl Server {
    /// Writes its configuration.
    pub(super) fn new(address: &str) -> Result<Server, Error> {
        let directory = directory(SERVER);
        fs::create_dir_all(&directory).map_err(said("making the server's directory"))?;
        let state = directory.join("state");
        let text = format!(
            "state = {state:?}\nlog_json = false\n[api]\nlisten = \"{address}:7440\"\nsocket = {:?}\n\
             [agents]\nlisten = \"{address}:7443\"\n",
            state.join("api.sock")
        );
        fs::write(config(), text).map_err(said("writing the server's configuration"))?;
        Ok(Server { process: None })
    }

    fn socket(&self) -> PathBuf {
        directory(SERVER).join("state/api.sock")
    }

    /// Where its API is, for root at the same machine.
    pub(super) fn url(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    pub(super) fn start(&mut self, programs: &Programs) -> Result<(), Error> {
        let path = directory(SERVER).join("server.log");
        let log = fs::File::options().create(true).append(true).open(&path).map_err(said("making a log"))?;
        let mut command = Command::new(&programs.keepwall);
        command.args(["lab", "server"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let pid = inside(SERVER, || process::spawn_detached(&mut command).map_err(said("starting keepwalld")))?;
        self.process = Process::open(pid).ok();
        let started = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            if started.elapsed() > STARTS_WITHIN || self.process.is_none() {
                return Err(format!("the server does not start: {}", last_line(&path)));
            }
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Kills it as a crash would.
    pub(super) fn kill(&mut self) -> Result<(), Error> {
        let process = self.process.take().ok_or("the server does not run")?;
        process.signal(Signal::Kill).map_err(said("killing the server"))?;
        process.wait(Some(Duration::from_secs(5))).map_err(said("waiting for the server's end"))?;
        Ok(())
    }

    /// Writes what the operator declares; where it is.
    pub(super) fn write_posture(&self, text: &str) -> Result<String, Error> {
        let path = directory(SERVER).join("fleet.yaml");
        fs::write(&path, text).map_err(said("writing the posture"))?;
        Ok(path.display().to_string())
    }

    /// What the operator types at the server.
    pub(super) fn operator(&self, programs: &Programs, arguments: &[&str]) -> Result<Told, Error> {
        let mut command = Command::new(&programs.keepwall);
        command.env_clear().env("HOME", directory("operator")).env("NO_COLOR", "1");
        run(SERVER, command.args(arguments), arguments)
    }
}

fn run(machine: &str, command: &mut Command, arguments: &[&str]) -> Result<Told, Error> {
    command.stdin(Stdio::null());
    let output = inside(machine, || command.output().map_err(said("starting keepwall")))?;
    Ok(Told::new(arguments, &output))
}

/// The command line on a machine of the fleet, about that machine.
fn here(programs: &Programs, name: &str, arguments: &[&str]) -> Result<Told, Error> {
    let mut command = Command::new(&programs.keepwall);
    command.env_clear().env("NO_COLOR", "1").args(["--context", "none", "--instance", name, "--socket"]);
    command.arg(socket(name)).args(arguments);
    run(name, &mut command, arguments)
}

fn places(name: &str) -> [String; 2] {
    [directory(name).join("uplink"), state(name)].map(|path| path.display().to_string())
}

/// Takes a machine into the fleet, as its administrator does.
pub(super) fn enrol(programs: &Programs, name: &str, token: &str) -> Result<Told, Error> {
    let [uplink, agent] = places(name);
    here(programs, name, &["enroll", token, "--state", &uplink, "--agent-state", &agent])
}

/// Starts a machine's uplink anew, with the certificate that it has; what became of its first dial, in its own words.
pub(super) fn dials_again(programs: &Programs, name: &str, token: &str) -> Result<String, Error> {
    let [uplink, agent] = places(name);
    let dials = || text(&uplink_log(name)).matches(" starting ").count();
    let before = dials();
    // Of a machine that has a certificate, `enroll` starts the uplink and waits for contact, which never comes.
    let mut command = Command::new(&programs.keepwall);
    command.env_clear().args(["--context", "none", "--socket"]).arg(socket(name));
    command.args(["enroll", token, "--state", &uplink, "--agent-state", &agent]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = inside(name, || command.spawn().map_err(said("starting keepwall")))?;
    let started = Instant::now();
    while (dials() == before || uplink_says(name).contains(" starting ")) && started.elapsed() < STARTS_WITHIN {
        sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    Ok(uplink_says(name))
}

/// Takes it out again.
pub(super) fn leave(programs: &Programs, name: &str) -> Result<Told, Error> {
    let [uplink, agent] = places(name);
    here(programs, name, &["leave", "--state", &uplink, "--agent-state", &agent])
}

/// How many changes are in force on a machine, as its own agent counts them.
pub(super) fn in_force(programs: &Programs, name: &str) -> Result<Value, Error> {
    Ok(here(programs, name, &["status", "--json"])?.json()?["status"]["generation"].clone())
}

fn uplink_log(name: &str) -> PathBuf {
    directory(name).join("keepwall-uplink.log")
}

/// How often a machine's uplink was welcomed by the server.
pub(super) fn contacts(name: &str) -> usize {
    text(&uplink_log(name)).matches(" connected ").count()
}

/// The last words of a machine's uplink.
pub(super) fn uplink_says(name: &str) -> String {
    last_line(&uplink_log(name))
}

/// A log, as far as it is written.
fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn last_line(path: &Path) -> String {
    text(path).lines().last().unwrap_or("it said nothing").trim().to_owned()
}

/// Runs `nft` where the calling thread is; what it says, also if it refuses.
pub(super) fn nft(arguments: &[&str]) -> Result<String, Error> {
    let output = Command::new("nft").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|e| format!("nft is needed for this drill: {e} (apt-get install nftables)"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

/// What a machine's kernel holds, in short.
pub(super) struct Table {
    pub(super) chains: Vec<String>,
    /// Of all maps.
    pub(super) elements: usize,
}

pub(super) fn table(name: &str) -> Result<Table, Error> {
    let text = inside(name, || nft(&["list", "table", "inet", "keepwall"]))?;
    let chains = text.lines().map(str::trim).filter(|line| line.starts_with("chain ")).map(str::to_owned).collect();
    Ok(Table { chains, elements: text.matches(" : goto ").count() })
}
