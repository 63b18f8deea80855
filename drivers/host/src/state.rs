//! State files that are whole or not there, however the power went.
//!
//! A file is written beside its name, synced, renamed over it, and the directory is synced. Its first line is a
//! digest of the rest, so that what a disk garbled is noticed and never enforced.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// A state file is never larger than this: 64 MiB, over ten times the intent of 10,000 rules.
pub const STATE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A directory of state files, locked by one process at a time.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Held while this lives; the kernel lets go of it when the process dies, however it dies.
    _lock: File,
}

/// The directory cannot be used.
#[derive(Debug)]
pub enum LockError {
    /// Another process holds it; its id, if it wrote one.
    Held(Option<u32>),
    /// Anything else.
    Io(io::Error),
}

impl std::fmt::Display for LockError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LockError::Held(Some(pid)) => write!(f, "process {pid} is already using it"),
            LockError::Held(None) => f.write_str("another process is already using it"),
            LockError::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for LockError {}

impl StateDir {
    /// Makes the directory if need be (mode 0700; those above it for everybody to pass) and locks it.
    ///
    /// # Errors
    /// Somebody else holds it, or the disk says no.
    pub fn lock(path: &Path) -> Result<StateDir, LockError> {
        if let Some(above) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(above).map_err(LockError::Io)?;
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(LockError::Io)?;
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(LockError::Io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(LockError::Held(holder(path))),
            Err(fs::TryLockError::Error(error)) => return Err(LockError::Io(error)),
        }
        file.set_len(0).and_then(|()| write!(file, "{}", std::process::id())).map_err(LockError::Io)?;
        Ok(StateDir { path: path.to_owned(), _lock: file })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the file `name`.
    ///
    /// # Errors
    /// The disk says no; the old file is still there then.
    pub fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let part = self.path.join(format!("{name}.part"));
        let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&part)?;
        file.write_all(digest(content).as_bytes())?;
        file.write_all(b"\n")?;
        file.write_all(content)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&part, self.path.join(name))?;
        self.sync()
    }

    /// Removes the file `name`; nothing happens if it is not there.
    ///
    /// # Errors
    /// The disk says no.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.sync(),
        }
    }

    /// Reads the file `name`; `None` if it is not there.
    ///
    /// # Errors
    /// See [`read`].
    pub fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        read(&self.path, name)
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

/// Who wrote its id into the lock file of the directory last.
#[must_use]
pub fn holder(path: &Path) -> Option<u32> {
    fs::read_to_string(path.join("lock")).ok()?.trim().parse().ok()
}

/// Reads a state file without the lock: `None` if it is not there.
///
/// # Errors
/// `InvalidData` if its digest does not fit; the message says which file.
pub fn read(directory: &Path, name: &str) -> io::Result<Option<Vec<u8>>> {
    let path = directory.join(name);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut bytes = Vec::new();
    file.take(STATE_BYTES_MAX).read_to_end(&mut bytes)?;
    let damaged = || {
        io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged: its digest does not fit", path.display()))
    };
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(damaged)?;
    let content = bytes.split_off(end + 1);
    if bytes[..end] != *digest(&content).as_bytes() {
        return Err(damaged());
    }
    Ok(Some(content))
}

fn digest(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("keepwall-state-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn what_was_written_is_read_and_what_was_garbled_is_not() {
        let path = scratch("garbled");
        let state = StateDir::lock(&path).unwrap();
        assert_eq!(state.read("a").unwrap(), None);
        state.write("a", b"one\ntwo").unwrap();
        assert_eq!(state.read("a").unwrap().unwrap(), b"one\ntwo");
        let mut bytes = fs::read(path.join("a")).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path.join("a"), bytes).unwrap();
        assert_eq!(state.read("a").unwrap_err().kind(), io::ErrorKind::InvalidData);
        fs::write(path.join("a"), "").unwrap();
        assert!(state.read("a").is_err());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn a_second_lock_is_refused_and_names_the_first() {
        let path = scratch("locked");
        let first = StateDir::lock(&path).unwrap();
        assert!(matches!(StateDir::lock(&path), Err(LockError::Held(Some(pid))) if pid == std::process::id()));
        drop(first);
        StateDir::lock(&path).unwrap();
        fs::remove_dir_all(path).unwrap();
    }
}
