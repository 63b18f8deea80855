//! Sessions, users, service accounts and keys.

use keepwall_api::operations::Operation;
use keepwall_api::problem::{self, Problem};
use keepwall_api::{
    BindingBody, KeyPage, Login, Me, NewKey, NewServiceAccount, NewUser, OidcFinish, OidcStart, PasswordChange,
    ServiceAccountChange, TotpCode, TotpEnrol, TotpMade, UserChange, UserPage, UserView,
};
use keepwall_fleet::access::{Action, Binding, Resource, Target};
use serde::de::DeserializeOwned;

use super::answer::Answer;
use super::call::{Call, cursor};
use super::problems;
use crate::auth::users::{Change, bodies};
use crate::auth::{AuthError, Credential};
use crate::fleet::rfc3339;

/// An answer, or what became of the same request before.
async fn settle<T>(
    call: Call,
    made: Result<T, AuthError>,
    answer: impl FnOnce(&Operation, T) -> Answer,
) -> Result<Answer, Problem> {
    match made {
        Ok(made) => Ok(answer(&call.op, made)),
        Err(AuthError::Before(before)) => call.again(&before).await,
        // Without a revision in the request, somebody else was faster; with one, it is no longer so.
        Err(AuthError::Store(error)) => Err(problems::conflict(&call, error)),
        Err(error) => Err(problems::auth(error)),
    }
}

fn nothing<T>(_: &Operation, _: T) -> Answer {
    Answer::nothing()
}

fn user_answer(_: &Operation, view: UserView) -> Answer {
    Answer::json(&view).etag(view.revision)
}

fn made_answer(op: &Operation, view: UserView) -> Answer {
    Answer::json(&view).etag(view.revision).location(&format!("{}/{}", op.path, view.name))
}

fn bindings(bodies: Vec<BindingBody>) -> Vec<Binding> {
    bodies.into_iter().map(Binding::from).collect()
}

/// Characters of a name that the audit log keeps of a login that failed.
const TRIED_CHARS_MAX: usize = 64;

/// The name that a login is tried with: for the audit log, where a stranger's text is not to look like anything else.
pub(super) fn tried(call: &Call) -> Option<String> {
    let login: Login = (call.op.id == "login").then(|| call.body().ok())??;
    Some(login.user.chars().take(TRIED_CHARS_MAX).flat_map(char::escape_default).collect())
}

pub(super) async fn login(call: Call) -> Result<Answer, Problem> {
    let body: Login = call.body()?;
    let code = body.code.as_ref().map(|code| code.0.as_str());
    let made = call.app.auth.login(&body.user, &body.password.0, code, &call.act).await;
    settle(call, made, |_, made| Answer::json(&made)).await
}

pub(super) async fn me(call: Call) -> Result<Answer, Problem> {
    let who = call.who()?;
    let totp = match who.user.as_str() {
        "" => false,
        user => match call.app.auth.user(user, false).await {
            Ok(view) => view.totp,
            Err(AuthError::NotFound(_)) => false,
            Err(error) => return Err(problems::auth(error)),
        },
    };
    Ok(Answer::json(&Me {
        actor: who.actor.clone(),
        user: who.user.clone(),
        bindings: bodies(&who.bindings),
        narrowed: who.narrowed.as_deref().map(bodies),
        totp,
        expires: who.expires_ms.map(rfc3339),
    }))
}

pub(super) async fn logout(call: Call) -> Result<Answer, Problem> {
    let Credential::Session(session) = call.who()?.credential.clone() else {
        return Err(problem::WRONG_STATE.because("only a session can end; take a key back with DELETE /api-keys/ID"));
    };
    let made = call.app.auth.logout(&session, &call.act).await;
    settle(call, made, nothing).await
}

/// The user of a session: a key must not be able to lock its owner out.
fn person<T: DeserializeOwned>(call: &Call) -> Result<(&str, T), Problem> {
    let body = call.body()?;
    match call.who()?.credential {
        Credential::Key(_) => Err(problem::FORBIDDEN.because("a key cannot change how its owner logs in")),
        _ => Ok((call.user()?, body)),
    }
}

pub(super) async fn change_password(call: Call) -> Result<Answer, Problem> {
    let (user, body): (_, PasswordChange) = person(&call)?;
    let made = call.app.auth.change_password(user, &body.current.0, &body.new.0, &call.act).await;
    settle(call, made, nothing).await
}

pub(super) async fn enrol_totp(call: Call) -> Result<Answer, Problem> {
    let (user, body): (_, TotpEnrol) = person(&call)?;
    let made = call.app.auth.enrol_totp(user, &body.password.0, &call.act).await;
    let answer = |_: &Operation, (secret, url): (String, String)| {
        Answer::json(&TotpMade { secret: keepwall_api::Secret(secret), url: keepwall_api::Secret(url) })
    };
    settle(call, made, answer).await
}

pub(super) async fn verify_totp(call: Call) -> Result<Answer, Problem> {
    settle_totp(call, true).await
}

pub(super) async fn remove_totp(call: Call) -> Result<Answer, Problem> {
    settle_totp(call, false).await
}

async fn settle_totp(call: Call, keep: bool) -> Result<Answer, Problem> {
    let (user, body): (_, TotpCode) = person(&call)?;
    let made = call.app.auth.settle_totp(user, &body.code.0, keep, &call.act).await;
    settle(call, made, nothing).await
}

pub(super) async fn oidc_start(call: Call) -> Result<Answer, Problem> {
    let _: OidcStart = call.body()?;
    let made = call.app.auth.oidc_start(&call.act).await;
    settle(call, made, |_, made| Answer::json(&made)).await
}

pub(super) async fn oidc_finish(call: Call) -> Result<Answer, Problem> {
    let body: OidcFinish = call.body()?;
    let made = call.app.auth.oidc_finish(&body, &call.act).await;
    settle(call, made, |_, made| Answer::json(&made)).await
}

async fn list(call: Call, service: bool) -> Result<Answer, Problem> {
    let after = call.cursor()?;
    let page = call.app.auth.users(after.as_deref(), call.limit(), service).await;
    let (items, next) = page.map_err(problems::auth)?;
    Ok(Answer::json(&UserPage { items, next: next.map(cursor) }))
}

pub(super) async fn list_users(call: Call) -> Result<Answer, Problem> {
    list(call, false).await
}

pub(super) async fn list_service_accounts(call: Call) -> Result<Answer, Problem> {
    list(call, true).await
}

pub(super) async fn create_user(call: Call) -> Result<Answer, Problem> {
    let body: NewUser = call.body()?;
    let bindings = bindings(body.bindings);
    let made = call.app.auth.create_user(&body.name, Some(&body.password.0), bindings, &call.act).await;
    settle(call, made, made_answer).await
}

pub(super) async fn create_service_account(call: Call) -> Result<Answer, Problem> {
    let body: NewServiceAccount = call.body()?;
    let made = call.app.auth.create_user(&body.name, None, bindings(body.bindings), &call.act).await;
    settle(call, made, made_answer).await
}

pub(super) async fn get_user(call: Call) -> Result<Answer, Problem> {
    let found = call.app.auth.user(call.param("name"), false).await;
    settle(call, found, user_answer).await
}

pub(super) async fn get_service_account(call: Call) -> Result<Answer, Problem> {
    let found = call.app.auth.user(call.param("name"), true).await;
    settle(call, found, user_answer).await
}

pub(super) async fn change_user(call: Call) -> Result<Answer, Problem> {
    let body: UserChange = call.body()?;
    let change = Change {
        password: body.password.map(|password| password.0),
        bindings: body.bindings.map(bindings),
        disabled: body.disabled,
        forget_totp: body.forget_totp == Some(true),
    };
    let made = call.app.auth.change_user(call.param("name"), false, change, call.expect, &call.act).await;
    settle(call, made, user_answer).await
}

pub(super) async fn change_service_account(call: Call) -> Result<Answer, Problem> {
    let body: ServiceAccountChange = call.body()?;
    let change = Change { bindings: body.bindings.map(bindings), disabled: body.disabled, ..Change::default() };
    let made = call.app.auth.change_user(call.param("name"), true, change, call.expect, &call.act).await;
    settle(call, made, user_answer).await
}

pub(super) async fn delete_user(call: Call) -> Result<Answer, Problem> {
    let made = call.app.auth.delete_user(call.param("name"), false, call.expect, &call.act).await;
    settle(call, made, nothing).await
}

pub(super) async fn delete_service_account(call: Call) -> Result<Answer, Problem> {
    let made = call.app.auth.delete_user(call.param("name"), true, call.expect, &call.act).await;
    settle(call, made, nothing).await
}

pub(super) async fn end_sessions(call: Call) -> Result<Answer, Problem> {
    let made = call.app.auth.end_sessions(call.param("name"), &call.act).await;
    settle(call, made, nothing).await
}

pub(super) async fn list_keys(call: Call) -> Result<Answer, Problem> {
    // The local root has no keys of its own, so it is shown everybody's.
    let all = call.query("all") == Some("true") || call.who()?.user.is_empty();
    if all {
        call.allowed(Resource::Key, Action::Read, Target::Whole)?;
    }
    let owner = if all { None } else { Some(call.user()?) };
    let after = call.cursor()?;
    let page = call.app.auth.keys(owner, after.as_deref(), call.limit()).await;
    let (items, next) = page.map_err(problems::auth)?;
    Ok(Answer::json(&KeyPage { items, next: next.map(cursor) }))
}

pub(super) async fn create_key(call: Call) -> Result<Answer, Problem> {
    let body: NewKey = call.body()?;
    let who = call.who()?;
    let owner = match &body.owner {
        Some(owner) if *owner != who.user => {
            call.allowed(Resource::Key, Action::Create, Target::Whole)?;
            owner.clone()
        }
        _ => call.user()?.to_owned(),
    };
    if let Credential::Key(_) = who.credential {
        // Else a key that is about to be taken back, or one that may little, would make itself a better one.
        return Err(problem::FORBIDDEN.because("a key cannot make keys; log in, or ask on the local socket as root"));
    }
    let made = call.app.auth.create_key(&owner, body, &call.act).await;
    settle(call, made, |_, made| Answer::json(&made).location(&format!("/api-keys/{}", made.id))).await
}

/// Lets through who owns the key, or may do this to keys of others; to anybody else it does not exist.
async fn key_of(call: &Call, action: Action) -> Result<keepwall_api::KeyView, Problem> {
    let key = call.app.auth.key(call.param("id")).await.map_err(problems::auth)?;
    let own = !key.owner.is_empty() && key.owner == call.who()?.user;
    if own || call.allowed(Resource::Key, action, Target::Whole).is_ok() {
        return Ok(key);
    }
    Err(problem::NOT_FOUND.because(format!("there is no key `{}`", call.param("id"))))
}

pub(super) async fn get_key(call: Call) -> Result<Answer, Problem> {
    let key = key_of(&call, Action::Read).await?;
    Ok(Answer::json(&key).etag(key.revision))
}

pub(super) async fn delete_key(call: Call) -> Result<Answer, Problem> {
    key_of(&call, Action::Delete).await?;
    let made = call.app.auth.delete_key(call.param("id"), call.expect, &call.act).await;
    settle(call, made, nothing).await
}
