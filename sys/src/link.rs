//! Network devices: just enough rtnetlink to build a small network. Everything happens in the network namespace of the
//! calling thread.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::netlink::{Protocol, RecvError, Socket};

/// The kernel answers while the request is sent; this is only for the case that it never does.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Index of a device.
///
/// # Errors
/// There is none of this name.
pub fn index(name: &str) -> io::Result<u32> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(rustix::net::netdevice::name_to_index(socket, name)?)
}

/// Name of the device with this index.
///
/// # Errors
/// There is none.
pub fn name(index: u32) -> io::Result<String> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(rustix::net::netdevice::index_to_name(socket, index)?)
}

/// Sets a device up.
///
/// # Errors
/// There is none of this name, or `EPERM`.
pub fn set_up(name: &str) -> io::Result<()> {
    set(name, IFF_UP)
}

/// Sets a device down: the other end of its cable carries nothing any more, and nobody says goodbye.
///
/// # Errors
/// There is none of this name, or `EPERM`.
pub fn set_down(name: &str) -> io::Result<()> {
    set(name, 0)
}

/// Of a device's flags, the one that is changed here.
const IFF_UP: u32 = 1;

fn set(name: &str, flags: u32) -> io::Result<()> {
    let mut body = link_header(index(name)?);
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    request(libc::RTM_NEWLINK, 0, &body)
}

/// Deletes a device.
///
/// # Errors
/// There is none of this name, or `EPERM`.
pub fn delete(name: &str) -> io::Result<()> {
    request(libc::RTM_DELLINK, 0, &link_header(index(name)?))
}

/// Creates two devices that are the ends of one cable: `name` here and `peer` in the namespace behind `peer_ns`.
///
/// # Errors
/// A name is taken, or `EPERM`.
pub fn add_veth(name: &str, peer: &str, peer_ns: impl AsFd) -> io::Result<()> {
    const VETH_INFO_PEER: u16 = 1;
    let mut far = link_header(0);
    attribute(&mut far, libc::IFLA_IFNAME, &terminated(peer));
    attribute(&mut far, libc::IFLA_NET_NS_FD, &peer_ns.as_fd().as_raw_fd().to_ne_bytes());
    let mut data = Vec::new();
    attribute(&mut data, VETH_INFO_PEER, &far);
    let mut info = Vec::new();
    attribute(&mut info, libc::IFLA_INFO_KIND, b"veth");
    attribute(&mut info, libc::IFLA_INFO_DATA, &data);
    let mut body = link_header(0);
    attribute(&mut body, libc::IFLA_IFNAME, &terminated(name));
    attribute(&mut body, libc::IFLA_LINKINFO, &info);
    request(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &body)
}

/// Gives a device an address. An IPv6 address is usable at once: nobody is asked whether it is taken (`nodad`).
///
/// # Errors
/// It has it already, there is no such device, or `EPERM`.
pub fn add_address(name: &str, address: IpAddr, prefix_len: u8) -> io::Result<()> {
    const NO_DAD: u8 = 2;
    let (family, bytes) = family_and_bytes(address);
    let flags = if address.is_ipv6() { NO_DAD } else { 0 };
    let mut body = vec![family, prefix_len, flags, 0];
    body.extend_from_slice(&index(name)?.to_ne_bytes());
    attribute(&mut body, libc::IFA_LOCAL, &bytes);
    attribute(&mut body, libc::IFA_ADDRESS, &bytes);
    request(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &body)
}

/// Adds a route to `network/prefix_len` (0 for the default) by a device and, if given, by way of a gateway.
///
/// # Errors
/// It is there already, the gateway is not reachable, or `EPERM`.
pub fn add_route(network: IpAddr, prefix_len: u8, name: &str, via: Option<IpAddr>) -> io::Result<()> {
    let (family, bytes) = family_and_bytes(network);
    let scope = if via.is_some() || network.is_ipv6() { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_LINK };
    let mut body =
        vec![family, prefix_len, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, scope, libc::RTN_UNICAST, 0, 0, 0, 0];
    if prefix_len > 0 {
        attribute(&mut body, libc::RTA_DST, &bytes);
    }
    if let Some(via) = via {
        attribute(&mut body, libc::RTA_GATEWAY, &family_and_bytes(via).1);
    }
    attribute(&mut body, libc::RTA_OIF, &index(name)?.to_ne_bytes());
    request(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &body)
}

/// `struct ifinfomsg`: family, pad, type, index, flags, change.
fn link_header(index: u32) -> Vec<u8> {
    let mut header = vec![0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

fn terminated(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn family_and_bytes(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(v4) => (2, v4.octets().to_vec()),
        IpAddr::V6(v6) => (10, v6.octets().to_vec()),
    }
}

fn attribute(body: &mut Vec<u8>, kind: u16, data: &[u8]) {
    let len = u16::try_from(data.len() + 4).unwrap_or(u16::MAX);
    body.extend_from_slice(&len.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(data);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn request(kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
    const ERROR: u16 = 2;
    let flags = u16::try_from(flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK).map_err(io::Error::other)?;
    let len = u32::try_from(body.len() + 16).map_err(io::Error::other)?;
    let mut message = len.to_ne_bytes().to_vec();
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(body);
    let mut socket = Socket::open(Protocol::Route)?;
    socket.send(&message)?;
    let answer = socket.recv(Some(ANSWER_WITHIN)).map_err(|error| match error {
        RecvError::Io(source) => source,
        other => io::Error::other(other),
    })?;
    // Type at 4, error code at 16: negative errno, or 0 for "done".
    match (answer.get(4..6), answer.get(16..20)) {
        (Some(kind), Some(code)) if kind == ERROR.to_ne_bytes() => {
            match i32::from_ne_bytes([code[0], code[1], code[2], code[3]]) {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            }
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is no acknowledgement")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use crate::namespace::{NetNs, in_a_new_one};
    use crate::{raw, tun};
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn two_namespaces_are_cabled_together_and_a_raw_packet_goes_through() {
        let far_side = || {
            let here = NetNs::current().unwrap();
            let (far, near) = (Ipv4Addr::new(10, 9, 0, 2), Ipv4Addr::new(10, 9, 0, 1));
            let receiver = std::thread::scope(|s| {
                s.spawn(|| {
                    NetNs::unshare().unwrap();
                    add_veth("far", "near", &here).unwrap();
                    set_up("far").unwrap();
                    add_address("far", far.into(), 24).unwrap();
                    raw::Socket::receiver(false, 253).unwrap()
                })
                .join()
                .unwrap()
            });
            set_up("near").unwrap();
            add_address("near", near.into(), 24).unwrap();
            add_address("near", Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).into(), 64).unwrap();
            add_route(Ipv4Addr::new(10, 10, 0, 0).into(), 16, "near", Some(far.into())).unwrap();
            add_route(Ipv6Addr::UNSPECIFIED.into(), 0, "near", None).unwrap();
            assert!(add_address("near", near.into(), 24).is_err(), "twice is refused");
            assert!(set_up("nosuch").is_err());

            let mut packet = vec![0x45, 0, 0, 24, 0, 1, 0, 0, 64, 253, 0, 0];
            packet.extend_from_slice(&near.octets());
            packet.extend_from_slice(&far.octets());
            packet.extend_from_slice(b"wall");
            raw::Socket::sender(false).unwrap().send(&packet, far.into()).unwrap();
            assert!(receiver.wait(Some(Duration::from_secs(10))).unwrap());
            let mut buffer = [0; 64];
            assert_eq!(receiver.recv(&mut buffer).unwrap(), 24);
            assert_eq!(&buffer[20..24], b"wall");
            assert!(raw::Socket::sender(true).unwrap().is_ipv6());
        };
        skip_without_root(in_a_new_one(far_side));
    }

    #[test]
    fn what_is_sent_into_a_tun_device_comes_out_of_the_stack() {
        let work = || {
            let device = tun::Device::open("kw0", tun::Kind::Tun).unwrap();
            assert!(tun::Device::open("a-name-that-is-too-long", tun::Kind::Tap).is_err());
            set_up("kw0").unwrap();
            let (here, there) = (Ipv4Addr::new(10, 8, 0, 1), Ipv4Addr::new(10, 8, 0, 2));
            add_address("kw0", here.into(), 24).unwrap();
            let receiver = raw::Socket::receiver(false, 253).unwrap();
            let mut packet = vec![0x45, 0, 0, 20, 0, 1, 0, 0, 64, 253, 0, 0];
            packet.extend_from_slice(&there.octets());
            packet.extend_from_slice(&here.octets());
            let sum: u32 = packet.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
            let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
            packet[10..12].copy_from_slice(&(!sum).to_be_bytes());
            device.send(&packet).unwrap();
            assert!(receiver.wait(Some(Duration::from_secs(10))).unwrap());
            delete("kw0").unwrap();
            assert!(index("kw0").is_err());
        };
        skip_without_root(in_a_new_one(work));
    }

    fn skip_without_root(result: io::Result<()>) {
        match result {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => eprintln!("skipped: needs root"),
            result => result.unwrap(),
        }
    }
}
