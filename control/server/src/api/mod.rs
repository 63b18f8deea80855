//! The REST API `/api/v1`.
//!
//! Every operation of [`keepwall_api::operations`] takes one way through [`serve`]: who asks, may they, is the
//! request one, was it answered before, and only then the handler of [`handlers`]. What is refused on the way, by us
//! or by the router, is a problem with a code.
//!
//! ```text
//! edge (ids, headers, time) ─▶ authenticate ─▶ right ─▶ query, headers, body ─▶ remembered? ─▶ handler ─▶ answer
//!        every answer             401             403      400 413 415 428                       404 409 412 422
//! ```
//!
//! Credentials are bearer tokens only: no browser sends them by itself, so there is nothing to forge across sites.

#![expect(clippy::result_large_err, reason = "a refusal is rare, and a box would stand in every signature")]

mod access;
mod answer;
mod call;
mod fleet;
mod fuzz;
mod observe;
mod posture;
mod problems;
mod serving;
mod views;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{RawPathParams, Request};
use axum::response::Response;
use axum::routing::{MethodFilter, MethodRouter};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use keepwall_api::operations::{Operation, Right, operations};
use keepwall_api::problem::{self, Problem};
use keepwall_fleet::access::{Target, Verdict};
use keepwall_store::Store;
use serde_json::json;
use tokio::sync::Semaphore;

use crate::auth::{Auth, Principal};
use crate::fleet::{Act, Fleet, hex};
use crate::seal::random;
use answer::Answer;
use call::Call;

pub use fuzz::fuzz_body;
pub use serving::{Peer, serve_connection};

/// Knobs of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiSettings {
    /// A request that takes longer is answered with 503, seconds, 1-300. Default 30.
    pub timeout_s: u64,
    /// Who watches live events at once. Default 256.
    pub watchers_max: usize,
    /// Requests that are worked on at once; more are told to come again. Default 512.
    pub requests_max: usize,
    /// Refusals per minute that the audit log gets a line for; of more it gets their number. Default 60.
    pub denials_per_minute: u64,
}

impl Default for ApiSettings {
    fn default() -> ApiSettings {
        ApiSettings { timeout_s: 30, watchers_max: 256, requests_max: 512, denials_per_minute: 60 }
    }
}

/// Everything that the API needs.
pub struct App {
    /// The fleet.
    pub fleet: Arc<Fleet>,
    /// The store.
    pub store: Arc<dyn Store>,
    /// Who asks.
    pub auth: Arc<Auth>,
    /// Knobs.
    pub settings: ApiSettings,
    watchers: Arc<Semaphore>,
    requests: Semaphore,
    denials: Denials,
}

impl App {
    /// An API over these.
    #[must_use]
    pub fn new(fleet: Arc<Fleet>, store: Arc<dyn Store>, auth: Arc<Auth>, settings: ApiSettings) -> App {
        App {
            fleet,
            store,
            auth,
            watchers: Arc::new(Semaphore::new(settings.watchers_max)),
            requests: Semaphore::new(settings.requests_max),
            denials: Denials::default(),
            settings,
        }
    }

    /// Notes in the audit log that something was refused, and the name that was tried if it was a login; within the
    /// bounds of a minute: a stranger must not be able to fill the disk.
    async fn denied(&self, act: &Act, what: &str, target: &str, problem: &Problem, tried: Option<String>) {
        let (noted, left_out) = self.denials.take(self.auth.now_ms(), self.settings.denials_per_minute);
        if !noted {
            return;
        }
        let mut after = json!({ "code": problem.code, "detail": problem.detail });
        if let Some(user) = tried {
            after["user"] = json!(user);
        }
        if left_out > 0 {
            after["left_out_before"] = json!(left_out);
        }
        let line = act.line(&format!("denied: {what}"), target, json!(null), after);
        if let Err(error) = self.auth.note(line).await {
            tracing::warn!(%error, "a refusal is not in the audit log");
        }
    }
}

/// Refusals of the present minute.
#[derive(Default)]
struct Denials {
    minute: Mutex<(u64, u64)>,
    left_out: AtomicU64,
}

impl Denials {
    /// Whether this one is noted, and how many were not since the last that was.
    fn take(&self, now_ms: u64, per_minute: u64) -> (bool, u64) {
        let mut minute = self.minute.lock().expect("nothing panics while it holds the lock");
        if minute.0 != now_ms / 60_000 {
            *minute = (now_ms / 60_000, 0);
        }
        if minute.1 >= per_minute {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return (false, 0);
        }
        minute.1 += 1;
        (true, self.left_out.swap(0, Ordering::Relaxed))
    }
}

type Handling = Pin<Box<dyn Future<Output = Result<Answer, Problem>> + Send>>;
type Handler = fn(Call) -> Handling;

macro_rules! handlers {
    ($($id:literal => $handler:path,)*) => {
        /// What serves each operation.
        fn handler(id: &str) -> Option<Handler> {
            match id {
                $($id => Some(|call| Box::pin($handler(call))),)*
                _ => None,
            }
        }
    };
}

handlers! {
    "openapi" => observe::openapi,
    "login" => access::login,
    "me" => access::me,
    "logout" => access::logout,
    "change_password" => access::change_password,
    "enrol_totp" => access::enrol_totp,
    "verify_totp" => access::verify_totp,
    "remove_totp" => access::remove_totp,
    "oidc_start" => access::oidc_start,
    "oidc_finish" => access::oidc_finish,
    "list_users" => access::list_users,
    "create_user" => access::create_user,
    "get_user" => access::get_user,
    "change_user" => access::change_user,
    "delete_user" => access::delete_user,
    "end_sessions" => access::end_sessions,
    "list_service_accounts" => access::list_service_accounts,
    "create_service_account" => access::create_service_account,
    "get_service_account" => access::get_service_account,
    "change_service_account" => access::change_service_account,
    "delete_service_account" => access::delete_service_account,
    "list_api_keys" => access::list_keys,
    "create_api_key" => access::create_key,
    "get_api_key" => access::get_key,
    "delete_api_key" => access::delete_key,
    "get_posture" => posture::get,
    "put_posture" => posture::put,
    "check_posture" => posture::check,
    "list_postures" => posture::history,
    "get_posture_at" => posture::at,
    "return_to_posture" => posture::return_to,
    "list_files" => posture::files,
    "get_file" => posture::file,
    "put_file" => posture::put_file,
    "delete_file" => posture::delete_file,
    "list_security_groups" => posture::groups,
    "get_security_group" => posture::group,
    "put_security_group" => posture::put_group,
    "delete_security_group" => posture::delete_group,
    "add_rule" => posture::add_rule,
    "change_rule" => posture::change_rule,
    "remove_rule" => posture::remove_rule,
    "list_prefix_lists" => posture::prefix_lists,
    "get_prefix_list" => posture::prefix_list,
    "put_prefix_list" => posture::put_prefix_list,
    "delete_prefix_list" => posture::delete_prefix_list,
    "list_port_lists" => posture::port_lists,
    "get_port_list" => posture::port_list,
    "put_port_list" => posture::put_port_list,
    "delete_port_list" => posture::delete_port_list,
    "list_declared_instances" => posture::instances,
    "get_declared_instance" => posture::instance,
    "put_declared_instance" => posture::put_instance,
    "delete_declared_instance" => posture::delete_instance,
    "list_instances" => fleet::list,
    "get_instance" => fleet::get,
    "change_instance" => fleet::change,
    "delete_instance" => fleet::delete,
    "revoke_instance" => fleet::revoke,
    "get_intent" => fleet::intent,
    "list_tokens" => fleet::tokens,
    "create_token" => fleet::make_token,
    "get_token" => fleet::token,
    "delete_token" => fleet::delete_token,
    "list_rollouts" => fleet::rollouts,
    "get_rollout" => fleet::rollout,
    "stop_rollout" => fleet::stop,
    "resume_rollout" => fleet::resume,
    "return_rollout" => fleet::return_back,
    "get_operation" => fleet::operation,
    "list_findings" => observe::findings,
    "list_events" => observe::events,
    "live" => observe::live,
    "list_audit" => observe::audit,
    "verify_audit" => observe::verify_audit,
    "reach" => observe::reach,
    "explain" => observe::explain,
}

/// The router of all operations.
///
/// # Panics
/// If an operation of the catalogue has no handler; a test holds that each has.
pub fn router(app: Arc<App>) -> Router {
    let mut paths: BTreeMap<&'static str, Vec<Operation>> = BTreeMap::new();
    for one in operations() {
        paths.entry(one.path).or_default().push(one);
    }
    let mut router = Router::new();
    for (path, all) in paths {
        let mut methods = MethodRouter::new();
        let mut allow = Vec::new();
        for one in all {
            let run = handler(one.id).expect("every operation of the catalogue has a handler");
            allow.push(one.method);
            if one.method == "GET" {
                allow.push("HEAD");
            }
            let app = Arc::clone(&app);
            let serve = move |params: Result<RawPathParams, _>, request: Request| {
                let app = Arc::clone(&app);
                async move { serve(app, one, run, params.ok(), request).await }
            };
            methods = methods.on(filter(one.method), serve);
        }
        let allow = HeaderValue::from_str(&allow.join(", ")).expect("methods are plain words");
        let methods = methods.fallback(move |request: Request| {
            let allow = allow.clone();
            async move {
                let detail = format!("{} is not among them", request.method());
                let mut response = refuse(&request, problem::METHOD_NOT_ALLOWED.because(detail));
                response.headers_mut().insert(header::ALLOW, allow);
                response
            }
        });
        router = router.route(&format!("{}{path}", keepwall_api::BASE), methods);
    }
    let router = router.fallback(|request: Request| async move {
        refuse(&request, problem::NOT_FOUND.because("no operation has this path"))
    });
    let within = Duration::from_secs(app.settings.timeout_s);
    router.layer(axum::middleware::from_fn(move |request, next| edge(within, request, next)))
}

fn filter(method: &str) -> MethodFilter {
    match method {
        "POST" => MethodFilter::POST,
        "PUT" => MethodFilter::PUT,
        "PATCH" => MethodFilter::PATCH,
        "DELETE" => MethodFilter::DELETE,
        _ => MethodFilter::GET,
    }
}

/// What the edge knows of a request.
#[derive(Clone, Debug)]
struct Edge {
    request_id: String,
    path: String,
}

/// The longest request id and trace header of others that we take over.
const ID_MAX: usize = 128;

/// Headers of a request at most.
const HEADERS_MAX: usize = 64;

/// What every request and answer gets, whatever becomes of it.
async fn edge(within: Duration, mut request: Request, next: axum::middleware::Next) -> Response {
    let random: [u8; 32] = random();
    let own_id = hex(&random[..8]);
    let given = request.headers().get("x-request-id").and_then(|value| value.to_str().ok());
    let good = |id: &&str| {
        (1..=ID_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let request_id = given.filter(good).map_or(own_id, str::to_owned);
    let trace = trace_id(request.headers()).unwrap_or_else(|| hex(&random[8..24]));
    let parent = format!("00-{trace}-{}-01", hex(&random[24..]));
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let live = path == format!("{}/events/live", keepwall_api::BASE);
    let edge = Edge { request_id: request_id.clone(), path: path.clone() };
    request.extensions_mut().insert(edge.clone());
    let began = std::time::Instant::now();
    let mut response = if request.headers().len() > HEADERS_MAX {
        let detail = format!("more than {HEADERS_MAX} headers");
        problems::response(problem::HEADERS_TOO_LARGE.because(detail), &edge)
    } else {
        match tokio::time::timeout(within, next.run(request)).await {
            Ok(response) => response,
            Err(_) => problems::response(problem::TIMED_OUT.because("the server gave up waiting"), &edge),
        }
    };
    let status = response.status().as_u16();
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(%method, path, status, took_ms, request = request_id, trace, live, "answered");
    let headers = response.headers_mut();
    for (name, value) in SECURITY {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    for (name, value) in [("x-request-id", request_id), ("traceparent", parent)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    response
}

/// The API is for programs: nothing of it is shown, framed, cached or guessed at by a browser.
const SECURITY: &[(HeaderName, &str)] = &[
    (header::CACHE_CONTROL, "no-store"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::STRICT_TRANSPORT_SECURITY, "max-age=31536000"),
];

/// The trace id of a valid `traceparent` (W3C Trace Context).
fn trace_id(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    let parts: Vec<&str> = text.split('-').collect();
    let [version, trace, span, flags] = parts[..] else { return None };
    let hex = |text: &str, len| text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let zero = |text: &str| text.bytes().all(|b| b == b'0');
    let good = version == "00" && hex(trace, 32) && hex(span, 16) && hex(flags, 2) && !zero(trace) && !zero(span);
    good.then(|| trace.to_owned())
}

fn edge_of(request: &Request) -> Edge {
    let known = request.extensions().get::<Edge>().cloned();
    known.unwrap_or_else(|| Edge { request_id: hex(&random::<8>()), path: request.uri().path().to_owned() })
}

fn refuse(request: &Request, problem: Problem) -> Response {
    problems::response(problem, &edge_of(request))
}

/// One request on its way through.
async fn serve(
    app: Arc<App>,
    op: Operation,
    run: Handler,
    params: Option<RawPathParams>,
    request: Request,
) -> Response {
    let edge = edge_of(&request);
    let head = request.method() == http::Method::HEAD;
    let Ok(_turn) = app.requests.try_acquire() else {
        let detail = format!("{} requests are being worked on", app.settings.requests_max);
        return problems::response(problem::UNAVAILABLE.because(detail), &edge);
    };
    let mut response = match answer(&app, op, run, params, request, &edge).await {
        Ok(answer) => answer.response(&op),
        Err(problem) => problems::response(problem, &edge),
    };
    if head {
        *response.body_mut() = Body::empty();
    }
    response
}

async fn answer(
    app: &Arc<App>,
    op: Operation,
    run: Handler,
    params: Option<RawPathParams>,
    request: Request,
    edge: &Edge,
) -> Result<Answer, Problem> {
    let (parts, body) = request.into_parts();
    let peer = parts.extensions.get::<Peer>().cloned().unwrap_or_default();
    let act =
        Act { actor: "nobody".into(), address: peer.address(), request: edge.request_id.clone(), ..Act::default() };
    let what = format!("{} {}", op.method, edge.path);
    let who = match op.right {
        Right::Public => None,
        _ => Some(authenticate(app, &parts.headers, &peer, &act, op, &what).await?),
    };
    let act = Act { actor: who.as_ref().map_or_else(|| act.actor.clone(), |who| who.actor.clone()), ..act };
    if let (Right::To(resource, action), Some(who)) = (op.right, &who)
        && let Verdict::Deny(why) = who.permits(resource, action, Target::Some)
    {
        let detail = format!("{} {}: {why}", resource.as_str(), action.as_str());
        let problem = problem::FORBIDDEN.because(detail);
        app.denied(&act, op.id, &what, &problem, None).await;
        return Err(problem);
    }
    let call = Call::read(app, op, who, act, params, &parts, body).await?;
    let (attempt, tried) = (call.clone_for_audit(), access::tried(&call));
    if let Some(remember) = &call.act.remember {
        let before = app.store.remembered(&remember.scope, &remember.key, &remember.digest).await;
        if let Some(answer) = before.map_err(problems::store)? {
            return call.again(&answer).await;
        }
    }
    let again = call.act.remember.clone().map(|remember| (remember, call.clone()));
    let problem = match run(call).await {
        Ok(answer) => return Ok(answer),
        Err(problem) => problem,
    };
    if let Some((remember, call)) = again
        && let Ok(Some(answer)) = app.store.remembered(&remember.scope, &remember.key, &remember.digest).await
    {
        // The first of two equal requests went through after we looked, at a server that was killed or at another one:
        // what this one ran into is its own change.
        return call.again(&answer).await;
    }
    if problem.code == problem::FORBIDDEN.code || problem.code == problem::LOGIN_FAILED.code {
        app.denied(&attempt, op.id, &what, &problem, tried).await;
    }
    Err(problem)
}

/// Who asks. A token counts before the socket's word, so that root can act as somebody else.
async fn authenticate(
    app: &App,
    headers: &HeaderMap,
    peer: &Peer,
    act: &Act,
    op: Operation,
    what: &str,
) -> Result<Principal, Problem> {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let (given, more) = (all.next(), all.next());
    let Some(given) = given else {
        if let Peer::Unix { uid: 0 } = peer {
            return Ok(Principal::local_root());
        }
        return Err(problem::UNAUTHENTICATED.because("the request has no credentials"));
    };
    let token = given.to_str().ok().and_then(|text| {
        let (scheme, token) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    let known = match token.filter(|_| more.is_none()) {
        Some(token) => app.auth.authenticate(token).await.map_err(problems::store)?,
        None => None,
    };
    if let Some(who) = known {
        return Ok(who);
    }
    let problem = problem::UNAUTHENTICATED.because("the credentials are none, or have expired or been taken back");
    app.denied(act, op.id, what, &problem, None).await;
    Err(problem)
}

/// The status of a code that the HTTP library made; for those that come before a router.
fn status(code: u16) -> StatusCode {
    StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

#[cfg(test)]
pub(crate) mod tests;
