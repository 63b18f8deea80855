//! One connection, with bounds on all that its client chooses.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::ServiceExt as _;

/// Who is at the other end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Peer {
    /// Nobody knows.
    #[default]
    Unknown,
    /// Somebody in the network.
    Tcp(SocketAddr),
    /// Somebody on this machine, as the kernel says.
    Unix {
        /// Their user id.
        uid: u32,
    },
}

impl Peer {
    /// For the audit log: an address without port, or `unix:uid`.
    #[must_use]
    pub fn address(&self) -> String {
        match self {
            Peer::Unknown => String::new(),
            Peer::Tcp(address) => address.ip().to_canonical().to_string(),
            Peer::Unix { uid } => format!("unix:{uid}"),
        }
    }
}

/// Headers that are parsed at all: more are answered by hyper without a word, fewer but too many by us.
const HEADERS_PARSED_MAX: usize = 128;
/// Bytes of a request's head at most; hyper answers 431 to a longer one.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// How long a head may take, also when a connection waits for its next request.
const HEAD_WITHIN: Duration = Duration::from_secs(15);

/// Serves requests of one connection until either side ends it.
///
/// # Errors
/// The connection broke, or its client did not keep to HTTP.
pub async fn serve_connection<T>(io: T, router: Router, peer: Peer) -> Result<(), hyper::Error>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = router.map_request(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        request.map(axum::body::Body::new)
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_headers(HEADERS_PARSED_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(service))
        .await
}
