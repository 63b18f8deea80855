//! Security groups, decided.
//!
//! ```text
//! Spec ─check─▶ Checked ─resolve─▶ Intent ─lower─▶ nf_tables values
//!                  │                                     │
//!                  └──────── evaluate ═══ must agree ════┘ (keepwall_ir::nft::interpret, and the kernel)
//! ```
//!
//! Pure: no clock, file, socket or environment.

mod cells;
pub mod check;
pub mod evaluate;
mod expand;
pub mod health;
pub mod intent;
pub mod judge;
pub mod lower;
pub mod reach;
pub mod spec;
