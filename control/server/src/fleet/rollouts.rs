//! Rollouts: one server at a time takes the next step of each, from what machines are known to do.

use std::sync::Arc;
use std::time::Duration;

use keepwall_api::fleet::{RolloutState, RolloutView, WaveView};
use keepwall_fleet::rollout::{Phase, Step};
use keepwall_store::{Commit, Expect, Generation, Op, PAGE_MAX, StoreError};
use serde_json::{Value, json};

use super::records::{ASKED, CURRENT, POSTURE, POSTURES_KEPT, PostureRecord, ROLLOUT, RolloutRecord};
use super::{Act, Fleet, FleetError, now_ms, rfc3339};

/// How long one server drives rollouts before another may, milliseconds.
const LEASE_MS: u64 = 10_000;
/// The lease is renewed so long before it ends.
const RENEW: Duration = Duration::from_secs(3);
/// Between two looks at all machines at least.
const GATHER: Duration = Duration::from_millis(20);
/// How often time alone is looked at while a rollout is on its way.
const TICK: Duration = Duration::from_millis(250);

/// A rollout in a line, for those who watch.
pub(super) fn summary(id: &str, revision: Generation, record: &RolloutRecord) -> Value {
    json!({
        "rollout": id,
        "revision": revision,
        "state": record.rollout.phase,
        "detail": record.detail,
        "waves": record.rollout.waves.len(),
        "open": record.rollout.waves.iter().filter(|w| w.opened_ms.is_some()).count(),
    })
}

impl Fleet {
    /// Drives rollouts until the server ends.
    pub(super) async fn drive_rollouts(self: Arc<Self>) {
        let mut leased: Option<tokio::time::Instant> = None;
        loop {
            if self.view().active.is_none() {
                self.rollout_wake.notified().await;
            } else {
                let _ = tokio::time::timeout(TICK, self.rollout_wake.notified()).await;
            }
            if self.view().active.is_none() {
                continue;
            }
            if leased.is_none_or(|at| at.elapsed() > RENEW) {
                match self.store.lease("rollouts", &self.server, LEASE_MS).await {
                    Ok(true) => leased = Some(tokio::time::Instant::now()),
                    Ok(false) => {
                        leased = None;
                        tokio::time::sleep(TICK * 4).await;
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot drive rollouts");
                        leased = None;
                        tokio::time::sleep(TICK * 4).await;
                        continue;
                    }
                }
            }
            let begun = tokio::time::Instant::now();
            let driven = self.drive().await;
            // Ten thousand machines speak at once: their words are gathered, and most of the time is theirs.
            tokio::time::sleep(GATHER.max(begun.elapsed() * 9)).await;
            if let Err(error) = driven {
                // Somebody else's step came first, or the store is away: look again.
                tracing::debug!(?error, "a rollout's step did not go through");
                tokio::time::sleep(TICK).await;
            }
        }
    }

    /// Steps until there is nothing more to do now.
    async fn drive(&self) -> Result<(), FleetError> {
        let view = self.view();
        let Some(active) = &view.active else { return Ok(()) };
        let Some(declared) = &view.declared else { return Ok(()) };
        let now = now_ms();
        let mut record = (*active.record).clone();
        let mut audit = Vec::new();
        let mut changed = false;
        {
            let registry = self.registry();
            let fact = |name: &str| self.fact(&registry, &view, name, now);
            // A step follows another without waiting for the store in between; one commit carries them all.
            for _ in 0..=record.rollout.waves.len() * 2 {
                let step = record.rollout.step(now, &fact);
                if !record.rollout.take(&step, now, &|name| fact(name).connected) {
                    break;
                }
                changed = true;
                let what = match &step {
                    Step::Open(n) => format!("wave {} is told", n + 1),
                    Step::Settle(n) => format!("wave {} has it", n + 1),
                    Step::Finish => "everybody who is there has it".to_owned(),
                    Step::Stop { failed, lost } => stop_reason(failed, lost),
                    Step::Wait(_) | Step::Rest => unreachable!("not taken"),
                };
                record.detail.clone_from(&what);
                if !matches!(step, Step::Settle(_)) {
                    audit.push(Act::server().line("rollout", &active.id, Value::Null, json!({ "step": what })));
                }
                if matches!(step, Step::Open(_)) {
                    break;
                }
            }
        }
        if !changed {
            return Ok(());
        }
        record.to_revision = declared.revision;
        let mut ops = Vec::new();
        if record.rollout.phase.is_over() {
            record.ended_ms = Some(now);
        }
        if record.rollout.phase == Phase::Returned {
            ops.extend(self.return_ops(&active.id, &record, declared.revision, "server").await?);
        }
        ops.push(Op::put(ROLLOUT, &active.id, Expect::Revision(active.revision), &record));
        self.commit(Commit { ops, audit, remember: None }).await?;
        Ok(())
    }

    /// What declares the posture before a rollout again.
    async fn return_ops(
        &self,
        id: &str,
        record: &RolloutRecord,
        present: Generation,
        actor: &str,
    ) -> Result<Vec<Op>, FleetError> {
        let files = match record.from_revision {
            0 => Vec::new(),
            revision => self.posture_record(revision).await?.files,
        };
        let back = PostureRecord {
            files,
            actor: actor.to_owned(),
            reason: format!("return of {id}"),
            returned_to: Some(record.from_revision),
            rollout: id.to_owned(),
        };
        let body = serde_json::to_string(&back).map_err(|error| FleetError::Wrong(error.to_string()))?;
        Ok(vec![
            Op::Put {
                kind: POSTURE.into(),
                name: CURRENT.into(),
                expect: Expect::Revision(present),
                body,
                keep: POSTURES_KEPT,
            },
            Op::put(ASKED, CURRENT, Expect::Any, &id),
        ])
    }

    pub(super) async fn rollout_record(&self, id: &str) -> Result<(Generation, u64, RolloutRecord), FleetError> {
        let found = self.store.get(ROLLOUT, id).await?;
        let found = found.ok_or_else(|| FleetError::NotFound(format!("there is no rollout `{id}`")))?;
        Ok((found.revision, found.created_ms, found.read()?))
    }

    /// Rollouts, newest first.
    ///
    /// # Errors
    /// The store.
    pub async fn rollouts(&self, after: Option<&str>, limit: usize) -> Result<Vec<RolloutView>, FleetError> {
        // Names grow with time, and the store lists upwards: bounded by how many postures are kept.
        let mut all = Vec::new();
        let mut from: Option<String> = None;
        loop {
            let page = self.store.list(ROLLOUT, from.as_deref(), PAGE_MAX).await?;
            from = page.last().map(|r| r.name.clone());
            let full = page.len() == PAGE_MAX;
            all.extend(page);
            if !full {
                break;
            }
        }
        let newest_first = all.into_iter().rev().skip_while(|r| after.is_some_and(|after| r.name.as_str() >= after));
        newest_first.take(limit).map(|r| Ok(self.rollout_view(&r.name, r.revision, &r.read()?))).collect()
    }

    /// One rollout.
    ///
    /// # Errors
    /// There is none of that id.
    pub async fn rollout(&self, id: &str) -> Result<RolloutView, FleetError> {
        let (revision, _, record) = self.rollout_record(id).await?;
        Ok(self.rollout_view(id, revision, &record))
    }

    fn rollout_view(&self, id: &str, revision: Generation, record: &RolloutRecord) -> RolloutView {
        let view = self.view();
        let now = now_ms();
        let current = view.active.as_ref().is_some_and(|active| active.id == id);
        let registry = self.registry();
        let (failed, lost) = if current {
            record.rollout.trouble(now, &|name| self.fact(&registry, &view, name, now))
        } else {
            Default::default()
        };
        let over = record.rollout.phase.is_over();
        let waves = (record.rollout.waves.iter())
            .map(|wave| {
                let mine = |names: &[String]| names.iter().filter(|n| wave.instances.contains(n)).cloned().collect();
                let applied = if current {
                    wave.instances.iter().filter(|n| self.fact(&registry, &view, n, now).applied).count()
                } else if over && wave.settled_ms.is_some() {
                    wave.instances.len()
                } else {
                    0
                };
                WaveView {
                    total: wave.instances.len() as u64,
                    open: wave.opened_ms.is_some(),
                    applied: if wave.opened_ms.is_some() { applied as u64 } else { 0 },
                    failed: mine(&failed),
                    lost: mine(&lost),
                }
            })
            .collect();
        RolloutView {
            id: id.to_owned(),
            revision,
            from_revision: record.from_revision,
            to_revision: record.to_revision,
            state: match record.rollout.phase {
                Phase::Running => RolloutState::Running,
                Phase::Stopped => RolloutState::Stopped,
                Phase::Done => RolloutState::Done,
                Phase::Returned => RolloutState::Returned,
            },
            detail: record.detail.clone(),
            actor: record.actor.clone(),
            started: rfc3339(record.started_ms),
            ended: record.ended_ms.map(rfc3339),
            policy: record.policy.clone(),
            waves,
        }
    }

    async fn change_rollout(
        &self,
        id: &str,
        action: &str,
        act: &Act,
        change: impl FnOnce(&mut RolloutRecord) -> Result<(), String>,
    ) -> Result<RolloutView, FleetError> {
        let (revision, _, mut record) = self.rollout_record(id).await?;
        let before = record.rollout.phase;
        change(&mut record).map_err(FleetError::Wrong)?;
        let mut ops = Vec::new();
        match action {
            "return" => {
                let present = self.posture().await?.revision;
                record.ended_ms = Some(now_ms());
                ops.extend(self.return_ops(id, &record, present, &act.actor).await?);
            }
            "resume" => ops.push(Op::put(ASKED, CURRENT, Expect::Any, &id)),
            _ => {}
        }
        ops.push(Op::put(ROLLOUT, id, Expect::Revision(revision), &record));
        let audit = vec![act.line(action, &format!("rollout/{id}"), json!(before), json!(record.rollout.phase))];
        match self.commit(Commit { ops, audit, remember: act.remember.clone() }).await {
            Ok(revision) => Ok(self.rollout_view(id, revision, &record)),
            Err(FleetError::Store(StoreError::Conflict { .. })) => {
                Err(FleetError::Wrong(format!("{id} moved on meanwhile; look at it and ask again")))
            }
            Err(error) => Err(error),
        }
    }

    /// Goes no further. Machines that were told keep what they have.
    ///
    /// # Errors
    /// It is not running.
    pub async fn stop_rollout(&self, id: &str, act: &Act) -> Result<RolloutView, FleetError> {
        let actor = act.actor.clone();
        self.change_rollout(id, "stop", act, move |record| {
            if record.rollout.phase != Phase::Running {
                return Err("it is not running".into());
            }
            record.rollout.phase = Phase::Stopped;
            record.detail = format!("stopped by {actor}");
            Ok(())
        })
        .await
    }

    /// Goes on after a stop; machines that failed are tried again.
    ///
    /// # Errors
    /// It is not stopped.
    pub async fn resume_rollout(&self, id: &str, act: &Act) -> Result<RolloutView, FleetError> {
        let actor = act.actor.clone();
        self.change_rollout(id, "resume", act, move |record| {
            if !record.rollout.resume(now_ms()) {
                return Err("it is not stopped".into());
            }
            record.detail = format!("resumed by {actor}");
            Ok(())
        })
        .await
    }

    /// Everybody goes back to the posture before, at once.
    ///
    /// # Errors
    /// It is over.
    pub async fn return_rollout(&self, id: &str, act: &Act) -> Result<RolloutView, FleetError> {
        let actor = act.actor.clone();
        self.change_rollout(id, "return", act, move |record| {
            if record.rollout.phase.is_over() {
                return Err("it is over; return to an earlier posture instead".into());
            }
            record.rollout.phase = Phase::Returned;
            record.detail = format!("returned by {actor}");
            Ok(())
        })
        .await
    }
}

fn stop_reason(failed: &[String], lost: &[String]) -> String {
    let some = |names: &[String]| {
        let shown: Vec<&str> = names.iter().take(5).map(String::as_str).collect();
        let more = names.len().saturating_sub(5);
        if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
    };
    let mut parts = Vec::new();
    if !failed.is_empty() {
        parts.push(format!("{} failed", some(failed)));
    }
    if !lost.is_empty() {
        parts.push(format!("{} lost contact", some(lost)));
    }
    format!("stopped: {}", parts.join("; "))
}
