//! The instance side of the control plane, without privilege: enrolment, one stream, renewal.
//!
//! ```text
//!  enroll ──▶ Identity (key made here, certificate, server, its authority)
//!     │
//!     ▼
//!  run ──▶ dial (direct, or through an HTTP proxy) ──▶ stream, or long poll ──▶ Machine (the agent's local socket)
//! ```
//!
//! What it is told, it hands to a [`Machine`]; it decides about order and proof of contact, and about nothing else.

pub mod contact;
pub mod dial;
pub mod enroll;
pub mod identity;
pub mod machine;
pub mod run;
pub mod tls;
pub mod token;

pub use identity::Identity;
pub use machine::Machine;
pub use run::{Ended, Pace, Uplink};
