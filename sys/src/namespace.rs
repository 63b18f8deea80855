//! Network namespaces.
//!
//! Entering one concerns the calling thread only; threads it starts later are born in it. Sockets stay where they were
//! opened.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

const OF_THIS_THREAD: &str = "/proc/thread-self/ns/net";

/// A network namespace, held open: it lives at least as long as this value.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
}

impl NetNs {
    /// The one at a path: where one was pinned, `/run/netns/…`, or `/proc/<pid>/ns/net`.
    ///
    /// # Errors
    /// There is no such path.
    pub fn open(path: impl AsRef<Path>) -> io::Result<NetNs> {
        Ok(NetNs { fd: File::open(path)?.into() })
    }

    /// The one of the calling thread.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn current() -> io::Result<NetNs> {
        NetNs::open(OF_THIS_THREAD)
    }

    /// Moves the calling thread into it.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`; `EINVAL` if the path was no network namespace.
    pub fn enter(&self) -> io::Result<()> {
        enter(&self.fd)
    }

    /// Moves the calling thread into a new one, empty but for a loopback device that is down.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn unshare() -> io::Result<NetNs> {
        // SAFETY: the danger of unshare(2) is in `CLONE_FILES`, after which descriptors of this process mean
        // different things in different threads; only `CLONE_NEWNET` is asked for, which leaves descriptors alone.
        #[expect(unsafe_code, reason = "rustix marks all of unshare(2) for the sake of CLONE_FILES")]
        unsafe {
            rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)?;
        }
        NetNs::current()
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Moves the calling thread into the namespace behind a descriptor.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`; `EINVAL` if it is no network namespace.
pub fn enter(fd: impl AsFd) -> io::Result<()> {
    Ok(move_into_link_name_space(fd.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Gives the calling thread's namespace a name in the file system, so that it outlives all of its processes and can be
/// opened by others. The file is created; it must not exist.
///
/// # Errors
/// The file exists or cannot be created, or the process may not mount.
pub fn pin(path: impl AsRef<Path>) -> io::Result<()> {
    let path = path.as_ref();
    File::create_new(path)?;
    mount_bind(OF_THIS_THREAD, path).inspect_err(|_| {
        let _ = fs::remove_file(path);
    })?;
    Ok(())
}

/// Undoes [`pin`]: the name goes at once, the namespace with its last user.
///
/// # Errors
/// Nothing is pinned there.
pub fn unpin(path: impl AsRef<Path>) -> io::Result<()> {
    unmount(path.as_ref(), UnmountFlags::DETACH)?;
    fs::remove_file(path)
}

/// Runs `work` on a thread of its own in a new namespace; the namespace goes when the work is done (and nothing else
/// that it started lives on in it).
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`; a panic of `work` is passed on.
pub fn in_a_new_one<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| NetNs::unshare().map(|_| work()));
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_namespace_can_be_entered_by_another_thread_and_is_gone_after_unpinning() {
        let path = std::env::temp_dir().join(format!("keepwall-ns-{}", std::process::id()));
        let links = |()| fs::read_to_string("/proc/thread-self/net/dev").unwrap().lines().count();
        match in_a_new_one(|| pin(&path)) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("skipped: needs root");
                return;
            }
            result => result.unwrap().unwrap(),
        }
        let inside = std::thread::scope(|s| {
            s.spawn(|| {
                NetNs::open(&path).unwrap().enter().unwrap();
                links(())
            })
            .join()
            .unwrap()
        });
        assert_eq!(inside, 3, "two lines of heading and the loopback device");
        assert!(pin(&path).is_err(), "a name that is taken is refused");
        unpin(&path).unwrap();
        assert!(!path.exists());
        assert!(unpin(&path).is_err());
    }
}
