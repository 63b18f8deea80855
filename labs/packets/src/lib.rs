//! Random policies, random packets, three answers each: the reference evaluator (from the semantics), the
//! lowered tables in an interpreter, and real packets through a kernel. They must agree.
//!
//! [`draw`] makes policies and packets, [`model`] gives the first two answers, [`kernel`] the third, [`campaign`]
//! compares them by the million; [`mutate`] breaks tables on purpose and [`probe`] draws the packets that should
//! notice.

pub mod campaign;
pub mod draw;
pub mod kernel;
pub mod model;
pub mod mutate;
pub mod probe;
