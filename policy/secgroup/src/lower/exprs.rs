//! Expressions by the names that people use, and the lookups of one chain.

use std::net::IpAddr;

use keepwall_core::{AddrRange, Family};
use keepwall_ir::nft::{CmpOp, CtKey, Expr, FieldType, LookupInto, Meta, PayloadBase, Rule, Verdict};

use super::lowered::Lane;
use super::maps::{Maps, PeerMap};

pub(super) fn rule(exprs: Vec<Expr>, comment: impl Into<String>) -> Rule {
    Rule { exprs, comment: comment.into() }
}

pub(super) fn cmp(sreg: u8, data: impl Into<Vec<u8>>) -> Expr {
    Expr::Cmp { sreg, op: CmpOp::Eq, data: data.into() }
}

pub(super) fn goto(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Goto(chain.to_owned()))
}

pub(super) fn jump(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Jump(chain.to_owned()))
}

pub(super) fn l4proto(number: u8) -> [Expr; 2] {
    [Expr::Meta { key: Meta::L4Proto, dreg: 0 }, cmp(0, [number])]
}

pub(super) fn nfproto(family: Family) -> [Expr; 2] {
    let number = if family == Family::Ipv4 { 2 } else { 10 };
    [Expr::Meta { key: Meta::NfProto, dreg: 0 }, cmp(0, [number])]
}

pub(super) fn transport(offset: u32, len: u32, dreg: u8) -> Expr {
    Expr::Payload { base: PayloadBase::Transport, offset, len, dreg }
}

pub(super) fn network(offset: u32, len: u32, dreg: u8) -> Expr {
    Expr::Payload { base: PayloadBase::Network, offset, len, dreg }
}

/// The source or destination address of the packet.
pub(super) fn address(family: Family, source: bool, dreg: u8) -> Expr {
    match (family, source) {
        (Family::Ipv4, true) => network(12, 4, dreg),
        (Family::Ipv4, false) => network(16, 4, dreg),
        (Family::Ipv6, true) => network(8, 16, dreg),
        (Family::Ipv6, false) => network(24, 16, dreg),
    }
}

pub(super) fn bytes(family: Family, number: u128) -> Vec<u8> {
    match AddrRange::address(family, number) {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

pub(super) fn address_type(family: Family) -> FieldType {
    match family {
        Family::Ipv4 => FieldType::Ipv4Addr,
        Family::Ipv6 => FieldType::Ipv6Addr,
    }
}

/// ICMP type (and code) for both families, as never-blocked rules need it.
pub(super) fn icmp(protocol: u8, kind: u8, code: Option<u8>) -> Vec<Expr> {
    let mut exprs = l4proto(protocol).to_vec();
    match code {
        Some(code) => exprs.extend([transport(0, 2, 0), cmp(0, [kind, code])]),
        None => exprs.extend([transport(0, 1, 0), cmp(0, [kind])]),
    }
    exprs
}

/// Where a map's key fields come from, seen from one direction and hook.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    /// Towards the instance, as the packet is.
    In,
    /// From the instance, as the packet is.
    Out,
    /// Towards a host through its forward hook: this side as it was before destination NAT, so that a port that
    /// a container publishes is judged by the port that the client asked for.
    PublishedIn,
}

impl View {
    pub(super) fn local(self, family: Family, dreg: u8) -> Expr {
        match (self, family) {
            (View::In, _) => address(family, false, dreg),
            (View::Out, _) => address(family, true, dreg),
            (View::PublishedIn, Family::Ipv4) => Expr::Ct { key: CtKey::OriginalDst4, dreg },
            (View::PublishedIn, Family::Ipv6) => Expr::Ct { key: CtKey::OriginalDst6, dreg },
        }
    }

    pub(super) fn peer(self, family: Family, dreg: u8) -> Expr {
        address(family, self != View::Out, dreg)
    }

    pub(super) fn destination_port(self, dreg: u8) -> Expr {
        match self {
            View::PublishedIn => Expr::Ct { key: CtKey::OriginalDport, dreg },
            View::In | View::Out => transport(2, 2, dreg),
        }
    }
}

/// One rule per map, most specific kind first.
pub(super) fn lookups((family, with_ports): Lane, view: View, maps: &Maps, out: &mut Vec<Rule>) {
    let regs = address_type(family).regs();
    let vmap = |map: &str| Expr::Lookup { map: map.to_owned(), sreg: 0, into: LookupInto::Verdict, invert: false };
    // Key fields behind the address or class: the destination port, where there is one, and the protocol.
    let slot = |first: u8| {
        let port = with_ports.then(|| view.destination_port(first));
        port.into_iter().chain([Expr::Meta { key: Meta::L4Proto, dreg: first + u8::from(with_ports) }])
    };
    let mut add = |exprs: Vec<Expr>, comment: &str| {
        out.push(rule(nfproto(family).into_iter().chain(exprs).collect(), comment));
    };
    for map in &maps.exact {
        let mut exprs = vec![view.peer(family, 0), view.local(family, regs)];
        if with_ports {
            exprs.push(transport(0, 2, 2 * regs));
        }
        exprs.extend(slot(2 * regs + u8::from(with_ports)));
        exprs.push(vmap(map));
        add(exprs, "rules about both sides");
    }
    for map in &maps.peer {
        match map {
            PeerMap::Direct(map) => {
                let mut exprs = vec![view.peer(family, 0)];
                exprs.extend(slot(regs));
                exprs.push(vmap(map));
                add(exprs, "rules about some peers");
            }
            PeerMap::Classes { classes, cells } => {
                // nft 1.0.6 aborts when it lists a looked-up register inside a concatenation, unless the register was
                // loaded from a packet field; so the class passes through the packet mark, which is put back before
                // anything can break off (ADR 8).
                let mut exprs = vec![
                    Expr::Meta { key: Meta::Mark, dreg: 8 },
                    view.peer(family, 0),
                    Expr::Lookup { map: classes.clone(), sreg: 0, into: LookupInto::Register(0), invert: false },
                    Expr::MarkSet { sreg: 0 },
                    Expr::Meta { key: Meta::Mark, dreg: 0 },
                    Expr::MarkSet { sreg: 8 },
                ];
                exprs.extend(slot(1));
                exprs.push(vmap(cells));
                add(exprs, "rules about some peers, by class");
            }
        }
    }
    for map in &maps.any {
        let mut exprs: Vec<Expr> = slot(0).collect();
        exprs.push(vmap(map));
        add(exprs, "rules about every peer");
    }
}
