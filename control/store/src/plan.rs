//! What a batch of commits does to the tables, decided without them.
//!
//! A store reads what it has under the names that the commits speak of ([`Known`]), asks [`plan`], writes what comes
//! out in one transaction, and then gives the answers. So both stores mean the same, and a commit that is refused
//! costs the others in its batch nothing.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use crate::{
    CHANGES_KEPT, Change, Commit, Committed, EPOCH_SHIFT, Expect, Generation, Op, PAGE_MAX, StoreError, audit,
};

/// Changes are forgotten when this many more have come, not with each commit.
const FORGET_EVERY: u64 = 1_000;
/// The largest epoch: 16 bits.
const EPOCH_MAX: u64 = 0xffff;
/// 2026-01-01 in milliseconds since 1970; see [`next_epoch`].
const EPOCHS_FROM_MS: u64 = 1_767_225_600_000;
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

/// Kind and name.
pub(crate) type Key<'a> = (&'a str, &'a str);

/// What a store remembers beside its tables; one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// The newest commit.
    pub(crate) generation: Generation,
    /// Counts changes of resources.
    pub(crate) changes: u64,
    /// The audit log's newest line, sealed.
    pub(crate) audit_number: u64,
    pub(crate) audit_mac: String,
    pub(crate) audit_seal: String,
}

impl State {
    /// Of an empty store.
    pub(crate) fn new(key: &[u8; 32]) -> State {
        let audit_seal = audit::seal(key, 0, "");
        State { generation: 0, changes: 0, audit_number: 0, audit_mac: String::new(), audit_seal }
    }

    /// The head of the audit log, if it is one that this key sealed.
    pub(crate) fn head(&self, key: &[u8; 32]) -> Result<Option<(u64, String)>, StoreError> {
        if audit::seal(key, self.audit_number, &self.audit_mac) != self.audit_seal {
            return Err(StoreError::Damaged(
                "the head of the audit log is not what was written, or was written with another key: give the key \
                 that belongs to this store"
                    .to_owned(),
            ));
        }
        Ok((self.audit_number > 0).then(|| (self.audit_number, self.audit_mac.clone())))
    }
}

/// The present version of a resource, without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) revision: Generation,
    pub(crate) created_ms: u64,
}

/// An answer that is remembered and has not expired.
pub(crate) struct Answer<'a> {
    pub(crate) digest: [u8; 32],
    pub(crate) answer: Cow<'a, str>,
}

/// What the tables hold under the names that a batch speaks of.
#[derive(Default)]
pub(crate) struct Known<'a> {
    pub(crate) resources: HashMap<Key<'a>, Stamp>,
    /// By scope and key.
    pub(crate) remembered: HashMap<Key<'a>, Answer<'a>>,
}

/// One version of a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version<'a> {
    pub(crate) kind: &'a str,
    pub(crate) name: &'a str,
    pub(crate) revision: Generation,
    pub(crate) created_ms: u64,
    pub(crate) updated_ms: u64,
    pub(crate) body: &'a str,
}

/// What to write, in the order of the fields.
#[derive(Default)]
pub(crate) struct Writes<'a> {
    /// Drop all history of these.
    pub(crate) forget: Vec<Key<'a>>,
    /// Copy the present version of these into the history.
    pub(crate) archive: Vec<Key<'a>>,
    /// Versions that came and went within the batch.
    pub(crate) history: Vec<Version<'a>>,
    /// Keep this many newest versions in the history of these.
    pub(crate) keep: Vec<(Key<'a>, u32)>,
    pub(crate) remove: Vec<Key<'a>>,
    pub(crate) put: Vec<Version<'a>>,
    pub(crate) changes: Vec<NumberedChange<'a>>,
    /// Forget changes up to this number.
    pub(crate) changes_gone: Option<u64>,
    /// Number, MAC, entry. All have the batch's time.
    pub(crate) audit: Vec<(u64, String, &'a str)>,
    /// By scope and key.
    pub(crate) remember: Vec<&'a crate::Remember>,
}

/// A change with the number that it has among all changes.
pub(crate) struct NumberedChange<'a> {
    pub(crate) number: u64,
    pub(crate) generation: Generation,
    pub(crate) key: Key<'a>,
    pub(crate) deleted: bool,
}

/// What comes of a batch.
pub(crate) struct Plan<'a> {
    /// One for each commit, to be given when `writes` and `state` are durable.
    pub(crate) answers: Vec<Result<Committed, StoreError>>,
    pub(crate) writes: Writes<'a>,
    pub(crate) state: State,
}

/// The kinds and names that commits speak of.
pub(crate) fn keys<'a>(commits: &[&'a Commit]) -> Vec<Key<'a>> {
    let mut keys: Vec<Key> = commits.iter().flat_map(|commit| &commit.ops).map(key_of).collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

fn key_of(op: &Op) -> Key<'_> {
    match op {
        Op::Put { kind, name, .. } | Op::Delete { kind, name, .. } => (kind, name),
    }
}

/// A resource while the batch goes over it.
#[derive(Default)]
struct Slot<'a> {
    stored: Option<Stamp>,
    present: Present<'a>,
    /// The stored version goes into the history.
    archive: bool,
    /// The stored history goes.
    forget: bool,
    /// Versions of this batch that were replaced in it.
    replaced: Vec<Version<'a>>,
    /// What the last write that replaced something wants to keep.
    keep: Option<u32>,
}

#[derive(Default)]
enum Present<'a> {
    #[default]
    Nothing,
    Stored(Stamp),
    New(Version<'a>),
}

impl<'a> Slot<'a> {
    fn of(stored: Option<Stamp>) -> Slot<'a> {
        Slot { stored, present: stored.map_or(Present::Nothing, Present::Stored), ..Slot::default() }
    }

    fn stamp(&self) -> Option<Stamp> {
        match &self.present {
            Present::Nothing => None,
            Present::Stored(stamp) => Some(*stamp),
            Present::New(version) => Some(Stamp { revision: version.revision, created_ms: version.created_ms }),
        }
    }

    fn forget_all(&mut self) {
        self.archive = false;
        self.forget = true;
        self.replaced.clear();
        self.keep = None;
    }

    fn put(&mut self, version: Version<'a>, keep: u32) {
        let revision = version.revision;
        let before = std::mem::replace(&mut self.present, Present::New(version));
        if keep == 0 {
            return self.forget_all();
        }
        match before {
            Present::Nothing => {}
            Present::Stored(_) => self.archive = true,
            // What one commit writes twice was never to be seen in between.
            Present::New(before) if before.revision == revision => {}
            Present::New(before) => self.replaced.push(before),
        }
        let beyond = self.replaced.len().saturating_sub(keep as usize);
        self.replaced.drain(..beyond);
        self.keep = Some(keep);
    }

    fn delete(&mut self) {
        self.forget_all();
        self.present = Present::Nothing;
    }
}

/// Decides a batch. `now_ms` is the store's clock.
pub(crate) fn plan<'a>(
    key: &[u8; 32],
    mut state: State,
    mut known: Known<'a>,
    commits: &[&'a Commit],
    now_ms: u64,
) -> Plan<'a> {
    let mut slots: BTreeMap<Key, Slot> = BTreeMap::new();
    let mut writes = Writes::default();
    let mut answers = Vec::with_capacity(commits.len());
    let (lines_before, changes_before) = (state.audit_number, state.changes);
    for commit in commits {
        let answer = match remembered(&known, commit) {
            Some(answer) => answer,
            None => expected(&known, &slots, commit, state.generation + 1).map(|()| {
                state.generation += 1;
                apply(&mut slots, &mut writes, &mut state, &known, commit, now_ms);
                for entry in &commit.audit {
                    state.audit_number += 1;
                    state.audit_mac = audit::link(key, &state.audit_mac, state.audit_number, now_ms, entry);
                    writes.audit.push((state.audit_number, state.audit_mac.clone(), entry));
                }
                if let Some(remember) = &commit.remember {
                    let answer = Answer { digest: remember.digest, answer: Cow::Borrowed(&remember.answer) };
                    known.remembered.insert((&remember.scope, &remember.key), answer);
                    writes.remember.push(remember);
                }
                Committed::Now(state.generation)
            }),
        };
        answers.push(answer);
    }
    if state.audit_number != lines_before {
        state.audit_seal = audit::seal(key, state.audit_number, &state.audit_mac);
    }
    if state.changes / FORGET_EVERY != changes_before / FORGET_EVERY {
        writes.changes_gone = state.changes.checked_sub(CHANGES_KEPT);
    }
    for (key, slot) in slots {
        settle(&mut writes, key, slot);
    }
    Plan { answers, writes, state }
}

fn remembered(known: &Known, commit: &Commit) -> Option<Result<Committed, StoreError>> {
    let remember = commit.remember.as_ref()?;
    let before = known.remembered.get(&(remember.scope.as_str(), remember.key.as_str()))?;
    Some(same_request(&remember.key, &remember.digest, before).map(Committed::Before))
}

/// The answer, if the request that it was given to is this one.
pub(crate) fn same_request(key: &str, digest: &[u8; 32], before: &Answer) -> Result<String, StoreError> {
    if before.digest != *digest {
        return Err(StoreError::KeyReused(key.to_owned()));
    }
    Ok(before.answer.clone().into_owned())
}

/// Whether all expectations hold, each after the operations before it.
fn expected(known: &Known, slots: &BTreeMap<Key, Slot>, commit: &Commit, next: Generation) -> Result<(), StoreError> {
    let mut seen: HashMap<Key, Option<Generation>> = HashMap::new();
    for op in &commit.ops {
        let key = key_of(op);
        let actual = seen.get(&key).copied().unwrap_or_else(|| match slots.get(&key) {
            Some(slot) => slot.stamp().map(|stamp| stamp.revision),
            None => known.resources.get(&key).map(|stamp| stamp.revision),
        });
        let (expect, after) = match op {
            Op::Put { expect, .. } => (expect, Some(next)),
            Op::Delete { expect, .. } => (expect, None),
        };
        let holds = match expect {
            Expect::Any => true,
            Expect::Absent => actual.is_none(),
            Expect::Present => actual.is_some(),
            Expect::Revision(revision) => actual == Some(*revision),
        };
        if !holds {
            return Err(StoreError::Conflict { kind: key.0.to_owned(), name: key.1.to_owned(), actual });
        }
        seen.insert(key, after);
    }
    Ok(())
}

/// Carries out a commit whose expectations hold.
fn apply<'a>(
    slots: &mut BTreeMap<Key<'a>, Slot<'a>>,
    writes: &mut Writes<'a>,
    state: &mut State,
    known: &Known<'a>,
    commit: &'a Commit,
    now_ms: u64,
) {
    for op in &commit.ops {
        let key = key_of(op);
        let slot = slots.entry(key).or_insert_with(|| Slot::of(known.resources.get(&key).copied()));
        let before = slot.stamp();
        let deleted = match op {
            Op::Put { kind, name, body, keep, .. } => {
                let created_ms = before.map_or(now_ms, |stamp| stamp.created_ms);
                let revision = state.generation;
                slot.put(Version { kind, name, revision, created_ms, updated_ms: now_ms, body }, *keep);
                false
            }
            Op::Delete { .. } if before.is_none() => continue,
            Op::Delete { .. } => {
                slot.delete();
                true
            }
        };
        state.changes += 1;
        writes.changes.push(NumberedChange { number: state.changes, generation: state.generation, key, deleted });
    }
}

/// Adds what became of one resource to what is written.
fn settle<'a>(writes: &mut Writes<'a>, key: Key<'a>, slot: Slot<'a>) {
    if slot.forget && slot.stored.is_some() {
        writes.forget.push(key);
    }
    if slot.archive {
        writes.archive.push(key);
    }
    if let Some(keep) = slot.keep
        && (slot.stored.is_some() || !slot.replaced.is_empty())
    {
        writes.keep.push((key, keep));
    }
    writes.history.extend(slot.replaced);
    match slot.present {
        Present::New(version) => writes.put.push(version),
        Present::Nothing if slot.stored.is_some() => writes.remove.push(key),
        Present::Nothing | Present::Stored(_) => {}
    }
}

/// The first generation of the epoch that follows a restore, less one: what the store counts on from.
///
/// Also where what was there before is lost and only a backup is left, that generation has to be above all that was
/// ever told to an agent. So the epoch is at least the number of days since 2026-01-01; 16 bits last until 2205.
pub(crate) fn next_epoch(known: Generation, now_ms: u64) -> Result<Generation, StoreError> {
    let days = now_ms.saturating_sub(EPOCHS_FROM_MS) / DAY_MS;
    let epoch = ((known >> EPOCH_SHIFT) + 1).max(days);
    if epoch > EPOCH_MAX {
        return Err(StoreError::Damaged(format!("epoch {epoch}, while {EPOCH_MAX} is the last")));
    }
    Ok(epoch << EPOCH_SHIFT)
}

/// Whether changes behind `after` are all still there.
pub(crate) fn followable(after: Generation, generation: Generation, gone: Generation) -> Result<(), StoreError> {
    let other_epoch = after >> EPOCH_SHIFT != generation >> EPOCH_SHIFT;
    if other_epoch || after > generation || after < gone { Err(StoreError::ChangesGone) } else { Ok(()) }
}

/// Cuts a page of changes, read with one more than [`PAGE_MAX`], behind its last whole commit. If there is no whole
/// one in it, the commit that has to be read instead.
pub(crate) fn split_commit(changes: &mut Vec<Change>) -> Option<Generation> {
    let last = changes.last()?.generation;
    if changes.len() <= PAGE_MAX {
        return None;
    }
    let whole = changes.iter().take_while(|change| change.generation < last).count();
    changes.truncate(whole);
    (whole == 0).then_some(last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [1; 32];

    #[test]
    fn a_refused_commit_leaves_no_trace_in_its_batch() {
        let put = |name: &str, expect| Op::put("thing", name, expect, &1);
        let commits = [
            Commit { ops: vec![put("a", Expect::Absent)], audit: vec!["1".into()], remember: None },
            Commit {
                ops: vec![put("b", Expect::Absent), put("a", Expect::Absent)],
                audit: vec!["2".into()],
                remember: None,
            },
            Commit { ops: vec![put("a", Expect::Revision(1))], audit: vec!["3".into()], remember: None },
        ];
        let commits: Vec<&Commit> = commits.iter().collect();
        let plan = plan(&KEY, State::new(&KEY), Known::default(), &commits, 5);
        assert_eq!(plan.answers[0], Ok(Committed::Now(1)));
        let conflict = StoreError::Conflict { kind: "thing".into(), name: "a".into(), actual: Some(1) };
        assert_eq!(plan.answers[1], Err(conflict));
        assert_eq!(plan.answers[2], Ok(Committed::Now(2)));
        let written: Vec<_> = plan.writes.put.iter().map(|version| (version.name, version.revision)).collect();
        assert_eq!(written, [("a", 2)]);
        let entries: Vec<_> = plan.writes.audit.iter().map(|(number, _, entry)| (*number, *entry)).collect();
        assert_eq!(entries, [(1, "1"), (2, "3")]);
        assert_eq!(plan.state.generation, 2);
        assert!(plan.state.head(&KEY).unwrap().is_some());
        assert!(plan.state.head(&[2; 32]).is_err());
    }

    #[test]
    fn an_epoch_is_above_the_one_before_and_not_below_the_day() {
        assert_eq!(next_epoch(5, 0).unwrap(), 1 << EPOCH_SHIFT);
        assert_eq!(next_epoch((9 << EPOCH_SHIFT) + 5, 0).unwrap(), 10 << EPOCH_SHIFT);
        assert_eq!(next_epoch(5, EPOCHS_FROM_MS + 300 * DAY_MS + 1).unwrap(), 300 << EPOCH_SHIFT);
        assert_eq!(next_epoch((300 << EPOCH_SHIFT) + 1, EPOCHS_FROM_MS + 300 * DAY_MS).unwrap(), 301 << EPOCH_SHIFT);
        assert!(next_epoch(EPOCH_MAX << EPOCH_SHIFT, 0).is_err());
        assert!(i64::try_from((EPOCH_MAX << EPOCH_SHIFT) + (1 << EPOCH_SHIFT) - 1).is_ok());
    }

    #[test]
    fn only_what_is_whole_can_be_followed() {
        let epoch = 3 << EPOCH_SHIFT;
        assert!(followable(epoch + 5, epoch + 9, epoch + 5).is_ok());
        assert!(followable(epoch + 9, epoch + 9, 0).is_ok());
        for after in [0, epoch - 1, epoch + 4, epoch + 10] {
            assert_eq!(followable(after, epoch + 9, epoch + 5), Err(StoreError::ChangesGone));
        }
    }
}
