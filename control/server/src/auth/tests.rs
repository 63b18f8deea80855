#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use keepwall_fleet::access::{Binding, Role};
use keepwall_store::{Commit, Expect, Op};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};

use super::oidc::{OidcConfig, RoleOf};
use super::{AuthSettings, totp};
use crate::api::tests::{Ask, Bench, Got, ask};
use crate::fleet::now_ms;

const PASSWORD: &str = "correct horse battery";

async fn with_alice() -> Bench {
    let bench = Bench::new().await;
    let alice = json!({ "name": "alice", "password": PASSWORD, "bindings": [{ "role": "viewer" }] });
    assert_eq!(bench.send(ask("POST", "/users").root().json(&alice)).await.status, 201);
    bench
}

fn login(user: &str, password: &str) -> Ask {
    ask("POST", "/session").json(&json!({ "user": user, "password": password }))
}

fn token(got: &Got) -> String {
    assert_eq!(got.status, 201, "{got:?}");
    got.body["token"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_session_begins_with_a_password_and_ends_with_logout() {
    let bench = with_alice().await;
    let token = token(&bench.send(login("alice", PASSWORD)).await);
    let me = bench.send(ask("GET", "/session").token(&token)).await;
    assert_eq!((&me.body["actor"], &me.body["totp"]), (&json!("user:alice"), &json!(false)));
    assert_eq!(bench.send(ask("GET", "/instances").token(&token)).await.status, 200);
    assert_eq!(bench.send(ask("GET", "/users").token(&token)).await.status, 403);
    assert_eq!(bench.send(ask("DELETE", "/session").token(&token)).await.status, 204);
    assert_eq!(bench.send(ask("GET", "/session").token(&token)).await.status, 401);
}

#[tokio::test]
async fn what_is_wrong_at_the_login_is_not_said() {
    let bench = with_alice().await;
    bench.key("robot", &[Binding::everywhere(Role::Admin)]).await;
    let wrong = bench.send(login("alice", "wrong horse battery").from("192.0.2.1:1")).await;
    let unknown = bench.send(login("nobody", "wrong horse battery").from("192.0.2.2:1")).await;
    let service = bench.send(login("robot", "wrong horse battery").from("192.0.2.3:1")).await;
    let strange = bench.send(login("\u{0}/../x", PASSWORD).from("192.0.2.4:1")).await;
    let mut bodies = [wrong, unknown, service, strange].map(|got| {
        assert_eq!((got.status, got.code()), (401, "login_failed"));
        got.body
    });
    for body in &mut bodies {
        body["request_id"] = json!("");
    }
    assert!(bodies.windows(2).all(|two| two[0] == two[1]));
}

#[tokio::test]
async fn sessions_end_when_idle_when_old_and_when_their_user_changes() {
    let bench = with_alice().await;
    let alive = async |token: &str| bench.send(ask("GET", "/session").token(token)).await.status == 200;
    let idle = token(&bench.send(login("alice", PASSWORD)).await);
    bench.later(3_599);
    assert!(alive(&idle).await);
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    bench.later(3_599);
    assert!(alive(&idle).await, "use was not written down");
    bench.later(3_601);
    assert!(!alive(&idle).await);

    let old = token(&bench.send(login("alice", PASSWORD)).await);
    for _ in 0..12 {
        bench.later(3_500);
        alive(&old).await;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    bench.later(1_300);
    assert!(!alive(&old).await);

    for change in [json!({ "disabled": true }), json!({ "disabled": false, "password": "another horse battery" })] {
        let before = token(&bench.send(login("alice", PASSWORD)).await);
        assert!(alive(&before).await);
        assert_eq!(bench.send(ask("PATCH", "/users/alice").root().json(&change)).await.status, 200);
        assert!(!alive(&before).await);
        let back = json!({ "disabled": false, "password": PASSWORD });
        assert_eq!(bench.send(ask("PATCH", "/users/alice").root().json(&back)).await.status, 200);
    }
    let gone = token(&bench.send(login("alice", PASSWORD)).await);
    assert_eq!(bench.send(ask("DELETE", "/users/alice").root()).await.status, 204);
    assert!(!alive(&gone).await);
}

#[tokio::test]
async fn a_user_has_a_bounded_number_of_sessions() {
    let bench = with_alice().await;
    let mut tokens = Vec::new();
    for _ in 0..22 {
        bench.later(1);
        tokens.push(token(&bench.send(login("alice", PASSWORD)).await));
    }
    let mut alive = Vec::new();
    for token in &tokens {
        alive.push(bench.send(ask("GET", "/session").token(token)).await.status == 200);
    }
    assert_eq!(alive.iter().filter(|alive| **alive).count(), 20);
    assert!(!alive[0] && !alive[1], "the oldest go first");
}

#[tokio::test]
async fn guessing_is_slowed_down_and_a_good_login_ends_it() {
    let bench = with_alice().await;
    for _ in 0..6 {
        assert_eq!(bench.send(login("alice", "wrong horse battery")).await.status, 401);
    }
    let slowed = bench.send(login("alice", PASSWORD)).await;
    assert_eq!((slowed.status, slowed.code()), (429, "throttled"));
    assert_eq!(slowed.headers["retry-after"], "1");
    bench.later(2);
    assert_eq!(bench.send(login("alice", PASSWORD)).await.status, 201);
    assert_eq!(bench.send(login("alice", PASSWORD)).await.status, 201);
}

#[tokio::test]
async fn codes_are_asked_for_once_one_was_verified_and_each_works_once() {
    let bench = with_alice().await;
    let session = token(&bench.send(login("alice", PASSWORD)).await);
    let enrol = ask("POST", "/session/totp").token(&session);
    assert_eq!(bench.send(enrol.clone().json(&json!({ "password": "wrong" }))).await.status, 401);
    let made = bench.send(enrol.json(&json!({ "password": PASSWORD }))).await;
    assert_eq!(made.status, 200, "{made:?}");
    let secret = made.body["secret"].as_str().unwrap().to_owned();
    // Not verified yet, so not asked for yet.
    assert_eq!(bench.send(login("alice", PASSWORD)).await.status, 201);
    let code = || totp::code(&secret, bench.app.auth.now_ms()).unwrap();
    let verify = ask("PUT", "/session/totp").token(&session);
    let used = code();
    assert_eq!(bench.send(verify.json(&json!({ "code": used }))).await.status, 204);
    let with =
        |code: &str| ask("POST", "/session").json(&json!({ "user": "alice", "password": PASSWORD, "code": code }));
    assert_eq!(bench.send(login("alice", PASSWORD)).await.code(), "login_failed");
    assert_eq!(bench.send(with(&used)).await.code(), "login_failed", "it was used to verify");
    bench.later(30);
    let next = code();
    assert_eq!(bench.send(with(&next)).await.status, 201);
    assert_eq!(bench.send(with(&next)).await.code(), "login_failed", "it was used to log in");
    bench.later(30);
    let forgotten = bench.send(ask("PATCH", "/users/alice").root().json(&json!({ "forget_totp": true }))).await;
    assert_eq!(forgotten.body["totp"], false);
    assert_eq!(bench.send(login("alice", PASSWORD)).await.status, 201);
    let stored = bench.app.store.get("user", "alice").await.unwrap().unwrap().body;
    assert!(!stored.contains(&secret) && !stored.contains(PASSWORD));
}

#[tokio::test]
async fn a_key_may_what_both_it_and_its_owner_may_until_either_ends() {
    let bench = with_alice().await;
    let session = token(&bench.send(login("alice", PASSWORD)).await);
    let make = |body: Value| ask("POST", "/api-keys").token(&session).json(&body);
    let narrowed = bench.send(make(json!({ "bindings": [{ "role": "admin" }], "ttl_s": 600, "note": "ci" }))).await;
    assert_eq!(narrowed.status, 201, "{narrowed:?}");
    let key = narrowed.body["key"].as_str().unwrap().to_owned();
    let id = narrowed.body["id"].as_str().unwrap().to_owned();
    assert_eq!(bench.send(ask("GET", "/users").token(&key)).await.status, 403, "its owner is no admin");
    assert_eq!(bench.send(ask("GET", "/instances").token(&key)).await.status, 200);
    let little = bench.send(make(json!({ "bindings": [] }))).await.body["key"].as_str().unwrap().to_owned();
    assert_eq!(bench.send(ask("GET", "/instances").token(&little)).await.status, 403);
    let of_another = bench.send(make(json!({ "owner": "robot" }))).await;
    assert_eq!(of_another.status, 403);
    let by_key = ask("POST", "/api-keys").token(&key).json(&json!({}));
    assert_eq!(bench.send(by_key).await.status, 403, "a key makes no keys");
    let password = ask("POST", "/session/password").token(&key);
    let password = password.json(&json!({ "current": PASSWORD, "new": "another horse battery" }));
    assert_eq!(bench.send(password).await.status, 403);
    let mut forged = key.clone();
    forged.pop();
    assert_eq!(bench.send(ask("GET", "/session").token(&forged)).await.status, 401);
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    let view = bench.send(ask("GET", &format!("/api-keys/{id}")).token(&session)).await;
    assert!(view.body["last_used"].is_string() && view.body.get("hash").is_none(), "{view:?}");
    let robot = bench.key("robot", &[Binding::everywhere(Role::Viewer)]).await;
    assert_eq!(bench.send(ask("GET", &format!("/api-keys/{id}")).token(&robot)).await.status, 404);
    bench.later(601);
    assert_eq!(bench.send(ask("GET", "/session").token(&key)).await.status, 401);
    assert_eq!(bench.send(ask("DELETE", &format!("/api-keys/{id}")).token(&session)).await.status, 204);
    assert_eq!(bench.send(ask("GET", &format!("/api-keys/{id}")).token(&session)).await.status, 404);
}

#[tokio::test]
async fn a_later_user_of_the_same_name_inherits_nothing() {
    let bench = Bench::new().await;
    let old = bench.key("robot", &[Binding::everywhere(Role::Admin)]).await;
    let record = bench.app.store.list("api-key", None, 1).await.unwrap().remove(0);
    assert_eq!(bench.send(ask("DELETE", "/service-accounts/robot").root()).await.status, 204);
    assert_eq!(bench.send(ask("GET", "/session").token(&old)).await.status, 401);
    // As if the key had been made while its owner was being removed.
    let body: Value = serde_json::from_str(&record.body).unwrap();
    let ops = vec![Op::put("api-key", &record.name, Expect::Absent, &body)];
    bench.app.store.commit(Commit { ops, ..Commit::default() }).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    bench.key("robot", &[Binding::everywhere(Role::Admin)]).await;
    assert_eq!(bench.send(ask("GET", "/session").token(&old)).await.status, 401);
}

#[tokio::test]
async fn users_are_changed_by_those_who_saw_them_last() {
    let bench = with_alice().await;
    let seen = bench.send(ask("GET", "/users/alice").root()).await;
    let etag = seen.headers["etag"].to_str().unwrap().to_owned();
    let change = |etag: &str| {
        let ask = ask("PATCH", "/users/alice").root().header("if-match", etag);
        ask.json(&json!({ "bindings": [{ "role": "operator", "scope": { "tier": "web" } }] }))
    };
    let changed = bench.send(change(&etag)).await;
    assert_eq!((changed.status, &changed.body["bindings"][0]["role"]), (200, &json!("operator")));
    assert_eq!(bench.send(change(&etag)).await.code(), "changed_meanwhile");
    let short = json!({ "password": "short" });
    let got = bench.send(ask("PATCH", "/users/alice").root().json(&short)).await;
    assert_eq!((got.status, &got.body["errors"][0]["pointer"]), (422, &json!("/password")));
}

#[tokio::test]
async fn sweeping_removes_what_has_expired_and_nothing_else() {
    let bench = with_alice().await;
    bench.send(login("alice", PASSWORD)).await;
    assert_eq!(bench.app.auth.sweep().await.unwrap(), 0);
    bench.later(50_000);
    let fresh = token(&bench.send(login("alice", PASSWORD)).await);
    assert_eq!(bench.app.auth.sweep().await.unwrap(), 1);
    assert_eq!(bench.send(ask("GET", "/session").token(&fresh)).await.status, 200);
}

#[test]
fn secrets_are_not_shown_by_debug() {
    let login = keepwall_api::Login {
        user: "alice".into(),
        password: keepwall_api::Secret(PASSWORD.into()),
        code: Some(keepwall_api::Secret("123456".into())),
    };
    let text = format!("{login:?}");
    assert!(text.contains("alice") && !text.contains("horse") && !text.contains("123456"));
}

/// An identity provider that does what the test says, right or wrong.
struct Provider {
    issuer: String,
    key: EcdsaKeyPair,
    /// What the token endpoint gives for a code, once; with the PKCE challenge that must fit.
    codes: Mutex<HashMap<String, (String, String)>>,
}

impl Provider {
    async fn start() -> Arc<Provider> {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let issuer = format!("http://{}", listener.local_addr().unwrap());
        let provider = Arc::new(Provider { issuer, key, codes: Mutex::default() });
        let served = Arc::clone(&provider);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let provider = Arc::clone(&served);
                let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let provider = Arc::clone(&provider);
                    async move { provider.answer(request).await }
                });
                let io = hyper_util::rt::TokioIo::new(stream);
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
            }
        });
        provider
    }

    async fn answer(
        &self,
        request: http::Request<hyper::body::Incoming>,
    ) -> Result<http::Response<Full<Bytes>>, std::convert::Infallible> {
        let path = request.uri().path().to_owned();
        let body = request.into_body().collect().await.map(|all| all.to_bytes()).unwrap_or_default();
        let (status, answer) = match path.as_str() {
            "/.well-known/openid-configuration" => (
                200,
                json!({
                    "issuer": self.issuer, "authorization_endpoint": format!("{}/authorize", self.issuer),
                    "token_endpoint": format!("{}/token", self.issuer), "jwks_uri": format!("{}/keys", self.issuer),
                    "response_types_supported": ["code"], "subject_types_supported": ["public"],
                    "id_token_signing_alg_values_supported": ["ES256"],
                }),
            ),
            "/keys" => {
                let point = self.key.public_key().as_ref();
                let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..]));
                (
                    200,
                    json!({ "keys": [{ "kty": "EC", "crv": "P-256", "use": "sig", "kid": "k1", "alg": "ES256", "x": x, "y": y }] }),
                )
            }
            "/token" => {
                let text = String::from_utf8_lossy(&body).into_owned();
                let field = |name: &str| {
                    let pair = text.split('&').find_map(|pair| pair.strip_prefix(&format!("{name}=")));
                    pair.unwrap_or_default().to_owned()
                };
                let challenge = ring::digest::digest(&ring::digest::SHA256, field("code_verifier").as_bytes());
                let challenge = URL_SAFE_NO_PAD.encode(challenge);
                match self.codes.lock().unwrap().remove(&field("code")) {
                    Some((wanted, token)) if wanted == challenge => {
                        (200, json!({ "access_token": "a", "token_type": "Bearer", "id_token": token }))
                    }
                    _ => (400, json!({ "error": "invalid_grant" })),
                }
            }
            _ => (404, json!({})),
        };
        let mut response = http::Response::new(Full::new(Bytes::from(answer.to_string())));
        *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
        Ok(response)
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let text = format!("{}.{}", part(header), part(claims));
        let signature = self.key.sign(&SystemRandom::new(), text.as_bytes()).unwrap();
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn claims(&self, nonce: &str) -> Value {
        let now = now_ms() / 1_000;
        json!({
            "iss": self.issuer, "sub": "u-17", "aud": "keepwall", "iat": now, "exp": now + 300, "nonce": nonce,
            "preferred_username": "carol", "groups": ["staff", "firewall"],
        })
    }
}

/// A login that was begun.
struct Begun {
    state: String,
    flow: String,
    nonce: String,
    challenge: String,
}

async fn begin(bench: &Bench) -> Begun {
    let got = bench.send(ask("POST", "/oidc/start").json(&json!({}))).await;
    assert_eq!(got.status, 200, "{got:?}");
    let url = got.body["url"].as_str().unwrap();
    let field = |name: &str| {
        let pair = url.split(['?', '&']).find_map(|pair| pair.strip_prefix(&format!("{name}=")));
        pair.unwrap_or_default().to_owned()
    };
    assert_eq!(field("code_challenge_method"), "S256");
    assert_eq!(field("state"), got.body["state"].as_str().unwrap());
    let flow = got.body["flow"].as_str().unwrap().to_owned();
    Begun { state: field("state"), flow, nonce: field("nonce"), challenge: field("code_challenge") }
}

async fn finish(bench: &Bench, flow: &str, state: &str, code: &str) -> Got {
    bench.later(120);
    bench.send(ask("POST", "/oidc/finish").json(&json!({ "flow": flow, "state": state, "code": code }))).await
}

async fn with_provider(value: &str) -> (Bench, Arc<Provider>) {
    let provider = Provider::start().await;
    let oidc = OidcConfig {
        issuer: provider.issuer.clone(),
        client_id: "keepwall".into(),
        client_secret: None,
        redirect_url: "http://127.0.0.1:7440/login".into(),
        scopes: vec!["groups".into()],
        claim: "groups".into(),
        roles: vec![RoleOf { value: value.into(), role: Role::Security, scope: Default::default() }],
        ca_pem: String::new(),
    };
    (Bench::with(AuthSettings { oidc: Some(oidc), ..AuthSettings::default() }).await, provider)
}

#[tokio::test]
async fn the_provider_vouches_for_somebody_once() {
    let (bench, provider) = with_provider("firewall").await;
    let begun = begin(&bench).await;
    let token_of = |nonce: &str| provider.sign(&json!({ "alg": "ES256", "kid": "k1" }), &provider.claims(nonce));
    provider.codes.lock().unwrap().insert("c1".into(), (begun.challenge.clone(), token_of(&begun.nonce)));
    let got = finish(&bench, &begun.flow, &begun.state, "c1").await;
    let session = token(&got);
    let me = bench.send(ask("GET", "/session").token(&session)).await;
    assert_eq!(me.body["bindings"], json!([{ "role": "security", "scope": {} }]));
    assert!(me.body["user"].as_str().unwrap().starts_with("oidc."));
    // The same code, and the same flow with a code that the provider would take once more.
    assert_eq!(finish(&bench, &begun.flow, &begun.state, "c1").await.code(), "login_failed");
    provider.codes.lock().unwrap().insert("c2".into(), (begun.challenge.clone(), token_of(&begun.nonce)));
    assert_eq!(finish(&bench, &begun.flow, &begun.state, "c2").await.code(), "login_failed");
    // Shut out here, whatever the provider says.
    let user = format!("/users/{}", me.body["user"].as_str().unwrap());
    assert_eq!(bench.send(ask("PATCH", &user).root().json(&json!({ "disabled": true }))).await.status, 200);
    let again = begin(&bench).await;
    provider.codes.lock().unwrap().insert("c3".into(), (again.challenge.clone(), token_of(&again.nonce)));
    assert_eq!(finish(&bench, &again.flow, &again.state, "c3").await.code(), "login_failed");
}

#[tokio::test]
async fn a_token_that_is_not_quite_right_lets_nobody_in() {
    let (bench, provider) = with_provider("firewall").await;
    let good = json!({ "alg": "ES256", "kid": "k1" });
    let stranger = Provider::start().await;
    let hmac = |claims: &Value| {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let text = format!("{}.{}", part(&json!({ "alg": "HS256" })), part(claims));
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"keepwall");
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, text.as_bytes())))
    };
    let unsigned = |claims: &Value| {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}.", part(&json!({ "alg": "none" })), part(claims))
    };
    let cases = ["nonce", "audience", "issuer", "expired", "unsigned", "hmac", "stranger", "verifier"];
    for case in cases {
        let begun = begin(&bench).await;
        let mut claims = provider.claims(&begun.nonce);
        let mut challenge = begun.challenge.clone();
        match case {
            "nonce" => claims["nonce"] = json!("another"),
            "audience" => claims["aud"] = json!("another"),
            "issuer" => claims["iss"] = json!("http://127.0.0.1:1"),
            "expired" => claims["exp"] = json!(now_ms() / 1_000 - 60),
            "verifier" => challenge = "another".into(),
            _ => {}
        }
        let token = match case {
            "unsigned" => unsigned(&claims),
            "hmac" => hmac(&claims),
            "stranger" => stranger.sign(&good, &claims),
            _ => provider.sign(&good, &claims),
        };
        provider.codes.lock().unwrap().insert(case.into(), (challenge, token));
        let got = finish(&bench, &begun.flow, &begun.state, case).await;
        assert_eq!(got.code(), "login_failed", "{case}: {got:?}");
    }
    let begun = begin(&bench).await;
    let token = provider.sign(&good, &provider.claims(&begun.nonce));
    provider.codes.lock().unwrap().insert("c".into(), (begun.challenge.clone(), token));
    let other = begin(&bench).await;
    assert_eq!(finish(&bench, &begun.flow, "another", "c").await.code(), "login_failed", "wrong state");
    assert_eq!(finish(&bench, &other.flow, &begun.state, "c").await.code(), "login_failed", "another's flow");
    assert_eq!(finish(&bench, "s1.AAAA", &begun.state, "c").await.code(), "login_failed", "a flow that is none");
    bench.later(700);
    assert_eq!(finish(&bench, &begun.flow, &begun.state, "c").await.code(), "login_failed", "too late");
}

#[tokio::test]
async fn who_has_no_role_here_is_told_so() {
    let (bench, provider) = with_provider("another group").await;
    let begun = begin(&bench).await;
    let token = provider.sign(&json!({ "alg": "ES256", "kid": "k1" }), &provider.claims(&begun.nonce));
    provider.codes.lock().unwrap().insert("c".into(), (begun.challenge.clone(), token));
    let got = finish(&bench, &begun.flow, &begun.state, "c").await;
    assert_eq!((got.status, got.code()), (403, "forbidden"));
    assert!(got.body["detail"].as_str().unwrap().contains("carol"), "{got:?}");
}

#[tokio::test]
async fn without_a_provider_there_is_no_such_login() {
    let bench = Bench::new().await;
    assert_eq!(bench.send(ask("POST", "/oidc/start").json(&json!({}))).await.status, 404);
}
