//! `instances:`

use std::collections::BTreeMap;

use keepwall_secgroup::spec::{Instance, Interface};

use super::{Reader, given};
use crate::keys;
use crate::problem::{Complaint, quote};
use crate::rule::check_text;
use crate::tree::{Key, Kind, Node};

/// As many labels as an instance or a selector has; the cloud allows 20 tags.
const LABELS_MAX: usize = 64;
/// Characters of a label's key and of its value.
const LABEL_CHARACTERS_MAX: usize = 128;
/// Linux: `IFNAMSIZ` with its closing zero.
const DEVICE_BYTES_MAX: usize = 15;

impl Reader<'_, '_> {
    pub(super) fn instance(&mut self, key: &Key, node: &Node) -> Option<Instance> {
        let name = self.declared(key);
        if !self.keys(node, &keys::INSTANCE) {
            return None;
        }
        let labels = given(node, "labels").map(|(_, labels)| self.labels(labels)).unwrap_or_default().into();
        let interfaces = self.interfaces(key, node);
        Some(Instance { name, place: self.place(key.span), labels, interfaces })
    }

    /// Label to value. Whatever a value looks like, it is text.
    pub(super) fn labels(&mut self, node: &Node) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        if !matches!(node.kind, Kind::Mapping { .. }) {
            self.wrong_shape(node, "labels with their values, as in { tier: web }");
        }
        if node.entries().len() > LABELS_MAX {
            self.complain(node.span, Complaint::new(format!("more than {LABELS_MAX} labels")));
            return out;
        }
        for (key, value) in node.entries() {
            if let Err(complaint) = check_text("a label", &key.text, 1, LABEL_CHARACTERS_MAX) {
                self.complain(key.span, complaint);
            }
            let expected = format!("the value of the label {}; \"\" for an empty one", quote(&key.text));
            let Some(text) = self.text(value, &expected) else { continue };
            if let Err(complaint) = check_text("a label's value", text, 0, LABEL_CHARACTERS_MAX) {
                self.complain(value.span, complaint);
            }
            out.insert(key.text.clone(), text.to_owned());
        }
        out
    }

    fn interfaces(&mut self, instance: &Key, node: &Node) -> Vec<Interface> {
        let interfaces = given(node, "interfaces").map(|(_, interfaces)| interfaces);
        if let Some(interfaces) = interfaces
            && !matches!(interfaces.kind, Kind::Mapping { .. })
        {
            self.wrong_shape(interfaces, "interfaces by name, as in `eth0: { groups: [web] }`");
            return Vec::new();
        }
        let entries = interfaces.map_or(&[][..], Node::entries);
        if entries.is_empty() {
            let complaint = Complaint::new(format!("the instance {} has no interface", quote(&instance.text)));
            self.complain(
                instance.span,
                complaint.expected("at least one under `interfaces`: groups apply to interfaces"),
            );
        }
        self.each(entries, |reader, (key, value)| reader.interface(key, value))
    }

    fn interface(&mut self, key: &Key, node: &Node) -> Option<Interface> {
        // An interface that says nothing is one without addresses and groups.
        if !node.is_null() && !self.keys(node, &keys::INTERFACE) {
            return None;
        }
        let good = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-');
        if check_text("", &key.text, 1, LABEL_CHARACTERS_MAX).is_err() || !key.text.chars().all(good) {
            let complaint = Complaint::new(format!("{} is no name of an interface", quote(&key.text)));
            self.complain(key.span, complaint.expected("letters, digits, and . _ - only"));
        }
        let device = match node.entry("device") {
            Some((_, value)) => self.text(value, "the name of a Linux network device")?,
            None => &key.text,
        };
        let device_span = node.entry("device").map_or(key.span, |(_, value)| value.span);
        if !is_device(device) {
            let complaint = Complaint::new(format!("{} is no name of a Linux network device", quote(device)));
            let expected = format!("1 to {DEVICE_BYTES_MAX} bytes without blanks, `/` or `:`");
            self.complain(device_span, complaint.expected(expected));
        }
        let host =
            node.entry("host").and_then(|(_, value)| self.reference(value, "the instance that carries the guest"));
        let mac = node.entry("mac").and_then(|(_, value)| self.mac(value));
        Some(Interface {
            name: key.text.clone(),
            place: self.place(key.span),
            device: device.to_owned(),
            host,
            addresses: self.addresses(node, "addresses"),
            public: self.addresses(node, "public"),
            mac,
            groups: self.references(node, "groups", "a security group"),
        })
    }

    fn mac(&mut self, node: &Node) -> Option<[u8; 6]> {
        let expected = "six pairs of hexadecimal digits such as 52:54:00:aa:bb:cc, not a multicast address";
        let text = self.text(node, expected)?;
        let mac = parse_mac(text).filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6]);
        if mac.is_none() {
            self.complain(node.span, Complaint::new(format!("{} is no MAC address", quote(text))).expected(expected));
        }
        mac
    }
}

fn is_device(name: &str) -> bool {
    (1..=DEVICE_BYTES_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && name.chars().all(|c| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | ':'))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut pairs = text.split([':', '-']);
    for byte in &mut mac {
        let pair = pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    pairs.next().is_none().then_some(mac)
}
