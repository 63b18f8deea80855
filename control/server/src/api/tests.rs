#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::sync::atomic::AtomicU64;

use axum::body::Bytes;
use http::Method;
use http_body_util::BodyExt as _;
use keepwall_api::operations::{Gives, Match, Right, operation, operations};
use keepwall_fleet::access::{Binding, Resource, Role};
use keepwall_store::sqlite::SqliteStore;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::auth::AuthSettings;
use crate::ca::Authority;
use crate::fleet::{FleetSettings, now_ms};
use crate::seal::Seal;

/// A server on a store of its own, with a clock that the test sets.
pub(crate) struct Bench {
    pub(crate) app: Arc<App>,
    pub(crate) now: Arc<AtomicU64>,
    router: Router,
    folder: std::path::PathBuf,
}

impl Drop for Bench {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

/// An answer, read.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Got {
    pub(crate) fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// A request to be sent.
#[derive(Clone, Default)]
pub(crate) struct Ask {
    method: Method,
    path: String,
    token: Option<String>,
    body: Option<Bytes>,
    headers: Vec<(&'static str, String)>,
    peer: Peer,
}

pub(crate) fn ask(method: &str, path: &str) -> Ask {
    let peer = Peer::Tcp("192.0.2.7:5000".parse().unwrap());
    Ask { method: method.parse().unwrap(), path: format!("/api/v1{path}"), peer, ..Ask::default() }
}

impl Ask {
    pub(crate) fn json(self, body: &Value) -> Ask {
        Ask { body: Some(Bytes::from(body.to_string())), ..self }.header("content-type", "application/json")
    }

    pub(crate) fn token(self, token: &str) -> Ask {
        Ask { token: Some(token.to_owned()), ..self }
    }

    pub(crate) fn root(self) -> Ask {
        Ask { peer: Peer::Unix { uid: 0 }, ..self }
    }

    pub(crate) fn from(self, address: &str) -> Ask {
        Ask { peer: Peer::Tcp(address.parse().unwrap()), ..self }
    }

    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Ask {
        self.headers.push((name, value.to_owned()));
        self
    }
}

const POSTURE: &str = "\
version: 1
security_groups:
  db:
    members: [{ tier: db }]
    ingress:
      - { policy: accept, protocol: tcp, ports: 5432, from: group:web }
  web: # the front
    members: [{ tier: web }]
    ingress:
      - { policy: accept, protocol: tcp, ports: 443, from: any } # customers
instances:
  web-1: { labels: { tier: web }, interfaces: { eth0: { addresses: [10.0.0.1] } } }
  db-1: { labels: { tier: db }, interfaces: { eth0: { addresses: [10.0.0.2] } } }
";

impl Bench {
    pub(crate) async fn new() -> Bench {
        Bench::with(AuthSettings::default()).await
    }

    pub(crate) async fn with(settings: AuthSettings) -> Bench {
        let folder = std::env::temp_dir().join(format!("keepwall-api-{}", hex(&random::<8>())));
        std::fs::create_dir_all(&folder).unwrap();
        let seal = Arc::new(Seal::new(&[1; 32]));
        let store = SqliteStore::open(&folder.join("store.db"), seal.audit_key()).unwrap();
        let store: Arc<dyn Store> = Arc::new(store);
        let authority = Arc::new(Authority::load(&store, &seal).await.unwrap());
        let agents = FleetSettings { agents_public: "127.0.0.1:7443".into(), public_key_pin: String::new() };
        let fleet = Fleet::start(Arc::clone(&store), authority, agents).await.unwrap();
        let now = Arc::new(AtomicU64::new(now_ms()));
        let clock = Arc::clone(&now);
        let clock = Arc::new(move || clock.load(Ordering::SeqCst));
        let auth = Arc::new(Auth::new(Arc::clone(&store), seal, settings, clock).unwrap());
        let app = Arc::new(App::new(fleet, store, auth, ApiSettings::default()));
        Bench { router: router(Arc::clone(&app)), app, now, folder }
    }

    pub(crate) fn later(&self, seconds: u64) {
        self.now.fetch_add(seconds * 1_000, Ordering::SeqCst);
    }

    /// Sends, and holds every answer against the catalogue.
    pub(crate) async fn send(&self, ask: Ask) -> Got {
        let mut request = http::Request::builder().method(ask.method.clone()).uri(&ask.path);
        for (name, value) in &ask.headers {
            request = request.header(*name, value);
        }
        if let Some(token) = &ask.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut request = request.body(Body::from(ask.body.clone().unwrap_or_default())).unwrap();
        request.extensions_mut().insert(ask.peer.clone());
        let answer = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = answer.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let got = Got {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: serde_json::from_slice(&bytes).unwrap_or_default(),
        };
        let what = format!("{} {}: {got:?}", ask.method, ask.path);
        assert!(got.status < 500, "{what}");
        if got.status >= 400 {
            assert_eq!(got.header("content-type"), "application/problem+json", "{what}");
            assert_eq!(got.body["status"], got.status, "{what}");
            assert_eq!(got.body["request_id"], got.header("x-request-id"), "{what}");
            assert!(problem::CODES.iter().any(|code| code.code == got.code() && code.status == got.status), "{what}");
        }
        if let Some(op) = op_of(&ask.method, &ask.path) {
            assert!(op.statuses().contains(&got.status), "not documented: {what}");
            if got.status == op.status {
                assert_eq!(op.etag, !got.header("etag").is_empty(), "{what}");
                assert_eq!(op.location, !got.header("location").is_empty(), "{what}");
                assert_eq!(matches!(op.gives, Gives::Nothing), got.header("content-type").is_empty(), "{what}");
            }
        }
        got
    }

    /// A key of a service account with these bindings.
    pub(crate) async fn key(&self, name: &str, bindings: &[Binding]) -> String {
        let body = json!({ "name": name, "bindings": bindings });
        let made = self.send(ask("POST", "/service-accounts").root().json(&body)).await;
        assert_eq!(made.status, 201);
        let made = self.send(ask("POST", "/api-keys").root().json(&json!({ "owner": name }))).await;
        assert_eq!(made.status, 201, "{made:?}");
        made.body["key"].as_str().unwrap().to_owned()
    }

    async fn declare(&self, text: &str) -> Got {
        let etag = self.send(ask("GET", "/posture").root()).await.header("etag").to_owned();
        let body = json!({ "files": [{ "name": "web.yaml", "text": text }], "reason": "a test" });
        self.send(ask("PUT", "/posture").root().header("if-match", &etag).json(&body)).await
    }

    /// Waits until the fleet has taken in what was declared and nothing is on its way.
    async fn settled(&self) {
        for _ in 0..200 {
            let page = self.send(ask("GET", "/rollouts?limit=1").root()).await;
            let running = page.body["items"][0]["state"] == "running";
            let revision = self.send(ask("GET", "/posture").root()).await.body["revision"].as_u64().unwrap();
            if !running && (revision == 0 || self.app.fleet.world().is_some()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("the rollout does not end");
    }

    async fn audit(&self) -> Vec<Value> {
        let mut out = Vec::new();
        let mut cursor = String::new();
        loop {
            let page = self.send(ask("GET", &format!("/audit?limit=500&cursor={cursor}")).root()).await;
            out.extend(page.body["items"].as_array().unwrap().clone());
            match page.body["next"].as_str() {
                Some(next) => cursor = next.to_owned(),
                None => return out,
            }
        }
    }
}

fn op_of(method: &Method, path: &str) -> Option<Operation> {
    let path = path.split('?').next()?.strip_prefix(keepwall_api::BASE)?;
    let parts: Vec<&str> = path.split('/').collect();
    let fits = |template: &str| {
        let own: Vec<&str> = template.split('/').collect();
        own.len() == parts.len() && own.iter().zip(&parts).all(|(own, part)| own.starts_with('{') || own == part)
    };
    let mut all: Vec<Operation> =
        operations().into_iter().filter(|op| op.method == method.as_str() && fits(op.path)).collect();
    all.sort_by_key(|op| op.path.matches('{').count());
    all.into_iter().next()
}

/// A request for an operation that gets as far as its handler.
fn sample(op: &Operation) -> Ask {
    let mut path = op.path.to_owned();
    for (name, value) in [("{direction}", "ingress"), ("{index}", "0"), ("{revision}", "1")] {
        path = path.replace(name, value);
    }
    for name in ["{name}", "{id}"] {
        path = path.replace(name, "absent");
    }
    if op.id == "explain" {
        path.push_str("?from=192.0.2.1&to=192.0.2.2&port=80");
    }
    let mut ask = ask(op.method, &path);
    if op.if_match == Match::Must {
        ask = ask.header("if-match", "\"1\"");
    }
    if op.body.is_some() { ask.json(&json!({})) } else { ask }
}

#[tokio::test]
async fn every_operation_is_refused_without_credentials_and_with_wrong_ones() {
    let bench = Bench::new().await;
    for op in operations().into_iter().filter(|op| op.right != Right::Public) {
        let got = bench.send(sample(&op)).await;
        assert_eq!((got.status, got.code()), (401, "unauthenticated"), "{}", op.id);
        assert!(got.header("www-authenticate").starts_with("Bearer"));
        for wrong in ["kws_bm9ib2R5.c2VjcmV0", "kwk_0123456789abcdef_00", "x", ""] {
            let got = bench.send(sample(&op).token(wrong)).await;
            assert_eq!(got.status, 401, "{} with {wrong}", op.id);
        }
        let stranger = Ask { peer: Peer::Unix { uid: 1_000 }, ..sample(&op) };
        assert_eq!(bench.send(stranger).await.status, 401, "{}", op.id);
    }
}

#[tokio::test]
async fn every_operation_is_refused_to_roles_that_lack_the_right() {
    let bench = Bench::new().await;
    let mut keys = Vec::new();
    for role in Role::ALL {
        keys.push((role, bench.key(role.as_str(), &[Binding::everywhere(role)]).await));
    }
    keys.push((Role::Viewer, bench.key("nobody", &[]).await));
    let mut golden = String::from("# operation: viewer operator security admin, and a key without any role\n");
    for op in operations().into_iter().filter(|op| !matches!(op.gives, Gives::Live)) {
        golden.push_str(&format!("{:<26}", op.id));
        for (_, key) in &keys {
            let got = bench.send(sample(&op).token(key)).await;
            let mark = if got.status == 403 { '-' } else { '+' };
            assert_ne!(got.status, 401, "{}", op.id);
            golden.push_str(&format!(" {mark}"));
        }
        golden.push('\n');
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/operations.golden");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &golden).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(kept, golden, "if that is meant, run the test with UPDATE=1 and read the difference");
}

#[tokio::test]
async fn refusals_have_one_form_wherever_they_come_from() {
    let bench = Bench::new().await;
    let code = |got: &Got| got.code().to_owned();
    assert_eq!(code(&bench.send(ask("GET", "/nothing")).await), "not_found");
    let got = bench.send(ask("PATCH", "/posture").root()).await;
    assert_eq!((code(&got).as_str(), got.header("allow")), ("method_not_allowed", "GET, HEAD, PUT"));
    let login = || ask("POST", "/session");
    assert_eq!(code(&bench.send(Ask { body: Some("{}".into()), ..login() }).await), "unsupported_media_type");
    let broken = Ask { body: Some("{".into()), ..login() }.header("content-type", "application/json");
    assert_eq!(code(&bench.send(broken).await), "malformed");
    assert_eq!(code(&bench.send(login().json(&json!([]))).await), "invalid");
    let unknown = json!({ "user": "a", "password": "b", "remember_me": true });
    let got = bench.send(login().json(&unknown)).await;
    assert!(code(&got) == "invalid" && got.body["detail"].as_str().unwrap().contains("remember_me"), "{got:?}");
    let large = json!({ "user": "a".repeat(300 * 1024), "password": "b" });
    assert_eq!(code(&bench.send(login().json(&large)).await), "too_large");
    assert_eq!(code(&bench.send(ask("GET", "/users?unknown=1").root()).await), "malformed");
    assert_eq!(code(&bench.send(ask("GET", "/users?limit=0").root()).await), "malformed");
    assert_eq!(code(&bench.send(ask("GET", "/users?limit=1&limit=2").root()).await), "malformed");
    assert_eq!(code(&bench.send(ask("GET", "/users?cursor=%21").root()).await), "malformed");
    assert_eq!(code(&bench.send(ask("GET", "/explain?from=a").root()).await), "malformed");
    assert_eq!(code(&bench.send(ask("GET", "/users/%ff").root()).await), "malformed");
    let unquoted = ask("PUT", "/posture").root().header("if-match", "1").json(&json!({ "files": [] }));
    assert_eq!(code(&bench.send(unquoted).await), "malformed");
    assert_eq!(
        code(&bench.send(ask("PUT", "/posture").root().json(&json!({ "files": [] }))).await),
        "precondition_required"
    );
}

#[tokio::test]
async fn an_answer_has_ids_and_keeps_browsers_out() {
    let bench = Bench::new().await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let given = ask("GET", "/openapi.json")
        .header("x-request-id", "mine-1")
        .header("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"));
    let got = bench.send(given).await;
    assert_eq!(got.header("x-request-id"), "mine-1");
    assert!(got.header("traceparent").starts_with(&format!("00-{trace}-")));
    assert!(!got.header("traceparent").contains("00f067aa0ba902b7"));
    assert_eq!(got.header("x-content-type-options"), "nosniff");
    assert_eq!(got.header("cache-control"), "no-store");
    assert!(got.headers.get("set-cookie").is_none());
    let got = bench.send(ask("GET", "/openapi.json").header("x-request-id", "a b\t<script>")).await;
    assert_eq!(got.header("x-request-id").len(), 16);
    assert_eq!(got.body["openapi"], "3.1.0");
}

#[tokio::test]
async fn a_posture_is_declared_read_changed_and_returned_to() {
    let bench = Bench::new().await;
    let none = bench.send(ask("GET", "/posture").root()).await;
    assert_eq!((none.status, none.header("etag")), (200, "\"0\""));
    let made = bench.declare(POSTURE).await;
    assert_eq!(made.status, 202, "{made:?}");
    let operation = made.header("location").to_owned();
    assert_eq!(operation, format!("/api/v1/operations/{}", made.body["rollout"].as_str().unwrap()));
    bench.settled().await;
    let done = bench.send(ask("GET", operation.strip_prefix("/api/v1").unwrap()).root()).await;
    assert_eq!((done.status, &done.body["done"]), (200, &json!(true)), "{done:?}");
    let first = bench.send(ask("GET", "/posture").root()).await;
    let body = json!({ "files": [{ "name": "web.yaml", "text": POSTURE }] });
    let stale = bench.send(ask("PUT", "/posture").root().header("if-match", "\"0\"").json(&body)).await;
    assert_eq!((stale.status, stale.code()), (412, "changed_meanwhile"));

    let refused = bench.declare("version: 1\nsecurity_groups: { web: { ingress: [{ ports: 1 }] } }\n").await;
    assert_eq!(refused.code(), "posture_refused");
    assert!(refused.body["errors"][0]["pointer"].as_str().unwrap().starts_with("web.yaml:2"), "{refused:?}");
    assert!(refused.body["report"]["problems"].is_array());

    let groups = bench.send(ask("GET", "/security-groups").root()).await;
    assert_eq!(groups.body["items"][1]["name"], "web");
    let rule = json!({ "protocol": "tcp", "ports": ["80"], "peers": ["any"] });
    let added = bench.send(ask("POST", "/security-groups/web/ingress?reason=plain").root().json(&rule)).await;
    assert_eq!(added.status, 202, "{added:?}");
    bench.settled().await;
    let file = bench.send(ask("GET", "/posture/files/web.yaml").root()).await;
    assert!(file.body["text"].as_str().unwrap().contains("# customers"));
    let group = bench.send(ask("GET", "/security-groups/web").root()).await;
    assert_eq!(group.body["spec"]["ingress"].as_array().unwrap().len(), 2);
    let by_hand = bench.send(ask("PUT", "/security-groups/web").root().json(&json!({}))).await;
    assert_eq!(by_hand.code(), "hand_written");
    assert!(by_hand.body["detail"].as_str().unwrap().contains("web.yaml, line 7"), "{by_hand:?}");
    let list = json!({ "family": "ipv4", "max_entries": 5, "entries": ["203.0.113.0/24"] });
    let put = bench.send(ask("PUT", "/prefix-lists/office").root().json(&list)).await;
    assert_eq!(put.status, 202, "{put:?}");
    bench.settled().await;
    let office = bench.send(ask("GET", "/prefix-lists/office").root()).await;
    assert_eq!(office.body["managed"], true);
    assert_eq!(bench.send(ask("GET", "/posture/files/api%2Fprefix-lists%2Foffice.yaml").root()).await.status, 200);
    assert_eq!(bench.send(ask("DELETE", "/prefix-lists/office").root()).await.status, 202);
    bench.settled().await;
    assert_eq!(bench.send(ask("GET", "/prefix-lists/office").root()).await.status, 404);

    let reach = bench.send(ask("GET", "/reach?from=internet&to=web-1").root()).await;
    assert_eq!(reach.body["items"][0]["on"], json!(["tcp 443", "tcp 80"]), "{reach:?}");
    let why = bench.send(ask("GET", "/explain?from=web-1&to=db-1&port=5432").root()).await;
    assert_eq!(why.body["items"][0]["allowed"], true, "{why:?}");
    let why = bench.send(ask("GET", "/explain?from=198.51.100.1&to=db-1&port=5432").root()).await;
    assert_eq!(why.body["items"][0]["allowed"], false);
    assert_eq!(bench.send(ask("GET", "/explain?from=web-2&to=db-1&port=1").root()).await.code(), "invalid");

    let back = format!("/posture/history/{}/return", first.body["revision"]);
    let back = bench.send(ask("POST", &back).root().json(&json!({ "reason": "calm" }))).await;
    assert_eq!(back.status, 202, "{back:?}");
    bench.settled().await;
    let now = bench.send(ask("GET", "/posture").root()).await;
    assert_eq!(now.body["returned_to"], first.body["revision"]);
    assert_eq!(now.body["files"], first.body["files"]);
    let history = bench.send(ask("GET", "/posture/history?limit=2").root()).await;
    assert!(history.body["next"].is_string() && history.body["items"][0].get("files").is_none(), "{history:?}");
}

#[tokio::test]
async fn the_same_key_does_the_same_request_once_and_no_other() {
    let bench = Bench::new().await;
    let etag = "\"0\"";
    let body = json!({ "files": [{ "name": "web.yaml", "text": POSTURE }] });
    let put = || ask("PUT", "/posture").root().header("if-match", etag).header("idempotency-key", "once-1");
    let first = bench.send(put().json(&body)).await;
    let again = bench.send(put().json(&body)).await;
    assert_eq!((first.status, again.status), (202, 202), "{again:?}");
    assert_eq!((&first.body, first.header("location")), (&again.body, again.header("location")));
    let other = json!({ "files": [{ "name": "other.yaml", "text": POSTURE }] });
    assert_eq!(bench.send(put().json(&other)).await.code(), "idempotency_key_reused");

    let user = json!({ "name": "alice", "password": "correct horse battery" });
    let make = || ask("POST", "/users").root().header("idempotency-key", "once-2").json(&user);
    let (first, again) = (bench.send(make()).await, bench.send(make()).await);
    assert_eq!((first.status, &first.body), (201, &again.body));
    assert_eq!(first.header("location"), again.header("location"));
    let twice = bench.send(ask("POST", "/users").root().json(&user)).await;
    assert_eq!((twice.status, twice.code()), (409, "exists"));

    let key = || ask("POST", "/api-keys").root().header("idempotency-key", "once-3").json(&json!({ "owner": "alice" }));
    let (first, again) = (bench.send(key()).await, bench.send(key()).await);
    assert_eq!((first.status, &first.body), (201, &again.body));
    let keys = bench.send(ask("GET", "/api-keys?all=true").root()).await;
    assert_eq!(keys.body["items"].as_array().unwrap().len(), 1);
    // Keys of different actors never meet.
    let admin = bench.key("robot", &[Binding::everywhere(Role::Admin)]).await;
    let theirs = json!({ "name": "bob", "password": "correct horse battery" });
    let theirs = ask("POST", "/users").token(&admin).header("idempotency-key", "once-2").json(&theirs);
    assert_eq!(bench.send(theirs).await.status, 201);
}

#[tokio::test]
async fn every_write_leaves_a_line_and_no_line_has_a_secret() {
    let bench = Bench::new().await;
    let password = "correct horse battery";
    let writes = [
        ("POST", "/users", json!({ "name": "alice", "password": password }), "create", "user/alice"),
        ("PATCH", "/users/alice", json!({ "bindings": [{ "role": "admin" }] }), "change", "user/alice"),
        ("DELETE", "/users/alice/sessions", json!(null), "end sessions", "user/alice"),
        ("POST", "/service-accounts", json!({ "name": "robot" }), "create", "user/robot"),
        ("PATCH", "/service-accounts/robot", json!({ "disabled": true }), "change", "user/robot"),
        ("DELETE", "/service-accounts/robot", json!(null), "delete", "user/robot"),
        ("POST", "/api-keys", json!({ "owner": "alice" }), "create", "key/"),
        ("POST", "/enrolment-tokens", json!({ "labels": { "tier": "web" } }), "", ""),
    ];
    let mut secrets = vec![password.to_owned()];
    for (method, path, body, action, target) in writes {
        let before = bench.audit().await.len();
        let request = ask(method, path).root().header("x-request-id", "request-7");
        let request = if body.is_null() { request } else { request.json(&body) };
        let got = bench.send(request).await;
        assert!(got.status < 300, "{path}: {got:?}");
        for secret in ["key", "token"] {
            secrets.extend(got.body[secret].as_str().map(|text| text.rsplit('_').next().unwrap().to_owned()));
        }
        let lines = bench.audit().await;
        assert_eq!(lines.len(), before + 1, "{method} {path}");
        let entry = &lines[before]["entry"];
        assert_eq!(entry["actor"], "local:root");
        assert_eq!((&entry["address"], &entry["request"]), (&json!("unix:0"), &json!("request-7")));
        if !action.is_empty() {
            assert_eq!(entry["action"], action);
            assert!(entry["target"].as_str().unwrap().starts_with(target), "{entry}");
        }
    }
    bench.declare(POSTURE).await;
    let lines = bench.audit().await;
    // The rollout's own steps may follow it by now.
    assert!(lines.iter().any(|line| line["entry"]["action"] == "declare"));
    let text = json!(lines).to_string();
    for secret in secrets {
        assert!(!text.contains(&secret), "{secret} is in the audit log");
    }
    let verdict = bench.send(ask("GET", "/audit/verify").root()).await;
    assert_eq!(verdict.body["holds"], true, "{verdict:?}");
}

#[tokio::test]
async fn refusals_are_in_the_audit_log_but_cannot_fill_it() {
    let bench = Bench::new().await;
    let viewer = bench.key("viewer", &[Binding::everywhere(Role::Viewer)]).await;
    let before = bench.audit().await.len();
    bench.send(ask("GET", "/audit").token(&viewer)).await;
    let lines = bench.audit().await;
    assert_eq!(lines.len(), before + 1);
    assert_eq!(lines[before]["entry"]["action"], "denied: list_audit");
    assert!(lines[before]["entry"]["actor"].as_str().unwrap().starts_with("service:viewer/key:"), "{lines:?}");
    for _ in 0..200 {
        bench.send(ask("GET", "/users").token("kwk_0123456789abcdef_00")).await;
    }
    assert_eq!(bench.audit().await.len(), before + 60);
    bench.later(60);
    bench.send(ask("GET", "/users").token("stolen")).await;
    let lines = bench.audit().await;
    assert_eq!(lines.last().unwrap()["entry"]["after"]["left_out_before"], 141);
    // Who has no credentials at all is no event.
    bench.send(ask("GET", "/users")).await;
    assert_eq!(bench.audit().await.len(), lines.len());
}

#[tokio::test]
async fn a_login_that_fails_is_noted_with_the_name_that_was_tried() {
    let bench = Bench::new().await;
    for user in ["alice", "\u{1b}[2J\u{202e}", &"x".repeat(300)] {
        let body = json!({ "user": user, "password": "a secret that is wrong" });
        assert_eq!(bench.send(ask("POST", "/session").json(&body)).await.status, 401);
    }
    let lines = bench.audit().await;
    let noted = |n: usize| lines[lines.len() - 3 + n]["entry"]["after"]["user"].as_str().unwrap().to_owned();
    assert_eq!([noted(0), noted(1)], ["alice", "\\u{1b}[2J\\u{202e}"]);
    assert_eq!(noted(2), "x".repeat(64));
    assert!(!json!(lines).to_string().contains("a secret"), "a password in the audit log");
}

#[tokio::test]
async fn a_scope_narrows_what_is_seen_and_changed() {
    let bench = Bench::new().await;
    assert_eq!(bench.declare(POSTURE).await.status, 202);
    bench.settled().await;
    let scope = |role| Binding { role, scope: [("tier".to_owned(), "web".to_owned())].into() };
    let viewer = bench.key("viewer", &[scope(Role::Viewer)]).await;
    let page = bench.send(ask("GET", "/instances").token(&viewer)).await;
    let names: Vec<&str> = page.body["items"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["web-1"]);
    assert_eq!(bench.send(ask("GET", "/instances/web-1").token(&viewer)).await.status, 200);
    let hidden = bench.send(ask("GET", "/instances/db-1").token(&viewer)).await;
    let missing = bench.send(ask("GET", "/instances/db-2").token(&viewer)).await;
    assert_eq!((hidden.status, hidden.code()), (missing.status, missing.code()));
    assert_eq!(bench.send(ask("GET", "/instances/db-1/intent").token(&viewer)).await.status, 404);

    let operator = bench.key("operator", &[scope(Role::Operator)]).await;
    let token = |labels: Value| ask("POST", "/enrolment-tokens").token(&operator).json(&json!({ "labels": labels }));
    assert_eq!(bench.send(token(json!({ "tier": "db" }))).await.status, 403);
    let made = bench.send(token(json!({ "tier": "web" }))).await;
    assert_eq!(made.status, 201, "{made:?}");

    let security = bench.key("security", &[scope(Role::Security)]).await;
    let rule = json!({ "protocol": "tcp", "ports": ["81"], "peers": ["any"] });
    let change = |group: &str| ask("POST", &format!("/security-groups/{group}/ingress")).token(&security).json(&rule);
    let refused = bench.send(change("db")).await;
    assert_eq!((refused.status, refused.code()), (403, "forbidden"), "{refused:?}");
    assert!(refused.body["detail"].as_str().unwrap().contains("db-1"));
    let changed = bench.send(change("web")).await;
    assert_eq!(changed.status, 202, "{changed:?}");
}

#[tokio::test]
async fn the_local_root_is_admin_and_nobody_else_on_the_socket_is() {
    let bench = Bench::new().await;
    let me = bench.send(ask("GET", "/session").root()).await;
    assert_eq!((&me.body["actor"], &me.body["bindings"][0]["role"]), (&json!("local:root"), &json!("admin")));
    assert_eq!(bench.send(ask("GET", "/session")).await.status, 401);
}

#[tokio::test]
async fn live_events_begin_at_once_and_are_bounded() {
    let bench = Bench::new().await;
    let request = || {
        let mut request = http::Request::get("/api/v1/events/live").body(Body::empty()).unwrap();
        request.extensions_mut().insert(Peer::Unix { uid: 0 });
        request
    };
    let answer = bench.router.clone().oneshot(request()).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut body = answer.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, Bytes::from_static(b": watching\n\n"));
    let _all = Arc::clone(&bench.app.watchers).try_acquire_many_owned(255).unwrap();
    let refused = bench.router.clone().oneshot(request()).await.unwrap();
    assert_eq!(refused.status(), 429);
    drop(body);
    assert_eq!(bench.router.clone().oneshot(request()).await.unwrap().status(), 200);
}

/// Serves on a local socket, as root, and on TCP.
async fn served(bench: &Bench) -> (std::path::PathBuf, std::net::SocketAddr) {
    let path = bench.folder.join("api.sock");
    let unix = tokio::net::UnixListener::bind(&path).unwrap();
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let (router, other) = (bench.router.clone(), bench.router.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = unix.accept().await {
            tokio::spawn(serve_connection(stream, router.clone(), Peer::Unix { uid: 0 }));
        }
    });
    tokio::spawn(async move {
        while let Ok((stream, peer)) = tcp.accept().await {
            tokio::spawn(serve_connection(stream, other.clone(), Peer::Tcp(peer)));
        }
    });
    (path, address)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_says_what_the_server_understands() {
    use keepwall_api::{Login, NewUser, PostureChange, PostureFile, RuleSpec, Secret};
    use keepwall_client::{Client, Error, ExplainQuery, ListInstancesQuery, LiveQuery, Settings};

    let bench = Bench::new().await;
    let (path, address) = served(&bench).await;
    let work = move || {
        let root = Client::new(Settings::new(&format!("unix:{}", path.display()))).unwrap();
        assert_eq!(root.me().unwrap().actor, "local:root");
        let before = root.get_posture().unwrap();
        let files = vec![PostureFile { name: "a/web.yaml".into(), text: POSTURE.into() }];
        let change = PostureChange { files, reason: "first".into(), rollout: Default::default() };
        let accepted = root.put_posture(&change, before.etag.unwrap()).unwrap();
        while !root.get_operation(&accepted.rollout).unwrap().done {
            std::thread::sleep(Duration::from_millis(20));
        }
        let stale = root.put_posture(&change, 0).unwrap_err();
        assert_eq!(stale.code(), Some("changed_meanwhile"));
        assert!(stale.help().contains("new ETag"));
        assert_eq!(root.get_file("a/web.yaml").unwrap().text, POSTURE);
        let list = ListInstancesQuery { labels: Some("tier=web".into()), ..Default::default() };
        assert_eq!(root.list_instances(&list).unwrap().items[0].name, "web-1");
        let question = ExplainQuery { from: "web-1".into(), to: "db-1".into(), port: Some(5432), ..Default::default() };
        assert!(root.explain(&question).unwrap().items[0].allowed);
        let missing = root.get_security_group("none at all").unwrap_err();
        assert_eq!(missing.code(), Some("not_found"));

        let mut live = root.live(&LiveQuery::default()).unwrap();
        let rule: RuleSpec =
            serde_json::from_value(json!({ "protocol": "tcp", "ports": ["80"], "peers": ["any"] })).unwrap();
        let why = keepwall_client::AddRuleQuery { reason: Some("plain & simple".into()) };
        root.add_rule("web", "ingress", &why, &rule, None).unwrap();
        let event = live.next().unwrap().unwrap();
        assert!(matches!(event.kind.as_str(), "posture" | "rollout" | "instance"), "{event:?}");
        drop(live);

        let password = Secret("correct horse battery".into());
        let alice = NewUser { name: "alice".into(), password: password.clone(), bindings: Vec::new() };
        root.create_user(&alice).unwrap();
        let anybody = Client::new(Settings::new(&format!("http://{address}"))).unwrap();
        assert_eq!(anybody.me().unwrap_err().code(), Some("unauthenticated"));
        let made = anybody.login(&Login { user: "alice".into(), password, code: None }).unwrap();
        let settings = Settings { token: Some(made.token), ..Settings::new(&format!("http://{address}")) };
        let own = Client::new(settings).unwrap();
        assert_eq!(own.me().unwrap().user, "alice");
        own.logout().unwrap();
        assert_eq!(own.me().unwrap_err().code(), Some("unauthenticated"));
        let nobody = Client::new(Settings::new("unix:/nowhere/api.sock")).unwrap();
        assert!(matches!(nobody.me(), Err(Error::Unreachable(_))));
    };
    tokio::task::spawn_blocking(work).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_believes_the_server_that_was_meant_and_no_other() {
    use keepwall_client::{Client, Error, Settings, Trust};

    let bench = Bench::new().await;
    let authority = Arc::clone(bench.app.fleet.authority());
    let (chain, key) = authority.server(&["127.0.0.1".to_owned()]).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = bench.router.clone();
    tokio::spawn(async move {
        while let Ok((stream, peer)) = listener.accept().await {
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            tokio::spawn(serve_connection(stream, router.clone(), Peer::Tcp(peer)));
        }
    });
    let work = move || {
        let ask = |host: &str, trust| {
            let settings = Settings { trust, ..Settings::new(&format!("https://{host}:{port}")) };
            Client::new(settings).unwrap().me().unwrap_err()
        };
        for good in [Trust::Pinned(authority.digest()), Trust::Pem(authority.pem().to_owned())] {
            assert_eq!(ask("127.0.0.1", good).code(), Some("unauthenticated"));
        }
        let pinned = Trust::Pinned(authority.digest());
        for bad in [ask("127.0.0.1", Trust::Pinned([0; 32])), ask("localhost", pinned)] {
            assert!(matches!(bad, Error::Unreachable(_)), "{bad:?}");
        }
    };
    tokio::task::spawn_blocking(work).await.unwrap();
}

#[tokio::test]
async fn a_connection_has_bounds() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let bench = Bench::new().await;
    let (_, address) = served(&bench).await;
    let say = async |text: String| {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.ok();
        let mut answer = vec![0; 4_096];
        let read = stream.read(&mut answer).await.unwrap_or(0);
        String::from_utf8_lossy(&answer[..read]).lines().next().unwrap_or_default().to_owned()
    };
    let many: String = (0..80).map(|n| format!("x-{n}: 1\r\n")).collect();
    assert!(say(format!("GET /api/v1/session HTTP/1.1\r\nhost: a\r\n{many}\r\n")).await.contains(" 431 "));
    let long = "a".repeat(64 * 1024);
    let answer = say(format!("GET /api/v1/session HTTP/1.1\r\nhost: a\r\nx: {long}\r\n\r\n")).await;
    assert!(answer.contains(" 431 ") || answer.is_empty(), "{answer}");
    assert!(say("GET /api/v1/session HTTP/1.1\r\nhost: a\r\n\r\n".into()).await.contains(" 401 "));
}

#[test]
fn the_first_refusals_of_a_minute_are_noted_and_the_rest_counted() {
    let denials = Denials::default();
    let noted = (0..10).filter(|_| denials.take(0, 3).0).count();
    assert_eq!(noted, 3);
    assert_eq!(denials.take(60_000, 3), (true, 7));
    assert_eq!(denials.take(60_000, 3), (true, 0));
}

#[test]
fn only_valid_traces_are_followed() {
    let trace = |text: &str| {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", text.parse().unwrap());
        trace_id(&headers)
    };
    let id = "4bf92f3577b34da6a3ce929d0e0e4736";
    assert_eq!(trace(&format!("00-{id}-00f067aa0ba902b7-01")).as_deref(), Some(id));
    for bad in ["", "00-0-0-0", "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"] {
        assert_eq!(trace(bad), None);
    }
    assert_eq!(trace(&format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32))), None);
}

#[test]
fn a_right_to_something_of_the_catalogue_exists() {
    for op in operations() {
        if let Right::To(resource, action) = op.right {
            let known = keepwall_fleet::access::RIGHTS.iter().any(|right| (right.0, right.1) == (resource, action));
            assert!(known, "{}", op.id);
        }
    }
    assert_eq!(operation("list_users").unwrap().right, Right::To(Resource::User, keepwall_fleet::access::Action::Read));
}
