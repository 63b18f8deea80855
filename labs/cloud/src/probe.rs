//! One real packet, or a handshake, from one machine of the lab to another.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use keepwall_sys::{dial, raw};

use crate::Error;
use crate::machine::inside;
use crate::serve::GREETING;

/// Denied packets are dropped silently, so every denial costs this long. Answers here take under 5 ms.
const PATIENCE: Duration = Duration::from_millis(500);

/// A packet to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The machine that sends.
    pub from: &'static str,
    /// Its address to send from.
    pub source: IpAddr,
    /// Whom to.
    pub destination: IpAddr,
    /// 6, 17, 1 or 58.
    pub protocol: u8,
    /// For TCP and UDP.
    pub port: u16,
}

/// True if it got through and an answer came back. A refusal by the other machine's kernel counts: the packet
/// arrived there.
///
/// # Errors
/// It could not be sent at all.
pub fn arrives(probe: &Probe) -> Result<bool, Error> {
    inside(probe.from, || {
        let done = match probe.protocol {
            6 => tcp(probe),
            17 => udp(probe),
            _ => echo(probe),
        };
        match done {
            Ok(answered) => Ok(answered),
            // What the sender's own rules drop, its kernel says so.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(false),
            Err(error) => Err(format!("{} to {}: {error}", probe.source, probe.destination)),
        }
    })
}

fn tcp(probe: &Probe) -> io::Result<bool> {
    let (source, destination) = (SocketAddr::new(probe.source, 0), SocketAddr::new(probe.destination, probe.port));
    match dial::tcp(source, destination, PATIENCE) {
        Ok(mut stream) => {
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut greeting = [0; GREETING.len()];
            Ok(stream.read_exact(&mut greeting).is_ok() && greeting == GREETING)
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
        Err(error) => Err(error),
    }
}

fn udp(probe: &Probe) -> io::Result<bool> {
    let socket = UdpSocket::bind(SocketAddr::new(probe.source, 0))?;
    socket.connect(SocketAddr::new(probe.destination, probe.port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"keepwall")?;
    match socket.recv(&mut [0; 64]) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(false),
        Err(error) => Err(error),
    }
}

fn echo(probe: &Probe) -> io::Result<bool> {
    let v6 = probe.destination.is_ipv6();
    let (protocol, request, reply) = if v6 { (58, 128, 129) } else { (1, 8, 0) };
    // Unlike an operator's ping, many run at once: the identifier tells whose answer it is.
    let id = ((std::process::id() as u16) ^ (Instant::now().elapsed().subsec_nanos() as u16)).to_be_bytes();
    let mut message = vec![request, 0, 0, 0, id[0], id[1], 0, 1];
    message.extend(b"keepwall");
    let (receiver, sender) = (raw::Socket::receiver(v6, protocol)?, raw::Socket::sender(v6)?);
    let packet = with_header(probe, protocol, &mut message);
    sender.send(&packet, probe.destination)?;
    let end = Instant::now() + PATIENCE;
    let mut buffer = [0; 512];
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        if !receiver.wait(Some(left))? {
            break;
        }
        let Ok(count) = receiver.recv(&mut buffer) else { continue };
        // IPv4 comes with its header of 20 bytes, IPv6 without.
        let icmp = buffer.get(if v6 { 0..count } else { 20..count }).unwrap_or_default();
        if icmp.first() == Some(&reply) && icmp.get(4..6) == Some(&id) && icmp.ends_with(b"keepwall") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn with_header(probe: &Probe, protocol: u8, message: &mut [u8]) -> Vec<u8> {
    #[expect(clippy::cast_possible_truncation, reason = "16 bytes")]
    let len = message.len() as u16;
    let mut pseudo = Vec::new();
    let mut packet = match (probe.source, probe.destination) {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            pseudo.extend([source.octets(), destination.octets()].concat());
            pseudo.extend([0, 0, 0, len as u8, 0, 0, 0, protocol]);
            let mut header = vec![0x60, 0, 0, 0, (len >> 8) as u8, len as u8, protocol, 64];
            header.extend([source.octets(), destination.octets()].concat());
            header
        }
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            // The kernel fills in length, identification and checksum.
            let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
            header.extend([source.octets(), destination.octets()].concat());
            header
        }
        _ => Vec::new(),
    };
    let sum = !(pseudo.chunks(2).chain(message.chunks(2)))
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .fold(0u32, |sum, word| {
            let sum = sum + word;
            (sum & 0xffff) + (sum >> 16)
        });
    message[2..4].copy_from_slice(&(sum as u16).to_be_bytes());
    packet.extend_from_slice(message);
    packet
}
