//! One posture and everybody who enrolled, resolved for each machine.
//!
//! An instance is declared in the posture, or it enrolled with labels and addresses that its token allowed; both are
//! members of groups in the same way. Where a name is in both, the posture's word counts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use keepwall_core::Place;
use keepwall_secgroup::check::{Checked, Problem, check};
use keepwall_secgroup::intent::{Intent, Resolver, set_members};
use keepwall_secgroup::spec::{Instance, Interface, Spec};

use crate::bundle::{self, Bundle, Change, Digest, Set};

/// A machine that came by a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// Its name.
    pub name: String,
    /// What groups select it by.
    pub labels: Arc<BTreeMap<String, String>>,
    /// Interface, device, private addresses.
    pub interfaces: Vec<(String, String, Vec<IpAddr>)>,
}

/// What each machine enforces.
#[derive(Debug)]
pub struct World {
    checked: Checked,
    resolver: Resolver,
    print: Arc<Print>,
    /// Enrolled machines that break a rule of the posture, a quota for instance, and why. They are told nothing new.
    held_out: Vec<(String, String)>,
}

/// The digests of a world, and its sets: enough to tell what changed since.
#[derive(Debug, Default)]
pub struct Print {
    instances: HashMap<String, Entry>,
    sets: HashMap<Arc<str>, Set>,
}

#[derive(Debug)]
struct Entry {
    rules: Digest,
    digest: Digest,
    /// In the order of their names; shared between machines that name the same.
    sets: Arc<[Arc<str>]>,
}

/// As many enrolled machines are held out one by one, the newest first, before the posture itself is blamed.
const HELD_OUT_TRIES: usize = 64;

impl World {
    /// Resolves a posture for everybody.
    ///
    /// # Errors
    /// The posture does not hold, whoever enrolled.
    pub fn build(spec: &Spec, enrolled: &[Enrolled]) -> Result<World, Vec<Problem>> {
        let declared: HashSet<&str> = spec.instances.iter().map(|i| i.name.as_str()).collect();
        let mut present: Vec<&Enrolled> = enrolled.iter().filter(|e| !declared.contains(e.name.as_str())).collect();
        let mut held_out = Vec::new();
        for _ in 0..HELD_OUT_TRIES {
            match check(with(spec, &present)) {
                Ok(checked) => {
                    return Ok(World::of(checked, held_out));
                }
                Err(problems) => {
                    let blamed = |e: &Enrolled| {
                        let file = place(&e.name).file;
                        problems.iter().find(|p| p.place.file == file).map(|p| p.message.clone())
                    };
                    let before = present.len();
                    present.retain(|e| match blamed(e) {
                        Some(why) => {
                            held_out.push((e.name.clone(), why));
                            false
                        }
                        None => true,
                    });
                    if present.len() == before {
                        let Some(newest) = present.pop() else { return Err(problems) };
                        let why = problems.first().map(|p| p.message.clone()).unwrap_or_default();
                        held_out.push((newest.name.clone(), why));
                    }
                }
            }
        }
        let checked = check(spec.clone())?;
        held_out
            .extend(present.iter().map(|e| (e.name.clone(), "too many machines break the posture's limits".into())));
        Ok(World::of(checked, held_out))
    }

    fn of(checked: Checked, held_out: Vec<(String, String)>) -> World {
        let resolver = Resolver::new(&checked);
        let print = Arc::new(Print::of(&checked, &resolver));
        World { checked, resolver, print, held_out }
    }

    /// The posture with everybody in it.
    #[must_use]
    pub fn checked(&self) -> &Checked {
        &self.checked
    }

    /// Its digests.
    #[must_use]
    pub fn print(&self) -> &Arc<Print> {
        &self.print
    }

    /// Enrolled machines that are not in it, and why.
    #[must_use]
    pub fn held_out(&self) -> &[(String, String)] {
        &self.held_out
    }

    /// Everything for one machine; `None` if there is no such machine.
    #[must_use]
    pub fn bundle(&self, instance: &str) -> Option<Bundle> {
        let rules = told(&self.resolver, &self.checked, instance)?;
        let sets = self.print.instances.get(instance)?.sets.iter();
        let sets = sets.map(|name| (Arc::clone(name), self.print.sets[name].clone())).collect();
        Bundle::from_parts(json(&rules), sets).ok()
    }

    /// What one machine enforces, as a whole.
    #[must_use]
    pub fn intent(&self, instance: &str) -> Option<Intent> {
        self.resolver.resolve(&self.checked, instance).ok()
    }

    /// What leads a machine that holds `base` of an earlier world to this one: which of its parts differ. `None` if
    /// that world knew nothing of `base`. Cheap; [`World::change`] then makes it.
    #[must_use]
    pub fn difference<'a>(&'a self, instance: &str, base: &Digest, before: &'a Print) -> Option<Difference<'a>> {
        let (new, old) = (self.print.instances.get(instance)?, before.instances.get(instance)?);
        if old.digest != *base {
            return None;
        }
        let differs = |name: &&Arc<str>| {
            before.sets.get(*name).map(Set::digest) != Some(self.print.sets[*name].digest()) || !old.sets.contains(name)
        };
        Some(Difference {
            rules: new.rules != old.rules,
            // What this machine had of a set before matters as well: it may have had none of it.
            sets: new.sets.iter().filter(differs).map(|name| (name, old.sets.contains(name))).collect(),
            gone: old.sets.iter().filter(|name| !new.sets.contains(name)).collect(),
        })
    }

    /// Makes a change.
    #[must_use]
    pub fn change(&self, instance: &str, difference: &Difference<'_>, before: &Print) -> Option<Change> {
        let rules = match difference.rules {
            true => Some(json(&told(&self.resolver, &self.checked, instance)?)),
            false => None,
        };
        let none = Set::default();
        let set = |(name, had): &(&Arc<str>, bool)| {
            let had = if *had { before.sets.get(*name).unwrap_or(&none) } else { &none };
            bundle::between(name, had, &self.print.sets[*name])
        };
        Some(Change {
            rules,
            sets: difference.sets.iter().map(set).collect(),
            gone: difference.gone.iter().map(|name| name.to_string()).collect(),
        })
    }
}

/// Which parts of a machine's bundle differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference<'a> {
    rules: bool,
    sets: Vec<(&'a Arc<str>, bool)>,
    gone: Vec<&'a Arc<str>>,
}

impl Difference<'_> {
    /// By what machines share one change; `None` if it is one machine's alone.
    #[must_use]
    pub fn key(&self) -> Option<String> {
        if self.rules {
            return None;
        }
        let mut key = String::new();
        for (name, had) in &self.sets {
            key.push(if *had { '~' } else { '+' });
            key.push_str(name);
            key.push('\n');
        }
        for name in &self.gone {
            key.push('-');
            key.push_str(name);
            key.push('\n');
        }
        Some(key)
    }
}

impl Print {
    fn of(checked: &Checked, resolver: &Resolver) -> Print {
        let mut out = Print::default();
        let mut lists: HashSet<Arc<[Arc<str>]>> = HashSet::new();
        for instance in &checked.spec().instances {
            let Some(intent) = told(resolver, checked, &instance.name) else { continue };
            let mut names: Vec<Arc<str>> = Vec::new();
            for name in intent.set_names() {
                let name = match out.sets.get_key_value(name.as_str()) {
                    Some((name, _)) => Arc::clone(name),
                    None => {
                        let set = Set::new(set_members(checked, &name));
                        let name: Arc<str> = name.into();
                        out.sets.insert(Arc::clone(&name), set);
                        name
                    }
                };
                names.push(name);
            }
            let names: Arc<[Arc<str>]> = names.into();
            let names = match lists.get(&names) {
                Some(known) => Arc::clone(known),
                None => {
                    lists.insert(Arc::clone(&names));
                    names
                }
            };
            let rules = bundle::rules_digest(&json(&intent));
            let digest = bundle::digest_of(&rules, names.iter().map(|name| (&**name, out.sets[name].digest())));
            out.instances.insert(instance.name.clone(), Entry { rules, digest, sets: names });
        }
        out
    }

    /// The digest of what a machine enforces in this world.
    #[must_use]
    pub fn digest(&self, instance: &str) -> Option<Digest> {
        self.instances.get(instance).map(|entry| entry.digest)
    }

    /// Machines that enforce something else in the other world, or are in one of them only; sorted.
    #[must_use]
    pub fn differing(&self, other: &Print) -> Vec<String> {
        let mut out: Vec<String> = (self.instances.iter())
            .filter(|(name, entry)| other.digest(name) != Some(entry.digest))
            .map(|(name, _)| name.clone())
            .chain(other.instances.keys().filter(|name| !self.instances.contains_key(*name)).cloned())
            .collect();
        out.sort();
        out
    }
}

/// The rules that a machine is told, without the places where they stand: a comment somewhere above must not change
/// what a thousand machines hold. Rules keep their labels, `web/ingress#2`, by which the posture finds them.
fn told(resolver: &Resolver, checked: &Checked, instance: &str) -> Option<Intent> {
    let mut intent = resolver.without_sets(checked, instance).ok()?;
    for attachment in &mut intent.attachments {
        for rule in attachment.ingress.iter_mut().chain(&mut attachment.egress) {
            rule.place = Place::default();
        }
    }
    Some(intent)
}

fn json(intent: &Intent) -> Vec<u8> {
    serde_json::to_vec(intent).expect("an intent is JSON")
}

/// Where an enrolled machine stands, for problems.
fn place(name: &str) -> Place {
    Place::new(&format!("instance {name} (enrolled)").into(), 1, 1)
}

fn with(spec: &Spec, enrolled: &[&Enrolled]) -> Spec {
    let mut spec = spec.clone();
    spec.instances.extend(enrolled.iter().map(|e| {
        let place = place(&e.name);
        Instance {
            name: e.name.clone(),
            labels: Arc::clone(&e.labels),
            interfaces: (e.interfaces.iter())
                .map(|(name, device, addresses)| Interface {
                    name: name.clone(),
                    place: place.clone(),
                    device: device.clone(),
                    host: None,
                    addresses: addresses.clone(),
                    public: Vec::new(),
                    mac: None,
                    groups: Vec::new(),
                })
                .collect(),
            place,
        }
    }));
    spec
}

/// A smaller fleet in which each kind of machine stands twice: for questions whose cost grows with the square of the
/// fleet. Machines are of one kind if their interfaces are in the same groups; machines that a test names stay.
/// `None` if it would not be smaller than `instances_max`, or need not be.
///
/// What is lost: a rule that names one machine's address is asked about only if that machine stayed.
#[must_use]
pub fn representatives(checked: &Checked, instances_max: usize) -> Option<Checked> {
    let spec = checked.spec();
    if spec.instances.len() <= instances_max {
        return None;
    }
    let named: HashSet<String> = spec.tests.iter().flat_map(|t| [t.from.to_string(), t.to.to_string()]).collect();
    let hosts: HashSet<&str> = spec
        .instances
        .iter()
        .flat_map(|i| &i.interfaces)
        .filter_map(|n| Some(n.host.as_ref()?.name.as_str()))
        .collect();
    let mut kinds: HashMap<Vec<Vec<&str>>, u8> = HashMap::new();
    let mut small = spec.clone();
    let mut keep = Vec::with_capacity(spec.instances.len());
    for (i, instance) in spec.instances.iter().enumerate() {
        let groups = |n| checked.groups_of(i, n).map(|g| g.name.as_str()).collect();
        let seen = kinds.entry((0..instance.interfaces.len()).map(groups).collect()).or_default();
        *seen = seen.saturating_add(1);
        keep.push(*seen <= 2 || named.contains(&instance.name) || hosts.contains(instance.name.as_str()));
    }
    let mut keep = keep.into_iter();
    small.instances.retain(|_| keep.next().unwrap_or(false));
    if small.instances.len() > instances_max {
        return None;
    }
    check(small).ok()
}
