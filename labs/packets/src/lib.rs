//! Random policies and random packets, three answers each: the reference evaluator (from the semantics), the
//! lowered tables in an interpreter, and real packets through a kernel. They must agree.
//!
//! [`draw`] makes policies and packets, [`model`] compares the first two answers, [`kernel`] the third,
//! [`mutate`] breaks tables on purpose to see whether the comparison would notice.

pub mod draw;
pub mod model;
pub mod mutate;
