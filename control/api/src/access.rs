//! Sessions, users, service accounts, keys: who asks, and what they may.

use std::fmt;

use keepwall_fleet::access::{Binding, Role};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fleet::Labels;

/// A secret on its way in or out: never shown by `Debug`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, format = Password)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// A name and a password, and a code if the user has set up codes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// The user's name.
    #[schema(max_length = 64)]
    pub user: String,
    /// The password.
    pub password: Secret,
    /// Six digits of the authenticator, if the user has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<Secret>,
}

/// A session that was opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionMade {
    /// To be sent as `Authorization: Bearer …`; shown this once.
    pub token: Secret,
    /// Who was let in.
    pub user: String,
    /// When it ends at the latest. It ends sooner if it is not used.
    pub expires: String,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Me {
    /// As the audit log calls them: `user:alice`, `key:3f…`, `local:root`.
    pub actor: String,
    /// The user or service account behind it; empty for `local:root`.
    pub user: String,
    /// What they may, as user.
    pub bindings: Vec<BindingBody>,
    /// A key's own bindings, which narrow the user's.
    pub narrowed: Option<Vec<BindingBody>>,
    /// True if codes are set up.
    pub totp: bool,
    /// When the credential ends.
    pub expires: Option<String>,
}

/// A role, and where it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BindingBody {
    /// What one is.
    pub role: RoleWord,
    /// Labels that a machine must carry, all of them. Empty means everywhere.
    #[serde(default)]
    pub scope: Labels,
}

/// A role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RoleWord {
    /// Sees posture, machines, rollouts, findings and events.
    Viewer,
    /// Keeps machines and rollouts.
    Operator,
    /// Decides what is allowed; reads the audit log.
    Security,
    /// Everything.
    Admin,
}

impl From<Role> for RoleWord {
    fn from(role: Role) -> RoleWord {
        match role {
            Role::Viewer => RoleWord::Viewer,
            Role::Operator => RoleWord::Operator,
            Role::Security => RoleWord::Security,
            Role::Admin => RoleWord::Admin,
        }
    }
}

impl From<RoleWord> for Role {
    fn from(role: RoleWord) -> Role {
        match role {
            RoleWord::Viewer => Role::Viewer,
            RoleWord::Operator => Role::Operator,
            RoleWord::Security => Role::Security,
            RoleWord::Admin => Role::Admin,
        }
    }
}

impl From<Binding> for BindingBody {
    fn from(binding: Binding) -> BindingBody {
        BindingBody { role: binding.role.into(), scope: binding.scope }
    }
}

impl From<BindingBody> for Binding {
    fn from(body: BindingBody) -> Binding {
        Binding { role: body.role.into(), scope: body.scope }
    }
}

/// A user to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewUser {
    /// 1-64 characters: small letters, digits, `-`, `_`, `.`, `@`; begins with a letter or digit.
    #[schema(min_length = 1, max_length = 64, pattern = "^[a-z0-9][a-z0-9._@-]*$")]
    pub name: String,
    /// 12-256 characters.
    #[schema(min_length = 12, max_length = 256)]
    pub password: Secret,
    /// What they may, at most 64.
    #[serde(default)]
    #[schema(max_items = 64)]
    pub bindings: Vec<BindingBody>,
}

/// A change of a user. What is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UserChange {
    /// A new password, 12-256 characters. All sessions of the user end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// New bindings, all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bindings: Option<Vec<BindingBody>>,
    /// True: no session and no key of theirs is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
    /// True: their authenticator is forgotten, as when it was lost. False does nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forget_totp: Option<bool>,
}

/// A user or a service account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UserView {
    /// Their name.
    pub name: String,
    /// The commit that wrote it; the ETag.
    pub revision: u64,
    /// `person`, `service`, or `oidc` for somebody whom an identity provider vouches for.
    pub kind: UserKind,
    /// What they may.
    pub bindings: Vec<BindingBody>,
    /// True if codes are set up.
    pub totp: bool,
    /// True if they are shut out.
    pub disabled: bool,
    /// When they were made.
    pub created: String,
}

/// What kind of user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum UserKind {
    /// Logs in with a password.
    Person,
    /// Has only keys.
    Service,
    /// Logs in at an identity provider.
    Oidc,
}

/// One's own new password.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PasswordChange {
    /// The one that holds now.
    pub current: Secret,
    /// 12-256 characters.
    #[schema(min_length = 12, max_length = 256)]
    pub new: Secret,
}

/// An authenticator to be set up: nothing holds until a code is verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TotpEnrol {
    /// The password once more.
    pub password: Secret,
}

/// What the authenticator needs; shown this once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TotpMade {
    /// In base32.
    pub secret: Secret,
    /// `otpauth://totp/…`, for a QR code.
    pub url: Secret,
}

/// A code, to prove that the authenticator works, or to take it away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TotpCode {
    /// Six digits. Each works once.
    pub code: Secret,
}

/// A key to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NewKey {
    /// For this service account or user; left out: for oneself. Another's needs the right to make keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// What it is for; at most 200 characters.
    #[schema(max_length = 200)]
    pub note: String,
    /// Seconds until it expires, 60-31,536,000 (a year). Default 7,776,000 (90 days).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 60, maximum = 31_536_000)]
    pub ttl_s: Option<u32>,
    /// Narrows what the owner may; left out: all that the owner may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bindings: Option<Vec<BindingBody>>,
}

/// A key that was made; the secret is shown this once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeyMade {
    /// Its id.
    pub id: String,
    /// `kwk_…`, to be sent as `Authorization: Bearer …`.
    pub key: Secret,
    /// When it expires.
    pub expires: String,
}

/// A key without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeyView {
    /// Its id.
    pub id: String,
    /// The commit that wrote it; the ETag.
    pub revision: u64,
    /// Whose it is.
    pub owner: String,
    /// What it is for.
    pub note: String,
    /// What it narrows its owner to.
    pub bindings: Option<Vec<BindingBody>>,
    /// When it was made.
    pub created: String,
    /// When it expires.
    pub expires: String,
    /// When it was last used, to about a minute; null if never.
    pub last_used: Option<String>,
}

/// A service account to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewServiceAccount {
    /// As a user's name; users and service accounts share their names.
    #[schema(min_length = 1, max_length = 64, pattern = "^[a-z0-9][a-z0-9._@-]*$")]
    pub name: String,
    /// What it may, at most 64.
    #[serde(default)]
    #[schema(max_items = 64)]
    pub bindings: Vec<BindingBody>,
}

/// A change of a service account. What is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServiceAccountChange {
    /// New bindings, all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bindings: Option<Vec<BindingBody>>,
    /// True: no key of it is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
}

/// A login at an identity provider to be begun.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OidcStart {}

/// Where to go, and what to bring back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OidcStarted {
    /// Open this in a browser.
    pub url: String,
    /// What the provider must give back as `state`.
    pub state: String,
    /// Keep it where nobody else sees it; it proves that who finishes is who began.
    pub flow: Secret,
    /// When it is too late.
    pub expires: String,
}

/// What the provider sent back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OidcFinish {
    /// From the beginning.
    pub flow: Secret,
    /// From the provider's redirect.
    pub state: String,
    /// From the provider's redirect.
    pub code: Secret,
}
