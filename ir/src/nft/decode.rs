//! Netlink messages as values: what comes from the kernel. Pure.
//!
//! These bytes are foreign: nothing here panics, whatever comes in; every list that they can lengthen is bounded; what
//! is not understood is named ([`Expr::Unknown`], [`Dumped::not_understood`]) and never taken for something else. A
//! lookup in a map that was not understood is not understood either.
//!
//! What the kernel fills in by itself (paddings, defaults, counters) does not show after [`normalise`], so that a
//! loaded table, read back, equals the one that was wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::encode::{
    DATA_MARK, DATA_VERDICT, ELEMENT_INTERVAL_END, HEADER_LEN, META_NFTRACE, OBJECT_CT_TIMEOUT, SUBSYSTEM_CONNTRACK,
    SUBSYSTEM_LOG, SUBSYSTEM_NFTABLES, UDATA_OBJECT_POLICY, attr, family_number, meta_number, msg, set_flag, successor,
    type_number,
};
use super::{
    Base, Chain, CmpOp, CtKey, CtTimeout, Element, ElementData, Expr, FieldRange, FieldType, Hook, LookupInto, Map,
    MapData, Meta, PayloadBase, Rule, Table, TableFamily, Verdict,
};

/// Tables in one dump. Machines have dozens.
pub const TABLES_MAX: usize = 4096;
/// Chains, maps and objects in one dump, all tables together: Kubernetes with 10,000 services stays below.
pub const NAMES_MAX: usize = 1 << 18;
/// Rules in one dump, all tables together.
pub const RULES_MAX: usize = 1 << 20;
/// Elements in one dump, all maps together: some 200 bytes each, below 1 GiB.
pub const ELEMENTS_MAX: usize = 1 << 22;
/// Expressions in one rule; the kernel allows 128.
const EXPRS_MAX: usize = 256;
/// Fields of a key: five times six bits fit its type number.
const FIELDS_MAX: usize = 5;
/// Notes on what was not understood, per table; more are not kept.
const NOTES_MAX: usize = 256;

// ---- messages and attributes

/// One netlink message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Its type: nfnetlink subsystem in the upper byte, message in the lower.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// The request it answers.
    pub seq: u32,
    /// Port of the socket that caused it; 0 for the kernel.
    pub port: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// nfnetlink subsystem.
    #[must_use]
    pub fn subsystem(&self) -> u8 {
        self.kind.to_be_bytes()[0]
    }

    /// Message number within the subsystem.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.kind.to_be_bytes()[1]
    }

    /// True if a change during the dump makes it unreliable: ask again.
    #[must_use]
    pub fn interrupted(&self) -> bool {
        const DUMP_INTERRUPTED: u16 = 0x10;
        self.flags & DUMP_INTERRUPTED != 0
    }

    /// Family, resource id and attributes of an nfnetlink message.
    fn nfnetlink(&self) -> Result<(u8, u16, &'a [u8]), DecodeError> {
        match self.payload {
            [family, _version, id_high, id_low, rest @ ..] => {
                Ok((*family, u16::from_be_bytes([*id_high, *id_low]), rest))
            }
            _ => Err(DecodeError::Truncated("nfnetlink header")),
        }
    }
}

/// Bytes that are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Something ends before its end.
    Truncated(&'static str),
    /// A necessary attribute is missing or has another form.
    Missing(&'static str),
    /// More of something than this module keeps.
    TooMany(&'static str),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::Truncated(what) => write!(f, "the kernel's answer ends within {what}"),
            DecodeError::Missing(what) => write!(f, "the kernel's answer lacks {what}"),
            DecodeError::TooMany(what) => write!(f, "the kernel's answer has more {what} than this program keeps"),
        }
    }
}

impl std::error::Error for DecodeError {}

/// The messages in what one read of a netlink socket gave.
#[must_use]
pub fn messages(bytes: &[u8]) -> Messages<'_> {
    Messages { rest: bytes }
}

/// Iterator of [`messages`]; ends after the first error.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let truncated = Some(Err(DecodeError::Truncated("a netlink message")));
        let bytes = std::mem::take(&mut self.rest);
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else {
            return truncated;
        };
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, p0, p1, p2, p3] = *header;
        let len = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let Some(payload) = bytes.get(HEADER_LEN..len) else {
            return truncated;
        };
        self.rest = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            seq: u32::from_ne_bytes([s0, s1, s2, s3]),
            port: u32::from_ne_bytes([p0, p1, p2, p3]),
            payload,
        }))
    }
}

/// The attributes in `bytes`: number (without flags) and content. Ends quietly at the first that does not fit, as the
/// kernel's own parsers do.
#[must_use]
pub fn attributes(bytes: &[u8]) -> Attributes<'_> {
    Attributes { rest: bytes }
}

/// Iterator of [`attributes`].
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = std::mem::take(&mut self.rest);
        let [l0, l1, k0, k1] = *bytes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let content = bytes.get(4..len)?;
        self.rest = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & attr::TYPE_MASK, content))
    }
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(number, _)| *number == kind).map(|(_, content)| content)
}

fn be16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.first_chunk()?))
}

fn be32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.first_chunk()?))
}

fn be64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.first_chunk()?))
}

fn find16(bytes: &[u8], kind: u16) -> Option<u16> {
    be16(find(bytes, kind)?)
}

fn find32(bytes: &[u8], kind: u16) -> Option<u32> {
    be32(find(bytes, kind)?)
}

fn find64(bytes: &[u8], kind: u16) -> Option<u64> {
    be64(find(bytes, kind)?)
}

/// Text up to its NUL; what is not UTF-8 is shown with replacement characters.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn find_text(bytes: &[u8], kind: u16) -> Option<String> {
    find(bytes, kind).map(text)
}

/// Type-length-value records of 8-bit type and length, as nft keeps user data.
fn find_tlv(bytes: &[u8], kind: u8) -> Option<&[u8]> {
    let mut rest = bytes;
    while let [number, len, tail @ ..] = rest {
        let content = tail.get(..usize::from(*len))?;
        if *number == kind {
            return Some(content);
        }
        rest = tail.get(usize::from(*len)..).unwrap_or_default();
    }
    None
}

// ---- answers

/// An answer that is not an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// All went well.
    Ack,
    /// It did not.
    Error(KernelError),
    /// The dump ends here; an error if the kernel broke it off.
    Done(Option<KernelError>),
    /// Nothing.
    Nothing,
    /// Messages were lost.
    Overrun,
}

/// The kernel's refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelError {
    /// `errno`, positive.
    pub errno: i32,
    /// What the kernel says about it, if anything (extended acknowledgement).
    pub message: Option<String>,
    /// Where in the request the offending attribute starts, in bytes from its header.
    pub offset: Option<u32>,
}

/// If the message is an answer that is not an object: which.
#[must_use]
pub fn reply(message: &Message<'_>) -> Option<Reply> {
    match message.kind {
        1 => Some(Reply::Nothing),
        2 => Some(match error(message) {
            Some(error) => Reply::Error(error),
            None => Reply::Ack,
        }),
        3 => {
            let errno = message.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code)).saturating_neg();
            let error = KernelError { errno, message: None, offset: None };
            Some(Reply::Done((errno > 0).then_some(error)))
        }
        4 => Some(Reply::Overrun),
        _ => None,
    }
}

fn error(message: &Message<'_>) -> Option<KernelError> {
    const CAPPED: u16 = 0x100;
    const HAS_ATTRIBUTES: u16 = 0x200;
    const EPROTO: i32 = 71;
    let Some((code, request)) = message.payload.split_first_chunk::<4>() else {
        // An answer too short to be one is no success.
        return Some(KernelError { errno: EPROTO, message: None, offset: None });
    };
    let code = i32::from_ne_bytes(*code);
    if code == 0 {
        return None;
    }
    let request_len = if message.flags & CAPPED != 0 {
        HEADER_LEN
    } else {
        let len = request.first_chunk().map_or(0, |len| u32::from_ne_bytes(*len));
        usize::try_from(len).unwrap_or(usize::MAX / 2).saturating_add(3) & !3
    };
    let extra = if message.flags & HAS_ATTRIBUTES != 0 { request.get(request_len..).unwrap_or_default() } else { &[] };
    Some(KernelError {
        errno: code.saturating_neg(),
        message: find_text(extra, 1),
        offset: find(extra, 2).and_then(|o| o.first_chunk()).map(|o| u32::from_ne_bytes(*o)),
    })
}

/// Somebody's transaction was committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Counts transactions since boot, in this network namespace.
    pub id: u32,
    /// The thread that made it (in a process of one thread: its process id); 0 if unknown.
    pub thread: u32,
    /// The thread's name, often its program's; empty if unknown.
    pub process: String,
}

/// If the message tells of a generation: which.
#[must_use]
pub fn generation(message: &Message<'_>) -> Option<Generation> {
    if message.subsystem() != SUBSYSTEM_NFTABLES || message.number() != msg::NEWGEN {
        return None;
    }
    let (_, _, attrs) = message.nfnetlink().ok()?;
    Some(Generation {
        id: find32(attrs, attr::GEN_ID)?,
        thread: find32(attrs, 2).unwrap_or(0),
        process: find_text(attrs, 3).unwrap_or_default(),
    })
}

/// Something in a table was created, changed or deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Family of the table.
    pub family: TableFamily,
    /// Name of the table.
    pub table: String,
    /// Netlink port of who did it.
    pub port: u32,
    /// True if something was deleted.
    pub deleted: bool,
    /// `table`, `chain`, `rule`, `map`, `element` or `object`.
    pub what: &'static str,
}

/// If the message tells of a change: which.
#[must_use]
pub fn change(message: &Message<'_>) -> Option<Change> {
    if message.subsystem() != SUBSYSTEM_NFTABLES {
        return None;
    }
    let (what, deleted) = match message.number() {
        msg::NEWTABLE => ("table", false),
        msg::DELTABLE => ("table", true),
        msg::NEWCHAIN => ("chain", false),
        msg::DELCHAIN => ("chain", true),
        msg::NEWRULE => ("rule", false),
        msg::DELRULE => ("rule", true),
        msg::NEWSET => ("map", false),
        msg::DELSET => ("map", true),
        msg::NEWSETELEM => ("element", false),
        msg::DELSETELEM => ("element", true),
        msg::NEWOBJ => ("object", false),
        msg::DELOBJ => ("object", true),
        _ => return None,
    };
    let (family, _, attrs) = message.nfnetlink().ok()?;
    // The table's name is attribute 1 in every one of them.
    let table = find_text(attrs, attr::TABLE_NAME)?;
    Some(Change { family: table_family(family)?, table, port: message.port, deleted, what })
}

// ---- tables

/// A table as the kernel showed it: counters and defaults not yet taken away, see [`normalise`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dumped {
    /// The table.
    pub table: Table,
    /// Netlink port of its owner; `None` if it has none. (A table that has lost its owner has lost the owner's flag too:
    /// it shows persist alone.)
    pub owner: Option<u32>,
    /// For each chain the handles of its rules, in the order of its rules. Traces name rules by them.
    pub rule_handles: BTreeMap<String, Vec<u64>>,
    /// What each element counted, where a map has counters.
    pub counters: Vec<ElementCounter>,
    /// What is in the table and not in `table`, a sentence each; bounded.
    pub not_understood: Vec<String>,
    /// Maps that have more elements than were asked for; not in `table`.
    pub not_dumped: Vec<String>,
}

/// What one element matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElementCounter {
    /// Name of the map.
    pub map: String,
    /// The element.
    pub key: Vec<FieldRange>,
    /// Packets so far.
    pub packets: u64,
    /// Bytes so far.
    pub bytes: u64,
}

/// Collects the messages of several dumps (tables first) to whole tables.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    tables: BTreeMap<(TableFamily, String), Building>,
    names: usize,
    rules: usize,
    elements: usize,
}

#[derive(Clone, Debug, Default)]
struct Building {
    flags: u32,
    owner: Option<u32>,
    chains: BTreeMap<String, RawChain>,
    maps: BTreeMap<String, RawMap>,
    timeouts: BTreeMap<String, CtTimeout>,
    not_understood: Vec<String>,
    not_dumped: BTreeSet<String>,
}

#[derive(Clone, Debug, Default)]
struct RawChain {
    base: Option<Base>,
    rules: Vec<RawRule>,
}

#[derive(Clone, Debug)]
struct RawRule {
    handle: u64,
    rule: Rule,
    /// Position and attributes of each lookup, in case its map turns out not to be understood.
    lookups: Vec<(usize, Vec<u8>)>,
}

#[derive(Clone, Debug)]
struct RawMap {
    map: Map,
    elements: Vec<RawElement>,
    understood: bool,
}

#[derive(Clone, Debug)]
struct RawElement {
    key: Vec<u8>,
    key_end: Option<Vec<u8>>,
    end: bool,
    data: ElementData,
    comment: String,
    counter: Option<(u64, u64)>,
}

impl Building {
    fn note(&mut self, sentence: String) {
        if self.not_understood.len() < NOTES_MAX {
            self.not_understood.push(sentence);
        }
    }
}

impl Dump {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Dump {
        Dump::default()
    }

    /// Takes one message; other messages than those of tables and of what is in them are passed over, and so is what
    /// belongs to a table that was not dumped.
    ///
    /// # Errors
    /// A message that is not what the kernel sends, or more than the bounds of this module.
    pub fn push(&mut self, message: &Message<'_>) -> Result<(), DecodeError> {
        if message.subsystem() != SUBSYSTEM_NFTABLES {
            return Ok(());
        }
        let (family, _, attrs) = message.nfnetlink()?;
        let Some(family) = table_family(family) else {
            return Ok(());
        };
        match message.number() {
            msg::NEWTABLE => self.push_table(family, attrs),
            msg::NEWCHAIN => self.push_chain(family, attrs),
            msg::NEWRULE => self.push_rule(family, attrs),
            msg::NEWSET => self.push_map(family, attrs),
            msg::NEWSETELEM => self.push_elements(family, attrs),
            msg::NEWOBJ => self.push_object(family, attrs),
            _ => Ok(()),
        }
    }

    /// Family, table and name of each map met so far and understood: whose elements are worth asking for.
    #[must_use]
    pub fn maps(&self) -> Vec<(TableFamily, String, String)> {
        let mut names = Vec::new();
        for ((family, table), building) in &self.tables {
            for (name, raw) in &building.maps {
                if raw.understood {
                    names.push((*family, table.clone(), name.clone()));
                }
            }
        }
        names
    }

    /// Family and name of each table met so far.
    #[must_use]
    pub fn tables(&self) -> Vec<(TableFamily, String)> {
        self.tables.keys().cloned().collect()
    }

    /// How many elements came so far, all maps together.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// This map's elements will not be asked for (or no more of them): the map is not shown, only named.
    pub fn leave_out(&mut self, family: TableFamily, table: &str, map: &str) {
        if let Some(building) = self.tables.get_mut(&(family, table.to_owned()))
            && let Some(raw) = building.maps.get_mut(map)
        {
            raw.understood = false;
            raw.elements.clear();
            building.not_dumped.insert(map.to_owned());
        }
    }

    /// The tables, in order of family and name; chains, maps and objects in order of their names.
    #[must_use]
    pub fn finish(self) -> Vec<Dumped> {
        self.tables.into_iter().map(|((family, name), building)| dumped(family, name, building)).collect()
    }

    fn push_table(&mut self, family: TableFamily, attrs: &[u8]) -> Result<(), DecodeError> {
        let name = find_text(attrs, attr::TABLE_NAME).ok_or(DecodeError::Missing("a table's name"))?;
        if self.tables.len() >= TABLES_MAX {
            return Err(DecodeError::TooMany("tables"));
        }
        let building = self.tables.entry((family, name)).or_default();
        building.flags = find32(attrs, attr::TABLE_FLAGS).unwrap_or(0);
        building.owner = find32(attrs, attr::TABLE_OWNER);
        Ok(())
    }

    fn building(&mut self, family: TableFamily, attrs: &[u8]) -> Result<Option<&mut Building>, DecodeError> {
        let table = find_text(attrs, attr::CHAIN_TABLE).ok_or(DecodeError::Missing("a table's name"))?;
        Ok(self.tables.get_mut(&(family, table)))
    }

    fn count_name(&mut self) -> Result<(), DecodeError> {
        self.names += 1;
        if self.names > NAMES_MAX { Err(DecodeError::TooMany("chains and maps")) } else { Ok(()) }
    }

    fn push_chain(&mut self, family: TableFamily, attrs: &[u8]) -> Result<(), DecodeError> {
        let name = find_text(attrs, attr::CHAIN_NAME).ok_or(DecodeError::Missing("a chain's name"))?;
        self.count_name()?;
        let Some(building) = self.building(family, attrs)? else {
            return Ok(());
        };
        let base = match find(attrs, attr::CHAIN_HOOK) {
            None => None,
            Some(hook) => match base(family, hook, attrs) {
                Some(base) => Some(base),
                None => {
                    building.note(format!("chain {name} hangs at a hook that is not known here"));
                    return Ok(());
                }
            },
        };
        building.chains.entry(name).or_default().base = base;
        Ok(())
    }

    fn push_rule(&mut self, family: TableFamily, attrs: &[u8]) -> Result<(), DecodeError> {
        let chain = find_text(attrs, attr::RULE_CHAIN).ok_or(DecodeError::Missing("a rule's chain"))?;
        self.rules += 1;
        if self.rules > RULES_MAX {
            return Err(DecodeError::TooMany("rules"));
        }
        let Some(building) = self.building(family, attrs)? else {
            return Ok(());
        };
        // Chains are dumped before rules; a rule of a chain that is not there came with a change in between, or
        // belongs to a chain that was not understood.
        if let Some(chain) = building.chains.get_mut(&chain) {
            chain.rules.push(rule(attrs)?);
        }
        Ok(())
    }

    fn push_map(&mut self, family: TableFamily, attrs: &[u8]) -> Result<(), DecodeError> {
        let name = find_text(attrs, attr::SET_NAME).ok_or(DecodeError::Missing("a map's name"))?;
        self.count_name()?;
        let Some(building) = self.building(family, attrs)? else {
            return Ok(());
        };
        let map = map(&name, attrs);
        if map.is_none() {
            building.note(format!("map {name} is of a kind that is not known here"));
        }
        let understood = map.is_some();
        let map = map.unwrap_or_else(|| Map {
            name: name.clone(),
            key: Vec::new(),
            interval: false,
            data: MapData::Nothing,
            counters: false,
            elements: Vec::new(),
        });
        building.maps.insert(name, RawMap { map, elements: Vec::new(), understood });
        Ok(())
    }

    fn push_elements(&mut self, family: TableFamily, attrs: &[u8]) -> Result<(), DecodeError> {
        let name = find_text(attrs, attr::ELEM_LIST_SET).ok_or(DecodeError::Missing("the elements' map"))?;
        let mut count = self.elements;
        let Some(building) = self.building(family, attrs)? else {
            return Ok(());
        };
        let Some(raw) = building.maps.get_mut(&name).filter(|raw| raw.understood) else {
            return Ok(());
        };
        let mut strange = false;
        for (kind, content) in attributes(find(attrs, attr::ELEM_LIST_ELEMENTS).unwrap_or_default()) {
            if kind != attr::LIST_ELEM {
                continue;
            }
            count += 1;
            if count > ELEMENTS_MAX {
                return Err(DecodeError::TooMany("elements"));
            }
            match element(&raw.map, content) {
                Some(element) => raw.elements.push(element),
                None => strange = true,
            }
        }
        if strange {
            raw.understood = false;
            raw.elements.clear();
            building.note(format!("map {name} has elements of a kind that is not known here"));
        }
        self.elements = count;
        Ok(())
    }

    fn push_object(&mut self, family: TableFamily, attrs: &[u8]) -> Result<(), DecodeError> {
        let name = find_text(attrs, attr::OBJ_NAME).ok_or(DecodeError::Missing("an object's name"))?;
        self.count_name()?;
        let Some(building) = self.building(family, attrs)? else {
            return Ok(());
        };
        match timeout(&name, attrs) {
            Some(timeout) => {
                building.timeouts.insert(name, timeout);
            }
            None => building.note(format!("object {name} is of a kind that is not known here")),
        }
        Ok(())
    }
}

/// Brings a table into the one form in which equal tables are equal: everything sorted that has no order of its own,
/// counters at zero, defaults of the kernel spelled out.
pub fn normalise(table: &mut Table) {
    table.maps.sort_by(|a, b| a.name.cmp(&b.name));
    table.chains.sort_by(|a, b| a.name.cmp(&b.name));
    table.timeouts.sort_by(|a, b| a.name.cmp(&b.name));
    for map in &mut table.maps {
        map.elements.sort_by(|a, b| a.key.cmp(&b.key));
    }
    for timeout in &mut table.timeouts {
        timeout.policy.sort_unstable();
    }
    for expr in table.chains.iter_mut().flat_map(|c| &mut c.rules).flat_map(|r| &mut r.exprs) {
        match expr {
            Expr::Counter { packets, bytes } => (*packets, *bytes) = (0, 0),
            // The kernel's default burst (`NFT_LIMIT_PKT_BURST_DEFAULT`).
            Expr::Limit { burst: burst @ 0, .. } => *burst = 5,
            _ => {}
        }
    }
}

/// True if [`normalise`] would change nothing: cheaper than a copy of a large table.
#[must_use]
pub fn is_normalised(table: &Table) -> bool {
    table.maps.is_sorted_by(|a, b| a.name <= b.name)
        && table.chains.is_sorted_by(|a, b| a.name <= b.name)
        && table.timeouts.is_sorted_by(|a, b| a.name <= b.name)
        && table.maps.iter().all(|map| map.elements.is_sorted_by(|a, b| a.key <= b.key))
        && table.timeouts.iter().all(|timeout| timeout.policy.is_sorted())
        && table.chains.iter().flat_map(|c| &c.rules).flat_map(|r| &r.exprs).all(|expr| {
            !matches!(expr, Expr::Limit { burst: 0, .. })
                && !matches!(expr, Expr::Counter { packets, bytes } if (*packets, *bytes) != (0, 0))
        })
}

fn dumped(family: TableFamily, name: String, building: Building) -> Dumped {
    let understood: BTreeSet<&String> =
        building.maps.iter().filter(|(_, raw)| raw.understood).map(|(name, _)| name).collect();
    let mut chains = Vec::new();
    let mut rule_handles = BTreeMap::new();
    for (name, raw) in building.chains {
        let mut rules = Vec::new();
        let mut handles = Vec::new();
        for mut raw in raw.rules {
            for (position, data) in raw.lookups {
                if let Some(expr) = raw.rule.exprs.get_mut(position)
                    && matches!(&*expr, Expr::Lookup { map, .. } if !understood.contains(map))
                {
                    *expr = Expr::Unknown { name: "lookup".to_owned(), data };
                }
            }
            handles.push(raw.handle);
            rules.push(raw.rule);
        }
        rule_handles.insert(name.clone(), handles);
        chains.push(Chain { name, base: raw.base, rules });
    }
    let mut maps = Vec::new();
    let mut counters = Vec::new();
    for (name, mut raw) in building.maps {
        if raw.understood {
            raw.map.elements = elements(&raw.map, raw.elements, &mut counters);
            raw.map.name = name;
            maps.push(raw.map);
        }
    }
    let timeouts = building.timeouts.into_values().collect();
    Dumped {
        table: Table { family, name, flags: building.flags, maps, chains, timeouts },
        owner: building.owner,
        rule_handles,
        counters,
        not_understood: building.not_understood,
        not_dumped: building.not_dumped.into_iter().collect(),
    }
}

fn table_family(number: u8) -> Option<TableFamily> {
    const ALL: [TableFamily; 6] = [
        TableFamily::Inet,
        TableFamily::Ip,
        TableFamily::Arp,
        TableFamily::Netdev,
        TableFamily::Bridge,
        TableFamily::Ip6,
    ];
    ALL.into_iter().find(|family| family_number(*family) == number)
}

fn base(family: TableFamily, hook: &[u8], attrs: &[u8]) -> Option<Base> {
    let hook_at = match (family, find32(hook, attr::HOOK_NUM)?) {
        (TableFamily::Arp, 0) => Hook::Input,
        (TableFamily::Arp, 1) => Hook::Output,
        (TableFamily::Arp, 2) => Hook::Forward,
        (TableFamily::Netdev, 0) => Hook::Ingress,
        (TableFamily::Inet, 5) => Hook::Ingress,
        (TableFamily::Arp | TableFamily::Netdev, _) => return None,
        (_, 0) => Hook::Prerouting,
        (_, 1) => Hook::Input,
        (_, 2) => Hook::Forward,
        (_, 3) => Hook::Output,
        (_, 4) => Hook::Postrouting,
        _ => return None,
    };
    Some(Base {
        kind: find_text(attrs, attr::CHAIN_TYPE).unwrap_or_else(|| "filter".to_owned()),
        hook: hook_at,
        priority: find32(hook, attr::HOOK_PRIORITY)?.cast_signed(),
        accept: find32(attrs, attr::CHAIN_POLICY).unwrap_or(1) != 0,
    })
}

// ---- maps

fn map(name: &str, attrs: &[u8]) -> Option<Map> {
    const KNOWN: u32 =
        set_flag::ANONYMOUS | set_flag::CONSTANT | set_flag::INTERVAL | set_flag::MAP | set_flag::CONCAT | 0x100;
    let flags = find32(attrs, attr::SET_FLAGS).unwrap_or(0);
    if flags & !KNOWN != 0 {
        return None;
    }
    let key = key_fields(find32(attrs, attr::SET_KEY_TYPE)?)?;
    if find32(attrs, attr::SET_KEY_LEN)? != u32::try_from(key_len(&key)).ok()? {
        return None;
    }
    let data = if flags & set_flag::MAP == 0 {
        MapData::Nothing
    } else {
        match find32(attrs, attr::SET_DATA_TYPE)? {
            DATA_VERDICT => MapData::Verdict,
            DATA_MARK if find32(attrs, attr::SET_DATA_LEN)? == 4 => MapData::Mark,
            _ => return None,
        }
    };
    let one = find(attrs, attr::SET_EXPR);
    let listed = attributes(find(attrs, attr::SET_EXPRESSIONS).unwrap_or_default()).take(EXPRS_MAX).map(|(_, e)| e);
    let mut counters = false;
    for expr in one.into_iter().chain(listed) {
        if find_text(expr, attr::EXPR_NAME).as_deref() != Some("counter") {
            return None;
        }
        counters = true;
    }
    let interval = flags & set_flag::INTERVAL != 0;
    Some(Map { name: name.to_owned(), key, interval, data, counters, elements: Vec::new() })
}

fn key_fields(mut number: u32) -> Option<Vec<FieldType>> {
    const ALL: [FieldType; 9] = [
        FieldType::Ipv4Addr,
        FieldType::Ipv6Addr,
        FieldType::InetProto,
        FieldType::InetService,
        FieldType::IfName,
        FieldType::Mark,
        FieldType::CtState,
        FieldType::Icmpv6Type,
        FieldType::EtherAddr,
    ];
    let mut fields = Vec::new();
    while number != 0 && fields.len() <= FIELDS_MAX {
        fields.push(ALL.into_iter().find(|field| type_number(*field) == number & 0x3f)?);
        number >>= 6;
    }
    fields.reverse();
    (!fields.is_empty() && fields.len() <= FIELDS_MAX).then_some(fields)
}

fn key_len(key: &[FieldType]) -> usize {
    match key {
        [single] => single.len(),
        fields => fields.iter().map(|f| f.len().next_multiple_of(4)).sum(),
    }
}

fn element(map: &Map, attrs: &[u8]) -> Option<RawElement> {
    let flags = find32(attrs, attr::ELEM_FLAGS).unwrap_or(0);
    if flags & !ELEMENT_INTERVAL_END != 0
        || find(attrs, attr::ELEM_TIMEOUT).is_some()
        || find(attrs, attr::ELEM_OBJREF).is_some()
    {
        return None;
    }
    let end = flags & ELEMENT_INTERVAL_END != 0;
    let key = find(find(attrs, attr::ELEM_KEY)?, attr::DATA_VALUE)?;
    if key.len() != key_len(&map.key) {
        return None;
    }
    let key_end = match find(attrs, attr::ELEM_KEY_END) {
        Some(nest) => Some(find(nest, attr::DATA_VALUE).filter(|k| k.len() == key.len())?.to_vec()),
        None => None,
    };
    let data = match (map.data, find(attrs, attr::ELEM_DATA)) {
        _ if end => ElementData::Nothing,
        (MapData::Nothing, None) => ElementData::Nothing,
        (MapData::Verdict, Some(data)) => ElementData::Verdict(verdict(find(data, attr::DATA_VERDICT)?)?),
        (MapData::Mark, Some(data)) => {
            let value = find(data, attr::DATA_VALUE)?;
            ElementData::Mark(u32::from_ne_bytes(value.try_into().ok()?))
        }
        _ => return None,
    };
    let expr = find(attrs, attr::ELEM_EXPR)
        .or_else(|| find(attrs, attr::ELEM_EXPRESSIONS).and_then(|list| find(list, attr::LIST_ELEM)));
    let counter = match expr {
        Some(expr) if find_text(expr, attr::EXPR_NAME).as_deref() == Some("counter") => {
            Some(counter(find(expr, attr::EXPR_DATA)?)?)
        }
        Some(_) => return None,
        None => None,
    };
    let comment = find(attrs, attr::ELEM_USERDATA).and_then(|u| find_tlv(u, 0)).map(text).unwrap_or_default();
    Some(RawElement { key: key.to_vec(), key_end, end, data, comment, counter })
}

fn counter(attrs: &[u8]) -> Option<(u64, u64)> {
    Some((find64(attrs, attr::COUNTER_PACKETS)?, find64(attrs, attr::COUNTER_BYTES)?))
}

/// Splits keys into fields and joins starts and ends to ranges.
fn elements(map: &Map, mut raw: Vec<RawElement>, counters: &mut Vec<ElementCounter>) -> Vec<Element> {
    let tree = map.interval && map.key.len() == 1;
    if tree {
        // Ends first: at one key, the range before it ends and the next one starts.
        raw.sort_by(|a, b| a.key.cmp(&b.key).then(b.end.cmp(&a.end)));
    }
    // Where each range ends, if the next entry says so; walked from the top.
    let mut above: Option<Vec<u8>> = None;
    let mut elements = Vec::with_capacity(raw.len());
    for entry in raw.into_iter().rev() {
        let upper = match (&entry.key_end, tree) {
            (Some(end), _) => end.clone(),
            (None, false) => entry.key.clone(),
            (None, true) => match above.as_deref() {
                Some(next) => predecessor(next),
                None => vec![0xff; entry.key.len()],
            },
        };
        above = Some(entry.key.clone());
        if entry.end {
            continue;
        }
        let key = fields(map, &entry.key, &upper);
        if let Some((packets, bytes)) = entry.counter {
            counters.push(ElementCounter { map: map.name.clone(), key: key.clone(), packets, bytes });
        }
        elements.push(Element { key, data: entry.data, comment: entry.comment });
    }
    elements.sort_by(|a, b| a.key.cmp(&b.key));
    elements
}

fn fields(map: &Map, lower: &[u8], upper: &[u8]) -> Vec<FieldRange> {
    let mut offset = 0;
    let mut ranges = Vec::with_capacity(map.key.len());
    for field in &map.key {
        let at = offset..offset + field.len();
        ranges.push(FieldRange::new(lower.get(at.clone()).unwrap_or_default(), upper.get(at).unwrap_or_default()));
        offset = (offset + field.len()).next_multiple_of(4);
    }
    ranges
}

/// The big-endian number before this one; 0 stays.
fn predecessor(number: &[u8]) -> Vec<u8> {
    // The complement turns counting down into counting up.
    let complement: Vec<u8> = number.iter().map(|b| !b).collect();
    match successor(&complement) {
        Some(next) => next.iter().map(|b| !b).collect(),
        None => number.to_vec(),
    }
}

fn timeout(name: &str, attrs: &[u8]) -> Option<CtTimeout> {
    const KINDS_MAX: usize = 64;
    if find32(attrs, attr::OBJ_TYPE)? != OBJECT_CT_TIMEOUT {
        return None;
    }
    let data = find(attrs, attr::OBJ_DATA)?;
    let asked = find(attrs, attr::OBJ_USERDATA).and_then(|u| find_tlv(u, UDATA_OBJECT_POLICY));
    let mut policy: Vec<(u16, u32)> = attributes(find(data, attr::CT_TIMEOUT_DATA).unwrap_or_default())
        .take(KINDS_MAX)
        .filter_map(|(kind, seconds)| Some((kind, be32(seconds)?)))
        // The kernel shows its defaults for what was not asked; they are not part of what was wanted.
        .filter(|(kind, _)| asked.is_none_or(|asked| asked.iter().any(|a| u16::from(*a) == *kind)))
        .collect();
    policy.sort_unstable();
    Some(CtTimeout {
        name: name.to_owned(),
        l4proto: *find(data, attr::CT_TIMEOUT_L4PROTO)?.first()?,
        l3proto: find16(data, attr::CT_TIMEOUT_L3PROTO)?,
        policy,
    })
}

// ---- rules

fn rule(attrs: &[u8]) -> Result<RawRule, DecodeError> {
    let mut exprs: Vec<Expr> = Vec::new();
    let mut lookups = Vec::new();
    for (_, content) in attributes(find(attrs, attr::RULE_EXPRESSIONS).unwrap_or_default()) {
        if exprs.len() >= EXPRS_MAX {
            return Err(DecodeError::TooMany("expressions in a rule"));
        }
        let name = find_text(content, attr::EXPR_NAME).ok_or(DecodeError::Missing("an expression's name"))?;
        let data = find(content, attr::EXPR_DATA).unwrap_or_default();
        if let Some(value) = traced_register(&name, data)
            && matches!(exprs.last(), Some(Expr::Immediate { dreg, data }) if *dreg == value && data[..] == [1])
        {
            exprs.pop();
            exprs.push(Expr::TraceOn);
            continue;
        }
        let expr = expression(&name, data).unwrap_or_else(|| Expr::Unknown { name, data: data.to_vec() });
        if matches!(expr, Expr::Lookup { .. }) {
            lookups.push((exprs.len(), data.to_vec()));
        }
        exprs.push(expr);
    }
    Ok(RawRule {
        handle: find64(attrs, attr::RULE_HANDLE).unwrap_or(0),
        rule: Rule {
            exprs,
            comment: find(attrs, attr::RULE_USERDATA).and_then(|u| find_tlv(u, 0)).map(text).unwrap_or_default(),
        },
        lookups,
    })
}

/// If the expression is `meta nftrace set`: from which register.
fn traced_register(name: &str, data: &[u8]) -> Option<u8> {
    if name != "meta" || find32(data, attr::META_KEY)? != META_NFTRACE {
        return None;
    }
    register(data, attr::META_SREG)
}

/// `None` for whatever is not exactly one of the expressions of this module.
fn expression(name: &str, data: &[u8]) -> Option<Expr> {
    match name {
        "meta" => meta(data),
        "payload" => {
            if find(data, attr::PAYLOAD_SREG).is_some() {
                return None;
            }
            Some(Expr::Payload {
                base: payload_base(find32(data, attr::PAYLOAD_BASE)?)?,
                offset: find32(data, attr::PAYLOAD_OFFSET)?,
                len: find32(data, attr::PAYLOAD_LEN)?,
                dreg: register(data, attr::PAYLOAD_DREG)?,
            })
        }
        "ct" => ct(data),
        "objref" => {
            if find32(data, attr::OBJREF_TYPE)? != OBJECT_CT_TIMEOUT {
                return None;
            }
            Some(Expr::CtTimeoutSet { name: find_text(data, attr::OBJREF_NAME)? })
        }
        "bitwise" => {
            if find32(data, attr::BITWISE_OP).unwrap_or(0) != 0 {
                return None;
            }
            let (mask, xor) = (value(data, attr::BITWISE_MASK)?, value(data, attr::BITWISE_XOR)?);
            if mask.len() != xor.len() {
                return None;
            }
            Some(Expr::Bitwise {
                sreg: register(data, attr::BITWISE_SREG)?,
                dreg: register(data, attr::BITWISE_DREG)?,
                mask,
                xor,
            })
        }
        "cmp" => Some(Expr::Cmp {
            sreg: register(data, attr::CMP_SREG)?,
            op: cmp_op(find32(data, attr::CMP_OP)?)?,
            data: value(data, attr::CMP_DATA)?,
        }),
        "range" => Some(Expr::Range {
            sreg: register(data, attr::RANGE_SREG)?,
            invert: flag(find32(data, attr::RANGE_OP)?)?,
            from: value(data, attr::RANGE_FROM)?,
            to: value(data, attr::RANGE_TO)?,
        }),
        "lookup" => lookup(data),
        "counter" => counter(data).map(|(packets, bytes)| Expr::Counter { packets, bytes }),
        "limit" => {
            if find64(data, attr::LIMIT_UNIT)? != 1 || find32(data, attr::LIMIT_TYPE).unwrap_or(0) != 0 {
                return None;
            }
            Some(Expr::Limit {
                per_s: find64(data, attr::LIMIT_RATE)?,
                burst: find32(data, attr::LIMIT_BURST).unwrap_or(0),
                over: flag(find32(data, attr::LIMIT_FLAGS).unwrap_or(0))?,
            })
        }
        "log" => {
            if find(data, attr::LOG_LEVEL).is_some() || find(data, attr::LOG_FLAGS).is_some() {
                return None;
            }
            Some(Expr::Log {
                group: find16(data, attr::LOG_GROUP)?,
                prefix: find_text(data, attr::LOG_PREFIX).unwrap_or_default(),
                snaplen: find32(data, attr::LOG_SNAPLEN).unwrap_or(0),
            })
        }
        "immediate" => {
            let content = find(data, attr::IMMEDIATE_DATA)?;
            if find32(data, attr::IMMEDIATE_DREG)? == 0 {
                return Some(Expr::Verdict(verdict(find(content, attr::DATA_VERDICT)?)?));
            }
            Some(Expr::Immediate {
                dreg: register(data, attr::IMMEDIATE_DREG)?,
                data: find(content, attr::DATA_VALUE)?.to_vec(),
            })
        }
        _ => None,
    }
}

fn meta(data: &[u8]) -> Option<Expr> {
    const ALL: [Meta; 8] = [
        Meta::NfProto,
        Meta::L4Proto,
        Meta::IifName,
        Meta::OifName,
        Meta::Mark,
        Meta::IifType,
        Meta::PktType,
        Meta::Protocol,
    ];
    let number = find32(data, attr::META_KEY)?;
    let key = ALL.into_iter().find(|key| meta_number(*key) == number).unwrap_or(Meta::Other(number));
    if find(data, attr::META_SREG).is_some() {
        let sreg = register(data, attr::META_SREG)?;
        return (key == Meta::Mark).then_some(Expr::MarkSet { sreg });
    }
    Some(Expr::Meta { key, dreg: register(data, attr::META_DREG)? })
}

fn ct(data: &[u8]) -> Option<Expr> {
    if find(data, attr::CT_SREG).is_some() {
        return None;
    }
    let direction = match find(data, attr::CT_DIRECTION) {
        Some(direction) => Some(*direction.first()?),
        None => None,
    };
    let key = match (find32(data, attr::CT_KEY)?, direction) {
        (0, None) => CtKey::State,
        (1, None) => CtKey::Direction,
        (2, None) => CtKey::Status,
        (3, None) => CtKey::Mark,
        (12, Some(0)) => CtKey::OriginalDport,
        (20, Some(0)) => CtKey::OriginalDst4,
        (22, Some(0)) => CtKey::OriginalDst6,
        (number, None) => CtKey::Other(number),
        (_, Some(_)) => return None,
    };
    Some(Expr::Ct { key, dreg: register(data, attr::CT_DREG)? })
}

fn lookup(data: &[u8]) -> Option<Expr> {
    let into = match find32(data, attr::LOOKUP_DREG) {
        None => LookupInto::Nothing,
        Some(0) => LookupInto::Verdict,
        Some(_) => LookupInto::Register(register(data, attr::LOOKUP_DREG)?),
    };
    Some(Expr::Lookup {
        map: find_text(data, attr::LOOKUP_SET)?,
        sreg: register(data, attr::LOOKUP_SREG)?,
        into,
        invert: flag(find32(data, attr::LOOKUP_FLAGS).unwrap_or(0))?,
    })
}

fn verdict(attrs: &[u8]) -> Option<Verdict> {
    let code = find32(attrs, attr::VERDICT_CODE)?.cast_signed();
    let chain = || find_text(attrs, attr::VERDICT_CHAIN);
    Some(match code {
        0 => Verdict::Drop,
        1 => Verdict::Accept,
        -1 => Verdict::Continue,
        -3 => Verdict::Jump(chain()?),
        -4 => Verdict::Goto(chain()?),
        -5 => Verdict::Return,
        queue if queue > 0 && queue & 0xff == 3 => Verdict::Queue,
        _ => return None,
    })
}

fn value(data: &[u8], kind: u16) -> Option<Vec<u8>> {
    find(find(data, kind)?, attr::DATA_VALUE).map(<[u8]>::to_vec)
}

/// Registers as they are numbered here: the kernel shows those that start a 16-byte one as 1 to 4.
fn register(data: &[u8], kind: u16) -> Option<u8> {
    match find32(data, kind)? {
        wide @ 1..=4 => u8::try_from((wide - 1) * 4).ok(),
        narrow @ 8..=23 => u8::try_from(narrow - 8).ok(),
        _ => None,
    }
}

fn flag(number: u32) -> Option<bool> {
    match number {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn payload_base(number: u32) -> Option<PayloadBase> {
    Some(match number {
        0 => PayloadBase::Link,
        1 => PayloadBase::Network,
        2 => PayloadBase::Transport,
        3 => PayloadBase::Inner,
        _ => return None,
    })
}

fn cmp_op(number: u32) -> Option<CmpOp> {
    Some(match number {
        0 => CmpOp::Eq,
        1 => CmpOp::Neq,
        2 => CmpOp::Lt,
        3 => CmpOp::Lte,
        4 => CmpOp::Gt,
        5 => CmpOp::Gte,
        _ => return None,
    })
}

// ---- traces and logged packets

/// One step of a traced packet (`meta nftrace`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The same for all steps of one packet.
    pub id: u32,
    /// Family of the table.
    pub family: TableFamily,
    /// Name of the table.
    pub table: String,
    /// Name of the chain.
    pub chain: String,
    /// What happened.
    pub step: TraceStep,
    /// Handle of the rule, if the step is one; see [`Dumped::rule_handles`].
    pub rule_handle: Option<u64>,
    /// What became of the packet in this step.
    pub verdict: Option<Verdict>,
    /// The device it came in by, as an index.
    pub iif: Option<u32>,
    /// The device it leaves by, as an index.
    pub oif: Option<u32>,
    /// The packet's mark.
    pub mark: Option<u32>,
    /// 2 (IPv4) or 10 (IPv6), where the kernel says so.
    pub nfproto: Option<u32>,
    /// Link-layer header; the kernel sends headers with the first step only.
    pub link_header: Vec<u8>,
    /// Head of the network header.
    pub network_header: Vec<u8>,
    /// Head of the transport header.
    pub transport_header: Vec<u8>,
}

/// Kinds of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceStep {
    /// A rule gave a verdict (or continued).
    Rule,
    /// The end of a base chain: its policy.
    Policy,
    /// The end of a chain: back.
    Return,
}

/// If the message is a step of a trace: which.
#[must_use]
pub fn trace(message: &Message<'_>) -> Option<Trace> {
    if message.subsystem() != SUBSYSTEM_NFTABLES || message.number() != msg::TRACE {
        return None;
    }
    let (family, _, attrs) = message.nfnetlink().ok()?;
    let step = match find32(attrs, attr::TRACE_TYPE)? {
        1 => TraceStep::Policy,
        2 => TraceStep::Return,
        3 => TraceStep::Rule,
        _ => return None,
    };
    let policy = || match find32(attrs, attr::TRACE_POLICY)? {
        0 => Some(Verdict::Drop),
        1 => Some(Verdict::Accept),
        _ => None,
    };
    let header = |kind| find(attrs, kind).unwrap_or_default().to_vec();
    Some(Trace {
        id: find32(attrs, attr::TRACE_ID)?,
        family: table_family(family)?,
        table: find_text(attrs, attr::TRACE_TABLE)?,
        chain: find_text(attrs, attr::TRACE_CHAIN)?,
        step,
        rule_handle: find64(attrs, attr::TRACE_RULE_HANDLE),
        verdict: find(attrs, attr::TRACE_VERDICT).and_then(verdict).or_else(policy),
        iif: find32(attrs, attr::TRACE_IIF),
        oif: find32(attrs, attr::TRACE_OIF),
        mark: find32(attrs, attr::TRACE_MARK),
        nfproto: find32(attrs, attr::TRACE_NFPROTO),
        link_header: header(attr::TRACE_LL_HEADER),
        network_header: header(attr::TRACE_NETWORK_HEADER),
        transport_header: header(attr::TRACE_TRANSPORT_HEADER),
    })
}

/// A packet from a `log group`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// The group.
    pub group: u16,
    /// 2 (IPv4), 10 (IPv6), or another `NFPROTO_*`.
    pub family: u8,
    /// Hook number, `NF_INET_*`.
    pub hook: u8,
    /// What the rule said.
    pub prefix: String,
    /// The device it came in by, as an index.
    pub indev: Option<u32>,
    /// The device it leaves by, as an index.
    pub outdev: Option<u32>,
    /// When it was received, in microseconds since 1970; absent for packets that were made here.
    pub timestamp_us: Option<u64>,
    /// From the network header on, at most as long as the group's copy range.
    pub payload: Vec<u8>,
}

/// If the message is a logged packet: which.
#[must_use]
pub fn logged(message: &Message<'_>) -> Option<Logged> {
    if message.subsystem() != SUBSYSTEM_LOG || message.number() != 0 {
        return None;
    }
    let (family, group, attrs) = message.nfnetlink().ok()?;
    let timestamp_us = || {
        let stamp = find(attrs, attr::PACKET_TIMESTAMP)?;
        be64(stamp)?.checked_mul(1_000_000)?.checked_add(be64(stamp.get(8..)?)?)
    };
    Some(Logged {
        group,
        family,
        hook: *find(attrs, attr::PACKET_HDR)?.get(2)?,
        prefix: find_text(attrs, attr::PACKET_PREFIX).unwrap_or_default(),
        indev: find32(attrs, attr::PACKET_INDEV),
        outdev: find32(attrs, attr::PACKET_OUTDEV),
        timestamp_us: timestamp_us(),
        payload: find(attrs, attr::PACKET_PAYLOAD).unwrap_or_default().to_vec(),
    })
}

// ---- connection tracking

/// One tracked connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// As its first packet went.
    pub original: Tuple,
    /// As its replies come; differs from the reverse if addresses are translated.
    pub reply: Tuple,
    /// Conntrack zone; 0 is the usual one.
    pub zone: u16,
    /// Connection mark.
    pub mark: u32,
    /// `IPS_*` bits.
    pub status: u32,
    /// Seconds until it is forgotten.
    pub timeout_s: u32,
    /// `TCP_CONNTRACK_*`, if it is TCP: 1 SYN sent, 3 established, 7 time wait.
    pub tcp_state: Option<u8>,
    /// Tells this flow from a later one with the same addresses.
    pub id: Option<u32>,
    /// Packets and bytes of the original direction, where accounting is on.
    pub counters_original: Option<(u64, u64)>,
    /// Packets and bytes of the reply direction.
    pub counters_reply: Option<(u64, u64)>,
}

/// One direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Layer-4 protocol.
    pub protocol: u8,
    /// What else tells flows of this protocol apart.
    pub rest: TupleRest,
}

/// See [`Tuple::rest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TupleRest {
    /// TCP, UDP and their like.
    Ports {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// ICMP and ICMPv6.
    Icmp {
        /// Identifier.
        id: u16,
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
    /// Other protocols.
    Nothing,
}

/// If the message tells of a tracked connection: which.
#[must_use]
pub fn flow(message: &Message<'_>) -> Option<Flow> {
    if message.subsystem() != SUBSYSTEM_CONNTRACK || message.number() != 0 {
        return None;
    }
    let (_, _, attrs) = message.nfnetlink().ok()?;
    let counters = |kind| {
        let counters = find(attrs, kind)?;
        Some((find64(counters, attr::COUNTERS_PACKETS)?, find64(counters, attr::COUNTERS_BYTES)?))
    };
    let tcp_state = || {
        let tcp = find(find(attrs, attr::CT_PROTOINFO)?, attr::PROTOINFO_TCP)?;
        find(tcp, attr::PROTOINFO_TCP_STATE)?.first().copied()
    };
    Some(Flow {
        original: tuple(find(attrs, attr::CT_TUPLE_ORIG)?)?,
        reply: tuple(find(attrs, attr::CT_TUPLE_REPLY)?)?,
        zone: find16(attrs, attr::CT_ZONE).unwrap_or(0),
        mark: find32(attrs, attr::CT_MARK).unwrap_or(0),
        status: find32(attrs, attr::CT_STATUS).unwrap_or(0),
        timeout_s: find32(attrs, attr::CT_TIMEOUT).unwrap_or(0),
        tcp_state: tcp_state(),
        id: find32(attrs, attr::CT_ID),
        counters_original: counters(attr::CT_COUNTERS_ORIG),
        counters_reply: counters(attr::CT_COUNTERS_REPLY),
    })
}

fn tuple(attrs: &[u8]) -> Option<Tuple> {
    let ip = find(attrs, attr::TUPLE_IP)?;
    let proto = find(attrs, attr::TUPLE_PROTO)?;
    let v4 = |kind| Some(IpAddr::V4(Ipv4Addr::from(*find(ip, kind)?.first_chunk::<4>()?)));
    let v6 = |kind| Some(IpAddr::V6(Ipv6Addr::from(*find(ip, kind)?.first_chunk::<16>()?)));
    let icmp = |base: u16| {
        Some(TupleRest::Icmp {
            id: find16(proto, base)?,
            kind: *find(proto, base + 1)?.first()?,
            code: *find(proto, base + 2)?.first()?,
        })
    };
    let ports = || {
        Some(TupleRest::Ports { src: find16(proto, attr::PROTO_SRC_PORT)?, dst: find16(proto, attr::PROTO_DST_PORT)? })
    };
    Some(Tuple {
        src: v4(attr::IP_V4_SRC).or_else(|| v6(attr::IP_V6_SRC))?,
        dst: v4(attr::IP_V4_DST).or_else(|| v6(attr::IP_V6_DST))?,
        protocol: *find(proto, attr::PROTO_NUM)?.first()?,
        rest: ports()
            .or_else(|| icmp(attr::PROTO_ICMP_ID))
            .or_else(|| icmp(attr::PROTO_ICMPV6_ID))
            .unwrap_or(TupleRest::Nothing),
    })
}
