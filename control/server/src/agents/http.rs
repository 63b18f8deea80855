//! HTTP at the agents' door: enrolment, long poll, and the programs for a new machine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use keepwall_fleet::sync::Session;
use keepwall_wire::{
    AGENT_FRAME_MAX, ENROLL_PATH, FromAgent, FromServer, Goodbye, HEARTBEAT_S, Kept, POLL_PATH, POLL_WAIT_S, Renewed,
    Welcome, from_agent, from_server, read_hello,
};

use super::Agents;
use super::tls::Tls;
use crate::fleet::{Admission, Enroll};

/// The body of a poll.
const POLL_BYTES_MAX: usize = AGENT_FRAME_MAX * 2;
/// The body of an enrolment.
const ENROLL_BYTES_MAX: usize = 64 * 1024;
/// How long a body may take.
const BODY: Duration = Duration::from_secs(30);
/// The programs that a new machine may fetch.
const PROGRAMS: [&str; 3] = ["keepwall", "keepwall-agent", "keepwall-uplink"];

type Answer = Response<Full<Bytes>>;

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// A refusal in the words that a person at the machine reads.
fn refusal(status: StatusCode, code: &str, detail: &str) -> Answer {
    let body = serde_json::json!({ "code": code, "detail": detail }).to_string();
    answer(status, "application/problem+json", body)
}

impl Agents {
    /// Serves one HTTP connection.
    pub(super) async fn http(self: Arc<Self>, tls: Tls, address: SocketAddr) {
        let Ok(_place) = self.connections.acquire().await else { return };
        let certificate = tls.state().peer_certificates().and_then(<[_]>::first).map(|c| c.to_vec());
        let agents = Arc::clone(&self);
        let service = hyper::service::service_fn(move |request| {
            let (agents, certificate) = (Arc::clone(&agents), certificate.clone());
            async move { Ok::<_, std::convert::Infallible>(agents.route(request, certificate, address).await) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(hyper_util::rt::TokioTimer::new())
            .header_read_timeout(BODY)
            .max_buf_size(16 * 1024)
            .serve_connection(TokioIo::new(tls), service);
        if let Err(error) = served.await {
            tracing::debug!(%address, %error, "an HTTP connection of an instance ended");
        }
    }

    async fn route(&self, request: Request<Incoming>, certificate: Option<Vec<u8>>, address: SocketAddr) -> Answer {
        match (request.method(), request.uri().path()) {
            (&Method::POST, ENROLL_PATH) => self.enroll(request, address).await,
            (&Method::POST, POLL_PATH) => self.poll(request, certificate, address).await,
            (&Method::GET, "/install") => answer(StatusCode::OK, "text/x-shellscript", INSTALL),
            (&Method::GET, path) => self.program(path).await,
            _ => {
                refusal(StatusCode::NOT_FOUND, "not-found", "there is no such thing here; people go to the API's port")
            }
        }
    }

    async fn enroll(&self, request: Request<Incoming>, address: SocketAddr) -> Answer {
        let Some(body) = body(request, ENROLL_BYTES_MAX).await else {
            return refusal(StatusCode::PAYLOAD_TOO_LARGE, "too-large", "an enrolment has at most 64 KiB");
        };
        let enroll: Enroll = match serde_json::from_slice(&body) {
            Ok(enroll) => enroll,
            Err(error) => return refusal(StatusCode::BAD_REQUEST, "bad-request", &error.to_string()),
        };
        match self.fleet.enroll(&enroll, &address.ip().to_string()).await {
            Ok(enrolled) => {
                let body = serde_json::to_vec(&enrolled).unwrap_or_default();
                answer(StatusCode::CREATED, "application/json", body)
            }
            Err(Admission::BadToken) => refusal(
                StatusCode::FORBIDDEN,
                "bad-token",
                "this token does not let anybody in: it was used, has expired, or is none; make a new one \
                 (keepwall token create)",
            ),
            Err(Admission::Refused(why)) => refusal(StatusCode::UNPROCESSABLE_ENTITY, "refused", &why),
            Err(Admission::Later(why)) => refusal(StatusCode::SERVICE_UNAVAILABLE, "later", &why),
        }
    }

    /// A poll tells everything anew: who it is, what it holds, and what became of offers. So polls of one instance
    /// may go to any server.
    async fn poll(&self, request: Request<Incoming>, certificate: Option<Vec<u8>>, address: SocketAddr) -> Answer {
        let revoked = || refusal(StatusCode::FORBIDDEN, "revoked", "this certificate opens nothing; enrol again");
        let Some(certificate) = certificate else { return revoked() };
        let digest = crate::ca::digest(&certificate);
        let name = crate::fleet::subject(&certificate).unwrap_or_default();
        let instance = match self.fleet.owner_named(&digest, &name).await {
            Ok(owner) => owner,
            Err(why) => {
                self.refuse(address, &name, why).await;
                return revoked();
            }
        };
        let bad = |why: &str| refusal(StatusCode::BAD_REQUEST, "protocol", why);
        let Some(body) = body(request, POLL_BYTES_MAX).await else {
            return refusal(StatusCode::PAYLOAD_TOO_LARGE, "too-large", "a poll has at most 512 KiB");
        };
        let frames = match keepwall_wire::frames::<FromAgent>(&body, AGENT_FRAME_MAX) {
            Ok(frames) => frames,
            Err(error) => return bad(&error.to_string()),
        };
        let mut frames = frames.into_iter().filter_map(|frame| frame.say);
        let Some(from_agent::Say::Hello(hello)) = frames.next() else { return bad("a poll begins with a hello") };
        let Ok(introduced) = read_hello(&hello) else { return bad("no hello") };
        if introduced.instance != *instance {
            self.refuse(address, &instance, "it calls itself by another name").await;
            return revoked();
        }
        let mut session = Session::new(&introduced);
        let handle = self.fleet.open_stream(&instance);
        self.take_held(&instance, &session, Some(&hello.version));
        if let Some(status) = &hello.status {
            self.take_status(&instance, status);
        }
        let mut out = BytesMut::new();
        let mut say = |said: from_server::Say| out.extend(keepwall_wire::frame(&FromServer { say: Some(said) }));
        let welcome = Welcome { heartbeat_s: HEARTBEAT_S, spread_ms: self.spread_ms(), kept: 0 };
        say(from_server::Say::Welcome(welcome));
        let mut worth_sending = false;
        for said in frames {
            match said {
                from_agent::Say::Hello(_) => return bad("a second hello"),
                from_agent::Say::Heartbeat(_) => {}
                // What it holds is in the hello; this is why.
                from_agent::Say::Outcome(outcome) if outcome.result == 2 => {
                    let failure: String = outcome.detail.chars().take(2_000).collect();
                    self.fleet.heard(&instance, |record| record.failure = failure);
                }
                from_agent::Say::Outcome(_) => {}
                from_agent::Say::Status(status) => self.take_status(&instance, &status),
                from_agent::Say::Report(report) => match self.take_report(&instance, report).await {
                    Ok(through) => {
                        worth_sending = true;
                        say(from_server::Say::Kept(Kept { through }));
                    }
                    Err(why) => return bad(why),
                },
                from_agent::Say::Renew(renew) => {
                    worth_sending = true;
                    let (chain, refused) = match self.fleet.renew(&instance, &digest, &renew.request).await {
                        Ok(chain) => (chain.into_iter().map(Bytes::from).collect(), String::new()),
                        Err(refused) => (Vec::new(), refused),
                    };
                    say(from_server::Say::Renewed(Renewed { chain, refused }));
                }
            }
        }
        let until = tokio::time::Instant::now() + Duration::from_secs(POLL_WAIT_S);
        let mut stop = self.stop.clone();
        loop {
            if let Some(reason) = handle.ended() {
                let retry_after_ms = if reason == "revoked" { 3_600_000 } else { 0 };
                let goodbye = Goodbye { reason: reason.to_owned(), retry_after_ms };
                out.extend(keepwall_wire::frame(&FromServer { say: Some(from_server::Say::Goodbye(goodbye)) }));
                break;
            }
            if let Some(offer) = self.next_offer(&instance, &mut session) {
                out.extend(offer);
                break;
            }
            if worth_sending {
                break;
            }
            tokio::select! {
                () = handle.wake.notified() => {}
                () = tokio::time::sleep_until(until) => break,
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        // Between polls nothing is open. It counts as there until it has missed the next one.
        self.fleet.end_poll(&instance, &handle);
        answer(StatusCode::OK, "application/octet-stream", out.freeze())
    }

    async fn program(&self, path: &str) -> Answer {
        let name = path.strip_prefix("/install/").filter(|name| PROGRAMS.contains(name));
        let (Some(name), Some(directory)) = (name, &self.programs) else {
            return refusal(
                StatusCode::NOT_FOUND,
                "not-found",
                "this server has no programs to hand out; install the package, or set `agents.programs`",
            );
        };
        match tokio::fs::read(directory.join(name)).await {
            Ok(bytes) => answer(StatusCode::OK, "application/octet-stream", bytes),
            Err(error) => {
                tracing::warn!(%error, name, "a program cannot be handed out");
                refusal(StatusCode::NOT_FOUND, "not-found", "this program is not there")
            }
        }
    }
}

async fn body(request: Request<Incoming>, max: usize) -> Option<Bytes> {
    let collected = tokio::time::timeout(BODY, Limited::new(request.into_body(), max).collect()).await;
    Some(collected.ok()?.ok()?.to_bytes())
}

/// What a new machine runs: fetches the programs over the connection that is pinned to this server, and enrols.
const INSTALL: &str = include_str!("install.sh");
