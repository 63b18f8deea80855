//! What was seen and done: findings, events, audit; and questions to the posture.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fleet::{InstanceView, PostureVersion, RolloutView, TokenView};
use crate::{KeyView, UserView};

/// A finding or an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Observation {
    /// Grows with time.
    pub id: u64,
    /// The machine that saw it; empty for the server itself.
    pub source: String,
    /// When.
    pub time: String,
    /// `drift`, `flow`, …
    pub kind: String,
    /// How bad.
    pub severity: SeverityWord,
    /// What exactly; its form depends on the kind.
    #[schema(value_type = Object)]
    pub body: serde_json::Value,
}

/// How bad something is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SeverityWord {
    /// To know.
    #[default]
    Info,
    /// Some day.
    Low,
    /// This week.
    Medium,
    /// Today.
    High,
    /// Now.
    Critical,
}

impl SeverityWord {
    /// All, least first.
    pub const ALL: [SeverityWord; 5] =
        [SeverityWord::Info, SeverityWord::Low, SeverityWord::Medium, SeverityWord::High, SeverityWord::Critical];
}

/// A line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditView {
    /// Counts from 1 without gaps.
    pub number: u64,
    /// When.
    pub time: String,
    /// Who, from where, by which request, what, before and after. Secrets are left out.
    #[schema(value_type = Object)]
    pub entry: serde_json::Value,
    /// Chains it to the line before, hexadecimal.
    pub mac: String,
}

/// Whether the audit log is as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditVerdict {
    /// True if every line follows from the one before and none is missing.
    pub holds: bool,
    /// Lines that were looked at.
    pub lines: u64,
    /// What is wrong, with the first line that is; empty if nothing.
    pub why: String,
}

/// Who reaches whom, and on what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReachRow {
    /// Who: an instance, a prefix, a prefix list, or `internet`.
    pub from: String,
    /// Whom.
    pub to: String,
    /// `tcp 443`, `udp 53-60`, `everything`.
    pub on: Vec<String>,
}

/// Why a session is allowed or denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// From this address.
    pub from: String,
    /// To this address.
    pub to: String,
    /// The protocol.
    pub protocol: String,
    /// The destination port, if the protocol has ports.
    pub port: Option<u16>,
    /// True if every interface on the way lets it pass.
    pub allowed: bool,
    /// Interface by interface; empty if neither end is a machine of the posture.
    pub steps: Vec<ExplanationStep>,
}

/// One answer for each pair of addresses that the two ends have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanations {
    /// Pair by pair; at most 1,000.
    pub items: Vec<Explanation>,
}

/// What one interface does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplanationStep {
    /// `web-1/eth0`.
    pub interface: String,
    /// `ingress` or `egress`.
    pub direction: String,
    /// True if it passes.
    pub allow: bool,
    /// The rule, or what else decides.
    pub reason: String,
}

/// A long piece of work: a rollout, seen so that every client can wait for it in the same way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationView {
    /// Its id: the rollout's.
    pub id: String,
    /// True if nothing more will happen by itself.
    pub done: bool,
    /// True if it ended well; false until then.
    pub succeeded: bool,
    /// Where it stands, in words.
    pub detail: String,
    /// Machines that have what was declared.
    pub applied: u64,
    /// Machines in all.
    pub total: u64,
    /// Where the rollout itself is.
    pub rollout: String,
}

macro_rules! pages {
    ($($(#[$doc:meta])* $name:ident of $item:ty;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
        pub struct $name {
            /// This page.
            pub items: Vec<$item>,
            /// Give it back as `cursor` for the next page; null on the last one.
            pub next: Option<String>,
        }
    )*};
}

pages! {
    /// Users.
    UserPage of UserView;
    /// Keys.
    KeyPage of KeyView;
    /// Machines.
    InstancePage of InstanceView;
    /// Enrolment tokens.
    TokenPage of TokenView;
    /// Rollouts, newest first.
    RolloutPage of RolloutView;
    /// Postures, newest first, without their files.
    PosturePage of PostureVersion;
    /// Findings or events, newest first.
    ObservationPage of Observation;
    /// Lines of the audit log, oldest first.
    AuditPage of AuditView;
    /// Who reaches whom.
    ReachPage of ReachRow;
}
