//! The authority that says who is an instance and who is the server.
//!
//! One key for all servers of a store, sealed in the store. Certificates of instances live a day and are renewed over
//! the stream; each is known by its digest, so one that was revoked, or never issued by us, opens nothing.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use keepwall_store::{Commit, Expect, Op, Store, StoreError};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use crate::seal::{Seal, random};

/// The name that every server's certificate bears, whatever its address: instances ask for it.
pub const SERVER_NAME: &str = "keepwall-server";
/// How long an instance's certificate holds.
pub const INSTANCE_LIFE: Duration = Duration::from_secs(24 * 3_600);
/// How long a server's own certificate holds; a new one is made at each start.
const SERVER_LIFE: Duration = Duration::from_secs(90 * 24 * 3_600);
/// How long the authority holds.
const AUTHORITY_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3_600);
/// Clocks differ: a certificate holds from so much earlier.
const BACKDATED: Duration = Duration::from_secs(3_600);

const KIND: &str = "secret";
const NAME: &str = "authority";

#[derive(Serialize, Deserialize)]
struct Kept {
    certificate_pem: String,
    key_sealed: String,
    /// The servers' own key: the same for all and across restarts, so that what is pinned to it stays true.
    server_key_sealed: String,
}

/// Signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    server_key: Vec<u8>,
}

/// A certificate for an instance.
pub struct Issued {
    /// DER.
    pub certificate: CertificateDer<'static>,
    /// Until when, milliseconds since 1970.
    pub until_ms: u64,
}

fn life(params: &mut CertificateParams, life: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + life).into();
    params.serial_number = Some(SerialNumber::from_slice(&random::<16>()));
}

fn named(name: &str) -> DistinguishedName {
    let mut out = DistinguishedName::new();
    out.push(DnType::CommonName, name);
    out
}

impl Authority {
    /// The store's authority; made if there is none.
    ///
    /// # Errors
    /// The store cannot be read, or the key does not open.
    pub async fn load(store: &Arc<dyn Store>, seal: &Seal) -> Result<Authority, String> {
        for _ in 0..3 {
            let found = store.get(KIND, NAME).await.map_err(|error| error.to_string())?;
            if let Some(found) = found {
                let kept: Kept = found.read().map_err(|error| error.to_string())?;
                let key = seal.open(NAME, &kept.key_sealed).map_err(|error| error.to_string())?;
                let server_key = seal.open(SERVER_NAME, &kept.server_key_sealed).map_err(|error| error.to_string())?;
                return Authority::from_parts(&key, kept.certificate_pem, server_key);
            }
            let (key, pem) = make()?;
            let server_key = KeyPair::generate().map_err(|error| error.to_string())?.serialize_der();
            let kept = Kept {
                key_sealed: seal.seal(NAME, &key),
                server_key_sealed: seal.seal(SERVER_NAME, &server_key),
                certificate_pem: pem,
            };
            let commit = Commit {
                ops: vec![Op::put(KIND, NAME, Expect::Absent, &kept)],
                audit: vec![
                    serde_json::json!({ "actor": "server", "action": "create", "target": "authority" }).to_string(),
                ],
                remember: None,
            };
            match store.commit(commit).await {
                // Another server was faster: take its.
                Ok(_) | Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Err("the authority was made and is not there".into())
    }

    fn from_parts(key: &[u8], pem: String, server_key: Vec<u8>) -> Result<Authority, String> {
        let broken = |error: rcgen::Error| format!("the authority's key or certificate is damaged: {error}");
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let key = KeyPair::from_der_and_sign_algo(&key, &rcgen::PKCS_ECDSA_P256_SHA256).map_err(broken)?;
        let certificate = pem_to_der(&pem)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(broken)?;
        Ok(Authority { issuer, certificate, pem, server_key })
    }

    /// Its certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its certificate, PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// SHA-256 of its certificate: what an enrolment token carries, so that a machine trusts no other.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        digest(&self.certificate)
    }

    /// Signs the key of a certificate request for an instance, for [`INSTANCE_LIFE`]; nothing else of the request
    /// counts.
    ///
    /// # Errors
    /// The request is none, or is not signed by its own key.
    pub fn issue(&self, instance: &str, request: &[u8]) -> Result<Issued, String> {
        self.issue_for(instance, request, INSTANCE_LIFE)
    }

    /// As [`Authority::issue`], for so long.
    ///
    /// # Errors
    /// As there.
    pub fn issue_for(&self, instance: &str, request: &[u8], holds: Duration) -> Result<Issued, String> {
        let der = CertificateSigningRequestDer::from(request);
        let mut request = CertificateSigningRequestParams::from_der(&der)
            .map_err(|error| format!("not a certificate request: {error}"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(instance);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        life(&mut params, holds);
        let until_ms = u64::try_from(params.not_after.unix_timestamp()).unwrap_or(0) * 1_000;
        request.params = params;
        let signed: Certificate = request.signed_by(&self.issuer).map_err(|error| error.to_string())?;
        Ok(Issued { certificate: signed.der().clone(), until_ms })
    }

    fn server_key(&self) -> Result<KeyPair, String> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.server_key.as_slice()));
        KeyPair::from_der_and_sign_algo(&der, &rcgen::PKCS_ECDSA_P256_SHA256).map_err(|error| error.to_string())
    }

    /// `sha256//…` of the servers' public key, as `curl --pinnedpubkey` takes it.
    ///
    /// # Errors
    /// The key is damaged.
    pub fn pin(&self) -> Result<String, String> {
        use base64::Engine as _;
        let spki = self.server_key()?.subject_public_key_info();
        Ok(format!("sha256//{}", base64::engine::general_purpose::STANDARD.encode(digest(&spki))))
    }

    /// A key and a certificate for this server.
    ///
    /// # Errors
    /// A name that no certificate can bear.
    pub fn server(&self, names: &[String]) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
        let key = self.server_key()?;
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).map_err(|error| error.to_string())?;
        for name in names {
            let san = match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(
                    name.as_str().try_into().map_err(|_| format!("`{name}` is no name for a certificate"))?,
                ),
            };
            params.subject_alt_names.push(san);
        }
        params.distinguished_name = named(SERVER_NAME);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        life(&mut params, SERVER_LIFE);
        let signed = params.signed_by(&key, &self.issuer).map_err(|error| error.to_string())?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok((vec![signed.der().clone(), self.certificate.clone()], key))
    }
}

/// SHA-256 of a certificate.
#[must_use]
pub fn digest(certificate: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, certificate).as_ref());
    out
}

fn make() -> Result<(Vec<u8>, String), String> {
    let key = KeyPair::generate().map_err(|error| error.to_string())?;
    let mut params = CertificateParams::default();
    params.distinguished_name = named("Keepwall authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    life(&mut params, AUTHORITY_LIFE);
    let certificate = params.self_signed(&key).map_err(|error| error.to_string())?;
    Ok((key.serialize_der(), certificate.pem()))
}

fn pem_to_der(pem: &str) -> Result<CertificateDer<'static>, String> {
    use rustls_pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| format!("the authority's certificate: {error}"))
}
