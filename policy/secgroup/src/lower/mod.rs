//! Intent to nf_tables: [`crate::cells`] laid out as maps, and the chains around them.
//!
//! ```text
//!  base chain (input, forward, output; policy accept; the only chains whose rules are ever replaced)
//!    cut sessions ──▶ drop        established ──▶ accept       related ICMP ──▶ accept
//!    invalid on a protected device ──▶ drop
//!    device ──▶ one dispatch chain per device and direction
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
//! one and switched to in one small transaction (ADR 3).

mod exprs;
mod lowered;
mod maps;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use keepwall_core::{AddrRange, Family};
use keepwall_ir::nft::{
    Base, Chain, CmpOp, CtKey, CtTimeout, ElementData, Expr, FieldRange, FieldType, Hook, LookupInto, MapData, Meta,
    PayloadBase, Rule, TABLE_OWNER, TABLE_PERSIST, Table, TableFamily, Verdict, ifname,
};

use crate::intent::{Attachment, Intent};
use crate::spec::{Direction, Policy};
use exprs::{
    View, address, address_type, bytes, cmp, goto, icmp, jump, l4proto, lookups, network, nfproto, rule, transport,
};
use lowered::Lane;
pub use lowered::{Lowered, TooLarge};
use maps::Maps;
pub(crate) use maps::{flatten, ranges_of};

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
/// Up to this many devices are compared one after the other; more are looked up.
const DEVICES_COMPARED_MAX: usize = 4;
/// Bytes of each logged packet that are copied: IPv6 header, extension headers, TCP header.
const SNAPLEN: u32 = 128;

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

struct DirectionChains {
    /// For packets that start or end at this machine, and for guests.
    plain: String,
    /// For packets forwarded through a host's own device.
    published: String,
}
