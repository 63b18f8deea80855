//! What was concluded, why to believe it, and what to do.

use serde::{Deserialize, Serialize};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Worth changing.
    Warning,
    /// Worth changing today.
    Critical,
}

/// A conclusion. It always carries its evidence and a way out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A stable word for the kind, such as `shadowed-rule`.
    pub kind: String,
    /// How much it matters.
    pub severity: Severity,
    /// What it is about, such as `web/ingress#2`.
    pub resource: String,
    /// Where that was written, `file:line`, or empty.
    pub place: String,
    /// Why we believe it.
    pub why: String,
    /// What to do.
    pub fix: String,
}
