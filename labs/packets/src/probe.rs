//! Packets at the edges of a table's elements, and one packet for every piece that the edges cut the space into.

use std::collections::BTreeSet;
use std::net::IpAddr;

use keepwall_core::{AddrRange, Family};
use keepwall_ir::nft::{Element, ElementData, Map, Table};

use crate::draw::{Case, Dice, GUEST_DEVICES, HOST, HOST_DEVICE, Path, Trip};

/// Probes for one element at most; where its cells are more, some are drawn.
const PROBES_PER_ELEMENT: usize = 120;
/// Probes for one service prefix at most.
const PROBES_PER_SERVICE: usize = 6_000;
/// Probes for one table, about: with many elements each gets fewer, though never fewer than its edges.
const PROBES_PER_TABLE: usize = 20_000;
/// Probes for one element that lie on or just beyond its bounds.
const EDGES_PER_ELEMENT: usize = 16;

type Range = (u128, u128);

/// Ports whose packets are treated in a way of their own, and the numbers beside them: SMTP and DHCP.
const SPECIAL_PORTS: [u128; 8] = [25, 26, 67, 68, 69, 546, 547, 548];
/// The same for protocols: ICMP, TCP, UDP, ICMPv6.
const SPECIAL_PROTOCOLS: [u128; 8] = [1, 2, 6, 7, 17, 18, 58, 59];

/// What a key field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Peer,
    Local,
    Protocol,
    SourcePort,
    Port,
    Class,
}

/// One interface, direction and family: the packets that one set of maps decides.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Side {
    device: String,
    ingress: bool,
    family: Family,
}

/// Packets of one side, as ranges of what rules look at.
#[derive(Clone, Debug)]
pub struct Region {
    sides: Vec<Side>,
    peers: Vec<Range>,
    local: Range,
    protocol: Range,
    source_port: Range,
    port: Range,
    /// Fields that are ranges over all, or narrowed, by map name and field.
    with_ports: Option<bool>,
}

/// The parts of a map's or chain's name: device, direction, and what it is. `None` for those that decide no packet by
/// rules (`n0_kw0_in_peer4_ports.tag`).
fn parts(name: &str) -> Option<(&str, bool, &str)> {
    let (name, _) = name.split_once('.')?;
    let mut pieces = name.splitn(4, '_');
    let number = pieces.next()?;
    let (device, way, what) = (pieces.next()?, pieces.next()?, pieces.next()?);
    let ours = number.starts_with('n') && matches!(way, "in" | "out") && !what.starts_with("fwd");
    ours.then_some((device, way == "in", what))
}

/// The fields of a map's key, in order.
fn fields(what: &str) -> Option<&'static [Field]> {
    use Field::{Class, Local, Peer, Port, Protocol, SourcePort};
    let (kind, rest) = what.split_once(['4', '6'])?;
    Some(match (kind, rest.starts_with("_ports")) {
        ("exact", true) => &[Peer, Local, SourcePort, Port, Protocol],
        ("exact", false) => &[Peer, Local, Protocol],
        ("peer", true) => &[Peer, Port, Protocol],
        ("peer", false) => &[Peer, Protocol],
        ("any", true) => &[Port, Protocol],
        ("any", false) => &[Protocol],
        ("cells", true) => &[Class, Port, Protocol],
        ("cells", false) => &[Class, Protocol],
        ("class" | "services", _) => &[Peer],
        _ => return None,
    })
}

fn side(name: &str) -> Option<(Side, &str)> {
    let (device, ingress, what) = parts(name)?;
    let at = what.find(['4', '6'])?;
    let family = if what[at..].starts_with('4') { Family::Ipv4 } else { Family::Ipv6 };
    Some((Side { device: device.to_owned(), ingress, family }, what))
}

fn number(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0, |number, byte| number << 8 | u128::from(*byte))
}

fn range(element: &Element, field: usize) -> Range {
    (number(&element.key[field].first), number(&element.key[field].last))
}

impl Region {
    fn everything(sides: Vec<Side>) -> Region {
        let max = sides.iter().map(|side| side.family.max()).max().unwrap_or(0);
        let ports = (0, u128::from(u16::MAX));
        Region {
            sides,
            peers: vec![(0, max)],
            local: (0, max),
            protocol: (0, 255),
            source_port: ports,
            port: ports,
            with_ports: None,
        }
    }

    /// What one element of a map decides, or could; `None` if it is not a map of rules.
    #[must_use]
    pub fn of_element(table: &Table, map: &Map, element: &Element) -> Option<Region> {
        let (side, what) = side(&map.name)?;
        let mut region = Region::everything(vec![side]);
        region.with_ports = if what.contains("_ports") {
            Some(true)
        } else if what.contains("_other") {
            Some(false)
        } else {
            None
        };
        let fields = fields(what)?;
        assert_eq!(fields.len(), map.key.len(), "this module knows how {} is laid out", map.name);
        for (n, field) in fields.iter().enumerate() {
            match field {
                Field::Class => region.peers = class_members(table, &map.name, element)?,
                _ => region.set(*field, range(element, n)),
            }
        }
        Some(region)
    }

    /// All packets that come through a chain of rules.
    #[must_use]
    pub fn of_chain(name: &str) -> Option<Region> {
        let (device, ingress, what) = parts(name)?;
        let sides = Family::BOTH.map(|family| Side { device: device.to_owned(), ingress, family }).to_vec();
        let mut region = Region::everything(sides);
        region.with_ports = Some(what == "ports");
        Some(region)
    }

    /// Only one value of one field of a map's key.
    pub fn narrow(&mut self, map: &str, field: usize, value: &[u8]) {
        let value = number(value);
        let fields = side(map).and_then(|(_, what)| fields(what));
        if let Some(field) = fields.and_then(|fields| fields.get(field).copied()) {
            self.set(field, (value, value));
        }
    }

    fn set(&mut self, field: Field, range: Range) {
        match field {
            Field::Peer => self.peers = vec![range],
            Field::Local => self.local = range,
            Field::Protocol => self.protocol = range,
            Field::SourcePort => self.source_port = range,
            Field::Port => self.port = range,
            Field::Class => {}
        }
    }
}

/// The peers of the class that an element of a cells map is about.
fn class_members(table: &Table, cells: &str, element: &Element) -> Option<Vec<Range>> {
    // `n0_kw0_in_cells4_ports_values.tag` has its members in `n0_kw0_in_class4_ports_hosts.tag` and `…_blocks.tag`.
    let (stem, tag) = cells.split_once('.')?;
    let stem = stem.rsplit_once('_')?.0.replace("_cells", "_class");
    let class = u32::from_ne_bytes(element.key.first()?.first.as_slice().try_into().ok()?);
    let names = ["hosts", "blocks"].map(|part| format!("{stem}_{part}.{tag}"));
    let maps = table.maps.iter().filter(|map| names.contains(&map.name));
    let members = maps.flat_map(|map| &map.elements).filter(|member| member.data == ElementData::Mark(class));
    Some(members.map(|member| range(member, 0)).collect())
}

/// Where the maps of one side are cut: the first number of each piece.
#[derive(Clone, Debug, Default)]
struct Cuts {
    peer: BTreeSet<u128>,
    local: BTreeSet<u128>,
    protocol: BTreeSet<u128>,
    source_port: BTreeSet<u128>,
    port: BTreeSet<u128>,
}

/// A policy's table with all its edges.
pub struct Space<'a> {
    case: &'a Case,
    table: &'a Table,
    sides: Vec<(Side, Cuts)>,
}

/// The values of each dimension to combine.
struct Axes {
    peer: Vec<u128>,
    local: Vec<u128>,
    protocol: Vec<u128>,
    source_port: Vec<u128>,
    port: Vec<u128>,
}

impl<'a> Space<'a> {
    /// Finds the edges.
    #[must_use]
    pub fn of(case: &'a Case, table: &'a Table) -> Space<'a> {
        let mut sides: Vec<(Side, Cuts)> = Vec::new();
        for device in [HOST_DEVICE, GUEST_DEVICES[0], GUEST_DEVICES[1]] {
            for ingress in [true, false] {
                for family in Family::BOTH {
                    let side = Side { device: device.to_owned(), ingress, family };
                    let cuts = cuts(table, &side);
                    sides.push((side, cuts));
                }
            }
        }
        Space { case, table, sides }
    }

    /// Packets for every element of the table: its cells as other maps cut them, and the edges inside and outside.
    #[must_use]
    pub fn probes(&self, dice: &mut Dice) -> Vec<Trip> {
        let mut out = Vec::new();
        let elements: usize = self.table.maps.iter().map(|map| map.elements.len()).sum();
        let most = (PROBES_PER_TABLE / elements.max(1)).clamp(EDGES_PER_ELEMENT, PROBES_PER_ELEMENT);
        for map in &self.table.maps {
            for element in &map.elements {
                let Some(region) = Region::of_element(self.table, map, element) else { continue };
                let Some(side) = region.sides.first() else { continue };
                let axes = self.axes(side, &region);
                // A service prefix matters only where a rule denies, which may be rare.
                let most = if map.name.contains("_services") { PROBES_PER_SERVICE } else { most };
                match self.combine(side, &axes, most) {
                    Some(all) => out.extend(all),
                    None => (0..most).for_each(|_| out.extend(self.draw(dice, side, &axes))),
                }
                let around = around(&axes, &region);
                (0..EDGES_PER_ELEMENT).for_each(|_| out.extend(self.draw(dice, side, &around)));
            }
        }
        out
    }

    /// One packet for each piece of the region; `None` if there are more than `most`.
    #[must_use]
    pub fn points(&self, region: &Region, most: usize) -> Option<Vec<Trip>> {
        let mut out = Vec::new();
        for side in &region.sides {
            out.extend(self.combine(side, &self.axes(side, region), most)?);
        }
        (out.len() <= most).then_some(out)
    }

    fn axes(&self, side: &Side, region: &Region) -> Axes {
        let none = Cuts::default();
        let cuts = self.sides.iter().find(|(candidate, _)| candidate == side).map_or(&none, |(_, cuts)| cuts);
        let max = side.family.max();
        let pieces = |cuts: &BTreeSet<u128>, (first, last): Range| -> Vec<u128> {
            let mut all: Vec<u128> = cuts.range(first..=last).copied().collect();
            all.extend([first, last]);
            all.sort_unstable();
            all.dedup();
            all
        };
        let mut peer: Vec<u128> =
            region.peers.iter().flat_map(|range| pieces(&cuts.peer, (range.0, range.1.min(max)))).collect();
        peer.dedup();
        let mut local = pieces(&cuts.local, (region.local.0, region.local.1.min(max)));
        if let (Some(guest), false) = (guest(&side.device), side.ingress) {
            // A guest sends from its own addresses; the guard drops everything else before any rule.
            let own = &self.case.checked.spec().instances[HOST + guest].interfaces[0].addresses;
            local = (own.iter().filter(|a| Family::of(**a) == side.family).map(|a| AddrRange::number(*a)))
                .filter(|number| (region.local.0..=region.local.1).contains(number))
                .collect();
        }
        let mut protocol = pieces(&cuts.protocol, region.protocol);
        protocol.retain(|number| region.with_ports.is_none_or(|with| with == matches!(number, 6 | 17)));
        Axes {
            peer,
            local,
            protocol,
            source_port: pieces(&cuts.source_port, region.source_port),
            port: pieces(&cuts.port, region.port),
        }
    }

    /// Every combination, or `None` if there are more than `most`.
    fn combine(&self, side: &Side, axes: &Axes, most: usize) -> Option<Vec<Trip>> {
        let mut out = Vec::new();
        for peer in &axes.peer {
            for local in &axes.local {
                for protocol in &axes.protocol {
                    let kinds = icmp_kinds(*protocol);
                    let with_ports = matches!(protocol, 6 | 17);
                    let (sources, ports) = match with_ports {
                        true => (&axes.source_port[..], &axes.port[..]),
                        false => (&[0][..], &[0][..]),
                    };
                    if out.len() + sources.len() * ports.len() * kinds.len() > most {
                        return None;
                    }
                    for source in sources {
                        for port in ports {
                            out.extend(
                                kinds.iter().map(|icmp| trip(side, *peer, *local, *protocol, *source, *port, *icmp)),
                            );
                        }
                    }
                }
            }
        }
        Some(out)
    }

    /// One combination.
    fn draw(&self, dice: &mut Dice, side: &Side, axes: &Axes) -> Option<Trip> {
        if axes.peer.is_empty() || axes.local.is_empty() || axes.protocol.is_empty() {
            return None;
        }
        let protocol = *dice.pick(&axes.protocol);
        let (source, port) = match protocol {
            6 | 17 => (*dice.pick(&axes.source_port), *dice.pick(&axes.port)),
            _ => (0, 0),
        };
        let icmp = *dice.pick(icmp_kinds(protocol));
        Some(trip(side, *dice.pick(&axes.peer), *dice.pick(&axes.local), protocol, source, port, icmp))
    }
}

/// The bounds of the region's ranges, and the numbers just beyond them.
fn around(axes: &Axes, region: &Region) -> Axes {
    let edges = |(first, last): Range, most: u128| -> Vec<u128> {
        vec![first.saturating_sub(1), first, last.min(most), last.saturating_add(1).min(most)]
    };
    let max = region.sides.iter().map(|side| side.family.max()).min().unwrap_or(0);
    let ports = u128::from(u16::MAX);
    Axes {
        peer: region.peers.iter().flat_map(|range| edges(*range, max)).collect(),
        local: axes.local.clone(),
        protocol: edges(region.protocol, 255),
        source_port: edges(region.source_port, ports),
        port: edges(region.port, ports),
    }
}

fn cuts(table: &Table, wanted: &Side) -> Cuts {
    let mut cuts = Cuts::default();
    cuts.port.extend(SPECIAL_PORTS);
    cuts.source_port.extend(SPECIAL_PORTS);
    cuts.protocol.extend(SPECIAL_PROTOCOLS);
    for map in &table.maps {
        let Some((side, what)) = side(&map.name) else { continue };
        let Some(fields) = fields(what).filter(|_| side == *wanted) else { continue };
        for element in &map.elements {
            for (n, field) in fields.iter().enumerate() {
                let set = match field {
                    Field::Peer => &mut cuts.peer,
                    Field::Local => &mut cuts.local,
                    Field::Protocol => &mut cuts.protocol,
                    Field::SourcePort => &mut cuts.source_port,
                    Field::Port => &mut cuts.port,
                    Field::Class => continue,
                };
                let (first, last) = range(element, n);
                set.extend([first, last.saturating_add(1)]);
            }
        }
    }
    cuts
}

fn guest(device: &str) -> Option<usize> {
    GUEST_DEVICES.iter().position(|name| *name == device).map(|n| n + 1)
}

/// ICMP types that rules decide, and those that are never blocked.
fn icmp_kinds(protocol: u128) -> &'static [Option<(u8, u8)>] {
    match protocol {
        1 => &[Some((8, 0)), Some((3, 4))],
        58 => &[Some((128, 0)), Some((135, 0)), Some((134, 0))],
        _ => &[None],
    }
}

#[expect(clippy::cast_possible_truncation, reason = "axes keep protocols below 256 and ports below 65,536")]
fn trip(
    side: &Side,
    peer: u128,
    local: u128,
    protocol: u128,
    source: u128,
    port: u128,
    icmp: Option<(u8, u8)>,
) -> Trip {
    let address = |number: u128| -> IpAddr { AddrRange::address(side.family, number) };
    let (peer, local) = (address(peer), address(local));
    let path = match (guest(&side.device), side.ingress) {
        (None, true) => Path::Input,
        (None, false) => Path::Output,
        (Some(_), true) => Path::ToGuest,
        (Some(_), false) => Path::FromGuest,
    };
    let (source_address, destination) = if side.ingress { (peer, local) } else { (local, peer) };
    Trip {
        path,
        guest: guest(&side.device).unwrap_or(1),
        source: source_address,
        destination,
        protocol: protocol as u8,
        source_port: source as u16,
        destination_port: port as u16,
        icmp,
    }
}
