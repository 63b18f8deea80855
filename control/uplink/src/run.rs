//! The uplink's life: dial, say what is held, take what is offered, prove contact, confirm; and again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use keepwall_fleet::bundle::Bundle;
use keepwall_fleet::sync::{self, Decision, Holder, Refusal, State};
use keepwall_wire::{
    Body, FromAgent, FromServer, HEAD, HEARTBEAT_S, Heartbeat, Outcome, POLL_PATH, POLL_WAIT_S, REPORT_ROWS_MAX, Renew,
    SERVER_FRAME_MAX, from_agent, from_server, read_offer, write_hello,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::contact::Contact;
use crate::dial::Route;
use crate::identity::{Identity, Request};
use crate::machine::{Applied, Machine};
use crate::tls::{Speak, Tls};

/// How long the server may be silent after a hello.
const WELCOME: Duration = Duration::from_secs(30);
/// How long a frame may take to leave.
const WRITE: Duration = Duration::from_secs(60);
/// A probe that takes longer has not got through.
const PROBE: Duration = Duration::from_secs(5);
/// Between two probes.
const PROBE_AGAIN: Duration = Duration::from_millis(500);
/// What is not proved so long before the machine reverts by itself is taken back.
const MARGIN: Duration = Duration::from_secs(2);
/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A stream that was welcomed and ended sooner was cut by something in between.
const SHORT: Duration = Duration::from_secs(120);
/// So many short streams in a row, and polls are tried instead.
const SHORT_MAX: u32 = 3;
/// After so long of polling, a stream is tried again.
const POLLING: Duration = Duration::from_secs(600);
/// The largest answer to a poll.
const POLL_BYTES_MAX: usize = SERVER_FRAME_MAX + 64 * 1024;

/// How often things are looked at.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Heartbeats.
    pub heartbeat: Duration,
    /// The machine's state; told to the server when it differs.
    pub status: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { heartbeat: Duration::from_secs(u64::from(HEARTBEAT_S)), status: Duration::from_secs(5) }
    }
}

/// Why the uplink ends by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Stopped,
}

/// How one connection ended.
enum Cut {
    Stopped,
    /// The server says why and when to come back.
    Goodbye(String, Duration),
    /// In words; true if it was welcomed before.
    Lost(String, bool),
}

/// One machine's uplink.
pub struct Uplink<M> {
    machine: Arc<M>,
    identity: Identity,
    tls: Tls,
    route: Route,
    /// Where renewed certificates are kept.
    directory: Option<PathBuf>,
    pace: Pace,
    /// An offer that is being applied; it goes on when the stream breaks.
    work: Option<JoinHandle<(sync::Outcome, String)>>,
    /// Why the newest offer failed, until the server knows.
    why: Option<(sync::Outcome, String)>,
    renewal: Option<Request>,
    renew_at: u64,
    spread: Duration,
    /// The number of the last report that is on its way.
    reported: Option<u64>,
    dice: u64,
}

struct Held {
    holder: Holder,
    bundle: Bundle,
}

fn say(said: from_agent::Say) -> Bytes {
    keepwall_wire::frame(&FromAgent { say: Some(said) })
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Renewal is due after two thirds of a certificate's life.
fn renewal_due(life: (u64, u64)) -> u64 {
    life.0 + life.1.saturating_sub(life.0) / 3 * 2
}

impl<M: Machine> Uplink<M> {
    /// An uplink that has not dialled yet. With a `directory`, renewed certificates are kept there.
    ///
    /// # Errors
    /// The identity is damaged.
    pub fn new(machine: M, identity: Identity, directory: Option<PathBuf>, pace: Pace) -> Result<Uplink<M>, String> {
        let mut dice = [0; 8];
        ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut dice)
            .map_err(|_| "the kernel has no randomness")?;
        let route = Route { server: identity.server.clone(), proxy: identity.proxy.clone(), from: None };
        Ok(Uplink {
            machine: Arc::new(machine),
            tls: identity.tls()?,
            renew_at: renewal_due(identity.life()?),
            route,
            identity,
            directory,
            pace,
            work: None,
            why: None,
            renewal: None,
            spread: Duration::from_millis(500),
            reported: None,
            dice: u64::from_be_bytes(dice) | 1,
        })
    }

    /// Dials from this address, for machines with several.
    #[must_use]
    pub fn from_address(mut self, address: std::net::IpAddr) -> Uplink<M> {
        self.route.from = Some(address);
        self
    }

    /// A moment within `span`, so that not everybody comes at once.
    fn within(&mut self, span: Duration) -> Duration {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        Duration::from_millis(self.dice % (u64::try_from(span.as_millis()).unwrap_or(u64::MAX).max(1)))
    }

    /// Runs until it is stopped.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Ended {
        let mut failures = 0u32;
        let mut short = 0u32;
        let mut polling_until: Option<Instant> = None;
        loop {
            let began = Instant::now();
            let polling = polling_until.is_some_and(|until| began < until);
            let cut = if polling { self.poll(&mut stop).await } else { self.stream(&mut stop).await };
            let pause = match cut {
                Cut::Stopped => return Ended::Stopped,
                Cut::Goodbye(reason, after) => {
                    if reason == "revoked" {
                        self.machine.contact(Contact::Revoked).await;
                        tracing::warn!(
                            "the server no longer takes this machine's certificate: it was removed or revoked. What is \
                             enforced stays. Make a token for its name and run `keepwall enroll` with it, or run \
                             `keepwall leave`"
                        );
                    } else {
                        tracing::info!(reason, "the server ends the stream");
                    }
                    failures = 0;
                    after.max(self.spread)
                }
                Cut::Lost(why, welcomed) => {
                    failures = if welcomed { 0 } else { failures.saturating_add(1) };
                    short = if welcomed && began.elapsed() < SHORT && !polling { short + 1 } else { 0 };
                    tracing::warn!(why, failures, "no contact with the server; what is enforced stays");
                    self.machine.contact(Contact::Lost { why }).await;
                    if short >= SHORT_MAX {
                        tracing::warn!("streams are cut on the way again and again: polling for ten minutes");
                        polling_until = Some(Instant::now() + POLLING);
                        short = 0;
                    }
                    self.spread.saturating_mul(1 << failures.min(6))
                }
            };
            // Half of the pause is sure, the other half is chance: a whole fleet comes back spread out.
            let pause = pause.min(PAUSE_MAX.max(self.spread));
            let pause = if failures == 0 { self.within(pause) } else { pause / 2 + self.within(pause / 2) };
            tokio::select! {
                () = sleep(pause) => {}
                () = stopped(&mut stop) => return Ended::Stopped,
            }
        }
    }

    /// What the machine holds; first, what is being applied ends.
    async fn held(&mut self) -> Result<Held, String> {
        if let Some(work) = self.work.take()
            && let Ok((outcome, why)) = work.await
            && outcome.result == sync::Applied::Failed
        {
            self.why = Some((outcome, why));
        }
        let force = self.machine.in_force().await?;
        let holder = Holder::new(&self.identity.instance, force.held, force.tried);
        Ok(Held { holder, bundle: force.bundle })
    }

    async fn hello(&mut self) -> Result<(Held, BytesMut), String> {
        let held = self.held().await?;
        let mut hello = write_hello(&held.holder.hello());
        hello.version = env!("CARGO_PKG_VERSION").to_owned();
        hello.status = self.machine.status().await;
        let mut out = BytesMut::from(&say(from_agent::Say::Hello(hello))[..]);
        if let Some((outcome, why)) = self.why.take() {
            out.extend(say(from_agent::Say::Outcome(Outcome::of(&outcome, why))));
        }
        self.reported = None;
        Ok((held, out))
    }

    async fn stream(&mut self, stop: &mut watch::Receiver<bool>) -> Cut {
        let lost = |why: String| Cut::Lost(why, false);
        let mut tls = match self.route.dial(self.tls.speaking(Speak::Stream)).await {
            Ok(tls) => tls,
            Err(why) => return lost(why),
        };
        let (mut held, hello) = match self.hello().await {
            Ok(hello) => hello,
            Err(why) => return lost(format!("this machine's agent: {why}")),
        };
        if let Err(why) = write(&mut tls, &hello).await {
            return lost(why);
        }
        drop(hello);
        let mut inbox = Inbox::default();
        match timeout(WELCOME, inbox.frame(&mut tls)).await {
            Ok(Ok(FromServer { say: Some(from_server::Say::Welcome(welcome)) })) => {
                self.spread = Duration::from_millis(u64::from(welcome.spread_ms.clamp(100, 600_000)));
            }
            Ok(Ok(FromServer { say: Some(from_server::Say::Goodbye(goodbye)) })) => {
                return Cut::Goodbye(goodbye.reason, Duration::from_millis(u64::from(goodbye.retry_after_ms)));
            }
            Ok(Ok(_)) => return lost("the server does not speak as it should".into()),
            Ok(Err(why)) => return lost(why),
            Err(_) => return lost("the server does not answer a hello".into()),
        }
        tracing::info!(server = self.route.server, "connected");
        self.machine.contact(Contact::Made).await;
        self.converse(&mut tls, &mut inbox, &mut held, stop).await
    }

    async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        tls: &mut S,
        inbox: &mut Inbox,
        held: &mut Held,
        stop: &mut watch::Receiver<bool>,
    ) -> Cut {
        let mut heartbeat = interval(self.pace.heartbeat);
        let mut look = interval(self.pace.status);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.tick().await;
        let mut told = None;
        loop {
            let out = tokio::select! {
                frame = inbox.frame(tls) => match frame {
                    Err(why) => return Cut::Lost(why, true),
                    Ok(FromServer { say: Some(said) }) => match self.take(said, held).await {
                        Ok(answer) => answer,
                        Err(cut) => return cut,
                    },
                    Ok(FromServer { say: None }) => None,
                },
                done = finished(&mut self.work) => {
                    self.work = None;
                    let mut out = BytesMut::from(&self.done(done, held).await[..]);
                    // What it did to the machine is seen with it.
                    out.extend(self.look(&mut told).await.unwrap_or_default());
                    Some(out.freeze())
                }
                _ = heartbeat.tick() => Some(say(from_agent::Say::Heartbeat(Heartbeat {}))),
                _ = look.tick() => self.look(&mut told).await,
                () = stopped(stop) => return Cut::Stopped,
            };
            if let Some(out) = out
                && let Err(why) = write(tls, &out).await
            {
                return Cut::Lost(why, true);
            }
        }
    }

    /// What the machine has to tell.
    async fn look(&mut self, told: &mut Option<keepwall_wire::Status>) -> Option<Bytes> {
        let mut out = BytesMut::new();
        if self.work.is_none()
            && let Some(status) = self.machine.status().await
            && told.as_ref() != Some(&status)
        {
            out.extend(say(from_agent::Say::Status(status.clone())));
            *told = Some(status);
        }
        if self.reported.is_none() {
            let report = self.machine.rows(REPORT_ROWS_MAX).await;
            if !report.rows.is_empty() {
                self.reported = Some(report.through);
                out.extend(say(from_agent::Say::Report(report)));
            }
        }
        out.extend(self.renewal());
        (!out.is_empty()).then(|| out.freeze())
    }

    fn renewal(&mut self) -> Option<Bytes> {
        if now_s() < self.renew_at || self.renewal.is_some() {
            return None;
        }
        let request = Request::new().ok()?;
        let der = request.der().ok()?;
        self.renewal = Some(request);
        // Should no answer come, it is tried again.
        self.renew_at = now_s() + 300;
        Some(say(from_agent::Say::Renew(Renew { request: der.into() })))
    }

    /// What the server says, and what to answer.
    async fn take(&mut self, said: from_server::Say, held: &mut Held) -> Result<Option<Bytes>, Cut> {
        match said {
            from_server::Say::Welcome(_) => Ok(None),
            from_server::Say::Goodbye(goodbye) => {
                Err(Cut::Goodbye(goodbye.reason, Duration::from_millis(u64::from(goodbye.retry_after_ms))))
            }
            from_server::Say::Kept(kept) => {
                self.reported = None;
                self.machine.kept(kept.through).await;
                Ok(None)
            }
            from_server::Say::Renewed(renewed) => {
                self.take_renewed(&renewed);
                Ok(None)
            }
            from_server::Say::Offer(offer) => Ok(self.take_offer(&offer, held)),
        }
    }

    fn take_renewed(&mut self, renewed: &keepwall_wire::Renewed) {
        let Some(request) = self.renewal.take() else { return };
        let Some(certificate) = renewed.chain.first() else {
            tracing::warn!(why = renewed.refused, "the server does not renew the certificate");
            return;
        };
        let identity = self.identity.renewed(certificate, &request.key());
        let checked = identity.tls().and_then(|tls| Ok((tls, identity.life()?)));
        let (tls, life) = match checked {
            Ok(checked) => checked,
            Err(why) => {
                tracing::warn!(why, "the renewed certificate is no good; the old one stays");
                return;
            }
        };
        // On disk first: what is used must survive a restart.
        if let Some(directory) = &self.directory
            && let Err(why) = identity.save(directory)
        {
            tracing::warn!(why, "the renewed certificate cannot be kept; the old one stays");
            return;
        }
        tracing::info!("the certificate is renewed");
        (self.tls, self.renew_at, self.identity) = (tls, renewal_due(life), identity);
    }

    /// Looks at an offer; the answer, unless it is being applied.
    fn take_offer(&mut self, offer: &keepwall_wire::Offer, held: &mut Held) -> Option<Bytes> {
        let refuse = |state: State, why: Refusal, detail: String| {
            let outcome = sync::Outcome { state, result: sync::Applied::Refused(why) };
            Some(say(from_agent::Say::Outcome(Outcome::of(&outcome, detail))))
        };
        let (head, body) = match read_offer(offer) {
            Ok(read) => read,
            Err(error) => {
                let state = keepwall_wire::state_of(offer.state.as_ref()).unwrap_or_default();
                return refuse(state, Refusal::BadBody, error.to_string());
            }
        };
        if self.work.is_some() {
            // One at a time; the server knows that and does not do this.
            return refuse(head.state, Refusal::OtherBase, "another offer is being applied".into());
        }
        match held.holder.decide(&head) {
            Decision::Apply => {}
            Decision::Again(outcome) | Decision::Refuse(outcome) => {
                return Some(say(from_agent::Say::Outcome(Outcome::of(&outcome, ""))));
            }
        }
        let bundle = match body {
            Body::Whole(bundle) => Ok(bundle),
            Body::Change(change) => held.bundle.changed(&change),
        };
        let bundle = match bundle {
            Ok(bundle) if bundle.digest() == head.state.digest => bundle,
            Ok(_) => return refuse(head.state, Refusal::BadBody, "it does not lead to what was announced".into()),
            Err(error) => return refuse(head.state, Refusal::BadBody, error.to_string()),
        };
        held.holder.begin(head.state);
        let (machine, route, tls) = (Arc::clone(&self.machine), self.route.clone(), self.tls.clone());
        let (within, note) = (offer.confirm_within_s.clamp(5, 3_600), offer.note.clone());
        self.work = Some(tokio::spawn(async move {
            let done = apply(&*machine, &route, &tls, head.state, &bundle, within, &note).await;
            match done {
                Ok(()) => (sync::Outcome { state: head.state, result: sync::Applied::Yes }, String::new()),
                Err(why) => (sync::Outcome { state: head.state, result: sync::Applied::Failed }, why),
            }
        }));
        None
    }

    /// An offer was applied, or not.
    async fn done(&mut self, done: Option<(sync::Outcome, String)>, held: &mut Held) -> Bytes {
        let (outcome, why) = match done {
            Some(done) => done,
            None => {
                let state = held.holder.tried();
                (sync::Outcome { state, result: sync::Applied::Failed }, "it broke off".to_owned())
            }
        };
        if outcome.result == sync::Applied::Yes {
            held.holder.applied(outcome.state);
        } else {
            held.holder.failed(outcome.state);
        }
        // The machine's own word, not ours.
        if let Ok(force) = self.machine.in_force().await {
            *held =
                Held { holder: Holder::new(&self.identity.instance, force.held, force.tried), bundle: force.bundle };
        }
        say(from_agent::Say::Outcome(Outcome::of(&outcome, why)))
    }

    /// One poll.
    async fn poll(&mut self, stop: &mut watch::Receiver<bool>) -> Cut {
        let lost = |why: String| Cut::Lost(why, false);
        let (mut held, mut out) = match self.hello().await {
            Ok(hello) => hello,
            Err(why) => return lost(format!("this machine's agent: {why}")),
        };
        out.extend(self.look(&mut None).await.unwrap_or_default());
        let answered = tokio::select! {
            answered = timeout(Duration::from_secs(POLL_WAIT_S) + WELCOME, post(&self.route, &self.tls, out.freeze())) => {
                answered.unwrap_or_else(|_| Err("the server does not answer a poll".into()))
            }
            () = stopped(stop) => return Cut::Stopped,
        };
        let frames = match answered {
            Ok(frames) => frames,
            Err(why) => return lost(why),
        };
        for said in frames.into_iter().filter_map(|frame| frame.say) {
            if let from_server::Say::Welcome(welcome) = &said {
                self.spread = Duration::from_millis(u64::from(welcome.spread_ms.clamp(100, 600_000)));
                self.machine.contact(Contact::Made).await;
            }
            // What becomes of an offer, the next poll's hello says.
            match self.take(said, &mut held).await {
                Ok(_) => {}
                Err(cut) => return cut,
            }
        }
        Cut::Goodbye("polled".into(), Duration::ZERO)
    }
}

/// Until it is told to stop, or nobody is left to tell it.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Waits for what is being applied; for ever, if nothing is.
async fn finished(work: &mut Option<JoinHandle<(sync::Outcome, String)>>) -> Option<(sync::Outcome, String)> {
    match work {
        Some(work) => work.await.ok(),
        None => std::future::pending().await,
    }
}

/// Applies, proves that the server can still be reached over a new connection, confirms; else takes it back.
async fn apply<M: Machine>(
    machine: &M,
    route: &Route,
    tls: &Tls,
    state: State,
    bundle: &Bundle,
    confirm_within_s: u32,
    note: &str,
) -> Result<(), String> {
    let until = Instant::now() + Duration::from_secs(u64::from(confirm_within_s)).saturating_sub(MARGIN);
    if machine.apply(state, bundle, confirm_within_s, note).await? == Applied::Confirmed {
        return Ok(());
    }
    loop {
        // Not longer than there is time to take it back, and to say why.
        let why = match timeout(until.saturating_duration_since(Instant::now()).min(PROBE), probe(route, tls)).await {
            Ok(Ok(())) => return machine.confirm(state).await,
            Ok(Err(why)) => why,
            Err(_) => "the server does not answer".to_owned(),
        };
        if Instant::now() + PROBE_AGAIN >= until {
            let taken_back = machine.revert(state).await;
            let reverted = match taken_back {
                Ok(()) => "taken back".to_owned(),
                Err(error) => format!("it reverts by itself ({error})"),
            };
            return Err(format!("no new connection to the server gets through afterwards: {why}; {reverted}"));
        }
        sleep(PROBE_AGAIN).await;
    }
}

async fn probe(route: &Route, tls: &Tls) -> Result<(), String> {
    let mut stream = route.dial(tls.speaking(Speak::Probe)).await?;
    let byte = stream.read_u8().await.map_err(|error| error.to_string())?;
    if byte == b'k' { Ok(()) } else { Err("the server does not greet as it should".to_owned()) }
}

async fn post(route: &Route, tls: &Tls, body: Bytes) -> Result<Vec<FromServer>, String> {
    let stream = route.dial(tls.speaking(Speak::Http)).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    let request = hyper::Request::post(POLL_PATH)
        .header("host", &route.server)
        .header("content-type", "application/octet-stream")
        .body(Full::new(body))
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), POLL_BYTES_MAX).collect().await;
    let body = body.map_err(|error| error.to_string())?.to_bytes();
    if !status.is_success() {
        return Err(format!("the server answers {status}: {}", String::from_utf8_lossy(&body).escape_default()));
    }
    keepwall_wire::frames(&body, SERVER_FRAME_MAX).map_err(|error| error.to_string())
}

async fn write<S: AsyncWrite + Unpin>(tls: &mut S, frame: &[u8]) -> Result<(), String> {
    let sent = async {
        tls.write_all(frame).await?;
        tls.flush().await
    };
    match timeout(WRITE, sent).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("the connection broke: {error}")),
        Err(_) => Err("the server does not take what is sent".into()),
    }
}

/// A frame that arrives in pieces, between which other things happen.
#[derive(Default)]
struct Inbox {
    head: [u8; HEAD],
    head_got: usize,
    body: BytesMut,
    body_len: usize,
}

impl Inbox {
    /// Reads on. Nothing is lost if it is dropped while it waits.
    async fn frame<S: AsyncRead + Unpin>(&mut self, tls: &mut S) -> Result<FromServer, String> {
        /// Memory for a frame grows with what arrives, in steps of this.
        const STEP: usize = 64 * 1024;
        let broke = |error: std::io::Error| match error.kind() {
            // A server that is killed says no farewell; the TLS library's words for that are for programmers.
            std::io::ErrorKind::UnexpectedEof => "the connection ended".to_owned(),
            _ => format!("the connection broke: {error}"),
        };
        while self.head_got < HEAD {
            match tls.read(&mut self.head[self.head_got..]).await.map_err(broke)? {
                0 => return Err("the connection ended".into()),
                n => self.head_got += n,
            }
            if self.head_got == HEAD {
                self.body_len = keepwall_wire::length(self.head, SERVER_FRAME_MAX).map_err(|e| e.to_string())?;
            }
        }
        while self.body.len() < self.body_len {
            let left = self.body_len - self.body.len();
            self.body.reserve(left.min(STEP));
            let mut limited = (&mut *tls).take(left as u64);
            if limited.read_buf(&mut self.body).await.map_err(broke)? == 0 {
                return Err("the connection ended".into());
            }
        }
        (self.head_got, self.body_len) = (0, 0);
        keepwall_wire::message(self.body.split().freeze()).map_err(|error| error.to_string())
    }
}
