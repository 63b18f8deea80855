//! Made from docs/openapi.json by `cargo xtask openapi`; changes here are lost.

#![allow(clippy::too_many_arguments, reason = "as many as the operation has")]

use crate::{Client, Error, Live, Request, Tagged, segment};

/// What `list_api_keys` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListApiKeysQuery {
    /// Everybody's, not only one's own; needs the right to read keys.
    pub all: Option<bool>,
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListApiKeysQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.all.as_ref().map(|value| ("all", value.to_string())));
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_audit` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListAuditQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListAuditQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_tokens` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListTokensQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListTokensQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_events` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListEventsQuery {
    /// Only from this machine.
    pub source: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// At least this bad.
    pub severity: Option<String>,
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListEventsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.source.as_ref().map(|value| ("source", value.to_string())));
        out.extend(self.kind.as_ref().map(|value| ("kind", value.to_string())));
        out.extend(self.severity.as_ref().map(|value| ("severity", value.to_string())));
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `live` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveQuery {
    /// Only of this kind.
    pub kind: Option<String>,
}

impl LiveQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.kind.as_ref().map(|value| ("kind", value.to_string())));
        out
    }
}

/// What `explain` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExplainQuery {
    /// An instance, instance/interface, or an address.
    pub from: String,
    /// An instance, instance/interface, or an address.
    pub to: String,
    /// `tcp` if nothing is said.
    pub protocol: Option<String>,
    /// Destination port.
    pub port: Option<u64>,
    /// Source port.
    pub source_port: Option<u64>,
}

impl ExplainQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.push(("from", self.from.to_string()));
        out.push(("to", self.to.to_string()));
        out.extend(self.protocol.as_ref().map(|value| ("protocol", value.to_string())));
        out.extend(self.port.as_ref().map(|value| ("port", value.to_string())));
        out.extend(self.source_port.as_ref().map(|value| ("source_port", value.to_string())));
        out
    }
}

/// What `list_findings` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListFindingsQuery {
    /// Only from this machine.
    pub source: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// At least this bad.
    pub severity: Option<String>,
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListFindingsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.source.as_ref().map(|value| ("source", value.to_string())));
        out.extend(self.kind.as_ref().map(|value| ("kind", value.to_string())));
        out.extend(self.severity.as_ref().map(|value| ("severity", value.to_string())));
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_instances` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListInstancesQuery {
    /// Only machines with these labels: `tier=web,site=a`.
    pub labels: Option<String>,
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListInstancesQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.labels.as_ref().map(|value| ("labels", value.to_string())));
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_port_lists` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListPortListsQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListPortListsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `delete_port_list` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeletePortListQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl DeletePortListQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `put_port_list` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutPortListQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl PutPortListQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `list_files` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListFilesQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListFilesQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `delete_file` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteFileQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl DeleteFileQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `list_postures` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListPosturesQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListPosturesQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_declared_instances` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListDeclaredInstancesQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListDeclaredInstancesQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `delete_declared_instance` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteDeclaredInstanceQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl DeleteDeclaredInstanceQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `put_declared_instance` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutDeclaredInstanceQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl PutDeclaredInstanceQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `list_prefix_lists` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListPrefixListsQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListPrefixListsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `delete_prefix_list` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeletePrefixListQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl DeletePrefixListQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `put_prefix_list` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutPrefixListQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl PutPrefixListQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `reach` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReachQuery {
    /// Only from here.
    pub from: Option<String>,
    /// Only to here.
    pub to: Option<String>,
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ReachQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.from.as_ref().map(|value| ("from", value.to_string())));
        out.extend(self.to.as_ref().map(|value| ("to", value.to_string())));
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_rollouts` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListRolloutsQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListRolloutsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_security_groups` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListSecurityGroupsQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListSecurityGroupsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `delete_security_group` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteSecurityGroupQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl DeleteSecurityGroupQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `put_security_group` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutSecurityGroupQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl PutSecurityGroupQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `add_rule` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddRuleQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl AddRuleQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `remove_rule` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoveRuleQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl RemoveRuleQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `change_rule` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChangeRuleQuery {
    /// Why, for the history.
    pub reason: Option<String>,
}

impl ChangeRuleQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.reason.as_ref().map(|value| ("reason", value.to_string())));
        out
    }
}

/// What `list_service_accounts` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListServiceAccountsQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListServiceAccountsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

/// What `list_users` may be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListUsersQuery {
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Items of a page.
    pub limit: Option<u64>,
}

impl ListUsersQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        out.extend(self.cursor.as_ref().map(|value| ("cursor", value.to_string())));
        out.extend(self.limit.as_ref().map(|value| ("limit", value.to_string())));
        out
    }
}

impl Client {
    /// Keys, without their secrets. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_api_keys(&self, query: &ListApiKeysQuery) -> Result<keepwall_api::KeyPage, Error> {
        let request = Request::new("GET", "/api/v1/api-keys").query(query.pairs());
        self.json(request)
    }

    /// Makes a key; its secret is shown this once. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn create_api_key(&self, body: &keepwall_api::NewKey) -> Result<keepwall_api::KeyMade, Error> {
        let request = Request::new("POST", "/api/v1/api-keys").body(body).once();
        self.json(request)
    }

    /// Takes a key back, at once. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_api_key(&self, id: &str, if_match: Option<u64>) -> Result<(), Error> {
        let request = Request::new("DELETE", format!("/api/v1/api-keys/{}", segment(id))).once().if_match(if_match);
        self.nothing(request)
    }

    /// One key. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_api_key(&self, id: &str) -> Result<Tagged<keepwall_api::KeyView>, Error> {
        let request = Request::new("GET", format!("/api/v1/api-keys/{}", segment(id)));
        self.tagged(request)
    }

    /// Who did what, oldest first. Needs the right `audit read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_audit(&self, query: &ListAuditQuery) -> Result<keepwall_api::AuditPage, Error> {
        let request = Request::new("GET", "/api/v1/audit").query(query.pairs());
        self.json(request)
    }

    /// Looks whether the audit log is as it was written. Needs the right `audit read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn verify_audit(&self) -> Result<keepwall_api::AuditVerdict, Error> {
        let request = Request::new("GET", "/api/v1/audit/verify");
        self.json(request)
    }

    /// Enrolment tokens, without their secrets. Needs the right `token read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_tokens(&self, query: &ListTokensQuery) -> Result<keepwall_api::TokenPage, Error> {
        let request = Request::new("GET", "/api/v1/enrolment-tokens").query(query.pairs());
        self.json(request)
    }

    /// Makes an enrolment token; its secret is shown this once. Needs the right `token create`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn create_token(&self, body: &keepwall_api::TokenSpec) -> Result<keepwall_api::TokenMade, Error> {
        let request = Request::new("POST", "/api/v1/enrolment-tokens").body(body).once();
        self.json(request)
    }

    /// Takes an enrolment token back. Needs the right `token delete`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_token(&self, id: &str, if_match: Option<u64>) -> Result<(), Error> {
        let request =
            Request::new("DELETE", format!("/api/v1/enrolment-tokens/{}", segment(id))).once().if_match(if_match);
        self.nothing(request)
    }

    /// One enrolment token. Needs the right `token read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_token(&self, id: &str) -> Result<Tagged<keepwall_api::TokenView>, Error> {
        let request = Request::new("GET", format!("/api/v1/enrolment-tokens/{}", segment(id)));
        self.tagged(request)
    }

    /// What was seen, newest first. Needs the right `event read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_events(&self, query: &ListEventsQuery) -> Result<keepwall_api::ObservationPage, Error> {
        let request = Request::new("GET", "/api/v1/events").query(query.pairs());
        self.json(request)
    }

    /// What happens now, as server-sent events; a comment now and then keeps the connection, `lagged` tells how many were missed. Needs the right `event read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn live(&self, query: &LiveQuery) -> Result<Live<'_>, Error> {
        let request = Request::new("GET", "/api/v1/events/live").query(query.pairs());
        self.stream(request)
    }

    /// Why a session is allowed or denied, by the present posture. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn explain(&self, query: &ExplainQuery) -> Result<keepwall_api::Explanations, Error> {
        let request = Request::new("GET", "/api/v1/explain").query(query.pairs());
        self.json(request)
    }

    /// What was concluded, newest first. Needs the right `finding read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_findings(&self, query: &ListFindingsQuery) -> Result<keepwall_api::ObservationPage, Error> {
        let request = Request::new("GET", "/api/v1/findings").query(query.pairs());
        self.json(request)
    }

    /// Machines, by name. Needs the right `instance read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_instances(&self, query: &ListInstancesQuery) -> Result<keepwall_api::InstancePage, Error> {
        let request = Request::new("GET", "/api/v1/instances").query(query.pairs());
        self.json(request)
    }

    /// Forgets a machine; its certificate is worth nothing from then on. Needs the right `instance delete`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_instance(&self, name: &str, if_match: Option<u64>) -> Result<(), Error> {
        let request = Request::new("DELETE", format!("/api/v1/instances/{}", segment(name))).once().if_match(if_match);
        self.nothing(request)
    }

    /// One machine, as declared and as it is. Needs the right `instance read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_instance(&self, name: &str) -> Result<Tagged<keepwall_api::InstanceView>, Error> {
        let request = Request::new("GET", format!("/api/v1/instances/{}", segment(name)));
        self.tagged(request)
    }

    /// Changes labels or interfaces of a machine that enrolled. Needs the right `instance change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn change_instance(
        &self,
        name: &str,
        body: &keepwall_api::InstanceChange,
        if_match: Option<u64>,
    ) -> Result<Tagged<keepwall_api::InstanceView>, Error> {
        let request =
            Request::new("PATCH", format!("/api/v1/instances/{}", segment(name))).body(body).once().if_match(if_match);
        self.tagged(request)
    }

    /// What the machine should enforce now. Needs the right `instance read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_intent(&self, name: &str) -> Result<serde_json::Value, Error> {
        let request = Request::new("GET", format!("/api/v1/instances/{}/intent", segment(name)));
        self.json(request)
    }

    /// Takes a machine's certificate away: it must enrol again. Needs the right `instance revoke`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn revoke_instance(&self, name: &str) -> Result<(), Error> {
        let request = Request::new("POST", format!("/api/v1/instances/{}/revoke", segment(name))).once();
        self.nothing(request)
    }

    /// Ends a login at the identity provider: opens a session. Needs no credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn oidc_finish(&self, body: &keepwall_api::OidcFinish) -> Result<keepwall_api::SessionMade, Error> {
        let request = Request::new("POST", "/api/v1/oidc/finish").body(body);
        self.json(request)
    }

    /// Begins a login at the identity provider. Needs no credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn oidc_start(&self, body: &keepwall_api::OidcStart) -> Result<keepwall_api::OidcStarted, Error> {
        let request = Request::new("POST", "/api/v1/oidc/start").body(body);
        self.json(request)
    }

    /// This document. Needs no credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn openapi(&self) -> Result<serde_json::Value, Error> {
        let request = Request::new("GET", "/api/v1/openapi.json");
        self.json(request)
    }

    /// How far a change is. Needs the right `rollout read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_operation(&self, id: &str) -> Result<keepwall_api::OperationView, Error> {
        let request = Request::new("GET", format!("/api/v1/operations/{}", segment(id)));
        self.json(request)
    }

    /// Port lists, by name. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_port_lists(&self, query: &ListPortListsQuery) -> Result<Tagged<keepwall_api::PortListPage>, Error> {
        let request = Request::new("GET", "/api/v1/port-lists").query(query.pairs());
        self.tagged(request)
    }

    /// Removes a port list that has a file of its own. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_port_list(
        &self,
        name: &str,
        query: &DeletePortListQuery,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("DELETE", format!("/api/v1/port-lists/{}", segment(name)))
            .query(query.pairs())
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// One port list. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_port_list(&self, name: &str) -> Result<Tagged<keepwall_api::PortListView>, Error> {
        let request = Request::new("GET", format!("/api/v1/port-lists/{}", segment(name)));
        self.tagged(request)
    }

    /// Declares a port list in a file of its own. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn put_port_list(
        &self,
        name: &str,
        query: &PutPortListQuery,
        body: &keepwall_api::PortListSpec,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("PUT", format!("/api/v1/port-lists/{}", segment(name)))
            .query(query.pairs())
            .body(body)
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// What is declared for the whole fleet. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_posture(&self) -> Result<Tagged<keepwall_api::PostureVersion>, Error> {
        let request = Request::new("GET", "/api/v1/posture");
        self.tagged(request)
    }

    /// Declares all of it anew. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn put_posture(
        &self,
        body: &keepwall_api::PostureChange,
        if_match: u64,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("PUT", "/api/v1/posture").body(body).once().if_match(Some(if_match));
        self.json(request)
    }

    /// Says what a posture would mean, and changes nothing. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn check_posture(&self, body: &keepwall_api::PostureQuestion) -> Result<keepwall_api::Report, Error> {
        let request = Request::new("POST", "/api/v1/posture/check").body(body);
        self.json(request)
    }

    /// The posture's files. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_files(&self, query: &ListFilesQuery) -> Result<Tagged<keepwall_api::FilePage>, Error> {
        let request = Request::new("GET", "/api/v1/posture/files").query(query.pairs());
        self.tagged(request)
    }

    /// Removes one file. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_file(
        &self,
        name: &str,
        query: &DeleteFileQuery,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("DELETE", format!("/api/v1/posture/files/{}", segment(name)))
            .query(query.pairs())
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// One file. A slash in its name is written %2F. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_file(&self, name: &str) -> Result<Tagged<keepwall_api::PostureFile>, Error> {
        let request = Request::new("GET", format!("/api/v1/posture/files/{}", segment(name)));
        self.tagged(request)
    }

    /// Writes one file. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn put_file(
        &self,
        name: &str,
        body: &keepwall_api::FileText,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("PUT", format!("/api/v1/posture/files/{}", segment(name)))
            .body(body)
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// Earlier postures, newest first, without files. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_postures(&self, query: &ListPosturesQuery) -> Result<keepwall_api::PosturePage, Error> {
        let request = Request::new("GET", "/api/v1/posture/history").query(query.pairs());
        self.json(request)
    }

    /// An earlier posture. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_posture_at(&self, revision: u64) -> Result<Tagged<keepwall_api::PostureVersion>, Error> {
        let request = Request::new("GET", format!("/api/v1/posture/history/{}", segment(revision)));
        self.tagged(request)
    }

    /// Declares an earlier posture again. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn return_to_posture(
        &self,
        revision: u64,
        body: &keepwall_api::ReturnChange,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("POST", format!("/api/v1/posture/history/{}/return", segment(revision)))
            .body(body)
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// Instances that posture files declare. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_declared_instances(
        &self,
        query: &ListDeclaredInstancesQuery,
    ) -> Result<Tagged<keepwall_api::DeclaredInstancePage>, Error> {
        let request = Request::new("GET", "/api/v1/posture/instances").query(query.pairs());
        self.tagged(request)
    }

    /// Removes a declared instance that has a file of its own. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_declared_instance(
        &self,
        name: &str,
        query: &DeleteDeclaredInstanceQuery,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("DELETE", format!("/api/v1/posture/instances/{}", segment(name)))
            .query(query.pairs())
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// One declared instance. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_declared_instance(&self, name: &str) -> Result<Tagged<keepwall_api::DeclaredInstanceView>, Error> {
        let request = Request::new("GET", format!("/api/v1/posture/instances/{}", segment(name)));
        self.tagged(request)
    }

    /// Declares an instance in a file of its own. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn put_declared_instance(
        &self,
        name: &str,
        query: &PutDeclaredInstanceQuery,
        body: &keepwall_api::InstanceSpec,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("PUT", format!("/api/v1/posture/instances/{}", segment(name)))
            .query(query.pairs())
            .body(body)
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// Prefix lists, by name. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_prefix_lists(
        &self,
        query: &ListPrefixListsQuery,
    ) -> Result<Tagged<keepwall_api::PrefixListPage>, Error> {
        let request = Request::new("GET", "/api/v1/prefix-lists").query(query.pairs());
        self.tagged(request)
    }

    /// Removes a prefix list that has a file of its own. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_prefix_list(
        &self,
        name: &str,
        query: &DeletePrefixListQuery,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("DELETE", format!("/api/v1/prefix-lists/{}", segment(name)))
            .query(query.pairs())
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// One prefix list. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_prefix_list(&self, name: &str) -> Result<Tagged<keepwall_api::PrefixListView>, Error> {
        let request = Request::new("GET", format!("/api/v1/prefix-lists/{}", segment(name)));
        self.tagged(request)
    }

    /// Declares a prefix list in a file of its own. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn put_prefix_list(
        &self,
        name: &str,
        query: &PutPrefixListQuery,
        body: &keepwall_api::PrefixListSpec,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("PUT", format!("/api/v1/prefix-lists/{}", segment(name)))
            .query(query.pairs())
            .body(body)
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// Who reaches whom under the present posture. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn reach(&self, query: &ReachQuery) -> Result<keepwall_api::ReachPage, Error> {
        let request = Request::new("GET", "/api/v1/reach").query(query.pairs());
        self.json(request)
    }

    /// Changes on their way and those that ended, newest first. Needs the right `rollout read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_rollouts(&self, query: &ListRolloutsQuery) -> Result<keepwall_api::RolloutPage, Error> {
        let request = Request::new("GET", "/api/v1/rollouts").query(query.pairs());
        self.json(request)
    }

    /// One rollout, wave by wave. Needs the right `rollout read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_rollout(&self, id: &str) -> Result<Tagged<keepwall_api::RolloutView>, Error> {
        let request = Request::new("GET", format!("/api/v1/rollouts/{}", segment(id)));
        self.tagged(request)
    }

    /// A stopped rollout goes on. Needs the right `rollout change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn resume_rollout(&self, id: &str) -> Result<Tagged<keepwall_api::RolloutView>, Error> {
        let request = Request::new("POST", format!("/api/v1/rollouts/{}/resume", segment(id))).once();
        self.tagged(request)
    }

    /// Machines go back to the state before. Needs the right `rollout change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn return_rollout(&self, id: &str) -> Result<Tagged<keepwall_api::RolloutView>, Error> {
        let request = Request::new("POST", format!("/api/v1/rollouts/{}/return", segment(id))).once();
        self.tagged(request)
    }

    /// No further machine is told. Needs the right `rollout change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn stop_rollout(&self, id: &str) -> Result<Tagged<keepwall_api::RolloutView>, Error> {
        let request = Request::new("POST", format!("/api/v1/rollouts/{}/stop", segment(id))).once();
        self.tagged(request)
    }

    /// Security groups, by name. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_security_groups(
        &self,
        query: &ListSecurityGroupsQuery,
    ) -> Result<Tagged<keepwall_api::GroupPage>, Error> {
        let request = Request::new("GET", "/api/v1/security-groups").query(query.pairs());
        self.tagged(request)
    }

    /// Removes a security group that has a file of its own. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_security_group(
        &self,
        name: &str,
        query: &DeleteSecurityGroupQuery,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("DELETE", format!("/api/v1/security-groups/{}", segment(name)))
            .query(query.pairs())
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// One security group. Needs the right `posture read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_security_group(&self, name: &str) -> Result<Tagged<keepwall_api::GroupView>, Error> {
        let request = Request::new("GET", format!("/api/v1/security-groups/{}", segment(name)));
        self.tagged(request)
    }

    /// Declares a security group in a file of its own. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn put_security_group(
        &self,
        name: &str,
        query: &PutSecurityGroupQuery,
        body: &keepwall_api::GroupSpec,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("PUT", format!("/api/v1/security-groups/{}", segment(name)))
            .query(query.pairs())
            .body(body)
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// Adds a rule, wherever the group stands; comments stay. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn add_rule(
        &self,
        name: &str,
        direction: &str,
        query: &AddRuleQuery,
        body: &keepwall_api::RuleSpec,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new("POST", format!("/api/v1/security-groups/{}/{}", segment(name), segment(direction)))
            .query(query.pairs())
            .body(body)
            .once()
            .if_match(if_match);
        self.json(request)
    }

    /// Removes the rule with this index, from 0. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn remove_rule(
        &self,
        name: &str,
        direction: &str,
        index: u64,
        query: &RemoveRuleQuery,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new(
            "DELETE",
            format!("/api/v1/security-groups/{}/{}/{}", segment(name), segment(direction), segment(index)),
        )
        .query(query.pairs())
        .once()
        .if_match(if_match);
        self.json(request)
    }

    /// Changes the rule with this index, from 0. Needs the right `posture change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn change_rule(
        &self,
        name: &str,
        direction: &str,
        index: u64,
        query: &ChangeRuleQuery,
        body: &keepwall_api::RuleEdit,
        if_match: Option<u64>,
    ) -> Result<keepwall_api::Accepted, Error> {
        let request = Request::new(
            "PATCH",
            format!("/api/v1/security-groups/{}/{}/{}", segment(name), segment(direction), segment(index)),
        )
        .query(query.pairs())
        .body(body)
        .once()
        .if_match(if_match);
        self.json(request)
    }

    /// Service accounts, by name. Needs the right `user read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_service_accounts(&self, query: &ListServiceAccountsQuery) -> Result<keepwall_api::UserPage, Error> {
        let request = Request::new("GET", "/api/v1/service-accounts").query(query.pairs());
        self.json(request)
    }

    /// Makes a user that has only keys. Needs the right `user create`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn create_service_account(
        &self,
        body: &keepwall_api::NewServiceAccount,
    ) -> Result<Tagged<keepwall_api::UserView>, Error> {
        let request = Request::new("POST", "/api/v1/service-accounts").body(body).once();
        self.tagged(request)
    }

    /// Removes a service account with its keys. Needs the right `user delete`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_service_account(&self, name: &str, if_match: Option<u64>) -> Result<(), Error> {
        let request =
            Request::new("DELETE", format!("/api/v1/service-accounts/{}", segment(name))).once().if_match(if_match);
        self.nothing(request)
    }

    /// One service account. Needs the right `user read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_service_account(&self, name: &str) -> Result<Tagged<keepwall_api::UserView>, Error> {
        let request = Request::new("GET", format!("/api/v1/service-accounts/{}", segment(name)));
        self.tagged(request)
    }

    /// Changes bindings or state of a service account. Needs the right `user change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn change_service_account(
        &self,
        name: &str,
        body: &keepwall_api::ServiceAccountChange,
        if_match: Option<u64>,
    ) -> Result<Tagged<keepwall_api::UserView>, Error> {
        let request = Request::new("PATCH", format!("/api/v1/service-accounts/{}", segment(name)))
            .body(body)
            .once()
            .if_match(if_match);
        self.tagged(request)
    }

    /// Ends the session that asks. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn logout(&self) -> Result<(), Error> {
        let request = Request::new("DELETE", "/api/v1/session").once();
        self.nothing(request)
    }

    /// Who asks, and what they may. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn me(&self) -> Result<keepwall_api::Me, Error> {
        let request = Request::new("GET", "/api/v1/session");
        self.json(request)
    }

    /// Opens a session. Needs no credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn login(&self, body: &keepwall_api::Login) -> Result<keepwall_api::SessionMade, Error> {
        let request = Request::new("POST", "/api/v1/session").body(body);
        self.json(request)
    }

    /// Sets one's own password; all other sessions end. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn change_password(&self, body: &keepwall_api::PasswordChange) -> Result<(), Error> {
        let request = Request::new("POST", "/api/v1/session/password").body(body).once();
        self.nothing(request)
    }

    /// Makes an authenticator's secret; it holds once a code was verified. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn enrol_totp(&self, body: &keepwall_api::TotpEnrol) -> Result<keepwall_api::TotpMade, Error> {
        let request = Request::new("POST", "/api/v1/session/totp").body(body).once();
        self.json(request)
    }

    /// Proves that the authenticator works; from now on a code is needed. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn verify_totp(&self, body: &keepwall_api::TotpCode) -> Result<(), Error> {
        let request = Request::new("PUT", "/api/v1/session/totp").body(body).once();
        self.nothing(request)
    }

    /// Takes the authenticator away, with one last code. Needs valid credentials.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn remove_totp(&self, body: &keepwall_api::TotpCode) -> Result<(), Error> {
        let request = Request::new("POST", "/api/v1/session/totp/remove").body(body).once();
        self.nothing(request)
    }

    /// People, by name. Needs the right `user read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn list_users(&self, query: &ListUsersQuery) -> Result<keepwall_api::UserPage, Error> {
        let request = Request::new("GET", "/api/v1/users").query(query.pairs());
        self.json(request)
    }

    /// Makes a user. Needs the right `user create`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn create_user(&self, body: &keepwall_api::NewUser) -> Result<Tagged<keepwall_api::UserView>, Error> {
        let request = Request::new("POST", "/api/v1/users").body(body).once();
        self.tagged(request)
    }

    /// Removes a user with their sessions and keys. Needs the right `user delete`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn delete_user(&self, name: &str, if_match: Option<u64>) -> Result<(), Error> {
        let request = Request::new("DELETE", format!("/api/v1/users/{}", segment(name))).once().if_match(if_match);
        self.nothing(request)
    }

    /// One user. Needs the right `user read`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn get_user(&self, name: &str) -> Result<Tagged<keepwall_api::UserView>, Error> {
        let request = Request::new("GET", format!("/api/v1/users/{}", segment(name)));
        self.tagged(request)
    }

    /// Changes password, bindings or state of a user. Needs the right `user change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn change_user(
        &self,
        name: &str,
        body: &keepwall_api::UserChange,
        if_match: Option<u64>,
    ) -> Result<Tagged<keepwall_api::UserView>, Error> {
        let request =
            Request::new("PATCH", format!("/api/v1/users/{}", segment(name))).body(body).once().if_match(if_match);
        self.tagged(request)
    }

    /// Ends all sessions of a user. Needs the right `user change`.
    ///
    /// # Errors
    /// The server refused, with a code; or it could not be reached.
    pub fn end_sessions(&self, name: &str) -> Result<(), Error> {
        let request = Request::new("DELETE", format!("/api/v1/users/{}/sessions", segment(name))).once();
        self.nothing(request)
    }
}
