//! Ports that destination NAT sends elsewhere: what Docker, Podman and port-forwarding rules publish.
//!
//! Read from every table's rules: nft's own `nat` expression, and the `DNAT` target that iptables-nft leaves as a
//! blob. A rule whose port or target cannot be read is left out: this is for showing, not for deciding.

use std::net::{IpAddr, SocketAddr};

use keepwall_ir::nft::decode::attributes;
use keepwall_ir::nft::{CmpOp, Expr, Meta, PayloadBase, Rule, TableFamily};

use crate::tracing::TRACE_TABLE;
use crate::{Nft, NftError};

/// A port of this machine that leads elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// 6 or 17.
    pub protocol: u8,
    /// The port that is asked for.
    pub port: u16,
    /// The address that is asked for, `None` for any of this machine.
    pub address: Option<IpAddr>,
    /// Where it ends.
    pub target: SocketAddr,
    /// `ip nat DOCKER`.
    pub by: String,
}

/// More published ports than this are not listed.
const PUBLISHED_MAX: usize = 4_096;

/// Every published port of this network namespace.
///
/// # Errors
/// The kernel cannot be reached or understood.
pub fn published() -> Result<Vec<Published>, NftError> {
    let mut out = Vec::new();
    for dumped in Nft::open()?.observe_all(0)? {
        let table = &dumped.table;
        if table.name == TRACE_TABLE || !matches!(table.family, TableFamily::Ip | TableFamily::Ip6 | TableFamily::Inet)
        {
            continue;
        }
        for chain in &table.chains {
            let by = format!("{} {}", crate::tracing::table_name(table.family, &table.name), chain.name);
            let rules = chain.rules.iter().filter_map(|rule| read(rule, table.family == TableFamily::Ip6));
            let room = PUBLISHED_MAX.saturating_sub(out.len());
            out.extend(rules.take(room).map(|published| Published { by: by.clone(), ..published }));
        }
    }
    Ok(out)
}

/// What one rule publishes, if it publishes anything.
fn read(rule: &Rule, ipv6: bool) -> Option<Published> {
    // What each register holds: where it was loaded from, or the bytes themselves.
    let mut loaded: [Option<&Expr>; 16] = [None; 16];
    let (mut protocol, mut port, mut address, mut target) = (None, None, None, None);
    for expr in &rule.exprs {
        match expr {
            Expr::Meta { dreg, .. } | Expr::Payload { dreg, .. } | Expr::Immediate { dreg, .. } => {
                *loaded.get_mut(usize::from(*dreg))? = Some(expr);
            }
            Expr::Cmp { sreg, op: CmpOp::Eq, data } => match loaded.get(usize::from(*sreg))? {
                Some(Expr::Meta { key: Meta::L4Proto, .. }) => protocol = data.first().copied(),
                Some(Expr::Payload { base: PayloadBase::Network, offset: 9, len: 1, .. }) => {
                    protocol = data.first().copied()
                }
                Some(Expr::Payload { base: PayloadBase::Transport, offset: 2, len: 2, .. }) => port = half(data, 0),
                Some(Expr::Payload { base: PayloadBase::Network, offset: 16, len: 4, .. })
                | Some(Expr::Payload { base: PayloadBase::Network, offset: 24, len: 16, .. }) => address = ip(data),
                _ => {}
            },
            Expr::Unknown { name, data } if name == "match" => {
                // xt_tcp and xt_udp: source ports, then destination ports, in host order.
                let info = attribute(data, 3)?;
                match attribute(data, 1)? {
                    b"tcp\0" | b"udp\0" if info.get(4..6) == info.get(6..8) => {
                        port = Some(u16::from_ne_bytes(info.get(4..6)?.try_into().ok()?));
                        protocol = Some(if attribute(data, 1)? == b"tcp\0" { 6 } else { 17 });
                    }
                    _ => {}
                }
            }
            Expr::Unknown { name, data } if name == "target" && attribute(data, 1)? == b"DNAT\0" => {
                // nf_nat_range2: flags, two addresses of 16 bytes, then the first port in network order.
                let info = attribute(data, 3)?;
                let to = ip(info.get(4..if ipv6 { 20 } else { 8 })?)?;
                target = Some((to, half(info, 36).filter(|port| *port != 0)));
            }
            Expr::Unknown { name, data } if name == "nat" => {
                let number = |kind| attribute(data, kind).and_then(|b| Some(u32::from_be_bytes(b.try_into().ok()?)));
                const DESTINATION: u32 = 1;
                if number(1)? != DESTINATION {
                    return None;
                }
                let held = |kind| -> Option<&Vec<u8>> {
                    // Registers on the wire: 1-4 of 16 bytes, or 8-23 of 4.
                    let register = match number(kind)? {
                        wide @ 1..=4 => (wide - 1) * 4,
                        narrow @ 8..=23 => narrow - 8,
                        _ => return None,
                    };
                    match loaded.get(register as usize)? {
                        Some(Expr::Immediate { data, .. }) => Some(data),
                        _ => None,
                    }
                };
                target = Some((ip(held(3)?)?, held(5).and_then(|bytes| half(bytes, 0))));
            }
            _ => {}
        }
    }
    let ((to, to_port), port) = (target?, port?);
    Some(Published {
        protocol: protocol?,
        port,
        address,
        target: SocketAddr::new(to, to_port.unwrap_or(port)),
        by: String::new(),
    })
}

fn attribute(data: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(data).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
