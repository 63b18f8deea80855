//! A machine that enforces in memory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use keepwall_fleet::bundle::Bundle;
use keepwall_fleet::sync::State;
use keepwall_uplink::machine::{Applied, InForce, Machine};
use keepwall_wire::{Report, Status};

/// Microseconds since 1970.
#[must_use]
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

/// What many machines of one process did.
#[derive(Debug, Default)]
pub struct Log {
    /// When each offer was begun: generation and time, microseconds since 1970.
    pub begun: Mutex<Vec<(u64, u64)>>,
    /// Offers that were confirmed.
    pub confirmed: AtomicU64,
    /// True: a new connection must be proved before anything is confirmed, as on a real machine.
    pub prove: AtomicBool,
    /// Rules broken: an older generation, another machine's intent. There must be none.
    pub wrong: Mutex<Vec<String>>,
}

impl Log {
    /// Forgets when offers were begun.
    pub fn clear(&self) {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.confirmed.store(0, Ordering::SeqCst);
    }
}

/// What it would have on disk.
#[derive(Debug)]
struct Disk {
    held: State,
    tried: State,
    bundle: Bundle,
    pending: Option<(State, Bundle)>,
}

/// A machine that enforces in memory.
#[derive(Clone, Debug)]
pub struct StandIn {
    instance: Arc<str>,
    disk: Arc<Mutex<Disk>>,
    log: Arc<Log>,
    /// True: it fails at whatever it is told.
    pub broken: Arc<AtomicBool>,
}

impl StandIn {
    /// A new one that holds nothing.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn new(instance: &str, log: Arc<Log>) -> StandIn {
        let bundle = Bundle::from_parts(Vec::new(), BTreeMap::new()).expect("nothing is within every limit");
        let disk = Disk { held: State::default(), tried: State::default(), bundle, pending: None };
        StandIn { instance: instance.into(), disk: Arc::new(Mutex::new(disk)), log, broken: Arc::default() }
    }

    fn disk(&self) -> std::sync::MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is confirmed.
    #[must_use]
    pub fn held(&self) -> State {
        self.disk().held
    }

    /// What it would enforce.
    #[must_use]
    pub fn bundle(&self) -> Bundle {
        self.disk().bundle.clone()
    }
}

impl Machine for StandIn {
    async fn in_force(&self) -> Result<InForce, String> {
        let disk = self.disk();
        Ok(InForce { held: disk.held, tried: disk.tried, bundle: disk.bundle.clone() })
    }

    async fn apply(&self, state: State, bundle: &Bundle, _within: u32, _note: &str) -> Result<Applied, String> {
        self.log.begun.lock().unwrap_or_else(PoisonError::into_inner).push((state.generation, now_us()));
        let mut disk = self.disk();
        let mut wrong = Vec::new();
        // Rules that stay are the same ones: they were looked at when they came.
        let known = std::ptr::eq(bundle.rules(), disk.bundle.rules());
        let name = format!("\"instance\":\"{}\"", self.instance);
        if !known && !String::from_utf8_lossy(bundle.rules()).contains(&name) {
            wrong.push(format!("{} was told what is for another", self.instance));
        }
        if state.generation < disk.tried.generation {
            wrong.push(format!("{}: {} after {}", self.instance, state.generation, disk.tried.generation));
        }
        // What a real machine does on its own processor is left out where thousands share one.
        if self.log.prove.load(Ordering::SeqCst)
            && let Err(error) = bundle.intent()
        {
            wrong.push(format!("{}: {error}", self.instance));
        }
        self.log.wrong.lock().unwrap_or_else(PoisonError::into_inner).extend(wrong);
        disk.tried = state;
        if self.broken.load(Ordering::SeqCst) {
            return Err("this machine is broken on purpose".into());
        }
        disk.pending = Some((state, bundle.clone()));
        if self.log.prove.load(Ordering::SeqCst) {
            return Ok(Applied::ToBeProved);
        }
        keep(&mut disk, state);
        self.log.confirmed.fetch_add(1, Ordering::SeqCst);
        Ok(Applied::Confirmed)
    }

    async fn confirm(&self, state: State) -> Result<(), String> {
        keep(&mut self.disk(), state);
        self.log.confirmed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn revert(&self, _state: State) -> Result<(), String> {
        self.disk().pending = None;
        Ok(())
    }

    async fn status(&self) -> Option<Status> {
        Some(Status { mode: "enforcing".into(), ..Status::default() })
    }

    async fn rows(&self, _max: usize) -> Report {
        Report::default()
    }

    async fn kept(&self, _through: u64) {}
}

fn keep(disk: &mut Disk, state: State) {
    if let Some((_, bundle)) = disk.pending.take_if(|(pending, _)| *pending == state) {
        disk.held = state;
        disk.bundle = bundle;
    }
}
