//! People, service accounts, and those whom an identity provider vouches for.

use keepwall_api::{BindingBody, UserKind, UserView};
use keepwall_fleet::access::{BINDINGS_MAX, Binding};
use keepwall_store::{Expect, Op, PAGE_MAX, Resource, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::totp::StoredTotp;
use super::{Auth, AuthError, keys, password, totp};
use crate::fleet::{Act, rfc3339};

/// Users in the store.
pub const KIND: &str = "user";
/// Bytes of a name at most.
const NAME_MAX: usize = 64;
/// Labels of a scope at most.
const SCOPE_MAX: usize = 64;

/// A user as stored.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub(crate) kind: UserKind,
    /// PHC format. Service accounts and users of a provider have none.
    pub(crate) password: Option<String>,
    pub(crate) totp: Option<StoredTotp>,
    pub(crate) bindings: Vec<Binding>,
    pub(crate) disabled: bool,
    /// Sessions of another epoch have ended.
    pub(crate) epoch: u64,
}

/// What becomes of a user.
#[derive(Clone, Default)]
pub struct Change {
    /// A new password.
    pub password: Option<String>,
    /// New bindings.
    pub bindings: Option<Vec<Binding>>,
    /// Shut out or not.
    pub disabled: Option<bool>,
    /// Forget the authenticator.
    pub forget_totp: bool,
}

pub(crate) fn view(one: &Resource, stored: &Stored) -> UserView {
    UserView {
        name: one.name.clone(),
        revision: one.revision,
        kind: stored.kind,
        bindings: bodies(&stored.bindings),
        totp: stored.totp.as_ref().is_some_and(|totp| totp.verified),
        disabled: stored.disabled,
        created: rfc3339(one.created_ms),
    }
}

/// Bindings as the API writes them.
#[must_use]
pub fn bodies(bindings: &[Binding]) -> Vec<BindingBody> {
    bindings.iter().cloned().map(BindingBody::from).collect()
}

fn public(stored: &Stored) -> serde_json::Value {
    json!({
        "kind": stored.kind, "bindings": stored.bindings, "disabled": stored.disabled,
        "totp": stored.totp.as_ref().is_some_and(|totp| totp.verified),
    })
}

/// What is wrong with a user's name.
#[must_use]
pub fn name_complaint(name: &str) -> Option<String> {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.' | b'@');
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    (!first || name.len() > NAME_MAX || !name.bytes().all(good)).then(|| {
        format!("a user's name has 1 to {NAME_MAX} small letters, digits, - _ . @, and begins with a letter or digit")
    })
}

/// What is wrong with bindings.
#[must_use]
pub fn bindings_complaint(bindings: &[Binding]) -> Option<String> {
    if bindings.len() > BINDINGS_MAX {
        return Some(format!("{} bindings are more than {BINDINGS_MAX}", bindings.len()));
    }
    let word = |text: &String| {
        (1..=63).contains(&text.chars().count())
            && text.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
    };
    let bad = |binding: &&Binding| {
        binding.scope.len() > SCOPE_MAX || !binding.scope.iter().all(|(key, value)| word(key) && word(value))
    };
    bindings.iter().find(bad).map(|binding| {
        format!("the scope {:?} holds what is no label: 1-63 letters, digits, - _ . / each", binding.scope)
    })
}

impl Auth {
    pub(super) async fn stored_user(&self, name: &str) -> Result<Option<(Resource, Stored)>, StoreError> {
        if name_complaint(name).is_some() {
            return Ok(None);
        }
        let Some(one) = self.store.get(KIND, name).await? else { return Ok(None) };
        let stored = one.read()?;
        Ok(Some((one, stored)))
    }

    async fn user_of(&self, name: &str, service: bool) -> Result<(Resource, Stored), AuthError> {
        let found = self.stored_user(name).await?;
        found.filter(|(_, stored)| (stored.kind == UserKind::Service) == service).ok_or_else(|| {
            AuthError::NotFound(format!("there is no {} `{name}`", if service { "service account" } else { "user" }))
        })
    }

    /// True once anybody can log in: before, only the local root can.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn has_users(&self) -> Result<bool, StoreError> {
        Ok(!self.store.list(KIND, None, 1).await?.is_empty())
    }

    /// Makes a user with a password, or a service account without.
    ///
    /// # Errors
    /// Name, password or bindings are none, or the name is taken.
    pub async fn create_user(
        &self,
        name: &str,
        password: Option<&str>,
        bindings: Vec<Binding>,
        act: &Act,
    ) -> Result<UserView, AuthError> {
        if let Some(why) = name_complaint(name) {
            return Err(AuthError::Invalid("/name", why));
        }
        if let Some(why) = bindings_complaint(&bindings) {
            return Err(AuthError::Invalid("/bindings", why));
        }
        let (kind, hash) = match password {
            None => (UserKind::Service, None),
            Some(password) => {
                if let Some(why) = password::complaint(name, password) {
                    return Err(AuthError::Invalid("/password", why));
                }
                (UserKind::Person, Some(self.passwords.hash(password).await?))
            }
        };
        let stored = Stored { kind, password: hash, totp: None, bindings, disabled: false, epoch: 0 };
        let target = format!("user/{name}");
        let line = act.line("create", &target, json!(null), public(&stored));
        let ops = vec![Op::put(KIND, name, Expect::Absent, &stored)];
        match self.commit(act, ops, line, json!({ "read": name })).await {
            Ok(_) => self.user(name, kind == UserKind::Service).await,
            Err(AuthError::Store(StoreError::Conflict { .. })) => {
                Err(AuthError::Exists(format!("a user or service account `{name}` exists already")))
            }
            Err(other) => Err(other),
        }
    }

    /// One user, or one service account.
    ///
    /// # Errors
    /// There is none of that name.
    pub async fn user(&self, name: &str, service: bool) -> Result<UserView, AuthError> {
        let (one, stored) = self.user_of(name, service).await?;
        Ok(view(&one, &stored))
    }

    /// Users by name from behind `after`, or service accounts; and the name to go on behind.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn users(
        &self,
        after: Option<&str>,
        limit: usize,
        service: bool,
    ) -> Result<(Vec<UserView>, Option<String>), AuthError> {
        let mut out = Vec::new();
        let mut after = after.map(str::to_owned);
        loop {
            let page = self.store.list(KIND, after.as_deref(), PAGE_MAX).await?;
            for one in &page {
                let stored: Stored = one.read()?;
                if (stored.kind == UserKind::Service) == service {
                    if out.len() == limit {
                        return Ok((out, after));
                    }
                    out.push(view(one, &stored));
                }
                after = Some(one.name.clone());
            }
            if page.len() < PAGE_MAX {
                return Ok((out, None));
            }
        }
    }

    /// Changes a user or a service account.
    ///
    /// # Errors
    /// There is none of that name, it is not as expected, or the change makes no sense.
    pub async fn change_user(
        &self,
        name: &str,
        service: bool,
        change: Change,
        expect: Expect,
        act: &Act,
    ) -> Result<UserView, AuthError> {
        let (one, old) = self.user_of(name, service).await?;
        let expect = held(&one, expect)?;
        let mut new = old.clone();
        if let Some(password) = &change.password {
            if old.kind != UserKind::Person {
                return Err(AuthError::Invalid("/password", "only people have passwords here".into()));
            }
            if let Some(why) = password::complaint(name, password) {
                return Err(AuthError::Invalid("/password", why));
            }
            new.password = Some(self.passwords.hash(password).await?);
            new.epoch += 1;
        }
        if let Some(bindings) = change.bindings {
            if let Some(why) = bindings_complaint(&bindings) {
                return Err(AuthError::Invalid("/bindings", why));
            }
            new.bindings = bindings;
        }
        if let Some(disabled) = change.disabled {
            new.disabled = disabled;
        }
        if change.forget_totp {
            new.totp = None;
        }
        let mut after = public(&new);
        if change.password.is_some() {
            after["password"] = json!("(changed)");
        }
        let line = act.line("change", &format!("user/{name}"), public(&old), after);
        let ops = vec![Op::put(KIND, name, expect, &new)];
        self.commit(act, ops, line, json!({ "read": name })).await?;
        self.user(name, service).await
    }

    /// Removes a user or a service account with all keys; sessions are worth nothing without their user.
    ///
    /// # Errors
    /// There is none of that name, or it is not as expected.
    pub async fn delete_user(&self, name: &str, service: bool, expect: Expect, act: &Act) -> Result<(), AuthError> {
        let (one, old) = self.user_of(name, service).await?;
        let mut ops = vec![Op::delete(KIND, name, held(&one, expect)?)];
        for key in self.keys_of(name).await? {
            ops.push(Op::delete(keys::KIND, &key.id, Expect::Any));
        }
        for session in self.sessions_of(name).await? {
            ops.push(Op::delete(super::sessions::KIND, &session.name, Expect::Any));
        }
        let line = act.line("delete", &format!("user/{name}"), public(&old), json!(null));
        self.commit(act, ops, line, json!(null)).await.map(drop)
    }

    /// Sets one's own password; all sessions end.
    ///
    /// # Errors
    /// The present one is wrong, the new one is none, or it was tried too often.
    pub async fn change_password(&self, name: &str, current: &str, new: &str, act: &Act) -> Result<(), AuthError> {
        let (one, old) = self.verified(name, current, act).await?;
        if let Some(why) = password::complaint(name, new) {
            return Err(AuthError::Invalid("/new", why));
        }
        let hash = Some(self.passwords.hash(new).await?);
        let stored = Stored { password: hash, epoch: old.epoch + 1, ..old };
        let note = json!({ "password": "(changed)" });
        let line = act.line("change", &format!("user/{name}"), json!(null), note);
        let ops = vec![Op::put(KIND, name, Expect::Revision(one.revision), &stored)];
        self.commit(act, ops, line, json!(null)).await.map(drop)
    }

    /// Begins to set up an authenticator: its secret and its link.
    ///
    /// # Errors
    /// The password is wrong, there is one already, or it was tried too often.
    pub async fn enrol_totp(&self, name: &str, password: &str, act: &Act) -> Result<(String, String), AuthError> {
        let (one, old) = self.verified(name, password, act).await?;
        if old.totp.as_ref().is_some_and(|totp| totp.verified) {
            return Err(AuthError::Wrong("there is an authenticator already; remove it first".into()));
        }
        let (stored, secret, url) = totp::enrol(&self.seal, name);
        let new = Stored { totp: Some(stored), ..old };
        let note = json!({ "totp": "(being set up)" });
        let line = act.line("change", &format!("user/{name}"), json!(null), note);
        let ops = vec![Op::put(KIND, name, Expect::Revision(one.revision), &new)];
        self.commit(act, ops, line, json!({ "body": { "secret": secret, "url": url } })).await?;
        Ok((secret, url))
    }

    /// Ends setting up an authenticator, or takes it away: either needs one of its codes.
    ///
    /// # Errors
    /// There is none, the code is wrong or was used, or it was tried too often.
    pub async fn settle_totp(&self, name: &str, code: &str, keep: bool, act: &Act) -> Result<(), AuthError> {
        self.throttle.attempt(name, &act.address, self.now_ms()).map_err(AuthError::Throttled)?;
        let found = self.stored_user(name).await?;
        let Some((one, mut stored)) = found else { return Err(AuthError::Wrong(NO_USER.into())) };
        let Some(present) = stored.totp.clone().filter(|totp| totp.verified != keep) else {
            let why = if keep { "there is no authenticator being set up" } else { "there is no authenticator" };
            return Err(AuthError::Wrong(why.into()));
        };
        let step = totp::check(&self.seal, name, &present, code, self.now_ms()).ok_or(AuthError::Failed)?;
        stored.totp = keep.then_some(StoredTotp { verified: true, last_step: step, ..present });
        let note = json!({ "totp": keep });
        let line = act.line("change", &format!("user/{name}"), json!({ "totp": !keep }), note);
        let ops = vec![Op::put(KIND, name, Expect::Revision(one.revision), &stored)];
        self.commit(act, ops, line, json!(null)).await?;
        self.throttle.succeeded(name, &act.address);
        Ok(())
    }

    /// Ends all sessions of a user.
    ///
    /// # Errors
    /// There is none of that name.
    pub async fn end_sessions(&self, name: &str, act: &Act) -> Result<(), AuthError> {
        let (one, old) = self.user_of(name, false).await?;
        let new = Stored { epoch: old.epoch + 1, ..old };
        let line = act.line("end sessions", &format!("user/{name}"), json!(null), json!(null));
        let ops = vec![Op::put(KIND, name, Expect::Revision(one.revision), &new)];
        self.commit(act, ops, line, json!(null)).await.map(drop)
    }

    /// The user, if the password is theirs.
    async fn verified(&self, name: &str, password: &str, act: &Act) -> Result<(Resource, Stored), AuthError> {
        self.throttle.attempt(name, &act.address, self.now_ms()).map_err(AuthError::Throttled)?;
        let Some((one, stored)) = self.stored_user(name).await? else { return Err(AuthError::Wrong(NO_USER.into())) };
        if stored.kind != UserKind::Person {
            return Err(AuthError::Wrong("only people who log in with a password have one".into()));
        }
        if !self.passwords.verify(stored.password.as_deref(), password).await? {
            return Err(AuthError::Failed);
        }
        self.throttle.succeeded(name, &act.address);
        Ok((one, stored))
    }
}

const NO_USER: &str = "these credentials have no user behind them";

/// What the store is to expect, if what is there is what the caller expects.
pub(super) fn held(one: &Resource, expect: Expect) -> Result<Expect, AuthError> {
    match expect {
        Expect::Revision(revision) if revision != one.revision => Err(AuthError::Store(StoreError::Conflict {
            kind: one.kind.clone(),
            name: one.name.clone(),
            actual: Some(one.revision),
        })),
        _ => Ok(Expect::Revision(one.revision)),
    }
}
