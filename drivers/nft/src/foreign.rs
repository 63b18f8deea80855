//! What other people's tables do with traffic that ours lets in.
//!
//! A drop in any table is final, so a user who is told "allowed" may still be cut off by ufw, firewalld or Docker.
//! Their rules are read and run in the interpreter; what cannot be read leaves both outcomes open, and is said so.

use std::net::IpAddr;

use keepwall_ir::nft::interpret::{Connection, Packet, run};
use keepwall_ir::nft::{Hook, TableFamily};

use crate::tracing::{TRACE_TABLE, table_name};
use crate::{Nft, NftError};

/// A new session towards this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The device it arrives at.
    pub device: String,
    /// Sender.
    pub source: IpAddr,
    /// Receiver.
    pub destination: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// ICMP type and code.
    pub icmp: Option<(u8, u8)>,
}

/// A table that drops (or may drop) a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignVerdict {
    /// `ip filter`.
    pub table: String,
    /// Chain.
    pub chain: String,
    /// Rule from 1; `None`: the chain's policy.
    pub rule: Option<usize>,
    /// Index of the probe.
    pub probe: usize,
    /// False if something in the table cannot be read.
    pub certain: bool,
}

/// Sets with more elements are not read; lookups in them leave both outcomes open.
const ELEMENTS_MAX: usize = 20_000;
/// Findings at most.
const DROPS_MAX: usize = 1_000;

/// Asks every foreign table of this network namespace about every probe.
///
/// # Errors
/// The kernel cannot be reached or understood.
pub fn foreign_drops(probes: &[Probe]) -> Result<Vec<ForeignVerdict>, NftError> {
    let tables = Nft::open()?.observe_all(ELEMENTS_MAX)?;
    let mut out = Vec::new();
    for dumped in tables.iter().filter(|d| d.table.name != "keepwall" && d.table.name != TRACE_TABLE) {
        for (number, probe) in probes.iter().enumerate() {
            let family = matches!(
                (dumped.table.family, probe.source),
                (TableFamily::Inet, _) | (TableFamily::Ip, IpAddr::V4(_)) | (TableFamily::Ip6, IpAddr::V6(_))
            );
            if !family || out.len() >= DROPS_MAX {
                continue;
            }
            let packet = packet(probe);
            for hook in [Hook::Prerouting, Hook::Input] {
                let outcome = run(&dumped.table, hook, &packet);
                if let (true, Some((chain, rule))) = (outcome.drop, outcome.dropped_at) {
                    out.push(ForeignVerdict {
                        table: table_name(dumped.table.family, &dumped.table.name),
                        chain,
                        rule: rule.map(|r| r + 1),
                        probe: number,
                        certain: !outcome.accept && dumped.not_understood.is_empty(),
                    });
                    break;
                }
            }
        }
    }
    Ok(out)
}

fn packet(probe: &Probe) -> Packet {
    let mut transport = match probe.icmp {
        Some((kind, code)) => vec![kind, code],
        None => [probe.source_port.to_be_bytes(), probe.destination_port.to_be_bytes()].concat(),
    };
    transport.resize(20, 0);
    if probe.protocol == 6 {
        (transport[12], transport[13]) = (0x50, 0x02);
    }
    let (network, destination) = match (probe.source, probe.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, probe.protocol, 0, 0];
            header.extend(source.octets());
            header.extend(destination.octets());
            (header, destination.octets().to_vec())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 20, probe.protocol, 64];
            header.extend(source.octets());
            header.extend(destination.octets());
            (header, destination.octets().to_vec())
        }
        _ => Default::default(),
    };
    Packet {
        iif: probe.device.clone(),
        nfproto: if probe.source.is_ipv4() { 2 } else { 10 },
        network,
        transport,
        l4proto: probe.protocol,
        iif_type: 1,
        ct: Some(Connection {
            state: 8,
            original_destination: destination,
            original_port: probe.destination_port,
            ..Connection::default()
        }),
        ..Packet::default()
    }
}
