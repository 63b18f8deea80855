//! What the fleet's own streams are measured beside: the same number of gRPC streams, with the same TLS, on the same
//! machine.
//!
//! ```text
//!  keepwall-grpc-stand-in N ──▶ server (its own process: memory is its alone)
//!        │                        ▲ HTTP/2 over mutual TLS
//!        ├──▶ swarm 1 (N/2 streams, each a connection of its own)
//!        └──▶ swarm 2
//! ```
//!
//! The service is one call, streams both ways: a client says hello, receives what the server pushes to all, and
//! acknowledges each push, as an instance must. It is written by hand over tonic, so that no compiler of protocol files
//! is needed. One line of JSON comes out.
//!
//! Two kinds of pushes are measured. A *bare* one is 4 KiB that nobody looks into: less work than any fleet has. An
//! *offer* is what the fleet's own streams carry, a change of two sets: each client reads it, applies it to what it
//! holds, and compares digests, with the same code as an instance. On both, nothing is enrolled, kept or decided here.

use std::convert::Infallible;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use keepwall_core::Prefix;
use keepwall_fleet::bundle::{Bundle, Set};
use prost::bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tonic::body::Body;
use tonic::codec::{BufferSettings, Codec};
use tonic::server::StreamingService;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower_service::Service;

/// Streams of one process: 20,000 descriptors a process are the limit where this was written.
const SWARM_MAX: usize = 5_000;
/// Handshakes at once in each swarm.
const DIALS: usize = 64;
/// Pushes to all; the median counts.
const ROUNDS: usize = 5;
/// Bytes of each.
const PUSH: usize = 4_096;
/// Between the last hello and the look at the server's memory.
const REST: Duration = Duration::from_secs(10);
/// How long anything may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(300);
/// Messages encoded ahead of the socket, bytes: tonic's own default.
const YIELD: usize = 32 * 1_024;
/// Bytes that tonic sets aside for each direction of a stream: its own default.
const BUFFER: usize = 8 * 1_024;
/// The one call that there is; the server does not ask which.
const CALL: &str = "/keepwall.StandIn/Stream";
/// Names of what a process is given: its certificate, its key, the authority, and the size of buffers.
const GIVEN: [&str; 4] = ["STAND_IN_CERTIFICATE", "STAND_IN_KEY", "STAND_IN_AUTHORITY", "STAND_IN_BUFFER"];

/// What goes both ways: a hello is an empty one.
#[derive(Clone, PartialEq, prost::Message)]
struct Message {
    #[prost(bytes = "bytes", tag = "1")]
    body: Bytes,
    /// What the change leads to; empty in a bare push.
    #[prost(bytes = "bytes", tag = "2")]
    digest: Bytes,
}

/// What a client holds: two lists of 60, which offers replace, and a group of 5,000, which stays. `version` is even or
/// odd.
fn held(version: usize) -> Bundle {
    let address = |text: String| text.parse::<Prefix>().expect("an address");
    let list = |half: usize| (0..60).map(|n| address(format!("fd00:{}:{half}:{n:x}::/64", version % 2))).collect();
    let group = (0..5_000).map(|n| address(format!("10.0.{}.{}", n / 250, n % 250))).collect();
    let sets = [("group:web", group), ("prefix-list:one", list(1)), ("prefix-list:two", list(2))];
    let sets = sets.into_iter().map(|(name, members)| (name.into(), Set::new(members))).collect();
    Bundle::from_parts(b"{}".to_vec(), sets).expect("within limits")
}

/// The offer that leads to a version from the one before.
fn offer(version: usize) -> Message {
    let (before, after) = (held(version + 1), held(version));
    let body = keepwall_wire::write_change(&before.change_to(&after));
    Message { body, digest: Bytes::copy_from_slice(&after.digest()) }
}

/// Protobuf, with buffers of the size that was asked for.
#[derive(Clone, Copy)]
struct Coding(BufferSettings);

impl Codec for Coding {
    type Encode = Message;
    type Decode = Message;
    type Encoder = <ProstCodec<Message, Message> as Codec>::Encoder;
    type Decoder = <ProstCodec<Message, Message> as Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<Message, Message>::raw_encoder(self.0)
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<Message, Message>::raw_decoder(self.0)
    }
}

fn coding() -> Coding {
    let buffer = std::env::var(GIVEN[3]).ok().and_then(|text| text.parse().ok()).unwrap_or(BUFFER);
    Coding(BufferSettings::new(buffer, YIELD))
}

/// Microseconds since 1970: the same clock in every process.
fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Why something of tonic's failed, with what is below.
fn whole(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        out = format!("{out}: {error}");
        below = error.source();
    }
    out
}

fn given(n: usize) -> Result<String, String> {
    std::env::var(GIVEN[n]).map_err(|_| format!("{} is not set", GIVEN[n]))
}

fn tell(line: impl std::fmt::Display) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(text)
}

// ---- the server

#[derive(Clone)]
struct Pushes {
    to_all: broadcast::Sender<Message>,
    /// Streams that have said hello.
    greeted: Arc<AtomicUsize>,
    coding: Coding,
}

type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl StreamingService<Message> for Pushes {
    type Response = Message;
    type ResponseStream = Pushed;
    type Future = Answer<Result<Response<Pushed>, Status>>;

    fn call(&mut self, request: Request<Streaming<Message>>) -> Self::Future {
        let (pushes, greeted) = (self.to_all.subscribe(), Arc::clone(&self.greeted));
        Box::pin(async move {
            let mut said = request.into_inner();
            said.message().await?;
            greeted.fetch_add(1, Ordering::SeqCst);
            Ok(Response::new(Pushed { pushes: BroadcastStream::new(pushes), said }))
        })
    }
}

/// What one client is sent, while it listens: no task and no queue beside those that tonic has.
struct Pushed {
    pushes: BroadcastStream<Message>,
    said: Streaming<Message>,
}

impl Stream for Pushed {
    type Item = Result<Message, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while let Poll::Ready(said) = Pin::new(&mut self.said).poll_next(cx) {
            match said {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(None),
            }
        }
        Pin::new(&mut self.pushes).poll_next(cx).map_err(|error| Status::data_loss(error.to_string()))
    }
}

impl Service<http::Request<Body>> for Pushes {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let pushes = self.clone();
        Box::pin(async move { Ok(tonic::server::Grpc::new(pushes.coding).streaming(pushes, request).await) })
    }
}

/// Says its port, then obeys: `greeted` is answered with how many streams there are, `push` with `done`.
fn server() -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(text)?;
    let pushes = Pushes { to_all: broadcast::channel(ROUNDS * 4).0, greeted: Arc::default(), coding: coding() };
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(given(0)?, given(1)?))
        .client_ca_root(Certificate::from_pem(given(2)?));
    let _inside = runtime.enter();
    let incoming = TcpIncoming::bind(SocketAddr::from(([127, 0, 0, 1], 0))).map_err(text)?.with_nodelay(Some(true));
    tell(incoming.local_addr().map_err(text)?.port())?;
    let serving = Server::builder().tls_config(tls).map_err(|e| whole(&e))?;
    runtime.spawn(serving.serve_with_incoming(pushes.clone(), incoming));
    let body = Bytes::from((0..PUSH).map(|n| u8::try_from(n * 31 % 251).unwrap_or(0)).collect::<Vec<u8>>());
    let mut version = 0;
    for line in std::io::stdin().lines() {
        match line.map_err(text)?.as_str() {
            "greeted" => tell(pushes.greeted.load(Ordering::SeqCst))?,
            "push" => {
                let bare = Message { body: body.clone(), digest: Bytes::new() };
                pushes.to_all.send(bare).map_err(|_| "nobody is there")?;
                tell("done")?;
            }
            "offer" => {
                version += 1;
                pushes.to_all.send(offer(version)).map_err(|_| "nobody is there")?;
                tell("done")?;
            }
            other => return Err(format!("`{other}` is not understood")),
        }
    }
    Ok(())
}

// ---- the clients

async fn client(
    endpoint: Endpoint,
    coding: Coding,
    turns: Arc<Semaphore>,
    seen: Arc<Mutex<Vec<u64>>>,
) -> Result<(), String> {
    let turn = turns.acquire_owned().await.map_err(text)?;
    let channel: Channel = endpoint.connect().await.map_err(|error| whole(&error))?;
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|error| whole(&error))?;
    // Held open: a client that has nothing more to say still listens.
    let (say, said) = mpsc::channel(1);
    say.send(Message::default()).await.map_err(text)?;
    let request = Request::new(ReceiverStream::new(said));
    let path = http::uri::PathAndQuery::from_static(CALL);
    let mut pushed = grpc.streaming(request, path, coding).await.map_err(text)?.into_inner();
    drop(turn);
    let mut bundle = held(0);
    while let Some(message) = pushed.message().await.map_err(text)? {
        if message.digest.is_empty() {
            if message.body.len() != PUSH {
                return Err(format!("{} bytes came", message.body.len()));
            }
        } else {
            let read = keepwall_wire::read_body(message.body, false).map_err(text)?;
            let keepwall_wire::Body::Change(change) = read else { return Err("a whole bundle came".into()) };
            bundle = bundle.changed(&change).map_err(text)?;
            if bundle.digest() != message.digest[..] {
                return Err("it leads elsewhere".into());
            }
        }
        seen.lock().unwrap_or_else(PoisonError::into_inner).push(now_us());
        say.send(Message::default()).await.map_err(text)?;
    }
    drop(say);
    Err("the server ended a stream".into())
}

/// Opens streams, then answers each line with when the push since the last one came: microseconds, as many as came.
fn swarm(port: &str, count: &str) -> Result<(), String> {
    let count: usize = count.parse().map_err(text)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(1).build().map_err(text)?;
    let tls = ClientTlsConfig::new()
        .identity(Identity::from_pem(given(0)?, given(1)?))
        .ca_certificate(Certificate::from_pem(given(2)?))
        .domain_name("localhost");
    let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{port}"))
        .and_then(|endpoint| endpoint.tcp_nodelay(true).tls_config(tls))
        .map_err(|error| whole(&error))?;
    let (turns, seen) = (Arc::new(Semaphore::new(DIALS)), Arc::new(Mutex::new(Vec::new())));
    for _ in 0..count {
        let one = client(endpoint.clone(), coding(), Arc::clone(&turns), Arc::clone(&seen));
        runtime.spawn(async move {
            if let Err(why) = one.await {
                eprintln!("a stream: {why}");
            }
        });
    }
    for line in std::io::stdin().lines() {
        line.map_err(text)?;
        // Taken before they are told: who hears them may push again at once.
        let times = {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            if seen.len() == count { std::mem::take(&mut *seen) } else { seen.clone() }
        };
        let told: Vec<String> = times.iter().map(u64::to_string).collect();
        tell(told.join(" "))?;
    }
    Ok(())
}

// ---- who starts them

/// A process that ends with us.
struct Part {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Part {
    fn start(args: &[&str], given: &[String; 4]) -> Result<Part, String> {
        let mut child = Command::new(std::env::current_exe().map_err(text)?)
            .args(args)
            .envs(GIVEN.iter().zip(given))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(text)?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else { return Err("no pipes".into()) };
        Ok(Part { child, to, from: BufReader::new(from) })
    }

    fn hear(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.from.read_line(&mut line).map_err(text)? {
            0 => Err("a part of it ended".into()),
            _ => Ok(line.trim().to_owned()),
        }
    }

    fn ask(&mut self, what: &str) -> Result<String, String> {
        writeln!(self.to, "{what}").and_then(|()| self.to.flush()).map_err(text)?;
        self.hear()
    }

    /// Resident memory, KiB.
    fn resident_kib(&self) -> Result<f64, String> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).map_err(text)?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
        line.trim().trim_end_matches(" kB").parse().map_err(text)
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>, String>) -> Result<T, String> {
    let begun = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("after {PATIENCE:?} still not: {what}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An authority, and what server and clients are given.
fn certificates(buffer: usize) -> Result<[[String; 4]; 2], String> {
    let mut params = CertificateParams::new(Vec::new()).map_err(text)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().map_err(text)?).map_err(text)?;
    let one = |name: &str| -> Result<[String; 4], String> {
        let key = KeyPair::generate().map_err(text)?;
        let params = CertificateParams::new(vec![name.to_owned()]).map_err(text)?;
        let certificate = params.signed_by(&key, &authority).map_err(text)?;
        Ok([certificate.pem(), key.serialize_pem(), authority.pem(), buffer.to_string()])
    };
    Ok([one("localhost")?, one("client")?])
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

fn median_ms(all: &mut [u64]) -> f64 {
    all.sort_unstable();
    all[all.len() / 2] as f64 / 1_000.0
}

fn measure(streams: usize, buffer: usize) -> Result<String, String> {
    let [ours, theirs] = certificates(buffer)?;
    let mut server = Part::start(&["server"], &ours)?;
    let port = server.hear()?;
    let at_rest_kib = server.resident_kib()?;
    let swarms = streams.div_ceil(SWARM_MAX).max(2);
    let each = streams / swarms;
    let streams = each * swarms;
    let mut parts: Vec<Part> =
        (0..swarms).map(|_| Part::start(&["swarm", &port, &each.to_string()], &theirs)).collect::<Result<_, _>>()?;
    until("all have said hello", || Ok((server.ask("greeted")? == streams.to_string()).then_some(())))?;
    std::thread::sleep(REST);
    let full_kib = server.resident_kib()?;
    let mut medians = Vec::new();
    for kind in ["push", "offer"] {
        medians.push(pushes(kind, &mut server, &mut parts, each)?);
    }
    Ok(format!(
        "{{\"kib_each\":{:.2},\"kib_grown\":{:.2},\"bare_p50_ms\":{:.1},\"bare_p99_ms\":{:.1},\"p50_ms\":{:.1},\
         \"p99_ms\":{:.1}}}",
        full_kib / streams as f64,
        (full_kib - at_rest_kib) / streams as f64,
        medians[0].0,
        medians[0].1,
        medians[1].0,
        medians[1].1,
    ))
}

/// Pushes of one kind to all: the medians of p50 and p99, from the first that had it, milliseconds.
fn pushes(kind: &str, server: &mut Part, parts: &mut [Part], each: usize) -> Result<(f64, f64), String> {
    let (mut p50s, mut p99s) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        server.ask(kind)?;
        // Asking costs the swarms time, so they are left alone while pushes are on their way.
        std::thread::sleep(Duration::from_secs(3));
        let mut spread = Vec::with_capacity(each * parts.len());
        for part in &mut *parts {
            let times = until("all have what was pushed", || {
                let told = part.ask("seen")?;
                let times: Vec<u64> = told.split_whitespace().filter_map(|time| time.parse().ok()).collect();
                Ok((times.len() == each).then_some(times))
            })?;
            spread.extend(times);
        }
        spread.sort_unstable();
        let first = spread.first().copied().unwrap_or(0);
        spread.iter_mut().for_each(|time| *time -= first);
        p50s.push(percentile(&spread, 50));
        p99s.push(percentile(&spread, 99));
    }
    Ok((median_ms(&mut p50s), median_ms(&mut p99s)))
}

fn main() -> ExitCode {
    const USAGE: &str = "usage: keepwall-grpc-stand-in STREAMS [BYTES OF A BUFFER]";
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse::<usize>().ok().filter(|n| *n >= 2).ok_or_else(|| USAGE.to_owned());
    let done = match words.as_slice() {
        ["server"] => server(),
        ["swarm", port, count] => swarm(port, count),
        [streams] => number(streams).and_then(|n| measure(n, BUFFER)).and_then(tell),
        [streams, buffer] => number(streams).and_then(|n| measure(n, number(buffer)?)).and_then(tell),
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("keepwall-grpc-stand-in: {why}");
            ExitCode::FAILURE
        }
    }
}
