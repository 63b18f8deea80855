//! nf_tables values as netlink messages: what goes to the kernel, byte for byte. Pure.
//!
//! A [`Batch`] is one transaction: the kernel takes all of its messages or none. Each message remembers what it
//! was about ([`Subject`]), so that the kernel's terse error number can be told as a sentence.
//!
//! Byte orders: netlink headers and attribute headers are in the machine's order, nf_tables attributes in network
//! order, keys and data as the registers hold them.
//!
//! Not here: sending (drivers), or anything that Keepwall does not load ([`Expr::Unknown`] is refused).

use std::fmt;
use std::net::IpAddr;

use super::decode::{Flow, Tuple, TupleRest};
use super::{
    COMMENT_MAX, Chain, CmpOp, CtKey, CtTimeout, Element, ElementData, Expr, FieldType, Hook, LookupInto, Map, MapData,
    Meta, PayloadBase, Rule, TableFamily, Verdict,
};

/// nfnetlink subsystem numbers (upper byte of the message type).
pub const SUBSYSTEM_CONNTRACK: u8 = 1;
/// nfnetlink_log.
pub const SUBSYSTEM_LOG: u8 = 4;
/// nf_tables.
pub const SUBSYSTEM_NFTABLES: u8 = 10;

/// Netlink message flags: a request.
pub const REQUEST: u16 = 0x1;
/// The kernel answers even if all went well.
pub const ACK: u16 = 0x4;
/// All objects, not one.
pub const DUMP: u16 = 0x300;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// Every netlink message starts with this many bytes.
pub const HEADER_LEN: usize = 16;

/// The kernel's limit on names of tables, chains, sets and objects, in bytes (`NFT_NAME_MAXLEN` with its NUL).
pub const NAME_MAX: usize = 255;

/// The kernel's limit on a log prefix, in bytes (`NF_LOG_PREFIXLEN` with its NUL).
pub const LOG_PREFIX_MAX: usize = 127;

/// The kernel's limit on the expressions of one rule (`NFT_RULE_MAXEXPRS`), less one for `meta nftrace`, which is two.
pub const RULE_EXPRS_MAX: usize = 127;

/// nft packs the types of a concatenation in 6 bits each of a 32-bit number.
pub const KEY_FIELDS_MAX: usize = 5;

/// An attribute's length is 16 bits, its header included. We stop well below, so that one more element always fits:
/// the longest takes two 64-byte keys, a 255-byte chain name, a 128-byte comment and their headers, below 1 KiB.
const ELEMENT_LIST_BYTES_MAX: usize = 60 * 1024;

pub(super) mod msg {
    pub(in super::super) const NEWTABLE: u8 = 0;
    pub(in super::super) const GETTABLE: u8 = 1;
    pub(in super::super) const DELTABLE: u8 = 2;
    pub(in super::super) const NEWCHAIN: u8 = 3;
    pub(in super::super) const GETCHAIN: u8 = 4;
    pub(in super::super) const DELCHAIN: u8 = 5;
    pub(in super::super) const NEWRULE: u8 = 6;
    pub(in super::super) const GETRULE: u8 = 7;
    pub(in super::super) const DELRULE: u8 = 8;
    pub(in super::super) const NEWSET: u8 = 9;
    pub(in super::super) const GETSET: u8 = 10;
    pub(in super::super) const DELSET: u8 = 11;
    pub(in super::super) const NEWSETELEM: u8 = 12;
    pub(in super::super) const GETSETELEM: u8 = 13;
    pub(in super::super) const DELSETELEM: u8 = 14;
    pub(in super::super) const NEWGEN: u8 = 15;
    pub(in super::super) const GETGEN: u8 = 16;
    pub(in super::super) const TRACE: u8 = 17;
    pub(in super::super) const NEWOBJ: u8 = 18;
    pub(in super::super) const GETOBJ: u8 = 19;
    pub(in super::super) const DELOBJ: u8 = 20;
}

pub(super) mod set_flag {
    pub(in super::super) const ANONYMOUS: u32 = 0x1;
    pub(in super::super) const CONSTANT: u32 = 0x2;
    pub(in super::super) const INTERVAL: u32 = 0x4;
    pub(in super::super) const MAP: u32 = 0x8;
    pub(in super::super) const CONCAT: u32 = 0x80;
}

/// What `NFTA_SET_DATA_TYPE` is for a verdict map.
pub(super) const DATA_VERDICT: u32 = 0xffff_ff00;
/// nft's number of the data type `mark`.
pub(super) const DATA_MARK: u32 = 19;
/// `NFT_OBJECT_CT_TIMEOUT`.
pub(super) const OBJECT_CT_TIMEOUT: u32 = 7;
/// In an object's user data, ours: which timeouts were asked for (the kernel's dump shows its defaults too). nft skips
/// what it does not know.
pub(super) const UDATA_OBJECT_POLICY: u8 = 200;
/// In an element's user data, nft's: flags; 1 means that the range is open at the upper end.
const UDATA_ELEMENT_FLAGS: u8 = 1;
/// In a set's user data, nft's: byte order of the key and of the data; 1 host, 2 network.
const UDATA_SET_KEY_ORDER: u8 = 0;
const UDATA_SET_DATA_ORDER: u8 = 1;
/// In an element's flags: the start of what does not belong to the range any more.
pub(super) const ELEMENT_INTERVAL_END: u32 = 1;

/// Which register carries the `1` of `meta nftrace set 1`: the last, so that no key in the making is hit.
const TRACE_REG: u8 = 15;

/// Where the things of a batch are: a table by family and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At<'a> {
    /// Family of the table.
    pub family: TableFamily,
    /// Name of the table.
    pub table: &'a str,
}

/// What a message of a batch was about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Begin or end of the batch: the transaction as a whole.
    Batch,
    /// The table itself.
    Table,
    /// A chain, by name.
    Chain(String),
    /// A rule of a chain.
    Rule {
        /// Name of the chain.
        chain: String,
        /// The rule's comment.
        comment: String,
    },
    /// A map or set, by name.
    Map(String),
    /// Elements of a map.
    Elements {
        /// Name of the map.
        map: String,
        /// Comment of the first of them (each message carries some hundreds).
        first_comment: String,
    },
    /// A conntrack timeout policy, by name.
    Timeout(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Batch => f.write_str("the transaction as a whole"),
            Subject::Table => f.write_str("the table itself"),
            Subject::Chain(name) => write!(f, "chain {name}"),
            Subject::Rule { chain, comment } if comment.is_empty() => write!(f, "a rule of chain {chain}"),
            Subject::Rule { chain, comment } => write!(f, "the rule \"{comment}\" of chain {chain}"),
            Subject::Map(name) => write!(f, "map {name}"),
            Subject::Elements { map, first_comment } if first_comment.is_empty() => write!(f, "elements of map {map}"),
            Subject::Elements { map, first_comment } => {
                write!(f, "elements of map {map} (from \"{first_comment}\" on)")
            }
            Subject::Timeout(name) => write!(f, "ct timeout {name}"),
        }
    }
}

/// A value that cannot be written as nf_tables messages. Always ours: nothing was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EncodeError {
    /// Empty, longer than [`NAME_MAX`] bytes, or with a NUL inside.
    Name(String),
    /// A comment longer than [`COMMENT_MAX`] bytes or with a NUL inside.
    Comment(String),
    /// A log prefix longer than [`LOG_PREFIX_MAX`] bytes or with a NUL inside.
    LogPrefix(String),
    /// A register that does not exist, or a value that would reach beyond the last one.
    Register {
        /// The chain that wanted it.
        chain: String,
        /// Its number.
        register: u8,
    },
    /// Data that is empty or longer than the registers (64 bytes), or two bounds of different lengths.
    Data {
        /// The chain with the rule.
        chain: String,
    },
    /// A rule of more than [`RULE_EXPRS_MAX`] expressions.
    Rule {
        /// The chain with the rule.
        chain: String,
    },
    /// An expression of a foreign table, which is never loaded.
    Foreign {
        /// The kernel's name of it.
        expr: String,
    },
    /// A map with no key, or with more than [`KEY_FIELDS_MAX`] fields.
    Key {
        /// Name of the map.
        map: String,
    },
    /// An element that does not fit its map: other fields, other lengths, reversed bounds, a range in a map without
    /// intervals, or other data.
    Element {
        /// Name of the map.
        map: String,
        /// The element's comment.
        comment: String,
    },
    /// A base chain at a hook that needs a device, which these values do not carry, or that its family lacks.
    Hook {
        /// Name of the chain.
        chain: String,
    },
}

impl fmt::Display for EncodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EncodeError::Name(name) => write!(f, "\"{name}\" is no name for nf_tables: 1 to {NAME_MAX} bytes"),
            EncodeError::Comment(text) => write!(f, "the comment \"{text}\" has more than {COMMENT_MAX} bytes"),
            EncodeError::LogPrefix(text) => {
                write!(f, "the log prefix \"{text}\" has more than {LOG_PREFIX_MAX} bytes")
            }
            EncodeError::Register { chain, register } => {
                write!(f, "a rule of chain {chain} uses register {register} beyond the last one, 15")
            }
            EncodeError::Data { chain } => write!(f, "a rule of chain {chain} compares with 0 or more than 64 bytes"),
            EncodeError::Rule { chain } => {
                write!(f, "a rule of chain {chain} has more than {RULE_EXPRS_MAX} expressions")
            }
            EncodeError::Foreign { expr } => write!(f, "the expression {expr} comes from a foreign table"),
            EncodeError::Key { map } => write!(f, "the key of map {map} must have 1 to {KEY_FIELDS_MAX} fields"),
            EncodeError::Element { map, comment } => write!(f, "an element \"{comment}\" does not fit map {map}"),
            EncodeError::Hook { chain } => write!(f, "chain {chain} hangs at a hook that this module cannot load"),
        }
    }
}

impl std::error::Error for EncodeError {}

/// One transaction in the making.
#[derive(Clone, Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    first_seq: u32,
    subjects: Vec<Subject>,
    last_start: usize,
    set_ids: u32,
}

impl Batch {
    /// Begins a transaction whose messages are numbered from `first_seq`.
    #[must_use]
    pub fn new(first_seq: u32) -> Batch {
        let mut batch = Batch { bytes: Vec::new(), first_seq, subjects: Vec::new(), last_start: 0, set_ids: 0 };
        batch.control(BATCH_BEGIN);
        batch
    }

    /// Ends the transaction. The last message that does something asks for an acknowledgement, so that the kernel
    /// always answers: once if all is in force, and with errors if nothing is.
    #[must_use]
    pub fn finish(mut self) -> Transaction {
        let asks = !self.is_empty();
        if asks && let Some(flags) = self.bytes.get_mut(self.last_start + 6..self.last_start + 8) {
            let with_ack = u16::from_ne_bytes([flags[0], flags[1]]) | ACK;
            flags.copy_from_slice(&with_ack.to_ne_bytes());
        }
        let ack_seq = self.next_seq().wrapping_sub(1);
        self.control(BATCH_END);
        Transaction { bytes: self.bytes, first_seq: self.first_seq, ack_seq, subjects: self.subjects, empty: !asks }
    }

    /// True if nothing would be changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.subjects.len() <= 1
    }

    /// How long it is by now, in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Creates the table; it must not be there.
    ///
    /// # Errors
    /// A name that the kernel would refuse.
    pub fn new_table(&mut self, at: At<'_>, flags: u32) -> Result<(), EncodeError> {
        self.table(at, flags, CREATE | EXCLUSIVE)
    }

    /// Becomes the owner of an orphaned table (owner and persist) of the same flags.
    ///
    /// # Errors
    /// A name that the kernel would refuse.
    pub fn adopt_table(&mut self, at: At<'_>, flags: u32) -> Result<(), EncodeError> {
        self.table(at, flags, CREATE)
    }

    fn table(&mut self, at: At<'_>, flags: u32, how: u16) -> Result<(), EncodeError> {
        let name = check_name(at.table)?;
        self.message(msg::NEWTABLE, how, at, Subject::Table, |m| {
            m.text(attr::TABLE_NAME, name);
            m.be32(attr::TABLE_FLAGS, flags);
        });
        Ok(())
    }

    /// Deletes the table with all that is in it.
    ///
    /// # Errors
    /// A name that the kernel would refuse.
    pub fn del_table(&mut self, at: At<'_>) -> Result<(), EncodeError> {
        let name = check_name(at.table)?;
        self.message(msg::DELTABLE, 0, at, Subject::Table, |m| m.text(attr::TABLE_NAME, name));
        Ok(())
    }

    /// Creates a chain without its rules. A base chain hangs at its hook from this very moment, before the
    /// transaction is committed, with its policy in force: so create it accepting, and set the policy later.
    ///
    /// # Errors
    /// A name that the kernel would refuse, or a hook that needs a device.
    pub fn new_chain(&mut self, at: At<'_>, chain: &Chain) -> Result<(), EncodeError> {
        self.chain(at, chain, CREATE | EXCLUSIVE)
    }

    /// Sets the policy of a base chain that exists; its other properties must be what they are.
    ///
    /// # Errors
    /// As for [`Batch::new_chain`].
    pub fn set_policy(&mut self, at: At<'_>, chain: &Chain) -> Result<(), EncodeError> {
        self.chain(at, chain, CREATE)
    }

    fn chain(&mut self, at: At<'_>, chain: &Chain, flags: u16) -> Result<(), EncodeError> {
        let table = check_name(at.table)?;
        let name = check_name(&chain.name)?;
        let hook = match &chain.base {
            Some(base) => {
                let number = hook_number(at.family, base.hook);
                Some((base, number.ok_or_else(|| EncodeError::Hook { chain: chain.name.clone() })?))
            }
            None => None,
        };
        self.message(msg::NEWCHAIN, flags, at, Subject::Chain(chain.name.clone()), |m| {
            m.text(attr::CHAIN_TABLE, table);
            m.text(attr::CHAIN_NAME, name);
            if let Some((base, number)) = hook {
                m.nest(attr::CHAIN_HOOK, |m| {
                    m.be32(attr::HOOK_NUM, number);
                    m.be32(attr::HOOK_PRIORITY, base.priority.cast_unsigned());
                });
                m.be32(attr::CHAIN_POLICY, u32::from(base.accept));
                m.text(attr::CHAIN_TYPE, &base.kind);
            }
        });
        Ok(())
    }

    /// Deletes a chain; it must have no rules left and nothing may jump to it.
    ///
    /// # Errors
    /// A name that the kernel would refuse.
    pub fn del_chain(&mut self, at: At<'_>, name: &str) -> Result<(), EncodeError> {
        let (table, name) = (check_name(at.table)?, check_name(name)?);
        self.message(msg::DELCHAIN, 0, at, Subject::Chain(name.to_owned()), |m| {
            m.text(attr::CHAIN_TABLE, table);
            m.text(attr::CHAIN_NAME, name);
        });
        Ok(())
    }

    /// Appends a rule to a chain.
    ///
    /// # Errors
    /// A foreign expression, a register or a text that the kernel would refuse.
    pub fn new_rule(&mut self, at: At<'_>, chain: &str, rule: &Rule) -> Result<(), EncodeError> {
        let (table, name) = (check_name(at.table)?, check_name(chain)?);
        check_comment(&rule.comment)?;
        if rule.exprs.len() > RULE_EXPRS_MAX {
            return Err(EncodeError::Rule { chain: chain.to_owned() });
        }
        for expr in &rule.exprs {
            check_expr(chain, expr)?;
        }
        let subject = Subject::Rule { chain: chain.to_owned(), comment: rule.comment.clone() };
        self.message(msg::NEWRULE, CREATE | APPEND, at, subject, |m| {
            m.text(attr::RULE_TABLE, table);
            m.text(attr::RULE_CHAIN, name);
            m.nest(attr::RULE_EXPRESSIONS, |m| {
                for expr in &rule.exprs {
                    expression(m, expr);
                }
            });
            if !rule.comment.is_empty() {
                m.bytes(attr::RULE_USERDATA, &comment_tlv(&rule.comment));
            }
        });
        Ok(())
    }

    /// Deletes all rules of a chain.
    ///
    /// # Errors
    /// A name that the kernel would refuse.
    pub fn flush_chain(&mut self, at: At<'_>, chain: &str) -> Result<(), EncodeError> {
        let (table, name) = (check_name(at.table)?, check_name(chain)?);
        self.message(msg::DELRULE, 0, at, Subject::Chain(chain.to_owned()), |m| {
            m.text(attr::RULE_TABLE, table);
            m.text(attr::RULE_CHAIN, name);
        });
        Ok(())
    }

    /// Creates a map or set without its elements. `size_max` bounds its elements; 0 leaves it open (a bound makes
    /// the kernel choose a hash of fixed size, and later additions beyond it fail with `ENFILE`).
    ///
    /// # Errors
    /// A name or a key that the kernel would refuse.
    pub fn new_map(&mut self, at: At<'_>, map: &Map, size_max: u32) -> Result<(), EncodeError> {
        let (table, name) = (check_name(at.table)?, check_name(&map.name)?);
        check_key(map)?;
        self.set_ids = self.set_ids.wrapping_add(1);
        let id = self.set_ids;
        self.message(msg::NEWSET, CREATE | EXCLUSIVE, at, Subject::Map(map.name.clone()), |m| {
            m.text(attr::SET_TABLE, table);
            m.text(attr::SET_NAME, name);
            m.be32(attr::SET_FLAGS, set_flags(map));
            m.be32(attr::SET_KEY_TYPE, key_type(&map.key));
            m.be32(attr::SET_KEY_LEN, key_len(&map.key));
            match map.data {
                MapData::Nothing => {}
                MapData::Verdict => {
                    m.be32(attr::SET_DATA_TYPE, DATA_VERDICT);
                    m.be32(attr::SET_DATA_LEN, 0);
                }
                MapData::Mark => {
                    m.be32(attr::SET_DATA_TYPE, DATA_MARK);
                    m.be32(attr::SET_DATA_LEN, 4);
                }
            }
            // Field lengths and the flag for concatenations go together; exact keys are hashed whole and need neither.
            let ranges = map.interval && map.key.len() > 1;
            if size_max > 0 || ranges {
                m.nest(attr::SET_DESC, |m| {
                    if size_max > 0 {
                        m.be32(attr::DESC_SIZE, size_max);
                    }
                    if ranges {
                        m.nest(attr::DESC_CONCAT, |m| {
                            for field in &map.key {
                                m.nest(attr::LIST_ELEM, |m| m.be32(attr::FIELD_LEN, small(field.len())));
                            }
                        });
                    }
                });
            }
            m.be32(attr::SET_ID, id);
            m.bytes(attr::SET_USERDATA, &set_userdata(map));
            if map.counters {
                m.nest(attr::SET_EXPR, |m| {
                    m.text(attr::EXPR_NAME, "counter");
                    m.nest(attr::EXPR_DATA, |_| {});
                });
            }
        });
        Ok(())
    }

    /// Deletes a map or set; no rule may use it any more.
    ///
    /// # Errors
    /// A name that the kernel would refuse.
    pub fn del_map(&mut self, at: At<'_>, name: &str) -> Result<(), EncodeError> {
        let (table, name) = (check_name(at.table)?, check_name(name)?);
        self.message(msg::DELSET, 0, at, Subject::Map(name.to_owned()), |m| {
            m.text(attr::SET_TABLE, table);
            m.text(attr::SET_NAME, name);
        });
        Ok(())
    }

    /// Adds elements to a map; one that overlaps what is there, or is there already, makes the transaction fail.
    ///
    /// # Errors
    /// An element that does not fit the map.
    pub fn new_elements<'e>(
        &mut self,
        at: At<'_>,
        map: &Map,
        elements: impl IntoIterator<Item = &'e Element>,
    ) -> Result<(), EncodeError> {
        self.elements(msg::NEWSETELEM, CREATE | EXCLUSIVE, at, map, elements)
    }

    /// Deletes elements from a map; one that is not there makes the transaction fail.
    ///
    /// # Errors
    /// An element that does not fit the map.
    pub fn del_elements<'e>(
        &mut self,
        at: At<'_>,
        map: &Map,
        elements: impl IntoIterator<Item = &'e Element>,
    ) -> Result<(), EncodeError> {
        self.elements(msg::DELSETELEM, 0, at, map, elements)
    }

    fn elements<'e>(
        &mut self,
        kind: u8,
        flags: u16,
        at: At<'_>,
        map: &Map,
        elements: impl IntoIterator<Item = &'e Element>,
    ) -> Result<(), EncodeError> {
        let (table, name) = (check_name(at.table)?, check_name(&map.name)?);
        check_key(map)?;
        let mut elements = elements.into_iter().peekable();
        while let Some(first) = elements.peek() {
            let subject = Subject::Elements { map: map.name.clone(), first_comment: first.comment.clone() };
            let mut outcome = Ok(());
            self.message(kind, flags, at, subject, |m| {
                m.text(attr::ELEM_LIST_TABLE, table);
                m.text(attr::ELEM_LIST_SET, name);
                m.nest(attr::ELEM_LIST_ELEMENTS, |m| {
                    let start = m.0.len();
                    while m.0.len() - start < ELEMENT_LIST_BYTES_MAX
                        && let Some(element) = elements.next()
                    {
                        outcome = check_element(map, element);
                        if outcome.is_err() {
                            return;
                        }
                        write_element(m, map, element, kind == msg::NEWSETELEM);
                    }
                });
            });
            outcome?;
        }
        Ok(())
    }

    /// Creates a conntrack timeout policy.
    ///
    /// # Errors
    /// A name that the kernel would refuse.
    pub fn new_timeout(&mut self, at: At<'_>, timeout: &CtTimeout) -> Result<(), EncodeError> {
        let (table, name) = (check_name(at.table)?, check_name(&timeout.name)?);
        let mut asked = vec![UDATA_OBJECT_POLICY, 0];
        asked.extend(timeout.policy.iter().filter_map(|(kind, _)| u8::try_from(*kind).ok()).take(64));
        asked[1] = u8::try_from(asked.len() - 2).unwrap_or(64);
        self.message(msg::NEWOBJ, CREATE | EXCLUSIVE, at, Subject::Timeout(timeout.name.clone()), |m| {
            m.text(attr::OBJ_TABLE, table);
            m.text(attr::OBJ_NAME, name);
            m.be32(attr::OBJ_TYPE, OBJECT_CT_TIMEOUT);
            m.nest(attr::OBJ_DATA, |m| {
                m.bytes(attr::CT_TIMEOUT_L3PROTO, &timeout.l3proto.to_be_bytes());
                m.bytes(attr::CT_TIMEOUT_L4PROTO, &[timeout.l4proto]);
                m.nest(attr::CT_TIMEOUT_DATA, |m| {
                    for (kind, seconds) in &timeout.policy {
                        m.be32(*kind & attr::TYPE_MASK, *seconds);
                    }
                });
            });
            m.bytes(attr::OBJ_USERDATA, &asked);
        });
        Ok(())
    }

    /// Deletes a conntrack timeout policy; no rule may use it any more.
    ///
    /// # Errors
    /// A name that the kernel would refuse.
    pub fn del_timeout(&mut self, at: At<'_>, name: &str) -> Result<(), EncodeError> {
        let (table, name) = (check_name(at.table)?, check_name(name)?);
        self.message(msg::DELOBJ, 0, at, Subject::Timeout(name.to_owned()), |m| {
            m.text(attr::OBJ_TABLE, table);
            m.text(attr::OBJ_NAME, name);
            m.be32(attr::OBJ_TYPE, OBJECT_CT_TIMEOUT);
        });
        Ok(())
    }

    fn next_seq(&self) -> u32 {
        self.first_seq.wrapping_add(small(self.subjects.len()))
    }

    fn control(&mut self, kind: u16) {
        let message = request(kind, 0, self.next_seq(), 0, u16::from(SUBSYSTEM_NFTABLES), |_| {});
        self.bytes.extend_from_slice(&message);
        self.subjects.push(Subject::Batch);
    }

    fn message(&mut self, kind: u8, flags: u16, at: At<'_>, subject: Subject, body: impl FnOnce(&mut Writer)) {
        let seq = self.next_seq();
        self.last_start = self.bytes.len();
        let mut writer = Writer(std::mem::take(&mut self.bytes));
        writer.message(nftables(kind), flags, seq, family_number(at.family), 0, body);
        self.bytes = writer.0;
        self.subjects.push(subject);
    }
}

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

/// A finished batch, to be sent in one piece.
#[derive(Clone, Debug)]
pub struct Transaction {
    /// All messages.
    pub bytes: Vec<u8>,
    /// Number of the first message.
    pub first_seq: u32,
    /// The message that the kernel acknowledges once everything is in force.
    pub ack_seq: u32,
    /// What each message was about, in order of their numbers.
    pub subjects: Vec<Subject>,
    /// True if there is nothing to do, and nothing to send.
    pub empty: bool,
}

impl Transaction {
    /// What the message with this number was about; `None` if it is none of ours.
    #[must_use]
    pub fn subject(&self, seq: u32) -> Option<&Subject> {
        self.subjects.get(usize::try_from(seq.wrapping_sub(self.first_seq)).ok()?)
    }
}

/// Asks for one table by name.
#[must_use]
pub fn get_table(seq: u32, at: At<'_>) -> Vec<u8> {
    get(msg::GETTABLE, 0, seq, Some(at.family), |m| m.text(attr::TABLE_NAME, at.table))
}

/// Asks for all tables.
#[must_use]
pub fn dump_tables(seq: u32) -> Vec<u8> {
    get(msg::GETTABLE, DUMP, seq, None, |_| {})
}

/// Asks for all chains of a family, of all tables (the kernel has no narrower filter), or of all families.
#[must_use]
pub fn dump_chains(seq: u32, family: Option<TableFamily>) -> Vec<u8> {
    get(msg::GETCHAIN, DUMP, seq, family, |_| {})
}

/// Asks for all rules of a table, or of all tables.
#[must_use]
pub fn dump_rules(seq: u32, at: Option<At<'_>>) -> Vec<u8> {
    get(msg::GETRULE, DUMP, seq, at.map(|a| a.family), |m| {
        if let Some(at) = at {
            m.text(attr::RULE_TABLE, at.table);
        }
    })
}

/// Asks for all maps and sets of a table, or of all tables; without their elements.
#[must_use]
pub fn dump_maps(seq: u32, at: Option<At<'_>>) -> Vec<u8> {
    get(msg::GETSET, DUMP, seq, at.map(|a| a.family), |m| {
        if let Some(at) = at {
            m.text(attr::SET_TABLE, at.table);
        }
    })
}

/// Asks for all elements of one map.
#[must_use]
pub fn dump_elements(seq: u32, at: At<'_>, map: &str) -> Vec<u8> {
    get(msg::GETSETELEM, DUMP, seq, Some(at.family), |m| {
        m.text(attr::ELEM_LIST_TABLE, at.table);
        m.text(attr::ELEM_LIST_SET, map);
    })
}

/// Asks for all conntrack timeout policies of a table.
#[must_use]
pub fn dump_timeouts(seq: u32, at: At<'_>) -> Vec<u8> {
    get(msg::GETOBJ, DUMP, seq, Some(at.family), |m| {
        m.text(attr::OBJ_TABLE, at.table);
        m.be32(attr::OBJ_TYPE, OBJECT_CT_TIMEOUT);
    })
}

/// Asks for the generation: the number that each committed transaction of anybody raises.
#[must_use]
pub fn get_generation(seq: u32) -> Vec<u8> {
    get(msg::GETGEN, 0, seq, None, |_| {})
}

fn get(kind: u8, flags: u16, seq: u32, family: Option<TableFamily>, body: impl FnOnce(&mut Writer)) -> Vec<u8> {
    request(nftables(kind), flags, seq, family.map_or(0, family_number), 0, body)
}

/// Binds this socket to an nfnetlink_log group: packets come with their first `snaplen` bytes, at most 10 ms late.
#[must_use]
pub fn log_bind(seq: u32, group: u16, snaplen: u32) -> Vec<u8> {
    const CONFIG: u16 = (SUBSYSTEM_LOG as u16) << 8 | 1;
    const COPY_PACKET: u8 = 2;
    let mut mode = snaplen.to_be_bytes().to_vec();
    mode.extend_from_slice(&[COPY_PACKET, 0]);
    request(CONFIG, ACK, seq, 0, group, |m| {
        m.bytes(attr::LOG_CFG_CMD, &[1]);
        m.bytes(attr::LOG_CFG_MODE, &mode);
        m.be32(attr::LOG_CFG_TIMEOUT, 1);
    })
}

/// Asks for all conntrack entries: of IPv4, IPv6, or both.
#[must_use]
pub fn dump_flows(seq: u32, ipv6: Option<bool>) -> Vec<u8> {
    let family = ipv6.map_or(0, |six| if six { AF_INET6 } else { AF_INET });
    request(conntrack(1), DUMP, seq, family, 0, |_| {})
}

/// Sets the bits of `mask` in one flow's mark to those of `mark`.
#[must_use]
pub fn flow_set_mark(seq: u32, flow: &Flow, mark: u32, mask: u32) -> Vec<u8> {
    request(conntrack(0), ACK, seq, ip_family(flow.original.src), 0, |m| {
        flow_key(m, flow);
        m.be32(attr::CT_MARK, mark & mask);
        m.be32(attr::CT_MARK_MASK, mask);
    })
}

/// Deletes one flow: the kernel forgets it, and its next packet is new (or invalid).
#[must_use]
pub fn flow_delete(seq: u32, flow: &Flow) -> Vec<u8> {
    request(conntrack(2), ACK, seq, ip_family(flow.original.src), 0, |m| {
        flow_key(m, flow);
        if let Some(id) = flow.id {
            m.be32(attr::CT_ID, id);
        }
    })
}

/// Deletes every flow of the network namespace.
#[must_use]
pub fn flows_flush(seq: u32) -> Vec<u8> {
    request(conntrack(2), ACK, seq, 0, 0, |_| {})
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

fn ip_family(address: IpAddr) -> u8 {
    if address.is_ipv6() { AF_INET6 } else { AF_INET }
}

fn flow_key(m: &mut Writer, flow: &Flow) {
    m.nest(attr::CT_TUPLE_ORIG, |m| tuple(m, &flow.original));
    if flow.zone != 0 {
        m.bytes(attr::CT_ZONE, &flow.zone.to_be_bytes());
    }
}

fn tuple(m: &mut Writer, tuple: &Tuple) {
    m.nest(attr::TUPLE_IP, |m| match (tuple.src, tuple.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            m.bytes(attr::IP_V4_SRC, &src.octets());
            m.bytes(attr::IP_V4_DST, &dst.octets());
        }
        (src, dst) => {
            m.bytes(attr::IP_V6_SRC, &to_v6(src));
            m.bytes(attr::IP_V6_DST, &to_v6(dst));
        }
    });
    m.nest(attr::TUPLE_PROTO, |m| {
        m.bytes(attr::PROTO_NUM, &[tuple.protocol]);
        match tuple.rest {
            TupleRest::Ports { src, dst } => {
                m.bytes(attr::PROTO_SRC_PORT, &src.to_be_bytes());
                m.bytes(attr::PROTO_DST_PORT, &dst.to_be_bytes());
            }
            TupleRest::Icmp { id, kind, code } => {
                let base = if tuple.src.is_ipv6() { attr::PROTO_ICMPV6_ID } else { attr::PROTO_ICMP_ID };
                m.bytes(base, &id.to_be_bytes());
                m.bytes(base + 1, &[kind]);
                m.bytes(base + 2, &[code]);
            }
            TupleRest::Nothing => {}
        }
    });
}

fn to_v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// `NFPROTO_*` of a family.
#[must_use]
pub fn family_number(family: TableFamily) -> u8 {
    match family {
        TableFamily::Inet => 1,
        TableFamily::Ip => 2,
        TableFamily::Arp => 3,
        TableFamily::Netdev => 5,
        TableFamily::Bridge => 7,
        TableFamily::Ip6 => 10,
    }
}

fn nftables(kind: u8) -> u16 {
    u16::from(SUBSYSTEM_NFTABLES) << 8 | u16::from(kind)
}

fn conntrack(kind: u8) -> u16 {
    u16::from(SUBSYSTEM_CONNTRACK) << 8 | u16::from(kind)
}

fn hook_number(family: TableFamily, hook: Hook) -> Option<u32> {
    match (family, hook) {
        (_, Hook::Ingress) | (TableFamily::Netdev, _) => None,
        (TableFamily::Arp, Hook::Input) => Some(0),
        (TableFamily::Arp, Hook::Output) => Some(1),
        (TableFamily::Arp, Hook::Forward) => Some(2),
        (TableFamily::Arp, _) => None,
        (_, Hook::Prerouting) => Some(0),
        (_, Hook::Input) => Some(1),
        (_, Hook::Forward) => Some(2),
        (_, Hook::Output) => Some(3),
        (_, Hook::Postrouting) => Some(4),
    }
}

// ---- maps and elements

fn set_flags(map: &Map) -> u32 {
    let mut flags = 0;
    if map.interval {
        flags |= set_flag::INTERVAL;
    }
    if map.data != MapData::Nothing {
        flags |= set_flag::MAP;
    }
    if map.interval && map.key.len() > 1 {
        flags |= set_flag::CONCAT;
    }
    flags
}

/// nft's number of a data type.
pub(super) fn type_number(field: FieldType) -> u32 {
    match field {
        FieldType::Ipv4Addr => 7,
        FieldType::Ipv6Addr => 8,
        FieldType::EtherAddr => 9,
        FieldType::InetProto => 12,
        FieldType::InetService => 13,
        FieldType::Mark => 19,
        FieldType::CtState => 26,
        FieldType::Icmpv6Type => 29,
        FieldType::IfName => 41,
    }
}

fn key_type(key: &[FieldType]) -> u32 {
    key.iter().fold(0, |sum, field| sum << 6 | type_number(*field))
}

/// Length of a key in bytes: a single field as it is, concatenated ones padded to whole registers.
fn key_len(key: &[FieldType]) -> u32 {
    match key {
        [single] => small(single.len()),
        fields => fields.iter().map(|f| u32::from(f.regs()) * 4).sum(),
    }
}

fn set_userdata(map: &Map) -> Vec<u8> {
    const HOST: u32 = 1;
    const NETWORK: u32 = 2;
    let host_order = matches!(map.key[..], [FieldType::Mark | FieldType::CtState | FieldType::IfName]);
    let mut userdata = tlv(UDATA_SET_KEY_ORDER, &(if host_order { HOST } else { NETWORK }).to_ne_bytes());
    if map.data == MapData::Mark {
        userdata.extend(tlv(UDATA_SET_DATA_ORDER, &HOST.to_ne_bytes()));
    }
    userdata
}

fn tlv(kind: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, u8::try_from(data.len()).unwrap_or(u8::MAX)];
    bytes.extend_from_slice(data);
    bytes
}

/// A comment as nft keeps it: type 0, with its NUL.
fn comment_tlv(comment: &str) -> Vec<u8> {
    let mut text = comment.as_bytes().to_vec();
    text.push(0);
    tlv(0, &text)
}

fn write_element(m: &mut Writer, map: &Map, element: &Element, with_content: bool) {
    // A single field with intervals is a red-black tree of starts and ends: an element where the range begins and,
    // unless it reaches to the top of the space, one just behind it.
    let tree = map.interval && map.key.len() == 1;
    let behind = if tree { element.key.first().and_then(|range| successor(&range.last)) } else { None };
    m.nest(attr::LIST_ELEM, |m| {
        m.nest(attr::ELEM_KEY, |m| m.bytes(attr::DATA_VALUE, &joined(map, element, false)));
        if map.interval && map.key.len() > 1 {
            m.nest(attr::ELEM_KEY_END, |m| m.bytes(attr::DATA_VALUE, &joined(map, element, true)));
        }
        if !with_content {
            return;
        }
        match &element.data {
            ElementData::Nothing => {}
            ElementData::Verdict(verdict) => m.nest(attr::ELEM_DATA, |m| write_verdict(m, verdict)),
            ElementData::Mark(mark) => m.nest(attr::ELEM_DATA, |m| m.bytes(attr::DATA_VALUE, &mark.to_ne_bytes())),
        }
        let mut userdata = Vec::new();
        if !element.comment.is_empty() {
            userdata = comment_tlv(&element.comment);
        }
        if tree && behind.is_none() {
            userdata.extend(tlv(UDATA_ELEMENT_FLAGS, &1u32.to_ne_bytes()));
        }
        if !userdata.is_empty() {
            m.bytes(attr::ELEM_USERDATA, &userdata);
        }
    });
    if let Some(behind) = behind {
        m.nest(attr::LIST_ELEM, |m| {
            m.nest(attr::ELEM_KEY, |m| m.bytes(attr::DATA_VALUE, &behind));
            m.be32(attr::ELEM_FLAGS, ELEMENT_INTERVAL_END);
        });
    }
}

/// The lower (or upper) bounds of all fields, one after the other; padded if there are several.
fn joined(map: &Map, element: &Element, upper: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    for range in &element.key {
        bytes.extend_from_slice(if upper { &range.last } else { &range.first });
        if map.key.len() > 1 {
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

/// The next big-endian number; `None` behind the last.
pub(super) fn successor(number: &[u8]) -> Option<Vec<u8>> {
    let mut next = number.to_vec();
    for byte in next.iter_mut().rev() {
        let (sum, carry) = byte.overflowing_add(1);
        *byte = sum;
        if !carry {
            return Some(next);
        }
    }
    None
}

// ---- expressions

fn expression(m: &mut Writer, expr: &Expr) {
    match expr {
        Expr::Meta { key, dreg } => named(m, "meta", |m| {
            m.be32(attr::META_KEY, meta_number(*key));
            m.be32(attr::META_DREG, register(*dreg));
        }),
        Expr::MarkSet { sreg } => named(m, "meta", |m| {
            m.be32(attr::META_KEY, meta_number(Meta::Mark));
            m.be32(attr::META_SREG, register(*sreg));
        }),
        Expr::TraceOn => {
            named(m, "immediate", |m| {
                m.be32(attr::IMMEDIATE_DREG, register(TRACE_REG));
                m.nest(attr::IMMEDIATE_DATA, |m| m.bytes(attr::DATA_VALUE, &[1]));
            });
            named(m, "meta", |m| {
                m.be32(attr::META_KEY, META_NFTRACE);
                m.be32(attr::META_SREG, register(TRACE_REG));
            });
        }
        Expr::Payload { base, offset, len, dreg } => named(m, "payload", |m| {
            m.be32(attr::PAYLOAD_DREG, register(*dreg));
            m.be32(attr::PAYLOAD_BASE, payload_base_number(*base));
            m.be32(attr::PAYLOAD_OFFSET, *offset);
            m.be32(attr::PAYLOAD_LEN, *len);
        }),
        Expr::Ct { key, dreg } => named(m, "ct", |m| {
            let (number, directed) = ct_number(*key);
            m.be32(attr::CT_DREG, register(*dreg));
            m.be32(attr::CT_KEY, number);
            if directed {
                m.bytes(attr::CT_DIRECTION, &[0]);
            }
        }),
        Expr::CtTimeoutSet { name } => named(m, "objref", |m| {
            m.be32(attr::OBJREF_TYPE, OBJECT_CT_TIMEOUT);
            m.text(attr::OBJREF_NAME, name);
        }),
        Expr::Bitwise { sreg, dreg, mask, xor } => named(m, "bitwise", |m| {
            m.be32(attr::BITWISE_SREG, register(*sreg));
            m.be32(attr::BITWISE_DREG, register(*dreg));
            m.be32(attr::BITWISE_LEN, small(mask.len()));
            m.nest(attr::BITWISE_MASK, |m| m.bytes(attr::DATA_VALUE, mask));
            m.nest(attr::BITWISE_XOR, |m| m.bytes(attr::DATA_VALUE, xor));
        }),
        Expr::Cmp { sreg, op, data } => named(m, "cmp", |m| {
            m.be32(attr::CMP_SREG, register(*sreg));
            m.be32(attr::CMP_OP, cmp_number(*op));
            m.nest(attr::CMP_DATA, |m| m.bytes(attr::DATA_VALUE, data));
        }),
        Expr::Range { sreg, invert, from, to } => named(m, "range", |m| {
            m.be32(attr::RANGE_SREG, register(*sreg));
            m.be32(attr::RANGE_OP, u32::from(*invert));
            m.nest(attr::RANGE_FROM, |m| m.bytes(attr::DATA_VALUE, from));
            m.nest(attr::RANGE_TO, |m| m.bytes(attr::DATA_VALUE, to));
        }),
        Expr::Lookup { map, sreg, into, invert } => named(m, "lookup", |m| {
            m.text(attr::LOOKUP_SET, map);
            m.be32(attr::LOOKUP_SREG, register(*sreg));
            match into {
                LookupInto::Nothing => {}
                LookupInto::Register(dreg) => m.be32(attr::LOOKUP_DREG, register(*dreg)),
                LookupInto::Verdict => m.be32(attr::LOOKUP_DREG, REG_VERDICT),
            }
            m.be32(attr::LOOKUP_FLAGS, u32::from(*invert));
        }),
        Expr::Counter { packets, bytes } => named(m, "counter", |m| {
            m.bytes(attr::COUNTER_BYTES, &bytes.to_be_bytes());
            m.bytes(attr::COUNTER_PACKETS, &packets.to_be_bytes());
        }),
        Expr::Limit { per_s, burst, over } => named(m, "limit", |m| {
            m.bytes(attr::LIMIT_RATE, &per_s.to_be_bytes());
            m.bytes(attr::LIMIT_UNIT, &1u64.to_be_bytes());
            m.be32(attr::LIMIT_BURST, *burst);
            m.be32(attr::LIMIT_TYPE, 0);
            m.be32(attr::LIMIT_FLAGS, u32::from(*over));
        }),
        Expr::Log { group, prefix, snaplen } => named(m, "log", |m| {
            m.bytes(attr::LOG_GROUP, &group.to_be_bytes());
            if !prefix.is_empty() {
                m.text(attr::LOG_PREFIX, prefix);
            }
            if *snaplen > 0 {
                m.be32(attr::LOG_SNAPLEN, *snaplen);
            }
        }),
        Expr::Verdict(verdict) => named(m, "immediate", |m| {
            m.be32(attr::IMMEDIATE_DREG, REG_VERDICT);
            m.nest(attr::IMMEDIATE_DATA, |m| write_verdict(m, verdict));
        }),
        Expr::Immediate { dreg, data } => named(m, "immediate", |m| {
            m.be32(attr::IMMEDIATE_DREG, register(*dreg));
            m.nest(attr::IMMEDIATE_DATA, |m| m.bytes(attr::DATA_VALUE, data));
        }),
        // Refused by `check_expr` before it gets here.
        Expr::Unknown { .. } => {}
    }
}

fn named(m: &mut Writer, name: &str, body: impl FnOnce(&mut Writer)) {
    m.nest(attr::LIST_ELEM, |m| {
        m.text(attr::EXPR_NAME, name);
        m.nest(attr::EXPR_DATA, body);
    });
}

fn write_verdict(m: &mut Writer, verdict: &Verdict) {
    let (code, chain): (i32, Option<&str>) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Queue => (3, None),
        Verdict::Continue => (-1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    m.nest(attr::DATA_VERDICT, |m| {
        m.be32(attr::VERDICT_CODE, code.cast_unsigned());
        if let Some(chain) = chain {
            m.text(attr::VERDICT_CHAIN, chain);
        }
    });
}

const REG_VERDICT: u32 = 0;
pub(super) const META_NFTRACE: u32 = 12;

/// `NFT_REG32_00 + n`.
fn register(reg: u8) -> u32 {
    8 + u32::from(reg)
}

pub(super) fn meta_number(key: Meta) -> u32 {
    match key {
        Meta::Protocol => 1,
        Meta::Mark => 3,
        Meta::IifName => 6,
        Meta::OifName => 7,
        Meta::IifType => 8,
        Meta::NfProto => 15,
        Meta::L4Proto => 16,
        Meta::PktType => 19,
        Meta::Other(number) => number,
    }
}

/// The key's number, and whether it is one of the original direction's.
fn ct_number(key: CtKey) -> (u32, bool) {
    match key {
        CtKey::State => (0, false),
        CtKey::Direction => (1, false),
        CtKey::Status => (2, false),
        CtKey::Mark => (3, false),
        CtKey::OriginalDport => (12, true),
        CtKey::OriginalDst4 => (20, true),
        CtKey::OriginalDst6 => (22, true),
        CtKey::Other(number) => (number, false),
    }
}

fn payload_base_number(base: PayloadBase) -> u32 {
    match base {
        PayloadBase::Link => 0,
        PayloadBase::Network => 1,
        PayloadBase::Transport => 2,
        PayloadBase::Inner => 3,
    }
}

fn cmp_number(op: CmpOp) -> u32 {
    match op {
        CmpOp::Eq => 0,
        CmpOp::Neq => 1,
        CmpOp::Lt => 2,
        CmpOp::Lte => 3,
        CmpOp::Gt => 4,
        CmpOp::Gte => 5,
    }
}

// ---- checks: what the kernel would refuse with a bare EINVAL is refused here with a sentence

fn check_name(name: &str) -> Result<&str, EncodeError> {
    if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
        return Err(EncodeError::Name(name.to_owned()));
    }
    Ok(name)
}

fn check_comment(comment: &str) -> Result<(), EncodeError> {
    if comment.len() > COMMENT_MAX || comment.contains('\0') {
        return Err(EncodeError::Comment(comment.to_owned()));
    }
    Ok(())
}

fn check_key(map: &Map) -> Result<(), EncodeError> {
    if map.key.is_empty() || map.key.len() > KEY_FIELDS_MAX {
        return Err(EncodeError::Key { map: map.name.clone() });
    }
    Ok(())
}

fn check_element(map: &Map, element: &Element) -> Result<(), EncodeError> {
    check_comment(&element.comment)?;
    let fits = map.key.len() == element.key.len()
        && map.key.iter().zip(&element.key).all(|(field, range)| {
            range.first.len() == field.len()
                && range.last.len() == field.len()
                && range.first <= range.last
                && (map.interval || range.first == range.last)
        });
    let data_fits = match (&element.data, map.data) {
        (ElementData::Nothing, MapData::Nothing) | (ElementData::Mark(_), MapData::Mark) => true,
        (ElementData::Verdict(verdict), MapData::Verdict) => return check_verdict(verdict),
        _ => false,
    };
    if fits && data_fits {
        return Ok(());
    }
    Err(EncodeError::Element { map: map.name.clone(), comment: element.comment.clone() })
}

fn check_verdict(verdict: &Verdict) -> Result<(), EncodeError> {
    match verdict {
        Verdict::Jump(chain) | Verdict::Goto(chain) => check_name(chain).map(|_| ()),
        Verdict::Queue => Err(EncodeError::Foreign { expr: "queue".to_owned() }),
        Verdict::Accept | Verdict::Drop | Verdict::Continue | Verdict::Return => Ok(()),
    }
}

fn check_expr(chain: &str, expr: &Expr) -> Result<(), EncodeError> {
    let fits = |reg: u8, len: usize| {
        if usize::from(reg) + len.max(1).div_ceil(4) <= 16 {
            return Ok(());
        }
        Err(EncodeError::Register { chain: chain.to_owned(), register: reg })
    };
    let data = |bytes: &[u8]| {
        if !bytes.is_empty() && bytes.len() <= 64 {
            return Ok(());
        }
        Err(EncodeError::Data { chain: chain.to_owned() })
    };
    match expr {
        Expr::Meta { dreg, key } => fits(*dreg, if matches!(key, Meta::IifName | Meta::OifName) { 16 } else { 4 }),
        Expr::Ct { dreg, key } => fits(*dreg, if *key == CtKey::OriginalDst6 { 16 } else { 4 }),
        Expr::MarkSet { sreg } => fits(*sreg, 4),
        Expr::Payload { dreg, len, .. } => fits(*dreg, usize::try_from(*len).unwrap_or(usize::MAX / 2)),
        Expr::CtTimeoutSet { name } => check_name(name).map(|_| ()),
        Expr::Bitwise { sreg, dreg, mask, xor } => {
            data(mask)?;
            if mask.len() != xor.len() {
                return Err(EncodeError::Data { chain: chain.to_owned() });
            }
            fits(*sreg, mask.len())?;
            fits(*dreg, mask.len())
        }
        Expr::Cmp { sreg, data: bytes, .. } => data(bytes).and_then(|()| fits(*sreg, bytes.len())),
        Expr::Range { sreg, from, to, .. } => {
            data(from)?;
            if from.len() != to.len() {
                return Err(EncodeError::Data { chain: chain.to_owned() });
            }
            fits(*sreg, from.len())
        }
        Expr::Lookup { map, sreg, into, .. } => {
            check_name(map)?;
            if let LookupInto::Register(dreg) = into {
                fits(*dreg, 4)?;
            }
            fits(*sreg, 1)
        }
        Expr::Immediate { dreg, data: bytes } => data(bytes).and_then(|()| fits(*dreg, bytes.len())),
        Expr::Log { prefix, .. } => {
            if prefix.len() > LOG_PREFIX_MAX || prefix.contains('\0') {
                return Err(EncodeError::LogPrefix(prefix.clone()));
            }
            Ok(())
        }
        Expr::Verdict(verdict) => check_verdict(verdict),
        Expr::TraceOn | Expr::Counter { .. } | Expr::Limit { .. } => Ok(()),
        Expr::Unknown { name, .. } => Err(EncodeError::Foreign { expr: name.clone() }),
    }
}

// ---- bytes

/// A length that is small by construction: names, keys and counts of messages.
fn small(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn request(kind: u16, flags: u16, seq: u32, family: u8, res_id: u16, body: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut writer = Writer(Vec::new());
    writer.message(kind, flags, seq, family, res_id, body);
    writer.0
}

/// Appends attributes. Lengths are filled in once they are known.
struct Writer(Vec<u8>);

impl Writer {
    fn message(&mut self, kind: u16, flags: u16, seq: u32, family: u8, res_id: u16, body: impl FnOnce(&mut Writer)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.0.extend_from_slice(&seq.to_ne_bytes());
        self.0.extend_from_slice(&[0; 4]);
        self.0.extend_from_slice(&[family, 0]);
        self.0.extend_from_slice(&res_id.to_be_bytes());
        body(self);
        let len = small(self.0.len() - start);
        self.0[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    fn bytes(&mut self, kind: u16, data: &[u8]) {
        let len = u16::try_from(data.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(&data[..usize::from(len) - 4]);
        self.pad();
    }

    fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    fn text(&mut self, kind: u16, value: &str) {
        let mut data = value.as_bytes().to_vec();
        data.push(0);
        self.bytes(kind, &data);
    }

    fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Writer)) {
        const NESTED: u16 = 0x8000;
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        body(self);
        let len = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }

    fn pad(&mut self) {
        let padded = self.0.len().next_multiple_of(4);
        self.0.resize(padded, 0);
    }
}

/// Attribute numbers, from the kernel's `nf_tables.h`, `nfnetlink_log.h` and `nfnetlink_conntrack.h`.
pub(super) mod attr {
    macro_rules! numbers {
        ($($name:ident = $number:literal),* $(,)?) => { $(pub(in super::super) const $name: u16 = $number;)* };
    }
    numbers! {
        TYPE_MASK = 0x3fff,
        LIST_ELEM = 1,
        TABLE_NAME = 1, TABLE_FLAGS = 2, TABLE_OWNER = 7,
        CHAIN_TABLE = 1, CHAIN_NAME = 3, CHAIN_HOOK = 4, CHAIN_POLICY = 5, CHAIN_TYPE = 7,
        HOOK_NUM = 1, HOOK_PRIORITY = 2,
        RULE_TABLE = 1, RULE_CHAIN = 2, RULE_HANDLE = 3, RULE_EXPRESSIONS = 4, RULE_USERDATA = 7,
        SET_TABLE = 1, SET_NAME = 2, SET_FLAGS = 3, SET_KEY_TYPE = 4, SET_KEY_LEN = 5, SET_DATA_TYPE = 6,
        SET_DATA_LEN = 7, SET_DESC = 9, SET_ID = 10, SET_USERDATA = 13, SET_EXPR = 17, SET_EXPRESSIONS = 18,
        DESC_SIZE = 1, DESC_CONCAT = 2, FIELD_LEN = 1,
        ELEM_LIST_TABLE = 1, ELEM_LIST_SET = 2, ELEM_LIST_ELEMENTS = 3,
        ELEM_KEY = 1, ELEM_DATA = 2, ELEM_FLAGS = 3, ELEM_TIMEOUT = 4, ELEM_USERDATA = 6, ELEM_EXPR = 7,
        ELEM_OBJREF = 9, ELEM_KEY_END = 10, ELEM_EXPRESSIONS = 11,
        DATA_VALUE = 1, DATA_VERDICT = 2, VERDICT_CODE = 1, VERDICT_CHAIN = 2,
        EXPR_NAME = 1, EXPR_DATA = 2,
        META_DREG = 1, META_KEY = 2, META_SREG = 3,
        PAYLOAD_DREG = 1, PAYLOAD_BASE = 2, PAYLOAD_OFFSET = 3, PAYLOAD_LEN = 4, PAYLOAD_SREG = 5,
        CT_DREG = 1, CT_KEY = 2, CT_DIRECTION = 3, CT_SREG = 4,
        OBJREF_TYPE = 1, OBJREF_NAME = 2,
        BITWISE_SREG = 1, BITWISE_DREG = 2, BITWISE_LEN = 3, BITWISE_MASK = 4, BITWISE_XOR = 5, BITWISE_OP = 6,
        CMP_SREG = 1, CMP_OP = 2, CMP_DATA = 3,
        RANGE_SREG = 1, RANGE_OP = 2, RANGE_FROM = 3, RANGE_TO = 4,
        LOOKUP_SET = 1, LOOKUP_SREG = 2, LOOKUP_DREG = 3, LOOKUP_FLAGS = 5,
        COUNTER_BYTES = 1, COUNTER_PACKETS = 2,
        LIMIT_RATE = 1, LIMIT_UNIT = 2, LIMIT_BURST = 3, LIMIT_TYPE = 4, LIMIT_FLAGS = 5,
        LOG_GROUP = 1, LOG_PREFIX = 2, LOG_SNAPLEN = 3, LOG_LEVEL = 5, LOG_FLAGS = 6,
        IMMEDIATE_DREG = 1, IMMEDIATE_DATA = 2,
        OBJ_TABLE = 1, OBJ_NAME = 2, OBJ_TYPE = 3, OBJ_DATA = 4, OBJ_USERDATA = 8,
        CT_TIMEOUT_L3PROTO = 1, CT_TIMEOUT_L4PROTO = 2, CT_TIMEOUT_DATA = 3,
        GEN_ID = 1,
        TRACE_TABLE = 1, TRACE_CHAIN = 2, TRACE_RULE_HANDLE = 3, TRACE_TYPE = 4, TRACE_VERDICT = 5, TRACE_ID = 6,
        TRACE_LL_HEADER = 7, TRACE_NETWORK_HEADER = 8, TRACE_TRANSPORT_HEADER = 9, TRACE_IIF = 10, TRACE_OIF = 12,
        TRACE_MARK = 14, TRACE_NFPROTO = 15, TRACE_POLICY = 16,
        LOG_CFG_CMD = 1, LOG_CFG_MODE = 2, LOG_CFG_TIMEOUT = 4,
        PACKET_HDR = 1, PACKET_TIMESTAMP = 3, PACKET_INDEV = 4, PACKET_OUTDEV = 5, PACKET_PAYLOAD = 9,
        PACKET_PREFIX = 10,
        CT_TUPLE_ORIG = 1, CT_TUPLE_REPLY = 2, CT_STATUS = 3, CT_PROTOINFO = 4, CT_TIMEOUT = 7, CT_MARK = 8,
        CT_COUNTERS_ORIG = 9, CT_COUNTERS_REPLY = 10, CT_ID = 12, CT_ZONE = 18, CT_MARK_MASK = 21,
        TUPLE_IP = 1, TUPLE_PROTO = 2,
        IP_V4_SRC = 1, IP_V4_DST = 2, IP_V6_SRC = 3, IP_V6_DST = 4,
        PROTO_NUM = 1, PROTO_SRC_PORT = 2, PROTO_DST_PORT = 3, PROTO_ICMP_ID = 4, PROTO_ICMPV6_ID = 7,
        PROTOINFO_TCP = 1, PROTOINFO_TCP_STATE = 1,
        COUNTERS_PACKETS = 1, COUNTERS_BYTES = 2,
    }
}
