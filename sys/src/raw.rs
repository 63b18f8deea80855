//! Raw IP sockets: whole packets out, and what passed the firewall in.
//!
//! A raw socket sees a packet after netfilter's input hook: what it receives was let in.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, Protocol, RawProtocol, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

/// Room for packets until they are read: some ten thousand small ones.
const QUEUE_BYTES: usize = 8 * 1024 * 1024;

/// A raw socket of one IP version.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    ipv6: bool,
}

impl Socket {
    /// Receives the packets of one protocol (6 TCP, 17 UDP, …), non-blocking. IPv4 packets come with their header, IPv6
    /// packets without.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`.
    pub fn receiver(ipv6: bool, protocol: u8) -> io::Result<Socket> {
        let socket = open(ipv6, u32::from(protocol))?;
        if sockopt::set_socket_recv_buffer_size_force(&socket.fd, QUEUE_BYTES).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket.fd, QUEUE_BYTES)?;
        }
        Ok(socket)
    }

    /// Sends packets that carry their own IP header (`IP_HDRINCL`, `IPV6_HDRINCL`).
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`.
    pub fn sender(ipv6: bool) -> io::Result<Socket> {
        const RAW: u32 = 255;
        const IPV6_HDRINCL: libc::c_int = 36;
        let socket = open(ipv6, RAW)?;
        let (level, option) =
            if ipv6 { (libc::IPPROTO_IPV6, IPV6_HDRINCL) } else { (libc::IPPROTO_IP, libc::IP_HDRINCL) };
        crate::option::set(&socket.fd, level, option, 1)?;
        Ok(socket)
    }

    /// Sends a packet on its way to `to`, which should be its destination address.
    ///
    /// # Errors
    /// No route, a full queue (`WouldBlock`), `EPERM` if the output hook drops it.
    pub fn send(&self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        rustix::net::sendto(&self.fd, packet, SendFlags::empty(), &SocketAddr::new(to, 0))?;
        Ok(())
    }

    /// Takes the next packet; longer ones are cut to the buffer.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (_, len) = rustix::net::recv(&self.fd, buffer, RecvFlags::empty())?;
        Ok(len)
    }

    /// Waits until there is something to take; `false` if the time is over.
    ///
    /// # Errors
    /// The socket has an error.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        crate::netlink::wait_readable(&self.fd, timeout)
    }

    /// Which IP version.
    #[must_use]
    pub fn is_ipv6(&self) -> bool {
        self.ipv6
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open(ipv6: bool, protocol: u32) -> io::Result<Socket> {
    let family = if ipv6 { AddressFamily::INET6 } else { AddressFamily::INET };
    let protocol = RawProtocol::new(protocol)
        .map(Protocol::from_raw)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "protocol 0 has no raw socket"))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(family, SocketType::RAW, flags, Some(protocol))?;
    Ok(Socket { fd, ipv6 })
}
