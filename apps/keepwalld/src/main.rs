//! keepwalld: the control plane.

fn main() {}
