//! Comparisons by the million: policy after policy, packet after packet, three answers each.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use keepwall_core::Family;
use keepwall_secgroup::spec::Direction;

use crate::draw::{self, Case, Dice, Path, Trip};
use crate::kernel::{Failure, Harness};
use crate::model::{self, expected, interpreted};
use crate::mutate::{self, Proof};
use crate::probe;

/// Packets drawn for each policy and path; the few that come twice count once.
const DRAWS_PER_PATH: usize = 76;
/// After so many mismatches the rest says nothing new.
const MISMATCHES_MAX: usize = 20;
/// Mutants made of one policy.
const MUTANTS_PER_POLICY: usize = 10;
/// Random packets for each policy and path beside the probes of its table's elements.
const RANDOM_PROBES: usize = 60;

/// How much to do.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// (policy, packet) pairs at least.
    pub pairs: usize,
    /// Of these, through the kernel, at least.
    pub kernel: usize,
    /// The first policy's number; another seed, other policies.
    pub seed: u64,
}

/// One way through the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Pairs compared.
    pub pairs: usize,
    /// Of these, through the kernel.
    pub kernel: usize,
    /// Of the pairs, IPv6.
    pub ipv6: usize,
    /// Of the pairs, allowed by the reference.
    pub allowed: usize,
}

/// What a campaign saw.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// By path, in the order of [`Path::ALL`].
    pub ways: [Way; 6],
    /// Policies drawn.
    pub policies: usize,
    /// Of these, loaded into the kernel.
    pub loaded: usize,
    /// Of the policies, those that look peers up by class.
    pub by_class: usize,
    /// Most rules on one interface.
    pub rules_max: usize,
    /// Most elements in one table.
    pub elements_max: usize,
    /// Where the answers differ.
    pub mismatches: Vec<String>,
}

impl Tally {
    /// All ways together.
    #[must_use]
    pub fn total(&self) -> Way {
        self.ways.iter().fold(Way::default(), |sum, way| Way {
            pairs: sum.pairs + way.pairs,
            kernel: sum.kernel + way.kernel,
            ipv6: sum.ipv6 + way.ipv6,
            allowed: sum.allowed + way.allowed,
        })
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: Tally) {
        for (way, more) in self.ways.iter_mut().zip(other.ways) {
            way.pairs += more.pairs;
            way.kernel += more.kernel;
            way.ipv6 += more.ipv6;
            way.allowed += more.allowed;
        }
        self.policies += other.policies;
        self.loaded += other.loaded;
        self.by_class += other.by_class;
        self.rules_max = self.rules_max.max(other.rules_max);
        self.elements_max = self.elements_max.max(other.elements_max);
        self.mismatches.extend(other.mismatches);
    }
}

/// Counts policies for several workers: each takes the next number.
#[derive(Debug, Default)]
pub struct Progress {
    next: AtomicUsize,
    pairs: AtomicUsize,
    through_kernel: AtomicUsize,
}

impl Progress {
    /// Pairs compared so far, and how many of them in the kernel.
    #[must_use]
    pub fn so_far(&self) -> (usize, usize) {
        (self.pairs.load(Ordering::Relaxed), self.through_kernel.load(Ordering::Relaxed))
    }
}

/// One worker's share: policies until there are enough pairs. Without a harness the kernel is not asked.
///
/// # Errors
/// The kernel or the harness failed; a mismatch is no error but in the tally.
pub fn compare(size: Size, progress: &Progress, mut harness: Option<&mut Harness>) -> Result<Tally, Failure> {
    let mut tally = Tally::default();
    loop {
        let (pairs, through_kernel) = progress.so_far();
        let enough = pairs >= size.pairs && (harness.is_none() || through_kernel >= size.kernel);
        if enough || tally.mismatches.len() >= MISMATCHES_MAX {
            return Ok(tally);
        }
        let n = progress.next.fetch_add(1, Ordering::Relaxed);
        let seed = size.seed.wrapping_add(n as u64);
        let mut dice = Dice::new(seed);
        let case = draw::numbered(&mut dice, n);
        // Spread evenly over all policies, so that all shapes and sizes meet the kernel.
        let due = through_kernel * size.pairs <= pairs * size.kernel || n % 53 == 7;
        let harness = if due { harness.as_deref_mut() } else { None };
        let trips = trips(&mut dice, &case);
        let one = policy(seed, n, &case, &trips, harness)?;
        let total = one.total();
        progress.pairs.fetch_add(total.pairs, Ordering::Relaxed);
        progress.through_kernel.fetch_add(total.kernel, Ordering::Relaxed);
        tally.add(one);
    }
}

fn trips(dice: &mut Dice, case: &Case) -> Vec<Trip> {
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for path in Path::ALL {
        for _ in 0..DRAWS_PER_PATH {
            let trip = draw::trip(dice, case, path);
            if seen.insert(trip) {
                out.push(trip);
            }
        }
    }
    out
}

fn policy(seed: u64, n: usize, case: &Case, trips: &[Trip], harness: Option<&mut Harness>) -> Result<Tally, Failure> {
    let table = model::lowered(case, &format!("v{n}")).table;
    let arrived = match harness {
        Some(harness) => {
            harness.load(&table)?;
            Some(harness.arrived(trips)?)
        }
        None => None,
    };
    let mut tally = Tally {
        policies: 1,
        loaded: usize::from(arrived.is_some()),
        by_class: usize::from(table.maps.iter().any(|map| map.name.contains("_cells"))),
        rules_max: rules_max(case),
        elements_max: table.maps.iter().map(|map| map.elements.len()).sum(),
        ..Tally::default()
    };
    for (at, trip) in trips.iter().enumerate() {
        let wanted = expected(case, trip);
        let modelled = interpreted(&table, trip);
        let real = arrived.as_ref().map(|arrived| arrived[at]);
        let way = &mut tally.ways[Path::ALL.iter().position(|path| *path == trip.path).unwrap_or(0)];
        way.pairs += 1;
        way.kernel += usize::from(real.is_some());
        way.ipv6 += usize::from(Family::of(trip.source) == Family::Ipv6);
        way.allowed += usize::from(wanted);
        if (modelled != wanted || real.is_some_and(|real| real != wanted)) && tally.mismatches.len() < MISMATCHES_MAX {
            tally.mismatches.push(describe(seed, n, case, trip, wanted, modelled, real));
        }
    }
    Ok(tally)
}

fn rules_max(case: &Case) -> usize {
    let rules = |instance: usize| {
        let groups = case.checked.groups_of(instance, 0);
        groups
            .flat_map(|g| Direction::BOTH.map(|d| keepwall_secgroup::intent::rules_of(&case.checked, g, d).len()))
            .sum()
    };
    (0..3).map(rules).max().unwrap_or(0)
}

fn describe(seed: u64, n: usize, case: &Case, trip: &Trip, wanted: bool, modelled: bool, real: Option<bool>) -> String {
    let word = |passes: bool| if passes { "allow" } else { "deny" };
    let reasons: Vec<String> = (model::judges(trip).into_iter())
        .map(|(instance, direction)| {
            let verdict = keepwall_secgroup::evaluate::evaluate(&case.checked, instance, 0, &trip.seen(direction));
            format!("{direction} of instance {instance}: {}", verdict.reason())
        })
        .collect();
    format!(
        "policy {n} (seed {seed}): reference {}, tables {}, kernel {}: {trip:?}; the reference says: {}",
        word(wanted),
        word(modelled),
        real.map_or("not asked", word),
        reasons.join("; ")
    )
}

/// What became of mutants.
#[derive(Clone, Debug, Default)]
pub struct Mutants {
    /// Tables broken.
    pub made: usize,
    /// Some packet noticed.
    pub noticed: usize,
    /// Proved to mean the same as the table that they were made of.
    pub equivalent: usize,
    /// Neither: the comparison would miss such a mistake.
    pub missed: Vec<String>,
    /// Packets tried, over all policies.
    pub probes: usize,
}

impl Mutants {
    /// Adds another's counts.
    pub fn add(&mut self, other: Mutants) {
        self.made += other.made;
        self.noticed += other.noticed;
        self.equivalent += other.equivalent;
        self.missed.extend(other.missed);
        self.probes += other.probes;
    }

    /// The share of those that could be noticed that were, 0 to 1.
    #[must_use]
    pub fn share(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "thousands")]
        let share = |a: usize, b: usize| if b == 0 { 0.0 } else { a as f64 / b as f64 };
        share(self.noticed, self.made - self.equivalent)
    }
}

/// One worker's share of `wanted` mutants.
pub fn mutants(seed: u64, wanted: usize, progress: &Progress) -> Mutants {
    let mut out = Mutants::default();
    loop {
        if progress.so_far().0 >= wanted {
            return out;
        }
        let n = progress.next.fetch_add(1, Ordering::Relaxed);
        let mut dice = Dice::new(seed.wrapping_add(n as u64));
        // Every mutant of a table is tried with thousands of packets, so the tables are of middling size.
        let case = match n % 53 {
            7 => draw::classes(&mut dice),
            _ => {
                let rules = if n % 20 == 3 { 16 } else { 1 + dice.below(8) };
                draw::case(&mut dice, rules)
            }
        };
        let one = mutants_of(&mut dice, n, &case);
        progress.pairs.fetch_add(one.made, Ordering::Relaxed);
        out.add(one);
    }
}

fn mutants_of(dice: &mut Dice, n: usize, case: &Case) -> Mutants {
    let table = model::lowered(case, "t").table;
    let space = probe::Space::of(case, &table);
    // What is drawn knows the policy and its unbroken table, not what will be broken.
    let mut probes = space.probes(dice);
    for path in Path::ALL {
        probes.extend((0..RANDOM_PROBES).map(|_| draw::trip(dice, case, path)));
    }
    let probes: Vec<(Trip, bool)> = probes.into_iter().map(|trip| (trip, expected(case, &trip))).collect();
    let mut out = Mutants { probes: probes.len(), ..Mutants::default() };
    // A packet that the unbroken table gets wrong would make every mutant look noticed.
    if let Some((trip, wanted)) = probes.iter().find(|(trip, wanted)| interpreted(&table, trip) != *wanted) {
        out.made = 1;
        out.missed.push(format!("policy {n}: the unbroken table is wrong: wanted {wanted} for {trip:?}"));
        return out;
    }
    let mut done = HashSet::new();
    for _ in 0..MUTANTS_PER_POLICY * 2 {
        let Some(mutant) = mutate::mutant(dice, &table) else { continue };
        if out.made >= MUTANTS_PER_POLICY || !done.insert(mutant.what.clone()) {
            continue;
        }
        out.made += 1;
        if probes.iter().any(|(trip, wanted)| interpreted(&mutant.table, trip) != *wanted) {
            out.noticed += 1;
            continue;
        }
        match mutate::prove_equivalent(&space, &table, &mutant) {
            Proof::Equivalent => out.equivalent += 1,
            Proof::Differs(trip) => out.missed.push(format!("policy {n}: {}; {trip:?} would show it", mutant.what)),
            Proof::TooLarge => out.missed.push(format!("policy {n}: {}; too large to prove", mutant.what)),
        }
    }
    out
}
