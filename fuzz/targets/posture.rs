//! Any bytes as a posture file: a spec or problems, never a panic.
//!
//! What parses is also checked, so that the check too meets names and numbers that nobody would write.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    keepwall_posture::fuzz_parse(bytes);
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(spec) = keepwall_posture::parse(&[keepwall_posture::SourceFile::new("fuzz.yaml", text)])
        && let Err(problems) = keepwall_secgroup::check::check(spec)
    {
        for problem in problems {
            let _ = problem.to_string();
        }
    }
});
