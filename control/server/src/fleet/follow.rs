//! Follows the store: what any server commits becomes known here, and sessions are told what is new for them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use keepwall_store::{Change, Commit, Generation, Op, PAGE_MAX, Resource, StoreError};
use tokio::sync::watch;

use super::records::{
    ASKED, CURRENT, INSTANCE, InstanceRecord, POSTURE, PostureRecord, ROLLOUT, RolloutRecord, SERVER, STATUS,
    ServerRecord, StatusRecord,
};
use super::tokens::TOKEN_USE;
use super::view::{Active, Declared, Source, View, enrolled, parse};
use super::{Fleet, hold, now_ms};

/// After a machine joined or left, wait so long for others before everything is resolved again; and three times as
/// long as that took the last time, so that a storm of enrolments leaves room for itself.
const GATHER: Duration = Duration::from_millis(25);
/// Pages of changes that are read before what they mean is told; under a steady load there is always one more.
const PAGES_MAX: usize = 64;
/// While the store does not answer, ask again after so long.
const RETRY: Duration = Duration::from_millis(500);
/// How often this server says that it lives.
const BEAT: Duration = Duration::from_secs(10);
/// How often statuses are written. What they say is known at this server before.
const FLUSH: Duration = Duration::from_millis(700);
/// Statuses in one commit.
const FLUSH_MAX: usize = 5_000;

pub(super) struct Follower {
    fleet: Arc<Fleet>,
    changed: watch::Receiver<Generation>,
    seen: Generation,
    asked: Generation,
    declared: Option<Declared>,
    rollouts: BTreeMap<String, (Generation, Arc<RolloutRecord>)>,
    /// How long it last took to resolve everything.
    resolving: Duration,
    /// What was followed and is not in the view yet. It outlives a store that goes away in between.
    due: Touched,
}

/// What a change touches.
#[derive(Default)]
struct Touched {
    instances: bool,
    posture: bool,
    other: bool,
}

impl Follower {
    pub(super) async fn start(fleet: Arc<Fleet>) -> Result<Follower, StoreError> {
        let changed = fleet.store.changed();
        let mut follower = Follower {
            fleet,
            changed,
            seen: 0,
            asked: 0,
            declared: None,
            rollouts: BTreeMap::new(),
            resolving: Duration::ZERO,
            due: Touched::default(),
        };
        follower.load().await?;
        Ok(follower)
    }

    /// Everything anew.
    async fn load(&mut self) -> Result<(), StoreError> {
        let store = Arc::clone(&self.fleet.store);
        let seen = store.generation().await?;
        self.rollouts.clear();
        {
            let mut registry = self.fleet.registry();
            let names: Vec<Arc<str>> = registry.instances.keys().cloned().collect();
            // Statuses of our own streams are newer than the store's; all else is read again.
            names.iter().for_each(|name| registry.set_instance(name, None));
        }
        for kind in [SERVER, INSTANCE, STATUS, ROLLOUT, ASKED, POSTURE] {
            let mut after: Option<String> = None;
            loop {
                let page = store.list(kind, after.as_deref(), PAGE_MAX).await?;
                after = page.last().map(|r| r.name.clone());
                let full = page.len() == PAGE_MAX;
                for resource in page {
                    self.take(kind, &resource.name.clone(), Some(resource))?;
                }
                if !full {
                    break;
                }
            }
        }
        self.seen = seen;
        self.publish(true).await
    }

    /// One resource as it is now.
    fn take(&mut self, kind: &str, name: &str, resource: Option<Resource>) -> Result<Touched, StoreError> {
        let mut touched = Touched::default();
        match kind {
            INSTANCE => {
                let known: Option<(Generation, InstanceRecord)> = match &resource {
                    Some(r) => Some((r.revision, r.read()?)),
                    None => None,
                };
                let gone = known.is_none();
                let revoked = known.as_ref().is_some_and(|(_, record)| record.certificates.is_empty());
                let mut registry = self.fleet.registry();
                registry.set_instance(name, known);
                // Perhaps this server did it itself and knows already; then it is to be resolved all the same.
                touched.instances = registry.unresolved;
                drop(registry);
                if gone || revoked {
                    self.fleet.end_stream(name, "revoked");
                }
            }
            STATUS => {
                let status: Option<StatusRecord> = resource.as_ref().map(Resource::read).transpose()?;
                let ours = hold(&self.fleet.sessions).contains_key(name);
                let mut registry = self.fleet.registry();
                match status {
                    // Our own stream knows better; should another server have written over it, write it again.
                    Some(status) if ours => {
                        if status.server != self.fleet.server
                            && let Some((name, _)) = registry.statuses.get_key_value(name)
                        {
                            let name = Arc::clone(name);
                            registry.dirty.insert(name);
                        }
                    }
                    Some(mut status) => {
                        registry.shared.status(&mut status);
                        let name = match registry.instances.get_key_value(name) {
                            Some((name, _)) => Arc::clone(name),
                            None => name.into(),
                        };
                        registry.statuses.insert(name, status);
                    }
                    None => {
                        registry.statuses.remove(name);
                    }
                }
                drop(registry);
                self.fleet.rollout_wake.notify_one();
            }
            SERVER => {
                let record: Option<ServerRecord> = resource.as_ref().map(Resource::read).transpose()?;
                let mut registry = self.fleet.registry();
                match record {
                    Some(record) => registry.servers.insert(name.to_owned(), record),
                    None => registry.servers.remove(name),
                };
            }
            ROLLOUT => {
                touched.other = true;
                match resource {
                    Some(r) => {
                        let record: RolloutRecord = r.read()?;
                        let view = super::rollouts::summary(name, r.revision, &record);
                        self.fleet.tell("rollout", name, BTreeMap::new(), &view);
                        // What is over is history: it is read from the store when somebody asks.
                        if record.rollout.phase.is_over() {
                            self.rollouts.remove(name);
                        } else {
                            self.rollouts.insert(name.to_owned(), (r.revision, Arc::new(record)));
                        }
                    }
                    None => {
                        self.rollouts.remove(name);
                    }
                }
                self.fleet.rollout_wake.notify_one();
            }
            ASKED => {
                touched.other = true;
                self.asked = resource.map_or(0, |r| r.revision);
            }
            POSTURE if name == CURRENT => {
                touched.posture = true;
                self.declared = match resource {
                    None => None,
                    Some(r) => {
                        let record: PostureRecord = r.read()?;
                        self.fleet.tell(
                            "posture",
                            CURRENT,
                            BTreeMap::new(),
                            &serde_json::json!({ "revision": r.revision, "actor": record.actor, "reason": record.reason }),
                        );
                        declared(r.revision, record)
                    }
                };
            }
            _ => {}
        }
        Ok(touched)
    }

    async fn before(&self, revision: Generation) -> Result<Option<Declared>, StoreError> {
        if revision == 0 {
            return Ok(None);
        }
        if let Some(declared) = self.declared.as_ref().filter(|d| d.revision == revision) {
            return Ok(Some(declared.clone()));
        }
        let found = self.fleet.store.history(POSTURE, CURRENT, Some(revision + 1), 1).await?;
        match found.first().filter(|r| r.revision == revision) {
            Some(r) => Ok(declared(r.revision, r.read()?)),
            None => Ok(None),
        }
    }

    /// A new view, and sessions woken for which it means something new.
    async fn publish(&mut self, instances_changed: bool) -> Result<(), StoreError> {
        let active = self.rollouts.iter().next_back();
        let active = active.map(|(id, (revision, record))| Active {
            id: id.clone(),
            revision: *revision,
            record: Arc::clone(record),
        });
        let before = match &active {
            Some(active) => self.before(active.record.from_revision).await?,
            None => None,
        };
        let enrolled = {
            let mut registry = self.fleet.registry();
            registry.unresolved = false;
            let mut all: Vec<_> = (registry.instances.iter())
                .map(|(name, known)| (known.record.enrolled_ms, enrolled(name, &known.record)))
                .collect();
            // Who came last is held out first if there are too many.
            all.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
            all.into_iter().map(|(_, enrolled)| enrolled).collect()
        };
        let source = Source {
            generation: self.seen,
            asked: self.asked,
            declared: self.declared.clone(),
            before,
            active,
            enrolled,
        };
        let last = self.fleet.view();
        let begun = std::time::Instant::now();
        let made = {
            let last = Arc::clone(&last);
            tokio::task::spawn_blocking(move || View::make(source, &last, instances_changed)).await
        };
        let view = match made {
            Ok(view) => Arc::new(view),
            Err(error) => {
                tracing::error!(%error, "the fleet's state could not be resolved; what was told before stays");
                return Ok(());
            }
        };
        self.resolving = begun.elapsed();
        for (name, why) in view.now.iter().flat_map(|world| world.held_out()) {
            tracing::warn!(instance = name, why, "an enrolled machine breaks a rule of the posture and is held out");
        }
        *self.fleet.view.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::clone(&view);
        let asked = view.asked != last.asked;
        for (name, handle) in hold(&self.fleet.sessions).iter() {
            let digest = |v: &View| v.desired(name).map(|state| state.digest);
            if asked || digest(&view) != digest(&last) {
                handle.wake.notify_one();
            }
        }
        self.fleet.rollout_wake.notify_one();
        Ok(())
    }

    pub(super) async fn run(mut self) {
        loop {
            if self.changed.changed().await.is_err() {
                return;
            }
            if let Err(error) = self.catch_up().await {
                if error == StoreError::ChangesGone {
                    tracing::warn!("too far behind the store: everything is read anew");
                    if let Err(error) = self.load().await {
                        tracing::warn!(%error, "cannot read the store");
                        tokio::time::sleep(RETRY).await;
                    }
                } else {
                    tracing::warn!(%error, "cannot follow the store");
                    tokio::time::sleep(RETRY).await;
                }
                self.changed.mark_changed();
            }
        }
    }

    async fn catch_up(&mut self) -> Result<(), StoreError> {
        let mut gathered = false;
        for _ in 0..PAGES_MAX {
            // Commits without resources count too: what is newest is asked first, so that nothing is passed over.
            let newest = self.fleet.store.generation().await?;
            let changes = self.fleet.store.changes(self.seen).await?;
            let Some(last) = changes.last().map(|change| change.generation) else {
                self.seen = self.seen.max(newest);
                if self.due.instances && !self.due.posture && !gathered {
                    // Whoever joins meanwhile is resolved with the others.
                    gathered = true;
                    tokio::time::sleep(GATHER.max(self.resolving * 3)).await;
                    continue;
                }
                break;
            };
            for change in changes {
                let new = self.follow(&change).await?;
                self.due.instances |= new.instances;
                self.due.posture |= new.posture;
                self.due.other |= new.other;
            }
            self.seen = last;
        }
        // Should there be more pages, they are next.
        if *self.changed.borrow() > self.seen {
            self.changed.mark_changed();
        }
        if self.due.instances || self.due.posture || self.due.other {
            self.publish(self.due.instances).await?;
            self.due = Touched::default();
            return Ok(());
        }
        // Only the number is new: the same worlds serve, and nobody needs to look.
        let mut view = self.fleet.view.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if view.generation < self.seen {
            *view = Arc::new(view.later(self.seen));
        }
        Ok(())
    }

    async fn follow(&mut self, change: &Change) -> Result<Touched, StoreError> {
        if change.kind == TOKEN_USE && !change.deleted {
            self.fleet.slot_taken(&change.name);
        }
        if ![SERVER, INSTANCE, STATUS, ROLLOUT, ASKED, POSTURE].contains(&change.kind.as_str()) {
            return Ok(Touched::default());
        }
        // Statuses of our own streams come back to us: nothing new.
        if change.kind == STATUS && hold(&self.fleet.sessions).contains_key(change.name.as_str()) && !change.deleted {
            return Ok(Touched::default());
        }
        let resource = self.fleet.store.get(&change.kind, &change.name).await?;
        self.take(&change.kind, &change.name, resource)
    }
}

fn declared(revision: Generation, record: PostureRecord) -> Option<Declared> {
    match parse(&record) {
        Ok(spec) => Some(Declared { revision, spec: Arc::new(spec) }),
        Err(problems) => {
            let why = problems.first().map(ToString::to_string).unwrap_or_default();
            tracing::error!(
                revision,
                why,
                "the posture in force is not understood by this version; nothing new is told"
            );
            None
        }
    }
}

impl Fleet {
    /// Writes what instances said, many at once, and that this server lives.
    pub(super) async fn flush_statuses(self: Arc<Self>) {
        let mut beaten: Option<tokio::time::Instant> = None;
        loop {
            tokio::time::sleep(FLUSH).await;
            let mut ops = Vec::new();
            let mut written = Vec::new();
            if beaten.is_none_or(|at| at.elapsed() >= BEAT) {
                let record = ServerRecord { beat_ms: now_ms() };
                ops.push(Op::put(SERVER, &self.server, keepwall_store::Expect::Any, &record));
                self.registry().servers.insert(self.server.to_string(), record);
                beaten = Some(tokio::time::Instant::now());
                self.bury_servers(&mut ops);
            }
            {
                let mut registry = self.registry();
                let names: Vec<Arc<str>> = registry.dirty.iter().take(FLUSH_MAX).cloned().collect();
                for name in names {
                    registry.dirty.remove(&name);
                    if let Some(status) = registry.statuses.get(&name) {
                        ops.push(Op::put(STATUS, &name, keepwall_store::Expect::Any, status));
                        written.push(name);
                    }
                }
            }
            if ops.is_empty() {
                continue;
            }
            if let Err(error) = self.store.commit(Commit { ops, ..Commit::default() }).await {
                tracing::warn!(%error, "statuses of {} machines wait", written.len());
                self.registry().dirty.extend(written);
                beaten = None;
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// Where one server has the store to itself, those before it are gone: nobody's stream is open at them.
    pub(super) async fn bury_predecessors(&self) -> Result<(), StoreError> {
        let before = self.store.list(SERVER, None, PAGE_MAX).await?;
        let ops: Vec<Op> = before.iter().map(|r| Op::delete(SERVER, &r.name, keepwall_store::Expect::Any)).collect();
        if !ops.is_empty() {
            self.store.commit(Commit { ops, ..Commit::default() }).await?;
        }
        Ok(())
    }

    /// Servers that have been silent for a day are forgotten.
    fn bury_servers(&self, ops: &mut Vec<Op>) {
        const FORGOTTEN_MS: u64 = 86_400_000;
        let now = now_ms();
        for (name, record) in &self.registry().servers {
            if now.saturating_sub(record.beat_ms) > FORGOTTEN_MS {
                ops.push(Op::delete(SERVER, name, keepwall_store::Expect::Any));
            }
        }
    }
}
