//! A server and a handful of instances, in one process, over real TLS on loopback.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use keepwall_api::fleet::{
    InstanceChange, Labels, OnFailure, PostureChange, PostureFile, RolloutPolicy, RolloutState, TokenSpec, WaveSpec,
};
use keepwall_fleet_lab::swarm::{Member, Swarm, enrol, facts};
use keepwall_fleet_lab::{Log, Scratch, config};
use keepwall_server::fleet::{Act, Fleet, FleetError};
use keepwall_server::run::Running;
use keepwall_store::Expect;
use keepwall_uplink::Pace;
use keepwall_uplink::enroll::enroll;
use keepwall_uplink::identity::Request;
use keepwall_uplink::token::Token;

const POSTURE: &str = "\
version: 1
security_groups:
  web:
    members: [{ role: web }]
    ingress:
      - { policy: accept, ports: 443, from: any }
  db:
    members: [{ role: db }]
    inner_access: drop
    ingress:
      - { policy: accept, ports: 5432, from: group:web }
";

fn act() -> Act {
    Act { actor: "user:tester".into(), ..Act::default() }
}

fn labels(role: &str) -> Labels {
    [("role".to_owned(), role.to_owned())].into()
}

async fn token(fleet: &Fleet, role: &str, uses: u32) -> Token {
    let spec = TokenSpec { labels: labels(role), uses, ..TokenSpec::default() };
    fleet.make_token(spec, &act()).await.unwrap().token.parse().unwrap()
}

fn change(text: &str, rollout: RolloutPolicy) -> PostureChange {
    let files = vec![PostureFile { name: "fleet.yaml".into(), text: text.to_owned() }];
    PostureChange { files, reason: "a test".into(), rollout }
}

async fn declare(fleet: &Fleet, text: &str, rollout: RolloutPolicy) -> Result<String, FleetError> {
    fleet.declare(change(text, rollout), Expect::Any, None, &|_| true, &act()).await.map(|a| a.rollout)
}

fn pace() -> Pace {
    Pace { heartbeat: Duration::from_secs(5), status: Duration::from_millis(200) }
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn state(fleet: &Fleet, id: &str) -> RolloutState {
    fleet.rollout(id).await.unwrap().state
}

struct Story {
    _scratch: Scratch,
    running: Running,
    log: Arc<Log>,
}

async fn story(name: &str) -> Story {
    let scratch = Scratch::new(name).unwrap();
    let running = Running::start(&config(scratch.path())).await.unwrap();
    let log = Arc::new(Log::default());
    log.prove.store(true, Ordering::SeqCst);
    Story { running, log, _scratch: scratch }
}

impl Story {
    fn fleet(&self) -> &Arc<Fleet> {
        &self.running.fleet
    }

    async fn members(&self, role: &str, first_address: u32, count: usize) -> Vec<Member> {
        let token = token(self.fleet(), role, u32::try_from(count).unwrap()).await;
        enrol(&[token], role, first_address, count, 4, None, &self.log).await.unwrap().0
    }

    async fn connected(&self, count: usize) {
        until("all are connected", async || self.fleet().count().connected == count).await;
    }

    async fn in_sync(&self, count: usize) {
        until("all are in sync", async || self.fleet().count().in_sync == count).await;
        assert_eq!(*self.log.wrong.lock().unwrap(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines_enrol_are_told_and_one_that_joins_changes_one_line_of_the_others() {
    let s = story("join").await;
    let web = s.members("web", 1, 3).await;
    let db = s.members("db", 101, 2).await;
    let swarms = [Swarm::start(&web, pace(), None).unwrap(), Swarm::start(&db, pace(), None).unwrap()];
    s.connected(5).await;
    let id = declare(s.fleet(), POSTURE, RolloutPolicy::default()).await.unwrap();
    until("the rollout is done", async || state(s.fleet(), &id).await == RolloutState::Done).await;
    s.in_sync(5).await;
    let members = |member: &Member| member.machine.bundle().sets()["group:web"].len();
    assert_eq!(members(&db[0]), 3);

    // One more web machine: the databases learn its address, by a change and not by new rules.
    let rules = db[0].machine.bundle().rules().to_vec();
    let token = token(s.fleet(), "web", 1).await;
    let joined = enroll(&token, &facts("web-9", 9), &Request::new().unwrap(), None, None).await.unwrap();
    assert_eq!(joined.identity.instance, "web-9");
    until("the databases know it", async || db.iter().all(|m| members(m) == 4)).await;
    assert_eq!(db[0].machine.bundle().rules(), rules);

    // It changes its role, and they forget it.
    let change = InstanceChange { labels: Some(labels("db")), interfaces: None };
    s.fleet().change_instance("web-9", change, Expect::Any, &act()).await.unwrap();
    until("the databases forget it", async || db.iter().all(|m| members(m) == 3)).await;
    for swarm in swarms {
        swarm.stop().await;
    }
    until("nobody is connected", async || s.fleet().count().connected == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_that_fails_stops_the_rollout_and_a_return_brings_everybody_back() {
    let s = story("canary").await;
    let web = s.members("web", 1, 4).await;
    let swarm = Swarm::start(&web, pace(), None).unwrap();
    s.connected(4).await;
    let first = declare(s.fleet(), POSTURE, RolloutPolicy { waves: vec![], ..RolloutPolicy::default() }).await.unwrap();
    until("the first is done", async || state(s.fleet(), &first).await == RolloutState::Done).await;
    let before: Vec<_> = web.iter().map(|m| m.machine.bundle()).collect();

    let canary = web.iter().find(|m| m.identity.instance == "web-0").unwrap();
    canary.machine.broken.store(true, Ordering::SeqCst);
    let other = POSTURE.replace("443", "8443");
    let second = declare(s.fleet(), &other, RolloutPolicy::default()).await.unwrap();
    until("it stops", async || state(s.fleet(), &second).await == RolloutState::Stopped).await;
    let view = s.fleet().rollout(&second).await.unwrap();
    assert_eq!(view.waves[0].failed, ["web-0"]);
    assert!(view.detail.contains("web-0") && !view.waves[1].open, "{view:?}");
    assert!(s.fleet().instance("web-0").await.unwrap().status.failure.contains("on purpose"));
    for (member, before) in web.iter().zip(&before) {
        assert_eq!(&member.machine.bundle(), before, "{} was told", member.identity.instance);
    }
    // While it is stopped, another change is refused.
    let refused = declare(s.fleet(), POSTURE, RolloutPolicy::default()).await;
    assert!(matches!(refused, Err(FleetError::Wrong(_))));

    // Mended and resumed: everybody gets it, the one that failed too.
    canary.machine.broken.store(false, Ordering::SeqCst);
    s.fleet().resume_rollout(&second, &act()).await.unwrap();
    until("it is done", async || state(s.fleet(), &second).await == RolloutState::Done).await;
    s.in_sync(4).await;
    assert!(web.iter().zip(&before).all(|(m, b)| &m.machine.bundle() != b));

    // A third with return on failure: everybody who was told goes back by themselves.
    let now: Vec<_> = web.iter().map(|m| m.machine.bundle()).collect();
    web.iter().find(|m| m.identity.instance == "web-3").unwrap().machine.broken.store(true, Ordering::SeqCst);
    let policy =
        RolloutPolicy { waves: vec![WaveSpec::Count(2)], on_failure: OnFailure::Return, ..RolloutPolicy::default() };
    let third = declare(s.fleet(), &POSTURE.replace("443", "9443"), policy).await.unwrap();
    until("it returns", async || state(s.fleet(), &third).await == RolloutState::Returned).await;
    s.in_sync(4).await;
    for (member, now) in web.iter().zip(&now) {
        assert_eq!(member.machine.bundle().rules(), now.rules());
    }
    let posture = s.fleet().posture().await.unwrap();
    assert!(posture.returned_to.is_some() && posture.files.unwrap()[0].text == other);
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_let_in_once_and_certificates_open_what_is_theirs() {
    let s = story("tokens").await;
    let fleet = s.fleet();
    let token = token(fleet, "web", 1).await;
    let request = Request::new().unwrap();
    let first = enroll(&token, &facts("web-1", 1), &request, None, None).await.unwrap();
    // The answer was lost: the same machine asks again. Another machine with the same token does not get in.
    enroll(&token, &facts("web-1", 1), &request, None, None).await.unwrap();
    let stolen = enroll(&token, &facts("web-2", 2), &Request::new().unwrap(), None, None).await.unwrap_err();
    assert!(stolen.contains("does not let anybody in"), "{stolen}");
    let same_name = enroll(&token, &facts("web-1", 1), &Request::new().unwrap(), None, None).await.unwrap_err();
    assert!(same_name.contains("does not let anybody in"), "{same_name}");
    // A general token does not let a machine take the name of one that is there, nor its address.
    let general = self::token(fleet, "db", 5).await;
    let taken = enroll(&general, &facts("web-1", 7), &Request::new().unwrap(), None, None).await.unwrap_err();
    assert!(taken.contains("enrolled already"), "{taken}");
    let address = enroll(&general, &facts("db-1", 1), &Request::new().unwrap(), None, None).await.unwrap_err();
    assert!(address.contains("address of `web-1`"), "{address}");
    // A public address is left out, and said.
    let mut public = facts("db-2", 0);
    public.interfaces[0].1 = vec!["203.0.113.9".parse().unwrap(), "10.0.0.77".parse().unwrap()];
    let left_out = enroll(&general, &public, &Request::new().unwrap(), None, None).await.unwrap().left_out;
    assert_eq!(left_out, ["203.0.113.9"]);
    // Another authority than the token's is not spoken with.
    let elsewhere = Token { authority: [7; 32], ..self::token(fleet, "web", 1).await };
    assert!(enroll(&elsewhere, &facts("web-5", 5), &Request::new().unwrap(), None, None).await.is_err());

    let machine = keepwall_fleet_lab::StandIn::new("web-1", Arc::clone(&s.log));
    let member = Member { identity: first.identity, machine };
    let swarm = Swarm::start(std::slice::from_ref(&member), pace(), None).unwrap();
    // The second enrolment of the same key replaced the first certificate.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(fleet.count().connected, 0);
    swarm.stop().await;
    let lines = s.fleet().store().audit(1, 1_000).await.unwrap();
    let told = |what: &str| lines.iter().filter(|l| l.entry.contains(what)).count();
    assert!(told("refuse enrolment") >= 4 && told("revoked certificate") >= 1, "{lines:#?}");
    assert!(!lines.iter().any(|l| l.entry.contains(&token.secret)), "a secret in the audit log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_machine_is_cut_off_at_once_and_stays_out() {
    let s = story("revoke").await;
    let web = s.members("web", 1, 2).await;
    let swarm = Swarm::start(&web, pace(), None).unwrap();
    s.connected(2).await;
    s.fleet().revoke("web-0", &act()).await.unwrap();
    until("it is cut off", async || !s.fleet().instance("web-0").await.unwrap().status.connected).await;
    let again = Swarm::start(&web[..1], pace(), None).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(s.fleet().count().connected, 1);
    assert!(!s.fleet().instance("web-0").await.unwrap().enrolled);
    again.stop().await;
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_machines_name_in_a_hello_is_refused_and_noted() {
    let s = story("name").await;
    let mut web = s.members("web", 1, 2).await;
    // The certificate is web-0's; it says that it is web-1.
    let victim = web[1].identity.instance.clone();
    web[0].identity.instance = victim;
    let swarm = Swarm::start(&web[..1], pace(), None).unwrap();
    until("it is noted", async || {
        let lines = s.fleet().store().audit(1, 1_000).await.unwrap();
        lines.iter().any(|l| l.entry.contains("it calls itself `web-1`"))
    })
    .await;
    assert_eq!(s.fleet().count().connected, 0);
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_posture_that_does_not_hold_reaches_nobody() {
    let s = story("refused").await;
    let web = s.members("web", 1, 1).await;
    let swarm = Swarm::start(&web, pace(), None).unwrap();
    s.connected(1).await;
    for wrong in [
        POSTURE.replace("group:web", "group:wbe"),
        format!("{POSTURE}tests:\n  - expect: deny internet -> web-0:443\n"),
    ] {
        let Err(FleetError::Refused(report)) = declare(s.fleet(), &wrong, RolloutPolicy::default()).await else {
            panic!("declared: {wrong}")
        };
        assert!(!report.holds());
    }
    assert_eq!(s.fleet().posture().await.unwrap().revision, 0);
    assert_eq!(web[0].machine.held().generation, 0);
    // Somebody who may change db machines only may not change this one.
    let only_db = |labels: &Labels| labels.get("role").is_some_and(|role| role == "db");
    let refused =
        s.fleet().declare(change(POSTURE, RolloutPolicy::default()), Expect::Any, None, &only_db, &act()).await;
    assert_eq!(refused, Err(FleetError::NotPermitted("web-0".into())));
    swarm.stop().await;
}
