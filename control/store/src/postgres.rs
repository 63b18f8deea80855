//! The store of several servers: PostgreSQL 15 or newer, in a schema `keepwall` of its own.
//!
//! Any server answers for all. Generations are given under one lock, leases by the database's clock, and word of
//! commits goes round by LISTEN and NOTIFY. When PostgreSQL is away, calls wait for it as long as [`PATIENCE`] and are
//! answered `Unavailable` then; it needs no restart of the server afterwards.
//!
//! Not here: backups, which PostgreSQL has tools for. After one was restored, say so by
//! [`PostgresStore::raise_epoch`], or agents take what they hear for old.

mod link;
mod schema;
mod tls;
mod writer;

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use ring::rand::SecureRandom;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tokio_postgres::Row as SqlRow;

use self::link::{Backoff, Link, Params, Target, transient};
use crate::limits::{self, signed, unsigned};
use crate::plan::{self, Answer, State};
use crate::queue::{Job, QUEUE_MAX};
use crate::rows::{self, Portion};
use crate::{
    AuditLine, Change, Commit, Committed, Filter, Generation, LEASE_MS_MAX, PAGE_MAX, Resource, Retention, Row, Store,
    StoreError, Stream,
};

/// How long a call waits for a PostgreSQL that is away: a restart takes a few seconds.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Connections that read. Two more write, one listens.
const READERS: usize = 4;
/// Word of a commit may get lost with a connection: after this long, who follows looks without.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Notifications that wait. Each says that there is something new, so one would do.
const TOLD_MAX: usize = 16;
/// Where servers tell each other of commits.
const CHANNEL: &str = "keepwall_commits";

/// What is declared and seen, in PostgreSQL.
pub struct PostgresStore {
    target: Target,
    audit_key: [u8; 32],
    commits: mpsc::Sender<Job>,
    rows: mpsc::Sender<Portion>,
    readers: Readers,
    changed: watch::Sender<Generation>,
    listener: tokio::task::JoinHandle<()>,
}

impl PostgresStore {
    /// Connects, and makes or updates the schema. `config` is a connection string, `host=… user=… dbname=…` or
    /// `postgresql://…`; `host=/run/postgresql` is a socket. Connections over a network are protected by TLS and the
    /// server's name is checked against the system's authorities or `sslrootcert`, unless `sslmode=disable` is said.
    ///
    /// # Errors
    /// PostgreSQL cannot be reached within [`PATIENCE`] or is older than 15 (`Unavailable`), the schema was written
    /// by a newer version (`Newer`), or its audit log with another key (`Damaged`).
    pub async fn connect(config: &str, audit_key: [u8; 32]) -> Result<PostgresStore, StoreError> {
        let target = Target::parse(config)?;
        let mut link = target.connect_until(Instant::now() + PATIENCE).await?;
        schema::migrate(&mut link, &audit_key).await?;
        let row = link.client.query_one(STATE, &[]).await?;
        let state = state_of(&row)?;
        state.head(&audit_key)?;

        let changed = watch::Sender::new(state.generation);
        let (commits, waiting_commits) = mpsc::channel(QUEUE_MAX);
        let (rows, waiting_rows) = mpsc::channel(rows::QUEUE_MAX);
        let writer = writer::Writer::new(target.clone(), audit_key, random_id()?, changed.clone());
        tokio::spawn(writer.run(waiting_commits));
        tokio::spawn(writer::rows(target.clone(), waiting_rows));
        let listener = tokio::spawn(listen(target.clone(), changed.clone()));
        let readers = Readers::new(target.clone(), link);
        Ok(PostgresStore { target, audit_key, commits, rows, readers, changed, listener })
    }

    /// Starts another epoch: for after a restore by PostgreSQL's own tools. The generation that the store counts on
    /// from; servers that run go on with it.
    ///
    /// # Errors
    /// PostgreSQL is away.
    pub async fn raise_epoch(&self) -> Result<Generation, StoreError> {
        let mut link = self.target.connect_until(Instant::now() + PATIENCE).await?;
        let transaction = link.client.transaction().await?;
        transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&schema::COMMIT_LOCK]).await?;
        let row = transaction
            .query_one(
                "SELECT generation, (extract(epoch FROM clock_timestamp()) * 1000)::bigint FROM keepwall.state",
                &[],
            )
            .await?;
        let generation = plan::next_epoch(number(&row, 0)?, number(&row, 1)?)?;
        let sql = "UPDATE keepwall.state SET generation = $1, changes_gone = $1";
        transaction.execute(sql, &[&signed(generation)]).await?;
        transaction.execute("SELECT pg_notify($1, $2)", &[&CHANNEL, &generation.to_string()]).await?;
        transaction.commit().await?;
        Ok(generation)
    }

    /// Puts a commit into the queue, or an empty write that shows whether one would go through.
    async fn send(&self, commit: Option<Commit>, bytes: usize) -> Result<Committed, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.commits.send(Job { commit, bytes, since: Instant::now(), answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

impl Drop for PostgresStore {
    fn drop(&mut self) {
        // The writers end by themselves when they have written what waits.
        self.listener.abort();
    }
}

const STATE: &str = "SELECT generation, changes, audit_number, audit_mac, audit_seal FROM keepwall.state";

fn state_of(row: &SqlRow) -> Result<State, StoreError> {
    Ok(State {
        generation: number(row, 0)?,
        changes: number(row, 1)?,
        audit_number: number(row, 2)?,
        audit_mac: row.try_get(3)?,
        audit_seal: row.try_get(4)?,
    })
}

fn number(row: &SqlRow, column: usize) -> Result<u64, StoreError> {
    unsigned(row.try_get(column)?)
}

fn digest(bytes: &[u8]) -> Result<[u8; 32], StoreError> {
    bytes.try_into().map_err(|_| StoreError::Damaged("a digest that is none".to_owned()))
}

fn gone() -> StoreError {
    StoreError::Unavailable("the server is shutting down".to_owned())
}

fn random_id() -> Result<String, StoreError> {
    let mut bytes = [0; 16];
    let random = ring::rand::SystemRandom::new();
    random.fill(&mut bytes).map_err(|_| StoreError::Unavailable("the system gives no random numbers".to_owned()))?;
    Ok(keepwall_core::hex(&bytes))
}

/// Wakes up who follows, if this is news.
fn mark(changed: &watch::Sender<Generation>, newest: Generation) {
    changed.send_if_modified(|generation| {
        let newer = newest > *generation;
        *generation = newest.max(*generation);
        newer
    });
}

/// Hears of the commits of all servers, for ever.
async fn listen(target: Target, changed: watch::Sender<Generation>) {
    let mut pause = Backoff::default();
    loop {
        match hear(&target, &changed, &mut pause).await {
            Ok(()) => {}
            Err(error) => tracing::warn!(%error, "no word of other servers' commits"),
        }
        pause.wait().await;
    }
}

/// Until the connection breaks.
async fn hear(target: &Target, changed: &watch::Sender<Generation>, pause: &mut Backoff) -> Result<(), StoreError> {
    let (tell, mut told) = mpsc::channel(TOLD_MAX);
    let link = target.connect(Some(tell)).await?;
    link.client.batch_execute(&format!("LISTEN {CHANNEL}")).await?;
    *pause = Backoff::default();
    loop {
        let look = async { number(&link.client.query_one("SELECT generation FROM keepwall.state", &[]).await?, 0) };
        let newest = tokio::time::timeout(LOOK_EVERY, look).await;
        let newest = newest.map_err(|_| StoreError::Unavailable("PostgreSQL does not answer".to_owned()))??;
        // Also without news: what the payload said may be behind what is there.
        changed.send_modify(|generation| *generation = newest.max(*generation));
        let next_look = Instant::now() + LOOK_EVERY;
        while let Ok(payload) = timeout_at(next_look, told.recv()).await {
            let Some(payload) = payload else { return Ok(()) };
            mark(changed, payload.parse().unwrap_or(0));
        }
    }
}

/// Connections that are used one task at a time.
struct Readers {
    target: Target,
    free: Mutex<Vec<Link>>,
    permits: Semaphore,
}

impl Readers {
    fn new(target: Target, first: Link) -> Readers {
        Readers { target, free: Mutex::new(vec![first]), permits: Semaphore::new(READERS) }
    }

    /// Asks, again if the connection breaks: only for what may be done twice.
    async fn query(&self, sql: &str, params: Params<'_>) -> Result<Vec<SqlRow>, StoreError> {
        let deadline = Instant::now() + PATIENCE;
        let late = |_| StoreError::Unavailable("PostgreSQL does not answer".to_owned());
        let _permit = timeout_at(deadline, self.permits.acquire()).await.map_err(late)?.map_err(|_| gone())?;
        let mut pause = Backoff::default();
        loop {
            let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let link = match free {
                Some(link) => link,
                None => self.target.connect_until(deadline).await?,
            };
            // What is cut off here leaves its connection in the middle of an answer: it is dropped, not given back.
            match timeout_at(deadline, link.query(sql, params)).await.map_err(late)? {
                Ok(rows) => {
                    self.free.lock().unwrap_or_else(PoisonError::into_inner).push(link);
                    return Ok(rows);
                }
                Err(error) if transient(&error) && pause.until(deadline).await => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

const RESOURCE: &str = "kind, name, revision, created_ms, updated_ms, body";

fn resource(row: &SqlRow) -> Result<Resource, StoreError> {
    Ok(Resource {
        kind: row.try_get(0)?,
        name: row.try_get(1)?,
        revision: number(row, 2)?,
        created_ms: number(row, 3)?,
        updated_ms: number(row, 4)?,
        body: row.try_get(5)?,
    })
}

fn change(row: &SqlRow) -> Result<Change, StoreError> {
    Ok(Change { generation: number(row, 0)?, kind: row.try_get(1)?, name: row.try_get(2)?, deleted: row.try_get(3)? })
}

fn seen(row: &SqlRow) -> Result<Row, StoreError> {
    let severity: i16 = row.try_get(5)?;
    Ok(Row {
        id: number(row, 0)?,
        source: row.try_get(1)?,
        key: row.try_get(2)?,
        time_ms: number(row, 3)?,
        kind: row.try_get(4)?,
        severity: u8::try_from(severity).map_err(|_| StoreError::Damaged(format!("severity {severity}")))?,
        body: row.try_get(6)?,
    })
}

fn line(row: &SqlRow) -> Result<AuditLine, StoreError> {
    Ok(AuditLine { number: number(row, 0)?, time_ms: number(row, 1)?, entry: row.try_get(2)?, mac: row.try_get(3)? })
}

fn all<T>(rows: &[SqlRow], read: impl Fn(&SqlRow) -> Result<T, StoreError>) -> Result<Vec<T>, StoreError> {
    rows.iter().map(read).collect()
}

#[async_trait]
impl Store for PostgresStore {
    fn shared(&self) -> bool {
        true
    }

    async fn get(&self, kind: &str, name: &str) -> Result<Option<Resource>, StoreError> {
        let (kind, name) = (limits::asked("kind", kind)?, limits::asked("name", name)?);
        let sql = format!("SELECT {RESOURCE} FROM keepwall.resources WHERE kind = $1 AND name = $2");
        self.readers.query(&sql, &[&kind, &name]).await?.first().map(resource).transpose()
    }

    async fn list(&self, kind: &str, after: Option<&str>, limit: usize) -> Result<Vec<Resource>, StoreError> {
        let (kind, after) = (limits::asked("kind", kind)?, limits::asked("name", after.unwrap_or(""))?);
        let sql =
            format!("SELECT {RESOURCE} FROM keepwall.resources WHERE kind = $1 AND name > $2 ORDER BY name LIMIT $3");
        all(&self.readers.query(&sql, &[&kind, &after, &limits::page(limit)]).await?, resource)
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
        let versions = "WHERE kind = $1 AND name = $2 AND revision < $3";
        let sql = format!(
            "SELECT {RESOURCE} FROM keepwall.resources {versions}
             UNION ALL SELECT {RESOURCE} FROM keepwall.history {versions} ORDER BY revision DESC LIMIT $4"
        );
        all(&self.readers.query(&sql, &[&kind, &name, &before, &limits::page(limit)]).await?, resource)
    }

    async fn commit(&self, commit: Commit) -> Result<Committed, StoreError> {
        let bytes = limits::commit(&commit)?;
        self.send(Some(commit), bytes).await
    }

    async fn remembered(&self, scope: &str, key: &str, wanted: &[u8; 32]) -> Result<Option<String>, StoreError> {
        let (scope, key) = (limits::asked("scope", scope)?, limits::asked("idempotency key", key)?);
        let sql = "SELECT digest, answer FROM keepwall.remembered WHERE scope = $1 AND key = $2
                   AND expires_ms > (extract(epoch FROM clock_timestamp()) * 1000)::bigint";
        let rows = self.readers.query(sql, &[&scope, &key]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let answer = Answer { digest: digest(row.try_get(0)?)?, answer: Cow::Owned(row.try_get(1)?) };
        plan::same_request(&key, wanted, &answer).map(Some)
    }

    async fn generation(&self) -> Result<Generation, StoreError> {
        let rows = self.readers.query(STATE, &[]).await?;
        rows.first().map_or(Err(StoreError::Damaged("there is no state".to_owned())), |row| number(row, 0))
    }

    async fn changes(&self, after: Generation) -> Result<Vec<Change>, StoreError> {
        let sql = "SELECT generation, kind, name, deleted FROM keepwall.changes WHERE generation > $1
                   ORDER BY number LIMIT $2";
        let page = self.readers.query(sql, &[&signed(after), &(PAGE_MAX as i64 + 1)]).await?;
        let mut changes = all(&page, change)?;
        if let Some(split) = plan::split_commit(&mut changes) {
            let sql = "SELECT generation, kind, name, deleted FROM keepwall.changes WHERE generation = $1
                       ORDER BY number";
            changes = all(&self.readers.query(sql, &[&signed(split)]).await?, change)?;
        }
        // Last: what was forgotten while we read is seen here.
        let bounds = self.readers.query("SELECT generation, changes_gone FROM keepwall.state", &[]).await?;
        let row = bounds.first().ok_or_else(|| StoreError::Damaged("there is no state".to_owned()))?;
        plan::followable(after, number(row, 0)?, number(row, 1)?)?;
        Ok(changes)
    }

    fn changed(&self) -> watch::Receiver<Generation> {
        self.changed.subscribe()
    }

    async fn append(&self, stream: Stream, rows: Vec<Row>) -> Result<(), StoreError> {
        rows::append(&self.rows, stream, rows, gone).await
    }

    async fn rows(&self, stream: Stream, filter: &Filter) -> Result<Vec<Row>, StoreError> {
        let source = limits::asked("source", filter.source.as_deref().unwrap_or(""))?;
        let kind = limits::asked("kind", filter.kind.as_deref().unwrap_or(""))?;
        // PostgreSQL wants to see every parameter, also those that no condition is about.
        let sql = format!(
            "SELECT id, source, key, time_ms, kind, severity, body FROM keepwall.{}
             WHERE {} AND ($1::text IS NOT NULL AND $2::text IS NOT NULL) ORDER BY id DESC LIMIT $5",
            stream.as_str(),
            rows::conditions(filter, '$')
        );
        let (severity, before) = (i16::from(filter.severity_min), signed(filter.before.unwrap_or(u64::MAX)));
        let limit = limits::page(filter.limit);
        all(&self.readers.query(&sql, &[&source, &kind, &severity, &before, &limit]).await?, seen)
    }

    async fn trim(&self, stream: Stream, retention: Retention, now_ms: u64) -> Result<u64, StoreError> {
        let table = stream.as_str();
        let newest_beyond = format!("SELECT id FROM keepwall.{table} ORDER BY id DESC LIMIT 1 OFFSET $1");
        let beyond = self.readers.query(&newest_beyond, &[&signed(retention.rows_max)]).await?;
        let beyond: Option<i64> = beyond.first().map(|row| row.try_get(0)).transpose()?;
        let oldest = signed(now_ms.saturating_sub(retention.age_ms_max));
        let mut went = 0;
        for (condition, bound) in [("id <= $1", beyond), ("time_ms < $1", Some(oldest))] {
            let Some(bound) = bound else { continue };
            let sql = format!(
                "WITH gone AS (DELETE FROM keepwall.{table} WHERE id IN
                     (SELECT id FROM keepwall.{table} WHERE {condition} LIMIT $2) RETURNING 1)
                 SELECT count(*) FROM gone"
            );
            loop {
                let counted = self.readers.query(&sql, &[&bound, &rows::TRIM_MAX]).await?;
                let gone = counted.first().map(|row| number(row, 0)).transpose()?.unwrap_or(0);
                went += gone;
                if gone < rows::TRIM_MAX as u64 {
                    break;
                }
            }
        }
        Ok(went)
    }

    async fn audit(&self, from: u64, limit: usize) -> Result<Vec<AuditLine>, StoreError> {
        let sql = "SELECT number, time_ms, entry, mac FROM keepwall.audit WHERE number >= $1 ORDER BY number LIMIT $2";
        all(&self.readers.query(sql, &[&signed(from), &limits::page(limit)]).await?, line)
    }

    async fn audit_head(&self) -> Result<Option<(u64, String)>, StoreError> {
        let rows = self.readers.query(STATE, &[]).await?;
        let row = rows.first().ok_or_else(|| StoreError::Damaged("there is no state".to_owned()))?;
        state_of(row)?.head(&self.audit_key)
    }

    async fn lease(&self, name: &str, holder: &str, ttl_ms: u64) -> Result<bool, StoreError> {
        limits::name("name", name)?;
        limits::name("holder", holder)?;
        let sql = "INSERT INTO keepwall.leases AS l (name, holder, until)
                   VALUES ($1, $2, clock_timestamp() + $3 * interval '1 millisecond')
                   ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
                   WHERE l.holder = excluded.holder OR l.until <= clock_timestamp() RETURNING 1";
        let ttl = ttl_ms.min(LEASE_MS_MAX) as f64;
        Ok(!self.readers.query(sql, &[&name, &holder, &ttl]).await?.is_empty())
    }

    async fn release(&self, name: &str, holder: &str) -> Result<(), StoreError> {
        let (name, holder) = (limits::asked("name", name)?, limits::asked("holder", holder)?);
        let sql = "DELETE FROM keepwall.leases WHERE name = $1 AND holder = $2";
        self.readers.query(sql, &[&name, &holder]).await.map(drop)
    }

    async fn ready(&self) -> Result<(), StoreError> {
        self.send(None, 0).await.map(drop)
    }
}
