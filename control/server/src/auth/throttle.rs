//! Guessing made slow: each failure in a row doubles how long the next attempt has to wait.
//!
//! Counted by user and by address. A user's wait stays short, or anybody could shut somebody out by guessing badly
//! in their name; an address's wait grows long. An attempt counts as a failure from its beginning, so that a burst of
//! parallel guesses gains nothing.
//!
//! Not seen here: guesses spread over many addresses and users. Long passwords and codes answer those. Each server
//! counts for itself.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;

/// Attempts that wait for nothing.
const FREE: u32 = 5;
/// The longest wait of a user, milliseconds.
const USER_WAIT_MS_MAX: u64 = 30_000;
/// The longest wait of an address, milliseconds.
const ADDRESS_WAIT_MS_MAX: u64 = 900_000;
/// What nobody tried for so long is forgotten, milliseconds.
const FORGET_MS: u64 = 3_600_000;
/// Users and addresses that are remembered, at about 100 bytes each: 1.6 MiB. The one that may try again soonest
/// goes first.
const ENTRIES_MAX: usize = 16_384;

#[derive(Clone, Copy, Debug)]
struct Entry {
    failures: u32,
    last_ms: u64,
    free_from_ms: u64,
}

/// Counts failures.
#[derive(Debug, Default)]
pub struct Throttle {
    entries: Mutex<HashMap<String, Entry>>,
}

/// Addresses that one person has at will count as one.
fn place(address: &str) -> String {
    match address.parse() {
        Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_none() => {
            let [a, b, c, d, ..] = v6.segments();
            format!("a {a:x}:{b:x}:{c:x}:{d:x}::/64")
        }
        _ => format!("a {address}"),
    }
}

impl Throttle {
    /// Begins an attempt.
    ///
    /// # Errors
    /// How long to wait first, in seconds.
    ///
    /// # Panics
    /// Never: nothing panics while it holds the lock.
    pub fn attempt(&self, user: &str, address: &str, now_ms: u64) -> Result<(), u64> {
        let keys = [(format!("u {user}"), USER_WAIT_MS_MAX), (place(address), ADDRESS_WAIT_MS_MAX)];
        let mut entries = self.entries.lock().expect("nothing panics while it holds the lock");
        let wait = keys.iter().filter_map(|(key, _)| entries.get(key)).map(|one| one.free_from_ms).max();
        if let Some(until) = wait.filter(|until| *until > now_ms) {
            return Err((until - now_ms).div_ceil(1_000));
        }
        for (key, wait_max) in keys {
            if entries.len() >= ENTRIES_MAX && !entries.contains_key(&key) {
                entries.retain(|_, one| one.last_ms + FORGET_MS > now_ms);
                if entries.len() >= ENTRIES_MAX
                    && let Some(soonest) = entries.iter().min_by_key(|(_, e)| e.free_from_ms).map(|(k, _)| k.clone())
                {
                    entries.remove(&soonest);
                }
            }
            let one = entries.entry(key).or_insert(Entry { failures: 0, last_ms: now_ms, free_from_ms: 0 });
            if one.last_ms + FORGET_MS <= now_ms {
                one.failures = 0;
            }
            one.failures = one.failures.saturating_add(1);
            one.last_ms = now_ms;
            let doublings = one.failures.saturating_sub(FREE).min(20);
            one.free_from_ms = if doublings == 0 { 0 } else { now_ms + (1_000 << (doublings - 1)).min(wait_max) };
        }
        Ok(())
    }

    /// The attempt succeeded: neither user nor address is slowed any more.
    ///
    /// # Panics
    /// Never: nothing panics while it holds the lock.
    pub fn succeeded(&self, user: &str, address: &str) {
        let mut entries = self.entries.lock().expect("nothing panics while it holds the lock");
        entries.remove(&format!("u {user}"));
        // One good login from an address that tries other names as well takes only its own attempt back: whoever has
        // an account and guesses at another's waits after each guess, and longer each time.
        if let Some(one) = entries.get_mut(&place(address)) {
            one.failures = one.failures.saturating_sub(1);
            one.free_from_ms = 0;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_end() {
        let throttle = Throttle::default();
        let mut now = 1_000_000;
        for _ in 0..FREE {
            assert_eq!(throttle.attempt("alice", "192.0.2.1", now), Ok(()));
        }
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(throttle.attempt("alice", "192.0.2.1", now), Ok(()));
            let wait = throttle.attempt("alice", "192.0.2.1", now).unwrap_err();
            waits.push(wait);
            now += wait * 1_000;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]);
    }

    #[test]
    fn a_user_cannot_be_shut_out_for_long_by_others() {
        let throttle = Throttle::default();
        let mut now = 1_000_000;
        for n in 0..50_u64 {
            now += 31_000;
            assert_eq!(throttle.attempt("alice", &format!("192.0.2.{n}"), now), Ok(()));
        }
        assert!(throttle.attempt("alice", "198.51.100.1", now + 30_000).is_ok());
    }

    #[test]
    fn success_forgets_the_user_but_not_what_the_address_did_to_others() {
        let throttle = Throttle::default();
        for n in 0..FREE + 1 {
            assert_eq!(throttle.attempt(&format!("user{n}"), "192.0.2.1", 1_000_000), Ok(()));
        }
        assert!(throttle.attempt("eve", "192.0.2.1", 1_000_000).is_err());
        assert_eq!(throttle.attempt("eve", "192.0.2.1", 1_002_000), Ok(()));
        throttle.succeeded("eve", "192.0.2.1");
        assert_eq!(throttle.attempt("alice", "192.0.2.1", 1_002_000), Ok(()));
        assert_eq!(throttle.attempt("eve", "192.0.2.1", 1_002_000), Err(2));
    }

    #[test]
    fn one_network_of_ipv6_is_one_place() {
        assert_eq!(place("2001:db8::1"), place("2001:db8::ffff:1"));
        assert_ne!(place("2001:db8::1"), place("2001:db8:0:1::1"));
        assert_ne!(place("192.0.2.1"), place("192.0.2.2"));
    }

    #[test]
    fn strangers_cannot_fill_the_memory() {
        let throttle = Throttle::default();
        for n in 0..3_000_u32 {
            let address = format!("2001:db8:{:x}:{:x}::1", n / 100, n % 100);
            for part in 0..6 {
                throttle.attempt(&format!("user{n}.{part}"), &address, 1_000_000).ok();
            }
        }
        assert!(throttle.entries.lock().map(|entries| entries.len()).unwrap_or(usize::MAX) <= ENTRIES_MAX);
    }
}
