//! What must parse, what must not, and with which words it is refused: one file per case.
//!
//! `tests/cases/NAME.yaml` is what an operator wrote; `tests/cases/NAME.out` is what the parser says about it.
//! `UPDATE=1 cargo test -p keepwall-posture` rewrites the latter; read the difference. A line
//! `#=== file: NAME` begins another file of the same posture.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests read their cases from files")]

use std::fs;
use std::path::{Path, PathBuf};

use keepwall_core::Place;
use keepwall_posture::{FILE_BYTES_MAX, PROBLEMS_MAX, SourceFile, fuzz_parse, parse};
use keepwall_secgroup::spec::{Direction, Peer, Settings, Spec};

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The files of a case.
fn files(name: &str, text: &str) -> Vec<SourceFile> {
    let mut files = vec![SourceFile::new(name, "")];
    for line in text.split_inclusive('\n') {
        match line.strip_prefix("#=== file: ") {
            Some(next) => files.push(SourceFile::new(next.trim(), "")),
            None => files.last_mut().unwrap().text.push_str(line),
        }
    }
    files.retain(|file| !file.text.is_empty() || text.is_empty());
    files
}

fn outcome(files: &[SourceFile]) -> String {
    match parse(files) {
        Ok(spec) => told(&spec),
        Err(problems) => problems.iter().map(|problem| format!("{problem}\n")).collect(),
    }
}

/// A spec in a few lines, each with the place that it was read from.
fn told(spec: &Spec) -> String {
    let mut out = match &spec.settings {
        settings if *settings == Settings::default() => String::new(),
        settings => format!("{settings:?}\n"),
    };
    let mut line = |place: &Place, text: String| out.push_str(&format!("{place}:{} {text}\n", place.column));
    for instance in &spec.instances {
        line(&instance.place, format!("instance {} {:?}", instance.name, instance.labels));
        for one in &instance.interfaces {
            let host = one.host.as_ref().map_or("itself", |host| &host.name);
            let groups: Vec<&str> = one.groups.iter().map(|group| group.name.as_str()).collect();
            let what = format!("  interface {} on {} of {host} {:?}", one.name, one.device, one.addresses);
            line(&one.place, format!("{what} public {:?} mac {:x?} in {groups:?}", one.public, one.mac));
        }
    }
    for group in &spec.groups {
        let (kind, access) = (group.kind, group.inner_access);
        line(&group.place, format!("group {} {kind:?} {access:?} {:?}", group.name, group.description));
        group.members.iter().for_each(|one| line(&one.place, format!("  members {:?}", one.labels)));
        for direction in Direction::BOTH {
            for rule in group.rules(direction) {
                let words = |words: Vec<String>| words.join(" ");
                let ports = words(rule.ports.iter().map(ToString::to_string).collect());
                let sources = words(rule.source_ports.iter().map(ToString::to_string).collect());
                let peers = words(rule.peers.iter().map(|peer| peer.peer.to_string()).collect());
                let local = rule.local.map_or("-".to_owned(), |local| local.to_string());
                let what = format!("  {direction} {:?} {} {} ports {ports}", rule.policy, rule.priority, rule.protocol);
                line(&rule.place, format!("{what} sources {sources} peers {peers} own {local} {:?}", rule.description));
            }
        }
    }
    for list in &spec.prefix_lists {
        let entries: Vec<String> = list.entries.iter().map(|(prefix, _)| prefix.to_string()).collect();
        let what = format!("prefix list {} {} of {} {:?}", list.name, list.family, list.max_entries, list.description);
        line(&list.place, format!("{what} {entries:?}"));
    }
    for list in &spec.port_lists {
        let entries: Vec<String> = list.entries.iter().map(|(range, _)| range.to_string()).collect();
        line(
            &list.place,
            format!("port list {} of {} {:?} {entries:?}", list.name, list.max_entries, list.description),
        );
    }
    for test in &spec.tests {
        let ports = test.ports.map_or("all".to_owned(), |ports| ports.to_string());
        let verdict = if test.allow { "allow" } else { "deny" };
        line(&test.place, format!("{verdict} {} -> {} {ports} {}", test.from, test.to, test.protocol));
    }
    out
}

#[test]
fn each_case_is_read_or_refused_in_exactly_these_words() {
    let mut names: Vec<PathBuf> =
        fs::read_dir(here("tests/cases")).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|ext| ext == "yaml"));
    names.sort();
    assert!(names.len() > 20, "only {} cases", names.len());
    let mut wrong = Vec::new();
    for path in names {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let found = outcome(&files(&name, &fs::read_to_string(&path).unwrap()));
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
fn every_example_parses() {
    let mut count = 0;
    for entry in fs::read_dir(here("../../examples")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ext| ext == "yaml") {
            let text = fs::read_to_string(&path).unwrap();
            let found = parse(&[SourceFile::new(&path.to_string_lossy(), text)]);
            let spec = found.unwrap_or_else(|problems| panic!("{}", problems[0]));
            assert!(!spec.tests.is_empty() && !spec.groups.is_empty(), "{path:?}");
            count += 1;
        }
    }
    assert!(count >= 4, "{count} examples");
}

#[test]
fn the_labs_example_says_what_the_lab_proves() {
    let text = fs::read_to_string(here("../../examples/web-and-db.yaml")).unwrap();
    let spec = parse(&[SourceFile::new("web-and-db.yaml", text)]).unwrap();
    assert_eq!(spec.settings, Settings::default());
    let web = &spec.instances[0].interfaces[0];
    assert_eq!((web.name.as_str(), web.device.as_str()), ("eth0", "eth0"));
    assert_eq!(web.addresses, ["10.77.1.10".parse::<std::net::IpAddr>().unwrap(), "fd77:1::10".parse().unwrap()]);
    let db = spec.groups.iter().find(|group| group.name == "db").unwrap();
    assert_eq!(db.rules(Direction::Ingress)[0].peers[0].peer, Peer::Group("web".into()));
    assert!((8..=10).contains(&spec.tests.len()));
    assert!(spec.tests.iter().any(|test| test.allow) && spec.tests.iter().any(|test| !test.allow));
}

#[test]
fn the_manual_names_every_key_and_its_example_parses() {
    let manual = fs::read_to_string(here("../../docs/posture.md")).unwrap();
    let example = manual.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    if let Err(problems) = parse(&[SourceFile::new("docs/posture.md", example)]) {
        panic!("{}", problems[0]);
    }
}

#[test]
fn at_most_fifty_problems_are_reported_and_in_order() {
    let text = format!("version: 1\ninstances:\n{}", "  - x\n".repeat(3));
    assert_eq!(parse(&[SourceFile::new("a", text)]).unwrap_err().len(), 1);
    let rules = "      - { ports: 0, from: any }\n".repeat(80);
    let text = format!("version: 1\nsecurity_groups:\n  web:\n    ingress:\n{rules}");
    let problems = parse(&[SourceFile::new("a", text)]).unwrap_err();
    assert_eq!(problems.len(), PROBLEMS_MAX);
    assert!(problems.is_sorted_by_key(|problem| problem.place.line));
}

#[test]
fn what_is_too_large_or_too_deep_is_refused_before_it_costs_anything() {
    let large = format!("version: 1 # {}", "x".repeat(FILE_BYTES_MAX));
    let deep = format!("version: {}", "[".repeat(200));
    let deep_block =
        format!("version:\n{}", (0..100).map(|n| format!("{}a:\n", " ".repeat(n + 1))).collect::<String>());
    let many = format!("version: 1\ntests: [{}]", "a,".repeat(1_000_001));
    for (text, why) in [
        (large, "the most is"),
        (deep, "deeper than 32"),
        (deep_block, "deeper than 32"),
        (many, "more than 1000000 values"),
    ] {
        let problems = parse(&[SourceFile::new("a", text)]).unwrap_err();
        assert!(problems.iter().any(|problem| problem.message.contains(why)), "{why}: {}", problems[0]);
        assert!(problems[0].to_string().len() < 2_000);
    }
}

/// Each text is near the size limit and of a shape that invites quadratic work.
#[test]
fn no_shape_of_a_large_file_keeps_the_parser_busy() {
    let big = FILE_BYTES_MAX - 1_000;
    let filled = |head: &str, piece: &str, tail: &str| format!("{head}{}{tail}", piece.repeat(big / piece.len()));
    let rule = "version: 1\nsecurity_groups: { web: { ingress: [ { ports: 1, from: [";
    let texts = [
        filled("version: 1\n", "# comment\n", ""),
        filled("version: 1\n", "#", ""),
        filled("", "- ", ""),
        filled("", "? ", ""),
        filled("", "[", ""),
        filled("", "{a: ", ""),
        filled("a: ", "x ", ""),
        filled("", "a\n", ""),
        filled("a: \"", "\\n", "\""),
        filled("a: \"", "x", ""),
        filled("a: |\n", "  x\n", ""),
        filled("", "&a ", ""),
        filled("", "!", ""),
        filled("", "%TAG ! x\n", ""),
        filled("version: 1\n", "\t\n", ""),
        filled("version: 1\n", "\u{7}", ""),
        filled("version: 1\n", "\u{7}\n", ""),
        filled("version: 1\nsettings: { service_prefixes: [", "x,", "] }\n"),
        filled(rule, "group:aaa, ", "] } ] } }\n"),
        filled(rule, "wbe,", "] } ] } }\n"),
        (0..250_000).map(|n| format!("aaaaaaa{n}: x\n")).collect::<String>(),
        format!("{rule}{}] }} ] }} }}\n", (0..250_000).map(|n| format!("group:g{n},")).collect::<String>()),
        format!(
            "version: 1\nsecurity_groups:\n  web:\n    ingress:\n{}",
            "    - { ports: 1, from: any, port: 1 }\n".repeat(90_000)
        ),
    ];
    for text in texts {
        // No time is asserted: quadratic work on four million bytes would not end while anyone waits.
        let _ = parse(&[SourceFile::new("large.yaml", text)]);
    }
}

#[test]
fn nothing_and_no_file_are_refused() {
    assert_eq!(parse(&[]).unwrap_err()[0].message, "there is no posture file");
    for text in ["", "# only a comment\n", "---\n", "\u{feff}"] {
        assert!(parse(&[SourceFile::new("a", text)]).is_err(), "{text:?}");
    }
}

#[test]
fn windows_files_and_byte_order_marks_change_no_place() {
    let text =
        "version: 1\nsecurity_groups:\n  web: # ünïcödé\n    ingress:\n      - { ports: 22, from: 10.0.0.7/24 }\n";
    let plain = parse(&[SourceFile::new("a", text)]).unwrap_err();
    assert_eq!((plain[0].place.line, plain[0].place.column), (5, 28));
    let crlf = parse(&[SourceFile::new("a", text.replace('\n', "\r\n"))]).unwrap_err();
    assert_eq!(plain, crlf);
    let mark = parse(&[SourceFile::new("a", format!("\u{feff}{text}"))]).unwrap_err();
    assert_eq!(plain, mark);
}

#[test]
fn no_bytes_make_the_parser_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut seeds: Vec<Vec<u8>> = fs::read_dir(here("tests/cases"))
        .unwrap()
        .chain(fs::read_dir(here("../../examples")).unwrap())
        .map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .collect();
    seeds.sort();
    let alphabet = b"\n\n  :-[]{},#&*!|>'\"%@`\t\r?~<=/0129azA\xff\xc3\xa9\0";
    let rounds: usize = std::env::var("FUZZ_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1_500);
    for _ in 0..rounds {
        let mut bytes = seeds[random(seeds.len())].clone();
        for _ in 0..=random(6) {
            let at = random(bytes.len() + 1);
            let until = (at + random(12)).min(bytes.len());
            match random(4) {
                0 => drop(bytes.drain(at..until)),
                1 => bytes.insert(at, alphabet[random(alphabet.len())]),
                2 => {
                    let piece = bytes[at..until].to_vec();
                    let to = random(bytes.len() + 1);
                    bytes.splice(to..to, piece);
                }
                _ => bytes.truncate(at.max(bytes.len() / 2)),
            }
        }
        fuzz_parse(&bytes);
    }
}
