//! Who this machine is: a key that was made here and never leaves, a certificate, and whom it trusts.

use std::fs::{File, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use crate::tls::Tls;

/// Where the uplink keeps its identity unless told otherwise.
pub const STATE: &str = "/var/lib/keepwall/uplink";
const FILE: &str = "identity.json";

/// Key, certificate, server.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Its name in the fleet.
    pub instance: String,
    /// `host:port` of the server.
    pub server: String,
    /// An HTTP proxy on the way there.
    pub proxy: Option<String>,
    /// The authority's certificate, DER in base64.
    authority: String,
    /// This machine's certificate, DER in base64.
    certificate: String,
    /// Its key, PKCS #8 in base64.
    key: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Identity");
        out.field("instance", &self.instance).field("server", &self.server).finish_non_exhaustive()
    }
}

/// A new key, and the request for its certificate.
pub struct Request {
    key: KeyPair,
}

impl Request {
    /// Makes a key.
    ///
    /// # Errors
    /// The kernel has no randomness.
    pub fn new() -> Result<Request, String> {
        Ok(Request { key: KeyPair::generate().map_err(|error| error.to_string())? })
    }

    /// The request (PKCS #10, DER). It says nothing but the key.
    ///
    /// # Errors
    /// Never, as far as is known.
    pub fn der(&self) -> Result<Vec<u8>, String> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&self.key).map_err(|error| error.to_string())?;
        Ok(request.der().to_vec())
    }

    /// The key, PKCS #8.
    #[must_use]
    pub fn key(&self) -> Vec<u8> {
        self.key.serialize_der()
    }
}

impl Identity {
    /// From what enrolment brought.
    #[must_use]
    pub fn new(instance: &str, server: &str, proxy: Option<String>, chain: &[Vec<u8>], key: &[u8]) -> Option<Identity> {
        let (certificate, authority) = (chain.first()?, chain.last()?);
        Some(Identity {
            instance: instance.to_owned(),
            server: server.to_owned(),
            proxy,
            authority: STANDARD.encode(authority),
            certificate: STANDARD.encode(certificate),
            key: STANDARD.encode(key),
        })
    }

    /// With a renewed certificate and its key.
    #[must_use]
    pub fn renewed(&self, certificate: &[u8], key: &[u8]) -> Identity {
        Identity { certificate: STANDARD.encode(certificate), key: STANDARD.encode(key), ..self.clone() }
    }

    /// TLS with it.
    ///
    /// # Errors
    /// It is damaged.
    pub fn tls(&self) -> Result<Tls, String> {
        let decode = |what: &str, text: &str| STANDARD.decode(text).map_err(|error| format!("{what}: {error}"));
        let authority = CertificateDer::from(decode("authority", &self.authority)?);
        let certificate = CertificateDer::from(decode("certificate", &self.certificate)?);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(decode("key", &self.key)?));
        Tls::new(&authority, vec![certificate], key)
    }

    /// When the certificate begins and ends, seconds since 1970.
    ///
    /// # Errors
    /// It is damaged.
    pub fn life(&self) -> Result<(u64, u64), String> {
        use x509_parser::prelude::FromDer as _;
        let der = STANDARD.decode(&self.certificate).map_err(|error| error.to_string())?;
        let (_, parsed) =
            x509_parser::certificate::X509Certificate::from_der(&der).map_err(|error| error.to_string())?;
        let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
        Ok((seconds(parsed.validity().not_before), seconds(parsed.validity().not_after)))
    }

    /// Reads it.
    ///
    /// # Errors
    /// There is none, or it is not readable: in words.
    pub fn load(directory: &Path) -> Result<Identity, String> {
        let path = directory.join(FILE);
        let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "this machine has not enrolled; run `keepwall enroll TOKEN`".to_owned(),
            _ => format!("{}: {error}", path.display()),
        })?;
        serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}; enrol again", path.display()))
    }

    /// Writes it: beside, synced, renamed, readable by its owner alone.
    ///
    /// # Errors
    /// The disk.
    pub fn save(&self, directory: &Path) -> Result<(), String> {
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(directory)?;
            std::fs::set_permissions(directory, Permissions::from_mode(0o700))?;
            let beside: PathBuf = directory.join(format!("{FILE}.new"));
            let _ = std::fs::remove_file(&beside);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            std::fs::rename(&beside, directory.join(FILE))?;
            File::open(directory)?.sync_all()
        };
        write().map_err(|error| format!("cannot write {}: {error}", directory.display()))
    }

    /// Forgets it. True if there was one.
    ///
    /// # Errors
    /// The disk.
    pub fn remove(directory: &Path) -> Result<bool, String> {
        match std::fs::remove_file(directory.join(FILE)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(format!("{}: {error}", directory.display())),
        }
    }
}
