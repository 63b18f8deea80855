//! What everybody is to hold, at one generation: made anew when something changes, and never changed.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use keepwall_fleet::bundle::Digest;
use keepwall_fleet::sync::State;
use keepwall_fleet::world::{Enrolled, Print, World};
use keepwall_posture::SourceFile;
use keepwall_secgroup::spec::Spec;
use keepwall_store::Generation;
use keepwall_wire::{write_change, write_whole};

use super::records::{InstanceRecord, PostureRecord, RolloutRecord};

/// Earlier worlds that a machine may still hold and be brought on from by a change; from an older one it is told
/// everything.
const PRINTS_MAX: usize = 3;
/// Encoded changes that are kept while a view lives.
const BODIES_MAX: usize = 1_024;

/// The posture in force, with its number.
#[derive(Clone, Debug)]
pub(crate) struct Declared {
    pub(crate) revision: Generation,
    pub(crate) spec: Arc<Spec>,
}

/// The rollout that is not over, with its number.
#[derive(Clone, Debug)]
pub(crate) struct Active {
    pub(crate) id: String,
    pub(crate) revision: Generation,
    pub(crate) record: Arc<RolloutRecord>,
}

/// Encoded changes by the worlds that they lead to and from, and what differs.
type Bodies = HashMap<(usize, usize, String), Bytes>;

/// What everybody is to hold.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// Everything up to here is in it; perhaps a little more.
    pub(crate) generation: Generation,
    /// When somebody last asked the fleet to try.
    pub(crate) asked: Generation,
    pub(crate) declared: Option<Declared>,
    pub(crate) active: Option<Active>,
    /// Of the posture in force.
    pub(crate) now: Option<Arc<World>>,
    /// Of the posture before, for machines that the rollout has not reached.
    pub(crate) before: Option<Arc<World>>,
    /// The posture before.
    returns_to: Option<Declared>,
    /// Machines that the rollout has reached; `None` if there is no rollout, and everybody is.
    reached: Option<Arc<HashSet<String>>>,
    prints: VecDeque<Arc<Print>>,
    bodies: Arc<Mutex<Bodies>>,
}

/// What a view is made from.
pub(crate) struct Source {
    pub(crate) generation: Generation,
    pub(crate) asked: Generation,
    pub(crate) declared: Option<Declared>,
    pub(crate) before: Option<Declared>,
    pub(crate) active: Option<Active>,
    pub(crate) enrolled: Vec<Enrolled>,
}

impl View {
    /// Resolves everything. The worlds of `last` are taken over where nothing changed that they depend on.
    pub(crate) fn make(source: Source, last: &View, instances_changed: bool) -> View {
        let world = |declared: &Option<Declared>| -> Option<Arc<World>> {
            let declared = declared.as_ref()?;
            if !instances_changed {
                let made = [(&last.declared, &last.now), (&last.returns_to, &last.before)];
                let same = |other: &&Option<Declared>| other.as_ref().is_some_and(|d| d.revision == declared.revision);
                if let Some((_, Some(world))) = made.iter().find(|(of, world)| same(of) && world.is_some()) {
                    return Some(Arc::clone(world));
                }
            }
            match World::build(&declared.spec, &source.enrolled) {
                Ok(world) => Some(Arc::new(world)),
                Err(problems) => {
                    // It held when it was declared; a newer version may see it otherwise. What is enforced stays.
                    let why = problems.first().map(|p| p.message.clone()).unwrap_or_default();
                    tracing::error!(revision = declared.revision, why, "the posture in force does not hold");
                    None
                }
            }
        };
        let now = world(&source.declared);
        let before = source.active.as_ref().and_then(|_| world(&source.before));
        let mut prints = last.prints.clone();
        for world in [&last.now, &last.before].into_iter().flatten() {
            if !prints.iter().any(|print| Arc::ptr_eq(print, world.print())) {
                prints.push_front(Arc::clone(world.print()));
            }
        }
        prints.truncate(PRINTS_MAX);
        let reached = source.active.as_ref().map(|active| Arc::new(active.record.rollout.reached()));
        View {
            reached,
            generation: source.generation,
            asked: source.asked,
            declared: source.declared,
            active: source.active,
            now,
            before,
            returns_to: source.before,
            prints,
            bodies: Arc::default(),
        }
    }

    /// The same at a later generation, in which nothing changed that matters here.
    pub(crate) fn later(&self, generation: Generation) -> View {
        View {
            generation,
            asked: self.asked,
            declared: self.declared.clone(),
            active: self.active.clone(),
            now: self.now.clone(),
            before: self.before.clone(),
            returns_to: self.returns_to.clone(),
            reached: self.reached.clone(),
            prints: self.prints.clone(),
            bodies: Arc::clone(&self.bodies),
        }
    }

    fn world_of(&self, instance: &str) -> Option<&Arc<World>> {
        match &self.reached {
            Some(reached) if !reached.contains(instance) => self.before.as_ref(),
            _ => self.now.as_ref(),
        }
    }

    /// What a machine is to hold; `None` if nothing was ever declared for it.
    pub(crate) fn desired(&self, instance: &str) -> Option<State> {
        let digest = self.world_of(instance)?.print().digest(instance)?;
        Some(State { generation: self.generation, digest })
    }

    /// What the posture in force means for a machine, reached by the rollout or not.
    pub(crate) fn target(&self, instance: &str) -> Option<Digest> {
        self.now.as_ref()?.print().digest(instance)
    }

    /// How long machines may take to confirm what they are told now, seconds.
    pub(crate) fn confirm_within_s(&self) -> u32 {
        self.active.as_ref().map_or(60, |active| active.record.rollout.pace.confirm_within_s)
    }

    /// What a machine should enforce now.
    pub(crate) fn intent(&self, instance: &str) -> Option<keepwall_secgroup::intent::Intent> {
        self.world_of(instance)?.intent(instance)
    }

    /// The body of an offer, and the base that it builds on.
    pub(crate) fn body(&self, instance: &str, base: Option<Digest>) -> Option<(Option<Digest>, Bytes)> {
        let world = self.world_of(instance)?;
        if let Some(base) = base {
            for print in &self.prints {
                let Some(difference) = world.difference(instance, &base, print) else { continue };
                let make = || Some(write_change(&world.change(instance, &difference, print)?));
                let Some(key) = difference.key() else { return Some((Some(base), make()?)) };
                let key = (Arc::as_ptr(world) as usize, Arc::as_ptr(print) as usize, key);
                let mut bodies = self.bodies.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(body) = bodies.get(&key) {
                    return Some((Some(base), body.clone()));
                }
                let body = make()?;
                if bodies.len() < BODIES_MAX {
                    bodies.insert(key, body.clone());
                }
                return Some((Some(base), body));
            }
        }
        Some((None, write_whole(&world.bundle(instance)?)))
    }
}

/// Reads the files of a posture. An empty list is a posture too: nobody is in any group.
pub(crate) fn parse(record: &PostureRecord) -> Result<Spec, Vec<keepwall_posture::Problem>> {
    if record.files.is_empty() {
        return Ok(Spec::default());
    }
    let files: Vec<SourceFile> = record.files.iter().map(|f| SourceFile::new(&f.name, f.text.clone())).collect();
    keepwall_posture::parse(&files)
}

/// An instance's record as the world takes it.
pub(crate) fn enrolled(name: &str, record: &InstanceRecord) -> Enrolled {
    let interface = |i: &super::records::InterfaceRecord| -> (String, String, Vec<IpAddr>) {
        (i.name.to_string(), i.device.to_string(), i.addresses.clone())
    };
    Enrolled {
        name: name.to_owned(),
        labels: Arc::clone(&record.labels),
        interfaces: record.interfaces.iter().map(interface).collect(),
    }
}
