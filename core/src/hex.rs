//! Bytes as people and JSON see them: two lower-case digits each.

use std::fmt::Write as _;

/// Bytes in hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        // Writing to a string does not fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The 32 bytes of a digest; `None` unless there are just 64 digits.
#[must_use]
pub fn unhex(text: &str) -> Option<[u8; 32]> {
    // Digits only: the number parser below would take a sign as well.
    if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut out = [0; 32];
    for (n, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(n * 2..n * 2 + 2)?, 16).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_written_and_read_and_nothing_else_is() {
        let digest = [0xa7; 32];
        assert_eq!(unhex(&hex(&digest)), Some(digest));
        assert_eq!(unhex(&hex(&digest).to_uppercase()), Some(digest));
        for wrong in ["", "07", &"g".repeat(64), &"+7".repeat(32), &"é".repeat(32)] {
            assert_eq!(unhex(wrong), None, "{wrong}");
        }
    }
}
