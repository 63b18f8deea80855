//! The agent's local socket: who connects is known from the kernel, before a byte is read.

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use keepwall_sys::peer::{self, Peer};

/// A listening local socket. Its file goes when it does.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Listens at `path`, open to whoever may reach the file: the agent's user and group. A stale file of a dead
    /// agent is replaced; the caller holds the state lock, so no living one can be behind it.
    ///
    /// # Errors
    /// The directory cannot be made, or the path is too long for a socket (107 bytes).
    pub fn open(path: &Path) -> io::Result<Door> {
        if let Some(directory) = path.parent() {
            // Whom the socket itself lets in has to get as far as the socket, whatever the umask is.
            if !directory.exists() {
                std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
                std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
            }
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
        Ok(Door { listener, path: path.to_owned() })
    }

    /// Lets `uid` connect besides root and our group. It becomes the owner of the file: what an owner may do besides,
    /// opening it to more users, shows them what is for everybody to see.
    ///
    /// # Errors
    /// Not root, or without `CAP_CHOWN`.
    pub fn admit(path: &Path, uid: u32) -> io::Result<()> {
        let own = keepwall_sys::process::user().uid;
        // Ours again first: nobody who was let in before has left it open, and only an owner may shut it.
        std::os::unix::fs::lchown(path, Some(own), None)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
        std::os::unix::fs::lchown(path, Some(uid), None)
    }

    /// The next one who connects.
    ///
    /// # Errors
    /// Descriptors are used up.
    pub fn accept(&self) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = self.listener.accept()?;
        let peer = peer::of(&stream)?;
        Ok((stream, peer))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Nothing to do if it is gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}
