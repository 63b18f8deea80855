//! What one machine is told: its rules, and apart from them the sets that they name.
//!
//! A set is what changes most, and what thousands of machines share: a machine that joins a group is one line in one
//! set of each of the others. So a bundle travels whole once, and as a [`Change`] of a few lines from then on. A
//! digest over all of it says on both sides whether they mean the same.

use std::collections::BTreeMap;

use keepwall_core::{Family, Prefix};
use keepwall_secgroup::intent::Intent;
use sha2::{Digest as _, Sha256};

/// SHA-256 of a bundle or of a part of one.
pub type Digest = [u8; 32];

/// The most sets of one bundle; each stands for a group or a list that a rule names.
pub const SETS_MAX: usize = 4_096;
/// The most members of one set.
pub const MEMBERS_MAX: usize = 262_144;
/// The largest rules of one bundle, in bytes of JSON.
pub const RULES_BYTES_MAX: usize = 32 * 1024 * 1024;

/// All that one machine enforces, in the form in which it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// The intent without its sets, as JSON.
    rules: Vec<u8>,
    /// Members by set, sorted, without repeats.
    sets: BTreeMap<String, Vec<Prefix>>,
}

/// From one bundle to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// New rules, or none if they stay.
    pub rules: Option<Vec<u8>>,
    /// What becomes of the sets that differ.
    pub sets: Vec<SetChange>,
    /// Sets that no rule names any more.
    pub gone: Vec<String>,
}

/// From one version of a set to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetChange {
    /// Its name.
    pub name: String,
    /// True: it begins empty, whatever was there.
    pub anew: bool,
    /// Members that come.
    pub add: Vec<Prefix>,
    /// Members that go.
    pub remove: Vec<Prefix>,
}

/// A bundle or a change cannot be used. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BundleError {
    /// Over a limit.
    TooLarge(String),
    /// It was not made for what is held.
    DoesNotFit(String),
    /// The rules are no intent.
    NoIntent(String),
}

impl std::fmt::Display for BundleError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BundleError::TooLarge(what) => f.write_str(what),
            BundleError::DoesNotFit(why) => write!(f, "the change was made for another state: {why}"),
            BundleError::NoIntent(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for BundleError {}

/// The digest of an intent's JSON without its sets.
#[must_use]
pub fn rules_digest(rules: &[u8]) -> Digest {
    Sha256::digest(rules).into()
}

/// The digest of a set's members, which are sorted and without repeats.
#[must_use]
pub fn set_digest(members: &[Prefix]) -> Digest {
    let mut hash = Sha256::new();
    for member in members {
        hash.update(compact(member));
    }
    hash.finalize().into()
}

/// The digest of a bundle from those of its parts; sets in the order of their names.
#[must_use]
pub fn digest_of<'a>(rules: &Digest, sets: impl IntoIterator<Item = (&'a str, &'a Digest)>) -> Digest {
    let mut hash = Sha256::new();
    hash.update(rules);
    for (name, set) in sets {
        // A length before the name: no two lists of sets read the same.
        hash.update((name.len() as u64).to_be_bytes());
        hash.update(name.as_bytes());
        hash.update(set);
    }
    hash.finalize().into()
}

/// A prefix in 18 bytes: family (4 or 6), length, address.
#[must_use]
pub fn compact(prefix: &Prefix) -> [u8; 18] {
    let mut out = [0; 18];
    out[0] = match prefix.family() {
        Family::Ipv4 => 4,
        Family::Ipv6 => 6,
    };
    out[1] = prefix.len();
    match prefix.address() {
        std::net::IpAddr::V4(a) => out[2..6].copy_from_slice(&a.octets()),
        std::net::IpAddr::V6(a) => out[2..].copy_from_slice(&a.octets()),
    }
    out
}

/// What changes between two versions of a set, both sorted.
#[must_use]
pub fn between(name: &str, before: &[Prefix], after: &[Prefix]) -> SetChange {
    let mut change = SetChange { name: name.to_owned(), ..SetChange::default() };
    let (mut b, mut a) = (before.iter().peekable(), after.iter().peekable());
    loop {
        match (b.peek(), a.peek()) {
            (None, None) => return change,
            (Some(_), None) => change.remove.extend(b.next()),
            (None, Some(_)) => change.add.extend(a.next()),
            (Some(old), Some(new)) if old == new => {
                b.next();
                a.next();
            }
            (Some(old), Some(new)) if old < new => change.remove.extend(b.next()),
            (Some(_), Some(_)) => change.add.extend(a.next()),
        }
    }
}

impl Bundle {
    /// Takes an intent apart.
    ///
    /// # Panics
    /// Never: an intent is JSON.
    #[must_use]
    pub fn of(mut intent: Intent) -> Bundle {
        let mut sets = std::mem::take(&mut intent.sets);
        for members in sets.values_mut() {
            members.sort();
            members.dedup();
        }
        let rules = serde_json::to_vec(&intent).expect("an intent is JSON");
        Bundle { rules, sets }
    }

    /// A bundle from its parts, as they arrive.
    ///
    /// # Errors
    /// Over a limit.
    pub fn from_parts(rules: Vec<u8>, sets: BTreeMap<String, Vec<Prefix>>) -> Result<Bundle, BundleError> {
        let mut bundle = Bundle { rules, sets };
        for members in bundle.sets.values_mut() {
            members.sort();
            members.dedup();
        }
        bundle.within_limits()?;
        Ok(bundle)
    }

    /// The intent's JSON without sets.
    #[must_use]
    pub fn rules(&self) -> &[u8] {
        &self.rules
    }

    /// Members by set.
    #[must_use]
    pub fn sets(&self) -> &BTreeMap<String, Vec<Prefix>> {
        &self.sets
    }

    /// Over all of it.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let sets: Vec<(&str, Digest)> =
            self.sets.iter().map(|(name, members)| (name.as_str(), set_digest(members))).collect();
        digest_of(&rules_digest(&self.rules), sets.iter().map(|(name, digest)| (*name, digest)))
    }

    /// Put together again.
    ///
    /// # Errors
    /// The rules are no intent of this version, or name a set that is not there.
    pub fn intent(&self) -> Result<Intent, BundleError> {
        let mut intent: Intent = serde_json::from_slice(&self.rules)
            .map_err(|error| BundleError::NoIntent(format!("the rules are no intent: {error}")))?;
        intent.sets = self.sets.clone();
        intent.validate().map_err(BundleError::NoIntent)?;
        Ok(intent)
    }

    /// The bundle after a change.
    ///
    /// # Errors
    /// The change removes what is not there, adds what is, or leads over a limit: it was made for another state.
    pub fn changed(&self, change: &Change) -> Result<Bundle, BundleError> {
        let mut next = self.clone();
        if let Some(rules) = &change.rules {
            next.rules.clone_from(rules);
        }
        for name in &change.gone {
            if next.sets.remove(name).is_none() {
                return Err(BundleError::DoesNotFit(format!("there is no set `{name}` to remove")));
            }
        }
        for set in &change.sets {
            let members = next.sets.entry(set.name.clone()).or_default();
            if set.anew {
                members.clear();
            }
            for member in &set.remove {
                let Ok(at) = members.binary_search(member) else {
                    return Err(BundleError::DoesNotFit(format!("{member} is not in `{}`", set.name)));
                };
                members.remove(at);
            }
            for member in &set.add {
                let Err(at) = members.binary_search(member) else {
                    return Err(BundleError::DoesNotFit(format!("{member} is in `{}` already", set.name)));
                };
                members.insert(at, *member);
            }
        }
        next.within_limits()?;
        Ok(next)
    }

    /// What leads from this bundle to another.
    #[must_use]
    pub fn change_to(&self, next: &Bundle) -> Change {
        let none = Vec::new();
        Change {
            rules: (self.rules != next.rules).then(|| next.rules.clone()),
            sets: (next.sets.iter())
                .filter(|(name, members)| self.sets.get(*name) != Some(members))
                .map(|(name, members)| between(name, self.sets.get(name).unwrap_or(&none), members))
                .collect(),
            gone: self.sets.keys().filter(|name| !next.sets.contains_key(*name)).cloned().collect(),
        }
    }

    fn within_limits(&self) -> Result<(), BundleError> {
        if self.rules.len() > RULES_BYTES_MAX {
            return Err(BundleError::TooLarge(format!("rules of more than {RULES_BYTES_MAX} bytes")));
        }
        if self.sets.len() > SETS_MAX {
            return Err(BundleError::TooLarge(format!("more than {SETS_MAX} sets")));
        }
        match self.sets.iter().find(|(_, members)| members.len() > MEMBERS_MAX) {
            Some((name, _)) => Err(BundleError::TooLarge(format!("`{name}` has more than {MEMBERS_MAX} members"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn bundle(rules: &str, sets: &[(&str, &[&str])]) -> Bundle {
        let sets = (sets.iter())
            .map(|(name, members)| ((*name).to_owned(), members.iter().map(|m| m.parse().unwrap()).collect()))
            .collect();
        Bundle::from_parts(rules.as_bytes().to_vec(), sets).unwrap()
    }

    #[test]
    fn a_change_leads_from_one_bundle_to_the_other() {
        let states = [
            bundle("a", &[]),
            bundle("a", &[("group:web", &["10.0.0.1", "10.0.0.2", "fd00::1"])]),
            bundle("a", &[("group:web", &["10.0.0.2", "10.0.0.9", "fd00::1"]), ("group:db", &["10.1.0.1"])]),
            bundle("b", &[("group:db", &[])]),
        ];
        for before in &states {
            for after in &states {
                let change = before.change_to(after);
                assert_eq!(&before.changed(&change).unwrap(), after);
                assert_eq!(before.digest() == after.digest(), before == after);
            }
        }
        let joined =
            states[1].change_to(&bundle("a", &[("group:web", &["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1"])]));
        assert_eq!((joined.rules, joined.sets[0].add.len(), joined.sets[0].remove.len()), (None, 1, 0));
    }

    #[test]
    fn a_change_made_for_another_state_is_refused() {
        let (a, b) = (bundle("a", &[("group:web", &["10.0.0.1"])]), bundle("a", &[("group:web", &["10.0.0.2"])]));
        let change = a.change_to(&b);
        assert!(matches!(b.changed(&change), Err(BundleError::DoesNotFit(_))));
        let gone = Change { gone: vec!["group:db".into()], ..Change::default() };
        assert!(matches!(a.changed(&gone), Err(BundleError::DoesNotFit(_))));
    }
}
