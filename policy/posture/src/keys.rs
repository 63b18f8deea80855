//! The catalogue: every key that a posture may hold. The reader refuses what is not here, the JSON Schema is
//! tested against it.

/// The keys of one kind of mapping.
pub(crate) struct Keys {
    /// What it is, for messages: `a rule`.
    pub(crate) what: &'static str,
    /// Its name under `$defs` of the JSON Schema.
    #[cfg_attr(not(test), expect(dead_code, reason = "the schema test reads it"))]
    pub(crate) schema: &'static str,
    /// The keys, in the order in which messages list them.
    pub(crate) names: &'static [&'static str],
}

pub(crate) const POSTURE: Keys = Keys {
    what: "a posture",
    schema: "posture",
    names: &["version", "settings", "instances", "security_groups", "prefix_lists", "port_lists", "tests"],
};

pub(crate) const SETTINGS: Keys = Keys {
    what: "settings",
    schema: "settings",
    names: &["sessions", "service_prefixes", "block_outbound_smtp", "flow_log_per_second", "limits"],
};

pub(crate) const SESSIONS: Keys = Keys { what: "sessions", schema: "sessions", names: &["on_deny", "idle_seconds"] };

pub(crate) const LIMITS: Keys = Keys {
    what: "limits",
    schema: "limits",
    names: &[
        "groups_per_interface",
        "rules_per_interface",
        "group_rules_per_group",
        "addresses_per_basic_group",
        "interfaces_per_advanced_group",
        "groups",
        "prefix_lists",
        "associations_per_prefix_list",
        "elements_per_interface",
    ],
};

pub(crate) const INSTANCE: Keys = Keys { what: "an instance", schema: "instance", names: &["labels", "interfaces"] };

pub(crate) const INTERFACE: Keys = Keys {
    what: "an interface",
    schema: "interface",
    names: &["device", "host", "addresses", "public", "mac", "groups"],
};

pub(crate) const GROUP: Keys = Keys {
    what: "a security group",
    schema: "group",
    names: &["type", "description", "inner_access", "members", "ingress", "egress"],
};

pub(crate) const RULE: Keys = Keys {
    what: "a rule",
    schema: "rule",
    names: &["policy", "protocol", "ports", "source_ports", "from", "to", "priority", "description"],
};

pub(crate) const PREFIX_LIST: Keys =
    Keys { what: "a prefix list", schema: "prefix_list", names: &["family", "max_entries", "description", "entries"] };

pub(crate) const PORT_LIST: Keys =
    Keys { what: "a port list", schema: "port_list", names: &["max_entries", "description", "entries"] };

pub(crate) const TEST: Keys = Keys { what: "a test", schema: "test", names: &["expect"] };

/// All of them.
#[cfg(test)]
pub(crate) const ALL: &[&Keys] =
    &[&POSTURE, &SETTINGS, &SESSIONS, &LIMITS, &INSTANCE, &INTERFACE, &GROUP, &RULE, &PREFIX_LIST, &PORT_LIST, &TEST];

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests read the pages that they compare")]
mod tests {
    use std::collections::BTreeSet;

    use super::ALL;

    fn docs(name: &str) -> String {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn the_schema_knows_the_keys_that_the_parser_knows_and_no_others() {
        let schema: serde_json::Value = serde_json::from_str(&docs("posture.schema.json")).unwrap();
        for keys in ALL {
            let definition = &schema["$defs"][keys.schema];
            let known: BTreeSet<&str> =
                definition["properties"].as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(known, keys.names.iter().copied().collect::<BTreeSet<_>>(), "{}", keys.schema);
            assert_eq!(definition["additionalProperties"], serde_json::Value::Bool(false), "{}", keys.schema);
        }
        let with_keys =
            schema["$defs"].as_object().unwrap().values().filter(|one| one["properties"].is_object()).count();
        assert_eq!(with_keys, ALL.len(), "the schema describes a mapping that the parser does not read");
    }

    #[test]
    fn the_manual_names_every_key() {
        let manual = docs("posture.md");
        for key in ALL.iter().flat_map(|keys| keys.names) {
            let named = |end: &str| manual.contains(&format!("`{key}{end}"));
            assert!(named("`") || named(".") || named(":") || manual.contains(&format!(".{key}`")), "{key}");
        }
    }
}
