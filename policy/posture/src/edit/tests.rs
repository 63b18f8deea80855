#![allow(clippy::unwrap_used, reason = "tests")]

use keepwall_core::{PortRange, Protocol};
use keepwall_secgroup::spec::Peer;
use proptest::prelude::*;

use super::*;

fn port(first: u16, last: u16) -> PortSel {
    PortSel::Range(PortRange::new(first, last).unwrap())
}

fn tcp(ports: &[u16], peer: &str) -> NewRule {
    let ports = ports.iter().map(|p| port(*p, *p)).collect();
    NewRule::accept(Protocol::TCP, ports, crate::rule::parse_peer(peer).unwrap())
}

/// The text with one group `web` whose body is `body`.
fn web(body: &str) -> String {
    format!("version: 1\nsecurity_groups:\n  web:{body}")
}

fn ingress(text: &str, rule: &NewRule) -> Edited {
    add_rule(text, "web", Direction::Ingress, rule).unwrap()
}

#[test]
fn a_rule_is_added_to_every_way_to_write_a_list() {
    let new = "{ policy: accept, protocol: tcp, ports: 22, from: 10.0.0.1, priority: 1 }";
    let old = "{ ports: 80, from: any }";
    for (before, after) in [
        ("", format!("\n    ingress:\n      - {new}")),
        (" # none\n", format!(" # none\n    ingress:\n      - {new}\n")),
        (" {}\n", format!(" {{ ingress: [{new}] }}\n")),
        (" { type: basic, }\n", format!(" {{ type: basic, ingress: [{new}] }}\n")),
        (" { ingress: }\n", format!(" {{ ingress: [{new}] }}\n")),
        (" { ingress: [] }\n", format!(" {{ ingress: [{new}] }}\n")),
        (
            "\n    type: basic # x\n    # end\n",
            format!("\n    type: basic # x\n    ingress:\n      - {new}\n    # end\n"),
        ),
        ("\n    ingress:   # x\n    type: basic\n", format!("\n    ingress:   # x\n      - {new}\n    type: basic\n")),
        ("\n    ingress: [] # x\n    type: basic", format!("\n    ingress: # x\n      - {new}\n    type: basic")),
        ("\n    ingress: ~\n", format!("\n    ingress: [{new}]\n")),
        ("\n    ingress: [\n      # none\n     ]\n", format!("\n    ingress: [\n      # none\n       {new}\n     ]\n")),
        (&*format!("\n    ingress: [ {old} ] # x\n"), format!("\n    ingress: [ {old}, {new} ] # x\n")),
        (&*format!("\n    ingress: [ {old}, ]\n"), format!("\n    ingress: [ {old}, {new} ]\n")),
        (
            &*format!("\n    ingress: [\n      {old} # x\n      # y\n    ]\n"),
            format!("\n    ingress: [\n      {old}, # x\n      {new}\n      # y\n    ]\n"),
        ),
        (
            &*format!("\n    ingress: [\n      {old}, # x\n    ]\n"),
            format!("\n    ingress: [\n      {old}, # x\n      {new},\n    ]\n"),
        ),
        (&*format!("\n    ingress:\n    - {old}"), format!("\n    ingress:\n    - {old}\n    - {new}")),
        (
            &*format!("\n    ingress:\n      # a\n      - {old} # b\n      # c\n    egress: []\n"),
            format!("\n    ingress:\n      # a\n      - {old} # b\n      - {new}\n      # c\n    egress: []\n"),
        ),
        (
            "\n    ingress:\n      - ports: 80\n        from:\n          - any # x\n  db:\n",
            "\n    ingress:\n      - ports: 80\n        from:\n          - any # x\n      - policy: accept\n        \
             protocol: tcp\n        ports: 22\n        from: 10.0.0.1\n        priority: 1\n  db:\n"
                .to_owned(),
        ),
    ] {
        let edited = ingress(&web(before), &tcp(&[22], "10.0.0.1"));
        assert_eq!(edited.text, web(&after), "before: {before}");
        assert!(edited.changed);
        assert!(edited.text.lines().nth(edited.line as usize - 1).unwrap().contains(" "), "{}", edited.line);
        let windows = ingress(&web(before).replace('\n', "\r\n"), &tcp(&[22], "10.0.0.1"));
        assert_eq!(windows.text, web(&after).replace('\n', "\r\n"));
        let again = ingress(&edited.text, &tcp(&[22], "10.0.0.1"));
        assert!(!again.changed && again.text == edited.text && again.line == edited.line);
    }
}

#[test]
fn what_is_there_already_in_other_words_is_not_added_again() {
    let text =
        web("\n    ingress:\n      - { ports: [80, 443/443], from: [\"2001:0db8::0001\", any], description: x }\n");
    for same in [tcp(&[80], "any"), tcp(&[443], "0.0.0.0/0"), tcp(&[80, 443], "::/0"), tcp(&[443], "2001:db8::1/128")] {
        let edited = ingress(&text, &same);
        assert!(!edited.changed && edited.text == text && edited.line == 5, "{same:?}");
    }
    let part = ingress(&text, &tcp(&[443, 22], "any"));
    assert!(part.text.ends_with("- { policy: accept, protocol: tcp, ports: 22, from: any, priority: 1 }\n"));
    let other_priority = NewRule { priority: 2, ..tcp(&[80], "any") };
    assert!(ingress(&text, &other_priority).changed);
}

#[test]
fn a_rule_is_removed_and_the_comments_around_it_stay() {
    let text = web(
        "\n    ingress:\n      # one\n      - { ports: 1, from: any } # goes\n      # two\n      - ports: 2\n        # inside\n        from: any\n      # end\n",
    );
    let first = remove_rule(&text, "web", Direction::Ingress, &RuleSelector::Index(0)).unwrap();
    assert_eq!(first.text, text.replace("      - { ports: 1, from: any } # goes\n", ""));
    let second = remove_rule(&text, "web", Direction::Ingress, &RuleSelector::Line(9)).unwrap();
    assert_eq!(second.text, text.replace("      - ports: 2\n", "").replace("        from: any\n", ""));
    let both = remove_rule(&first.text, "web", Direction::Ingress, &RuleSelector::Tuple(tcp(&[2], "any"))).unwrap();
    assert_eq!(both.text, web("\n    ingress: []\n      # one\n      # two\n        # inside\n      # end\n"));
    for at in [RuleSelector::Index(2), RuleSelector::Line(4), RuleSelector::Line(11)] {
        let error = remove_rule(&text, "web", Direction::Ingress, &at).unwrap_err();
        assert!(matches!(error, EditError::NoSuchRule { .. }), "{at:?}");
    }
    let nothing = remove_rule(&text, "web", Direction::Ingress, &RuleSelector::Tuple(tcp(&[3], "any"))).unwrap();
    assert!(!nothing.changed && nothing.text == text);
}

#[test]
fn rules_are_removed_from_flow_lists_with_their_commas() {
    let (a, b, c) = ("{ ports: 1, from: any }", "{ ports: 2, from: any }", "{ ports: 3, from: any }");
    let remove = |body: &str, index| {
        remove_rule(&web(body), "web", Direction::Ingress, &RuleSelector::Index(index)).unwrap().text
    };
    let line = format!(" {{ ingress: [ {a}, {b}, {c} ] }} # x\n");
    assert_eq!(remove(&line, 0), web(&format!(" {{ ingress: [ {b}, {c} ] }} # x\n")));
    assert_eq!(remove(&line, 1), web(&format!(" {{ ingress: [ {a}, {c} ] }} # x\n")));
    assert_eq!(remove(&line, 2), web(&format!(" {{ ingress: [ {a}, {b} ] }} # x\n")));
    assert_eq!(remove(&format!(" {{ ingress: [{a}] }}\n"), 0), web(" { ingress: [] }\n"));
    let lines = format!("\n    ingress: [\n      {a}, # a\n      # bb\n      {b}, # b\n      {c} # c\n    ]\n");
    assert_eq!(remove(&lines, 0), web(&lines).replace(&format!("      {a}, # a\n"), ""));
    assert_eq!(remove(&lines, 1), web(&lines).replace(&format!("      {b}, # b\n"), ""));
    assert_eq!(remove(&lines, 2), web(&lines).replace(&format!("      {c} # c\n"), ""));
}

#[test]
fn a_tuple_takes_its_combinations_out_of_larger_rules() {
    let text = web(
        "\n    ingress:\n      - { ports: [80, 443], from: [any, group:lb], description: both } # keep\n      - ports:\n          - 80 # http\n          # secure\n          - 443\n        from: 10.0.0.0/8\n",
    );
    let one = remove_rule(&text, "web", Direction::Ingress, &RuleSelector::Tuple(tcp(&[80], "10.0.0.0/8"))).unwrap();
    assert!(one.text.ends_with("      - ports: 443\n          # secure\n        from: 10.0.0.0/8\n"), "{}", one.text);
    let corner = remove_rule(&text, "web", Direction::Ingress, &RuleSelector::Tuple(tcp(&[80], "0.0.0.0/0"))).unwrap();
    assert!(
        corner.text.contains("- { ports: [80, 443], from: [\"::/0\", group:lb], description: both } # keep\n"),
        "{}",
        corner.text
    );
    assert!(
        corner.text.ends_with("- policy: accept\n        protocol: tcp\n        ports: 443\n        from: 0.0.0.0/0\n        priority: 1\n        description: both\n"),
        "{}",
        corner.text
    );
}

#[test]
fn a_rule_is_changed_where_it_stands() {
    let text = web(
        "\n    ingress:\n      - { ports: 22, from: any } # ssh\n      - policy: accept\n        ports: # some\n          - 80 # http\n          # secure\n          - 443\n        from: any # all\n",
    );
    let change = RuleChange {
        description: Some("for: \"us\"".into()),
        priority: Some(7),
        policy: Some(Policy::Drop),
        ports: Some(vec![PortSel::Range(PortRange::ALL)]),
    };
    let flow = set_rule(&text, "web", Direction::Ingress, &RuleSelector::Index(0), &change).unwrap();
    assert_eq!(flow.line, 5);
    assert!(
        flow.text.contains(
            "- { ports: all, from: any, policy: drop, priority: 7, description: \"for: \\\"us\\\"\" } # ssh\n"
        ),
        "{}",
        flow.text
    );
    let block = set_rule(&text, "web", Direction::Ingress, &RuleSelector::Index(1), &change).unwrap();
    assert!(
        block.text.ends_with(
            "      - policy: drop\n        ports: all # some\n          # secure\n        from: any # all\n        priority: 7\n        description: \"for: \\\"us\\\"\"\n"
        ),
        "{}",
        block.text
    );
    let again = set_rule(&block.text, "web", Direction::Ingress, &RuleSelector::Index(1), &change).unwrap();
    assert!(!again.changed);
    let bad = RuleChange { priority: Some(101), ..RuleChange::default() };
    let refused = set_rule(&text, "web", Direction::Ingress, &RuleSelector::Index(1), &bad).unwrap_err();
    assert!(refused.to_string().contains("out of range"));
    assert!(set_rule(&text, "web", Direction::Egress, &RuleSelector::Index(0), &change).is_err());
}

#[test]
fn groups_are_added_cloned_and_deleted() {
    let text = "version: 1 # v\n# end\n";
    let group = NewGroup {
        name: "web".into(),
        description: "Public: web".into(),
        inner_access: Some(InnerAccess::Drop),
        members: vec![BTreeMap::from([("tier".into(), "yes".into())])],
        ingress: vec![tcp(&[80], "any")],
        ..NewGroup::default()
    };
    let first = add_group(text, &group).unwrap();
    assert_eq!(
        first.text,
        "version: 1 # v\nsecurity_groups:\n  web:\n    type: basic\n    description: \"Public: web\"\n    inner_access: drop\n    \
         members:\n      - { tier: \"yes\" }\n    ingress:\n      - { policy: accept, protocol: tcp, ports: 80, from: any, priority: 1 }\n# end\n"
    );
    assert_eq!(
        add_group(&first.text, &group).unwrap_err().to_string(),
        "the security group `web` exists already, on line 3"
    );
    let second = clone_group(&first.text, "web", "web-2").unwrap();
    let spec = spec_of(&second.text).unwrap();
    assert_eq!(spec.groups[1].members, []);
    assert_eq!(NewRule::of(&spec.groups[1].ingress[0]), tcp(&[80], "any"));
    assert_eq!(delete_group(&second.text, "web-2").unwrap().text, first.text);
    let none = delete_group(&first.text, "web").unwrap();
    assert_eq!(none.text, "version: 1 # v\nsecurity_groups: {}\n# end\n");
    assert!(add_group(&none.text, &group).is_ok());
    let missing = delete_group(&first.text, "wbe").unwrap_err();
    assert_eq!(missing.to_string(), "there is no security group `wbe` in this file; did you mean `web`?");
}

#[test]
fn flow_groups_are_deleted_with_one_comma() {
    let text = "{ version: 1, security_groups: { web: {}, db: { type: advanced }, lb: } }\n";
    assert_eq!(
        delete_group(text, "web").unwrap().text,
        "{ version: 1, security_groups: { db: { type: advanced }, lb: } }\n"
    );
    assert_eq!(delete_group(text, "db").unwrap().text, "{ version: 1, security_groups: { web: {}, lb: } }\n");
    assert_eq!(
        delete_group(text, "lb").unwrap().text,
        "{ version: 1, security_groups: { web: {}, db: { type: advanced } } }\n"
    );
}

#[test]
fn inner_access_is_set_among_the_short_fields() {
    let text = web("\n    # top\n    type: basic # t\n    ingress:\n      - { ports: 1, from: any }\n");
    let edited = set_inner_access(&text, "web", InnerAccess::Drop).unwrap();
    assert_eq!(edited.text, text.replace("# t\n", "# t\n    inner_access: drop\n"));
    let back = set_inner_access(&edited.text, "web", InnerAccess::Accept).unwrap();
    assert_eq!(back.text, edited.text.replace(": drop", ": accept"));
    assert!(!set_inner_access(&text, "web", InnerAccess::Accept).unwrap().changed);
    assert!(set_inner_access(&web(" { type: advanced }"), "web", InnerAccess::Drop).is_err());
}

#[test]
fn interfaces_join_and_leave_groups() {
    let text = "version: 1\ninstances:\n  a-web:\n    interfaces:\n      eth0: { addresses: [10.0.0.1], groups: [web] } # x\n      eth1:\n        groups:\n          # one\n          - web # w\n      eth2: # none\n";
    let both = join(text, "a-web", "eth0", "db").unwrap();
    assert_eq!(both.text, text.replace("[web]", "[web, db]"));
    assert_eq!(leave(&both.text, "a-web", "eth0", "db").unwrap().text, text);
    assert_eq!(leave(text, "a-web", "eth0", "web").unwrap().text, text.replace("[web]", "[]"));
    assert_eq!(join(text, "a-web", "eth1", "db").unwrap().text, text.replace("# w\n", "# w\n          - db\n"));
    assert_eq!(
        leave(text, "a-web", "eth1", "web").unwrap().text,
        text.replace("        groups:\n", "        groups: []\n").replace("          - web # w\n", "")
    );
    assert_eq!(join(text, "a-web", "eth2", "db").unwrap().text, format!("{text}        groups:\n          - db\n"));
    assert!(
        !join(text, "a-web", "eth0", "web").unwrap().changed && !leave(text, "a-web", "eth0", "db").unwrap().changed
    );
    assert!(join(text, "a-web", "eth9", "web").is_err() && join(text, "b-web", "eth0", "web").is_err());
    assert!(join(text, "a-web", "eth0", "{}").is_err());
}

#[test]
fn prefix_lists_gain_and_lose_entries_within_their_bounds() {
    let text = "version: 1\nprefix_lists:\n  office: { family: ipv4, max_entries: 2, entries: [10.0.0.0/8] }\n  home:\n    family: ipv6\n    max_entries: 2\n";
    let two = add_prefix(text, "office", "192.0.2.1".parse().unwrap()).unwrap();
    assert_eq!(two.text, text.replace("[10.0.0.0/8]", "[10.0.0.0/8, 192.0.2.1]"));
    assert!(!add_prefix(&two.text, "office", "192.0.2.1/32".parse().unwrap()).unwrap().changed);
    let three = add_prefix(&two.text, "office", "192.0.2.2".parse().unwrap()).unwrap_err();
    assert!(three.to_string().contains("more than its `max_entries` of 2"));
    let family = add_prefix(text, "office", "fd00::/8".parse().unwrap()).unwrap_err();
    assert!(family.to_string().contains("IPv6 in a list of IPv4"));
    let home = add_prefix(text, "home", "fd00::/8".parse().unwrap()).unwrap();
    assert_eq!(home.text, format!("{text}    entries:\n      - fd00::/8\n"));
    let all = add_prefix(text, "home", "::/0".parse().unwrap()).unwrap();
    assert_eq!(
        remove_prefix(&all.text, "home", "::/0".parse().unwrap()).unwrap().text,
        format!("{text}    entries: []\n")
    );
}

#[test]
fn replacing_rules_leaves_alone_what_is_wanted() {
    let text = web(
        "\n    ingress:\n      # site\n      - { ports: 80, from: any } # http\n      # old\n      - { ports: 21, from: any }\n",
    );
    let edited = replace_rules(&text, "web", &[tcp(&[22], "any"), tcp(&[80], "any")], &[tcp(&[25], "any")]).unwrap();
    assert!(edited.text.contains("      # site\n      - { ports: 80, from: any } # http\n"));
    assert!(
        !edited.text.contains("21") && edited.text.contains("# old") && edited.text.contains("egress:"),
        "{}",
        edited.text
    );
    let again =
        replace_rules(&edited.text, "web", &[tcp(&[80], "any"), tcp(&[22], "any")], &[tcp(&[25], "any")]).unwrap();
    assert!(!again.changed);
}

#[test]
fn what_is_not_a_posture_is_not_edited() {
    let error = add_rule("version: 2\n", "web", Direction::Ingress, &tcp(&[1], "any")).unwrap_err();
    assert!(matches!(error, EditError::NotValid(_)) && error.to_string().contains("version `2` is unknown"));
    let bad = NewRule { ports: Vec::new(), ..tcp(&[1], "any") };
    assert!(matches!(add_rule(&web(""), "web", Direction::Ingress, &bad), Err(EditError::Invalid(_))));
}

#[test]
fn an_edit_that_would_mean_something_else_is_refused() {
    // The comment between the ports would have to move into the middle of the quoted text.
    let text = web(
        "\n    ingress:\n      - { ports: [80,\n        # secure\n        443], description: \"a\n        b\", from: any }\n",
    );
    let change = RuleChange { ports: Some(vec![port(80, 80)]), ..RuleChange::default() };
    let refused = set_rule(&text, "web", Direction::Ingress, &RuleSelector::Index(0), &change).unwrap_err();
    assert!(matches!(refused, EditError::Awkward { .. }), "{refused}");
    assert!(refused.to_string().ends_with("edit it by hand"));
}

/// Texts and edits from a stream of numbers.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len())]
    }

    fn peer(&mut self) -> &'static str {
        self.pick(&["any", "10.0.0.0/8", "192.0.2.7", "\"::/0\"", "2001:db8::/32", "group:lb", "prefix-list:office"])
    }

    fn rule(&mut self) -> NewRule {
        let peer_count = 1 + self.below(2);
        let mut peers = Vec::new();
        for _ in 0..peer_count {
            let peer = crate::rule::parse_peer(self.peer().trim_matches('"')).unwrap();
            if !peers.contains(&peer) {
                peers.push(peer);
            }
        }
        let mut ports = Vec::new();
        for _ in 0..=self.below(2) {
            let next =
                [port(80, 80), port(443, 443), port(8000, 8100), PortSel::List("pl-x".into())][self.below(4)].clone();
            if !ports.contains(&next) {
                ports.push(next);
            }
        }
        NewRule {
            policy: [Policy::Accept, Policy::Drop][self.below(2)],
            priority: [1, 1, 50][self.below(3)],
            protocol: [Protocol::TCP, Protocol::UDP][self.below(2)],
            ports,
            source_ports: if self.below(4) == 0 { vec![PortRange::new(1024, 65535).unwrap()] } else { Vec::new() },
            peers,
            local: None,
            description: self.pick(&["", "", "the site", "a: b # c", "it's \"quoted\""]).to_owned(),
        }
    }
}

/// Writes a posture in a random style, with numbered comments wherever YAML allows a comment line.
struct Writer {
    dice: Dice,
    out: String,
    comments: usize,
}

impl Writer {
    fn comment(&mut self, indent: usize) {
        while self.dice.below(3) == 0 {
            self.comments += 1;
            let indent = if self.dice.below(5) == 0 { 0 } else { indent };
            self.out.push_str(&format!("{}# comment {}\n", " ".repeat(indent), self.comments));
        }
    }

    fn line(&mut self, indent: usize, text: &str) {
        let trailing = self.dice.pick(&["", "", "  # trailing"]);
        self.out.push_str(&format!("{}{text}{trailing}\n", " ".repeat(indent)));
        self.comment(indent);
    }

    fn list(&mut self, indent: usize, key: &str, items: &[Value]) {
        match (items, self.dice.below(4)) {
            ([], 0) => {}
            ([], 1) => self.line(indent, &format!("{key}:")),
            ([], 2) => self.line(indent, &format!("{key}: []")),
            ([], _) => {
                self.line(indent, &format!("{key}: ["));
                self.line(indent + 1, "]");
            }
            (items, 0) => self.line(indent, &format!("{key}: [{}]", joined(items))),
            (items, 1) => {
                self.line(indent, &format!("{key}: ["));
                let trailing_comma = self.dice.below(2) == 0;
                for (index, item) in items.iter().enumerate() {
                    let comma = if index + 1 < items.len() || trailing_comma { "," } else { "" };
                    self.line(indent + 2, &format!("{}{comma}", item.flow));
                }
                self.line(indent, "]");
            }
            (items, way) => {
                self.line(indent, &format!("{key}:"));
                let dash = if way == 2 { indent } else { indent + 2 };
                for item in items {
                    if item.block.is_empty() || self.dice.below(2) == 0 {
                        self.line(dash, &format!("- {}", item.flow));
                    } else {
                        for (index, text) in item.block.iter().enumerate() {
                            self.line(dash, &format!("{}{text}", if index == 0 { "- " } else { "  " }));
                        }
                    }
                }
            }
        }
    }

    fn posture(seed: u64) -> String {
        let mut w = Writer { dice: Dice(seed), out: String::new(), comments: 0 };
        w.comment(0);
        w.line(0, "version: 1");
        w.line(0, "security_groups:");
        for name in ["web", "db"] {
            if w.dice.below(6) == 0 {
                w.line(2, &format!("{name}:"));
                continue;
            }
            w.line(2, &format!("{name}:"));
            w.line(4, "type: basic");
            for direction in Direction::BOTH {
                let count = w.dice.below(4);
                let items: Vec<Value> = (0..count).map(|_| render::rule(&w.dice.rule(), direction, true)).collect();
                w.list(4, &direction.to_string(), &items);
            }
        }
        w.line(0, "prefix_lists:");
        w.line(2, "office:");
        w.line(4, "family: ipv4");
        w.line(4, "max_entries: 9");
        let entries: Vec<Value> =
            ["10.0.0.0/8", "192.0.2.7", "198.51.100.0/24"][..w.dice.below(4)].iter().map(|e| Value::flow(*e)).collect();
        w.list(4, "entries", &entries);
        w.line(0, "instances:");
        w.line(2, "one:");
        w.line(4, "interfaces:");
        if w.dice.below(2) == 0 {
            let groups = w.dice.pick(&["", ", groups: []", ", groups: [web]", ", groups: [web, db]", ", groups: "]);
            w.line(6, &format!("eth0: {{ device: eth0{groups} }}"));
        } else {
            w.line(6, "eth0:");
            w.line(8, "device: eth0");
            let groups: Vec<Value> = ["web", "db"][..w.dice.below(3)].iter().map(|g| Value::flow(*g)).collect();
            w.list(8, "groups", &groups);
        }
        if w.dice.below(3) == 0 {
            w.out.pop();
        }
        if w.dice.below(3) == 0 { w.out.replace('\n', "\r\n") } else { w.out }
    }
}

fn joined(items: &[Value]) -> String {
    items.iter().map(|item| item.flow.clone()).collect::<Vec<_>>().join(", ")
}

fn comment_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> =
        text.lines().map(str::trim).filter(|l| l.starts_with('#')).map(str::to_owned).collect();
    lines.sort();
    lines
}

/// What a group's rules of one direction decide, whatever way they are written.
fn meaning(spec: &Spec, group: &str, direction: Direction) -> BTreeSet<String> {
    let group = spec.groups.iter().find(|own| own.name == group).unwrap();
    group.rules(direction).iter().flat_map(|rule| singles_of(&NewRule::of(rule))).collect()
}

fn singles_of(rule: &NewRule) -> Vec<String> {
    rule.singles().into_iter().map(|rule| format!("{:?}", NewRule { description: String::new(), ..rule })).collect()
}

/// How many lines of `before` are gone.
fn lost_lines(before: &str, after: &str) -> usize {
    let mut after: Vec<&str> = after.lines().collect();
    before.lines().filter(|line| after.iter().position(|own| own == line).map(|at| after.remove(at)).is_none()).count()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_edits_keep_every_comment_line_and_do_what_was_asked(seed in any::<u64>()) {
        let mut text = Writer::posture(seed);
        let mut dice = Dice(seed ^ 0x5555);
        for _ in 0..6 {
            let before = spec_of(&text).unwrap_or_else(|p| panic!("{}\n{text}", p[0]));
            let group = dice.pick(&["web", "db"]);
            let direction = Direction::BOTH[dice.below(2)];
            let rule = dice.rule();
            let count = before.groups.iter().find(|own| own.name == group).unwrap().rules(direction).len();
            let mut want = meaning(&before, group, direction);
            let kind = dice.below(9);
            let result = match kind {
                0 | 1 => {
                    want.extend(singles_of(&rule));
                    add_rule(&text, group, direction, &rule)
                }
                2 => {
                    for single in singles_of(&rule) {
                        want.remove(&single);
                    }
                    remove_rule(&text, group, direction, &RuleSelector::Tuple(rule))
                }
                3 if count > 0 => {
                    let index = dice.below(count);
                    let kept: Vec<String> = before.groups.iter().find(|own| own.name == group).unwrap().rules(direction)
                        .iter().enumerate().filter(|(own, _)| *own != index)
                        .flat_map(|(_, rule)| singles_of(&NewRule::of(rule))).collect();
                    want = kept.into_iter().collect();
                    remove_rule(&text, group, direction, &RuleSelector::Index(index))
                }
                4 if count > 0 => {
                    let index = dice.below(count);
                    let change = RuleChange {
                        description: (!rule.description.is_empty()).then(|| rule.description.clone()),
                        priority: Some(rule.priority),
                        policy: None,
                        ports: Some(rule.ports.clone()),
                    };
                    let edited = set_rule(&text, group, direction, &RuleSelector::Index(index), &change);
                    if let Ok(edited) = &edited {
                        want = meaning(&spec_of(&edited.text).unwrap(), group, direction);
                    }
                    edited
                }
                5 => {
                    let new: Vec<NewRule> = (0..dice.below(4)).map(|_| dice.rule()).collect();
                    want = new.iter().flat_map(singles_of).collect();
                    let other: Vec<NewRule> = before.groups.iter().find(|own| own.name == group).unwrap()
                        .rules(if direction == Direction::Ingress { Direction::Egress } else { Direction::Ingress })
                        .iter().map(NewRule::of).collect();
                    match direction {
                        Direction::Ingress => replace_rules(&text, group, &new, &other),
                        Direction::Egress => replace_rules(&text, group, &other, &new),
                    }
                }
                6 if dice.below(2) == 0 => join(&text, "one", "eth0", group),
                6 => leave(&text, "one", "eth0", group),
                7 => {
                    let prefix = dice.pick(&["10.0.0.0/8", "192.0.2.7", "198.51.100.0/24", "203.0.113.0/24"]).parse().unwrap();
                    if dice.below(2) == 0 { add_prefix(&text, "office", prefix) } else { remove_prefix(&text, "office", prefix) }
                }
                _ => set_inner_access(&text, group, [InnerAccess::Accept, InnerAccess::Drop][dice.below(2)]),
            };
            let edited = result.unwrap_or_else(|error| panic!("edit {kind} of {group} {direction}: {error}\n{text}"));
            let after = spec_of(&edited.text).unwrap();
            prop_assert_eq!(meaning(&after, group, direction), want, "edit {}\n{}\n=====\n{}", kind, &text, &edited.text);
            prop_assert_eq!(comment_lines(&edited.text), comment_lines(&text), "edit {}\n{}\n=====\n{}", kind, &text, &edited.text);
            prop_assert_eq!(edited.changed, edited.text != text);
            prop_assert_eq!(edited.text.contains("\r\n"), text.contains("\r\n"));
            prop_assert!(!edited.text.contains("\r\n") || edited.text.matches('\n').count() == edited.text.matches("\r\n").count());
            if matches!(kind, 0 | 1 | 6 | 7) {
                prop_assert!(lost_lines(&text, &edited.text) <= 3, "edit {}\n{}\n=====\n{}", kind, &text, &edited.text);
            }
            text = edited.text;
        }
        // A group goes with its own comments and with nothing else.
        let lines = comment_lines(&text);
        let deleted = delete_group(&text, "web").unwrap_or_else(|error| panic!("{error}\n{text}"));
        let left = comment_lines(&deleted.text);
        prop_assert!(left.iter().all(|line| lines.contains(line)));
        prop_assert_eq!(meaning(&spec_of(&text).unwrap(), "db", Direction::Ingress), meaning(&spec_of(&deleted.text).unwrap(), "db", Direction::Ingress));
        let cloned = clone_group(&text, "web", "web-2").unwrap_or_else(|error| panic!("{error}\n{text}"));
        prop_assert_eq!(comment_lines(&cloned.text), lines);
    }
}

#[test]
fn a_peer_that_is_any_in_the_clouds_words_reads_as_any() {
    assert_eq!(tcp(&[1], "any").singles().len(), 2);
    assert_eq!(NewRule { protocol: Protocol::ICMP, ports: Vec::new(), ..tcp(&[], "any") }.singles().len(), 1);
    assert_eq!(crate::rule::parse_peer("0.0.0.0/0").unwrap().to_string(), "0.0.0.0/0");
    assert_eq!(crate::rule::parse_peer("any").unwrap(), Peer::Any);
}
