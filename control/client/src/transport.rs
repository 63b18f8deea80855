//! HTTP/1.1 over TCP, TLS or a local socket, for one caller at a time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, ETAG, HOST, HeaderValue, IF_MATCH};
use hyper_util::rt::TokioIo;
use keepwall_api::Problem;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Runtime;

use crate::{Error, Request, Settings};

/// The largest answer: a posture has at most 8 MiB, and JSON may double what it escapes.
const ANSWER_BYTES_MAX: usize = 32 * 1024 * 1024;
/// How long it may take to connect, TLS included.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A stream of events that is silent for so long is dead: the server says something every 15 seconds.
const LIVE_SILENT: Duration = Duration::from_secs(60);
/// The largest event of a stream.
const EVENT_BYTES_MAX: usize = 1024 * 1024;

enum Place {
    Tcp { host: String, port: u16, tls: Option<Arc<ClientConfig>> },
    Unix(PathBuf),
}

type Sender = SendRequest<Full<Bytes>>;

pub(crate) struct Transport {
    runtime: Runtime,
    place: Place,
    authority: String,
    token: Option<keepwall_api::Secret>,
    timeout: Duration,
    /// The connection of the call before, if it may still be good.
    idle: RefCell<Option<Sender>>,
}

fn unreachable(error: impl std::fmt::Display) -> Error {
    Error::Unreachable(error.to_string())
}

/// Where a server is, and what it is called in `Host`.
fn place(settings: &Settings) -> Result<(Place, String), Error> {
    let bad = |why: &str| Error::Address(format!("`{}` is no address of a server: {why}", settings.server));
    if let Some(path) = settings.server.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return if path.starts_with('/') {
            Ok((Place::Unix(path.into()), "localhost".into()))
        } else {
            Err(bad("a local socket has an absolute path"))
        };
    }
    let (secure, rest) = match settings.server.split_once("://") {
        Some(("https", rest)) => (true, rest),
        Some(("http", rest)) => (false, rest),
        _ => return Err(bad("it begins with https://, http:// or unix:")),
    };
    let authority = rest.trim_end_matches('/');
    if authority.is_empty() || authority.contains(['/', '@', '?', '#']) {
        return Err(bad("a host and a port stand behind the scheme, and nothing else"));
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| bad("its port is none"))?),
        _ => (authority, if secure { 443 } else { 80 }),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let loopback = host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    if !secure && !loopback {
        return Err(bad("without TLS only this machine itself is asked; use https://"));
    }
    let tls = if secure { Some(Arc::new(settings.trust.config()?)) } else { None };
    Ok((Place::Tcp { host, port, tls }, authority.to_owned()))
}

impl Transport {
    pub(crate) fn new(settings: Settings) -> Result<Transport, Error> {
        let (place, authority) = place(&settings)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(unreachable)?;
        let Settings { token, timeout, .. } = settings;
        Ok(Transport { runtime, place, authority, token, timeout, idle: RefCell::new(None) })
    }

    async fn connect(&self) -> Result<Sender, Error> {
        async fn shake<T>(io: T) -> Result<Sender, Error>
        where
            T: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
        {
            let (sender, connection) = handshake(io).await.map_err(unreachable)?;
            tokio::spawn(async move { connection.await.ok() });
            Ok(sender)
        }
        let connect = async {
            match &self.place {
                Place::Unix(path) => {
                    let at = |error| unreachable(format!("{}: {error}", path.display()));
                    shake(TokioIo::new(UnixStream::connect(path).await.map_err(at)?)).await
                }
                Place::Tcp { host, port, tls } => {
                    let at = |error| unreachable(format!("{host}:{port}: {error}"));
                    let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(at)?;
                    stream.set_nodelay(true).ok();
                    let Some(config) = tls else { return shake(TokioIo::new(stream)).await };
                    let name = ServerName::try_from(host.clone()).map_err(unreachable)?;
                    let connector = tokio_rustls::TlsConnector::from(Arc::clone(config));
                    shake(TokioIo::new(connector.connect(name, stream).await.map_err(at)?)).await
                }
            }
        };
        let late = |_| Error::Unreachable("the server did not take the connection in time".into());
        tokio::time::timeout(CONNECT_WITHIN, connect).await.map_err(late)?
    }

    fn http(&self, request: &Request, key: &str) -> Result<hyper::Request<Full<Bytes>>, Error> {
        let body = Full::new(Bytes::from(request.body.clone().unwrap_or_default()));
        let mut http = hyper::Request::builder().method(request.method).uri(&request.path).body(body);
        let http = http.as_mut().map_err(|error| Error::Address(error.to_string()))?;
        let headers = http.headers_mut();
        let value = |text: &str| HeaderValue::from_str(text).map_err(|error| Error::Address(error.to_string()));
        headers.insert(HOST, value(&self.authority)?);
        if request.body.is_some() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        if let Some(token) = &self.token {
            let mut token = value(&format!("Bearer {}", token.0))?;
            token.set_sensitive(true);
            headers.insert(AUTHORIZATION, token);
        }
        if let Some(revision) = request.if_match {
            headers.insert(IF_MATCH, value(&format!("\"{revision}\""))?);
        }
        if request.once {
            headers.insert("idempotency-key", value(key)?);
        }
        Ok(std::mem::take(http))
    }

    /// Sends, once more on a new connection if the one of the call before had ended, or if the request is one that
    /// the server does once.
    async fn ask(&self, request: &Request) -> Result<hyper::Response<Incoming>, Error> {
        let key = key();
        let kept = self.idle.borrow_mut().take();
        let mut again = kept.is_some() || request.once;
        let mut sender = match kept {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.connect().await?,
        };
        loop {
            match sender.send_request(self.http(request, &key)?).await {
                Ok(answer) => {
                    *self.idle.borrow_mut() = Some(sender);
                    return Ok(answer);
                }
                // A request that was never sent is cancelled; another may have been done, so it needs its key.
                Err(error) if again && (error.is_canceled() || request.once || request.method == "GET") => {
                    again = false;
                    sender = self.connect().await?;
                }
                Err(error) => return Err(unreachable(error)),
            }
        }
    }

    /// The answer's body and its ETag.
    pub(crate) fn send(&self, request: &Request) -> Result<(Bytes, Option<u64>), Error> {
        let work = async {
            let answer = self.ask(request).await?;
            let (parts, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(unreachable)?.to_bytes();
            if !parts.status.is_success() {
                return Err(refused(parts.status.as_u16(), &body));
            }
            let etag = parts.headers.get(ETAG).and_then(|value| value.to_str().ok());
            Ok((body, etag.and_then(|text| text.trim_matches('"').parse().ok())))
        };
        let late = |_| Error::Unreachable("the server did not answer in time".into());
        self.runtime.block_on(async { tokio::time::timeout(self.timeout, work).await.map_err(late)? })
    }

    /// Events from now on.
    pub(crate) fn live(&self, request: &Request) -> Result<Live<'_>, Error> {
        let work = async {
            let answer = self.ask(request).await?;
            // The connection belongs to the stream from now on.
            self.idle
                .borrow_mut()
                .take()
                .map_or_else(|| Err(unreachable("the connection ended")), |sender| Ok((answer, sender)))
        };
        let late = |_| Error::Unreachable("the server did not answer in time".into());
        let (answer, sender) =
            self.runtime.block_on(async { tokio::time::timeout(self.timeout, work).await.map_err(late)? })?;
        if !answer.status().is_success() {
            let status = answer.status().as_u16();
            let body = self.runtime.block_on(Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect());
            return Err(refused(status, &body.map_err(unreachable)?.to_bytes()));
        }
        let body = answer.into_body();
        Ok(Live { transport: self, body, _sender: sender, buffer: Vec::new(), ready: VecDeque::new(), over: false })
    }
}

/// A problem of the server, or what else came instead.
fn refused(status: u16, body: &[u8]) -> Error {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => Error::Refused(Box::new(problem)),
        Err(_) => {
            let text: String = String::from_utf8_lossy(body).chars().filter(|c| !c.is_control()).take(200).collect();
            Error::Unreachable(format!("the answer is HTTP {status}, and no problem of a Keepwall server: {text}"))
        }
    }
}

/// A key that nobody used before: not secret, only unlikely.
fn key() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    // Its keys come from the system's randomness.
    let random = || RandomState::new().hash_one(now);
    format!("{now:x}-{:016x}{:016x}", random(), random())
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveEvent {
    /// `instance`, `rollout`, `posture`, `finding`, `event`, or `lagged`: so many were missed.
    pub kind: String,
    /// What happened.
    pub data: Value,
}

/// Events as they happen; ends when the server ends it, with an error when the connection does.
pub struct Live<'c> {
    transport: &'c Transport,
    body: Incoming,
    /// The connection lives as long as somebody might send on it.
    _sender: Sender,
    buffer: Vec<u8>,
    ready: VecDeque<LiveEvent>,
    over: bool,
}

impl std::fmt::Debug for Live<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").finish_non_exhaustive()
    }
}

impl Live<'_> {
    fn fail(&mut self, why: impl std::fmt::Display) -> Option<Result<LiveEvent, Error>> {
        self.over = true;
        Some(Err(unreachable(why)))
    }
}

impl Iterator for Live<'_> {
    type Item = Result<LiveEvent, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            let body = &mut self.body;
            let frame = async { tokio::time::timeout(LIVE_SILENT, body.frame()).await };
            match self.transport.runtime.block_on(frame) {
                Err(_) => return self.fail("the server has said nothing for a minute"),
                Ok(None) => self.over = true,
                Ok(Some(Err(error))) => return self.fail(error),
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                    self.ready.extend(events(&mut self.buffer));
                    if self.buffer.len() > EVENT_BYTES_MAX {
                        return self.fail("the server sends an event without an end");
                    }
                }
            }
        }
    }
}

/// The events that are whole in the buffer; the rest stays.
fn events(buffer: &mut Vec<u8>) -> Vec<LiveEvent> {
    let mut out = Vec::new();
    while let Some(end) = buffer.windows(2).position(|two| two == b"\n\n") {
        let block: Vec<u8> = buffer.drain(..end + 2).collect();
        let text = String::from_utf8_lossy(&block);
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if let (Some(kind), Some(data)) = (field("event:"), field("data:")) {
            let data = serde_json::from_str(data).unwrap_or_default();
            out.push(LiveEvent { kind: kind.to_owned(), data });
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn events_come_whole_however_they_are_cut() {
        let all = b": watching\n\nevent: rollout\ndata: {\"name\":\"ro-1\"}\n\n: alive\n\nevent: lagged\ndata: {\"missed\":3}\n\n";
        for cut in 0..all.len() {
            let mut buffer = all[..cut].to_vec();
            let mut seen = events(&mut buffer);
            buffer.extend_from_slice(&all[cut..]);
            seen.extend(events(&mut buffer));
            let kinds: Vec<&str> = seen.iter().map(|event| event.kind.as_str()).collect();
            assert_eq!(kinds, ["rollout", "lagged"], "{cut}");
            assert_eq!(seen[1].data["missed"], 3);
        }
    }

    #[test]
    fn only_this_machine_is_asked_without_tls() {
        let address = |server: &str| place(&Settings::new(server)).map(|(_, authority)| authority);
        assert_eq!(address("http://127.0.0.1:8443").unwrap(), "127.0.0.1:8443");
        assert_eq!(address("http://[::1]:8443/").unwrap(), "[::1]:8443");
        assert!(address("unix:/run/keepwall/api.sock").is_ok());
        for bad in ["http://192.0.2.1:80", "ftp://x", "https://user@host", "https://", "unix:relative", "host:1"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_no_problem_is_told_as_it_came() {
        let error = refused(502, b"<html>\x1b[31mBad Gateway");
        assert!(error.to_string().contains("502") && !error.to_string().contains('\x1b'), "{error}");
    }
}
