//! Any bytes as the body of a request: the first says of which operation.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some((which, body)) = bytes.split_first() {
        keepwall_server::api::fuzz_body(usize::from(*which), body);
    }
});
