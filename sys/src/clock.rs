//! The one clock: time since boot, sleep included, so that a deadline does not wait for a suspended machine and no
//! change of the wall clock moves it.

use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since boot (`CLOCK_BOOTTIME`).
#[must_use]
pub fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let millis = u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000;
    seconds.saturating_mul(1000).saturating_add(millis)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_clock_does_not_run_backwards() {
        let first = super::now_ms();
        assert!(first > 0);
        assert!(super::now_ms() >= first);
    }
}
