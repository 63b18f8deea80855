//! The C library's heap, held short.
//!
//! A server with ten thousand quiet connections keeps what its busiest moment took, spread over as many arenas as it
//! has threads: twice of what it uses. glibc only; elsewhere nothing happens.

/// One arena for all threads. To be called before there are any.
#[allow(unsafe_code, reason = "a setting of the C library's allocator")]
pub fn one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two integers and changes a limit of the allocator under its own lock; a value that it does
    // not know it refuses.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives free pages back to the kernel.
#[allow(unsafe_code, reason = "a function of the C library's allocator")]
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes an integer and works under the allocator's own locks; no memory in use is touched.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_in_use_stays_as_it_is() {
        super::one_arena();
        let kept: Vec<String> = (0..1_000).map(|n| n.to_string()).collect();
        drop((0..1_000).map(|n| vec![n; 1_000]).collect::<Vec<_>>());
        super::trim();
        assert!(kept.iter().enumerate().all(|(n, text)| *text == n.to_string()));
    }
}
