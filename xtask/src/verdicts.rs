//! `cargo xtask verdicts`: the reference, the lowered tables and the kernel give one answer, a million times; and
//! broken tables are noticed.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use keepwall_packets::campaign::{self, Mutants, Progress, Size, Tally};
use keepwall_packets::draw::Path;
use keepwall_packets::kernel::{self, Failure, in_kernel};

use crate::say;

const HELP: &str = "\
cargo xtask verdicts [--pairs N] [--kernel N] [--mutants N] [--seed N]

  --pairs    (policy, packet) pairs compared (1000000)
  --kernel   of these, through a kernel as real packets (250000); 0 without root
  --mutants  broken tables that must be noticed (1000)
  --seed     other policies (1)";

/// The share of mutants that must be noticed.
const SHARE_MIN: f64 = 0.99;

/// Runs both campaigns.
///
/// # Errors
/// A mismatch, or too few mutants noticed.
pub fn run(args: &[String]) -> Result<(), String> {
    let (mut size, mut mutants) = (Size { pairs: 1_000_000, kernel: 250_000, seed: 1 }, 1000);
    for pair in args.chunks(2) {
        let [name, value] = pair else { return Err(HELP.to_owned()) };
        let number: u64 = value.parse().map_err(|_| HELP.to_owned())?;
        let count = usize::try_from(number).map_err(|_| HELP.to_owned())?;
        match name.as_str() {
            "--pairs" => size.pairs = count,
            "--kernel" => size.kernel = count,
            "--mutants" => mutants = count,
            "--seed" => size.seed = number,
            _ => return Err(HELP.to_owned()),
        }
    }
    if cfg!(debug_assertions) {
        say("this is a debug build: it works, slowly; for numbers, `cargo run --release -p xtask -- ...`");
    }
    let same = verdicts(size)?;
    let noticed = break_tables(size.seed, mutants);
    match (same, noticed) {
        (true, true) => Ok(()),
        (false, _) => Err("the answers differ: see above".to_owned()),
        (_, false) => Err("too few broken tables were noticed".to_owned()),
    }
}

fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `work` on every core, and shows how far it is meanwhile.
fn on_all_cores<T: Send>(progress: &Progress, all: usize, what: &str, work: impl Fn() -> T + Sync) -> Vec<T> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers()).map(|_| scope.spawn(&work)).collect();
        let done = &done;
        let line = scope.spawn(move || {
            let started = Instant::now();
            let every = if std::io::stderr().is_terminal() { 1 } else { 20 };
            let mut shown = 0;
            while !done.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_millis(200));
                let seconds = started.elapsed().as_secs();
                if seconds >= shown + every {
                    shown = seconds;
                    say(format!("  {seconds:>4} s  {:>9} of {all} {what}", progress.so_far().0));
                }
            }
        });
        let out = threads.into_iter().map(|thread| match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        let out = out.collect();
        done.store(true, Ordering::Relaxed);
        line.thread().unpark();
        out
    })
}

fn verdicts(size: Size) -> Result<bool, String> {
    let progress = Progress::default();
    let started = Instant::now();
    let worker = || -> Result<Tally, Failure> {
        match size.kernel {
            0 => campaign::compare(size, &progress, None),
            _ => in_kernel(|harness| campaign::compare(size, &progress, Some(harness))),
        }
    };
    let mut tally = Tally::default();
    for part in on_all_cores(&progress, size.pairs, "pairs", worker) {
        tally.add(part.map_err(|failure| match kernel::no_root(&failure) {
            true => "real packets need root; `--kernel 0` compares the model only".to_owned(),
            false => failure.to_string(),
        })?);
    }
    let seconds = started.elapsed().as_secs_f64();
    say(format!("\n{:<14}{:>10}{:>12}{:>10}{:>11}", "path", "pairs", "of: kernel", "of: IPv6", "allowed"));
    let total = tally.total();
    let names = Path::ALL.map(|path| format!("{path:?}"));
    for (name, way) in names.iter().map(String::as_str).zip(tally.ways).chain([("all", total)]) {
        say(format!(
            "{name:<14}{:>10}{:>12}{:>9.0}%{:>10.0}%",
            way.pairs,
            way.kernel,
            percent(way.ipv6, way.pairs),
            percent(way.allowed, way.pairs)
        ));
    }
    say(format!(
        "{} policies (up to {} rules on an interface, {} elements in a table; {} by class), {} of them in the kernel",
        tally.policies, tally.rules_max, tally.elements_max, tally.by_class, tally.loaded
    ));
    #[expect(clippy::cast_precision_loss, reason = "millions")]
    let rate = (2 * total.pairs + total.kernel) as f64 / seconds;
    say(format!("{seconds:.0} s, {rate:.0} verdicts/s; mismatches: {}", tally.mismatches.len()));
    for mismatch in &tally.mismatches {
        say(format!("  {mismatch}"));
    }
    Ok(tally.mismatches.is_empty())
}

fn break_tables(seed: u64, wanted: usize) -> bool {
    if wanted == 0 {
        return true;
    }
    let progress = Progress::default();
    let started = Instant::now();
    let mut all = Mutants::default();
    for part in on_all_cores(&progress, wanted, "mutants", || campaign::mutants(seed, wanted, &progress)) {
        all.add(part);
    }
    say(format!(
        "\nmutants: {} made, {} proved equivalent, {} noticed of the other {} = {:.2} % (at least {:.0} % wanted), {:.0} s",
        all.made,
        all.equivalent,
        all.noticed,
        all.made - all.equivalent,
        all.share() * 100.0,
        SHARE_MIN * 100.0,
        started.elapsed().as_secs_f64()
    ));
    for missed in all.missed.iter().take(20) {
        say(format!("  missed: {missed}"));
    }
    all.share() >= SHARE_MIN
}

#[expect(clippy::cast_precision_loss, reason = "millions")]
fn percent(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}
