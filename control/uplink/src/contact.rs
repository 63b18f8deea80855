//! The last word about contact with the server, in the uplink's directory, for whoever asks on this machine.
//!
//! It is a hint for people. The uplink decides nothing by it, and its directory is the uplink's own: who reads it as
//! root reads what somebody without privilege wrote.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The file in the uplink's directory.
pub const FILE: &str = "contact";
/// Reasons are cut there; they name an address and what failed.
const WHY_BYTES_MAX: usize = 512;
/// A note is shorter, all of its reason escaped.
const FILE_BYTES_MAX: u64 = 8_192;

/// How it stands with the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "contact", rename_all = "snake_case")]
pub enum Contact {
    /// It has welcomed this machine.
    Made,
    /// There is none; it is dialled again and again.
    Lost {
        /// What failed last, in words.
        why: String,
    },
    /// It takes this machine's certificate no more: the machine was removed there, or its certificate revoked.
    Revoked,
}

/// A word, and since when it is so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// How it stands.
    #[serde(flatten)]
    pub contact: Contact,
    /// Seconds since 1970. A loss is as old as its first failure.
    pub since_s: u64,
}

impl Noted {
    /// What to write once `contact` is so, at `now_s`; `None` if that is written already.
    #[must_use]
    pub fn after(before: Option<&Noted>, mut contact: Contact, now_s: u64) -> Option<Noted> {
        if let Contact::Lost { why } = &mut contact {
            why.truncate(why.floor_char_boundary(WHY_BYTES_MAX));
        }
        match before {
            Some(before) if before.contact == contact => None,
            Some(Noted { contact: Contact::Lost { .. }, since_s }) if matches!(contact, Contact::Lost { .. }) => {
                Some(Noted { contact, since_s: *since_s })
            }
            _ => Some(Noted { contact, since_s: now_s }),
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// The disk.
    pub fn write(&self, directory: &Path) -> std::io::Result<()> {
        let beside = directory.join(format!("{FILE}.new"));
        fs::write(&beside, serde_json::to_vec(self)?)?;
        fs::rename(&beside, directory.join(FILE))
    }

    /// What is written there, if anything that is understood.
    #[must_use]
    pub fn read(directory: &Path) -> Option<Noted> {
        let path = directory.join(FILE);
        // Whoever may write there could put a pipe in the way, which would be waited for.
        let is_file = path.symlink_metadata().is_ok_and(|found| found.is_file());
        let mut text = Vec::new();
        File::open(path).ok().filter(|_| is_file)?.take(FILE_BYTES_MAX).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Forgets it: nobody knows yet how it stands.
    pub fn remove(directory: &Path) {
        let _ = fs::remove_file(directory.join(FILE));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn lost(why: &str) -> Contact {
        Contact::Lost { why: why.into() }
    }

    #[test]
    fn a_loss_is_as_old_as_its_first_failure_and_nothing_is_written_twice() {
        let made = Noted::after(None, Contact::Made, 10).unwrap();
        assert_eq!(Noted::after(Some(&made), Contact::Made, 20), None);
        let first = Noted::after(Some(&made), lost("cut"), 30).unwrap();
        let second = Noted::after(Some(&first), lost("refused"), 40).unwrap();
        assert_eq!(second, Noted { contact: lost("refused"), since_s: 30 });
        assert_eq!(Noted::after(Some(&second), Contact::Revoked, 50).unwrap().since_s, 50);
        let long = Noted::after(None, lost(&"ä".repeat(WHY_BYTES_MAX)), 1).unwrap();
        assert!(matches!(long.contact, Contact::Lost { why } if why.len() <= WHY_BYTES_MAX));
    }

    #[test]
    fn what_is_written_is_read_back_and_anything_else_is_nothing() {
        let directory = std::env::temp_dir().join(format!("keepwall-contact-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        assert_eq!(Noted::read(&directory), None);
        for contact in [Contact::Made, lost("a \"b\""), Contact::Revoked] {
            let noted = Noted { contact, since_s: 7 };
            noted.write(&directory).unwrap();
            assert_eq!(Noted::read(&directory), Some(noted));
        }
        fs::write(directory.join(FILE), "").unwrap();
        assert_eq!(Noted::read(&directory), None);
        Noted::remove(&directory);
        std::os::unix::fs::symlink("/dev/zero", directory.join(FILE)).unwrap();
        assert_eq!(Noted::read(&directory), None);
        fs::remove_dir_all(directory).unwrap();
    }
}
