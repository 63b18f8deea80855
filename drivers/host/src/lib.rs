//! Doors on this machine that are not nf_tables: the agent's local socket, its state files, processes.

pub mod door;
pub mod state;

pub use keepwall_sys::{clock, memory, namespace, peer, process};
