//! `settings:`

use keepwall_secgroup::spec::{Limits, OnDeny, Settings};

use super::{Reader, given};
use crate::keys;
use crate::problem::{Complaint, quote};
use crate::tree::Node;

/// A session is remembered for a day at most.
const IDLE_S_MAX: u32 = 86_400;
/// More than this says nothing that a counter does not say.
const FLOW_LOG_MAX: u32 = 100_000;
/// The most that any quota can be raised to.
const LIMIT_MAX: u32 = 10_000_000;

impl Reader<'_, '_> {
    pub(super) fn settings(&mut self, node: &Node) -> Settings {
        let mut settings = Settings::default();
        if !self.keys(node, &keys::SETTINGS) {
            return settings;
        }
        if let Some((_, sessions)) = given(node, "sessions")
            && self.keys(sessions, &keys::SESSIONS)
        {
            let words = [("cut", OnDeny::Cut), ("keep", OnDeny::Keep)];
            settings.on_deny = self.word(sessions, "on_deny", &words).unwrap_or_default();
            settings.session_idle_s = self.idle_seconds(sessions, settings.session_idle_s);
        }
        if let Some(prefixes) = self.prefixes(node, "service_prefixes") {
            settings.service_prefixes = prefixes;
        }
        settings.block_outbound_smtp = self.switch(node, "block_outbound_smtp", settings.block_outbound_smtp);
        settings.flow_log_per_s = self.number(node, "flow_log_per_second", 0, FLOW_LOG_MAX, settings.flow_log_per_s);
        if let Some((_, limits)) = given(node, "limits")
            && self.keys(limits, &keys::LIMITS)
        {
            settings.limits = self.limits(limits);
        }
        settings
    }

    fn idle_seconds(&mut self, sessions: &Node, default: Option<u32>) -> Option<u32> {
        let Some((_, node)) = sessions.entry("idle_seconds") else { return default };
        let expected = format!("a number of seconds from 1 to {IDLE_S_MAX}, or none for the kernel's own limits");
        let Some(text) = self.text(node, &expected) else { return default };
        if text == "none" {
            return None;
        }
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        match text.parse::<u32>().ok().filter(|seconds| digits && (1..=IDLE_S_MAX).contains(seconds)) {
            Some(seconds) => Some(seconds),
            None => {
                let complaint = Complaint::new(format!("{} is no `idle_seconds`", quote(text)));
                self.complain(node.span, complaint.expected(expected));
                default
            }
        }
    }

    fn limits(&mut self, node: &Node) -> Limits {
        let default = Limits::default();
        let mut limit = |key: &str, default: u32| self.number(node, key, 1, LIMIT_MAX, default);
        Limits {
            groups_per_interface: limit("groups_per_interface", default.groups_per_interface),
            rules_per_interface: limit("rules_per_interface", default.rules_per_interface),
            group_rules_per_group: limit("group_rules_per_group", default.group_rules_per_group),
            addresses_per_basic_group: limit("addresses_per_basic_group", default.addresses_per_basic_group),
            interfaces_per_advanced_group: limit(
                "interfaces_per_advanced_group",
                default.interfaces_per_advanced_group,
            ),
            groups: limit("groups", default.groups),
            prefix_lists: limit("prefix_lists", default.prefix_lists),
            associations_per_prefix_list: limit("associations_per_prefix_list", default.associations_per_prefix_list),
            elements_per_interface: limit("elements_per_interface", default.elements_per_interface),
        }
    }
}
