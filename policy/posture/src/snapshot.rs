//! What a group's rules were at one time, to go back to.
//!
//! A document only: who takes it, when, and how long it is kept is decided elsewhere; restoring is
//! [`crate::edit::replace_rules`].

use keepwall_secgroup::spec::{Direction, Group};
use serde::{Deserialize, Serialize};

use crate::rule::NewRule;

/// The only version of the document.
pub const SNAPSHOT_VERSION: u32 = 1;

/// The largest document that is read.
pub const SNAPSHOT_BYTES_MAX: usize = 16 << 20;

/// The rules of one group at one time, as they were written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSnapshot {
    version: u32,
    /// The group's name.
    pub group: String,
    /// When, in seconds since 1970 UTC, as the caller says.
    pub taken_at_s: u64,
    /// Inbound rules in file order.
    pub ingress: Vec<NewRule>,
    /// Outbound rules in file order.
    pub egress: Vec<NewRule>,
}

impl GroupSnapshot {
    /// The rules of a group now.
    #[must_use]
    pub fn of(group: &Group, taken_at_s: u64) -> GroupSnapshot {
        let rules = |direction| group.rules(direction).iter().map(NewRule::of).collect();
        GroupSnapshot {
            version: SNAPSHOT_VERSION,
            group: group.name.clone(),
            taken_at_s,
            ingress: rules(Direction::Ingress),
            egress: rules(Direction::Egress),
        }
    }

    /// The document, indented, with a line end.
    #[must_use]
    pub fn serialise(&self) -> String {
        // Texts and numbers only: writing them to memory cannot fail.
        let mut text = serde_json::to_string_pretty(self).expect("a snapshot holds only texts, numbers and lists");
        text.push('\n');
        text
    }

    /// Reads a document.
    ///
    /// # Errors
    /// It is too large, no JSON, of another version, has unknown fields, or holds a rule that is none.
    pub fn parse(text: &str) -> Result<GroupSnapshot, SnapshotError> {
        if text.len() > SNAPSHOT_BYTES_MAX {
            return Err(SnapshotError::TooLarge);
        }
        let snapshot: GroupSnapshot =
            serde_json::from_str(text).map_err(|error| SnapshotError::NotASnapshot(error.to_string()))?;
        match snapshot.version {
            SNAPSHOT_VERSION => Ok(snapshot),
            other => Err(SnapshotError::Version(other)),
        }
    }
}

/// Why a text is no snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotError {
    /// Larger than [`SNAPSHOT_BYTES_MAX`].
    TooLarge,
    /// No JSON of this shape; the text says where and what.
    NotASnapshot(String),
    /// Written by a newer program.
    Version(u32),
}

impl std::fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SnapshotError::TooLarge => write!(f, "the snapshot is larger than {SNAPSHOT_BYTES_MAX} bytes"),
            SnapshotError::NotASnapshot(why) => {
                write!(f, "this is no group snapshot: {}", crate::problem::printable(why))
            }
            SnapshotError::Version(version) => {
                write!(f, "the snapshot has version {version}; this program reads {SNAPSHOT_VERSION}")
            }
        }
    }
}

impl std::error::Error for SnapshotError {}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::edit::{RuleSelector, remove_rule, replace_rules};
    use crate::{SourceFile, parse};

    const TEXT: &str = "version: 1
security_groups:
  web:
    ingress:
      # the site
      - { ports: [80, 443], from: any, description: the site }
      - { ports: 22, source_ports: 1024/65535, from: [group:ops, 10.0.0.0/8], to: 10.1.0.0/16, priority: 7 }
    egress:
      - { policy: drop, ports: 'port-list:mail', to: prefix-list:world }
";

    fn group(text: &str) -> Group {
        parse(&[SourceFile::new("t", text)]).unwrap().groups.remove(0)
    }

    #[test]
    fn a_snapshot_reads_back_as_itself_and_restores_what_was_removed() {
        let snapshot = GroupSnapshot::of(&group(TEXT), 1_790_000_000);
        assert_eq!(GroupSnapshot::parse(&snapshot.serialise()).unwrap(), snapshot);
        let fewer = remove_rule(TEXT, "web", Direction::Ingress, &RuleSelector::Index(1)).unwrap().text;
        let restored = replace_rules(&fewer, "web", &snapshot.ingress, &snapshot.egress).unwrap();
        assert_eq!(GroupSnapshot::of(&group(&restored.text), 1_790_000_000), snapshot);
        assert!(restored.text.contains("      # the site\n"));
    }

    #[test]
    fn unknown_fields_versions_and_rules_that_are_none_are_refused() {
        let good = GroupSnapshot::of(&group(TEXT), 1).serialise();
        for (from, to, why) in [
            ("\"version\": 1", "\"version\": 2", "version 2"),
            ("\"group\"", "\"grupo\"", "unknown field"),
            ("\"priority\": 7", "\"priority\": 0", "out of range"),
            ("group:ops", "grup:ops", "did you mean `group:ops`"),
            ("80/80", "80/79", "reversed"),
        ] {
            assert!(good.contains(from), "{from}");
            let error = GroupSnapshot::parse(&good.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
