//! Where instances call: one port, TLS 1.3, three ways to speak.
//!
//! ```text
//!  TLS ─▶ ALPN keepwall/1        certificate needed   stream.rs   frames both ways
//!      ─▶ ALPN keepwall-probe/1  certificate needed   one byte: a new connection gets through
//!      ─▶ ALPN http/1.1                               http.rs     long poll (certificate), enrolment (token), install
//! ```
//!
//! Who shows a certificate is known by its digest; a certificate that the authority signed and nobody remembers opens
//! nothing.

mod http;
mod limits;
mod serve;
mod stream;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keepwall_wire::{ALPN, ALPN_PROBE};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::fleet::{Act, Fleet};
pub use limits::AgentLimits;
use limits::Turns;
use tls::Tls;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// The agents' door.
pub struct Agents {
    fleet: Arc<Fleet>,
    /// Where the programs are that a new machine fetches.
    programs: Option<PathBuf>,
    /// Handshakes at once: the rest waits its turn, and a storm is served one after the other.
    handshakes: Turns,
    connections: Semaphore,
    pub(crate) stop: tokio::sync::watch::Receiver<bool>,
}

/// TLS as instances need it.
///
/// # Errors
/// The authority's own certificate is no good.
pub fn tls(fleet: &Fleet, names: &[String]) -> Result<Arc<ServerConfig>, String> {
    let authority = fleet.authority();
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone()).map_err(|error| error.to_string())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        // Enrolment has no certificate yet; who needs one is refused afterwards.
        .allow_unauthenticated()
        .build()
        .map_err(|error| error.to_string())?;
    let (chain, key) = authority.server(names)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .map_err(|error| error.to_string())?;
    config.alpn_protocols = vec![ALPN.to_vec(), ALPN_PROBE.to_vec(), b"http/1.1".to_vec()];
    // Resumption by tickets that the server need not remember: a storm of reconnects costs a third.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(|error| error.to_string())?;
    config.send_tls13_tickets = 1;
    Ok(Arc::new(config))
}

impl Agents {
    /// Serves until told to stop.
    pub async fn serve(
        fleet: Arc<Fleet>,
        listener: TcpListener,
        config: Arc<ServerConfig>,
        limits: AgentLimits,
        programs: Option<PathBuf>,
        stop: tokio::sync::watch::Receiver<bool>,
    ) {
        let agents = Arc::new(Agents {
            handshakes: Turns::new(limits.handshakes_max),
            connections: Semaphore::new(limits.connections_max),
            fleet,
            programs,
            stop: stop.clone(),
        });
        let mut stop = stop;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stop.wait_for(|stop| *stop) => return,
            };
            match accepted {
                Ok((tcp, address)) => {
                    // A task of its own for the handshake: its size is not that of the stream's.
                    tokio::spawn(Arc::clone(&agents).welcome(Arc::clone(&config), tcp, address));
                }
                Err(error) => {
                    // Out of descriptors, mostly: what is open goes on.
                    tracing::warn!(%error, "cannot accept an instance");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn welcome(self: Arc<Self>, config: Arc<ServerConfig>, tcp: TcpStream, address: SocketAddr) {
        if self.connections.available_permits() == 0 {
            return;
        }
        let _ = tcp.set_nodelay(true);
        let _ = socket2::SockRef::from(&tcp).set_tcp_user_timeout(Some(keepwall_wire::UNACKNOWLEDGED));
        let greeted = async {
            let _turn = self.handshakes.take(address.ip()).await?;
            match tokio::time::timeout(HANDSHAKE, Tls::accept(tcp, config)).await {
                Ok(Ok(tls)) => Some(tls),
                Ok(Err(error)) => {
                    self.refused_handshake(address, &error).await;
                    None
                }
                Err(_) => None,
            }
        };
        let Some(tls) = greeted.await else { return };
        let protocol = tls.state().alpn_protocol().map(<[u8]>::to_vec);
        match protocol.as_deref() {
            Some(protocol) if protocol == ALPN => {
                tokio::spawn(self.stream(Box::new(tls), address));
            }
            Some(protocol) if protocol == ALPN_PROBE => self.probe(tls, address).await,
            _ => {
                tokio::spawn(self.http(tls, address));
            }
        }
    }

    /// Whose stream it is, by its certificate.
    async fn owner(&self, tls: &Tls, address: SocketAddr) -> Option<(Arc<str>, [u8; 32])> {
        let certificate = tls.state().peer_certificates().and_then(<[_]>::first).cloned();
        let why = match &certificate {
            None => "no certificate",
            Some(certificate) => {
                let digest = crate::ca::digest(certificate);
                let name = crate::fleet::subject(certificate).unwrap_or_default();
                match self.fleet.owner_named(&digest, &name).await {
                    Ok(owner) => return Some((owner, digest)),
                    Err(why) => why,
                }
            }
        };
        let name = certificate.as_deref().and_then(crate::fleet::subject).unwrap_or_default();
        self.refuse(address, &name, why).await;
        None
    }

    /// Into the log and the audit log.
    async fn refuse(&self, address: SocketAddr, name: &str, why: &str) {
        tracing::warn!(%address, instance = name, why, "an instance is refused");
        let act = Act { actor: "instance:unknown".into(), address: address.ip().to_string(), ..Act::default() };
        let line = act.line("refuse connection", &format!("instance/{name}"), Value::Null, json!({ "why": why }));
        self.fleet.refusal(line).await;
    }

    async fn refused_handshake(&self, address: SocketAddr, error: &std::io::Error) {
        // What a stranger's scanner does is noise; a certificate that does not hold is worth a line.
        let about_certificate = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
            .is_some_and(|error| matches!(error, rustls::Error::InvalidCertificate(_)));
        if about_certificate {
            self.refuse(address, "", &format!("its certificate does not hold: {error}")).await;
        } else {
            tracing::debug!(%address, %error, "a handshake failed");
        }
    }

    /// Proves to an instance that a new connection gets through.
    async fn probe(&self, mut tls: Tls, address: SocketAddr) {
        use tokio::io::AsyncWriteExt as _;
        if self.owner(&tls, address).await.is_some() {
            let _ = tokio::time::timeout(HANDSHAKE, async {
                tls.write_all(b"k").await?;
                tls.shutdown().await
            })
            .await;
        }
    }
}
