//! Values as YAML text.

use keepwall_core::{PortRange, Prefix};
use keepwall_secgroup::spec::{Direction, GroupType, InnerAccess, Peer, Policy, PortSel};

use super::NewGroup;
use super::splice::Value;
use crate::read::side_keys;
use crate::rule::NewRule;

/// A text as one YAML scalar that reads back as itself in block and flow style, for every YAML reader.
pub(crate) fn scalar(text: &str) -> String {
    let opens = text.starts_with(|c: char| c.is_alphabetic() || c.is_ascii_digit());
    let inside =
        |c: char| c.is_alphanumeric() || matches!(c, ' ' | '.' | '_' | '-' | '/' | ':' | '(' | ')' | '+' | '=');
    let colon_is_plain = !text.contains(": ") && !text.ends_with(':');
    let word = text.to_ascii_lowercase();
    let taken = matches!(word.as_str(), "null" | "true" | "false" | "yes" | "no" | "on" | "off" | "y" | "n");
    let numeric = text.starts_with(|c: char| c.is_ascii_digit()) && !text.contains(' ');
    let plain = opens && text.chars().all(inside) && colon_is_plain && !text.ends_with(' ') && !taken && !numeric;
    if plain { text.to_owned() } else { quoted(text) }
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// An address without its /32 or /128. An IPv6 block that begins or ends with a colon needs quotes.
pub(super) fn prefix(prefix: &Prefix) -> String {
    let host = prefix.len() == prefix.family().bits();
    let text = if host { prefix.address().to_string() } else { prefix.to_string() };
    if text.starts_with(':') || text.ends_with(':') { quoted(&text) } else { text }
}

fn range(range: &PortRange) -> String {
    match *range {
        PortRange::ALL => "all".to_owned(),
        range if range.first() == range.last() => range.first().to_string(),
        range => range.to_string(),
    }
}

fn port(port: &PortSel) -> String {
    match port {
        PortSel::Range(ports) => range(ports),
        PortSel::List(name) => scalar(&format!("port-list:{name}")),
    }
}

fn peer(peer: &Peer) -> String {
    match peer {
        Peer::Prefix(block) => prefix(block),
        other => scalar(&other.to_string()),
    }
}

/// One value bare, several in brackets.
fn list<T>(items: &[T], text: impl Fn(&T) -> String) -> String {
    match items {
        [one] => text(one),
        many => format!("[{}]", many.iter().map(text).collect::<Vec<_>>().join(", ")),
    }
}

pub(super) fn ports(ports: &[PortSel]) -> String {
    list(ports, port)
}

pub(super) fn source_ports(ports: &[PortRange]) -> String {
    list(ports, range)
}

pub(super) fn peers(peers: &[Peer]) -> String {
    list(peers, peer)
}

pub(super) fn policy(policy: Policy) -> &'static str {
    match policy {
        Policy::Accept => "accept",
        Policy::Drop => "drop",
    }
}

pub(super) fn inner_access(access: InnerAccess) -> &'static str {
    match access {
        InnerAccess::Accept => "accept",
        InnerAccess::Drop => "drop",
    }
}

/// A rule, on one line or, if its neighbours are written so, on one line per field.
pub(super) fn rule(rule: &NewRule, direction: Direction, by_lines: bool) -> Value {
    let (peer_key, local_key) = side_keys(direction);
    let mut fields = vec![("policy", policy(rule.policy).to_owned()), ("protocol", rule.protocol.to_string())];
    if !rule.ports.is_empty() {
        fields.push(("ports", ports(&rule.ports)));
    }
    if !rule.source_ports.is_empty() {
        fields.push(("source_ports", source_ports(&rule.source_ports)));
    }
    fields.push((peer_key, peers(&rule.peers)));
    if let Some(local) = &rule.local {
        fields.push((local_key, prefix(local)));
    }
    fields.push(("priority", rule.priority.to_string()));
    if !rule.description.is_empty() {
        fields.push(("description", scalar(&rule.description)));
    }
    let lines: Vec<String> = fields.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    Value { flow: format!("{{ {} }}", lines.join(", ")), block: if by_lines { lines } else { Vec::new() } }
}

/// A group's body.
pub(super) fn group(group: &NewGroup) -> Value {
    let mut parts: Vec<(&str, Value)> = Vec::new();
    parts.push((
        "type",
        Value::flow(match group.kind {
            GroupType::Basic => "basic",
            GroupType::Advanced => "advanced",
        }),
    ));
    if !group.description.is_empty() {
        parts.push(("description", Value::flow(scalar(&group.description))));
    }
    if let Some(access) = group.inner_access {
        parts.push(("inner_access", Value::flow(inner_access(access))));
    }
    if !group.members.is_empty() {
        let selector = |labels: &std::collections::BTreeMap<String, String>| {
            let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{}: {}", scalar(k), scalar(v))).collect();
            Value::flow(format!("{{ {} }}", pairs.join(", ")))
        };
        parts.push(("members", Value::list(&group.members.iter().map(selector).collect::<Vec<_>>())));
    }
    for (direction, rules) in [(Direction::Ingress, &group.ingress), (Direction::Egress, &group.egress)] {
        if !rules.is_empty() {
            let key = if direction == Direction::Ingress { "ingress" } else { "egress" };
            let items: Vec<Value> = rules.iter().map(|one| rule(one, direction, false)).collect();
            parts.push((key, Value::list(&items)));
        }
    }
    let flow = parts.iter().map(|(key, value)| format!("{key}: {}", value.flow)).collect::<Vec<_>>().join(", ");
    let mut block = Vec::new();
    for (key, value) in &parts {
        if value.block.is_empty() {
            block.push(format!("{key}: {}", value.flow));
        } else {
            block.push(format!("{key}:"));
            block.extend(value.block.iter().map(|line| format!("  {line}")));
        }
    }
    Value { flow: format!("{{ {flow} }}"), block }
}

#[cfg(test)]
mod tests {
    use super::scalar;

    #[test]
    fn words_that_other_readers_take_for_something_else_are_quoted() {
        for text in ["no", "null", "12", "1.5", "a: b", "# x", "- x", "", " x", "x ", "a\"b", "::/0", "*x", "{", "0x10"]
        {
            assert!(scalar(text).starts_with('"'), "{text}");
        }
        for text in ["the site", "group:web", "a.b_c-d", "数据库", "see (RFC 1) a/b"] {
            assert_eq!(scalar(text), text);
        }
    }
}
