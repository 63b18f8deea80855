//! The two threads that write.

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use tokio::sync::{mpsc, watch};

use super::{answer_to, count, now_ms, read_state, said};
use crate::limits::signed;
use crate::plan::{self, Known, Plan, Stamp, State, Version, Writes};
use crate::queue::{self, Job};
use crate::rows::{self, Portion};
use crate::{Commit, Committed, Generation, StoreError};

/// Expired answers that are removed with each batch.
const EXPIRED_MAX: i64 = 100;

/// Writes commits until nobody can send any more.
pub(super) fn commits(
    mut connection: Connection,
    key: &[u8; 32],
    mut queue: mpsc::Receiver<Job>,
    changed: &watch::Sender<Generation>,
) {
    while let Some(first) = queue.blocking_recv() {
        let batch = queue::gather(first, &mut queue);
        let result = together(&mut connection, key, &queue::commits(&batch)).map_err(said);
        let newest = result.as_ref().map_or(0, |(_, state)| state.generation);
        queue::answer(batch, result.map(|(answers, _)| answers));
        changed.send_if_modified(|generation| {
            let newer = newest > *generation;
            *generation = newest.max(*generation);
            newer
        });
    }
}

type Answers = Vec<Result<Committed, StoreError>>;

/// One transaction and one wait for the disk for all. An answer is only true once this has come back.
fn together(connection: &mut Connection, key: &[u8; 32], commits: &[&Commit]) -> rusqlite::Result<(Answers, State)> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let now_ms = now_ms();
    let state = read_state(&transaction)?;
    let known = known(&transaction, commits, now_ms)?;
    let Plan { answers, writes, state } = plan::plan(key, state, known, commits, now_ms);
    write(&transaction, &writes, now_ms)?;
    write_state(&transaction, &state)?;
    transaction.commit()?;
    Ok((answers, state))
}

fn known<'a>(db: &Transaction, commits: &[&'a Commit], now_ms: u64) -> rusqlite::Result<Known<'a>> {
    let mut known = Known::default();
    let mut stamp = db.prepare_cached("SELECT revision, created_ms FROM resources WHERE kind = ?1 AND name = ?2")?;
    for key in plan::keys(commits) {
        let found =
            stamp.query_row([key.0, key.1], |row| Ok(Stamp { revision: count(row, 0)?, created_ms: count(row, 1)? }));
        if let Some(found) = found.optional()? {
            known.resources.insert(key, found);
        }
    }
    for remember in commits.iter().filter_map(|commit| commit.remember.as_ref()) {
        if let Some(answer) = answer_to(db, &remember.scope, &remember.key, now_ms)? {
            known.remembered.insert((&remember.scope, &remember.key), answer);
        }
    }
    Ok(known)
}

fn write(db: &Transaction, writes: &Writes, now_ms: u64) -> rusqlite::Result<()> {
    let each = |sql: &str, keys: &[plan::Key]| -> rusqlite::Result<()> {
        let mut statement = db.prepare_cached(sql)?;
        keys.iter().try_for_each(|key| statement.execute([key.0, key.1]).map(drop))
    };
    each("DELETE FROM history WHERE kind = ?1 AND name = ?2", &writes.forget)?;
    each(
        "INSERT INTO history (kind, name, revision, created_ms, updated_ms, body)
         SELECT kind, name, revision, created_ms, updated_ms, body FROM resources WHERE kind = ?1 AND name = ?2",
        &writes.archive,
    )?;
    versions(
        db,
        "INSERT INTO history (kind, name, revision, created_ms, updated_ms, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        &writes.history,
    )?;
    let mut keep = db.prepare_cached(
        "DELETE FROM history WHERE kind = ?1 AND name = ?2 AND revision <=
             (SELECT revision FROM history WHERE kind = ?1 AND name = ?2 ORDER BY revision DESC LIMIT 1 OFFSET ?3)",
    )?;
    for ((kind, name), count) in &writes.keep {
        keep.execute(params![kind, name, count])?;
    }
    each("DELETE FROM resources WHERE kind = ?1 AND name = ?2", &writes.remove)?;
    versions(
        db,
        "INSERT INTO resources (kind, name, revision, created_ms, updated_ms, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (kind, name) DO UPDATE SET revision = excluded.revision, created_ms = excluded.created_ms,
             updated_ms = excluded.updated_ms, body = excluded.body",
        &writes.put,
    )?;
    let mut change =
        db.prepare_cached("INSERT INTO changes (number, generation, kind, name, deleted) VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for one in &writes.changes {
        change.execute(params![signed(one.number), signed(one.generation), one.key.0, one.key.1, one.deleted])?;
    }
    if let Some(number) = writes.changes_gone {
        let number = signed(number);
        db.execute(
            "UPDATE state SET changes_gone =
                 max(changes_gone, coalesce((SELECT max(generation) FROM changes WHERE number <= ?1), 0))",
            [number],
        )?;
        db.execute("DELETE FROM changes WHERE number <= ?1", [number])?;
    }
    let mut line = db.prepare_cached("INSERT INTO audit (number, time_ms, entry, mac) VALUES (?1, ?2, ?3, ?4)")?;
    for (number, mac, entry) in &writes.audit {
        line.execute(params![signed(*number), signed(now_ms), entry, mac])?;
    }
    if writes.remember.is_empty() {
        return Ok(());
    }
    let mut remember = db.prepare_cached(
        "INSERT OR REPLACE INTO remembered (scope, key, digest, answer, expires_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?;
    for one in &writes.remember {
        remember.execute(params![one.scope, one.key, one.digest, one.answer, signed(one.expires_ms)])?;
    }
    db.prepare_cached(
        "DELETE FROM remembered WHERE rowid IN (SELECT rowid FROM remembered WHERE expires_ms <= ?1 LIMIT ?2)",
    )?
    .execute([signed(now_ms), EXPIRED_MAX])
    .map(drop)
}

fn versions(db: &Transaction, sql: &str, versions: &[Version]) -> rusqlite::Result<()> {
    let mut statement = db.prepare_cached(sql)?;
    versions.iter().try_for_each(|version| {
        let Version { kind, name, revision, created_ms, updated_ms, body } = version;
        statement
            .execute(params![kind, name, signed(*revision), signed(*created_ms), signed(*updated_ms), body])
            .map(drop)
    })
}

fn write_state(db: &Transaction, state: &State) -> rusqlite::Result<()> {
    let State { generation, changes, audit_number, audit_mac, audit_seal } = state;
    db.prepare_cached("UPDATE state SET generation=?1, changes=?2, audit_number=?3, audit_mac=?4, audit_seal=?5")?
        .execute(params![signed(*generation), signed(*changes), signed(*audit_number), audit_mac, audit_seal])
        .map(drop)
}

/// Writes rows until nobody can send any more.
pub(super) fn rows(connection: &mut Connection, mut queue: mpsc::Receiver<Portion>) {
    let mut left = None;
    while let Some(first) = left.take().or_else(|| queue.blocking_recv()) {
        let (portions, next) = rows::gather(first, &mut queue);
        left = next;
        let result = add(connection, &portions).map_err(said);
        for portion in portions {
            // Who went away sends the rows again, and they are passed over.
            let _ = portion.answer.send(result.clone());
        }
    }
}

fn add(connection: &mut Connection, portions: &[Portion]) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for portion in portions {
        let mut insert = transaction.prepare_cached(&format!(
            "INSERT INTO {} (source, key, time_ms, kind, severity, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (source, key) DO NOTHING",
            portion.stream.as_str()
        ))?;
        for row in &portion.rows {
            let time_ms = signed(row.time_ms);
            insert.execute(params![row.source, row.key, time_ms, row.kind, row.severity, row.body])?;
        }
    }
    transaction.commit()
}
