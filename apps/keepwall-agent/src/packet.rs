//! From what the kernel shows (logged bytes, tracked flows) to a packet that a policy can judge.

use std::net::{IpAddr, SocketAddr};

use keepwall_core::Family;
use keepwall_nft::{Flow, TupleRest};
use keepwall_secgroup::evaluate::{Packet, Verdict};
use keepwall_secgroup::intent::{Attachment, Intent};
use keepwall_secgroup::judge::judge;
use keepwall_secgroup::spec::Direction;
use keepwall_sensors::interfaces::Interface;
use keepwall_sensors::sessions::Session;

/// The ends of a packet, with what rules look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ends {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    pub(crate) icmp: Option<(u8, u8)>,
}

impl Ends {
    pub(crate) fn seen(&self, direction: Direction) -> Packet {
        let (peer, local) = match direction {
            Direction::Ingress => (self.source, self.destination),
            Direction::Egress => (self.destination, self.source),
        };
        Packet {
            direction,
            peer,
            local,
            protocol: self.protocol,
            source_port: self.source_port,
            destination_port: self.destination_port,
            icmp: self.icmp,
        }
    }

    /// Reads the head of an IP packet; `None` if it is too short or none.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Ends> {
        let (source, destination, protocol, transport): (IpAddr, IpAddr, u8, &[u8]) = match bytes.first()? >> 4 {
            4 => {
                let header = usize::from(bytes[0] & 0x0f) * 4;
                let source: [u8; 4] = bytes.get(12..16)?.try_into().ok()?;
                let destination: [u8; 4] = bytes.get(16..20)?.try_into().ok()?;
                (source.into(), destination.into(), *bytes.get(9)?, bytes.get(header..).unwrap_or_default())
            }
            6 => {
                let source: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
                let destination: [u8; 16] = bytes.get(24..40)?.try_into().ok()?;
                let (protocol, at) = skip_extensions(bytes, *bytes.get(6)?, 40);
                (source.into(), destination.into(), protocol, bytes.get(at..).unwrap_or_default())
            }
            _ => return None,
        };
        let mut ends = Ends { source, destination, protocol, source_port: 0, destination_port: 0, icmp: None };
        ends.set_transport(transport);
        Some(ends)
    }

    /// Ports or ICMP type from the transport header, as far as it is there.
    pub(crate) fn set_transport(&mut self, transport: &[u8]) {
        let half = |at: usize| transport.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
        match self.protocol {
            6 | 17 => (self.source_port, self.destination_port) = (half(0), half(2)),
            1 | 58 => self.icmp = Some((*transport.first().unwrap_or(&0), *transport.get(1).unwrap_or(&0))),
            _ => {}
        }
    }
}

/// IPv6 extension headers are skipped, a few of them; a longer chain is somebody's trick.
fn skip_extensions(bytes: &[u8], mut next: u8, mut at: usize) -> (u8, usize) {
    for _ in 0..8 {
        let length = match (next, bytes.get(at + 1)) {
            (0 | 43 | 60, Some(length)) => 8 + usize::from(*length) * 8,
            (44, _) => 8,
            (51, Some(length)) => 8 + usize::from(*length) * 4,
            _ => break,
        };
        let Some(following) = bytes.get(at) else { break };
        next = *following;
        at += length;
    }
    (next, at)
}

/// Which of our interfaces a tracked flow passes, and how each of them sees its first packet.
pub(crate) fn views<'i>(intent: &'i Intent, interfaces: &[Interface], flow: &Flow) -> Vec<(&'i Attachment, Packet)> {
    let original = flow.original;
    let (source_port, destination_port, icmp) = match original.rest {
        TupleRest::Ports { src, dst } => (src, dst, None),
        TupleRest::Icmp { kind, code, .. } => (0, 0, Some((kind, code))),
        TupleRest::Nothing => (0, 0, None),
    };
    let ends = Ends {
        source: original.src,
        destination: original.dst,
        protocol: original.protocol,
        source_port,
        destination_port,
        icmp,
    };
    // Behind destination NAT: what guests see, and where the host's own packets really go.
    let mut inner = ends;
    inner.destination = flow.reply.src;
    if let TupleRest::Ports { src, .. } = flow.reply.rest {
        inner.destination_port = src;
    }
    let mut out = Vec::new();
    for attachment in &intent.attachments {
        if attachment.guest {
            if attachment.addresses.contains(&original.src) {
                out.push((attachment, inner.seen(Direction::Egress)));
            }
            if attachment.addresses.contains(&inner.destination) {
                out.push((attachment, inner.seen(Direction::Ingress)));
            }
            continue;
        }
        let own = |address: IpAddr| {
            (interfaces.iter().filter(|i| i.name == attachment.device))
                .any(|i| i.addresses.iter().any(|a| a.address == address))
        };
        if own(original.dst) {
            out.push((attachment, ends.seen(Direction::Ingress)));
        }
        // The host's own packets, and containers' behind source NAT.
        if own(original.src) || (own(flow.reply.dst) && !own(original.dst)) {
            out.push((attachment, inner.seen(Direction::Egress)));
        }
    }
    out
}

/// Whether a new SSH connection like this session would be let in; the verdict that refuses it otherwise.
pub(crate) fn refuses(intent: &Intent, interfaces: &[Interface], session: &Session) -> Option<Verdict> {
    let (peer, local): (SocketAddr, SocketAddr) = (session.remote, session.local);
    let device = interfaces.iter().find(|i| i.addresses.iter().any(|a| a.address == local.ip()))?;
    let attachment = intent.attachments.iter().find(|a| !a.guest && a.device == device.name)?;
    if Family::of(peer.ip()) != Family::of(local.ip()) || intent.observe {
        return None;
    }
    let packet = Packet {
        direction: Direction::Ingress,
        peer: peer.ip(),
        local: local.ip(),
        protocol: 6,
        source_port: peer.port(),
        destination_port: local.port(),
        icmp: None,
    };
    let verdict = judge(intent, attachment, &packet);
    (!verdict.is_allow()).then_some(verdict)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn ports_are_found_behind_options_and_extension_headers() {
        let mut v4 = vec![0x46, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 203, 0, 113, 7, 10, 0, 0, 1, 1, 1, 1, 0];
        v4.extend([0xc0, 0, 0, 22]);
        let ends = Ends::parse(&v4).unwrap();
        assert_eq!(
            (ends.source.to_string(), ends.source_port, ends.destination_port),
            ("203.0.113.7".into(), 49152, 22)
        );
        let mut v6 = vec![0x60, 0, 0, 0, 0, 0, 0, 64];
        v6.extend([0; 32]);
        v6.extend([17, 0, 0, 0, 0, 0, 0, 0, 0, 53, 0, 53]);
        let ends = Ends::parse(&v6).unwrap();
        assert_eq!((ends.protocol, ends.destination_port), (17, 53));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        for len in 0..60 {
            for first in [0x40, 0x45, 0x4f, 0x60, 0x00, 0xff] {
                let mut bytes = vec![0u8; len];
                if let Some(b) = bytes.first_mut() {
                    *b = first;
                }
                let _ = Ends::parse(&bytes);
            }
        }
    }
}
