//! Socket options that rustix does not know.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sets an option whose value is an `int`.
pub(crate) fn set(socket: impl AsFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open for as long as it is borrowed; the pointer leads to one `c_int` that lives until
    // the call returns, and `len` is its size, so the kernel reads nothing else.
    #[expect(unsafe_code, reason = "setsockopt(2) takes a pointer and rustix has no door for these options")]
    let result = unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw const value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
