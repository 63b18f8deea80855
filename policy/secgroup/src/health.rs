//! Rules that do nothing, do too much, or were never needed: each with why, and what to do.

use std::collections::{BTreeMap, BTreeSet};

use keepwall_core::{Family, Finding, Protocol, Severity};

use crate::cells::{Slot, cut};
use crate::check::Checked;
use crate::intent::{Attachment, Intent, IntentPeer, IntentRule, rules_of};
use crate::lower::flatten;
use crate::spec::{Direction, Group, Policy};

/// Ports that nobody should open to the world, with what listens there.
pub const SENSITIVE: [(u16, &str, Severity); 22] = [
    (21, "FTP", Severity::Warning),
    (22, "SSH", Severity::Warning),
    (23, "Telnet", Severity::Critical),
    (111, "portmapper", Severity::Critical),
    (135, "Windows RPC", Severity::Critical),
    (139, "NetBIOS", Severity::Critical),
    (445, "SMB", Severity::Critical),
    (1433, "SQL Server", Severity::Critical),
    (1521, "Oracle", Severity::Critical),
    (2049, "NFS", Severity::Critical),
    (2375, "Docker API", Severity::Critical),
    (2379, "etcd", Severity::Critical),
    (3306, "MySQL", Severity::Critical),
    (3389, "RDP", Severity::Warning),
    (5432, "PostgreSQL", Severity::Critical),
    (5900, "VNC", Severity::Critical),
    (5984, "CouchDB", Severity::Critical),
    (6379, "Redis", Severity::Critical),
    (9200, "Elasticsearch", Severity::Critical),
    (10250, "kubelet", Severity::Critical),
    (11211, "memcached", Severity::Critical),
    (27017, "MongoDB", Severity::Critical),
];

/// Above this many cells it is not known which rules decide: nothing is said then. Four times the default limit of
/// elements, since a group may hold more than any one interface takes.
const CELLS_MAX: usize = 262_144;
/// Above this many rules in one direction of a group, which single rule covers another is not searched for.
const PAIRS_MAX: usize = 3_000;

/// Findings about rules and interfaces. `hits` has the packets that each rule id matched since `since_s`
/// seconds; without it nothing is said about unused rules.
#[must_use]
pub fn findings(checked: &Checked, hits: Option<(&BTreeMap<String, u64>, u64)>) -> Vec<Finding> {
    let mut out = Vec::new();
    for (i, instance) in checked.spec().instances.iter().enumerate() {
        for (n, interface) in instance.interfaces.iter().enumerate() {
            if checked.groups_of(i, n).next().is_none() {
                out.push(Finding {
                    kind: "unprotected-interface".into(),
                    severity: Severity::Warning,
                    resource: format!("{}/{}", instance.name, interface.name),
                    place: interface.place.to_string(),
                    why: "the interface is in no security group, so nothing is filtered on it".into(),
                    fix: "add it to a group under `groups:`".into(),
                });
            }
        }
    }
    for group in &checked.spec().groups {
        for direction in Direction::BOTH {
            group_findings(checked, group, direction, hits, &mut out);
        }
    }
    out.sort_by(|a, b| b.severity.cmp(&a.severity).then_with(|| a.resource.cmp(&b.resource)));
    out
}

fn group_findings(
    checked: &Checked,
    group: &Group,
    direction: Direction,
    hits: Option<(&BTreeMap<String, u64>, u64)>,
    out: &mut Vec<Finding>,
) {
    let mut rules = rules_of(checked, group, direction);
    rules.sort_by(|a, b| (a.priority, a.policy, &a.label).cmp(&(b.priority, b.policy, &b.label)));
    let (deciding, open) = deciders(checked, group, direction, &rules);

    // A rule as written may mean several; it is dead only if all of them are.
    let mut labels: Vec<&str> = rules.iter().map(|rule| rule.label.as_str()).collect();
    labels.dedup();
    let mut seen = BTreeSet::new();
    for label in labels.into_iter().filter(|label| seen.insert(label.to_owned())) {
        let mine: Vec<usize> = (0..rules.len()).filter(|i| rules[*i].label == label).collect();
        let Some(first) = mine.first().map(|i| &rules[*i]) else { continue };
        let covers: Vec<Option<&IntentRule>> = mine.iter().map(|i| covering(checked, &rules, *i)).collect();
        let finding = |kind: &str, severity, why: String, fix: &str| Finding {
            kind: kind.into(),
            severity,
            resource: label.to_owned(),
            place: first.place.to_string(),
            why,
            fix: fix.into(),
        };
        let empty: BTreeSet<String> = (mine.iter())
            .filter_map(|i| match &rules[*i].peer {
                IntentPeer::Set(name) if crate::intent::set_members(checked, name).is_empty() => Some(name.clone()),
                _ => None,
            })
            .collect();
        if mine.iter().all(|i| matches!(&rules[*i].peer, IntentPeer::Set(name) if empty.contains(name))) {
            let names: Vec<String> = empty.into_iter().collect();
            out.push(finding(
                "empty-rule",
                Severity::Note,
                format!("{} holds no address now, so it matches nothing", names.join(" and ")),
                "add members or entries, or remove the rule if nobody is coming",
            ));
        } else if covers.iter().all(Option::is_some) {
            let by: BTreeSet<&str> = covers.iter().flatten().map(|rule| rule.label.as_str()).collect();
            let by: Vec<&str> = by.into_iter().collect();
            let same = covers.iter().flatten().all(|rule| rule.policy == first.policy);
            let (kind, why) = if same {
                (
                    "redundant-rule",
                    format!(
                        "{} already {}s all that it matches, at the same or a higher priority",
                        by.join(" and "),
                        word(first.policy)
                    ),
                )
            } else {
                (
                    "shadowed-rule",
                    format!(
                        "{} comes first and {}s all that it matches, so it never decides",
                        by.join(" and "),
                        word(other(first.policy))
                    ),
                )
            };
            let severity = if same { Severity::Note } else { Severity::Warning };
            out.push(finding(kind, severity, why, "remove it, or give it a higher priority (a smaller number)"));
        } else if mine.iter().all(|i| !deciding.contains(i)) {
            let why = "rules that come first together match all that it matches, so it never decides".to_owned();
            out.push(finding(
                "shadowed-rule",
                Severity::Warning,
                why,
                "remove it, or give it a higher priority (a smaller number)",
            ));
        }
        let exposed: Vec<&(u16, &str, Severity)> =
            SENSITIVE.iter().filter(|(port, ..)| mine.iter().any(|i| open.contains(&(*i, *port)))).collect();
        if let Some(worst) = exposed.iter().map(|(_, _, severity)| *severity).max() {
            let names: Vec<String> = exposed.iter().take(6).map(|(port, name, _)| format!("{name} ({port})")).collect();
            let more = if exposed.len() > 6 { format!(" and {} more", exposed.len() - 6) } else { String::new() };
            out.push(finding(
                "high-risk-rule",
                worst,
                format!("every address in the world may reach {}{more}", names.join(", ")),
                "name the addresses that need it (`from: 203.0.113.7`, a prefix list, a group)",
            ));
        }
        if let Some((hits, since_s)) = hits
            && mine.iter().all(|i| hits.get(&rules[*i].id).is_some_and(|packets| *packets == 0))
        {
            out.push(finding(
                "unused-rule",
                Severity::Note,
                format!("no packet has matched it in {}", duration(since_s)),
                "remove it if nothing needs it",
            ));
        }
    }
}

fn word(policy: Policy) -> &'static str {
    if policy == Policy::Accept { "accept" } else { "drop" }
}

fn other(policy: Policy) -> Policy {
    if policy == Policy::Accept { Policy::Drop } else { Policy::Accept }
}

fn duration(seconds: u64) -> String {
    match seconds {
        s if s < 120 => format!("{s} seconds"),
        s if s < 7_200 => format!("{} minutes", s / 60),
        s if s < 172_800 => format!("{} hours", s / 3_600),
        s => format!("{} days", s / 86_400),
    }
}

/// The rules that decide at least one packet, and the sensitive TCP ports that each opens to everybody.
fn deciders(
    checked: &Checked,
    group: &Group,
    direction: Direction,
    rules: &[IntentRule],
) -> (BTreeSet<usize>, BTreeSet<(usize, u16)>) {
    let sets = (rules.iter())
        .filter_map(|rule| match &rule.peer {
            IntentPeer::Set(name) => Some((name.clone(), crate::intent::set_members(checked, name))),
            IntentPeer::Prefix(_) => None,
        })
        .collect();
    let mut attachment = Attachment {
        name: group.name.clone(),
        device: "any".into(),
        guest: false,
        addresses: vec![],
        mac: None,
        groups: vec![group.name.clone()],
        kind: group.kind,
        inner: vec![],
        ingress: vec![],
        egress: vec![],
    };
    match direction {
        Direction::Ingress => attachment.ingress = rules.to_vec(),
        Direction::Egress => attachment.egress = rules.to_vec(),
    }
    let mut intent = Intent::empty(&group.name);
    intent.sets = sets;
    let by_id: BTreeMap<&str, usize> = rules.iter().enumerate().rev().map(|(i, rule)| (rule.id.as_str(), i)).collect();
    let mut deciding = BTreeSet::new();
    let mut open = BTreeSet::new();
    for family in Family::BOTH {
        let (flats, decides) = flatten(&intent, &attachment, direction, family);
        let Ok(cells) = cut(&flats, family.max(), CELLS_MAX) else {
            deciding.extend(0..rules.len());
            continue;
        };
        let index = |flat: usize| by_id.get(decides[flat].id).copied();
        let opens = |rule: usize, slot: &Slot| -> Vec<(usize, u16)> {
            match slot {
                Slot::Ports { protocol: 6, first, last }
                    if direction == Direction::Ingress && rules[rule].policy == Policy::Accept =>
                {
                    let open = SENSITIVE.iter().filter(|(port, ..)| first <= port && port <= last);
                    open.map(|(port, ..)| (rule, *port)).collect()
                }
                _ => Vec::new(),
            }
        };
        for cell in &cells.exact {
            let Some(rule) = index(cell.rule) else { continue };
            deciding.insert(rule);
            // A rule about one of our addresses, or about source ports, opens it to the world all the same.
            if flats[cell.rule].any_peer {
                open.extend(opens(rule, &cell.slot));
            }
        }
        deciding.extend(cells.peer.iter().flat_map(|class| class.cells.iter().filter_map(|(_, rule)| index(*rule))));
        for (slot, rule) in &cells.any {
            let Some(rule) = index(*rule) else { continue };
            deciding.insert(rule);
            open.extend(opens(rule, slot));
        }
    }
    (deciding, open)
}

/// One rule of the list that matches all that rule `at` matches and comes no later (semantics §1.10).
fn covering<'a>(checked: &Checked, rules: &'a [IntentRule], at: usize) -> Option<&'a IntentRule> {
    if rules.len() > PAIRS_MAX {
        return None;
    }
    let rule = &rules[at];
    (rules.iter().enumerate())
        .filter(|(n, other)| {
            // Of two equal rules the first stays.
            let before = (other.priority, other.policy) < (rule.priority, rule.policy);
            let tied = (other.priority, other.policy) == (rule.priority, rule.policy);
            before || (tied && (*n < at || !covers(checked, rule, other)))
        })
        .map(|(_, other)| other)
        .find(|other| other.label != rule.label && covers(checked, other, rule))
}

fn covers(checked: &Checked, wide: &IntentRule, narrow: &IntentRule) -> bool {
    let protocol = wide.protocol == Protocol::All || wide.protocol == narrow.protocol;
    let range = |wide: Option<keepwall_core::PortRange>, narrow: Option<keepwall_core::PortRange>| match (wide, narrow)
    {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(wide), Some(narrow)) => wide.first() <= narrow.first() && narrow.last() <= wide.last(),
    };
    let local = match (wide.local, narrow.local) {
        (None, _) => true,
        (Some(wide), None) => wide.is_everything(),
        (Some(wide), Some(narrow)) => wide.covers(&narrow),
    };
    let members = |peer: &IntentPeer| match peer {
        IntentPeer::Prefix(prefix) => vec![*prefix],
        IntentPeer::Set(name) => crate::intent::set_members(checked, name),
    };
    let peer = wide.peer == narrow.peer || {
        let (wide, narrow) = (members(&wide.peer), members(&narrow.peer));
        !narrow.is_empty() && narrow.iter().all(|n| wide.iter().any(|w| w.covers(n)))
    };
    protocol && range(wide.ports, narrow.ports) && range(wide.source_ports, narrow.source_ports) && local && peer
}
