//! The agent of this machine, over its local socket: what the control plane's side calls a machine.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keepwall_core::{Finding, Severity};
use keepwall_fleet::bundle::Bundle;
use keepwall_fleet::sync::State;
use keepwall_link::{
    Apply, Drift, Envelope, FRAME_BYTES_MAX, Mark, Refused, Request, Response, Status, VERSION, read_frame, write_frame,
};
use keepwall_secgroup::intent::Intent;
use keepwall_uplink::Machine;
use keepwall_uplink::contact::{Contact, Noted};
use keepwall_uplink::machine::{Applied, InForce};
use serde_json::json;

use crate::rows::Rows;

/// Applying 10,000 rules takes under a second; an agent that is silent this long is stuck.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the agent takes as a note.
const NOTE_BYTES_MAX: usize = 1_024;
/// Lines of a difference in a finding.
const LINES_MAX: usize = 20;

/// The machine.
#[derive(Clone, Debug)]
pub(crate) struct Agent(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    socket: PathBuf,
    state: PathBuf,
    rows: Mutex<Rows>,
    seen: Mutex<Seen>,
}

/// What was seen last, to see what is new.
#[derive(Debug, Default)]
struct Seen {
    /// The agent's process and its repairs.
    repairs: Option<(u32, u64)>,
    contested: Vec<String>,
    /// What was put in force and is neither confirmed nor taken back, as far as is known here.
    waiting: Option<Mark>,
    /// How it stands with the server, as it is written in the state directory.
    contact: Option<Noted>,
}

fn mark(state: State) -> Mark {
    Mark { generation: state.generation, digest: state.digest }
}

fn state(mark: Mark) -> State {
    State { generation: mark.generation, digest: mark.digest }
}

fn unexpected(response: &Response) -> String {
    let response: String = format!("{response:?}").chars().take(200).collect();
    format!("the agent gave another answer than asked for, install the same version of all programs: {response}")
}

/// Why the agent does not do it.
#[derive(Debug)]
enum No {
    Refused(Refused),
    Silent(String),
}

impl From<No> for String {
    fn from(no: No) -> String {
        match no {
            No::Refused(Refused { message, help, .. }) if help.is_empty() => message,
            No::Refused(Refused { message, help, .. }) => format!("{message} ({help})"),
            No::Silent(why) => why,
        }
    }
}

fn ask(socket: &Path, request: Request) -> Result<Response, No> {
    let silent = |error: &dyn std::fmt::Display| No::Silent(format!("{}: {error}", socket.display()));
    let mut stream = UnixStream::connect(socket).map_err(|error| silent(&error))?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .map_err(|error| silent(&error))?;
    write_frame(&mut stream, &Envelope { version: VERSION, request }).map_err(|error| silent(&error))?;
    match read_frame(&mut stream, FRAME_BYTES_MAX).map_err(|error| silent(&error))? {
        Response::Refused(refused) => Err(No::Refused(refused)),
        other => Ok(other),
    }
}

/// A thread that panicked leaves nothing half done here.
fn hold<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Agent {
    pub(crate) fn new(socket: &Path, state: &Path) -> Agent {
        // What an earlier process wrote may not be so any more.
        Noted::remove(state);
        let (rows, seen) = (Mutex::new(Rows::new()), Mutex::default());
        Agent(Arc::new(Inner { socket: socket.to_owned(), state: state.to_owned(), rows, seen }))
    }

    pub(crate) fn with_rows<T>(&self, work: impl FnOnce(&mut Rows) -> T) -> T {
        work(&mut hold(&self.0.rows))
    }

    /// The protocol waits, so it gets a thread that may.
    async fn waiting<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> T + Send + 'static) -> Result<T, String> {
        let inner = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || work(&inner)).await;
        done.map_err(|error| format!("a thread failed: {error}"))
    }
}

impl Inner {
    fn status(&self) -> Result<Status, String> {
        match ask(&self.socket, Request::Status)? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    fn in_force(&self) -> Result<InForce, String> {
        let fleet = match ask(&self.socket, Request::Fleet)? {
            Response::Fleet(fleet) => fleet,
            other => return Err(unexpected(&other)),
        };
        let intent = fleet.intent.map(|intent| *intent);
        // Of what is not held, nothing is built upon.
        let intent = intent.unwrap_or_else(|| Intent::empty(&fleet.instance));
        Ok(InForce { held: state(fleet.held), tried: state(fleet.tried), bundle: Bundle::of(intent) })
    }

    fn apply(&self, mark: Mark, bundle: &Bundle, confirm_within_s: u32, note: &str) -> Result<Applied, String> {
        let apply = Apply {
            intent: bundle.intent().map_err(|error| error.to_string())?,
            base: None,
            confirm_within_s: Some(confirm_within_s),
            danger_cut_session: false,
            note: note[..note.floor_char_boundary(NOTE_BYTES_MAX)].to_owned(),
            fleet: Some(mark),
        };
        let request = Request::Apply(Box::new(apply));
        let done = match ask(&self.socket, request.clone()) {
            // Left by an uplink that was killed while it proved its contact: nobody confirms that any more.
            Err(No::Refused(refused)) if refused.code == "pending" && self.take_back()? => ask(&self.socket, request),
            other => other,
        };
        let applied = match done? {
            Response::Applied(applied) => applied,
            other => return Err(unexpected(&other)),
        };
        let mut rows = hold(&self.rows);
        for warning in applied.warnings.iter().take(LINES_MAX) {
            rows.event("warning", 1, &json!({ "generation": mark.generation, "warning": warning }));
        }
        if applied.confirmed {
            rows.event(
                "applied",
                0,
                &json!({ "generation": mark.generation, "outcome": applied.outcome, "note": note }),
            );
            return Ok(Applied::Confirmed);
        }
        hold(&self.seen).waiting = Some(mark);
        Ok(Applied::ToBeProved)
    }

    /// Takes back what waits, if it is the control plane's. False if it is not.
    fn take_back(&self) -> Result<bool, String> {
        match self.status()?.pending {
            Some(pending) if pending.fleet.is_some() => {
                let generation = Some(pending.generation);
                ask(&self.socket, Request::Revert { generation })?;
                Ok(true)
            }
            other => Ok(other.is_none()),
        }
    }

    /// Confirms or takes back what waits, if it is just that.
    fn decide(&self, mark: Mark, keep: bool) -> Result<(), String> {
        let pending = self.status()?.pending.filter(|pending| pending.fleet == Some(mark));
        let pending = pending.ok_or("it does not wait any more: its time was over, and it is taken back")?;
        let generation = pending.generation;
        let request = if keep {
            Request::Confirm { generation, danger_same_session: false }
        } else {
            Request::Revert { generation: Some(generation) }
        };
        ask(&self.socket, request)?;
        hold(&self.seen).waiting = None;
        let mut rows = hold(&self.rows);
        let body = json!({ "generation": mark.generation });
        if keep {
            rows.event("applied", 0, &body)
        } else {
            rows.event("reverted", 2, &body)
        }
        Ok(())
    }

    /// What is new about the machine becomes a row.
    fn notice(&self, status: &Status) {
        let mut seen = hold(&self.seen);
        let mut rows = hold(&self.rows);
        let before = match seen.repairs.replace((status.pid, status.repairs)) {
            Some((pid, repairs)) if pid == status.pid => repairs,
            // Of an agent that we first meet we do not know what was told; one that started anew begins at none.
            Some(_) => 0,
            None => status.repairs,
        };
        let finding = |severity, why: String, fix: &str| Finding {
            kind: "drift".into(),
            severity,
            resource: "inet keepwall".into(),
            place: String::new(),
            why,
            fix: fix.into(),
        };
        let lines = |lines: &[String]| lines.iter().take(LINES_MAX).map(String::as_str).collect::<Vec<_>>().join("; ");
        if status.repairs > before {
            let what = match &status.drift {
                Drift::Repaired(what) => lines(what),
                _ => format!("{} times", status.repairs - before),
            };
            let why = format!("somebody changed the table, and it was put right: {what}");
            let fix = "find out what flushes or edits nf_tables on this machine (`nft monitor` shows who)";
            rows.finding("drift", 2, &finding(Severity::Warning, why, fix));
        }
        let contested = match &status.drift {
            Drift::Contested(what) => what.clone(),
            _ => Vec::new(),
        };
        if !contested.is_empty() && contested != seen.contested {
            let why = format!("somebody keeps changing the table, it is not as it should be: {}", lines(&contested));
            let fix = "stop the other program that owns the firewall on this machine; then keepwall verify";
            rows.finding("drift", 4, &finding(Severity::Critical, why, fix));
        }
        seen.contested = contested;
        if let Some(mark) = seen.waiting
            && status.pending.as_ref().is_none_or(|pending| pending.fleet != Some(mark))
        {
            seen.waiting = None;
            rows.event("reverted", 2, &json!({ "generation": mark.generation, "why": "nobody confirmed it in time" }));
        }
    }

    /// Whoever asks on this machine reads how it stands.
    fn contact(&self, contact: Contact) {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut seen = hold(&self.seen);
        let Some(noted) = Noted::after(seen.contact.as_ref(), contact, now_s) else { return };
        if let Err(error) = noted.write(&self.state) {
            tracing::warn!(%error, "cannot note how it stands with the server");
        }
        seen.contact = Some(noted);
    }
}

fn of_status(status: Status) -> keepwall_wire::Status {
    let drift = match status.drift {
        Drift::Contested(lines) => lines,
        // What was repaired is as it should be.
        Drift::NoTable | Drift::None | Drift::Repaired(_) => Vec::new(),
    };
    keepwall_wire::Status { mode: status.mode, drift, degraded: status.degraded }
}

impl Machine for Agent {
    async fn in_force(&self) -> Result<InForce, String> {
        self.waiting(Inner::in_force).await?
    }

    async fn apply(&self, state: State, bundle: &Bundle, confirm_within_s: u32, note: &str) -> Result<Applied, String> {
        let (bundle, note) = (bundle.clone(), note.to_owned());
        self.waiting(move |inner| {
            let done = inner.apply(mark(state), &bundle, confirm_within_s, &note);
            if let Err(why) = &done {
                let body = json!({ "generation": state.generation, "why": why });
                hold(&inner.rows).event("failed", 2, &body);
            }
            done
        })
        .await?
    }

    async fn confirm(&self, state: State) -> Result<(), String> {
        self.waiting(move |inner| inner.decide(mark(state), true)).await?
    }

    async fn revert(&self, state: State) -> Result<(), String> {
        self.waiting(move |inner| inner.decide(mark(state), false)).await?
    }

    async fn status(&self) -> Option<keepwall_wire::Status> {
        let status = self.waiting(|inner| {
            let status = inner.status()?;
            inner.notice(&status);
            Ok::<_, String>(of_status(status))
        });
        status.await.and_then(|status| status).ok()
    }

    async fn rows(&self, max: usize) -> keepwall_wire::Report {
        self.with_rows(|rows| rows.report(max))
    }

    async fn kept(&self, through: u64) {
        self.with_rows(|rows| rows.kept(through));
    }

    async fn contact(&self, contact: Contact) {
        // A disk that hangs holds up no heartbeat.
        let _ = self.waiting(move |inner| inner.contact(contact)).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests;
