//! nf_tables as values.
//!
//! A subset, chosen: what Keepwall loads, nothing more. What it meets in foreign tables and does not know
//! decodes to [`Expr::Unknown`], never to something else.
//!
//! Registers: nf_tables has sixteen 32-bit registers, numbered here from 0 (netlink's `NFT_REG32_00`). A field
//! of n bytes takes `n.div_ceil(4)` registers from its first on. Concatenated keys are fields loaded into
//! consecutive registers.

pub mod decode;
pub mod encode;
pub mod interpret;

/// `NFPROTO_*`: which packets a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// IPv4 and IPv6 (1).
    Inet,
    /// IPv4 (2).
    Ip,
    /// ARP (3).
    Arp,
    /// Before the network stack, per device (5).
    Netdev,
    /// Ethernet bridges (7).
    Bridge,
    /// IPv6 (10).
    Ip6,
}

/// One table with all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Which packets it sees.
    pub family: TableFamily,
    /// At most 31 bytes for nft's own tools to show it well.
    pub name: String,
    /// `NFT_TABLE_F_*` bits: 1 dormant, 2 owner, 4 persist.
    pub flags: u32,
    /// Maps and sets.
    pub maps: Vec<Map>,
    /// Chains; base chains among them.
    pub chains: Vec<Chain>,
    /// Conntrack timeout policies (`ct timeout` objects).
    pub timeouts: Vec<CtTimeout>,
}

/// Nobody else may change the table while its owner lives.
pub const TABLE_OWNER: u32 = 2;
/// The table outlives its owner and waits for the next one.
pub const TABLE_PERSIST: u32 = 4;

/// A chain of rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Unique in its table.
    pub name: String,
    /// `Some` if packets enter here from the network stack.
    pub base: Option<Base>,
    /// In order.
    pub rules: Vec<Rule>,
}

/// Where a base chain hangs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// Which hook.
    pub hook: Hook,
    /// Lower runs earlier.
    pub priority: i32,
    /// True: packets that fall off the end pass. False: they are dropped.
    pub accept: bool,
}

/// Netfilter hooks of the IP families, with their numbers (`NF_INET_*`); ARP's input is 0 and output is 1 on
/// the wire, which the codec knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Just arrived.
    Prerouting,
    /// For this machine.
    Input,
    /// For somebody else.
    Forward,
    /// From this machine.
    Output,
    /// About to leave.
    Postrouting,
    /// netdev and inet ingress.
    Ingress,
}

/// Expressions, run in order until one breaks off or gives a verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// What it does.
    pub exprs: Vec<Expr>,
    /// Shown by `nft list`; at most [`COMMENT_MAX`] bytes.
    pub comment: String,
}

/// nft's own limit on a comment, in bytes.
pub const COMMENT_MAX: usize = 128;

/// A register, 0-15.
pub type Reg = u8;

/// One expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// `meta`: about the packet, loaded into `dreg`.
    Meta {
        /// What about it.
        key: Meta,
        /// Where to.
        dreg: Reg,
    },
    /// `meta mark set`: the packet's mark becomes what `sreg` holds; 4 bytes, host order. What this rule and all
    /// later ones load with [`Meta::Mark`] is then the new mark. (Why anybody needs it here: nft 1.0.6 aborts when
    /// it lists a concatenated key that holds another map's value, but not when the value went through the mark.)
    MarkSet {
        /// From where.
        sreg: Reg,
    },
    /// `meta nftrace set 1`: from here on the kernel reports each rule that sees this packet.
    TraceOn,
    /// `payload`: bytes of the packet, loaded into `dreg`. Breaks off if the packet is too short.
    Payload {
        /// From where.
        base: PayloadBase,
        /// Bytes from there.
        offset: u32,
        /// How many bytes.
        len: u32,
        /// Where to.
        dreg: Reg,
    },
    /// `ct`: about the packet's connection, loaded into `dreg`. Breaks off if there is none.
    Ct {
        /// What about it.
        key: CtKey,
        /// Where to.
        dreg: Reg,
    },
    /// `ct timeout set`: give the connection this table's timeout policy.
    CtTimeoutSet {
        /// Name of the [`CtTimeout`].
        name: String,
    },
    /// `bitwise`: `dreg = (sreg & mask) ^ xor`.
    Bitwise {
        /// From.
        sreg: Reg,
        /// To.
        dreg: Reg,
        /// As long as the value, in bytes.
        mask: Vec<u8>,
        /// As long as the mask.
        xor: Vec<u8>,
    },
    /// `cmp`: breaks off unless `sreg op data`.
    Cmp {
        /// What is compared.
        sreg: Reg,
        /// How.
        op: CmpOp,
        /// With what, in network order.
        data: Vec<u8>,
    },
    /// `range`: breaks off unless `from <= sreg <= to` (or, inverted, if so).
    Range {
        /// What is compared.
        sreg: Reg,
        /// True: must lie outside.
        invert: bool,
        /// Lower bound, network order.
        from: Vec<u8>,
        /// Upper bound, included.
        to: Vec<u8>,
    },
    /// `lookup`: breaks off unless the key at `sreg` is in the map (or, inverted, if it is). With a value map the
    /// value goes to `dreg`; with a verdict map it is the rule's verdict.
    Lookup {
        /// Name of the [`Map`].
        map: String,
        /// Where the key starts.
        sreg: Reg,
        /// What becomes of the data.
        into: LookupInto,
        /// True: breaks off if the key is there.
        invert: bool,
    },
    /// `counter`.
    Counter {
        /// Seen so far; what is loaded starts at this.
        packets: u64,
        /// Bytes so far.
        bytes: u64,
    },
    /// `limit`: breaks off above the rate (or, inverted, below it).
    Limit {
        /// Packets per second.
        per_s: u64,
        /// Above the rate for this many packets at once.
        burst: u32,
        /// True: matches what exceeds the rate.
        over: bool,
    },
    /// `log group`: a copy of the packet's head to user space.
    Log {
        /// nfnetlink_log group.
        group: u16,
        /// Carried with the packet; at most 127 bytes.
        prefix: String,
        /// Bytes of the packet, 0 for all.
        snaplen: u32,
    },
    /// `immediate` into the verdict register.
    Verdict(Verdict),
    /// `immediate` into a data register.
    Immediate {
        /// Where to.
        dreg: Reg,
        /// The bytes.
        data: Vec<u8>,
    },
    /// Something in a foreign table that this module does not know. Never loaded.
    Unknown {
        /// The kernel's name of the expression.
        name: String,
        /// Its attributes, as they came, for whoever knows more (`xt` matches and targets).
        data: Vec<u8>,
    },
}

/// What a lookup gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupInto {
    /// A set: only whether it is there.
    Nothing,
    /// A value map: its value goes here.
    Register(Reg),
    /// A verdict map: its value is the verdict.
    Verdict,
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Passes this base chain (later base chains still see it).
    Accept,
    /// Gone, for good.
    Drop,
    /// On with the next rule.
    Continue,
    /// Back to the caller.
    Return,
    /// To a chain, and back.
    Jump(String),
    /// To a chain, and back to this one's caller.
    Goto(String),
    /// To user space (`NF_QUEUE`), seen in foreign tables only.
    Queue,
}

/// `NFT_META_*` keys that are used here, with their numbers in the codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Meta {
    /// Family of the packet in an inet table: 2 or 10; 1 byte.
    NfProto,
    /// Layer-4 protocol, extension headers skipped; 1 byte.
    L4Proto,
    /// Name of the device it came in by; 16 bytes.
    IifName,
    /// Name of the device it leaves by; 16 bytes.
    OifName,
    /// Packet mark; 4 bytes, host order.
    Mark,
    /// `ARPHRD_*` of the incoming device; 2 bytes, host order.
    IifType,
    /// How the frame was addressed: 0 host, 1 broadcast, 2 multicast; 1 byte.
    PktType,
    /// Ethernet protocol; 2 bytes.
    Protocol,
    /// Another key, by number; seen in foreign tables only.
    Other(u32),
}

/// Where payload offsets count from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PayloadBase {
    /// Link layer (0).
    Link,
    /// Network header (1).
    Network,
    /// Transport header (2).
    Transport,
    /// Behind the transport header (3).
    Inner,
}

/// `NFT_CT_*` keys with their direction attribute where they need one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CtKey {
    /// State bits: invalid 1, established 2, related 4, new 8, untracked 64; 4 bytes, host order.
    State,
    /// Status bits (`IPS_*`): destination NAT is 32; 4 bytes, host order.
    Status,
    /// Connection mark; 4 bytes, host order.
    Mark,
    /// Direction: 0 original, 1 reply; 1 byte.
    Direction,
    /// IPv4 destination of the original direction; 4 bytes.
    OriginalDst4,
    /// IPv6 destination of the original direction; 16 bytes.
    OriginalDst6,
    /// Destination port of the original direction; 2 bytes.
    OriginalDport,
    /// Another key, by number; seen in foreign tables only.
    Other(u32),
}

/// `NFT_CMP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CmpOp {
    /// Equal.
    Eq,
    /// Not equal.
    Neq,
    /// Less.
    Lt,
    /// Less or equal.
    Lte,
    /// Greater.
    Gt,
    /// Greater or equal.
    Gte,
}

/// A set or map. What it holds never overlaps: the kernel refuses overlaps, and so do we.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// Unique in its table.
    pub name: String,
    /// The fields of the key, in order.
    pub key: Vec<FieldType>,
    /// True: elements are ranges. False: exact values, hashed.
    pub interval: bool,
    /// What an element maps to.
    pub data: MapData,
    /// True: each element counts what it matched.
    pub counters: bool,
    /// Sorted by key; disjoint.
    pub elements: Vec<Element>,
}

/// What a key field is; it decides length, byte order and how nft shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FieldType {
    /// 4 bytes.
    Ipv4Addr,
    /// 16 bytes.
    Ipv6Addr,
    /// 1 byte.
    InetProto,
    /// 2 bytes.
    InetService,
    /// 16 bytes, NUL-padded.
    IfName,
    /// 4 bytes, host order: a class number, or a mark.
    Mark,
    /// 4 bytes, host order.
    CtState,
    /// 1 byte.
    Icmpv6Type,
    /// 6 bytes.
    EtherAddr,
}

impl FieldType {
    /// Length in bytes.
    #[must_use]
    pub fn len(self) -> usize {
        match self {
            FieldType::InetProto | FieldType::Icmpv6Type => 1,
            FieldType::InetService => 2,
            FieldType::Ipv4Addr | FieldType::Mark | FieldType::CtState => 4,
            FieldType::EtherAddr => 6,
            FieldType::Ipv6Addr | FieldType::IfName => 16,
        }
    }

    /// Never: no field is empty.
    #[must_use]
    pub fn is_empty(self) -> bool {
        false
    }

    /// How many 32-bit registers it fills.
    #[must_use]
    pub fn regs(self) -> u8 {
        #[expect(clippy::cast_possible_truncation, reason = "at most 4")]
        let regs = self.len().div_ceil(4) as u8;
        regs
    }
}

/// What elements map to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapData {
    /// A set: nothing.
    Nothing,
    /// A verdict map.
    Verdict,
    /// A 4-byte value in host order (nft type `mark`).
    Mark,
}

/// One element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// One range per key field, bytes in network order except for host-order types; `first == last` unless the
    /// map has intervals.
    pub key: Vec<FieldRange>,
    /// What it maps to.
    pub data: ElementData,
    /// Shown by `nft list`; at most [`COMMENT_MAX`] bytes.
    pub comment: String,
}

/// A range of one field, bounds included.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FieldRange {
    /// Lower bound.
    pub first: Vec<u8>,
    /// Upper bound.
    pub last: Vec<u8>,
}

impl FieldRange {
    /// Just this value.
    #[must_use]
    pub fn exact(bytes: impl Into<Vec<u8>>) -> FieldRange {
        let first = bytes.into();
        FieldRange { last: first.clone(), first }
    }

    /// `first..=last`.
    #[must_use]
    pub fn new(first: impl Into<Vec<u8>>, last: impl Into<Vec<u8>>) -> FieldRange {
        FieldRange { first: first.into(), last: last.into() }
    }

    /// True if `value` lies in the range, compared as big-endian numbers.
    #[must_use]
    pub fn contains(&self, value: &[u8]) -> bool {
        self.first.as_slice() <= value && value <= self.last.as_slice()
    }
}

/// The data of an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ElementData {
    /// Of a set.
    Nothing,
    /// Of a verdict map.
    Verdict(Verdict),
    /// Of a value map.
    Mark(u32),
}

/// A conntrack timeout policy for one protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CtTimeout {
    /// Unique among the table's objects.
    pub name: String,
    /// 6 TCP, 17 UDP.
    pub l4proto: u8,
    /// 2 (`NFPROTO_IPV4`) or 10.
    pub l3proto: u16,
    /// Attribute number (`CTA_TIMEOUT_TCP_*` / `CTA_TIMEOUT_UDP_*`, from 1) and seconds, sorted.
    pub policy: Vec<(u16, u32)>,
}

/// `IFNAMSIZ` bytes, NUL-padded, as `meta iifname` loads them. Longer names are cut as the kernel would refuse
/// them anyway.
#[must_use]
pub fn ifname(name: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = name.bytes().take(15).collect();
    bytes.resize(16, 0);
    bytes
}
