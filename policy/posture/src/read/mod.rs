//! From trees to a spec: one function per kind of mapping, each reading every key it knows.
//!
//! A reader never stops at the first fault. It reports, leaves a value out, and reads on; the spec is only handed
//! out when nothing was reported.

mod expect;
mod fields;
mod groups;
mod instances;
mod lists;
mod settings;

pub(crate) use groups::side_keys;

use std::collections::HashMap;

use keepwall_core::{Place, nearest};
use keepwall_secgroup::spec::{Settings, Spec};

use crate::keys::{self, Keys};
use crate::problem::{Complaint, Problems, quote};
use crate::tree::{Key, Kind, Node, Source, Span, TOP};

/// The only version of the format there is.
const VERSION: &str = "1";

/// Reads one file.
pub(crate) struct Reader<'r, 'a> {
    source: &'r Source<'a>,
    problems: &'r mut Problems,
}

/// What one file declares, and where its settings stand if it has any.
pub(crate) struct Part {
    pub(crate) spec: Spec,
    pub(crate) settings: Option<Span>,
}

/// Reads the tree of one file.
pub(crate) fn read(source: &Source<'_>, root: &Node, problems: &mut Problems) -> Part {
    Reader { source, problems }.posture(root)
}

impl Reader<'_, '_> {
    fn posture(&mut self, root: &Node) -> Part {
        let mut part = Part { spec: Spec::default(), settings: None };
        if !self.keys(root, &keys::POSTURE) {
            return part;
        }
        self.version(root);
        if let Some((key, node)) = given(root, "settings") {
            part.settings = Some(key.span);
            part.spec.settings = self.settings(node);
        }
        part.spec.instances = self.named(root, "instances", |reader, key, node| reader.instance(key, node));
        part.spec.groups = self.named(root, "security_groups", |reader, key, node| reader.group(key, node));
        part.spec.prefix_lists = self.named(root, "prefix_lists", |reader, key, node| reader.prefix_list(key, node));
        part.spec.port_lists = self.named(root, "port_lists", |reader, key, node| reader.port_list(key, node));
        let tests = self.list(root, "tests");
        part.spec.tests = self.each(tests, Self::policy_test);
        part
    }

    fn version(&mut self, root: &Node) {
        let expected = format!("`version: {VERSION}` in each file");
        match root.entry("version") {
            None => self.complain(TOP, Complaint::new("the file names no version").expected(expected)),
            Some((key, node)) => match &node.kind {
                Kind::Scalar { text, .. } if text == VERSION => {}
                Kind::Scalar { text, .. } => {
                    let complaint = Complaint::new(format!("version {} is unknown to this program", quote(text)));
                    self.complain(if node.is_null() { key.span } else { node.span }, complaint.expected(expected));
                }
                _ => self.wrong_shape(node, &expected),
            },
        }
    }

    fn place(&self, span: Span) -> Place {
        self.source.place(span)
    }

    fn complain(&mut self, span: Span, complaint: Complaint) {
        self.problems.add(self.source, span, complaint);
    }

    fn wrong_shape(&mut self, node: &Node, expected: &str) {
        if matches!(node.kind, Kind::Refused) {
            return;
        }
        let found = match &node.kind {
            Kind::Scalar { text, .. } if !node.is_null() => quote(text),
            _ => node.shape().to_owned(),
        };
        self.complain(node.span, Complaint::new(format!("{found} stands here")).expected(expected));
    }

    /// True if the node is a mapping; keys that `keys` does not know are reported.
    fn keys(&mut self, node: &Node, keys: &Keys) -> bool {
        let Kind::Mapping { entries, flow } = &node.kind else {
            self.wrong_shape(node, &format!("{}: a mapping of {}", keys.what, listed(keys.names)));
            return false;
        };
        for (key, value) in entries {
            if keys.names.contains(&key.text.as_str()) {
                continue;
            }
            if self.problems.is_full() {
                break;
            }
            let complaint = Complaint::new(format!("unknown field {} in {}", quote(&key.text), keys.what));
            // `{ ports: 80,443 }` is two keys to YAML.
            let cut_off = *flow && value.is_null() && key.text.starts_with(|c: char| c.is_ascii_digit());
            let complaint = match cut_off {
                true => complaint.expected("a list in brackets when there are several: [80, 443]"),
                false => complaint.expected(listed(keys.names)).suggest(nearest(&key.text, keys.names.iter().copied())),
            };
            self.complain(key.span, complaint);
        }
        true
    }

    /// True if the mapping has a key that was reported: then what seems to be missing may be what was misspelt.
    fn misspelt(&self, node: &Node, keys: &Keys) -> bool {
        node.entries().iter().any(|(key, _)| !keys.names.contains(&key.text.as_str()))
    }

    /// The entries of a section of named things. A section with nothing behind its key is an empty one.
    fn named<T>(
        &mut self,
        root: &Node,
        section: &'static str,
        mut read: impl FnMut(&mut Self, &Key, &Node) -> Option<T>,
    ) -> Vec<T> {
        let Some((_, node)) = given(root, section) else { return Vec::new() };
        if !matches!(node.kind, Kind::Mapping { .. }) {
            self.wrong_shape(node, &format!("names with what they stand for, as in `{section}: {{ web: … }}`"));
        }
        self.each(node.entries(), |reader, (key, value)| read(reader, key, value))
    }

    /// What comes of each item; nothing of the rest once there are as many problems as are reported, for looking
    /// at a million wrong items takes long and tells nobody anything.
    fn each<N, T>(&mut self, items: &[N], mut read: impl FnMut(&mut Self, &N) -> Option<T>) -> Vec<T> {
        let mut out = Vec::new();
        for item in items {
            if self.problems.is_full() {
                break;
            }
            out.extend(read(self, item));
        }
        out
    }

    /// The items of a list; none if the key is missing or has nothing behind it.
    fn list<'n>(&mut self, mapping: &'n Node, key: &str) -> &'n [Node] {
        let Some((_, node)) = given(mapping, key) else { return &[] };
        match &node.kind {
            Kind::Sequence { items, .. } => items,
            Kind::Scalar { text, .. } => {
                let complaint = Complaint::new(format!("`{key}` is a list, and {} is not", quote(text)));
                self.complain(node.span, complaint.expected("a list").suggest(Some(format!("[{text}]"))));
                &[]
            }
            _ => {
                self.wrong_shape(node, &format!("a list: `{key}` begins its items with `- `, or stands in brackets"));
                &[]
            }
        }
    }

    /// The items of a list that may be written without brackets when it has one.
    fn one_or_list<'n>(&mut self, node: &'n Node) -> &'n [Node] {
        match &node.kind {
            Kind::Sequence { items, .. } => items,
            _ => std::slice::from_ref(node),
        }
    }
}

/// The entry of a key that has something behind it.
fn given<'n>(mapping: &'n Node, key: &str) -> Option<(&'n Key, &'n Node)> {
    mapping.entry(key).filter(|(_, node)| !node.is_null())
}

/// `a, b or c`.
fn listed(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => format!("`{one}`"),
        [head @ .., last] => {
            let head: Vec<String> = head.iter().map(|word| format!("`{word}`")).collect();
            format!("{} or `{last}`", head.join(", "))
        }
    }
}

/// Several files as one spec. What stands twice is reported at the second place with the first.
pub(crate) fn merge(parts: Vec<(&Source<'_>, Part)>, problems: &mut Problems) -> Spec {
    let mut merged = Spec::default();
    let mut settings: Option<Place> = None;
    let mut names: HashMap<(&'static str, String), Place> = HashMap::new();
    for (source, part) in parts {
        let Spec { settings: own, instances, groups, prefix_lists, port_lists, tests } = part.spec;
        if let Some(span) = part.settings {
            match &settings {
                None => {
                    settings = Some(source.place(span));
                    merged.settings = own;
                }
                Some(first) => {
                    let message = format!("settings stand in two files; the first are at {first}:{}", first.column);
                    problems.add(source, span, Complaint::new(message).expected("`settings` in one file only"));
                }
            }
        }
        let mut claim = |what: &'static str, name: &str, place: &Place| {
            let Some(first) = names.insert((what, name.to_owned()), place.clone()) else { return };
            // Within one file the tree has refused it already.
            if first.file != place.file {
                let message = format!("the {what} {} exists already, at {first}:{}", quote(name), first.column);
                let span = Span { line: place.line, column: place.column, ..Span::default() };
                problems.add(source, span, Complaint::new(message).expected("each name once over all files"));
            }
        };
        instances.iter().for_each(|one| claim("instance", &one.name, &one.place));
        groups.iter().for_each(|one| claim("security group", &one.name, &one.place));
        prefix_lists.iter().for_each(|one| claim("prefix list", &one.name, &one.place));
        port_lists.iter().for_each(|one| claim("port list", &one.name, &one.place));
        merged.instances.extend(instances);
        merged.groups.extend(groups);
        merged.prefix_lists.extend(prefix_lists);
        merged.port_lists.extend(port_lists);
        merged.tests.extend(tests);
    }
    if settings.is_none() {
        merged.settings = Settings::default();
    }
    merged
}
