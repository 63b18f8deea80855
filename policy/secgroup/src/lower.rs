//! Intent to nf_tables: [`crate::cells`] laid out as maps, and the chains around them.
//!
//! ```text
//!  base chain (input, forward, output; policy accept; the only chains whose rules are ever replaced)
//!    cut sessions ──▶ drop        established ──▶ accept       related ICMP ──▶ accept
//!    invalid on a protected device ──▶ drop
//!    device map ──▶ one dispatch chain per device and direction
//!                     icmp, udp: what groups never block ──▶ return
//!                     tcp, udp   ─▶ ports chain: exact map, peer map, any map, default
//!                     all others ─▶ other chain: the same without ports
//!                        each ends in  allow: session limit, log, return   or   deny: log, drop
//! ```
//!
//! `return` and not `accept` lets a packet on, because forwarded traffic passes two interfaces and both must
//! agree. Devices that nobody attached fall through every map and are left alone.
//!
//! All but the base chains carry the `tag` in their name, so that a new version can be built beside the old
//! one and switched to in one small transaction (packet-path.md §3).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use keepwall_core::{AddrRange, Family, Prefix};
use keepwall_ir::nft::{
    Base, Chain, CmpOp, CtKey, CtTimeout, Element, ElementData, Expr, FieldRange, FieldType, Hook, LookupInto, Map,
    MapData, Meta, PayloadBase, Rule, TABLE_OWNER, TABLE_PERSIST, Table, TableFamily, Verdict, ifname,
};

use crate::cells::{self, Class, Flat, Slot};
use crate::intent::{Attachment, Intent, IntentPeer};
use crate::spec::{Direction, Policy};

/// The name of our table, in every family that has one.
pub const TABLE: &str = "keepwall";
/// The nfnetlink_log group that flow records go to.
pub const LOG_GROUP: u16 = 4242;
/// The bit of the connection mark that says "cut". One bit, set and cleared under a mask, so that others'
/// marks stay as they are.
pub const CUT_MARK: u32 = 0x4000_0000;
/// Connection states as `ct state` gives them.
const INVALID: u32 = 1;
const ESTABLISHED: u32 = 2;
const RELATED: u32 = 4;
/// Our base chains run just before the usual `filter` priority: what we drop, nobody needs to look at.
const PRIORITY: i32 = -5;
/// Up to this many elements peers and cells are multiplied out into one map; above, if that saves elements, there is a
/// map from peer to class and one of (class, port, protocol). One lookup is faster than two.
const DIRECT_MAX: usize = 4_096;
/// Ranges are kept in a structure that the kernel copies for each change and walks in time that grows with them: above
/// this many, classes are preferred if that saves elements.
const DIRECT_RANGES_MAX: usize = 512;
/// Up to this many cells, single values stay with the ranges among them.
const TOGETHER_MAX: usize = 16;
/// Up to this many devices are compared one after the other; more are looked up.
const DEVICES_COMPARED_MAX: usize = 4;
/// Bytes of each logged packet that are copied: IPv6 header, extension headers, TCP header.
const SNAPLEN: u32 = 128;

/// A table, and what its elements mean.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// For the driver.
    pub table: Table,
    /// Which rule each element of a counting map stands for: rule ids, in the order of the map's elements.
    legend: BTreeMap<String, Vec<Arc<str>>>,
    /// Maps whose elements may change in place, with the packets that ask them: see [`Lowered::differs_in_place`].
    lanes: BTreeMap<String, Lane>,
}

/// A family, and whether the protocol has ports: each packet is of one lane.
type Lane = (Family, bool);

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

/// Lowers an intent. Equal intents and tags give equal tables.
///
/// # Errors
/// [`TooLarge`]; nothing is lowered then.
pub fn lower(intent: &Intent, tag: &str) -> Result<Lowered, Box<TooLarge>> {
    let mut build = Build {
        intent,
        tag,
        left: 0,
        legend: BTreeMap::new(),
        lanes: BTreeMap::new(),
        table: Table {
            family: TableFamily::Inet,
            name: TABLE.to_owned(),
            flags: TABLE_OWNER | TABLE_PERSIST,
            maps: Vec::new(),
            chains: Vec::new(),
            timeouts: Vec::new(),
        },
    };
    build.shared();
    let mut devices = Devices::default();
    for (n, attachment) in intent.attachments.iter().enumerate() {
        let slug = slug(n, &attachment.device);
        build.attachment(attachment, &slug, &mut devices)?;
    }
    build.base_chains(&devices);
    let mut table = build.table;
    table.maps.sort_by(|a, b| a.name.cmp(&b.name));
    table.chains.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Lowered { table, legend: build.legend, lanes: build.lanes })
}

/// A piece of a chain name for a device: unique by its number, readable by its name.
fn slug(n: usize, device: &str) -> String {
    let device: String = device.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("n{n}_{device}")
}

/// Where each hook sends each device: device to chain.
#[derive(Default)]
struct Devices {
    guard: Vec<(String, String)>,
    input: Vec<(String, String)>,
    output: Vec<(String, String)>,
    forward_in: Vec<(String, String)>,
    forward_out: Vec<(String, String)>,
}

struct Build<'a> {
    intent: &'a Intent,
    tag: &'a str,
    table: Table,
    /// Elements that the rules of the present interface may still take, both directions and families together.
    left: usize,
    legend: BTreeMap<String, Vec<Arc<str>>>,
    lanes: BTreeMap<String, Lane>,
}

fn rule(exprs: Vec<Expr>, comment: impl Into<String>) -> Rule {
    Rule { exprs, comment: comment.into() }
}

fn cmp(sreg: u8, data: impl Into<Vec<u8>>) -> Expr {
    Expr::Cmp { sreg, op: CmpOp::Eq, data: data.into() }
}

fn goto(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Goto(chain.to_owned()))
}

fn jump(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Jump(chain.to_owned()))
}

fn l4proto(number: u8) -> [Expr; 2] {
    [Expr::Meta { key: Meta::L4Proto, dreg: 0 }, cmp(0, [number])]
}

fn nfproto(family: Family) -> [Expr; 2] {
    let number = if family == Family::Ipv4 { 2 } else { 10 };
    [Expr::Meta { key: Meta::NfProto, dreg: 0 }, cmp(0, [number])]
}

fn transport(offset: u32, len: u32, dreg: u8) -> Expr {
    Expr::Payload { base: PayloadBase::Transport, offset, len, dreg }
}

fn network(offset: u32, len: u32, dreg: u8) -> Expr {
    Expr::Payload { base: PayloadBase::Network, offset, len, dreg }
}

/// The source or destination address of the packet.
fn address(family: Family, source: bool, dreg: u8) -> Expr {
    match (family, source) {
        (Family::Ipv4, true) => network(12, 4, dreg),
        (Family::Ipv4, false) => network(16, 4, dreg),
        (Family::Ipv6, true) => network(8, 16, dreg),
        (Family::Ipv6, false) => network(24, 16, dreg),
    }
}

fn bytes(family: Family, number: u128) -> Vec<u8> {
    match AddrRange::address(family, number) {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn address_type(family: Family) -> FieldType {
    match family {
        Family::Ipv4 => FieldType::Ipv4Addr,
        Family::Ipv6 => FieldType::Ipv6Addr,
    }
}

/// ICMP type (and code) for both families, as never-blocked rules need it.
fn icmp(protocol: u8, kind: u8, code: Option<u8>) -> Vec<Expr> {
    let mut exprs = l4proto(protocol).to_vec();
    match code {
        Some(code) => exprs.extend([transport(0, 2, 0), cmp(0, [kind, code])]),
        None => exprs.extend([transport(0, 1, 0), cmp(0, [kind])]),
    }
    exprs
}

/// Where a map's key fields come from, seen from one direction and hook.
#[derive(Clone, Copy, PartialEq, Eq)]
enum View {
    /// Towards the instance, as the packet is.
    In,
    /// From the instance, as the packet is.
    Out,
    /// Towards a host through its forward hook: this side as it was before destination NAT, so that a port that
    /// a container publishes is judged by the port that the client asked for.
    PublishedIn,
}

impl View {
    fn local(self, family: Family, dreg: u8) -> Expr {
        match (self, family) {
            (View::In, _) => address(family, false, dreg),
            (View::Out, _) => address(family, true, dreg),
            (View::PublishedIn, Family::Ipv4) => Expr::Ct { key: CtKey::OriginalDst4, dreg },
            (View::PublishedIn, Family::Ipv6) => Expr::Ct { key: CtKey::OriginalDst6, dreg },
        }
    }

    fn peer(self, family: Family, dreg: u8) -> Expr {
        address(family, self != View::Out, dreg)
    }

    fn destination_port(self, dreg: u8) -> Expr {
        match self {
            View::PublishedIn => Expr::Ct { key: CtKey::OriginalDport, dreg },
            View::In | View::Out => transport(2, 2, dreg),
        }
    }
}

/// The maps of one direction, family and kind (with ports or without), in the order in which they are asked.
#[derive(Default)]
struct Maps {
    exact: Vec<String>,
    peer: Vec<PeerMap>,
    any: Vec<String>,
}

enum PeerMap {
    /// (peer, port, protocol) to verdict.
    Direct(String),
    /// Peer to class, then (class, port, protocol) to verdict.
    Classes { classes: String, cells: String },
}

impl Build<'_> {
    fn name(&self, parts: &[&str]) -> String {
        format!("{}.{}", parts.join("_"), self.tag)
    }

    fn chain(&mut self, name: String, rules: Vec<Rule>) -> String {
        self.table.chains.push(Chain { name: name.clone(), base: None, rules });
        name
    }

    /// A rate-limited record of the packet, or nothing if records are switched off.
    fn log(&self, prefix: String) -> Option<Rule> {
        let per_s = self.intent.flow_log_per_s;
        (per_s > 0).then(|| {
            rule(
                vec![
                    Expr::Limit { per_s: u64::from(per_s), burst: per_s, over: false },
                    Expr::Log { group: LOG_GROUP, prefix, snaplen: SNAPLEN },
                ],
                "",
            )
        })
    }

    /// Drop, or in observe mode let pass.
    fn denial(&self) -> Expr {
        Expr::Verdict(if self.intent.observe { Verdict::Return } else { Verdict::Drop })
    }

    /// Chains that every device uses.
    fn shared(&mut self) {
        let pmtu: Vec<Rule> = [icmp(1, 3, Some(4)), icmp(58, 2, None)]
            .into_iter()
            .map(|mut exprs| {
                exprs.push(Expr::Verdict(Verdict::Accept));
                rule(exprs, "a path-MTU error is never blocked")
            })
            .collect();
        let mut invalid = pmtu;
        for (key, name) in [(Meta::IifName, "protected_in"), (Meta::OifName, "protected_out")] {
            let map = self.name(&[name]);
            let deny = self.name(&["invalid_drop"]);
            invalid.push(rule(
                vec![
                    Expr::Meta { key, dreg: 0 },
                    Expr::Lookup { map, sreg: 0, into: LookupInto::Nothing, invert: false },
                    goto(&deny),
                ],
                "",
            ));
        }
        let name = self.name(&["invalid"]);
        self.chain(name, invalid);
        for (what, prefix, comment) in
            [("invalid_drop", "kw1 invalid", "belongs to no session"), ("cut", "kw1 cut", "its rule is gone")]
        {
            let mut rules: Vec<Rule> = self.log(prefix.to_owned()).into_iter().collect();
            let denial = self.denial();
            rules.push(rule(vec![Expr::Counter { packets: 0, bytes: 0 }, denial], comment));
            let name = self.name(&[what]);
            self.chain(name, rules);
        }
        let state = |state: u32| [Expr::Ct { key: CtKey::State, dreg: 0 }, cmp(0, state.to_ne_bytes())];
        let mut known = vec![rule(
            vec![
                Expr::Ct { key: CtKey::Mark, dreg: 0 },
                Expr::Bitwise { sreg: 0, dreg: 0, mask: CUT_MARK.to_ne_bytes().to_vec(), xor: vec![0; 4] },
                cmp(0, CUT_MARK.to_ne_bytes()),
                goto(&self.name(&["cut"])),
            ],
            "",
        )];
        let mut established = state(ESTABLISHED).to_vec();
        established.push(Expr::Verdict(Verdict::Accept));
        known.push(rule(established, ""));
        // Only errors about a session are related here; a helper's data channel has to have a rule of its own.
        for protocol in [1, 58] {
            let mut related = state(RELATED).to_vec();
            related.extend(l4proto(protocol));
            related.push(Expr::Verdict(Verdict::Accept));
            known.push(rule(related, "an error about a session"));
        }
        let mut invalid = state(INVALID).to_vec();
        invalid.push(goto(&self.name(&["invalid"])));
        known.push(rule(invalid, ""));
        let name = self.name(&["known"]);
        self.chain(name, known);
        self.session_limits();
    }

    /// `ct timeout` objects and the chain that gives them to new sessions.
    fn session_limits(&mut self) {
        let Some(idle) = self.intent.session_idle_s else { return };
        let mut rules = Vec::new();
        for family in Family::BOTH {
            for protocol in [6u8, 17] {
                let (l3, v) = if family == Family::Ipv4 { (2, "4") } else { (10, "6") };
                // CTA_TIMEOUT_TCP_ESTABLISHED is 3, UDP_UNREPLIED 1, UDP_REPLIED 2; the kernel's own UDP limits
                // (30 s, 120 s) are only ever shortened.
                let (name, policy) = match protocol {
                    6 => ("tcp", vec![(3, idle)]),
                    _ => ("udp", vec![(1, idle.min(30)), (2, idle.min(120))]),
                };
                let name = self.name(&["idle", &format!("{name}{v}")]);
                self.table.timeouts.push(CtTimeout { name: name.clone(), l4proto: protocol, l3proto: l3, policy });
                let mut exprs = nfproto(family).to_vec();
                exprs.extend(l4proto(protocol));
                exprs.push(Expr::CtTimeoutSet { name });
                rules.push(rule(exprs, ""));
            }
        }
        let name = self.name(&["session"]);
        self.chain(name, rules);
    }

    fn attachment(&mut self, attachment: &Attachment, slug: &str, devices: &mut Devices) -> Result<(), Box<TooLarge>> {
        let device = attachment.device.clone();
        self.left = self.intent.elements_max as usize;
        let ingress = self.direction(attachment, slug, Direction::Ingress)?;
        let egress = self.direction(attachment, slug, Direction::Egress)?;
        if attachment.guest {
            // The guest's ingress is what leaves by its device, its egress what comes in by it.
            devices.input.push((device.clone(), egress.plain.clone()));
            devices.forward_in.push((device.clone(), egress.plain));
            devices.output.push((device.clone(), ingress.plain.clone()));
            devices.forward_out.push((device.clone(), ingress.plain));
            let guard = self.guard(attachment, slug);
            devices.guard.push((device, guard));
        } else {
            devices.input.push((device.clone(), ingress.plain));
            devices.output.push((device.clone(), egress.plain));
            devices.forward_in.push((device.clone(), ingress.published));
            devices.forward_out.push((device, egress.published));
        }
        Ok(())
    }

    /// A guest sends from its own addresses only.
    fn guard(&mut self, attachment: &Attachment, slug: &str) -> String {
        let spoofed = self.name(&[slug, "spoofed"]);
        let mut rules: Vec<Rule> = self.log(format!("kw1 {} spoofed", attachment.device)).into_iter().collect();
        let denial = self.denial();
        rules.push(rule(vec![Expr::Counter { packets: 0, bytes: 0 }, denial], "not the guest's own address"));
        self.chain(spoofed.clone(), rules);

        let mut rules = Vec::new();
        if let Some(mac) = attachment.mac {
            // ARPHRD_ETHER is 1, in host order; devices without Ethernet frames have no address to forge.
            rules.push(rule(
                vec![
                    Expr::Meta { key: Meta::IifType, dreg: 0 },
                    cmp(0, 1u16.to_ne_bytes()),
                    Expr::Payload { base: PayloadBase::Link, offset: 6, len: 6, dreg: 0 },
                    Expr::Cmp { sreg: 0, op: CmpOp::Neq, data: mac.to_vec() },
                    goto(&spoofed),
                ],
                "another guest's MAC address",
            ));
        }
        // A guest that advertises itself as a router, or redirects, would take over others' traffic.
        for kind in [134, 137] {
            let mut router = nfproto(Family::Ipv6).to_vec();
            router.extend(icmp(58, kind, None));
            router.push(goto(&spoofed));
            rules.push(rule(router, "a guest is no router"));
        }
        // DHCP asks from 0.0.0.0, duplicate address detection and MLD from ::, neighbour discovery from fe80::/10.
        let mut dhcp = nfproto(Family::Ipv4).to_vec();
        dhcp.extend([address(Family::Ipv4, true, 0), cmp(0, [0; 4])]);
        dhcp.extend(l4proto(17));
        dhcp.extend([transport(0, 4, 0), cmp(0, [0, 68, 0, 67]), Expr::Verdict(Verdict::Return)]);
        rules.push(rule(dhcp, "DHCP"));
        let mut unspecified = nfproto(Family::Ipv6).to_vec();
        unspecified.extend([address(Family::Ipv6, true, 0), cmp(0, [0; 16])]);
        unspecified.extend(l4proto(58));
        unspecified.push(Expr::Verdict(Verdict::Return));
        rules.push(rule(unspecified, "duplicate address detection"));
        let mut link_local = nfproto(Family::Ipv6).to_vec();
        link_local.extend([
            network(8, 2, 0),
            Expr::Bitwise { sreg: 0, dreg: 0, mask: vec![0xff, 0xc0], xor: vec![0, 0] },
            cmp(0, [0xfe, 0x80]),
            Expr::Verdict(Verdict::Return),
        ]);
        rules.push(rule(link_local, "link-local"));
        for family in Family::BOTH {
            let own: Vec<IpAddr> = attachment.addresses.iter().copied().filter(|a| Family::of(*a) == family).collect();
            if own.is_empty() {
                continue;
            }
            let name = self.name(&[slug, if family == Family::Ipv4 { "own4" } else { "own6" }]);
            let keys = own.iter().map(|a| vec![FieldRange::exact(bytes(family, AddrRange::number(*a)))]);
            self.map(
                &name,
                vec![address_type(family)],
                false,
                MapData::Nothing,
                keys.map(|key| (key, ElementData::Nothing, None)).collect(),
            );
            let mut exprs = nfproto(family).to_vec();
            exprs.extend([
                address(family, true, 0),
                Expr::Lookup { map: name, sreg: 0, into: LookupInto::Nothing, invert: false },
                Expr::Verdict(Verdict::Return),
            ]);
            rules.push(rule(exprs, "the guest's own address"));
        }
        rules.push(rule(vec![goto(&spoofed)], ""));
        let name = self.name(&[slug, "guard"]);
        self.chain(name, rules)
    }

    fn map(&mut self, name: &str, key: Vec<FieldType>, interval: bool, data: MapData, mut elements: Vec<NewElement>) {
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
    fn cell_maps(&mut self, stem: &[&str], lane: Lane, key: Vec<FieldType>, elements: Vec<NewElement>) -> Vec<String> {
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

    fn direction(
        &mut self,
        attachment: &Attachment,
        slug: &str,
        direction: Direction,
    ) -> Result<DirectionChains, Box<TooLarge>> {
        let way = match direction {
            Direction::Ingress => "in",
            Direction::Egress => "out",
        };
        let slug = format!("{slug}_{way}");
        let allow = self.allow_chain(attachment, &slug, way);
        let deny = self.deny_chain(attachment, &slug, way, direction, &allow);
        let mut maps = Vec::new();
        for family in Family::BOTH {
            let [ports, other] = self.maps(attachment, &slug, direction, family, &allow, &deny)?;
            maps.push(((family, true), ports));
            maps.push(((family, false), other));
        }
        let default = match attachment.default_policy(direction) {
            Policy::Accept => &allow,
            Policy::Drop => &deny,
        };
        let view = match direction {
            Direction::Ingress => View::In,
            Direction::Egress => View::Out,
        };
        let plain = self.dispatch(attachment, &slug, direction, view, &maps, &deny, default);
        if attachment.guest {
            return Ok(DirectionChains { published: plain.clone(), plain });
        }
        // Forwarded through a host's own device. What goes to or comes from a guest is the guest's business;
        // the rest (containers, VPNs) enters or leaves the instance and is judged as such.
        let guests: Vec<String> =
            self.intent.attachments.iter().filter(|a| a.guest).map(|a| a.device.clone()).collect();
        let inner = match direction {
            Direction::Ingress => {
                self.dispatch(attachment, &format!("{slug}_fwd"), direction, View::PublishedIn, &maps, &deny, default)
            }
            Direction::Egress => plain.clone(),
        };
        let mut rules = Vec::new();
        if !guests.is_empty() {
            let name = self.name(&[&slug, "guests"]);
            let keys =
                guests.iter().map(|device| (vec![FieldRange::exact(ifname(device))], ElementData::Nothing, None));
            self.map(&name, vec![FieldType::IfName], false, MapData::Nothing, keys.collect());
            let key = if direction == Direction::Ingress { Meta::OifName } else { Meta::IifName };
            rules.push(rule(
                vec![
                    Expr::Meta { key, dreg: 0 },
                    Expr::Lookup { map: name, sreg: 0, into: LookupInto::Nothing, invert: false },
                    Expr::Verdict(Verdict::Return),
                ],
                "a guest's own rules decide",
            ));
        }
        rules.push(rule(vec![goto(&inner)], ""));
        let name = self.name(&[&slug, "forward"]);
        let published = self.chain(name, rules);
        Ok(DirectionChains { plain, published })
    }

    fn allow_chain(&mut self, attachment: &Attachment, slug: &str, way: &str) -> String {
        let mut rules = Vec::new();
        if self.intent.session_idle_s.is_some() {
            rules.push(rule(vec![jump(&self.name(&["session"]))], ""));
        }
        rules.extend(self.log(format!("kw1 {} {way} accept", attachment.device)));
        let name = self.name(&[slug, "allow"]);
        self.chain(name, rules)
    }

    fn deny_chain(
        &mut self,
        attachment: &Attachment,
        slug: &str,
        way: &str,
        direction: Direction,
        allow: &str,
    ) -> String {
        let mut rules = Vec::new();
        if direction == Direction::Egress {
            for family in Family::BOTH {
                let prefixes = ranges_of(&self.intent.service_prefixes, family);
                if prefixes.is_empty() {
                    continue;
                }
                let name = self.name(&[slug, if family == Family::Ipv4 { "services4" } else { "services6" }]);
                let keys = prefixes.iter().map(|r| {
                    (vec![FieldRange::new(bytes(family, r.0), bytes(family, r.1))], ElementData::Nothing, None)
                });
                self.map(&name, vec![address_type(family)], true, MapData::Nothing, keys.collect());
                let mut exprs = nfproto(family).to_vec();
                exprs.extend([
                    address(family, false, 0),
                    Expr::Lookup { map: name, sreg: 0, into: LookupInto::Nothing, invert: false },
                    goto(allow),
                ]);
                rules.push(rule(exprs, "a service prefix is never blocked"));
            }
        }
        rules.extend(self.log(format!("kw1 {} {way} drop", attachment.device)));
        let denial = self.denial();
        rules.push(rule(vec![denial], ""));
        let name = self.name(&[slug, "deny"]);
        self.chain(name, rules)
    }

    /// The chain that a device map leads to.
    #[expect(clippy::too_many_arguments, reason = "what one direction of one device is made of")]
    fn dispatch(
        &mut self,
        attachment: &Attachment,
        slug: &str,
        direction: Direction,
        view: View,
        maps: &[(Lane, Maps)],
        deny: &str,
        default: &str,
    ) -> String {
        let default_rule = |chain: &str| {
            rule(vec![Expr::Counter { packets: 0, bytes: 0 }, goto(chain)], "no rule matches: the group type's default")
        };
        let mut ports = Vec::new();
        if direction == Direction::Egress && self.intent.block_outbound_smtp {
            let mut exprs = l4proto(6).to_vec();
            exprs.extend([view.destination_port(0), cmp(0, 25u16.to_be_bytes()), goto(deny)]);
            ports.push(rule(exprs, "settings.block_outbound_smtp"));
        }
        let mut other = Vec::new();
        for (lane, maps) in maps {
            lookups(*lane, view, maps, if lane.1 { &mut ports } else { &mut other });
        }
        ports.push(default_rule(default));
        other.push(default_rule(default));
        let ports_name = self.name(&[slug, "ports"]);
        let ports = self.chain(ports_name, ports);
        let other_name = self.name(&[slug, "other"]);
        let other = self.chain(other_name, other);

        let udp_name = self.name(&[slug, "udp"]);
        let mut udp = Vec::new();
        for (family, server, client) in [(Family::Ipv4, 67u16, 68u16), (Family::Ipv6, 547, 546)] {
            let (source, destination) = match direction {
                Direction::Ingress => (server, client),
                Direction::Egress => (client, server),
            };
            let both: Vec<u8> = [source.to_be_bytes(), destination.to_be_bytes()].concat();
            // The ports first: hardly any packet gets to the second comparison.
            let mut exprs = vec![transport(0, 4, 0), cmp(0, both)];
            exprs.extend(nfproto(family));
            exprs.push(Expr::Verdict(Verdict::Return));
            udp.push(rule(exprs, "DHCP is never blocked"));
        }
        udp.push(rule(vec![goto(&ports)], ""));
        let udp = self.chain(udp_name, udp);

        let icmp_name = self.name(&[slug, "icmp"]);
        let mut exprs = nfproto(Family::Ipv4).to_vec();
        exprs.extend([transport(0, 2, 0), cmp(0, [3, 4]), Expr::Verdict(Verdict::Return)]);
        let icmp = vec![rule(exprs, "a path-MTU error is never blocked"), rule(vec![goto(&other)], "")];
        let icmp = self.chain(icmp_name, icmp);

        let icmp6_name = self.name(&[slug, "icmp6"]);
        let mut never = vec![2u8, 130, 131, 132, 133, 134, 135, 136, 143];
        if attachment.guest && direction == Direction::Egress {
            never.retain(|kind| *kind != 134);
        }
        let never_name = self.name(&[slug, "never"]);
        let keys = never.iter().map(|kind| (vec![FieldRange::exact([*kind])], ElementData::Nothing, None));
        self.map(&never_name, vec![FieldType::Icmpv6Type], false, MapData::Nothing, keys.collect());
        let mut exprs = nfproto(Family::Ipv6).to_vec();
        exprs.extend([
            transport(0, 1, 0),
            Expr::Lookup { map: never_name, sreg: 0, into: LookupInto::Nothing, invert: false },
            Expr::Verdict(Verdict::Return),
        ]);
        let icmp6 = vec![
            rule(exprs, "path-MTU errors, neighbour discovery and MLD are never blocked"),
            rule(vec![goto(&other)], ""),
        ];
        let icmp6 = self.chain(icmp6_name, icmp6);

        // Most packets are TCP, and a comparison is cheaper than any lookup.
        let mut rules: Vec<Rule> = [(6u8, &ports), (17, &udp), (1, &icmp), (58, &icmp6)]
            .into_iter()
            .map(|(number, chain)| {
                let mut exprs = l4proto(number).to_vec();
                exprs.push(goto(chain));
                rule(exprs, "")
            })
            .collect();
        rules.push(rule(vec![goto(&other)], ""));
        let name = self.name(&[slug]);
        self.chain(name, rules)
    }

    /// The maps with ports, and those without.
    fn maps(
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

    fn base_chains(&mut self, devices: &Devices) {
        for (name, lists) in [
            ("protected_in", [&devices.input, &devices.forward_in]),
            ("protected_out", [&devices.output, &devices.forward_out]),
        ] {
            let mut keys: Vec<Vec<u8>> =
                lists.iter().flat_map(|l| l.iter().map(|(device, _)| ifname(device))).collect();
            keys.sort();
            keys.dedup();
            let name = self.name(&[name]);
            let elements = keys.into_iter().map(|key| (vec![FieldRange::exact(key)], ElementData::Nothing, None));
            self.map(&name, vec![FieldType::IfName], false, MapData::Nothing, elements.collect());
        }
        if !devices.guard.is_empty() {
            let lookup = self.device_rules("guard", Meta::IifName, &devices.guard);
            self.base("guard", Hook::Prerouting, -300, lookup);
        }
        let chains = [
            ("input", Hook::Input, vec![("input", Meta::IifName, &devices.input)]),
            ("output", Hook::Output, vec![("output", Meta::OifName, &devices.output)]),
            (
                "forward",
                Hook::Forward,
                vec![
                    ("forward_in", Meta::IifName, &devices.forward_in),
                    ("forward_out", Meta::OifName, &devices.forward_out),
                ],
            ),
        ];
        for (chain, hook, lookups) in chains {
            let mut rules = vec![self.known_sessions()];
            for (map, key, list) in lookups {
                rules.extend(self.device_rules(map, key, list));
            }
            self.base(chain, hook, PRIORITY, rules);
        }
    }

    /// What each hook asks first. A packet that opens a session passes by with one comparison.
    fn known_sessions(&self) -> Rule {
        const KNOWN: u32 = INVALID | ESTABLISHED | RELATED;
        rule(
            vec![
                Expr::Ct { key: CtKey::State, dreg: 0 },
                Expr::Bitwise { sreg: 0, dreg: 0, mask: KNOWN.to_ne_bytes().to_vec(), xor: vec![0; 4] },
                Expr::Cmp { sreg: 0, op: CmpOp::Neq, data: vec![0; 4] },
                jump(&self.name(&["known"])),
            ],
            "",
        )
    }

    /// To each device's chain: compared one by one if they are few, else looked up.
    fn device_rules(&mut self, name: &str, key: Meta, list: &[(String, String)]) -> Vec<Rule> {
        if list.len() <= DEVICES_COMPARED_MAX {
            return (list.iter())
                .map(|(device, chain)| rule(vec![Expr::Meta { key, dreg: 0 }, cmp(0, ifname(device)), jump(chain)], ""))
                .collect();
        }
        let name = self.name(&["devices", name]);
        let elements = (list.iter())
            .map(|(device, chain)| {
                (vec![FieldRange::exact(ifname(device))], ElementData::Verdict(Verdict::Jump(chain.clone())), None)
            })
            .collect();
        self.map(&name, vec![FieldType::IfName], false, MapData::Verdict, elements);
        let lookup = Expr::Lookup { map: name, sreg: 0, into: LookupInto::Verdict, invert: false };
        vec![rule(vec![Expr::Meta { key, dreg: 0 }, lookup], "")]
    }

    fn base(&mut self, name: &str, hook: Hook, priority: i32, rules: Vec<Rule>) {
        let base = Base { kind: "filter".to_owned(), hook, priority, accept: true };
        self.table.chains.push(Chain { name: name.to_owned(), base: Some(base), rules });
    }
}

/// Key, data, and the rule that it stands for, if it does.
type NewElement = (Vec<FieldRange>, ElementData, Option<Of>);

/// The rule that an element stands for.
#[derive(Clone)]
struct Of {
    id: Arc<str>,
    comment: Arc<str>,
}

struct DirectionChains {
    /// For packets that start or end at this machine, and for guests.
    plain: String,
    /// For packets forwarded through a host's own device.
    published: String,
}

/// Port before protocol: thousands of cells share a protocol, and what many cells share makes the kernel's walk over
/// ranges slow if it comes first.
fn slot_key(slot: Slot) -> impl Iterator<Item = FieldRange> {
    let (port, protocol) = match slot {
        Slot::Ports { protocol, first, last } => {
            (Some(FieldRange::new(first.to_be_bytes(), last.to_be_bytes())), FieldRange::exact([protocol]))
        }
        Slot::Protocols { first, last } => (None, FieldRange::new([first], [last])),
    };
    port.into_iter().chain([protocol])
}

/// True if the slot is a single value in each of its fields.
fn is_value(slot: Slot) -> bool {
    match slot {
        Slot::Ports { first, last, .. } => first == last,
        Slot::Protocols { first, last } => first == last,
    }
}

/// A label as far as nft can show it.
fn comment(label: &str) -> String {
    let mut comment: String = label.chars().take(60).collect();
    while comment.len() > keepwall_ir::nft::COMMENT_MAX {
        comment.pop();
    }
    comment
}

/// One rule per map, most specific kind first.
fn lookups((family, with_ports): Lane, view: View, maps: &Maps, out: &mut Vec<Rule>) {
    let regs = address_type(family).regs();
    let vmap = |map: &str| Expr::Lookup { map: map.to_owned(), sreg: 0, into: LookupInto::Verdict, invert: false };
    // Key fields behind the address or class: the destination port, where there is one, and the protocol.
    let slot = |first: u8| {
        let port = with_ports.then(|| view.destination_port(first));
        port.into_iter().chain([Expr::Meta { key: Meta::L4Proto, dreg: first + u8::from(with_ports) }])
    };
    let mut add = |exprs: Vec<Expr>, comment: &str| {
        out.push(rule(nfproto(family).into_iter().chain(exprs).collect(), comment));
    };
    for map in &maps.exact {
        let mut exprs = vec![view.peer(family, 0), view.local(family, regs)];
        if with_ports {
            exprs.push(transport(0, 2, 2 * regs));
        }
        exprs.extend(slot(2 * regs + u8::from(with_ports)));
        exprs.push(vmap(map));
        add(exprs, "rules about both sides");
    }
    for map in &maps.peer {
        match map {
            PeerMap::Direct(map) => {
                let mut exprs = vec![view.peer(family, 0)];
                exprs.extend(slot(regs));
                exprs.push(vmap(map));
                add(exprs, "rules about some peers");
            }
            PeerMap::Classes { classes, cells } => {
                // nft 1.0.6 aborts when it lists a looked-up register inside a concatenation, unless the register was
                // loaded from a packet field; so the class passes through the packet mark, which is put back before
                // anything can break off (ADR 8).
                let mut exprs = vec![
                    Expr::Meta { key: Meta::Mark, dreg: 8 },
                    view.peer(family, 0),
                    Expr::Lookup { map: classes.clone(), sreg: 0, into: LookupInto::Register(0), invert: false },
                    Expr::MarkSet { sreg: 0 },
                    Expr::Meta { key: Meta::Mark, dreg: 0 },
                    Expr::MarkSet { sreg: 8 },
                ];
                exprs.extend(slot(1));
                exprs.push(vmap(cells));
                add(exprs, "rules about some peers, by class");
            }
        }
    }
    for map in &maps.any {
        let mut exprs: Vec<Expr> = slot(0).collect();
        exprs.push(vmap(map));
        add(exprs, "rules about every peer");
    }
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

fn too_large(
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
