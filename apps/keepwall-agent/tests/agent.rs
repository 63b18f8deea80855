//! The agent as a process, in network namespaces of the tests' own. Needs root.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]

mod bench;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bench::{Bench, applied, intent, nft, refusal, story};
use keepwall_core::Generation;
use keepwall_link::{Drift, Request, Response};
use keepwall_secgroup::spec::GroupType;

#[test]
fn an_agent_that_was_told_nothing_leaves_the_kernel_alone() {
    story(|| {
        let mut bench = Bench::new("observing");
        bench.start();
        assert_eq!(bench.status().mode, "observing");
        if let Some(tables) = nft(&["list", "tables"]) {
            assert_eq!(tables, "");
        }
    });
}

#[test]
fn a_killed_agents_rules_stay_and_the_next_one_takes_them_over() {
    story(|| {
        let mut bench = Bench::new("killed");
        bench.start();
        applied(bench.apply(&intent(&[80, 443]), None, None));
        let before = nft(&["list", "table", "inet", "keepwall"]);
        bench.kill();
        if let Some(before) = &before {
            // The first lines name the owner, who is gone.
            let rules = |text: &str| text.split_once("\n\n").unwrap().1.to_owned();
            let after = nft(&["list", "table", "inet", "keepwall"]).unwrap();
            assert!(after.contains("web/ingress#443"));
            assert!(rules(before) == rules(&after), "{before}\n{after}");
        }
        bench.start();
        let status = bench.status();
        assert_eq!((status.mode.as_str(), status.generation), ("enforcing", Generation(1)));
        assert!(matches!(bench.ask(Request::Verify), Response::Verified(Drift::None)));
        // It owns the table: others can neither flush nor delete it.
        if nft(&["flush", "ruleset"]).is_some() {
            assert!(nft(&["list", "table", "inet", "keepwall"]).unwrap().contains("web/ingress#443"));
            assert!(matches!(bench.ask(Request::Verify), Response::Verified(Drift::None)));
        }
        assert_eq!(applied(bench.apply(&intent(&[80, 443]), Some(1), None)).outcome, "unchanged");
    });
}

#[test]
fn what_somebody_took_away_while_no_agent_ran_is_put_right_and_told() {
    story(|| {
        let mut bench = Bench::new("flushed");
        bench.start();
        applied(bench.apply(&intent(&[80]), None, None));
        for (taken, words) in
            [(["flush", "table"], "all its rules were gone"), (["delete", "table"], "the table was gone")]
        {
            bench.kill();
            if nft(&[&taken[..], &["inet", "keepwall"]].concat()).is_none() {
                return eprintln!("skipped: nftables is not installed");
            }
            bench.start();
            let status = bench.status();
            assert!(matches!(&status.drift, Drift::Repaired(what) if what[0].contains(words)), "{:?}", status.drift);
            assert_eq!(status.repairs, 1);
            assert!(nft(&["list", "table", "inet", "keepwall"]).unwrap().contains("web/ingress#80"));
        }
        bench.kill();
        bench.start();
        assert_eq!((bench.status().repairs, bench.status().drift), (0, Drift::None), "nobody touched it");
    });
}

#[test]
fn a_boot_comes_back_to_what_was_confirmed_and_not_to_what_was_pending() {
    let mut bench = Bench::new("boot");
    let bench = &mut bench;
    story(|| {
        bench.start();
        applied(bench.apply(&intent(&[80]), None, None));
        assert_eq!(applied(bench.apply(&intent(&[8080]), None, Some(300))).generation, Generation(2));
        assert_eq!(bench.status().pending.unwrap().generation, Generation(2));
        bench.kill();
    });
    if !bench.state().join("confirmed.json").exists() {
        return;
    }
    // Another namespace, as empty as a kernel that has just booted.
    story(|| {
        let output = bench.command("restore").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        if let Some(table) = nft(&["list", "table", "inet", "keepwall"]) {
            assert!(table.contains("web/ingress#80\"") && !table.contains("web/ingress#8080"));
        }
        // Another program of the boot empties every table before the agent is up.
        let flushed = nft(&["flush", "table", "inet", "keepwall"]).is_some();
        bench.start();
        let status = bench.status();
        assert_eq!((status.generation, status.pending), (Generation(1), None));
        assert_eq!(status.repairs, u64::from(flushed), "{:?}", status.drift);
        // A generation that was reverted is not given out again.
        assert_eq!(applied(bench.apply(&intent(&[81]), None, None)).generation, Generation(3));
    });
}

#[test]
fn what_is_not_confirmed_reverts_and_a_late_confirmation_is_refused() {
    story(|| {
        let mut bench = Bench::new("revert");
        bench.start();
        applied(bench.apply(&intent(&[80]), None, None));
        applied(bench.apply(&intent(&[8080]), Some(1), Some(5)));
        assert_eq!(refusal(bench.apply(&intent(&[81]), None, Some(5))), "pending");
        let started = Instant::now();
        while bench.status().pending.is_some() {
            assert!(started.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(100));
        }
        let confirm = Request::Confirm { generation: Generation(2), danger_same_session: false };
        assert_eq!(refusal(bench.ask(confirm)), "nothing-pending");
        match bench.ask(Request::Intent) {
            Response::Intent(Some(now)) => assert_eq!(*now, intent(&[80])),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_plan_against_another_state_and_a_broken_intent_change_nothing() {
    story(|| {
        let mut bench = Bench::new("refused");
        bench.start();
        applied(bench.apply(&intent(&[80]), Some(0), None));
        assert_eq!(refusal(bench.apply(&intent(&[81]), Some(0), None)), "state-moved");
        let mut broken = intent(&[80]);
        broken.format = 99;
        assert_eq!(refusal(bench.apply(&broken, None, None)), "bad-request");
        let mut broken = intent(&[80]);
        broken.attachments[0].device = "no/device".into();
        assert_eq!(refusal(bench.apply(&broken, None, None)), "bad-request");
        assert_eq!(refusal(bench.apply(&intent(&[80]), None, Some(1))), "bad-request");
        let mut large = intent(&[80, 81, 82, 83]);
        large.elements_max = 3;
        assert_eq!(refusal(bench.apply(&large, None, None)), "too-large");
        assert_eq!(bench.status().generation, Generation(1));
    });
}

#[test]
fn one_rule_more_for_one_map_is_changed_in_place_and_the_rest_is_replaced() {
    story(|| {
        let mut bench = Bench::new("in-place");
        bench.start();
        assert_eq!(applied(bench.apply(&intent(&[80]), None, None)).outcome, "replaced");
        assert_eq!(applied(bench.apply(&intent(&[80, 81]), None, None)).outcome, "elements");
        let mut other = intent(&[80, 81]);
        other.attachments[0].kind = GroupType::Advanced;
        assert_eq!(applied(bench.apply(&other, None, None)).outcome, "replaced");
        assert!(matches!(bench.ask(Request::Verify), Response::Verified(Drift::None)));
    });
}

#[test]
fn a_damaged_state_is_never_enforced_and_the_kernel_keeps_what_it_has() {
    story(|| {
        let mut bench = Bench::new("damaged");
        bench.start();
        applied(bench.apply(&intent(&[80]), None, None));
        bench.kill();
        let path = bench.state().join("confirmed.json");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let output = bench.command("run").arg("--socket").arg(bench.socket()).output().unwrap();
        assert!(!output.status.success());
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains("is damaged") && words.contains("stays in force"), "{words}");
        if let Some(table) = nft(&["list", "table", "inet", "keepwall"]) {
            assert!(table.contains("web/ingress#80"));
        }
    });
}

#[test]
fn a_second_agent_on_the_same_state_is_refused() {
    story(|| {
        let mut bench = Bench::new("second");
        bench.start();
        let output = bench.command("run").arg("--socket").arg(Path::new("/nonexistent/sock")).output().unwrap();
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("is already using it"));
    });
}

#[test]
fn nonsense_on_the_socket_is_answered_and_the_agent_lives() {
    use std::io::{Read, Write};
    story(|| {
        let mut bench = Bench::new("nonsense");
        bench.start();
        for bytes in [&b"\0\0\0\x02{}"[..], b"\xff\xff\xff\xff", b"\0\0\0\x04nope", b"GET / HTTP/1.1\r\n\r\n"] {
            let mut stream = UnixStream::connect(bench.socket()).unwrap();
            stream.write_all(bytes).unwrap();
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(String::from_utf8_lossy(&answer).contains("bad-request"), "{bytes:?}");
        }
        assert_eq!(bench.status().mode, "observing");
    });
}
