//! The agent as a process, in network namespaces of the tests' own. Needs root.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keepwall_core::{Generation, Place, PortRange, Prefix, Protocol};
use keepwall_host::namespace;
use keepwall_link::{
    Apply, Drift, Envelope, FRAME_BYTES_MAX, Request, Response, Status, VERSION, read_frame, write_frame,
};
use keepwall_secgroup::intent::{Attachment, Intent, IntentPeer, IntentRule};
use keepwall_secgroup::spec::{GroupType, Policy};

const AGENT: &str = env!("CARGO_BIN_EXE_keepwall-agent");

/// An agent with a directory of its own; both go with this value.
struct Bench {
    directory: PathBuf,
    agent: Option<Child>,
}

impl Bench {
    fn new(name: &str) -> Bench {
        let directory = std::env::temp_dir().join(format!("keepwall-agent-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        Bench { directory, agent: None }
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("sock")
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(AGENT);
        command.arg(what).arg("--state").arg(self.state()).stdin(Stdio::null());
        command
    }

    /// Starts the agent in the calling thread's namespace.
    fn start(&mut self) {
        let log = std::fs::File::create(self.directory.join("log")).unwrap();
        let child = self.command("run").arg("--socket").arg(self.socket()).stderr(log).spawn().unwrap();
        self.agent = Some(child);
        let started = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            assert!(started.elapsed() < Duration::from_secs(10), "{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// As `kill -9` would.
    fn kill(&mut self) {
        if let Some(mut child) = self.agent.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn ask(&self, request: Request) -> Response {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        write_frame(&mut stream, &Envelope { version: VERSION, request }).unwrap();
        read_frame(&mut stream, FRAME_BYTES_MAX).unwrap()
    }

    fn apply(&self, intent: &Intent, base: Option<u64>, confirm_within_s: Option<u32>) -> Response {
        self.ask(Request::Apply(Box::new(Apply {
            intent: intent.clone(),
            base: base.map(Generation),
            confirm_within_s,
            danger_cut_session: false,
            note: "test".into(),
        })))
    }

    fn status(&self) -> Status {
        match self.ask(Request::Status) {
            Response::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// One interface that lets these TCP ports in.
fn intent(ports: &[u16]) -> Intent {
    let rule = |port: u16| IntentRule {
        id: format!("sgr-{port}"),
        label: format!("web/ingress#{port}"),
        place: Place::default(),
        priority: 1,
        policy: Policy::Accept,
        protocol: Protocol::TCP,
        ports: Some(PortRange::new(port, port).unwrap()),
        source_ports: None,
        peer: IntentPeer::Prefix("0.0.0.0/0".parse::<Prefix>().unwrap()),
        local: None,
    };
    let attachment = Attachment {
        name: "web/eth0".into(),
        device: "eth0".into(),
        guest: false,
        addresses: vec![],
        mac: None,
        groups: vec!["web".into()],
        kind: GroupType::Basic,
        inner: vec![],
        ingress: ports.iter().map(|port| rule(*port)).collect(),
        egress: vec![],
    };
    Intent { attachments: vec![attachment], ..Intent::empty("web") }
}

fn refusal(response: Response) -> String {
    match response {
        Response::Refused(refused) => refused.code,
        other => panic!("not refused: {other:?}"),
    }
}

fn applied(response: Response) -> keepwall_link::Applied {
    match response {
        Response::Applied(applied) => applied,
        other => panic!("not applied: {other:?}"),
    }
}

/// Runs the story in a new namespace, or says why not.
fn story(work: impl FnOnce() + Send) {
    match namespace::in_a_new_one(work) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => eprintln!("skipped: needs root"),
        other => other.unwrap(),
    }
}

fn nft(arguments: &[&str]) -> Option<String> {
    let output = Command::new("nft").args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

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
        bench.start();
        let status = bench.status();
        assert_eq!((status.generation, status.pending), (Generation(1), None));
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
