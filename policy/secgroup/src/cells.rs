//! Priorities compiled away: an ordered list of rules becomes disjoint cells, each with its deciding rule.
//!
//! The rules of one interface, direction and family are a list; the first match decides. Kernel maps have no
//! order and refuse overlaps, so here the space of (peer, ports) is cut at every rule's edge and each piece is
//! given to the rule that decides it. Three kinds of rule go to three kinds of map, looked up one after the
//! other:
//!
//! 1. *exact*: rules that also say something about this side or the source port (5-tuple rules);
//! 2. *peer*: rules for some peers;
//! 3. *any*: rules for every peer.
//!
//! A map of one kind holds just the cells that a rule of that kind decides. So `accept 443 from any` beside
//! ten thousand rules for single hosts costs one element and not ten thousand: a packet that misses the
//! hosts' map falls through to it. The maps agree with the list because a cell is in a map exactly if the
//! first match over *all* rules is of that map's kind.

use std::collections::HashMap;

/// A rule flattened to numbers, in the order of evaluation. `Vec`s of ranges are sorted and disjoint.
#[derive(Clone, Debug)]
pub(crate) struct Flat {
    /// Peer ranges.
    pub(crate) peers: Vec<(u128, u128)>,
    /// True if the peers are the whole family.
    pub(crate) any_peer: bool,
    /// This side, `None` for any.
    pub(crate) local: Option<(u128, u128)>,
    /// Protocols, as numbers.
    pub(crate) protocols: (u8, u8),
    /// Destination ports; `None` matches any, 0 included.
    pub(crate) ports: Option<(u16, u16)>,
    /// Source ports, `None` for any.
    pub(crate) source_ports: Option<(u16, u16)>,
}

impl Flat {
    fn is_exact(&self) -> bool {
        self.local.is_some() || self.source_ports.is_some()
    }
}

type Ranges = Vec<(u128, u128)>;

/// One protocol of TCP and UDP with destination ports, or a range of the others without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Slot {
    /// Protocol 6 or 17 and its destination ports.
    Ports { protocol: u8, first: u16, last: u16 },
    /// Protocols that carry no ports.
    Protocols { first: u8, last: u8 },
}

/// Cells of peers who are all treated alike.
#[derive(Clone, Debug)]
pub(crate) struct Class {
    /// The peers, one range for each piece between two edges: neighbours are not merged, so that a member who
    /// joins adds a range and changes none.
    pub(crate) peers: Vec<(u128, u128)>,
    /// Slot and deciding rule; disjoint.
    pub(crate) cells: Vec<(Slot, usize)>,
}

/// A cell decided by a 5-tuple rule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exact {
    pub(crate) peer: (u128, u128),
    pub(crate) local: (u128, u128),
    pub(crate) source_ports: (u16, u16),
    pub(crate) slot: Slot,
    pub(crate) rule: usize,
}

/// The cells of one interface, direction and family.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cells {
    pub(crate) exact: Vec<Exact>,
    pub(crate) peer: Vec<Class>,
    pub(crate) any: Vec<(Slot, usize)>,
}

/// Growth was stopped; how many cells each rule had caused by then.
#[derive(Debug)]
pub(crate) struct Explosion {
    pub(crate) by_rule: HashMap<usize, usize>,
}

/// TCP and UDP go to the maps with ports, all others to the maps without.
const PORTFUL: [u8; 2] = [6, 17];
const PORTLESS: [(u8, u8); 3] = [(0, 5), (7, 16), (18, 255)];

/// Cuts `rules` (of one family, whose highest address is `max`) into cells; stops at `cells_max` of them.
pub(crate) fn cut(rules: &[Flat], max: u128, cells_max: usize) -> Result<Cells, Explosion> {
    let mut budget = Budget { left: cells_max, by_rule: HashMap::new() };
    let any: Vec<usize> = (0..rules.len()).filter(|i| rules[*i].any_peer && !rules[*i].is_exact()).collect();
    let mut cells = Cells::default();

    for (slot, rule) in slots(rules, &any) {
        budget.spend(rule, 1)?;
        cells.any.push((slot, rule));
    }

    let specific: Vec<usize> = (0..rules.len()).filter(|i| !rules[*i].any_peer || rules[*i].is_exact()).collect();
    let mut class_of: HashMap<Vec<usize>, usize> = HashMap::new();
    let mut classes: Vec<(Vec<usize>, Ranges)> = Vec::new();
    sweep_peers(rules, &specific, max, |range, active| {
        let class = *class_of.entry(active.to_vec()).or_insert_with(|| {
            classes.push((active.to_vec(), Vec::new()));
            classes.len() - 1
        });
        classes[class].1.push(range);
    });

    // By their rules and not by their addresses, so that a member with a low address renumbers no class.
    classes.sort_unstable();
    for (active, peers) in classes {
        let order = merged(&active, &any);
        let plain: Vec<usize> = order.iter().copied().filter(|i| !rules[*i].is_exact()).collect();
        let own: Vec<(Slot, usize)> = match plain.as_slice() {
            // Most classes of a large policy are of one rule: nothing to cut.
            [rule] => slots_of_one(&rules[*rule]).map(|slot| (slot, *rule)).collect(),
            several => slots(rules, several).into_iter().filter(|(_, rule)| !rules[*rule].any_peer).collect(),
        };
        // What the smaller of the two layouts takes: every peer with every cell, or peers and cells apart.
        let together = peers.len().saturating_mul(own.len()) <= peers.len() + own.len();
        for (n, (_, rule)) in own.iter().enumerate() {
            budget.spend(*rule, if together { peers.len() } else { 1 + if n == 0 { peers.len() } else { 0 } })?;
        }
        if order.iter().any(|i| rules[*i].is_exact()) {
            exact_cells(rules, &order, max, &mut |local, source_ports, slot, rule| {
                budget.spend(rule, peers.len())?;
                cells.exact.extend(peers.iter().map(|peer| Exact { peer: *peer, local, source_ports, slot, rule }));
                Ok(())
            })?;
        }
        if !own.is_empty() {
            cells.peer.push(Class { peers, cells: own });
        }
    }
    Ok(cells)
}

struct Budget {
    left: usize,
    by_rule: HashMap<usize, usize>,
}

impl Budget {
    fn spend(&mut self, rule: usize, count: usize) -> Result<(), Explosion> {
        *self.by_rule.entry(rule).or_default() += count;
        match self.left.checked_sub(count) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(Explosion { by_rule: std::mem::take(&mut self.by_rule) }),
        }
    }
}

/// Two ascending lists as one.
fn merged(a: &[usize], b: &[usize]) -> Vec<usize> {
    let mut out: Vec<usize> = a.iter().chain(b).copied().collect();
    out.sort_unstable();
    out.dedup();
    out
}

/// Calls `piece` for every range of peers between two edges, with the rules that cover it, ascending. Pieces
/// that no rule covers are left out.
pub(crate) fn sweep_peers(rules: &[Flat], which: &[usize], max: u128, mut piece: impl FnMut((u128, u128), &[usize])) {
    // (position, false for an end, rule): ends sort first, so that a piece never includes what ended before it.
    let mut edges: Vec<(u128, bool, usize)> = Vec::new();
    for rule in which {
        for (first, last) in &rules[*rule].peers {
            edges.push((*first, true, *rule));
            if *last < max {
                edges.push((*last + 1, false, *rule));
            }
        }
    }
    edges.sort_unstable();
    let mut active = std::collections::BTreeSet::new();
    let mut list: Vec<usize> = Vec::new();
    let mut at = 0;
    while at < edges.len() {
        let position = edges[at].0;
        while at < edges.len() && edges[at].0 == position {
            let (_, starts, rule) = edges[at];
            if starts {
                active.insert(rule)
            } else {
                active.remove(&rule)
            };
            at += 1;
        }
        if active.is_empty() {
            continue;
        }
        let last = edges.get(at).map_or(max, |next| next.0 - 1);
        list.clear();
        list.extend(&active);
        piece((position, last), &list);
    }
}

/// The slots of a list of rules, each with its first match; neighbours with the same match are one slot.
fn slots(rules: &[Flat], order: &[usize]) -> Vec<(Slot, usize)> {
    let mut out = Vec::new();
    for protocol in PORTFUL {
        let candidates: Vec<(u32, u32, usize)> = (order.iter())
            .filter(|i| (rules[**i].protocols.0..=rules[**i].protocols.1).contains(&protocol))
            .map(|i| {
                let (first, last) = rules[*i].ports.unwrap_or((0, u16::MAX));
                (u32::from(first), u32::from(last), *i)
            })
            .collect();
        first_match(&candidates, |first, last, rule| {
            #[expect(clippy::cast_possible_truncation, reason = "bounds come from u16")]
            out.push((Slot::Ports { protocol, first: first as u16, last: last as u16 }, rule));
        });
    }
    let mut candidates = Vec::new();
    for i in order {
        for (first, last) in PORTLESS {
            let (low, high) = (first.max(rules[*i].protocols.0), last.min(rules[*i].protocols.1));
            if low <= high {
                candidates.push((u32::from(low), u32::from(high), *i));
            }
        }
    }
    first_match(&candidates, |first, last, rule| {
        // Two PORTLESS ranges never touch (6 and 17 lie between), so a merged slot stays within one.
        #[expect(clippy::cast_possible_truncation, reason = "bounds come from u8")]
        out.push((Slot::Protocols { first: first as u8, last: last as u8 }, rule));
    });
    out
}

/// What [`slots`] gives for one rule alone.
fn slots_of_one(rule: &Flat) -> impl Iterator<Item = Slot> {
    let (low, high) = rule.protocols;
    let (first, last) = rule.ports.unwrap_or((0, u16::MAX));
    let with_ports = PORTFUL.into_iter().filter(move |protocol| (low..=high).contains(protocol));
    let without = PORTLESS.into_iter().map(move |(first, last)| (first.max(low), last.min(high)));
    with_ports
        .map(move |protocol| Slot::Ports { protocol, first, last })
        .chain(without.filter(|(first, last)| first <= last).map(|(first, last)| Slot::Protocols { first, last }))
}

/// Ranges in order of precedence, cut so that each number goes to the first range that holds it.
pub(crate) fn first_match(ranges: &[(u32, u32, usize)], mut out: impl FnMut(u32, u32, usize)) {
    let mut edges: Vec<u32> = ranges.iter().flat_map(|(first, last, _)| [*first, *last + 1]).collect();
    edges.sort_unstable();
    edges.dedup();
    let mut starts: Vec<(u32, u32, usize)> = ranges.iter().enumerate().map(|(n, r)| (r.0, r.1, n)).collect();
    starts.sort_unstable();
    let mut next = 0;
    // Precedence, then last number: the smallest entry that has not ended decides.
    let mut open: std::collections::BinaryHeap<std::cmp::Reverse<(usize, u32)>> = std::collections::BinaryHeap::new();
    let mut pending: Option<(u32, u32, usize)> = None;
    for pair in edges.windows(2) {
        let (first, last) = (pair[0], pair[1] - 1);
        while next < starts.len() && starts[next].0 <= first {
            open.push(std::cmp::Reverse((starts[next].2, starts[next].1)));
            next += 1;
        }
        while open.peek().is_some_and(|top| top.0.1 < first) {
            open.pop();
        }
        let winner = open.peek().map(|top| ranges[top.0.0].2);
        pending = match (pending, winner) {
            (Some((start, end, rule)), Some(winner)) if rule == winner && end + 1 == first => Some((start, last, rule)),
            (before, winner) => {
                if let Some((start, end, rule)) = before {
                    out(start, end, rule);
                }
                winner.map(|winner| (first, last, winner))
            }
        };
    }
    if let Some((start, end, rule)) = pending {
        out(start, end, rule);
    }
}

/// Cells of one class that a 5-tuple rule decides: cut by this side, by source port, then as slots.
fn exact_cells(
    rules: &[Flat],
    order: &[usize],
    max: u128,
    out: &mut impl FnMut((u128, u128), (u16, u16), Slot, usize) -> Result<(), Explosion>,
) -> Result<(), Explosion> {
    let mut locals: Vec<u128> = vec![0];
    for (first, last) in order.iter().filter_map(|i| rules[*i].local) {
        locals.push(first);
        if last < max {
            locals.push(last + 1);
        }
    }
    locals.sort_unstable();
    locals.dedup();
    for (n, local) in locals.iter().enumerate() {
        let local = (*local, locals.get(n + 1).map_or(max, |next| next - 1));
        let here: Vec<usize> = (order.iter().copied())
            .filter(|i| rules[*i].local.is_none_or(|(first, last)| first <= local.0 && local.1 <= last))
            .collect();
        if !here.iter().any(|i| rules[*i].is_exact()) {
            continue;
        }
        let mut sources: Vec<u32> = vec![0];
        for (first, last) in here.iter().filter_map(|i| rules[*i].source_ports) {
            sources.extend([u32::from(first), u32::from(last) + 1]);
        }
        sources.sort_unstable();
        sources.dedup();
        for (m, source) in sources.iter().enumerate().filter(|(_, source)| **source <= u32::from(u16::MAX)) {
            let source = (*source, sources.get(m + 1).map_or(u32::from(u16::MAX), |next| next - 1));
            let matching: Vec<usize> = (here.iter().copied())
                .filter(|i| {
                    rules[*i].source_ports.is_none_or(|(f, l)| u32::from(f) <= source.0 && source.1 <= u32::from(l))
                })
                .collect();
            for (slot, rule) in slots(rules, &matching) {
                // Only TCP and UDP have a source port; without one the other protocols make one cell, not many.
                let whole = matches!(slot, Slot::Protocols { .. });
                if rules[rule].is_exact() && !(whole && source.0 > 0) {
                    #[expect(clippy::cast_possible_truncation, reason = "bounds come from u16")]
                    out(local, (source.0 as u16, source.1 as u16), slot, rule)?;
                }
            }
        }
    }
    Ok(())
}
