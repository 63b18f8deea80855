//! The lab's machines: made, entered, and cleared away.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use keepwall_sys::namespace::{self, NetNs};
use keepwall_sys::process::{Process, Signal};
use keepwall_sys::{link, process};

use crate::{Error, Programs};

/// All files of the lab.
pub const DIRECTORY: &str = "/run/keepwall-lab";
/// Where namespaces are named, as `ip netns` does.
const NAMES: &str = "/run/netns";
/// Only one lab at a time.
const LOCK: &str = "/run/keepwall-lab.lock";
/// Looks for processes that are to be ended.
const LOOKS_MAX: usize = 10;
/// An agent that does not answer by then is broken.
const AGENT_STARTS_WITHIN: Duration = Duration::from_secs(10);

/// A machine of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its name.
    pub name: &'static str,
    /// Addresses of its `eth0`: with prefix length and the router's address in that network.
    pub addresses: &'static [(&'static str, u8, &'static str)],
    /// More addresses, which the router knows to be here.
    pub extra: &'static [(&'static str, u8)],
}

const CLIENT: Machine =
    Machine { name: "client", addresses: &[("10.77.0.10", 24, "10.77.0.1"), ("fd77::10", 64, "fd77::1")], extra: &[] };
const ATTACKER: Machine = Machine {
    name: "attacker",
    addresses: &[("10.77.9.66", 24, "10.77.9.1"), ("fd77:9::66", 64, "fd77:9::1")],
    extra: &[("203.0.113.66", 32), ("2001:db8:9::66", 128)],
};

/// Everybody in the lab of two protected machines.
pub const MACHINES: [Machine; 4] = [
    CLIENT,
    ATTACKER,
    Machine { name: "web", addresses: &[("10.77.1.10", 24, "10.77.1.1"), ("fd77:1::10", 64, "fd77:1::1")], extra: &[] },
    Machine { name: "db", addresses: &[("10.77.2.10", 24, "10.77.2.1"), ("fd77:2::10", 64, "fd77:2::1")], extra: &[] },
];

/// Everybody in the lab of a fleet.
pub const FLEET: [Machine; 7] = [
    CLIENT,
    ATTACKER,
    Machine { name: "server", addresses: &[("10.77.10.10", 24, "10.77.10.1")], extra: &[] },
    Machine { name: "web1", addresses: &[("10.77.11.10", 24, "10.77.11.1")], extra: &[] },
    Machine { name: "web2", addresses: &[("10.77.12.10", 24, "10.77.12.1")], extra: &[] },
    Machine { name: "db1", addresses: &[("10.77.13.10", 24, "10.77.13.1")], extra: &[] },
    Machine { name: "bastion", addresses: &[("10.77.14.10", 24, "10.77.14.1")], extra: &[] },
];

const ROUTER: &str = "router";

/// The machines that are there now.
pub(crate) fn present() -> impl Iterator<Item = &'static Machine> {
    let others = FLEET.iter().filter(|machine| !MACHINES.contains(machine));
    MACHINES.iter().chain(others).filter(|machine| ns_path(machine.name).exists())
}

fn ns_path(name: &str) -> PathBuf {
    Path::new(NAMES).join(format!("kwlab-{name}"))
}

/// Where a machine of the lab keeps its files.
#[must_use]
pub fn directory(machine: &str) -> PathBuf {
    Path::new(DIRECTORY).join(machine)
}

/// Where an agent of the lab listens.
#[must_use]
pub fn socket(machine: &str) -> PathBuf {
    directory(machine).join("agent.sock")
}

/// Where an agent of the lab keeps its state.
#[must_use]
pub fn state(machine: &str) -> PathBuf {
    directory(machine).join("state")
}

pub(crate) fn said(what: &str) -> impl Fn(io::Error) -> Error + '_ {
    move |error| match error.kind() {
        io::ErrorKind::PermissionDenied => format!("{what}: not permitted; the lab needs root (sudo keepwall lab)"),
        _ => format!("{what}: {error}"),
    }
}

/// Runs `work` on a thread inside a machine.
///
/// # Errors
/// There is no such machine, or what `work` says.
pub fn inside<T: Send>(name: &str, work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    let ns = NetNs::open(ns_path(name)).map_err(|_| format!("the lab is not up: there is no machine `{name}`"))?;
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            ns.enter().map_err(said("entering a namespace"))?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(format!("a thread in {name} failed")))
    })
}

/// Held while a command works on the lab, so that two do not work on it at once.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held, not read")] fs::File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Still held: whoever opened it meanwhile finds that it is no longer the one at the path.
        let _ = fs::remove_file(LOCK);
    }
}

/// Takes the lab for this command.
///
/// # Errors
/// Another command has it.
pub fn lock() -> Result<Lock, Error> {
    loop {
        let file = fs::File::options().create(true).truncate(false).write(true).open(LOCK);
        let file = file.map_err(said("the lab's lock"))?;
        if file.try_lock().is_err() {
            return Err("another `keepwall lab` is at work; wait for it".to_owned());
        }
        let number = |metadata: io::Result<fs::Metadata>| metadata.map(|m| m.ino()).ok();
        if number(file.metadata()) == number(fs::metadata(LOCK)) {
            return Ok(Lock(file));
        }
    }
}

/// Where the lab puts its example if the repository's is not at hand.
pub const EXAMPLE: &str = "/run/keepwall-lab.yaml";

/// [`clear`], and the example.
///
/// # Errors
/// Not root.
pub fn clear_all() -> Result<(), Error> {
    let _ = fs::remove_file(EXAMPLE);
    clear()
}

/// Makes machines and cables. Clears away first what a killed lab left.
///
/// # Errors
/// Not root, or the kernel lacks something.
pub fn make(machines: &[Machine]) -> Result<(), Error> {
    clear()?;
    let made = (|| {
        fs::create_dir_all(NAMES).map_err(said("making the directory of namespaces"))?;
        fs::create_dir_all(DIRECTORY).map_err(said("making the lab's directory"))?;
        // Servers and uplinks run as nobody in particular, and go through here to what is theirs.
        fs::set_permissions(DIRECTORY, fs::Permissions::from_mode(0o755)).map_err(said("the lab's directory"))?;
        new_namespace(ROUTER)?;
        for machine in machines {
            new_namespace(machine.name)?;
            connect(machine)?;
        }
        Ok(())
    })();
    if made.is_err() {
        // Half a lab is none.
        let _ = clear();
    }
    made
}

fn new_namespace(name: &str) -> Result<(), Error> {
    let path = ns_path(name);
    namespace::in_a_new_one(|| {
        namespace::pin(&path)?;
        link::set_up("lo")?;
        // Before any device comes up: no waiting for duplicate address detection, no address from thin air.
        for (key, value) in
            [("ipv6/conf/default/accept_dad", "0"), ("ipv6/conf/all/accept_dad", "0"), ("ipv4/ip_forward", "0")]
        {
            sysctl(key, value)?;
        }
        if name == ROUTER {
            for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                sysctl(key, "1")?;
            }
        }
        Ok(())
    })
    .and_then(|done: io::Result<()>| done)
    .map_err(said("making a namespace"))
}

/// Sets a network knob of the calling thread's namespace.
pub(crate) fn sysctl(key: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/net/{key}"), value)
}

fn connect(machine: &Machine) -> Result<(), Error> {
    let ns = NetNs::open(ns_path(machine.name)).map_err(said("opening a namespace"))?;
    inside(ROUTER, || {
        let work = || -> io::Result<()> {
            link::add_veth(machine.name, "eth0", &ns)?;
            link::set_up(machine.name)?;
            for (_, len, router) in machine.addresses {
                link::add_address(machine.name, parse(router), *len)?;
            }
            Ok(())
        };
        work().map_err(said("laying a cable"))
    })?;
    inside(machine.name, || {
        let work = || -> io::Result<()> {
            link::set_up("eth0")?;
            for (address, len, router) in machine.addresses {
                link::add_address("eth0", parse(address), *len)?;
                let everywhere = if address.contains(':') { "::" } else { "0.0.0.0" };
                link::add_route(parse(everywhere), 0, "eth0", Some(parse(router)))?;
            }
            for (address, len) in machine.extra {
                link::add_address("eth0", parse(address), *len)?;
            }
            Ok(())
        };
        work().map_err(said("configuring a machine"))
    })?;
    inside(ROUTER, || {
        for (address, len) in machine.extra {
            let via = machine.addresses.iter().map(|(a, ..)| *a).find(|a| a.contains(':') == address.contains(':'));
            link::add_route(parse(address), *len, machine.name, via.map(parse)).map_err(said("adding a route"))?;
        }
        Ok(())
    })
}

fn parse(text: &str) -> IpAddr {
    text.parse().expect("an address of this module's own tables")
}

/// Removes everything that a lab made, by name: processes, namespaces (and with them devices and tables), files.
///
/// # Errors
/// Not root.
pub fn clear() -> Result<(), Error> {
    let listeners = fs::read_to_string(directory("serve").join("pid")).unwrap_or_default();
    if let Ok(pid) = listeners.trim().parse() {
        end(pid);
    }
    let present = || present().map(|machine| machine.name);
    // One that is just being started is found by the next look.
    for _ in 0..LOOKS_MAX {
        if !end_inside(present()) {
            break;
        }
    }
    for name in present().chain([ROUTER, crate::coexist::CONTAINER]) {
        let path = ns_path(name);
        if path.exists() && namespace::unpin(&path).is_err() {
            // Never mounted: a lab that was killed between making the file and naming the namespace.
            fs::remove_file(&path).map_err(said("removing a namespace's name"))?;
        }
    }
    match fs::remove_dir_all(DIRECTORY) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(said("removing the lab's directory")(error)),
        _ => Ok(()),
    }
}

/// Ends our programs in these machines, whoever started them. False if there was none.
fn end_inside<'a>(machines: impl Iterator<Item = &'a str>) -> bool {
    let number = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let inside: Vec<_> = machines.filter_map(|name| fs::metadata(ns_path(name)).map(number).ok()).collect();
    let mut some = false;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if fs::metadata(entry.path().join("ns/net")).is_ok_and(|own| inside.contains(&number(own))) {
            some |= end(pid);
        }
    }
    some
}

/// Ends a process if it is one of ours; process ids are used again, so its command line has to say so.
fn end(pid: u32) -> bool {
    let Ok(process) = Process::open(pid) else { return false };
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&arguments).into_owned();
    let ours = text.contains("keepwall") && (text.contains(DIRECTORY) || text.contains("serve"));
    if ours {
        let _ = process.signal(Signal::Kill);
        let _ = process.wait(Some(Duration::from_secs(2)));
    }
    ours
}

/// Cuts or mends a machine's cable, at the router's end.
///
/// # Errors
/// The lab is not up.
pub(crate) fn cable(name: &str, whole: bool) -> Result<(), Error> {
    let turn = if whole { link::set_up } else { link::set_down };
    inside(ROUTER, || turn(name).map_err(said("a cable")))
}

/// Starts an agent in a machine.
///
/// # Errors
/// It does not come up; its last words are in the message.
pub fn start_agent(programs: &Programs, name: &str) -> Result<(), Error> {
    let directory = directory(name);
    fs::create_dir_all(&directory).map_err(said("making a directory"))?;
    let log = fs::File::create(directory.join("agent.log")).map_err(said("making a log"))?;
    let mut command = Command::new(&programs.agent);
    command.arg("run").arg("--state").arg(state(name)).arg("--socket").arg(socket(name));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    inside(name, || process::spawn_detached(&mut command).map_err(said("starting keepwall-agent")))?;
    let started = Instant::now();
    while std::os::unix::net::UnixStream::connect(socket(name)).is_err() {
        if started.elapsed() > AGENT_STARTS_WITHIN {
            let log = fs::read_to_string(directory.join("agent.log")).unwrap_or_default();
            return Err(format!(
                "the agent of {name} does not start: {}",
                log.lines().last().unwrap_or("it said nothing")
            ));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Kills a machine's agent as a crash would.
///
/// # Errors
/// There is none.
pub fn kill_agent(name: &str) -> Result<(), Error> {
    let pid = fs::read_to_string(state(name).join("lock")).map_err(said("reading the agent's lock"))?;
    let pid = pid.trim().parse().map_err(|_| "the agent's lock holds no process id".to_owned())?;
    let process = Process::open(pid).map_err(said("finding the agent"))?;
    process.signal(Signal::Kill).map_err(said("killing the agent"))?;
    process.wait(Some(Duration::from_secs(5))).map_err(said("waiting for the agent's end"))?;
    Ok(())
}

/// Runs the command line in a machine against that machine's agent.
///
/// # Errors
/// It cannot be started; how it ended is in the output.
pub fn keepwall(
    programs: &Programs,
    name: &str,
    posture: &Path,
    arguments: &[&str],
    ssh: Option<&str>,
) -> Result<Output, Error> {
    let mut command = Command::new(&programs.keepwall);
    command.arg("--posture").arg(posture).arg("--socket").arg(socket(name)).args(["--instance", name, "--no-color"]);
    // Whatever server its user has chosen: the lab's machines are meant.
    command.args(["--context", "none"]);
    command.args(arguments).stdin(Stdio::null()).env_remove("SSH_CONNECTION");
    if let Some(ssh) = ssh {
        command.env("SSH_CONNECTION", ssh);
    }
    inside(name, || command.output().map_err(said("starting keepwall")))
}
