//! Posture, instances, enrolment, rollouts: what the fleet is told, and what it answers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Labels: each key and value 1-63 characters of letters, digits, `-`, `_`, `.`, `/`; at most 64 of them.
pub type Labels = BTreeMap<String, String>;

/// One file of the posture, as it was written, comments included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PostureFile {
    /// `web.yaml`: 1-128 characters of letters, digits, `-`, `_`, `.`, `/`. Problems and rules name it.
    pub name: String,
    /// YAML, at most 4 MiB.
    pub text: String,
}

/// What is declared for the whole fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Posture {
    /// In the order of their names.
    pub files: Vec<PostureFile>,
}

/// A posture that was declared at some time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PostureVersion {
    /// The commit that declared it; the ETag.
    pub revision: u64,
    /// When.
    pub time: String,
    /// Who.
    pub actor: String,
    /// Why, as they said.
    pub reason: String,
    /// The revision that this one returned to, if it did.
    pub returned_to: Option<u64>,
    /// What was declared; left out in listings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<Vec<PostureFile>>,
}

/// How a change reaches the machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutPolicy {
    /// Waves in order; machines that no wave names follow in one more. Default: one machine, then all others.
    pub waves: Vec<WaveSpec>,
    /// How long each wave must keep contact and hold what it was told before the next begins, seconds, 0-86,400.
    pub soak_s: u32,
    /// How long a machine may take to apply and confirm, seconds, 5-3,600. Default 60: what is not confirmed by then
    /// has been taken back by the machine itself.
    pub confirm_within_s: u32,
    /// How many machines may fail or lose contact before the rollout stops. Default 0: the first stops it.
    pub failures_max: u32,
    /// What a stop does to the machines that were changed already.
    pub on_failure: OnFailure,
}

impl Default for RolloutPolicy {
    fn default() -> RolloutPolicy {
        RolloutPolicy {
            waves: vec![WaveSpec::Count(1)],
            soak_s: 0,
            confirm_within_s: 60,
            failures_max: 0,
            on_failure: OnFailure::Stop,
        }
    }
}

/// Which machines a wave takes, of those that no earlier wave took, in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaveSpec {
    /// This many, at least 1.
    Count(u32),
    /// This share of all that change, 1-100, rounded up.
    Percent(u8),
    /// Those that carry all these labels.
    Labels(Labels),
}

/// What a stop does to the machines that were changed already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// They keep the new state; somebody decides.
    #[default]
    Stop,
    /// They go back to the state before.
    Return,
}

/// A change of the posture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PostureChange {
    /// All files: what is left out is gone.
    pub files: Vec<PostureFile>,
    /// Why, for the history; at most 1,000 characters.
    #[serde(default)]
    pub reason: String,
    /// How it reaches the machines.
    #[serde(default)]
    pub rollout: RolloutPolicy,
}

/// A question about a change, without making it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PostureQuestion {
    /// All files.
    pub files: Vec<PostureFile>,
}

/// What a posture would mean for the fleet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// Why it is refused; empty if it is not.
    pub problems: Vec<PostureProblem>,
    /// The posture's own tests.
    pub tests: Vec<TestOutcome>,
    /// What could be better.
    pub findings: Vec<PostureFinding>,
    /// Machines whose rules change, by name; at most 1,000 are listed.
    pub changed: Vec<String>,
    /// How many machines change in all.
    pub changed_count: u64,
    /// Who can reach whom afterwards and could not before, or the other way round; at most 1,000.
    pub reach: Vec<ReachChange>,
}

impl Report {
    /// True if the posture may be declared.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.problems.is_empty() && self.tests.iter().all(|test| test.holds)
    }
}

/// Something wrong in a posture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PostureProblem {
    /// `web.yaml:3:7`, or empty.
    pub place: String,
    /// What is wrong.
    pub message: String,
    /// The way out, or empty.
    pub help: String,
}

/// A policy test and what came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TestOutcome {
    /// `expect: deny internet -> db:3306`.
    pub test: String,
    /// Where it stands.
    pub place: String,
    /// True if the posture does what the test expects.
    pub holds: bool,
    /// What happens instead, if it does not.
    pub why: String,
}

/// Something that could be better.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PostureFinding {
    /// `info`, `low`, `medium`, `high`, `critical`.
    pub severity: String,
    /// Where it stands.
    pub place: String,
    /// What it is.
    pub message: String,
    /// What to do.
    pub help: String,
}

/// Who can reach whom differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReachChange {
    /// True: possible from now on. False: no longer.
    pub opens: bool,
    /// Who.
    pub from: String,
    /// Whom.
    pub to: String,
    /// On what: `tcp 443`.
    pub on: String,
}

/// A change was accepted and is on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// The rollout that carries it: an operation to follow.
    pub rollout: String,
}

/// A rollout: one change on its way through the waves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RolloutView {
    /// `ro-…`
    pub id: String,
    /// Its commit; the ETag.
    pub revision: u64,
    /// The posture before.
    pub from_revision: u64,
    /// The posture that it brings.
    pub to_revision: u64,
    /// Where it stands.
    pub state: RolloutState,
    /// Why it stopped, or what it waits for.
    pub detail: String,
    /// Who started it.
    pub actor: String,
    /// When.
    pub started: String,
    /// When it ended.
    pub ended: Option<String>,
    /// How.
    pub policy: RolloutPolicy,
    /// Wave by wave.
    pub waves: Vec<WaveView>,
}

/// Where a rollout stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RolloutState {
    /// On its way.
    Running,
    /// A machine failed or was lost, or somebody stopped it. Resume it or return.
    Stopped,
    /// Everybody has it.
    Done,
    /// Machines go, or went, back to the state before.
    Returned,
}

/// One wave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaveView {
    /// Machines in it.
    pub total: u64,
    /// Opened: its machines are told.
    pub open: bool,
    /// Applied and confirmed.
    pub applied: u64,
    /// Refused it, failed, or reverted by themselves.
    pub failed: Vec<String>,
    /// Not connected.
    pub lost: Vec<String>,
}

/// One machine, as declared and as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceView {
    /// Its name in the posture.
    pub name: String,
    /// Its commit; the ETag. 0 if it stands only in the posture and has never enrolled.
    pub revision: u64,
    /// True if a posture file declares it; else it came by enrolment.
    pub declared: bool,
    /// True if it has a certificate that holds.
    pub enrolled: bool,
    /// What groups select it by.
    pub labels: Labels,
    /// Its interfaces.
    pub interfaces: Vec<InstanceInterface>,
    /// What it was last told and what it said.
    pub status: InstanceStatus,
}

/// One interface of an enrolled instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceInterface {
    /// `eth0`: name in the posture, and the Linux device.
    pub name: String,
    /// The Linux device.
    pub device: String,
    /// Private addresses, which stand for it where a rule names a group.
    pub addresses: Vec<String>,
}

/// What an instance was told and what it said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceStatus {
    /// True if its stream is open now, at whichever server.
    pub connected: bool,
    /// When it was last heard.
    pub last_seen: Option<String>,
    /// The generation in force there, confirmed.
    pub generation: u64,
    /// True if that is what it should enforce.
    pub in_sync: bool,
    /// `observing`, `enforcing`, `observe-only`, or empty if unknown.
    pub mode: String,
    /// How the kernel differs from what it should hold; empty if it does not.
    pub drift: Vec<String>,
    /// What the machine lacks and what it does instead.
    pub degraded: Vec<String>,
    /// Why the last change did not go in; empty if it did.
    pub failure: String,
    /// The agent's version.
    pub agent_version: String,
    /// When its certificate ends.
    pub certificate_until: Option<String>,
}

/// Changes of an instance that enrolled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InstanceChange {
    /// New labels, all of them; groups may change by that.
    pub labels: Option<Labels>,
    /// New interfaces, all of them.
    pub interfaces: Option<Vec<InstanceInterface>>,
}

/// An enrolment token to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TokenSpec {
    /// For this instance only. Without it the machine is called by its host name.
    pub instance: Option<String>,
    /// Labels that the machine gets.
    pub labels: Labels,
    /// Addresses that the machine may have. Default: private ranges (RFC 1918, RFC 4193, 100.64.0.0/10).
    pub addresses_within: Vec<String>,
    /// Seconds until it expires, 60-604,800. Default 3,600.
    pub ttl_s: u32,
    /// How many machines it lets in, 1-1,000. Default 1.
    pub uses: u32,
}

impl Default for TokenSpec {
    fn default() -> TokenSpec {
        TokenSpec { instance: None, labels: Labels::new(), addresses_within: Vec::new(), ttl_s: 3_600, uses: 1 }
    }
}

/// A token that was made; the secret is shown this once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenMade {
    /// `et-…`
    pub id: String,
    /// The one line to run on the machine, as root.
    pub command: String,
    /// The same for a machine that has nothing yet: fetches the programs from this server, pinned to its key.
    pub install: String,
    /// The same for cloud-init: user data of the machine.
    pub cloud_init: String,
    /// Server, its certificate authority's digest, and the secret, in one word.
    pub token: String,
    /// When it expires.
    pub expires: String,
}

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    /// `et-…`
    pub id: String,
    /// Its commit; the ETag.
    pub revision: u64,
    /// As it was asked for.
    pub spec: TokenSpec,
    /// Who made it.
    pub actor: String,
    /// When it expires.
    pub expires: String,
    /// Machines that came by it.
    pub used_by: Vec<String>,
}
