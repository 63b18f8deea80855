//! What is kept in the store about the fleet: the bodies of its resources.

use std::net::IpAddr;
use std::sync::Arc;

use keepwall_api::fleet::{Labels, PostureFile, RolloutPolicy, TokenSpec};
use keepwall_fleet::rollout::Rollout;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Kind of [`PostureRecord`]; its one name is [`CURRENT`].
pub(crate) const POSTURE: &str = "posture";
/// Kind of [`RolloutRecord`].
pub(crate) const ROLLOUT: &str = "rollout";
/// Kind of [`InstanceRecord`].
pub(crate) const INSTANCE: &str = "instance";
/// Kind of [`TokenRecord`].
pub(crate) const TOKEN: &str = "token";
/// Kind of [`StatusRecord`].
pub(crate) const STATUS: &str = "status";
/// Kind of [`ServerRecord`].
pub(crate) const SERVER: &str = "server";
/// Kind of a mark without a body that matters: when somebody last asked the fleet to try.
pub(crate) const ASKED: &str = "asked";
/// The name of what there is one of.
pub(crate) const CURRENT: &str = "current";
/// Earlier postures that are kept for return.
pub(crate) const POSTURES_KEPT: u32 = 1_000;

/// A SHA-256 digest, kept as hexadecimal. Nothing at all is the digest of nothing known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sha256(pub(crate) [u8; 32]);

impl std::fmt::Display for Sha256 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&keepwall_core::hex(&self.0))
    }
}

impl Serialize for Sha256 {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256 {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Sha256, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(from)?;
        if text.is_empty() {
            return Ok(Sha256::default());
        }
        keepwall_core::unhex(&text).map(Sha256).ok_or_else(|| serde::de::Error::custom("a digest has 64 hex digits"))
    }
}

/// What is declared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PostureRecord {
    pub(crate) files: Vec<PostureFile>,
    pub(crate) actor: String,
    pub(crate) reason: String,
    pub(crate) returned_to: Option<u64>,
    /// The rollout that carries it.
    pub(crate) rollout: String,
}

/// A change on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RolloutRecord {
    pub(crate) from_revision: u64,
    /// 0 until the controller has seen the posture's own number.
    pub(crate) to_revision: u64,
    pub(crate) actor: String,
    pub(crate) reason: String,
    pub(crate) started_ms: u64,
    pub(crate) ended_ms: Option<u64>,
    pub(crate) detail: String,
    pub(crate) policy: RolloutPolicy,
    pub(crate) rollout: Rollout,
}

/// A certificate that an instance may show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CertificateRecord {
    /// Of the DER.
    pub(crate) sha256: Sha256,
    pub(crate) until_ms: u64,
}

/// A machine that enrolled. There are thousands in memory: what many have in common they share, see
/// [`super::Registry::set_instance`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InstanceRecord {
    pub(crate) labels: Arc<Labels>,
    pub(crate) interfaces: Vec<InterfaceRecord>,
    /// The newest two: a renewal is not sure to arrive.
    pub(crate) certificates: Vec<CertificateRecord>,
    /// The token that let it in.
    pub(crate) token: Box<str>,
    /// Of the public key with which the token was used.
    #[serde(default)]
    pub(crate) key: Sha256,
    pub(crate) enrolled_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InterfaceRecord {
    pub(crate) name: Arc<str>,
    pub(crate) device: Arc<str>,
    pub(crate) addresses: Vec<IpAddr>,
}

/// A token, its secret as a digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TokenRecord {
    pub(crate) spec: TokenSpec,
    pub(crate) secret_sha256: String,
    pub(crate) actor: String,
    pub(crate) expires_ms: u64,
}

/// What an instance last said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StatusRecord {
    pub(crate) generation: u64,
    pub(crate) digest: Sha256,
    /// What it could not do.
    pub(crate) failed: Option<Sha256>,
    pub(crate) failed_generation: u64,
    pub(crate) failure: String,
    pub(crate) mode: Arc<str>,
    pub(crate) drift: Vec<String>,
    pub(crate) degraded: Vec<String>,
    pub(crate) version: Arc<str>,
    /// The server that holds its stream, or empty.
    pub(crate) server: Arc<str>,
    /// When something of this changed last, or it was last heard before it went.
    pub(crate) seen_ms: u64,
}

/// A server of this store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServerRecord {
    pub(crate) beat_ms: u64,
}
