//! What went wrong, what is true now, and what to do next.

use std::error::Error;
use std::fmt;
use std::io;

use keepwall_ir::nft::decode::{DecodeError, KernelError};
use keepwall_ir::nft::encode::{EncodeError, Subject};
use keepwall_sys::netlink::RecvError;

/// Why nf_tables (or conntrack) could not be made so. Unless a variant says otherwise, what was in force still is.
#[derive(Debug)]
#[non_exhaustive]
pub enum NftError {
    /// The kernel cannot be talked to at all.
    Unreachable {
        /// Doing what.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel's answer did not come through. What is in force is unknown: observe.
    Unanswered {
        /// Doing what.
        doing: &'static str,
        /// Why not.
        source: RecvError,
    },
    /// The kernel answered with something that is not understood.
    Garbled {
        /// Where.
        source: DecodeError,
    },
    /// The desired table is not one that can be loaded: a defect of ours.
    Unloadable {
        /// The table.
        table: String,
        /// What about it.
        source: EncodeError,
    },
    /// This process lacks the privilege.
    NotPermitted {
        /// The table.
        table: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another live process owns the table.
    Owned {
        /// The table.
        table: String,
        /// Its owner's netlink port (often its process id); `None` if only the kernel's refusal is known.
        port: Option<u32>,
    },
    /// The table is there with other flags, and flags cannot be changed while it is in force.
    Flags {
        /// The table.
        table: String,
        /// What it has.
        present: u32,
        /// What is wanted.
        wanted: u32,
    },
    /// A chain or map (or a base chain's place) of the same name has other content than the one in force. Changed
    /// chains and maps need fresh names.
    NameReused {
        /// The table.
        table: String,
        /// Which, a phrase each.
        what: Vec<String>,
    },
    /// This kernel lacks a feature.
    Unsupported {
        /// The table.
        table: String,
        /// What needs it.
        subject: Subject,
        /// What the kernel said besides.
        said: Option<String>,
        /// What the kernel said.
        source: io::Error,
    },
    /// Elements of one map overlap each other, or what is there.
    Overlap {
        /// The table.
        table: String,
        /// Which elements.
        subject: Subject,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map has no room for more elements.
    Full {
        /// The table.
        table: String,
        /// Which elements.
        subject: Subject,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something is still used by something else.
    Busy {
        /// The table.
        table: String,
        /// What.
        subject: Subject,
        /// What the kernel said.
        source: io::Error,
    },
    /// The transaction is larger than the send queue.
    TooLarge {
        /// The table.
        table: String,
        /// How long, in bytes.
        bytes: usize,
    },
    /// Refused for another reason.
    Refused {
        /// The table, or what else was asked for.
        table: String,
        /// What the kernel was at.
        subject: Subject,
        /// What the kernel said besides.
        said: Option<String>,
        /// What the kernel said.
        source: io::Error,
    },
    /// The table changed each time while it was read.
    Moving {
        /// The table.
        table: String,
    },
    /// Another process listens to this nfnetlink_log group.
    GroupTaken {
        /// Its number.
        group: u16,
    },
}

impl fmt::Display for NftError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NftError::Unreachable { doing, .. } => {
                write!(f, "{doing}: the kernel's netfilter cannot be reached; is nf_tables built in, and is this root?")
            }
            NftError::Unanswered { doing, .. } => {
                write!(f, "{doing}: no answer from the kernel; what is in force is unknown, so look again")
            }
            NftError::Garbled { .. } => f.write_str("an answer of the kernel is not understood; please report this"),
            NftError::Unloadable { table, .. } => {
                write!(f, "table {table} cannot be loaded; what was in force still is; please report this")
            }
            NftError::NotPermitted { table, .. } => {
                write!(f, "table {table}: not permitted; run as root (CAP_NET_ADMIN in this network namespace)")
            }
            NftError::Owned { table, port } => {
                write!(f, "table {table} belongs to another process")?;
                if let Some(port) = port {
                    write!(f, " (netlink port {port}, often its process id)")?;
                }
                f.write_str("; stop the other keepwall-agent first")
            }
            NftError::Flags { table, present, wanted } => write!(
                f,
                "table {table} is there with flags {present} and {wanted} are wanted; flags cannot be changed in force: \
                 remove the table first (nothing is filtered meanwhile)"
            ),
            NftError::NameReused { table, what } => write!(
                f,
                "table {table}: {} would change under the same name, which cannot be done without a gap; changed \
                 chains and maps need fresh names; please report this",
                what.join(", ")
            ),
            NftError::Unsupported { table, subject, said, .. } => {
                write!(f, "table {table}: this kernel lacks what {subject} needs")?;
                say(f, said)?;
                f.write_str("; see the features that `probe` finds")
            }
            NftError::Overlap { table, subject, .. } => write!(
                f,
                "table {table}: {subject} overlap each other or what is there, which nf_tables refuses; please report \
                 this"
            ),
            NftError::Full { table, subject, .. } => {
                write!(f, "table {table}: no room for {subject}; lower the number of rules or members")
            }
            NftError::Busy { table, subject, .. } => {
                write!(f, "table {table}: {subject} is still in use; somebody else's rule may refer to it")
            }
            NftError::TooLarge { table, bytes } => write!(
                f,
                "table {table}: a transaction of {bytes} bytes is more than the kernel takes; run as root, or lower the \
                 number of rules"
            ),
            NftError::Refused { table, subject, said, .. } => {
                write!(f, "{table}: the kernel refuses {subject}")?;
                say(f, said)
            }
            NftError::Moving { table } => {
                write!(f, "table {table} changed each time while it was read; find out who changes it (nft monitor)")
            }
            NftError::GroupTaken { group } => {
                write!(f, "another process listens to log group {group}; stop it or choose another group")
            }
        }
    }
}

fn say(f: &mut fmt::Formatter<'_>, said: &Option<String>) -> fmt::Result {
    match said {
        Some(said) => write!(f, " (\"{said}\")"),
        None => Ok(()),
    }
}

impl Error for NftError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            NftError::Unreachable { source, .. }
            | NftError::NotPermitted { source, .. }
            | NftError::Unsupported { source, .. }
            | NftError::Overlap { source, .. }
            | NftError::Full { source, .. }
            | NftError::Busy { source, .. }
            | NftError::Refused { source, .. } => Some(source),
            NftError::Unanswered { source, .. } => Some(source),
            NftError::Garbled { source } => Some(source),
            NftError::Unloadable { source, .. } => Some(source),
            NftError::Owned { .. }
            | NftError::Flags { .. }
            | NftError::NameReused { .. }
            | NftError::TooLarge { .. }
            | NftError::Moving { .. }
            | NftError::GroupTaken { .. } => None,
        }
    }
}

/// The kernel's error number as a sentence.
pub(crate) fn refused(table: &str, subject: Subject, error: KernelError) -> NftError {
    let table = table.to_owned();
    let source = io::Error::from_raw_os_error(error.errno);
    let said = error.message;
    match (error.errno, &subject) {
        (EPERM, Subject::Batch) => NftError::NotPermitted { table, source },
        // With the privilege, only an owner stands in the way.
        (EPERM, _) => NftError::Owned { table, port: None },
        (EOPNOTSUPP | EAFNOSUPPORT | EPROTONOSUPPORT, _) => NftError::Unsupported { table, subject, said, source },
        // What an unknown expression or object type gives, as no module brings it.
        (ENOENT, Subject::Rule { .. }) if said.is_none() => NftError::Unsupported { table, subject, said, source },
        (EEXIST | ENOTEMPTY, Subject::Elements { .. }) => NftError::Overlap { table, subject, source },
        (ENFILE | ENOSPC, _) => NftError::Full { table, subject, source },
        (EBUSY, _) => NftError::Busy { table, subject, source },
        _ => NftError::Refused { table, subject, said, source },
    }
}

const EPERM: i32 = 1;
pub(crate) const ENOENT: i32 = 2;
pub(crate) const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const ENFILE: i32 = 23;
const ENOSPC: i32 = 28;
const ENOTEMPTY: i32 = 39;
pub(crate) const EMSGSIZE: i32 = 90;
const EPROTONOSUPPORT: i32 = 93;
const EOPNOTSUPP: i32 = 95;
const EAFNOSUPPORT: i32 = 97;
