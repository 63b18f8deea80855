//! A spec with every name resolved, for one machine: what its agent is told, keeps on disk and enforces.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use keepwall_core::{Place, PortRange, Prefix, Protocol};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::check::Checked;
use crate::expand::{self, Single};
use crate::spec::{Direction, GroupType, InnerAccess, OnDeny, Peer, Policy};

/// The format that this build writes and accepts. A newer one is refused, never guessed at.
pub const FORMAT: u32 = 1;

/// All that one machine enforces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intent {
    /// [`FORMAT`].
    pub format: u32,
    /// The machine's instance name.
    pub instance: String,
    /// True: log what would be dropped, drop nothing.
    pub observe: bool,
    /// What a change does to sessions that it now denies.
    pub on_deny: OnDeny,
    /// Idle limit of a session in seconds, or the kernel's own.
    pub session_idle_s: Option<u32>,
    /// Destinations never blocked outbound.
    pub service_prefixes: Vec<Prefix>,
    /// Drop outbound TCP 25 whatever the rules say.
    pub block_outbound_smtp: bool,
    /// Flow records per second and chain at most; 0 for none.
    pub flow_log_per_s: u32,
    /// Map elements per interface at most.
    pub elements_max: u32,
    /// The interfaces that this machine enforces for: its own and its guests'.
    pub attachments: Vec<Attachment>,
    /// Groups and prefix lists that rules name, as addresses. Kept apart from the rules, so that a member who
    /// joins changes one line here.
    pub sets: BTreeMap<String, Vec<Prefix>>,
}

/// One enforced interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// `instance/interface`.
    pub name: String,
    /// The Linux device on this machine.
    pub device: String,
    /// True if the device is the host's end of a guest's interface.
    pub guest: bool,
    /// The interface's private addresses; a guest may send from no other.
    pub addresses: Vec<IpAddr>,
    /// A guest's MAC address, if it is pinned.
    pub mac: Option<[u8; 6]>,
    /// The groups on it, sorted.
    pub groups: Vec<String>,
    /// Basic or advanced; decides the implicit defaults.
    pub kind: GroupType,
    /// Basic groups with intra-group accept: their members' sets are let in before any rule.
    pub inner: Vec<String>,
    /// Inbound rules in the order of evaluation.
    pub ingress: Vec<IntentRule>,
    /// Outbound rules in the order of evaluation.
    pub egress: Vec<IntentRule>,
}

impl Attachment {
    /// The rules of one direction, in the order of evaluation.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> &[IntentRule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// What happens when no rule matches (semantics §1.2).
    #[must_use]
    pub fn default_policy(&self, direction: Direction) -> Policy {
        match (direction, self.kind) {
            (Direction::Egress, GroupType::Basic) => Policy::Accept,
            _ => Policy::Drop,
        }
    }
}

/// One rule, one combination, names resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IntentRule {
    /// `sgr-` and 16 hex digits of what the rule says: stable while its meaning is.
    pub id: String,
    /// `group/ingress#2`: the rule as written, counted from 1.
    pub label: String,
    /// Where it was written.
    pub place: Place,
    /// 1-100.
    pub priority: u8,
    /// Accept or drop.
    pub policy: Policy,
    /// The protocol.
    pub protocol: Protocol,
    /// Destination ports; `None` for protocols without, which match whatever stands there.
    pub ports: Option<PortRange>,
    /// Source ports, `None` for any.
    pub source_ports: Option<PortRange>,
    /// The other side.
    pub peer: IntentPeer,
    /// This side, `None` for any.
    pub local: Option<Prefix>,
}

/// The other side of a resolved rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IntentPeer {
    /// A block.
    Prefix(Prefix),
    /// A set of the intent, by name.
    Set(String),
}

impl std::fmt::Display for IntentPeer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            IntentPeer::Prefix(prefix) => prefix.fmt(f),
            IntentPeer::Set(name) => f.write_str(name),
        }
    }
}

/// The id of a rule: a digest of its normalised meaning, so that equal rules have equal ids (semantics §1.1).
pub(crate) fn rule_id(group: &str, direction: Direction, single: &Single<'_>) -> String {
    let rule = single.rule;
    let text = format!(
        "{group}|{direction}|{:?}|{}|{}|{:?}|{:?}|{}|{:?}",
        rule.policy, rule.priority, rule.protocol, single.ports, single.source_ports, single.peer, rule.local
    );
    let digest = Sha256::digest(text.as_bytes());
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("sgr-{hex}")
}

/// `group/ingress#2`: the rule as written, counted from 1.
pub(crate) fn rule_label(group: &str, direction: Direction, single: &Single<'_>) -> String {
    format!("{group}/{direction}#{}", single.ordinal + 1)
}

/// The rules of one group and direction, as they are known by id.
#[must_use]
pub fn rules_of(checked: &Checked, group: &crate::spec::Group, direction: Direction) -> Vec<IntentRule> {
    let mut out = Vec::new();
    for single in expand::singles(checked.spec(), group, direction) {
        let peer = match &single.peer {
            Peer::Prefix(prefix) => IntentPeer::Prefix(*prefix),
            Peer::Any => continue,
            named => IntentPeer::Set(named.to_string()),
        };
        out.push(IntentRule {
            id: rule_id(&group.name, direction, &single),
            label: rule_label(&group.name, direction, &single),
            place: single.rule.place.clone(),
            priority: single.rule.priority,
            policy: single.rule.policy,
            protocol: single.rule.protocol,
            ports: single.ports,
            source_ports: single.source_ports,
            peer,
            local: single.rule.local,
        });
    }
    out
}

/// What the machine `instance` enforces: its own interfaces and those of the guests that it hosts.
/// Interfaces without any group are left alone (and reported by [`crate::health`]).
///
/// # Errors
/// The instance is not declared.
pub fn resolve(checked: &Checked, instance: &str) -> Result<Intent, ResolveError> {
    Resolver::new(checked).resolve(checked, instance)
}

/// Resolves many machines of one posture: what they share is made once. It is asked with the [`Checked`] that it was
/// made from.
#[derive(Debug)]
pub struct Resolver {
    /// Instance and interface indexes by the machine that enforces for them. Each declared instance is a key.
    here: HashMap<String, Vec<(usize, usize)>>,
    /// Inbound and outbound rules by group.
    rules: HashMap<String, [Vec<IntentRule>; 2]>,
}

impl Resolver {
    /// Makes what machines share.
    #[must_use]
    pub fn new(checked: &Checked) -> Resolver {
        let spec = checked.spec();
        let mut here: HashMap<String, Vec<(usize, usize)>> =
            spec.instances.iter().map(|instance| (instance.name.clone(), Vec::new())).collect();
        for (i, owner) in spec.instances.iter().enumerate() {
            for (n, interface) in owner.interfaces.iter().enumerate() {
                let enforcer = interface.host.as_ref().map_or(&owner.name, |host| &host.name);
                here.entry(enforcer.clone()).or_default().push((i, n));
            }
        }
        let rules = (spec.groups.iter())
            .map(|group| (group.name.clone(), Direction::BOTH.map(|direction| rules_of(checked, group, direction))))
            .collect();
        Resolver { here, rules }
    }

    /// As [`resolve`].
    ///
    /// # Errors
    /// The instance is not declared.
    pub fn resolve(&self, checked: &Checked, instance: &str) -> Result<Intent, ResolveError> {
        let mut intent = self.without_sets(checked, instance)?;
        for name in intent.set_names() {
            let members = set_members(checked, &name);
            intent.sets.insert(name, members);
        }
        Ok(intent)
    }

    /// What the machine enforces, but for the members of the sets that its rules name ([`Intent::set_names`]).
    ///
    /// # Errors
    /// The instance is not declared.
    pub fn without_sets(&self, checked: &Checked, instance: &str) -> Result<Intent, ResolveError> {
        let spec = checked.spec();
        let Some(here) = self.here.get(instance) else {
            return Err(ResolveError {
                instance: instance.to_owned(),
                known: spec.instances.iter().map(|i| i.name.clone()).collect(),
            });
        };
        let mut attachments = Vec::new();
        for &(i, n) in here {
            let owner = &spec.instances[i];
            let interface = &owner.interfaces[n];
            let groups: Vec<&crate::spec::Group> = checked.groups_of(i, n).collect();
            if groups.is_empty() {
                continue;
            }
            let mut attachment = Attachment {
                name: format!("{}/{}", owner.name, interface.name),
                device: interface.device.clone(),
                guest: interface.host.is_some(),
                addresses: interface.addresses.clone(),
                mac: interface.mac,
                groups: groups.iter().map(|g| g.name.clone()).collect(),
                kind: groups[0].kind,
                inner: Vec::new(),
                ingress: Vec::new(),
                egress: Vec::new(),
            };
            for group in &groups {
                if group.inner_access() == InnerAccess::Accept {
                    attachment.inner.push(Peer::Group(group.name.clone()).to_string());
                }
                if let Some([ingress, egress]) = self.rules.get(group.name.as_str()) {
                    attachment.ingress.extend_from_slice(ingress);
                    attachment.egress.extend_from_slice(egress);
                }
            }
            for rules in [&mut attachment.ingress, &mut attachment.egress] {
                // Priority, then drop before accept. The sort is stable: what ties stays in the order of groups and
                // of rules as written, so that every evaluator names the same rule.
                rules.sort_by_key(|rule| (rule.priority, rule.policy));
                let mut seen = BTreeSet::new();
                rules.retain(|rule| seen.insert(rule.id.clone()));
            }
            attachments.push(attachment);
        }
        let settings = &spec.settings;
        Ok(Intent {
            on_deny: settings.on_deny,
            session_idle_s: settings.session_idle_s,
            service_prefixes: settings.service_prefixes.clone(),
            block_outbound_smtp: settings.block_outbound_smtp,
            flow_log_per_s: settings.flow_log_per_s,
            elements_max: settings.limits.elements_per_interface,
            attachments,
            ..Intent::empty(instance)
        })
    }
}

/// The members of a set by its name, sorted, without repeats. A name that leads nowhere has none.
#[must_use]
pub fn set_members(checked: &Checked, name: &str) -> Vec<Prefix> {
    let mut members: Vec<Prefix> = if let Some(group) = name.strip_prefix("group:") {
        checked.addresses_of(group).iter().copied().map(Prefix::host).collect()
    } else {
        let list = name.strip_prefix("prefix-list:").unwrap_or(name);
        (checked.spec().prefix_lists.iter().filter(|l| l.name == list))
            .flat_map(|l| l.entries.iter().map(|(prefix, _)| *prefix))
            .collect()
    };
    members.sort();
    members.dedup();
    members
}

/// The posture has no such instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolveError {
    /// What was asked for.
    pub instance: String,
    /// What there is.
    pub known: Vec<String>,
}

impl std::fmt::Display for ResolveError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the posture declares no instance `{}`", self.instance)?;
        match keepwall_core::nearest(&self.instance, self.known.iter().map(String::as_str)) {
            Some(near) => write!(f, "; did you mean `{near}`?"),
            None => write!(f, "; it declares: {}", self.known.join(", ")),
        }
    }
}

impl std::error::Error for ResolveError {}

impl Intent {
    /// An intent that attaches to nothing.
    #[must_use]
    pub fn empty(instance: &str) -> Intent {
        let settings = crate::spec::Settings::default();
        Intent {
            format: FORMAT,
            instance: instance.to_owned(),
            observe: false,
            on_deny: settings.on_deny,
            session_idle_s: settings.session_idle_s,
            service_prefixes: settings.service_prefixes,
            block_outbound_smtp: settings.block_outbound_smtp,
            flow_log_per_s: settings.flow_log_per_s,
            elements_max: settings.limits.elements_per_interface,
            attachments: Vec::new(),
            sets: BTreeMap::new(),
        }
    }

    /// The sets that rules name, sorted.
    #[must_use]
    pub fn set_names(&self) -> BTreeSet<String> {
        let rules = self.attachments.iter().flat_map(|a| a.ingress.iter().chain(&a.egress));
        let named = rules.filter_map(|rule| match &rule.peer {
            IntentPeer::Set(name) => Some(name.clone()),
            IntentPeer::Prefix(_) => None,
        });
        named.chain(self.attachments.iter().flat_map(|a| a.inner.iter().cloned())).collect()
    }

    /// Reads an intent that came from a file or a socket.
    ///
    /// # Errors
    /// Not JSON, an unknown field, another format, a name without its set: refused whole.
    pub fn from_json(bytes: &[u8]) -> Result<Intent, String> {
        let intent: Intent = serde_json::from_slice(bytes).map_err(|error| format!("not an intent: {error}"))?;
        intent.validate()?;
        Ok(intent)
    }

    /// Checks what the types do not hold.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn validate(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("this intent has format {}; this build knows {FORMAT} only", self.format));
        }
        let mut devices = BTreeSet::new();
        for attachment in &self.attachments {
            if attachment.device.is_empty()
                || attachment.device.len() > 15
                || attachment.device.bytes().any(|b| b == 0 || b == b'/' || b.is_ascii_whitespace())
            {
                return Err(format!("{}: `{}` is no device name", attachment.name, attachment.device));
            }
            if !devices.insert(&attachment.device) {
                return Err(format!("device `{}` is attached twice", attachment.device));
            }
            let sets = (attachment.ingress.iter().chain(&attachment.egress))
                .filter_map(|rule| match &rule.peer {
                    IntentPeer::Set(name) => Some(name),
                    IntentPeer::Prefix(_) => None,
                })
                .chain(&attachment.inner);
            for name in sets {
                if !self.sets.contains_key(name) {
                    return Err(format!("{}: set `{name}` is named but not there", attachment.name));
                }
            }
            for direction in Direction::BOTH {
                let rules = attachment.rules(direction);
                if !rules.is_sorted_by_key(|rule| (rule.priority, rule.policy)) {
                    return Err(format!("{}: {direction} rules are not in the order of evaluation", attachment.name));
                }
                if let Some(rule) = rules.iter().find(|r| {
                    r.ports.is_some() != r.protocol.has_ports() || (r.source_ports.is_some() && r.ports.is_none())
                }) {
                    return Err(format!("{}: ports do not fit protocol {}", rule.label, rule.protocol));
                }
            }
        }
        Ok(())
    }
}
