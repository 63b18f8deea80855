//! What is wanted of the kernel, as plain values.
//!
//! [`nft`] describes an nf_tables table: chains, rules as sequences of expressions, maps with their elements.
//! Nothing here talks to a kernel. The same values are encoded to netlink by [`nft::encode`], decoded from a
//! dump by [`nft::decode`], and given their meaning for one packet by [`nft::interpret`], so that a table can
//! be tested, compared and shown without root.

pub mod nft;
