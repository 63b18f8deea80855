//! One rule as the cloud's `Permission`: field names to texts, whatever the file around it is.

use std::collections::BTreeMap;

use keepwall_core::{Family, Prefix, nearest};
use keepwall_secgroup::spec::{Direction, PRIORITY_DEFAULT, PRIORITY_MAX, Peer, Policy, PortSel};

use crate::problem::quote;
use crate::rule::{Field, NewRule, parse_port_range, parse_ports, parse_prefix, parse_protocol};

/// Field to text; no field twice, none empty.
pub(super) type Row = BTreeMap<&'static str, String>;

/// The fields that are written, in column order.
pub(super) const COLUMNS: [&str; 17] = [
    "Direction",
    "Policy",
    "Priority",
    "IpProtocol",
    "PortRange",
    "PortRangeListId",
    "SourcePortRange",
    "SourceCidrIp",
    "Ipv6SourceCidrIp",
    "SourceGroupId",
    "SourcePrefixListId",
    "DestCidrIp",
    "Ipv6DestCidrIp",
    "DestGroupId",
    "DestPrefixListId",
    "NicType",
    "Description",
];

/// What the cloud exports too and what decides nothing.
const IGNORED: [&str; 7] = [
    "CreateTime",
    "SecurityGroupRuleId",
    "SourceGroupName",
    "DestGroupName",
    "SourcePrefixListName",
    "DestPrefixListName",
    "PortRangeListName",
];

/// Fields of another account's groups: a rule that needs them means nothing here.
const REFUSED: [&str; 4] =
    ["SourceGroupOwnerAccount", "SourceGroupOwnerId", "DestGroupOwnerAccount", "DestGroupOwnerId"];

const NO_PORTS: &str = "-1/-1";

/// A fault in one field.
pub(super) type Fault = (&'static str, String);

/// The field that a word of a file names; `Ok(None)` if it decides nothing.
pub(super) fn column(name: &str) -> Result<Option<&'static str>, String> {
    let known = COLUMNS.iter().chain(&REFUSED).find(|known| known.eq_ignore_ascii_case(name));
    if let Some(known) = known {
        return Ok(Some(known));
    }
    if IGNORED.iter().any(|known| known.eq_ignore_ascii_case(name)) {
        return Ok(None);
    }
    let near = nearest(name, COLUMNS).map_or(String::new(), |word| format!("; did you mean `{word}`?"));
    Err(format!("unknown field {}; expected one of {}{near}", quote(name), COLUMNS.join(", ")))
}

/// The names of one side's fields: IPv4 block, IPv6 block, group, prefix list.
fn side(source: bool) -> [&'static str; 4] {
    match source {
        true => ["SourceCidrIp", "Ipv6SourceCidrIp", "SourceGroupId", "SourcePrefixListId"],
        false => ["DestCidrIp", "Ipv6DestCidrIp", "DestGroupId", "DestPrefixListId"],
    }
}

/// A single rule (one port, one peer) as a row.
pub(super) fn write(direction: Direction, rule: &NewRule) -> Row {
    let ingress = direction == Direction::Ingress;
    let mut row = Row::new();
    row.insert("Direction", direction.to_string());
    let policy = match rule.policy {
        Policy::Accept => "Accept",
        Policy::Drop => "Drop",
    };
    row.insert("Policy", policy.to_owned());
    row.insert("Priority", rule.priority.to_string());
    row.insert("IpProtocol", rule.protocol.to_string().to_ascii_uppercase());
    row.insert("NicType", "intranet".to_owned());
    match rule.ports.first() {
        Some(PortSel::Range(range)) => drop(row.insert("PortRange", range.to_string())),
        Some(PortSel::List(name)) => drop(row.insert("PortRangeListId", name.clone())),
        None => drop(row.insert("PortRange", NO_PORTS.to_owned())),
    }
    if let Some(range) = rule.source_ports.first() {
        row.insert("SourcePortRange", range.to_string());
    }
    let cidr = |fields: [&'static str; 4], prefix: &Prefix| match prefix.family() {
        Family::Ipv4 => fields[0],
        Family::Ipv6 => fields[1],
    };
    let fields = side(ingress);
    match rule.peers.first() {
        Some(Peer::Prefix(prefix)) => drop(row.insert(cidr(fields, prefix), prefix.to_string())),
        Some(Peer::Group(name)) => drop(row.insert(fields[2], name.clone())),
        Some(Peer::PrefixList(name)) => drop(row.insert(fields[3], name.clone())),
        // `any` is never single.
        Some(Peer::Any) | None => {}
    }
    if let Some(local) = &rule.local {
        row.insert(cidr(side(!ingress), local), local.to_string());
    }
    if !rule.description.is_empty() {
        row.insert("Description", rule.description.clone());
    }
    row
}

/// A row as a rule, or everything that is wrong with it.
pub(super) fn read(row: &Row) -> Result<(Direction, NewRule), Vec<Fault>> {
    let mut faults: Vec<Fault> = Vec::new();
    let direction = match text(row, "Direction").map(str::to_ascii_lowercase).as_deref() {
        Some("ingress") => Some(Direction::Ingress),
        Some("egress") => Some(Direction::Egress),
        _ => fault(&mut faults, "Direction", "expected ingress or egress"),
    };
    let policy = match text(row, "Policy").map(str::to_ascii_lowercase).as_deref() {
        None | Some("accept") => Some(Policy::Accept),
        Some("drop") => Some(Policy::Drop),
        Some(_) => fault(&mut faults, "Policy", "expected Accept or Drop"),
    };
    let priority = match text(row, "Priority") {
        None => Some(PRIORITY_DEFAULT),
        Some(text) => {
            let plain = text.bytes().all(|b| b.is_ascii_digit());
            let number = text.parse::<u8>().ok().filter(|number| plain && (1..=PRIORITY_MAX).contains(number));
            number
                .or_else(|| fault(&mut faults, "Priority", format!("{} is not from 1 to {PRIORITY_MAX}", quote(text))))
        }
    };
    if let Some(nic) = text(row, "NicType").filter(|nic| !nic.eq_ignore_ascii_case("intranet")) {
        faults.push(("NicType", format!("{} is of the classic network; expected intranet", quote(nic))));
    }
    for field in REFUSED.into_iter().filter(|field| row.contains_key(field)) {
        faults.push((field, "groups of other accounts mean nothing here; expected no value".to_owned()));
    }
    let protocol = match text(row, "IpProtocol") {
        None => fault(&mut faults, "IpProtocol", "expected TCP, UDP, ICMP, ICMPv6, GRE, ALL or a number from 0 to 255"),
        Some(text) => match parse_protocol(text) {
            Ok(protocol) => Some(protocol),
            Err(complaint) => fault(&mut faults, "IpProtocol", complaint.sentence()),
        },
    };
    // A written range wins over a list, as in the cloud.
    let ports = match (text(row, "PortRange"), text(row, "PortRangeListId")) {
        (Some(NO_PORTS), None) if protocol.is_some_and(|protocol| protocol.has_ports()) => {
            fault(&mut faults, "PortRange", "-1/-1 is for protocols without ports; every port is 1/65535")
        }
        (None | Some(NO_PORTS), Some(list)) => Some(vec![PortSel::List(list.to_owned())]),
        (None | Some(NO_PORTS), None) => Some(Vec::new()),
        (Some(text), _) => match parse_ports(text) {
            Ok(ports) => Some(ports),
            Err(complaint) => fault(&mut faults, "PortRange", complaint.sentence()),
        },
    };
    let source_ports = match text(row, "SourcePortRange") {
        None | Some(NO_PORTS) => Some(Vec::new()),
        Some(text) => match parse_port_range(text) {
            Ok(range) => Some(vec![range]),
            Err(complaint) => fault(&mut faults, "SourcePortRange", complaint.sentence()),
        },
    };
    let ingress = direction == Some(Direction::Ingress);
    let (peer_field, peer) = peer(row, side(ingress), &mut faults);
    let (local_field, local) = local(row, side(!ingress), &mut faults);
    let description = text(row, "Description").unwrap_or_default().to_owned();
    let (Some(direction), Some(policy), Some(priority), Some(protocol), Some(ports), Some(source_ports), Some(peer)) =
        (direction, policy, priority, protocol, ports, source_ports, peer)
    else {
        return Err(faults);
    };
    let rule = NewRule { policy, priority, protocol, ports, source_ports, peers: vec![peer], local, description };
    for (field, complaint) in rule.faults() {
        let column = match field {
            Field::Rule | Field::Ports => "PortRange",
            Field::Priority => "Priority",
            Field::SourcePorts => "SourcePortRange",
            Field::Peer(_) => peer_field,
            Field::Local => local_field,
            Field::Description => "Description",
        };
        faults.push((column, complaint.sentence()));
    }
    if faults.is_empty() { Ok((direction, rule)) } else { Err(faults) }
}

fn text<'r>(row: &'r Row, field: &str) -> Option<&'r str> {
    row.get(field).map(String::as_str).filter(|text| !text.is_empty())
}

/// Notes a fault where a value was wanted.
fn fault<T>(faults: &mut Vec<Fault>, field: &'static str, message: impl Into<String>) -> Option<T> {
    faults.push((field, message.into()));
    None
}

/// The one authorisation object that is effective: a block before a group before a list (semantics §1.1).
fn peer(row: &Row, fields: [&'static str; 4], faults: &mut Vec<Fault>) -> (&'static str, Option<Peer>) {
    let (field, prefix) = local(row, fields, faults);
    if let Some(prefix) = prefix {
        return (field, Some(Peer::Prefix(prefix)));
    }
    if text(row, fields[0]).is_some() || text(row, fields[1]).is_some() {
        return (field, None);
    }
    if let Some(name) = text(row, fields[2]) {
        return (fields[2], Some(Peer::Group(name.to_owned())));
    }
    if let Some(name) = text(row, fields[3]) {
        return (fields[3], Some(Peer::PrefixList(name.to_owned())));
    }
    faults.push((fields[0], format!("the rule names no peer; expected one of {}", fields.join(", "))));
    (fields[0], None)
}

/// The block of one side.
fn local(row: &Row, fields: [&'static str; 4], faults: &mut Vec<Fault>) -> (&'static str, Option<Prefix>) {
    let (field, family, text) = match (text(row, fields[0]), text(row, fields[1])) {
        (Some(_), Some(_)) => {
            faults.push((fields[1], format!("{} is given too; a rule is of one family", fields[0])));
            return (fields[1], None);
        }
        (Some(text), None) => (fields[0], Family::Ipv4, text),
        (None, Some(text)) => (fields[1], Family::Ipv6, text),
        (None, None) => return (fields[0], None),
    };
    let prefix = match parse_prefix(text) {
        Ok(prefix) if prefix.family() == family => Some(prefix),
        Ok(prefix) => fault(faults, field, format!("{prefix} is {}; expected {family}", prefix.family())),
        Err(complaint) => fault(faults, field, complaint.sentence()),
    };
    (field, prefix)
}
