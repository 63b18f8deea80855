//! The store of one server: two files, no other process.
//!
//! One thread writes what is declared: it takes all commits that wait, writes them in one transaction, waits once for
//! the disk, and then answers all. Rows go to a second file, `….observations`, by a thread of its own, so they share
//! nothing with commits but the disk.
//!
//! A backup holds what was declared, history and audit log; not the rows: they are bounded by retention, and a
//! machine's findings are found again. Copy the second file while the server stands still if you want them.

mod files;
mod schema;
mod writer;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row as SqlRow, params};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

pub use files::{Restored, copy, restore};

use crate::limits::{self, signed};
use crate::plan::{self, Answer, State};
use crate::queue::{Job, QUEUE_MAX};
use crate::rows::{self, Portion};
use crate::{
    AuditLine, Change, Commit, Committed, Filter, Generation, LEASE_MS_MAX, PAGE_MAX, Resource, Retention, Row, Store,
    StoreError, Stream,
};

/// Connections that read, of each file.
const READERS: usize = 4;
/// Leases that are remembered; the expired ones go first.
const LEASES_MAX: usize = 10_000;

/// What is declared and seen, in SQLite. Dropping it waits for what is being written.
pub struct SqliteStore {
    path: PathBuf,
    audit_key: [u8; 32],
    /// `None` only while it is dropped.
    commits: Option<mpsc::Sender<Job>>,
    rows: Option<mpsc::Sender<Portion>>,
    /// Removes rows; the one other writer of that file.
    trimmer: Arc<Readers>,
    readers: Arc<Readers>,
    row_readers: Arc<Readers>,
    changed: watch::Sender<Generation>,
    /// Nobody else has the files open, and who held a lease died with the process: so they need no table.
    leases: Mutex<HashMap<String, (String, Instant)>>,
    threads: Vec<JoinHandle<()>>,
    /// Last, so that it is let go when all else is closed.
    _lock: File,
}

impl SqliteStore {
    /// Opens the store at `path`, or makes one. Files that it makes are for their owner only.
    ///
    /// A store of an earlier version is brought up to this one, after a copy was made beside it.
    ///
    /// # Errors
    /// Another process has it open (`Unavailable`, and who), it was written by a newer version (`Newer`), it is no
    /// store or its audit log was written with another key (`Damaged`).
    pub fn open(path: &Path, audit_key: [u8; 32]) -> Result<SqliteStore, StoreError> {
        let lock = files::lock(path)?;
        let observations = files::observations(path);
        let mut main = files::open(path, &schema::MAIN)?;
        let mut second = files::open(&observations, &schema::OBSERVATIONS)?;
        let generation = first_state(&mut main, &audit_key)?.generation;

        let changed = watch::Sender::new(generation);
        let (commits, waiting_commits) = mpsc::channel(QUEUE_MAX);
        let (rows, waiting_rows) = mpsc::channel(rows::QUEUE_MAX);
        let marked = changed.clone();
        let threads = vec![
            thread("store", move || writer::commits(main, &audit_key, waiting_commits, &marked))?,
            thread("observations", move || writer::rows(&mut second, waiting_rows))?,
        ];
        Ok(SqliteStore {
            path: path.to_owned(),
            audit_key,
            commits: Some(commits),
            rows: Some(rows),
            trimmer: Readers::open(&observations, &schema::OBSERVATIONS, 1, false)?,
            readers: Readers::open(path, &schema::MAIN, READERS, true)?,
            row_readers: Readers::open(&observations, &schema::OBSERVATIONS, READERS, true)?,
            changed,
            leases: Mutex::new(HashMap::new()),
            threads,
            _lock: lock,
        })
    }

    /// Writes a copy of what is declared, as it is at this moment, while work goes on. It is whole and on the disk
    /// when this returns.
    ///
    /// # Errors
    /// `to` exists: a backup is never overwritten. Or it cannot be written.
    pub async fn backup(&self, to: &Path) -> Result<(), StoreError> {
        let (from, to) = (self.path.clone(), to.to_owned());
        blocking(move || files::copy(&from, &to)).await
    }

    /// Puts a commit into the queue, or an empty write that shows whether one would go through.
    async fn send(&self, commit: Option<Commit>, bytes: usize) -> Result<Committed, StoreError> {
        let (answer, answered) = oneshot::channel();
        let queue = self.commits.as_ref().ok_or_else(gone)?;
        queue.send(Job { commit, bytes, since: tokio::time::Instant::now(), answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.commits = None;
        self.rows = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the store ended badly");
            }
        }
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StoreError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|error| StoreError::Unavailable(format!("no thread for writing: {error}")))
}

/// The state, made if the store is new.
fn first_state(connection: &mut Connection, key: &[u8; 32]) -> Result<State, StoreError> {
    let new = State::new(key);
    connection
        .execute(
            "INSERT OR IGNORE INTO state (one, generation, changes, changes_gone, audit_number, audit_mac, audit_seal)
             VALUES (1, 0, 0, 0, 0, '', ?1)",
            [&new.audit_seal],
        )
        .map_err(said)?;
    let state = read_state(connection).map_err(said)?;
    state.head(key)?;
    Ok(state)
}

fn read_state(connection: &Connection) -> rusqlite::Result<State> {
    connection.prepare_cached("SELECT generation, changes, audit_number, audit_mac, audit_seal FROM state")?.query_row(
        [],
        |row| {
            Ok(State {
                generation: count(row, 0)?,
                changes: count(row, 1)?,
                audit_number: count(row, 2)?,
                audit_mac: row.get(3)?,
                audit_seal: row.get(4)?,
            })
        },
    )
}

fn count(row: &SqlRow, column: usize) -> rusqlite::Result<u64> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, number))
}

fn gone() -> StoreError {
    StoreError::Unavailable("its writer has ended; see the log, start the server again".to_owned())
}

/// What SQLite said, sorted by what it means.
fn said(error: rusqlite::Error) -> StoreError {
    use rusqlite::{Error, ErrorCode};
    match &error {
        Error::SqliteFailure(failure, _)
            if matches!(failure.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) =>
        {
            StoreError::Damaged(format!("{error}; restore a backup"))
        }
        Error::FromSqlConversionFailure(..)
        | Error::IntegralValueOutOfRange(..)
        | Error::InvalidColumnType(..)
        | Error::QueryReturnedNoRows => StoreError::Damaged(error.to_string()),
        _ => StoreError::Unavailable(error.to_string()),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(StoreError::Unavailable("the server is shutting down".to_owned())),
    }
}

/// Connections that are used one task at a time.
struct Readers {
    free: Mutex<Vec<Connection>>,
    permits: Arc<Semaphore>,
}

impl Readers {
    fn open(path: &Path, kind: &schema::Kind, count: usize, query_only: bool) -> Result<Arc<Readers>, StoreError> {
        let mut free = Vec::with_capacity(count);
        for _ in 0..count {
            let connection = files::connect(path, kind)?;
            connection.pragma_update(None, "query_only", query_only).map_err(said)?;
            free.push(connection);
        }
        Ok(Arc::new(Readers { free: Mutex::new(free), permits: Arc::new(Semaphore::new(count)) }))
    }

    /// The permit goes with the work, which goes on if nobody waits for it any more.
    async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| gone())?;
        let readers = Arc::clone(self);
        blocking(move || {
            let mut connection = readers.locked().pop().ok_or_else(gone)?;
            let result = work(&mut connection).map_err(said);
            readers.locked().push(connection);
            drop(permit);
            result
        })
        .await
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const RESOURCE: &str = "kind, name, revision, created_ms, updated_ms, body";

fn resource(row: &SqlRow) -> rusqlite::Result<Resource> {
    Ok(Resource {
        kind: row.get(0)?,
        name: row.get(1)?,
        revision: count(row, 2)?,
        created_ms: count(row, 3)?,
        updated_ms: count(row, 4)?,
        body: row.get(5)?,
    })
}

fn seen(row: &SqlRow) -> rusqlite::Result<Row> {
    Ok(Row {
        id: count(row, 0)?,
        source: row.get(1)?,
        key: row.get(2)?,
        time_ms: count(row, 3)?,
        kind: row.get(4)?,
        severity: row.get(5)?,
        body: row.get(6)?,
    })
}

fn collect<T>(
    connection: &Connection,
    sql: &str,
    params: impl rusqlite::Params,
    read: impl FnMut(&SqlRow) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    connection.prepare_cached(sql)?.query_map(params, read)?.collect()
}

fn answer_to(
    connection: &Connection,
    scope: &str,
    key: &str,
    now_ms: u64,
) -> rusqlite::Result<Option<Answer<'static>>> {
    connection
        .prepare_cached("SELECT digest, answer FROM remembered WHERE scope = ?1 AND key = ?2 AND expires_ms > ?3")?
        .query_row(params![scope, key, signed(now_ms)], |row| {
            Ok(Answer { digest: row.get(0)?, answer: Cow::Owned(row.get(1)?) })
        })
        .optional()
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[async_trait]
impl Store for SqliteStore {
    fn shared(&self) -> bool {
        false
    }

    async fn get(&self, kind: &str, name: &str) -> Result<Option<Resource>, StoreError> {
        let (kind, name) = (limits::asked("kind", kind)?, limits::asked("name", name)?);
        let sql = format!("SELECT {RESOURCE} FROM resources WHERE kind = ?1 AND name = ?2");
        self.readers.with(move |db| db.prepare_cached(&sql)?.query_row([kind, name], resource).optional()).await
    }

    async fn list(&self, kind: &str, after: Option<&str>, limit: usize) -> Result<Vec<Resource>, StoreError> {
        let (kind, after) = (limits::asked("kind", kind)?, limits::asked("name", after.unwrap_or(""))?);
        let sql = format!("SELECT {RESOURCE} FROM resources WHERE kind = ?1 AND name > ?2 ORDER BY name LIMIT ?3");
        self.readers.with(move |db| collect(db, &sql, params![kind, after, limits::page(limit)], resource)).await
    }

    async fn history(
        &self,
        kind: &str,
        name: &str,
        before: Option<Generation>,
        limit: usize,
    ) -> Result<Vec<Resource>, StoreError> {
        let (kind, name) = (limits::asked("kind", kind)?, limits::asked("name", name)?);
        let before = signed(before.unwrap_or(Generation::MAX));
        let versions = "WHERE kind = ?1 AND name = ?2 AND revision < ?3";
        let sql = format!(
            "SELECT {RESOURCE} FROM resources {versions} UNION ALL SELECT {RESOURCE} FROM history {versions}
             ORDER BY revision DESC LIMIT ?4"
        );
        self.readers.with(move |db| collect(db, &sql, params![kind, name, before, limits::page(limit)], resource)).await
    }

    async fn commit(&self, commit: Commit) -> Result<Committed, StoreError> {
        let bytes = limits::commit(&commit)?;
        self.send(Some(commit), bytes).await
    }

    async fn remembered(&self, scope: &str, key: &str, digest: &[u8; 32]) -> Result<Option<String>, StoreError> {
        let (scope, key) = (limits::asked("scope", scope)?, limits::asked("idempotency key", key)?);
        let asked = key.clone();
        let answer = self.readers.with(move |db| answer_to(db, &scope, &asked, now_ms())).await?;
        answer.map(|answer| plan::same_request(&key, digest, &answer)).transpose()
    }

    async fn generation(&self) -> Result<Generation, StoreError> {
        self.readers.with(|db| db.query_row("SELECT generation FROM state", [], |row| count(row, 0))).await
    }

    async fn changes(&self, after: Generation) -> Result<Vec<Change>, StoreError> {
        let change = |row: &SqlRow| {
            Ok(Change { generation: count(row, 0)?, kind: row.get(1)?, name: row.get(2)?, deleted: row.get(3)? })
        };
        let read = move |db: &mut Connection| {
            // In one transaction, so that nothing is forgotten between the two looks.
            let db = db.transaction()?;
            let bounds = "SELECT generation, changes_gone FROM state";
            let (newest, forgotten) = db.query_row(bounds, [], |row| Ok((count(row, 0)?, count(row, 1)?)))?;
            if let Err(error) = plan::followable(after, newest, forgotten) {
                return Ok(Err(error));
            }
            let sql = "SELECT generation, kind, name, deleted FROM changes WHERE generation > ?1
                       ORDER BY number LIMIT ?2";
            let mut changes = collect(&db, sql, params![signed(after), PAGE_MAX as i64 + 1], change)?;
            if let Some(split) = plan::split_commit(&mut changes) {
                let sql = "SELECT generation, kind, name, deleted FROM changes WHERE generation = ?1 ORDER BY number";
                changes = collect(&db, sql, [signed(split)], change)?;
            }
            Ok(Ok(changes))
        };
        self.readers.with(read).await?
    }

    fn changed(&self) -> watch::Receiver<Generation> {
        self.changed.subscribe()
    }

    async fn append(&self, stream: Stream, rows: Vec<Row>) -> Result<(), StoreError> {
        rows::append(self.rows.as_ref().ok_or_else(gone)?, stream, rows, gone).await
    }

    async fn rows(&self, stream: Stream, filter: &Filter) -> Result<Vec<Row>, StoreError> {
        let sql = format!(
            "SELECT id, source, key, time_ms, kind, severity, body FROM {} WHERE {} ORDER BY id DESC LIMIT ?5",
            stream.as_str(),
            rows::conditions(filter, '?')
        );
        let source = filter.source.as_deref().map(|source| limits::asked("source", source)).transpose()?;
        let kind = filter.kind.as_deref().map(|kind| limits::asked("kind", kind)).transpose()?;
        let (severity, before) = (filter.severity_min, signed(filter.before.unwrap_or(u64::MAX)));
        let limit = limits::page(filter.limit);
        self.row_readers.with(move |db| collect(db, &sql, params![source, kind, severity, before, limit], seen)).await
    }

    async fn trim(&self, stream: Stream, retention: Retention, now_ms: u64) -> Result<u64, StoreError> {
        let table = stream.as_str();
        let newest_beyond = format!("SELECT id FROM {table} ORDER BY id DESC LIMIT 1 OFFSET ?1");
        let offset = signed(retention.rows_max);
        let beyond =
            self.row_readers.with(move |db| db.query_row(&newest_beyond, [offset], |row| row.get(0)).optional());
        let beyond: Option<i64> = beyond.await?;
        let doomed =
            [("id <= ?1", beyond), ("time_ms < ?1", Some(signed(now_ms.saturating_sub(retention.age_ms_max))))];
        let mut went = 0;
        for (condition, bound) in doomed {
            let Some(bound) = bound else { continue };
            let sql = format!("DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE {condition} LIMIT ?2)");
            loop {
                let sql = sql.clone();
                let gone = self
                    .trimmer
                    .with(move |db| db.prepare_cached(&sql)?.execute(params![bound, rows::TRIM_MAX]))
                    .await?;
                went += gone as u64;
                if (gone as i64) < rows::TRIM_MAX {
                    break;
                }
            }
        }
        Ok(went)
    }

    async fn audit(&self, from: u64, limit: usize) -> Result<Vec<AuditLine>, StoreError> {
        let line = |row: &SqlRow| {
            Ok(AuditLine { number: count(row, 0)?, time_ms: count(row, 1)?, entry: row.get(2)?, mac: row.get(3)? })
        };
        let sql = "SELECT number, time_ms, entry, mac FROM audit WHERE number >= ?1 ORDER BY number LIMIT ?2";
        self.readers.with(move |db| collect(db, sql, params![signed(from), limits::page(limit)], line)).await
    }

    async fn audit_head(&self) -> Result<Option<(u64, String)>, StoreError> {
        self.readers.with(|db| read_state(db)).await?.head(&self.audit_key)
    }

    async fn lease(&self, name: &str, holder: &str, ttl_ms: u64) -> Result<bool, StoreError> {
        limits::name("name", name)?;
        limits::name("holder", holder)?;
        let now = Instant::now();
        let until = now + Duration::from_millis(ttl_ms.min(LEASE_MS_MAX));
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if leases.len() >= LEASES_MAX {
            leases.retain(|_, (_, until)| *until > now);
        }
        match leases.get(name) {
            Some((other, until)) if other != holder && *until > now => return Ok(false),
            None if leases.len() >= LEASES_MAX => {
                return Err(StoreError::TooLarge(format!("more than {LEASES_MAX} leases")));
            }
            _ => {}
        }
        leases.insert(name.to_owned(), (holder.to_owned(), until));
        Ok(true)
    }

    async fn release(&self, name: &str, holder: &str) -> Result<(), StoreError> {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if leases.get(name).is_some_and(|(other, _)| other == holder) {
            leases.remove(name);
        }
        Ok(())
    }

    async fn ready(&self) -> Result<(), StoreError> {
        self.send(None, 0).await.map(drop)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests;
