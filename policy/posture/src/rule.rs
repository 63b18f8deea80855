//! One rule as a value: what an edit adds, what an import reads, what a snapshot keeps.
//!
//! The parser, the import and the snapshots all ask [`NewRule::faults`], so a rule that one of them refuses is
//! refused by all.

use std::collections::BTreeSet;

use keepwall_core::{Family, Place, PortRange, PortRangeError, Prefix, PrefixError, Protocol, check_name, nearest};
use keepwall_secgroup::spec::{PRIORITY_DEFAULT, PRIORITY_MAX, Peer, PeerRef, Policy, PortSel, Rule};
use serde::{Deserialize, Serialize};

use crate::problem::{Complaint, quote};

/// A rule's description has at most this many characters (semantics §1.1).
pub const RULE_DESCRIPTION_MAX: usize = 512;

/// A written rule stands for one rule per combination of port, source port and peer; more than this is a mistake
/// or an attack, since an interface has 1,000 rules.
pub const RULE_COMBINATIONS_MAX: usize = 10_000;

/// No address with its prefix length, and no port range, is longer.
const WORD_MAX: usize = 64;

/// A rule without a place. Everything that [`Rule`] says about its fields holds here too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Wire", into = "Wire")]
pub struct NewRule {
    /// Accept or drop.
    pub policy: Policy,
    /// 1 (highest) to 100.
    pub priority: u8,
    /// The protocol.
    pub protocol: Protocol,
    /// Destination ports: at least one for TCP and UDP, none for others.
    pub ports: Vec<PortSel>,
    /// Source ports, TCP and UDP only; empty means any.
    pub source_ports: Vec<PortRange>,
    /// The other side; at least one.
    pub peers: Vec<Peer>,
    /// This side's own private address block; `None` means every address of the interface.
    pub local: Option<Prefix>,
    /// 1-512 characters, or empty.
    pub description: String,
}

/// Which field of a rule a fault is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Rule,
    Priority,
    Ports,
    SourcePorts,
    /// The peer with this index.
    Peer(usize),
    Local,
    Description,
}

impl NewRule {
    /// An accept rule of priority 1 without 5-tuple fields and description.
    #[must_use]
    pub fn accept(protocol: Protocol, ports: Vec<PortSel>, peer: Peer) -> NewRule {
        NewRule {
            policy: Policy::Accept,
            priority: PRIORITY_DEFAULT,
            protocol,
            ports,
            source_ports: Vec::new(),
            peers: vec![peer],
            local: None,
            description: String::new(),
        }
    }

    /// The value of a written rule.
    #[must_use]
    pub fn of(rule: &Rule) -> NewRule {
        NewRule {
            policy: rule.policy,
            priority: rule.priority,
            protocol: rule.protocol,
            ports: rule.ports.clone(),
            source_ports: rule.source_ports.clone(),
            peers: rule.peers.iter().map(|peer| peer.peer.clone()).collect(),
            local: rule.local,
            description: rule.description.clone(),
        }
    }

    /// This rule as if it had been written at `place`.
    #[must_use]
    pub fn at(&self, place: &Place) -> Rule {
        let peer = |peer: &Peer| PeerRef { peer: peer.clone(), place: place.clone() };
        Rule {
            place: place.clone(),
            policy: self.policy,
            priority: self.priority,
            protocol: self.protocol,
            ports: self.ports.clone(),
            source_ports: self.source_ports.clone(),
            peers: self.peers.iter().map(peer).collect(),
            local: self.local,
            description: self.description.clone(),
        }
    }

    /// What makes it no rule, in sentences; empty if it is one.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        self.faults().iter().map(|(_, complaint)| complaint.sentence()).collect()
    }

    /// Everything that is wrong with the fields of a rule, alone and together.
    pub(crate) fn faults(&self) -> Vec<(Field, Complaint)> {
        let mut faults = Vec::new();
        if !(1..=PRIORITY_MAX).contains(&self.priority) {
            faults.push((Field::Priority, priority_complaint(&self.priority.to_string())));
        }
        if let Err(complaint) = check_text("a rule's description", &self.description, 0, RULE_DESCRIPTION_MAX) {
            faults.push((Field::Description, complaint));
        }
        self.port_faults(&mut faults);
        if self.peers.is_empty() {
            let complaint = Complaint::new("the rule names no peer");
            faults.push((Field::Rule, complaint.expected("any, an address block, group:NAME or prefix-list:NAME")));
        }
        self.family_faults(&mut faults);
        let names = self.ports.iter().filter_map(|port| match port {
            PortSel::List(name) => Some((Field::Ports, name)),
            PortSel::Range(_) => None,
        });
        let peer_names = self.peers.iter().enumerate().filter_map(|(index, peer)| match peer {
            Peer::Group(name) | Peer::PrefixList(name) => Some((Field::Peer(index), name)),
            Peer::Any | Peer::Prefix(_) => None,
        });
        for (field, name) in names.chain(peer_names) {
            if let Err(error) = check_name(name) {
                faults.push((field, Complaint::new(format!("{} is no name: {error}", quote(name)))));
            }
        }
        let sides = self.ports.len().max(1) * self.source_ports.len().max(1);
        if sides.saturating_mul(self.peers.len()) > RULE_COMBINATIONS_MAX {
            let message = format!("the rule stands for more than {RULE_COMBINATIONS_MAX} rules");
            faults.push((Field::Rule, Complaint::new(message).expected("a prefix list or a port list instead")));
        }
        faults
    }

    fn port_faults(&self, faults: &mut Vec<(Field, Complaint)>) {
        let protocol = self.protocol;
        if protocol.has_ports() {
            if self.ports.is_empty() {
                let complaint = Complaint::new(format!("a {protocol} rule needs `ports`"));
                faults.push((
                    Field::Rule,
                    complaint.expected("`ports: 22`, `ports: [80, 443]`, or `ports: all` (1/65535)"),
                ));
            }
        } else {
            let why =
                || Complaint::new(format!("{protocol} has no ports")).expected("no ports; only tcp and udp have them");
            if !self.ports.is_empty() {
                faults.push((Field::Ports, why()));
            }
            if !self.source_ports.is_empty() {
                faults.push((Field::SourcePorts, why()));
            }
        }
        if let Some((_, port)) = repeated(&self.ports) {
            faults.push((Field::Ports, Complaint::new(format!("the port {port} is given twice"))));
        }
        if let Some((_, port)) = repeated(&self.source_ports) {
            faults.push((Field::SourcePorts, Complaint::new(format!("the source port {port} is given twice"))));
        }
    }

    /// A rule is of one family: protocol, peer and own address must agree on it (semantics §1.1).
    fn family_faults(&self, faults: &mut Vec<(Field, Complaint)>) {
        if let (Some(family), Some(local)) = (self.protocol.family(), self.local)
            && local.family() != family
        {
            faults.push((Field::Local, self.wrong_protocol(&local)));
        }
        if let Some((index, peer)) = repeated(&self.peers) {
            faults.push((Field::Peer(index), Complaint::new(format!("the peer {peer} is given twice"))));
        }
        for (index, peer) in self.peers.iter().enumerate() {
            let Peer::Prefix(prefix) = peer else { continue };
            if self.protocol.family().is_some_and(|family| family != prefix.family()) {
                faults.push((Field::Peer(index), self.wrong_protocol(prefix)));
            } else if let Some(local) = self.local.filter(|local| local.family() != prefix.family()) {
                let (own, other) = (local.family(), prefix.family());
                let complaint =
                    Complaint::new(format!("{prefix} is {other}, but the rule's own side {local} is {own}"));
                faults.push((Field::Peer(index), complaint.expected("one family on both sides")));
            }
        }
    }

    fn wrong_protocol(&self, prefix: &Prefix) -> Complaint {
        let (protocol, family) = (self.protocol, prefix.family());
        let right = match family {
            Family::Ipv4 => "icmp",
            Family::Ipv6 => "icmpv6",
        };
        Complaint::new(format!("{protocol} never runs over {family}, and {prefix} is {family}")).suggest(Some(right))
    }

    /// The peers with `any` taken apart into the families that the rule can match, so that two ways to write
    /// the same rule are one (semantics §1.1: equality of rules is judged on normalised values).
    fn peers_apart(&self) -> Vec<Peer> {
        let family = self.protocol.family().or(self.local.map(|local| local.family()));
        let mut out = Vec::new();
        for peer in &self.peers {
            match peer {
                Peer::Any => out.extend(
                    Family::BOTH
                        .into_iter()
                        .filter(|own| family.is_none_or(|family| family == *own))
                        .map(|own| Peer::Prefix(own.everything())),
                ),
                other => out.push(other.clone()),
            }
        }
        out.sort();
        out.dedup();
        out
    }

    /// True if both decide about the same packets in the same way; ports and peers may still differ.
    fn same_kind(&self, other: &NewRule) -> bool {
        self.policy == other.policy
            && self.priority == other.priority
            && self.protocol == other.protocol
            && self.local == other.local
    }

    /// The single rules that this one stands for, as the cloud counts and lists them: one for each combination.
    /// `any` becomes one rule per family.
    #[must_use]
    pub fn singles(&self) -> Vec<NewRule> {
        let ports: Vec<Option<PortSel>> = one_or_none(&self.ports);
        let sources: Vec<Option<PortRange>> = one_or_none(&self.source_ports);
        let mut out = Vec::new();
        for peer in self.peers_apart() {
            for port in &ports {
                for source in &sources {
                    out.push(NewRule {
                        ports: port.iter().cloned().collect(),
                        source_ports: source.iter().copied().collect(),
                        peers: vec![peer.clone()],
                        ..self.clone()
                    });
                }
            }
        }
        out
    }

    /// What is left of this rule without those combinations that `other` has too; nothing at all if `other` covers
    /// it. Descriptions do not count. `None` if they have nothing in common.
    pub(crate) fn without(&self, other: &NewRule) -> Option<Vec<NewRule>> {
        if !self.same_kind(other) {
            return None;
        }
        let theirs = other.peers_apart();
        let (peers_both, peers_own) = partition(&self.peers_apart(), &theirs);
        let (ports_both, ports_own) = partition_or_none(&self.ports, &other.ports)?;
        let (_, sources_own) = partition_or_none(&self.source_ports, &other.source_ports)?;
        if peers_both.is_empty() {
            return None;
        }
        // The three boxes around the common one: other peers; same peers on other ports; same peers and ports from
        // other source ports.
        let mut left = Vec::new();
        let with = |peers: &[Peer], ports: &[PortSel], sources: &[PortRange]| NewRule {
            peers: self.together(peers),
            ports: ports.to_vec(),
            source_ports: sources.to_vec(),
            ..self.clone()
        };
        if !peers_own.is_empty() {
            left.push(with(&peers_own, &self.ports, &self.source_ports));
        }
        if !ports_own.is_empty() {
            left.push(with(&peers_both, &ports_own, &self.source_ports));
        }
        if !sources_own.is_empty() {
            left.push(with(&peers_both, &ports_both, &sources_own));
        }
        Some(left)
    }

    /// Peers of this rule written as it wrote them: in its order, and with `any` where `any` stood and is whole.
    fn together(&self, apart: &[Peer]) -> Vec<Peer> {
        let mut out: Vec<Peer> = Vec::new();
        let apart: BTreeSet<&Peer> = apart.iter().collect();
        for peer in &self.peers {
            let parts = match peer {
                Peer::Any => NewRule { peers: vec![Peer::Any], ..self.clone() }.peers_apart(),
                other => vec![other.clone()],
            };
            if parts.iter().all(|part| apart.contains(part)) {
                out.push(peer.clone());
            } else {
                out.extend(parts.into_iter().filter(|part| apart.contains(part)));
            }
        }
        if repeated(&out).is_some() {
            out.sort();
            out.dedup();
        }
        out
    }
}

fn one_or_none<T: Clone>(all: &[T]) -> Vec<Option<T>> {
    if all.is_empty() { vec![None] } else { all.iter().cloned().map(Some).collect() }
}

/// `own` split into what `other` has too and what it has not.
fn partition<T: Clone + Ord>(own: &[T], other: &[T]) -> (Vec<T>, Vec<T>) {
    let other: BTreeSet<&T> = other.iter().collect();
    own.iter().cloned().partition(|item| other.contains(item))
}

/// The same for a field in which nothing means one thing of its own; `None` if there is nothing in common.
fn partition_or_none<T: Clone + Ord>(own: &[T], other: &[T]) -> Option<(Vec<T>, Vec<T>)> {
    if own.is_empty() || other.is_empty() {
        return (own.is_empty() && other.is_empty()).then(|| (Vec::new(), Vec::new()));
    }
    let (both, rest) = partition(own, other);
    (!both.is_empty()).then_some((both, rest))
}

fn repeated<T: Ord>(items: &[T]) -> Option<(usize, &T)> {
    let mut seen = BTreeSet::new();
    items.iter().enumerate().find(|(_, item)| !seen.insert(*item))
}

/// The rules of `wanted` that `present` does not hold already, combination by combination.
pub(crate) fn missing<'a>(wanted: &NewRule, present: impl IntoIterator<Item = &'a NewRule>) -> Vec<NewRule> {
    let mut left = vec![wanted.clone()];
    for rule in present {
        // Each step may cut one box into three, but all boxes together have at most the rule's combinations.
        left = left.into_iter().flat_map(|own| own.without(rule).unwrap_or_else(|| vec![own])).collect();
    }
    left
}

pub(crate) fn priority_complaint(text: &str) -> Complaint {
    let message = format!("the priority {} is out of range", quote(text));
    Complaint::new(message).expected(format!("a number from 1 (decides first) to {PRIORITY_MAX}"))
}

/// A text of `min..=max` characters on one line.
pub(crate) fn check_text(what: &str, text: &str, min: usize, max: usize) -> Result<(), Complaint> {
    let count = text.chars().count();
    if !(min..=max).contains(&count) {
        let message = format!("{what} has {count} character{}", if count == 1 { "" } else { "s" });
        return Err(Complaint::new(message).expected(format!("{} to {max} characters", min.max(1))));
    }
    match text.chars().find(|c| c.is_control() || crate::problem::is_direction_control(*c)) {
        Some(c) => Err(Complaint::new(format!("{what} holds the character {c:?}")).expected("one line of plain text")),
        None => Ok(()),
    }
}

/// A CIDR block or an address.
pub(crate) fn parse_prefix(text: &str) -> Result<Prefix, Complaint> {
    let example = "an address block such as 203.0.113.0/24 or 2001:db8::/32, or one address";
    if text.len() > WORD_MAX {
        return Err(Complaint::new(format!("{} is not an address", quote(text))).expected(example));
    }
    text.parse().map_err(|error| match error {
        PrefixError::NotAnAddress(text) => {
            Complaint::new(format!("{} is not an address", quote(&text))).expected(example)
        }
        PrefixError::BadLength { text, max } => Complaint::new(format!("{} has no valid prefix length", quote(&text)))
            .expected(format!("a number from 0 to {max} behind the slash")),
        PrefixError::HostBits { text, suggestion } => {
            let one = text.split('/').next().unwrap_or(&text).to_owned();
            Complaint::new(format!("{} has host bits set", quote(&text)))
                .expected(format!("the block {suggestion}, or the one address {one}"))
                .suggest(Some(suggestion))
        }
    })
}

/// `22`, `22/22`, `8000-8100`.
pub(crate) fn parse_port_range(text: &str) -> Result<PortRange, Complaint> {
    let example = "22, 22/22, 8000/8100 or 8000-8100, each port from 1 to 65535";
    if text.len() > WORD_MAX {
        return Err(Complaint::new(format!("{} is not a port range", quote(text))).expected(example));
    }
    text.parse().map_err(|error| match error {
        PortRangeError::NotAPort(text) => {
            Complaint::new(format!("{} is not a port range", quote(&text))).expected(example)
        }
        PortRangeError::Reversed { text, suggestion } => Complaint::new(format!("{} is reversed", quote(&text)))
            .expected("the lower port first")
            .suggest(Some(suggestion)),
    })
}

/// One or several port selections: `443`, `80,443`, `all`, `port-list:web`.
pub(crate) fn parse_ports(text: &str) -> Result<Vec<PortSel>, Complaint> {
    text.split(',').map(|part| parse_port(part.trim())).collect()
}

fn parse_port(text: &str) -> Result<PortSel, Complaint> {
    if text.eq_ignore_ascii_case("all") {
        return Ok(PortSel::Range(PortRange::ALL));
    }
    if let Some(name) = text.strip_prefix("port-list:") {
        return Ok(PortSel::List(name.trim().to_owned()));
    }
    parse_port_range(text).map(PortSel::Range).map_err(|complaint| {
        if complaint.suggestion.is_some() {
            return complaint;
        }
        let expected = format!("{}; or all, or port-list:NAME", complaint.expected);
        let list = check_name(text).is_ok().then(|| format!("port-list:{text}"));
        complaint.expected(expected).suggest(nearest(text, ["all"]).map(str::to_owned).or(list))
    })
}

/// `any`, an address block, `group:web`, `prefix-list:office`.
pub(crate) fn parse_peer(text: &str) -> Result<Peer, Complaint> {
    const KINDS: [&str; 2] = ["group", "prefix-list"];
    if text == "any" {
        return Ok(Peer::Any);
    }
    if let Some(name) = text.strip_prefix("group:") {
        return Ok(Peer::Group(name.trim().to_owned()));
    }
    if let Some(name) = text.strip_prefix("prefix-list:") {
        return Ok(Peer::PrefixList(name.trim().to_owned()));
    }
    let bad = || {
        Complaint::new(format!("{} is not a peer", quote(text)))
            .expected("any, an address block, group:NAME or prefix-list:NAME")
    };
    if let Some((kind, name)) = text.split_once(':')
        && let Some(kind) = nearest(kind, KINDS)
    {
        return Err(bad().suggest(Some(format!("{kind}:{}", name.trim()))));
    }
    parse_prefix(text).map(Peer::Prefix).map_err(|complaint| {
        let looks_like_address = text.chars().all(|c| c.is_ascii_hexdigit() || matches!(c, '.' | ':' | '/'));
        if looks_like_address || complaint.suggestion.is_some() {
            return complaint;
        }
        let word = nearest(text, ["any"]).map(str::to_owned);
        bad().suggest(word.or_else(|| check_name(text).is_ok().then(|| format!("group:{text}"))))
    })
}

/// `tcp`, `6`, `all`.
pub(crate) fn parse_protocol(text: &str) -> Result<Protocol, Complaint> {
    const NAMES: [&str; 6] = ["tcp", "udp", "icmp", "icmpv6", "gre", "all"];
    text.parse().map_err(|_| {
        Complaint::new(format!("{} is not a protocol", quote(text)))
            .expected("tcp, udp, icmp, icmpv6, gre, all, or an IANA number from 0 to 255")
            .suggest(nearest(text, NAMES))
    })
}

/// How a rule is written in a snapshot: every field a word, unknown fields refused.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    policy: Policy,
    priority: u8,
    protocol: Protocol,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    source_ports: Vec<PortRange>,
    peers: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    local: Option<Prefix>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    description: String,
}

impl From<NewRule> for Wire {
    fn from(rule: NewRule) -> Wire {
        Wire {
            policy: rule.policy,
            priority: rule.priority,
            protocol: rule.protocol,
            ports: rule.ports.iter().map(ToString::to_string).collect(),
            source_ports: rule.source_ports,
            peers: rule.peers.iter().map(ToString::to_string).collect(),
            local: rule.local,
            description: rule.description,
        }
    }
}

impl TryFrom<Wire> for NewRule {
    type Error = String;

    fn try_from(wire: Wire) -> Result<NewRule, String> {
        let rule = NewRule {
            policy: wire.policy,
            priority: wire.priority,
            protocol: wire.protocol,
            ports: wire
                .ports
                .iter()
                .map(|text| parse_port(text))
                .collect::<Result<_, _>>()
                .map_err(|c| c.sentence())?,
            source_ports: wire.source_ports,
            peers: wire
                .peers
                .iter()
                .map(|text| parse_peer(text))
                .collect::<Result<_, _>>()
                .map_err(|c| c.sentence())?,
            local: wire.local,
            description: wire.description,
        };
        match rule.complaints().into_iter().next() {
            Some(complaint) => Err(complaint),
            None => Ok(rule),
        }
    }
}
