//! What each machine of a fleet is told, in which order, and who may say so.
//!
//! ```text
//! posture ─┐
//!          ├▶ world ─bundle, change─▶ sync (server) ═══ network ═══ sync (instance) ─▶ agent
//! enrolled ┘     ▲                        ▲
//!                └──────── rollout ───────┘  which machines have the new posture already
//! ```
//!
//! Pure: no clock, file, socket or environment, so that a whole fleet with its failures runs in a test
//! (`tests/simulation.rs`).

pub mod access;
pub mod bundle;
pub mod rollout;
pub mod sync;
pub mod world;
