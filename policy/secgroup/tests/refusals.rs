//! What the check refuses although the posture parser would have seen it first, and that no kind of refusal is
//! without a case.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests read their cases from files")]

use std::fs;
use std::path::Path;

use keepwall_posture::{SourceFile, parse};
use keepwall_secgroup::check::{PROBLEMS_MAX, check};
use keepwall_secgroup::spec::{InnerAccess, Spec};

fn spec() -> Spec {
    let text = "version: 1\n\
        instances:\n  web: { interfaces: { eth0: { addresses: [10.0.0.5], groups: [web] } } }\n\
        prefix_lists: { office: { family: ipv4, max_entries: 2 } }\n\
        port_lists: { site: { max_entries: 2 } }\n\
        security_groups:\n  web:\n    ingress:\n      - { protocol: icmp, from: 10.0.0.0/8 }\n      - { ports: 22, from: 10.0.0.0/8, to: 10.0.0.5 }\n  ci: { type: advanced }\n";
    parse(&[SourceFile::new("by-hand.yaml", text)]).unwrap()
}

/// What is refused after `change`, a line for each problem.
fn refused(change: impl FnOnce(&mut Spec)) -> Vec<String> {
    let mut spec = spec();
    change(&mut spec);
    check(spec).unwrap_err().iter().map(|problem| problem.to_string().replace("\n  ", " | ")).collect()
}

#[test]
fn the_spec_that_the_others_break_is_fine() {
    assert!(check(spec()).is_ok());
}

#[test]
fn a_name_stands_for_one_thing() {
    let found = refused(|spec| {
        spec.instances.push(spec.instances[0].clone());
        spec.instances[1].interfaces.clear();
        spec.groups.push(spec.groups[1].clone());
        spec.prefix_lists.push(spec.prefix_lists[0].clone());
        spec.port_lists.push(spec.port_lists[0].clone());
    });
    assert_eq!(
        found,
        [
            "by-hand.yaml:3: instance `web` is declared twice | the first stands at by-hand.yaml:3",
            "by-hand.yaml:11: security group `ci` is declared twice | the first stands at by-hand.yaml:11",
            "by-hand.yaml:4: prefix list `office` is declared twice | the first stands at by-hand.yaml:4",
            "by-hand.yaml:5: port list `site` is declared twice | the first stands at by-hand.yaml:5",
        ]
    );
}

#[test]
fn a_device_has_a_name_that_linux_takes() {
    for (device, bytes) in [("", 0), ("sixteen-bytes-xx", 16)] {
        let found = refused(|spec| spec.instances[0].interfaces[0].device = device.into());
        let wanted = format!(
            "by-hand.yaml:3: device `{device}` has {bytes} bytes; Linux allows 1 to 15 | name the device with `device:`"
        );
        assert_eq!(found, [wanted]);
    }
}

#[test]
fn an_advanced_group_stays_isolated() {
    assert_eq!(
        refused(|spec| spec.groups[1].inner_access = Some(InnerAccess::Accept)),
        [
            "by-hand.yaml:11: advanced group `ci` is isolated; inner_access cannot be accept | remove `inner_access`, or use `type: basic`"
        ]
    );
}

#[test]
fn a_rule_is_of_one_family() {
    let found = refused(|spec| {
        let six = keepwall_secgroup::spec::Peer::Prefix("fd00::/16".parse().unwrap());
        spec.groups[0].ingress.iter_mut().for_each(|rule| rule.peers[0].peer = six.clone());
    });
    assert_eq!(
        found,
        [
            "by-hand.yaml:9: icmp is IPv4 only, and fd00::/16 is IPv6 | use `protocol: icmpv6` for IPv6",
            "by-hand.yaml:10: one side of the rule is IPv6 (fd00::/16), the other IPv4 (10.0.0.5/32) | both sides of a rule are of one family",
        ]
    );
}

#[test]
fn so_many_problems_are_listed_and_no_more() {
    let found = refused(|spec| {
        let rule = spec.groups[0].ingress[1].clone();
        for n in 0..PROBLEMS_MAX + 50 {
            let mut rule = rule.clone();
            rule.peers[0].peer = keepwall_secgroup::spec::Peer::Group(format!("nobody{n}"));
            spec.groups[0].ingress.push(rule);
        }
    });
    assert_eq!(found.len(), PROBLEMS_MAX);
}

/// A word or two of each message in `check.rs`.
const KINDS: [&str; 24] = [
    "is declared twice",
    "security groups; the limit is",
    "prefix lists; the limit is",
    "which host/eno1 has already",
    "Linux allows 1 to 15",
    "there is no instance",
    "it is a guest itself",
    "has no addresses",
    "there is no security group",
    "inner_access cannot be accept",
    "there is no port list",
    "there is no prefix list",
    "IPv4 only, and",
    "one side of the rule is",
    "source and destination are both",
    "names itself",
    "cannot name the peer of a rule",
    "cannot be named as the peer of a rule",
    "rules that name another group; the limit is",
    "rules name prefix list",
    "there is no instance, group or prefix list",
    "has basic and advanced groups",
    "groups; the limit is",
    "rules (",
];

#[test]
fn no_kind_of_refusal_is_without_a_case() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut told = fs::read_to_string(here.join("refusals.rs")).unwrap();
    // What stands in this list does not count as a case.
    let list = told.find("const KINDS").unwrap()..told.find("#[test]\nfn no_kind").unwrap();
    told.replace_range(list, "");
    for entry in fs::read_dir(here.join("cases")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ext| ext == "out") {
            told.push_str(&fs::read_to_string(path).unwrap());
        }
    }
    let mut kinds = KINDS.to_vec();
    kinds.extend(["private addresses; the limit is", "interfaces; the limit is"]);
    let missing: Vec<&&str> = kinds.iter().filter(|kind| !told.contains(**kind)).collect();
    assert!(missing.is_empty(), "no case shows: {missing:?}");
    // A message that is added to the check without a case is noticed here.
    let source = fs::read_to_string(here.join("../src/check.rs")).unwrap();
    assert_eq!(source.matches("problem(").count(), PROBLEM_CALLS, "add a case and its words to KINDS, then count");
}

/// Mentions of `problem(` in `check.rs`, its definition included; one more needs one more case.
const PROBLEM_CALLS: usize = 21;
