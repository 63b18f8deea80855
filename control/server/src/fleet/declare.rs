//! The posture: what it would mean, declaring it, its history.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use keepwall_api::fleet::{
    Accepted, OnFailure, PostureChange, PostureFile, PostureFinding, PostureProblem, PostureVersion, ReachChange,
    Report, RolloutPolicy, TestOutcome, WaveSpec,
};
use keepwall_fleet::rollout::{Candidate, Pace, Phase, Rollout, Take, waves};
use keepwall_fleet::world::{World, representatives};
use keepwall_secgroup::check::Checked;
use keepwall_secgroup::evaluate::{Packet, evaluate};
use keepwall_secgroup::spec::{Direction, Instance};
use keepwall_secgroup::{health, reach};
use keepwall_store::{Commit, Expect, Op, Resource, StoreError};
use serde_json::{Value, json};

use super::records::{ASKED, CURRENT, POSTURE, POSTURES_KEPT, PostureRecord, ROLLOUT, RolloutRecord};
use super::view::{View, enrolled, parse};
use super::{Act, Fleet, FleetError, Permit, invalid, now_ms, rfc3339};

/// Questions whose cost grows with the square of the fleet are asked about so many machines at most; of a larger
/// fleet, about two of each kind.
const ASKED_ABOUT_MAX: usize = 96;
/// Names and lines in a report.
const LISTED_MAX: usize = 1_000;
/// The protocol of streams.
const TCP: u8 = 6;
/// Characters of a reason.
const REASON_MAX: usize = 1_000;
/// Bytes of all files together.
const POSTURE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// A posture that was looked at.
struct Looked {
    report: Report,
    /// None if the report does not hold.
    world: Option<World>,
    /// Machines that change.
    changed: Vec<String>,
}

impl Fleet {
    /// The posture in force.
    ///
    /// # Errors
    /// The store.
    pub async fn posture(&self) -> Result<PostureVersion, FleetError> {
        match self.store.get(POSTURE, CURRENT).await? {
            Some(found) => version(&found, true),
            None => Ok(PostureVersion {
                revision: 0,
                time: rfc3339(0),
                actor: String::new(),
                reason: "nothing was ever declared".into(),
                returned_to: None,
                files: Some(Vec::new()),
            }),
        }
    }

    /// Postures, newest first, without their files.
    ///
    /// # Errors
    /// The store.
    pub async fn postures(&self, before: Option<u64>, limit: usize) -> Result<Vec<PostureVersion>, FleetError> {
        let found = self.store.history(POSTURE, CURRENT, before, limit).await?;
        found.iter().map(|resource| version(resource, false)).collect()
    }

    /// One posture.
    ///
    /// # Errors
    /// It is not kept.
    pub async fn posture_at(&self, revision: u64) -> Result<PostureVersion, FleetError> {
        version(&self.posture_resource(revision).await?, true)
    }

    async fn posture_resource(&self, revision: u64) -> Result<Resource, FleetError> {
        let found = self.store.history(POSTURE, CURRENT, revision.checked_add(1), 1).await?;
        let found = found.into_iter().find(|r| r.revision == revision);
        found.ok_or_else(|| FleetError::NotFound(format!("no posture of revision {revision} is kept")))
    }

    pub(super) async fn posture_record(&self, revision: u64) -> Result<PostureRecord, FleetError> {
        Ok(self.posture_resource(revision).await?.read()?)
    }

    /// What a posture would mean.
    ///
    /// # Errors
    /// The question itself is wrong; what is wrong with the posture is in the report.
    pub async fn check(&self, files: Vec<PostureFile>) -> Result<Report, FleetError> {
        Ok(self.look(files).await?.report)
    }

    async fn look(&self, files: Vec<PostureFile>) -> Result<Looked, FleetError> {
        let files = in_order(files)?;
        let view = self.view();
        let everybody: Vec<_> = {
            let registry = self.registry();
            let mut all: Vec<_> = registry.instances.iter().collect();
            all.sort_by_key(|(name, known)| (known.record.enrolled_ms, Arc::clone(name)));
            all.into_iter().map(|(name, known)| enrolled(name, &known.record)).collect()
        };
        let door = self.settings.agents_public.parse().ok();
        let looked = tokio::task::spawn_blocking(move || look(&files, &everybody, &view, door)).await;
        looked.map_err(|error| FleetError::Store(StoreError::Unavailable(error.to_string())))
    }

    /// Declares a posture: from now on it is on its way to the machines.
    ///
    /// # Errors
    /// It does not hold, it changes what the caller may not change, another change is on its way, or somebody was
    /// faster. Nothing is changed then.
    pub async fn declare(
        &self,
        change: PostureChange,
        expect: Expect,
        returned_to: Option<u64>,
        permit: Permit<'_>,
        act: &Act,
    ) -> Result<Accepted, FleetError> {
        let takes = takes(&change.rollout)?;
        if change.reason.chars().count() > REASON_MAX {
            return Err(invalid("/reason", format!("a reason has at most {REASON_MAX} characters")));
        }
        if change.files.is_empty() {
            return Err(invalid("/files", "a posture has at least one file; to enforce nothing, empty its groups"));
        }
        let files = in_order(change.files)?;
        let before = self.store.get(POSTURE, CURRENT).await?;
        let present = before.as_ref().map(|r| r.revision);
        match (expect, present) {
            (Expect::Any, _) | (Expect::Absent, None) | (Expect::Present, Some(_)) => {}
            (Expect::Revision(wanted), Some(there)) if wanted == there => {}
            _ => {
                let (kind, name) = (POSTURE.to_owned(), CURRENT.to_owned());
                return Err(StoreError::Conflict { kind, name, actual: present }.into());
            }
        }
        let looked = self.look(files.clone()).await?;
        let Some(world) = looked.world else { return Err(FleetError::Refused(Box::new(looked.report))) };
        if let Some(active) = &self.view().active {
            // The view follows the store by some milliseconds: it may be over by now.
            let (_, _, record) = self.rollout_record(&active.id).await?;
            if !record.rollout.phase.is_over() {
                let id = &active.id;
                return Err(FleetError::Wrong(match record.rollout.phase {
                    Phase::Stopped => format!("{id} has stopped half-way; resume it or return from it first"),
                    _ => format!("{id} is on its way; wait until it is done, or stop it and return from it"),
                }));
            }
        }
        let spec = world.checked().spec();
        let empty = super::Labels::new();
        let instances: HashMap<&str, &Instance> = spec.instances.iter().map(|i| (i.name.as_str(), i)).collect();
        let labels_of = |name: &String| instances.get(name.as_str()).map_or(&empty, |i| &i.labels);
        // Whoever may not change everything may change what touches only machines of theirs, and touches some.
        if !permit(&empty) {
            for name in &looked.changed {
                if !permit(labels_of(name)) {
                    return Err(FleetError::NotPermitted(name.clone()));
                }
            }
            if looked.changed.is_empty() {
                return Err(FleetError::NotPermitted("the whole posture".into()));
            }
        }
        let now = now_ms();
        let view = self.view();
        let candidates: Vec<Candidate> = {
            let registry = self.registry();
            (looked.changed.iter())
                .filter(|name| registry.instances.contains_key(name.as_str()))
                .map(|name| Candidate {
                    connected: self.fact(&registry, &view, name, now).connected,
                    labels: labels_of(name).clone(),
                    name: name.clone(),
                })
                .collect()
        };
        // Names in the order of time, so that a list of them is one too.
        let id = format!("ro-{:013x}{}", now, super::hex(&crate::seal::random::<2>()));
        let policy = change.rollout;
        let pace = Pace {
            soak_ms: u64::from(policy.soak_s) * 1_000,
            confirm_within_s: policy.confirm_within_s,
            failures_max: policy.failures_max,
            return_on_failure: policy.on_failure == OnFailure::Return,
        };
        let rollout = RolloutRecord {
            from_revision: present.unwrap_or(0),
            to_revision: 0,
            actor: act.actor.clone(),
            reason: change.reason.clone(),
            started_ms: now,
            ended_ms: None,
            detail: "begins".into(),
            policy,
            rollout: Rollout::new(pace, waves(candidates, &takes)),
        };
        let record =
            PostureRecord { files, actor: act.actor.clone(), reason: change.reason, returned_to, rollout: id.clone() };
        let told = |record: &PostureRecord| {
            let files: Vec<Value> = (record.files.iter())
                .map(|f| json!({ "name": f.name, "sha256": super::hex(&crate::ca::digest(f.text.as_bytes())) }))
                .collect();
            json!({ "files": files, "reason": record.reason })
        };
        let previous: Option<PostureRecord> = before.as_ref().map(Resource::read).transpose()?;
        let audit = vec![act.line(
            "declare",
            "posture",
            previous.as_ref().map_or(Value::Null, told),
            json!({ "posture": told(&record), "rollout": id, "changed": looked.changed.len(), "returned_to": returned_to }),
        )];
        let body = serde_json::to_string(&record).map_err(|error| FleetError::Wrong(error.to_string()))?;
        let ops = vec![
            Op::Put {
                kind: POSTURE.into(),
                name: CURRENT.into(),
                expect: present.map_or(Expect::Absent, Expect::Revision),
                body,
                keep: POSTURES_KEPT,
            },
            Op::put(ROLLOUT, &id, Expect::Absent, &rollout),
            Op::put(ASKED, CURRENT, Expect::Any, &id),
        ];
        let answer = json!({ "rollout": id }).to_string();
        let remember = act.remember.clone().map(|remember| keepwall_store::Remember { answer, ..remember });
        self.commit(Commit { ops, audit, remember }).await?;
        Ok(Accepted { rollout: id })
    }

    /// The posture in force, checked, with everybody who enrolled: for questions such as `reach` and `explain`.
    /// `None` if nothing was declared.
    #[must_use]
    pub fn world(&self) -> Option<Arc<World>> {
        self.view().now.clone()
    }
}

fn version(resource: &Resource, with_files: bool) -> Result<PostureVersion, FleetError> {
    let record: PostureRecord = resource.read()?;
    Ok(PostureVersion {
        revision: resource.revision,
        time: rfc3339(resource.updated_ms),
        actor: record.actor,
        reason: record.reason,
        returned_to: record.returned_to,
        files: with_files.then_some(record.files),
    })
}

/// Files by name, each name once and sane.
fn in_order(mut files: Vec<PostureFile>) -> Result<Vec<PostureFile>, FleetError> {
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let mut seen = BTreeSet::new();
    for (n, file) in files.iter().enumerate() {
        let pointer = format!("/files/{n}/name");
        let sane = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if file.name.is_empty() || file.name.len() > 128 || !file.name.chars().all(sane) {
            return Err(invalid(&pointer, "a file name has 1 to 128 letters, digits, `-`, `_`, `.` or `/`"));
        }
        if !seen.insert(&file.name) {
            return Err(invalid(&pointer, format!("`{}` comes twice", file.name)));
        }
    }
    let bytes: usize = files.iter().map(|f| f.text.len()).sum();
    if bytes > POSTURE_BYTES_MAX {
        return Err(invalid("/files", format!("{bytes} bytes in all; at most {POSTURE_BYTES_MAX} are taken")));
    }
    Ok(files)
}

fn takes(policy: &RolloutPolicy) -> Result<Vec<Take>, FleetError> {
    if policy.soak_s > 86_400 {
        return Err(invalid("/rollout/soak_s", "a soak is from 0 to 86,400 seconds"));
    }
    if !(5..=3_600).contains(&policy.confirm_within_s) {
        return Err(invalid("/rollout/confirm_within_s", "a confirmation takes from 5 to 3,600 seconds"));
    }
    if policy.waves.len() > 100 {
        return Err(invalid("/rollout/waves", "at most 100 waves"));
    }
    let take = |(n, wave): (usize, &WaveSpec)| match wave {
        WaveSpec::Count(count) if *count >= 1 => Ok(Take::Count(*count as usize)),
        WaveSpec::Percent(percent) if (1..=100).contains(percent) => Ok(Take::Percent(*percent)),
        WaveSpec::Labels(labels) if !labels.is_empty() => Ok(Take::Labels(labels.clone())),
        _ => Err(invalid(
            &format!("/rollout/waves/{n}"),
            "a wave takes a count of at least 1, a percentage from 1 to 100, or at least one label",
        )),
    };
    policy.waves.iter().enumerate().map(take).collect()
}

fn look(
    files: &[PostureFile],
    everybody: &[keepwall_fleet::world::Enrolled],
    view: &View,
    door: Option<SocketAddr>,
) -> Looked {
    let mut report = Report::default();
    let record = PostureRecord {
        files: files.to_vec(),
        actor: String::new(),
        reason: String::new(),
        returned_to: None,
        rollout: String::new(),
    };
    let refused = |report| Looked { report, world: None, changed: Vec::new() };
    let spec = match parse(&record) {
        Ok(spec) => spec,
        Err(problems) => {
            report.problems = (problems.iter())
                .map(|p| PostureProblem {
                    place: format!("{}:{}:{}", p.place.file, p.place.line, p.place.column),
                    message: p.message.clone(),
                    help: match &p.suggestion {
                        Some(word) => format!("did you mean `{word}`?"),
                        None if p.expected.is_empty() => String::new(),
                        None => format!("expected {}", p.expected),
                    },
                })
                .collect();
            return refused(report);
        }
    };
    let world = match World::build(&spec, everybody) {
        Ok(world) => world,
        Err(problems) => {
            report.problems = (problems.into_iter())
                .map(|p| PostureProblem { place: p.place.to_string(), message: p.message, help: p.help })
                .collect();
            return refused(report);
        }
    };
    for (name, why) in world.held_out() {
        report.findings.push(PostureFinding {
            severity: "high".into(),
            place: String::new(),
            message: format!("{name} is enrolled and does not fit this posture: {why}"),
            help: "it keeps what it enforces now; change its labels, or the posture's limits".into(),
        });
    }
    report.findings.extend(door.and_then(|door| shut_out(world.checked(), door)));
    let small = representatives(world.checked(), ASKED_ABOUT_MAX);
    let asked: &Checked = small.as_ref().unwrap_or(world.checked());
    report.tests = (reach::run_tests(asked).into_iter())
        .map(|t| TestOutcome {
            test: reach::describe(&t.test),
            place: t.test.place.to_string(),
            holds: t.failure.is_none(),
            why: t.failure.unwrap_or_default(),
        })
        .collect();
    report.findings.extend(health::findings(asked, None).into_iter().map(|f| {
        PostureFinding {
            severity: match f.severity {
                keepwall_core::Severity::Note => "low",
                keepwall_core::Severity::Warning => "medium",
                keepwall_core::Severity::Critical => "critical",
            }
            .to_owned(),
            place: f.place,
            message: f.why,
            help: f.fix,
        }
    }));
    let changed = match &view.now {
        Some(now) => world.print().differing(now.print()),
        None => world.print().differing(&keepwall_fleet::world::Print::default()),
    };
    report.changed_count = changed.len() as u64;
    report.changed = changed.iter().take(LISTED_MAX).cloned().collect();
    report.reach = reach_changes(view.now.as_deref(), asked);
    let holds = report.holds();
    Looked { report, world: holds.then_some(world), changed }
}

/// Machines that the server's own machine would not let in at the agents' door, if it is one of the fleet. It proves its
/// own contact over loopback, and streams that are open stay open: nobody else would notice in time.
fn shut_out(checked: &Checked, door: SocketAddr) -> Option<PostureFinding> {
    const NAMED_MAX: usize = 5;
    let instances = &checked.spec().instances;
    let (host, interface) = (instances.iter().enumerate()).find_map(|(n, one)| {
        Some((
            n,
            one.interfaces.iter().position(|i| i.addresses.contains(&door.ip()) || i.public.contains(&door.ip()))?,
        ))
    })?;
    let local = *instances[host].interfaces[interface].addresses.iter().find(|a| a.is_ipv4() == door.is_ipv4())?;
    let refused = |peer: &IpAddr| {
        let packet = Packet {
            direction: Direction::Ingress,
            peer: *peer,
            local,
            protocol: TCP,
            source_port: 0,
            destination_port: door.port(),
            icmp: None,
        };
        peer.is_ipv4() == door.is_ipv4() && !evaluate(checked, host, interface, &packet).is_allow()
    };
    let out: Vec<&str> = (instances.iter().enumerate())
        .filter(|(n, one)| *n != host && one.interfaces.iter().flat_map(|i| &i.addresses).any(refused))
        .map(|(_, one)| one.name.as_str())
        .collect();
    let shown = out.iter().take(NAMED_MAX).copied().collect::<Vec<_>>().join(", ");
    let more = out.len().saturating_sub(NAMED_MAX);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    (!out.is_empty()).then(|| PostureFinding {
        severity: "critical".into(),
        place: String::new(),
        message: format!(
            "{shown}{more} could not reach this server at {door}: the groups of {}, on which it runs, do not let them in",
            instances[host].name
        ),
        help: format!("let the fleet in there: - {{ ports: {}, from: any }}", door.port()),
    })
}

fn reach_changes(before: Option<&World>, after: &Checked) -> Vec<ReachChange> {
    let matrix = |checked: &Checked| match representatives(checked, ASKED_ABOUT_MAX) {
        Some(small) => reach::matrix(&small),
        None if checked.spec().instances.len() <= ASKED_ABOUT_MAX => reach::matrix(checked),
        // So many kinds of machines that no table of them can be read.
        None => reach::Matrix::new(),
    };
    let before = before.map(|world| matrix(world.checked())).unwrap_or_default();
    (reach::difference(&before, &matrix(after)).into_iter().take(LISTED_MAX))
        .map(|c| ReachChange { opens: c.opened, from: c.from, to: c.to, on: c.what })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_posture_that_locks_the_fleet_out_of_its_server_is_found() {
        let found = |ports: &str, door: &str| {
            let text = format!(
                "version: 1\ninstances:\n  \
                 srv: {{ interfaces: {{ eth0: {{ addresses: [10.0.0.1], groups: [srv] }} }} }}\n  \
                 web: {{ interfaces: {{ eth0: {{ addresses: [10.0.0.2], groups: [srv] }} }} }}\n\
                 security_groups:\n  srv:\n    inner_access: drop\n    ingress:\n      \
                 - {{ policy: accept, ports: {ports}, from: 10.0.0.0/24 }}\n"
            );
            let files = vec![PostureFile { name: "a.yaml".into(), text }];
            let record = PostureRecord {
                files,
                actor: String::new(),
                reason: String::new(),
                returned_to: None,
                rollout: String::new(),
            };
            let checked = keepwall_secgroup::check::check(parse(&record).unwrap()).unwrap();
            shut_out(&checked, door.parse().unwrap()).map(|finding| finding.message)
        };
        let message = found("22", "10.0.0.1:7443").unwrap();
        assert!(message.starts_with("web could not reach this server at 10.0.0.1:7443"), "{message}");
        assert_eq!(found("7443", "10.0.0.1:7443"), None);
        assert_eq!(found("22", "10.9.9.9:7443"), None);
    }
}
