//! What an operator wrote, and what every stage made of it: one file per case.
//!
//! `tests/cases/NAME.yaml` is a posture; `tests/cases/NAME.out` is its resolved rules in the order of evaluation, the
//! maps that they become, who reaches whom, how its own tests came out, and its health; or why it was refused.
//! `UPDATE=1 cargo test -p keepwall-secgroup` rewrites the latter; read the difference.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests read their cases from files")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use keepwall_ir::nft::{ElementData, FieldRange, FieldType, Map, MapData, Verdict};
use keepwall_posture::{SourceFile, parse};
use keepwall_secgroup::check::{Checked, check};
use keepwall_secgroup::health;
use keepwall_secgroup::intent::{Attachment, Intent, IntentRule, resolve};
use keepwall_secgroup::lower::lower;
use keepwall_secgroup::reach::{describe, matrix, run_tests};
use keepwall_secgroup::spec::{Direction, Policy};

/// Maps with more elements than this show their number only.
const ELEMENTS_SHOWN: usize = 12;

fn told(name: &str, text: &str) -> String {
    let spec = match parse(&[SourceFile::new(name, text)]) {
        Ok(spec) => spec,
        Err(problems) => return problems.iter().map(|problem| format!("not a posture: {problem}\n")).collect(),
    };
    let checked = match check(spec) {
        Ok(checked) => checked,
        Err(problems) => return problems.iter().map(|problem| format!("{problem}\n")).collect(),
    };
    let mut out = String::new();
    for instance in &checked.spec().instances {
        let intent = resolve(&checked, &instance.name).unwrap();
        intent.validate().unwrap();
        if !intent.attachments.is_empty() {
            resolved(&mut out, &intent);
            lowered(&mut out, &intent);
        }
    }
    outlook(&mut out, &checked);
    out
}

fn resolved(out: &mut String, intent: &Intent) {
    writeln!(out, "=== intent {}", intent.instance).unwrap();
    for attachment in &intent.attachments {
        let Attachment { name, device, groups, kind, inner, .. } = attachment;
        let guest = if attachment.guest { " of a guest" } else { "" };
        writeln!(out, "{name} on {device}{guest}: {kind:?}, {}", groups.join(" + ")).unwrap();
        for direction in Direction::BOTH {
            writeln!(out, "  {direction}").unwrap();
            if direction == Direction::Ingress {
                inner.iter().for_each(|set| writeln!(out, "        accept all from members of {set}").unwrap());
            }
            attachment.rules(direction).iter().for_each(|rule| writeln!(out, "    {}", rule_text(rule)).unwrap());
            writeln!(out, "        {} the rest", word(attachment.default_policy(direction))).unwrap();
        }
    }
    for (name, members) in &intent.sets {
        let members: Vec<String> = members.iter().map(ToString::to_string).collect();
        writeln!(out, "set {name}: {}", members.join(" ")).unwrap();
    }
}

fn word(policy: Policy) -> &'static str {
    if policy == Policy::Accept { "accept" } else { "drop" }
}

fn rule_text(rule: &IntentRule) -> String {
    let mut text = format!("{:>3} {} {}", rule.priority, word(rule.policy), rule.protocol);
    let mut also = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            write!(text, " {name}{value}").unwrap();
        }
    };
    also("", rule.ports.map(|ports| ports.to_string()));
    also("source port ", rule.source_ports.map(|ports| ports.to_string()));
    also("peer ", Some(rule.peer.to_string()));
    also("own ", rule.local.map(|prefix| prefix.to_string()));
    format!("{text}  {} ({})", rule.label, rule.place)
}

/// The maps that rules became; the chains are the same for every posture.
fn lowered(out: &mut String, intent: &Intent) {
    let lowered = match lower(intent, "g1") {
        Ok(lowered) => lowered,
        Err(large) => return writeln!(out, "--- not lowered: {large}").unwrap(),
    };
    writeln!(out, "--- maps of {}", intent.instance).unwrap();
    for map in lowered.table.maps.iter().filter(|map| map.counters || map.data == MapData::Mark) {
        writeln!(out, "{} {}", map.name, map.elements.len()).unwrap();
        for element in map.elements.iter().take(if map.elements.len() > ELEMENTS_SHOWN { 0 } else { ELEMENTS_SHOWN }) {
            let key: Vec<String> = element.key.iter().zip(&map.key).map(|(range, kind)| field(range, *kind)).collect();
            let data = match &element.data {
                ElementData::Verdict(Verdict::Goto(chain)) if chain.contains("_allow.") => "accept".to_owned(),
                ElementData::Verdict(Verdict::Goto(chain)) if chain.contains("_deny.") => "drop".to_owned(),
                other => format!("{other:?}"),
            };
            writeln!(out, "    {} : {data}  {}", key.join(" . "), element.comment).unwrap();
        }
        assert_disjoint(map);
    }
}

/// The kernel refuses elements that overlap.
fn assert_disjoint(map: &Map) {
    for (n, a) in map.elements.iter().enumerate() {
        for b in &map.elements[n + 1..] {
            let apart = a.key.iter().zip(&b.key).any(|(x, y)| x.last < y.first || y.last < x.first);
            assert!(apart, "{}: {:?} overlaps {:?}", map.name, a.key, b.key);
        }
    }
}

fn field(range: &FieldRange, kind: FieldType) -> String {
    let one = |bytes: &[u8]| match kind {
        FieldType::Ipv4Addr => std::net::Ipv4Addr::from(<[u8; 4]>::try_from(bytes).unwrap()).to_string(),
        FieldType::Ipv6Addr => std::net::Ipv6Addr::from(<[u8; 16]>::try_from(bytes).unwrap()).to_string(),
        FieldType::Mark => format!("class {}", u32::from_ne_bytes(bytes.try_into().unwrap())),
        _ => bytes.iter().fold(0u32, |number, byte| number << 8 | u32::from(*byte)).to_string(),
    };
    let (first, last) = (one(&range.first), one(&range.last));
    if first == last { first } else { format!("{first}-{last}") }
}

fn outlook(out: &mut String, checked: &Checked) {
    out.push_str("=== reach\n");
    for ((from, to), what) in matrix(checked) {
        let what: Vec<String> = what.into_iter().collect();
        writeln!(out, "{from} -> {to}: {}", what.join(", ")).unwrap();
    }
    out.push_str("=== tests\n");
    for result in run_tests(checked) {
        let text = describe(&result.test);
        match result.failure {
            None => writeln!(out, "holds: {text}").unwrap(),
            Some(why) => writeln!(out, "FAILS: {text}\n    {why}").unwrap(),
        }
    }
    out.push_str("=== health\n");
    // As if nothing had come by for an hour.
    let hits: BTreeMap<String, u64> = BTreeMap::new();
    for finding in health::findings(checked, Some((&hits, 3_600))) {
        writeln!(out, "{:?} {} {} ({})", finding.severity, finding.kind, finding.resource, finding.place).unwrap();
        writeln!(out, "    {}\n    {}", finding.why, finding.fix).unwrap();
    }
}

fn cases() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut cases: Vec<PathBuf> = fs::read_dir(here).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|path| path.extension().is_some_and(|ext| ext == "yaml"));
    cases.sort();
    cases
}

#[test]
fn each_case_becomes_exactly_this_at_every_stage() {
    let cases = cases();
    assert!(cases.len() >= 16, "only {} cases", cases.len());
    let mut wrong = Vec::new();
    for path in cases {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let found = told(&name, &fs::read_to_string(&path).unwrap());
        let golden = path.with_extension("out");
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&golden, &found).unwrap();
        } else if fs::read_to_string(&golden).unwrap_or_default() != found {
            wrong.push(format!("--- {name}\n{found}"));
        }
    }
    assert!(wrong.is_empty(), "not as in the .out files (UPDATE=1 rewrites them):\n{}", wrong.join("\n"));
}

#[test]
fn only_the_cases_named_refused_are_refused() {
    for path in cases() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let told = told(&name, &fs::read_to_string(&path).unwrap());
        assert!(!told.starts_with("not a posture"), "{told}");
        let refused = !told.starts_with("=== ");
        assert_eq!(refused, name.starts_with("refused-"), "{name}: {told}");
    }
}
