//! What the operator declared, with names and places, not yet checked against each other.
//!
//! A spec is plain data: the posture parser makes one from YAML, tests make one by hand, the control plane
//! will make one from its store. What can be seen wrong in one field alone (host bits, a reversed port
//! range, a priority of 0) never gets this far; what needs two fields is [`crate::check`]'s work.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use keepwall_core::{Family, Place, PortRange, Prefix, Protocol};
use serde::{Deserialize, Serialize};

/// The whole posture, as far as security groups go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// Knobs and limits.
    pub settings: Settings,
    /// Machines and guests, in file order.
    pub instances: Vec<Instance>,
    /// Security groups, in file order.
    pub groups: Vec<Group>,
    /// Shared lists of prefixes.
    pub prefix_lists: Vec<PrefixList>,
    /// Shared lists of port ranges.
    pub port_lists: Vec<PortList>,
    /// What the policy must and must not allow, run before each apply.
    pub tests: Vec<PolicyTest>,
}

/// Something that was written somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The name itself.
    pub name: String,
    /// Where it stands.
    pub place: Place,
}

/// One machine, or one guest of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Unique among instances; 2-128 characters.
    pub name: String,
    /// Where it was declared.
    pub place: Place,
    /// Labels that a group's `members` selects by.
    pub labels: Arc<BTreeMap<String, String>>,
    /// Network interfaces, at least one.
    pub interfaces: Vec<Interface>,
}

/// One network interface (ENI) of an instance. Groups apply to interfaces, never to instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Unique within the instance.
    pub name: String,
    /// Where it was declared.
    pub place: Place,
    /// The Linux device that carries it; its own name unless the posture says otherwise.
    pub device: String,
    /// `None`: a device of the instance's own kernel. `Some`: the instance is a guest, and the device (a tap, a
    /// veth's host end) belongs to that other instance, which enforces for it.
    pub host: Option<Named>,
    /// Private addresses. These, and never the public ones, stand for the interface in a group peer.
    pub addresses: Vec<IpAddr>,
    /// Public addresses that reach the interface by NAT in front of it (EIP). Rules never match them.
    pub public: Vec<IpAddr>,
    /// The guest's MAC address; if given, frames with another are dropped.
    pub mac: Option<[u8; 6]>,
    /// Groups joined by name.
    pub groups: Vec<Named>,
}

/// Basic or advanced ("enterprise"); never mixed on one instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupType {
    /// Members talk to each other unless isolated; everything may leave unless refused.
    #[default]
    Basic,
    /// Isolated; nothing may leave unless allowed; neither names groups nor is named.
    Advanced,
}

/// Whether members of a basic group may talk to each other (`InnerAccessPolicy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InnerAccess {
    /// Accepted before custom rules, and regardless of them.
    #[default]
    Accept,
    /// Isolated: custom rules decide.
    Drop,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Silently: no RST, no ICMP. Sorts before accept, as it is evaluated on equal priority.
    Drop,
    /// Let it pass.
    Accept,
}

/// The side that opened the session, seen from the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Towards the instance.
    Ingress,
    /// From the instance.
    Egress,
}

impl Direction {
    /// Both, ingress first.
    pub const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        })
    }
}

/// A security group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Unique among groups; 2-128 characters.
    pub name: String,
    /// Where it was declared.
    pub place: Place,
    /// 2-256 characters if given, else empty.
    pub description: String,
    /// Basic or advanced.
    pub kind: GroupType,
    /// Basic groups only; `None` means the type's own (basic: accept; advanced: isolated).
    pub inner_access: Option<InnerAccess>,
    /// Interfaces that join by label: an interface of an instance that carries all labels of any selector.
    pub members: Vec<Selector>,
    /// Inbound rules in file order. The order means nothing; priority does.
    pub ingress: Vec<Rule>,
    /// Outbound rules in file order.
    pub egress: Vec<Rule>,
}

impl Group {
    /// The rules of one direction.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> &[Rule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// What holds between members: the type's default where nothing was written.
    #[must_use]
    pub fn inner_access(&self) -> InnerAccess {
        match self.kind {
            GroupType::Basic => self.inner_access.unwrap_or_default(),
            GroupType::Advanced => InnerAccess::Drop,
        }
    }
}

/// Labels that must all be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    /// Label to value; never empty.
    pub labels: BTreeMap<String, String>,
    /// Where it was written.
    pub place: Place,
}

impl Selector {
    /// True if `labels` has every label of the selector with its value.
    #[must_use]
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// One rule as it was written. Several ports or peers mean one rule for each combination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where it was written.
    pub place: Place,
    /// Accept or drop.
    pub policy: Policy,
    /// 1 (highest) to 100; 1 if not written.
    pub priority: u8,
    /// The protocol.
    pub protocol: Protocol,
    /// Destination ports; empty unless the protocol is TCP or UDP, never empty then.
    pub ports: Vec<PortSel>,
    /// Source ports (5-tuple rules); empty means any.
    pub source_ports: Vec<PortRange>,
    /// The other side: `from` of an ingress rule, `to` of an egress rule. Never empty.
    pub peers: Vec<PeerRef>,
    /// This side (5-tuple rules): `to` of an ingress rule, `from` of an egress rule; private addresses of the
    /// group's members. `None` means every address of the interface.
    pub local: Option<Prefix>,
    /// 1-512 characters if given, else empty.
    pub description: String,
}

/// A port selection of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortSel {
    /// `443`, `8000/8100`.
    Range(PortRange),
    /// `port-list:web`.
    List(String),
}

/// The authorisation object of a rule, with its place for error messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRef {
    /// What was named.
    pub peer: Peer,
    /// Where.
    pub place: Place,
}

/// The other side of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    /// `any`: `0.0.0.0/0` and `::/0`, one rule each.
    Any,
    /// A CIDR block or an address.
    Prefix(Prefix),
    /// `group:web`: private addresses of that group's members.
    Group(String),
    /// `prefix-list:office`.
    PrefixList(String),
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Any => f.write_str("any"),
            Peer::Prefix(prefix) => prefix.fmt(f),
            Peer::Group(name) => write!(f, "group:{name}"),
            Peer::PrefixList(name) => write!(f, "prefix-list:{name}"),
        }
    }
}

impl std::fmt::Display for PortSel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PortSel::Range(range) => range.fmt(f),
            PortSel::List(name) => write!(f, "port-list:{name}"),
        }
    }
}

/// A named, bounded list of prefixes of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixList {
    /// Unique among prefix lists.
    pub name: String,
    /// Where it was declared.
    pub place: Place,
    /// 2-256 characters if given, else empty.
    pub description: String,
    /// All entries are of this family.
    pub family: Family,
    /// 1-200. A rule that names the list counts as this many rules, however many entries there are now.
    pub max_entries: u32,
    /// The entries with their places.
    pub entries: Vec<(Prefix, Place)>,
}

/// A named, bounded list of port ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortList {
    /// Unique among port lists.
    pub name: String,
    /// Where it was declared.
    pub place: Place,
    /// 2-256 characters if given, else empty.
    pub description: String,
    /// 1-2,000. A rule that names the list counts as this many rules.
    pub max_entries: u32,
    /// The entries with their places.
    pub entries: Vec<(PortRange, Place)>,
}

/// `expect: deny internet -> db:3306`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyTest {
    /// Where it was written.
    pub place: Place,
    /// True for `allow`, false for `deny`.
    pub allow: bool,
    /// Who opens the session.
    pub from: Endpoint,
    /// Whom it is opened to.
    pub to: Endpoint,
    /// The destination ports, `None` for all of them.
    pub ports: Option<PortRange>,
    /// TCP unless written otherwise.
    pub protocol: Protocol,
}

/// One end of a policy test or a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Every global unicast address that no instance has: all of them must be allowed, or all denied.
    Internet,
    /// An address block: likewise all of it.
    Prefix(Prefix),
    /// An instance, a group's members, or a prefix list: whichever has that name, in this order.
    Name(String),
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Endpoint::Internet => f.write_str("internet"),
            Endpoint::Prefix(prefix) if prefix.len() == prefix.family().bits() => prefix.address().fmt(f),
            Endpoint::Prefix(prefix) => prefix.fmt(f),
            Endpoint::Name(name) => f.write_str(name),
        }
    }
}

/// What happens to an established session when a change turns its verdict from accept to drop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDeny {
    /// It is cut at once (semantics §1.4). Sessions whose verdict is unchanged are never touched.
    #[default]
    Cut,
    /// It lives until it ends or times out, as on AWS.
    Keep,
}

/// Knobs of the whole posture, each with its one default here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// What a change does to sessions that it now denies. Default: cut.
    pub on_deny: OnDeny,
    /// How long an idle session is remembered, in seconds, 1-86,400; `None` leaves the kernel's own limits.
    /// Default: 910 (semantics §1.4).
    pub session_idle_s: Option<u32>,
    /// Destinations that no group ever blocks outbound, as the cloud's metadata service. Default:
    /// `100.100.100.200/32` (semantics §1.3).
    pub service_prefixes: Vec<Prefix>,
    /// Drop outbound TCP 25 whatever the rules say, as the cloud does. Default: no, since the machine is yours.
    pub block_outbound_smtp: bool,
    /// How many accepted and denied flows per second each interface reports at most, 0-100,000. Default: 200.
    pub flow_log_per_s: u32,
    /// Quotas.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            on_deny: OnDeny::Cut,
            session_idle_s: Some(910),
            service_prefixes: vec![Prefix::host(IpAddr::V4(std::net::Ipv4Addr::new(100, 100, 100, 200)))],
            block_outbound_smtp: false,
            flow_log_per_s: 200,
            limits: Limits::default(),
        }
    }
}

/// Quotas (semantics §1.9). Each may be raised; what exceeds one is refused before anything is applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Groups on one interface. Default 10.
    pub groups_per_interface: u32,
    /// Rules, inbound and outbound, summed over all groups of an interface; a list counts as its
    /// `max_entries`. Default 1,000.
    pub rules_per_interface: u32,
    /// Rules of one basic group that name another group. Default 20.
    pub group_rules_per_group: u32,
    /// Private addresses, v6 included, in one basic group. Default 6,000.
    pub addresses_per_basic_group: u32,
    /// Interfaces in one advanced group. Default 65,536.
    pub interfaces_per_advanced_group: u32,
    /// Groups in all. Default 1,000.
    pub groups: u32,
    /// Prefix lists in all. Default 100.
    pub prefix_lists: u32,
    /// Rules that name one prefix list. Default 1,000.
    pub associations_per_prefix_list: u32,
    /// Kernel map elements for one interface; what needs more is refused with the rules that cause it.
    /// Default 65,536.
    pub elements_per_interface: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            groups_per_interface: 10,
            rules_per_interface: 1_000,
            group_rules_per_group: 20,
            addresses_per_basic_group: 6_000,
            interfaces_per_advanced_group: 65_536,
            groups: 1_000,
            prefix_lists: 100,
            associations_per_prefix_list: 1_000,
            elements_per_interface: 65_536,
        }
    }
}

/// How many entries a prefix list may promise to hold (semantics §1.9).
pub const PREFIX_LIST_ENTRIES_MAX: u32 = 200;
/// How many entries a port list may promise to hold (semantics §1.9).
pub const PORT_LIST_ENTRIES_MAX: u32 = 2_000;
/// The lowest priority. 1 is the highest.
pub const PRIORITY_MAX: u8 = 100;
/// The priority of a rule that names none.
pub const PRIORITY_DEFAULT: u8 = 1;
