//! Findings and events on their way to the control plane: a queue with an end.
//!
//! Rows stay until the server says that it keeps them. When it is away for long, flows go first: there are always
//! more of them, and a finding says what to do.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use keepwall_wire::{Report, Row};

/// Rows that wait: an hour of a flow per second. More are counted and dropped.
const ROWS_MAX: usize = 4_096;
/// Bytes of one report: a frame has at most 256 KiB, and the heads of 256 rows need some of it.
const REPORT_BYTES_MAX: usize = 192 * 1024;
/// The longest body; what is longer is not worth its place.
const BODY_BYTES_MAX: usize = 8 * 1024;

/// What a row is about.
pub(crate) const FLOW: &str = "flow";

#[derive(Debug)]
pub(crate) struct Rows {
    /// With their numbers, which count from 1.
    queue: VecDeque<(u64, Row)>,
    next: u64,
    /// Dropped, and not yet told or not yet kept.
    lost: u64,
    /// Told with the report that is on its way.
    told: u64,
    /// Tells the rows of this process from those of an earlier one.
    life: u64,
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Rows {
    pub(crate) fn new() -> Rows {
        Rows { queue: VecDeque::new(), next: 1, lost: 0, told: 0, life: now_ms() }
    }

    /// Something concluded, to be dealt with by somebody. Severity: 0 information to 4 critical.
    pub(crate) fn finding(&mut self, kind: &str, severity: u32, body: &impl serde::Serialize) {
        self.push(true, kind, severity, body);
    }

    /// Something that happened.
    pub(crate) fn event(&mut self, kind: &str, severity: u32, body: &impl serde::Serialize) {
        self.push(false, kind, severity, body);
    }

    /// Events that came too fast to be seen.
    pub(crate) fn lost(&mut self, count: u64) {
        self.lost = self.lost.saturating_add(count);
    }

    fn push(&mut self, finding: bool, kind: &str, severity: u32, body: &impl serde::Serialize) {
        let body = serde_json::to_string(body).ok().filter(|body| body.len() <= BODY_BYTES_MAX);
        let Some(body) = body else { return self.lost(1) };
        if self.queue.len() >= ROWS_MAX {
            let goes = self.queue.iter().position(|(_, row)| row.kind == FLOW).unwrap_or(0);
            self.queue.remove(goes);
            self.lost(1);
        }
        let number = self.next;
        self.next += 1;
        let key = format!("{:x}-{number}", self.life);
        let row = Row { finding, key, time_ms: now_ms(), kind: kind.to_owned(), severity, body };
        self.queue.push_back((number, row));
    }

    /// The oldest rows, as many as fit.
    pub(crate) fn report(&mut self, max: usize) -> Report {
        let mut bytes = 0;
        let fits = |(_, row): &&(u64, Row)| {
            bytes += row.body.len() + row.kind.len() + row.key.len() + 32;
            bytes <= REPORT_BYTES_MAX
        };
        let rows: Vec<&(u64, Row)> = self.queue.iter().take(max).take_while(fits).collect();
        self.told = self.lost;
        Report {
            through: rows.last().map_or(self.next - 1, |(number, _)| *number),
            rows: rows.into_iter().map(|(_, row)| row.clone()).collect(),
            lost: self.lost,
        }
    }

    /// The server keeps everything up to this one.
    pub(crate) fn kept(&mut self, through: u64) {
        while self.queue.front().is_some_and(|(number, _)| *number <= through) {
            self.queue.pop_front();
        }
        self.lost -= std::mem::take(&mut self.told).min(self.lost);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn rows_stay_until_they_are_kept() {
        let mut rows = Rows::new();
        assert!(rows.report(10).rows.is_empty());
        for n in 0..5 {
            rows.event("applied", 0, &n);
        }
        let first = rows.report(3);
        assert_eq!((first.rows.len(), first.through), (3, 3));
        assert_eq!(rows.report(3).rows, first.rows, "the connection broke: again");
        rows.kept(first.through);
        let second = rows.report(3);
        assert_eq!((second.rows.len(), second.through), (2, 5));
        let mut keys: Vec<&str> = first.rows.iter().chain(&second.rows).map(|row| row.key.as_str()).collect();
        keys.dedup();
        assert_eq!(keys.len(), 5);
    }

    #[test]
    fn a_full_queue_drops_flows_before_findings_and_counts_them() {
        let mut rows = Rows::new();
        rows.finding("drift", 2, &"first");
        for n in 0..ROWS_MAX + 9 {
            rows.event(FLOW, 0, &n);
        }
        assert_eq!(rows.queue.len(), ROWS_MAX);
        let report = rows.report(ROWS_MAX);
        assert_eq!((report.rows[0].kind.as_str(), report.lost), ("drift", 10));
        rows.lost(3);
        rows.kept(report.through);
        assert_eq!(rows.report(1).lost, 3, "what was told and kept is not told again");
    }

    #[test]
    fn a_report_fits_into_a_frame() {
        let mut rows = Rows::new();
        for _ in 0..300 {
            rows.event("x", 0, &"y".repeat(8_000));
        }
        rows.event("x", 0, &"y".repeat(100_000));
        let report = rows.report(keepwall_wire::REPORT_ROWS_MAX);
        assert!(!report.rows.is_empty() && report.lost == 1);
        let said = keepwall_wire::FromAgent { say: Some(keepwall_wire::from_agent::Say::Report(report)) };
        assert!(keepwall_wire::frame(&said).len() < keepwall_wire::AGENT_FRAME_MAX);
    }
}
