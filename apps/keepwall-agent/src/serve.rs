//! The local socket: who may ask what, one request per connection, a bounded number of them at once.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use keepwall_host::door::Door;
use keepwall_host::peer::Peer;
use keepwall_link::{
    Envelope, FRAME_BYTES_MAX, FRAME_BYTES_MAX_UNPRIVILEGED, Refused, Request, Response, VERSION, read_frame,
    write_frame,
};
use keepwall_nft::{ChangeEvent, ChangeListener};
use keepwall_secgroup::lower::TABLE;

use crate::agent::Agent;
use crate::log;
use crate::stream;

/// Connections served at once; each is a thread with a small stack. More are told to come back.
const CONNECTIONS_MAX: usize = 32;
/// A client that sends its request slower than this is let go.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// How often the agent looks at its deadlines.
const TICK: Duration = Duration::from_millis(200);
/// How often it compares the kernel with what it should hold, if nobody tells of a change before.
const VERIFY_EVERY: Duration = Duration::from_secs(30);
/// After our own table changed without us: at most this often.
const VERIFY_AT_MOST: Duration = Duration::from_millis(500);

pub(crate) type Shared = Arc<Mutex<Agent>>;

/// A thread that panicked held the state for reading or had not yet changed it: the kernel and the disk hold the
/// truth, and the next verification puts the rest right.
pub(crate) fn hold(shared: &Shared) -> MutexGuard<'_, Agent> {
    shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Runs until it is killed.
pub(crate) fn run(state: &Path, socket: &Path) -> Result<(), String> {
    let agent = Agent::start(state, socket)?;
    let door = Door::open(socket).map_err(|error| format!("cannot listen at {}: {error}", socket.display()))?;
    log(format!("listening at {}", socket.display()));
    agent.admit();
    let shared: Shared = Arc::new(Mutex::new(agent));
    let of_ticker = Arc::clone(&shared);
    spawn("ticker", move || tick(&of_ticker))?;
    let of_watcher = Arc::clone(&shared);
    spawn("watcher", move || watch(&of_watcher))?;
    let served = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, peer) = match door.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                log(format!("cannot accept: {error}"));
                thread::sleep(TICK);
                continue;
            }
        };
        if served.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            served.fetch_sub(1, Ordering::SeqCst);
            let busy = Refused {
                code: "busy".into(),
                message: format!("{CONNECTIONS_MAX} requests are being served already"),
                help: "try again in a moment".into(),
            };
            let mut stream = stream;
            let _ = stream.set_write_timeout(Some(TICK));
            let _ = write_frame(&mut stream, &Response::Refused(busy));
            continue;
        }
        let (shared, served_here) = (Arc::clone(&shared), Arc::clone(&served));
        let started = spawn("request", move || {
            // Counted down however the request ends.
            struct Leave(Arc<AtomicUsize>);
            impl Drop for Leave {
                fn drop(&mut self) {
                    self.0.fetch_sub(1, Ordering::SeqCst);
                }
            }
            let _leave = Leave(served_here);
            serve(stream, &peer, &shared);
        });
        if let Err(error) = started {
            log(error);
            served.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let started = thread::Builder::new().name(name.to_owned()).stack_size(2 << 20).spawn(work);
    started.map(|_| ()).map_err(|error| format!("cannot start a thread: {error}"))
}

fn tick(shared: &Shared) {
    let mut verified = Instant::now();
    loop {
        thread::sleep(TICK);
        let mut agent = hold(shared);
        agent.tick();
        if verified.elapsed() >= VERIFY_EVERY {
            if let Err(refused) = agent.verify() {
                log(refused.message);
            }
            verified = Instant::now();
        }
    }
}

/// Looks again at once when somebody else has touched our table.
fn watch(shared: &Shared) {
    let mut changes = match ChangeListener::open() {
        Ok(changes) => changes,
        Err(error) => return log(format!("changes by others are seen only every {VERIFY_EVERY:?}: {error}")),
    };
    let mut lost = 0;
    loop {
        let mut ours = false;
        match changes.next(Duration::from_secs(3600)) {
            Ok(Some(ChangeEvent::Changed(change))) => ours = change.table == TABLE,
            Ok(_) => {}
            Err(error) => {
                log(format!("cannot listen for changes: {error}"));
                thread::sleep(VERIFY_EVERY);
            }
        }
        ours |= std::mem::replace(&mut lost, changes.times_lost()) != changes.times_lost();
        if !ours {
            continue;
        }
        thread::sleep(VERIFY_AT_MOST);
        // What came meanwhile is answered by the same look. Our own changes find nothing to repair.
        while matches!(changes.next(Duration::ZERO), Ok(Some(_))) {}
        if let Err(refused) = hold(shared).verify() {
            log(refused.message);
        }
    }
}

fn serve(mut stream: UnixStream, peer: &Peer, shared: &Shared) {
    let trusted = peer.uid == 0 || hold(shared).is_bound_to(peer.uid);
    let max = if trusted { FRAME_BYTES_MAX } else { FRAME_BYTES_MAX_UNPRIVILEGED };
    if stream.set_read_timeout(Some(REQUEST_PATIENCE)).is_err()
        || stream.set_write_timeout(Some(REQUEST_PATIENCE)).is_err()
    {
        return;
    }
    let refusal = |code: &str, message: String, help: &str| {
        Response::Refused(Refused { code: code.into(), message, help: help.into() })
    };
    let response = match read_frame::<Envelope>(&mut stream, max) {
        Err(keepwall_link::FrameError::Closed) => return,
        Err(error) => {
            refusal("bad-request", error.to_string(), "keepwall and keepwall-agent should have the same version")
        }
        Ok(envelope) if envelope.version != VERSION => refusal(
            "bad-request",
            format!("this agent speaks version {VERSION} of the local protocol, not {}", envelope.version),
            "install the same version of keepwall and keepwall-agent",
        ),
        Ok(Envelope { request, .. }) => {
            let agent = hold(shared);
            match (agent.may_ask(peer.uid, &request), request) {
                (Err(refused), _) => Response::Refused(refused),
                (Ok(()), Request::Flows) => {
                    drop(agent);
                    return stream::flows(stream, shared);
                }
                (Ok(()), Request::Trace(filter)) => {
                    drop(agent);
                    return stream::trace(stream, shared, &filter);
                }
                // These ask the kernel only; the agent's state is not held meanwhile.
                (Ok(()), Request::Sessions) => {
                    drop(agent);
                    sessions(shared)
                }
                (Ok(()), Request::Published) => {
                    drop(agent);
                    ports()
                }
                (Ok(()), request) => answer(request, peer, agent),
            }
        }
    };
    // Whoever asked may be gone by now.
    let _ = write_frame(&mut stream, &response);
}

fn published(of: keepwall_nft::Published) -> keepwall_link::Published {
    keepwall_link::Published { protocol: of.protocol, port: of.port, address: of.address, target: of.target, by: of.by }
}

fn no(message: String) -> Response {
    Response::Refused(Refused { code: "kernel".into(), message, help: String::new() })
}

fn sessions(shared: &Shared) -> Response {
    stream::sessions(shared).map_or_else(no, Response::Sessions)
}

fn ports() -> Response {
    match keepwall_nft::published() {
        Ok(all) => Response::Published(all.into_iter().map(published).collect()),
        Err(error) => no(crate::enforce::chain(&error)),
    }
}

fn answer(request: Request, peer: &Peer, mut agent: MutexGuard<'_, Agent>) -> Response {
    let done = match request {
        Request::Status => Ok(Response::Status(Box::new(agent.status()))),
        Request::Intent => Ok(Response::Intent(agent.intent().cloned().map(Box::new))),
        Request::Apply(apply) => agent.apply(*apply, peer).map(Response::Applied),
        Request::Confirm { generation, danger_same_session } => {
            agent.confirm(generation, danger_same_session, peer).map(Response::Done)
        }
        Request::Revert { generation } => agent.revert_to_confirmed(generation).map(Response::Done),
        Request::Remove => agent.remove().map(Response::Done),
        Request::Bind { instance, server, uid } => agent.bind(instance, server, uid).map(Response::Done),
        Request::Unbind => agent.unbind().map(Response::Done),
        Request::Fleet => agent.fleet().map(Response::Fleet),
        Request::Counters => agent.counters().map(Response::Counters),
        Request::Foreign => agent.foreign().map(Response::Foreign),
        Request::Verify => agent.verify().map(Response::Verified),
        Request::Flows | Request::Trace(_) | Request::Sessions | Request::Published => unreachable!("answered before"),
    };
    done.unwrap_or_else(Response::Refused)
}
