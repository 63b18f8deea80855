//! One change on its way through a fleet: wave by wave, and not further than it works.
//!
//! ```text
//!   Running ──▶ wave 1 told ──all applied, soaked──▶ wave 2 told ──▶ … ──▶ Done
//!      │  a machine fails, or loses contact, beyond what is allowed
//!      ▼
//!   Stopped ──resume──▶ Running          Stopped ──return──▶ Returned (everybody has the state before)
//! ```
//!
//! A machine that was not connected when its wave began holds nobody up: it is told when it comes back. One that was,
//! and is gone afterwards, counts as lost, which is just what a firewall mistake looks like from here.
//!
//! Pure: what machines say and what time it is arrive as arguments; what to do comes back as a value.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

/// How long a machine may be out of contact beyond its own time to confirm: it reverts, dials again with some jitter,
/// and is heard. Milliseconds.
pub const GRACE_MS: u64 = 15_000;

/// How a change goes through the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// How long each wave must hold before the next begins, milliseconds.
    pub soak_ms: u64,
    /// How long a machine may take to apply and confirm, seconds, 5-3,600.
    pub confirm_within_s: u32,
    /// More than this many that fail or are lost stop the rollout.
    pub failures_max: u32,
    /// True: a stop sends everybody back to the state before. False: they stay, and somebody decides.
    pub return_on_failure: bool,
}

/// Which machines a wave takes, of those that no earlier one took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Take {
    /// This many.
    Count(usize),
    /// This share of all, 1-100, rounded up.
    Percent(u8),
    /// Those with all of these labels.
    Labels(BTreeMap<String, String>),
}

/// A machine that a rollout changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// True if its stream is open: the others cannot be canaries.
    pub connected: bool,
}

/// Which machine goes in which wave: connected ones first, by name; what no wave takes goes in one more.
#[must_use]
pub fn waves(mut candidates: Vec<Candidate>, takes: &[Take]) -> Vec<Vec<String>> {
    candidates.sort_by(|a, b| b.connected.cmp(&a.connected).then_with(|| a.name.cmp(&b.name)));
    let all = candidates.len();
    let mut out = Vec::new();
    for take in takes {
        let wave: Vec<Candidate> = match take {
            Take::Labels(labels) => candidates
                .extract_if(.., |c| labels.iter().all(|(key, value)| c.labels.get(key) == Some(value)))
                .collect(),
            Take::Count(count) => candidates.drain(..(*count).min(candidates.len())).collect(),
            Take::Percent(percent) => {
                let count = (all * usize::from(*percent)).div_ceil(100);
                candidates.drain(..count.min(candidates.len())).collect()
            }
        };
        if !wave.is_empty() {
            out.push(wave.into_iter().map(|c| c.name).collect());
        }
    }
    if !candidates.is_empty() {
        out.push(candidates.into_iter().map(|c| c.name).collect());
    }
    out
}

/// Where a rollout stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// On its way.
    Running,
    /// Stopped by a failure or by somebody.
    Stopped,
    /// Everybody who is there has it.
    Done,
    /// Everybody goes back to the state before.
    Returned,
}

impl Phase {
    /// True if nothing more happens by itself or on request.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Phase::Done | Phase::Returned)
    }
}

/// One wave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wave {
    /// Machines in it.
    pub instances: Vec<String>,
    /// When its machines were told, milliseconds since 1970.
    pub opened_ms: Option<u64>,
    /// When the last of those who are there had applied it.
    pub settled_ms: Option<u64>,
    /// Machines that were not connected when it was opened.
    pub absent: Vec<String>,
}

/// A change and how far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// How it goes.
    pub pace: Pace,
    /// Where it stands.
    pub phase: Phase,
    /// In order.
    pub waves: Vec<Wave>,
}

/// What a machine is known to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fact {
    /// It holds what the rollout brings, confirmed.
    pub applied: bool,
    /// It could not, or took it back.
    pub failed: bool,
    /// Its stream is open.
    pub connected: bool,
    /// When it was last heard, milliseconds since 1970.
    pub heard_ms: u64,
    /// It was removed from the fleet meanwhile.
    pub removed: bool,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing before this time, unless a machine says something.
    Wait(u64),
    /// Tell this wave.
    Open(usize),
    /// This wave has it; its soak begins.
    Settle(usize),
    /// Everybody who is there has it.
    Finish,
    /// Go no further.
    Stop {
        /// Machines that failed or took it back.
        failed: Vec<String>,
        /// Machines that lost contact.
        lost: Vec<String>,
    },
    /// It is not running.
    Rest,
}

impl Rollout {
    /// A rollout that has told nobody yet.
    #[must_use]
    pub fn new(pace: Pace, waves: Vec<Vec<String>>) -> Rollout {
        let wave = |instances| Wave { instances, opened_ms: None, settled_ms: None, absent: Vec::new() };
        Rollout { pace, phase: Phase::Running, waves: waves.into_iter().map(wave).collect() }
    }

    /// Machines that are to have the new state, of a rollout that is not over.
    #[must_use]
    pub fn reached(&self) -> HashSet<String> {
        let open = self.waves.iter().filter(|wave| wave.opened_ms.is_some());
        open.flat_map(|wave| wave.instances.iter().cloned()).collect()
    }

    /// Who failed and who was lost, of the machines that were told.
    #[must_use]
    pub fn trouble(&self, now_ms: u64, fact: &dyn Fn(&str) -> Fact) -> (Vec<String>, Vec<String>) {
        let (mut failed, mut lost) = (Vec::new(), Vec::new());
        let patience_ms = u64::from(self.pace.confirm_within_s) * 1_000 + GRACE_MS;
        for wave in self.waves.iter() {
            let Some(opened_ms) = wave.opened_ms else { continue };
            let absent: HashSet<&str> = wave.absent.iter().map(String::as_str).collect();
            for name in &wave.instances {
                let fact = fact(name);
                let absent = absent.contains(name.as_str());
                let silent_since = fact.heard_ms.max(opened_ms);
                if fact.removed {
                    continue;
                }
                if fact.failed {
                    failed.push(name.clone());
                } else if !fact.connected && !absent && now_ms.saturating_sub(silent_since) > patience_ms {
                    lost.push(name.clone());
                } else if fact.connected && !fact.applied && now_ms.saturating_sub(opened_ms) > patience_ms && !absent {
                    // It is there and says neither yes nor no: as bad as a failure.
                    failed.push(name.clone());
                }
            }
        }
        (failed, lost)
    }

    /// What to do at `now_ms`, given what machines are known to do.
    #[must_use]
    pub fn step(&self, now_ms: u64, fact: &dyn Fn(&str) -> Fact) -> Step {
        if self.phase != Phase::Running {
            return Step::Rest;
        }
        let (failed, lost) = self.trouble(now_ms, fact);
        if failed.len() + lost.len() > self.pace.failures_max as usize {
            return Step::Stop { failed, lost };
        }
        let opened = self.waves.iter().take_while(|wave| wave.opened_ms.is_some()).count();
        let Some(current) = opened.checked_sub(1) else {
            return if self.waves.is_empty() { Step::Finish } else { Step::Open(0) };
        };
        let wave = &self.waves[current];
        let Some(settled_ms) = wave.settled_ms else {
            let over: HashSet<&String> = failed.iter().chain(&lost).collect();
            let absent: HashSet<&String> = wave.absent.iter().collect();
            let waiting = |name: &String| {
                let f = fact(name);
                !(f.applied || f.removed || over.contains(name)) && (f.connected || !absent.contains(name))
            };
            return if wave.instances.iter().any(waiting) { Step::Wait(now_ms + 1_000) } else { Step::Settle(current) };
        };
        let soaked_ms = settled_ms + self.pace.soak_ms;
        if now_ms < soaked_ms {
            return Step::Wait(soaked_ms);
        }
        if current + 1 < self.waves.len() { Step::Open(current + 1) } else { Step::Finish }
    }

    /// Takes a step that [`Rollout::step`] has named. False if nothing changed.
    pub fn take(&mut self, step: &Step, now_ms: u64, connected: &dyn Fn(&str) -> bool) -> bool {
        match step {
            Step::Wait(_) | Step::Rest => return false,
            Step::Open(n) => {
                let wave = &mut self.waves[*n];
                wave.opened_ms = Some(now_ms);
                wave.absent = wave.instances.iter().filter(|name| !connected(name)).cloned().collect();
            }
            Step::Settle(n) => self.waves[*n].settled_ms = Some(now_ms),
            Step::Finish => self.phase = Phase::Done,
            Step::Stop { .. } => {
                self.phase = if self.pace.return_on_failure { Phase::Returned } else { Phase::Stopped };
            }
        }
        true
    }

    /// Goes on after a stop: waves that were opened count as opened now, so that who failed is tried again.
    pub fn resume(&mut self, now_ms: u64) -> bool {
        if self.phase != Phase::Stopped {
            return false;
        }
        self.phase = Phase::Running;
        for wave in self.waves.iter_mut().filter(|wave| wave.opened_ms.is_some()) {
            (wave.opened_ms, wave.settled_ms) = (Some(now_ms), None);
        }
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn rollout(soak_ms: u64, failures_max: u32) -> Rollout {
        let pace = Pace { soak_ms, confirm_within_s: 10, failures_max, return_on_failure: false };
        let candidate = |n: usize| Candidate {
            name: format!("i{n}"),
            labels: BTreeMap::from([("tier".to_owned(), if n < 2 { "web" } else { "db" }.to_owned())]),
            connected: n != 0,
        };
        Rollout::new(pace, waves((0..5).map(candidate).collect(), &[Take::Count(1), Take::Percent(40)]))
    }

    fn go(rollout: &mut Rollout, now_ms: u64, fact: &dyn Fn(&str) -> Fact) -> Step {
        let step = rollout.step(now_ms, fact);
        rollout.take(&step, now_ms, &|name| fact(name).connected);
        step
    }

    #[test]
    fn canaries_are_connected_and_the_rest_follows() {
        let names: Vec<Vec<String>> = rollout(0, 0).waves.into_iter().map(|w| w.instances).collect();
        assert_eq!(names, [vec!["i1"], vec!["i2", "i3"], vec!["i4", "i0"]]);
        let by_label = waves(
            vec![
                Candidate { name: "b".into(), labels: BTreeMap::new(), connected: true },
                Candidate {
                    name: "a".into(),
                    labels: BTreeMap::from([("env".to_owned(), "test".to_owned())]),
                    connected: false,
                },
            ],
            &[Take::Labels(BTreeMap::from([("env".to_owned(), "test".to_owned())]))],
        );
        assert_eq!(by_label, [["a"], ["b"]]);
    }

    #[test]
    fn a_wave_opens_when_the_one_before_has_settled_and_soaked() {
        let mut r = rollout(5_000, 0);
        let nobody = |_: &str| Fact { connected: true, heard_ms: 1, ..Fact::default() };
        let all = |_: &str| Fact { applied: true, connected: true, heard_ms: 1, ..Fact::default() };
        assert_eq!(go(&mut r, 0, &nobody), Step::Open(0));
        assert!(r.reached().contains("i1") && !r.reached().contains("i2"));
        assert_eq!(go(&mut r, 1, &nobody), Step::Wait(1_001));
        assert_eq!(go(&mut r, 2, &all), Step::Settle(0));
        assert_eq!(go(&mut r, 3, &all), Step::Wait(5_002));
        assert_eq!(go(&mut r, 5_002, &all), Step::Open(1));
        for now in [5_003, 10_003, 10_004] {
            go(&mut r, now, &all);
        }
        assert_eq!(go(&mut r, 15_004, &all), Step::Finish);
        assert_eq!(r.phase, Phase::Done);
    }

    #[test]
    fn a_failure_stops_it_and_nobody_else_is_told() {
        let mut r = rollout(0, 0);
        let failed = |_: &str| Fact { failed: true, connected: true, ..Fact::default() };
        go(&mut r, 0, &failed);
        assert_eq!(go(&mut r, 1, &failed), Step::Stop { failed: vec!["i1".into()], lost: vec![] });
        assert_eq!(go(&mut r, 2, &failed), Step::Rest);
        assert!(!r.reached().contains("i2"));
        assert!(r.resume(3) && r.phase == Phase::Running);
    }

    #[test]
    fn who_loses_contact_stops_it_and_who_was_away_before_does_not() {
        let mut r = rollout(0, 0);
        let there = |_: &str| Fact { applied: true, connected: true, heard_ms: 0, ..Fact::default() };
        go(&mut r, 0, &there);
        let gone = |_: &str| Fact { heard_ms: 100, ..Fact::default() };
        assert_eq!(go(&mut r, 25_000, &gone), Step::Wait(26_000));
        assert_eq!(go(&mut r, 25_101, &gone), Step::Stop { failed: vec![], lost: vec!["i1".into()] });
        // i0 is absent when its wave opens, and the rollout ends without it.
        let mut r = rollout(0, 0);
        let fact = |name: &str| Fact { applied: name != "i0", connected: name != "i0", ..Fact::default() };
        let last = (0..20).map(|now| go(&mut r, now * 60_000, &fact)).last();
        assert_eq!((last, r.phase), (Some(Step::Rest), Phase::Done));
    }
}
