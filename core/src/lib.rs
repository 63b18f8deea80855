//! The words that every layer shares.
//!
//! Values only: nothing here reads a clock, a file, a socket or the environment. A word that two layers
//! need lives here; a word that one layer needs lives there.

mod address;
mod finding;
mod generation;
mod hex;
mod place;
mod ports;
mod protocol;
mod words;

pub use address::{AddrRange, Family, Prefix, PrefixError};
pub use finding::{Finding, Severity};
pub use generation::Generation;
pub use hex::{hex, unhex};
pub use place::Place;
pub use ports::{PortRange, PortRangeError};
pub use protocol::{Protocol, ProtocolError};
pub use words::{NameError, check_name, nearest};
