//! The control plane: API, agents, controller.
//!
//! ```text
//!  people, tools ──▶ api ──▶ auth ──▶ fleet ──▶ store ◀── other servers
//!                                       ▲
//!  instances ──────▶ agents ────────────┘
//! ```

pub mod agents;
pub mod api;
pub mod auth;
pub mod ca;
pub mod config;
pub mod fleet;
pub mod metrics;
pub mod run;
pub mod seal;
