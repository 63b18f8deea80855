//! Spec in, [`Checked`] spec out: everything that needs two fields to be seen wrong.
//!
//! All problems are reported at once, each with its place, so that one run of an editor mends them all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use keepwall_core::{Family, Place, nearest};

use crate::expand;
use crate::spec::{Direction, Endpoint, Group, GroupType, InnerAccess, Instance, Interface, Peer, PortSel, Spec};

/// A spec that went through [`check`]. Nothing else can make one, so nothing unchecked is resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    spec: Spec,
    /// Group indexes of each interface, sorted and without repeats: explicit and by label.
    joined: BTreeMap<(usize, usize), Vec<usize>>,
    /// Private addresses of each group's members, sorted.
    addresses: HashMap<String, Vec<IpAddr>>,
}

/// Something that keeps a spec from being used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What is wrong.
    pub message: String,
    /// The way out, or empty.
    pub help: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.message)?;
        if self.help.is_empty() { Ok(()) } else { write!(f, "\n  {}", self.help) }
    }
}

/// More problems than this are not listed: somebody has to read them, and mending the first mends most.
pub const PROBLEMS_MAX: usize = 100;

impl Checked {
    /// What was checked.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The groups that an interface has joined, by name or by label, sorted by name.
    pub fn groups_of(&self, instance: usize, interface: usize) -> impl Iterator<Item = &Group> {
        self.joined.get(&(instance, interface)).into_iter().flatten().map(|index| &self.spec.groups[*index])
    }

    /// Every interface that has joined the group.
    pub fn members_of<'a>(&'a self, group: &'a str) -> impl Iterator<Item = (&'a Instance, &'a Interface)> {
        self.joined
            .iter()
            .filter(move |(_, groups)| groups.iter().any(|index| self.spec.groups[*index].name == group))
            .map(|((instance, interface), _)| {
                let instance = &self.spec.instances[*instance];
                (instance, &instance.interfaces[*interface])
            })
    }

    /// Private addresses of the group's members, sorted: what `group:NAME` means as a peer (semantics §1.1).
    #[must_use]
    pub fn addresses_of(&self, group: &str) -> &[IpAddr] {
        self.addresses.get(group).map_or(&[], Vec::as_slice)
    }

    /// The instance of that name.
    #[must_use]
    pub fn instance(&self, name: &str) -> Option<(usize, &Instance)> {
        self.spec.instances.iter().enumerate().find(|(_, instance)| instance.name == name)
    }
}

struct Checker<'a> {
    spec: &'a Spec,
    problems: Vec<Problem>,
    group_index: HashMap<&'a str, usize>,
}

impl Checker<'_> {
    fn problem(&mut self, place: &Place, message: impl Into<String>, help: impl Into<String>) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem { place: place.clone(), message: message.into(), help: help.into() });
        }
    }

    fn unknown(&mut self, place: &Place, kind: &str, name: &str, known: &[&str]) {
        let help = match nearest(name, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None if known.is_empty() => format!("no {kind} is declared"),
            None => format!("declared: {}", listed(known)),
        };
        self.problem(place, format!("there is no {kind} `{name}`"), help);
    }
}

fn listed(names: &[&str]) -> String {
    const SHOWN: usize = 8;
    let mut text = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(", …");
    }
    text
}

/// Checks names against each other, types, families and quotas.
///
/// # Errors
/// Every problem found, at most [`PROBLEMS_MAX`].
pub fn check(spec: Spec) -> Result<Checked, Vec<Problem>> {
    let mut checker = Checker {
        spec: &spec,
        problems: Vec::new(),
        group_index: spec.groups.iter().enumerate().map(|(index, group)| (group.name.as_str(), index)).collect(),
    };
    checker.unique_names();
    checker.interfaces();
    checker.groups();
    checker.tests();
    let joined = checker.joined();
    checker.membership(&joined);
    let problems = checker.problems;
    if !problems.is_empty() {
        return Err(problems);
    }
    let mut addresses: HashMap<String, BTreeSet<IpAddr>> = HashMap::new();
    for ((instance, interface), groups) in &joined {
        for group in groups {
            let members = addresses.entry(spec.groups[*group].name.clone()).or_default();
            members.extend(spec.instances[*instance].interfaces[*interface].addresses.iter().copied());
        }
    }
    let addresses = addresses.into_iter().map(|(name, members)| (name, members.into_iter().collect())).collect();
    Ok(Checked { spec, joined, addresses })
}

impl<'a> Checker<'a> {
    fn unique_names(&mut self) {
        let spec = self.spec;
        let kinds: [(&str, Vec<(&str, &Place)>); 4] = [
            ("instance", spec.instances.iter().map(|x| (x.name.as_str(), &x.place)).collect()),
            ("security group", spec.groups.iter().map(|x| (x.name.as_str(), &x.place)).collect()),
            ("prefix list", spec.prefix_lists.iter().map(|x| (x.name.as_str(), &x.place)).collect()),
            ("port list", spec.port_lists.iter().map(|x| (x.name.as_str(), &x.place)).collect()),
        ];
        for (kind, names) in kinds {
            let mut seen: HashMap<&str, &Place> = HashMap::new();
            for (name, place) in names {
                if let Some(first) = seen.insert(name, place) {
                    self.problem(
                        place,
                        format!("{kind} `{name}` is declared twice"),
                        format!("the first stands at {first}"),
                    );
                }
            }
        }
        let limits = &spec.settings.limits;
        let nowhere = Place::default();
        for (kind, count, limit) in [
            ("security groups", spec.groups.len(), limits.groups),
            ("prefix lists", spec.prefix_lists.len(), limits.prefix_lists),
        ] {
            if count > limit as usize {
                self.problem(
                    &nowhere,
                    format!("{count} {kind}; the limit is {limit}"),
                    "raise it under settings.limits",
                );
            }
        }
    }

    fn interfaces(&mut self) {
        let spec = self.spec;
        let names: Vec<&str> = spec.instances.iter().map(|i| i.name.as_str()).collect();
        let mut owners: HashMap<IpAddr, String> = HashMap::new();
        let mut devices: HashMap<(&str, &str), &Place> = HashMap::new();
        for instance in &spec.instances {
            for interface in &instance.interfaces {
                for address in interface.addresses.iter().chain(&interface.public) {
                    let me = format!("{}/{}", instance.name, interface.name);
                    if let Some(other) = owners.insert(*address, me.clone()) {
                        self.problem(
                            &interface.place,
                            format!("{me} has address {address}, which {other} has already"),
                            "an address belongs to one interface",
                        );
                    }
                }
                if interface.device.is_empty() || interface.device.len() > 15 {
                    self.problem(
                        &interface.place,
                        format!(
                            "device `{}` has {} bytes; Linux allows 1 to 15",
                            interface.device,
                            interface.device.len()
                        ),
                        "name the device with `device:`",
                    );
                }
                let owner = match &interface.host {
                    None => instance.name.as_str(),
                    Some(host) => {
                        match spec.instances.iter().find(|i| i.name == host.name) {
                            None => self.unknown(&host.place, "instance", &host.name, &names),
                            Some(i) if i.interfaces.iter().any(|x| x.host.is_some()) || i.name == instance.name => self
                                .problem(
                                    &host.place,
                                    format!(
                                        "`{}` cannot be the host of `{}`: it is a guest itself",
                                        i.name, instance.name
                                    ),
                                    "a host's own interfaces have no `host:`",
                                ),
                            Some(_) => {}
                        }
                        if interface.addresses.is_empty() {
                            self.problem(
                                &interface.place,
                                format!("guest interface {}/{} has no addresses", instance.name, interface.name),
                                "list them under `addresses:`; a guest may send from no other",
                            );
                        }
                        host.name.as_str()
                    }
                };
                if let Some(first) = devices.insert((owner, &interface.device), &interface.place) {
                    self.problem(
                        &interface.place,
                        format!("device `{}` of `{owner}` is declared twice", interface.device),
                        format!("the first stands at {first}"),
                    );
                }
                for named in &interface.groups {
                    if !self.group_index.contains_key(named.name.as_str()) {
                        self.unknown_group(&named.place, &named.name);
                    }
                }
            }
        }
    }

    fn unknown_group(&mut self, place: &Place, name: &str) {
        let known: Vec<&str> = self.spec.groups.iter().map(|g| g.name.as_str()).collect();
        self.unknown(place, "security group", name, &known);
    }

    fn groups(&mut self) {
        let spec = self.spec;
        let prefix_lists: Vec<&str> = spec.prefix_lists.iter().map(|l| l.name.as_str()).collect();
        let port_lists: Vec<&str> = spec.port_lists.iter().map(|l| l.name.as_str()).collect();
        let mut associations: HashMap<&str, u32> = HashMap::new();
        for group in &spec.groups {
            if group.kind == GroupType::Advanced && group.inner_access == Some(InnerAccess::Accept) {
                self.problem(
                    &group.place,
                    format!("advanced group `{}` is isolated; inner_access cannot be accept", group.name),
                    "remove `inner_access`, or use `type: basic`",
                );
            }
            let mut naming_groups = 0;
            for (direction, rule) in Direction::BOTH.iter().flat_map(|d| group.rules(*d).iter().map(move |r| (*d, r))) {
                for port in &rule.ports {
                    if let PortSel::List(name) = port
                        && !port_lists.contains(&name.as_str())
                    {
                        self.unknown(&rule.place, "port list", name, &port_lists);
                    }
                }
                for peer in &rule.peers {
                    match &peer.peer {
                        Peer::Any => {}
                        Peer::Prefix(prefix) => {
                            self.families(&peer.place, rule, prefix.family(), &format!("{prefix}"));
                            if rule.local == Some(*prefix) && prefix.len() != 0 {
                                self.problem(
                                    &peer.place,
                                    format!("source and destination are both {prefix}"),
                                    "a rule's two sides differ",
                                );
                            }
                        }
                        Peer::PrefixList(name) => match spec.prefix_lists.iter().find(|l| l.name == *name) {
                            None => self.unknown(&peer.place, "prefix list", name, &prefix_lists),
                            Some(list) => {
                                *associations.entry(name).or_default() += 1;
                                self.families(&peer.place, rule, list.family, &format!("prefix list `{name}`"));
                            }
                        },
                        Peer::Group(name) => {
                            naming_groups += 1;
                            self.group_peer(group, direction, name, &peer.place);
                        }
                    }
                }
            }
            let limit = spec.settings.limits.group_rules_per_group;
            if naming_groups > limit {
                self.problem(
                    &group.place,
                    format!(
                        "group `{}` has {naming_groups} rules that name another group; the limit is {limit}",
                        group.name
                    ),
                    "use a prefix list, or raise settings.limits.group_rules_per_group",
                );
            }
        }
        let limit = spec.settings.limits.associations_per_prefix_list;
        for list in &spec.prefix_lists {
            let count = associations.get(list.name.as_str()).copied().unwrap_or(0);
            if count > limit {
                self.problem(
                    &list.place,
                    format!("{count} rules name prefix list `{}`; the limit is {limit}", list.name),
                    "raise settings.limits.associations_per_prefix_list",
                );
            }
        }
    }

    fn families(&mut self, place: &Place, rule: &crate::spec::Rule, family: Family, what: &str) {
        if let Some(bound) = rule.protocol.family()
            && bound != family
        {
            let other = if bound == Family::Ipv4 { "icmpv6" } else { "icmp" };
            self.problem(
                place,
                format!("{} is {bound} only, and {what} is {family}", rule.protocol),
                format!("use `protocol: {other}` for {family}"),
            );
        }
        if let Some(local) = rule.local
            && local.family() != family
        {
            self.problem(
                place,
                format!("one side of the rule is {family} ({what}), the other {} ({local})", local.family()),
                "both sides of a rule are of one family",
            );
        }
    }

    fn group_peer(&mut self, group: &'a Group, direction: Direction, name: &str, place: &Place) {
        let Some(index) = self.group_index.get(name) else { return self.unknown_group(place, name) };
        let named = &self.spec.groups[*index];
        if named.name == group.name {
            self.problem(
                place,
                format!("group `{name}` names itself in an {direction} rule"),
                "members of a basic group reach each other by `inner_access: accept`",
            );
        }
        for advanced in [group, named] {
            if advanced.kind == GroupType::Advanced {
                let which = if advanced.name == group.name { "name" } else { "be named as" };
                self.problem(
                    place,
                    format!("`{}` is an advanced group and cannot {which} the peer of a rule", advanced.name),
                    "use a prefix list with the members' addresses, or `type: basic`",
                );
                return;
            }
        }
    }

    fn tests(&mut self) {
        let spec = self.spec;
        let known: Vec<&str> = (spec.instances.iter().map(|x| x.name.as_str()))
            .chain(spec.groups.iter().map(|x| x.name.as_str()))
            .chain(spec.prefix_lists.iter().map(|x| x.name.as_str()))
            .chain(["internet"])
            .collect();
        for test in &spec.tests {
            for end in [&test.from, &test.to] {
                if let Endpoint::Name(name) = end
                    && !known.contains(&name.as_str())
                {
                    self.unknown(&test.place, "instance, group or prefix list", name, &known);
                }
            }
        }
    }

    fn joined(&self) -> BTreeMap<(usize, usize), Vec<usize>> {
        let mut joined = BTreeMap::new();
        for (i, instance) in self.spec.instances.iter().enumerate() {
            let by_label: Vec<usize> = (self.spec.groups.iter().enumerate())
                .filter(|(_, group)| group.members.iter().any(|selector| selector.selects(&instance.labels)))
                .map(|(index, _)| index)
                .collect();
            for (n, interface) in instance.interfaces.iter().enumerate() {
                let mut groups: Vec<usize> = (interface.groups.iter())
                    .filter_map(|named| self.group_index.get(named.name.as_str()).copied())
                    .chain(by_label.iter().copied())
                    .collect();
                groups.sort_by(|a, b| self.spec.groups[*a].name.cmp(&self.spec.groups[*b].name));
                groups.dedup();
                joined.insert((i, n), groups);
            }
        }
        joined
    }

    fn membership(&mut self, joined: &BTreeMap<(usize, usize), Vec<usize>>) {
        let spec = self.spec;
        let limits = &spec.settings.limits;
        let mut addresses: HashMap<usize, usize> = HashMap::new();
        let mut interfaces: HashMap<usize, usize> = HashMap::new();
        for (i, instance) in spec.instances.iter().enumerate() {
            let of_instance: BTreeSet<usize> =
                joined.range((i, 0)..(i + 1, 0)).flat_map(|(_, groups)| groups.iter().copied()).collect();
            let kinds: BTreeSet<bool> =
                of_instance.iter().map(|g| spec.groups[*g].kind == GroupType::Advanced).collect();
            if kinds.len() > 1 {
                let names: Vec<&str> = of_instance.iter().map(|g| spec.groups[*g].name.as_str()).collect();
                self.problem(
                    &instance.place,
                    format!("instance `{}` has basic and advanced groups: {}", instance.name, listed(&names)),
                    "an instance's groups are all basic or all advanced",
                );
            }
            for (n, interface) in instance.interfaces.iter().enumerate() {
                let groups = &joined[&(i, n)];
                for group in groups {
                    *addresses.entry(*group).or_default() += interface.addresses.len();
                    *interfaces.entry(*group).or_default() += 1;
                }
                if groups.len() > limits.groups_per_interface as usize {
                    self.problem(
                        &interface.place,
                        format!(
                            "{}/{} is in {} groups; the limit is {}",
                            instance.name,
                            interface.name,
                            groups.len(),
                            limits.groups_per_interface
                        ),
                        "merge groups, or raise settings.limits.groups_per_interface",
                    );
                }
                let counts: Vec<(u64, &str)> = groups
                    .iter()
                    .map(|g| (expand::quota(spec, &spec.groups[*g]), spec.groups[*g].name.as_str()))
                    .collect();
                let total: u64 = counts.iter().map(|(count, _)| count).sum();
                if total > u64::from(limits.rules_per_interface) {
                    let shares: Vec<String> = counts.iter().map(|(count, name)| format!("{name} {count}")).collect();
                    self.problem(
                        &interface.place,
                        format!(
                            "{}/{} has {total} rules ({}); the limit is {}",
                            instance.name,
                            interface.name,
                            shares.join(", "),
                            limits.rules_per_interface
                        ),
                        "a rule counts once for each peer and port, and a list counts as its max_entries; \
                         merge rules, or raise settings.limits.rules_per_interface",
                    );
                }
            }
        }
        for (index, group) in spec.groups.iter().enumerate() {
            let (count, limit, what, knob) = match group.kind {
                GroupType::Basic => (
                    addresses.get(&index).copied().unwrap_or(0),
                    limits.addresses_per_basic_group,
                    "private addresses",
                    "addresses_per_basic_group",
                ),
                GroupType::Advanced => (
                    interfaces.get(&index).copied().unwrap_or(0),
                    limits.interfaces_per_advanced_group,
                    "interfaces",
                    "interfaces_per_advanced_group",
                ),
            };
            if count > limit as usize {
                self.problem(
                    &group.place,
                    format!("group `{}` has {count} {what}; the limit is {limit}", group.name),
                    format!("split the group, or raise settings.limits.{knob}"),
                );
            }
        }
    }
}
