//! Each line of a posture's tests, as real packets.

use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use keepwall_core::{Family, Protocol};
use keepwall_posture::{SourceFile, parse};
use keepwall_secgroup::check::{Checked, check};
use keepwall_secgroup::reach::describe;
use keepwall_secgroup::spec::{Endpoint, PolicyTest};
use keepwall_sys::process;

use crate::machine::{MACHINES, directory, inside, keepwall, make, start_agent};
use crate::probe::{Probe, arrives};
use crate::serve::{TCP_PORTS, UDP_PORTS};
use crate::{Error, Programs};

/// What one packet showed.
#[derive(Clone, Debug)]
pub struct Proof {
    /// The test, as written.
    pub test: String,
    /// The packet, in words.
    pub packet: String,
    /// What the test expects.
    pub allow: bool,
    /// Whether it arrived before anything was enforced.
    pub before: bool,
    /// Whether it arrived with the posture in force.
    pub after: bool,
}

impl Proof {
    /// True if the kernel does what the posture says, and the packet shows it: one that never arrives proves nothing.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.before && self.after == self.allow
    }
}

/// Machines, listeners and agents; nothing is enforced yet.
///
/// # Errors
/// Not root, or something does not start.
pub fn up(programs: &Programs, posture: &Path, mut say: impl FnMut(&str)) -> Result<Checked, Error> {
    let checked = read(posture)?;
    say("making four machines and a router …");
    make(&MACHINES)?;
    start_listeners(programs)?;
    for machine in protected(&checked) {
        say(&format!("starting the agent of {machine} …"));
        start_agent(programs, machine)?;
    }
    Ok(checked)
}

/// Reads the posture that the lab is to enforce.
///
/// # Errors
/// It cannot be read, or is wrong.
pub fn read(posture: &Path) -> Result<Checked, Error> {
    let text = std::fs::read_to_string(posture).map_err(|e| format!("cannot read {}: {e}", posture.display()))?;
    let spec = parse(&[SourceFile::new(&posture.display().to_string(), text)])
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))?;
    check(spec).map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
}

/// Starts what answers in every machine that is there.
pub(crate) fn start_listeners(programs: &Programs) -> Result<(), Error> {
    let mut command = Command::new(&programs.keepwall);
    command.args(["lab", "serve"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    process::spawn_detached(&mut command).map_err(|e| format!("cannot start the lab's listeners: {e}"))?;
    let started = Instant::now();
    let ready = directory("serve").join("pid");
    while !ready.exists() {
        if started.elapsed() > Duration::from_secs(10) {
            return Err("the lab's listeners do not start".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The lab's machines that the posture protects.
#[must_use]
pub fn protected(checked: &Checked) -> Vec<&'static str> {
    let names = checked.spec().instances.iter().map(|i| i.name.as_str());
    names.filter_map(|name| MACHINES.iter().find(|m| m.name == name)).map(|m| m.name).collect()
}

/// Applies the posture on each of its machines.
///
/// # Errors
/// It is refused; the command's own words.
pub fn enforce(programs: &Programs, checked: &Checked, posture: &Path) -> Result<(), Error> {
    for machine in protected(checked) {
        let output =
            keepwall(programs, machine, posture, &["apply", "--yes", "--danger-no-confirm", "--note", "lab"], None)?;
        if !output.status.success() {
            return Err(format!("{machine}: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    Ok(())
}

/// Tries the packets of every test. `before` gives what arrived earlier, in the same order.
///
/// # Errors
/// A packet could not be sent at all.
pub fn prove(checked: &Checked, before: Option<&[Proof]>) -> Result<Vec<Proof>, Error> {
    let mut tries: Vec<(String, bool, Probe)> = Vec::new();
    for test in &checked.spec().tests {
        for probe in packets(checked, test) {
            tries.push((describe(test), test.allow, probe));
        }
    }
    let answers: Vec<Result<bool, Error>> = thread::scope(|scope| {
        let threads: Vec<_> = tries.iter().map(|(_, _, probe)| scope.spawn(|| arrives(probe))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a probe failed".into()))).collect()
    });
    let mut out = Vec::new();
    for (n, ((test, allow, probe), arrived)) in tries.into_iter().zip(answers).enumerate() {
        let arrived = arrived?;
        let before = before.map_or(arrived, |b| b.get(n).is_some_and(|p| p.before));
        out.push(Proof { test, packet: words(&probe), allow, before, after: arrived });
    }
    Ok(out)
}

fn words(probe: &Probe) -> String {
    let protocol = Protocol::Number(probe.protocol);
    let port = if protocol.has_ports() { format!(" {}", probe.port) } else { String::new() };
    format!("{protocol}{port} {} → {}", probe.source, probe.destination)
}

/// The machine that has an address, if the lab has one.
fn owner(address: IpAddr) -> Option<&'static str> {
    (MACHINES.iter())
        .find(|machine| {
            let own = machine.addresses.iter().map(|(a, ..)| *a).chain(machine.extra.iter().map(|(a, _)| *a));
            own.filter_map(|a| a.parse::<IpAddr>().ok()).any(|a| a == address)
        })
        .map(|machine| machine.name)
}

/// The addresses in the lab that an endpoint stands for.
fn addresses(checked: &Checked, end: &Endpoint) -> Vec<IpAddr> {
    let lab = MACHINES.iter().flat_map(|m| {
        m.addresses.iter().map(|(a, ..)| *a).chain(m.extra.iter().map(|(a, _)| *a)).filter_map(|a| a.parse().ok())
    });
    match end {
        Endpoint::Internet => MACHINES[1].extra.iter().filter_map(|(address, _)| address.parse().ok()).collect(),
        Endpoint::Prefix(prefix) => lab.filter(|address| prefix.contains(*address)).collect(),
        Endpoint::Name(name) => {
            let spec = checked.spec();
            let list = spec.prefix_lists.iter().find(|l| l.name == *name);
            let mut out: Vec<IpAddr> = (spec.instances.iter().enumerate())
                .flat_map(|(i, instance)| instance.interfaces.iter().enumerate().map(move |(n, x)| (i, n, instance, x)))
                .filter(|(i, n, instance, _)| {
                    instance.name == *name || checked.groups_of(*i, *n).any(|g| g.name == *name)
                })
                .flat_map(|(_, _, _, interface)| interface.addresses.iter().copied())
                .collect();
            if out.is_empty() {
                out = lab.filter(|a| list.is_some_and(|l| l.entries.iter().any(|(p, _)| p.contains(*a)))).collect();
            }
            out
        }
    }
}

/// The packets that show a test: each pair of addresses of one family, at the test's port or, for all ports, at those
/// that something listens on.
fn packets(checked: &Checked, test: &PolicyTest) -> Vec<Probe> {
    let mut out = Vec::new();
    let protocols: Vec<u8> = match test.protocol {
        Protocol::All => vec![6, 17, 1, 58],
        Protocol::Number(number) => vec![number],
    };
    for source in addresses(checked, &test.from) {
        for destination in addresses(checked, &test.to) {
            let (Some(from), Some(to)) = (owner(source), owner(destination)) else { continue };
            if Family::of(source) != Family::of(destination) || from == to {
                continue;
            }
            for protocol in &protocols {
                if Protocol::Number(*protocol).family().is_some_and(|f| f != Family::of(source)) {
                    continue;
                }
                let listening: &[u16] = match protocol {
                    6 => &TCP_PORTS,
                    17 => &UDP_PORTS,
                    _ => &[0],
                };
                let first = test.ports.map(|r| [r.first()]);
                let ports = match (&first, Protocol::Number(*protocol).has_ports()) {
                    (Some(first), true) => first.as_slice(),
                    _ => listening,
                };
                out.extend(ports.iter().map(|port| Probe {
                    from,
                    source,
                    destination,
                    protocol: *protocol,
                    port: *port,
                }));
            }
        }
    }
    out
}

/// Runs a program in a machine with this terminal.
///
/// # Errors
/// There is no such machine or program.
pub fn exec(machine: &str, command: &[String]) -> Result<i32, Error> {
    let Some((program, arguments)) = command.split_first() else { return Err("nothing to run".into()) };
    inside(machine, || {
        let status = Command::new(program).args(arguments).status().map_err(|e| format!("{program}: {e}"))?;
        Ok(status.code().unwrap_or(1))
    })
}
