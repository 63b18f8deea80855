//! The two tasks that write.
//!
//! All servers of a database take one lock while they write commits, so generations have no gaps and readers see
//! them in order. Each batch leaves its number with the server's name in the same transaction. If the connection
//! breaks while it commits, the server connects again, takes the lock (then the transaction before is over, one way or
//! the other) and sees by that number what became of it: nothing is lost and nothing written twice.

use std::borrow::Cow;
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};
use tokio_postgres::types::ToSql;

use super::link::{Backoff, Link, Target, transient};
use super::schema::COMMIT_LOCK;
use super::{CHANNEL, PATIENCE, number, state_of};
use crate::limits::signed;
use crate::plan::{self, Answer, Key, Known, Plan, Stamp, State, Version, Writes};
use crate::queue::{self, Job};
use crate::rows::{self, Portion};
use crate::{Commit, Committed, Generation, StoreError};

/// A batch is tried for at least this long, however long its commits have waited.
const TRY_AT_LEAST: Duration = Duration::from_secs(1);

const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";
const LOCK: &str = "SELECT pg_advisory_xact_lock($1)";
const STATE: &str = "SELECT generation, changes, audit_number, audit_mac, audit_seal,
    (extract(epoch FROM clock_timestamp()) * 1000)::bigint FROM keepwall.state";
const WRITTEN: &str = "SELECT batch FROM keepwall.writers WHERE id = $1";
const STAMPS: &str = "SELECT k.ord, r.revision, r.created_ms FROM keepwall.resources r
    JOIN unnest($1::text[], $2::text[]) WITH ORDINALITY AS k(kind, name, ord) ON r.kind = k.kind AND r.name = k.name";
const REMEMBERED: &str = "SELECT k.ord, r.digest, r.answer FROM keepwall.remembered r
    JOIN unnest($1::text[], $2::text[]) WITH ORDINALITY AS k(scope, key, ord) ON r.scope = k.scope AND r.key = k.key
    WHERE r.expires_ms > $3";
const FORGET: &str = "DELETE FROM keepwall.history h USING unnest($1::text[], $2::text[]) AS k(kind, name)
    WHERE h.kind = k.kind AND h.name = k.name";
const ARCHIVE: &str = "INSERT INTO keepwall.history (kind, name, revision, created_ms, updated_ms, body)
    SELECT r.kind, r.name, r.revision, r.created_ms, r.updated_ms, r.body FROM keepwall.resources r
    JOIN unnest($1::text[], $2::text[]) AS k(kind, name) ON r.kind = k.kind AND r.name = k.name";
const HISTORY: &str = "INSERT INTO keepwall.history (kind, name, revision, created_ms, updated_ms, body)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[])";
const KEEP: &str = "DELETE FROM keepwall.history h
    USING unnest($1::text[], $2::text[], $3::bigint[]) AS k(kind, name, keep)
    WHERE h.kind = k.kind AND h.name = k.name AND h.revision <= (SELECT o.revision FROM keepwall.history o
        WHERE o.kind = k.kind AND o.name = k.name ORDER BY o.revision DESC LIMIT 1 OFFSET k.keep)";
const REMOVE: &str = "DELETE FROM keepwall.resources r USING unnest($1::text[], $2::text[]) AS k(kind, name)
    WHERE r.kind = k.kind AND r.name = k.name";
const PUT: &str = "INSERT INTO keepwall.resources (kind, name, revision, created_ms, updated_ms, body)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[])
    ON CONFLICT (kind, name) DO UPDATE SET revision = excluded.revision, created_ms = excluded.created_ms,
        updated_ms = excluded.updated_ms, body = excluded.body";
const CHANGES: &str = "INSERT INTO keepwall.changes (number, generation, kind, name, deleted)
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::boolean[])";
const CHANGES_GONE: &str = "WITH gone AS (DELETE FROM keepwall.changes WHERE number <= $1 RETURNING generation)
    UPDATE keepwall.state SET changes_gone = greatest(changes_gone, (SELECT max(generation) FROM gone))";
const AUDIT: &str = "INSERT INTO keepwall.audit (number, time_ms, entry, mac)
    SELECT number, $4, entry, mac FROM unnest($1::bigint[], $2::text[], $3::text[]) AS l(number, mac, entry)";
const REMEMBER: &str = "INSERT INTO keepwall.remembered (scope, key, digest, answer, expires_ms)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[], $4::text[], $5::bigint[])
    ON CONFLICT (scope, key) DO UPDATE SET digest = excluded.digest, answer = excluded.answer,
        expires_ms = excluded.expires_ms";
const EXPIRED: &str = "DELETE FROM keepwall.remembered WHERE (scope, key) IN
    (SELECT scope, key FROM keepwall.remembered WHERE expires_ms <= $1 LIMIT 100)";
const WRITE_STATE: &str = "WITH me AS (INSERT INTO keepwall.writers (id, batch, at) VALUES ($1, $2, now())
        ON CONFLICT (id) DO UPDATE SET batch = excluded.batch, at = excluded.at)
    UPDATE keepwall.state SET generation = $3, changes = $4, audit_number = $5, audit_mac = $6, audit_seal = $7";
const NOTIFY: &str = "SELECT pg_notify($1, $2)";
/// Servers that wrote nothing for this long are not in the middle of a commit.
const OLD_WRITERS: &str = "DELETE FROM keepwall.writers WHERE at < now() - interval '7 days' AND id <> $1";

/// All that is sent in a row without waiting in between: prepared when the connection is made, so that nothing is
/// asked in the middle and the order stays.
const PREPARED: &[&str] = &[
    LOCK,
    STATE,
    WRITTEN,
    STAMPS,
    REMEMBERED,
    FORGET,
    ARCHIVE,
    HISTORY,
    KEEP,
    REMOVE,
    PUT,
    CHANGES,
    CHANGES_GONE,
    AUDIT,
    REMEMBER,
    EXPIRED,
    WRITE_STATE,
    NOTIFY,
];

type Answers = Vec<Result<Committed, StoreError>>;

/// Why an attempt came to nothing.
struct Failure {
    /// Another attempt may well succeed.
    again: bool,
    error: StoreError,
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Failure {
        Failure { again: transient(&error), error: error.into() }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure { again: matches!(error, StoreError::Unavailable(_)), error }
    }
}

/// Writes commits.
pub(super) struct Writer {
    target: Target,
    audit_key: [u8; 32],
    /// This server's name among the writers: random, new with each start.
    id: String,
    batch: i64,
    link: Option<Link>,
    changed: watch::Sender<Generation>,
}

impl Writer {
    pub(super) fn new(target: Target, audit_key: [u8; 32], id: String, changed: watch::Sender<Generation>) -> Writer {
        Writer { target, audit_key, id, batch: 0, link: None, changed }
    }

    /// Until nobody can send any more.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(first) = queue.recv().await {
            let batch = queue::gather(first, &mut queue);
            match self.write(&batch).await {
                Ok(answers) => queue::answer(batch, Ok(answers)),
                // PostgreSQL refuses something in it, as when a disk quota is reached: the others need not suffer.
                Err(failure) if !failure.again && batch.len() > 1 => {
                    for job in batch {
                        let alone = vec![job];
                        let answers = self.write(&alone).await.map_err(|failure| failure.error);
                        queue::answer(alone, answers);
                    }
                }
                Err(failure) => queue::answer(batch, Err(failure.error)),
            }
        }
    }

    /// Attempts until it is clear what became of the batch, or the patience of its youngest commit is at its end.
    async fn write(&mut self, batch: &[Job]) -> Result<Answers, Failure> {
        let youngest = batch.iter().map(|job| job.since).max().unwrap_or_else(Instant::now);
        let deadline = (youngest + PATIENCE).max(Instant::now() + TRY_AT_LEAST);
        let commits = queue::commits(batch);
        let mut unsure = None;
        let mut pause = Backoff::default();
        self.batch += 1;
        loop {
            let failure = match timeout_at(deadline, self.attempt(&commits, &mut unsure)).await {
                Ok(Ok(answers)) => return Ok(answers),
                Ok(Err(failure)) => failure,
                Err(_) => StoreError::Unavailable("PostgreSQL does not answer".to_owned()).into(),
            };
            self.link = None;
            if failure.again && pause.until(deadline).await {
                continue;
            }
            return Err(match unsure {
                None => failure,
                Some(_) => StoreError::Unavailable(format!(
                    "the connection broke while the change was made durable; whether it was is not known: {}",
                    failure.error
                ))
                .into(),
            });
        }
    }

    /// `unsure` are the answers that hold if a transaction whose end nobody saw went through.
    async fn attempt(
        &mut self,
        commits: &[&Commit],
        unsure: &mut Option<(Answers, Generation)>,
    ) -> Result<Answers, Failure> {
        let link = match &mut self.link {
            Some(link) => link,
            empty => {
                let link = self.target.connect(None).await?;
                for sql in PREPARED {
                    link.statement(sql).await?;
                }
                link.execute(OLD_WRITERS, &[&self.id]).await?;
                empty.insert(link)
            }
        };
        let (begun, locked, state) =
            tokio::join!(link.client.batch_execute(BEGIN), link.query(LOCK, &[&COMMIT_LOCK]), link.query(STATE, &[]));
        begun?;
        locked?;
        let state = state?;
        let row = state.first().ok_or_else(|| StoreError::Damaged("there is no state".to_owned()))?;
        let now_ms = number(row, 5)?;

        if unsure.is_some() {
            let written = link.query(WRITTEN, &[&self.id]).await?;
            if written.first().map(|row| row.try_get::<_, i64>(0)).transpose()? == Some(self.batch)
                && let Some((answers, newest)) = unsure.take()
            {
                link.client.batch_execute("ROLLBACK").await?;
                super::mark(&self.changed, newest);
                return Ok(answers);
            }
            *unsure = None;
        }

        let known = known(link, commits, now_ms).await?;
        let before = state_of(row)?;
        let generation_before = before.generation;
        let Plan { answers, writes, state } = plan::plan(&self.audit_key, before, known, commits, now_ms);
        let mut sends = statements(&writes, now_ms);
        let State { generation, changes, audit_number, audit_mac, audit_seal } = state;
        sends.push((
            WRITE_STATE,
            vec![
                Box::new(self.id.as_str()),
                Box::new(self.batch),
                Box::new(signed(generation)),
                Box::new(signed(changes)),
                Box::new(signed(audit_number)),
                Box::new(audit_mac),
                Box::new(audit_seal),
            ],
        ));
        if generation != generation_before {
            sends.push((NOTIFY, vec![Box::new(CHANNEL), Box::new(generation.to_string())]));
        }
        let link = &*link;
        try_join_all(sends.iter().map(|(sql, params)| async move {
            let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|param| &**param as &(dyn ToSql + Sync)).collect();
            link.execute(sql, &params).await
        }))
        .await?;

        *unsure = Some((answers, generation));
        link.client.batch_execute("COMMIT").await?;
        super::mark(&self.changed, generation);
        Ok(unsure.take().map(|(answers, _)| answers).unwrap_or_default())
    }
}

async fn known<'a>(link: &Link, commits: &[&'a Commit], now_ms: u64) -> Result<Known<'a>, Failure> {
    let mut known = Known::default();
    let keys = plan::keys(commits);
    if !keys.is_empty() {
        let [kinds, names] = columns(&keys);
        for row in link.query(STAMPS, &[&kinds, &names]).await? {
            let stamp = Stamp { revision: number(&row, 1)?, created_ms: number(&row, 2)? };
            known.resources.insert(at(&keys, &row)?, stamp);
        }
    }
    let remembers = commits.iter().filter_map(|commit| commit.remember.as_ref());
    let keys: Vec<Key> = remembers.map(|remember| (remember.scope.as_str(), remember.key.as_str())).collect();
    if !keys.is_empty() {
        let [scopes, names] = columns(&keys);
        for row in link.query(REMEMBERED, &[&scopes, &names, &signed(now_ms)]).await? {
            let answer = Answer { digest: super::digest(row.try_get(1)?)?, answer: Cow::Owned(row.try_get(2)?) };
            known.remembered.insert(at(&keys, &row)?, answer);
        }
    }
    Ok(known)
}

/// The key that a row is about, counted from 1 in its first column.
fn at<'a>(keys: &[Key<'a>], row: &tokio_postgres::Row) -> Result<Key<'a>, StoreError> {
    let key = number(row, 0)?.checked_sub(1).and_then(|at| keys.get(usize::try_from(at).ok()?));
    key.copied().ok_or_else(|| StoreError::Damaged("a row for which nobody asked".to_owned()))
}

fn columns<'a>(keys: &[Key<'a>]) -> [Vec<&'a str>; 2] {
    [keys.iter().map(|key| key.0).collect(), keys.iter().map(|key| key.1).collect()]
}

type Param<'a> = Box<dyn ToSql + Sync + Send + 'a>;

/// A column of what is written: one value of each row.
fn column<'a, R, T: ToSql + Sync + Send + 'a>(rows: &[R], value: impl Fn(&R) -> T) -> Param<'a> {
    Box::new(rows.iter().map(value).collect::<Vec<T>>())
}

/// A statement and its parameters.
type Sending<'a> = (&'static str, Vec<Param<'a>>);

fn statements<'a>(writes: &'a Writes<'a>, now_ms: u64) -> Vec<Sending<'a>> {
    let keys = |keys: &[Key<'a>]| -> Vec<Param<'a>> { vec![column(keys, |key| key.0), column(keys, |key| key.1)] };
    let versions = |versions: &[Version<'a>]| -> Vec<Param<'a>> {
        vec![
            column(versions, |version| version.kind),
            column(versions, |version| version.name),
            column(versions, |version| signed(version.revision)),
            column(versions, |version| signed(version.created_ms)),
            column(versions, |version| signed(version.updated_ms)),
            column(versions, |version| version.body),
        ]
    };
    let mut sends: Vec<Sending> = Vec::new();
    if !writes.forget.is_empty() {
        sends.push((FORGET, keys(&writes.forget)));
    }
    if !writes.archive.is_empty() {
        sends.push((ARCHIVE, keys(&writes.archive)));
    }
    if !writes.history.is_empty() {
        sends.push((HISTORY, versions(&writes.history)));
    }
    if !writes.keep.is_empty() {
        let of = &writes.keep;
        let count = column(of, |(_, count)| i64::from(*count));
        sends.push((KEEP, vec![column(of, |(key, _)| key.0), column(of, |(key, _)| key.1), count]));
    }
    if !writes.remove.is_empty() {
        sends.push((REMOVE, keys(&writes.remove)));
    }
    if !writes.put.is_empty() {
        sends.push((PUT, versions(&writes.put)));
    }
    if !writes.changes.is_empty() {
        let of = &writes.changes;
        sends.push((
            CHANGES,
            vec![
                column(of, |change| signed(change.number)),
                column(of, |change| signed(change.generation)),
                column(of, |change| change.key.0),
                column(of, |change| change.key.1),
                column(of, |change| change.deleted),
            ],
        ));
    }
    if let Some(number) = writes.changes_gone {
        sends.push((CHANGES_GONE, vec![Box::new(signed(number))]));
    }
    if !writes.audit.is_empty() {
        let of = &writes.audit;
        let numbers = column(of, |(number, ..)| signed(*number));
        let macs: Vec<&str> = of.iter().map(|(_, mac, _)| mac.as_str()).collect();
        sends.push((AUDIT, vec![numbers, Box::new(macs), column(of, |(.., entry)| *entry), Box::new(signed(now_ms))]));
    }
    if !writes.remember.is_empty() {
        let of = &writes.remember;
        sends.push((
            REMEMBER,
            vec![
                column(of, |one| one.scope.as_str()),
                column(of, |one| one.key.as_str()),
                column(of, |one| one.digest.as_slice()),
                column(of, |one| one.answer.as_str()),
                column(of, |one| signed(one.expires_ms)),
            ],
        ));
        sends.push((EXPIRED, vec![Box::new(signed(now_ms))]));
    }
    sends
}

/// Writes rows until nobody can send any more.
pub(super) async fn rows(target: Target, mut queue: mpsc::Receiver<Portion>) {
    let mut link = None;
    let mut left = None;
    loop {
        let first = match left.take() {
            Some(portion) => portion,
            None => match queue.recv().await {
                Some(portion) => portion,
                None => return,
            },
        };
        let (portions, next) = rows::gather(first, &mut queue);
        left = next;
        let result = add_until(&target, &mut link, &portions, Instant::now() + PATIENCE).await;
        for portion in portions {
            // Who went away sends the rows again, and they are passed over.
            let _ = portion.answer.send(result.clone());
        }
    }
}

async fn add_until(
    target: &Target,
    link: &mut Option<Link>,
    portions: &[Portion],
    deadline: Instant,
) -> Result<(), StoreError> {
    let mut pause = Backoff::default();
    loop {
        let failure = match timeout_at(deadline, add(target, link, portions)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(failure)) => failure,
            Err(_) => StoreError::Unavailable("PostgreSQL does not answer".to_owned()).into(),
        };
        *link = None;
        if !failure.again || !pause.until(deadline).await {
            return Err(failure.error);
        }
    }
}

async fn add(target: &Target, link: &mut Option<Link>, portions: &[Portion]) -> Result<(), Failure> {
    let link = match link {
        Some(link) => link,
        empty => {
            let link = target.connect(None).await?;
            // What is lost with the power is sent again or seen again; commits do not wait for its way to the disk.
            link.client.batch_execute("SET synchronous_commit = off").await?;
            empty.insert(link)
        }
    };
    // Portion by portion: what is written twice is passed over, so a half-written batch does no harm.
    for portion in portions {
        let sql = format!(
            "INSERT INTO keepwall.{} (source, key, time_ms, kind, severity, body)
             SELECT source, key, time_ms, kind, severity, body
             FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::smallint[], $6::text[])
                 WITH ORDINALITY AS r(source, key, time_ms, kind, severity, body, ord) ORDER BY ord
             ON CONFLICT (source, key) DO NOTHING",
            portion.stream.as_str()
        );
        let of = &portion.rows;
        let sources: Vec<&str> = of.iter().map(|row| row.source.as_str()).collect();
        let keys: Vec<&str> = of.iter().map(|row| row.key.as_str()).collect();
        let times: Vec<i64> = of.iter().map(|row| signed(row.time_ms)).collect();
        let kinds: Vec<&str> = of.iter().map(|row| row.kind.as_str()).collect();
        let severities: Vec<i16> = of.iter().map(|row| i16::from(row.severity)).collect();
        let bodies: Vec<&str> = of.iter().map(|row| row.body.as_str()).collect();
        link.execute(&sql, &[&sources, &keys, &times, &kinds, &severities, &bodies]).await?;
    }
    Ok(())
}
