//! `prefix_lists:` and `port_lists:`

use keepwall_core::{Family, Place, PortRange, Prefix};
use keepwall_secgroup::spec::{PORT_LIST_ENTRIES_MAX, PREFIX_LIST_ENTRIES_MAX, PortList, PrefixList};

use super::Reader;
use super::groups::{DESCRIPTION_MAX, DESCRIPTION_MIN};
use crate::keys;
use crate::problem::Complaint;
use crate::rule::{parse_port_range, parse_prefix};
use crate::tree::{Key, Node};

impl Reader<'_, '_> {
    pub(super) fn prefix_list(&mut self, key: &Key, node: &Node) -> Option<PrefixList> {
        let name = self.declared(key);
        if !self.keys(node, &keys::PREFIX_LIST) {
            return None;
        }
        let families = [("ipv4", Family::Ipv4), ("ipv6", Family::Ipv6)];
        let family = self.word(node, "family", &families);
        if node.entry("family").is_none() {
            self.complain(
                key.span,
                Complaint::new("the prefix list names no family").expected("`family: ipv4` or `family: ipv6`"),
            );
        }
        let max_entries = self.max_entries(key, node, PREFIX_LIST_ENTRIES_MAX);
        let entries = self.entries(node, max_entries, |text| {
            let prefix: Prefix = parse_prefix(text)?;
            match family {
                Some(family) if family != prefix.family() => {
                    let message = format!("{prefix} is {} in a list of {family}", prefix.family());
                    Err(Complaint::new(message).expected("another prefix list for the other family"))
                }
                _ => Ok(prefix),
            }
        });
        let description = self.description(node, DESCRIPTION_MIN, DESCRIPTION_MAX);
        Some(PrefixList { name, place: self.place(key.span), description, family: family?, max_entries, entries })
    }

    pub(super) fn port_list(&mut self, key: &Key, node: &Node) -> Option<PortList> {
        let name = self.declared(key);
        if !self.keys(node, &keys::PORT_LIST) {
            return None;
        }
        let max_entries = self.max_entries(key, node, PORT_LIST_ENTRIES_MAX);
        let entries: Vec<(PortRange, Place)> = self.entries(node, max_entries, parse_port_range);
        let description = self.description(node, DESCRIPTION_MIN, DESCRIPTION_MAX);
        Some(PortList { name, place: self.place(key.span), description, max_entries, entries })
    }

    fn max_entries(&mut self, key: &Key, node: &Node, max: u32) -> u32 {
        if node.entry("max_entries").is_none() {
            let complaint = Complaint::new("the list does not say how many entries it may ever have");
            let expected = format!("`max_entries`, 1 to {max}: a rule that names the list counts as that many rules");
            self.complain(key.span, complaint.expected(expected));
        }
        self.number(node, "max_entries", 1, max, max)
    }

    fn entries<T: Ord + Copy>(
        &mut self,
        node: &Node,
        max: u32,
        parse: impl Fn(&str) -> Result<T, Complaint>,
    ) -> Vec<(T, Place)> {
        let mut out: Vec<(T, Place)> = Vec::new();
        let mut seen = std::collections::BTreeMap::new();
        for (index, item) in self.list(node, "entries").iter().enumerate() {
            if index == max as usize {
                let message = format!("the list has more than its `max_entries` of {max}");
                self.complain(item.span, Complaint::new(message).expected("fewer entries, or a larger `max_entries`"));
                break;
            }
            let Some(text) = self.text(item, "an entry") else { continue };
            match parse(text) {
                Err(complaint) => self.complain(item.span, complaint),
                Ok(value) => {
                    let place = self.place(item.span);
                    if let Some(first) = seen.insert(value, place.clone()) {
                        let message =
                            format!("the same entry stands in the list twice; first at {first}:{}", first.column);
                        self.complain(item.span, Complaint::new(message).expected("each entry once"));
                    }
                    out.push((value, place));
                }
            }
        }
        out
    }
}
