//! What the agent does, one request at a time; all state is here, and on disk before it is in the kernel.
//!
//! ```text
//! apply:   (tried on disk ▶) pending on disk ▶ watchdog started ▶ kernel ▶ sessions ▶ answer
//! confirm: confirmed on disk ▶ pending gone
//! revert:  confirmed into the kernel ▶ pending gone
//! start:   pending of this boot and in time? resume it : confirmed into the kernel
//! ```

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use keepwall_core::Generation;
use keepwall_host::door::Door;
use keepwall_host::peer::Peer;
use keepwall_host::state::{LockError, StateDir};
use keepwall_host::{clock, process};
use keepwall_link::{
    Applied, Apply, AttachmentStatus, Counters, Drift, FleetState, ForeignDrop, Mark, Refused, Request, Status,
};
use keepwall_secgroup::intent::Intent;
use keepwall_secgroup::judge::probes;
use keepwall_secgroup::spec::OnDeny;
use keepwall_sensors::interfaces::{self, Interface};
use keepwall_sensors::sessions;

use crate::enforce::{Change, Enforcer};
use crate::fleet::{self, Binding};
use crate::log;
use crate::record::{self, Pending, Record};

/// Confirmation windows, in seconds: shorter cannot be met, longer is no safety.
const CONFIRM_S: std::ops::RangeInclusive<u32> = 5..=3_600;
/// A note is for people.
const NOTE_BYTES_MAX: usize = 1_024;

pub(crate) struct Agent {
    state: StateDir,
    socket: PathBuf,
    enforcer: Enforcer,
    confirmed: Option<Record>,
    pending: Option<Pending>,
    binding: Option<Binding>,
    drift: Drift,
    repairs: u64,
    started: Instant,
    boot: String,
}

pub(crate) fn refused(code: &str, message: impl Into<String>, help: impl Into<String>) -> Refused {
    Refused { code: code.into(), message: message.into(), help: help.into() }
}

fn kernel(message: String) -> Refused {
    refused("kernel", message, "what was in force before still is; see the agent's log")
}

fn disk(error: std::io::Error) -> Refused {
    refused(
        "disk",
        format!("cannot write the state: {error}"),
        "make room or mend the file system; nothing was changed",
    )
}

/// Devices and their addresses now; none if the kernel does not say.
pub(crate) fn devices() -> Vec<Interface> {
    interfaces::all().unwrap_or_default()
}

/// How long a watchdog or a boot's restore may need with the state, before an agent that starts gives up.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// Takes the state; waits for a watchdog or a restore that is just using it, and for nobody else.
fn lock(path: &Path) -> Result<StateDir, String> {
    let started = Instant::now();
    loop {
        match StateDir::lock(path) {
            Ok(state) => return Ok(state),
            Err(LockError::Held(Some(pid))) if started.elapsed() < LOCK_PATIENCE && passing(pid) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(format!("cannot use {}: {error}", path.display())),
        }
    }
}

/// True for a process that gives the state back by itself, or that has just ended.
fn passing(pid: u32) -> bool {
    let arguments = keepwall_sensors::processes::arguments(pid);
    arguments.is_empty() || arguments.get(1).is_some_and(|command| command == "watchdog" || command == "restore")
}

/// Interfaces of the intent whose packets cannot be seen by their device's name, and what to do about it.
fn unseen(intent: &Intent, interfaces: &[Interface]) -> Vec<String> {
    let mut out = Vec::new();
    for attachment in &intent.attachments {
        let (name, device) = (&attachment.name, &attachment.device);
        match interfaces.iter().find(|i| i.name == *device) {
            None => {
                out.push(format!("{name}: there is no device `{device}` now; its rules take effect when one appears"))
            }
            Some(Interface { master: Some(master), .. }) => {
                let master =
                    interfaces.iter().find(|i| i.index == *master).map_or("another device", |i| i.name.as_str());
                let fix = if attachment.guest {
                    "give the guest a routed device instead of a bridged one"
                } else {
                    "attach that device instead"
                };
                out.push(format!(
                    "{name}: `{device}` is part of `{master}`, by which its packets arrive, so its rules do NOT apply; {fix}"
                ));
            }
            Some(_) => {}
        }
    }
    out
}

/// Loads the last confirmed state and ends.
pub(crate) fn restore(state: &Path) -> Result<(), String> {
    let state = lock(state)?;
    let Some(record) = record::confirmed(state.path()).map_err(|error| error.to_string())? else {
        log("nothing was ever confirmed; nothing to restore");
        return Ok(());
    };
    let mut enforcer = Enforcer::open().map_err(|error| crate::enforce::chain(&error))?;
    enforcer.adopt(&record.intent)?;
    // What was pending was never confirmed, and the machine has been down since.
    record::clear_pending(&state).map_err(|error| error.to_string())?;
    record::write_place(&state, &record::place()).map_err(|error| error.to_string())?;
    log(format!("restored {} of {}", record.generation, record.intent.instance));
    Ok(())
}

/// The agent is dead and a change was not confirmed: back to the confirmed state, or to nothing.
pub(crate) fn revert_without_agent(state: &Path) -> Result<(), String> {
    let state = lock(state)?;
    let mut enforcer = Enforcer::open().map_err(|error| crate::enforce::chain(&error))?;
    match record::confirmed(state.path()).map_err(|error| error.to_string())? {
        Some(record) => {
            enforcer.adopt(&record.intent)?;
            let from = record::pending(state.path()).unwrap_or_default();
            // Takes back the cuts that only the reverted change made.
            crate::cut::cut(from.map(|p| p.record.intent).as_ref(), &record.intent, &devices())?;
        }
        None => {
            enforcer.remove()?;
        }
    }
    record::clear_pending(&state).map_err(|error| error.to_string())?;
    log("the agent is gone; the unconfirmed change is reverted");
    Ok(())
}

impl Agent {
    pub(crate) fn start(state: &Path, socket: &Path) -> Result<Agent, String> {
        let state = lock(state)?;
        let enforcer = Enforcer::open().map_err(|error| crate::enforce::chain(&error))?;
        let confirmed = record::confirmed(state.path()).map_err(|error| {
            format!(
                "{error}. What the kernel enforces stays in force; move {} away to start afresh",
                state.path().display()
            )
        })?;
        // Without it nobody knows which decision of a control plane is the newest.
        let binding = record::binding(state.path()).map_err(|error| {
            format!(
                "{error}. What the kernel enforces stays in force; remove the file, and enrol again (`keepwall leave`, `keepwall enroll`)"
            )
        })?;
        // An unconfirmed state that cannot be read is as good as reverted; one that is the confirmed state was
        // confirmed just before an end.
        let pending = record::pending(state.path()).unwrap_or_default();
        let pending = pending.filter(|p| confirmed.as_ref() != Some(&p.record));
        if pending.is_none() {
            record::clear_pending(&state).map_err(|error| format!("cannot use {}: {error}", state.path().display()))?;
        }
        let mut agent = Agent {
            state,
            socket: socket.to_owned(),
            enforcer,
            confirmed,
            pending,
            binding,
            drift: Drift::NoTable,
            repairs: 0,
            started: Instant::now(),
            boot: record::boot(),
        };
        agent.resume()?;
        let noted = record::write_place(&agent.state, &record::place());
        noted.map_err(|error| format!("cannot use {}: {error}", agent.state.path().display()))?;
        Ok(agent)
    }

    /// Puts in force what should be, whatever an earlier agent left.
    fn resume(&mut self) -> Result<(), String> {
        match &self.pending {
            Some(pending) if pending.left_ms(clock::now_ms(), &self.boot) > 0 => {
                let pending = pending.clone();
                log(format!("resuming {}, which waits for its confirmation", pending.record.generation));
                self.enforcer.adopt(&pending.record.intent)?;
                self.cut_sessions(self.confirmed.as_ref().map(|c| c.intent.clone()).as_ref(), &pending.record.intent);
                self.drift = Drift::None;
                Ok(())
            }
            Some(_) => self.revert("nobody confirmed it in time"),
            None => match self.confirmed.clone() {
                Some(record) => {
                    // An agent that was here before had put its rules in.
                    let here_before = record::last_place(self.state.path()) == record::place();
                    let missing = if here_before { self.enforcer.missing()? } else { None };
                    let change = self.enforcer.adopt(&record.intent)?;
                    self.drift = Drift::None;
                    if let Some(what) = missing
                        && change != Change::Unchanged
                    {
                        let what = format!("while no agent ran, {what}");
                        log(format!("somebody changed our table, which is repaired: {what}"));
                        self.drift = Drift::Repaired(vec![what]);
                        self.repairs += 1;
                    }
                    log(format!("enforcing {} of {}", record.generation, record.intent.instance));
                    Ok(())
                }
                None => {
                    // A table without any state is what a removal was cut short in.
                    match self.enforcer.remove() {
                        Ok(true) => log("removed a table that no state stands behind"),
                        Ok(false) => {}
                        Err(why) => log(format!("cannot look for a table of an earlier agent: {why}")),
                    }
                    log("nothing is applied; observing only");
                    Ok(())
                }
            },
        }
    }

    fn generation(&self) -> Generation {
        let of = |record: Option<&Record>| record.map(|r| r.generation).unwrap_or_default();
        of(self.pending.as_ref().map(|p| &p.record)).max(of(self.confirmed.as_ref()))
    }

    /// Whether `uid` may ask this now.
    pub(crate) fn may_ask(&self, uid: u32, request: &Request) -> Result<(), Refused> {
        fleet::may_ask(uid, self.binding.as_ref(), self.pending.as_ref().map(|p| p.record.fleet), request)
    }

    /// True for the user that hands on what a control plane decides.
    pub(crate) fn is_bound_to(&self, uid: u32) -> bool {
        self.binding.as_ref().is_some_and(|binding| binding.uid == uid)
    }

    /// Lets in at the socket whom the machine is bound to.
    pub(crate) fn admit(&self) {
        let uid = self.binding.as_ref().map_or(0, |binding| binding.uid);
        if let Err(error) = Door::admit(&self.socket, uid) {
            log(format!("user {uid} cannot be let in at {}: {error}", self.socket.display()));
        }
    }

    pub(crate) fn bind(&mut self, instance: String, server: String, uid: u32) -> Result<String, Refused> {
        let mut binding = Binding::new(instance, server, uid)?;
        match &self.binding {
            Some(old) if (&old.instance, &old.server) == (&binding.instance, &binding.server) => {
                binding.tried = old.tried;
            }
            Some(old) => {
                return Err(refused(
                    "bound",
                    format!("this machine is bound to {} already, as {}", old.server, old.instance),
                    "take it out of that fleet first: keepwall leave",
                ));
            }
            None => {
                if let Some(pending) = &self.pending {
                    return Err(refused(
                        "pending",
                        format!("{} still waits for its confirmation", pending.record.generation),
                        "confirm it (`keepwall confirm`) or take it back (`keepwall revert`) first",
                    ));
                }
                // What an earlier control plane decided is not this one's.
                if let Some(record) = self.confirmed.as_ref().filter(|record| record.fleet.is_some()) {
                    let record = Record { fleet: None, ..record.clone() };
                    record::write_confirmed(&self.state, &record).map_err(disk)?;
                    self.confirmed = Some(record);
                }
            }
        }
        record::write_binding(&self.state, &binding).map_err(disk)?;
        let done = format!("this machine is bound to {} as {}", binding.server, binding.instance);
        log(&done);
        self.binding = Some(binding);
        self.admit();
        Ok(done)
    }

    pub(crate) fn unbind(&mut self) -> Result<String, Refused> {
        let Some(binding) = &self.binding else { return Ok("this machine was not bound".to_owned()) };
        let done = format!("this machine is no longer bound to {}", binding.server);
        // Who could have confirmed it is gone.
        if self.pending.as_ref().is_some_and(|pending| pending.record.fleet.is_some()) {
            self.revert("the machine leaves the fleet").map_err(kernel)?;
        }
        record::clear_binding(&self.state).map_err(disk)?;
        self.binding = None;
        self.admit();
        log(&done);
        Ok(done)
    }

    pub(crate) fn fleet(&self) -> Result<FleetState, Refused> {
        let Some(binding) = &self.binding else {
            return Err(refused("not-bound", "this machine is in no fleet", "keepwall enroll TOKEN"));
        };
        let held = self.confirmed.as_ref().filter(|record| record.fleet.is_some());
        Ok(FleetState {
            instance: binding.instance.clone(),
            server: binding.server.clone(),
            held: held.and_then(|record| record.fleet).unwrap_or_default(),
            tried: binding.tried,
            intent: held.map(|record| Box::new(record.intent.clone())),
        })
    }

    /// Whether the control plane or, without one, root may put this in force.
    fn takes(&self, apply: &Apply) -> Result<(), Refused> {
        match (&self.binding, &apply.fleet) {
            (Some(binding), Some(mark)) => binding.takes(mark, apply),
            (Some(binding), None) => Err(fleet::only_from(&binding.server)),
            (None, Some(_)) => Err(refused("not-bound", "this machine is in no fleet", "keepwall enroll TOKEN")),
            (None, None) => Ok(()),
        }
    }

    /// From now on this decision counts as begun, whatever becomes of it.
    fn begin(&mut self, mark: Mark) -> Result<(), Refused> {
        if let Some(binding) = self.binding.as_mut().filter(|binding| binding.tried != mark) {
            let begun = Binding { tried: mark, ..binding.clone() };
            record::write_binding(&self.state, &begun).map_err(disk)?;
            *binding = begun;
        }
        Ok(())
    }

    pub(crate) fn intent(&self) -> Option<&Intent> {
        self.enforcer.intent()
    }

    pub(crate) fn status(&mut self) -> Status {
        let present = devices();
        let intent = self.enforcer.intent();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            mode: match intent {
                None => "observing",
                Some(intent) if intent.observe => "observe-only",
                Some(_) => "enforcing",
            }
            .to_owned(),
            instance: intent.map(|i| i.instance.clone()),
            generation: self.generation(),
            confirmed: self.confirmed.as_ref().map(|c| c.generation),
            pending: self.pending.as_ref().map(|p| keepwall_link::Pending {
                generation: p.record.generation,
                left_ms: p.left_ms(clock::now_ms(), &self.boot),
                fleet: p.record.fleet,
            }),
            server: self.binding.as_ref().map(|binding| binding.server.clone()),
            attachments: (intent.into_iter().flat_map(|i| &i.attachments))
                .map(|a| AttachmentStatus {
                    name: a.name.clone(),
                    device: a.device.clone(),
                    present: present.iter().any(|i| i.name == a.device),
                    groups: a.groups.clone(),
                    ingress_rules: a.ingress.len(),
                    egress_rules: a.egress.len(),
                })
                .collect(),
            drift: self.drift.clone(),
            repairs: self.repairs,
            degraded: {
                let mut all = self.enforcer.degraded();
                all.extend(intent.map(|i| unseen(i, &present)).unwrap_or_default());
                all
            },
        }
    }

    pub(crate) fn apply(&mut self, apply: Apply, peer: &Peer) -> Result<Applied, Refused> {
        let bad = |why: String| refused("bad-request", why, "nothing was changed");
        apply.intent.validate().map_err(bad)?;
        self.takes(&apply)?;
        if apply.note.len() > NOTE_BYTES_MAX {
            return Err(bad(format!("the note is longer than {NOTE_BYTES_MAX} bytes")));
        }
        if let Some(seconds) = apply.confirm_within_s
            && !CONFIRM_S.contains(&seconds)
        {
            return Err(bad(format!(
                "a confirmation window of {seconds} s; it is from {} to {} seconds",
                CONFIRM_S.start(),
                CONFIRM_S.end()
            )));
        }
        if let Some(pending) = &self.pending {
            return Err(refused(
                "pending",
                format!("{} still waits for its confirmation", pending.record.generation),
                "confirm it (`keepwall confirm`) or take it back (`keepwall revert`) first",
            ));
        }
        if apply.base.is_some_and(|base| base != self.generation()) {
            return Err(refused(
                "state-moved",
                format!("the plan was made against another state; in force is {}", self.generation()),
                "make a new plan and look at it again",
            ));
        }
        self.enforcer.check(&apply.intent).map_err(|why| refused("too-large", why, "nothing was changed"))?;

        let interfaces = devices();
        let mut warnings = self.lock_out(&apply, peer, &interfaces)?;
        warnings.extend(unseen(&apply.intent, &interfaces));

        if let Some(mark) = apply.fleet {
            self.begin(mark)?;
        }
        let generation = self.generation().max(record::highest(self.state.path())).next();
        record::write_highest(&self.state, generation).map_err(disk)?;
        let record = Record { generation, intent: apply.intent, note: apply.note, fleet: apply.fleet };
        let before = self.enforcer.intent().cloned();
        match apply.confirm_within_s {
            Some(seconds) => {
                let pending = Pending {
                    record: record.clone(),
                    deadline_ms: clock::now_ms() + u64::from(seconds) * 1_000,
                    boot: self.boot.clone(),
                    sessions: sessions::before_a_change(peer.pid),
                };
                record::write_pending(&self.state, &pending).map_err(disk)?;
                self.pending = Some(pending);
                if let Err(error) = self.start_watchdog(record.generation) {
                    self.pending = None;
                    let _ = record::clear_pending(&self.state);
                    return Err(refused(
                        "watchdog",
                        format!("the process that would revert an unconfirmed change does not start: {error}"),
                        "nothing was changed",
                    ));
                }
            }
            None => record::write_confirmed(&self.state, &record).map_err(disk)?,
        }

        let change = match self.enforcer.enforce(&record.intent) {
            Ok(change) => change,
            Err(why) => {
                // The kernel refused, so the old rules are in force; the state goes back to saying so.
                self.pending = None;
                let _ = record::clear_pending(&self.state);
                if apply.confirm_within_s.is_none() {
                    let _ = match &self.confirmed {
                        Some(old) => record::write_confirmed(&self.state, old),
                        None => record::clear_confirmed(&self.state),
                    };
                }
                return Err(kernel(why));
            }
        };
        if apply.confirm_within_s.is_none() {
            self.confirmed = Some(record.clone());
        }
        let sessions_cut = self.cut_sessions(before.as_ref(), &record.intent);
        self.drift = Drift::None;
        log(format!(
            "applied {}: {}",
            record.generation,
            if record.note.is_empty() { "no note" } else { &record.note }
        ));
        // Nothing reached the kernel, so there is nothing to prove.
        let confirmed = record.fleet.is_some() && matches!(change, Change::Unchanged);
        if confirmed {
            self.keep(record.clone())?;
        }
        Ok(Applied {
            generation: record.generation,
            outcome: match change {
                Change::Unchanged => "unchanged",
                Change::Elements => "elements",
                Change::Replaced => "replaced",
            }
            .to_owned(),
            sessions_cut,
            confirm_within_s: apply.confirm_within_s.filter(|_| !confirmed),
            confirmed,
            warnings,
        })
    }

    /// Refuses what would keep the operator from coming back in the way they came; warns about other sessions. A
    /// control plane came by no session, so there it warns about all: what cuts the uplink off is taken back.
    fn lock_out(&self, apply: &Apply, peer: &Peer, interfaces: &[Interface]) -> Result<Vec<String>, Refused> {
        let mut warnings = Vec::new();
        let own = if apply.fleet.is_some() { None } else { sessions::of_process(peer.pid) };
        if let Some(session) = &own
            && let Some(verdict) = crate::packet::refuses(&apply.intent, interfaces, session)
        {
            let message = format!(
                "this would lock you out: a new session like yours ({} to {}) would be refused: {}",
                session.remote,
                session.local,
                verdict.reason()
            );
            if !apply.danger_cut_session {
                return Err(refused(
                    "would-cut-session",
                    message,
                    format!(
                        "allow tcp {} from {} first, or go on by name with --danger-cut-session; nothing was changed",
                        session.local.port(),
                        session.remote.ip()
                    ),
                ));
            }
            warnings.push(message);
        }
        for session in sessions::of_machine().iter().filter(|s| own.as_ref() != Some(s)) {
            if let Some(verdict) = crate::packet::refuses(&apply.intent, interfaces, session) {
                warnings.push(format!(
                    "the SSH session from {} would be refused if it were new: {}",
                    session.remote.ip(),
                    verdict.reason()
                ));
            }
        }
        Ok(warnings)
    }

    fn cut_sessions(&self, before: Option<&Intent>, after: &Intent) -> u64 {
        if after.on_deny != OnDeny::Cut || after.observe {
            return 0;
        }
        crate::cut::cut(before, after, &devices()).unwrap_or_else(|why| {
            log(format!("established sessions could not be looked at: {why}"));
            0
        })
    }

    /// The process that reverts if this one cannot.
    fn start_watchdog(&self, generation: Generation) -> std::io::Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("watchdog")
            .args(["--generation", &generation.0.to_string()])
            .arg("--state")
            .arg(self.state.path())
            .arg("--socket")
            .arg(&self.socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        process::spawn_detached(&mut command).map(|_| ())
    }

    pub(crate) fn confirm(
        &mut self,
        generation: Generation,
        danger_same_session: bool,
        peer: &Peer,
    ) -> Result<String, Refused> {
        let Some(pending) = &self.pending else {
            return Err(refused("nothing-pending", "nothing waits for a confirmation", "see `keepwall status`"));
        };
        if pending.record.generation != generation {
            return Err(refused(
                "nothing-pending",
                format!("{} waits for a confirmation, not {generation}", pending.record.generation),
                "see `keepwall status`",
            ));
        }
        // The uplink has proved a new connection of its own: the one to the control plane.
        let uplink = self.is_bound_to(peer.uid);
        let session = if uplink { None } else { sessions::of_process(peer.pid) };
        if let Some(session) = &session
            && pending.sessions.contains(session)
            && !danger_same_session
        {
            return Err(refused(
                "same-session",
                format!(
                    "your session from {} was open before the change, so it does not prove that a new one gets in",
                    session.remote
                ),
                "open a second session and run `keepwall confirm` there",
            ));
        }
        self.keep(pending.record.clone())?;
        log(format!("confirmed {generation}"));
        Ok(match session {
            Some(session) => format!("{generation} is confirmed by a new session from {}", session.remote.ip()),
            None if uplink => format!("{generation} is confirmed by a new connection to the control plane"),
            None => format!("{generation} is confirmed from this machine's own console"),
        })
    }

    /// What is in force is what a restart comes back to.
    fn keep(&mut self, record: Record) -> Result<(), Refused> {
        record::write_confirmed(&self.state, &record).map_err(disk)?;
        self.confirmed = Some(record);
        self.pending = None;
        record::clear_pending(&self.state).map_err(disk)
    }

    /// Back to the last confirmed state.
    pub(crate) fn revert_to_confirmed(&mut self, generation: Option<Generation>) -> Result<String, Refused> {
        let Some(pending) = &self.pending else {
            return Err(refused("nothing-pending", "nothing waits for a confirmation", "see `keepwall status`"));
        };
        if generation.is_some_and(|wanted| wanted != pending.record.generation) {
            return Err(refused("nothing-pending", "another generation waits by now", "see `keepwall status`"));
        }
        self.revert("asked for").map_err(kernel)?;
        Ok(match &self.confirmed {
            Some(record) => format!("{} is in force again", record.generation),
            None => "nothing is enforced again, as before".to_owned(),
        })
    }

    fn revert(&mut self, why: &str) -> Result<(), String> {
        let from = self.pending.as_ref().map(|p| p.record.intent.clone());
        match self.confirmed.clone() {
            Some(record) => {
                self.enforcer.adopt(&record.intent)?;
                self.cut_sessions(from.as_ref(), &record.intent);
                self.drift = Drift::None;
            }
            None => {
                self.enforcer.remove()?;
                self.drift = Drift::NoTable;
            }
        }
        if let Some(pending) = self.pending.take() {
            log(format!("reverted {}: {why}", pending.record.generation));
        }
        record::clear_pending(&self.state).map_err(|error| format!("cannot remove the pending state: {error}"))
    }

    pub(crate) fn remove(&mut self) -> Result<String, Refused> {
        if let Some(binding) = &self.binding {
            return Err(fleet::only_from(&binding.server));
        }
        record::clear_pending(&self.state).map_err(disk)?;
        record::clear_confirmed(&self.state).map_err(disk)?;
        (self.pending, self.confirmed) = (None, None);
        let was = self.enforcer.remove().map_err(kernel)?;
        self.drift = Drift::NoTable;
        log("removed: nothing is enforced");
        Ok(if was { "nothing is enforced any more" } else { "nothing was enforced" }.to_owned())
    }

    /// What has to happen without being asked: revert in time.
    pub(crate) fn tick(&mut self) {
        if let Some(pending) = &self.pending
            && pending.left_ms(clock::now_ms(), &self.boot) == 0
            && let Err(why) = self.revert("nobody confirmed it in time")
        {
            log(format!("cannot revert yet: {why}"));
        }
    }

    pub(crate) fn verify(&mut self) -> Result<Drift, Refused> {
        let drift = self.enforcer.verify().map_err(kernel)?;
        match &drift {
            Drift::Repaired(what) => log(format!("somebody changed our table, which is repaired: {}", what.join("; "))),
            Drift::Contested(what) => log(format!("somebody keeps changing our table: {}", what.join("; "))),
            Drift::None | Drift::NoTable => {}
        }
        self.repairs += u64::from(matches!(drift, Drift::Repaired(_)));
        self.drift = drift.clone();
        Ok(drift)
    }

    /// Starts or stops flow records.
    pub(crate) fn watch(&mut self, watched: bool) -> Result<(), String> {
        self.enforcer.watch(watched)
    }

    pub(crate) fn counters(&mut self) -> Result<Counters, Refused> {
        self.enforcer.counters().map_err(kernel)
    }

    /// What other tables do with what our rules let in.
    pub(crate) fn foreign(&mut self) -> Result<Vec<ForeignDrop>, Refused> {
        let probes = self.enforcer.intent().map(probes).unwrap_or_default();
        let asked: Vec<keepwall_nft::Probe> = (probes.iter())
            .map(|probe| keepwall_nft::Probe {
                device: probe.device.clone(),
                source: probe.packet.peer,
                destination: probe.packet.local,
                protocol: probe.packet.protocol,
                source_port: probe.packet.source_port,
                destination_port: probe.packet.destination_port,
                icmp: probe.packet.icmp,
            })
            .collect();
        let drops = keepwall_nft::foreign_drops(&asked).map_err(|error| kernel(crate::enforce::chain(&error)))?;
        Ok((drops.into_iter())
            .map(|drop| {
                let probe = &probes[drop.probe];
                let p = &probe.packet;
                let protocol = keepwall_core::Protocol::Number(p.protocol);
                let port = if protocol.has_ports() { format!(" port {}", p.destination_port) } else { String::new() };
                ForeignDrop {
                    table: drop.table,
                    chain: drop.chain,
                    rule: drop.rule,
                    ours: probe.label.clone(),
                    example: format!("{protocol} {} -> {}{port}", p.peer, p.local),
                    certain: drop.certain,
                }
            })
            .collect())
    }
}
