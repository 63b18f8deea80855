//! Edits: a text in, a text out, everything that was not meant stays byte for byte.
//!
//! Each edit finds its place by the tree, replaces those bytes, parses the result and compares its spec with the
//! one that was meant. If they differ, or the result does not parse, the edit is refused: a text that is handed
//! out means what was asked for.
//!
//! A comment that has a line of its own survives every edit but one: deleting a group takes what stands between
//! its first and last line. A comment behind a removed rule on the same line goes with the rule.
//!
//! Not judged here: whether names refer to anything, and quotas. That needs all files (`check` in
//! `keepwall-secgroup`).

mod render;
mod splice;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use keepwall_core::{Place, Prefix, check_name, nearest};
use keepwall_secgroup::spec::{
    Direction, Group, GroupType, InnerAccess, Interface, Named, Policy, PortSel, PrefixList, Rule, Selector, Spec,
};

use crate::problem::{Problem, Problems, printable, quote};
use crate::read::side_keys;
use crate::rule::{NewRule, check_text, missing};
use crate::tree::{self, Kind, Node, Source};
use crate::{SourceFile, parse};
use splice::{Awkward, Doc, Patches, Spot, Value};

/// What an edit made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Edited {
    /// The new text; the old one if nothing had to change.
    pub text: String,
    /// False if what was asked for was the case already.
    pub changed: bool,
    /// The line (from 1) of what was added, changed or found; 0 if there is nothing to point at.
    pub line: u32,
}

/// Why an edit was refused. The text is as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EditError {
    /// The text was not a valid posture before the edit.
    NotValid(Vec<Problem>),
    /// It would not be one afterwards.
    WouldNotBeValid(Vec<Problem>),
    /// Nothing has that name in this text.
    NoSuch {
        /// `security group`, `instance`, …
        what: &'static str,
        /// The name.
        name: String,
        /// A name that exists and looks alike.
        suggestion: Option<String>,
    },
    /// Something has that name already.
    Exists {
        /// `security group`, …
        what: &'static str,
        /// The name.
        name: String,
        /// Its line.
        line: u32,
    },
    /// The group has no rule there (`InvalidParam.SecurityGroupRuleId`).
    NoSuchRule {
        /// The group.
        group: String,
        /// The direction.
        direction: Direction,
        /// How the rule was pointed at: `index 7`, `line 12`, `this tuple`.
        which: String,
    },
    /// What should be written is wrong in itself; each sentence names one fault.
    Invalid(Vec<String>),
    /// The text is written in a way that this edit cannot change safely; change it by hand.
    Awkward {
        /// What could not be changed.
        what: String,
    },
}

impl fmt::Display for EditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problems = |f: &mut fmt::Formatter<'_>, intro: &str, all: &[Problem]| {
            f.write_str(intro)?;
            all.iter().try_for_each(|problem| write!(f, "\n{problem}"))
        };
        match self {
            EditError::NotValid(all) => problems(f, "nothing was changed: the posture has problems already", all),
            EditError::WouldNotBeValid(all) => problems(f, "nothing was changed: the result would not be valid", all),
            EditError::NoSuch { what, name, suggestion } => {
                write!(f, "there is no {what} {} in this file", printable(&quote(name)))?;
                suggestion.as_ref().map_or(Ok(()), |word| write!(f, "; did you mean `{word}`?"))
            }
            EditError::Exists { what, name, line } => {
                write!(f, "the {what} {} exists already, on line {line}", printable(&quote(name)))
            }
            EditError::NoSuchRule { group, direction, which } => {
                write!(f, "the group {} has no {direction} rule at {which}", printable(&quote(group)))
            }
            EditError::Invalid(all) => f.write_str(&all.join("; ")),
            EditError::Awkward { what } => {
                write!(
                    f,
                    "nothing was changed: {what} is written in a way that cannot be edited safely; edit it by hand"
                )
            }
        }
    }
}

impl std::error::Error for EditError {}

/// Which rule of a group and direction is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleSelector {
    /// Whatever decides about the same packets in the same way, wherever it stands; descriptions do not count.
    /// One that matches nothing is no error (semantics §1.7).
    Tuple(NewRule),
    /// The rule that was written on this line, from 1. No rule there is an error.
    Line(u32),
    /// The rule with this index in file order, from 0, as in `web/ingress#0`. No such rule is an error.
    Index(usize),
}

/// What becomes of a rule. `None` leaves a field as it is. The peer and the protocol cannot change (semantics
/// §1.7): remove the rule and add another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleChange {
    /// A new description, 1-512 characters.
    pub description: Option<String>,
    /// A new priority, 1-100.
    pub priority: Option<u8>,
    /// Accept or drop.
    pub policy: Option<Policy>,
    /// New ports.
    pub ports: Option<Vec<PortSel>>,
}

/// A group to add.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewGroup {
    /// Its name, new in the posture.
    pub name: String,
    /// 2-256 characters, or empty.
    pub description: String,
    /// Basic or advanced.
    pub kind: GroupType,
    /// Basic groups only.
    pub inner_access: Option<InnerAccess>,
    /// Label selectors; none of them empty.
    pub members: Vec<BTreeMap<String, String>>,
    /// Inbound rules.
    pub ingress: Vec<NewRule>,
    /// Outbound rules.
    pub egress: Vec<NewRule>,
}

/// Adds a rule to a group. What the group has already, combination by combination, is not added again; if that is
/// all of it, the text stays as it is and `line` is where the rule stands (semantics §1.7).
///
/// # Errors
/// The rule is none, the group is not in this text, or the text cannot be edited.
pub fn add_rule(text: &str, group: &str, direction: Direction, rule: &NewRule) -> Result<Edited, EditError> {
    add_rules(text, group, &[(direction, rule.clone())])
}

/// Adds those of several rules that the group does not have; what it has is never touched (additive import).
///
/// # Errors
/// As [`add_rule`]; nothing is added if one rule is wrong.
pub fn add_rules(text: &str, group: &str, rules: &[(Direction, NewRule)]) -> Result<Edited, EditError> {
    check_rules(rules.iter().map(|(_, rule)| rule))?;
    let edit = Edit::new(text)?;
    let mut present = edit.group(group)?.clone();
    let mut new: Vec<(Direction, NewRule)> = Vec::new();
    for (direction, rule) in rules {
        let old: Vec<NewRule> = present.rules(*direction).iter().map(NewRule::of).collect();
        for part in missing(rule, &old) {
            rules_mut(&mut present, *direction).push(part.at(&Place::default()));
            new.push((*direction, part));
        }
    }
    if new.is_empty() {
        let line = rules.first().map_or(0, |(direction, rule)| line_of_same(edit.group(group).ok(), *direction, rule));
        return Ok(edit.unchanged(line));
    }
    let mut expected = edit.spec.clone();
    *group_mut(&mut expected, group)? = present;
    let text = edit.push_rules(edit.text.to_owned(), group, &new)?;
    let first = new.first().map(|(direction, _)| *direction).unwrap_or(Direction::Ingress);
    let index = edit.group(group)?.rules(first).len();
    edit.finish(text, &expected, |spec| rule_line(spec, group, first, index))
}

/// Takes rules away. A tuple takes away each of its combinations wherever it stands: a rule for ports 80 and 443
/// without 80 becomes a rule for 443.
///
/// # Errors
/// No rule at that line or index, no such group, or the text cannot be edited. A tuple that matches nothing is
/// success.
pub fn remove_rule(text: &str, group: &str, direction: Direction, rule: &RuleSelector) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    let rules: Vec<NewRule> = edit.group(group)?.rules(direction).iter().map(NewRule::of).collect();
    let left: Vec<Option<Vec<NewRule>>> = match rule {
        RuleSelector::Tuple(tuple) => rules.iter().map(|own| own.without(tuple)).collect(),
        at => {
            let index = edit.rule_index(group, direction, at)?;
            (0..rules.len()).map(|own| (own == index).then(Vec::new)).collect()
        }
    };
    if left.iter().all(Option::is_none) {
        return Ok(edit.unchanged(0));
    }
    let mut kept = Vec::new();
    let mut split = Vec::new();
    let mut gone = BTreeSet::new();
    let mut changes = Vec::new();
    for (index, (own, left)) in rules.iter().zip(left).enumerate() {
        match left.as_deref() {
            None => kept.push(own.clone()),
            Some([]) => drop(gone.insert(index)),
            Some([first, rest @ ..]) => {
                changes.push((index, first.clone()));
                kept.push(first.clone());
                split.extend(rest.iter().map(|rule| (direction, rule.clone())));
            }
        }
    }
    kept.extend(split.iter().map(|(_, rule)| rule.clone()));
    let mut expected = edit.spec.clone();
    *rules_mut(group_mut(&mut expected, group)?, direction) =
        kept.iter().map(|rule| rule.at(&Place::default())).collect();
    let text = edit.narrow(group, direction, &rules, &changes)?;
    let text = edit.drop_rules(text, group, direction, &gone)?;
    let text = edit.push_rules(text, group, &split)?;
    let line = changes.first().map(|(index, _)| *index);
    edit.finish(text, &expected, |spec| line.map_or(0, |index| rule_line(spec, group, direction, index)))
}

/// Changes description, priority, policy or ports of one written rule.
///
/// # Errors
/// No rule is there, the result is no rule, or the text cannot be edited.
pub fn set_rule(
    text: &str,
    group: &str,
    direction: Direction,
    rule: &RuleSelector,
    change: &RuleChange,
) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    let index = edit.rule_index(group, direction, rule)?;
    let written = &edit.group(group)?.rules(direction)[index];
    let line = written.place.line;
    let old = NewRule::of(written);
    let new = NewRule {
        description: change.description.clone().unwrap_or_else(|| old.description.clone()),
        priority: change.priority.unwrap_or(old.priority),
        policy: change.policy.unwrap_or(old.policy),
        ports: change.ports.clone().unwrap_or_else(|| old.ports.clone()),
        ..old.clone()
    };
    if change.description.as_ref().is_some_and(String::is_empty) {
        return Err(EditError::Invalid(vec!["a rule's description has 1 to 512 characters".to_owned()]));
    }
    check_rules([&new])?;
    let mut fields = Vec::new();
    if new.policy != old.policy {
        fields.push(("policy", render::policy(new.policy).to_owned()));
    }
    if new.ports != old.ports {
        fields.push(("ports", render::ports(&new.ports)));
    }
    if new.priority != old.priority {
        fields.push(("priority", new.priority.to_string()));
    }
    if new.description != old.description {
        fields.push(("description", render::scalar(&new.description)));
    }
    if fields.is_empty() {
        return Ok(edit.unchanged(line));
    }
    let mut expected = edit.spec.clone();
    rules_mut(group_mut(&mut expected, group)?, direction)[index] = new.at(&Place::default());
    let mut text = edit.text.to_owned();
    for (key, value) in fields {
        text = edit.patch(text, "the rule", |doc| {
            let item = rule_node(doc, group, direction, index).ok_or(Awkward)?;
            doc.set(item, key, &value)
        })?;
    }
    edit.finish(text, &expected, |spec| rule_line(spec, group, direction, index))
}

/// Adds a group at the end of `security_groups`.
///
/// # Errors
/// A group has that name, something in it is wrong, or the text cannot be edited.
pub fn add_group(text: &str, group: &NewGroup) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    check_rules(group.ingress.iter().chain(&group.egress))?;
    if let Err(error) = check_name(&group.name) {
        return Err(EditError::Invalid(vec![error.to_string()]));
    }
    if !group.description.is_empty() {
        check_text("a group's description", &group.description, 2, 256)
            .map_err(|complaint| EditError::Invalid(vec![complaint.sentence()]))?;
    }
    if let Some(present) = edit.spec.groups.iter().find(|own| own.name == group.name) {
        let line = present.place.line;
        return Err(EditError::Exists { what: "security group", name: group.name.clone(), line });
    }
    let nowhere = Place::default();
    let at = |rules: &[NewRule]| rules.iter().map(|rule| rule.at(&nowhere)).collect::<Vec<Rule>>();
    let mut expected = edit.spec.clone();
    expected.groups.push(Group {
        name: group.name.clone(),
        place: nowhere.clone(),
        description: group.description.clone(),
        kind: group.kind,
        inner_access: group.inner_access,
        members: group
            .members
            .iter()
            .map(|labels| Selector { labels: labels.clone(), place: nowhere.clone() })
            .collect(),
        ingress: at(&group.ingress),
        egress: at(&group.egress),
    });
    let value = render::group(group);
    let text = edit.patch(edit.text.to_owned(), "`security_groups`", |doc| match doc.walk(&["security_groups"]) {
        Some(groups) => doc.add_entry(groups, &render::scalar(&group.name), &value, false),
        None => {
            let root = Spot { key: None, node: &doc.root, in_flow: false };
            let entry = format!("{}:", render::scalar(&group.name));
            let block = std::iter::once(entry).chain(value.block.iter().map(|line| format!("  {line}"))).collect();
            let flow = format!("{{ {}: {} }}", render::scalar(&group.name), value.flow);
            doc.add_entry(root, "security_groups", &Value { flow, block }, false)
        }
    })?;
    edit.finish(text, &expected, |spec| spec.groups.last().map_or(0, |group| group.place.line))
}

/// A new group with another one's type and rules. Members stay where they are: no interface changes its groups
/// because a rule set was copied.
///
/// # Errors
/// As [`add_group`]; or there is no group to copy.
pub fn clone_group(text: &str, group: &str, new_name: &str) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    let old = edit.group(group)?;
    let rules = |direction| old.rules(direction).iter().map(NewRule::of).collect();
    add_group(
        text,
        &NewGroup {
            name: new_name.to_owned(),
            description: old.description.clone(),
            kind: old.kind,
            inner_access: old.inner_access,
            members: Vec::new(),
            ingress: rules(Direction::Ingress),
            egress: rules(Direction::Egress),
        },
    )
}

/// Takes a group away, with the comments inside it. Whether something still names it is for the caller to ask
/// first (`DependencyViolation`).
///
/// # Errors
/// No such group, or the text cannot be edited.
pub fn delete_group(text: &str, group: &str) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    edit.group(group)?;
    let mut expected = edit.spec.clone();
    expected.groups.retain(|own| own.name != group);
    let text = edit.patch(edit.text.to_owned(), "the group", |doc| {
        doc.remove_entry(doc.walk(&["security_groups"]).ok_or(Awkward)?, group)
    })?;
    edit.finish(text, &expected, |_| 0)
}

/// Sets whether members of a basic group may talk to each other.
///
/// # Errors
/// The group is advanced, is not there, or the text cannot be edited.
pub fn set_inner_access(text: &str, group: &str, access: InnerAccess) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    let old = edit.group(group)?;
    if old.kind == GroupType::Advanced {
        return Err(EditError::Invalid(vec!["an advanced group is always isolated".to_owned()]));
    }
    if old.inner_access() == access {
        return Ok(edit.unchanged(old.place.line));
    }
    let mut expected = edit.spec.clone();
    group_mut(&mut expected, group)?.inner_access = Some(access);
    let text = edit.patch(edit.text.to_owned(), "the group", |doc| {
        doc.set(doc.walk(&["security_groups", group]).ok_or(Awkward)?, "inner_access", render::inner_access(access))
    })?;
    edit.finish(text, &expected, |spec| {
        spec.groups.iter().find(|own| own.name == group).map_or(0, |own| own.place.line)
    })
}

/// Writes a group's name into an interface's `groups`. Already there is success.
///
/// # Errors
/// No such instance or interface, or the text cannot be edited.
pub fn join(text: &str, instance: &str, interface: &str, group: &str) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    let (place, present) = edit.membership(instance, interface, group)?;
    if present.is_some() {
        return Ok(edit.unchanged(place.line));
    }
    let mut expected = edit.spec.clone();
    let named = Named { name: group.to_owned(), place: Place::default() };
    interface_mut(&mut expected, instance, interface)?.groups.push(named);
    let text = edit.patch(edit.text.to_owned(), "the interface", |doc| {
        let spot = doc.walk(&["instances", instance, "interfaces", interface]).ok_or(Awkward)?;
        doc.push(spot, "groups", &[Value::flow(render::scalar(group))])
    })?;
    edit.finish(text, &expected, |_| place.line)
}

/// Takes a group's name out of an interface's `groups`. Not there is success. That an interface is left in at
/// least one group is for the caller to see to, who knows the label selectors.
///
/// # Errors
/// No such instance or interface, or the text cannot be edited.
pub fn leave(text: &str, instance: &str, interface: &str, group: &str) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    let (place, present) = edit.membership(instance, interface, group)?;
    let Some(index) = present else { return Ok(edit.unchanged(place.line)) };
    let mut expected = edit.spec.clone();
    interface_mut(&mut expected, instance, interface)?.groups.remove(index);
    let text = edit.patch(edit.text.to_owned(), "the interface", |doc| {
        let spot = doc.walk(&["instances", instance, "interfaces", interface, "groups"]).ok_or(Awkward)?;
        doc.remove_items(spot, &BTreeSet::from([index]))
    })?;
    edit.finish(text, &expected, |_| place.line)
}

/// Adds an entry to a prefix list. Already there is success.
///
/// # Errors
/// No such list, another family, no room for one more, or the text cannot be edited.
pub fn add_prefix(text: &str, list: &str, prefix: Prefix) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    if let Some((_, place)) = edit.prefix_list(list)?.entries.iter().find(|(own, _)| *own == prefix) {
        return Ok(edit.unchanged(place.line));
    }
    let mut expected = edit.spec.clone();
    list_mut(&mut expected, list)?.entries.push((prefix, Place::default()));
    let text = edit.patch(edit.text.to_owned(), "the prefix list", |doc| {
        let spot = doc.walk(&["prefix_lists", list]).ok_or(Awkward)?;
        doc.push(spot, "entries", &[Value::flow(render::prefix(&prefix))])
    })?;
    edit.finish(text, &expected, |spec| {
        let list = spec.prefix_lists.iter().find(|own| own.name == list);
        list.and_then(|own| own.entries.last()).map_or(0, |(_, place)| place.line)
    })
}

/// Takes an entry out of a prefix list. Not there is success.
///
/// # Errors
/// No such list, or the text cannot be edited.
pub fn remove_prefix(text: &str, list: &str, prefix: Prefix) -> Result<Edited, EditError> {
    let edit = Edit::new(text)?;
    let Some(index) = edit.prefix_list(list)?.entries.iter().position(|(own, _)| *own == prefix) else {
        return Ok(edit.unchanged(0));
    };
    let mut expected = edit.spec.clone();
    list_mut(&mut expected, list)?.entries.remove(index);
    let text = edit.patch(edit.text.to_owned(), "the prefix list", |doc| {
        doc.remove_items(doc.walk(&["prefix_lists", list, "entries"]).ok_or(Awkward)?, &BTreeSet::from([index]))
    })?;
    edit.finish(text, &expected, |_| 0)
}

/// Makes a group's rules exactly these (restore, full import). Rules that are among them already stay as and where
/// they were written.
///
/// # Errors
/// A rule is none, there is no such group, or the text cannot be edited.
pub fn replace_rules(text: &str, group: &str, ingress: &[NewRule], egress: &[NewRule]) -> Result<Edited, EditError> {
    check_rules(ingress.iter().chain(egress))?;
    let edit = Edit::new(text)?;
    let mut expected = edit.spec.clone();
    let mut new_text = edit.text.to_owned();
    let mut new = Vec::new();
    for (direction, wanted) in [(Direction::Ingress, ingress), (Direction::Egress, egress)] {
        let mut wanted: Vec<NewRule> = wanted.to_vec();
        let mut gone = BTreeSet::new();
        let mut kept = Vec::new();
        for (index, rule) in edit.group(group)?.rules(direction).iter().enumerate() {
            let own = NewRule::of(rule);
            match wanted.iter().position(|rule| *rule == own) {
                Some(found) => {
                    wanted.remove(found);
                    kept.push(own);
                }
                None => drop(gone.insert(index)),
            }
        }
        kept.extend(wanted.iter().cloned());
        *rules_mut(group_mut(&mut expected, group)?, direction) =
            kept.iter().map(|rule| rule.at(&Place::default())).collect();
        new_text = edit.drop_rules(new_text, group, direction, &gone)?;
        new.extend(wanted.into_iter().map(|rule| (direction, rule)));
    }
    let line = edit.group(group)?.place.line;
    new_text = edit.push_rules(new_text, group, &new)?;
    if new_text == edit.text {
        return Ok(edit.unchanged(line));
    }
    edit.finish(new_text, &expected, |_| line)
}

/// A text that is being edited.
struct Edit<'t> {
    text: &'t str,
    spec: Spec,
}

fn spec_of(text: &str) -> Result<Spec, Vec<Problem>> {
    parse(&[SourceFile::new("posture", text)])
}

/// The tree of a text that was parsed before.
fn doc(text: &str) -> Option<Doc<'_>> {
    let name: Arc<str> = "posture".into();
    let root = tree::build(&Source::new(&name, text), &mut 0, &mut Problems::default())?;
    let scalars = tree::scalars(&root);
    Some(Doc { text, root, scalars })
}

impl<'t> Edit<'t> {
    fn new(text: &'t str) -> Result<Edit<'t>, EditError> {
        let spec = spec_of(text).map_err(EditError::NotValid)?;
        Ok(Edit { text, spec })
    }

    fn unchanged(&self, line: u32) -> Edited {
        Edited { text: self.text.to_owned(), changed: false, line }
    }

    /// The text after one step, which need not be valid yet.
    fn patch(&self, text: String, what: &str, step: impl FnOnce(&Doc<'_>) -> Patches) -> Result<String, EditError> {
        let awkward = || EditError::Awkward { what: what.to_owned() };
        let patches = step(&doc(&text).ok_or_else(awkward)?).map_err(|Awkward| awkward())?;
        splice::apply(&text, patches).ok_or_else(awkward)
    }

    /// Hands the text out if it means what was meant.
    fn finish(&self, text: String, expected: &Spec, line: impl FnOnce(&Spec) -> u32) -> Result<Edited, EditError> {
        let spec = spec_of(&text).map_err(EditError::WouldNotBeValid)?;
        if bare(spec.clone()) != bare(expected.clone()) {
            return Err(EditError::Awkward { what: "what surrounds it".to_owned() });
        }
        let line = line(&spec);
        Ok(Edited { text, changed: true, line })
    }

    fn group(&self, name: &str) -> Result<&Group, EditError> {
        let names = self.spec.groups.iter().map(|own| own.name.as_str());
        self.spec.groups.iter().find(|own| own.name == name).ok_or_else(|| no_such("security group", name, names))
    }

    fn prefix_list(&self, name: &str) -> Result<&PrefixList, EditError> {
        let names = self.spec.prefix_lists.iter().map(|own| own.name.as_str());
        self.spec.prefix_lists.iter().find(|own| own.name == name).ok_or_else(|| no_such("prefix list", name, names))
    }

    /// Where an interface stands, and which of its groups is this one.
    fn membership(&self, instance: &str, interface: &str, group: &str) -> Result<(Place, Option<usize>), EditError> {
        if let Err(error) = check_name(group) {
            return Err(EditError::Invalid(vec![error.to_string()]));
        }
        let names = self.spec.instances.iter().map(|own| own.name.as_str());
        let own = self.spec.instances.iter().find(|own| own.name == instance);
        let own = own.ok_or_else(|| no_such("instance", instance, names))?;
        let names = own.interfaces.iter().map(|own| own.name.as_str());
        let own = own.interfaces.iter().find(|own| own.name == interface);
        let own = own.ok_or_else(|| no_such("interface", interface, names))?;
        Ok((own.place.clone(), own.groups.iter().position(|own| own.name == group)))
    }

    fn rule_index(&self, group: &str, direction: Direction, rule: &RuleSelector) -> Result<usize, EditError> {
        let rules = self.group(group)?.rules(direction);
        let (found, which) = match rule {
            RuleSelector::Index(index) => (rules.get(*index).map(|_| *index), format!("index {index}")),
            RuleSelector::Line(line) => {
                // A rule over several lines is named by any of them.
                let doc = doc(self.text);
                let covers = |index: usize| {
                    let node = doc.as_ref().and_then(|doc| Some((doc, rule_node(doc, group, direction, index)?.node)));
                    let lines = node.map_or(0, |(doc, node)| newlines(&doc.text[node.span.start..node.span.end]));
                    let first = rules[index].place.line;
                    (first..=first.saturating_add(lines)).contains(line)
                };
                ((0..rules.len()).find(|index| covers(*index)), format!("line {line}"))
            }
            RuleSelector::Tuple(tuple) => {
                let same = |own: &Rule| {
                    let own = NewRule::of(own);
                    own.without(tuple).is_some_and(|left| left.is_empty())
                        && tuple.without(&own).is_some_and(|left| left.is_empty())
                };
                (rules.iter().position(same), "this tuple".to_owned())
            }
        };
        found.ok_or_else(|| EditError::NoSuchRule { group: group.to_owned(), direction, which })
    }

    /// Rules at the end of their lists, written as the last one there is written.
    fn push_rules(&self, mut text: String, group: &str, rules: &[(Direction, NewRule)]) -> Result<String, EditError> {
        for direction in Direction::BOTH {
            let new: Vec<&NewRule> = rules.iter().filter(|(own, _)| *own == direction).map(|(_, rule)| rule).collect();
            if new.is_empty() {
                continue;
            }
            text = self.patch(text, "the group", |doc| {
                let key = direction.to_string();
                let spot = doc.walk(&["security_groups", group]).ok_or(Awkward)?;
                let last = spot.node.entry(&key).and_then(|(_, list)| list.items().last());
                let by_lines = last.is_some_and(|item| matches!(item.kind, Kind::Mapping { flow: false, .. }));
                let items: Vec<Value> = new.iter().map(|rule| render::rule(rule, direction, by_lines)).collect();
                doc.push(spot, &key, &items)
            })?;
        }
        Ok(text)
    }

    fn drop_rules(
        &self,
        text: String,
        group: &str,
        direction: Direction,
        which: &BTreeSet<usize>,
    ) -> Result<String, EditError> {
        if which.is_empty() {
            return Ok(text);
        }
        self.patch(text, "the group", |doc| {
            let list = doc.walk(&["security_groups", group, &direction.to_string()]).ok_or(Awkward)?;
            doc.remove_items(list, which)
        })
    }

    /// The text with fewer ports or peers in some rules.
    fn narrow(
        &self,
        group: &str,
        direction: Direction,
        old: &[NewRule],
        changes: &[(usize, NewRule)],
    ) -> Result<String, EditError> {
        let (peer_key, _) = side_keys(direction);
        let mut text = self.text.to_owned();
        for (index, new) in changes {
            let mut fields = Vec::new();
            if new.ports != old[*index].ports {
                fields.push(("ports", render::ports(&new.ports)));
            }
            if new.source_ports != old[*index].source_ports {
                fields.push(("source_ports", render::source_ports(&new.source_ports)));
            }
            if new.peers != old[*index].peers {
                fields.push((peer_key, render::peers(&new.peers)));
            }
            for (key, value) in fields {
                text = self.patch(text, "the rule", |doc| {
                    let item = rule_node(doc, group, direction, *index).ok_or(Awkward)?;
                    doc.set(item, key, &value)
                })?;
            }
        }
        Ok(text)
    }
}

fn no_such<'a>(what: &'static str, name: &str, names: impl Iterator<Item = &'a str>) -> EditError {
    EditError::NoSuch { what, name: name.to_owned(), suggestion: nearest(name, names).map(str::to_owned) }
}

fn check_rules<'a>(rules: impl IntoIterator<Item = &'a NewRule>) -> Result<(), EditError> {
    let complaints: Vec<String> = rules.into_iter().flat_map(NewRule::complaints).collect();
    if complaints.is_empty() { Ok(()) } else { Err(EditError::Invalid(complaints)) }
}

fn rule_node<'d>(doc: &'d Doc<'_>, group: &str, direction: Direction, index: usize) -> Option<Spot<'d>> {
    let list = doc.walk(&["security_groups", group, &direction.to_string()])?;
    let node: &Node = list.node.items().get(index)?;
    Some(Spot { key: None, node, in_flow: false })
}

fn rule_line(spec: &Spec, group: &str, direction: Direction, index: usize) -> u32 {
    let group = spec.groups.iter().find(|own| own.name == group);
    group.and_then(|own| own.rules(direction).get(index)).map_or(0, |rule| rule.place.line)
}

/// The line of the first rule that has something in common with `rule`.
fn line_of_same(group: Option<&Group>, direction: Direction, rule: &NewRule) -> u32 {
    let rules = group.map_or(&[][..], |group| group.rules(direction));
    rules.iter().find(|own| rule.without(&NewRule::of(own)).is_some()).map_or(0, |own| own.place.line)
}

fn newlines(text: &str) -> u32 {
    u32::try_from(text.matches('\n').count()).unwrap_or(u32::MAX)
}

fn rules_mut(group: &mut Group, direction: Direction) -> &mut Vec<Rule> {
    match direction {
        Direction::Ingress => &mut group.ingress,
        Direction::Egress => &mut group.egress,
    }
}

fn group_mut<'s>(spec: &'s mut Spec, name: &str) -> Result<&'s mut Group, EditError> {
    spec.groups.iter_mut().find(|own| own.name == name).ok_or_else(|| no_such("security group", name, [].into_iter()))
}

fn list_mut<'s>(spec: &'s mut Spec, name: &str) -> Result<&'s mut PrefixList, EditError> {
    spec.prefix_lists
        .iter_mut()
        .find(|own| own.name == name)
        .ok_or_else(|| no_such("prefix list", name, [].into_iter()))
}

fn interface_mut<'s>(spec: &'s mut Spec, instance: &str, name: &str) -> Result<&'s mut Interface, EditError> {
    spec.instances
        .iter_mut()
        .find(|own| own.name == instance)
        .and_then(|own| own.interfaces.iter_mut().find(|own| own.name == name))
        .ok_or_else(|| no_such("interface", name, [].into_iter()))
}

/// A spec without places, to compare what two texts mean.
fn bare(mut spec: Spec) -> Spec {
    let clear = |place: &mut Place| *place = Place::default();
    for instance in &mut spec.instances {
        clear(&mut instance.place);
        for interface in &mut instance.interfaces {
            clear(&mut interface.place);
            interface.host.iter_mut().chain(&mut interface.groups).for_each(|named| clear(&mut named.place));
        }
    }
    for group in &mut spec.groups {
        clear(&mut group.place);
        group.members.iter_mut().for_each(|selector| clear(&mut selector.place));
        for rule in group.ingress.iter_mut().chain(&mut group.egress) {
            clear(&mut rule.place);
            rule.peers.iter_mut().for_each(|peer| clear(&mut peer.place));
        }
    }
    for list in &mut spec.prefix_lists {
        clear(&mut list.place);
        list.entries.iter_mut().for_each(|(_, place)| clear(place));
    }
    for list in &mut spec.port_lists {
        clear(&mut list.place);
        list.entries.iter_mut().for_each(|(_, place)| clear(place));
    }
    spec.tests.iter_mut().for_each(|test| clear(&mut test.place));
    spec
}

/// A few edits of whatever the fuzzer found to be a posture.
pub(crate) fn fuzz_edits(text: &str, spec: &Spec) {
    for group in spec.groups.iter().take(2) {
        let rule = NewRule::accept(keepwall_core::Protocol::All, Vec::new(), keepwall_secgroup::spec::Peer::Any);
        for direction in Direction::BOTH {
            drop(add_rule(text, &group.name, direction, &rule));
            drop(remove_rule(text, &group.name, direction, &RuleSelector::Index(0)));
            let change = RuleChange { priority: Some(7), ..RuleChange::default() };
            drop(set_rule(text, &group.name, direction, &RuleSelector::Index(0), &change));
        }
        drop(set_inner_access(text, &group.name, InnerAccess::Drop));
        drop(delete_group(text, &group.name));
        drop(clone_group(text, &group.name, "clone-of-it"));
        drop(replace_rules(text, &group.name, &[rule], &[]));
    }
    for instance in spec.instances.iter().take(1) {
        for interface in instance.interfaces.iter().take(1) {
            drop(join(text, &instance.name, &interface.name, "web"));
            interface
                .groups
                .iter()
                .take(1)
                .for_each(|group| drop(leave(text, &instance.name, &interface.name, &group.name)));
        }
    }
}
