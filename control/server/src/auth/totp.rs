//! Codes of an authenticator (RFC 6238: SHA-1, six digits, 30 seconds, as every app has them), each good for once.

use serde::{Deserialize, Serialize};
use totp_rs::{Algorithm, Builder, Secret, Totp};

use crate::seal::{Seal, random};

/// Bytes of a secret: what RFC 4226 recommends.
const SECRET_BYTES: usize = 20;
/// Steps before and after the present one that are accepted: clocks differ.
const SKEW: u16 = 1;

/// A user's authenticator as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredTotp {
    /// Its secret, sealed.
    pub sealed: String,
    /// False until a code proved that it works: until then it is not asked for.
    pub verified: bool,
    /// The newest step of which a code was used; it and all before are worth nothing.
    pub last_step: u64,
}

/// A new authenticator: what to store, the secret in base32, and the link for it.
#[must_use]
pub fn enrol(seal: &Seal, user: &str) -> (StoredTotp, String, String) {
    let bytes: [u8; SECRET_BYTES] = random();
    let secret = Secret::new_stack(bytes).to_base32();
    let label: String =
        user.bytes().map(|b| if b == b'@' { "%40".to_owned() } else { char::from(b).to_string() }).collect();
    let url = format!("otpauth://totp/Keepwall:{label}?secret={secret}&issuer=Keepwall");
    (StoredTotp { sealed: seal.seal(&purpose(user), &bytes), verified: false, last_step: 0 }, secret, url)
}

/// The step that a code is of, if it is right and neither it nor a later one was used before.
#[must_use]
pub fn check(seal: &Seal, user: &str, stored: &StoredTotp, code: &str, now_ms: u64) -> Option<u64> {
    if code.len() != 6 || !code.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let step = totp(&seal.open(&purpose(user), &stored.sealed).ok()?)?.check(code, now_ms / 1_000)?;
    (step > stored.last_step).then_some(step)
}

/// The code of a secret in base32 at a time; for tests and those who enrol a program.
#[must_use]
pub fn code(secret: &str, now_ms: u64) -> Option<String> {
    let secret = Secret::try_from_base32(secret).ok()?;
    Some(totp(secret.as_bytes())?.generate(now_ms / 1_000).to_string())
}

fn purpose(user: &str) -> String {
    format!("totp/{user}")
}

fn totp(secret: &[u8]) -> Option<Totp> {
    let builder = Builder::new().with_algorithm(Algorithm::SHA1).with_digits(6).with_step_duration(30).with_skew(SKEW);
    builder.with_secret(secret).build().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_code_works_once_and_not_after_a_later_one() {
        let seal = Seal::new(&[1; 32]);
        let (mut stored, secret, url) = enrol(&seal, "alice@example");
        assert!(url.starts_with("otpauth://totp/Keepwall:alice%40example?secret="));
        let now = 1_700_000_000_000;
        let this = code(&secret, now).unwrap();
        let next = code(&secret, now + 30_000).unwrap();
        stored.last_step = check(&seal, "alice@example", &stored, &this, now).unwrap();
        assert_eq!(check(&seal, "alice@example", &stored, &this, now), None);
        stored.last_step = check(&seal, "alice@example", &stored, &next, now).unwrap();
        assert_eq!(check(&seal, "alice@example", &stored, &this, now), None);
        assert_eq!(check(&seal, "bob", &stored, &code(&secret, now + 60_000).unwrap(), now + 60_000), None);
        assert_eq!(check(&seal, "alice@example", &stored, &code(&secret, now + 300_000).unwrap(), now), None);
    }

    #[test]
    fn codes_are_those_of_the_rfc() {
        // RFC 6238, appendix B, SHA-1, the last six of eight digits.
        let secret = Secret::new_stack(*b"12345678901234567890").to_base32();
        assert_eq!(code(&secret, 59_000).unwrap(), "287082");
        assert_eq!(code(&secret, 1_111_111_109_000).unwrap(), "081804");
    }
}
