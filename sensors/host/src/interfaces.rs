//! Network devices and their addresses, from rtnetlink.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use keepwall_sys::netlink::{Protocol, RecvError, Socket};
use serde::{Deserialize, Serialize};

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
    /// True if it is administratively up.
    pub up: bool,
    /// True for `lo`.
    pub loopback: bool,
    /// What kind of virtual device it is (`bridge`, `veth`, `vlan`); empty for hardware.
    pub kind: String,
    /// Number of the bridge or bond that it is part of: packets then arrive by that device, not by this one.
    pub master: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Length of its subnet's prefix.
    pub prefix_len: u8,
}

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
/// The kernel answers a dump at once; longer means that something is broken.
const PATIENCE: Duration = Duration::from_secs(5);

/// All devices of the calling thread's network namespace, by number.
///
/// # Errors
/// rtnetlink does not answer.
pub fn all() -> io::Result<Vec<Interface>> {
    let mut out: BTreeMap<u32, Interface> = BTreeMap::new();
    dump(RTM_GETLINK, |kind, body| {
        if kind != RTM_NEWLINK || body.len() < 16 {
            return;
        }
        let (index, flags) = (word(body, 4), word(body, 8));
        let name = attributes(&body[16..])
            .find(|(kind, _)| *kind == 3)
            .map(|(_, value)| crate::processes::clean(value.strip_suffix(b"\0").unwrap_or(value)));
        const IFLA_MASTER: u16 = 10;
        let master = attributes(&body[16..]).find(|(kind, _)| *kind == IFLA_MASTER).map(|(_, value)| word(value, 0));
        const IFLA_LINKINFO: u16 = 18;
        const IFLA_INFO_KIND: u16 = 1;
        let kind = (attributes(&body[16..]).find(|(kind, _)| *kind == IFLA_LINKINFO))
            .and_then(|(_, info)| attributes(info).find(|(kind, _)| *kind == IFLA_INFO_KIND))
            .map(|(_, value)| crate::processes::clean(value.strip_suffix(b"\0").unwrap_or(value)));
        let interface = Interface {
            name: name.unwrap_or_default(),
            index,
            up: flags & IFF_UP != 0,
            loopback: flags & IFF_LOOPBACK != 0,
            kind: kind.unwrap_or_default(),
            master,
            addresses: Vec::new(),
        };
        out.insert(index, interface);
    })?;
    dump(RTM_GETADDR, |kind, body| {
        if kind != RTM_NEWADDR || body.len() < 8 {
            return;
        }
        let prefix_len = body[1];
        // IFA_LOCAL (2) is the own address; on point-to-point links IFA_ADDRESS (1) is the peer's.
        let mut found: [Option<&[u8]>; 2] = [None, None];
        for (kind, value) in attributes(&body[8..]) {
            if kind == 1 || kind == 2 {
                found[usize::from(kind) - 1] = Some(value);
            }
        }
        let address = match found[1].or(found[0]) {
            Some(value) if value.len() == 4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
            Some(value) => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
            None => None,
        };
        if let (Some(address), Some(interface)) = (address, out.get_mut(&word(body, 4))) {
            interface.addresses.push(Address { address, prefix_len });
        }
    })?;
    Ok(out.into_values().collect())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|w| w.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|w| w.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(half(bytes, 0));
        let value = bytes.get(4..len)?;
        let kind = half(bytes, 2) & 0x3fff;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Asks for all of one kind and hands each message to `each`.
fn dump(kind: u16, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
    const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    let mut socket = Socket::open(Protocol::Route)?;
    // Header and an empty ifinfomsg, which serves as an ifaddrmsg too.
    let mut request = Vec::with_capacity(32);
    request.extend(32u32.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 24]);
    socket.send(&request)?;
    loop {
        let mut bytes = match socket.recv(Some(PATIENCE)) {
            Ok(bytes) => bytes,
            Err(RecvError::Io(error)) => return Err(error),
            Err(error) => return Err(io::Error::other(error.to_string())),
        };
        while bytes.len() >= 16 {
            let len = word(bytes, 0) as usize;
            let Some(body) = bytes.get(16..len) else { break };
            match half(bytes, 4) {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return Err(io::Error::other("rtnetlink refused the request")),
                kind => each(kind, body),
            }
            bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    #[test]
    fn the_loopback_device_is_there() {
        let all = super::all().unwrap();
        let lo = all.iter().find(|interface| interface.loopback).unwrap();
        assert_eq!(lo.name, "lo");
    }
}
