//! A server and a handful of instances, in one process, over real TLS on loopback.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keepwall_api::fleet::{
    InstanceChange, Labels, OnFailure, PostureChange, PostureFile, RolloutPolicy, RolloutState, TokenSpec, WaveSpec,
};
use keepwall_fleet_lab::swarm::{Member, Swarm, enrol, facts};
use keepwall_fleet_lab::{Log, Scratch, config};
use keepwall_server::fleet::{Act, Admission, Enroll, EnrollInterface, Fleet, FleetError};
use keepwall_server::run::Running;
use keepwall_store::{Commit, Expect, Op};
use keepwall_uplink::enroll::enroll;
use keepwall_uplink::identity::Request;
use keepwall_uplink::token::Token;
use keepwall_uplink::{Identity, Pace, Uplink};

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
async fn a_machine_that_asks_twice_at_once_is_not_told_that_its_token_is_used_up() {
    let s = story("twice").await;
    // Few: refusals are counted for all servers of a process, and the audit log takes 120 a minute.
    for n in 0..8 {
        let token = token(s.fleet(), "web", 1).await;
        let ask = Enroll {
            token: token.secret,
            request: STANDARD.encode(Request::new().unwrap().der().unwrap()),
            hostname: format!("web-{n}"),
            interfaces: vec![EnrollInterface { device: "eth0".into(), addresses: Vec::new() }],
            version: String::new(),
        };
        let all = (0..4).map(|_| {
            let (fleet, ask) = (Arc::clone(s.fleet()), ask.clone());
            tokio::spawn(async move { fleet.enroll(&ask, "192.0.2.1").await })
        });
        let mut came = 0;
        for one in all.collect::<Vec<_>>() {
            match one.await.unwrap() {
                Ok(_) => came += 1,
                Err(Admission::Later(_)) => {}
                Err(refused) => panic!("{refused:?}"),
            }
        }
        assert!(came > 0);
        let view = s.fleet().tokens(None, 100).await.unwrap();
        assert!(view.iter().all(|token| token.used_by.len() == 1), "{view:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_a_spent_token_nor_a_name_brings_back_what_was_revoked() {
    let s = story("spent").await;
    let fleet = s.fleet();
    let (spent, request) = (token(fleet, "db", 1).await, Request::new().unwrap());
    enroll(&spent, &facts("db-1", 1), &request, None, None).await.unwrap();
    // It asks again after somebody changed its labels: they stay.
    let change = InstanceChange { labels: Some(labels("web")), interfaces: None };
    fleet.change_instance("db-1", change, Expect::Any, &act()).await.unwrap();
    enroll(&spent, &facts("db-1", 1), &request, None, None).await.unwrap();
    assert_eq!(fleet.instance("db-1").await.unwrap().labels, labels("web"));
    fleet.revoke("db-1", &act()).await.unwrap();
    let again = enroll(&spent, &facts("db-1", 1), &request, None, None).await.unwrap_err();
    assert!(again.contains("does not let anybody in"), "{again}");
    // A stranger with a token without labels calls itself so: it gets the name, and none of what it stood for.
    let general = fleet.make_token(TokenSpec::default(), &act()).await.unwrap().token.parse().unwrap();
    enroll(&general, &facts("db-1", 2), &Request::new().unwrap(), None, None).await.unwrap();
    assert_eq!(fleet.instance("db-1").await.unwrap().labels, Labels::new());
    // By a token for its name, a machine keeps its labels.
    let change = InstanceChange { labels: Some(labels("db")), interfaces: None };
    fleet.change_instance("db-1", change, Expect::Any, &act()).await.unwrap();
    let named = TokenSpec { instance: Some("db-1".into()), ..TokenSpec::default() };
    let named = fleet.make_token(named, &act()).await.unwrap().token.parse().unwrap();
    enroll(&named, &facts("whatever", 3), &Request::new().unwrap(), None, None).await.unwrap();
    assert_eq!(fleet.instance("db-1").await.unwrap().labels, labels("db"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_has_expired_opens_nothing_and_is_noted() {
    let s = story("expired").await;
    let web = s.members("web", 1, 2).await;
    let noted = async |what: &str| {
        let lines = s.fleet().store().audit(1, 1_000).await.unwrap();
        lines.iter().any(|l| l.entry.contains(what))
    };
    // By its own date.
    let (authority, request) = (s.fleet().authority(), Request::new().unwrap());
    let issued = authority.issue_for("web-0", &request.der().unwrap(), Duration::ZERO).unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let identity = web[0].identity.renewed(&issued.certificate, &request.key());
    let old = Member { identity, machine: web[0].machine.clone() };
    let swarm = Swarm::start(&[old], pace(), None).unwrap();
    until("its date is noted", async || noted("its certificate does not hold").await).await;
    assert_eq!(s.fleet().count().connected, 0);
    swarm.stop().await;
    // By the record alone: a resumed TLS session does not look at the date.
    let found = s.fleet().store().get("instance", "web-1").await.unwrap().unwrap();
    let mut record: serde_json::Value = found.read().unwrap();
    record["certificates"][0]["until_ms"] = 1.into();
    let ops = vec![Op::put("instance", "web-1", Expect::Revision(found.revision), &record)];
    s.fleet().store().commit(Commit { ops, ..Commit::default() }).await.unwrap();
    until("the server knows", async || !s.fleet().instance("web-1").await.unwrap().enrolled).await;
    let swarm = Swarm::start(&web[1..], pace(), None).unwrap();
    until("its end is noted", async || noted("expired certificate").await).await;
    assert_eq!(s.fleet().count().connected, 0);
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_before_it_ends() {
    const LIFE: Duration = Duration::from_secs(6);
    let s = story("renew").await;
    let web = s.members("web", 1, 1).await;
    let request = Request::new().unwrap();
    let issued = s.fleet().authority().issue_for("web-0", &request.der().unwrap(), LIFE).unwrap();
    let ends = Instant::now() + LIFE;
    let found = s.fleet().store().get("instance", "web-0").await.unwrap().unwrap();
    let mut record: serde_json::Value = found.read().unwrap();
    let digest = keepwall_server::ca::digest(&issued.certificate);
    record["certificates"][0]["sha256"] = keepwall_core::hex(&digest).into();
    let ops = vec![Op::put("instance", "web-0", Expect::Revision(found.revision), &record)];
    s.fleet().store().commit(Commit { ops, ..Commit::default() }).await.unwrap();

    let kept = Scratch::new("renew-identity").unwrap();
    let short = web[0].identity.renewed(&issued.certificate, &request.key());
    let uplink = Uplink::new(web[0].machine.clone(), short.clone(), Some(kept.path().to_owned()), pace()).unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let running = tokio::spawn(uplink.run(stopped));
    until("the renewed certificate is kept", async || Identity::load(kept.path()).is_ok()).await;
    assert!(Instant::now() < ends, "it was renewed too late");
    stop.send(true).unwrap();
    running.await.unwrap();
    // With the old one nobody gets in any more; with the new one the machine does.
    let renewed = Identity::load(kept.path()).unwrap();
    assert!(renewed.life().unwrap().1 > short.life().unwrap().1);
    tokio::time::sleep_until((ends + Duration::from_secs(2)).into()).await;
    let swarm = Swarm::start(&[Member { identity: renewed, machine: web[0].machine.clone() }], pace(), None).unwrap();
    s.connected(1).await;
    swarm.stop().await;
    let lines = s.fleet().store().audit(1, 1_000).await.unwrap();
    assert!(lines.iter().any(|l| l.entry.contains("\"action\":\"renew\"")));
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
