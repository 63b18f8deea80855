//! What is seen on this machine, without changing anything: [`interfaces`], [`listeners`], administration
//! [`sessions`].
//!
//! Everything comes from `/proc` and rtnetlink of the calling thread's network namespace. Other people decide what
//! stands there (process names, command lines), so every read is bounded and every text is cleaned before it is
//! shown.

pub mod interfaces;
pub mod listeners;
pub mod processes;
pub mod sessions;
pub mod sockets;
