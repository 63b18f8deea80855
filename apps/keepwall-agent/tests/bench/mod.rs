//! An agent as a process, for tests that run it in network namespaces of their own. Needs root.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]
#![allow(dead_code, reason = "not every test uses all of it")]

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keepwall_core::{Generation, Place, PortRange, Prefix, Protocol};
use keepwall_host::namespace;
use keepwall_link::{Apply, Envelope, FRAME_BYTES_MAX, Request, Response, Status, VERSION, read_frame, write_frame};
use keepwall_secgroup::intent::{Attachment, Intent, IntentPeer, IntentRule};
use keepwall_secgroup::spec::{GroupType, Policy};

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_keepwall-agent");

/// An agent with a directory of its own; both go with this value.
pub(crate) struct Bench {
    pub(crate) directory: PathBuf,
    pub(crate) agent: Option<Child>,
}

impl Bench {
    pub(crate) fn new(name: &str) -> Bench {
        let directory = std::env::temp_dir().join(format!("keepwall-agent-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        Bench { directory, agent: None }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("sock")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    pub(crate) fn command(&self, what: &str) -> Command {
        let mut command = Command::new(AGENT);
        command.arg(what).arg("--state").arg(self.state()).stdin(Stdio::null());
        command
    }

    /// Starts the agent in the calling thread's namespace.
    pub(crate) fn start(&mut self) {
        let log = std::fs::File::create(self.directory.join("log")).unwrap();
        let child = self.command("run").arg("--socket").arg(self.socket()).stderr(log).spawn().unwrap();
        self.agent = Some(child);
        let started = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            assert!(started.elapsed() < Duration::from_secs(10), "{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// As `kill -9` would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.agent.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn ask(&self, request: Request) -> Response {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        write_frame(&mut stream, &Envelope { version: VERSION, request }).unwrap();
        read_frame(&mut stream, FRAME_BYTES_MAX).unwrap()
    }

    pub(crate) fn apply(&self, intent: &Intent, base: Option<u64>, confirm_within_s: Option<u32>) -> Response {
        self.ask(Request::Apply(Box::new(Apply {
            intent: intent.clone(),
            base: base.map(Generation),
            confirm_within_s,
            danger_cut_session: false,
            note: "test".into(),
            fleet: None,
        })))
    }

    pub(crate) fn status(&self) -> Status {
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
pub(crate) fn intent(ports: &[u16]) -> Intent {
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

pub(crate) fn refusal(response: Response) -> String {
    match response {
        Response::Refused(refused) => refused.code,
        other => panic!("not refused: {other:?}"),
    }
}

pub(crate) fn applied(response: Response) -> keepwall_link::Applied {
    match response {
        Response::Applied(applied) => applied,
        other => panic!("not applied: {other:?}"),
    }
}

/// Runs the story in a new namespace, or says why not.
pub(crate) fn story(work: impl FnOnce() + Send) {
    match namespace::in_a_new_one(work) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => eprintln!("skipped: needs root"),
        other => other.unwrap(),
    }
}

pub(crate) fn nft(arguments: &[&str]) -> Option<String> {
    let output = Command::new("nft").args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}
