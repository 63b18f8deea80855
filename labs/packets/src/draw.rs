//! Policies and packets from a seed: the same seed, the same case, on every machine.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use keepwall_core::{AddrRange, Family, Place, PortRange, Prefix, Protocol};
use keepwall_secgroup::check::{Checked, check};
use keepwall_secgroup::evaluate::Packet;
use keepwall_secgroup::intent::IntentPeer;
use keepwall_secgroup::spec::{
    Direction, Group, GroupType, InnerAccess, Instance, Interface, Named, Peer, PeerRef, Policy, PortList, PortSel,
    PrefixList, Rule, Selector, Spec,
};

/// SplitMix64: small, well spread, and ours to seed.
pub struct Dice(u64);

impl Dice {
    /// The dice that this seed throws.
    #[must_use]
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    /// True once in `n` throws.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of them; the slice is not empty.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// The device of the host's own interface.
pub const HOST_DEVICE: &str = "kw0";
/// The devices of its two guests.
pub const GUEST_DEVICES: [&str; 2] = ["kw1", "kw2"];
/// Number of the host among the drawn instances; the guests follow it.
pub const HOST: usize = 0;

/// Addresses that a kernel takes as anybody's: no loopback, multicast, or "this network".
const BLOCKS4: [&str; 6] =
    ["10.0.0.0/8", "172.16.0.0/12", "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "11.0.0.0/8"];
const BLOCKS6: [&str; 3] = ["2001:db8::/32", "fd00::/16", "2001:db8:1::/48"];

/// One case: a policy that was checked.
pub struct Case {
    /// The policy; instance 0 is the host, 1 and 2 its guests, the rest are members of groups.
    pub checked: Checked,
}

fn place(line: usize) -> Place {
    let file: Arc<str> = Arc::from("drawn.yaml");
    Place::new(&file, u32::try_from(line).unwrap_or(u32::MAX), 1)
}

fn text<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    text.parse().expect("a constant of this module")
}

fn blocks(family: Family) -> Vec<Prefix> {
    match family {
        Family::Ipv4 => BLOCKS4.iter().map(|t| text(t)).collect(),
        Family::Ipv6 => BLOCKS6.iter().map(|t| text(t)).collect(),
    }
}

fn address_in(dice: &mut Dice, block: Prefix) -> IpAddr {
    let range = block.range();
    let span = range.last - range.first;
    let offset = (u128::from(dice.bits()) << 64 | u128::from(dice.bits())) & span;
    // Keep off the ends: a kernel takes the last address of a subnet for a broadcast.
    AddrRange::address(block.family(), range.first + offset.clamp(1, span.saturating_sub(1).max(1)))
}

fn address(dice: &mut Dice, family: Family) -> IpAddr {
    let block = *dice.pick(&blocks(family));
    address_in(dice, block)
}

fn family(dice: &mut Dice) -> Family {
    if dice.one_in(2) { Family::Ipv4 } else { Family::Ipv6 }
}

fn prefix(dice: &mut Dice, family: Family) -> Prefix {
    if dice.one_in(8) {
        return family.everything();
    }
    let block = *dice.pick(&blocks(family));
    let shortest = block.len().saturating_sub(2);
    let len = match dice.below(4) {
        0 => family.bits(),
        1 => block.len(),
        _ => shortest + (dice.below(usize::from(family.bits() - shortest) + 1) as u8),
    };
    let inside = AddrRange::number(address_in(dice, block));
    let host = u32::from(family.bits() - len);
    let first = if host >= 128 { 0 } else { (inside >> host) << host };
    Prefix::new(AddrRange::address(family, first), len).expect("host bits were cleared")
}

const PORTS: [u16; 12] = [1, 22, 25, 53, 80, 443, 3306, 8000, 8080, 32768, 65534, 65535];

fn port_range(dice: &mut Dice) -> PortRange {
    let (a, b) = (*dice.pick(&PORTS), *dice.pick(&PORTS));
    match dice.below(4) {
        0 => PortRange::ALL,
        1 => PortRange::new(a.min(b), a.max(b)).expect("in order"),
        _ => PortRange::new(a, a).expect("not zero"),
    }
}

/// The protocols that a kernel passes on without knowing more about them.
pub const OTHER_PROTOCOLS: [u8; 4] = [47, 50, 89, 253];

fn protocol(dice: &mut Dice) -> Protocol {
    match dice.below(10) {
        0..=3 => Protocol::TCP,
        4..=5 => Protocol::UDP,
        6 => Protocol::ICMP,
        7 => Protocol::ICMPV6,
        8 => Protocol::All,
        _ => Protocol::Number(*dice.pick(&OTHER_PROTOCOLS)),
    }
}

/// Draws case number `n` of a seed: mostly small policies, every 20th with hundreds of rules, every 53rd so large
/// that peers are looked up by class.
#[must_use]
pub fn numbered(dice: &mut Dice, n: usize) -> Case {
    if n % 53 == 7 {
        classes(dice)
    } else if n % 20 == 3 {
        // Rules that overlap at random multiply; what would need ages to compare is drawn again.
        loop {
            let rules = 30 + dice.below(60);
            let case = case(dice, rules);
            if fits(&case) {
                return case;
            }
        }
    } else {
        let rules = 1 + dice.below(12);
        case(dice, rules)
    }
}

/// Elements of one interface that a drawn policy may need.
const ELEMENTS_MAX: u32 = 10_000;

fn fits(case: &Case) -> bool {
    let intent = keepwall_secgroup::intent::resolve(&case.checked, "host");
    intent.is_ok_and(|intent| {
        let intent = keepwall_secgroup::intent::Intent { elements_max: ELEMENTS_MAX, ..intent };
        keepwall_secgroup::lower::lower(&intent, "t").is_ok()
    })
}

/// Entries of a list that makes classes: times its ports, more than a direct map takes.
const CLASS_ENTRIES: usize = 160;
/// Rules, one port each, about such a list. 160 × 200 = 32,000 cells are more than `lower`'s 16,384, also when a
/// third of the hosts lie in blocks of the list.
const CLASS_PORTS: u16 = 200;

/// Draws a policy whose peers the lowering sorts into classes: long prefix lists, many ports each.
#[must_use]
pub fn classes(dice: &mut Dice) -> Case {
    loop {
        let mut drawn = spec(dice, 3);
        let family = family(dice);
        let mut entries: Vec<Prefix> = (0..2 * CLASS_ENTRIES).map(|_| prefix(dice, family)).collect();
        entries.retain(|prefix| prefix.len() > 8);
        entries.sort();
        entries.dedup();
        // A few blocks, some within others, and many single hosts.
        let hosts = (0..CLASS_ENTRIES + 30).map(|_| Prefix::host(address(dice, family)));
        entries = entries.into_iter().rev().take(10).chain(hosts).collect();
        entries.sort();
        entries.dedup();
        drawn.prefix_lists.push(PrefixList {
            name: "many".into(),
            place: place(99),
            description: String::new(),
            family,
            max_entries: 200,
            entries: entries.into_iter().take(200).map(|prefix| (prefix, place(99))).collect(),
        });
        let direction = *dice.pick(&Direction::BOTH);
        let attached = drawn.instances[dice.below(3)].interfaces[0].groups[0].name.clone();
        let Some(group) = drawn.groups.iter_mut().find(|group| group.name == attached) else { continue };
        let rules = if direction == Direction::Ingress { &mut group.ingress } else { &mut group.egress };
        for n in 0..CLASS_PORTS {
            // Every second port is a range; no two touch, so that no two cells become one.
            let first = 1000 + 10 * n;
            let range = PortRange::new(first, first + 3 * (n % 2)).expect("in order");
            rules.push(Rule {
                place: place(100 + usize::from(n)),
                policy: if n % 3 == 0 { Policy::Drop } else { Policy::Accept },
                priority: *dice.pick(&[1, 2, 50]),
                protocol: if n % 5 == 0 { Protocol::UDP } else { Protocol::TCP },
                ports: vec![PortSel::Range(range)],
                source_ports: vec![],
                peers: vec![PeerRef { peer: Peer::PrefixList("many".into()), place: place(100) }],
                local: None,
                description: String::new(),
            });
        }
        if let Ok(checked) = check(drawn) {
            return Case { checked };
        }
    }
}

/// Draws a policy of about `rules` rules a group.
#[must_use]
pub fn case(dice: &mut Dice, rules: usize) -> Case {
    loop {
        // A few draws are refused by the check (a rule of two families, say): draw again.
        if let Ok(checked) = check(spec(dice, rules)) {
            return Case { checked };
        }
    }
}

fn spec(dice: &mut Dice, rules: usize) -> Spec {
    let mut spec = Spec::default();
    spec.settings.limits.rules_per_interface = 1_000_000;
    spec.settings.limits.group_rules_per_group = 1_000_000;
    spec.settings.limits.elements_per_interface = 1_000_000;
    spec.settings.block_outbound_smtp = dice.one_in(4);
    if dice.one_in(3) {
        spec.settings.service_prefixes.push(prefix(dice, Family::Ipv6));
    }
    let advanced = dice.one_in(4);
    let group_names: Vec<String> = (0..2 + dice.below(3)).map(|n| format!("group{n}")).collect();
    for n in 0..1 + dice.below(2) {
        let family = family(dice);
        let mut entries: Vec<Prefix> = (0..dice.below(6)).map(|_| prefix(dice, family)).collect();
        entries.sort();
        entries.dedup();
        spec.prefix_lists.push(PrefixList {
            name: format!("prefixes{n}"),
            place: place(n),
            description: String::new(),
            family,
            max_entries: 10,
            entries: entries.into_iter().map(|prefix| (prefix, place(n))).collect(),
        });
    }
    spec.port_lists.push(PortList {
        name: "ports".into(),
        place: place(0),
        description: String::new(),
        max_entries: 10,
        entries: (0..1 + dice.below(4)).map(|_| (port_range(dice), place(0))).collect(),
    });
    instances(dice, &mut spec, &group_names);
    for (n, name) in group_names.iter().enumerate() {
        let draw = |dice: &mut Dice, spec: &Spec| -> Vec<Rule> {
            let count = if rules == 0 { 0 } else { dice.below(2 * rules) };
            (0..count).filter_map(|line| rule(dice, spec, &group_names, n, advanced, line)).collect()
        };
        let ingress = draw(dice, &spec);
        let egress = draw(dice, &spec);
        let members = if dice.one_in(3) {
            vec![Selector { labels: BTreeMap::from([("tier".into(), format!("t{n}"))]), place: place(0) }]
        } else {
            vec![]
        };
        spec.groups.push(Group {
            name: name.clone(),
            place: place(n),
            description: String::new(),
            kind: if advanced { GroupType::Advanced } else { GroupType::Basic },
            inner_access: (!advanced && dice.one_in(2)).then_some(InnerAccess::Drop),
            members,
            ingress,
            egress,
        });
    }
    spec
}

fn instances(dice: &mut Dice, spec: &mut Spec, groups: &[String]) {
    let named = |dice: &mut Dice, at_least: usize| -> Vec<Named> {
        let mut names: Vec<String> = (0..at_least + dice.below(3)).map(|_| dice.pick(groups).clone()).collect();
        names.sort();
        names.dedup();
        names.into_iter().map(|name| Named { name, place: place(0) }).collect()
    };
    let mut add = |dice: &mut Dice, name: &str, device: &str, guest: bool, addresses: Vec<IpAddr>, at_least| {
        let labels = BTreeMap::from([("tier".into(), format!("t{}", dice.below(4)))]);
        spec.instances.push(Instance {
            name: name.into(),
            place: place(0),
            labels: labels.into(),
            interfaces: vec![Interface {
                name: "eth0".into(),
                place: place(0),
                device: device.into(),
                host: guest.then(|| Named { name: "host".into(), place: place(0) }),
                addresses,
                public: vec![],
                mac: None,
                groups: named(dice, at_least),
            }],
        });
    };
    add(dice, "host", HOST_DEVICE, false, vec![text("10.1.0.1"), text("10.1.0.2"), text("fd00:1::1")], 1);
    add(dice, "guest1", GUEST_DEVICES[0], true, vec![text("10.2.0.2"), text("fd00:2::2")], 1);
    add(dice, "guest2", GUEST_DEVICES[1], true, vec![text("10.3.0.2"), text("fd00:3::2")], 1);
    let mut seen: Vec<IpAddr> = spec_addresses(&["10.1.0.1", "10.1.0.2", "10.2.0.2", "10.3.0.2"]);
    let mut add = |dice: &mut Dice, n: usize, addresses: Vec<IpAddr>| {
        let labels = BTreeMap::from([("tier".into(), format!("t{}", dice.below(4)))]);
        spec.instances.push(Instance {
            name: format!("member{n}"),
            place: place(0),
            labels: labels.into(),
            interfaces: vec![Interface {
                name: "eth0".into(),
                place: place(0),
                device: "eth0".into(),
                host: None,
                addresses,
                public: vec![],
                mac: None,
                groups: named(dice, 0),
            }],
        });
    };
    for n in 0..dice.below(6) {
        let mut addresses = vec![address(dice, Family::Ipv4), address(dice, Family::Ipv6)];
        addresses.retain(|a| !seen.contains(a));
        seen.extend(&addresses);
        add(dice, n, addresses);
    }
}

fn spec_addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|t| text(t)).collect()
}

fn rule(dice: &mut Dice, spec: &Spec, groups: &[String], own: usize, advanced: bool, line: usize) -> Option<Rule> {
    let protocol = protocol(dice);
    let mut peers = Vec::new();
    for _ in 0..1 + dice.below(2) {
        let peer = match dice.below(8) {
            0 => Peer::Any,
            1 if !advanced => {
                let other = dice.below(groups.len());
                if other == own { Peer::Any } else { Peer::Group(groups[other].clone()) }
            }
            2 => Peer::PrefixList(dice.pick(&spec.prefix_lists).name.clone()),
            _ => {
                let family = protocol.family().unwrap_or_else(|| family(dice));
                // Sometimes just a member of some group, to meet the sets.
                let known: Vec<IpAddr> =
                    spec.instances.iter().flat_map(|i| i.interfaces[0].addresses.clone()).collect();
                match known.iter().find(|a| Family::of(**a) == family) {
                    Some(address) if dice.one_in(4) => Peer::Prefix(Prefix::host(*address)),
                    _ => Peer::Prefix(prefix(dice, family)),
                }
            }
        };
        peers.push(PeerRef { peer, place: place(line) });
    }
    let families: Vec<Family> = (peers.iter())
        .filter_map(|p| match &p.peer {
            Peer::Prefix(prefix) => Some(prefix.family()),
            Peer::PrefixList(name) => spec.prefix_lists.iter().find(|l| l.name == *name).map(|l| l.family),
            _ => None,
        })
        .collect();
    if families.iter().any(|f| protocol.family().is_some_and(|p| p != *f)) {
        return None;
    }
    let one_family = families.first().copied().filter(|first| families.iter().all(|f| f == first));
    let local = match one_family.or(protocol.family()) {
        Some(family) if dice.one_in(4) && !peers.iter().any(|p| matches!(&p.peer, Peer::Group(_))) => {
            let all: Vec<IpAddr> = spec.instances[..3].iter().flat_map(|i| i.interfaces[0].addresses.clone()).collect();
            let of_family: Vec<&IpAddr> = all.iter().filter(|a| Family::of(**a) == family).collect();
            let block = if dice.one_in(3) { family.everything() } else { Prefix::host(**dice.pick(&of_family)) };
            // A rule whose two sides are the same block is refused.
            (!peers.iter().any(|p| p.peer == Peer::Prefix(block))).then_some(block)
        }
        _ => None,
    };
    let ports = if protocol.has_ports() {
        (0..1 + dice.below(2))
            .map(|_| if dice.one_in(6) { PortSel::List("ports".into()) } else { PortSel::Range(port_range(dice)) })
            .collect()
    } else {
        vec![]
    };
    let source_ports = if protocol.has_ports() && dice.one_in(5) { vec![port_range(dice)] } else { vec![] };
    Some(Rule {
        place: place(line + 1),
        policy: if dice.one_in(3) { Policy::Drop } else { Policy::Accept },
        // Few priorities, so that ties are common.
        priority: *dice.pick(&[1, 1, 2, 50, 100]),
        protocol,
        ports,
        source_ports,
        peers,
        local,
        description: String::new(),
    })
}

/// The way a packet takes through the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// From outside to the host itself.
    Input,
    /// From the host to outside.
    Output,
    /// From outside to a guest.
    ToGuest,
    /// From a guest to outside.
    FromGuest,
    /// From a guest to the other: both must agree.
    Between,
    /// From a guest to the host itself: the guest's egress decides.
    GuestToHost,
}

impl Path {
    /// All of them.
    pub const ALL: [Path; 6] =
        [Path::Input, Path::Output, Path::ToGuest, Path::FromGuest, Path::Between, Path::GuestToHost];
}

/// A packet on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Trip {
    /// Through what.
    pub path: Path,
    /// Which guest is meant (1 or 2); between guests, the one that sends.
    pub guest: usize,
    /// Sender's address.
    pub source: IpAddr,
    /// Receiver's address.
    pub destination: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// 0 where the protocol has none.
    pub source_port: u16,
    /// 0 where the protocol has none.
    pub destination_port: u16,
    /// ICMP type and code.
    pub icmp: Option<(u8, u8)>,
}

impl Trip {
    /// The packet as an interface with that direction sees it.
    #[must_use]
    pub fn seen(&self, direction: Direction) -> Packet {
        let (peer, local) = match direction {
            Direction::Ingress => (self.source, self.destination),
            Direction::Egress => (self.destination, self.source),
        };
        Packet {
            direction,
            peer,
            local,
            protocol: self.protocol,
            source_port: self.source_port,
            destination_port: self.destination_port,
            icmp: self.icmp,
        }
    }
}

/// What a kernel would not carry as somebody's unicast packet, or would take for its own.
fn carried(case: &Case, address: IpAddr) -> bool {
    let in_blocks = blocks(Family::of(address)).iter().any(|block| {
        let number = AddrRange::number(address);
        block.contains(address) && number != block.range().first && number != block.range().last
    });
    let own = case.checked.spec().instances[..3].iter().any(|i| i.interfaces[0].addresses.contains(&address));
    in_blocks && !own
}

/// Draws a packet; three of four sit on the edge of some rule.
#[must_use]
pub fn trip(dice: &mut Dice, case: &Case, path: Path) -> Trip {
    let spec = case.checked.spec();
    let family = family(dice);
    let guest = 1 + dice.below(GUEST_DEVICES.len());
    let other = 3 - guest;
    let own = |n: usize, dice: &mut Dice| -> IpAddr {
        let all = &spec.instances[n].interfaces[0].addresses;
        let of_family: Vec<IpAddr> = all.iter().copied().filter(|a| Family::of(*a) == family).collect();
        *dice.pick(&of_family)
    };
    // Which interface's rules to aim at, and which way they look.
    let (subject, direction) = match path {
        Path::Input => (0, Direction::Ingress),
        Path::Output => (0, Direction::Egress),
        Path::ToGuest => (guest, Direction::Ingress),
        Path::FromGuest | Path::GuestToHost => (guest, Direction::Egress),
        Path::Between if dice.one_in(2) => (guest, Direction::Egress),
        Path::Between => (other, Direction::Ingress),
    };
    let mut peer = address(dice, family);
    let mut protocol = *dice.pick(&[6, 6, 6, 17, 17, 1, 47, 50, 89, 253]);
    let (source, destination) = (*dice.pick(&PORTS), *dice.pick(&PORTS));
    let mut ports = (edge_port(dice, source), edge_port(dice, destination));
    if !dice.one_in(4) {
        let groups: Vec<&Group> = case.checked.groups_of(subject, 0).collect();
        let group = *dice.pick(&groups);
        let rules = keepwall_secgroup::intent::rules_of(&case.checked, group, direction);
        if !rules.is_empty() {
            let rule = dice.pick(&rules);
            let ranges: Vec<AddrRange> = match &rule.peer {
                IntentPeer::Prefix(prefix) => vec![prefix.range()],
                IntentPeer::Set(name) => {
                    let hosts = name.strip_prefix("group:").map(|g| case.checked.addresses_of(g)).unwrap_or_default();
                    let list = name.strip_prefix("prefix-list:");
                    let entries = spec.prefix_lists.iter().filter(|l| Some(l.name.as_str()) == list);
                    (hosts.iter().map(|a| AddrRange::host(*a)))
                        .chain(entries.flat_map(|l| l.entries.iter().map(|(prefix, _)| prefix.range())))
                        .collect()
                }
            };
            if let Some(range) = ranges.get(dice.below(ranges.len().max(1)))
                && range.family == family
            {
                let number = match dice.below(4) {
                    0 => range.first,
                    1 => range.last,
                    2 => range.first.saturating_sub(1),
                    _ => range.last.saturating_add(1).min(family.max()),
                };
                peer = AddrRange::address(family, number);
            }
            if let Protocol::Number(number) = rule.protocol
                && !dice.one_in(8)
            {
                protocol = number;
            }
            if let Some(range) = rule.ports {
                let bound = if dice.one_in(2) { range.first() } else { range.last() };
                ports.1 = edge_port(dice, bound);
            }
            if let Some(range) = rule.source_ports {
                let bound = if dice.one_in(2) { range.first() } else { range.last() };
                ports.0 = edge_port(dice, bound);
            }
        }
    }
    if !carried(case, peer) {
        peer = address(dice, family);
        if !carried(case, peer) {
            peer = if family == Family::Ipv4 { text("198.51.100.77") } else { text("2001:db8:77::77") };
        }
    }
    let (source, destination) = match path {
        Path::Input => (peer, own(0, dice)),
        Path::Output => (own(0, dice), peer),
        Path::ToGuest => (peer, own(guest, dice)),
        Path::FromGuest => (own(guest, dice), peer),
        Path::Between => (own(guest, dice), own(other, dice)),
        Path::GuestToHost => (own(guest, dice), own(0, dice)),
    };
    // Each family has its own ICMP, and a kernel drops the other's unseen.
    if protocol == 1 && family == Family::Ipv6 {
        protocol = 58;
    } else if protocol == 58 && family == Family::Ipv4 {
        protocol = 1;
    }
    // Mostly echo requests; else a path-MTU error, a timestamp request, neighbour and multicast listener discovery.
    let icmp = match protocol {
        1 => Some(*dice.pick(&[(8, 0), (8, 0), (8, 0), (3, 4), (13, 0)])),
        58 => Some(*dice.pick(&[(128, 0), (128, 0), (128, 0), (2, 0), (135, 0), (143, 0)])),
        _ => None,
    };
    if protocol == 17 && dice.one_in(40) {
        ports = *dice.pick(&[(67, 68), (68, 67), (546, 547), (547, 546)]);
    }
    let (source_port, destination_port) = if protocol == 6 || protocol == 17 { ports } else { (0, 0) };
    Trip { path, guest, source, destination, protocol, source_port, destination_port, icmp }
}

fn edge_port(dice: &mut Dice, port: u16) -> u16 {
    match dice.below(4) {
        0 => port.wrapping_add(1).max(1),
        1 => port.wrapping_sub(1).max(1),
        2 if dice.one_in(4) => 1 + dice.below(65_535) as u16,
        _ => port,
    }
}
