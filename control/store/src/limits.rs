//! What a caller may hand in. Both stores refuse the same, before anything is queued.

use crate::{
    BODY_BYTES_MAX, COMMIT_BYTES_MAX, Commit, NAME_BYTES_MAX, OPS_MAX, Op, PAGE_MAX, ROW_BYTES_MAX, Row, StoreError,
};

/// Names are keys of indexes and stand in lists and logs.
pub(crate) fn name(what: &str, name: &str) -> Result<(), StoreError> {
    if name.is_empty() {
        return Err(StoreError::TooLarge(format!("an empty {what}")));
    }
    optional_name(what, name)
}

/// A name that may be empty.
pub(crate) fn optional_name(what: &str, name: &str) -> Result<(), StoreError> {
    if name.len() > NAME_BYTES_MAX {
        return Err(StoreError::TooLarge(format!("a {what} of {} bytes; {NAME_BYTES_MAX} at most", name.len())));
    }
    no_nul(what, name)
}

/// A name that somebody looks for.
pub(crate) fn asked(what: &str, name: &str) -> Result<String, StoreError> {
    optional_name(what, name)?;
    Ok(name.to_owned())
}

/// PostgreSQL's text cannot hold it, and JSON does not need it.
fn no_nul(what: &str, text: &str) -> Result<(), StoreError> {
    if text.contains('\0') {
        return Err(StoreError::TooLarge(format!("a {what} with a NUL character")));
    }
    Ok(())
}

fn text(what: &str, text: &str, bytes_max: usize) -> Result<usize, StoreError> {
    if text.len() > bytes_max {
        return Err(StoreError::TooLarge(format!("a {what} of {} bytes; {bytes_max} at most", text.len())));
    }
    no_nul(what, text)?;
    Ok(text.len())
}

/// How many bytes the commit has, if they are not too many.
pub(crate) fn commit(commit: &Commit) -> Result<usize, StoreError> {
    if commit.ops.len() > OPS_MAX || commit.audit.len() > OPS_MAX {
        let more = commit.ops.len().max(commit.audit.len());
        return Err(StoreError::TooLarge(format!("a commit of {more} operations; {OPS_MAX} at most")));
    }
    let mut bytes = 0;
    for op in &commit.ops {
        let (kind, its_name, body) = match op {
            Op::Put { kind, name, body, .. } => (kind, name, body.as_str()),
            Op::Delete { kind, name, .. } => (kind, name, ""),
        };
        name("kind", kind)?;
        name("name", its_name)?;
        bytes += kind.len() + its_name.len() + text("body", body, BODY_BYTES_MAX)?;
    }
    for entry in &commit.audit {
        bytes += text("line for the audit log", entry, BODY_BYTES_MAX)?;
    }
    if let Some(remember) = &commit.remember {
        name("scope", &remember.scope)?;
        name("idempotency key", &remember.key)?;
        stored_number("expiry", remember.expires_ms)?;
        bytes += text("answer", &remember.answer, BODY_BYTES_MAX)?;
    }
    if bytes > COMMIT_BYTES_MAX {
        return Err(StoreError::TooLarge(format!("a commit of {bytes} bytes; {COMMIT_BYTES_MAX} at most")));
    }
    Ok(bytes)
}

pub(crate) fn row(row: &Row) -> Result<(), StoreError> {
    optional_name("source", &row.source)?;
    name("key", &row.key)?;
    name("kind", &row.kind)?;
    stored_number("time", row.time_ms)?;
    text("row", &row.body, ROW_BYTES_MAX - 3 * NAME_BYTES_MAX)?;
    Ok(())
}

fn stored_number(what: &str, number: u64) -> Result<(), StoreError> {
    i64::try_from(number).map(drop).map_err(|_| StoreError::TooLarge(format!("a {what} of {number}")))
}

/// How many to read.
pub(crate) fn page(limit: usize) -> i64 {
    limit.min(PAGE_MAX) as i64
}

/// As databases count. What is above never was written, so that to look for the largest finds what is right.
pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A number that we wrote, so it is not negative.
pub(crate) fn unsigned(number: i64) -> Result<u64, StoreError> {
    u64::try_from(number).map_err(|_| StoreError::Damaged(format!("a count of {number}")))
}
