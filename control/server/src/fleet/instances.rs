//! Who is there: enrolment, renewal, revocation, and what is known of each machine.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keepwall_api::fleet::{InstanceChange, InstanceInterface, InstanceStatus, InstanceView, Labels};
use keepwall_core::Prefix;
use keepwall_store::{Commit, Expect, Generation, Op, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;

use super::records::{CertificateRecord, INSTANCE, InstanceRecord, InterfaceRecord, STATUS, Sha256};
use super::tokens::{TOKEN_USE, TokenUse, parse_secret, slot_name};
use super::{Act, Fleet, FleetError, hex, invalid, now_ms, rfc3339};

/// Interfaces of one machine.
const INTERFACES_MAX: usize = 64;
/// Addresses of one machine.
const ADDRESSES_MAX: usize = 256;
/// Labels of one machine.
const LABELS_MAX: usize = 64;
/// The largest certificate request.
const REQUEST_BYTES_MAX: usize = 8 * 1024;
/// Certificates of one machine that hold at once: the one in use, and a renewal that may not have arrived.
const CERTIFICATES_MAX: usize = 2;

/// What a machine says that wants to enrol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enroll {
    /// The token's secret word: `et-….…`.
    pub token: String,
    /// A certificate request (PKCS #10 DER, base64) for the key that the machine made.
    pub request: String,
    /// How it calls itself.
    pub hostname: String,
    /// Its interfaces.
    pub interfaces: Vec<EnrollInterface>,
    /// The agent's version.
    #[serde(default)]
    pub version: String,
}

/// An interface of a machine that wants to enrol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrollInterface {
    /// The Linux device.
    pub device: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    /// What it is called from now on.
    pub instance: String,
    /// Its certificate and the authority's, DER, base64.
    pub chain: Vec<String>,
    /// Addresses that it may not have by its token, and that stand for nothing: for a person to read.
    pub left_out: Vec<String>,
}

/// Why a machine is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The token is unknown, used up, expired, or of another machine. Which of them, the audit log says; a stranger
    /// learns nothing.
    BadToken,
    /// The token is good and something else is wrong; what, in words.
    Refused(String),
    /// The store does not answer; come again.
    Later(String),
}

/// A name for a machine out of what it calls itself.
fn name_from(hostname: &str) -> Result<String, String> {
    let short = hostname.split('.').next().unwrap_or_default();
    keepwall_core::check_name(short)
        .map_err(|error| format!("the host name `{short}` is no instance name: {error}; make a token for a name"))?;
    Ok(short.to_owned())
}

fn usual_ranges() -> Vec<Prefix> {
    ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"]
        .iter()
        .map(|text| text.parse().expect("a constant"))
        .collect()
}

pub(super) fn within(spec: &[String]) -> Result<Vec<Prefix>, String> {
    if spec.is_empty() {
        return Ok(usual_ranges());
    }
    spec.iter().map(|text| text.parse::<Prefix>().map_err(|error| format!("`{text}`: {error}"))).collect()
}

pub(super) fn check_labels(labels: &Labels, pointer: &str) -> Result<(), FleetError> {
    let sane = |text: &str, empty: bool| {
        (empty || !text.is_empty())
            && text.len() <= 63
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
    };
    if labels.len() > LABELS_MAX || !labels.iter().all(|(key, value)| sane(key, false) && sane(value, true)) {
        return Err(invalid(
            pointer,
            format!("at most {LABELS_MAX} labels; keys and values have up to 63 letters, digits, `-`, `_`, `.`, `/`"),
        ));
    }
    Ok(())
}

fn interfaces_of(change: &[InstanceInterface]) -> Result<Vec<InterfaceRecord>, FleetError> {
    let mut out = Vec::new();
    let mut names = BTreeSet::new();
    if change.is_empty() || change.len() > INTERFACES_MAX {
        return Err(invalid("/interfaces", format!("1 to {INTERFACES_MAX} interfaces")));
    }
    for (n, interface) in change.iter().enumerate() {
        let at = |field: &str| format!("/interfaces/{n}/{field}");
        check_device(&interface.device).map_err(|why| invalid(&at("device"), why))?;
        if interface.name.is_empty() || interface.name.len() > 64 || !names.insert(&interface.name) {
            return Err(invalid(&at("name"), "each interface has a name of its own, 1-64 characters"));
        }
        let mut addresses = Vec::new();
        for (m, text) in interface.addresses.iter().enumerate() {
            let at = format!("/interfaces/{n}/addresses/{m}");
            addresses.push(text.parse().map_err(|_| invalid(&at, format!("`{text}` is no address")))?);
        }
        if addresses.len() > ADDRESSES_MAX {
            return Err(invalid(&at("addresses"), format!("at most {ADDRESSES_MAX} addresses")));
        }
        out.push(InterfaceRecord { name: (*interface.name).into(), device: (*interface.device).into(), addresses });
    }
    Ok(out)
}

fn check_device(device: &str) -> Result<(), String> {
    if device.is_empty() || device.len() > 15 || !device.chars().all(|c| c.is_ascii_graphic() && c != '/') {
        return Err("a Linux device has a name of 1 to 15 characters without spaces or `/`".into());
    }
    Ok(())
}

impl Fleet {
    /// Lets a machine in. The same machine may ask again with the same key, since an answer can be lost; anybody else
    /// who shows the token is refused.
    ///
    /// # Errors
    /// See [`Admission`]. Refusals are in the audit log.
    pub async fn enroll(&self, enroll: &Enroll, address: &str) -> Result<Enrolled, Admission> {
        let (admission, why) = match self.try_enroll(enroll, address).await {
            Ok(enrolled) => return Ok(enrolled),
            Err(refusal) => refusal,
        };
        tracing::warn!(address, hostname = enroll.hostname.escape_default().to_string(), why, "enrolment refused");
        let act = Act { actor: "instance:unknown".into(), address: address.to_owned(), ..Act::default() };
        let hostname: String = enroll.hostname.chars().take(64).collect();
        let token = enroll.token.split_once('.').map_or("", |(id, _)| id);
        let token: String = token.chars().take(32).collect();
        self.refusal(act.line(
            "refuse enrolment",
            &format!("token/{token}"),
            Value::Null,
            json!({ "hostname": hostname, "why": why }),
        ))
        .await;
        Err(admission)
    }

    async fn try_enroll(&self, enroll: &Enroll, address: &str) -> Result<Enrolled, (Admission, String)> {
        let bad = |why: &str| (Admission::BadToken, why.to_owned());
        let refused = |why: String| (Admission::Refused(why.clone()), why);
        let later = |error: StoreError| (Admission::Later(error.to_string()), error.to_string());
        let (id, secret) = parse_secret(&enroll.token).ok_or_else(|| bad("not a token"))?;
        let (_, token) = self.token_record(&id).await.map_err(|error| match error {
            FleetError::Store(error) => later(error),
            _ => bad("unknown token"),
        })?;
        let shown = hex(&crate::ca::digest(&secret));
        if !bool::from(shown.as_bytes().ct_eq(token.secret_sha256.as_bytes())) {
            return Err(bad("wrong secret"));
        }
        let now = now_ms();
        if now >= token.expires_ms {
            return Err(bad("expired token"));
        }
        let request = STANDARD.decode(&enroll.request).ok().filter(|r| r.len() <= REQUEST_BYTES_MAX);
        let request =
            request.ok_or_else(|| refused("the certificate request is not base64 of at most 8 KiB".into()))?;
        let name = match &token.spec.instance {
            Some(name) => name.clone(),
            None => name_from(&enroll.hostname).map_err(refused)?,
        };
        let issued = self.authority.issue(&name, &request).map_err(refused)?;
        let key = Sha256(crate::ca::digest(&public_key(&issued.certificate).map_err(refused)?));
        let before = self.store.get(INSTANCE, &name).await.map_err(later)?;
        let old: Option<InstanceRecord> = before.as_ref().map(|r| r.read()).transpose().map_err(later)?;
        // The answer was lost, and the machine asks again. What was revoked since stays so.
        let came = |old: &InstanceRecord| *old.token == *id && old.key == key && !old.certificates.is_empty();
        let again = old.as_ref().is_some_and(came);
        let at_once = || {
            let why = "somebody else enrolled at the same moment";
            (Admission::Later(why.into()), "conflict".to_owned())
        };
        if !again && !self.slot_left(&id, token.spec.uses).await.map_err(later)? {
            // Perhaps it was this machine's own first request, which went through after we looked.
            let now = self.store.get(INSTANCE, &name).await.map_err(later)?;
            let now: Option<InstanceRecord> = now.map(|r| r.read()).transpose().map_err(later)?;
            return Err(if now.as_ref().is_some_and(came) { at_once() } else { bad("used up") });
        }
        if token.spec.instance.is_none() && !again {
            // A general token makes new machines; a machine that is known, or declared, is somebody.
            let holds = old.as_ref().is_some_and(|old| old.certificates.iter().any(|c| c.until_ms > now));
            if holds {
                return Err(refused(format!(
                    "an instance `{name}` is enrolled already; remove it first, or make a token for it by name"
                )));
            }
            let view = self.view();
            if view.declared.as_ref().is_some_and(|d| d.spec.instances.iter().any(|i| i.name == name)) {
                return Err(refused(format!("the posture declares `{name}`; make a token for it by name")));
            }
        }
        let allowed = within(&token.spec.addresses_within).map_err(refused)?;
        let (interfaces, left_out) = self.admitted(&name, &enroll.interfaces, &allowed).map_err(refused)?;
        let certificate =
            CertificateRecord { sha256: Sha256(crate::ca::digest(&issued.certificate)), until_ms: issued.until_ms };
        // What was there before no longer opens anything: this is the machine of that name now.
        let record = InstanceRecord {
            // A machine that comes back by a token for its name keeps its labels, and so its groups, unless the token
            // says otherwise: without any it would be in no group, and wide open. A name that a machine gives itself
            // brings no labels.
            labels: match &old {
                Some(old) if again || token.spec.instance.is_some() && token.spec.labels.is_empty() => {
                    Arc::clone(&old.labels)
                }
                _ => Arc::new(token.spec.labels.clone()),
            },
            interfaces,
            certificates: vec![certificate.clone()],
            token: id.as_str().into(),
            key,
            enrolled_ms: old.as_ref().map_or(now, |old| old.enrolled_ms),
        };
        let mut ops = vec![Op::put(
            INSTANCE,
            &name,
            before.as_ref().map_or(Expect::Absent, |r| Expect::Revision(r.revision)),
            &record,
        )];
        if !again {
            // A slot is taken once, whichever server is asked.
            let slot = self.next_slot(&id);
            if slot >= token.spec.uses {
                // The last were given out since we looked, and perhaps not used.
                return Err(at_once());
            }
            let used = TokenUse { instance: name.clone(), time_ms: now };
            ops.push(Op::put(TOKEN_USE, &slot_name(&id, slot), Expect::Absent, &used));
        }
        let act = Act { actor: format!("instance:{name}"), address: address.to_owned(), ..Act::default() };
        let audit = vec![act.line(
            "enrol",
            &format!("instance/{name}"),
            json!(old.as_ref().map(|o| json!({ "certificates": o.certificates }))),
            json!({ "token": id, "certificate": certificate, "labels": record.labels, "interfaces": record.interfaces }),
        )];
        let revision = match self.commit(Commit { ops, audit, remember: None }).await {
            Ok(revision) => revision,
            Err(FleetError::Store(StoreError::Conflict { .. })) => {
                // Another server may have taken slots; they are counted again.
                self.forget_slots(&id);
                return Err(at_once());
            }
            Err(FleetError::Store(error)) => return Err(later(error)),
            Err(error) => return Err(refused(format!("{error:?}"))),
        };
        // Known here at once: the machine dials within milliseconds, before the store tells us of ourselves.
        self.registry().set_instance(&name, Some((revision, record)));
        if old.is_some() {
            self.end_stream(&name, "replaced");
        }
        Ok(Enrolled {
            instance: name,
            chain: vec![STANDARD.encode(&issued.certificate), STANDARD.encode(self.authority.certificate())],
            left_out,
        })
    }

    /// The interfaces of a machine with the addresses that its token allows and nobody else has.
    fn admitted(
        &self,
        name: &str,
        asked: &[EnrollInterface],
        allowed: &[Prefix],
    ) -> Result<(Vec<InterfaceRecord>, Vec<String>), String> {
        if asked.is_empty() || asked.len() > INTERFACES_MAX {
            return Err(format!("a machine has 1 to {INTERFACES_MAX} interfaces"));
        }
        let total: usize = asked.iter().map(|i| i.addresses.len()).sum();
        if total > ADDRESSES_MAX {
            return Err(format!("{total} addresses; at most {ADDRESSES_MAX} are taken"));
        }
        let mut left_out = Vec::new();
        let mut out: Vec<InterfaceRecord> = Vec::new();
        for interface in asked {
            check_device(&interface.device)?;
            if out.iter().any(|i| *i.device == *interface.device) {
                return Err(format!("device `{}` comes twice", interface.device));
            }
            let (mut addresses, others): (Vec<IpAddr>, Vec<IpAddr>) =
                interface.addresses.iter().partition(|a| allowed.iter().any(|p| p.contains(**a)));
            addresses.sort();
            addresses.dedup();
            left_out.extend(others.iter().map(ToString::to_string));
            let device: Arc<str> = interface.device.as_str().into();
            out.push(InterfaceRecord { name: Arc::clone(&device), device, addresses });
        }
        let registry = self.registry();
        for address in out.iter().flat_map(|i| &i.addresses) {
            if let Some(other) = registry.addresses.get(address).filter(|other| &***other != name) {
                return Err(format!(
                    "{address} is the address of `{other}` already; remove that instance, or limit this one's \
                     addresses with the token's addresses_within"
                ));
            }
        }
        drop(registry);
        Ok((out, left_out))
    }

    /// A new certificate for a machine that has one.
    ///
    /// # Errors
    /// In words, for the machine's log.
    pub(crate) async fn renew(
        &self,
        instance: &Arc<str>,
        shown: &[u8; 32],
        request: &[u8],
    ) -> Result<Vec<Vec<u8>>, String> {
        if request.len() > REQUEST_BYTES_MAX {
            return Err("the certificate request is too long".into());
        }
        let found = self.store.get(INSTANCE, instance).await.map_err(|error| error.to_string())?;
        let found = found.ok_or("this instance was removed")?;
        let mut record: InstanceRecord = found.read().map_err(|error| error.to_string())?;
        let shown = Sha256(*shown);
        if !record.certificates.iter().any(|c| c.sha256 == shown) {
            return Err("this certificate was revoked".into());
        }
        let issued = self.authority.issue(instance, request)?;
        let new =
            CertificateRecord { sha256: Sha256(crate::ca::digest(&issued.certificate)), until_ms: issued.until_ms };
        record.certificates.retain(|c| c.sha256 == shown);
        record.certificates.push(new.clone());
        record.certificates.truncate(CERTIFICATES_MAX);
        let act = Act { actor: format!("instance:{instance}"), ..Act::default() };
        let audit = vec![act.line("renew", &format!("instance/{instance}"), json!(shown), json!(new))];
        let ops = vec![Op::put(INSTANCE, instance, Expect::Revision(found.revision), &record)];
        let revision =
            self.commit(Commit { ops, audit, remember: None }).await.map_err(|error| format!("not now: {error:?}"))?;
        self.registry().set_instance(instance, Some((revision, record)));
        Ok(vec![issued.certificate.to_vec(), self.authority.certificate().to_vec()])
    }

    /// Whose certificate this is, if it holds.
    pub(crate) async fn owner(&self, certificate: &[u8; 32]) -> Result<Arc<str>, &'static str> {
        if let Some(owner) = self.known_owner(certificate) {
            return owner;
        }
        // Another server may have issued it a moment ago: its name is in it, its record in the store.
        Err("unknown certificate")
    }

    /// As [`Fleet::owner`], asking the store about the instance that the certificate names.
    pub(crate) async fn owner_named(&self, certificate: &[u8; 32], name: &str) -> Result<Arc<str>, &'static str> {
        if let Ok(owner) = self.owner(certificate).await {
            return Ok(owner);
        }
        let found = self.store.get(INSTANCE, name).await.map_err(|_| "the store does not answer")?;
        let found = found.ok_or("no such instance")?;
        let record: InstanceRecord = found.read().map_err(|_| "the record is damaged")?;
        self.registry().set_instance(name, Some((found.revision, record)));
        self.known_owner(certificate).unwrap_or(Err("revoked certificate"))
    }

    fn known_owner(&self, certificate: &[u8; 32]) -> Option<Result<Arc<str>, &'static str>> {
        let registry = self.registry();
        let (owner, until_ms) = registry.certificates.get(certificate)?;
        // A resumed TLS session does not look at the date again.
        Some(if *until_ms > now_ms() { Ok(Arc::clone(owner)) } else { Err("expired certificate") })
    }

    /// A line about something refused, bounded: a stranger cannot fill the disk.
    pub(crate) async fn refusal(&self, line: String) {
        const PER_MINUTE_MAX: u64 = 120;
        static MINUTE: std::sync::Mutex<(u64, u64)> = std::sync::Mutex::new((0, 0));
        {
            let mut minute = super::hold(&MINUTE);
            let now = now_ms() / 60_000;
            if minute.0 != now {
                *minute = (now, 0);
            }
            minute.1 += 1;
            if minute.1 > PER_MINUTE_MAX {
                return;
            }
        }
        let commit = Commit { audit: vec![line], ..Commit::default() };
        if let Err(error) = self.store.commit(commit).await {
            tracing::warn!(%error, "a refusal could not be written to the audit log");
        }
    }

    /// Machines by name, declared and enrolled, that carry all these labels.
    ///
    /// # Errors
    /// The store.
    pub async fn instances(
        &self,
        after: Option<&str>,
        limit: usize,
        labels: &Labels,
    ) -> Result<Vec<InstanceView>, FleetError> {
        let view = self.view();
        let registry = self.registry();
        let declared = view.declared.iter().flat_map(|d| d.spec.instances.iter().map(|i| i.name.as_str()));
        let names: BTreeSet<&str> = declared.chain(registry.instances.keys().map(|name| &**name)).collect();
        let behind = names.into_iter().filter(|name| after.is_none_or(|after| *name > after));
        let carries = |view: &InstanceView| labels.iter().all(|(key, value)| view.labels.get(key) == Some(value));
        Ok(behind.filter_map(|name| self.instance_view(&view, &registry, name)).filter(carries).take(limit).collect())
    }

    /// One machine.
    ///
    /// # Errors
    /// There is none of that name.
    pub async fn instance(&self, name: &str) -> Result<InstanceView, FleetError> {
        let found = self.instance_view(&self.view(), &self.registry(), name);
        found.ok_or_else(|| FleetError::NotFound(format!("there is no instance `{name}`")))
    }

    fn instance_view(&self, view: &super::view::View, registry: &super::Registry, name: &str) -> Option<InstanceView> {
        let declared = view.declared.as_ref().and_then(|d| d.spec.instances.iter().find(|i| i.name == name));
        let known = registry.instances.get(name);
        if declared.is_none() && known.is_none() {
            return None;
        }
        let now = now_ms();
        let until_ms = known.and_then(|k| k.record.certificates.iter().map(|c| c.until_ms).max());
        let status = registry.statuses.get(name).cloned().unwrap_or_default();
        let connected = registry.connected(&self.server, &status, now);
        let in_sync = view.desired(name).is_some_and(|state| state.digest == status.digest.0);
        let (labels, interfaces) = match (declared, known) {
            (Some(declared), _) => (
                &declared.labels,
                (declared.interfaces.iter())
                    .map(|i| InstanceInterface {
                        name: i.name.clone(),
                        device: i.device.clone(),
                        addresses: i.addresses.iter().map(ToString::to_string).collect(),
                    })
                    .collect(),
            ),
            (None, Some(known)) => (
                &known.record.labels,
                (known.record.interfaces.iter())
                    .map(|i| InstanceInterface {
                        name: i.name.to_string(),
                        device: i.device.to_string(),
                        addresses: i.addresses.iter().map(ToString::to_string).collect(),
                    })
                    .collect(),
            ),
            (None, None) => return None,
        };
        Some(InstanceView {
            name: name.to_owned(),
            revision: known.map_or(0, |k| k.revision),
            declared: declared.is_some(),
            enrolled: until_ms.is_some_and(|until| until > now),
            labels: (**labels).clone(),
            interfaces,
            status: InstanceStatus {
                connected,
                last_seen: match (connected, status.seen_ms) {
                    (true, _) => Some(rfc3339(now)),
                    (false, 0) => None,
                    (false, seen) => Some(rfc3339(seen)),
                },
                generation: status.generation,
                in_sync,
                mode: status.mode.to_string(),
                drift: status.drift,
                degraded: status.degraded,
                // Of what it is no longer asked to do, nobody needs to hear.
                failure: if in_sync { String::new() } else { status.failure },
                agent_version: status.version.to_string(),
                certificate_until: until_ms.map(rfc3339),
            },
        })
    }

    /// Changes labels or interfaces of a machine that enrolled. Groups that select by label change at once, on every
    /// machine that names them.
    ///
    /// # Errors
    /// It is declared in the posture, or has not enrolled; somebody was faster.
    pub async fn change_instance(
        &self,
        name: &str,
        change: InstanceChange,
        expect: Expect,
        act: &Act,
    ) -> Result<InstanceView, FleetError> {
        let (revision, record) = self.instance_record(name, expect).await?;
        if self.instance(name).await.is_ok_and(|view| view.declared) {
            return Err(FleetError::Wrong(format!("the posture declares `{name}`: change it there")));
        }
        let mut new = record.clone();
        if let Some(labels) = change.labels {
            check_labels(&labels, "/labels")?;
            new.labels = Arc::new(labels);
        }
        if let Some(interfaces) = &change.interfaces {
            new.interfaces = interfaces_of(interfaces)?;
        }
        let audit = vec![act.line(
            "change",
            &format!("instance/{name}"),
            json!({ "labels": record.labels, "interfaces": record.interfaces }),
            json!({ "labels": new.labels, "interfaces": new.interfaces }),
        )];
        let ops = vec![Op::put(INSTANCE, name, Expect::Revision(revision), &new)];
        let revision = self.commit(Commit { ops, audit, remember: act.remember.clone() }).await?;
        // Whoever was told that it is done reads it here from now on.
        self.registry().set_instance(name, Some((revision, new.clone())));
        let mut view = self.instance(name).await?;
        view.revision = revision;
        view.labels = (*new.labels).clone();
        view.interfaces = change.interfaces.unwrap_or(view.interfaces);
        Ok(view)
    }

    async fn instance_record(&self, name: &str, expect: Expect) -> Result<(Generation, InstanceRecord), FleetError> {
        let found = self.store.get(INSTANCE, name).await?;
        let found = found.ok_or_else(|| FleetError::NotFound(format!("no instance `{name}` has enrolled")))?;
        if let Expect::Revision(wanted) = expect
            && wanted != found.revision
        {
            let (kind, name) = (INSTANCE.to_owned(), name.to_owned());
            return Err(StoreError::Conflict { kind, name, actual: Some(found.revision) }.into());
        }
        Ok((found.revision, found.read()?))
    }

    /// Forgets a machine: its certificate opens nothing from now on, and it stands for nothing in any group. What it
    /// enforces, it goes on enforcing until somebody says otherwise there.
    ///
    /// # Errors
    /// It has not enrolled; somebody was faster.
    pub async fn remove_instance(&self, name: &str, expect: Expect, act: &Act) -> Result<(), FleetError> {
        let (revision, record) = self.instance_record(name, expect).await?;
        let audit = vec![act.line("remove", &format!("instance/{name}"), json!(record), Value::Null)];
        let ops = vec![Op::delete(INSTANCE, name, Expect::Revision(revision)), Op::delete(STATUS, name, Expect::Any)];
        self.commit(Commit { ops, audit, remember: act.remember.clone() }).await?;
        self.registry().set_instance(name, None);
        self.end_stream(name, "revoked");
        Ok(())
    }

    /// Revokes a machine's certificates: it must enrol again, by a token for its name.
    ///
    /// # Errors
    /// It has not enrolled.
    pub async fn revoke(&self, name: &str, act: &Act) -> Result<(), FleetError> {
        let (revision, record) = self.instance_record(name, Expect::Any).await?;
        let audit = vec![act.line("revoke", &format!("instance/{name}"), json!(record.certificates), json!([]))];
        let new = InstanceRecord { certificates: Vec::new(), ..record };
        let ops = vec![Op::put(INSTANCE, name, Expect::Revision(revision), &new)];
        let revision = self.commit(Commit { ops, audit, remember: act.remember.clone() }).await?;
        self.registry().set_instance(name, Some((revision, new)));
        self.end_stream(name, "revoked");
        Ok(())
    }

    /// What a machine should enforce now.
    ///
    /// # Errors
    /// There is no such machine, or nothing is declared for it.
    pub async fn intent(&self, name: &str) -> Result<Value, FleetError> {
        self.instance(name).await?;
        let intent = self.view().intent(name);
        let intent = intent.ok_or_else(|| FleetError::NotFound(format!("nothing is declared for `{name}` yet")))?;
        Ok(json!(intent))
    }
}

/// The public key of a certificate, as its digest is remembered with a token.
fn public_key(certificate: &[u8]) -> Result<Vec<u8>, String> {
    use x509_parser::prelude::FromDer as _;
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    Ok(parsed.public_key().raw.to_vec())
}

/// The instance that a certificate names.
pub(crate) fn subject(certificate: &[u8]) -> Option<String> {
    use x509_parser::prelude::FromDer as _;
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?.as_str().ok()?;
    keepwall_core::check_name(name).ok()?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_called_by_the_first_part_of_its_host_name() {
        assert_eq!(name_from("web-1.example.org"), Ok("web-1".into()));
        for wrong in ["", "1web", "a", "we b"] {
            assert!(name_from(wrong).is_err(), "{wrong}");
        }
    }
}
