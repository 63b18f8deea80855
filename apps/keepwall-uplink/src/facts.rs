//! What this machine says of itself when it enrols.

use std::net::IpAddr;

use keepwall_sensors::interfaces::{self, Interface};
use keepwall_uplink::enroll::Facts;

/// What the server takes.
const INTERFACES_MAX: usize = 64;
const ADDRESSES_MAX: usize = 256;

/// Host name and interfaces as they are now.
pub(crate) fn look(hostname: Option<String>) -> Result<Facts, String> {
    let own = || std::fs::read_to_string("/proc/sys/kernel/hostname").map(|text| text.trim().to_owned());
    let hostname = hostname.map_or_else(own, Ok).map_err(|error| format!("the host name: {error}"))?;
    let all = interfaces::all().map_err(|error| format!("the interfaces: {error}"))?;
    Ok(Facts { hostname, interfaces: own_interfaces(&all) })
}

/// Devices by which this machine's own packets come and go: up, with addresses, and neither a bridge (whose guests and
/// containers are machines of their own) nor a part of one.
fn own_interfaces(all: &[Interface]) -> Vec<(String, Vec<IpAddr>)> {
    (all.iter())
        .filter(|i| i.up && !i.loopback && i.master.is_none() && i.kind != "bridge")
        .map(|i| (i.name.clone(), i.addresses.iter().map(|a| a.address).filter(|a| !link_local(*a)).collect()))
        .map(|(name, addresses): (String, Vec<IpAddr>)| {
            (name, addresses.into_iter().take(ADDRESSES_MAX).collect::<Vec<_>>())
        })
        .filter(|(_, addresses)| !addresses.is_empty())
        .take(INTERFACES_MAX)
        .collect()
}

fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// The proxy that the environment names for `https`, unless it makes an exception for this server.
pub(crate) fn proxy(server: &str, variable: impl Fn(&str) -> Option<String>) -> Option<String> {
    let either = |lower: &str, upper: &str| variable(lower).or_else(|| variable(upper)).filter(|text| !text.is_empty());
    let host = keepwall_uplink::dial::host_and_port(server).map_or(server, |(host, _)| host);
    let exceptions = either("no_proxy", "NO_PROXY").unwrap_or_default();
    let excepted = exceptions.split(',').map(|word| word.trim().trim_start_matches('.')).any(|word| {
        word == "*" || !word.is_empty() && (word == host || host.strip_suffix(word).is_some_and(|h| h.ends_with('.')))
    });
    if excepted { None } else { either("https_proxy", "HTTPS_PROXY") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keepwall_sensors::interfaces::Address;

    fn interface(name: &str, kind: &str, addresses: &[&str]) -> Interface {
        Interface {
            name: name.into(),
            index: 1,
            up: true,
            loopback: name == "lo",
            kind: kind.into(),
            master: None,
            addresses: (addresses.iter())
                .filter_map(|a| Some(Address { address: a.parse().ok()?, prefix_len: 24 }))
                .collect(),
        }
    }

    #[test]
    fn only_this_machines_own_ways_in_and_out_are_told() {
        let all = [
            interface("lo", "", &["127.0.0.1"]),
            interface("eth0", "", &["10.0.0.5", "fe80::5", "fd00::5"]),
            interface("docker0", "bridge", &["172.17.0.1"]),
            Interface { master: Some(9), ..interface("veth1", "veth", &["10.0.0.6"]) },
            Interface { up: false, ..interface("eth1", "", &["10.0.0.7"]) },
            interface("eth2", "", &["169.254.1.1"]),
            interface("wg0", "wireguard", &["10.9.0.1"]),
        ];
        let told = own_interfaces(&all);
        let names: Vec<(&str, usize)> = told.iter().map(|(name, a)| (name.as_str(), a.len())).collect();
        assert_eq!(names, [("eth0", 2), ("wg0", 1)]);
    }

    #[test]
    fn the_environments_proxy_is_taken_but_for_its_exceptions() {
        let with = |exceptions: &'static str| {
            move |name: &str| match name {
                "https_proxy" => Some("http://p:3128".to_owned()),
                "NO_PROXY" => Some(exceptions.to_owned()),
                _ => None,
            }
        };
        for (exceptions, used) in [
            ("", true),
            ("other", true),
            ("example", false),
            ("localhost, .example", false),
            ("fleet.example", false),
            ("eet.example", true),
            ("*", false),
        ] {
            assert_eq!(proxy("fleet.example:7443", with(exceptions)).is_some(), used, "{exceptions}");
        }
        assert_eq!(proxy("fleet.example:7443", |_| None), None);
    }
}
