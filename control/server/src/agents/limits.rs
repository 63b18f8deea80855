//! What the agents' door takes at once.

/// What the agents' door takes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentLimits {
    /// Handshakes at once. More wait: each costs a core some 300 µs.
    pub handshakes_max: usize,
    /// Connections at once; more are closed at once. Below the limit of descriptors (`LimitNOFILE=`).
    pub connections_max: usize,
}

impl Default for AgentLimits {
    fn default() -> AgentLimits {
        AgentLimits { handshakes_max: 256, connections_max: 100_000 }
    }
}
