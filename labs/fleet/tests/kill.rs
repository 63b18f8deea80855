//! Servers are killed while somebody writes: nothing acknowledged is lost, nothing is done twice, machines converge.
//!
//! `KEEPWALL_KILL_ROUNDS` is how often each story kills (10; the full check takes 100).

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use keepwall_api::{Labels, TokenSpec};
use keepwall_client::{Client, ListAuditQuery, ListInstancesQuery, ListPosturesQuery, ListTokensQuery, Settings};
use keepwall_fleet_lab::swarm::{Member, Swarm, enrol};
use keepwall_fleet_lab::{Log, Scratch};
use keepwall_store::testing::TestPostgres;
use keepwall_uplink::Pace;
use serde_json::{Value, json};

/// Machines; half of them call each server, if there are two.
const MACHINES: usize = 8;
/// How long anything may take. Machines that were cut off again and again wait up to a minute before they come back.
const PATIENCE: Duration = Duration::from_secs(180);

fn rounds() -> usize {
    std::env::var("KEEPWALL_KILL_ROUNDS").map_or(10, |text| text.parse().unwrap())
}

/// The real server's program, built as this test is.
fn program() -> PathBuf {
    let profile = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
    let target = profile.parent().unwrap();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "-p", "keepwalld", "--target-dir"]).arg(target);
    if profile.file_name().unwrap() != "debug" {
        build.arg("--profile").arg(profile.file_name().unwrap());
    }
    assert!(build.status().unwrap().success());
    profile.join("keepwalld")
}

fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A keepwalld that comes back at the same addresses.
struct Server {
    program: PathBuf,
    config: PathBuf,
    socket: PathBuf,
    child: Child,
}

impl Server {
    fn start(program: &Path, scratch: &Path, name: &str, postgres: Option<&str>) -> Server {
        let (config, socket) = (scratch.join(format!("{name}.toml")), scratch.join(format!("{name}.sock")));
        let state = scratch.join(name);
        let store = postgres.map_or(String::new(), |connection| {
            format!("[store]\npostgres = {connection:?}\nseal_key = {:?}\n", scratch.join("seal.key"))
        });
        let text = format!(
            "state = {state:?}\nlog = \"error\"\n{store}[api]\nlisten = \"127.0.0.1:0\"\nsocket = {socket:?}\n\
             [agents]\nlisten = \"127.0.0.1:{}\"\n[metrics]\nlisten = \"127.0.0.1:0\"\n",
            port()
        );
        std::fs::write(&config, text).unwrap();
        let child = spawn(program, &config);
        let server = Server { program: program.to_owned(), config, socket, child };
        server.ready();
        server
    }

    fn ready(&self) {
        until("the server answers", || self.client().get_posture().is_ok());
    }

    fn client(&self) -> Client {
        Client::new(Settings::new(&format!("unix:{}", self.socket.display()))).unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn again(&mut self) {
        self.child = spawn(&self.program, &self.config);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, config: &Path) -> Child {
    Command::new(program).arg("run").arg("--config").arg(config).stdin(Stdio::null()).spawn().unwrap()
}

/// One request with a key of the caller's choice, and what came back. The generated client makes a key for each call;
/// here a request is sent again long after, perhaps to another server.
fn ask(socket: &Path, method: &str, path: &str, key: &str, etag: Option<u64>, body: &Value) -> Option<(u16, Value)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let body = body.to_string();
    let etag = etag.map_or(String::new(), |etag| format!("if-match: \"{etag}\"\r\n"));
    write!(
        stream,
        "{method} /api/v1{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nidempotency-key: {key}\r\n{etag}\r\n{body}",
        body.len()
    )
    .ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let status = text.split(' ').nth(1)?.parse().ok()?;
    Some((status, serde_json::from_str(text.split_once("\r\n\r\n")?.1).unwrap_or_default()))
}

/// The posture of change `n`: web machines are reached on port 10,000 + n, databases by web machines.
fn posture(n: usize) -> String {
    format!(
        "version: 1\nsecurity_groups:\n  web:\n    members: [{{ role: web }}]\n    ingress:\n      \
         - {{ policy: accept, ports: {}, from: any }}\n  db:\n    members: [{{ role: db }}]\n    inner_access: drop\n    \
         ingress:\n      - {{ policy: accept, ports: 5432, from: group:web }}\n",
        10_000 + n % 50_000
    )
}

/// What a change is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Token,
    Labels,
    Posture,
}

fn kind(n: usize) -> Kind {
    match n % 9 {
        8 => Kind::Posture,
        odd if odd % 2 == 1 => Kind::Labels,
        _ => Kind::Token,
    }
}

/// What was acknowledged, by its number.
#[derive(Default)]
struct Written {
    tokens: Vec<usize>,
    postures: Vec<usize>,
    /// Machine and its role.
    labels: Vec<(usize, String, String)>,
    /// Requests that were sent again.
    again: usize,
}

/// Writes numbered changes until it is told to stop: to one server, to the next when that fails, each change with one
/// key until it is acknowledged.
fn write(sockets: &[PathBuf], stop: &AtomicBool) -> Written {
    let mut written = Written::default();
    let mut at = 0;
    let (mut posture_at, mut instance_at) = (0, BTreeMap::new());
    'changes: for n in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let machine = format!("machine-{}", n / 2 % MACHINES);
        let role = if (n / 2 / MACHINES).is_multiple_of(2) { "db" } else { "web" };
        let (method, path, etag, body) = match kind(n) {
            Kind::Token => ("POST", "/enrolment-tokens".to_owned(), None, json!({ "labels": { "n": n.to_string() } })),
            Kind::Labels => {
                let etag = instance_at.get(&machine).copied();
                let labels = json!({ "labels": { "role": role, "n": n.to_string() } });
                ("PATCH", format!("/instances/{machine}"), etag, labels)
            }
            Kind::Posture => {
                let files = json!([{ "name": "fleet.yaml", "text": posture(n) }]);
                let rollout = json!({ "waves": [], "failures_max": 1_000 });
                let body = json!({ "files": files, "reason": format!("change {n}"), "rollout": rollout });
                ("PUT", "/posture".to_owned(), Some(posture_at), body)
            }
        };
        let (key, again) = (format!("change-{n}"), written.again);
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "change {n} is not taken");
            let Some((status, answer)) = ask(&sockets[at], method, &path, &key, etag, &body) else {
                at = (at + 1) % sockets.len();
                written.again += 1;
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            let code = answer["code"].as_str().unwrap_or_default();
            let detail = answer["detail"].as_str().unwrap_or_default();
            match (status, kind(n)) {
                // It was made before the answer was lost.
                (409, Kind::Token) if detail.contains("has made a token before") => break,
                // The rollout before is still on its way. What was never sent before was not done.
                (409, Kind::Posture) if code == "wrong_state" && detail.contains("is on its way") => {
                    if written.again == again {
                        continue 'changes;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                (200..=299, _) => break,
                (503, _) => std::thread::sleep(Duration::from_millis(20)),
                _ => panic!("change {n} ({method} {path}, if-match {etag:?}): {status} {answer}"),
            }
        }
        match kind(n) {
            Kind::Token => written.tokens.push(n),
            Kind::Labels => written.labels.push((n, machine.clone(), role.to_owned())),
            Kind::Posture => written.postures.push(n),
        }
        // What the next change of the same thing has to name. The server that did it knows at once; another, or one
        // that was asked again, soon.
        let (done_by, sure) = (at, written.again == again);
        let mut revision = None;
        until("what was written is read", || {
            let client = Client::new(Settings::new(&format!("unix:{}", sockets[at].display()))).unwrap();
            let read = match kind(n) {
                Kind::Token => return true,
                Kind::Labels => {
                    client.get_instance(&machine).map(|i| (i.etag, i.labels.get("n") == Some(&n.to_string())))
                }
                Kind::Posture => client.get_posture().map(|p| (Some(p.revision), p.reason == format!("change {n}"))),
            };
            match read {
                Ok((etag, true)) => revision = etag,
                Ok((_, false)) => assert!(!sure || at != done_by, "change {n} is done and not read"),
                Err(_) => at = (at + 1) % sockets.len(),
            }
            revision.is_some()
        });
        match kind(n) {
            Kind::Token => {}
            Kind::Labels => drop(instance_at.insert(machine, revision.unwrap())),
            Kind::Posture => posture_at = revision.unwrap(),
        }
    }
    written
}

/// All pages of a listing.
fn pages<T>(mut page: impl FnMut(Option<String>) -> (Vec<T>, Option<String>)) -> Vec<T> {
    let (mut all, mut cursor) = (Vec::new(), None);
    loop {
        let (items, next) = page(cursor);
        all.extend(items);
        cursor = next;
        if cursor.is_none() {
            return all;
        }
    }
}

/// How often each number stands there.
fn counted<T: Ord>(all: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
    let mut out = BTreeMap::new();
    all.into_iter().for_each(|one| *out.entry(one).or_default() += 1);
    out
}

/// What was acknowledged is there once, in the resources and in the audit log; nothing else is.
fn every_change_is_there_once(client: &Client, written: &Written) {
    let tokens = pages(|cursor| {
        let page = client.list_tokens(&ListTokensQuery { cursor, limit: Some(500) }).unwrap();
        (page.items, page.next)
    });
    let tokens = tokens.iter().filter_map(|token| token.spec.labels.get("n")?.parse::<usize>().ok());
    assert_eq!(counted(tokens), counted(written.tokens.clone()));
    let postures = pages(|cursor| {
        let page = client.list_postures(&ListPosturesQuery { cursor, limit: Some(500) }).unwrap();
        (page.items, page.next)
    });
    let reasons = postures.iter().filter_map(|posture| posture.reason.strip_prefix("change ")?.parse::<usize>().ok());
    assert_eq!(counted(reasons), counted(written.postures.clone()));

    let verdict = client.verify_audit().unwrap();
    assert!(verdict.holds, "{}", verdict.why);
    let lines = pages(|cursor| {
        let page = client.list_audit(&ListAuditQuery { cursor, limit: Some(500) }).unwrap();
        (page.items, page.next)
    });
    let noted = |action: &str, number: &dyn Fn(&Value) -> Option<usize>| {
        let entries = lines.iter().map(|line| &line.entry).filter(|entry| entry["action"] == action);
        counted(entries.filter_map(|entry| number(&entry["after"])))
    };
    let number = |value: &Value| value.as_str()?.parse::<usize>().ok();
    assert_eq!(noted("create", &|after| number(&after["spec"]["labels"]["n"])), counted(written.tokens.clone()));
    assert_eq!(noted("change", &|after| number(&after["labels"]["n"])), counted(written.labels.iter().map(|l| l.0)));
    let reason = |after: &Value| after["posture"]["reason"].as_str()?.strip_prefix("change ")?.parse().ok();
    assert_eq!(noted("declare", &reason), counted(written.postures.clone()));
}

/// Machines hold what is desired: the last posture and the last labels that were acknowledged.
fn machines_converge(client: &Client, members: &[Member], written: &Written) {
    let instances = || client.list_instances(&ListInstancesQuery::default()).unwrap().items;
    let roles: BTreeMap<&str, &str> = written.labels.iter().map(|(_, name, role)| (&**name, &**role)).collect();
    let role = |name: &str| roles.get(name).copied().unwrap_or("web").to_owned();
    let web = (0..MACHINES).filter(|n| role(&format!("machine-{n}")) == "web").count();
    let port = (10_000 + written.postures.last().unwrap() % 50_000).to_string();
    let holds = |member: &Member| {
        let bundle = member.machine.bundle();
        match role(&member.identity.instance).as_str() {
            "web" => format!("{:?}", bundle.intent().unwrap()).contains(&port),
            _ => bundle.sets().get("group:web").map_or(0, |set| set.len()) == web,
        }
    };
    until("all machines hold the last posture and know the last members", || members.iter().all(holds));
    until("all are known to be in sync", || instances().iter().all(|instance| instance.status.in_sync));
    let all = instances();
    assert_eq!(all.len(), MACHINES);
    assert!(all.iter().all(|instance| instance.labels.get("role") == Some(&role(&instance.name))));
}

/// Looks at all machines again and again: what they hold never gets older.
fn never_backwards(members: &[Member], stop: &AtomicBool) {
    let mut newest = vec![0; members.len()];
    while !stop.load(Ordering::SeqCst) {
        for (member, newest) in members.iter().zip(&mut newest) {
            let generation = member.machine.held().generation;
            assert!(generation >= *newest, "{}: {generation} after {newest}", member.identity.instance);
            *newest = generation;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The story: machines enrol, somebody writes, `disturb` does what a round is about.
fn story(mut servers: Vec<Server>, mut disturb: impl FnMut(&mut [Server], usize, &mut dyn FnMut(u64) -> u64)) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let log = Arc::new(Log::default());
    log.prove.store(true, Ordering::SeqCst);
    let mut members = Vec::new();
    for n in 0..MACHINES {
        let labels: Labels = [("role".to_owned(), "web".to_owned())].into();
        let instance = Some(format!("machine-{n}"));
        let spec = TokenSpec { instance, labels, ..TokenSpec::default() };
        let token = servers[n % servers.len()].client().create_token(&spec).unwrap().token.parse().unwrap();
        let first = u32::try_from(n).unwrap() + 1;
        let enrolled = runtime.block_on(enrol(&[token], &format!("m{n}"), first, 1, 1, None, &log)).unwrap();
        members.extend(enrolled.0);
    }
    let pace = Pace { heartbeat: Duration::from_secs(5), status: Duration::from_millis(200) };
    let swarm = runtime.block_on(async { Swarm::start(&members, pace, None).unwrap() });
    let sockets: Vec<PathBuf> = servers.iter().map(|server| server.socket.clone()).collect();
    let (stop, over) = (AtomicBool::new(false), AtomicBool::new(false));
    // A failed test must not wait for threads that nobody stops.
    struct Stop<'a>(&'a AtomicBool, &'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
            self.1.store(true, Ordering::SeqCst);
        }
    }
    std::thread::scope(|scope| {
        let ends = Stop(&stop, &over);
        let writer = scope.spawn(|| write(&sockets, &stop));
        scope.spawn(|| never_backwards(&members, &over));
        let mut dice = std::process::id() as u64 | 1;
        eprintln!("dice: {dice}");
        let mut throw = |below: u64| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            dice % below
        };
        for round in 0..rounds() {
            std::thread::sleep(Duration::from_millis(50 + throw(700)));
            disturb(&mut servers, round, &mut throw);
        }
        // With everybody there again, more can be written.
        servers.iter().for_each(Server::ready);
        std::thread::sleep(Duration::from_secs(2));
        ends.0.store(true, Ordering::SeqCst);
        let written = writer.join().unwrap();
        eprintln!(
            "{} rounds; acknowledged: {} tokens, {} changes of labels, {} postures; sent again: {}",
            rounds(),
            written.tokens.len(),
            written.labels.len(),
            written.postures.len(),
            written.again
        );
        assert!(written.postures.len() >= 2 && written.again > 0, "nothing happened");
        for server in &servers {
            every_change_is_there_once(&server.client(), &written);
        }
        let begun = Instant::now();
        machines_converge(&servers[0].client(), &members, &written);
        eprintln!("all machines converged {:.1} s after the last change", begun.elapsed().as_secs_f64());
    });
    assert_eq!(*log.wrong.lock().unwrap(), Vec::<String>::new());
    runtime.block_on(swarm.stop());
}

#[test]
fn a_server_with_sqlite_is_killed_while_somebody_writes() {
    let scratch = Scratch::new("kill-sqlite").unwrap();
    let server = Server::start(&program(), scratch.path(), "only", None);
    story(vec![server], |servers, _, throw| {
        servers[0].kill();
        servers[0].again();
        // Sometimes it is killed while it starts.
        if throw(4) > 0 {
            servers[0].ready();
        }
    });
}

#[test]
fn two_servers_and_their_postgresql_are_killed_while_somebody_writes() {
    let Some(postgres) = TestPostgres::start() else { return };
    let scratch = Scratch::new("kill-postgres").unwrap();
    let (program, connection) = (program(), postgres.config());
    let servers = ["one", "two"].map(|name| Server::start(&program, scratch.path(), name, Some(&connection)));
    story(servers.into(), |servers, round, throw| match round % 10 {
        4 => postgres.restart(),
        9 => postgres.kill9(),
        _ => {
            let one = usize::try_from(throw(2)).unwrap();
            servers[one].kill();
            std::thread::sleep(Duration::from_millis(throw(300)));
            servers[one].again();
            servers[one].ready();
        }
    });
}
