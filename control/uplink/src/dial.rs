//! One connection to the server: direct, or through an HTTP proxy that lets `CONNECT` pass.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::tls::SERVER_NAME;

/// How long a connection with its handshake may take: a server that is dialled by a whole fleet answers late.
pub const DIAL: Duration = Duration::from_secs(30);
/// The longest answer of a proxy.
const PROXY_BYTES_MAX: usize = 8 * 1024;

/// Where to go, and by which way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// `host:port`
    pub server: String,
    /// `http://[user:password@]host:port`, or none.
    pub proxy: Option<String>,
    /// The local address to dial from, for machines with several.
    pub from: Option<std::net::IpAddr>,
}

/// `host` and `port` of `host:port`; IPv6 in brackets.
///
/// # Errors
/// In words.
pub fn host_and_port(text: &str) -> Result<(&str, u16), String> {
    let wrong = || format!("`{text}` is not `host:port`");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let port = port.parse().map_err(|_| wrong())?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control() || "/@".contains(c)) {
        return Err(wrong());
    }
    Ok((host, port))
}

impl Route {
    /// Dials and shakes hands.
    ///
    /// # Errors
    /// In words: which step did not work, and why.
    pub async fn dial(&self, tls: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, String> {
        let dialled = async {
            let tcp = match &self.proxy {
                None => self.tcp(&self.server).await?,
                Some(proxy) => self.through(proxy).await?,
            };
            let _ = tcp.set_nodelay(true);
            let name = ServerName::try_from(SERVER_NAME).map_err(|error| error.to_string())?;
            // What is not acknowledged for so long never will be: a cable was cut. It is dialled again.
            let _ = socket2::SockRef::from(&tcp).set_tcp_user_timeout(Some(keepwall_wire::UNACKNOWLEDGED));
            let done = TlsConnector::from(tls).connect(name, tcp).await;
            done.map_err(|error| format!("{} does not speak as it should: {error}", self.server))
        };
        tokio::time::timeout(DIAL, dialled).await.map_err(|_| format!("{} does not answer", self.server))?
    }

    async fn tcp(&self, target: &str) -> Result<TcpStream, String> {
        let (host, port) = host_and_port(target)?;
        let failed = |error: std::io::Error| format!("cannot reach {target}: {error}");
        let Some(from) = self.from else { return TcpStream::connect((host, port)).await.map_err(failed) };
        let mut addresses = tokio::net::lookup_host((host, port)).await.map_err(failed)?;
        let address = addresses.find(|a| a.is_ipv4() == from.is_ipv4());
        let address = address.ok_or_else(|| format!("{target} has no address of the family of {from}"))?;
        let socket = match from {
            std::net::IpAddr::V4(_) => tokio::net::TcpSocket::new_v4(),
            std::net::IpAddr::V6(_) => tokio::net::TcpSocket::new_v6(),
        };
        let socket = socket.map_err(failed)?;
        socket.bind((from, 0).into()).map_err(failed)?;
        socket.connect(address).await.map_err(failed)
    }

    async fn through(&self, proxy: &str) -> Result<TcpStream, String> {
        let rest = proxy.strip_prefix("http://").unwrap_or(proxy).trim_end_matches('/');
        let (credentials, target) = match rest.rsplit_once('@') {
            Some((credentials, target)) => (Some(credentials), target),
            None => (None, rest),
        };
        let mut tcp = self.tcp(target).await.map_err(|error| format!("the proxy: {error}"))?;
        let authorization = credentials.map_or(String::new(), |credentials| {
            let word = base64::engine::general_purpose::STANDARD.encode(credentials);
            format!("Proxy-Authorization: Basic {word}\r\n")
        });
        let server = &self.server;
        let request = format!("CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n{authorization}\r\n");
        let broken = |error: std::io::Error| format!("the proxy {target}: {error}");
        tcp.write_all(request.as_bytes()).await.map_err(broken)?;
        let mut head = Vec::new();
        // Byte by byte: what follows the head belongs to TLS.
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= PROXY_BYTES_MAX {
                return Err(format!("the proxy {target} says too much"));
            }
            head.push(tcp.read_u8().await.map_err(broken)?);
        }
        let line = String::from_utf8_lossy(&head);
        let line = line.lines().next().unwrap_or_default();
        match line.split_whitespace().nth(1) {
            Some(code) if code.starts_with('2') => Ok(tcp),
            _ => Err(format!("the proxy {target} refuses: {}", line.escape_default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports_are_taken_apart() {
        assert_eq!(host_and_port("a.example:7443"), Ok(("a.example", 7443)));
        assert_eq!(host_and_port("[fd00::1]:1"), Ok(("fd00::1", 1)));
        for wrong in ["", "a", "a:", "a:x", ":1", "a b:1", "http://a:1", "a\n:1"] {
            assert!(host_and_port(wrong).is_err(), "{wrong}");
        }
    }
}
