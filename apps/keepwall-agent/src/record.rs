//! What the agent keeps on disk: the confirmed state, and one that waits for its confirmation.

use std::io;
use std::path::Path;

use keepwall_core::Generation;
use keepwall_host::state::{self, StateDir};
use keepwall_link::Mark;
use keepwall_secgroup::intent::Intent;
use keepwall_sensors::sessions::Session;
use serde::{Deserialize, Serialize};

use crate::fleet::Binding;

const CONFIRMED: &str = "confirmed.json";
const PENDING: &str = "pending.json";
const GENERATION: &str = "generation";
const FLEET: &str = "fleet.json";
const PLACE: &str = "place";

/// A state that was applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// Counts changes.
    pub(crate) generation: Generation,
    /// What is enforced.
    pub(crate) intent: Intent,
    /// Who asked for it and why.
    pub(crate) note: String,
    /// The control plane's decision that it is, if it is one of the control plane that the machine is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fleet: Option<Mark>,
}

/// A state that nobody has confirmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pending {
    pub(crate) record: Record,
    /// When it reverts: milliseconds of the boot clock.
    pub(crate) deadline_ms: u64,
    /// Of which boot: a clock of another one says nothing.
    pub(crate) boot: String,
    /// SSH sessions that were open before: they prove nothing about new ones.
    pub(crate) sessions: Vec<Session>,
}

/// Identifies this boot.
pub(crate) fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Where rules are put in force: this boot's kernel, this network namespace. In another one nothing of ours can be left.
pub(crate) fn place() -> String {
    let namespace = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    format!("{} {}", boot(), namespace.display())
}

impl Pending {
    /// Milliseconds until it reverts; 0 if it is time.
    pub(crate) fn left_ms(&self, now_ms: u64, boot: &str) -> u64 {
        if self.boot == boot { self.deadline_ms.saturating_sub(now_ms) } else { 0 }
    }
}

fn parse<T: serde::de::DeserializeOwned>(name: &str, bytes: Option<Vec<u8>>) -> io::Result<Option<T>> {
    bytes
        .map(|bytes| {
            serde_json::from_slice(&bytes).map_err(|error| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{name} is not from this version: {error}"))
            })
        })
        .transpose()
}

pub(crate) fn confirmed(path: &Path) -> io::Result<Option<Record>> {
    let record: Option<Record> = parse(CONFIRMED, state::read(path, CONFIRMED)?)?;
    if let Some(record) = &record {
        record.intent.validate().map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))?;
    }
    Ok(record)
}

pub(crate) fn pending(path: &Path) -> io::Result<Option<Pending>> {
    parse(PENDING, state::read(path, PENDING)?)
}

pub(crate) fn write_confirmed(state: &StateDir, record: &Record) -> io::Result<()> {
    state.write(CONFIRMED, &serde_json::to_vec(record)?)
}

pub(crate) fn write_pending(state: &StateDir, pending: &Pending) -> io::Result<()> {
    state.write(PENDING, &serde_json::to_vec(pending)?)
}

pub(crate) fn clear_pending(state: &StateDir) -> io::Result<()> {
    state.remove(PENDING)
}

pub(crate) fn clear_confirmed(state: &StateDir) -> io::Result<()> {
    state.remove(CONFIRMED)
}

/// The highest generation ever given out: a reverted one is not used again, so that a late confirmation or a late
/// watchdog never means another.
pub(crate) fn highest(path: &Path) -> Generation {
    let bytes = state::read(path, GENERATION).unwrap_or_default().unwrap_or_default();
    Generation(String::from_utf8_lossy(&bytes).trim().parse().unwrap_or(0))
}

pub(crate) fn write_highest(state: &StateDir, generation: Generation) -> io::Result<()> {
    state.write(GENERATION, generation.0.to_string().as_bytes())
}

/// Where the agent before ran.
pub(crate) fn last_place(path: &Path) -> String {
    let bytes = state::read(path, PLACE).unwrap_or_default().unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(crate) fn write_place(state: &StateDir, place: &str) -> io::Result<()> {
    state.write(PLACE, place.as_bytes())
}

pub(crate) fn binding(path: &Path) -> io::Result<Option<Binding>> {
    parse(FLEET, state::read(path, FLEET)?)
}

pub(crate) fn write_binding(state: &StateDir, binding: &Binding) -> io::Result<()> {
    state.write(FLEET, &serde_json::to_vec(binding)?)
}

pub(crate) fn clear_binding(state: &StateDir) -> io::Result<()> {
    state.remove(FLEET)
}
