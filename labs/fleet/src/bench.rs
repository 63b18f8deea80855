//! A large fleet on one machine, measured.
//!
//! ```text
//!  bench ──▶ keepwalld (its own process: memory is its alone)
//!    │           ▲ TLS
//!    ├──▶ swarm 1 (5,000 uplinks from 127.0.0.11)
//!    └──▶ swarm 2 (5,000 uplinks from 127.0.0.12)        the same again with the gRPC stand-in
//! ```
//!
//! Swarms and server share two cores here: what is measured is an upper bound of what a server alone would take.

#![allow(clippy::print_stdout, reason = "a bench is read in a terminal")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use keepwall_api::{PostureChange, PostureFile, RolloutPolicy, TokenSpec};
use keepwall_client::{Client, Settings};
use keepwall_uplink::token::Token;
use serde::{Deserialize, Serialize};

use crate::machine::{Log, now_us};
use crate::server::Scratch;
use crate::swarm::{Member, Swarm, enrol, quiet};

/// Uplinks of one process: 20,000 descriptors a process are the limit where this was written.
const SWARM_MAX: usize = 5_000;
/// How long anything may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(300);
/// Rounds of each push.
const ROUNDS: usize = 5;

/// What a swarm is told, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// Enrol so many.
    Enrol { prefix: String, first_address: u32, count: usize, tokens: Vec<String>, from: IpAddr },
    /// Start all uplinks.
    Dial { from: IpAddr },
    /// Whether a new connection must be proved from now on.
    Prove(bool),
    /// Forget what was seen.
    Clear,
    /// How many offers were confirmed since: asked often, so the answer is short.
    Confirmed,
    /// When offers were begun since.
    Seen,
    /// End all uplinks.
    Stop,
}

/// What it answers, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    Enrolled { seconds: f64 },
    Done,
    Confirmed(u64),
    Seen { begun_us: Vec<u64>, wrong: Vec<String> },
    Failed(String),
}

/// The process of a swarm: does as it is told until its input ends.
///
/// # Errors
/// No runtime.
pub fn swarm() -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(1).build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let log = Arc::new(Log::default());
    let mut members: Vec<Member> = Vec::new();
    let mut swarm: Option<Swarm> = None;
    for line in std::io::stdin().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let order: Order = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        let word = match order {
            Order::Enrol { prefix, first_address, count, tokens, from } => {
                let tokens: Result<Vec<Token>, String> = tokens.iter().map(|t| t.parse()).collect();
                let enrolled = tokens.and_then(|tokens| {
                    runtime.block_on(enrol(&tokens, &prefix, first_address, count, 64, Some(from), &log))
                });
                match enrolled {
                    Ok((new, seconds)) => {
                        members.extend(new);
                        Word::Enrolled { seconds }
                    }
                    Err(why) => Word::Failed(why),
                }
            }
            Order::Dial { from } => match runtime.block_on(async { Swarm::start(&members, quiet(), Some(from)) }) {
                Ok(started) => {
                    swarm = Some(started);
                    Word::Done
                }
                Err(why) => Word::Failed(why),
            },
            Order::Prove(prove) => {
                log.prove.store(prove, Ordering::SeqCst);
                Word::Done
            }
            Order::Clear => {
                log.clear();
                Word::Done
            }
            Order::Confirmed => Word::Confirmed(log.confirmed.load(Ordering::SeqCst)),
            Order::Seen => Word::Seen {
                begun_us: log.begun.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, t)| *t).collect(),
                wrong: log.wrong.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            },
            Order::Stop => {
                if let Some(swarm) = swarm.take() {
                    runtime.block_on(swarm.stop());
                }
                Word::Done
            }
        };
        let mut out = serde_json::to_string(&word).map_err(|error| error.to_string())?;
        out.push('\n');
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(out.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// A child that ends with us.
struct Part(Child);

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Hand {
    _part: Part,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    address: IpAddr,
}

impl Hand {
    fn start(n: usize) -> Result<Hand, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut child = Command::new(program)
            .arg("swarm")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let (Some(to), Some(from)) = (to, from) else { return Err("a swarm has no pipes".into()) };
        let address = IpAddr::from([127, 0, 0, u8::try_from(11 + n).unwrap_or(11)]);
        Ok(Hand { _part: Part(child), to, from: BufReader::new(from), address })
    }

    fn tell(&mut self, order: &Order) -> Result<(), String> {
        let mut line = serde_json::to_string(order).map_err(|error| error.to_string())?;
        line.push('\n');
        self.to.write_all(line.as_bytes()).and_then(|()| self.to.flush()).map_err(|error| error.to_string())
    }

    fn hear(&mut self) -> Result<Word, String> {
        let mut line = String::new();
        self.from.read_line(&mut line).map_err(|error| error.to_string())?;
        match serde_json::from_str(&line).map_err(|error| format!("a swarm ended: {error}"))? {
            Word::Failed(why) => Err(why),
            word => Ok(word),
        }
    }
}

fn all(hands: &mut [Hand], order: impl Fn(&Hand, usize) -> Order) -> Result<Vec<Word>, String> {
    for (n, hand) in hands.iter_mut().enumerate() {
        let order = order(hand, n);
        hand.tell(&order)?;
    }
    hands.iter_mut().map(Hand::hear).collect()
}

/// Resident memory of a process, KiB.
fn resident_kib(pid: u32) -> Result<u64, String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|error| error.to_string())?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).ok_or_else(|| "no VmRSS".to_owned())
}

/// Processor time of a process, seconds.
fn cpu_s(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<u64> = rest.split_whitespace().skip(11).take(2).filter_map(|f| f.parse().ok()).collect();
    // A hundred ticks a second on every Linux that there is.
    fields.iter().sum::<u64>() as f64 / 100.0
}

/// Bytes that the loopback device has carried, which all of a fleet's traffic does here.
fn loopback_bytes() -> u64 {
    let text = std::fs::read_to_string("/sys/class/net/lo/statistics/tx_bytes").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

fn metric(port: u16, name: &str) -> Result<f64, String> {
    use std::io::Read as _;
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(|error| error.to_string())?;
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .map_err(|error| error.to_string())?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(|error| error.to_string())?;
    let line = text.lines().find(|line| line.starts_with(&format!("keepwall_{name} ")));
    line.and_then(|line| line.split(' ').nth(1)?.parse().ok()).ok_or_else(|| format!("no metric {name}"))
}

fn until(what: &str, mut holds: impl FnMut() -> bool) -> Result<Duration, String> {
    let begun = Instant::now();
    while !holds() {
        if begun.elapsed() > PATIENCE {
            return Err(format!("after {PATIENCE:?} still not: {what}"));
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    Ok(begun.elapsed())
}

struct Server {
    part: Part,
    client: Client,
}

fn start_server(program: &Path, scratch: &Path, agents: u16, metrics: u16) -> Result<Server, String> {
    let config = scratch.join("server.toml");
    let socket = scratch.join("server.sock");
    let text = format!(
        "state = \"{}\"\nlog = \"error\"\n[api]\nlisten = \"127.0.0.1:0\"\nsocket = \"{}\"\n[agents]\n\
         listen = \"127.0.0.1:{agents}\"\n[metrics]\nlisten = \"127.0.0.1:{metrics}\"\n",
        scratch.join("state").display(),
        socket.display()
    );
    std::fs::write(&config, text).map_err(|error| error.to_string())?;
    let child = Command::new(program)
        .arg("run")
        .arg("--config")
        .arg(&config)
        .stdin(Stdio::null())
        .spawn()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    let part = Part(child);
    until("the server listens", || metric(metrics, "store_up").is_ok_and(|up| up > 0.0))?;
    let client = Client::new(Settings::new(&format!("unix:{}", socket.display()))).map_err(|e| e.to_string())?;
    Ok(Server { part, client })
}

/// A posture with two lists of IPv6 prefixes, one version of which differs from the next by about 4 KiB: what goes
/// and what comes, 17 bytes each.
fn posture(version: usize) -> String {
    let list = |name: &str, half: usize| {
        let entries: Vec<String> = (0..60).map(|n| format!("\"fd00:{version:x}:{half:x}:{n:x}::/64\"")).collect();
        format!("  {name}: {{ family: ipv6, max_entries: 200, entries: [{}] }}\n", entries.join(", "))
    };
    format!(
        "version: 1\nsettings: {{ limits: {{ addresses_per_basic_group: 20000 }} }}\nsecurity_groups:\n  \
         all:\n    members: [{{ fleet: bench }}]\n    inner_access: drop\n    ingress:\n      \
         - {{ policy: accept, ports: 22, from: [prefix-list:one, prefix-list:two] }}\n      \
         - {{ policy: accept, ports: 443, from: any }}\n  web:\n    members: [{{ role: web }}]\n\
         prefix_lists:\n{}{}",
        list("one", 1),
        list("two", 2)
    )
}

fn declare(server: &Server, text: String) -> Result<u64, String> {
    let change = PostureChange {
        files: vec![PostureFile { name: "bench.yaml".into(), text }],
        reason: "bench".into(),
        rollout: RolloutPolicy { waves: Vec::new(), ..RolloutPolicy::default() },
    };
    let present = server.client.get_posture().map_err(|error| error.to_string())?.value.revision;
    server.client.put_posture(&change, present).map_err(|error| error.to_string())?;
    Ok(now_us())
}

fn tokens(server: &Server, count: usize, role: &str, machines: usize) -> Result<Vec<String>, String> {
    let uses = u32::try_from(machines.div_ceil(count).min(1_000)).unwrap_or(1_000);
    let labels = [("fleet".to_owned(), "bench".to_owned()), ("role".to_owned(), role.to_owned())].into();
    let spec = TokenSpec { labels, uses, ..TokenSpec::default() };
    (0..count).map(|_| Ok(server.client.create_token(&spec).map_err(|error| error.to_string())?.token)).collect()
}

/// Waits until so many offers are confirmed at all machines.
fn until_confirmed(hands: &mut [Hand], count: usize) -> Result<(), String> {
    until(&format!("{count} machines have confirmed"), || {
        let words = all(hands, |_, _| Order::Confirmed).unwrap_or_default();
        words.iter().map(|word| if let Word::Confirmed(n) = word { *n as usize } else { 0 }).sum::<usize>() == count
    })?;
    Ok(())
}

/// When offers were begun at all machines, sorted, microseconds since 1970.
fn seen(hands: &mut [Hand]) -> Result<Vec<u64>, String> {
    let mut begun = Vec::new();
    for word in all(hands, |_, _| Order::Seen)? {
        if let Word::Seen { begun_us, wrong } = word {
            if let Some(wrong) = wrong.first() {
                return Err(format!("a rule was broken: {wrong}"));
            }
            begun.extend(begun_us);
        }
    }
    begun.sort_unstable();
    Ok(begun)
}

fn row(what: &str, value: String, goal: &str, holds: Option<bool>) {
    let mark = match holds {
        Some(true) => "yes",
        Some(false) => "NO",
        None => "",
    };
    println!("{what:<58} {value:>26}   {goal:<16} {mark}");
}

/// `bench [--agents N] [--server PATH] [--baseline PATH]`
///
/// # Errors
/// Something did not work; goals that are not reached are said and are no error.
pub fn run(args: &[&str]) -> Result<(), String> {
    let (mut agents, mut server, mut baseline) = (10_000usize, None::<PathBuf>, None::<PathBuf>);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let value = args.next().ok_or_else(|| format!("{arg} needs a value"))?;
        match *arg {
            "--agents" => agents = value.parse().map_err(|_| "--agents takes a number")?,
            "--server" => server = Some(value.into()),
            "--baseline" => baseline = Some(value.into()),
            other => return Err(format!("`{other}` is not understood")),
        }
    }
    let beside = |name: &str| std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
    let program = server.or_else(|| beside("keepwalld")).ok_or("no server")?;
    let scratch = Scratch::new("bench").map_err(|error| error.to_string())?;
    println!("{agents} instances, mTLS, server and instances on the same machine");
    println!("{:<58} {:>26}   {:<16}", "", "measured", "goal");

    let (agents_port, metrics_port) = (17_443, 17_441);
    let mut server = start_server(&program, scratch.path(), agents_port, metrics_port)?;
    let pid = server.part.0.id();
    let at_rest_kib = resident_kib(pid)?;
    let swarms = agents.div_ceil(SWARM_MAX).max(2);
    let per_swarm = agents / swarms;
    let agents = per_swarm * swarms;
    let mut hands = (0..swarms).map(Hand::start).collect::<Result<Vec<_>, _>>()?;

    // Enrolment. Half of the machines are of the role that joins are about.
    let tokens: Vec<Vec<String>> = (0..swarms)
        .map(|n| tokens(&server, 20, if n % 2 == 0 { "web" } else { "db" }, per_swarm))
        .collect::<Result<_, _>>()?;
    let words = all(&mut hands, |hand, n| Order::Enrol {
        prefix: format!("swarm{n}"),
        first_address: 1 + u32::try_from(n * per_swarm).unwrap_or(0),
        count: per_swarm,
        tokens: tokens[n].clone(),
        from: hand.address,
    })?;
    let seconds = words.iter().filter_map(|w| if let Word::Enrolled { seconds } = w { Some(*seconds) } else { None });
    let rate = agents as f64 / seconds.fold(0.0, f64::max);
    row("enrolments a second", format!("{rate:.0}"), ">= 500", Some(rate >= 500.0));

    declare(&server, posture(0))?;
    let dial = Instant::now();
    all(&mut hands, |hand, _| Order::Dial { from: hand.address })?;
    until("all are connected", || metric(metrics_port, "streams").is_ok_and(|n| n as usize == agents))?;
    row("all connect the first time", format!("{:.1} s", dial.elapsed().as_secs_f64()), "", None);
    until("all are in sync", || metric(metrics_port, "instances_in_sync").is_ok_and(|n| n as usize == agents))?;
    row("all hold their first posture after", format!("{:.1} s", dial.elapsed().as_secs_f64()), "", None);
    until("the rollout is done", || metric(metrics_port, "rollout_active").is_ok_and(|n| n == 0.0))?;

    // At rest.
    std::thread::sleep(Duration::from_secs(25));
    let (cpu, rest) = (cpu_s(pid), Instant::now());
    std::thread::sleep(Duration::from_secs(20));
    let idle = (cpu_s(pid) - cpu) / rest.elapsed().as_secs_f64() * 100.0;
    let full_kib = resident_kib(pid)?;
    let per_agent = full_kib as f64 / agents as f64;
    row(
        "server memory for each instance, all of it counted",
        format!("{per_agent:.1} KiB"),
        "<= 16 KiB",
        Some(per_agent <= 16.0),
    );
    let grown = full_kib.saturating_sub(at_rest_kib) as f64 / agents as f64;
    row("the same without what an empty server takes", format!("{grown:.1} KiB"), "", None);
    row("server at rest, heartbeats every 20 s", format!("{idle:.1} % of a core"), "", None);

    // Pushes of about 4 KiB to all.
    let (mut p50s, mut p99s, mut wholes) = (Vec::new(), Vec::new(), Vec::new());
    let mut bytes = 0;
    for round in 1..=ROUNDS {
        all(&mut hands, |_, _| Order::Clear)?;
        let before = loopback_bytes();
        let declared = declare(&server, posture(round))?;
        until_confirmed(&mut hands, agents)?;
        bytes = loopback_bytes() - before;
        let begun = seen(&mut hands)?;
        // From the first that had it: before, the server decides what to send; that is in the next line.
        let first = begun.first().copied().unwrap_or(0);
        let spread: Vec<u64> = begun.iter().map(|t| t - first).collect();
        p50s.push(percentile(&spread, 50));
        p99s.push(percentile(&spread, 99));
        wholes.push(begun.last().copied().unwrap_or(0).saturating_sub(declared));
        until("the rollout is done", || metric(metrics_port, "rollout_active").is_ok_and(|n| n == 0.0))?;
    }
    let median = |all: &mut Vec<u64>| {
        all.sort_unstable();
        all[all.len() / 2] as f64 / 1_000.0
    };
    let (p50, p99, whole) = (median(&mut p50s), median(&mut p99s), median(&mut wholes));
    row("4 KiB to all, from the first to have it: p50", format!("{p50:.0} ms"), "", None);
    row("p99", format!("{p99:.0} ms"), "<= 500 ms", Some(p99 <= 500.0));
    row("from the API's answer to the last that has it", format!("{whole:.0} ms"), "", None);
    row("bytes on the wire for it, both ways, all counted", format!("{:.1} MiB", bytes as f64 / 1_048_576.0), "", None);

    // One machine joins a group of half the fleet.
    for prove in [false, true] {
        all(&mut hands, |_, _| Order::Prove(prove))?;
        all(&mut hands, |_, _| Order::Clear)?;
        let joiner = self::tokens(&server, 1, "web", 1)?;
        let members = agents / 2;
        let before = loopback_bytes();
        let begun = Instant::now();
        let token: Token = joiner[0].parse()?;
        let log = Arc::new(Log::default());
        let name = format!("joiner{}", u8::from(prove));
        let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
        let address = 200_000 + u32::from(prove);
        runtime.block_on(enrol(&[token], &name, address, 1, 1, None, &log))?;
        until_confirmed(&mut hands, members)?;
        let took = begun.elapsed();
        let bytes = loopback_bytes() - before;
        let how = if prove { "each proves a new connection" } else { "acknowledged at once" };
        row(
            &format!("one joins a group of {members}; {how}"),
            format!("{:.0} ms, {:.0} KiB", took.as_secs_f64() * 1_000.0, bytes as f64 / 1_024.0),
            "",
            None,
        );
    }
    all(&mut hands, |_, _| Order::Prove(false))?;

    // The server dies and comes back.
    server.part.0.kill().map_err(|error| error.to_string())?;
    let _ = server.part.0.wait();
    drop(server);
    let back = Instant::now();
    let server = start_server(&program, scratch.path(), agents_port, metrics_port)?;
    let started = back.elapsed();
    until("all are back", || metric(metrics_port, "streams").is_ok_and(|n| n as usize == agents))?;
    let took = back.elapsed().as_secs_f64();
    row("all are back after kill -9 and restart of the server", format!("{took:.1} s"), "<= 15 s", Some(took <= 15.0));
    row("of which the server takes to start", format!("{:.1} s", started.as_secs_f64()), "", None);
    let pid = server.part.0.id();
    row("server memory after that", format!("{:.1} KiB", resident_kib(pid)? as f64 / agents as f64), "", None);
    all(&mut hands, |_, _| Order::Stop)?;
    drop(hands);
    drop(server);

    let Some(baseline) = baseline else {
        println!("(no gRPC stand-in was given: --baseline)");
        return Ok(());
    };
    let measured = Command::new(&baseline)
        .arg(agents.to_string())
        .stdout(Stdio::piped())
        .output()
        .map_err(|error| format!("{}: {error}", baseline.display()))?;
    let text = String::from_utf8_lossy(&measured.stdout);
    let grpc: Baseline = serde_json::from_str(text.trim()).map_err(|error| format!("the stand-in: {error}: {text}"))?;
    row("gRPC stand-in: memory for each stream", format!("{:.1} KiB", grpc.kib_each), "", None);
    let both = |p50: f64, p99: f64| format!("{p50:.0} / {p99:.0} ms");
    row("gRPC stand-in: the same change to all, p50 / p99", both(grpc.p50_ms, grpc.p99_ms), "", None);
    row("gRPC stand-in: 4 KiB that nobody reads", both(grpc.bare_p50_ms, grpc.bare_p99_ms), "", None);
    let memory = grpc.kib_each / per_agent;
    let latency = grpc.p99_ms / p99;
    row("memory, gRPC / ours", format!("{memory:.1}"), ">= 3", Some(memory >= 3.0));
    row("memory, gRPC / ours, what a stream adds", format!("{:.1}", grpc.kib_grown / grown), "", None);
    row("p99 of a push, gRPC / ours", format!("{latency:.2}"), ">= 1.5", Some(latency >= 1.5));
    Ok(())
}

/// What the gRPC stand-in prints.
#[derive(Debug, Deserialize)]
struct Baseline {
    /// Resident memory of its server by streams.
    kib_each: f64,
    /// The same without what its empty server takes.
    kib_grown: f64,
    /// Pushes of the same change as ours, read and applied.
    p50_ms: f64,
    p99_ms: f64,
    /// Pushes of as many bytes that nobody looks into.
    bare_p50_ms: f64,
    bare_p99_ms: f64,
}
