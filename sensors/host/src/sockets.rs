//! The socket tables of `/proc/net`.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// 6 or 17.
    pub protocol: u8,
    /// Its own end.
    pub local: SocketAddr,
    /// The other end; unspecified if there is none.
    pub remote: SocketAddr,
    /// `TCP_*` state: 1 established, 10 listening; UDP uses 7 for unconnected.
    pub state: u8,
    /// To find the process by.
    pub inode: u64,
    /// Owner.
    pub uid: u32,
}

/// A table longer than this is cut: 64 MiB, about 400,000 sockets.
const TABLE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// All TCP and UDP sockets of the calling thread's network namespace.
#[must_use]
pub fn all() -> Vec<Socket> {
    let mut out = Vec::new();
    for (name, protocol) in [("tcp", 6), ("tcp6", 6), ("udp", 17), ("udp6", 17)] {
        let mut text = String::new();
        if let Ok(file) = File::open(format!("/proc/thread-self/net/{name}")) {
            // A table cut short is still a table.
            let _ = file.take(TABLE_BYTES_MAX).read_to_string(&mut text);
        }
        out.extend(text.lines().skip(1).filter_map(|line| row(line, protocol)));
    }
    out
}

fn row(line: &str, protocol: u8) -> Option<Socket> {
    let mut fields = line.split_ascii_whitespace();
    let local = address(fields.nth(1)?)?;
    let remote = address(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Socket { protocol, local, remote, state, inode, uid })
}

/// `0100007F:1F90`: 32-bit words in host order.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for at in 0..4 {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_the_kernels_table_is_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 1 0000000000000000 100 0 0 10 0";
        let socket = row(line, 6).expect("a good row");
        assert_eq!(socket.local.to_string(), "127.0.0.1:8080");
        assert_eq!((socket.state, socket.inode, socket.uid), (10, 12345, 1000));
        assert_eq!(row("nonsense", 6), None);
        assert_eq!(row("0: 0100007:1F90 00000000:0000 0A 0 0 0 0 0 0 0", 6), None);
    }
}
