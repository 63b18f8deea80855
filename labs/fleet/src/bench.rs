//! `cargo xtask bench fleet`.
