//! The fleet: what is declared, who is there, what each is told.
//!
//! ```text
//!  declare, enrol, … ──commit──▶ store ──changes──▶ follow ──▶ registry (who is there)
//!                                  ▲                      └──▶ view (what each is to hold) ──▶ sessions
//!                     statuses ────┘◀── flush ◀── registry ◀── what instances say ◀───────────┘
//! ```
//!
//! Every server of a store does this for itself, from the same commits; which server made a commit does not matter.

mod declare;
mod follow;
mod instances;
mod records;
mod rollouts;
mod tokens;
mod view;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keepwall_api::fleet::{Labels, Report};
pub(crate) use keepwall_core::hex;
use keepwall_fleet::rollout::Fact;
use keepwall_store::{Commit, Committed, Generation, Remember, Store, StoreError};
use serde_json::json;
use tokio::sync::{Notify, broadcast};

use crate::ca::Authority;
pub(crate) use instances::subject;
pub use instances::{Admission, Enroll, EnrollInterface, Enrolled};
pub(crate) use records::Sha256;
use records::{InstanceRecord, ServerRecord, StatusRecord};
use view::View;

/// Who does something, from where, and how it is remembered. Every change takes one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Act {
    /// `user:alice`, `key:ci`, `instance:web-1`, `local:root`.
    pub actor: String,
    /// The address that the request came from, or empty.
    pub address: String,
    /// The request's id, which the answer and the logs carry too.
    pub request: String,
    /// Answer this again if the same request comes again.
    pub remember: Option<Remember>,
}

impl Act {
    /// The server itself.
    #[must_use]
    pub fn server() -> Act {
        Act { actor: "server".into(), ..Act::default() }
    }

    /// A line of the audit log.
    #[must_use]
    pub fn line(&self, action: &str, target: &str, before: serde_json::Value, after: serde_json::Value) -> String {
        json!({
            "actor": self.actor,
            "address": self.address,
            "request": self.request,
            "action": action,
            "target": target,
            "before": before,
            "after": after,
        })
        .to_string()
    }
}

/// A change or a question was refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FleetError {
    /// What was asked for is wrong: field, message, the way out.
    Invalid {
        /// JSON pointer into the request, or empty.
        pointer: String,
        /// What is wrong.
        message: String,
    },
    /// The posture does not hold; the report says why.
    Refused(Box<Report>),
    /// It would change this machine, which is outside what the caller may change.
    NotPermitted(String),
    /// There is no such thing.
    NotFound(String),
    /// Not in this state: a rollout that is done cannot be stopped.
    Wrong(String),
    /// The same request went through before; this was the answer ([`Act::remember`]).
    Before(String),
    /// Somebody else was faster, or the store said no.
    Store(StoreError),
}

impl From<StoreError> for FleetError {
    fn from(error: StoreError) -> FleetError {
        FleetError::Store(error)
    }
}

pub(crate) fn invalid(pointer: &str, message: impl Into<String>) -> FleetError {
    FleetError::Invalid { pointer: pointer.to_owned(), message: message.into() }
}

/// Something that happened just now, for those who watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// `instance`, `rollout`, `posture`, `finding`, `event`.
    pub kind: &'static str,
    /// Which instance or rollout.
    pub name: String,
    /// Its labels, if it is an instance: who may not see it is not told.
    pub labels: Labels,
    /// JSON text.
    pub body: Arc<str>,
}

/// Whether the caller may change a machine with these labels.
pub type Permit<'a> = &'a (dyn Fn(&Labels) -> bool + Send + Sync);

/// Watchers that are slower than this many happenings are told that they missed some.
const LIVE_MAX: usize = 1_024;
/// A server that has not been heard for so long holds no streams.
const SERVER_SILENT_MS: u64 = 30_000;

/// An enrolled machine with the number of its record.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) revision: Generation,
    pub(crate) record: Arc<InstanceRecord>,
}

/// Who is there, and what they last said; followed from the store, and ahead of it for streams of this server.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pub(crate) instances: HashMap<Arc<str>, Known>,
    /// Instance and end of life by the digest of its certificate.
    pub(crate) certificates: HashMap<[u8; 32], (Arc<str>, u64)>,
    pub(crate) statuses: HashMap<Arc<str>, StatusRecord>,
    pub(crate) servers: HashMap<String, ServerRecord>,
    /// Whose an address is.
    pub(crate) addresses: HashMap<std::net::IpAddr, Arc<str>>,
    /// Labels or interfaces differ from what the view was made of.
    unresolved: bool,
    /// Statuses that are newer here than in the store.
    dirty: HashSet<Arc<str>>,
    /// What many machines have in common, held once.
    shared: Shared,
}

/// A stream that is open at this server.
#[derive(Clone)]
pub(crate) struct Handle {
    /// Tells streams of one instance apart.
    pub(crate) id: u64,
    /// Look at the view again.
    pub(crate) wake: Arc<Notify>,
    /// End, for this reason.
    pub(crate) end: Arc<Mutex<Option<&'static str>>>,
}

/// Values that many machines have, each held once: most of a fleet has few kinds of labels, devices and versions.
#[derive(Debug, Default)]
struct Shared {
    labels: HashSet<Arc<Labels>>,
    words: HashSet<Arc<str>>,
}

/// So many values may be held that no machine has any more, before all such are let go.
const SHARED_SPARE: usize = 64;

/// The value as it is held already, or as it is from now on.
fn one<T: ?Sized + Eq + std::hash::Hash>(held: &mut HashSet<Arc<T>>, value: &mut Arc<T>) {
    if let Some(known) = held.get(&**value) {
        *value = Arc::clone(known);
        return;
    }
    // What only this set holds is garbage; looking for it is paid for by as many insertions.
    if held.len() >= SHARED_SPARE && held.len() == held.capacity() {
        held.retain(|value| Arc::strong_count(value) > 1);
    }
    held.insert(Arc::clone(value));
}

impl Shared {
    fn instance(&mut self, record: &mut InstanceRecord) {
        one(&mut self.labels, &mut record.labels);
        for interface in &mut record.interfaces {
            one(&mut self.words, &mut interface.name);
            one(&mut self.words, &mut interface.device);
            interface.addresses.shrink_to_fit();
        }
        record.interfaces.shrink_to_fit();
        record.certificates.shrink_to_fit();
    }

    fn status(&mut self, status: &mut StatusRecord) {
        for word in [&mut status.mode, &mut status.version, &mut status.server] {
            one(&mut self.words, word);
        }
    }
}

/// The fleet as one server sees it.
pub struct Fleet {
    store: Arc<dyn Store>,
    authority: Arc<Authority>,
    settings: FleetSettings,
    /// Of this process; a restart is another.
    server: Arc<str>,
    view: RwLock<Arc<View>>,
    registry: Mutex<Registry>,
    sessions: Mutex<HashMap<Arc<str>, Handle>>,
    stream_ids: std::sync::atomic::AtomicU64,
    live: broadcast::Sender<Live>,
    /// Something may have to be done about a rollout.
    rollout_wake: Notify,
    /// A stream waits for a generation that is not there: see [`Fleet::nudge`].
    nudge_wake: Notify,
    token_slots: Mutex<HashMap<String, u32>>,
}

/// The fleet in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Enrolled.
    pub instances: usize,
    /// With an open stream at any server.
    pub connected: usize,
    /// That hold what they should.
    pub in_sync: usize,
    /// That did not take what they were told.
    pub failed: usize,
    /// Whose kernel differs from what it should hold.
    pub drifted: usize,
    /// The newest commit that this server has heard of.
    pub generation: Generation,
    /// A rollout is on its way, or stopped.
    pub rollout: bool,
}

/// What the fleet is told by the server's configuration.
#[derive(Clone, Debug)]
pub struct FleetSettings {
    /// Where machines reach this server: `host:port`, as tokens carry it.
    pub agents_public: String,
    /// `sha256//…` of the server's own public key, as `curl --pinnedpubkey` takes it.
    pub public_key_pin: String,
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// A moment as the API writes it.
#[must_use]
pub fn rfc3339(ms: u64) -> String {
    // Days to date by the civil calendar's arithmetic: eras of 400 years, years that begin in March.
    let (days, rest) = (ms / 86_400_000, ms % 86_400_000);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) =
        (day_of_year - (153 * shifted + 2) / 5 + 1, if shifted < 10 { shifted + 3 } else { shifted - 9 });
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (s, ms) = (rest / 1_000, rest % 1_000);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{ms:03}Z", s / 3_600, s / 60 % 60, s % 60)
}

/// A thread that panicked left a map as it was before or after one insertion: both are fine.
fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fleet {
    /// Reads everything there is, and follows from then on.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn start(
        store: Arc<dyn Store>,
        authority: Arc<Authority>,
        settings: FleetSettings,
    ) -> Result<Arc<Fleet>, StoreError> {
        let fleet = Arc::new(Fleet {
            store,
            authority,
            settings,
            server: format!("srv-{}", hex(&crate::seal::random::<8>())).into(),
            view: RwLock::default(),
            registry: Mutex::default(),
            sessions: Mutex::default(),
            stream_ids: std::sync::atomic::AtomicU64::new(1),
            live: broadcast::channel(LIVE_MAX).0,
            rollout_wake: Notify::new(),
            nudge_wake: Notify::new(),
            token_slots: Mutex::default(),
        });
        if !fleet.store.shared() {
            fleet.bury_predecessors().await?;
        }
        let follower = follow::Follower::start(Arc::clone(&fleet)).await?;
        tokio::spawn(follower.run());
        tokio::spawn(Arc::clone(&fleet).flush_statuses());
        tokio::spawn(Arc::clone(&fleet).drive_rollouts());
        tokio::spawn(Arc::clone(&fleet).keep_nudging());
        Ok(fleet)
    }

    /// What it is kept in.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Who signs.
    #[must_use]
    pub fn authority(&self) -> &Arc<Authority> {
        &self.authority
    }

    /// What happens from now on.
    #[must_use]
    pub fn live(&self) -> broadcast::Receiver<Live> {
        self.live.subscribe()
    }

    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        hold(&self.registry)
    }

    /// Tells those who watch.
    pub(crate) fn tell(&self, kind: &'static str, name: &str, labels: Labels, body: &serde_json::Value) {
        if self.live.receiver_count() > 0 {
            // Nobody listening any more is no error.
            let _ = self.live.send(Live { kind, name: name.to_owned(), labels, body: body.to_string().into() });
        }
    }

    /// Commits; a request that went through before is an error of its own kind.
    async fn commit(&self, commit: Commit) -> Result<Generation, FleetError> {
        match self.store.commit(commit).await? {
            Committed::Now(generation) => Ok(generation),
            Committed::Before(answer) => Err(FleetError::Before(answer)),
        }
    }

    /// The fleet in numbers.
    #[must_use]
    pub fn count(&self) -> Count {
        let (view, now) = (self.view(), now_ms());
        let registry = self.registry();
        let mut count = Count {
            instances: registry.instances.len(),
            generation: view.generation,
            rollout: view.active.is_some(),
            ..Count::default()
        };
        for name in registry.instances.keys() {
            let Some(status) = registry.statuses.get(name) else { continue };
            count.connected += usize::from(registry.connected(&self.server, status, now));
            let in_sync = view.desired(name).is_some_and(|d| d.digest == status.digest.0);
            count.in_sync += usize::from(in_sync);
            count.failed += usize::from(status.failed.is_some() && !in_sync);
            count.drifted += usize::from(!status.drift.is_empty());
        }
        count
    }

    /// Says goodbye to the other servers: nobody's stream is here any more.
    pub async fn leave(&self) {
        let gone = keepwall_store::Op::delete(records::SERVER, &self.server, keepwall_store::Expect::Any);
        if let Err(error) = self.store.commit(Commit { ops: vec![gone], ..Commit::default() }).await {
            tracing::warn!(%error, "the other servers learn by themselves that this one ended");
        }
    }

    /// Open streams at this server.
    #[must_use]
    pub fn streams(&self) -> usize {
        hold(&self.sessions).len()
    }

    /// A stream begins; an older one of the same machine ends.
    pub(crate) fn open_stream(&self, instance: &Arc<str>) -> Handle {
        let handle = Handle {
            id: self.stream_ids.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            wake: Arc::new(Notify::new()),
            end: Arc::default(),
        };
        if let Some(old) = hold(&self.sessions).insert(Arc::clone(instance), handle.clone()) {
            old.end("replaced");
        }
        handle
    }

    /// A stream is over. True if it was the machine's newest.
    pub(crate) fn close_stream(&self, instance: &Arc<str>, handle: &Handle) -> bool {
        let mut sessions = hold(&self.sessions);
        let newest = sessions.get(instance).is_some_and(|h| h.id == handle.id);
        if newest {
            sessions.remove(instance);
        }
        newest
    }

    /// A poll was answered. The machine counts as there until it has missed the next.
    pub(crate) fn end_poll(self: &Arc<Self>, instance: &Arc<str>, handle: &Handle) {
        const MISSED: Duration = Duration::from_secs(keepwall_wire::POLL_WAIT_S * 2);
        let (fleet, instance, handle) = (Arc::clone(self), Arc::clone(instance), handle.clone());
        tokio::spawn(async move {
            tokio::time::sleep(MISSED).await;
            if fleet.close_stream(&instance, &handle) {
                fleet.heard(&instance, |record| record.server = Arc::default());
            }
        });
    }

    /// Of this process, among the servers of the store.
    #[must_use]
    pub fn server_name(&self) -> &Arc<str> {
        &self.server
    }

    pub(crate) fn labels_of(&self, instance: &str) -> Labels {
        self.registry().instances.get(instance).map(|k| (*k.record.labels).clone()).unwrap_or_default()
    }

    /// Tells those who watch of a row.
    pub(crate) fn tell_row(
        &self,
        stream: keepwall_store::Stream,
        source: &str,
        labels: &Labels,
        kind: &str,
        severity: u8,
        body: &serde_json::Value,
    ) {
        if self.live.receiver_count() > 0 {
            let body = json!({ "instance": source, "kind": kind, "severity": severity, "body": body });
            self.tell(stream.as_str(), source, labels.clone(), &body);
        }
    }

    /// Ends a machine's stream, if it is here.
    pub(crate) fn end_stream(&self, instance: &str, reason: &'static str) {
        if let Some(handle) = hold(&self.sessions).get(instance) {
            handle.end(reason);
        }
    }

    /// Changes what is known of a machine; written to the store soon, together with others.
    pub(crate) fn heard(&self, instance: &Arc<str>, change: impl FnOnce(&mut StatusRecord)) {
        let mut guard = self.registry();
        let registry = &mut *guard;
        let status = registry.statuses.entry(Arc::clone(instance)).or_default();
        let before = status.clone();
        change(status);
        if *status == before {
            return;
        }
        registry.shared.status(status);
        status.seen_ms = now_ms();
        // Made only for those who watch: ten thousand machines speak at once after a push.
        let live = (self.live.receiver_count() > 0).then(|| {
            json!({
                "instance": instance,
                "generation": status.generation,
                "connected": !status.server.is_empty(),
                "failure": status.failure,
                "drift": status.drift,
            })
        });
        let labels = match (&live, registry.instances.get(instance)) {
            (Some(_), Some(known)) => (*known.record.labels).clone(),
            _ => Labels::new(),
        };
        registry.dirty.insert(Arc::clone(instance));
        drop(guard);
        if let Some(body) = live {
            self.tell("instance", instance, labels, &body);
        }
        self.rollout_wake.notify_one();
    }

    /// What is known about a machine, for a rollout.
    pub(crate) fn fact(&self, registry: &Registry, view: &View, instance: &str, now_ms: u64) -> Fact {
        let Some(status) = registry.statuses.get(instance) else {
            return Fact { removed: !registry.instances.contains_key(instance), ..Fact::default() };
        };
        let target = view.target(instance);
        let is_target = |digest: Sha256| target == Some(digest.0);
        Fact {
            applied: is_target(status.digest),
            failed: status.failed.is_some_and(is_target) && status.failed_generation >= view.asked,
            connected: registry.connected(&self.server, status, now_ms),
            heard_ms: status.seen_ms,
            removed: !registry.instances.contains_key(instance),
        }
    }

    /// A stream has an instance that is ahead of this server. If nothing new comes by itself, a new number is made:
    /// two servers may have given out the same one for different contents, and the next settles it.
    pub(crate) fn nudge(&self) {
        self.nudge_wake.notify_one();
    }

    async fn keep_nudging(self: Arc<Self>) {
        loop {
            self.nudge_wake.notified().await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            let mark = Commit {
                ops: vec![keepwall_store::Op::put("nudge", records::CURRENT, keepwall_store::Expect::Any, &0)],
                ..Commit::default()
            };
            if let Err(error) = self.store.commit(mark).await {
                tracing::warn!(%error, "cannot make a new generation");
            }
            // Once a second at most, whatever instances claim to hold.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

impl Handle {
    pub(crate) fn end(&self, reason: &'static str) {
        *hold(&self.end) = Some(reason);
        self.wake.notify_one();
    }

    pub(crate) fn ended(&self) -> Option<&'static str> {
        *hold(&self.end)
    }
}

impl Registry {
    /// True if a stream of the machine is open at some living server.
    pub(crate) fn connected(&self, own: &str, status: &StatusRecord, now_ms: u64) -> bool {
        let alive = |server: &str| {
            self.servers.get(server).is_some_and(|record| now_ms.saturating_sub(record.beat_ms) < SERVER_SILENT_MS)
        };
        !status.server.is_empty() && (&*status.server == own || alive(&status.server))
    }

    /// Takes over a machine's record, or forgets it. A record that is older than what is known comes too late.
    pub(crate) fn set_instance(&mut self, name: &str, record: Option<(Generation, InstanceRecord)>) {
        if let (Some(old), Some((new, _))) = (self.instances.get(name), &record)
            && *new < old.revision
        {
            return;
        }
        let known = record.map(|(revision, mut record)| {
            self.shared.instance(&mut record);
            Known { revision, record: Arc::new(record) }
        });
        let name: Arc<str> = match self.instances.get_key_value(name) {
            Some((name, _)) => Arc::clone(name),
            None => name.into(),
        };
        let old = self.instances.get(&name);
        self.unresolved |= match (old, &known) {
            (Some(old), Some(new)) => {
                (&old.record.labels, &old.record.interfaces) != (&new.record.labels, &new.record.interfaces)
            }
            (old, new) => old.is_some() != new.is_some(),
        };
        if let Some(old) = old {
            for certificate in &old.record.certificates {
                self.certificates.remove(&certificate.sha256.0);
            }
            for address in old.record.interfaces.iter().flat_map(|i| &i.addresses) {
                self.addresses.remove(address);
            }
        }
        match known {
            None => {
                self.instances.remove(&name);
                self.statuses.remove(&name);
                self.dirty.remove(&name);
            }
            Some(known) => {
                for certificate in &known.record.certificates {
                    self.certificates.insert(certificate.sha256.0, (Arc::clone(&name), certificate.until_ms));
                }
                for address in known.record.interfaces.iter().flat_map(|i| &i.addresses) {
                    self.addresses.insert(*address, Arc::clone(&name));
                }
                self.instances.insert(name, known);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_people_read_them() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(rfc3339(1_795_314_896_789), "2026-11-22T02:34:56.789Z");
    }

    #[test]
    fn digests_are_kept_as_people_read_them() {
        let text = format!("\"{}\"", "a7".repeat(32));
        assert_eq!(serde_json::to_string(&Sha256([0xa7; 32])).unwrap(), text);
        assert_eq!(serde_json::from_str::<Sha256>(&text).unwrap(), Sha256([0xa7; 32]));
        assert_eq!(serde_json::from_str::<Sha256>("\"\"").unwrap(), Sha256::default());
        assert!(serde_json::from_str::<Sha256>("\"07\"").is_err());
    }

    #[test]
    fn machines_that_are_alike_share_what_they_have_in_common() {
        let mut registry = Registry::default();
        let record = || InstanceRecord {
            labels: Arc::new([("tier".to_owned(), "web".to_owned())].into()),
            ..InstanceRecord::default()
        };
        registry.set_instance("web-1", Some((1, record())));
        registry.set_instance("web-2", Some((2, record())));
        let labels = |name: &str| Arc::clone(&registry.instances[name].record.labels);
        assert!(Arc::ptr_eq(&labels("web-1"), &labels("web-2")));
        // Nothing is held for machines that are gone.
        for n in 0..1_000 {
            let labels = Arc::new([("n".to_owned(), n.to_string())].into());
            registry.set_instance("web-3", Some((3, InstanceRecord { labels, ..record() })));
        }
        assert!(registry.shared.labels.len() < 200);
    }
}
