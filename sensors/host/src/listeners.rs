//! What listens on this machine, and how far away somebody may be to reach it.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::interfaces::Interface;
use crate::{processes, sockets};

/// One listening socket, or one port that a container publishes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// 6 or 17.
    pub protocol: u8,
    /// The address it is bound to; unspecified means all.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// Process id, if it could be seen.
    pub pid: Option<u32>,
    /// Process name, or `?`.
    pub process: String,
    /// For a published port: where in which container it ends.
    pub published: Option<SocketAddr>,
    /// How far it can be reached, as far as addresses tell.
    pub scope: Scope,
    /// The devices that lead to it.
    pub devices: Vec<String>,
}

/// From how far a socket can be reached, by the addresses that it listens on. Firewalls are not asked here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// This machine only.
    Local,
    /// Networks attached to it: private addresses.
    Network,
    /// Anybody: it has a public address.
    Internet,
}

/// True for an address that the Internet routes.
#[must_use]
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            let shared = a.octets()[0] == 100 && a.octets()[1] & 0xc0 == 64;
            !(a.is_private()
                || a.is_loopback()
                || a.is_link_local()
                || a.is_unspecified()
                || a.is_multicast()
                || a.is_broadcast()
                || shared)
        }
        IpAddr::V6(a) => a.segments()[0] & 0xe000 == 0x2000,
    }
}

/// Every listening TCP socket and every unconnected UDP socket, with its process.
#[must_use]
pub fn all(interfaces: &[Interface]) -> Vec<Listener> {
    let owners = processes::by_socket();
    let mut out: BTreeMap<(u8, u16, IpAddr), Listener> = BTreeMap::new();
    for socket in sockets::all() {
        let listening = match socket.protocol {
            6 => socket.state == 10,
            _ => socket.state == 7 && socket.remote.port() == 0,
        };
        if !listening || socket.local.port() == 0 {
            continue;
        }
        let pid = owners.get(&socket.inode).copied();
        let address = socket.local.ip().to_canonical();
        let (scope, devices) = reach(address, interfaces);
        let process = pid.map_or_else(|| "?".to_owned(), processes::name);
        let published = if process == "docker-proxy" { pid.and_then(docker_target) } else { None };
        out.insert(
            (socket.protocol, socket.local.port(), address),
            Listener {
                protocol: socket.protocol,
                address,
                port: socket.local.port(),
                pid,
                process,
                published,
                scope,
                devices,
            },
        );
    }
    out.into_values().collect()
}

/// How far an address can be reached, and by which devices.
#[must_use]
pub fn reach(address: IpAddr, interfaces: &[Interface]) -> (Scope, Vec<String>) {
    let mut scope = Scope::Local;
    let mut devices = Vec::new();
    for interface in interfaces.iter().filter(|i| !i.loopback && i.up) {
        let mut leads = false;
        for own in &interface.addresses {
            // `::` takes IPv4 too, unless the socket is IPv6 only, which no table shows: the wider reading is safer.
            let bound =
                address == own.address || (address.is_unspecified() && (address.is_ipv6() || own.address.is_ipv4()));
            if !bound {
                continue;
            }
            leads = true;
            scope = scope.max(if is_public(own.address) { Scope::Internet } else { Scope::Network });
        }
        if leads {
            devices.push(interface.name.clone());
        }
    }
    (scope, devices)
}

/// Where docker-proxy forwards to, from its own command line.
fn docker_target(pid: u32) -> Option<SocketAddr> {
    let arguments = processes::arguments(pid);
    let mut values: HashMap<&str, &str> = HashMap::new();
    for pair in arguments.windows(2) {
        values.insert(&pair[0], &pair[1]);
    }
    Some(SocketAddr::new(values.get("-container-ip")?.parse().ok()?, values.get("-container-port")?.parse().ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::interfaces::Address;

    fn interface(name: &str, addresses: &[&str]) -> Interface {
        Interface {
            name: name.into(),
            index: 1,
            up: true,
            loopback: name == "lo",
            kind: String::new(),
            master: None,
            addresses: addresses.iter().map(|a| Address { address: a.parse().unwrap(), prefix_len: 24 }).collect(),
        }
    }

    #[test]
    fn a_wildcard_is_as_reachable_as_the_widest_address() {
        let interfaces =
            [interface("lo", &["127.0.0.1"]), interface("eth0", &["10.0.0.5"]), interface("eth1", &["203.0.113.5"])];
        let reach = |text: &str| reach(text.parse().unwrap(), &interfaces);
        assert_eq!(reach("0.0.0.0"), (Scope::Internet, vec!["eth0".into(), "eth1".into()]));
        assert_eq!(reach("10.0.0.5"), (Scope::Network, vec!["eth0".into()]));
        assert_eq!(reach("127.0.0.1"), (Scope::Local, vec![]));
        assert_eq!(reach("::").0, Scope::Internet);
        assert_eq!(super::reach("::".parse().unwrap(), &interfaces[..1]).0, Scope::Local);
    }

    #[test]
    fn this_tests_own_listener_is_found_with_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = all(&[]).into_iter().find(|l| l.port == port).unwrap();
        assert_eq!((found.pid, found.scope), (Some(std::process::id()), Scope::Local));
    }
}
