//! What will change, in order. Pure: two tables in, steps out; no choices are left for when they run.
//!
//! A replacement has phases, so that each packet meets the old rules or the new ones, never a mixture, and a map is
//! never asked before it is filled:
//!
//! 0. what an earlier, interrupted replacement left behind is removed: nothing refers to it;
//! 1. new maps with their elements, new chains with their rules, under names that nobody uses yet; missing base chains,
//!    empty and accepting;
//! 2. in one small transaction, the rules of all base chains that change;
//! 3. old maps and chains, which now nobody uses, are removed.

use std::collections::BTreeSet;

use keepwall_ir::nft::{Chain, CtTimeout, Element, ElementData, Expr, LookupInto, Map, Rule, Table, Verdict};

/// Names of what goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) chains: Vec<String>,
    pub(crate) maps: Vec<String>,
    pub(crate) timeouts: Vec<String>,
}

impl Names {
    pub(crate) fn extend(&mut self, more: &Names) {
        self.chains.extend_from_slice(&more.chains);
        self.maps.extend_from_slice(&more.maps);
        self.timeouts.extend_from_slice(&more.timeouts);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.maps.is_empty() && self.timeouts.is_empty()
    }
}

/// The steps from one table to another.
#[derive(Debug)]
pub(crate) enum Plan<'a> {
    /// None: it is so.
    Nothing,
    /// One map changes some of its elements, and nothing else changes.
    Elements { clean: Names, change: Change<'a> },
    /// See the module's text.
    Replace(Steps<'a>),
}

/// What changes in one map.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    pub(crate) map: &'a Map,
    pub(crate) remove: Vec<&'a Element>,
    pub(crate) add: Vec<&'a Element>,
}

/// The phases of a replacement.
#[derive(Debug, Default)]
pub(crate) struct Steps<'a> {
    /// Phase 0.
    pub(crate) clean: Names,
    /// Phase 1: the table itself is missing.
    pub(crate) create_table: bool,
    /// Phase 1.
    pub(crate) timeouts: Vec<&'a CtTimeout>,
    /// Phase 1: missing base chains.
    pub(crate) bases: Vec<&'a Chain>,
    /// Phase 1.
    pub(crate) chains: Vec<&'a Chain>,
    /// Phase 1.
    pub(crate) maps: Vec<&'a Map>,
    /// Phase 2: base chains whose rules or policy change.
    pub(crate) switch: Vec<Switch<'a>>,
    /// Phase 2: base chains that go, rules and all.
    pub(crate) drop_bases: Vec<String>,
    /// Phase 3.
    pub(crate) retire: Names,
}

/// A base chain in phase 2.
#[derive(Debug)]
pub(crate) struct Switch<'a> {
    pub(crate) chain: &'a Chain,
    /// Its policy changes too.
    pub(crate) policy: bool,
}

/// The elements by which two tables differ that differ in elements only; both must be normalised. The error names what
/// else differs.
pub(crate) fn element_changes<'a>(present: &'a Table, desired: &'a Table) -> Result<Vec<Change<'a>>, Vec<String>> {
    if present.maps.len() != desired.maps.len() {
        return Err(vec!["the number of maps".to_owned()]);
    }
    let pairs = || present.maps.iter().zip(&desired.maps);
    let other: Vec<String> =
        pairs().filter(|(old, new)| !same_shape(old, new)).map(|(_, new)| format!("map {}", new.name)).collect();
    if !other.is_empty() {
        return Err(other);
    }
    let changes = pairs().map(|(old, map)| {
        let (remove, add) = difference(&old.elements, &map.elements);
        Change { map, remove, add }
    });
    Ok(changes.filter(|change| !change.remove.is_empty() || !change.add.is_empty()).collect())
}

/// Both tables must be normalised. The error names what would have to change under its own name.
pub(crate) fn plan<'a>(present: Option<&'a Table>, desired: &'a Table) -> Result<Plan<'a>, Vec<String>> {
    let Some(present) = present else {
        return Ok(Plan::Replace(from_nothing(desired)));
    };
    if present == desired {
        return Ok(Plan::Nothing);
    }
    let used = reachable(present);
    let mut steps = Steps::default();
    let mut reused = Vec::new();
    let mut changed_maps: Vec<(&Map, &Map)> = Vec::new();

    for map in &desired.maps {
        match find(&present.maps, &map.name, |m| &m.name) {
            None => steps.maps.push(map),
            Some(old) if old == map => {}
            Some(old) if !used.maps.contains(&old.name) => {
                steps.clean.maps.push(old.name.clone());
                steps.maps.push(map);
            }
            Some(old) => changed_maps.push((old, map)),
        }
    }
    for chain in &desired.chains {
        let old = find(&present.chains, &chain.name, |c| &c.name);
        match (old, &chain.base) {
            (None, None) => steps.chains.push(chain),
            (None, Some(base)) => {
                steps.bases.push(chain);
                steps.switch.push(Switch { chain, policy: !base.accept });
            }
            (Some(old), _) if old == chain => {}
            (Some(old), Some(base)) => match &old.base {
                Some(was) if (&was.kind, was.hook, was.priority) == (&base.kind, base.hook, base.priority) => {
                    steps.switch.push(Switch { chain, policy: was.accept != base.accept });
                }
                _ => reused.push(format!("the place of base chain {}", chain.name)),
            },
            (Some(old), None) if old.base.is_none() && !used.chains.contains(&old.name) => {
                steps.clean.chains.push(old.name.clone());
                steps.chains.push(chain);
            }
            (Some(_), None) => reused.push(format!("chain {}", chain.name)),
        }
    }
    for timeout in &desired.timeouts {
        match find(&present.timeouts, &timeout.name, |t| &t.name) {
            None => steps.timeouts.push(timeout),
            Some(old) if old == timeout => {}
            Some(old) if !used.timeouts.contains(&old.name) => {
                steps.clean.timeouts.push(old.name.clone());
                steps.timeouts.push(timeout);
            }
            Some(_) => reused.push(format!("ct timeout {}", timeout.name)),
        }
    }
    what_goes(present, desired, &used, &mut steps);
    clean_what_refers(present, desired, &used, &mut steps);

    let nothing_else = reused.is_empty()
        && steps.maps.is_empty()
        && steps.chains.is_empty()
        && steps.timeouts.is_empty()
        && steps.switch.is_empty()
        && steps.drop_bases.is_empty()
        && steps.retire.is_empty();
    if let ([(old, map)], true) = (&changed_maps[..], nothing_else)
        && same_shape(old, map)
    {
        let (remove, add) = difference(&old.elements, &map.elements);
        return Ok(Plan::Elements { clean: steps.clean, change: Change { map, remove, add } });
    }
    reused.extend(changed_maps.iter().map(|(_, map)| format!("map {}", map.name)));
    if reused.is_empty() { Ok(Plan::Replace(steps)) } else { Err(reused) }
}

fn from_nothing(desired: &Table) -> Steps<'_> {
    let (bases, chains): (Vec<_>, Vec<_>) = desired.chains.iter().partition(|c| c.base.is_some());
    let switch = bases
        .iter()
        .map(|chain| Switch { chain, policy: chain.base.as_ref().is_some_and(|base| !base.accept) })
        .collect();
    Steps {
        create_table: true,
        timeouts: desired.timeouts.iter().collect(),
        bases,
        chains,
        maps: desired.maps.iter().collect(),
        switch,
        ..Steps::default()
    }
}

/// Sorts what is present and not desired into what nobody uses (phase 0) and what goes later.
fn what_goes(present: &Table, desired: &Table, used: &Used<'_>, steps: &mut Steps<'_>) {
    for chain in &present.chains {
        if find(&desired.chains, &chain.name, |c| &c.name).is_some() {
            continue;
        }
        let list = match (&chain.base, used.chains.contains(&chain.name)) {
            (Some(_), _) => &mut steps.drop_bases,
            (None, true) => &mut steps.retire.chains,
            (None, false) => &mut steps.clean.chains,
        };
        list.push(chain.name.clone());
    }
    for map in &present.maps {
        if find(&desired.maps, &map.name, |m| &m.name).is_none() && !is_anonymous(&map.name) {
            let list = if used.maps.contains(&map.name) { &mut steps.retire.maps } else { &mut steps.clean.maps };
            list.push(map.name.clone());
        }
    }
    for timeout in &present.timeouts {
        if find(&desired.timeouts, &timeout.name, |t| &t.name).is_none() {
            let used = used.timeouts.contains(&timeout.name);
            let list = if used { &mut steps.retire.timeouts } else { &mut steps.clean.timeouts };
            list.push(timeout.name.clone());
        }
    }
}

/// What an interrupted replacement left may be as it is wanted, and refer to what is not: then it has to be made anew,
/// as nothing can be removed that something refers to.
fn clean_what_refers<'a>(present: &Table, desired: &'a Table, used: &Used<'_>, steps: &mut Steps<'a>) {
    // Each round adds a name or is the last.
    loop {
        let clean = &steps.clean;
        let has = |list: &[String], name: &String| list.iter().any(|item| item == name);
        let jumps = |verdict: &Verdict| match verdict {
            Verdict::Jump(name) | Verdict::Goto(name) => has(&clean.chains, name),
            _ => false,
        };
        let chain = present.chains.iter().find(|chain| {
            chain.base.is_none()
                && !used.chains.contains(&chain.name)
                && !has(&clean.chains, &chain.name)
                && chain.rules.iter().flat_map(|rule| &rule.exprs).any(|expr| match expr {
                    Expr::Verdict(verdict) => jumps(verdict),
                    Expr::Lookup { map, .. } => has(&clean.maps, map),
                    Expr::CtTimeoutSet { name } => has(&clean.timeouts, name),
                    _ => false,
                })
        });
        let map = present.maps.iter().find(|map| {
            !used.maps.contains(&map.name)
                && !has(&clean.maps, &map.name)
                && map.elements.iter().any(|element| matches!(&element.data, ElementData::Verdict(v) if jumps(v)))
        });
        if chain.is_none() && map.is_none() {
            return;
        }
        if let Some(chain) = chain {
            steps.clean.chains.push(chain.name.clone());
            steps.chains.extend(find(&desired.chains, &chain.name, |c| &c.name));
        }
        if let Some(map) = map {
            steps.clean.maps.push(map.name.clone());
            steps.maps.extend(find(&desired.maps, &map.name, |m| &m.name));
        }
    }
}

/// Anonymous sets belong to a rule and go with it; nobody can delete them by name.
fn is_anonymous(name: &str) -> bool {
    name.starts_with("__set") || name.starts_with("__map")
}

fn find<'t, T>(sorted: &'t [T], name: &str, key: impl Fn(&T) -> &String) -> Option<&'t T> {
    sorted.binary_search_by(|item| key(item).as_str().cmp(name)).ok().and_then(|at| sorted.get(at))
}

fn same_shape(old: &Map, new: &Map) -> bool {
    (&old.key, old.interval, old.data, old.counters) == (&new.key, new.interval, new.data, new.counters)
}

/// What to remove from `old` and to add to it, so that it becomes `new`; both sorted by key.
fn difference<'a>(old: &'a [Element], new: &'a [Element]) -> (Vec<&'a Element>, Vec<&'a Element>) {
    let (mut remove, mut add) = (Vec::new(), Vec::new());
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        match (old.peek(), new.peek()) {
            (None, None) => return (remove, add),
            (Some(o), Some(n)) if o.key == n.key => {
                if o != n {
                    remove.push(*o);
                    add.push(*n);
                }
                old.next();
                new.next();
            }
            (Some(o), n) if n.is_none_or(|n| o.key < n.key) => {
                remove.push(*o);
                old.next();
            }
            (_, n) => {
                add.extend(n);
                new.next();
            }
        }
    }
}

/// What packets can reach.
#[derive(Debug, Default)]
struct Used<'t> {
    chains: BTreeSet<&'t String>,
    maps: BTreeSet<&'t String>,
    timeouts: BTreeSet<&'t String>,
}

fn reachable(table: &Table) -> Used<'_> {
    let mut used = Used::default();
    // Each chain enters at most once, so this ends whatever the jumps are.
    let mut todo: Vec<&Chain> = table.chains.iter().filter(|c| c.base.is_some()).collect();
    used.chains.extend(todo.iter().map(|c| &c.name));
    while let Some(chain) = todo.pop() {
        for expr in chain.rules.iter().flat_map(|rule: &Rule| &rule.exprs) {
            match expr {
                Expr::Verdict(verdict) => visit(table, verdict, &mut used, &mut todo),
                Expr::Lookup { map, into, .. } => {
                    let Some(map) = find(&table.maps, map, |m| &m.name) else { continue };
                    if !used.maps.insert(&map.name) || *into != LookupInto::Verdict {
                        continue;
                    }
                    // Thousands of elements lead to a handful of chains; most to the same as their neighbour.
                    let mut last = None;
                    for element in &map.elements {
                        if let ElementData::Verdict(verdict) = &element.data
                            && last != Some(verdict)
                        {
                            visit(table, verdict, &mut used, &mut todo);
                            last = Some(verdict);
                        }
                    }
                }
                Expr::CtTimeoutSet { name } => {
                    used.timeouts.insert(name);
                }
                _ => {}
            }
        }
    }
    used
}

fn visit<'t>(table: &'t Table, verdict: &Verdict, used: &mut Used<'t>, todo: &mut Vec<&'t Chain>) {
    let (Verdict::Jump(name) | Verdict::Goto(name)) = verdict else { return };
    if let Some(chain) = find(&table.chains, name, |c| &c.name)
        && used.chains.insert(&chain.name)
    {
        todo.push(chain);
    }
}
