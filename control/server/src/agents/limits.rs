//! What the agents' door takes at once.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What the agents' door takes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentLimits {
    /// Handshakes at once, a quarter of them from one address. More wait: each costs a core some 300 µs.
    pub handshakes_max: usize,
    /// Connections at once; more are closed at once. Below the limit of descriptors (`LimitNOFILE=`).
    pub connections_max: usize,
}

impl Default for AgentLimits {
    fn default() -> AgentLimits {
        AgentLimits { handshakes_max: 256, connections_max: 100_000 }
    }
}

/// One address has this part of all turns at most: who connects and is silent holds up none but his own.
const SHARE: usize = 4;
/// So many addresses may be remembered that hold no turn any more, before all such are forgotten.
const SPARE: usize = 1_024;

/// Turns for handshakes, in the order in which they are asked for.
pub(super) struct Turns {
    all: Arc<Semaphore>,
    each: usize,
    sources: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
}

/// A turn; it ends when it is dropped.
pub(super) struct Turn {
    _all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
}

/// Whoever has a whole /64 is one source.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

impl Turns {
    pub(super) fn new(max: usize) -> Turns {
        let all = Arc::new(Semaphore::new(max));
        Turns { all, each: max.div_ceil(SHARE), sources: Mutex::default() }
    }

    /// Waits for a turn.
    pub(super) async fn take(&self, address: IpAddr) -> Option<Turn> {
        let own = {
            let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
            // Looking for what nobody needs is paid for by as many insertions.
            if sources.len() >= SPARE && sources.len() == sources.capacity() {
                sources.retain(|_, own| Arc::strong_count(own) > 1);
            }
            Arc::clone(sources.entry(source(address)).or_insert_with(|| Arc::new(Semaphore::new(self.each))))
        };
        let own = own.acquire_owned().await.ok()?;
        let all = Arc::clone(&self.all).acquire_owned().await.ok()?;
        Some(Turn { _all: all, _own: own })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn who_is_silent_holds_up_none_but_his_own() {
        let turns = Turns::new(8);
        let soon = async |address: &str| {
            let address = address.parse().unwrap();
            tokio::time::timeout(Duration::from_millis(20), turns.take(address)).await.ok().flatten()
        };
        let silent = [soon("192.0.2.1").await.unwrap(), soon("::ffff:192.0.2.1").await.unwrap()];
        assert!(soon("192.0.2.1").await.is_none());
        let near = [soon("2001:db8::1").await.unwrap(), soon("2001:db8::2").await.unwrap()];
        assert!(soon("2001:db8::3").await.is_none());
        assert!(soon("192.0.2.2").await.is_some());
        drop((silent, near));
        assert!(soon("192.0.2.1").await.is_some() && soon("2001:db8::3").await.is_some());
    }

    #[tokio::test]
    async fn addresses_that_hold_no_turn_are_forgotten() {
        let turns = Turns::new(8);
        for n in 0..20 * SPARE as u32 {
            turns.take(std::net::Ipv4Addr::from_bits(n).into()).await.unwrap();
        }
        assert!(turns.sources.lock().unwrap().len() < 4 * SPARE);
    }
}
