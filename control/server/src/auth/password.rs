//! Passwords: Argon2id with the parameters that OWASP names, and no more of it at once than memory allows.

use std::sync::Arc;

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _, Version};
use tokio::sync::Semaphore;

/// KiB of one hash: OWASP's first choice of Argon2id parameters is 19 MiB, two passes, one lane.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// Hashes at once: 2 × 19 MiB is all that strangers at the login can make us hold.
const HASHES_AT_ONCE: usize = 2;
/// Who waits for a hash, at about 30 ms each and two at once: a second's worth. More are told to come again.
const WAITING_MAX: usize = 64;
/// Characters of a password at least.
pub const PASSWORD_MIN: usize = 12;
/// Characters of a password at most: a hash takes its time by its parameters, not by its input.
pub const PASSWORD_MAX: usize = 256;

/// Too many wait already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

/// Hashes and compares, a few at once.
#[derive(Debug)]
pub struct Passwords {
    hashing: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// Compared with when there is no such user, so that both take as long.
    nobody: String,
}

fn argon2() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).expect("the parameters are within their ranges");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// What is wrong with a password, before anybody hashes it.
#[must_use]
pub fn complaint(user: &str, password: &str) -> Option<String> {
    let count = password.chars().count();
    if !(PASSWORD_MIN..=PASSWORD_MAX).contains(&count) {
        return Some(format!("a password has {PASSWORD_MIN} to {PASSWORD_MAX} characters, this one has {count}"));
    }
    let only = password.chars().all(|c| password.starts_with(c));
    (only || password == user).then(|| "this password is the first one that anybody would try".to_owned())
}

impl Passwords {
    /// Makes the hash of nobody's password.
    ///
    /// # Panics
    /// If the system has no randomness.
    #[must_use]
    pub fn new() -> Passwords {
        Passwords {
            hashing: Arc::new(Semaphore::new(HASHES_AT_ONCE)),
            waiting: Arc::new(Semaphore::new(WAITING_MAX)),
            nobody: hash_now("nobody has this password"),
        }
    }

    /// The hash to keep, in PHC format.
    ///
    /// # Errors
    /// Too many wait already.
    pub async fn hash(&self, password: &str) -> Result<String, Busy> {
        let password = password.to_owned();
        self.run(move || hash_now(&password)).await
    }

    /// Whether it is the password of this hash. Without a hash it is not, and takes as long.
    ///
    /// # Errors
    /// Too many wait already.
    pub async fn verify(&self, hash: Option<&str>, password: &str) -> Result<bool, Busy> {
        let real = hash.is_some();
        let hash = hash.unwrap_or(&self.nobody).to_owned();
        // Longer ones are never right, and cost what others cost.
        let password: String = password.chars().take(PASSWORD_MAX + 1).collect();
        let right = self.run(move || {
            let hash = PasswordHash::new(&hash);
            hash.is_ok_and(|hash| argon2().verify_password(password.as_bytes(), &hash).is_ok())
        });
        Ok(right.await? && real)
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Busy> {
        let _waits = self.waiting.try_acquire().map_err(|_| Busy)?;
        let turn = Arc::clone(&self.hashing).acquire_owned().await.map_err(|_| Busy)?;
        // The turn goes with the work: who hangs up does not make room for another hash before this one is done.
        let done = tokio::task::spawn_blocking(move || {
            let out = work();
            drop(turn);
            out
        });
        done.await.map_err(|_| Busy)
    }
}

impl Default for Passwords {
    fn default() -> Passwords {
        Passwords::new()
    }
}

fn hash_now(password: &str) -> String {
    argon2().hash_password(password.as_bytes()).expect("the system has randomness").to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_is_right_or_wrong_and_nobody_has_none() {
        let passwords = Passwords::new();
        let hash = passwords.hash("correct horse battery").await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(passwords.verify(Some(&hash), "correct horse battery").await.unwrap());
        assert!(!passwords.verify(Some(&hash), "correct horse batterz").await.unwrap());
        assert!(!passwords.verify(None, "nobody has this password").await.unwrap());
    }

    #[test]
    fn passwords_have_12_to_256_characters() {
        assert!(complaint("a", &"ab".repeat(5)).is_some());
        assert!(complaint("a", &"äb".repeat(6)).is_none());
        assert!(complaint("a", &"ab".repeat(128)).is_none());
        assert!(complaint("a", &"ab".repeat(129)).is_some());
        assert!(complaint("a", &"a".repeat(20)).is_some());
        assert!(complaint("administrator", "administrator").is_some());
    }
}
