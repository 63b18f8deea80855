//! What this crate promises, against the real kernel, in network namespaces that exist for one test each.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::ControlFlow;
use std::process::Command;
use std::time::{Duration, Instant};

use keepwall_ir::nft::decode::{self, TraceStep};
use keepwall_ir::nft::encode::{At, Batch};
use keepwall_ir::nft::*;
use keepwall_nft::*;
use keepwall_sys::{link, namespace};

// ---- what the tests are about

/// Runs on a thread of its own in a new namespace; says so and does nothing where that is not allowed.
fn in_namespace(work: impl FnOnce() + Send) {
    match namespace::in_a_new_one(work) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => eprintln!("skipped: needs root"),
        result => result.unwrap(),
    }
}

/// What `nft` says, run in this namespace; `None` if it is not installed.
fn nft(args: &[&str]) -> Option<(bool, String)> {
    let output = match Command::new("nft").args(args).output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("nft is not installed, its view is not compared: {error}");
            return None;
        }
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Some((output.status.success(), text))
}

fn v4(a: u8, b: u8, c: u8, d: u8) -> Vec<u8> {
    vec![a, b, c, d]
}

fn v6(text: &str) -> Vec<u8> {
    text.parse::<Ipv6Addr>().unwrap().octets().to_vec()
}

fn ports(first: u16, last: u16) -> FieldRange {
    FieldRange::new(first.to_be_bytes(), last.to_be_bytes())
}

fn rule(comment: &str, exprs: Vec<Expr>) -> Rule {
    Rule { exprs, comment: comment.to_owned() }
}

fn payload(base: PayloadBase, offset: u32, len: u32, dreg: Reg) -> Expr {
    Expr::Payload { base, offset, len, dreg }
}

fn lookup(map: &str, sreg: Reg, into: LookupInto) -> Expr {
    Expr::Lookup { map: map.to_owned(), sreg, into, invert: false }
}

fn family_is(number: u8) -> [Expr; 2] {
    [Expr::Meta { key: Meta::NfProto, dreg: 0 }, Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: vec![number] }]
}

fn counter() -> Expr {
    Expr::Counter { packets: 0, bytes: 0 }
}

fn base(name: &str, hook: Hook, accept: bool, rules: Vec<Rule>) -> Chain {
    let base = Base { kind: "filter".to_owned(), hook, priority: -5, accept };
    Chain { name: name.to_owned(), base: Some(base), rules }
}

fn chain(name: &str, rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), base: None, rules }
}

fn verdict_element(key: Vec<FieldRange>, verdict: Verdict, comment: &str) -> Element {
    Element { key, data: ElementData::Verdict(verdict), comment: comment.to_owned() }
}

fn mark_element(first: Vec<u8>, last: Vec<u8>, mark: u32, comment: &str) -> Element {
    Element { key: vec![FieldRange::new(first, last)], data: ElementData::Mark(mark), comment: comment.to_owned() }
}

fn map(name: &str, key: &[FieldType], interval: bool, data: MapData, elements: Vec<Element>) -> Map {
    Map { name: name.to_owned(), key: key.to_vec(), interval, data, counters: false, elements }
}

/// Everything that Keepwall loads, at once.
fn rich(version: u32, flags: u32) -> Table {
    use FieldType::{CtState, IfName, InetProto, InetService, Ipv4Addr, Ipv6Addr, Mark};
    let named = |name: &str| format!("{name}_{version}");
    let class4 = map(
        &named("class4"),
        &[Ipv4Addr],
        true,
        MapData::Mark,
        vec![
            mark_element(v4(0, 0, 0, 0), v4(9, 255, 255, 255), 1, "from the very first"),
            mark_element(v4(10, 0, 0, 0), v4(10, 0, 0, 0), 2, "adjacent, one address"),
            mark_element(v4(10, 0, 0, 2), v4(10, 0, 0, 9), 3, ""),
            mark_element(v4(203, 0, 113, 7), v4(255, 255, 255, 255), 4, "to the very last"),
        ],
    );
    let class6 = map(
        &named("class6"),
        &[Ipv6Addr],
        true,
        MapData::Mark,
        vec![
            mark_element(v6("::"), v6("::ffff"), 1, ""),
            mark_element(v6("2001:db8::"), v6("2001:db8::ffff:ffff"), 2, "documentation"),
            mark_element(v6("ff00::"), v6("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), 3, ""),
        ],
    );
    let exact = |mark: u32| FieldRange::exact(mark.to_ne_bytes());
    let mut verdicts = map(
        &named("verdicts"),
        &[Mark, InetProto, InetService],
        true,
        MapData::Verdict,
        vec![
            verdict_element(vec![exact(1), FieldRange::exact([6]), ports(80, 80)], Verdict::Accept, "web#0"),
            verdict_element(
                vec![exact(1), FieldRange::exact([17]), ports(0, 65535)],
                Verdict::Jump(named("logged")),
                "web#1 with a long comment, 128 bytes and not one more: \
                 0123456789012345678901234567890123456789012345678901234567890123456789012",
            ),
            verdict_element(vec![exact(2), FieldRange::new([0], [255]), ports(1, 1023)], Verdict::Drop, ""),
        ],
    );
    verdicts.counters = true;
    let mut direct6 = map(
        &named("direct6"),
        &[Ipv6Addr, Ipv6Addr, InetService],
        true,
        MapData::Verdict,
        vec![verdict_element(
            vec![
                FieldRange::new(v6("fe80::"), v6("fe80::ffff:ffff:ffff:ffff")),
                FieldRange::new(v6("::"), v6("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")),
                ports(546, 547),
            ],
            Verdict::Goto(named("logged")),
            "dhcp",
        )],
    );
    direct6.counters = true;
    let devices = map(
        &named("devices"),
        &[IfName],
        false,
        MapData::Verdict,
        vec![
            verdict_element(vec![FieldRange::exact(ifname("lo"))], Verdict::Accept, "loopback"),
            verdict_element(vec![FieldRange::exact(ifname("tap0"))], Verdict::Jump(named("classes")), "web#eth0"),
        ],
    );
    let state = |bit: u32| vec![FieldRange::exact(bit.to_ne_bytes())];
    let states = map(
        &named("states"),
        &[CtState],
        false,
        MapData::Verdict,
        vec![
            verdict_element(state(1), Verdict::Drop, "invalid"),
            verdict_element(state(2), Verdict::Accept, "established"),
            verdict_element(state(4), Verdict::Accept, "related"),
            verdict_element(state(8), Verdict::Continue, "new"),
        ],
    );
    let hosts = map(
        &named("hosts"),
        &[Ipv4Addr, InetService],
        false,
        MapData::Nothing,
        vec![Element {
            key: vec![FieldRange::exact(v4(192, 0, 2, 1)), ports(53, 53)],
            data: ElementData::Nothing,
            comment: "resolver".to_owned(),
        }],
    );

    let through_mark = |four: bool| {
        let (family, offset, len, class) =
            if four { (2, 12, 4, named("class4")) } else { (10, 8, 16, named("class6")) };
        let mut exprs = family_is(family).to_vec();
        exprs.extend([
            Expr::Meta { key: Meta::Mark, dreg: 8 },
            payload(PayloadBase::Network, offset, len, 0),
            lookup(&class, 0, LookupInto::Register(0)),
            Expr::MarkSet { sreg: 0 },
            Expr::Meta { key: Meta::Mark, dreg: 0 },
            Expr::MarkSet { sreg: 8 },
            Expr::Meta { key: Meta::L4Proto, dreg: 1 },
            payload(PayloadBase::Transport, 2, 2, 2),
            lookup(&named("verdicts"), 0, LookupInto::Verdict),
        ]);
        exprs
    };
    let classes = chain(
        &named("classes"),
        vec![rule("classes v4", through_mark(true)), rule("", through_mark(false)), rule("", vec![counter()])],
    );
    let logged = chain(
        &named("logged"),
        vec![
            rule(
                "at most ten a second",
                vec![
                    Expr::Limit { per_s: 10, burst: 20, over: false },
                    Expr::Log { group: 4242, prefix: "web#1 drop".to_owned(), snaplen: 128 },
                ],
            ),
            rule("", vec![counter(), Expr::Verdict(Verdict::Drop)]),
        ],
    );
    let state_rule =
        rule("state", vec![Expr::Ct { key: CtKey::State, dreg: 0 }, lookup(&named("states"), 0, LookupInto::Verdict)]);
    let input = base(
        "input",
        Hook::Input,
        true,
        vec![
            rule(
                "devices",
                vec![Expr::Meta { key: Meta::IifName, dreg: 0 }, lookup(&named("devices"), 0, LookupInto::Verdict)],
            ),
            state_rule,
            rule(
                "",
                vec![
                    Expr::Ct { key: CtKey::State, dreg: 0 },
                    Expr::Bitwise { sreg: 0, dreg: 0, mask: 8u32.to_ne_bytes().to_vec(), xor: vec![0; 4] },
                    Expr::Cmp { sreg: 0, op: CmpOp::Neq, data: vec![0; 4] },
                    counter(),
                ],
            ),
            rule("ports of UDP", {
                let mut exprs = vec![
                    Expr::Meta { key: Meta::L4Proto, dreg: 0 },
                    Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: vec![17] },
                    payload(PayloadBase::Transport, 2, 2, 4),
                ];
                exprs.push(Expr::Range { sreg: 4, invert: true, from: vec![0, 53], to: vec![0, 80] });
                exprs.push(Expr::Verdict(Verdict::Jump(named("logged"))));
                exprs
            }),
            rule("not the resolver", {
                let mut exprs = family_is(2).to_vec();
                exprs.extend([
                    payload(PayloadBase::Network, 12, 4, 0),
                    Expr::Meta { key: Meta::L4Proto, dreg: 5 },
                    Expr::Cmp { sreg: 5, op: CmpOp::Eq, data: vec![17] },
                    payload(PayloadBase::Transport, 2, 2, 1),
                    Expr::Lookup { map: named("hosts"), sreg: 0, into: LookupInto::Nothing, invert: true },
                    Expr::Verdict(Verdict::Return),
                ]);
                exprs
            }),
            rule("dhcp v6", {
                let mut exprs = family_is(10).to_vec();
                exprs.extend([
                    payload(PayloadBase::Network, 8, 16, 0),
                    payload(PayloadBase::Network, 24, 16, 4),
                    payload(PayloadBase::Transport, 2, 2, 8),
                    lookup(&named("direct6"), 0, LookupInto::Verdict),
                ]);
                exprs
            }),
        ],
    );
    let timeouts = vec![
        CtTimeout { name: named("tcp910"), l4proto: 6, l3proto: 2, policy: vec![(3, 910), (7, 30)] },
        CtTimeout { name: named("udp"), l4proto: 17, l3proto: 10, policy: vec![(1, 20), (2, 60)] },
    ];
    let prerouting = base(
        "prerouting",
        Hook::Prerouting,
        true,
        vec![
            rule(
                "trace me",
                vec![
                    Expr::Meta { key: Meta::Mark, dreg: 0 },
                    Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: 77u32.to_ne_bytes().to_vec() },
                    Expr::TraceOn,
                ],
            ),
            rule("idle", {
                let mut exprs = family_is(2).to_vec();
                exprs.extend([
                    Expr::Meta { key: Meta::L4Proto, dreg: 0 },
                    Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: vec![6] },
                    Expr::CtTimeoutSet { name: named("tcp910") },
                ]);
                exprs
            }),
        ],
    );
    let mut published = family_is(2).to_vec();
    published.extend([
        Expr::Ct { key: CtKey::Status, dreg: 0 },
        Expr::Bitwise { sreg: 0, dreg: 0, mask: 32u32.to_ne_bytes().to_vec(), xor: vec![0; 4] },
        Expr::Cmp { sreg: 0, op: CmpOp::Neq, data: vec![0; 4] },
        Expr::Ct { key: CtKey::OriginalDst4, dreg: 0 },
        Expr::Ct { key: CtKey::OriginalDport, dreg: 1 },
        lookup(&named("hosts"), 0, LookupInto::Nothing),
        Expr::Verdict(Verdict::Accept),
    ]);
    let forward = base("forward", Hook::Forward, true, vec![rule("published", published)]);
    let output = base("output", Hook::Output, true, vec![rule("", vec![Expr::Verdict(Verdict::Accept)])]);
    Table {
        family: TableFamily::Inet,
        name: "keepwall".to_owned(),
        flags,
        maps: vec![class4, class6, verdicts, direct6, devices, states, hosts],
        chains: vec![input, prerouting, forward, output, classes, logged],
        timeouts,
    }
}

fn normal(mut table: Table) -> Table {
    decode::normalise(&mut table);
    table
}

/// A table whose input chain looks a destination port up in one verdict map.
fn small(version: u32, flags: u32, elements: Vec<Element>) -> Table {
    use FieldType::{InetProto, InetService, Ipv4Addr};
    let name = format!("verdicts_{version}");
    let mut verdicts = map(&name, &[Ipv4Addr, InetProto, InetService], true, MapData::Verdict, elements);
    verdicts.counters = true;
    let mut exprs = family_is(2).to_vec();
    exprs.extend([
        payload(PayloadBase::Network, 12, 4, 0),
        Expr::Meta { key: Meta::L4Proto, dreg: 1 },
        payload(PayloadBase::Transport, 2, 2, 2),
        lookup(&name, 0, LookupInto::Verdict),
    ]);
    let policy = chain(&format!("policy_{version}"), vec![rule("policy", exprs)]);
    let jump = rule("", vec![Expr::Verdict(Verdict::Jump(policy.name.clone()))]);
    Table {
        family: TableFamily::Inet,
        name: "keepwall".to_owned(),
        flags,
        maps: vec![verdicts],
        chains: vec![base("input", Hook::Input, true, vec![jump]), policy],
        timeouts: Vec::new(),
    }
}

fn port_element(first: u16, last: u16, verdict: Verdict, comment: &str) -> Element {
    let anywhere = FieldRange::new(v4(0, 0, 0, 0), v4(255, 255, 255, 255));
    verdict_element(vec![anywhere, FieldRange::exact([17]), ports(first, last)], verdict, comment)
}

/// `count` elements over different sources and ports.
fn many(count: u32) -> Vec<Element> {
    let element = |n: u32| {
        let source = Ipv4Addr::from(0x0a00_0000 + n * 256).octets();
        let last = Ipv4Addr::from(0x0a00_0000 + n * 256 + 200).octets();
        let port = u16::try_from(n % 60_000).unwrap();
        let key = vec![FieldRange::new(source, last), FieldRange::exact([6]), ports(port, port + 100)];
        verdict_element(key, if n.is_multiple_of(2) { Verdict::Accept } else { Verdict::Drop }, &format!("rule#{n}"))
    };
    (0..count).map(element).collect()
}

const OURS: u32 = TABLE_OWNER | TABLE_PERSIST;

// ---- the tests

#[test]
fn a_rich_table_reads_back_as_it_was_wanted_and_nft_lists_it() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        assert_eq!(driver.observe(TableFamily::Inet, "keepwall").unwrap(), None);
        let wanted = rich(1, 0);
        let outcome = driver.converge(&wanted).unwrap();
        assert!(matches!(outcome, Outcome::Replaced(_)), "{outcome:?}");
        let found = driver.observe(TableFamily::Inet, "keepwall").unwrap().unwrap();
        pretty_assert_equal(&found, &normal(wanted.clone()));
        assert!(matches!(driver.converge(&wanted).unwrap(), Outcome::AlreadyThere));
        for args in [&["list", "ruleset"][..], &["-j", "list", "ruleset"][..]] {
            if let Some((success, text)) = nft(args) {
                assert!(success, "{text}");
                for comment in ["web#0", "from the very first", "loopback", "classes v4", "documentation", "resolver"] {
                    assert!(text.contains(comment), "{comment} is missing in {text}");
                }
            }
        }
        if let Some((_, text)) = nft(&["list", "ruleset"]) {
            for line in
                ["203.0.113.7-255.255.255.255", "0.0.0.0-9.255.255.255", "established", "\"tap0\"", "snaplen 128"]
            {
                assert!(text.contains(line), "{line} is missing in {text}");
            }
        }
        assert!(driver.remove(TableFamily::Inet, "keepwall").unwrap());
        assert!(!driver.remove(TableFamily::Inet, "keepwall").unwrap());
    });
}

fn pretty_assert_equal(found: &Table, wanted: &Table) {
    for (f, w) in found.maps.iter().zip(&wanted.maps) {
        assert_eq!(f, w);
    }
    for (f, w) in found.chains.iter().zip(&wanted.chains) {
        assert_eq!(f, w);
    }
    assert_eq!(found, wanted);
}

#[test]
fn probing_finds_features_and_leaves_nothing() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let features = driver.probe().unwrap();
        assert!(features.verdict_maps && features.conntrack && features.limit, "{features:?}");
        assert!(features.table_flags == OURS || features.table_flags == 0);
        eprintln!("{features:?}");
        assert_eq!(driver.observe_all(10).unwrap(), Vec::new());
    });
}

#[test]
fn overlapping_elements_are_refused_by_name_and_the_old_table_stays() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let old = normal(small(1, OURS, vec![port_element(1, 100, Verdict::Accept, "a")]));
        driver.replace(&old).unwrap();
        let overlapping =
            vec![port_element(1, 100, Verdict::Accept, "first"), port_element(100, 200, Verdict::Drop, "second")];
        let error = driver.replace(&small(2, OURS, overlapping)).unwrap_err();
        assert!(matches!(error, NftError::Overlap { .. }), "{error:?}");
        assert!(error.to_string().contains("verdicts_2"), "{error}");
        assert_eq!(driver.observe(old.family, &old.name).unwrap(), Some(old.clone()));

        let twice = vec![port_element(1, 100, Verdict::Accept, ""), port_element(1, 100, Verdict::Accept, "")];
        let error = driver.replace(&small(3, OURS, twice)).unwrap_err();
        assert!(matches!(error, NftError::Overlap { .. }), "{error:?}");

        let tree = |elements| {
            let mut table = small(4, OURS, vec![]);
            table.maps.push(map("tree_4", &[FieldType::Ipv4Addr], true, MapData::Mark, elements));
            table
        };
        let ranges = vec![
            mark_element(v4(10, 0, 0, 0), v4(10, 0, 0, 9), 1, ""),
            mark_element(v4(10, 0, 0, 9), v4(10, 0, 0, 12), 2, ""),
        ];
        let error = driver.replace(&tree(ranges)).unwrap_err();
        assert!(matches!(error, NftError::Overlap { .. }), "{error:?}");
        assert_eq!(driver.observe(old.family, &old.name).unwrap(), Some(old));
    });
}

#[test]
fn a_bad_last_rule_leaves_the_old_table_untouched() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let old = normal(small(1, OURS, many(100)));
        driver.replace(&old).unwrap();
        let mut bad = small(2, OURS, many(100));
        bad.chains[0].rules.push(rule("bad", vec![lookup("no_such_map", 0, LookupInto::Verdict)]));
        let error = driver.replace(&bad).unwrap_err();
        assert!(error.to_string().contains("\"bad\" of chain input"), "{error}");
        // The new map and chain were created before the bad rule was met; they are gone again.
        assert_eq!(driver.observe(old.family, &old.name).unwrap(), Some(old.clone()));

        let mut foreign = small(3, OURS, vec![]);
        foreign.chains[0].rules.push(rule("", vec![Expr::Unknown { name: "xt".to_owned(), data: vec![] }]));
        let error = driver.replace(&foreign).unwrap_err();
        assert!(matches!(error, NftError::Unloadable { .. }), "{error:?}");
        assert_eq!(driver.observe(old.family, &old.name).unwrap(), Some(old));
    });
}

#[test]
fn a_first_table_that_cannot_be_loaded_leaves_no_table() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let mut bad = small(1, OURS, many(10));
        bad.chains[0].rules.push(rule("bad", vec![lookup("no_such_map", 0, LookupInto::Verdict)]));
        driver.replace(&bad).unwrap_err();
        assert_eq!(driver.observe(bad.family, &bad.name).unwrap(), None);
    });
}

#[test]
fn a_replacement_removes_the_old_names_and_hands_over_what_they_counted() {
    in_namespace(|| {
        link::set_up("lo").unwrap();
        let mut driver = Nft::open().unwrap();
        let first = small(1, OURS, vec![port_element(4000, 4009, Verdict::Accept, "web#0")]);
        driver.replace(&first).unwrap();
        send_udp(4004, 3);
        let counted = driver.counters(&first).unwrap();
        assert_eq!((counted.len(), counted[0].packets), (1, 3), "{counted:?}");

        let second = small(2, OURS, vec![port_element(4000, 4009, Verdict::Drop, "web#0")]);
        let applied = driver.replace_from(&first, &second).unwrap();
        assert!(applied.left_behind.is_none(), "{applied:?}");
        assert_eq!(applied.retired[0].packets, 3);
        assert_eq!(applied.retired[0].map, "verdicts_1");
        assert_eq!(applied.removed, ["policy_1", "verdicts_1"]);
        assert_eq!(driver.observe(second.family, &second.name).unwrap(), Some(normal(second.clone())));

        let third = rich(3, OURS);
        let applied = driver.replace(&third).unwrap();
        assert!(applied.left_behind.is_none(), "{applied:?}");
        let fourth = rich(4, OURS);
        assert!(driver.replace(&fourth).unwrap().left_behind.is_none());
        assert_eq!(driver.observe(fourth.family, &fourth.name).unwrap(), Some(normal(fourth)));
    });
}

#[test]
fn a_base_chain_that_drops_by_policy_comes_and_goes() {
    in_namespace(|| {
        link::set_up("lo").unwrap();
        let mut driver = Nft::open().unwrap();
        let mut closed = small(1, OURS, vec![port_element(4000, 4009, Verdict::Accept, "")]);
        closed.chains[0].base.as_mut().unwrap().accept = false;
        assert!(matches!(driver.converge(&closed).unwrap(), Outcome::Replaced(_)));
        assert!(matches!(driver.converge(&closed).unwrap(), Outcome::AlreadyThere));
        let mut open = small(2, OURS, vec![]);
        open.chains.push(base("output", Hook::Output, true, vec![]));
        assert!(matches!(driver.converge(&open).unwrap(), Outcome::Replaced(_)));
        assert!(matches!(driver.converge(&closed).unwrap(), Outcome::Replaced(_)));

        let mut moved = closed.clone();
        moved.chains[0].base.as_mut().unwrap().priority = 7;
        let error = driver.converge(&moved).unwrap_err();
        assert!(error.to_string().contains("base chain input"), "{error}");
    });
}

#[test]
fn an_owned_table_resists_others_survives_its_owner_and_is_adopted() {
    in_namespace(|| {
        let table = normal(small(1, OURS, many(3)));
        let mut driver = Nft::open().unwrap();
        driver.replace(&table).unwrap();
        if let Some((success, text)) = nft(&["delete", "table", "inet", "keepwall"]) {
            assert!(!success, "{text}");
            nft(&["flush", "ruleset"]);
        }
        assert_eq!(driver.observe(table.family, &table.name).unwrap(), Some(table.clone()));

        let mut other = Nft::open().unwrap();
        let next = small(2, OURS, many(4));
        let error = other.replace(&next).unwrap_err();
        assert!(matches!(error, NftError::Owned { port: Some(port), .. } if port == driver.port()), "{error:?}");
        let error = other.remove(table.family, &table.name).unwrap_err();
        assert!(matches!(error, NftError::Owned { .. }), "{error:?}");
        assert!(matches!(other.converge(&table).unwrap_err(), NftError::Owned { .. }), "even if nothing is to be done");
        assert!(matches!(driver.replace(&small(2, 0, vec![])).unwrap_err(), NftError::Flags { .. }));

        drop(driver);
        let orphan = other.observe_all_of(table.family, &table.name).unwrap().unwrap();
        assert_eq!((orphan.table.flags, orphan.owner), (TABLE_PERSIST, None));
        assert_eq!((orphan.table.maps, orphan.table.chains), (table.maps.clone(), table.chains.clone()));
        assert!(matches!(other.converge(&table).unwrap(), Outcome::AlreadyThere));
        let adopted = other.observe_all_of(table.family, &table.name).unwrap().unwrap();
        assert_eq!(adopted.owner, Some(other.port()));
        other.replace(&next).unwrap();
        if let Some((success, text)) = nft(&["delete", "table", "inet", "keepwall"]) {
            assert!(!success, "{text}");
        }
        drop(other);
        assert!(Nft::open().unwrap().remove(table.family, &table.name).unwrap());
    });
}

#[test]
fn elements_of_one_map_change_in_place_and_the_others_keep_counting() {
    in_namespace(|| {
        link::set_up("lo").unwrap();
        let mut driver = Nft::open().unwrap();
        let keep = port_element(4000, 4000, Verdict::Accept, "keep");
        let first = small(1, OURS, vec![keep.clone(), port_element(4001, 4009, Verdict::Accept, "go")]);
        driver.replace(&first).unwrap();
        send_udp(4000, 2);
        let changed = port_element(4001, 4005, Verdict::Drop, "come");
        let second = small(1, OURS, vec![keep.clone(), changed]);
        let applied = driver.replace_from(&first, &second).unwrap();
        assert_eq!((applied.elements_added, applied.elements_removed, applied.maps_created), (1, 1, 0));
        assert_eq!(driver.observe(second.family, &second.name).unwrap(), Some(normal(second.clone())));
        let counted = driver.counters(&second).unwrap();
        assert_eq!(counted.iter().find(|c| c.key == keep.key).unwrap().packets, 2);

        // Trees too, with ranges that touch each other and the ends of the space.
        let tree = |elements: Vec<Element>| {
            let mut table = small(2, OURS, vec![]);
            table.maps.push(map("tree_2", &[FieldType::Ipv4Addr], true, MapData::Mark, elements));
            table.chains[0].rules.push(rule(
                "",
                vec![payload(PayloadBase::Network, 12, 4, 0), lookup("tree_2", 0, LookupInto::Register(0))],
            ));
            normal(table)
        };
        let a = mark_element(v4(0, 0, 0, 0), v4(10, 0, 0, 9), 1, "a");
        let b = mark_element(v4(10, 0, 0, 10), v4(10, 0, 0, 19), 2, "b");
        let c = mark_element(v4(10, 0, 0, 20), v4(255, 255, 255, 255), 3, "c");
        let b2 = mark_element(v4(10, 0, 0, 10), v4(10, 0, 0, 14), 4, "b2");
        let all = mark_element(v4(0, 0, 0, 0), v4(255, 255, 255, 255), 5, "all");
        let mut last = tree(vec![a.clone(), b.clone(), c.clone()]);
        driver.replace(&last).unwrap();
        for elements in
            [vec![a.clone(), c.clone()], vec![a.clone(), b2, c.clone()], vec![all], vec![b], vec![], vec![a, c]]
        {
            let next = tree(elements);
            driver.replace_from(&last, &next).unwrap();
            assert_eq!(driver.observe(next.family, &next.name).unwrap(), Some(next.clone()));
            last = next;
        }
    });
}

#[test]
fn changed_content_under_an_old_name_is_refused() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let first = small(1, OURS, many(10));
        driver.replace(&first).unwrap();
        let mut chain_changed = first.clone();
        chain_changed.chains[1].rules.push(rule("one more", vec![Expr::Verdict(Verdict::Drop)]));
        let error = driver.replace(&chain_changed).unwrap_err();
        assert!(matches!(&error, NftError::NameReused { what, .. } if what == &["chain policy_1"]), "{error:?}");

        let mut map_and_rule_changed = small(1, OURS, many(11));
        map_and_rule_changed.chains[0].rules.clear();
        let error = driver.replace(&map_and_rule_changed).unwrap_err();
        assert!(matches!(&error, NftError::NameReused { what, .. } if what == &["map verdicts_1"]), "{error:?}");
        assert_eq!(driver.observe(first.family, &first.name).unwrap(), Some(normal(first)));
    });
}

#[test]
fn what_a_killed_replacement_left_is_removed_by_the_next() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let first = small(1, 0, many(3));
        driver.replace(&first).unwrap();
        // As after a kill in phase 1: new parts are there, nothing refers to them. One of them is half filled and has a
        // name that is wanted next.
        let mut killed = Kernel::open();
        let half = small(2, 0, many(2));
        let stale = small(9, 0, many(5));
        killed.transact(|batch, at| {
            for part in [&half, &stale] {
                batch.new_chain(at, &chain(&part.chains[1].name, vec![])).unwrap();
                batch.new_map(at, &part.maps[0], 0).unwrap();
                batch.new_elements(at, &part.maps[0], &part.maps[0].elements).unwrap();
                batch.new_rule(at, &part.chains[1].name, &part.chains[1].rules[0]).unwrap();
            }
        });
        let second = small(2, 0, many(4));
        let applied = driver.replace(&second).unwrap();
        assert!(applied.removed.contains(&"verdicts_9".to_owned()), "{applied:?}");
        assert_eq!(driver.observe(second.family, &second.name).unwrap(), Some(normal(second)));
    });
}

/// Another process, as it were: sends what it is told.
struct Kernel(keepwall_sys::netlink::Socket);

impl Kernel {
    fn open() -> Kernel {
        Kernel(keepwall_sys::netlink::Socket::open(keepwall_sys::netlink::Protocol::Netfilter).unwrap())
    }

    fn transact(&mut self, content: impl FnOnce(&mut Batch, At<'_>)) {
        let mut batch = Batch::new(1);
        content(&mut batch, At { family: TableFamily::Inet, table: "keepwall" });
        self.0.send(&batch.finish().bytes).unwrap();
        let answer = self.0.recv(Some(Duration::ZERO)).unwrap().to_vec();
        let message = decode::messages(&answer).next().unwrap().unwrap();
        assert_eq!(decode::reply(&message), Some(decode::Reply::Ack));
    }
}

#[test]
fn somebody_else_s_change_of_an_unowned_table_is_repaired() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let table = small(1, 0, many(3));
        driver.replace(&table).unwrap();
        if nft(&["add", "rule", "inet", "keepwall", "input", "tcp", "dport", "{", "22,", "23", "}", "accept"]).is_none()
        {
            return;
        }
        assert!(matches!(driver.converge(&table).unwrap(), Outcome::Replaced(_)));
        assert!(matches!(driver.converge(&table).unwrap(), Outcome::AlreadyThere));
    });
}

#[test]
fn foreign_tables_are_read_what_is_unknown_stays_unknown_and_large_sets_are_left_out() {
    in_namespace(|| {
        let numbers: Vec<String> = (1..200u16).map(|n| n.to_string()).collect();
        let script = format!(
            "table ip filter {{
                set big {{
                    type inet_service
                    elements = {{ {} }}
                }}
                set timed {{
                    type ipv4_addr
                    timeout 1h
                }}
                ct timeout slow {{
                    protocol tcp
                    policy = {{ established: 100 }}
                }}
                chain FORWARD {{
                    type filter hook forward priority filter; policy drop
                    ct state established,related accept
                    tcp dport @big accept
                    ip saddr @timed drop
                    icmp type {{ echo-request, echo-reply }} accept
                    ip daddr 10.0.0.0/8 counter return
                    tcp dport != 22 jump other
                    meta mark set 5
                    fib daddr type local drop
                }}
                chain other {{
                    ip saddr {{ 10.1.0.0/16, 10.3.0.0-10.3.0.9 }} log prefix \"x\" group 3
                }}
            }}",
            numbers.join(", ")
        );
        let path = std::env::temp_dir().join(format!("keepwall-foreign-{}.nft", std::process::id()));
        std::fs::write(&path, script).unwrap();
        let loaded = nft(&["-f", path.to_str().unwrap()]);
        std::fs::remove_file(&path).unwrap();
        let Some((success, text)) = loaded else { return };
        assert!(success, "{text}");

        let mut driver = Nft::open().unwrap();
        let tables = driver.observe_all(100).unwrap();
        assert_eq!(tables.len(), 1);
        let filter = &tables[0];
        assert_eq!((filter.table.name.as_str(), filter.table.family), ("filter", TableFamily::Ip));
        assert_eq!(filter.not_dumped, ["big"]);
        assert!(filter.not_understood.iter().any(|note| note.contains("timed")), "{:?}", filter.not_understood);
        let forward = filter.table.chains.iter().find(|c| c.name == "FORWARD").unwrap();
        assert!(!forward.base.as_ref().unwrap().accept);
        let unknown: Vec<usize> = (0..forward.rules.len())
            .filter(|n| forward.rules[*n].exprs.iter().any(|e| matches!(e, Expr::Unknown { .. })))
            .collect();
        // The set that is too large, the set with timeouts, the set of ICMP types, and `fib`.
        assert_eq!(unknown, [1, 2, 3, 7], "{forward:#?}");
        assert_eq!(forward.rules[6].exprs.last(), Some(&Expr::MarkSet { sreg: 0 }));
        assert_eq!(filter.rule_handles["FORWARD"].len(), forward.rules.len());
        let ranges = &filter.table.maps.iter().find(|m| m.interval).unwrap().elements;
        assert_eq!(ranges[0].key, [FieldRange::new(v4(10, 1, 0, 0), v4(10, 1, 255, 255))]);
        assert_eq!(ranges[1].key, [FieldRange::new(v4(10, 3, 0, 0), v4(10, 3, 0, 9))]);
        assert_eq!(filter.table.timeouts[0].l4proto, 6);

        let all = driver.observe_all(1000).unwrap();
        assert_eq!(all[0].table.maps.iter().find(|m| m.name == "big").unwrap().elements.len(), 199);
    });
}

fn send_udp(port: u16, count: usize) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..count {
        let _ = socket.send_to(b"keepwall", ("127.0.0.1", port));
    }
}

#[test]
fn ranges_of_a_tree_match_from_their_first_to_their_last_address() {
    // Raw packets with any source come in by the loopback device and meet the prerouting hook before routing drops them.
    in_namespace(|| {
        link::set_up("lo").unwrap();
        let mut driver = Nft::open().unwrap();
        let elements = vec![
            mark_element(v4(0, 0, 0, 0), v4(9, 255, 255, 255), 1, ""),
            mark_element(v4(10, 0, 0, 0), v4(10, 0, 0, 0), 2, ""),
            mark_element(v4(10, 0, 0, 2), v4(10, 0, 0, 9), 3, ""),
            mark_element(v4(203, 0, 113, 7), v4(255, 255, 255, 255), 4, ""),
        ];
        let classes = map("classes", &[FieldType::Ipv4Addr], true, MapData::Mark, elements);
        let rules = (1..=4u32).map(|class| {
            rule(
                "",
                vec![
                    payload(PayloadBase::Network, 12, 4, 0),
                    lookup("classes", 0, LookupInto::Register(0)),
                    Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: class.to_ne_bytes().to_vec() },
                    Expr::Immediate { dreg: 4, data: vec![7; 4] },
                    counter(),
                ],
            )
        });
        let table = Table {
            family: TableFamily::Inet,
            name: "keepwall".to_owned(),
            flags: 0,
            maps: vec![classes],
            chains: vec![base("prerouting", Hook::Prerouting, true, rules.collect())],
            timeouts: Vec::new(),
        };
        driver.replace(&table).unwrap();
        let sender = keepwall_sys::raw::Socket::sender(false).unwrap();
        let mut expected = [0; 4];
        for (source, class) in [
            ([0, 0, 0, 1], 1),
            ([9, 255, 255, 255], 1),
            ([10, 0, 0, 0], 2),
            ([10, 0, 0, 1], 0),
            ([10, 0, 0, 2], 3),
            ([10, 0, 0, 9], 3),
            ([10, 0, 0, 10], 0),
            ([203, 0, 113, 6], 0),
            ([203, 0, 113, 7], 4),
            ([255, 255, 255, 254], 4),
            ([255, 255, 255, 255], 4),
        ] {
            let mut packet = vec![0x45, 0, 0, 20, 0, 1, 0, 0, 64, 253, 0, 0];
            packet.extend_from_slice(&source);
            packet.extend_from_slice(&[127, 0, 0, 1]);
            sender.send(&packet, Ipv4Addr::LOCALHOST.into()).unwrap();
            if class > 0 {
                expected[class - 1] += 1;
            }
        }
        let found = driver.observe_all_of(table.family, &table.name).unwrap().unwrap();
        assert_eq!(found.table, table);
        let counted = raw_counters(&table);
        assert_eq!(counted, expected);
    });
}

/// The number by which the kernel knows this thread.
fn this_thread() -> u32 {
    let path = std::fs::read_link("/proc/thread-self").unwrap();
    path.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// Packets that each rule of the first chain counted, read without normalising.
fn raw_counters(table: &Table) -> Vec<u64> {
    use keepwall_ir::nft::encode;
    let mut socket = keepwall_sys::netlink::Socket::open(keepwall_sys::netlink::Protocol::Netfilter).unwrap();
    let at = At { family: table.family, table: &table.name };
    let mut dump = decode::Dump::new();
    for request in [
        encode::get_table(1, at),
        encode::dump_chains(2, Some(at.family)),
        encode::dump_rules(3, Some(at)),
        encode::dump_maps(4, Some(at)),
    ] {
        socket.send(&request).unwrap();
        while let Ok(bytes) = socket.recv(Some(Duration::ZERO)) {
            for message in decode::messages(bytes) {
                dump.push(&message.unwrap()).unwrap();
            }
        }
    }
    let table = dump.finish().remove(0).table;
    let exprs = table.chains[0].rules.iter().flat_map(|r| &r.exprs);
    exprs.filter_map(|e| if let Expr::Counter { packets, .. } = e { Some(*packets) } else { None }).collect()
}

#[test]
fn traces_logs_and_changes_are_heard() {
    in_namespace(|| {
        link::set_up("lo").unwrap();
        let mut changes = ChangeListener::open().unwrap();
        let mut driver = Nft::open().unwrap();
        let mut exprs = vec![
            Expr::Meta { key: Meta::L4Proto, dreg: 0 },
            Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: vec![17] },
            Expr::TraceOn,
            Expr::Log { group: 4711, prefix: "seen".to_owned(), snaplen: 24 },
        ];
        exprs.push(Expr::Verdict(Verdict::Jump("deny".to_owned())));
        let table = normal(Table {
            family: TableFamily::Inet,
            name: "keepwall".to_owned(),
            flags: 0,
            maps: Vec::new(),
            chains: vec![
                base("input", Hook::Input, true, vec![rule("", exprs)]),
                chain("deny", vec![rule("the deciding one", vec![Expr::Verdict(Verdict::Drop)])]),
            ],
            timeouts: Vec::new(),
        });
        driver.replace(&table).unwrap();
        let found = driver.observe_all_of(table.family, &table.name).unwrap().unwrap();
        assert_eq!(found.table, table);

        let mut heard = false;
        let mut committed = false;
        while let Some(event) = changes.next(Duration::from_millis(200)).unwrap() {
            match event {
                ChangeEvent::Changed(change) => heard |= change.table == "keepwall" && change.port == driver.port(),
                ChangeEvent::Committed(generation) => committed |= generation.thread == this_thread(),
            }
        }
        assert!(heard, "a change by our port");
        assert!(committed, "a transaction by this thread");

        let mut logs = LogListener::open(4711, 24).unwrap();
        assert!(matches!(LogListener::open(4711, 24), Err(NftError::GroupTaken { group: 4711 })));
        let mut traces = TraceListener::open().unwrap();
        send_udp(4321, 1);
        let logged = logs.next(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!((logged.prefix.as_str(), logged.group, logged.hook, logged.family), ("seen", 4711, 1, 2));
        assert_eq!(logged.payload.len(), 24, "the head of the packet and no more");
        assert_eq!(logged.payload[22..24], 4321u16.to_be_bytes());
        assert_eq!(logged.indev, Some(link::index("lo").unwrap()));

        let deciding = found.rule_handles["deny"][0];
        let first = traces.next(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(first.chain, "input");
        assert_eq!(first.network_header[..1], [0x45]);
        let second = traces.next(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!((second.chain.as_str(), second.step), ("deny", TraceStep::Rule));
        assert_eq!((second.rule_handle, second.verdict, second.id), (Some(deciding), Some(Verdict::Drop), first.id));
        assert_eq!(traces.next(Duration::ZERO).unwrap(), None);
        assert_eq!((traces.times_lost(), logs.times_lost()), (0, 0));
    });
}

#[test]
fn connections_are_seen_marked_and_forgotten() {
    in_namespace(|| {
        link::set_up("lo").unwrap();
        let mut driver = Nft::open().unwrap();
        let track = rule("", vec![Expr::Ct { key: CtKey::State, dreg: 0 }, counter()]);
        let table = Table {
            family: TableFamily::Inet,
            name: "keepwall".to_owned(),
            flags: 0,
            maps: Vec::new(),
            chains: vec![base("input", Hook::Input, true, vec![track])],
            timeouts: Vec::new(),
        };
        driver.replace(&table).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let six = std::net::UdpSocket::bind("[::1]:0").unwrap();
        six.send_to(b"six", six.local_addr().unwrap()).unwrap();

        let mut conntrack = Conntrack::open().unwrap();
        let mut all = |ipv6| {
            let mut flows = Vec::new();
            conntrack
                .flows(ipv6, |flow| {
                    flows.push(flow);
                    ControlFlow::Continue(())
                })
                .unwrap();
            flows
        };
        let four = all(Some(false));
        assert_eq!(four.len(), 1, "{four:#?}");
        let flow = four[0].clone();
        assert_eq!((flow.original.protocol, flow.tcp_state), (6, Some(3)));
        let port = client.local_addr().unwrap().port();
        assert!(matches!(flow.original.rest, decode::TupleRest::Ports { src, .. } if src == port));
        assert_eq!(all(Some(true)).len(), 1);
        assert_eq!(all(None).len(), 2);

        let both = all(None);
        let mut gone = flow.clone();
        gone.original.rest = decode::TupleRest::Ports { src: 1, dst: 1 };
        let wanted: Vec<(&decode::Flow, u32)> = both.iter().chain([&gone]).map(|flow| (flow, 0x1234_0000)).collect();
        let mut conntrack = Conntrack::open().unwrap();
        assert_eq!(conntrack.set_marks(wanted, 0xffff_0000).unwrap(), Marked { changed: 2, gone: 1 });
        conntrack.set_marks([(&flow, 0xff)], 0x0f).unwrap();
        let mut marks = Vec::new();
        conntrack
            .flows(Some(false), |flow| {
                marks.push(flow.mark);
                ControlFlow::Break(())
            })
            .unwrap();
        assert_eq!(marks, [0x1234_000f]);
        assert!(conntrack.delete(&flow).unwrap());
        assert!(!conntrack.delete(&flow).unwrap());
        conntrack.danger_flush().unwrap();
        let mut left = 0;
        conntrack
            .flows(None, |_| {
                left += 1;
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(left, 0);
    });
}

#[test]
fn ten_thousand_elements_are_replaced_and_one_of_them_changes_in_place() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let first = normal(small(1, OURS, many(10_000)));
        driver.replace(&first).unwrap();
        let second = normal(small(2, OURS, many(10_000)));
        let start = Instant::now();
        driver.replace_from(&first, &second).unwrap();
        eprintln!("10,000 elements replaced in {:?}", start.elapsed());
        let mut third = second.clone();
        third.maps[0].elements[5000].data = ElementData::Verdict(Verdict::Continue);
        let start = Instant::now();
        let applied = driver.replace_from(&second, &third).unwrap();
        eprintln!("one of 10,000 elements changed in {:?}", start.elapsed());
        assert_eq!((applied.elements_added, applied.elements_removed), (1, 1));
        let start = Instant::now();
        assert_eq!(driver.observe(third.family, &third.name).unwrap(), Some(third));
        eprintln!("10,000 elements read back in {:?}", start.elapsed());
    });
}

#[test]
fn a_table_of_several_transactions_that_fails_at_the_end_leaves_no_trace_of_itself() {
    in_namespace(|| {
        let mut driver = Nft::open().unwrap();
        let first = normal(small(1, OURS, many(3)));
        driver.replace(&first).unwrap();
        // 110,000 hashed elements with long comments: some 18 MiB, more than one transaction takes.
        let elements = (0..110_000u32).map(|n| {
            let key = vec![FieldRange::exact(n.to_be_bytes())];
            verdict_element(key, Verdict::Accept, &"long".repeat(32))
        });
        let large = map("large_2", &[FieldType::Ipv4Addr], false, MapData::Verdict, elements.collect());
        let mut second = small(2, OURS, many(3));
        second.maps.push(large);
        let mut bad = second.clone();
        bad.chains[0].rules.push(rule("bad", vec![lookup("no_such_map", 0, LookupInto::Verdict)]));
        driver.replace(&bad).unwrap_err();
        assert_eq!(driver.observe(first.family, &first.name).unwrap(), Some(first));
        driver.replace(&second).unwrap();
        assert_eq!(driver.observe(second.family, &second.name).unwrap(), Some(normal(second)));
    });
}

#[test]
fn no_packet_is_lost_or_leaked_while_tables_are_replaced() {
    // One thread sends, always allowed and always denied in turn; the other replaces. A second table, further down the
    // same hook, counts what got through.
    in_namespace(|| {
        link::set_up("lo").unwrap();
        let mut driver = Nft::open().unwrap();
        let version = |n: u32| {
            let mut elements = vec![
                port_element(4000, 4000, Verdict::Accept, "allowed"),
                port_element(5000, 5000, Verdict::Drop, "denied"),
            ];
            elements.extend(many(1000));
            let mut table = small(n, OURS, elements);
            // What is in no map is dropped: an empty map would lose the allowed, a missing rule leak the denied.
            table.chains[0].rules.push(rule("the rest", vec![Expr::Verdict(Verdict::Drop)]));
            normal(table)
        };
        let counting = |port: u16| {
            rule(
                "",
                vec![
                    Expr::Meta { key: Meta::L4Proto, dreg: 0 },
                    Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: vec![17] },
                    payload(PayloadBase::Transport, 2, 2, 0),
                    Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: port.to_be_bytes().to_vec() },
                    counter(),
                ],
            )
        };
        let mut behind = base("behind", Hook::Input, true, vec![counting(4000), counting(5000)]);
        behind.base.as_mut().unwrap().priority = 100;
        let witness = Table {
            family: TableFamily::Inet,
            name: "witness".to_owned(),
            flags: 0,
            maps: Vec::new(),
            chains: vec![behind],
            timeouts: Vec::new(),
        };
        driver.replace(&version(0)).unwrap();
        driver.replace(&witness).unwrap();

        let here = namespace::NetNs::current().unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        let sent = std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                here.enter().unwrap();
                let mut sent = 0u64;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    send_udp(4000, 50);
                    send_udp(5000, 50);
                    sent += 50;
                }
                sent
            });
            let mut last = version(0);
            for n in 1..=60 {
                let next = version(n);
                driver.replace_from(&last, &next).unwrap();
                last = next;
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            sender.join().unwrap()
        });
        let counted = raw_counters(&witness);
        eprintln!("{sent} packets of each kind during 60 replacements");
        assert_eq!(counted, [sent, 0], "allowed and denied packets that got through");
    });
}
