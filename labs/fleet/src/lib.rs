//! Fleets on one machine: a server, and instances that stand for real ones.
//!
//! An instance here is the real uplink (its TLS, its frames, its probes of a new connection) over a machine that keeps
//! in memory what a real one enforces. What is proved here is everything between the API and the uplink; that the
//! kernel then enforces it, `labs/cloud` and `labs/packets` prove.

pub mod bench;
pub mod machine;
pub mod server;
pub mod swarm;

pub use machine::{Log, StandIn};
pub use server::{Scratch, config};
