//! Enrolment tokens: short-lived, counted, shown once.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use keepwall_api::fleet::{TokenMade, TokenSpec, TokenView};
use keepwall_store::{Commit, Expect, Generation, Op, Resource, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::instances::{check_labels, within};
use super::records::{TOKEN, TokenRecord};
use super::{Act, Fleet, FleetError, hex, hold, invalid, now_ms, rfc3339};
use crate::seal::random;

/// Kind of [`TokenUse`]: `et-…/0000`, one name for each use, so that none is used twice.
pub(super) const TOKEN_USE: &str = "token-use";
/// The most uses of a token.
const USES_MAX: u32 = 1_000;

/// One use of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TokenUse {
    pub(super) instance: String,
    pub(super) time_ms: u64,
}

/// The name of one use.
pub(super) fn slot_name(id: &str, slot: u32) -> String {
    format!("{id}/{slot:04}")
}

/// `et-…` and the secret's bytes, out of a token's secret word.
pub(super) fn parse_secret(word: &str) -> Option<(String, Vec<u8>)> {
    if word.len() > 200 {
        return None;
    }
    let (id, secret) = word.split_once('.')?;
    let secret = URL_SAFE_NO_PAD.decode(secret).ok()?;
    id.starts_with("et-").then(|| (id.to_owned(), secret))
}

/// All that a machine needs in one word: `kw1.`, and in base64 a line each: server, authority's digest, secret word,
/// and the pin of the server's key for `curl`.
fn word(server: &str, authority: &[u8; 32], secret: &str, pin: &str) -> String {
    format!("kw1.{}", URL_SAFE_NO_PAD.encode(format!("{server}\n{}\n{secret}\n{pin}", hex(authority))))
}

impl Fleet {
    /// Makes a token. Its secret is in the answer and nowhere else.
    ///
    /// # Errors
    /// Something asked for is out of range.
    pub async fn make_token(&self, spec: TokenSpec, act: &Act) -> Result<TokenMade, FleetError> {
        if !(60..=604_800).contains(&spec.ttl_s) {
            return Err(invalid("/ttl_s", "a token lives from 60 seconds to 7 days (604,800)"));
        }
        if !(1..=USES_MAX).contains(&spec.uses) {
            return Err(invalid("/uses", format!("a token lets in from 1 to {USES_MAX} machines")));
        }
        if let Some(name) = &spec.instance {
            keepwall_core::check_name(name).map_err(|error| invalid("/instance", error.to_string()))?;
            if spec.uses != 1 {
                return Err(invalid("/uses", "a token for one instance is used once"));
            }
        }
        check_labels(&spec.labels, "/labels")?;
        if spec.addresses_within.len() > 64 {
            return Err(invalid("/addresses_within", "at most 64 ranges"));
        }
        within(&spec.addresses_within).map_err(|why| invalid("/addresses_within", why))?;
        let id = format!("et-{}", hex(&random::<8>()));
        let secret = random::<32>();
        let expires_ms = now_ms() + u64::from(spec.ttl_s) * 1_000;
        let record =
            TokenRecord { secret_sha256: hex(&crate::ca::digest(&secret)), actor: act.actor.clone(), expires_ms, spec };
        let audit = vec![act.line(
            "create",
            &format!("token/{id}"),
            Value::Null,
            json!({ "spec": record.spec, "expires": rfc3339(expires_ms) }),
        )];
        let ops = vec![Op::put(TOKEN, &id, Expect::Absent, &record)];
        self.commit(Commit { ops, audit, remember: act.remember.clone() }).await?;
        let authority = self.authority.digest();
        let server = &self.settings.agents_public;
        let pin = &self.settings.public_key_pin;
        let token = word(server, &authority, &format!("{id}.{}", URL_SAFE_NO_PAD.encode(secret)), pin);
        let command = format!("keepwall enroll {token}");
        let install =
            format!("curl -fsS --insecure --pinnedpubkey '{pin}' https://{server}/install | sh -s -- {token}");
        let cloud_init = format!("#cloud-config\nruncmd:\n  - [ sh, -c, \"{}\" ]\n", install.replace('"', "\\\""));
        Ok(TokenMade { id, command, install, cloud_init, token, expires: rfc3339(expires_ms) })
    }

    pub(super) async fn token_record(&self, id: &str) -> Result<(Generation, TokenRecord), FleetError> {
        let found = self.store.get(TOKEN, id).await?;
        let found = found.ok_or_else(|| FleetError::NotFound(format!("there is no token `{id}`")))?;
        Ok((found.revision, found.read()?))
    }

    async fn token_uses(&self, id: &str) -> Result<Vec<(String, TokenUse)>, StoreError> {
        let prefix = format!("{id}/");
        let found = self.store.list(TOKEN_USE, Some(&prefix), USES_MAX as usize).await?;
        let mine = found.into_iter().take_while(|r| r.name.starts_with(&prefix));
        mine.map(|r| Ok((r.name.clone(), r.read()?))).collect()
    }

    /// True if a slot is left, as far as this server knows. They are counted once, and not for each of a thousand
    /// machines that come by one token.
    pub(super) async fn slot_left(&self, id: &str, uses: u32) -> Result<bool, StoreError> {
        /// More tokens than this in use at once start counting from the store again.
        const TOKENS_MAX: usize = 10_000;
        let known = hold(&self.token_slots).get(id).copied();
        if known.is_none_or(|next| next >= uses) {
            // A slot that was given out here and not used, since the store was away, is free again.
            let taken: BTreeSet<String> = self.token_uses(id).await?.into_iter().map(|(name, _)| name).collect();
            let Some(free) = (0..uses).find(|slot| !taken.contains(&slot_name(id, *slot))) else { return Ok(false) };
            let mut slots = hold(&self.token_slots);
            if slots.len() >= TOKENS_MAX {
                slots.clear();
            }
            let next = slots.entry(id.to_owned()).or_insert(free);
            // Somebody else may have counted meanwhile.
            *next = if *next < uses { (*next).max(free) } else { free };
        }
        Ok(true)
    }

    /// The next slot that nobody has taken, as far as this server knows; the store has the last word.
    pub(super) fn next_slot(&self, id: &str) -> u32 {
        let mut slots = hold(&self.token_slots);
        let next = slots.entry(id.to_owned()).or_default();
        *next += 1;
        *next - 1
    }

    pub(super) fn forget_slots(&self, id: &str) {
        hold(&self.token_slots).remove(id);
    }

    /// A server, perhaps another one, took a slot: `et-…/0000`.
    pub(super) fn slot_taken(&self, name: &str) {
        let Some((id, slot)) = name.split_once('/') else { return };
        if let (Ok(slot), Some(next)) = (slot.parse::<u32>(), hold(&self.token_slots).get_mut(id)) {
            *next = (*next).max(slot.saturating_add(1));
        }
    }

    async fn token_view(&self, resource: &Resource) -> Result<TokenView, FleetError> {
        let record: TokenRecord = resource.read()?;
        Ok(TokenView {
            id: resource.name.clone(),
            revision: resource.revision,
            spec: record.spec,
            actor: record.actor,
            expires: rfc3339(record.expires_ms),
            used_by: self.token_uses(&resource.name).await?.into_iter().map(|(_, used)| used.instance).collect(),
        })
    }

    /// Tokens by id.
    ///
    /// # Errors
    /// The store.
    pub async fn tokens(&self, after: Option<&str>, limit: usize) -> Result<Vec<TokenView>, FleetError> {
        let mut out = Vec::new();
        for resource in self.store.list(TOKEN, after, limit).await? {
            out.push(self.token_view(&resource).await?);
        }
        Ok(out)
    }

    /// One token.
    ///
    /// # Errors
    /// There is none of that id.
    pub async fn token(&self, id: &str) -> Result<TokenView, FleetError> {
        let found = self.store.get(TOKEN, id).await?;
        let found = found.ok_or_else(|| FleetError::NotFound(format!("there is no token `{id}`")))?;
        self.token_view(&found).await
    }

    /// Takes a token back. Machines that came by it stay.
    ///
    /// # Errors
    /// There is none of that id; somebody was faster.
    pub async fn delete_token(&self, id: &str, expect: Expect, act: &Act) -> Result<(), FleetError> {
        let view = self.token(id).await?;
        let expect = if expect == Expect::Any { Expect::Present } else { expect };
        let mut ops = vec![Op::delete(TOKEN, id, expect)];
        let used = self.token_uses(id).await?;
        ops.extend(used.iter().map(|(name, _)| Op::delete(TOKEN_USE, name, Expect::Any)));
        let audit = vec![act.line("delete", &format!("token/{id}"), json!({ "spec": view.spec }), Value::Null)];
        self.commit(Commit { ops, audit, remember: act.remember.clone() }).await?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_secret_word_is_taken_apart_and_nothing_else_is() {
        let (id, secret) = parse_secret("et-0011.AAEC").unwrap();
        assert_eq!((id.as_str(), secret.as_slice()), ("et-0011", &[0, 1, 2][..]));
        for wrong in ["", "et-1", "xx-1.AAEC", "et-1.!", &"e".repeat(300)] {
            assert!(parse_secret(wrong).is_none());
        }
    }
}
