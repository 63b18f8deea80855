//! Cells laid out as kernel maps: values hashed, ranges walked, peers direct or by class (ADR 2).

use std::collections::HashMap;
use std::sync::Arc;

use keepwall_core::{Family, Prefix};
use keepwall_ir::nft::{Element, ElementData, FieldRange, FieldType, Map, MapData, Verdict};

use super::Build;
use super::exprs::{address_type, bytes};
use super::lowered::{Lane, TooLarge, too_large};
use crate::cells::{self, Class, Flat, Slot};
use crate::intent::{Attachment, Intent, IntentPeer};
use crate::spec::{Direction, Policy};

/// The maps of one direction, family and kind (with ports or without), in the order in which they are asked.
#[derive(Default)]
pub(super) struct Maps {
    pub(super) exact: Vec<String>,
    pub(super) peer: Vec<PeerMap>,
    pub(super) any: Vec<String>,
}

pub(super) enum PeerMap {
    /// (peer, port, protocol) to verdict.
    Direct(String),
    /// Peer to class, then (class, port, protocol) to verdict.
    Classes { classes: String, cells: String },
}

/// Key, data, and the rule that it stands for, if it does.
pub(super) type NewElement = (Vec<FieldRange>, ElementData, Option<Of>);

/// The rule that an element stands for.
#[derive(Clone)]
pub(super) struct Of {
    id: Arc<str>,
    comment: Arc<str>,
}

/// Port before protocol: thousands of cells share a protocol, and what many cells share makes the kernel's walk over
/// ranges slow if it comes first.
pub(super) fn slot_key(slot: Slot) -> impl Iterator<Item = FieldRange> {
    let (port, protocol) = match slot {
        Slot::Ports { protocol, first, last } => {
            (Some(FieldRange::new(first.to_be_bytes(), last.to_be_bytes())), FieldRange::exact([protocol]))
        }
        Slot::Protocols { first, last } => (None, FieldRange::new([first], [last])),
    };
    port.into_iter().chain([protocol])
}

/// True if the slot is a single value in each of its fields.
pub(super) fn is_value(slot: Slot) -> bool {
    match slot {
        Slot::Ports { first, last, .. } => first == last,
        Slot::Protocols { first, last } => first == last,
    }
}

/// A label as far as nft can show it.
pub(super) fn comment(label: &str) -> String {
    let mut comment: String = label.chars().take(60).collect();
    while comment.len() > keepwall_ir::nft::COMMENT_MAX {
        comment.pop();
    }
    comment
}

pub(crate) struct Decides<'a> {
    pub(crate) policy: Policy,
    pub(crate) id: &'a str,
    pub(crate) label: &'a str,
}

/// The prefixes of one family as sorted, disjoint ranges.
pub(crate) fn ranges_of(prefixes: &[Prefix], family: Family) -> Vec<(u128, u128)> {
    let mut ranges: Vec<(u128, u128)> = (prefixes.iter())
        .filter(|prefix| prefix.family() == family)
        .map(|prefix| (prefix.range().first, prefix.range().last))
        .collect();
    ranges.sort_unstable_by_key(|range| (range.0, std::cmp::Reverse(range.1)));
    // A list may hold a block and a part of it; a map takes no overlap, and the block is enough.
    ranges.dedup_by(|inner, outer| inner.1 <= outer.1);
    ranges
}

/// The rules of one direction and family in the order of evaluation, intra-group accept first.
pub(crate) fn flatten<'a>(
    intent: &'a Intent,
    attachment: &'a Attachment,
    direction: Direction,
    family: Family,
) -> (Vec<Flat>, Vec<Decides<'a>>) {
    let mut flats = Vec::new();
    let mut decides = Vec::new();
    let of_set = |name: &str| ranges_of(intent.sets.get(name).map_or(&[], Vec::as_slice), family);
    if direction == Direction::Ingress {
        for name in &attachment.inner {
            let peers = of_set(name);
            if !peers.is_empty() {
                flats.push(Flat {
                    peers,
                    any_peer: false,
                    local: None,
                    protocols: (0, 255),
                    ports: None,
                    source_ports: None,
                });
                decides.push(Decides { policy: Policy::Accept, id: name, label: name });
            }
        }
    }
    for rule in attachment.rules(direction) {
        let peers = match &rule.peer {
            IntentPeer::Prefix(prefix) if prefix.family() == family => {
                vec![(prefix.range().first, prefix.range().last)]
            }
            IntentPeer::Prefix(_) => continue,
            IntentPeer::Set(name) => of_set(name),
        };
        let fits =
            rule.protocol.family().is_none_or(|f| f == family) && rule.local.is_none_or(|l| l.family() == family);
        if peers.is_empty() || !fits {
            continue;
        }
        let any_peer = peers == [(0, family.max())];
        let protocols = match rule.protocol {
            keepwall_core::Protocol::All => (0, 255),
            keepwall_core::Protocol::Number(number) => (number, number),
        };
        flats.push(Flat {
            peers,
            any_peer,
            local: rule.local.map(|l| (l.range().first, l.range().last)),
            protocols,
            ports: rule.ports.map(|r| (r.first(), r.last())),
            source_ports: rule.source_ports.map(|r| (r.first(), r.last())),
        });
        decides.push(Decides { policy: rule.policy, id: &rule.id, label: &rule.label });
    }
    (flats, decides)
}

/// Up to this many elements peers and cells are multiplied out into one map; above, if that saves elements, there is a
/// map from peer to class and one of (class, port, protocol). One lookup is faster than two.
const DIRECT_MAX: usize = 4_096;

/// Ranges are kept in a structure that the kernel copies for each change and walks in time that grows with them: above
/// this many, classes are preferred if that saves elements.
const DIRECT_RANGES_MAX: usize = 512;

/// Up to this many cells, single values stay with the ranges among them.
const TOGETHER_MAX: usize = 16;

impl Build<'_> {
    pub(super) fn map(
        &mut self,
        name: &str,
        key: Vec<FieldType>,
        interval: bool,
        data: MapData,
        mut elements: Vec<NewElement>,
    ) {
        elements.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let counters = data == MapData::Verdict && elements.iter().any(|(_, _, of)| of.is_some());
        if counters {
            let ids = elements.iter().map(|(_, _, of)| of.as_ref().map_or_else(|| "".into(), |of| Arc::clone(&of.id)));
            self.legend.insert(name.to_owned(), ids.collect());
        }
        let elements = elements.into_iter().map(|(key, data, of)| Element {
            key,
            data,
            comment: of.map(|of| of.comment.to_string()).unwrap_or_default(),
        });
        let elements = elements.collect();
        self.table.maps.push(Map { name: name.to_owned(), key, interval, data, counters, elements });
    }

    /// A verdict map of cells as one or two maps: single values are hashed, which costs the same at any number; the
    /// rest are ranges. A few ranges among the cells take the rest along: one walk is cheaper than two.
    pub(super) fn cell_maps(
        &mut self,
        stem: &[&str],
        lane: Lane,
        key: Vec<FieldType>,
        elements: Vec<NewElement>,
    ) -> Vec<String> {
        let single = |element: &NewElement| element.0.iter().all(|field| field.first == field.last);
        let ranges = elements.iter().filter(|element| !single(element)).count();
        let together = ranges > 0 && elements.len() <= TOGETHER_MAX;
        let (hashed, ranged): (Vec<_>, Vec<_>) = elements.into_iter().partition(|e| !together && single(e));
        let mut names = Vec::new();
        for (part, interval, elements) in [("values", false, hashed), ("ranges", true, ranged)] {
            if !elements.is_empty() {
                let name = self.name(&[&stem.join("_"), part]);
                self.lanes.insert(name.clone(), lane);
                self.map(&name, key.clone(), interval, MapData::Verdict, elements);
                names.push(name);
            }
        }
        names
    }

    /// The maps with ports, and those without.
    pub(super) fn maps(
        &mut self,
        attachment: &Attachment,
        slug: &str,
        direction: Direction,
        family: Family,
        allow: &str,
        deny: &str,
    ) -> Result<[Maps; 2], Box<TooLarge>> {
        let (flats, rules) = flatten(self.intent, attachment, direction, family);
        let limit = self.intent.elements_max as usize;
        let cells = cells::cut(&flats, family.max(), self.left)
            .map_err(|explosion| too_large(attachment, direction, limit, &rules, &explosion.by_rule))?;
        let first_map = self.table.maps.len();
        let of: Vec<Of> = rules.iter().map(|r| Of { id: r.id.into(), comment: comment(r.label).into() }).collect();
        let element = |key: Vec<FieldRange>, rule: usize| -> NewElement {
            let chain = if rules[rule].policy == Policy::Accept { allow } else { deny };
            (key, ElementData::Verdict(Verdict::Goto(chain.to_owned())), Some(of[rule].clone()))
        };
        let v = if family == Family::Ipv4 { "4" } else { "6" };
        let peer_type = address_type(family);
        let range = |(first, last): (u128, u128)| FieldRange::new(bytes(family, first), bytes(family, last));
        let mut both = [Maps::default(), Maps::default()];
        for (maps, with_ports) in both.iter_mut().zip([true, false]) {
            let kind = if with_ports { "ports" } else { "other" };
            let lane = (family, with_ports);
            let mine = |slot: &Slot| matches!(slot, Slot::Ports { .. }) == with_ports;
            let slot_types: &[FieldType] =
                if with_ports { &[FieldType::InetService, FieldType::InetProto] } else { &[FieldType::InetProto] };

            let exact = (cells.exact.iter().filter(|cell| mine(&cell.slot))).map(|cell| {
                let mut key = vec![range(cell.peer), range(cell.local)];
                if with_ports {
                    key.push(FieldRange::new(cell.source_ports.0.to_be_bytes(), cell.source_ports.1.to_be_bytes()));
                }
                key.extend(slot_key(cell.slot));
                element(key, cell.rule)
            });
            let exact = exact.collect();
            let mut types = vec![peer_type, peer_type];
            types.extend(with_ports.then_some(FieldType::InetService));
            types.extend(slot_types);
            maps.exact = self.cell_maps(&[slug, &format!("exact{v}"), kind], lane, types, exact);

            let any = cells
                .any
                .iter()
                .filter(|(slot, _)| mine(slot))
                .map(|(slot, rule)| element(slot_key(*slot).collect(), *rule));
            let any = any.collect();
            maps.any = self.cell_maps(&[slug, &format!("any{v}"), kind], lane, slot_types.to_vec(), any);

            let classes: Vec<(&Class, Vec<(Slot, usize)>)> = (cells.peer.iter())
                .map(|class| (class, class.cells.iter().copied().filter(|(slot, _)| mine(slot)).collect::<Vec<_>>()))
                .filter(|(_, own)| !own.is_empty())
                .collect();
            if classes.is_empty() {
                continue;
            }
            let direct: usize = classes.iter().map(|(class, own)| class.peers.len() * own.len()).sum();
            let by_class: usize = classes.iter().map(|(class, own)| class.peers.len() + own.len()).sum();
            let values = |class: &Class| class.peers.iter().filter(|(first, last)| first == last).count();
            let hashed: usize = classes
                .iter()
                .map(|(class, own)| values(class) * own.iter().filter(|(s, _)| is_value(*s)).count())
                .sum();
            let small = direct <= DIRECT_MAX.min(self.left) && direct - hashed <= DIRECT_RANGES_MAX;
            if small || direct <= by_class {
                let elements = (classes.iter())
                    .flat_map(|(class, own)| {
                        class.peers.iter().flat_map(move |peer| own.iter().map(move |c| (*peer, *c)))
                    })
                    .map(|(peer, (slot, rule))| {
                        element([range(peer)].into_iter().chain(slot_key(slot)).collect(), rule)
                    })
                    .collect();
                let types = [&[peer_type], slot_types].concat();
                let names = self.cell_maps(&[slug, &format!("peer{v}"), kind], lane, types, elements);
                maps.peer = names.into_iter().map(PeerMap::Direct).collect();
                continue;
            }
            let mut members: Vec<NewElement> = Vec::new();
            let mut elements = Vec::new();
            for (number, (class, own)) in (1u32..).zip(&classes) {
                members.extend(class.peers.iter().map(|peer| (vec![range(*peer)], ElementData::Mark(number), None)));
                for (slot, rule) in own {
                    let class = FieldRange::exact(number.to_ne_bytes());
                    elements.push(element([class].into_iter().chain(slot_key(*slot)).collect(), *rule));
                }
            }
            // Hosts are hashed, so that one who joins is one insertion; blocks need a tree.
            let (hosts, blocks): (Vec<_>, Vec<_>) =
                members.into_iter().partition(|(key, ..)| key[0].first == key[0].last);
            let types = [&[FieldType::Mark], slot_types].concat();
            let cells = self.cell_maps(&[slug, &format!("cells{v}"), kind], lane, types, elements);
            for (part, interval, members) in [("hosts", false, hosts), ("blocks", true, blocks)] {
                if members.is_empty() {
                    continue;
                }
                let name = self.name(&[slug, &format!("class{v}"), kind, part]);
                self.lanes.insert(name.clone(), lane);
                self.map(&name, vec![peer_type], interval, MapData::Mark, members);
                maps.peer
                    .extend(cells.iter().map(|cells| PeerMap::Classes { classes: name.clone(), cells: cells.clone() }));
            }
        }
        // The cut counted the cells; what they became is counted here, so that the limit holds for the interface.
        let new = &self.table.maps[first_map..];
        let count: usize = new.iter().map(|map| map.elements.len()).sum();
        match self.left.checked_sub(count) {
            Some(left) => {
                self.left = left;
                Ok(both)
            }
            None => {
                let number: HashMap<&str, usize> = rules.iter().enumerate().map(|(n, rule)| (rule.id, n)).collect();
                let mut by_rule = HashMap::new();
                for id in new.iter().filter_map(|map| self.legend.get(&map.name)).flatten() {
                    if let Some(n) = number.get(&**id) {
                        *by_rule.entry(*n).or_default() += 1;
                    }
                }
                Err(too_large(attachment, direction, limit, &rules, &by_rule))
            }
        }
    }
}
