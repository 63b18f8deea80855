//! Secrets at rest: sealed with a key that is not in the store.
//!
//! A copy of the store, a backup or a stolen database gives nobody the authority's key or a second factor. Several
//! servers of one store share the key file.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

/// Seals and opens.
pub struct Seal {
    key: LessSafeKey,
    /// For the audit log's chain: derived, so that one file is all there is to keep.
    audit: [u8; 32],
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal")
    }
}

/// What is sealed cannot be opened: another key, or somebody changed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a sealed secret does not open: the seal key is another one, or the secret was changed")
    }
}

impl std::error::Error for Broken {}

impl Seal {
    /// With the bytes of the key file.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Seal {
        let derive = |purpose: &[u8]| {
            let tag = ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key), purpose);
            let mut out = [0; 32];
            out.copy_from_slice(tag.as_ref());
            out
        };
        let sealing = UnboundKey::new(&CHACHA20_POLY1305, &derive(b"keepwall seal 1")).expect("32 bytes are a key");
        Seal { key: LessSafeKey::new(sealing), audit: derive(b"keepwall audit 1") }
    }

    /// The audit log's key.
    #[must_use]
    pub fn audit_key(&self) -> [u8; 32] {
        self.audit
    }

    /// Seals for one purpose; opened for another it does not open.
    #[must_use]
    pub fn seal(&self, purpose: &str, secret: &[u8]) -> String {
        let nonce: [u8; NONCE_LEN] = random();
        let mut sealed = secret.to_vec();
        // 96 random bits: some thousand secrets are far from a repeat.
        let done = self.key.seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(purpose.as_bytes()),
            &mut sealed,
        );
        done.expect("a secret is far shorter than the cipher's limit");
        let mut out = nonce.to_vec();
        out.extend(sealed);
        STANDARD.encode(out)
    }

    /// Opens.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn open(&self, purpose: &str, sealed: &str) -> Result<Vec<u8>, Broken> {
        let bytes = STANDARD.decode(sealed).map_err(|_| Broken)?;
        let (nonce, rest) = bytes.split_first_chunk::<NONCE_LEN>().ok_or(Broken)?;
        let mut rest = rest.to_vec();
        let opened = self
            .key
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(purpose.as_bytes()), &mut rest)
            .map_err(|_| Broken)?;
        Ok(opened.to_vec())
    }
}

/// Random bytes that nobody can guess.
///
/// # Panics
/// The kernel has no randomness, which nothing survives.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut out = [0; N];
    SystemRandom::new().fill(&mut out).expect("the kernel has randomness");
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_key_for_its_purpose_only() {
        let (seal, other) = (Seal::new(&[1; 32]), Seal::new(&[2; 32]));
        let sealed = seal.seal("totp alice", b"secret");
        assert_eq!(seal.open("totp alice", &sealed).unwrap(), b"secret");
        assert!(seal.open("totp bob", &sealed).is_err() && other.open("totp alice", &sealed).is_err());
        assert!(seal.open("totp alice", "").is_err() && seal.open("totp alice", "!").is_err());
        assert_ne!(seal.audit_key(), other.audit_key());
    }
}
