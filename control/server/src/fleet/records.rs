//! What is kept in the store about the fleet: the bodies of its resources.

use std::net::IpAddr;

use keepwall_api::fleet::{Labels, PostureFile, RolloutPolicy, TokenSpec};
use keepwall_fleet::rollout::Rollout;
use serde::{Deserialize, Serialize};

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
    /// SHA-256 of the DER, hex.
    pub(crate) sha256: String,
    pub(crate) until_ms: u64,
}

/// A machine that enrolled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InstanceRecord {
    pub(crate) labels: Labels,
    pub(crate) interfaces: Vec<InterfaceRecord>,
    /// The newest two: a renewal is not sure to arrive.
    pub(crate) certificates: Vec<CertificateRecord>,
    /// The token that let it in.
    pub(crate) token: String,
    pub(crate) enrolled_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InterfaceRecord {
    pub(crate) name: String,
    pub(crate) device: String,
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
    /// Hex.
    pub(crate) digest: String,
    /// What it could not do: digest, hex.
    pub(crate) failed: Option<String>,
    pub(crate) failed_generation: u64,
    pub(crate) failure: String,
    pub(crate) mode: String,
    pub(crate) drift: Vec<String>,
    pub(crate) degraded: Vec<String>,
    pub(crate) version: String,
    /// The server that holds its stream, or empty.
    pub(crate) server: String,
    /// When something of this changed last, or it was last heard before it went.
    pub(crate) seen_ms: u64,
}

/// A server of this store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServerRecord {
    pub(crate) beat_ms: u64,
}
