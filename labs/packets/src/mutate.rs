//! Tables broken on purpose, to see whether the comparison notices.

use keepwall_ir::nft::{ElementData, Expr, MapData, Table, Verdict};

use crate::draw::{Dice, Trip};
use crate::model::interpreted;
use crate::probe::{Region, Space};

/// A broken table.
#[derive(Clone, Debug)]
pub struct Mutant {
    /// The table.
    pub table: Table,
    /// What was broken.
    pub what: String,
    /// The packets that a lookup answers differently now lie in here.
    pub region: Region,
}

/// Points that a proof may take; more are [`Proof::TooLarge`].
const POINTS_MAX: usize = 400_000;

/// What comparing the two tables on every cell came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// The mutant does the same to every packet.
    Equivalent,
    /// Not to this one.
    Differs(Box<Trip>),
    /// Too many cells to look at all of them.
    TooLarge,
}

/// Whether the mutant does the same as the table. Packets outside the mutant's region meet the same elements in
/// both. Inside, the space is cut at every bound of every map that such a packet can meet: within one piece all
/// packets are alike, so one of each piece is enough.
#[must_use]
pub fn prove_equivalent(space: &Space<'_>, table: &Table, mutant: &Mutant) -> Proof {
    let Some(points) = space.points(&mutant.region, POINTS_MAX) else { return Proof::TooLarge };
    let differs = |trip: &&Trip| interpreted(table, trip) != interpreted(&mutant.table, trip);
    match points.iter().find(differs) {
        Some(trip) => Proof::Differs(Box::new(*trip)),
        None => Proof::Equivalent,
    }
}

/// Breaks one thing that decides a packet: drops an element, flips its verdict, gives a peer to another class, moves
/// a bound by one, or flips a default. `None` if the throw hit nothing that can be broken so.
#[must_use]
pub fn mutant(dice: &mut Dice, table: &Table) -> Option<Mutant> {
    if dice.one_in(25) {
        return flipped_default(dice, table);
    }
    let maps: Vec<usize> = (0..table.maps.len())
        .filter(|n| {
            let map = &table.maps[*n];
            let decides = map.counters || map.data == MapData::Mark || map.name.contains("_services");
            decides && !map.elements.is_empty()
        })
        .collect();
    let at = *maps.get(dice.below(maps.len()))?;
    let original = &table.maps[at];
    let n = dice.below(original.elements.len());
    let mut region = Region::of_element(table, original, &original.elements[n])?;
    let mut table = table.clone();
    let map = &mut table.maps[at];
    let what = match dice.below(4) {
        0 => {
            map.elements.remove(n);
            "the element is gone".to_owned()
        }
        1 => match &mut map.elements[n].data {
            ElementData::Verdict(verdict) => {
                flip(verdict)?;
                "the verdict is flipped".to_owned()
            }
            ElementData::Mark(class) => {
                *class += 1;
                "the class is the next one".to_owned()
            }
            ElementData::Nothing => return None,
        },
        side => {
            let field = dice.below(map.elements[n].key.len());
            let range = &mut map.elements[n].key[field];
            // Growing may overlap a neighbour, which a kernel would refuse; so ranges only shrink.
            if range.first == range.last {
                return None;
            }
            let (bound, up) = if side == 2 { (&mut range.first, true) } else { (&mut range.last, false) };
            region.narrow(&map.name, field, bound);
            step(bound, up);
            format!("the {} bound of field {field} is off by one", if up { "lower" } else { "upper" })
        }
    };
    let what = format!("{what}: map {}, element {n}", map.name);
    Some(Mutant { table, what, region })
}

fn flip(verdict: &mut Verdict) -> Option<()> {
    let Verdict::Goto(chain) = verdict else { return None };
    *chain = match chain.contains("_allow") {
        true => chain.replace("_allow", "_deny"),
        false => chain.replace("_deny", "_allow"),
    };
    Some(())
}

/// The last rule of a chain that looks maps up: what happens when none of them answers.
fn flipped_default(dice: &mut Dice, table: &Table) -> Option<Mutant> {
    let mut table = table.clone();
    let is_dispatch = |name: &str| (name.contains("_ports.") || name.contains("_other.")) && !name.contains("_fwd_");
    let mut chains: Vec<_> = table.chains.iter_mut().filter(|chain| is_dispatch(&chain.name)).collect();
    let count = chains.len();
    let chain = chains.get_mut(dice.below(count))?;
    let Some(Expr::Verdict(verdict)) = chain.rules.last_mut()?.exprs.last_mut() else { return None };
    flip(verdict)?;
    let what = format!("the default is flipped: chain {}", chain.name);
    let region = Region::of_chain(&chain.name)?;
    Some(Mutant { table, what, region })
}

fn step(bound: &mut [u8], up: bool) {
    for byte in bound.iter_mut().rev() {
        let (next, carry) = if up { byte.overflowing_add(1) } else { byte.overflowing_sub(1) };
        *byte = next;
        if !carry {
            return;
        }
    }
}
