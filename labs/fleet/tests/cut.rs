//! The cable of one machine is cut, without a word to either end, while the posture changes and the machine restarts:
//! it arrives when the cable is whole again, never goes back, and holds up nobody else.
//!
//! Needs root. `KEEPWALL_CUT_SECONDS` is how long the cut lasts (8; the full check takes 60, which is long enough for a
//! rollout to give a machine of its wave up).

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why")]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use keepwall_api::fleet::{InstanceChange, PostureChange, PostureFile, RolloutPolicy, RolloutState, TokenSpec};
use keepwall_fleet_lab::swarm::{Member, Swarm, enrol};
use keepwall_fleet_lab::{Log, Scratch, config};
use keepwall_server::fleet::{Act, Fleet};
use keepwall_server::run::Running;
use keepwall_store::Expect;
use keepwall_sys::link;
use keepwall_sys::namespace::NetNs;
use keepwall_uplink::Pace;
use tokio::runtime::Runtime;

const MACHINES: usize = 3;
/// Where machines reach the server, whichever cable is whole.
const SERVER: &str = "10.99.99.1";
const PATIENCE: Duration = Duration::from_secs(180);
/// Machines whose cables are whole have a change by then.
const AT_ONCE: Duration = Duration::from_secs(5);
/// A rollout gives a machine up 15 seconds after what its policy allows, which is 5 at least.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(25);

/// A network namespace of its own, and threads that were born in it.
struct Place {
    ns: NetNs,
    runtime: Runtime,
}

impl Place {
    fn new() -> io::Result<Place> {
        let made = std::thread::spawn(|| {
            let ns = NetNs::unshare()?;
            link::set_up("lo")?;
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            Ok(Place { ns, runtime: builder.worker_threads(1).enable_all().build()? })
        });
        made.join().unwrap()
    }

    /// Runs `work` on a thread inside.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.ns.enter().unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    /// Runs what opens sockets: on the threads that were born inside.
    fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        self.runtime.block_on(self.runtime.spawn(work)).unwrap()
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A cable from the server to machine `n`.
fn connect(server: &Place, machine: &Place, n: usize) {
    let (here, there) = (format!("10.99.{n}.1"), format!("10.99.{n}.2"));
    server.inside(|| {
        link::add_veth(&format!("m{n}"), "eth0", &machine.ns).unwrap();
        link::set_up(&format!("m{n}")).unwrap();
        link::add_address(&format!("m{n}"), address(&here), 24).unwrap();
    });
    machine.inside(|| {
        link::set_up("eth0").unwrap();
        link::add_address("eth0", address(&there), 24).unwrap();
        link::add_route(address("0.0.0.0"), 0, "eth0", Some(address(&here))).unwrap();
    });
}

/// Cuts or mends the cable of machine `n` at the server's end. Nobody says goodbye.
fn cable(server: &Place, n: usize, whole: bool) {
    let state = if whole { "up" } else { "down" };
    let done = server.inside(|| Command::new("ip").args(["link", "set", &format!("m{n}"), state]).status().unwrap());
    assert!(done.success());
}

fn act() -> Act {
    Act { actor: "user:tester".into(), ..Act::default() }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    begun.elapsed()
}

fn posture(port: u16) -> String {
    format!(
        "version: 1\nsecurity_groups:\n  web:\n    members: [{{ role: web }}]\n    ingress:\n      \
         - {{ policy: accept, ports: {port}, from: any }}\n"
    )
}

/// Declares that web machines are reached on `port`; the rollout's id.
fn declare(server: &Place, fleet: &Arc<Fleet>, port: u16, failures_max: u32) -> String {
    let files = vec![PostureFile { name: "fleet.yaml".into(), text: posture(port) }];
    let rollout = RolloutPolicy { waves: Vec::new(), confirm_within_s: 5, failures_max, ..RolloutPolicy::default() };
    let change = PostureChange { files, reason: format!("port {port}"), rollout };
    let fleet = Arc::clone(fleet);
    server.run(async move { fleet.declare(change, Expect::Any, None, &|_| true, &act()).await.unwrap().rollout })
}

fn holds(member: &Member, port: u16) -> bool {
    member.machine.bundle().intent().is_ok_and(|intent| format!("{intent:?}").contains(&format!("first: {port},")))
}

/// Web machines, as one of them knows them.
fn knows(member: &Member) -> usize {
    member.machine.bundle().sets().get("group:web").map_or(0, |set| set.len())
}

#[test]
fn a_machine_whose_cable_was_cut_arrives_later_and_holds_up_nobody() {
    let lasts = std::env::var("KEEPWALL_CUT_SECONDS").map_or(8, |text| text.parse().unwrap());
    let lasts = Duration::from_secs(lasts);
    let server = match Place::new() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            eprintln!("skipped: needs root");
            return;
        }
        made => made.unwrap(),
    };
    let machines: Vec<Place> = (0..MACHINES).map(|_| Place::new().unwrap()).collect();
    server.inside(|| link::add_address("lo", address(SERVER), 32).unwrap());
    machines.iter().enumerate().for_each(|(n, machine)| connect(&server, machine, n));

    let scratch = Scratch::new("cut").unwrap();
    let mut config = config(scratch.path());
    config.agents.listen = SocketAddr::new(address(SERVER), 7443);
    let running = server.run(async move { Running::start(&config).await.unwrap() });
    let fleet = Arc::clone(&running.fleet);
    let log = Arc::new(Log::default());
    log.prove.store(true, Ordering::SeqCst);
    let mut members = Vec::new();
    for (n, machine) in machines.iter().enumerate() {
        let labels = [("role".to_owned(), "web".to_owned())].into();
        let spec = TokenSpec { instance: Some(format!("machine-{n}")), labels, ..TokenSpec::default() };
        let maker = Arc::clone(&fleet);
        let token = server.run(async move { maker.make_token(spec, &act()).await.unwrap().token.parse().unwrap() });
        let (log, first) = (Arc::clone(&log), u32::try_from(n).unwrap() + 1);
        let enrolled = machine.run(async move { enrol(&[token], "m", first, 1, 1, None, &log).await.unwrap() });
        members.extend(enrolled.0);
    }
    let start = |n: usize| {
        let _inside = machines[n].runtime.enter();
        let pace = Pace { heartbeat: Duration::from_secs(5), status: Duration::from_millis(200) };
        Swarm::start(&members[n..=n], pace, None).unwrap()
    };
    let mut uplinks: Vec<Swarm> = (0..MACHINES).map(start).collect();
    until("all are connected", || fleet.count().connected == MACHINES);
    let state = |id: &str| server.runtime.block_on(fleet.rollout(id)).unwrap();
    let first = declare(&server, &fleet, 4001, 0);
    until("the first posture is everywhere", || state(&first).state == RolloutState::Done);
    assert!(members.iter().all(|member| holds(member, 4001) && knows(member) == MACHINES));
    let before = members[0].machine.held();

    // The cable of machine 0 is cut. If there is time for it, a rollout finds out.
    cable(&server, 0, false);
    let cut = Instant::now();
    if lasts > GIVEN_UP_AFTER + AT_ONCE {
        let doomed = declare(&server, &fleet, 4002, 0);
        let took = until("the others have it", || members[1..].iter().all(|member| holds(member, 4002)));
        assert!(took < AT_ONCE, "the others were held up for {took:?}");
        let took = until("the rollout stops", || state(&doomed).state == RolloutState::Stopped);
        let view = state(&doomed);
        // Lost once its stream is known to be dead, which takes three heartbeats of silence; until then it counts as
        // one that does not do what it is told.
        let named = [&view.waves[0].lost[..], &view.waves[0].failed[..]].concat();
        assert!(named == ["machine-0"] && view.detail.contains("machine-0"), "{view:?}");
        eprintln!("the rollout stopped after {:.1} s: {}", took.as_secs_f64(), view.detail);
        server.runtime.block_on(fleet.return_rollout(&doomed, &act())).unwrap();
        until("the others are back", || members[1..].iter().all(|member| holds(member, 4001)));
    }
    // A change that may lose one machine; and one machine leaves the group.
    let second = declare(&server, &fleet, 4003, 1);
    let took = until("the others have it", || members[1..].iter().all(|member| holds(member, 4003)));
    assert!(took < AT_ONCE, "the others were held up for {took:?}");
    eprintln!("the others had it after {:.0} ms", took.as_secs_f64() * 1_000.0);
    let change = InstanceChange { labels: Some([("role".to_owned(), "db".to_owned())].into()), interfaces: None };
    server.runtime.block_on(fleet.change_instance("machine-2", change, Expect::Any, &act())).unwrap();
    let took = until("machine 1 forgets machine 2", || knows(&members[1]) == MACHINES - 1);
    assert!(took < AT_ONCE, "machine 1 was held up for {took:?}");
    // Machine 0 restarts meanwhile, and has what is on its disk.
    let old = std::mem::replace(&mut uplinks[0], start(0));
    machines[0].run(old.stop());
    std::thread::sleep(lasts.saturating_sub(cut.elapsed()));
    assert!(members[0].machine.held() == before && holds(&members[0], 4001), "it heard something while it was cut off");

    cable(&server, 0, true);
    let cut = cut.elapsed();
    let took = until("machine 0 arrives", || holds(&members[0], 4003) && knows(&members[0]) == MACHINES - 1);
    eprintln!("cut for {:.0} s; machine 0 arrived {:.1} s after", cut.as_secs_f64(), took.as_secs_f64());
    until("the rollout is done", || state(&second).state == RolloutState::Done);
    until("all are in sync", || fleet.count().in_sync == MACHINES - 1 || fleet.count().in_sync == MACHINES);
    assert!(members[0].machine.held().generation > before.generation);
    assert_eq!(*log.wrong.lock().unwrap(), Vec::<String>::new());

    for (machine, uplink) in machines.iter().zip(uplinks) {
        machine.run(uplink.stop());
    }
    server.run(running.stop());
}
