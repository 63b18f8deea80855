//! The verdict on one packet from a resolved intent: for the agent, which has no spec.
//!
//! Says the same as [`crate::evaluate`], tested against it; what it adds is the name of the rule for a flow
//! record, the sessions that a change would cut, and the probes for other people's firewalls.

use keepwall_core::{AddrRange, Family, PortRange, Protocol};

use crate::evaluate::{Packet, Reason, Verdict, never_blocked};
use crate::intent::{Attachment, Intent, IntentPeer, IntentRule};
use crate::spec::{Direction, Policy};

/// What `attachment` does with `packet`.
pub fn judge(intent: &Intent, attachment: &Attachment, packet: &Packet) -> Verdict {
    if let Some(what) = never_blocked(packet, attachment.guest) {
        return Verdict::Allow(Reason::NeverBlocked(what));
    }
    if packet.direction == Direction::Egress {
        if let Some(prefix) = intent.service_prefixes.iter().find(|prefix| prefix.contains(packet.peer)) {
            return Verdict::Allow(Reason::ServicePrefix(*prefix));
        }
        if intent.block_outbound_smtp && packet.protocol == 6 && packet.destination_port == 25 {
            return Verdict::Deny(Reason::OutboundSmtp);
        }
    }
    let in_set = |name: &str| intent.sets.get(name).is_some_and(|set| set.iter().any(|p| p.contains(packet.peer)));
    if packet.direction == Direction::Ingress
        && let Some(name) = attachment.inner.iter().find(|name| in_set(name))
    {
        return Verdict::Allow(Reason::IntraGroup(name.trim_start_matches("group:").to_owned()));
    }
    let matched = attachment.rules(packet.direction).iter().find(|rule| {
        rule.protocol.matches(packet.protocol)
            && rule.protocol.family().is_none_or(|family| family == Family::of(packet.peer))
            && rule.ports.is_none_or(|range| range.contains(packet.destination_port))
            && rule.source_ports.is_none_or(|range| range.contains(packet.source_port))
            && rule.local.is_none_or(|prefix| prefix.contains(packet.local))
            && match &rule.peer {
                IntentPeer::Prefix(prefix) => prefix.contains(packet.peer),
                IntentPeer::Set(name) => in_set(name),
            }
    });
    let reason =
        |rule: &IntentRule| Reason::Rule { id: rule.id.clone(), label: rule.label.clone(), place: rule.place.clone() };
    match (matched, attachment.default_policy(packet.direction)) {
        (Some(rule), _) if rule.policy == Policy::Accept => Verdict::Allow(reason(rule)),
        (Some(rule), _) => Verdict::Deny(reason(rule)),
        (None, Policy::Accept) => Verdict::Allow(Reason::Default(attachment.kind)),
        (None, Policy::Drop) => Verdict::Deny(Reason::Default(attachment.kind)),
    }
}

/// A packet that a rule lets in, to ask other firewalls about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The device it would arrive at.
    pub device: String,
    /// The rule that lets it in, by label.
    pub label: String,
    /// The packet.
    pub packet: Packet,
}

/// Probes asked about one rule: its first peer for each family. The whole list is bounded.
const PROBES_MAX: usize = 2_000;

/// One packet for each inbound accept rule that decides it (a rule that a higher one overrides makes none).
#[must_use]
pub fn probes(intent: &Intent) -> Vec<Probe> {
    let mut out: Vec<Probe> = Vec::new();
    for attachment in intent.attachments.iter().filter(|a| !a.guest) {
        for rule in attachment.ingress.iter().filter(|rule| rule.policy == Policy::Accept) {
            let peer = match &rule.peer {
                IntentPeer::Prefix(prefix) => Some(*prefix),
                IntentPeer::Set(name) => intent.sets.get(name).and_then(|set| set.first().copied()),
            };
            let Some(range) = peer.map(|prefix| prefix.range()) else { continue };
            let family = range.family;
            let peer = if range == AddrRange::everything(family) {
                // Somebody on the Internet: documentation addresses stand for one.
                match family {
                    Family::Ipv4 => AddrRange::number([203, 0, 113, 99].into()),
                    Family::Ipv6 => AddrRange::number([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x99].into()),
                }
            } else {
                range.first.saturating_add(u128::from(range.first != range.last))
            };
            let protocol = match (rule.protocol, family) {
                (Protocol::Number(number), _) => number,
                (Protocol::All, _) => 6,
            };
            let local = rule
                .local
                .map(|prefix| prefix.address())
                .or_else(|| attachment.addresses.iter().copied().find(|address| Family::of(*address) == family));
            let local = local.unwrap_or_else(|| AddrRange::address(family, 0));
            let packet = Packet {
                direction: Direction::Ingress,
                peer: AddrRange::address(family, peer),
                local,
                protocol,
                source_port: rule.source_ports.map_or(EPHEMERAL, |range| range.first()),
                destination_port: rule
                    .ports
                    .map_or(if protocol == 6 { 80 } else { 0 }, |range: PortRange| range.first()),
                icmp: match protocol {
                    1 => Some((8, 0)),
                    58 => Some((128, 0)),
                    _ => None,
                },
            };
            let decides = matches!(judge(intent, attachment, &packet),
                Verdict::Allow(Reason::Rule { ref id, .. }) if *id == rule.id);
            if decides && out.len() < PROBES_MAX {
                out.push(Probe { device: attachment.device.clone(), label: rule.label.clone(), packet });
            }
        }
    }
    out
}

/// A source port as clients use it, where a question does not name one.
pub const EPHEMERAL: u16 = 49_152;
