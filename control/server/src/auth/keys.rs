//! API keys: `kwk_ID_SECRET`, shown once, of which the store holds a hash.

use keepwall_api::{KeyMade, KeyView, NewKey, Secret, UserKind};
use keepwall_fleet::access::Binding;
use keepwall_store::{Expect, Op, PAGE_MAX, Resource, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::json;
use subtle::ConstantTimeEq as _;

use super::sessions::TOUCH_MS;
use super::users::{bindings_complaint, bodies, held};
use super::{Auth, AuthError, Credential, Principal, hash};
use crate::fleet::{Act, hex, rfc3339};
use crate::seal::random;

/// Keys in the store.
pub const KIND: &str = "api-key";
/// How a key begins.
pub const PREFIX: &str = "kwk_";
/// Keys of one owner at most.
const PER_OWNER_MAX: usize = 100;
/// Characters of a note at most.
const NOTE_MAX: usize = 200;
/// How long a key lives unless somebody says otherwise, seconds: 90 days.
const TTL_S: u32 = 7_776_000;
/// How long a key may live, seconds: a minute to a year.
const TTL_S_RANGE: std::ops::RangeInclusive<u32> = 60..=31_536_000;

/// A key as stored.
#[derive(Clone, Serialize, Deserialize)]
struct StoredKey {
    owner: String,
    note: String,
    hash: String,
    bindings: Option<Vec<Binding>>,
    expires_ms: u64,
    used_ms: Option<u64>,
    /// The owner's creation: a later user of the same name does not inherit it.
    owner_created_ms: u64,
}

fn view(one: &Resource, stored: &StoredKey) -> KeyView {
    KeyView {
        id: one.name.clone(),
        revision: one.revision,
        owner: stored.owner.clone(),
        note: stored.note.clone(),
        bindings: stored.bindings.as_deref().map(bodies),
        created: rfc3339(one.created_ms),
        expires: rfc3339(stored.expires_ms),
        last_used: stored.used_ms.map(rfc3339),
    }
}

fn public(stored: &StoredKey) -> serde_json::Value {
    json!({
        "owner": stored.owner, "note": stored.note, "bindings": stored.bindings,
        "expires": rfc3339(stored.expires_ms),
    })
}

impl Auth {
    /// Makes a key for `owner`.
    ///
    /// # Errors
    /// There is no such owner, it has enough keys, or something in it is wrong.
    pub async fn create_key(&self, owner: &str, new: NewKey, act: &Act) -> Result<KeyMade, AuthError> {
        let ttl_s = new.ttl_s.unwrap_or(TTL_S);
        if !TTL_S_RANGE.contains(&ttl_s) {
            return Err(AuthError::Invalid("/ttl_s", "a key lives 60 to 31,536,000 seconds".into()));
        }
        if new.note.chars().count() > NOTE_MAX || new.note.chars().any(char::is_control) {
            return Err(AuthError::Invalid("/note", format!("a note has at most {NOTE_MAX} characters on one line")));
        }
        let bindings: Option<Vec<Binding>> = new.bindings.map(|all| all.into_iter().map(Binding::from).collect());
        if let Some(why) = bindings.as_deref().and_then(bindings_complaint) {
            return Err(AuthError::Invalid("/bindings", why));
        }
        let Some((user, _)) = self.stored_user(owner).await? else {
            return Err(AuthError::Invalid("/owner", format!("there is no user or service account `{owner}`")));
        };
        if self.keys_of(owner).await?.len() >= PER_OWNER_MAX {
            return Err(AuthError::Wrong(format!("`{owner}` has {PER_OWNER_MAX} keys; take one back first")));
        }
        let id = hex(&random::<8>());
        let secret = hex(&random::<32>());
        let stored = StoredKey {
            owner: owner.to_owned(),
            note: new.note,
            hash: hash(&secret),
            bindings,
            expires_ms: self.now_ms() + u64::from(ttl_s) * 1_000,
            used_ms: None,
            owner_created_ms: user.created_ms,
        };
        let key = Secret(format!("{PREFIX}{id}_{secret}"));
        let made = KeyMade { id: id.clone(), key, expires: rfc3339(stored.expires_ms) };
        let line = act.line("create", &format!("key/{id}"), json!(null), public(&stored));
        let ops = vec![Op::put(KIND, &id, Expect::Absent, &stored)];
        self.commit(act, ops, line, json!({ "body": made })).await?;
        Ok(made)
    }

    /// One key.
    ///
    /// # Errors
    /// There is none of that id.
    pub async fn key(&self, id: &str) -> Result<KeyView, AuthError> {
        let one = self.store.get(KIND, id).await?;
        let one = one.ok_or_else(|| AuthError::NotFound(format!("there is no key `{id}`")))?;
        Ok(view(&one, &one.read()?))
    }

    /// Keys by id from behind `after`; and the id to go on behind. Without `owner` everybody's.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn keys(
        &self,
        owner: Option<&str>,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<KeyView>, Option<String>), AuthError> {
        let mut out = Vec::new();
        let mut after = after.map(str::to_owned);
        loop {
            let page = self.store.list(KIND, after.as_deref(), PAGE_MAX).await?;
            for one in &page {
                let stored: StoredKey = one.read()?;
                if owner.is_none_or(|owner| owner == stored.owner) {
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

    pub(super) async fn keys_of(&self, owner: &str) -> Result<Vec<KeyView>, AuthError> {
        Ok(self.keys(Some(owner), None, usize::MAX).await?.0)
    }

    /// Takes a key back.
    ///
    /// # Errors
    /// There is none of that id, or it is not as expected.
    pub async fn delete_key(&self, id: &str, expect: Expect, act: &Act) -> Result<(), AuthError> {
        let one = self.store.get(KIND, id).await?;
        let one = one.ok_or_else(|| AuthError::NotFound(format!("there is no key `{id}`")))?;
        let stored: StoredKey = one.read()?;
        // Use is written down beside requests, so a key that is being used has another revision all the time.
        let expect = if expect == Expect::Any { Expect::Present } else { held(&one, expect)? };
        let line = act.line("delete", &format!("key/{id}"), public(&stored), json!(null));
        self.commit(act, vec![Op::delete(KIND, id, expect)], line, json!(null)).await.map(drop)
    }

    /// Whom the rest of a key stands for.
    pub(super) async fn key_of(&self, rest: &str) -> Result<Option<Principal>, StoreError> {
        let Some((id, secret)) = rest.split_once('_') else { return Ok(None) };
        if id.len() != 16 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(None);
        }
        self.key_with(id, Some(secret)).await
    }

    /// Whom a key stands for, if the secret is its own; without one, if it still stands for anybody.
    pub(super) async fn key_with(&self, id: &str, secret: Option<&str>) -> Result<Option<Principal>, StoreError> {
        let Some(one) = self.store.get(KIND, id).await? else { return Ok(None) };
        let stored: StoredKey = one.read()?;
        let now = self.now_ms();
        let other = |secret| !bool::from(hash(secret).as_bytes().ct_eq(stored.hash.as_bytes()));
        if secret.is_some_and(other) || now >= stored.expires_ms {
            return Ok(None);
        }
        let Some((user, owner)) = self.stored_user(&stored.owner).await? else { return Ok(None) };
        if owner.disabled || user.created_ms != stored.owner_created_ms {
            return Ok(None);
        }
        if stored.used_ms.is_none_or(|used| now > used + TOUCH_MS) {
            self.touch(&one, &StoredKey { used_ms: Some(now), ..stored.clone() });
        }
        let actor = match owner.kind {
            UserKind::Service => format!("service:{}/key:{id}", stored.owner),
            _ => format!("user:{}/key:{id}", stored.owner),
        };
        Ok(Some(Principal {
            actor,
            user: stored.owner,
            bindings: owner.bindings,
            narrowed: stored.bindings,
            credential: Credential::Key(id.to_owned()),
            expires_ms: Some(stored.expires_ms),
        }))
    }
}
