//! Security groups.
pub mod spec;
