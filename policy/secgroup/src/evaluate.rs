//! The reference: what the semantics say about one packet, and which rule says it.
//!
//! Written from the cloud's documents (semantics §1.2, §1.3) and not from the compiler: it walks groups and
//! rules as they were declared, sorts, and takes the first match. It is slow and plain on purpose; `explain`
//! shows its answers and every other evaluator is tested against it.
//!
//! Not seen here: established sessions (they pass without a rule), packets that conntrack calls invalid (they
//! are dropped), and spoofed packets of guests (they never get as far as a group).

use std::net::IpAddr;

use keepwall_core::{Family, Place, Prefix};

use crate::check::Checked;
use crate::expand;
use crate::intent::{rule_id, rule_label};
use crate::spec::{Direction, Group, GroupType, InnerAccess, Peer, Policy};

/// The first packet of a session, as an interface sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    /// Which way it goes, seen from the interface.
    pub direction: Direction,
    /// The other side's address.
    pub peer: IpAddr,
    /// This side's private address.
    pub local: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// Source port; 0 where the protocol has none.
    pub source_port: u16,
    /// Destination port; 0 where the protocol has none.
    pub destination_port: u16,
    /// ICMP type and code, for ICMP and ICMPv6.
    pub icmp: Option<(u8, u8)>,
}

/// An answer, never an error: which way, and why.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes.
    Allow(Reason),
    /// It is dropped, silently.
    Deny(Reason),
}

impl Verdict {
    /// True if the packet passes.
    #[must_use]
    pub fn is_allow(&self) -> bool {
        matches!(self, Verdict::Allow(_))
    }

    /// Why.
    #[must_use]
    pub fn reason(&self) -> &Reason {
        match self {
            Verdict::Allow(reason) | Verdict::Deny(reason) => reason,
        }
    }
}

/// Why a packet passes or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A rule decided.
    Rule {
        /// Stable id.
        id: String,
        /// `group/ingress#2`.
        label: String,
        /// Where it was written.
        place: Place,
    },
    /// Peer and interface share this basic group, whose members may talk to each other.
    IntraGroup(String),
    /// No rule matched; this is what the group type does then.
    Default(GroupType),
    /// Groups never block this kind of packet.
    NeverBlocked(&'static str),
    /// The destination is a service prefix of the settings.
    ServicePrefix(Prefix),
    /// Outbound TCP 25 is blocked by the settings.
    OutboundSmtp,
    /// The interface has no group, so Keepwall leaves it alone.
    NotProtected,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::Rule { label, place, .. } => write!(f, "rule {label} ({place})"),
            Reason::IntraGroup(group) => write!(f, "intra-group accept of basic group {group}"),
            Reason::Default(kind) => {
                let kind = if *kind == GroupType::Basic { "basic" } else { "advanced" };
                write!(f, "no rule matches: the default of {kind} groups")
            }
            Reason::NeverBlocked(what) => write!(f, "{what}, which security groups never block"),
            Reason::ServicePrefix(prefix) => write!(f, "{prefix} is a service prefix (settings.service_prefixes)"),
            Reason::OutboundSmtp => f.write_str("settings.block_outbound_smtp"),
            Reason::NotProtected => f.write_str("the interface is in no security group"),
        }
    }
}

/// What happens to the packet at interface number `interface` of instance number `instance`.
///
/// # Panics
/// Never for indexes that exist in the spec.
pub fn evaluate(checked: &Checked, instance: usize, interface: usize, packet: &Packet) -> Verdict {
    let spec = checked.spec();
    let groups: Vec<&Group> = checked.groups_of(instance, interface).collect();
    let Some(first) = groups.first() else { return Verdict::Allow(Reason::NotProtected) };
    let guest = spec.instances[instance].interfaces[interface].host.is_some();

    if let Some(what) = never_blocked(packet, guest) {
        return Verdict::Allow(Reason::NeverBlocked(what));
    }
    if packet.direction == Direction::Egress {
        if let Some(prefix) = spec.settings.service_prefixes.iter().find(|prefix| prefix.contains(packet.peer)) {
            return Verdict::Allow(Reason::ServicePrefix(*prefix));
        }
        if spec.settings.block_outbound_smtp && packet.protocol == 6 && packet.destination_port == 25 {
            return Verdict::Deny(Reason::OutboundSmtp);
        }
    }
    // (a) Members of a shared basic group with intra-group accept: before custom rules and regardless of them.
    if packet.direction == Direction::Ingress {
        for group in &groups {
            if group.inner_access() == InnerAccess::Accept && checked.addresses_of(&group.name).contains(&packet.peer) {
                return Verdict::Allow(Reason::IntraGroup(group.name.clone()));
            }
        }
    }
    // (b) The union of all groups' rules: lowest priority number first, drop before accept, first match.
    let mut best: Option<(&Group, expand::Single<'_>)> = None;
    for group in &groups {
        for single in expand::singles(spec, group, packet.direction).filter(|single| matches(checked, single, packet)) {
            let order = |single: &expand::Single<'_>| (single.rule.priority, single.rule.policy);
            if best.as_ref().is_none_or(|(_, best)| order(&single) < order(best)) {
                best = Some((group, single));
            }
        }
    }
    match best {
        Some((group, single)) => {
            let reason = Reason::Rule {
                id: rule_id(&group.name, packet.direction, &single),
                label: rule_label(&group.name, packet.direction, &single),
                place: single.rule.place.clone(),
            };
            match single.rule.policy {
                Policy::Accept => Verdict::Allow(reason),
                Policy::Drop => Verdict::Deny(reason),
            }
        }
        // (c) What the type of the groups says; an interface's groups are all of one type.
        None => match (first.kind, packet.direction) {
            (GroupType::Basic, Direction::Egress) => Verdict::Allow(Reason::Default(first.kind)),
            _ => Verdict::Deny(Reason::Default(first.kind)),
        },
    }
}

fn matches(checked: &Checked, single: &expand::Single<'_>, packet: &Packet) -> bool {
    single.rule.protocol.matches(packet.protocol)
        // ICMP is of IPv4 and ICMPv6 of IPv6, also where the peer is a group of both.
        && single.rule.protocol.family().is_none_or(|family| family == Family::of(packet.peer))
        && single.ports.is_none_or(|range| range.contains(packet.destination_port))
        && single.source_ports.is_none_or(|range| range.contains(packet.source_port))
        && single.rule.local.is_none_or(|prefix| prefix.contains(packet.local))
        && match &single.peer {
            Peer::Any => true,
            Peer::Prefix(prefix) => prefix.contains(packet.peer),
            Peer::Group(name) => checked.addresses_of(name).contains(&packet.peer),
            Peer::PrefixList(name) => {
                checked.spec().prefix_lists.iter().any(|list| {
                    list.name == *name && list.entries.iter().any(|(prefix, _)| prefix.contains(packet.peer))
                })
            }
        }
}

/// What a group never blocks (semantics §1.3, and what IPv6 and DHCP cannot live without).
#[must_use]
pub fn never_blocked(packet: &Packet, guest: bool) -> Option<&'static str> {
    let v6 = packet.peer.is_ipv6();
    match (packet.protocol, packet.icmp) {
        (1, Some((3, 4))) if !v6 => Some("a path-MTU error"),
        (58, Some((2, _))) if v6 => Some("a path-MTU error"),
        (58, Some((133 | 135 | 136, _))) if v6 => Some("neighbour discovery"),
        // A guest that advertises itself as a router would take over its neighbours' traffic.
        (58, Some((134, _))) if v6 && !(guest && packet.direction == Direction::Egress) => {
            Some("a router advertisement")
        }
        (58, Some((130 | 131 | 132 | 143, _))) if v6 => Some("multicast listener discovery"),
        (17, _) => {
            let (server, client) = if v6 { (547, 546) } else { (67, 68) };
            let wanted = match packet.direction {
                Direction::Ingress => (server, client),
                Direction::Egress => (client, server),
            };
            ((packet.source_port, packet.destination_port) == wanted).then_some("DHCP")
        }
        _ => None,
    }
}
