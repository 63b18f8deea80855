//! `security_groups:` and their rules.

use keepwall_core::{PortRange, Prefix, Protocol};
use keepwall_secgroup::spec::{
    Direction, Group, GroupType, InnerAccess, PRIORITY_DEFAULT, PRIORITY_MAX, PeerRef, Policy, PortSel, Rule, Selector,
};

use super::{Reader, given};
use crate::keys;
use crate::problem::{Complaint, quote};
use crate::rule::{
    Field, NewRule, RULE_DESCRIPTION_MAX, parse_peer, parse_port_range, parse_ports, parse_prefix, parse_protocol,
    priority_complaint,
};
use crate::tree::{Key, Kind, Node, Span};

/// Characters of a group's or a list's description (semantics §1.1).
pub(super) const DESCRIPTION_MIN: usize = 2;
pub(super) const DESCRIPTION_MAX: usize = 256;

/// The cloud's way to say that a protocol has no ports.
const NO_PORTS: &str = "-1/-1";

impl Reader<'_, '_> {
    pub(super) fn group(&mut self, key: &Key, node: &Node) -> Option<Group> {
        let name = self.declared(key);
        // `web:` with nothing behind it is a group that has only its type's implicit rules.
        if !node.is_null() && !self.keys(node, &keys::GROUP) {
            return None;
        }
        let types = [("basic", GroupType::Basic), ("advanced", GroupType::Advanced)];
        let kind = self.word(node, "type", &types).unwrap_or_default();
        let access = [("accept", InnerAccess::Accept), ("drop", InnerAccess::Drop)];
        let inner_access = self.word(node, "inner_access", &access);
        if let (GroupType::Advanced, Some(InnerAccess::Accept), Some((_, value))) =
            (kind, inner_access, node.entry("inner_access"))
        {
            let complaint = Complaint::new("an advanced group is always isolated");
            self.complain(value.span, complaint.expected("no `inner_access`, or `type: basic`"));
        }
        let members = self.list(node, "members");
        let members = self.each(members, Self::selector);
        Some(Group {
            name,
            place: self.place(key.span),
            description: self.description(node, DESCRIPTION_MIN, DESCRIPTION_MAX),
            kind,
            inner_access,
            members,
            ingress: self.rules(node, Direction::Ingress),
            egress: self.rules(node, Direction::Egress),
        })
    }

    fn selector(&mut self, node: &Node) -> Option<Selector> {
        let labels = self.labels(node);
        if labels.is_empty() {
            if matches!(node.kind, Kind::Mapping { .. }) && node.entries().is_empty() {
                let complaint = Complaint::new("an empty selector would select every interface");
                self.complain(node.span, complaint.expected("at least one label, as in { tier: web }"));
            }
            return None;
        }
        Some(Selector { labels, place: self.place(node.span) })
    }

    fn rules(&mut self, group: &Node, direction: Direction) -> Vec<Rule> {
        let items = self.list(group, &direction.to_string());
        self.each(items, |reader, item| reader.rule(item, direction))
    }

    fn rule(&mut self, node: &Node, direction: Direction) -> Option<Rule> {
        if !self.keys(node, &keys::RULE) {
            return None;
        }
        // After a wrong word the value is a stand-in; nothing of a reported rule is ever handed out.
        let policies = [("accept", Policy::Accept), ("drop", Policy::Drop)];
        let policy = self.word(node, "policy", &policies).unwrap_or(Policy::Accept);
        let priority = self.priority(node);
        let description = self.description(node, 1, RULE_DESCRIPTION_MAX);
        let protocol = self.protocol(node);
        let ports = self.ports(node, protocol);
        let source_ports = self.source_ports(node);
        let (peers, local) = self.sides(node, direction);
        let (protocol, ports, source_ports, peers, local) = (protocol?, ports?, source_ports?, peers?, local?);
        let rule = Rule {
            place: self.place(node.span),
            policy,
            priority,
            protocol,
            ports,
            source_ports,
            peers,
            local,
            description,
        };
        if !self.misspelt(node, &keys::RULE) {
            self.faults(node, direction, &rule);
        }
        Some(rule)
    }

    /// Reports what is wrong with the rule's fields together, each at the field that should change.
    fn faults(&mut self, node: &Node, direction: Direction, rule: &Rule) {
        let (peer_key, local_key) = side_keys(direction);
        let span_of = |key: &str| node.entry(key).map_or(node.span, |(_, value)| value.span);
        for (field, complaint) in NewRule::of(rule).faults() {
            let span = match field {
                Field::Rule => node.span,
                Field::Priority => span_of("priority"),
                Field::Ports => span_of("ports"),
                Field::SourcePorts => span_of("source_ports"),
                Field::Local => span_of(local_key),
                Field::Description => span_of("description"),
                Field::Peer(index) => rule.peers.get(index).map_or(span_of(peer_key), |peer| Span {
                    line: peer.place.line,
                    column: peer.place.column,
                    ..node.span
                }),
            };
            self.complain(span, complaint);
        }
    }

    fn priority(&mut self, node: &Node) -> u8 {
        let Some((_, value)) = node.entry("priority") else { return PRIORITY_DEFAULT };
        let Some(text) = self.text(value, &format!("a number from 1 to {PRIORITY_MAX}")) else {
            return PRIORITY_DEFAULT;
        };
        let plain = matches!(value.kind, Kind::Scalar { plain: true, .. }) && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse::<u8>().ok().filter(|number| plain && (1..=PRIORITY_MAX).contains(number)) {
            Some(number) => number,
            None => {
                self.complain(value.span, priority_complaint(text));
                PRIORITY_DEFAULT
            }
        }
    }

    /// TCP if only ports are given. `None` if it was reported.
    fn protocol(&mut self, node: &Node) -> Option<Protocol> {
        let Some((_, value)) = node.entry("protocol") else {
            if given(node, "ports").is_some() {
                return Some(Protocol::TCP);
            }
            let complaint = Complaint::new("the rule names neither a protocol nor ports");
            self.complain(node.span, complaint.expected("`protocol: all` for everything, or `ports: 22` for TCP"));
            return None;
        };
        let text = self.text(value, "a protocol")?;
        parse_protocol(text).map_err(|complaint| self.complain(value.span, complaint)).ok()
    }

    fn ports(&mut self, node: &Node, protocol: Option<Protocol>) -> Option<Vec<PortSel>> {
        let Some((_, value)) = given(node, "ports") else { return Some(Vec::new()) };
        let mut out = Vec::new();
        let mut good = true;
        for item in self.one_or_list(value) {
            if self.problems.is_full() {
                return None;
            }
            let Some(text) = self.text(item, "a port, a port range, all, or port-list:NAME") else {
                good = false;
                continue;
            };
            if text.trim() == NO_PORTS {
                if protocol.is_some_and(Protocol::has_ports) {
                    let complaint =
                        Complaint::new(format!("{NO_PORTS} means a protocol without ports, and this one has them"));
                    self.complain(
                        item.span,
                        complaint.expected("`all` or 1/65535 for every port").suggest(Some("all")),
                    );
                    good = false;
                }
                continue;
            }
            match parse_ports(text) {
                Ok(ports) => out.extend(ports),
                Err(complaint) => {
                    self.complain(item.span, complaint);
                    good = false;
                }
            }
        }
        if out.is_empty() && good && matches!(value.kind, Kind::Sequence { .. }) && value.items().is_empty() {
            self.complain(
                value.span,
                Complaint::new("an empty list of ports matches nothing").expected("`all`, or ports"),
            );
            good = false;
        }
        good.then_some(out)
    }

    fn source_ports(&mut self, node: &Node) -> Option<Vec<PortRange>> {
        let Some((_, value)) = given(node, "source_ports") else { return Some(Vec::new()) };
        let mut out = Vec::new();
        let mut good = true;
        for item in self.one_or_list(value) {
            if self.problems.is_full() {
                return None;
            }
            let Some(text) = self.text(item, "a port, a port range, or all") else {
                good = false;
                continue;
            };
            for part in text.split(',').map(str::trim).filter(|part| *part != "all" && *part != NO_PORTS) {
                match parse_port_range(part) {
                    Ok(range) => out.push(range),
                    Err(complaint) => {
                        self.complain(item.span, complaint);
                        good = false;
                    }
                }
            }
        }
        good.then_some(out)
    }

    /// The peers and this side's own block; each `None` if it was reported.
    fn sides(&mut self, node: &Node, direction: Direction) -> (Option<Vec<PeerRef>>, Option<Option<Prefix>>) {
        let (peer_key, local_key) = side_keys(direction);
        let Some((_, value)) = given(node, peer_key) else {
            let complaint = Complaint::new(format!("an {direction} rule names its peer in `{peer_key}`"));
            let (span, complaint) = match node.entry(local_key) {
                Some((key, _)) => {
                    let meaning = format!("`{peer_key}` here; `{local_key}` is the group's own side and optional");
                    (key.span, complaint.expected(meaning).suggest(Some(peer_key)))
                }
                None => (node.span, complaint.expected("any, an address block, group:NAME or prefix-list:NAME")),
            };
            self.complain(span, complaint);
            return (None, None);
        };
        let mut peers = Some(Vec::new());
        for item in self.one_or_list(value) {
            if self.problems.is_full() {
                return (None, None);
            }
            let peer = self.text(item, "any, an address block, group:NAME or prefix-list:NAME").map(parse_peer);
            match (peer, &mut peers) {
                (Some(Ok(peer)), Some(peers)) => peers.push(PeerRef { peer, place: self.place(item.span) }),
                (Some(Err(complaint)), _) => {
                    self.complain(item.span, complaint);
                    peers = None;
                }
                _ => peers = None,
            }
        }
        if value.items().is_empty() && matches!(value.kind, Kind::Sequence { .. }) {
            let complaint = Complaint::new("an empty list of peers matches nobody");
            self.complain(value.span, complaint.expected("any, an address block, group:NAME or prefix-list:NAME"));
            peers = None;
        }
        (peers, self.local(node, direction))
    }

    fn local(&mut self, node: &Node, direction: Direction) -> Option<Option<Prefix>> {
        let (peer_key, local_key) = side_keys(direction);
        let Some((_, value)) = given(node, local_key) else { return Some(None) };
        let expected = format!("one address block of the group's own members; peers stand in `{peer_key}`");
        let text = self.text(value, &expected)?;
        if text == "any" {
            return Some(None);
        }
        match parse_prefix(text) {
            Ok(prefix) => Some(Some(prefix)),
            Err(complaint) if complaint.suggestion.is_some() => {
                self.complain(value.span, complaint);
                None
            }
            Err(_) => {
                let message = format!("{} is no address block for `{local_key}` of an {direction} rule", quote(text));
                let is_peer = parse_peer(text).is_ok();
                let complaint = Complaint::new(message).expected(expected).suggest(is_peer.then_some(peer_key));
                self.complain(value.span, complaint);
                None
            }
        }
    }
}

/// Which key names the peer and which the group's own side.
pub(crate) fn side_keys(direction: Direction) -> (&'static str, &'static str) {
    match direction {
        Direction::Ingress => ("from", "to"),
        Direction::Egress => ("to", "from"),
    }
}
