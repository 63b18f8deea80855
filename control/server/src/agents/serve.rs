//! What the ways to speak have in common: statuses, reports, offers, renewals.

use std::sync::Arc;

use bytes::Bytes;
use keepwall_fleet::sync::{Applied, Next, Outcome, Refusal, Session};
use keepwall_store::{Row, Stream};
use keepwall_wire::{REPORT_ROWS_MAX, Report, Status, offer_frame};

use super::Agents;
use crate::fleet::{Sha256, now_ms};

/// Lines of drift or degradation that are kept of one machine, and characters of each.
const LINES_MAX: usize = 32;
const LINE_CHARS_MAX: usize = 300;
/// Characters of a failure's reason.
const DETAIL_CHARS_MAX: usize = 2_000;
/// Bytes of one row's body.
const ROW_BYTES_MAX: usize = 16 * 1024;

fn short(text: &str, chars: usize) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').take(chars).collect()
}

fn lines(all: &[String]) -> Vec<String> {
    all.iter().take(LINES_MAX).map(|line| short(line, LINE_CHARS_MAX)).collect()
}

impl Agents {
    pub(super) fn take_status(&self, instance: &Arc<str>, status: &Status) {
        self.fleet.heard(instance, |record| {
            if *record.mode != *status.mode {
                record.mode = short(&status.mode, 32).into();
            }
            record.drift = lines(&status.drift);
            record.degraded = lines(&status.degraded);
        });
    }

    /// What a session knows becomes known to people and to rollouts.
    pub(super) fn take_held(&self, instance: &Arc<str>, session: &Session, version: Option<&str>) {
        let server = Arc::clone(self.fleet.server_name());
        self.fleet.heard(instance, |record| {
            record.generation = session.held().generation;
            record.digest = Sha256(session.held().digest);
            let failed = session.failed().map(Sha256);
            if failed.is_none() {
                record.failure.clear();
            } else if record.failure.is_empty() {
                record.failure = "it went back to what it enforced before".into();
            }
            record.failed_generation = session.tried().generation;
            record.failed = failed;
            record.server = server;
            if let Some(version) = version {
                record.version = short(version, 64).into();
            }
        });
    }

    pub(super) fn take_outcome(&self, instance: &Arc<str>, session: &mut Session, outcome: &Outcome, detail: &str) {
        // After a lost stream the hello says what became of an offer, and this only why.
        let told_before = outcome.result == Applied::Failed && session.failed() == Some(outcome.state.digest);
        if !session.answered(outcome) && !told_before {
            return;
        }
        let failure = match outcome.result {
            Applied::Yes | Applied::Refused(Refusal::Older | Refusal::OtherBase) => None,
            Applied::Failed => Some(short(detail, DETAIL_CHARS_MAX)),
            Applied::Refused(Refusal::OtherInstance) => Some("it says that this is not for it".into()),
            Applied::Refused(Refusal::BadBody) => {
                Some(format!("it cannot use this: {}", short(detail, DETAIL_CHARS_MAX)))
            }
        };
        if let Some(failure) = failure {
            tracing::warn!(instance = &**instance, failure, "a machine did not take what it was told");
            self.fleet.heard(instance, |record| record.failure = failure);
        }
        self.take_held(instance, session, None);
    }

    /// Rows to the store; what the instance may forget. Waits while the store is behind.
    pub(super) async fn take_report(&self, instance: &Arc<str>, report: Report) -> Result<u64, &'static str> {
        if report.rows.len() > REPORT_ROWS_MAX {
            return Err("a report of too many rows");
        }
        let through = report.through;
        let labels = self.fleet.labels_of(instance);
        let mut findings = Vec::new();
        let mut events = Vec::new();
        if report.lost > 0 {
            events.push(Row {
                id: 0,
                source: instance.to_string(),
                key: format!("lost-{through}"),
                time_ms: now_ms(),
                kind: "lost".into(),
                severity: 1,
                body: serde_json::json!({ "rows": report.lost }).to_string(),
            });
        }
        for row in report.rows {
            let sane = row.key.len() <= 128 && row.kind.len() <= 64 && row.body.len() <= ROW_BYTES_MAX;
            if !sane || serde_json::from_str::<serde::de::IgnoredAny>(&row.body).is_err() {
                return Err("a row that is none");
            }
            let out = Row {
                id: 0,
                source: instance.to_string(),
                key: row.key,
                time_ms: row.time_ms,
                kind: row.kind,
                severity: u8::try_from(row.severity.min(4)).unwrap_or(4),
                body: row.body,
            };
            if row.finding { findings.push(out) } else { events.push(out) }
        }
        for (stream, rows) in [(Stream::Finding, findings), (Stream::Event, events)] {
            if rows.is_empty() {
                continue;
            }
            for row in &rows {
                let body = serde_json::from_str(&row.body).unwrap_or_default();
                self.fleet.tell_row(stream, &row.source, &labels, &row.kind, row.severity, &body);
            }
            // What is not kept is not acknowledged: the instance sends it again.
            self.fleet.store().append(stream, rows).await.map_err(|_| "the store is behind")?;
        }
        Ok(through)
    }

    /// The next offer for a session, if there is one.
    pub(super) fn next_offer(&self, instance: &Arc<str>, session: &mut Session) -> Option<Bytes> {
        let view = self.fleet.view();
        session.forgive(view.asked);
        let desired = view.desired(instance)?;
        match session.next(&desired) {
            Next::Nothing => None,
            Next::Behind => {
                self.fleet.nudge();
                None
            }
            Next::Offer { state, base } => {
                let (base, body) = view.body(instance, base)?;
                session.offered(state);
                let note = view.active.as_ref().map_or("", |active| active.id.as_str());
                Some(offer_frame(instance, state, base, &body, view.confirm_within_s(), note))
            }
        }
    }
}
