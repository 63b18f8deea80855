//! Tables broken on purpose, to see whether the comparison notices.

use keepwall_ir::nft::{ElementData, Table, Verdict};

use crate::draw::Dice;

/// Breaks one thing that decides a packet: drops an element, flips its verdict, or moves a bound by one. `None`
/// if the throw hit nothing that can be broken so.
#[must_use]
pub fn mutant(dice: &mut Dice, table: &Table) -> Option<(Table, String)> {
    let maps: Vec<usize> = (0..table.maps.len())
        .filter(|n| {
            let map = &table.maps[*n];
            map.interval && map.counters && !map.elements.is_empty()
        })
        .collect();
    let mut table = table.clone();
    let map = &mut table.maps[*maps.get(dice.below(maps.len()))?];
    let n = dice.below(map.elements.len());
    let what = match dice.below(4) {
        0 => {
            map.elements.remove(n);
            "an element is gone".to_owned()
        }
        1 => {
            let ElementData::Verdict(Verdict::Goto(chain)) = &mut map.elements[n].data else { return None };
            *chain = if chain.contains("_allow") {
                chain.replace("_allow", "_deny")
            } else {
                chain.replace("_deny", "_allow")
            };
            "a verdict is flipped".to_owned()
        }
        side => {
            let field = dice.below(map.elements[n].key.len());
            let range = &mut map.elements[n].key[field];
            // Growing may overlap a neighbour, which a kernel would refuse; so ranges only shrink.
            if range.first == range.last {
                return None;
            }
            let (bound, up) = if side == 2 { (&mut range.first, true) } else { (&mut range.last, false) };
            step(bound, up);
            format!("a bound of field {field} is off by one")
        }
    };
    let name = map.name.clone();
    Some((table, format!("{what}: map {name}, element {n}")))
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
