//! Every operation of the API: its path, the right that it needs, what goes in, what comes out.
//!
//! This list is the API. The server serves what is here, the OpenAPI document and the client are made from it, and
//! the tests try each of them without rights.

use keepwall_fleet::access::{Action, Resource};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::access::{
    KeyMade, KeyView, Login, Me, NewKey, NewServiceAccount, NewUser, OidcFinish, OidcStart, OidcStarted,
    PasswordChange, ServiceAccountChange, SessionMade, TotpCode, TotpEnrol, TotpMade, UserChange, UserView,
};
use crate::fleet::{
    Accepted, InstanceChange, InstanceView, PostureChange, PostureFile, PostureQuestion, PostureVersion, Report,
    RolloutView, TokenMade, TokenSpec, TokenView,
};
use crate::observe::{
    AuditPage, AuditVerdict, Explanations, InstancePage, KeyPage, ObservationPage, OperationView, PosturePage,
    ReachPage, RolloutPage, TokenPage, UserPage,
};
use crate::resources::{
    DeclaredInstancePage, DeclaredInstanceView, FilePage, FileText, GroupPage, GroupSpec, GroupView, InstanceSpec,
    PortListPage, PortListSpec, PortListView, PrefixListPage, PrefixListSpec, PrefixListView, ReturnChange, RuleEdit,
    RuleSpec,
};

/// The largest body that holds a posture.
pub const POSTURE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// The largest body otherwise.
pub const BODY_BYTES_MAX: usize = 256 * 1024;
/// The longest idempotency key.
pub const IDEMPOTENCY_KEY_MAX: usize = 128;
/// The largest page.
pub const PAGE_MAX: u64 = 500;
/// The page when nobody says how large.
pub const PAGE_DEFAULT: u64 = 100;

/// What one needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Nothing: it is how one gets credentials, or the document of the API.
    Public,
    /// Valid credentials: it is about oneself.
    Own,
    /// A role that may do this to that.
    To(Resource, Action),
}

/// A query parameter.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// What it may be.
    pub kind: ParamKind,
    /// True if the operation needs it.
    pub required: bool,
}

/// What a parameter may be.
#[derive(Clone, Copy, Debug)]
pub enum ParamKind {
    /// A text of at most so many characters.
    Text(u64),
    /// A number from, to.
    Number(u64, u64),
    /// One of these words.
    Word(&'static [&'static str]),
    /// True or false.
    Flag,
}

/// A body.
#[derive(Clone, Copy)]
pub struct Body {
    /// Its schema's name.
    pub name: fn() -> String,
    /// Its schema, and those that it refers to.
    pub schemas: fn() -> Vec<(String, RefOr<Schema>)>,
}

/// What comes out.
#[derive(Clone, Copy)]
pub enum Gives {
    /// Nothing.
    Nothing,
    /// JSON of this form.
    One(Body),
    /// JSON of a form that is not said here.
    Json,
    /// Server-sent events.
    Live,
}

/// Whether If-Match is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// It means nothing here.
    No,
    /// If it is there it must hold.
    May,
    /// It must be there.
    Must,
}

/// One operation.
#[derive(Clone, Copy)]
pub struct Operation {
    /// Its name, for the client.
    pub id: &'static str,
    /// In capitals.
    pub method: &'static str,
    /// Below [`crate::BASE`], with `{name}` for parameters.
    pub path: &'static str,
    /// What it does, in a sentence.
    pub doc: &'static str,
    /// What one needs.
    pub right: Right,
    /// Query parameters.
    pub query: &'static [Param],
    /// The body, if it takes one.
    pub body: Option<Body>,
    /// Bytes of a body at most.
    pub body_max: usize,
    /// The status when it went well.
    pub status: u16,
    /// What comes out.
    pub gives: Gives,
    /// Whether the answer has an ETag.
    pub etag: bool,
    /// Whether the answer has a Location.
    pub location: bool,
    /// Whether If-Match is looked at.
    pub if_match: Match,
    /// Whether attempts are throttled.
    pub throttled: bool,
    /// Whether Idempotency-Key is looked at.
    pub idempotent: bool,
}

pub(crate) fn body<T: ToSchema + PartialSchema>() -> Body {
    fn schemas<T: ToSchema + PartialSchema>() -> Vec<(String, RefOr<Schema>)> {
        let mut all = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut all);
        all
    }
    Body { name: || T::name().into_owned(), schemas: schemas::<T> }
}

impl Operation {
    fn new(method: &'static str, path: &'static str, id: &'static str, right: Right, doc: &'static str) -> Operation {
        Operation {
            id,
            method,
            path,
            doc,
            right,
            query: &[],
            body: None,
            body_max: BODY_BYTES_MAX,
            status: 204,
            gives: Gives::Nothing,
            etag: false,
            location: false,
            if_match: Match::No,
            throttled: false,
            idempotent: method != "GET" && right != Right::Public,
        }
    }

    fn takes<T: ToSchema + PartialSchema>(self) -> Operation {
        Operation { body: Some(body::<T>()), ..self }
    }

    fn gives<T: ToSchema + PartialSchema>(self) -> Operation {
        Operation { gives: Gives::One(body::<T>()), status: 200, ..self }
    }

    fn query(self, query: &'static [Param]) -> Operation {
        Operation { query, ..self }
    }

    fn created(self) -> Operation {
        Operation { status: 201, location: true, ..self }
    }

    fn etag(self) -> Operation {
        Operation { etag: true, ..self }
    }

    fn if_match(self, if_match: Match) -> Operation {
        Operation { if_match, ..self }
    }

    fn throttled(self) -> Operation {
        Operation { throttled: true, ..self }
    }

    /// A change of the posture: accepted, and an operation to follow.
    fn accepted(self) -> Operation {
        let if_match = if self.if_match == Match::Must { Match::Must } else { Match::May };
        Operation {
            status: 202,
            gives: Gives::One(body::<Accepted>()),
            location: true,
            body_max: POSTURE_BYTES_MAX,
            if_match,
            ..self
        }
    }

    /// The names in the path, in order.
    pub fn path_params(&self) -> impl Iterator<Item = &'static str> {
        self.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
    }

    /// True if it changes something.
    #[must_use]
    pub fn writes(&self) -> bool {
        self.method != "GET" && !matches!(self.id, "check_posture")
    }

    /// Every status that it answers with, in order.
    #[must_use]
    pub fn statuses(&self) -> Vec<u16> {
        let mut all = vec![self.status, 400, 431, 500, 503];
        if self.right != Right::Public || self.throttled {
            all.extend([401, 403]);
        }
        if self.path.contains('{') {
            all.push(404);
        }
        if self.writes() {
            all.extend([404, 409, 422]);
        }
        if self.body.is_some() {
            all.extend([413, 415, 422]);
        }
        if self.if_match != Match::No {
            all.push(412);
        }
        if self.if_match == Match::Must {
            all.push(428);
        }
        if self.throttled || matches!(self.gives, Gives::Live) {
            all.push(429);
        }
        if matches!(self.id, "explain" | "reach" | "list_instances") {
            all.push(422);
        }
        all.sort_unstable();
        all.dedup();
        all
    }
}

const CURSOR: Param =
    Param { name: "cursor", doc: "`next` of the page before.", kind: ParamKind::Text(1_024), required: false };
const LIMIT: Param =
    Param { name: "limit", doc: "Items of a page.", kind: ParamKind::Number(1, PAGE_MAX), required: false };
const LABELS: Param = Param {
    name: "labels",
    doc: "Only machines with these labels: `tier=web,site=a`.",
    kind: ParamKind::Text(4_096),
    required: false,
};
const SOURCE: Param =
    Param { name: "source", doc: "Only from this machine.", kind: ParamKind::Text(128), required: false };
const KIND: Param = Param { name: "kind", doc: "Only of this kind.", kind: ParamKind::Text(64), required: false };
const SEVERITY: Param = Param {
    name: "severity",
    doc: "At least this bad.",
    kind: ParamKind::Word(&["info", "low", "medium", "high", "critical"]),
    required: false,
};
const REASON: Param =
    Param { name: "reason", doc: "Why, for the history.", kind: ParamKind::Text(1_000), required: false };
const ALL: Param = Param {
    name: "all",
    doc: "Everybody's, not only one's own; needs the right to read keys.",
    kind: ParamKind::Flag,
    required: false,
};
const fn text(name: &'static str, doc: &'static str, required: bool) -> Param {
    Param { name, doc, kind: ParamKind::Text(256), required }
}

const PAGE: &[Param] = &[CURSOR, LIMIT];
const WHY: &[Param] = &[REASON];
const REACH: &[Param] = &[text("from", "Only from here.", false), text("to", "Only to here.", false), CURSOR, LIMIT];
const EXPLAIN: &[Param] = &[
    text("from", "An instance, instance/interface, or an address.", true),
    text("to", "An instance, instance/interface, or an address.", true),
    text("protocol", "`tcp` if nothing is said.", false),
    Param { name: "port", doc: "Destination port.", kind: ParamKind::Number(0, 65_535), required: false },
    Param { name: "source_port", doc: "Source port.", kind: ParamKind::Number(0, 65_535), required: false },
];

fn get(path: &'static str, id: &'static str, right: Right, doc: &'static str) -> Operation {
    Operation::new("GET", path, id, right, doc)
}
fn post(path: &'static str, id: &'static str, right: Right, doc: &'static str) -> Operation {
    Operation::new("POST", path, id, right, doc)
}
fn put(path: &'static str, id: &'static str, right: Right, doc: &'static str) -> Operation {
    Operation::new("PUT", path, id, right, doc)
}
fn patch(path: &'static str, id: &'static str, right: Right, doc: &'static str) -> Operation {
    Operation::new("PATCH", path, id, right, doc)
}
fn delete(path: &'static str, id: &'static str, right: Right, doc: &'static str) -> Operation {
    Operation::new("DELETE", path, id, right, doc)
}

/// All operations.
#[must_use]
#[rustfmt::skip]
pub fn operations() -> Vec<Operation> {
    use Action::{Change, Create, Delete, Read, Revoke};
    use Resource::{Audit, Event, Finding, Instance, Posture, Rollout, Token, User};
    use Right::{Own, Public, To};
    let mut all = vec![
        get("/openapi.json", "openapi", Public, "This document."),

        post("/session", "login", Public, "Opens a session.").takes::<Login>().gives::<SessionMade>().throttled(),
        get("/session", "me", Own, "Who asks, and what they may.").gives::<Me>(),
        delete("/session", "logout", Own, "Ends the session that asks."),
        post("/session/password", "change_password", Own, "Sets one's own password; all other sessions end.")
            .takes::<PasswordChange>().throttled(),
        post("/session/totp", "enrol_totp", Own, "Makes an authenticator's secret; it holds once a code was verified.")
            .takes::<TotpEnrol>().gives::<TotpMade>().throttled(),
        put("/session/totp", "verify_totp", Own, "Proves that the authenticator works; from now on a code is needed.")
            .takes::<TotpCode>().throttled(),
        post("/session/totp/remove", "remove_totp", Own, "Takes the authenticator away, with one last code.")
            .takes::<TotpCode>().throttled(),
        post("/oidc/start", "oidc_start", Public, "Begins a login at the identity provider.")
            .takes::<OidcStart>().gives::<OidcStarted>().throttled(),
        post("/oidc/finish", "oidc_finish", Public, "Ends a login at the identity provider: opens a session.")
            .takes::<OidcFinish>().gives::<SessionMade>().throttled(),

        get("/users", "list_users", To(User, Read), "People, by name.").query(PAGE).gives::<UserPage>(),
        post("/users", "create_user", To(User, Create), "Makes a user.").takes::<NewUser>().gives::<UserView>().created().etag(),
        get("/users/{name}", "get_user", To(User, Read), "One user.").gives::<UserView>().etag(),
        patch("/users/{name}", "change_user", To(User, Change), "Changes password, bindings or state of a user.")
            .takes::<UserChange>().gives::<UserView>().etag().if_match(Match::May),
        delete("/users/{name}", "delete_user", To(User, Delete), "Removes a user with their sessions and keys.").if_match(Match::May),
        delete("/users/{name}/sessions", "end_sessions", To(User, Change), "Ends all sessions of a user."),
        get("/service-accounts", "list_service_accounts", To(User, Read), "Service accounts, by name.").query(PAGE).gives::<UserPage>(),
        post("/service-accounts", "create_service_account", To(User, Create), "Makes a user that has only keys.")
            .takes::<NewServiceAccount>().gives::<UserView>().created().etag(),
        get("/service-accounts/{name}", "get_service_account", To(User, Read), "One service account.").gives::<UserView>().etag(),
        patch("/service-accounts/{name}", "change_service_account", To(User, Change), "Changes bindings or state of a service account.")
            .takes::<ServiceAccountChange>().gives::<UserView>().etag().if_match(Match::May),
        delete("/service-accounts/{name}", "delete_service_account", To(User, Delete), "Removes a service account with its keys.").if_match(Match::May),
        get("/api-keys", "list_api_keys", Own, "Keys, without their secrets.").query(&[ALL, CURSOR, LIMIT]).gives::<KeyPage>(),
        post("/api-keys", "create_api_key", Own, "Makes a key; its secret is shown this once.").takes::<NewKey>().gives::<KeyMade>().created(),
        get("/api-keys/{id}", "get_api_key", Own, "One key.").gives::<KeyView>().etag(),
        delete("/api-keys/{id}", "delete_api_key", Own, "Takes a key back, at once.").if_match(Match::May),

        get("/posture", "get_posture", To(Posture, Read), "What is declared for the whole fleet.").gives::<PostureVersion>().etag(),
        put("/posture", "put_posture", To(Posture, Change), "Declares all of it anew.").takes::<PostureChange>().if_match(Match::Must).accepted(),
        post("/posture/check", "check_posture", To(Posture, Read), "Says what a posture would mean, and changes nothing.")
            .takes::<PostureQuestion>().gives::<Report>(),
        get("/posture/history", "list_postures", To(Posture, Read), "Earlier postures, newest first, without files.").query(PAGE).gives::<PosturePage>(),
        get("/posture/history/{revision}", "get_posture_at", To(Posture, Read), "An earlier posture.").gives::<PostureVersion>().etag(),
        post("/posture/history/{revision}/return", "return_to_posture", To(Posture, Change), "Declares an earlier posture again.")
            .takes::<ReturnChange>().accepted(),
        get("/posture/files", "list_files", To(Posture, Read), "The posture's files.").query(PAGE).gives::<FilePage>().etag(),
        get("/posture/files/{name}", "get_file", To(Posture, Read), "One file. A slash in its name is written %2F.").gives::<PostureFile>().etag(),
        put("/posture/files/{name}", "put_file", To(Posture, Change), "Writes one file.").takes::<FileText>().accepted(),
        delete("/posture/files/{name}", "delete_file", To(Posture, Change), "Removes one file.").query(WHY).accepted(),

        get("/security-groups", "list_security_groups", To(Posture, Read), "Security groups, by name.").query(PAGE).gives::<GroupPage>().etag(),
        get("/security-groups/{name}", "get_security_group", To(Posture, Read), "One security group.").gives::<GroupView>().etag(),
        put("/security-groups/{name}", "put_security_group", To(Posture, Change), "Declares a security group in a file of its own.")
            .query(WHY).takes::<GroupSpec>().accepted(),
        delete("/security-groups/{name}", "delete_security_group", To(Posture, Change), "Removes a security group that has a file of its own.").query(WHY).accepted(),
        post("/security-groups/{name}/{direction}", "add_rule", To(Posture, Change), "Adds a rule, wherever the group stands; comments stay.")
            .query(WHY).takes::<RuleSpec>().accepted(),
        patch("/security-groups/{name}/{direction}/{index}", "change_rule", To(Posture, Change), "Changes the rule with this index, from 0.")
            .query(WHY).takes::<RuleEdit>().accepted(),
        delete("/security-groups/{name}/{direction}/{index}", "remove_rule", To(Posture, Change), "Removes the rule with this index, from 0.").query(WHY).accepted(),
        get("/prefix-lists", "list_prefix_lists", To(Posture, Read), "Prefix lists, by name.").query(PAGE).gives::<PrefixListPage>().etag(),
        get("/prefix-lists/{name}", "get_prefix_list", To(Posture, Read), "One prefix list.").gives::<PrefixListView>().etag(),
        put("/prefix-lists/{name}", "put_prefix_list", To(Posture, Change), "Declares a prefix list in a file of its own.")
            .query(WHY).takes::<PrefixListSpec>().accepted(),
        delete("/prefix-lists/{name}", "delete_prefix_list", To(Posture, Change), "Removes a prefix list that has a file of its own.").query(WHY).accepted(),
        get("/port-lists", "list_port_lists", To(Posture, Read), "Port lists, by name.").query(PAGE).gives::<PortListPage>().etag(),
        get("/port-lists/{name}", "get_port_list", To(Posture, Read), "One port list.").gives::<PortListView>().etag(),
        put("/port-lists/{name}", "put_port_list", To(Posture, Change), "Declares a port list in a file of its own.")
            .query(WHY).takes::<PortListSpec>().accepted(),
        delete("/port-lists/{name}", "delete_port_list", To(Posture, Change), "Removes a port list that has a file of its own.").query(WHY).accepted(),
        get("/posture/instances", "list_declared_instances", To(Posture, Read), "Instances that posture files declare.").query(PAGE).gives::<DeclaredInstancePage>().etag(),
        get("/posture/instances/{name}", "get_declared_instance", To(Posture, Read), "One declared instance.").gives::<DeclaredInstanceView>().etag(),
        put("/posture/instances/{name}", "put_declared_instance", To(Posture, Change), "Declares an instance in a file of its own.")
            .query(WHY).takes::<InstanceSpec>().accepted(),
        delete("/posture/instances/{name}", "delete_declared_instance", To(Posture, Change), "Removes a declared instance that has a file of its own.").query(WHY).accepted(),

        get("/instances", "list_instances", To(Instance, Read), "Machines, by name.").query(&[LABELS, CURSOR, LIMIT]).gives::<InstancePage>(),
        get("/instances/{name}", "get_instance", To(Instance, Read), "One machine, as declared and as it is.").gives::<InstanceView>().etag(),
        patch("/instances/{name}", "change_instance", To(Instance, Change), "Changes labels or interfaces of a machine that enrolled.")
            .takes::<InstanceChange>().gives::<InstanceView>().etag().if_match(Match::May),
        delete("/instances/{name}", "delete_instance", To(Instance, Delete), "Forgets a machine; its certificate is worth nothing from then on.").if_match(Match::May),
        post("/instances/{name}/revoke", "revoke_instance", To(Instance, Revoke), "Takes a machine's certificate away: it must enrol again."),
        get("/instances/{name}/intent", "get_intent", To(Instance, Read), "What the machine should enforce now."),
        get("/enrolment-tokens", "list_tokens", To(Token, Read), "Enrolment tokens, without their secrets.").query(PAGE).gives::<TokenPage>(),
        post("/enrolment-tokens", "create_token", To(Token, Create), "Makes an enrolment token; its secret is shown this once.")
            .takes::<TokenSpec>().gives::<TokenMade>().created(),
        get("/enrolment-tokens/{id}", "get_token", To(Token, Read), "One enrolment token.").gives::<TokenView>().etag(),
        delete("/enrolment-tokens/{id}", "delete_token", To(Token, Delete), "Takes an enrolment token back.").if_match(Match::May),
        get("/rollouts", "list_rollouts", To(Rollout, Read), "Changes on their way and those that ended, newest first.").query(PAGE).gives::<RolloutPage>(),
        get("/rollouts/{id}", "get_rollout", To(Rollout, Read), "One rollout, wave by wave.").gives::<RolloutView>().etag(),
        post("/rollouts/{id}/stop", "stop_rollout", To(Rollout, Change), "No further machine is told.").gives::<RolloutView>().etag(),
        post("/rollouts/{id}/resume", "resume_rollout", To(Rollout, Change), "A stopped rollout goes on.").gives::<RolloutView>().etag(),
        post("/rollouts/{id}/return", "return_rollout", To(Rollout, Change), "Machines go back to the state before.").gives::<RolloutView>().etag(),
        get("/operations/{id}", "get_operation", To(Rollout, Read), "How far a change is.").gives::<OperationView>(),

        get("/findings", "list_findings", To(Finding, Read), "What was concluded, newest first.")
            .query(&[SOURCE, KIND, SEVERITY, CURSOR, LIMIT]).gives::<ObservationPage>(),
        get("/events", "list_events", To(Event, Read), "What was seen, newest first.")
            .query(&[SOURCE, KIND, SEVERITY, CURSOR, LIMIT]).gives::<ObservationPage>(),
        get("/events/live", "live", To(Event, Read), "What happens now, as server-sent events; a comment now and then keeps the connection, `lagged` tells how many were missed.")
            .query(&[KIND]),
        get("/audit", "list_audit", To(Audit, Read), "Who did what, oldest first.").query(PAGE).gives::<AuditPage>(),
        get("/audit/verify", "verify_audit", To(Audit, Read), "Looks whether the audit log is as it was written.").gives::<AuditVerdict>(),
        get("/reach", "reach", To(Posture, Read), "Who reaches whom under the present posture.").query(REACH).gives::<ReachPage>(),
        get("/explain", "explain", To(Posture, Read), "Why a session is allowed or denied, by the present posture.").query(EXPLAIN),
    ];
    for one in &mut all {
        match one.id {
            "login" | "oidc_finish" => one.status = 201,
            "openapi" | "get_intent" => (one.status, one.gives) = (200, Gives::Json),
            "live" => (one.status, one.gives) = (200, Gives::Live),
            "explain" => (one.status, one.gives) = (200, Gives::One(body::<Explanations>())),
            "check_posture" => (one.body_max, one.idempotent) = (POSTURE_BYTES_MAX, false),
            _ => {}
        }
    }
    all
}

/// The operation of that name.
#[must_use]
pub fn operation(id: &str) -> Option<Operation> {
    operations().into_iter().find(|one| one.id == id)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::operations;

    #[test]
    fn each_operation_has_a_name_and_a_path_of_its_own() {
        let all = operations();
        let ids: BTreeSet<&str> = all.iter().map(|one| one.id).collect();
        let paths: BTreeSet<(&str, &str)> = all.iter().map(|one| (one.method, one.path)).collect();
        assert_eq!((ids.len(), paths.len()), (all.len(), all.len()));
    }
}
