//! The machine against something that stands for its agent.

use super::*;
use keepwall_core::Generation;
use keepwall_link::{FleetState, Pending};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

/// Answers one connection after the other with what a story says, and hands back what was asked.
struct FakeAgent {
    directory: PathBuf,
    thread: JoinHandle<Vec<Request>>,
}

impl FakeAgent {
    fn start(name: &str, answers: Vec<Response>) -> (FakeAgent, Agent) {
        let directory = std::env::temp_dir().join(format!("keepwall-uplink-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let socket = directory.join("sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let answer = |answer: Response| {
                let (mut stream, _) = listener.accept().unwrap();
                let envelope: Envelope = read_frame(&mut stream, FRAME_BYTES_MAX).unwrap();
                write_frame(&mut stream, &answer).unwrap();
                envelope.request
            };
            answers.into_iter().map(answer).collect()
        });
        let agent = Agent::new(&socket, &directory);
        (FakeAgent { directory, thread }, agent)
    }

    fn asked(self) -> Vec<Request> {
        let asked = self.thread.join().unwrap();
        std::fs::remove_dir_all(self.directory).unwrap();
        asked
    }
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

fn a_status(drift: Drift, repairs: u64, pending: Option<Pending>) -> Response {
    Response::Status(Box::new(Status {
        version: "1".into(),
        pid: 7,
        uptime_s: 1,
        mode: "enforcing".into(),
        instance: None,
        generation: Generation(3),
        confirmed: None,
        pending,
        server: None,
        attachments: Vec::new(),
        drift,
        repairs,
        degraded: vec!["no logs".into()],
    }))
}

fn no(code: &str) -> Response {
    Response::Refused(Refused { code: code.into(), message: "no".into(), help: "so".into() })
}

fn applied(confirmed: bool) -> Response {
    Response::Applied(keepwall_link::Applied {
        generation: Generation(3),
        outcome: "replaced".into(),
        sessions_cut: 0,
        confirm_within_s: Some(60),
        confirmed,
        warnings: vec!["somebody would be cut".into()],
    })
}

fn pending(fleet: Option<Mark>) -> Option<Pending> {
    Some(Pending { generation: Generation(3), left_ms: 1, fleet })
}

fn wanted() -> (Bundle, State) {
    let bundle = Bundle::of(Intent::empty("web"));
    let state = State { generation: 5, digest: bundle.digest() };
    (bundle, state)
}

fn kinds(agent: &Agent) -> Vec<(String, bool, u32)> {
    let report = wait(agent.rows(100));
    wait(agent.kept(report.through));
    report.rows.into_iter().map(|row| (row.kind, row.finding, row.severity)).collect()
}

fn row(kind: &str, finding: bool, severity: u32) -> (String, bool, u32) {
    (kind.to_owned(), finding, severity)
}

#[test]
fn what_is_held_is_what_the_agent_says() {
    let (bundle, held) = wanted();
    let answer = |held: State, intent: Option<Intent>| {
        let (held, tried, intent) = (mark(held), Mark::default(), intent.map(Box::new));
        Response::Fleet(FleetState { instance: "web".into(), server: "s:1".into(), held, tried, intent })
    };
    let answers = vec![
        answer(State::default(), None),
        answer(held, Some(bundle.intent().unwrap())),
        no("not-bound"),
        Response::Done(String::new()),
    ];
    let (fake, agent) = FakeAgent::start("held", answers);
    assert_eq!(wait(agent.in_force()).unwrap().held, State::default());
    let force = wait(agent.in_force()).unwrap();
    assert_eq!((force.held, force.bundle.digest()), (held, held.digest));
    assert_eq!(wait(agent.in_force()).unwrap_err(), "no (so)");
    assert!(wait(agent.in_force()).unwrap_err().contains("another answer"));
    assert!(fake.asked().iter().all(|asked| matches!(asked, Request::Fleet)));
    assert!(wait(agent.in_force()).unwrap_err().contains("sock"), "nobody listens any more");
    assert_eq!(wait(agent.status()), None);
}

#[test]
fn a_decision_is_applied_with_its_mark_and_confirmed_by_its_number() {
    let (bundle, state) = wanted();
    let ours = pending(Some(mark(state)));
    let answers = vec![
        applied(false),
        a_status(Drift::None, 0, ours),
        Response::Done(String::new()),
        // Another waits by now, or none: nothing is confirmed.
        a_status(Drift::None, 0, pending(None)),
        a_status(Drift::None, 0, None),
        applied(true),
    ];
    let (fake, agent) = FakeAgent::start("applied", answers);
    let note = "é".repeat(1_000);
    assert_eq!(wait(agent.apply(state, &bundle, 60, &note)), Ok(Applied::ToBeProved));
    assert_eq!(wait(agent.confirm(state)), Ok(()));
    assert!(wait(agent.confirm(state)).is_err());
    assert!(wait(agent.revert(state)).is_err());
    assert_eq!(wait(agent.apply(state, &bundle, 60, "")), Ok(Applied::Confirmed));
    assert_eq!(
        kinds(&agent),
        [row("warning", false, 1), row("applied", false, 0), row("warning", false, 1), row("applied", false, 0)]
    );
    let asked = fake.asked();
    let Request::Apply(apply) = &asked[0] else { panic!("{asked:?}") };
    assert_eq!((apply.fleet, apply.confirm_within_s, apply.base), (Some(mark(state)), Some(60), None));
    assert!(apply.note.len() <= NOTE_BYTES_MAX && !apply.danger_cut_session);
    assert!(matches!(asked[2], Request::Confirm { generation: Generation(3), danger_same_session: false }));
}

#[test]
fn what_an_earlier_uplink_left_waiting_is_taken_back_first_but_nobody_elses_change() {
    let (bundle, state) = wanted();
    let older = pending(Some(Mark { generation: 4, digest: [0; 32] }));
    let answers = vec![
        no("pending"),
        a_status(Drift::None, 0, older),
        Response::Done(String::new()),
        applied(false),
        no("pending"),
        a_status(Drift::None, 0, pending(None)),
        no("older"),
    ];
    let (fake, agent) = FakeAgent::start("waiting", answers);
    assert_eq!(wait(agent.apply(state, &bundle, 60, "")), Ok(Applied::ToBeProved));
    assert_eq!(wait(agent.apply(state, &bundle, 60, "")), Err("no (so)".into()));
    assert_eq!(wait(agent.apply(state, &bundle, 60, "")), Err("no (so)".into()));
    assert_eq!(kinds(&agent), [row("warning", false, 1), row("failed", false, 2), row("failed", false, 2)]);
    let asked = fake.asked();
    assert!(matches!(asked[2], Request::Revert { generation: Some(Generation(3)) }));
}

#[test]
fn drift_and_what_reverts_by_itself_are_told_once() {
    let (bundle, state) = wanted();
    let lines = || vec!["chain input is gone".to_owned()];
    let ours = || pending(Some(mark(state)));
    let answers = vec![
        a_status(Drift::None, 2, None),
        a_status(Drift::Repaired(lines()), 3, None),
        a_status(Drift::Repaired(lines()), 3, None),
        a_status(Drift::Contested(lines()), 3, None),
        a_status(Drift::Contested(lines()), 3, None),
        a_status(Drift::None, 3, None),
        applied(false),
        a_status(Drift::None, 3, ours()),
        a_status(Drift::None, 3, None),
        a_status(Drift::None, 3, None),
    ];
    let (fake, agent) = FakeAgent::start("drift", answers);
    let looked = |times: usize| (0..times).map(|_| wait(agent.status()).unwrap().drift.len()).collect::<Vec<_>>();
    assert_eq!(looked(3), [0, 0, 0], "what was repaired is as it should be");
    assert_eq!(looked(3), [1, 1, 0]);
    wait(agent.apply(state, &bundle, 60, "")).unwrap();
    looked(3);
    assert_eq!(
        kinds(&agent),
        [row("drift", true, 2), row("drift", true, 4), row("warning", false, 1), row("reverted", false, 2)]
    );
    fake.asked();
}

#[test]
fn how_it_stands_with_the_server_is_written_for_whoever_asks() {
    let (fake, agent) = FakeAgent::start("contact", Vec::new());
    let now = || Noted::read(&fake.directory).map(|noted| noted.contact);
    assert_eq!(now(), None, "nobody knows yet");
    wait(agent.contact(Contact::Made));
    assert_eq!(now(), Some(Contact::Made));
    let lost = Contact::Lost { why: "the connection ended".into() };
    wait(agent.contact(lost.clone()));
    assert_eq!(now(), Some(lost));
    wait(agent.contact(Contact::Revoked));
    assert_eq!(now(), Some(Contact::Revoked));
    drop(agent);
    Agent::new(Path::new("/nonexistent"), &fake.directory);
    assert_eq!(now(), None, "a new process does not repeat what an older one knew");
}
