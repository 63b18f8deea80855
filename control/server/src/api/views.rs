//! Parts of a posture as values, and back into files. Pure: files in, files or values out.
//!
//! What the API declares stands in files of its own, `api/security-groups/web.yaml`, whose text is JSON, which YAML
//! contains. What a person wrote by hand is never rewritten as a whole: only rules in it are edited, by the splicing
//! of `keepwall_posture::edit`, which keeps every comment.

use keepwall_api::problem::{self, FieldError, Problem};
use keepwall_api::{
    Declared, FamilyWord, GroupSpec, GroupTypeWord, InstanceSpec, InterfaceSpec, Labels, PolicyWord, PortListSpec,
    PostureFile, PrefixListSpec, RuleEdit, RuleSpec,
};
use keepwall_core::{Family, Place, check_name};
use keepwall_posture::edit::{self, EditError, Edited, RuleChange, RuleSelector};
use keepwall_posture::{NewRule, SourceFile, parse};
use keepwall_secgroup::spec::{
    Direction, Group, GroupType, InnerAccess, Instance, Policy, PortList, PrefixList, Rule, Spec,
};
use serde_json::{Value, json};

/// A kind of named things in a posture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Groups,
    PrefixLists,
    PortLists,
    Instances,
}

impl Section {
    /// Its key in a posture file.
    fn key(self) -> &'static str {
        match self {
            Section::Groups => "security_groups",
            Section::PrefixLists => "prefix_lists",
            Section::PortLists => "port_lists",
            Section::Instances => "instances",
        }
    }

    /// For messages.
    pub(super) fn noun(self) -> &'static str {
        match self {
            Section::Groups => "security group",
            Section::PrefixLists => "prefix list",
            Section::PortLists => "port list",
            Section::Instances => "instance",
        }
    }

    /// The file that the API keeps one of them in.
    pub(super) fn file(self, name: &str) -> String {
        // File names are plain ASCII, names are not: what else they hold is written by its number.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
        let mut file = format!("api/{}/", self.key().replace('_', "-"));
        for c in name.chars() {
            if plain(c) { file.push(c) } else { file.push_str(&format!("_{:x}_", u32::from(c))) }
        }
        file.push_str(".yaml");
        file
    }

    /// Where one of that name stands.
    pub(super) fn place(self, spec: &Spec, name: &str) -> Option<Place> {
        match self {
            Section::Groups => spec.groups.iter().find(|one| one.name == name).map(|one| &one.place),
            Section::PrefixLists => spec.prefix_lists.iter().find(|one| one.name == name).map(|one| &one.place),
            Section::PortLists => spec.port_lists.iter().find(|one| one.name == name).map(|one| &one.place),
            Section::Instances => spec.instances.iter().find(|one| one.name == name).map(|one| &one.place),
        }
        .cloned()
    }
}

/// What the files declare.
pub(super) fn spec(files: &[PostureFile]) -> Result<Spec, Problem> {
    if files.is_empty() {
        return Ok(Spec::default());
    }
    let sources: Vec<SourceFile> = files.iter().map(|file| SourceFile::new(&file.name, file.text.as_str())).collect();
    parse(&sources).map_err(|problems| {
        let errors = problems.iter().map(|one| FieldError {
            pointer: format!("{}:{}", one.place, one.place.column),
            message: one.message.clone(),
            help: one.expected.clone(),
        });
        Problem {
            errors: errors.collect(),
            ..problem::POSTURE_REFUSED.because("the posture cannot be read as it is; declare a whole one that can")
        }
    })
}

fn there_is_none(section: Section, name: &str) -> Problem {
    problem::NOT_FOUND.because(format!("no posture file declares a {} `{name}`", section.noun()))
}

fn hand_written(section: Section, name: &str, place: &Place) -> Problem {
    let what = section.noun();
    problem::HAND_WRITTEN.because(format!("the {what} `{name}` stands in {}, line {}", place.file, place.line))
}

/// Declares one in a file of its own, which is made or written anew.
pub(super) fn put(
    mut files: Vec<PostureFile>,
    section: Section,
    name: &str,
    value: &Value,
) -> Result<Vec<PostureFile>, Problem> {
    check_name(name).map_err(|error| problem::INVALID.at("name", error.to_string()))?;
    let own = section.file(name);
    if let Some(place) = section.place(&spec(&files)?, name)
        && *place.file != *own
    {
        return Err(hand_written(section, name, &place));
    }
    let text = format!("{:#}\n", json!({ "version": 1, section.key(): { name: value } }));
    match files.iter_mut().find(|file| file.name == own) {
        Some(file) => file.text = text,
        None => files.push(PostureFile { name: own, text }),
    }
    Ok(files)
}

/// Removes one that has a file of its own.
pub(super) fn delete(mut files: Vec<PostureFile>, section: Section, name: &str) -> Result<Vec<PostureFile>, Problem> {
    let place = section.place(&spec(&files)?, name).ok_or_else(|| there_is_none(section, name))?;
    let own = section.file(name);
    if *place.file != *own {
        return Err(hand_written(section, name, &place));
    }
    files.retain(|file| file.name != own);
    Ok(files)
}

/// What becomes of the rules of a group.
pub(super) enum RuleWork {
    Add(Box<RuleSpec>),
    Change(usize, RuleEdit),
    Remove(usize),
}

/// Edits the rules of a group where it stands.
pub(super) fn edit_rule(
    mut files: Vec<PostureFile>,
    group: &str,
    direction: Direction,
    work: &RuleWork,
) -> Result<Vec<PostureFile>, Problem> {
    let section = Section::Groups;
    let place = section.place(&spec(&files)?, group).ok_or_else(|| there_is_none(section, group))?;
    let Some(file) = files.iter_mut().find(|file| *file.name == *place.file) else {
        return Err(there_is_none(section, group));
    };
    let edited = match work {
        RuleWork::Add(rule) => edit::add_rule(&file.text, group, direction, &new_rule(rule)?),
        RuleWork::Change(index, change) => {
            edit::set_rule(&file.text, group, direction, &RuleSelector::Index(*index), &rule_change(change)?)
        }
        RuleWork::Remove(index) => edit::remove_rule(&file.text, group, direction, &RuleSelector::Index(*index)),
    };
    let Edited { text, .. } = edited.map_err(|error| match error {
        EditError::NoSuchRule { .. } | EditError::NoSuch { .. } => problem::NOT_FOUND.because(error.to_string()),
        EditError::Awkward { .. } => problem::HAND_WRITTEN.because(format!("{}: {error}", place.file)),
        other => problem::INVALID.because(other.to_string()),
    })?;
    file.text = text;
    Ok(files)
}

/// A rule as the posture's own value; it says itself what is wrong with it.
fn new_rule(rule: &RuleSpec) -> Result<NewRule, Problem> {
    let value = serde_json::to_value(rule).unwrap_or_default();
    serde_json::from_value(value).map_err(|error| problem::INVALID.because(error.to_string()))
}

fn rule_change(change: &RuleEdit) -> Result<RuleChange, Problem> {
    let ports = match &change.ports {
        None => None,
        // Ports are read as those of a rule that has nothing else to complain about.
        Some(ports) => {
            let value = json!({
                "policy": "accept", "priority": 1, "protocol": "tcp", "ports": ports, "peers": ["any"],
            });
            let rule: NewRule =
                serde_json::from_value(value).map_err(|error| problem::INVALID.at("/ports", error.to_string()))?;
            Some(rule.ports)
        }
    };
    Ok(RuleChange {
        description: change.description.clone(),
        priority: change.priority,
        policy: change.policy.map(policy),
        ports,
    })
}

fn policy(word: PolicyWord) -> Policy {
    match word {
        PolicyWord::Accept => Policy::Accept,
        PolicyWord::Drop => Policy::Drop,
    }
}

fn policy_word(policy: Policy) -> PolicyWord {
    match policy {
        Policy::Accept => PolicyWord::Accept,
        Policy::Drop => PolicyWord::Drop,
    }
}

fn declared<T>(section: Section, name: &str, place: &Place, spec: T) -> Declared<T> {
    let managed = *place.file == *section.file(name);
    Declared { name: name.to_owned(), place: place.to_string(), managed, spec }
}

/// A group as a value of the API.
pub(super) fn group(one: &Group) -> Declared<GroupSpec> {
    let spec = GroupSpec {
        kind: match one.kind {
            GroupType::Basic => GroupTypeWord::Basic,
            GroupType::Advanced => GroupTypeWord::Advanced,
        },
        description: one.description.clone(),
        inner_access: one.inner_access.map(|access| match access {
            InnerAccess::Accept => PolicyWord::Accept,
            InnerAccess::Drop => PolicyWord::Drop,
        }),
        members: one.members.iter().map(|selector| selector.labels.clone()).collect(),
        ingress: one.ingress.iter().map(rule).collect(),
        egress: one.egress.iter().map(rule).collect(),
    };
    declared(Section::Groups, &one.name, &one.place, spec)
}

fn rule(one: &Rule) -> RuleSpec {
    RuleSpec {
        policy: policy_word(one.policy),
        priority: one.priority,
        protocol: one.protocol.to_string(),
        ports: one.ports.iter().map(ToString::to_string).collect(),
        source_ports: one.source_ports.iter().map(ToString::to_string).collect(),
        peers: one.peers.iter().map(|peer| peer.peer.to_string()).collect(),
        local: one.local.map(|local| local.to_string()),
        description: one.description.clone(),
    }
}

/// A group as a posture file has it.
pub(super) fn group_value(spec: &GroupSpec) -> Value {
    let mut value = serde_json::to_value(spec).unwrap_or_default();
    for (direction, peer, local) in [("ingress", "from", "to"), ("egress", "to", "from")] {
        for rule in value[direction].as_array_mut().into_iter().flatten() {
            let Some(rule) = rule.as_object_mut() else { continue };
            if let Some(peers) = rule.remove("peers") {
                rule.insert(peer.into(), peers);
            }
            if let Some(own) = rule.remove("local") {
                rule.insert(local.into(), own);
            }
        }
    }
    value
}

/// A prefix list as a value of the API.
pub(super) fn prefix_list(one: &PrefixList) -> Declared<PrefixListSpec> {
    let spec = PrefixListSpec {
        family: if one.family == Family::Ipv4 { FamilyWord::Ipv4 } else { FamilyWord::Ipv6 },
        max_entries: one.max_entries,
        description: one.description.clone(),
        entries: one.entries.iter().map(|(prefix, _)| prefix.to_string()).collect(),
    };
    declared(Section::PrefixLists, &one.name, &one.place, spec)
}

/// A port list as a value of the API.
pub(super) fn port_list(one: &PortList) -> Declared<PortListSpec> {
    let spec = PortListSpec {
        max_entries: one.max_entries,
        description: one.description.clone(),
        entries: one.entries.iter().map(|(range, _)| range.to_string()).collect(),
    };
    declared(Section::PortLists, &one.name, &one.place, spec)
}

/// An instance as a value of the API.
pub(super) fn instance(one: &Instance) -> Declared<InstanceSpec> {
    let interface = |own: &keepwall_secgroup::spec::Interface| InterfaceSpec {
        device: (own.device != own.name).then(|| own.device.clone()),
        host: own.host.as_ref().map(|host| host.name.clone()),
        addresses: own.addresses.iter().map(ToString::to_string).collect(),
        public: own.public.iter().map(ToString::to_string).collect(),
        mac: own.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")),
        groups: own.groups.iter().map(|group| group.name.clone()).collect(),
    };
    let labels: Labels = (*one.labels).clone();
    let interfaces = one.interfaces.iter().map(|own| (own.name.clone(), interface(own))).collect();
    declared(Section::Instances, &one.name, &one.place, InstanceSpec { labels, interfaces })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const WEB: &str = "\
version: 1
security_groups:
  web: # the front
    members: [{ tier: web }]
    ingress:
      - { policy: accept, protocol: tcp, ports: 443, from: any } # customers
  db:
    ingress:
      - { policy: accept, protocol: tcp, ports: [5432, 8000/8100], from: group:web, to: 10.0.0.0/8, priority: 7 }
prefix_lists:
  office: { family: ipv4, max_entries: 5, entries: [203.0.113.0/24] }
port_lists:
  web: { max_entries: 3, entries: [80, 443] }
instances:
  web-1: { labels: { tier: web }, interfaces: { eth0: { addresses: [10.0.0.1], groups: [web] } } }
";

    fn files() -> Vec<PostureFile> {
        vec![PostureFile { name: "web.yaml".into(), text: WEB.into() }]
    }

    #[test]
    fn what_is_read_and_put_again_in_a_file_of_its_own_means_the_same() {
        let before = spec(&files()).unwrap();
        let mut copy = Vec::new();
        for one in &before.groups {
            copy = put(copy, Section::Groups, &one.name, &group_value(&group(one).spec)).unwrap();
        }
        for one in &before.prefix_lists {
            let value = serde_json::to_value(prefix_list(one).spec).unwrap();
            copy = put(copy, Section::PrefixLists, &one.name, &value).unwrap();
        }
        for one in &before.port_lists {
            copy =
                put(copy, Section::PortLists, &one.name, &serde_json::to_value(port_list(one).spec).unwrap()).unwrap();
        }
        for one in &before.instances {
            copy =
                put(copy, Section::Instances, &one.name, &serde_json::to_value(instance(one).spec).unwrap()).unwrap();
        }
        let after = spec(&copy).unwrap();
        assert_eq!(before.groups.iter().map(|g| group(g).spec).collect::<Vec<_>>(), {
            let mut groups: Vec<_> = after.groups.iter().collect();
            groups.sort_by_key(|g| std::cmp::Reverse(g.name.clone()));
            groups.into_iter().map(|g| group(g).spec).collect::<Vec<_>>()
        });
        assert_eq!(prefix_list(&before.prefix_lists[0]).spec, prefix_list(&after.prefix_lists[0]).spec);
        assert_eq!(port_list(&before.port_lists[0]).spec, port_list(&after.port_lists[0]).spec);
        assert_eq!(instance(&before.instances[0]).spec, instance(&after.instances[0]).spec);
        assert!(group(&after.groups[0]).managed && !group(&before.groups[0]).managed);
    }

    #[test]
    fn what_a_person_wrote_is_neither_replaced_nor_removed() {
        for refused in [
            put(files(), Section::Groups, "web", &json!({})).unwrap_err(),
            delete(files(), Section::PrefixLists, "office").unwrap_err(),
        ] {
            assert_eq!(refused.code, "hand_written");
            assert!(refused.detail.contains("web.yaml, line "), "{}", refused.detail);
        }
        assert_eq!(delete(files(), Section::Groups, "nobody").unwrap_err().code, "not_found");
    }

    #[test]
    fn rules_are_edited_where_they_stand_and_comments_stay() {
        let rule: RuleSpec =
            serde_json::from_value(json!({ "protocol": "tcp", "ports": ["80"], "peers": ["any"] })).unwrap();
        let added = edit_rule(files(), "web", Direction::Ingress, &RuleWork::Add(Box::new(rule))).unwrap();
        assert!(added[0].text.contains("# the front") && added[0].text.contains("# customers"));
        assert_eq!(spec(&added).unwrap().groups[0].ingress.len(), 2);
        let change = RuleEdit { ports: Some(vec!["444".into()]), priority: Some(3), ..RuleEdit::default() };
        let changed = edit_rule(added, "web", Direction::Ingress, &RuleWork::Change(0, change)).unwrap();
        assert_eq!(group(&spec(&changed).unwrap().groups[0]).spec.ingress[0].priority, 3);
        let removed = edit_rule(changed, "web", Direction::Ingress, &RuleWork::Remove(1)).unwrap();
        assert_eq!(spec(&removed).unwrap().groups[0].ingress.len(), 1);
        let missing = edit_rule(removed, "web", Direction::Egress, &RuleWork::Remove(0)).unwrap_err();
        assert_eq!(missing.code, "not_found");
    }

    #[test]
    fn names_of_any_script_have_files_of_their_own() {
        let (a, b) = (Section::Groups.file("数据库"), Section::Groups.file("a_b"));
        assert!(a.is_ascii() && a != b);
        assert_eq!(Section::PrefixLists.file("office"), "api/prefix-lists/office.yaml");
    }
}
