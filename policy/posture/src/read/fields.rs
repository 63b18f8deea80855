//! Single values: numbers, words, names, texts, addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use keepwall_core::{Place, Prefix, check_name, nearest};
use keepwall_secgroup::spec::Named;

use super::{Reader, given, listed};
use crate::problem::{Complaint, quote};
use crate::rule::{check_text, parse_prefix};
use crate::tree::{Key, Kind, Node, Span};

/// Words with a meaning of their own in `expect:` lines.
const RESERVED: [&str; 1] = ["internet"];

impl Reader<'_, '_> {
    /// The text of a scalar, quoted or not; nothing behind the key is reported.
    pub(super) fn text<'n>(&mut self, node: &'n Node, expected: &str) -> Option<&'n str> {
        match &node.kind {
            Kind::Scalar { text, .. } if !node.is_null() => Some(text),
            _ => {
                self.wrong_shape(node, expected);
                None
            }
        }
    }

    /// A number in `min..=max`; `default` if the key is missing or the number is reported.
    pub(super) fn number(&mut self, mapping: &Node, key: &str, min: u32, max: u32, default: u32) -> u32 {
        let Some((_, node)) = mapping.entry(key) else { return default };
        let expected = format!("a number from {min} to {max}");
        let Some(text) = self.text(node, &expected) else { return default };
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !matches!(node.kind, Kind::Scalar { plain: true, .. }) && digits {
            let complaint = Complaint::new(format!("`{key}` is a number, and {} is a text", quote(text)));
            self.complain(node.span, complaint.expected("a number without quotes").suggest(Some(text)));
            return default;
        }
        match text.parse::<u32>().ok().filter(|number| digits && (min..=max).contains(number)) {
            Some(number) => number,
            None => {
                self.complain(node.span, Complaint::new(format!("{} is no `{key}`", quote(text))).expected(expected));
                default
            }
        }
    }

    /// One of a few words; `None` if the key is missing or the word is reported.
    pub(super) fn word<T: Copy>(&mut self, mapping: &Node, key: &str, words: &[(&str, T)]) -> Option<T> {
        let (_, node) = mapping.entry(key)?;
        let names: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
        let text = self.text(node, &listed(&names))?;
        let found = words.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if found.is_none() {
            let complaint = Complaint::new(format!("{} is no `{key}`", quote(text))).expected(listed(&names));
            self.complain(node.span, complaint.suggest(nearest(text, names)));
        }
        found
    }

    /// `true` or `false`.
    pub(super) fn switch(&mut self, mapping: &Node, key: &str, default: bool) -> bool {
        let Some((_, node)) = mapping.entry(key) else { return default };
        let Some(text) = self.text(node, "true or false") else { return default };
        match text {
            "true" => true,
            "false" => false,
            other => {
                let meant = match other.to_ascii_lowercase().as_str() {
                    "yes" | "on" | "true" | "1" => Some("true"),
                    "no" | "off" | "false" | "0" => Some("false"),
                    _ => None,
                };
                let complaint = Complaint::new(format!("{} is no `{key}`", quote(other))).expected("true or false");
                self.complain(node.span, complaint.suggest(meant));
                default
            }
        }
    }

    /// A text of `min..=max` characters; empty if the key is missing or the text is reported.
    pub(super) fn description(&mut self, mapping: &Node, min: usize, max: usize) -> String {
        let Some((_, node)) = mapping.entry("description") else { return String::new() };
        let expected = format!("a text of {min} to {max} characters");
        let Some(text) = self.text(node, &expected) else { return String::new() };
        // A folded text ends with the line end of its last line.
        let text = text.trim_end_matches('\n');
        match check_text("the description", text, min, max) {
            Ok(()) => text.to_owned(),
            Err(complaint) => {
                self.complain(node.span, complaint.expected(expected));
                String::new()
            }
        }
    }

    /// Reports a name that is none.
    pub(super) fn check_name(&mut self, name: &str, span: Span) {
        if let Err(error) = check_name(name) {
            self.complain(span, Complaint::new(format!("{} is no name: {error}", quote(name))));
        } else if RESERVED.contains(&name) {
            let message = format!("the name {} is taken: `expect:` lines mean the Internet by it", quote(name));
            self.complain(span, Complaint::new(message));
        }
    }

    /// The name that a key declares.
    pub(super) fn declared(&mut self, key: &Key) -> String {
        self.check_name(&key.text, key.span);
        key.text.clone()
    }

    /// A name that refers to something.
    pub(super) fn reference(&mut self, node: &Node, what: &str) -> Option<Named> {
        let name = self.text(node, &format!("the name of {what}"))?.to_owned();
        self.check_name(&name, node.span);
        Some(Named { name, place: self.place(node.span) })
    }

    /// A list of names of one kind, each once.
    pub(super) fn references(&mut self, mapping: &Node, key: &str, what: &str) -> Vec<Named> {
        let mut seen: BTreeMap<String, Place> = BTreeMap::new();
        let items = self.list(mapping, key);
        self.each(items, |reader, node| {
            let named = reader.reference(node, what)?;
            if let Some(first) = seen.insert(named.name.clone(), named.place.clone()) {
                let place = format!("{first}:{}", first.column);
                let message = format!("{} stands in the list twice; first at {place}", quote(&named.name));
                reader.complain(node.span, Complaint::new(message));
            }
            Some(named)
        })
    }

    /// A list of addresses of interfaces, each once.
    pub(super) fn addresses(&mut self, mapping: &Node, key: &str) -> Vec<IpAddr> {
        self.once_each(mapping, key, "the address", address)
    }

    /// A list of address blocks, each once.
    pub(super) fn prefixes(&mut self, mapping: &Node, key: &str) -> Option<Vec<Prefix>> {
        given(mapping, key)?;
        Some(self.once_each(mapping, key, "the block", parse_prefix))
    }

    fn once_each<T: Ord + Copy + std::fmt::Display>(
        &mut self,
        mapping: &Node,
        key: &str,
        what: &str,
        parse: impl Fn(&str) -> Result<T, Complaint>,
    ) -> Vec<T> {
        let mut seen = BTreeSet::new();
        let items = self.list(mapping, key);
        self.each(items, |reader, node| {
            let text = reader.text(node, "an address")?;
            match parse(text) {
                Err(complaint) => reader.complain(node.span, complaint),
                Ok(value) if seen.insert(value) => return Some(value),
                Ok(value) => {
                    let message = format!("{what} {value} stands in the list twice");
                    reader.complain(node.span, Complaint::new(message));
                }
            }
            None
        })
    }
}

/// An address that an interface can have.
fn address(text: &str) -> Result<IpAddr, Complaint> {
    let expected = "an address such as 10.0.1.10 or fd00:1::10";
    let Ok(address) = text.parse::<IpAddr>() else {
        let complaint = Complaint::new(format!("{} is not an address", quote(text))).expected(expected);
        let alone = text.split_once('/').map(|(alone, _)| alone).filter(|alone| alone.parse::<IpAddr>().is_ok());
        return Err(match alone {
            Some(alone) => complaint.expected("an address without prefix length").suggest(Some(alone)),
            None => complaint,
        });
    };
    let mapped = match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => v6.to_ipv4_mapped(),
    };
    if let Some(v4) = mapped {
        let complaint = Complaint::new(format!("{address} is an IPv4 address in IPv6 clothes"));
        return Err(complaint.expected("the IPv4 address itself").suggest(Some(v4.to_string())));
    }
    if address.is_unspecified() || address.is_multicast() {
        return Err(Complaint::new(format!("no interface has the address {address}")).expected(expected));
    }
    Ok(address)
}
