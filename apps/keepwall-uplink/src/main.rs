//! keepwall-uplink: speaks with the control plane for the agent, without privilege.

fn main() {}
