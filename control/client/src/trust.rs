//! Whose word proves that a server is the one that was meant.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest as _, Sha256};

use crate::Error;

/// Where distributions keep their authorities.
const SYSTEM: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Whom to believe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The authorities of this system.
    System,
    /// These authorities, PEM.
    Pem(String),
    /// The one authority with this SHA-256 of its DER, which the server sends along.
    Pinned([u8; 32]),
}

impl Trust {
    pub(crate) fn config(&self) -> Result<ClientConfig, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::Address(error.to_string()))?;
        if let Trust::Pinned(digest) = self {
            let verifier = Arc::new(Pinned { digest: *digest, provider });
            return Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth());
        }
        let pem = match self {
            Trust::Pem(pem) => pem.clone(),
            _ => std::fs::read_to_string(SYSTEM)
                .map_err(|error| Error::Address(format!("the system's authorities in {SYSTEM}: {error}")))?,
        };
        let mut roots = RootCertStore::empty();
        for one in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let one = one.map_err(|error| Error::Address(format!("the authorities to trust are no PEM: {error}")))?;
            // A bundle of a distribution may hold one that this library does not take; the others still count.
            roots.add(one).ok();
        }
        if roots.is_empty() {
            return Err(Error::Address("there is no authority among those to trust".into()));
        }
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}

/// Believes the one authority whose digest is known, and checks all else as usual.
struct Pinned {
    digest: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pinned")
    }
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
        let pinned = intermediates.iter().find(|one| Sha256::digest(one).as_slice() == self.digest);
        let pinned = pinned.ok_or_else(|| {
            rustls::Error::General("the server does not show the authority whose digest is pinned".into())
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(pinned.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
