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

use std::collections::HashMap;
use std::net::IpAddr;

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
/// Our base chains run just before the usual `filter` priority: what we drop, nobody needs to look at.
const PRIORITY: i32 = -5;
/// Up to this many elements, one direct map of (peer, protocol, port) is looked up faster than a map of classes
/// and then one of (class, protocol, port): one walk instead of two (packet-path.md §3 measured 10,000).
const DIRECT_MAX: usize = 16_384;
/// Bytes of each logged packet that are copied: IPv6 header, extension headers, TCP header.
const SNAPLEN: u32 = 128;

/// A table, and what its elements mean.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// For the driver.
    pub table: Table,
    /// Which rule each counted element belongs to: (map, key) to rule id.
    pub legend: HashMap<(String, Vec<FieldRange>), String>,
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
        legend: HashMap::new(),
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
    Ok(Lowered { table, legend: build.legend })
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
    legend: HashMap<(String, Vec<FieldRange>), String>,
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

/// The maps of one direction and family, by name; `None` where no rule needs one.
#[derive(Default)]
struct Maps {
    exact_ports: Option<String>,
    exact_other: Option<String>,
    peer_ports: Option<PeerMap>,
    peer_other: Option<PeerMap>,
    any_ports: Option<String>,
    any_other: Option<String>,
}

enum PeerMap {
    /// (peer, slot) to verdict.
    Direct(String),
    /// Peer to class, then (class, slot) to verdict.
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
        // Only errors about a session are related here; a helper's data channel has to have a rule of its own.
        let related = [1, 58].map(|protocol| {
            let mut exprs = l4proto(protocol).to_vec();
            exprs.push(Expr::Verdict(Verdict::Accept));
            rule(exprs, "an error about a session")
        });
        let name = self.name(&["related"]);
        self.chain(name, related.to_vec());
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

    fn map(&mut self, name: &str, key: Vec<FieldType>, interval: bool, data: MapData, elements: Vec<NewElement<'_>>) {
        let mut out = Vec::with_capacity(elements.len());
        let counters = data == MapData::Verdict && elements.iter().any(|(_, _, of)| of.is_some());
        for (key, data, of) in elements {
            let mut comment = String::new();
            if let Some((id, label)) = of {
                self.legend.insert((name.to_owned(), key.clone()), id.to_owned());
                comment = label.chars().take(60).collect();
                while comment.len() > keepwall_ir::nft::COMMENT_MAX {
                    comment.pop();
                }
            }
            out.push(Element { key, data, comment });
        }
        out.sort_by(|a, b| a.key.cmp(&b.key));
        self.table.maps.push(Map { name: name.to_owned(), key, interval, data, counters, elements: out });
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
            maps.push((family, self.maps(attachment, &slug, direction, family, &allow, &deny)?));
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
        maps: &[(Family, Maps)],
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
        for (family, maps) in maps {
            self.lookups(*family, view, maps, &mut ports, &mut other);
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
            let mut exprs = nfproto(family).to_vec();
            exprs.extend([transport(0, 4, 0), cmp(0, both), Expr::Verdict(Verdict::Return)]);
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

        let protocols = self.name(&[slug, "protocols"]);
        let targets = [(1u8, &icmp), (6, &ports), (17, &udp), (58, &icmp6)];
        let elements = targets
            .map(|(number, chain)| {
                (vec![FieldRange::exact([number])], ElementData::Verdict(Verdict::Goto(chain.clone())), None)
            })
            .to_vec();
        self.map(&protocols, vec![FieldType::InetProto], false, MapData::Verdict, elements);
        let rules = vec![
            rule(
                vec![
                    Expr::Meta { key: Meta::L4Proto, dreg: 0 },
                    Expr::Lookup { map: protocols, sreg: 0, into: LookupInto::Verdict, invert: false },
                ],
                "",
            ),
            rule(vec![goto(&other)], ""),
        ];
        let name = self.name(&[slug]);
        self.chain(name, rules)
    }

    /// One rule per map, most specific kind first.
    fn lookups(&self, family: Family, view: View, maps: &Maps, ports: &mut Vec<Rule>, other: &mut Vec<Rule>) {
        let regs = address_type(family).regs();
        let vmap =
            |map: &str, sreg: u8| Expr::Lookup { map: map.to_owned(), sreg, into: LookupInto::Verdict, invert: false };
        // Key fields behind the addresses: protocol, then (with ports) the destination port.
        let slot = |first: u8, with_ports: bool| {
            let mut exprs = vec![Expr::Meta { key: Meta::L4Proto, dreg: first }];
            if with_ports {
                exprs.push(view.destination_port(first + 1));
            }
            exprs
        };
        for (with_ports, exact, peer, any, out) in [
            (true, &maps.exact_ports, &maps.peer_ports, &maps.any_ports, ports),
            (false, &maps.exact_other, &maps.peer_other, &maps.any_other, other),
        ] {
            if let Some(map) = exact {
                let mut exprs = nfproto(family).to_vec();
                exprs.extend([view.peer(family, 0), view.local(family, regs)]);
                exprs.push(Expr::Meta { key: Meta::L4Proto, dreg: 2 * regs });
                if with_ports {
                    exprs.extend([transport(0, 2, 2 * regs + 1), view.destination_port(2 * regs + 2)]);
                }
                exprs.push(vmap(map, 0));
                out.push(rule(exprs, "rules about both sides"));
            }
            match peer {
                None => {}
                Some(PeerMap::Direct(map)) => {
                    let mut exprs = nfproto(family).to_vec();
                    exprs.push(view.peer(family, 0));
                    exprs.extend(slot(regs, with_ports));
                    exprs.push(vmap(map, 0));
                    out.push(rule(exprs, "rules about some peers"));
                }
                Some(PeerMap::Classes { classes, cells }) => {
                    // nft 1.0.6 aborts when it lists a looked-up register inside a concatenation, unless the
                    // register was loaded from a packet field; so the class passes through the packet mark, which
                    // is put back before anything can break off.
                    let mut exprs = nfproto(family).to_vec();
                    exprs.extend([
                        Expr::Meta { key: Meta::Mark, dreg: 8 },
                        view.peer(family, 0),
                        Expr::Lookup { map: classes.clone(), sreg: 0, into: LookupInto::Register(0), invert: false },
                        Expr::MarkSet { sreg: 0 },
                        Expr::Meta { key: Meta::Mark, dreg: 0 },
                        Expr::MarkSet { sreg: 8 },
                    ]);
                    exprs.extend(slot(1, with_ports));
                    exprs.push(vmap(cells, 0));
                    out.push(rule(exprs, "rules about some peers, by class"));
                }
            }
            if let Some(map) = any {
                let mut exprs = nfproto(family).to_vec();
                exprs.extend(slot(0, with_ports));
                exprs.push(vmap(map, 0));
                out.push(rule(exprs, "rules about every peer"));
            }
        }
    }

    fn maps(
        &mut self,
        attachment: &Attachment,
        slug: &str,
        direction: Direction,
        family: Family,
        allow: &str,
        deny: &str,
    ) -> Result<Maps, Box<TooLarge>> {
        let (flats, rules) = flatten(self.intent, attachment, direction, family);
        let limit = self.intent.elements_max as usize;
        let cells = cells::cut(&flats, family.max(), self.left)
            .map_err(|explosion| too_large(attachment, direction, limit, &rules, &explosion.by_rule))?;
        let first_map = self.table.maps.len();
        let verdict = |rule: usize| {
            let chain = if rules[rule].policy == Policy::Accept { allow } else { deny };
            ElementData::Verdict(Verdict::Goto(chain.to_owned()))
        };
        let of = |rule: usize| Some((rules[rule].id, rules[rule].label));
        let v = if family == Family::Ipv4 { "4" } else { "6" };
        let peer_type = address_type(family);
        let range = |(first, last): (u128, u128)| FieldRange::new(bytes(family, first), bytes(family, last));
        let mut maps = Maps::default();
        for with_ports in [true, false] {
            let kind = if with_ports { "ports" } else { "other" };
            let mine = |slot: &Slot| matches!(slot, Slot::Ports { .. }) == with_ports;
            let slot_types: &[FieldType] =
                if with_ports { &[FieldType::InetProto, FieldType::InetService] } else { &[FieldType::InetProto] };

            let exact: Vec<_> = (cells.exact.iter().filter(|cell| mine(&cell.slot)))
                .map(|cell| {
                    let mut key = vec![range(cell.peer), range(cell.local)];
                    let slot = slot_key(cell.slot);
                    key.push(slot[0].clone());
                    if with_ports {
                        key.push(FieldRange::new(cell.source_ports.0.to_be_bytes(), cell.source_ports.1.to_be_bytes()));
                        key.push(slot[1].clone());
                    }
                    (key, verdict(cell.rule), of(cell.rule))
                })
                .collect();
            if !exact.is_empty() {
                let name = self.name(&[slug, &format!("exact{v}"), kind]);
                let mut types = vec![peer_type, peer_type, FieldType::InetProto];
                if with_ports {
                    types.extend([FieldType::InetService, FieldType::InetService]);
                }
                self.map(&name, types, true, MapData::Verdict, exact);
                *(if with_ports { &mut maps.exact_ports } else { &mut maps.exact_other }) = Some(name);
            }

            let any: Vec<_> = (cells.any.iter().filter(|(slot, _)| mine(slot)))
                .map(|(slot, rule)| (slot_key(*slot), verdict(*rule), of(*rule)))
                .collect();
            if !any.is_empty() {
                let name = self.name(&[slug, &format!("any{v}"), kind]);
                self.map(&name, slot_types.to_vec(), true, MapData::Verdict, any);
                *(if with_ports { &mut maps.any_ports } else { &mut maps.any_other }) = Some(name);
            }

            let classes: Vec<(&Class, Vec<(Slot, usize)>)> = (cells.peer.iter())
                .map(|class| (class, class.cells.iter().copied().filter(|(slot, _)| mine(slot)).collect::<Vec<_>>()))
                .filter(|(_, own)| !own.is_empty())
                .collect();
            if classes.is_empty() {
                continue;
            }
            let direct: usize = classes.iter().map(|(class, own)| class.peers.len() * own.len()).sum();
            let by_class: usize = classes.iter().map(|(class, own)| class.peers.len() + own.len()).sum();
            let peer_map = if direct <= DIRECT_MAX.min(self.left) || direct <= by_class {
                let elements = (classes.iter())
                    .flat_map(|(class, own)| {
                        class.peers.iter().flat_map(move |peer| own.iter().map(move |cell| (*peer, *cell)))
                    })
                    .map(|(peer, (slot, rule))| {
                        let mut key = vec![range(peer)];
                        key.extend(slot_key(slot));
                        (key, verdict(rule), of(rule))
                    })
                    .collect();
                let name = self.name(&[slug, &format!("peer{v}"), kind]);
                let types = [&[peer_type], slot_types].concat();
                self.map(&name, types, true, MapData::Verdict, elements);
                PeerMap::Direct(name)
            } else {
                self.class_maps(slug, v, kind, &classes, peer_type, slot_types, &range, &verdict, &of)
            };
            *(if with_ports { &mut maps.peer_ports } else { &mut maps.peer_other }) = Some(peer_map);
        }
        // The cut counted the cells; what they became is counted here, so that the limit holds for the interface.
        let new = &self.table.maps[first_map..];
        let count: usize = new.iter().map(|map| map.elements.len()).sum();
        self.left = match self.left.checked_sub(count) {
            Some(left) => left,
            None => {
                let number: HashMap<&str, usize> = rules.iter().enumerate().map(|(n, rule)| (rule.id, n)).collect();
                let mut by_rule = HashMap::new();
                for (map, element) in new.iter().flat_map(|map| map.elements.iter().map(move |e| (map, e))) {
                    let id = self.legend.get(&(map.name.clone(), element.key.clone()));
                    if let Some(n) = id.and_then(|id| number.get(id.as_str())) {
                        *by_rule.entry(*n).or_default() += 1;
                    }
                }
                return Err(too_large(attachment, direction, limit, &rules, &by_rule));
            }
        };
        Ok(maps)
    }

    #[expect(clippy::too_many_arguments, reason = "the pieces of two maps that share their classes")]
    fn class_maps<'r>(
        &mut self,
        slug: &str,
        v: &str,
        kind: &str,
        classes: &[(&Class, Vec<(Slot, usize)>)],
        peer_type: FieldType,
        slot_types: &[FieldType],
        range: &dyn Fn((u128, u128)) -> FieldRange,
        verdict: &dyn Fn(usize) -> ElementData,
        of: &dyn Fn(usize) -> Option<(&'r str, &'r str)>,
    ) -> PeerMap {
        let mut members = Vec::new();
        let mut elements = Vec::new();
        for (number, (class, own)) in (1u32..).zip(classes) {
            members.extend(class.peers.iter().map(|peer| (vec![range(*peer)], ElementData::Mark(number), None)));
            for (slot, rule) in own {
                let mut key = vec![FieldRange::exact(number.to_ne_bytes())];
                key.extend(slot_key(*slot));
                elements.push((key, verdict(*rule), of(*rule)));
            }
        }
        let members_name = self.name(&[slug, &format!("class{v}"), kind]);
        self.map(&members_name, vec![peer_type], true, MapData::Mark, members);
        let cells_name = self.name(&[slug, &format!("cells{v}"), kind]);
        let types = [&[FieldType::Mark], slot_types].concat();
        self.map(&cells_name, types, true, MapData::Verdict, elements);
        PeerMap::Classes { classes: members_name, cells: cells_name }
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
        let states = self.name(&["states"]);
        let elements = [
            (1u32, Verdict::Jump(self.name(&["invalid"]))),
            (2, Verdict::Accept),
            (4, Verdict::Jump(self.name(&["related"]))),
        ]
        .map(|(state, verdict)| (vec![FieldRange::exact(state.to_ne_bytes())], ElementData::Verdict(verdict), None));
        self.map(&states, vec![FieldType::CtState], false, MapData::Verdict, elements.to_vec());

        if !devices.guard.is_empty() {
            let lookup = self.device_lookup("guard", Meta::IifName, &devices.guard);
            self.base("guard", Hook::Prerouting, -300, vec![lookup]);
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
            let mut rules = self.sessions(&states);
            for (map, key, list) in lookups {
                if !list.is_empty() {
                    rules.push(self.device_lookup(map, key, list));
                }
            }
            self.base(chain, hook, PRIORITY, rules);
        }
    }

    /// What each hook asks first: was the session cut, is it established?
    fn sessions(&self, states: &str) -> Vec<Rule> {
        vec![
            rule(
                vec![
                    Expr::Ct { key: CtKey::Mark, dreg: 0 },
                    Expr::Bitwise { sreg: 0, dreg: 0, mask: CUT_MARK.to_ne_bytes().to_vec(), xor: vec![0; 4] },
                    cmp(0, CUT_MARK.to_ne_bytes()),
                    jump(&self.name(&["cut"])),
                ],
                "",
            ),
            rule(
                vec![
                    Expr::Ct { key: CtKey::State, dreg: 0 },
                    Expr::Lookup { map: states.to_owned(), sreg: 0, into: LookupInto::Verdict, invert: false },
                ],
                "",
            ),
        ]
    }

    fn device_lookup(&mut self, name: &str, key: Meta, list: &[(String, String)]) -> Rule {
        let name = self.name(&["devices", name]);
        let elements = (list.iter())
            .map(|(device, chain)| {
                (vec![FieldRange::exact(ifname(device))], ElementData::Verdict(Verdict::Jump(chain.clone())), None)
            })
            .collect();
        self.map(&name, vec![FieldType::IfName], false, MapData::Verdict, elements);
        rule(
            vec![
                Expr::Meta { key, dreg: 0 },
                Expr::Lookup { map: name, sreg: 0, into: LookupInto::Verdict, invert: false },
            ],
            "",
        )
    }

    fn base(&mut self, name: &str, hook: Hook, priority: i32, rules: Vec<Rule>) {
        let base = Base { kind: "filter".to_owned(), hook, priority, accept: true };
        self.table.chains.push(Chain { name: name.to_owned(), base: Some(base), rules });
    }
}

/// Key, data, and id and label of the rule that it stands for, if it does.
type NewElement<'r> = (Vec<FieldRange>, ElementData, Option<(&'r str, &'r str)>);

struct DirectionChains {
    /// For packets that start or end at this machine, and for guests.
    plain: String,
    /// For packets forwarded through a host's own device.
    published: String,
}

fn slot_key(slot: Slot) -> Vec<FieldRange> {
    match slot {
        Slot::Ports { protocol, first, last } => {
            vec![FieldRange::exact([protocol]), FieldRange::new(first.to_be_bytes(), last.to_be_bytes())]
        }
        Slot::Protocols { first, last } => vec![FieldRange::new([first], [last])],
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
