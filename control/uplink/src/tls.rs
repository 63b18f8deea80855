//! TLS as instances speak it: 1.3, and one authority, which the enrolment token named.

use std::sync::Arc;

use keepwall_wire::{ALPN, ALPN_PROBE};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// What every server's certificate bears, whatever its address is.
pub const SERVER_NAME: &str = "keepwall-server";

/// How a connection is to be spoken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speak {
    /// Frames both ways.
    Stream,
    /// A greeting, and the end.
    Probe,
    /// Long polls, enrolment.
    Http,
}

/// TLS of an instance, for each way to speak. They share their tickets: a probe after a stream is cheap.
#[derive(Clone)]
pub struct Tls {
    stream: Arc<ClientConfig>,
    probe: Arc<ClientConfig>,
    http: Arc<ClientConfig>,
}

impl From<ClientConfig> for Tls {
    fn from(config: ClientConfig) -> Tls {
        let speaking = |protocol: &[u8]| {
            let mut config = config.clone();
            config.alpn_protocols = vec![protocol.to_vec()];
            Arc::new(config)
        };
        Tls { stream: speaking(ALPN), probe: speaking(ALPN_PROBE), http: speaking(b"http/1.1") }
    }
}

impl Tls {
    /// With a certificate, trusting one authority.
    ///
    /// # Errors
    /// Key or certificate are no good.
    pub fn new(
        authority: &CertificateDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Tls, String> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone()).map_err(|error| format!("the authority's certificate: {error}"))?;
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("this machine's certificate or key: {error}"))?;
        Ok(config.into())
    }

    /// For enrolment: no certificate yet, and trust in the authority with this digest alone.
    ///
    /// # Errors
    /// Never, as far as is known: the library may refuse its own defaults.
    pub fn pinned(authority: [u8; 32]) -> Result<Tls, String> {
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned { authority }))
            .with_no_client_auth();
        Ok(config.into())
    }

    /// For one way to speak.
    #[must_use]
    pub fn speaking(&self, speak: Speak) -> Arc<ClientConfig> {
        Arc::clone(match speak {
            Speak::Stream => &self.stream,
            Speak::Probe => &self.probe,
            Speak::Http => &self.http,
        })
    }
}

/// Trusts what the authority with this digest has signed, and nothing else. The authority comes with the chain.
#[derive(Debug)]
struct Pinned {
    authority: [u8; 32],
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let is_ours = |certificate: &&CertificateDer<'_>| {
            ring::digest::digest(&ring::digest::SHA256, certificate).as_ref() == self.authority
        };
        let Some(authority) = intermediates.iter().find(is_ours) else {
            return Err(CertificateError::UnknownIssuer.into());
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|_| rustls::Error::from(CertificateError::BadEncoding))?;
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
