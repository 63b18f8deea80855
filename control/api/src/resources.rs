//! Parts of the posture one by one: views over its files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fleet::{Labels, RolloutPolicy};

/// A part of the posture, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared<T> {
    /// Its name.
    pub name: String,
    /// `web.yaml:3`.
    pub place: String,
    /// True if the API stored it in a file of its own, so that PUT and DELETE work.
    pub managed: bool,
    /// What is declared.
    pub spec: T,
}

/// A security group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GroupSpec {
    /// Basic or advanced.
    #[serde(rename = "type")]
    pub kind: GroupTypeWord,
    /// 2-256 characters, or empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(max_length = 256)]
    pub description: String,
    /// Basic groups only: whether members may talk to each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inner_access: Option<PolicyWord>,
    /// Who joins by label: whoever carries all labels of one of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<Labels>,
    /// Inbound rules.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<RuleSpec>,
    /// Outbound rules.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<RuleSpec>,
}

/// Basic or advanced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum GroupTypeWord {
    /// Members talk to each other unless isolated; everything may leave unless refused.
    #[default]
    Basic,
    /// Isolated; nothing may leave unless allowed.
    Advanced,
}

/// Accept or drop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyWord {
    /// Let it pass.
    #[default]
    Accept,
    /// Drop it silently.
    Drop,
}

/// One rule. Several ports or peers mean one rule for each combination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Accept (default) or drop.
    #[serde(default)]
    pub policy: PolicyWord,
    /// 1 (decides first, default) to 100.
    #[serde(default = "first")]
    #[schema(minimum = 1, maximum = 100)]
    pub priority: u8,
    /// `tcp`, `udp`, `icmp`, `icmpv6`, `gre`, `all`, or a number.
    pub protocol: String,
    /// `443`, `8000/8100`, `all`, `port-list:web`; TCP and UDP only, where at least one is needed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<String>,
    /// Source ports; none means any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_ports: Vec<String>,
    /// The other side, at least one: `any`, a block, `group:web`, `prefix-list:office`.
    pub peers: Vec<String>,
    /// This side's own block; left out: every address of the interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<String>,
    /// 1-512 characters, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schema(max_length = 512)]
    pub description: String,
}

fn first() -> u8 {
    1
}

/// A change of a rule; what is left out stays. Protocol and peers cannot change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RuleEdit {
    /// Accept or drop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyWord>,
    /// 1 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100)]
    pub priority: Option<u8>,
    /// New ports, all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<String>>,
    /// A new description.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// A shared list of prefixes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PrefixListSpec {
    /// All entries are of this family.
    pub family: FamilyWord,
    /// 1-200: a rule that names the list counts as so many rules.
    #[schema(minimum = 1, maximum = 200)]
    pub max_entries: u32,
    /// 2-256 characters, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schema(max_length = 256)]
    pub description: String,
    /// `203.0.113.0/24`.
    #[serde(default)]
    pub entries: Vec<String>,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FamilyWord {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// A shared list of port ranges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortListSpec {
    /// 1-2,000: a rule that names the list counts as so many rules.
    #[schema(minimum = 1, maximum = 2_000)]
    pub max_entries: u32,
    /// 2-256 characters, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schema(max_length = 256)]
    pub description: String,
    /// `443`, `8000/8100`.
    #[serde(default)]
    pub entries: Vec<String>,
}

/// An instance as the posture declares it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InstanceSpec {
    /// What groups select it by.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// By name; at least one.
    pub interfaces: BTreeMap<String, InterfaceSpec>,
}

/// One interface of a declared instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InterfaceSpec {
    /// The Linux device; left out: the interface's own name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The instance that carries this guest, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Private addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Public addresses that reach it by NAT in front of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub public: Vec<String>,
    /// A guest's MAC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Groups joined by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
}

/// One file's new text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FileText {
    /// YAML.
    pub text: String,
    /// Why, for the history; at most 1,000 characters.
    #[serde(default)]
    pub reason: String,
    /// How it reaches the machines.
    #[serde(default)]
    pub rollout: RolloutPolicy,
}

macro_rules! declared {
    ($($(#[$doc:meta])* $name:ident, $page:ident of $spec:ty;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
        pub struct $name {
            /// Its name.
            pub name: String,
            /// `web.yaml:3`.
            pub place: String,
            /// True if the API stored it in a file of its own, so that PUT and DELETE work.
            pub managed: bool,
            /// What is declared.
            pub spec: $spec,
        }

        impl From<Declared<$spec>> for $name {
            fn from(one: Declared<$spec>) -> $name {
                $name { name: one.name, place: one.place, managed: one.managed, spec: one.spec }
            }
        }

        /// All of them, page by page.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
        pub struct $page {
            /// This page.
            pub items: Vec<$name>,
            /// Give it back as `cursor` for the next page; null on the last one.
            pub next: Option<String>,
        }
    )*};
}

declared! {
    /// A security group, and where it stands.
    GroupView, GroupPage of GroupSpec;
    /// A prefix list, and where it stands.
    PrefixListView, PrefixListPage of PrefixListSpec;
    /// A port list, and where it stands.
    PortListView, PortListPage of PortListSpec;
    /// A declared instance, and where it stands.
    DeclaredInstanceView, DeclaredInstancePage of InstanceSpec;
}

/// A return to an earlier posture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReturnChange {
    /// Why, for the history; at most 1,000 characters.
    pub reason: String,
    /// How it reaches the machines.
    pub rollout: RolloutPolicy,
}

/// A file of the posture without its text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileView {
    /// Its name.
    pub name: String,
    /// Bytes of its text.
    pub bytes: u64,
}

/// The posture's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FilePage {
    /// This page.
    pub items: Vec<FileView>,
    /// Give it back as `cursor` for the next page; null on the last one.
    pub next: Option<String>,
}
