//! Make nf_tables so, and look again.
//!
//! [`Nft`] observes tables, replaces ours without losing or leaking one packet, and tells what stands in the way.
//! [`TraceListener`], [`LogListener`] and [`ChangeListener`] hear what the kernel tells by itself; [`Conntrack`] sees
//! the connections. The bytes are made and read by `keepwall_ir::nft`; here is only when to send them, and what their
//! answers mean.
//!
//! Everything happens in the network namespace of the thread that opened the value.

mod conntrack;
mod error;
mod foreign;
mod kernel;
mod listen;
mod look;
mod nft;
mod plan;
mod published;
mod tracing;

pub use conntrack::{Conntrack, Marked};
pub use error::NftError;
pub use foreign::{ForeignVerdict, Probe, foreign_drops};
pub use keepwall_ir::nft::TableFamily;
pub use keepwall_ir::nft::decode::{ElementCounter, Flow, Logged, Tuple, TupleRest};
pub use listen::{ChangeEvent, ChangeListener, LogListener, TraceListener};
pub use nft::{Applied, Features, Foreign, Nft, Outcome};
pub use published::{Published, published};
pub use tracing::{TRACE_TABLE, TraceFilter, TracedStep, Tracer};
