//! What lowering gives, how two of them differ, and why there may be none.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use keepwall_core::Family;
use keepwall_ir::nft::{ElementData, Expr, FieldRange, Table, Verdict};

use super::maps::Decides;
use crate::intent::Attachment;
use crate::spec::Direction;

/// A table, and what its elements mean.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// For the driver.
    pub table: Table,
    /// Which rule each element of a counting map stands for: rule ids, in the order of the map's elements.
    pub(super) legend: BTreeMap<String, Vec<Arc<str>>>,
    /// Maps whose elements may change in place, with the packets that ask them: see [`Lowered::differs_in_place`].
    pub(super) lanes: BTreeMap<String, Lane>,
}

/// A family, and whether the protocol has ports: each packet is of one lane.
pub(super) type Lane = (Family, bool);

impl Lowered {
    /// The id of the rule that an element of a counting map stands for.
    #[must_use]
    pub fn rule_of(&self, map: &str, key: &[FieldRange]) -> Option<&str> {
        let ids = self.legend.get(map)?;
        let maps = &self.table.maps;
        let map = &maps[maps.binary_search_by(|candidate| candidate.name.as_str().cmp(map)).ok()?];
        let at = map.elements.binary_search_by(|element| element.key.as_slice().cmp(key)).ok()?;
        ids.get(at).map(|id| &**id)
    }

    /// True if `new` (of the same tag) differs in elements only, and no packet asks two of the maps that change: then
    /// they can change in place in one transaction, though the kernel publishes map after map.
    #[must_use]
    pub fn differs_in_place(&self, new: &Lowered) -> bool {
        let (old_maps, new_maps) = (&self.table.maps, &new.table.maps);
        let same_frame = self.table.chains == new.table.chains
            && self.table.timeouts == new.table.timeouts
            && self.table.flags == new.table.flags
            && old_maps.len() == new_maps.len();
        let mut taken: Vec<Lane> = Vec::new();
        same_frame
            && old_maps.iter().zip(new_maps).all(|(old, new)| {
                if old == new {
                    return true;
                }
                let same_shape = (&old.name, &old.key, old.interval, old.data, old.counters)
                    == (&new.name, &new.key, new.interval, new.data, new.counters);
                match self.lanes.get(&new.name) {
                    Some(lane) if same_shape && !taken.contains(lane) => {
                        taken.push(*lane);
                        true
                    }
                    _ => false,
                }
            })
    }

    /// The same under another tag, which must be fresh: cheaper than lowering again.
    #[must_use]
    pub fn retagged(mut self, old: &str, new: &str) -> Lowered {
        let rename = |name: &mut String| {
            if let Some(stem) = name.strip_suffix(old).and_then(|name| name.strip_suffix('.')) {
                *name = format!("{stem}.{new}");
            }
        };
        let verdict = |verdict: &mut Verdict| {
            if let Verdict::Jump(chain) | Verdict::Goto(chain) = verdict {
                rename(chain);
            }
        };
        for map in &mut self.table.maps {
            rename(&mut map.name);
            for element in &mut map.elements {
                if let ElementData::Verdict(data) = &mut element.data {
                    verdict(data);
                }
            }
        }
        for chain in &mut self.table.chains {
            rename(&mut chain.name);
            for expr in chain.rules.iter_mut().flat_map(|rule| &mut rule.exprs) {
                match expr {
                    Expr::Lookup { map: name, .. } | Expr::CtTimeoutSet { name } => rename(name),
                    Expr::Verdict(data) => verdict(data),
                    _ => {}
                }
            }
        }
        for timeout in &mut self.table.timeouts {
            rename(&mut timeout.name);
        }
        let renamed = |mut name: String| {
            rename(&mut name);
            name
        };
        self.legend = self.legend.into_iter().map(|(name, ids)| (renamed(name), ids)).collect();
        self.lanes = self.lanes.into_iter().map(|(name, lane)| (renamed(name), lane)).collect();
        self
    }
}

/// The rules need more elements than the limit allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// The interface.
    pub attachment: String,
    /// Which way.
    pub direction: Direction,
    /// The limit that was passed.
    pub limit: usize,
    /// The rules that cost most, with their share.
    pub rules: Vec<(String, usize)>,
}

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {}: the rules overlap so much that they need more than {} kernel map elements",
            self.attachment, self.direction, self.limit
        )?;
        f.write_str("; most are caused by ")?;
        for (n, (rule, count)) in self.rules.iter().enumerate() {
            write!(f, "{}{rule} ({count})", if n == 0 { "" } else { ", " })?;
        }
        f.write_str(". Give those rules fewer peers or ports, or raise settings.limits.elements_per_interface")
    }
}

impl std::error::Error for TooLarge {}

pub(super) fn too_large(
    attachment: &Attachment,
    direction: Direction,
    limit: usize,
    rules: &[Decides<'_>],
    by_rule: &HashMap<usize, usize>,
) -> Box<TooLarge> {
    let mut shares: HashMap<&str, usize> = HashMap::new();
    for (rule, count) in by_rule {
        *shares.entry(rules[*rule].label).or_default() += count;
    }
    let mut shares: Vec<(String, usize)> = shares.into_iter().map(|(label, count)| (label.to_owned(), count)).collect();
    shares.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    shares.truncate(3);
    Box::new(TooLarge { attachment: attachment.name.clone(), direction, limit, rules: shares })
}
