//! The command line against a server with machines: a real server and stand-in machines in this process, the real
//! program beside them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use keepwall_fleet_lab::swarm::{Member, Swarm, enrol};
use keepwall_fleet_lab::{Log, Scratch, config};
use keepwall_server::run::Running;
use keepwall_uplink::Pace;
use serde_json::Value;

const POSTURE: &str = "\
version: 1
security_groups:
  web:
    members: [{ role: web }]
    ingress:
      - { policy: accept, ports: 443, from: any }   # the world
  db:
    members: [{ role: db }]
    inner_access: drop
    ingress:
      - { policy: accept, ports: 5432, from: group:web }
tests:
  - expect: allow internet -> web-0:443
  - expect: deny internet -> db-0:5432
";

/// A server, a place for the CLI's configuration, and a posture directory.
struct Story {
    scratch: Scratch,
    running: Running,
    log: Arc<Log>,
    secure: bool,
}

impl Story {
    async fn new(name: &str) -> Story {
        Story::with(name, false).await
    }

    async fn with(name: &str, secure: bool) -> Story {
        let scratch = Scratch::new(&format!("cli-{name}")).unwrap();
        let mut config = config(scratch.path());
        config.api.tls = secure;
        let running = Running::start(&config).await.unwrap();
        std::fs::create_dir(scratch.path().join("posture")).unwrap();
        let story = Story { scratch, running, log: Arc::default(), secure };
        story.write("fleet.yaml", POSTURE);
        story
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path("posture").join(name), text).unwrap();
    }

    fn url(&self) -> String {
        format!("{}://{}", if self.secure { "https" } else { "http" }, self.running.api)
    }

    fn contexts(&self) -> PathBuf {
        self.path("home/.config/keepwall/contexts.json")
    }

    /// The program as a user runs it, without a terminal.
    async fn with_input(&self, input: &str, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keepwall"));
        command.env_clear().env("HOME", self.path("home")).env("NO_COLOR", "1").envs(variables.iter().copied());
        command.args(["--socket", "/nonexistent/agent.sock", "--posture"]).arg(self.path("posture")).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let input = input.to_owned();
        let run = move || {
            use std::io::Write as _;
            let mut child = command.spawn().unwrap();
            let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
            child.wait_with_output().unwrap()
        };
        tokio::task::spawn_blocking(run).await.unwrap()
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        self.with_input("", &[], arguments).await
    }

    /// As root of the server's machine, by its socket.
    async fn root(&self, arguments: &[&str]) -> Output {
        let socket = format!("unix:{}", self.path("server.sock").display());
        self.with_input("", &[("KEEPWALL_SERVER", &socket)], arguments).await
    }

    async fn good(&self, arguments: &[&str]) -> String {
        let output = self.root(arguments).await;
        assert!(output.status.success(), "{arguments:?}: {}", words(&output));
        words(&output)
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        let output = self.root(&[arguments, &["--json"]].concat()).await;
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {}", words(&output)))
    }

    /// Machines that came by a token which the program made.
    async fn members(&self, role: &str, first_address: u32, count: usize) -> Vec<Member> {
        let uses = count.to_string();
        let made = self.json(&["token", "create", "--label", &format!("role={role}"), "--uses", &uses]).await;
        let token = made["token"].as_str().unwrap().parse().unwrap();
        enrol(&[token], role, first_address, count, 4, None, &self.log).await.unwrap().0
    }

    async fn connected(&self, count: usize) {
        let end = Instant::now() + Duration::from_secs(30);
        while self.running.fleet.count().connected != count {
            assert!(Instant::now() < end, "they never connect");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn pace() -> Pace {
    Pace { heartbeat: Duration::from_secs(5), status: Duration::from_millis(200) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_posture_is_planned_applied_changed_and_brought_back() {
    let s = Story::new("story").await;
    let (web, db) = (s.members("web", 1, 3).await, s.members("db", 101, 1).await);
    let swarms = [Swarm::start(&web, pace(), None).unwrap(), Swarm::start(&db, pace(), None).unwrap()];
    s.connected(4).await;

    assert!(s.good(&["status"]).await.contains("nothing is declared yet"));
    let said = s.good(&["plan"]).await;
    assert!(said.contains("fleet.yaml is new") && said.contains("db-0, web-0, web-1, web-2"), "{said}");
    assert!(said.contains("now: nothing is enforced") && !said.contains("opens"), "all was open before: {said}");
    assert!(said.contains("4 machines change; 2 policy tests pass"), "{said}");
    assert_eq!(s.root(&["plan", "--detailed-exitcode"]).await.status.code(), Some(2));
    let refused = s.root(&["apply"]).await;
    assert!(!refused.status.success() && words(&refused).contains("--yes"), "{}", words(&refused));

    let said = s.good(&["apply", "--yes", "-m", "the first", "--wave", "role=db", "--wave", "50%"]).await;
    assert!(said.contains("Done: 4 machines have it"), "{said}");
    let waves = s.json(&["rollout", "show"]).await["waves"]
        .as_array()
        .unwrap()
        .iter()
        .map(|w| w["total"].clone())
        .collect::<Vec<_>>();
    assert_eq!(waves, [1, 2, 1]);
    assert_eq!(s.root(&["plan", "--detailed-exitcode"]).await.status.code(), Some(0));
    assert!(s.good(&["apply", "--yes"]).await.contains("is told this posture already"));

    // Rules one by one: said twice is once, removed by what it says, comments stay.
    let add = ["sg", "rule", "add", "web", "--ports", "8443", "--peer", "203.0.113.0/24", "--yes"];
    assert!(s.good(&add).await.contains("Done: 3 machines have it"));
    assert!(s.good(&add).await.contains("Nothing to do"));
    assert!(s.good(&["sg", "show", "web"]).await.contains("#2"));
    assert!(s.good(&["posture", "show", "fleet.yaml"]).await.contains("# the world"));
    let said = s.good(&["explain", "--from", "203.0.113.9", "--to", "web-1", "--port", "8443"]).await;
    assert!(said.contains("✓ allowed") && said.contains("web/ingress#2"), "{said}");
    s.good(&["sg", "rule", "set", "web", "2", "--priority", "7", "--yes"]).await;
    let remove =
        ["sg", "rule", "remove", "web", "--ports", "8443", "--peer", "203.0.113.0/24", "--priority", "7", "--yes"];
    s.good(&remove).await;
    assert!(s.good(&remove).await.contains("Nothing to do"));

    // Looked back at, fetched, returned to.
    let history = s.json(&["posture", "history"]).await;
    let revisions: Vec<String> = history.as_array().unwrap().iter().map(|one| one["revision"].to_string()).collect();
    assert_eq!(revisions.len(), 4);
    assert!(s.good(&["posture", "diff", &revisions[3], &revisions[2]]).await.contains("+       - "));
    let to = s.path("fetched").display().to_string();
    s.good(&["posture", "pull", &to, "--revision", &revisions[2]]).await;
    assert!(std::fs::read_to_string(s.path("fetched/fleet.yaml")).unwrap().contains("8443"));
    assert!(words(&s.root(&["posture", "pull", &to]).await).contains("is not empty"));
    let said = s.good(&["posture", "return", &revisions[2], "--yes"]).await;
    assert!(said.contains("+ opens") && said.contains("Done: 3 machines"), "{said}");
    assert!(s.good(&["reach", "--to", "web-1"]).await.contains("8443"));
    assert!(s.good(&["status"]).await.contains("4 machines: 4 enrolled, 4 connected, 4 in sync."));
    assert!(s.good(&["audit", "list"]).await.contains("local:root"));
    assert!(s.good(&["audit", "verify"]).await.contains("as they were written"));
    for swarm in swarms {
        swarm.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_that_stops_names_who_and_why_and_the_ways_on() {
    let s = Story::new("stop").await;
    let web = s.members("web", 1, 3).await;
    let swarm = Swarm::start(&web, pace(), None).unwrap();
    s.connected(3).await;
    s.write("fleet.yaml", POSTURE.split("tests:").next().unwrap());
    let canary = web.iter().find(|member| member.identity.instance == "web-0").unwrap();
    canary.machine.broken.store(true, Ordering::SeqCst);
    let output = s.root(&["apply", "--yes", "--confirm-within", "5"]).await;
    let said = words(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("web-0 failed") && said.contains("on purpose") && said.contains("rollout resume"), "{said}");
    assert!(s.good(&["status"]).await.contains("has stopped"));
    let output = s.root(&["apply", "--yes"]).await;
    assert!(output.status.success() && words(&output).contains("told this posture already"), "{}", words(&output));

    canary.machine.broken.store(false, Ordering::SeqCst);
    assert!(s.good(&["rollout", "resume"]).await.contains("Done: 3 machines"));
    let nothing = s.root(&["revert"]).await;
    assert!(!nothing.status.success() && words(&nothing).contains("posture return"), "{}", words(&nothing));

    // Returned by hand, as `revert`, while it stands.
    canary.machine.broken.store(true, Ordering::SeqCst);
    s.write("fleet.yaml", &POSTURE.split("tests:").next().unwrap().replace("443", "9443"));
    assert_eq!(s.root(&["apply", "--yes"]).await.status.code(), Some(1));
    assert!(s.good(&["revert"]).await.contains("is taken back"));
    assert!(s.good(&["rollout", "list"]).await.contains("returned"));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_hold_is_shown_with_its_line_and_nothing_is_declared() {
    let s = Story::new("wrong").await;
    s.write("fleet.yaml", &POSTURE.replace("group:web", "group:wbe"));
    for word in ["check", "plan", "test"] {
        let output = s.root(&[word]).await;
        let said = words(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("wbe") && said.contains("fleet.yaml:"), "{said}");
    }
    s.write("fleet.yaml", "version: 1\nsecurity_groops: {}\n");
    let said = words(&s.root(&["apply", "--yes"]).await);
    assert!(said.contains("fleet.yaml:2:1: error") && said.contains("    2 | security_groops: {}"), "{said}");

    // A test that fails is exit code 3, as without a server.
    let instance = "instances:\n  web-0: { labels: { role: web }, interfaces: { eth0: { addresses: [10.0.0.1] } } }\n";
    let failing = POSTURE.replace("expect: allow internet -> web-0:443", "expect: deny internet -> web-0:443");
    let failing = failing.replace("  - expect: deny internet -> db-0:5432\n", "");
    s.write("fleet.yaml", &failing.replace("security_groups:", &format!("{instance}security_groups:")));
    for words_of in [&["test"][..], &["plan"], &["apply", "--yes"], &["plan", "--json"]] {
        assert_eq!(s.root(words_of).await.status.code(), Some(3), "{words_of:?}");
    }
    assert!(s.good(&["posture", "show"]).await.contains("Nothing is declared yet"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_the_server_has_is_named_before_it_goes_and_can_be_fetched() {
    let s = Story::new("race").await;
    s.write("fleet.yaml", POSTURE.split("tests:").next().unwrap());
    s.good(&["apply", "--yes"]).await;
    // What only the API wrote is named before it goes.
    s.good(&["sg", "create", "lonely", "--yes"]).await;
    let said = s.good(&["plan"]).await;
    assert!(said.contains("api/security-groups/lonely.yaml goes"), "{said}");
    // Fetched whole, with directories, it is what is declared.
    let to = s.path("fetched").display().to_string();
    s.good(&["posture", "pull", &to]).await;
    let socket = format!("unix:{}", s.path("server.sock").display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_keepwall"));
    command.env_clear().env("HOME", "/nonexistent").args(["--server", &socket, "--posture", &to]);
    let output = tokio::task::spawn_blocking(move || command.args(["plan", "--detailed-exitcode"]).output().unwrap());
    let output = output.await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contexts_keep_tokens_from_others_and_words_say_where_they_go() {
    let s = Story::new("contexts").await;
    let url = s.url();
    // Without a server.
    let output = s.run(&["instance", "list"]).await;
    let said = words(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("`instance` needs a server") && said.contains("keepwall context add"), "{said}");
    assert!(words(&s.run(&["context", "show"]).await).contains("no server is chosen"));
    assert!(words(&s.run(&["apply", "--wave", "1"]).await).contains("waves are for a fleet"));
    assert_eq!(s.run(&["apply", "--wave", "0"]).await.status.code(), Some(2));

    assert!(words(&s.run(&["context", "add", "prod"]).await).contains("which server?"));
    assert!(!s.run(&["context", "add", "prod", "--server", "http://192.0.2.1:7440"]).await.status.success());
    assert!(!s.run(&["context", "add", "none", "--server", &url]).await.status.success());
    let output = s.run(&["context", "add", "prod", "--server", &url]).await;
    assert!(output.status.success() && words(&output).contains("keepwall login"), "{}", words(&output));
    let said = words(&s.run(&["status"]).await);
    assert!(said.contains("(unauthenticated)") && said.contains("keepwall login"), "{said}");
    for word in ["flows", "confirm", "up", "suggest", "counters"] {
        let said = words(&s.run(&[word]).await);
        assert!(said.contains(&format!("`{word}` is about one machine")), "{said}");
    }
    assert!(words(&s.run(&["--context", "none", "flows"]).await).contains("no agent is running"));

    // A key for a program, made by root; kept by login, for its user alone.
    s.good(&["service-account", "add", "robot", "--role", "operator"]).await;
    let key = s.json(&["key", "create", "--owner", "robot", "-m", "tests"]).await["key"].as_str().unwrap().to_owned();
    let output = s.with_input(&format!("{key}\n"), &[], &["login", "--token-stdin"]).await;
    assert!(output.status.success() && words(&output).contains("You are robot at prod"), "{}", words(&output));
    assert!(!words(&output).contains(&key));
    assert!(words(&s.run(&["whoami"]).await).contains("operator"));
    assert_eq!(std::fs::metadata(s.contexts()).unwrap().permissions().mode() & 0o777, 0o600);
    let listed = words(&s.run(&["context", "list", "--json"]).await);
    assert!(listed.contains("\"logged_in\": true") && !listed.contains(&key), "{listed}");
    // An operator does not decide what is allowed.
    s.write("fleet.yaml", POSTURE.split("tests:").next().unwrap());
    let said = words(&s.run(&["apply", "--yes"]).await);
    assert!(said.contains("(forbidden)"), "{said}");

    std::fs::set_permissions(s.contexts(), std::fs::Permissions::from_mode(0o640)).unwrap();
    let said = words(&s.run(&["whoami"]).await);
    assert!(said.contains("may be read or changed by others") && said.contains("chmod 600"), "{said}");
    std::fs::set_permissions(s.contexts(), std::fs::Permissions::from_mode(0o600)).unwrap();

    // Somebody else's token for this server goes before the one that is kept; nothing of it is written.
    let output = s.with_input("", &[("KEEPWALL_TOKEN", "kwk_wrong")], &["whoami"]).await;
    assert!(words(&output).contains("(unauthenticated)"));
    assert!(words(&s.run(&["logout"]).await).contains("it stays good"));
    assert!(!std::fs::read_to_string(s.contexts()).unwrap().contains("kwk_"));
    assert!(words(&s.run(&["context", "remove", "prod"]).await).contains("about this machine"));
    assert!(words(&s.run(&["context", "use", "prod"]).await).contains("there is no context `prod`"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_and_machines_are_kept_by_the_same_program() {
    let s = Story::new("people").await;
    let web = s.members("web", 1, 2).await;
    let swarm = Swarm::start(&web, pace(), None).unwrap();
    s.connected(2).await;
    let socket = format!("unix:{}", s.path("server.sock").display());
    let variables = [("KEEPWALL_SERVER", socket.as_str())];
    let add = ["user", "add", "alice", "--role", "operator:role=web", "--password-stdin"];
    let output = s.with_input("correct horse battery\n", &variables, &add).await;
    assert!(output.status.success() && words(&output).contains("operator where role=web"), "{}", words(&output));
    let output =
        s.with_input("short\n", &variables, &["user", "add", "bob", "--role", "viewer", "--password-stdin"]).await;
    assert!(words(&output).contains("(invalid)"), "{}", words(&output));
    assert!(s.good(&["user", "role", "alice", "viewer", "security"]).await.contains("viewer; security"));
    s.good(&["user", "disable", "alice"]).await;
    assert!(s.good(&["user", "list"]).await.contains("shut out"));
    s.good(&["user", "remove", "alice", "--yes"]).await;

    let said = s.good(&["instance", "label", "web-0", "env=test", "role-"]).await;
    assert!(said.contains("web-0 has env=test;"), "{said}");
    assert_eq!(s.json(&["instance", "list", "--label", "env=test"]).await.as_array().unwrap().len(), 1);
    assert!(s.good(&["instance", "show", "web-1"]).await.contains("connected"));
    s.good(&["instance", "revoke", "web-1", "--yes"]).await;
    s.good(&["instance", "remove", "web-1", "--yes"]).await;
    assert!(!s.root(&["instance", "show", "web-1"]).await.status.success());

    let said = s.good(&["token", "create", "--instance", "db-0", "--ttl", "15m"]).await;
    assert!(said.contains("keepwall enroll kw1.") && said.contains("lets db-0 in") && said.contains("shown this once"));
    let output = s.root(&["token", "create", "--cloud-init"]).await;
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("#cloud-config\n"));
    let all = s.json(&["token", "list"]).await;
    let id = all[0]["id"].as_str().unwrap();
    assert!(!s.good(&["token", "list"]).await.contains("kw1."));
    s.good(&["token", "delete", id]).await;
    assert!(words(&s.root(&["token", "delete", id]).await).contains("(not_found)"));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pinned_authority_is_believed_and_no_other() {
    let s = Story::with("pinned", true).await;
    let url = s.url();
    let digest: String = s.running.fleet.authority().digest().iter().map(|byte| format!("{byte:02x}")).collect();
    s.run(&["context", "add", "right", "--server", &url, "--ca-sha256", &digest]).await;
    assert!(
        words(&s.run(&["whoami"]).await).contains("(unauthenticated)"),
        "the server is believed, and asks who we are"
    );
    s.run(&["context", "add", "wrong", "--server", &url, "--ca-sha256", &"0f".repeat(32)]).await;
    let said = words(&s.run(&["--context", "wrong", "whoami"]).await);
    assert!(said.contains("pinned"), "{said}");
    assert!(!s.run(&["context", "add", "short", "--server", &url, "--ca-sha256", "0f"]).await.status.success());
}
