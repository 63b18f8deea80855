//! The bodies of the REST API `/api/v1`, its operations, and its problem codes.
//!
//! Server and client share these types; the OpenAPI document is made from them and from the list of operations in
//! [`operations`], which also says what right each one needs. Field names are snake_case, times are RFC 3339 in UTC,
//! unknown fields of a request are refused.
//!
//! Not here: how an operation is served (`keepwall-server`), and how it is called (`keepwall-client`, generated).

pub mod access;
pub mod fleet;
pub mod observe;
pub mod openapi;
pub mod operations;
pub mod problem;
pub mod resources;

pub use access::*;
pub use fleet::*;
pub use observe::*;
pub use problem::{FieldError, Problem};
pub use resources::*;

/// Where all operations begin.
pub const BASE: &str = "/api/v1";
