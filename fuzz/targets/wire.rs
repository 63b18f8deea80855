//! Any bytes as frames between an instance and the control plane: messages or an error, never a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| keepwall_wire::fuzz_frames(bytes));
