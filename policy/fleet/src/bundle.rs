//! What one machine is told: its rules, and apart from them the sets that they name.
//!
//! A set is what changes most, and what thousands of machines share: a machine that joins a group is one line in one
//! set of each of the others. So a bundle travels whole once, and as a [`Change`] of a few lines from then on. A
//! digest over all of it says on both sides whether they mean the same.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

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

/// A part of a bundle, shared by all bundles that have it, and its digest from the first time that it is asked for:
/// what does not change is neither copied nor read again.
#[derive(Debug, Default)]
struct Part<T> {
    value: T,
    digest: OnceLock<Digest>,
}

impl<T> Part<T> {
    fn new(value: T) -> Arc<Part<T>> {
        Arc::new(Part { value, digest: OnceLock::new() })
    }
}

/// The members of a set: sorted, without repeats. A clone is the same set.
#[derive(Clone, Debug, Default)]
pub struct Set(Arc<Part<Vec<Prefix>>>);

impl Set {
    /// A set of these members, in any order.
    #[must_use]
    pub fn new(mut members: Vec<Prefix>) -> Set {
        if !members.is_sorted() {
            members.sort();
        }
        members.dedup();
        members.shrink_to_fit();
        Set(Part::new(members))
    }

    /// The digest of its members.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        self.0.digest.get_or_init(|| {
            let mut hash = Sha256::new();
            for member in self.iter() {
                hash.update(compact(member));
            }
            hash.finalize().into()
        })
    }
}

impl std::ops::Deref for Set {
    type Target = [Prefix];

    fn deref(&self) -> &[Prefix] {
        &self.0.value
    }
}

impl PartialEq for Set {
    fn eq(&self, other: &Set) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || **self == **other
    }
}

impl Eq for Set {}

/// All that one machine enforces, in the form in which it travels.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The intent without its sets, as JSON.
    rules: Arc<Part<Vec<u8>>>,
    /// Members by set.
    sets: BTreeMap<Arc<str>, Set>,
}

impl PartialEq for Bundle {
    fn eq(&self, other: &Bundle) -> bool {
        self.rules() == other.rules() && self.sets == other.sets
    }
}

impl Eq for Bundle {}

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

/// In order; as they are, if they are.
fn sorted(members: &[Prefix]) -> Cow<'_, [Prefix]> {
    if members.is_sorted() {
        return Cow::Borrowed(members);
    }
    let mut members = members.to_vec();
    members.sort();
    Cow::Owned(members)
}

/// The members of a set after a change, in one pass.
fn merge(members: &[Prefix], change: &SetChange) -> Result<Vec<Prefix>, BundleError> {
    let (add, remove) = (sorted(&change.add), sorted(&change.remove));
    let mut out: Vec<Prefix> = Vec::with_capacity(members.len() + add.len());
    let (mut add, mut remove) = (add.iter().peekable(), remove.iter().peekable());
    let fits_not =
        |member: &Prefix, how: &str| Err(BundleError::DoesNotFit(format!("{member} {how} `{}`", change.name)));
    for member in members {
        while let Some(new) = add.next_if(|new| *new < member) {
            out.push(*new);
        }
        if remove.next_if_eq(&member).is_none() {
            out.push(*member);
        }
    }
    out.extend(add);
    if let Some(left) = remove.next() {
        return fits_not(left, "is not in");
    }
    // One that was there already stands beside itself now.
    match out.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => fits_not(&two[0], "is already in"),
        None => Ok(out),
    }
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
        let sets = std::mem::take(&mut intent.sets);
        let sets = sets.into_iter().map(|(name, members)| (name.into(), Set::new(members))).collect();
        let rules = serde_json::to_vec(&intent).expect("an intent is JSON");
        Bundle { rules: Part::new(rules), sets }
    }

    /// A bundle from its parts, as they arrive.
    ///
    /// # Errors
    /// Over a limit.
    pub fn from_parts(rules: Vec<u8>, sets: BTreeMap<Arc<str>, Set>) -> Result<Bundle, BundleError> {
        let bundle = Bundle { rules: Part::new(rules), sets };
        bundle.within_limits()?;
        Ok(bundle)
    }

    /// The intent's JSON without sets.
    #[must_use]
    pub fn rules(&self) -> &[u8] {
        &self.rules.value
    }

    /// Members by set.
    #[must_use]
    pub fn sets(&self) -> &BTreeMap<Arc<str>, Set> {
        &self.sets
    }

    /// Over all of it.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let rules = self.rules.digest.get_or_init(|| rules_digest(&self.rules.value));
        digest_of(rules, self.sets.iter().map(|(name, set)| (&**name, set.digest())))
    }

    /// Put together again.
    ///
    /// # Errors
    /// The rules are no intent of this version, or name a set that is not there.
    pub fn intent(&self) -> Result<Intent, BundleError> {
        let mut intent: Intent = serde_json::from_slice(self.rules())
            .map_err(|error| BundleError::NoIntent(format!("the rules are no intent: {error}")))?;
        intent.sets = self.sets.iter().map(|(name, set)| (name.to_string(), set.to_vec())).collect();
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
            next.rules = Part::new(rules.clone());
        }
        for name in &change.gone {
            if next.sets.remove(name.as_str()).is_none() {
                return Err(BundleError::DoesNotFit(format!("there is no set `{name}` to remove")));
            }
        }
        for set in &change.sets {
            let held = next.sets.get_mut(set.name.as_str());
            let members: &[Prefix] = match &held {
                Some(held) if !set.anew => held,
                _ => &[],
            };
            let changed = Set(Part::new(merge(members, set)?));
            match held {
                Some(held) => *held = changed,
                None => {
                    next.sets.insert(set.name.as_str().into(), changed);
                }
            }
        }
        next.within_limits()?;
        Ok(next)
    }

    /// What leads from this bundle to another.
    #[must_use]
    pub fn change_to(&self, next: &Bundle) -> Change {
        let none = Set::default();
        Change {
            rules: (self.rules() != next.rules()).then(|| next.rules().to_vec()),
            sets: (next.sets.iter())
                .filter(|(name, set)| self.sets.get(*name) != Some(*set))
                .map(|(name, set)| between(name, self.sets.get(name).unwrap_or(&none), set))
                .collect(),
            gone: self.sets.keys().filter(|name| !next.sets.contains_key(*name)).map(|name| name.to_string()).collect(),
        }
    }

    fn within_limits(&self) -> Result<(), BundleError> {
        if self.rules().len() > RULES_BYTES_MAX {
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
            .map(|(name, members)| ((*name).into(), Set::new(members.iter().map(|m| m.parse().unwrap()).collect())))
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
        let set = |add: &[&str], remove: &[&str]| {
            let members = |all: &[&str]| all.iter().map(|m| m.parse().unwrap()).collect();
            let set = SetChange { name: "group:web".into(), anew: false, add: members(add), remove: members(remove) };
            a.changed(&Change { sets: vec![set], ..Change::default() }).map(|b| b.sets()["group:web"].to_vec())
        };
        for (add, remove) in [
            (&["10.0.0.1"][..], &[][..]),
            (&["10.0.0.2", "10.0.0.2"], &[]),
            (&[], &["10.0.0.1", "10.0.0.1"]),
            (&[], &["10.0.0.0"]),
            (&["10.0.0.3"], &["10.0.0.9"]),
        ] {
            assert!(matches!(set(add, remove), Err(BundleError::DoesNotFit(_))), "{add:?} {remove:?}");
        }
        // In any order; what goes and comes again is there.
        let sorted: Vec<Prefix> = ["10.0.0.0", "10.0.0.1", "10.0.0.3"].map(|m| m.parse().unwrap()).into();
        assert_eq!(set(&["10.0.0.3", "10.0.0.0"], &[]).unwrap(), sorted);
        assert_eq!(set(&["10.0.0.3", "10.0.0.1", "10.0.0.0"], &["10.0.0.1"]).unwrap(), sorted);
        let gone = Change { gone: vec!["group:db".into()], ..Change::default() };
        assert!(matches!(a.changed(&gone), Err(BundleError::DoesNotFit(_))));
    }
}
