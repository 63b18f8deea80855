//! A machine that is bound to a control plane: what the agent takes, from whom, and what survives `kill -9`.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]
#![allow(clippy::print_stdout, reason = "how a child hands its answer back")]

mod bench;

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bench::{Bench, applied, intent, refusal, story};
use keepwall_core::Generation;
use keepwall_fleet::bundle::Bundle;
use keepwall_host::process::{User, unprivileged};
use keepwall_link::{
    Apply, Drift, Envelope, FRAME_BYTES_MAX, FleetState, Mark, Request, Response, VERSION, read_frame, write_frame,
};
use keepwall_secgroup::intent::Intent;

const UPLINK: u32 = 64_917;

fn mark(generation: u64, intent: &Intent) -> Mark {
    Mark { generation, digest: Bundle::of(intent.clone()).digest() }
}

fn offer(generation: u64, intent: &Intent) -> Apply {
    Apply {
        intent: intent.clone(),
        base: None,
        confirm_within_s: Some(60),
        danger_cut_session: false,
        note: "test".into(),
        fleet: Some(mark(generation, intent)),
    }
}

fn bind(bench: &Bench) -> Response {
    bench.ask(Request::Bind { instance: "web".into(), server: "fleet.example:7443".into(), uid: UPLINK })
}

fn fleet(bench: &Bench) -> FleetState {
    match bench.ask(Request::Fleet) {
        Response::Fleet(state) => state,
        other => panic!("{other:?}"),
    }
}

fn take(bench: &Bench, apply: Apply) -> Response {
    bench.ask(Request::Apply(Box::new(apply)))
}

fn confirm(bench: &Bench, generation: Generation) {
    let answer = bench.ask(Request::Confirm { generation, danger_same_session: false });
    assert!(matches!(answer, Response::Done(_)), "{answer:?}");
}

fn in_force(bench: &Bench) -> Option<Intent> {
    match bench.ask(Request::Intent) {
        Response::Intent(intent) => intent.map(|intent| *intent),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_the_control_plane_decides_is_tried_confirmed_and_held() {
    story(|| {
        let mut bench = Bench::new("fleet-held");
        bench.start();
        assert_eq!(refusal(bench.ask(Request::Fleet)), "not-bound");
        assert_eq!(refusal(take(&bench, offer(5, &intent(&[80])))), "not-bound");
        assert!(matches!(bind(&bench), Response::Done(_)));
        let state = fleet(&bench);
        assert_eq!((state.instance.as_str(), state.server.as_str()), ("web", "fleet.example:7443"));
        assert_eq!((state.held, state.tried, state.intent), (Mark::default(), Mark::default(), None));

        let first = offer(5, &intent(&[80]));
        let done = applied(take(&bench, first.clone()));
        assert_eq!((done.confirmed, done.confirm_within_s), (false, Some(60)));
        assert_eq!(bench.status().pending.unwrap().fleet, first.fleet);
        let state = fleet(&bench);
        assert_eq!((state.held, Some(state.tried)), (Mark::default(), first.fleet));
        confirm(&bench, done.generation);
        let state = fleet(&bench);
        assert_eq!((Some(state.held), state.intent), (first.fleet, Some(Box::new(intent(&[80])))));

        // The same rules under a new number: nothing reaches the kernel, so there is nothing to prove.
        let again = applied(take(&bench, offer(6, &intent(&[80]))));
        assert_eq!((again.outcome.as_str(), again.confirmed, again.confirm_within_s), ("unchanged", true, None));
        assert_eq!((fleet(&bench).held.generation, bench.status().pending), (6, None));

        // All of it is on disk.
        bench.kill();
        bench.start();
        let state = fleet(&bench);
        assert_eq!((state.held.generation, state.tried.generation), (6, 6));
    });
}

#[test]
fn an_older_decision_another_machines_and_a_forged_one_are_refused() {
    story(|| {
        let mut bench = Bench::new("fleet-refused");
        bench.start();
        bind(&bench);
        confirm(&bench, applied(take(&bench, offer(5, &intent(&[80])))).generation);
        let newer = applied(take(&bench, offer(7, &intent(&[81])))).generation;
        assert!(matches!(bench.ask(Request::Revert { generation: Some(newer) }), Response::Done(_)));
        // 7 was begun and taken back: held is 5 still, and yet nothing below 7 is taken, not even 5 itself.
        assert_eq!((fleet(&bench).held.generation, fleet(&bench).tried.generation), (5, 7));
        for generation in [1, 5, 6, 7] {
            assert_eq!(refusal(take(&bench, offer(generation, &intent(&[80])))), "older", "{generation}");
        }
        let mut other = intent(&[80]);
        other.instance = "db".into();
        assert_eq!(refusal(take(&bench, offer(8, &other))), "other-instance");
        let forged = Apply { intent: intent(&[22]), ..offer(8, &intent(&[80])) };
        assert_eq!(refusal(take(&bench, forged)), "other-digest");
        let for_ever = Apply { confirm_within_s: None, ..offer(8, &intent(&[80])) };
        assert_eq!(refusal(take(&bench, for_ever)), "bad-request");
        assert_eq!((in_force(&bench), fleet(&bench).tried.generation), (Some(intent(&[80])), 7));
        // And after a restart as before.
        bench.kill();
        bench.start();
        assert_eq!(refusal(take(&bench, offer(6, &intent(&[80])))), "older");
        // The one that was begun may be begun again.
        confirm(&bench, applied(take(&bench, offer(7, &intent(&[81])))).generation);
        assert_eq!(fleet(&bench).held.generation, 7);
    });
}

#[test]
fn a_bound_machine_is_not_changed_by_hand_until_it_leaves() {
    story(|| {
        let mut bench = Bench::new("fleet-bound");
        bench.start();
        applied(bench.apply(&intent(&[22]), None, None));
        bind(&bench);
        assert_eq!(refusal(bench.apply(&intent(&[80]), None, None)), "bound");
        assert_eq!(refusal(bench.ask(Request::Remove)), "bound");
        let elsewhere = Request::Bind { instance: "web".into(), server: "other.example:7443".into(), uid: UPLINK };
        assert_eq!(refusal(bench.ask(elsewhere)), "bound");
        assert_eq!(bench.status().server.as_deref(), Some("fleet.example:7443"));
        confirm(&bench, applied(take(&bench, offer(5, &intent(&[80])))).generation);
        // Enrolled again at the same place: what was begun is not forgotten.
        bind(&bench);
        assert_eq!((fleet(&bench).tried.generation, fleet(&bench).held.generation), (5, 5));
        // Leaving takes back what nobody can confirm any more, and keeps what is confirmed.
        applied(take(&bench, offer(6, &intent(&[81]))));
        assert!(matches!(bench.ask(Request::Unbind), Response::Done(_)));
        assert_eq!(
            (in_force(&bench), bench.status().pending, bench.status().server),
            (Some(intent(&[80])), None, None)
        );
        assert_eq!(refusal(take(&bench, offer(7, &intent(&[80])))), "not-bound");
        // What the first control plane decided is not held for the next one.
        bind(&bench);
        assert_eq!((fleet(&bench).held, fleet(&bench).tried, fleet(&bench).intent), Default::default());
        bench.ask(Request::Unbind);
        applied(bench.apply(&intent(&[22]), None, Some(60)));
        assert_eq!(refusal(bind(&bench)), "pending");
    });
}

#[test]
fn an_unconfirmed_decision_reverts_by_itself_even_if_the_agent_is_killed() {
    story(|| {
        let mut bench = Bench::new("fleet-revert");
        bench.start();
        bind(&bench);
        confirm(&bench, applied(take(&bench, offer(5, &intent(&[80])))).generation);
        applied(take(&bench, Apply { confirm_within_s: Some(5), ..offer(6, &intent(&[81])) }));
        bench.kill();
        let started = Instant::now();
        while bench.state().join("pending.json").exists() {
            assert!(started.elapsed() < Duration::from_secs(20), "the watchdog does not revert");
            std::thread::sleep(Duration::from_millis(50));
        }
        bench.start();
        assert_eq!(in_force(&bench), Some(intent(&[80])));
        assert_eq!((fleet(&bench).held.generation, fleet(&bench).tried.generation), (5, 6));
    });
}

#[test]
fn what_is_begun_is_on_disk_before_anything_is_applied() {
    story(|| {
        let mut bench = Bench::new("fleet-begun");
        bench.start();
        bind(&bench);
        confirm(&bench, applied(take(&bench, offer(5, &intent(&[80])))).generation);
        // A disk that takes nothing more just after the decision counts as begun.
        let obstacle = bench.state().join("pending.json.part");
        std::fs::create_dir(&obstacle).unwrap();
        assert_eq!(refusal(take(&bench, offer(6, &intent(&[81])))), "disk");
        bench.kill();
        std::fs::remove_dir(&obstacle).unwrap();
        bench.start();
        assert_eq!((fleet(&bench).held.generation, fleet(&bench).tried.generation), (5, 6));
        assert_eq!(in_force(&bench), Some(intent(&[80])));
        assert_eq!(refusal(take(&bench, offer(5, &intent(&[80])))), "older");
        confirm(&bench, applied(take(&bench, offer(6, &intent(&[81])))).generation);
    });
}

#[test]
fn killed_anywhere_in_an_apply_the_agent_never_goes_back() {
    story(|| {
        let mut bench = Bench::new("fleet-killed");
        bench.start();
        bind(&bench);
        let mut held = 0;
        for round in 1..=24u64 {
            let wanted = intent(&[u16::try_from(round).unwrap()]);
            let mut stream = UnixStream::connect(bench.socket()).unwrap();
            let request = Request::Apply(Box::new(offer(round, &wanted)));
            write_frame(&mut stream, &Envelope { version: VERSION, request }).unwrap();
            // From before it is read until after it is done.
            std::thread::sleep(Duration::from_micros(round * 500));
            bench.kill();
            bench.start();
            let state = fleet(&bench);
            assert_eq!(state.held.generation, held, "nothing is held that nobody confirmed");
            let pending = bench.status().pending;
            let of_this = in_force(&bench).as_ref() == Some(&wanted);
            assert_eq!(of_this, pending.is_some(), "in force is what waits, else what is held");
            if of_this {
                assert_eq!(state.tried, mark(round, &wanted), "in force and not begun");
            }
            if let Some(pending) = pending {
                assert_eq!(pending.fleet, Some(mark(round, &wanted)));
                confirm(&bench, pending.generation);
            } else {
                confirm(&bench, applied(take(&bench, offer(round, &wanted))).generation);
            }
            held = round;
            if round > 1 {
                assert_eq!(refusal(take(&bench, offer(round - 1, &intent(&[1])))), "older");
            }
        }
        assert!(matches!(bench.ask(Request::Verify), Response::Verified(Drift::None)));
    });
}

#[test]
fn a_damaged_binding_is_not_taken_for_none() {
    story(|| {
        let mut bench = Bench::new("fleet-damaged");
        bench.start();
        bind(&bench);
        bench.kill();
        let path = bench.state().join("fleet.json");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let output = bench.command("run").arg("--socket").arg(bench.socket()).output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && words.contains("fleet.json is damaged"), "{words}");
    });
}

/// Where a child is told to ask.
const ASK_AT: &str = "KEEPWALL_TEST_ASK_AT";
/// What stands before its answer.
const ANSWER: &str = "the answer is ";

/// Not a test: what a child of the next test does, as another user.
#[test]
fn a_child_asks_as_somebody_else() {
    let Ok(socket) = std::env::var(ASK_AT) else { return };
    let mut request = Vec::new();
    std::io::stdin().read_to_end(&mut request).unwrap();
    let said = match UnixStream::connect(socket) {
        Err(error) => format!("{:?}", error.kind()),
        Ok(mut stream) => {
            stream.write_all(&request).unwrap();
            let answer: Response = read_frame(&mut stream, FRAME_BYTES_MAX).unwrap();
            match answer {
                Response::Refused(refused) => refused.code,
                Response::Applied(applied) => format!("applied {}", applied.generation.0),
                other => format!("{other:?}").split(['(', ' ']).next().unwrap().to_owned(),
            }
        }
    };
    println!("\n{ANSWER}{said}");
}

/// Asks in a process of that user; `None` if that user cannot run this program.
fn ask_as(uid: u32, socket: &Path, request: Request) -> Option<String> {
    let mut bytes = Vec::new();
    write_frame(&mut bytes, &Envelope { version: VERSION, request }).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_child_asks_as_somebody_else", "--nocapture"]).env(ASK_AT, socket);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = match unprivileged(&mut command, User { uid, gid: uid }).spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return None,
        other => other.unwrap(),
    };
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let answer = text.lines().find_map(|line| line.strip_prefix(ANSWER));
    Some(answer.unwrap_or_else(|| panic!("{text}")).to_owned())
}

#[test]
fn the_bound_user_may_hand_on_decisions_and_nothing_else() {
    story(|| {
        let mut bench = Bench::new("fleet-users");
        bench.start();
        let socket = bench.socket();
        let Some(before) = ask_as(UPLINK, &socket, Request::Status) else {
            return eprintln!("skipped: another user cannot run this test");
        };
        assert_eq!(before, "PermissionDenied", "nobody but root reaches the socket of a machine that is not bound");
        bind(&bench);
        assert_eq!(std::fs::metadata(&socket).unwrap().uid(), UPLINK);
        assert_eq!(ask_as(UPLINK + 1, &socket, Request::Status).unwrap(), "PermissionDenied");
        let ask = |request: Request| ask_as(UPLINK, &socket, request).unwrap();
        let apply = |apply: Apply| Request::Apply(Box::new(apply));

        assert_eq!((ask(Request::Status).as_str(), ask(Request::Fleet).as_str()), ("Status", "Fleet"));
        assert_eq!((ask(Request::Counters).as_str(), ask(Request::Verify).as_str()), ("Counters", "Verified"));
        let another = Request::Bind { instance: "db".into(), server: "x:1".into(), uid: UPLINK };
        for request in
            [Request::Intent, Request::Remove, Request::Unbind, Request::Sessions, Request::Published, another]
        {
            assert_eq!(ask(request.clone()), "not-root", "{request:?}");
        }
        let by_hand = Apply { fleet: None, ..offer(5, &intent(&[80])) };
        assert_eq!(ask(apply(by_hand)), "not-root");
        let for_ever = Apply { confirm_within_s: None, ..offer(5, &intent(&[80])) };
        assert_eq!(ask(apply(for_ever)), "not-root");

        // More than anybody else's requests may have.
        let large = intent(&(1..=200).collect::<Vec<u16>>());
        assert!(serde_json::to_vec(&large).unwrap().len() > 4096);
        assert_eq!(ask(apply(offer(5, &large))), "applied 1");
        let keep = |generation| Request::Confirm { generation: Generation(generation), danger_same_session: false };
        assert_eq!(ask(keep(1)), "Done");
        assert_eq!(fleet(&bench).held, mark(5, &large));
        assert_eq!(ask(apply(offer(4, &intent(&[80])))), "older");
        assert_eq!(ask(apply(offer(6, &intent(&[80])))), "applied 2");
        assert_eq!(ask(Request::Revert { generation: None }), "Done");

        // A restart lets it in again; leaving lets it out.
        bench.kill();
        bench.start();
        assert_eq!(ask(Request::Fleet), "Fleet");
        bench.ask(Request::Unbind);
        assert_eq!(ask(Request::Status), "PermissionDenied");
        assert_eq!(std::fs::metadata(&socket).unwrap().uid(), 0);
    });
}
