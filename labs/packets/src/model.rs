//! The reference evaluator against the lowered tables, both pure.

use std::net::IpAddr;

use keepwall_ir::nft::interpret::{self, Connection};
use keepwall_ir::nft::{Hook, Table};
use keepwall_secgroup::evaluate::evaluate;
use keepwall_secgroup::intent::resolve;
use keepwall_secgroup::lower::{Lowered, lower};
use keepwall_secgroup::spec::Direction;

use crate::draw::{Case, GUEST_DEVICES, HOST, HOST_DEVICE, Path, Trip};

/// Resolves and lowers the host of a drawn case.
///
/// # Panics
/// If the case does not lower: drawn limits are too high for that.
#[must_use]
pub fn lowered(case: &Case, tag: &str) -> Lowered {
    let mut intent = resolve(&case.checked, "host").expect("every case has a host");
    // Records of a million packets are of no use here.
    intent.flow_log_per_s = 0;
    intent.validate().expect("resolve makes valid intents");
    lower(&intent, tag).expect("limits of drawn cases are out of reach")
}

/// Whose rules must let the packet pass: instance, and which way it sees the packet go.
#[must_use]
pub fn judges(trip: &Trip) -> Vec<(usize, Direction)> {
    let (guest, other) = (HOST + trip.guest, HOST + 3 - trip.guest);
    match trip.path {
        Path::Input => vec![(HOST, Direction::Ingress)],
        Path::Output => vec![(HOST, Direction::Egress)],
        Path::ToGuest => vec![(guest, Direction::Ingress)],
        Path::FromGuest | Path::GuestToHost => vec![(guest, Direction::Egress)],
        Path::Between => vec![(guest, Direction::Egress), (other, Direction::Ingress)],
    }
}

/// What the semantics say: true if the packet arrives.
#[must_use]
pub fn expected(case: &Case, trip: &Trip) -> bool {
    // A guest that plays the router never gets as far as a group: the guard at its device drops that.
    let from_guest = matches!(trip.path, Path::FromGuest | Path::Between | Path::GuestToHost);
    if from_guest && trip.source.is_ipv6() && trip.protocol == 58 && matches!(trip.icmp, Some((134 | 137, _))) {
        return false;
    }
    let allows = |(instance, way)| evaluate(&case.checked, instance, 0, &trip.seen(way)).is_allow();
    judges(trip).into_iter().all(allows)
}

/// The packet's bytes: a network header and a transport header that hold what rules look at. `number` goes into
/// the payload (or TCP's sequence number), so that a receiver knows which packet it was.
#[must_use]
pub fn bytes(trip: &Trip, number: u32) -> (Vec<u8>, Vec<u8>) {
    let mut transport = Vec::with_capacity(24);
    match trip.protocol {
        6 => {
            transport.extend(trip.source_port.to_be_bytes());
            transport.extend(trip.destination_port.to_be_bytes());
            transport.extend(number.to_be_bytes());
            transport.extend([0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
        }
        17 => {
            transport.extend(trip.source_port.to_be_bytes());
            transport.extend(trip.destination_port.to_be_bytes());
            transport.extend([0, 12, 0, 0]);
            transport.extend(number.to_be_bytes());
        }
        1 | 58 => {
            let (kind, code) = trip.icmp.unwrap_or((8, 0));
            // Identifier and sequence number make each echo a session of its own.
            transport.extend([kind, code, 0, 0]);
            transport.extend(number.to_be_bytes());
            transport.extend(number.to_be_bytes());
        }
        // GRE version 0 with neither key nor checksum, then the number as payload; the others likewise.
        _ => {
            transport.extend([0, 0, 0x08, 0x00]);
            transport.extend(number.to_be_bytes());
        }
    }
    let network = network_header(trip, transport.len());
    checksum_transport(trip, &mut transport);
    (network, transport)
}

fn network_header(trip: &Trip, payload: usize) -> Vec<u8> {
    #[expect(clippy::cast_possible_truncation, reason = "packets here are under 100 bytes")]
    let payload = payload as u16;
    match (trip.source, trip.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, trip.protocol, 0, 0];
            header[2..4].copy_from_slice(&(20 + payload).to_be_bytes());
            header.extend(source.octets());
            header.extend(destination.octets());
            let sum = !sum(&header, 0);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            header
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, trip.protocol, 64];
            header[4..6].copy_from_slice(&payload.to_be_bytes());
            header.extend(source.octets());
            header.extend(destination.octets());
            header
        }
        _ => Vec::new(),
    }
}

fn checksum_transport(trip: &Trip, transport: &mut [u8]) {
    let at = match trip.protocol {
        6 => 16,
        17 => 6,
        1 | 58 => 2,
        _ => return,
    };
    let mut pseudo = Vec::new();
    if trip.protocol != 1 {
        match (trip.source, trip.destination) {
            (IpAddr::V4(a), IpAddr::V4(b)) => pseudo.extend([a.octets(), b.octets()].concat()),
            (IpAddr::V6(a), IpAddr::V6(b)) => pseudo.extend([a.octets(), b.octets()].concat()),
            _ => {}
        }
        #[expect(clippy::cast_possible_truncation, reason = "packets here are under 100 bytes")]
        pseudo.extend([0, trip.protocol, 0, transport.len() as u8]);
    }
    let value = !sum(transport, u32::from(sum(&pseudo, 0)));
    transport[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut total = start;
    for pair in bytes.chunks(2) {
        total += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded above")]
    let folded = total as u16;
    folded
}

/// What the table does with the packet: true if it arrives. Prerouting first, then the path's own hook.
///
/// # Panics
/// If the table leaves it open: ours never do.
#[must_use]
pub fn interpreted(table: &Table, trip: &Trip) -> bool {
    let (network, transport) = bytes(trip, 0);
    let guest = GUEST_DEVICES[trip.guest - 1];
    let (iif, oif, hook) = match trip.path {
        Path::Input => (HOST_DEVICE, "", Hook::Input),
        Path::Output => ("", HOST_DEVICE, Hook::Output),
        Path::ToGuest => (HOST_DEVICE, guest, Hook::Forward),
        Path::FromGuest => (guest, HOST_DEVICE, Hook::Forward),
        Path::Between => (guest, GUEST_DEVICES[2 - trip.guest], Hook::Forward),
        Path::GuestToHost => (guest, "", Hook::Input),
    };
    let original_destination = match trip.destination {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let mut packet = interpret::Packet {
        iif: iif.to_owned(),
        oif: String::new(),
        nfproto: if trip.source.is_ipv4() { 2 } else { 10 },
        link: Vec::new(),
        network,
        transport,
        l4proto: trip.protocol,
        iif_type: 0xfffe,
        mark: 0,
        ct: Some(Connection {
            state: 8,
            original_destination,
            original_port: trip.destination_port,
            ..Connection::default()
        }),
    };
    let pass = |outcome: interpret::Outcome| {
        assert!(outcome.accept != outcome.drop, "our own tables leave nothing open");
        outcome.accept
    };
    if hook != Hook::Output && !pass(interpret::run(table, Hook::Prerouting, &packet)) {
        return false;
    }
    packet.oif = oif.to_owned();
    pass(interpret::run(table, hook, &packet))
}
