//! `cargo xtask bench packet-path`: what a packet and an update cost, for our tables and for the linear lists that
//! most tools write, in one run and as ratios.
//!
//! Every candidate has a network namespace of its own with a TUN device. A packet written into one takes its whole
//! way within the write, on the writer's time: so the thread's CPU clock around many writes is the cost of the path,
//! and neighbours that take the CPU away are not counted (those that empty its caches are, hence the median of many
//! interleaved rounds). All packets end in the same place, a chain behind all candidates that drops everything.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use keepwall_core::{Place, PortRange, Prefix, Protocol};
use keepwall_ir::nft::Table;
use keepwall_nft::Nft;
use keepwall_packets::draw::{Dice, HOST_DEVICE, Path, Trip};
use keepwall_packets::kernel::{Failure, be_a_router, host_device, no_root};
use keepwall_packets::model;
use keepwall_secgroup::intent::{Attachment, Intent, IntentPeer, IntentRule};
use keepwall_secgroup::lower::lower;
use keepwall_secgroup::spec::{GroupType, Policy};
use keepwall_sys::namespace::{self, NetNs};
use keepwall_sys::tun::Device;
use rustix::time::{ClockId, clock_gettime};

use crate::{fleet, say};

const HELP: &str = "\
cargo xtask bench packet-path [--rounds N]
cargo xtask bench fleet [--agents N]

  --rounds  interleaved measurements of every candidate, the median counts (15)
  --agents  machines that call one server (10000)";

/// Rules of the lists.
const SIZES: [usize; 4] = [10, 100, 1_000, 10_000];
/// Different packets of each kind, sent in turn.
const PACKETS: usize = 1_024;
/// One measurement takes about this much of the thread's time.
const SLICE: Duration = Duration::from_millis(20);
/// Updates of each kind; the median counts.
const UPDATES: usize = 7;
/// Members of the group that one more joins.
const MEMBERS: u32 = 5_000;
/// Behind every candidate: all packets end here, whoever let them pass.
const SINK: &str = "table inet sink { chain input { type filter hook input priority 300; policy drop; }; }\n";

/// Runs it.
///
/// # Errors
/// A goal is missed, a tool is not installed, or the harness failed.
pub fn run(args: &[String]) -> Result<(), String> {
    let rounds = match args {
        [what, rest @ ..] if what == "fleet" => return fleet::bench(rest),
        [what] if what == "packet-path" => 15,
        [what, name, number] if what == "packet-path" && name == "--rounds" => {
            number.parse::<usize>().map_err(|_| HELP.to_owned())?.max(9)
        }
        _ => return Err(HELP.to_owned()),
    };
    let explain = |failure: Failure| match no_root(&failure) {
        true => "needs root: it makes network namespaces".to_owned(),
        false => failure.to_string(),
    };
    if cfg!(debug_assertions) {
        say("this is a debug build: it works, slowly; for numbers, `cargo run --release -p xtask -- ...`");
    }
    let mut goals = per_packet(rounds).map_err(explain)?;
    goals.extend(per_update().map_err(explain)?);
    say("\ngoals");
    for goal in &goals {
        say(format!(
            "  {} {:<66}{:>9.2}  (wanted {})",
            if goal.met { "✓" } else { "✗" },
            goal.what,
            goal.is,
            goal.wanted
        ));
    }
    match goals.iter().filter(|goal| !goal.met).count() {
        0 => Ok(()),
        missed => Err(format!("{missed} goals are missed")),
    }
}

struct Goal {
    what: String,
    is: f64,
    wanted: String,
    met: bool,
}

fn at_most(what: impl Into<String>, is: f64, most: f64) -> Goal {
    Goal { what: what.into(), is, wanted: format!("at most {most}"), met: is <= most }
}

fn at_least(what: impl Into<String>, is: f64, least: f64) -> Goal {
    Goal { what: what.into(), is, wanted: format!("at least {least}"), met: is >= least }
}

// ---- rules

/// Rule `n` accepts UDP to this port from this source; no two are alike.
fn source(n: usize) -> Ipv4Addr {
    // Spread, not a block: neighbours in a list are seldom neighbours in the address space. Multiples of the golden
    // ratio stay apart, so that no two of some ten thousand rules share a source.
    let spread = (n as u32).wrapping_mul(2_654_435_761) >> 8;
    Ipv4Addr::from(0x0a80_0000 | (spread & 0x007f_ffff))
}

fn port(n: usize) -> u16 {
    1_024 + (n % 50_000) as u16
}

/// Rule sets that are measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Each rule: one host, one port.
    Hosts,
    /// Each rule: one port, from anywhere.
    AnySource,
}

fn intent(rules: usize, shape: Shape) -> Intent {
    let place = Place::new(&"bench".into(), 1, 1);
    let ingress = (0..rules)
        .map(|n| IntentRule {
            id: format!("sgr-{n:016x}"),
            label: format!("bench/ingress#{n}"),
            place: place.clone(),
            priority: 1,
            policy: Policy::Accept,
            protocol: Protocol::UDP,
            // Every second port: neighbours would become one element.
            ports: match shape {
                Shape::Hosts => PortRange::new(port(n), port(n)).ok(),
                Shape::AnySource => PortRange::new(any_port(n), any_port(n)).ok(),
            },
            source_ports: None,
            peer: IntentPeer::Prefix(match shape {
                Shape::Hosts => Prefix::host(source(n).into()),
                Shape::AnySource => keepwall_core::Family::Ipv4.everything(),
            }),
            local: None,
        })
        .collect();
    attached(ingress)
}

/// Ports of single rules apart from each other, or they would become one element.
fn any_port(n: usize) -> u16 {
    1_024 + 2 * (n % 30_000) as u16
}

fn attached(ingress: Vec<IntentRule>) -> Intent {
    let attachment = Attachment {
        name: "host/eth0".into(),
        device: HOST_DEVICE.into(),
        guest: false,
        addresses: vec![],
        mac: None,
        groups: vec!["bench".into()],
        kind: GroupType::Basic,
        inner: vec![],
        ingress,
        egress: vec![],
    };
    // As the agent loads it while nobody runs `keepwall flows`.
    Intent { flow_log_per_s: 0, elements_max: 1_000_000, attachments: vec![attachment], ..Intent::empty("host") }
}

fn ours(rules: usize, shape: Shape, tag: &str) -> Result<Table, Failure> {
    Ok(lower(&intent(rules, shape), tag)?.table)
}

/// As a user writes it: established first, one rule a line, drop at the end.
fn nft_linear(rules: usize, shape: Shape) -> String {
    let mut out =
        String::from("table inet linear {\n chain input { type filter hook input priority 0; policy accept;\n");
    out.push_str("  ct state established,related accept\n  ct state invalid drop\n");
    for n in 0..rules {
        out.push_str(&match shape {
            Shape::Hosts => format!("  ip saddr {} udp dport {} accept\n", source(n), port(n)),
            Shape::AnySource => format!("  udp dport {} accept\n", any_port(n)),
        });
    }
    out.push_str("  drop\n }\n}\n");
    out
}

fn nft_map(rules: usize) -> String {
    let mut out = String::from(
        "table inet mapped {\n map m { type ipv4_addr . inet_proto . inet_service : verdict; flags interval; counter; elements = {\n",
    );
    for n in 0..rules {
        out.push_str(&format!("  {} . udp . {} : accept,\n", source(n), port(n)));
    }
    out.push_str(" } }\n chain input { type filter hook input priority 0; policy accept;\n");
    out.push_str("  ct state established,related accept\n  ct state invalid drop\n");
    out.push_str("  ip saddr . meta l4proto . udp dport vmap @m\n  drop\n }\n}\n");
    out
}

fn iptables_linear(rules: usize, shape: Shape) -> String {
    let mut out = String::from("*filter\n:INPUT ACCEPT [0:0]\n");
    out.push_str("-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n");
    out.push_str("-A INPUT -m conntrack --ctstate INVALID -j DROP\n");
    for n in 0..rules {
        out.push_str(&match shape {
            Shape::Hosts => format!("-A INPUT -s {}/32 -p udp -m udp --dport {} -j ACCEPT\n", source(n), port(n)),
            Shape::AnySource => format!("-A INPUT -p udp -m udp --dport {} -j ACCEPT\n", any_port(n)),
        });
    }
    out.push_str("-A INPUT -j DROP\nCOMMIT\n");
    out
}

/// Runs a tool in the namespace of this thread.
fn feed(command: &str, args: &[&str], input: &str) -> Result<Duration, Failure> {
    let started = Instant::now();
    let mut child = Command::new(command)
        .args(args)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("`{command}` (packages nftables and iptables): {error}"))?;
    child.stdin.take().ok_or("no pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    match output.status.success() {
        true => Ok(started.elapsed()),
        false => Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

// ---- per packet

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Just the sink.
    Nothing,
    /// A rule about established sessions: conntrack works, and nothing is decided.
    Conntrack,
    Ours,
    Nft,
    Iptables,
}

struct Candidate {
    kind: Kind,
    shape: Shape,
    rules: usize,
    device: Device,
    /// While it is held the namespace lives.
    _space: NetNs,
    /// Nanoseconds a packet, one for each round: packets that no rule matches, and packets for the last rule.
    miss: Vec<f64>,
    last: Vec<f64>,
}

impl Candidate {
    fn new(kind: Kind, shape: Shape, rules: usize) -> Result<Candidate, Failure> {
        namespace::in_a_new_one(|| -> Result<Candidate, Failure> {
            be_a_router()?;
            let device = host_device()?;
            feed("nft", &["-f", "-"], SINK)?;
            match kind {
                Kind::Nothing => {}
                Kind::Conntrack => {
                    let text = "table inet tracked { chain input { type filter hook input priority 0; \
                                ct state established,related accept; ct state invalid drop; }; }\n";
                    feed("nft", &["-f", "-"], text)?;
                }
                Kind::Ours => {
                    Nft::open()?.replace(&ours(rules, shape, "v0")?)?;
                }
                Kind::Nft => {
                    feed("nft", &["-f", "-"], &nft_linear(rules, shape))?;
                }
                Kind::Iptables => {
                    feed("iptables-nft-restore", &[], &iptables_linear(rules, shape))?;
                }
            }
            Ok(Candidate { kind, shape, rules, device, _space: NetNs::current()?, miss: Vec::new(), last: Vec::new() })
        })?
    }

    /// Nanoseconds of this thread for one of these packets.
    fn measure(&self, packets: &[Vec<u8>], count: usize) -> Result<f64, Failure> {
        let before = thread_ns();
        for packet in packets.iter().cycle().take(count) {
            self.device.send(packet)?;
        }
        Ok((thread_ns() - before) as f64 / count as f64)
    }

    fn round(&mut self) -> Result<(), Failure> {
        let miss = missing(self.shape);
        let last = for_rule(self.rules.max(1) - 1, self.shape);
        // How many fit the slice; they also warm the caches.
        let rough = self.measure(&miss, 32)?;
        let count = ((SLICE.as_nanos() as f64 / rough.max(1.0)) as usize).clamp(64, 20_000);
        let value = self.measure(&miss, count)?;
        self.miss.push(value);
        let value = self.measure(&last, count)?;
        self.last.push(value);
        Ok(())
    }
}

fn thread_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn udp(source: Ipv4Addr, source_port: u16, destination_port: u16) -> Vec<u8> {
    let trip = Trip {
        path: Path::Input,
        guest: 1,
        source: source.into(),
        destination: Ipv4Addr::new(10, 1, 0, 1).into(),
        protocol: 17,
        source_port,
        destination_port,
        icmp: None,
    };
    let (mut packet, transport) = model::bytes(&trip, 0);
    packet.extend(transport);
    packet
}

/// Packets that no rule matches, from everywhere, among them the rules' own sources to other ports.
fn missing(shape: Shape) -> Vec<Vec<u8>> {
    let mut dice = Dice::new(42);
    (0..PACKETS)
        .map(|n| {
            let from = match (shape, n % 4) {
                (Shape::Hosts, 0) => source(dice.below(10_000)),
                _ => Ipv4Addr::from(0x0b00_0000 + (dice.bits() & 0xff_ffff) as u32),
            };
            udp(from, 1_024 + dice.below(60_000) as u16, 61_500 + dice.below(4_000) as u16)
        })
        .collect()
}

fn for_rule(n: usize, shape: Shape) -> Vec<Vec<u8>> {
    let port = if shape == Shape::Hosts { port(n) } else { any_port(n) };
    (0..PACKETS).map(|i| udp(source(n), 1_024 + i as u16, port)).collect()
}

fn per_packet(rounds: usize) -> Result<Vec<Goal>, Failure> {
    let mut all =
        vec![Candidate::new(Kind::Nothing, Shape::Hosts, 0)?, Candidate::new(Kind::Conntrack, Shape::Hosts, 0)?];
    for rules in SIZES {
        for kind in [Kind::Ours, Kind::Nft, Kind::Iptables] {
            all.push(Candidate::new(kind, Shape::Hosts, rules)?);
        }
        all.push(Candidate::new(Kind::Ours, Shape::AnySource, rules)?);
    }
    for _ in 0..rounds {
        for candidate in &mut all {
            candidate.round()?;
        }
    }
    let of = |kind: Kind, shape: Shape, rules: usize| -> (f64, f64) {
        let found = all.iter().find(|c| (c.kind, c.shape, c.rules) == (kind, shape, rules));
        found.map_or((f64::NAN, f64::NAN), |c| (median(&c.miss), median(&c.last)))
    };
    let nothing = of(Kind::Nothing, Shape::Hosts, 0).0;
    let conntrack = of(Kind::Conntrack, Shape::Hosts, 0).0;
    say(format!(
        "ns of CPU per packet: new UDP sessions through a TUN device and the input hook, median of {rounds} rounds"
    ));
    say(format!("no table at all: {nothing:.0}; conntrack and no other rule: {conntrack:.0}"));
    say(format!("\n{:<34}{:>10}{:>10}{:>10}{:>10}", "no rule matches", 10, 100, "1,000", "10,000"));
    let rows = [
        ("ours, a host and a port each", Kind::Ours, Shape::Hosts),
        ("nft linear", Kind::Nft, Shape::Hosts),
        ("iptables-nft linear", Kind::Iptables, Shape::Hosts),
        ("ours, a port from anywhere each", Kind::Ours, Shape::AnySource),
    ];
    for (pick, last) in [(0, false), (1, true)] {
        if last {
            say(format!("{:<34}", "the last rule matches"));
        }
        for (name, kind, shape) in rows {
            let value = |rules| if pick == 0 { of(kind, shape, rules).0 } else { of(kind, shape, rules).1 };
            let values = SIZES.map(value);
            say(format!("{name:<34}{:>10.0}{:>10.0}{:>10.0}{:>10.0}", values[0], values[1], values[2], values[3]));
        }
    }
    say(format!("\n{:<34}{:>10}{:>10}{:>10}{:>10}", "above conntrack alone", 10, 100, "1,000", "10,000"));
    let above = |kind: Kind, rules: usize| of(kind, Shape::Hosts, rules).0 - conntrack;
    for (name, kind) in [("nft linear / ours", Kind::Nft), ("iptables-nft linear / ours", Kind::Iptables)] {
        let ratios = SIZES.map(|rules| above(kind, rules) / above(Kind::Ours, rules));
        say(format!("{name:<34}{:>10.1}{:>10.1}{:>10.1}{:>10.1}", ratios[0], ratios[1], ratios[2], ratios[3]));
    }
    let growth = above(Kind::Ours, 10_000) / above(Kind::Ours, 10);
    let whole = (of(Kind::Ours, Shape::Hosts, 10_000).0 - nothing) / (of(Kind::Ours, Shape::Hosts, 10).0 - nothing);
    let mut goals = vec![
        at_most("10,000 rules cost, of 10 rules (above conntrack alone)", growth, 6.0),
        at_most("10,000 rules cost, of 10 rules (above no table at all)", whole, 6.0),
    ];
    for (rules, least) in [(1_000, 100.0), (10_000, 300.0)] {
        for (name, kind) in [("nft", Kind::Nft), ("iptables-nft", Kind::Iptables)] {
            let what = format!("{name} linear / ours at {rules} rules (above conntrack alone)");
            goals.push(at_least(what, above(kind, rules) / above(Kind::Ours, rules), least));
        }
    }
    Ok(goals)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

// ---- per update

fn per_update() -> Result<Vec<Goal>, Failure> {
    const RULES: usize = 10_000;
    let fresh = |text: String, name: &str| format!("table inet {name}\ndelete table inet {name}\n{text}");
    let linear = fresh(nft_linear(RULES, Shape::Hosts), "linear");
    let mapped = fresh(nft_map(RULES), "mapped");
    let policy = intent(RULES, Shape::Hosts);
    let [mut whole, mut lowering, mut by_list, mut by_map] = [const { Vec::new() }; 4];
    // Each in a namespace of its own, as a table beside it would slow its transactions down.
    let mut state: Option<(Nft, Table)> = None;
    namespace::in_a_new_one(|| -> Result<(), Failure> {
        let spaces = [NetNs::unshare()?, NetNs::unshare()?, NetNs::unshare()?];
        for number in 0..=UPDATES {
            spaces[0].enter()?;
            let started = Instant::now();
            let next = lower(&policy, &format!("v{number}"))?.table;
            let lowered = started.elapsed();
            match &mut state {
                None => {
                    let mut nft = Nft::open()?;
                    nft.replace(&next)?;
                    state = Some((nft, next));
                }
                Some((nft, present)) => {
                    let applied = nft.replace_from(present, &next)?;
                    whole.push(ms(started.elapsed()));
                    lowering.push(ms(lowered));
                    applied.left_behind.map_or(Ok(()), Err)?;
                    *present = next;
                }
            }
            spaces[1].enter()?;
            let took = feed("nft", &["-f", "-"], &linear)?;
            spaces[2].enter()?;
            let took_map = feed("nft", &["-f", "-"], &mapped)?;
            if number > 0 {
                by_list.push(ms(took));
                by_map.push(ms(took_map));
            }
        }
        Ok(())
    })??;
    let (whole, lowering, by_list, by_map) = (median(&whole), median(&lowering), median(&by_list), median(&by_map));
    say(format!("\nreplacing all of {RULES} rules, ms (median of {UPDATES}; everything from policy to kernel)"));
    say(format!("{:<52}{whole:>9.1}  (of which lowering {lowering:.1})", "ours, without losing a packet"));
    say(format!("{:<52}{by_list:>9.1}", "nft -f, linear rules, one transaction"));
    say(format!("{:<52}{by_map:>9.1}", "nft -f, one verdict map, one transaction"));
    say(format!(
        "ours / nft -f: linear {:.2}, one verdict map (which loses packets while it is replaced) {:.2}",
        whole / by_list,
        whole / by_map
    ));
    let (join, leave, join_all) = membership()?;
    say(format!("\none member joins or leaves a group of {MEMBERS}, ms (median of {UPDATES}; IPv4)"));
    say(format!("{:<52}{:>9.2}  (with lowering {:.1})", "joins: one port is allowed from the group", join.0, join.1));
    say(format!("{:<52}{:>9.2}  (with lowering {:.1})", "leaves", leave.0, leave.1));
    say(format!(
        "{:<52}{:>9.2}  (with lowering {:.1})",
        "joins: its members may talk to each other (all)", join_all.0, join_all.1
    ));
    Ok(vec![
        at_most("full replacement / nft -f, linear rules", whole / by_list, 0.5),
        at_most("one member joins, ms", join.0, 5.0),
        at_most("one member leaves, ms", leave.0, 5.0),
        at_most("one member joins a group whose members may talk to each other, ms", join_all.0, 5.0),
    ])
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

/// Milliseconds of the kernel alone, and with lowering.
type Took = (f64, f64);

fn group(members: u32, inner: bool) -> Intent {
    let rule = IntentRule {
        id: "sgr-0".into(),
        label: "bench/ingress#1".into(),
        place: Place::new(&"bench".into(), 1, 1),
        priority: 1,
        policy: Policy::Accept,
        protocol: Protocol::TCP,
        ports: PortRange::new(443, 443).ok(),
        source_ports: None,
        peer: IntentPeer::Set("group:many".into()),
        local: None,
    };
    let mut intent = attached(if inner { vec![] } else { vec![rule] });
    if inner {
        intent.attachments[0].inner.push("group:many".into());
    }
    // Every third address, so that no two members are neighbours.
    let host = |n: u32| Prefix::host(IpAddr::from(Ipv4Addr::from(0x0a80_0000 + 3 * n)));
    intent.sets.insert("group:many".into(), (0..members).map(host).collect());
    intent
}

/// Joining and leaving, where one rule is about the group; and joining where its members may talk to each other.
fn membership() -> Result<(Took, Took, Took), Failure> {
    // Joins and leaves in turn, in the table that is there; the first of each only warms up.
    let changes = |inner: bool| -> Result<[Took; 2], Failure> {
        let mut times = [const { (Vec::new(), Vec::new()) }; 2];
        namespace::in_a_new_one(|| -> Result<(), Failure> {
            let mut nft = Nft::open()?;
            let mut tag = "v0".to_owned();
            let mut present = lower(&group(MEMBERS, inner), &tag)?;
            nft.replace(&present.table)?;
            for number in 0..2 * (UPDATES + 1) {
                let joins = number % 2 == 0;
                let intent = group(MEMBERS + u32::from(joins), inner);
                let started = Instant::now();
                let mut next = lower(&intent, &tag)?;
                let lowered = started.elapsed();
                // As the agent does it.
                if present.differs_in_place(&next) {
                    nft.change_elements(&present.table, &next.table)?;
                } else {
                    let fresh = format!("w{number}");
                    next = next.retagged(&tag, &fresh);
                    tag = fresh;
                    nft.replace_from(&present.table, &next.table)?;
                }
                let took = started.elapsed();
                present = next;
                if number >= 2 {
                    let (kernel, all) = &mut times[number % 2];
                    kernel.push(ms(took - lowered));
                    all.push(ms(took));
                }
            }
            Ok(())
        })??;
        Ok(times.map(|(kernel, all)| (median(&kernel), median(&all))))
    };
    let ([join, leave], [join_inner, _]) = (changes(false)?, changes(true)?);
    Ok((join, leave, join_inner))
}
