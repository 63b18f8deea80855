//! `cargo xtask traffic`: rules are replaced while packets flow, and whoever replaces them is killed; no packet that
//! both versions allow is lost, none that both deny gets through, and no state file is ever damaged.
//!
//! ```text
//!  this thread ── kw0 (TUN) ──▶ input hook ──▶ raw socket ── this thread
//! ```
//!
//! A packet that is written into a TUN device has taken its whole way when the write returns, on the writer's core;
//! the transactions of the other thread or process run on another. So each packet is looked for at once where it
//! would be, and nothing is lost in a queue; a control run without replacements shows it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use keepwall_core::{Place, PortRange, Prefix, Protocol};
use keepwall_host::state::{self, StateDir};
use keepwall_ir::nft::{Table, TableFamily};
use keepwall_nft::Nft;
use keepwall_packets::draw::{Dice, HOST_DEVICE, Path as Way, Trip};
use keepwall_packets::kernel::{Failure, be_a_router, host_device, no_root};
use keepwall_packets::model;
use keepwall_secgroup::intent::{Attachment, Intent, IntentPeer, IntentRule};
use keepwall_secgroup::lower::{TABLE, lower};
use keepwall_secgroup::spec::{GroupType, Policy};
use keepwall_sys::process::die_with_parent;
use keepwall_sys::tun::Device;
use keepwall_sys::{namespace, raw};

use crate::say;

const HELP: &str = "\
cargo xtask traffic [--replacements N] [--pps N] [--kills N]

  --replacements  at each size (100)
  --pps           packets per second, half always allowed, half always denied (51000)
  --kills         kill -9 of the process that replaces, in all (210)";

/// Rules of the policies.
const SIZES: [usize; 3] = [10, 1_000, 10_000];
/// The argument that makes this program the one that is killed.
const CHILD: &str = "--the-one-that-is-killed";
/// Sessions of each kind. Never answered, they stay new, and their table never grows.
const SESSIONS: u16 = 64;
/// Every policy accepts it; UDP.
const ALLOWED: u16 = 5_000;
/// No policy accepts it.
const DENIED: u16 = 5_001;
/// One of two versions accepts the first, the other the second.
const DIFFERING: [u16; 2] = [6_000, 6_001];
/// A child that has not replaced anything by then is stuck.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the state file that the child writes: as large as an intent of some hundred rules.
const STATE_BYTES: usize = 96 * 1024;

/// Runs all of it.
///
/// # Errors
/// A packet leaked or was lost, a file was damaged, or the harness failed.
pub fn run(args: &[String]) -> Result<(), String> {
    if let [name, directory, rules] = args
        && name == CHILD
    {
        let rules = rules.parse().map_err(|_| HELP.to_owned())?;
        return be_killed(Path::new(directory), rules).map_err(|failure| failure.to_string());
    }
    let (mut replacements, mut pps, mut kills) = (100, 51_000, 210);
    for pair in args.chunks(2) {
        let [name, value] = pair else { return Err(HELP.to_owned()) };
        let number: u32 = value.parse().map_err(|_| HELP.to_owned())?;
        match name.as_str() {
            "--replacements" => replacements = number,
            "--pps" => pps = number.max(1),
            "--kills" => kills = number,
            _ => return Err(HELP.to_owned()),
        }
    }
    let mut wrong = 0;
    say("replaced under traffic (IPv4 and IPv6, offered together; counted by packet number)");
    say(format!(
        "{:>7}{:>14}{:>10}{:>11}{:>11}{:>9}{:>7}{:>12}{:>8}",
        "rules", "replacements", "seconds", "allowed", "denied", "leaked", "lost", "packets/s", "churn"
    ));
    for rules in SIZES {
        for replacements in [0, replacements] {
            wrong += in_namespace(|| under_traffic(rules, replacements, pps))?;
        }
    }
    say("\nkill -9 of the process that replaces, with its state files");
    say(format!(
        "{:>7}{:>8}{:>10}{:>14}{:>10}{:>9}{:>7}{:>9}{:>14}{:>9}",
        "rules",
        "kills",
        "replaced",
        "in the middle",
        "packets",
        "leaked",
        "lost",
        "neither",
        "files checked",
        "damaged"
    ));
    // Most at the sizes where a replacement takes long enough to be hit in each of its phases.
    for (rules, share) in SIZES.into_iter().zip([3, 4, 3]) {
        wrong += in_namespace(|| under_kills(rules, kills * share / 10))?;
    }
    match wrong {
        0 => Ok(()),
        wrong => Err(format!("{wrong} packets or files got what neither version says")),
    }
}

fn in_namespace<T: Send>(work: impl FnOnce() -> Result<T, Failure> + Send) -> Result<T, String> {
    let result = namespace::in_a_new_one(work).map_err(Failure::from).and_then(|result| result);
    result.map_err(|failure| match no_root(&failure) {
        true => "needs root: it makes network namespaces".to_owned(),
        false => failure.to_string(),
    })
}

/// Two versions of a policy of so many rules. They share the rules about [`ALLOWED`], which stand in the same map as
/// all others, so that it is always in the map that is replaced.
fn version(rules: usize, number: u32) -> Intent {
    let place = Place::new(&"traffic".into(), 1, 1);
    let rule = |n: usize, port: u16, peer: Prefix| IntentRule {
        id: format!("sgr-{n:016x}"),
        label: format!("traffic/ingress#{n}"),
        place: place.clone(),
        priority: 1,
        policy: Policy::Accept,
        protocol: Protocol::UDP,
        ports: PortRange::new(port, port).ok(),
        source_ports: None,
        peer: IntentPeer::Prefix(peer),
        local: None,
    };
    let odd = number % 2;
    let clients = [Prefix::new(client(false, 0), 24), Prefix::new(client(true, 0), 64)];
    let mut ingress = Vec::new();
    for clients in clients.into_iter().flatten() {
        ingress.push(rule(ingress.len(), ALLOWED, clients));
        ingress.push(rule(ingress.len(), DIFFERING[odd as usize], clients));
    }
    for n in ingress.len() as u32..rules as u32 {
        // Half of the rules differ from one version to the next.
        let port = if n % 2 == 0 { 10_000 } else { 10_001 + odd as u16 };
        let peer = match n % 3 {
            0 => IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, (n >> 16) as u16, n as u16)),
            _ => IpAddr::from(Ipv4Addr::from(0x0b00_0000 + 3 * n)),
        };
        ingress.push(rule(n as usize, port, Prefix::host(peer)));
    }
    let attachment = Attachment {
        name: "host/eth0".into(),
        device: HOST_DEVICE.into(),
        guest: false,
        addresses: vec![],
        mac: None,
        groups: vec!["traffic".into()],
        kind: GroupType::Basic,
        inner: vec![],
        ingress,
        egress: vec![],
    };
    Intent { flow_log_per_s: 0, elements_max: 1_000_000, attachments: vec![attachment], ..Intent::empty("host") }
}

fn table(rules: usize, number: u32) -> Result<Table, Failure> {
    Ok(lower(&version(rules, number), &format!("v{number}"))?.table)
}

fn client(ipv6: bool, n: u16) -> IpAddr {
    if ipv6 {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n).into()
    } else {
        Ipv4Addr::new(198, 51, 100, n as u8).into()
    }
}

/// The wire, the sockets behind the firewall, and what was counted.
struct Traffic {
    device: Device,
    receivers: [raw::Socket; 2],
    /// Never read: with somebody listening the kernel answers nothing.
    _listeners: Vec<UdpSocket>,
    packets: u64,
    count: Count,
}

/// Packets by what should become of them.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    allowed: u64,
    denied: u64,
    leaked: u64,
    lost: u64,
}

impl Traffic {
    fn open() -> Result<Traffic, Failure> {
        be_a_router()?;
        let device = host_device()?;
        let mut listeners = Vec::new();
        for port in [ALLOWED, DENIED, DIFFERING[0], DIFFERING[1]] {
            listeners.push(UdpSocket::bind((Ipv4Addr::new(10, 1, 0, 1), port))?);
            listeners.push(UdpSocket::bind((Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1), port))?);
        }
        let receivers = [raw::Socket::receiver(false, 17)?, raw::Socket::receiver(true, 17)?];
        Ok(Traffic { device, receivers, _listeners: listeners, packets: 0, count: Count::default() })
    }

    /// Sends one packet; true if it has arrived. Families change every two packets, so both kinds of a pair meet both.
    fn passes(&mut self, port: u16) -> Result<bool, Failure> {
        self.packets += 1;
        let number = self.packets as u32;
        let ipv6 = self.packets % 4 >= 2;
        let session = (self.packets % u64::from(SESSIONS)) as u16;
        let destination: IpAddr =
            if ipv6 { Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1).into() } else { Ipv4Addr::new(10, 1, 0, 1).into() };
        let trip = Trip {
            path: Way::Input,
            guest: 1,
            source: client(ipv6, 1 + session),
            destination,
            protocol: 17,
            source_port: 20_000 + session,
            destination_port: port,
            icmp: None,
        };
        let (mut packet, transport) = model::bytes(&trip, number);
        packet.extend(transport);
        self.device.send(&packet)?;
        let mut buffer = [0; 256];
        let mut arrived = false;
        loop {
            let len = match self.receivers[usize::from(ipv6)].recv(&mut buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(arrived),
                Err(error) => return Err(error.into()),
            };
            // Headers of 20 (IPv4 only) and 8 bytes, then the number.
            let at = if ipv6 { 8 } else { 28 };
            match buffer[..len].get(at..at + 4) {
                Some(bytes) if bytes == number.to_be_bytes() => arrived = true,
                _ => return Err("a packet arrived that was not sent now".into()),
            }
        }
    }

    /// One that must arrive, and one that must not.
    fn pair(&mut self) -> Result<(), Failure> {
        self.count.allowed += 1;
        self.count.denied += 1;
        self.count.lost += u64::from(!self.passes(ALLOWED)?);
        self.count.leaked += u64::from(self.passes(DENIED)?);
        Ok(())
    }

    fn quiet(&self) -> Result<(), Failure> {
        let mut buffer = [0; 256];
        while self.device.recv(&mut buffer).is_ok() {}
        Ok(())
    }
}

/// Packets at a steady rate while another thread replaces; what leaked and was lost.
fn under_traffic(rules: usize, replacements: u32, pps: u32) -> Result<u64, Failure> {
    let mut traffic = Traffic::open()?;
    let mut nft = Nft::open()?;
    // Made beforehand, so that the replacements follow one another as fast as the kernel can.
    let versions = [version(rules, 0), version(rules, 1)];
    let mut present = lower(&versions[0], "v0")?.table;
    nft.replace(&present)?;
    let (stop, done) = (AtomicBool::new(false), AtomicU32::new(0));
    let started = Instant::now();
    let applied = std::thread::scope(|scope| -> Result<Duration, Failure> {
        let (stop, done) = (&stop, &done);
        let worker = scope.spawn(move || -> Result<Duration, Failure> {
            let mut busy = Duration::ZERO;
            for number in 1..=replacements {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let next = lower(&versions[number as usize % 2], &format!("v{number}"))?.table;
                let from = Instant::now();
                let applied = nft.replace_from(&present, &next)?;
                busy += from.elapsed();
                if let Some(error) = applied.left_behind {
                    return Err(error.into());
                }
                present = next;
                done.store(number, Ordering::Relaxed);
            }
            Ok(busy)
        });
        // At least two seconds, so that a control run says something.
        let outcome = loop {
            let elapsed = started.elapsed();
            if worker.is_finished() && elapsed > Duration::from_secs(2) {
                break Ok(());
            }
            let due = (elapsed.as_secs_f64() * f64::from(pps)) as u64;
            if traffic.packets >= due {
                std::hint::spin_loop();
                continue;
            }
            if let Err(failure) = traffic.pair() {
                break Err(failure);
            }
        };
        stop.store(true, Ordering::Relaxed);
        let busy = worker.join().map_err(|_| "the thread that replaces has failed")??;
        outcome?;
        Ok(busy)
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let done = done.load(Ordering::Relaxed);
    let rate = traffic.packets as f64 / seconds;
    let Count { allowed, denied, leaked, lost } = traffic.count;
    let what = if replacements == 0 { "control".to_owned() } else { done.to_string() };
    say(format!(
        "{rules:>7}{what:>14}{seconds:>10.1}{allowed:>11}{denied:>11}{leaked:>9}{lost:>7}{rate:>12.0}{:>7.0}%{}",
        100.0 * applied.as_secs_f64() / seconds,
        if rate < f64::from(pps) * 0.98 { "  (slower than asked: the machine is busy)" } else { "" }
    ));
    if done < replacements {
        return Err("fewer replacements than asked".into());
    }
    Ok(leaked + lost)
}

// ---- the one that is killed

/// Adopts the table that is there and replaces it for ever, with a state file before and after each time.
fn be_killed(directory: &Path, rules: usize) -> Result<(), Failure> {
    let state = StateDir::lock(directory)?;
    let mut nft = Nft::open()?;
    let mut number = match state.read("current")? {
        Some(bytes) => content_number(&bytes).ok_or("the state file is not what was written")?,
        None => 0,
    };
    // The table may be one further than the file: this puts it where the file says, or on from there.
    let mut present: Option<Table> = None;
    loop {
        number += 1;
        let next = table(rules, number)?;
        state.write("wanted", &content(number))?;
        match &present {
            Some(present) => nft.replace_from(present, &next)?,
            None => nft.replace(&next)?,
        };
        state.write("current", &content(number))?;
        present = Some(next);
    }
}

/// A file whose every byte follows from its number.
fn content(number: u32) -> Vec<u8> {
    let mut dice = Dice::new(u64::from(number));
    let mut out = format!("{number}\n").into_bytes();
    while out.len() < STATE_BYTES {
        out.extend(dice.bits().to_le_bytes());
    }
    out
}

fn content_number(bytes: &[u8]) -> Option<u32> {
    let line = bytes.split(|byte| *byte == b'\n').next()?;
    let number = std::str::from_utf8(line).ok()?.parse().ok()?;
    (bytes == content(number)).then_some(number)
}

fn start_child(directory: &Path, rules: usize) -> Result<Child, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["traffic", CHILD]).arg(directory).arg(rules.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    // It is born in this thread's namespace.
    Ok(die_with_parent(&mut command).spawn()?)
}

/// What the kills showed.
#[derive(Default)]
struct Kills {
    kills: u32,
    replaced: u32,
    in_the_middle: u32,
    neither: u64,
    files: u32,
    damaged: u32,
}

fn under_kills(rules: usize, kills: u32) -> Result<u64, Failure> {
    let directory = Scratch::new(rules)?;
    let mut traffic = Traffic::open()?;
    let first = table(rules, 0)?;
    // Orphaned at once: the first child adopts it.
    let took = {
        let started = Instant::now();
        Nft::open()?.replace(&first)?;
        started.elapsed()
    };
    StateDir::lock(&directory.0)?.write("current", &content(0))?;
    let mut dice = Dice::new(rules as u64);
    let mut seen = Kills::default();
    let mut before = 0;
    while seen.kills < kills {
        let mut child = start_child(&directory.0, rules)?;
        // From when the child has begun its first replacement, over some replacements.
        let began = wait_for_change(&directory.0, before, &mut traffic, &mut child)?;
        let window = took.as_micros() as usize * 4 + 4_000;
        let at = began + Duration::from_micros(dice.below(window) as u64);
        while Instant::now() < at {
            traffic.pair()?;
        }
        child.kill()?;
        child.wait()?;
        seen.kills += 1;
        before = check(&directory.0, rules, before, &mut traffic, &mut seen)?;
        traffic.quiet()?;
    }
    seen.replaced = before;
    let Count { leaked, lost, .. } = traffic.count;
    say(format!(
        "{rules:>7}{:>8}{:>10}{:>14}{:>10}{leaked:>9}{lost:>7}{:>9}{:>14}{:>9}",
        seen.kills, seen.replaced, seen.in_the_middle, traffic.packets, seen.neither, seen.files, seen.damaged
    ));
    Ok(leaked + lost + seen.neither + u64::from(seen.damaged))
}

/// Sends packets until the child wants a version after `before`.
fn wait_for_change(
    directory: &Path,
    before: u32,
    traffic: &mut Traffic,
    child: &mut Child,
) -> Result<Instant, Failure> {
    let started = Instant::now();
    loop {
        for _ in 0..50 {
            traffic.pair()?;
        }
        if let Some(status) = child.try_wait()? {
            return Err(format!("the process that replaces has ended by itself: {status}").into());
        }
        if number_in(directory, "wanted")?.is_some_and(|wanted| wanted > before) {
            return Ok(Instant::now());
        }
        if started.elapsed() > PATIENCE {
            return Err("the process that replaces does nothing".into());
        }
    }
}

fn number_in(directory: &Path, name: &str) -> Result<Option<u32>, Failure> {
    match state::read(directory, name)? {
        Some(bytes) => content_number(&bytes).map(Some).ok_or_else(|| "a state file is not what was written".into()),
        None => Ok(None),
    }
}

/// After a kill nobody changes anything: the files are whole, and packets get the one version or the other. Returns
/// the version that the file says is current.
fn check(directory: &Path, rules: usize, before: u32, traffic: &mut Traffic, seen: &mut Kills) -> Result<u32, Failure> {
    let mut numbers = BTreeMap::new();
    for name in ["wanted", "current"] {
        seen.files += 1;
        match number_in(directory, name) {
            Ok(Some(number)) => {
                numbers.insert(name, number);
            }
            Ok(None) | Err(_) => seen.damaged += 1,
        }
    }
    let (Some(wanted), Some(current)) = (numbers.get("wanted"), numbers.get("current")) else { return Ok(before) };
    // The file of the version in force is at most one behind the wish.
    if *current < before || wanted < current || *wanted > current + 1 {
        seen.damaged += 1;
    }
    for _ in 0..8 {
        traffic.pair()?;
        let passed = [traffic.passes(DIFFERING[0])?, traffic.passes(DIFFERING[1])?];
        let one_of_two = passed[0] != passed[1];
        let in_force = u32::from(passed[1]);
        let allowed = one_of_two && (in_force == wanted % 2 || in_force == current % 2);
        seen.neither += u64::from(!allowed);
    }
    // What it left half done is still there: parts of two versions, or none that the file knows.
    let observed = Nft::open()?.observe(TableFamily::Inet, TABLE)?.ok_or("the table is gone")?;
    let clean = table(rules, *current)?;
    seen.in_the_middle += u32::from(observed.maps.len() != clean.maps.len() || wanted != current);
    Ok(*current)
}

/// A directory that goes when this does.
struct Scratch(PathBuf);

impl Scratch {
    fn new(rules: usize) -> Result<Scratch, Failure> {
        let path = std::env::temp_dir().join(format!("keepwall-traffic-{}-{rules}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
