//! Safe doors to the kernel: the only crate with `unsafe`, and as little of it as possible.
//!
//! Each module opens one door: [`netlink`] sockets, network [`namespace`]s, [`tun`] devices, [`link`]s with their
//! addresses and routes, [`raw`] IP sockets, [`process`]es, the [`peer`] of a local socket, the [`clock`]. No policy
//! and no formats of nf_tables here; what is read is handed on as bytes.

pub mod clock;
pub mod dial;
pub mod link;
pub mod memory;
pub mod namespace;
pub mod netlink;
pub mod peer;
pub mod process;
pub mod raw;
pub mod tun;

mod option;
