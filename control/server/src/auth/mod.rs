//! Who asks: passwords and codes, sessions, API keys, an identity provider, the local root.
//!
//! Whoever shows a credential becomes a [`Principal`]; what a principal may is decided in `keepwall_fleet::access`.
//! Of passwords, session tokens and keys only hashes are stored, of authenticators sealed secrets. A wrong name, a
//! wrong password and a wrong code are one answer that takes one time.
//!
//! Not here: certificates of agents. An agent is never a principal of the API.

pub mod keys;
pub mod oidc;
pub mod password;
pub mod sessions;
pub mod throttle;
pub mod totp;
pub mod users;

use std::fmt;
use std::sync::Arc;

use keepwall_fleet::access::{Action, Binding, Resource, Role, Target, Verdict, permits};
use keepwall_store::{Commit, Committed, Op, Store, StoreError};
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::fleet::{Act, hex};
use crate::seal::Seal;
use oidc::Oidc;
use password::Passwords;
use throttle::Throttle;

/// Milliseconds since 1970, now.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Knobs of authentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthSettings {
    /// A session that nobody used for so long ends, seconds, 60-86,400. Default 3,600.
    pub session_idle_s: u64,
    /// A session ends after this, however much it is used, seconds, 300-604,800. Default 43,200.
    pub session_max_s: u64,
    /// The identity provider, if there is one.
    pub oidc: Option<oidc::OidcConfig>,
}

impl Default for AuthSettings {
    fn default() -> AuthSettings {
        AuthSettings { session_idle_s: 3_600, session_max_s: 43_200, oidc: None }
    }
}

/// Which credential was shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A session: its name in the store.
    Session(String),
    /// An API key: its id.
    Key(String),
    /// The kernel's word that it is root on this machine.
    Local,
}

/// Who asks, and what they may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// `user:alice`, `key:3f…`, `local:root`.
    pub actor: String,
    /// The user or service account behind it; empty for `local:root`.
    pub user: String,
    /// What they may.
    pub bindings: Vec<Binding>,
    /// A key's own bindings: what is done must be permitted by both.
    pub narrowed: Option<Vec<Binding>>,
    /// What was shown.
    pub credential: Credential,
    /// When it ends, milliseconds since 1970.
    pub expires_ms: Option<u64>,
}

impl Principal {
    /// Whether they may do this.
    pub fn permits(&self, resource: Resource, action: Action, target: Target<'_>) -> Verdict {
        let verdict = permits(&self.bindings, resource, action, target);
        match &self.narrowed {
            Some(narrowed) if verdict.is_allow() => permits(narrowed, resource, action, target),
            _ => verdict,
        }
    }

    /// Root on this machine, as the kernel says who opened the local socket.
    #[must_use]
    pub fn local_root() -> Principal {
        Principal {
            actor: "local:root".into(),
            user: String::new(),
            bindings: vec![Binding::everywhere(Role::Admin)],
            narrowed: None,
            credential: Credential::Local,
            expires_ms: None,
        }
    }
}

/// Why something about credentials did not go through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthError {
    /// Name, password or code is wrong; which is not said.
    Failed,
    /// Wait so many seconds.
    Throttled(u64),
    /// Too many hash passwords already.
    Busy,
    /// A field of the request, and what is wrong with it.
    Invalid(&'static str, String),
    /// There is no such thing.
    NotFound(String),
    /// Not in this state.
    Wrong(String),
    /// The name is taken.
    Exists(String),
    /// The identity provider vouches for somebody who has no role here.
    NoRole(String),
    /// The identity provider does not answer as it should.
    Provider(String),
    /// The same request went through before; this was the answer.
    Before(String),
    /// The store said no.
    Store(StoreError),
}

impl From<StoreError> for AuthError {
    fn from(error: StoreError) -> AuthError {
        AuthError::Store(error)
    }
}

impl From<password::Busy> for AuthError {
    fn from(_: password::Busy) -> AuthError {
        AuthError::Busy
    }
}

/// Everything that knows who asks.
pub struct Auth {
    store: Arc<dyn Store>,
    seal: Arc<Seal>,
    settings: AuthSettings,
    passwords: Passwords,
    throttle: Throttle,
    oidc: Option<Oidc>,
    clock: Clock,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Auth {
    /// The seal encrypts authenticators' secrets and remembered answers.
    ///
    /// # Errors
    /// The identity provider's settings do not make sense, and why.
    pub fn new(store: Arc<dyn Store>, seal: Arc<Seal>, settings: AuthSettings, clock: Clock) -> Result<Auth, String> {
        let oidc = settings.oidc.clone().map(Oidc::new).transpose()?;
        Ok(Auth { store, seal, settings, passwords: Passwords::new(), throttle: Throttle::default(), oidc, clock })
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    /// What encrypts what has to be read again.
    #[must_use]
    pub fn seal(&self) -> &Seal {
        &self.seal
    }

    /// Whom a bearer token stands for; `None` if it stands for nobody (any more).
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn authenticate(&self, token: &str) -> Result<Option<Principal>, StoreError> {
        if let Some(rest) = token.strip_prefix(sessions::PREFIX) {
            return self.session_of(rest).await;
        }
        match token.strip_prefix(keys::PREFIX) {
            Some(rest) => self.key_of(rest).await,
            None => Ok(None),
        }
    }

    /// The same principal as they are now; `None` if they have been shut out since.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn again(&self, who: &Principal) -> Result<Option<Principal>, StoreError> {
        match &who.credential {
            Credential::Session(name) => self.session_named(name).await,
            Credential::Key(id) => self.key_with(id, None).await,
            Credential::Local => Ok(Some(who.clone())),
        }
    }

    /// Removes what has expired. Nothing depends on it but disk space; run it now and then.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn sweep(&self) -> Result<usize, StoreError> {
        let now = self.now_ms();
        let mut gone = 0;
        for kind in [sessions::KIND, keys::KIND, oidc::KIND] {
            let mut after: Option<String> = None;
            loop {
                let page = self.store.list(kind, after.as_deref(), keepwall_store::PAGE_MAX).await?;
                let Some(last) = page.last() else { break };
                after = Some(last.name.clone());
                let expired = page.iter().filter(|one| {
                    let body: Value = serde_json::from_str(&one.body).unwrap_or_default();
                    body["expires_ms"].as_u64().is_some_and(|until| until <= now)
                });
                let ops: Vec<Op> =
                    expired.map(|one| Op::delete(kind, &one.name, keepwall_store::Expect::Any)).collect();
                gone += ops.len();
                if !ops.is_empty() {
                    self.store.commit(Commit { ops, ..Commit::default() }).await?;
                }
            }
        }
        Ok(gone)
    }

    /// Ops, their line of the audit log, and the answer to remember, in one commit. `answer` is sealed: it may hold a
    /// secret that is shown once.
    async fn commit(&self, act: &Act, ops: Vec<Op>, line: String, answer: Value) -> Result<u64, AuthError> {
        let remember = act.remember.clone().map(|mut remember| {
            remember.answer = self.seal.seal(ANSWER, answer.to_string().as_bytes());
            remember
        });
        match self.store.commit(Commit { ops, audit: vec![line], remember }).await? {
            Committed::Now(revision) => Ok(revision),
            Committed::Before(answer) => Err(AuthError::Before(answer)),
        }
    }

    /// Writes only a line of the audit log: something was refused.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn note(&self, line: String) -> Result<(), StoreError> {
        self.store.commit(Commit { audit: vec![line], ..Commit::default() }).await.map(drop)
    }

    /// An answer that was remembered, as it was given.
    #[must_use]
    pub fn remembered(&self, answer: &str) -> Option<Value> {
        let plain = match self.seal.open(ANSWER, answer) {
            Ok(plain) => plain,
            // What the fleet remembers holds no secret of ours.
            Err(_) => answer.as_bytes().to_vec(),
        };
        serde_json::from_slice(&plain).ok()
    }
}

/// What remembered answers are sealed for.
const ANSWER: &str = "answer";

/// SHA-256 in hex: what is stored of a random secret, which no dictionary holds.
fn hash(secret: &str) -> String {
    hex(digest(&SHA256, secret.as_bytes()).as_ref())
}

#[cfg(test)]
mod tests;
