//! A rule as written into the rules that it means: one for each combination of peer and ports (semantics §1.1).

use keepwall_core::{Family, PortRange, Prefix};

use crate::spec::{Direction, Group, Peer, PortSel, Rule, Spec};

/// One combination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Single<'a> {
    /// The rule it came from.
    pub(crate) rule: &'a Rule,
    /// Counts from 0 in the group's direction, over rules as written.
    pub(crate) ordinal: usize,
    /// The other side, never `Any`.
    pub(crate) peer: Peer,
    /// Destination ports, for TCP and UDP.
    pub(crate) ports: Option<PortRange>,
    /// Source ports, `None` for any.
    pub(crate) source_ports: Option<PortRange>,
}

/// Every combination of one direction of a group.
pub(crate) fn singles<'a>(spec: &'a Spec, group: &'a Group, direction: Direction) -> impl Iterator<Item = Single<'a>> {
    group.rules(direction).iter().enumerate().flat_map(move |(ordinal, rule)| {
        let ports = ports(spec, rule);
        let source_ports: Vec<Option<PortRange>> = match rule.source_ports.as_slice() {
            [] => vec![None],
            some => some.iter().copied().map(Some).collect(),
        };
        let mut out = Vec::new();
        for peer in peers(rule) {
            for port in &ports {
                for source in &source_ports {
                    out.push(Single { rule, ordinal, peer: peer.clone(), ports: *port, source_ports: *source });
                }
            }
        }
        out
    })
}

fn peers(rule: &Rule) -> Vec<Peer> {
    let mut out = Vec::new();
    for peer in &rule.peers {
        match &peer.peer {
            Peer::Any => out.extend(any(rule).map(Peer::Prefix)),
            other => out.push(other.clone()),
        }
    }
    out
}

/// `any` is both families, less the one that the protocol or the local side excludes.
fn any(rule: &Rule) -> impl Iterator<Item = Prefix> {
    let bound = rule.protocol.family();
    let local = rule.local.map(|prefix| prefix.family());
    Family::BOTH
        .into_iter()
        .filter(move |family| bound.is_none_or(|b| b == *family) && local.is_none_or(|l| l == *family))
        .map(Family::everything)
}

fn ports(spec: &Spec, rule: &Rule) -> Vec<Option<PortRange>> {
    if !rule.protocol.has_ports() {
        return vec![None];
    }
    let mut out = Vec::new();
    for selection in &rule.ports {
        match selection {
            PortSel::Range(range) => out.push(Some(*range)),
            PortSel::List(name) => {
                let list = spec.port_lists.iter().find(|list| list.name == *name);
                out.extend(list.into_iter().flat_map(|list| list.entries.iter().map(|(range, _)| Some(*range))));
            }
        }
    }
    out
}

/// How many rules a group counts as (semantics §1.9): combinations, a list counting as its `max_entries`.
pub(crate) fn quota(spec: &Spec, group: &Group) -> u64 {
    let rule_quota = |rule: &Rule| -> u64 {
        let peers: u64 = (rule.peers.iter())
            .map(|peer| match &peer.peer {
                Peer::Any => any(rule).count() as u64,
                Peer::PrefixList(name) => {
                    spec.prefix_lists.iter().find(|l| l.name == *name).map_or(1, |l| u64::from(l.max_entries))
                }
                Peer::Prefix(_) | Peer::Group(_) => 1,
            })
            .sum();
        let ports: u64 = (rule.ports.iter())
            .map(|port| match port {
                PortSel::Range(_) => 1,
                PortSel::List(name) => {
                    spec.port_lists.iter().find(|l| l.name == *name).map_or(1, |l| u64::from(l.max_entries))
                }
            })
            .sum();
        peers * ports.max(1) * (rule.source_ports.len() as u64).max(1)
    };
    group.ingress.iter().chain(&group.egress).map(rule_quota).sum()
}
