//! Netlink sockets: bytes out, bytes in.
//!
//! The kernel works on a request while it is being sent: when [`Socket::send`] returns, all answers are in the queue
//! (only dumps go on as they are read). Whoever listens too slowly loses messages, and is told: [`RecvError::Lost`].

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

/// One read takes at most this much. Dumps come in pieces of at most 32 KiB, notifications and logged packets in
/// pieces of at most 64 KiB and a header.
const READ_BYTES_MAX: usize = 256 * 1024;

/// Room for one transaction: the kernel wants it whole, and charges about twice its length.
const SEND_QUEUE_BYTES: usize = 64 * 1024 * 1024;

/// Room for answers and notifications until they are read.
const RECV_QUEUE_BYTES: usize = 8 * 1024 * 1024;

/// Which part of the kernel is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// nf_tables, nfnetlink_log, conntrack (12).
    Netfilter,
    /// Links, addresses, routes (0).
    Route,
    /// Sockets (4).
    SockDiag,
}

/// Nothing was read.
#[derive(Debug)]
pub enum RecvError {
    /// The queue was full: messages are lost for good (`ENOBUFS`). Reading on is possible.
    Lost,
    /// Nothing came within the time given.
    TimedOut,
    /// Anything else.
    Io(io::Error),
}

impl fmt::Display for RecvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecvError::Lost => f.write_str("the netlink queue was full and messages are lost; read faster"),
            RecvError::TimedOut => f.write_str("the kernel did not answer in time"),
            RecvError::Io(_) => f.write_str("reading from the netlink socket failed"),
        }
    }
}

impl std::error::Error for RecvError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            RecvError::Io(source) => Some(source),
            RecvError::Lost | RecvError::TimedOut => None,
        }
    }
}

/// A netlink socket of the calling thread's network namespace; it stays in that namespace wherever the thread goes.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    port: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens and binds a socket, with extended and capped acknowledgements, and with large queues as far as the
    /// process may have them.
    ///
    /// # Errors
    /// The kernel lacks this protocol, or descriptors are used up.
    pub fn open(protocol: Protocol) -> io::Result<Socket> {
        let protocol = match protocol {
            Protocol::Netfilter => Some(netlink::NETFILTER),
            Protocol::Route => None,
            Protocol::SockDiag => Some(netlink::SOCK_DIAG),
        };
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        // Without the privilege to force it, the system's limit applies; sends beyond it fail with EMSGSIZE.
        if sockopt::set_socket_send_buffer_size_force(&fd, SEND_QUEUE_BYTES).is_err() {
            sockopt::set_socket_send_buffer_size(&fd, SEND_QUEUE_BYTES)?;
        }
        if sockopt::set_socket_recv_buffer_size_force(&fd, RECV_QUEUE_BYTES).is_err() {
            sockopt::set_socket_recv_buffer_size(&fd, RECV_QUEUE_BYTES)?;
        }
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            crate::option::set(&fd, libc::SOL_NETLINK, option, 1)?;
        }
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        let bound: SocketAddrNetlink = rustix::net::getsockname(&fd)?.try_into()?;
        Ok(Socket { fd, port: bound.pid(), buffer: vec![0; READ_BYTES_MAX] })
    }

    /// The port that the kernel gave this socket: it names its owner in tables and notifications.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Listens to a multicast group, by number.
    ///
    /// # Errors
    /// There is no such group, or this process may not.
    pub fn join(&self, group: u32) -> io::Result<()> {
        let group = libc::c_int::try_from(group).map_err(io::Error::other)?;
        crate::option::set(&self.fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)
    }

    /// Sends one or more messages, all or none.
    ///
    /// # Errors
    /// `EMSGSIZE`: longer than the send queue.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match rustix::net::sendto(&self.fd, bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)) {
                Ok(sent) if sent == bytes.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads what comes next from the kernel; waits at most `timeout` (`None`: for ever, zero: not at all).
    ///
    /// # Errors
    /// See [`RecvError`].
    pub fn recv(&mut self, timeout: Option<Duration>) -> Result<&[u8], RecvError> {
        loop {
            if timeout != Some(Duration::ZERO) && !wait_readable(&self.fd, timeout).map_err(RecvError::Io)? {
                return Err(RecvError::TimedOut);
            }
            let flags = RecvFlags::TRUNC | RecvFlags::DONTWAIT;
            match rustix::net::recvfrom(&self.fd, &mut self.buffer[..], flags) {
                Ok((_, len, from)) => {
                    let from = from.and_then(|from| SocketAddrNetlink::try_from(from).ok());
                    if from.is_none_or(|from| from.pid() != 0) {
                        continue; // Another process may send to this port; only the kernel is listened to.
                    }
                    let Some(bytes) = self.buffer.get(..len) else {
                        return Err(RecvError::Lost);
                    };
                    // Borrowed again because the borrow checker does not see that this ends the loop.
                    let len = bytes.len();
                    return Ok(&self.buffer[..len]);
                }
                Err(Errno::NOBUFS) => return Err(RecvError::Lost),
                Err(Errno::AGAIN) if timeout == Some(Duration::ZERO) => return Err(RecvError::TimedOut),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(RecvError::Io(error.into())),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until there is something to read; `false` if the time is over.
pub(crate) fn wait_readable(fd: impl AsFd, timeout: Option<Duration>) -> io::Result<bool> {
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    loop {
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[test]
    fn two_sockets_have_two_ports_and_silence_times_out() {
        let mut one = Socket::open(Protocol::Netfilter).unwrap();
        let two = Socket::open(Protocol::Route).unwrap();
        assert_ne!(one.port(), 0);
        assert_ne!(two.port(), 0);
        assert!(matches!(one.recv(Some(Duration::ZERO)), Err(RecvError::TimedOut)));
    }
}
