//! A small cloud on one machine: network namespaces, real cables between them, real packets.
//!
//! ```text
//!   client   10.77.0.10  fd77::10  ───┐
//!                                     ├── router ──┬── web  10.77.1.10  fd77:1::10
//!   attacker 10.77.9.66  fd77:9::66 ──┘            └── db   10.77.2.10  fd77:2::10
//!            203.0.113.66 2001:db8:9::66 (stands for the Internet)
//! ```
//!
//! Each machine is a namespace with one device `eth0`. The same programs that protect a real machine run in `web`
//! and `db`. The lab of a [`fleet`] has other machines behind the same router. Everything has a name that only the lab uses, and is found again by that name: a lab that was killed is
//! cleared away by the next one, and nothing else is ever touched.

pub mod coexist;
pub mod drill;
pub mod fleet;
pub mod machine;
pub mod probe;
pub mod prove;
pub mod serve;

use std::path::PathBuf;

/// What went wrong in the lab, in words.
pub type Error = String;

/// The programs that the lab runs in its machines.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The command line.
    pub keepwall: PathBuf,
    /// The agent.
    pub agent: PathBuf,
}

/// One line of a table: what was tried, what should happen, what did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What it is about.
    pub what: String,
    /// What was expected.
    pub expected: String,
    /// What was seen.
    pub seen: String,
    /// Whether that is what was expected.
    pub good: bool,
}
