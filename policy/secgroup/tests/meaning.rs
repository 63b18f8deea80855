//! What must hold for every posture, tried on drawn ones.

#![allow(clippy::unwrap_used, reason = "tests")]

use keepwall_ir::nft::Table;
use keepwall_packets::draw::{self, Dice, HOST, Path};
use keepwall_posture::{SourceFile, parse};
use keepwall_secgroup::check::{Checked, check};
use keepwall_secgroup::evaluate::{Packet, Reason, evaluate};
use keepwall_secgroup::health;
use keepwall_secgroup::intent::{FORMAT, Intent, resolve};
use keepwall_secgroup::judge::judge;
use keepwall_secgroup::lower::lower;
use keepwall_secgroup::reach::{difference, machine_matrix, matrix, run_tests};
use keepwall_secgroup::spec::Direction;

fn posture(text: &str) -> Checked {
    let spec = parse(&[SourceFile::new("test.yaml", text)]).unwrap_or_else(|problems| panic!("{}", problems[0]));
    check(spec).unwrap_or_else(|problems| panic!("{}", problems[0]))
}

/// The reference walks groups as they were declared, the judge an intent: they agree on the verdict and, since flow
/// records are read beside `explain`, on the rule that gave it.
#[test]
fn the_judge_says_what_the_reference_says_and_names_the_same_rule() {
    let mut rules = 0;
    for seed in 0..400 {
        let mut dice = Dice::new(seed);
        let size = 1 + dice.below(14);
        let case = draw::case(&mut dice, size);
        let intent = resolve(&case.checked, "host").unwrap();
        for path in Path::ALL {
            for _ in 0..40 {
                let trip = draw::trip(&mut dice, &case, path);
                for direction in Direction::BOTH {
                    let packet = trip.seen(direction);
                    for instance in HOST..HOST + 3 {
                        let name = &case.checked.spec().instances[instance].name;
                        let name = format!("{name}/{}", case.checked.spec().instances[instance].interfaces[0].name);
                        let wanted = evaluate(&case.checked, instance, 0, &packet);
                        match intent.attachments.iter().find(|a| a.name == name) {
                            Some(attachment) => assert_eq!(judge(&intent, attachment, &packet), wanted, "seed {seed}"),
                            None => assert_eq!(*wanted.reason(), Reason::NotProtected),
                        }
                        rules += usize::from(matches!(wanted.reason(), Reason::Rule { .. }));
                    }
                }
            }
        }
    }
    assert!(rules > 50_000, "only {rules} packets met a rule");
}

#[test]
fn equal_intents_lower_to_equal_tables_and_survive_their_own_json() {
    for seed in 0..200 {
        let mut dice = Dice::new(seed);
        let case = draw::case(&mut dice, 10);
        let intent = resolve(&case.checked, "host").unwrap();
        let again = Intent::from_json(&serde_json::to_vec(&intent).unwrap()).unwrap();
        assert_eq!(again, intent);
        assert_eq!(lower(&again, "g7").unwrap().table, lower(&intent, "g7").unwrap().table, "seed {seed}");
        let other = lower(&intent, "g8").unwrap().table;
        let inner = |table: &Table| -> Vec<String> {
            let chains = table.chains.iter().filter(|chain| chain.base.is_none()).map(|chain| chain.name.clone());
            chains.chain(table.maps.iter().map(|map| map.name.clone())).collect()
        };
        // Built beside each other, two versions share no name but those of base chains.
        assert!(inner(&other).iter().all(|name| name.ends_with(".g8")));
    }
}

#[test]
fn an_intent_of_another_format_or_out_of_order_is_refused_whole() {
    let checked = posture(
        "version: 1\ninstances: { web: { interfaces: { eth0: { addresses: [10.0.0.5], groups: [web] } } } }\n\
         security_groups: { web: { ingress: [{ ports: 22, from: group:ops }, { policy: drop, ports: 80, from: any, priority: 2 }] }, ops: { } }\n",
    );
    let good = resolve(&checked, "web").unwrap();
    let refused = |change: &dyn Fn(&mut Intent)| {
        let mut bad = good.clone();
        change(&mut bad);
        Intent::from_json(&serde_json::to_vec(&bad).unwrap()).unwrap_err()
    };
    assert_eq!(refused(&|i| i.format = FORMAT + 1), "this intent has format 2; this build knows 1 only");
    assert_eq!(refused(&|i| i.sets.clear()), "web/eth0: set `group:ops` is named but not there");
    assert_eq!(refused(&|i| i.attachments[0].device = "eth0/../x".into()), "web/eth0: `eth0/../x` is no device name");
    assert_eq!(refused(&|i| i.attachments.push(i.attachments[0].clone())), "device `eth0` is attached twice");
    let order = "web/eth0: ingress rules are not in the order of evaluation";
    assert_eq!(refused(&|i| i.attachments[0].ingress.reverse()), order);
    let ports = "web/ingress#1: ports do not fit protocol tcp";
    assert_eq!(refused(&|i| i.attachments[0].ingress[0].ports = None), ports);
    let mut text = serde_json::to_string(&good).unwrap();
    text.insert_str(1, "\"from_the_future\":1,");
    assert!(
        Intent::from_json(text.as_bytes()).unwrap_err().starts_with("not an intent: unknown field `from_the_future`")
    );
}

#[test]
fn what_needs_too_many_elements_names_the_rules_that_need_them() {
    let checked = posture(&overlapping(100));
    let Err(large) = lower(&resolve(&checked, "web").unwrap(), "g1") else { panic!("it fits") };
    assert_eq!((large.attachment.as_str(), large.direction, large.limit), ("web/eth0", Direction::Ingress, 100));
    assert_eq!(large.rules.len(), 3);
    assert!(large.rules.is_sorted_by(|a, b| a.1 >= b.1));
    let text = large.to_string();
    assert!(text.starts_with("web/eth0 ingress: the rules overlap so much that they need more than 100 kernel map elements; most are caused by web/ingress#"), "{text}");
    assert!(text.ends_with("or raise settings.limits.elements_per_interface"), "{text}");
    // The same with room for it is lowered.
    let checked = posture(&overlapping(100_000));
    assert!(lower(&resolve(&checked, "web").unwrap(), "g1").is_ok());
}

/// Forty blocks within and beside each other, with ports that overlap: they must all be cut against each other.
fn overlapping(limit: u32) -> String {
    let mut text = format!(
        "version: 1\nsettings: {{ limits: {{ elements_per_interface: {limit} }} }}\n\
         instances: {{ web: {{ interfaces: {{ eth0: {{ addresses: [10.0.0.5], groups: [web] }} }} }} }}\n\
         security_groups:\n  web:\n    ingress:\n"
    );
    for n in 0..40 {
        let (policy, priority) = (if n % 2 == 0 { "drop" } else { "accept" }, 1 + n);
        text.push_str(
            &format!(
                "      - {{ policy: {policy}, ports: {}/{}, from: 10.{}.0.0/{}, priority: {priority} }}\n",
                1_000 + 10 * n,
                2_000 + 10 * n,
                if n < 20 { 0 } else { n },
                if n < 20 { 35 - n } else { 16 }
            )
            .replace("/35,", "/32,")
            .replace("/34,", "/32,")
            .replace("/33,", "/32,"),
        );
    }
    text
}

#[test]
fn the_limit_of_elements_is_one_for_the_whole_interface() {
    // 60 elements inbound and 60 outbound, for each family: neither part is above 200, together they are.
    let text = |limit: u32| {
        let mut text = format!(
            "version: 1\nsettings: {{ limits: {{ elements_per_interface: {limit} }} }}\n\
             instances: {{ web: {{ interfaces: {{ eth0: {{ addresses: [10.0.0.5], groups: [web] }} }} }} }}\n\
             security_groups:\n  web:\n    inner_access: drop\n"
        );
        for (direction, peer) in [("ingress", "from"), ("egress", "to")] {
            text.push_str(&format!("    {direction}:\n"));
            for n in 1..=60 {
                text.push_str(&format!("      - {{ ports: {n}, {peer}: [10.0.0.{n}, \"fd00::{n}\"] }}\n"));
            }
        }
        text
    };
    let lowered = |limit| lower(&resolve(&posture(&text(limit)), "web").unwrap(), "g1").map(|lowered| lowered.table);
    let table = lowered(65_536).unwrap();
    let count: usize = table.maps.iter().filter(|map| map.counters).map(|map| map.elements.len()).sum();
    assert_eq!(count, 240);
    assert!(lowered(240).is_ok());
    assert!(lowered(239).is_err() && lowered(200).is_err());
}

/// A member that joins a group which rules name as a peer changes one map of each interface that has such a rule, so
/// that it costs milliseconds and not a whole new version.
///
/// Not so, and then a new version is built beside the old one: the group lets its members reach each other (a member
/// is then accepted with and without ports, in two maps); the member has addresses of both families; rules of both
/// directions, or with and without ports, name the group; the member is the first of the group, for its rule was
/// none until then.
#[test]
fn a_member_that_joins_changes_one_map() {
    for count in [3, 9_000] {
        let with = |member: &str| {
            let mut text = "version: 1\nsettings: { limits: { addresses_per_basic_group: 10000 } }\ninstances:\n\
                 \x20 db: { interfaces: { eth0: { addresses: [10.9.0.1], groups: [db] } } }\n"
                .to_owned();
            for n in 0..count {
                let (high, low, odd) = (n / 250, n % 250, if n % 2 == 0 { "web" } else { "app" });
                text.push_str(&format!(
                    "  m{n}: {{ interfaces: {{ eth0: {{ addresses: [10.1.{high}.{low}], groups: [{odd}] }} }} }}\n"
                ));
            }
            text.push_str(member);
            text.push_str(
                "security_groups:\n  web: { inner_access: drop }\n  app: { inner_access: drop }\n  db:\n    inner_access: drop\n    ingress:\n\
                 \x20     - { ports: [3306, 3307, 9000-9100], from: group:web }\n      - { ports: 3306, from: group:app }\n      - { ports: 9050, from: any, priority: 2 }\n",
            );
            lower(&resolve(&posture(&text), "db").unwrap(), "g1").unwrap().table
        };
        let before = with("");
        let shape = if count > 100 { "class4" } else { "peer4" };
        // Below all others, between them, and above: no place renumbers a class.
        for address in ["10.0.0.1", "10.1.0.251", "10.200.0.1"] {
            for group in ["web", "app"] {
                let member = format!(
                    "  newcomer: {{ interfaces: {{ eth0: {{ addresses: [{address}], groups: [{group}] }} }} }}\n"
                );
                let after = with(&member);
                assert_eq!((&before.chains, &before.timeouts), (&after.chains, &after.timeouts));
                let changed: Vec<&str> = (before.maps.iter().zip(&after.maps))
                    .filter(|(old, new)| old != new)
                    .map(|(_, new)| new.name.as_str())
                    .collect();
                assert_eq!(before.maps.len(), after.maps.len());
                assert!(changed.len() == 1 && changed[0].contains(shape), "{address} into {group}: {changed:?}");
            }
        }
    }
}

#[test]
fn explanations_name_the_rule_and_its_line() {
    let checked = posture(
        "version: 1\nsettings: { block_outbound_smtp: true }\ninstances:\n  web: { interfaces: { eth0: { addresses: [10.0.0.5], groups: [web] }, eth1: { addresses: [10.8.0.5] } } }\n\
         \x20 app: { interfaces: { eth0: { addresses: [10.0.0.6], groups: [web] } } }\nsecurity_groups:\n  web:\n    ingress:\n      - { ports: 22, from: 10.1.0.0/16 }\n      - { policy: drop, ports: 22, from: any, priority: 2 }\n",
    );
    let packet = |direction, peer: &str, protocol, port| Packet {
        direction,
        peer: peer.parse().unwrap(),
        local: "10.0.0.5".parse().unwrap(),
        protocol,
        source_port: 40_000,
        destination_port: port,
        icmp: (protocol == 1).then_some((3, 4)),
    };
    let told = |interface, packet: Packet| {
        let verdict = evaluate(&checked, 0, interface, &packet);
        format!("{}: {}", if verdict.is_allow() { "allow" } else { "deny" }, verdict.reason())
    };
    let (inward, outward) = (Direction::Ingress, Direction::Egress);
    for (interface, packet, wanted) in [
        (0, packet(inward, "10.1.2.3", 6, 22), "allow: rule web/ingress#1 (test.yaml:9)"),
        (0, packet(inward, "10.2.2.3", 6, 22), "deny: rule web/ingress#2 (test.yaml:10)"),
        (0, packet(inward, "10.2.2.3", 6, 80), "deny: no rule matches: the default of basic groups"),
        (0, packet(inward, "10.0.0.6", 6, 80), "allow: intra-group accept of basic group web"),
        (0, packet(inward, "10.2.2.3", 1, 0), "allow: a path-MTU error, which security groups never block"),
        (
            0,
            packet(outward, "100.100.100.200", 6, 25),
            "allow: 100.100.100.200/32 is a service prefix (settings.service_prefixes)",
        ),
        (0, packet(outward, "203.0.113.7", 6, 25), "deny: settings.block_outbound_smtp"),
        (0, packet(outward, "203.0.113.7", 6, 80), "allow: no rule matches: the default of basic groups"),
        (1, packet(inward, "10.2.2.3", 6, 22), "allow: the interface is in no security group"),
    ] {
        assert_eq!(told(interface, packet), wanted);
    }
}

#[test]
fn the_order_in_which_rules_of_one_priority_were_written_decides_who_is_named() {
    // Ten rules before it: `#10` sorts before `#2` as text, and groups `web` and `web-1` swap places with a slash.
    let mut text = "version: 1\ninstances: { box: { interfaces: { eth0: { addresses: [10.0.0.5], groups: [web, web-1] } } } }\nsecurity_groups:\n  web:\n    ingress:\n".to_owned();
    text.push_str("      - { ports: 1, from: 192.0.2.1 }\n");
    text.push_str("      - { ports: 80, from: 10.0.0.0/8 }\n");
    for n in 3..=9 {
        text.push_str(&format!("      - {{ ports: {n}, from: 192.0.2.1 }}\n"));
    }
    text.push_str(
        "      - { ports: 80-90, from: 10.0.0.0/8 }\n  web-1:\n    ingress:\n      - { ports: 80, from: any }\n",
    );
    let checked = posture(&text);
    let intent = resolve(&checked, "box").unwrap();
    let packet = Packet {
        direction: Direction::Ingress,
        peer: [10, 1, 1, 1].into(),
        local: [10, 0, 0, 5].into(),
        protocol: 6,
        source_port: 40_000,
        destination_port: 80,
        icmp: None,
    };
    let wanted = evaluate(&checked, 0, 0, &packet);
    assert!(wanted.reason().to_string().starts_with("rule web/ingress#2 "));
    assert_eq!(judge(&intent, &intent.attachments[0], &packet), wanted);
    let lowered = lower(&intent, "g1").unwrap();
    let id = &intent.attachments[0].ingress.iter().find(|rule| rule.label == "web/ingress#2").unwrap().id;
    let counted = lowered.table.maps.iter().flat_map(|map| map.elements.iter().map(move |e| (map, e)));
    let mut counted = counted.filter_map(|(map, element)| lowered.rule_of(&map.name, &element.key));
    assert!(counted.any(|counted| counted == id), "what the kernel counts is the same rule");
}

#[test]
fn rules_that_nothing_matched_are_reported_and_those_not_loaded_are_not() {
    let checked = posture(
        "version: 1\ninstances: { web: { interfaces: { eth0: { addresses: [10.0.0.5], groups: [web] } } } }\n\
         security_groups: { web: { ingress: [{ ports: 80, from: 10.0.0.0/8 }, { ports: 81, from: 10.0.0.0/8 }, { ports: 82, from: 10.0.0.0/8 }] } }\n",
    );
    let intent = resolve(&checked, "web").unwrap();
    let ids: Vec<&String> = intent.attachments[0].ingress.iter().map(|rule| &rule.id).collect();
    // The first was used, the second never, of the third nothing is known.
    let hits = [(ids[0].clone(), 7), (ids[1].clone(), 0)].into();
    let found = health::findings(&checked, Some((&hits, 7_500)));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].kind.as_str(), found[0].resource.as_str()), ("unused-rule", "web/ingress#2"));
    assert_eq!(found[0].why, "no packet has matched it in 2 hours");
    assert!(health::findings(&checked, None).is_empty());
}

#[test]
fn a_difference_of_reach_says_what_opens_and_what_ends() {
    let of = |rules: &str| {
        posture(&format!(
            "version: 1\ninstances: {{ web: {{ interfaces: {{ eth0: {{ addresses: [10.0.0.5], groups: [web] }} }} }} }}\n\
             security_groups: {{ web: {{ ingress: [{rules}] }} }}\n"
        ))
    };
    let before = of("{ ports: 80, from: any }, { ports: 22, from: 10.0.0.0/8 }");
    let after = of("{ ports: 443, from: any }, { ports: 22, from: 10.0.0.0/8 }");
    let told = |changes: Vec<keepwall_secgroup::reach::ReachChange>| -> Vec<String> {
        let sign = |opened| if opened { '+' } else { '-' };
        changes.iter().map(|c| format!("{} {} -> {}: {}", sign(c.opened), c.from, c.to, c.what)).collect()
    };
    assert_eq!(
        told(difference(&matrix(&before), &matrix(&after))),
        [
            "+ 10.0.0.0/8 -> web: tcp 443",
            "- 10.0.0.0/8 -> web: tcp 80",
            "+ internet -> web: tcp 443",
            "- internet -> web: tcp 80"
        ]
    );
    assert!(difference(&matrix(&after), &matrix(&after)).is_empty());
    // The machine's own view, from what it is told.
    let intents = (resolve(&before, "web").unwrap(), resolve(&after, "web").unwrap());
    let machine =
        difference(&machine_matrix(&intents.0, Some(&intents.1)), &machine_matrix(&intents.1, Some(&intents.0)));
    assert!(told(machine).contains(&"+ internet -> web/eth0: tcp 443".to_owned()));
}

#[test]
fn a_failing_test_of_the_policy_gives_an_example() {
    let checked = posture(
        "version: 1\ninstances: { web: { interfaces: { eth0: { addresses: [10.0.0.5], groups: [web] } } } }\n\
         security_groups: { web: { ingress: [{ ports: [80, 443], from: any }] } }\n\
         tests: [{ expect: \"deny internet -> web:1-442\" }, { expect: \"allow internet -> web:443\" }, { expect: \"deny 192.0.2.1 -> 198.51.100.1:80\" }]\n",
    );
    let failures: Vec<Option<String>> = run_tests(&checked).into_iter().map(|result| result.failure).collect();
    assert_eq!(
        failures,
        [
            Some("IPv4 tcp port 80 from 1.0.0.0-9.255.255.255 to web/eth0 is allowed by web/ingress#1".to_owned()),
            None,
            Some(
                "nothing to test: 192.0.2.1 and 198.51.100.1 have no interface and address family in common".to_owned()
            ),
        ]
    );
}

#[test]
fn what_changes_in_place_is_never_asked_twice_by_one_packet() {
    let text = |member: &str, ingress: &str| {
        let mut text =
            "version: 1\ninstances:\n  web: { interfaces: { eth0: { addresses: [10.0.0.5], groups: [web] } } }\n"
                .to_owned();
        text.push_str(member);
        text.push_str("security_groups:\n  web:\n    ingress:\n");
        text.push_str(ingress);
        text
    };
    let lowered = |text: &str| lower(&resolve(&posture(text), "web").unwrap(), "g1").unwrap();
    let rules = "      - { ports: [80, 81], from: 192.0.2.1 }\n      - { ports: 443, from: any }\n";
    let before = lowered(&text("", rules));

    // A member of both families, let in whatever it sends: four maps, one for each kind of packet.
    let newcomer = "  app: { interfaces: { eth0: { addresses: [10.0.0.6, \"fd00::6\"], groups: [web] } } }\n";
    let again = "  old: { interfaces: { eth0: { addresses: [10.0.0.9, \"fd00::9\"], groups: [web] } } }\n";
    let with_one = lowered(&text(again, rules));
    let with_two = lowered(&text(&format!("{again}{newcomer}"), rules));
    assert!(with_one.differs_in_place(&with_two) && with_two.differs_in_place(&with_one));
    let changed = with_one.table.maps.iter().zip(&with_two.table.maps).filter(|(a, b)| a != b).count();
    assert_eq!(changed, 4);

    // Port 80 goes from one peer's map to everybody's: a packet that asks both could see neither.
    let moved = lowered(&text("", "      - { ports: 81, from: 192.0.2.1 }\n      - { ports: [80, 443], from: any }\n"));
    assert!(!before.differs_in_place(&moved));
    // A map that was not there, and other chains, are no change of elements.
    assert!(!before.differs_in_place(&with_one));
    let tagged = before.clone().retagged("g1", "g2");
    let again = lower(&resolve(&posture(&text("", rules)), "web").unwrap(), "g2").unwrap();
    assert_eq!(tagged.table, again.table, "a new tag is what lowering under it gives");
    assert!(!before.differs_in_place(&tagged));
}
