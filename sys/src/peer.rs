//! Who is at the other end of a local socket, as the kernel says, not as they say.

use std::io;
use std::os::unix::net::UnixStream;

/// The process that connected, as it was at that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: u32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

/// Credentials of the peer (`SO_PEERCRED`).
///
/// # Errors
/// The socket is not connected.
pub fn of(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)?;
    let pid = u32::try_from(credentials.pid.as_raw_nonzero().get()).map_err(io::Error::other)?;
    Ok(Peer { pid, uid: credentials.uid.as_raw(), gid: credentials.gid.as_raw() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert_eq!(super::of(&one).unwrap().pid, std::process::id());
    }
}
