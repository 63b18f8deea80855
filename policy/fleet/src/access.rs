//! Who may do what to which machines.
//!
//! A person or a key has bindings: a role, and the scope that it holds in. What a role may do stands in one table,
//! [`RIGHTS`]; nothing else grants anything. An empty scope is everything; a scope of labels covers the instances
//! that carry all of them, what they report, and changes of the posture that change no other machine.
//!
//! Not decided here: who somebody is (that is authentication), and which machines a change of the posture touches
//! (that is the resolver's word, which the caller asks about each of them).

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Labels of an instance, or those that a scope wants.
pub type Labels = BTreeMap<String, String>;

/// As many bindings as one user or key has at most.
pub const BINDINGS_MAX: usize = 64;

/// What somebody is to the fleet. None contains another, but admin, which contains all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees posture, machines, rollouts, findings and events.
    Viewer,
    /// Keeps machines: enrols, labels and removes them, stops, resumes and returns rollouts.
    Operator,
    /// Decides what is allowed: declares postures, revokes certificates, reads the audit log.
    Security,
    /// Everything, users and keys included.
    Admin,
}

impl Role {
    /// All, in the order of the table's columns.
    pub const ALL: [Role; 4] = [Role::Viewer, Role::Operator, Role::Security, Role::Admin];

    /// As it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Security => "security",
            Role::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What something is done to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// What is declared, as files or one by one.
    Posture,
    /// Machines.
    Instance,
    /// Enrolment tokens.
    Token,
    /// Changes on their way.
    Rollout,
    /// What was concluded.
    Finding,
    /// What was seen.
    Event,
    /// Who did what.
    Audit,
    /// People, service accounts, and their bindings.
    User,
    /// API keys of others. One's own need no right.
    Key,
}

impl Resource {
    /// All of them.
    pub const ALL: [Resource; 9] = [
        Resource::Posture,
        Resource::Instance,
        Resource::Token,
        Resource::Rollout,
        Resource::Finding,
        Resource::Event,
        Resource::Audit,
        Resource::User,
        Resource::Key,
    ];

    /// As it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Resource::Posture => "posture",
            Resource::Instance => "instance",
            Resource::Token => "token",
            Resource::Rollout => "rollout",
            Resource::Finding => "finding",
            Resource::Event => "event",
            Resource::Audit => "audit",
            Resource::User => "user",
            Resource::Key => "key",
        }
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Look.
    Read,
    /// Make one.
    Create,
    /// Change one.
    Change,
    /// Remove one.
    Delete,
    /// Take a machine's certificate away.
    Revoke,
}

impl Action {
    /// All of them.
    pub const ALL: [Action; 5] = [Action::Read, Action::Create, Action::Change, Action::Delete, Action::Revoke];

    /// As it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Read => "read",
            Action::Create => "create",
            Action::Change => "change",
            Action::Delete => "delete",
            Action::Revoke => "revoke",
        }
    }
}

/// What a binding with a scope is worth for a right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It holds for targets whose labels contain the scope.
    Labels,
    /// It holds: the thing is shared, and who has a part of the fleet needs it.
    Any,
    /// It does not hold: the thing concerns everybody.
    Whole,
}

const V: Role = Role::Viewer;
const O: Role = Role::Operator;
const S: Role = Role::Security;
const A: Role = Role::Admin;

/// All rights there are. What is not here, nobody may do.
#[rustfmt::skip]
pub const RIGHTS: &[(Resource, Action, Reach, &[Role])] = &[
    // A change is asked about machine by machine while it is resolved; one that changes no machine is anybody's
    // who may change any.
    (Resource::Posture,  Action::Read,   Reach::Any,    &[V, O, S, A]),
    (Resource::Posture,  Action::Change, Reach::Labels, &[      S, A]),
    (Resource::Instance, Action::Read,   Reach::Labels, &[V, O, S, A]),
    (Resource::Instance, Action::Change, Reach::Labels, &[   O,    A]),
    (Resource::Instance, Action::Delete, Reach::Labels, &[   O,    A]),
    (Resource::Instance, Action::Revoke, Reach::Labels, &[   O, S, A]),
    // A token is a secret until it is used, so a viewer does not even see that there is one.
    (Resource::Token,    Action::Read,   Reach::Labels, &[   O,    A]),
    (Resource::Token,    Action::Create, Reach::Labels, &[   O,    A]),
    (Resource::Token,    Action::Delete, Reach::Labels, &[   O,    A]),
    (Resource::Rollout,  Action::Read,   Reach::Any,    &[V, O, S, A]),
    (Resource::Rollout,  Action::Change, Reach::Whole,  &[   O,    A]),
    (Resource::Finding,  Action::Read,   Reach::Labels, &[V, O, S, A]),
    (Resource::Event,    Action::Read,   Reach::Labels, &[V, O, S, A]),
    (Resource::Audit,    Action::Read,   Reach::Whole,  &[      S, A]),
    (Resource::User,     Action::Read,   Reach::Whole,  &[         A]),
    (Resource::User,     Action::Create, Reach::Whole,  &[         A]),
    (Resource::User,     Action::Change, Reach::Whole,  &[         A]),
    (Resource::User,     Action::Delete, Reach::Whole,  &[         A]),
    (Resource::Key,      Action::Read,   Reach::Whole,  &[         A]),
    (Resource::Key,      Action::Create, Reach::Whole,  &[         A]),
    (Resource::Key,      Action::Delete, Reach::Whole,  &[         A]),
];

/// A role and where it holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// What somebody is.
    pub role: Role,
    /// Labels that a target must carry, all of them; empty means everywhere.
    #[serde(default)]
    pub scope: Labels,
}

impl Binding {
    /// A role everywhere.
    #[must_use]
    pub fn everywhere(role: Role) -> Binding {
        Binding { role, scope: Labels::new() }
    }

    fn covers(&self, labels: &Labels) -> bool {
        self.scope.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// What is meant by a question.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// All of its kind.
    Whole,
    /// One with these labels.
    One(&'a Labels),
    /// Whichever of them the asker may: what a list asks before it leaves out the others.
    Some,
}

/// An answer, never an error.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This role lets it through.
    Allow(Role),
    /// Why not.
    Deny(Denied),
}

impl Verdict {
    /// True if it may be done.
    #[must_use]
    pub fn is_allow(&self) -> bool {
        matches!(self, Verdict::Allow(_))
    }
}

/// Why something may not be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Nobody may: there is no such right.
    Nobody,
    /// No binding has a role that may; these have it.
    Role(Vec<Role>),
    /// A role may, but its scope does not reach this far.
    Scope(Role),
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Denied::Nobody => f.write_str("nobody may do that"),
            Denied::Role(roles) => {
                let roles: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
                write!(f, "it needs the role {}", roles.join(" or "))
            }
            Denied::Scope(role) => write!(f, "the scope of the role {role} does not reach that far"),
        }
    }
}

/// Whether somebody with these bindings may do this.
pub fn permits(bindings: &[Binding], resource: Resource, action: Action, target: Target<'_>) -> Verdict {
    let right = RIGHTS.iter().find(|right| right.0 == resource && right.1 == action);
    let Some((_, _, reach, roles)) = right else { return Verdict::Deny(Denied::Nobody) };
    let mut out_of_scope = None;
    for binding in bindings.iter().filter(|binding| roles.contains(&binding.role)) {
        let reaches = binding.scope.is_empty()
            || match (reach, target) {
                (Reach::Any, _) | (Reach::Labels, Target::Some) => true,
                (Reach::Labels, Target::One(labels)) => binding.covers(labels),
                (Reach::Labels, Target::Whole) | (Reach::Whole, _) => false,
            };
        if reaches {
            return Verdict::Allow(binding.role);
        }
        out_of_scope = Some(binding.role);
    }
    Verdict::Deny(match out_of_scope {
        Some(role) => Denied::Scope(role),
        None => Denied::Role(roles.to_vec()),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests read the table that they compare")]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// Each role, everywhere and with a scope, against each resource and action: `yes`, or how far.
    fn golden() -> String {
        let (inside, outside) = (labels(&[("tier", "web"), ("site", "a")]), labels(&[("tier", "db")]));
        let mut out = String::from("# resource action: role=everywhere/scoped; + may, - may not\n");
        out.push_str("# scoped tier=web: a target inside, a target outside, all targets, some targets\n");
        for resource in Resource::ALL {
            for action in Action::ALL {
                out.push_str(&format!("{:<9} {:<7}", resource.as_str(), action.as_str()));
                for role in Role::ALL {
                    let mark = |binding: &Binding, target| {
                        let bindings = std::slice::from_ref(binding);
                        if permits(bindings, resource, action, target).is_allow() { '+' } else { '-' }
                    };
                    let targets = [Target::One(&inside), Target::One(&outside), Target::Whole, Target::Some];
                    let marks = |binding| targets.map(|target| mark(&binding, target)).iter().collect::<String>();
                    let scoped = Binding { role, scope: labels(&[("tier", "web")]) };
                    out.push_str(&format!("  {role}={}/{}", marks(Binding::everywhere(role)), marks(scoped)));
                }
                out.push('\n');
            }
        }
        out
    }

    #[test]
    fn roles_may_what_the_golden_table_says() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/access.golden");
        let now = golden();
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &now).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept, now, "if that is meant, run the test with UPDATE=1 and read the difference");
    }

    #[test]
    fn a_denial_says_why() {
        let viewer = [Binding::everywhere(Role::Viewer)];
        let denied = permits(&viewer, Resource::Posture, Action::Change, Target::Some);
        assert_eq!(denied, Verdict::Deny(Denied::Role(vec![Role::Security, Role::Admin])));
        let scoped = [Binding { role: Role::Operator, scope: labels(&[("tier", "web")]) }];
        let outside = labels(&[("tier", "db")]);
        let denied = permits(&scoped, Resource::Instance, Action::Delete, Target::One(&outside));
        assert_eq!(denied, Verdict::Deny(Denied::Scope(Role::Operator)));
        assert_eq!(permits(&scoped, Resource::Audit, Action::Delete, Target::Some), Verdict::Deny(Denied::Nobody));
    }

    #[test]
    fn a_scope_wants_all_its_labels_with_their_values() {
        let scoped = [Binding { role: Role::Viewer, scope: labels(&[("tier", "web"), ("site", "a")]) }];
        let may = |target: &Labels| permits(&scoped, Resource::Instance, Action::Read, Target::One(target)).is_allow();
        assert!(may(&labels(&[("tier", "web"), ("site", "a"), ("x", "y")])));
        assert!(!may(&labels(&[("tier", "web")])));
        assert!(!may(&labels(&[("tier", "web"), ("site", "b")])));
        assert!(!may(&Labels::new()));
    }

    #[test]
    fn no_bindings_may_nothing() {
        for (resource, action) in Resource::ALL.into_iter().flat_map(|r| Action::ALL.map(|a| (r, a))) {
            assert!(!permits(&[], resource, action, Target::Some).is_allow());
        }
    }

    #[test]
    fn one_binding_that_reaches_is_enough() {
        let both = [Binding { role: Role::Viewer, scope: labels(&[("a", "b")]) }, Binding::everywhere(Role::Admin)];
        assert!(permits(&both, Resource::Instance, Action::Read, Target::Whole).is_allow());
    }
}
