//! Sessions: a random token, of which the store holds a hash.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use keepwall_api::{Secret, SessionMade, UserKind};
use keepwall_store::{Commit, Expect, Op, Resource, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::users::{self, Stored};
use super::{Auth, AuthError, Credential, Principal, hash, totp};
use crate::fleet::{Act, rfc3339};
use crate::seal::random;

/// Sessions in the store: `user/hash`.
pub const KIND: &str = "session";
/// How a session's token begins.
pub const PREFIX: &str = "kws_";
/// A user's open sessions; one more ends the one that was used longest ago.
const PER_USER_MAX: usize = 20;
/// Use is written down at most this often, milliseconds: reading must not turn into writing.
pub(super) const TOUCH_MS: u64 = 60_000;

/// A session as stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoredSession {
    expires_ms: u64,
    used_ms: u64,
    epoch: u64,
}

/// Where a session stands in the store.
pub(super) struct Open {
    pub(super) name: String,
    used_ms: u64,
}

impl Auth {
    /// Opens a session for a name, a password, and a code if the user has an authenticator.
    ///
    /// # Errors
    /// One of them is wrong, or it was tried too often.
    pub async fn login(
        &self,
        name: &str,
        password: &str,
        code: Option<&str>,
        act: &Act,
    ) -> Result<SessionMade, AuthError> {
        let now = self.now_ms();
        // What cannot be a name counts by its address alone, or strangers choose what we remember.
        let counted = if users::name_complaint(name).is_none() { name } else { "" };
        self.throttle.attempt(counted, &act.address, now).map_err(AuthError::Throttled)?;
        let found = self.stored_user(name).await?;
        let hash = found.as_ref().and_then(|(_, stored)| stored.password.as_deref());
        let right = self.passwords.verify(hash, password).await?;
        let (one, mut stored) = found.filter(|_| right).ok_or(AuthError::Failed)?;
        if stored.disabled || stored.kind != UserKind::Person {
            return Err(AuthError::Failed);
        }
        let mut ops = Vec::new();
        if let Some(present) = stored.totp.as_mut().filter(|totp| totp.verified) {
            let code = code.ok_or(AuthError::Failed)?;
            let step = totp::check(&self.seal, name, present, code, now).ok_or(AuthError::Failed)?;
            present.last_step = step;
            // Two logins with one code: the second finds another revision, at whichever server.
            ops.push(Op::put(users::KIND, name, Expect::Revision(one.revision), &stored));
        }
        let made = self.open(name, &stored, ops, json!(null), act).await;
        let made = made.map_err(|error| match error {
            AuthError::Store(StoreError::Conflict { .. }) => AuthError::Failed,
            other => other,
        })?;
        self.throttle.succeeded(counted, &act.address);
        Ok(made)
    }

    /// Opens a session for somebody who has proved who they are, together with `ops`; `note` is for the audit log.
    pub(super) async fn open(
        &self,
        name: &str,
        stored: &Stored,
        mut ops: Vec<Op>,
        note: Value,
        act: &Act,
    ) -> Result<SessionMade, AuthError> {
        let now = self.now_ms();
        let mut open = self.sessions_of(name).await?;
        open.sort_by_key(|session| std::cmp::Reverse(session.used_ms));
        ops.extend(open.iter().skip(PER_USER_MAX - 1).map(|old| Op::delete(KIND, &old.name, Expect::Any)));
        let secret = URL_SAFE_NO_PAD.encode(random::<32>());
        let expires_ms = now + self.settings.session_max_s * 1_000;
        let session = StoredSession { expires_ms, used_ms: now, epoch: stored.epoch };
        ops.push(Op::put(KIND, &format!("{name}/{}", hash(&secret)), Expect::Absent, &session));
        let act = Act { actor: format!("user:{name}"), ..act.clone() };
        let line = act.line("login", &format!("user/{name}"), json!(null), note);
        self.commit(&act, ops, line, json!(null)).await?;
        let token = Secret(format!("{PREFIX}{}.{secret}", URL_SAFE_NO_PAD.encode(name)));
        Ok(SessionMade { token, user: name.to_owned(), expires: rfc3339(expires_ms) })
    }

    /// Ends one session.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn logout(&self, session: &str, act: &Act) -> Result<(), AuthError> {
        let user = session.split('/').next().unwrap_or_default();
        let line = act.line("logout", &format!("user/{user}"), json!(null), json!(null));
        self.commit(act, vec![Op::delete(KIND, session, Expect::Any)], line, json!(null)).await.map(drop)
    }

    pub(super) async fn sessions_of(&self, user: &str) -> Result<Vec<Open>, StoreError> {
        let prefix = format!("{user}/");
        // A user has few more than the most that may be open: those that expired since the last sweep.
        let page = self.store.list(KIND, Some(&prefix), keepwall_store::PAGE_MAX).await?;
        let own = page.into_iter().take_while(|one| one.name.starts_with(&prefix));
        own.map(|one| one.read::<StoredSession>().map(|s| Open { name: one.name, used_ms: s.used_ms })).collect()
    }

    /// Whom the rest of a session's token stands for.
    pub(super) async fn session_of(&self, rest: &str) -> Result<Option<Principal>, StoreError> {
        let Some((user, secret)) = rest.split_once('.') else { return Ok(None) };
        let user = URL_SAFE_NO_PAD.decode(user).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let Some(user) = user.filter(|user| users::name_complaint(user).is_none()) else { return Ok(None) };
        self.session_named(&format!("{user}/{}", hash(secret))).await
    }

    /// Whom a session stands for, by its name in the store.
    pub(super) async fn session_named(&self, name: &str) -> Result<Option<Principal>, StoreError> {
        let user = name.split('/').next().unwrap_or_default().to_owned();
        let Some(one) = self.store.get(KIND, name).await? else { return Ok(None) };
        let session: StoredSession = one.read()?;
        let now = self.now_ms();
        let idle_until = session.used_ms + self.settings.session_idle_s * 1_000;
        if now >= session.expires_ms || now >= idle_until {
            return Ok(None);
        }
        let Some((_, stored)) = self.stored_user(&user).await? else { return Ok(None) };
        if stored.disabled || stored.epoch != session.epoch {
            return Ok(None);
        }
        if now > session.used_ms + TOUCH_MS {
            self.touch(&one, &StoredSession { used_ms: now, ..session.clone() });
        }
        Ok(Some(Principal {
            actor: format!("user:{user}"),
            user,
            bindings: stored.bindings,
            narrowed: None,
            credential: Credential::Session(name.to_owned()),
            expires_ms: Some(session.expires_ms),
        }))
    }

    /// Writes down, beside the request, that something was used; if it is gone by now it stays gone.
    pub(super) fn touch<T: Serialize>(&self, one: &Resource, body: &T) {
        let op = Op::put(&one.kind, &one.name, Expect::Revision(one.revision), body);
        let store = std::sync::Arc::clone(&self.store);
        tokio::spawn(async move { store.commit(Commit { ops: vec![op], ..Commit::default() }).await.ok() });
    }
}
