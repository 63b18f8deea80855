//! Any bytes as a frame on the agent's socket: a request or an error, never a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| keepwall_link::fuzz_request(bytes));
