//! What the control plane knows, kept.
//!
//! One [`Store`] trait, two implementations: [`sqlite`], embedded, for one server; [`postgres`], for several. A new
//! capability needs no migration: what is declared is a *resource* (a kind, a name, a JSON body), what is seen is a
//! *row* of a stream (findings, events).
//!
//! Every change is one [`Commit`]: resources, the lines of the audit log that tell of them, and the answer to an
//! idempotent request, all durable or none. Commits are numbered without gaps across all servers of a store; the
//! number ([`Generation`]) is what the whole fleet counts by.
//!
//! Rows take another way to the disk than commits and wait behind them, so that a flood of observations slows no
//! change of the posture.

pub mod audit;
mod limits;
mod plan;
pub mod postgres;
mod queue;
mod rows;
pub mod sqlite;
#[cfg(feature = "testing")]
pub mod testing;

use async_trait::async_trait;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Counts commits, from 1. The 16 bits from [`EPOCH_SHIFT`] on are the store's epoch: it grows when an older state is
/// restored, so that what is said afterwards is newer than all that was said before, and agents accept it. The bit
/// above stays 0: databases count with signs.
pub type Generation = u64;

/// How many bits of a generation count commits within an epoch.
pub const EPOCH_SHIFT: u32 = 47;
/// The largest body of a resource, in bytes: a posture of 10,000 instances has about 4 MiB.
pub const BODY_BYTES_MAX: usize = 32 * 1024 * 1024;
/// The longest kind, name, scope or key, in bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// The most operations of one commit.
pub const OPS_MAX: usize = 20_000;
/// The most bytes of a commit: names, bodies, lines for the audit log and the answer together.
pub const COMMIT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// The most bytes of a row: its texts together.
pub const ROW_BYTES_MAX: usize = 64 * 1024;
/// The largest page of any listing.
pub const PAGE_MAX: usize = 1_000;
/// The longest lease, milliseconds; a longer one is cut to this: a year.
pub const LEASE_MS_MAX: u64 = 365 * 24 * 60 * 60 * 1_000;
/// Changes of resources that are remembered for those who follow; who is further behind reads everything anew.
pub const CHANGES_KEPT: u64 = 100_000;

/// Something declared or known: a posture, an instance, a user, a rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// `posture`, `instance`, `user`, …
    pub kind: String,
    /// Unique within its kind.
    pub name: String,
    /// The commit that wrote this version; the API's ETag.
    pub revision: Generation,
    /// When the first version was written, milliseconds since 1970.
    pub created_ms: u64,
    /// When this version was written, milliseconds since 1970.
    pub updated_ms: u64,
    /// JSON text.
    pub body: String,
}

impl Resource {
    /// The body as what it is.
    ///
    /// # Errors
    /// The body is something else, as a newer version might write it.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, StoreError> {
        serde_json::from_str(&self.body)
            .map_err(|error| StoreError::Damaged(format!("{}/{}: {error}", self.kind, self.name)))
    }
}

/// What must hold for an operation to go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Any,
    /// There is none of that name.
    Absent,
    /// There is one.
    Present,
    /// There is one, and this commit wrote it.
    Revision(Generation),
}

/// A change of one resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write it.
    Put {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
        /// What must hold before.
        expect: Expect,
        /// JSON text.
        body: String,
        /// How many earlier versions to keep for [`Store::history`]; the oldest go first.
        keep: u32,
    },
    /// Remove it, its history too.
    Delete {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
        /// What must hold before. `Any`: removing what is not there is no error.
        expect: Expect,
    },
}

impl Op {
    /// Writes a value without history.
    ///
    /// # Panics
    /// Never: our own types are JSON.
    #[must_use]
    pub fn put<T: Serialize>(kind: &str, name: &str, expect: Expect, body: &T) -> Op {
        let body = serde_json::to_string(body).expect("our own types are JSON");
        Op::Put { kind: kind.to_owned(), name: name.to_owned(), expect, body, keep: 0 }
    }

    /// Removes.
    #[must_use]
    pub fn delete(kind: &str, name: &str, expect: Expect) -> Op {
        Op::Delete { kind: kind.to_owned(), name: name.to_owned(), expect }
    }
}

/// All or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    /// In this order; a later one sees the earlier ones.
    pub ops: Vec<Op>,
    /// Lines for the audit log: JSON text each, chained in this order.
    pub audit: Vec<String>,
    /// The answer to give again if the same request comes again.
    pub remember: Option<Remember>,
}

/// An idempotent request and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remember {
    /// Whose key it is: keys of different users never meet.
    pub scope: String,
    /// The client's idempotency key.
    pub key: String,
    /// A digest of the request: the same key with another request is a mistake.
    pub digest: [u8; 32],
    /// The answer, as the API gave it.
    pub answer: String,
    /// Forgotten from then on, milliseconds since 1970.
    pub expires_ms: u64,
}

/// What became of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Committed {
    /// Durable, under this number.
    Now(Generation),
    /// The same request went through before; this was the answer.
    Before(String),
}

/// One resource changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// By which commit.
    pub generation: Generation,
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// True if it is gone.
    pub deleted: bool,
}

/// A stream of what was seen. Each has a retention of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Concluded: something to look at.
    Finding,
    /// Seen: flows, state changes.
    Event,
}

impl Stream {
    /// As it is written in tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Stream::Finding => "finding",
            Stream::Event => "event",
        }
    }
}

/// One row of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Given by the store, growing within a stream; 0 before.
    pub id: u64,
    /// The instance that saw it, or empty for the server itself.
    pub source: String,
    /// Unique within its source: a row that is sent again is kept once.
    pub key: String,
    /// When, milliseconds since 1970.
    pub time_ms: u64,
    /// `drift`, `flow`, …
    pub kind: String,
    /// 0 information, 1 low, 2 medium, 3 high, 4 critical.
    pub severity: u8,
    /// JSON text.
    pub body: String,
}

/// Which rows to read. Newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only of this source.
    pub source: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// At least this severity.
    pub severity_min: u8,
    /// Only with smaller ids: the cursor.
    pub before: Option<u64>,
    /// At most this many, up to [`PAGE_MAX`].
    pub limit: usize,
}

/// How much of a stream is kept; whatever is beyond either bound goes, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Rows at most.
    pub rows_max: u64,
    /// Rows older than this go, milliseconds.
    pub age_ms_max: u64,
}

/// A line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditLine {
    /// Counts lines from 1, without gaps.
    pub number: u64,
    /// When it was written, milliseconds since 1970.
    pub time_ms: u64,
    /// JSON text: who, from where, what, before and after.
    pub entry: String,
    /// HMAC-SHA-256 over the line before and this line, in hex; see [`audit`].
    pub mac: String,
}

/// Something did not work. What was there still is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// An expectation did not hold.
    Conflict {
        /// Of which resource.
        kind: String,
        /// Of which resource.
        name: String,
        /// The commit that wrote what is there, or `None` if there is nothing.
        actual: Option<Generation>,
    },
    /// The idempotency key was used for another request.
    KeyReused(String),
    /// A name, a body, a row or a commit is outside its limits: too long, empty, or with a NUL character.
    TooLarge(String),
    /// Followers asked for changes that are no longer remembered, or from before a restore: read everything anew.
    ChangesGone,
    /// Not reachable now. A commit that ends so may or may not have gone through; an idempotency key tells.
    Unavailable(String),
    /// What is stored cannot be what we wrote.
    Damaged(String),
    /// Written by a newer version; this one does not touch it.
    Newer(String),
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StoreError::Conflict { kind, name, actual: Some(revision) } => {
                write!(f, "{kind} `{name}` is at revision {revision} by now")
            }
            StoreError::Conflict { kind, name, actual: None } => write!(f, "there is no {kind} `{name}`"),
            StoreError::KeyReused(key) => write!(f, "the idempotency key `{key}` was used for another request"),
            StoreError::TooLarge(what) => f.write_str(what),
            StoreError::ChangesGone => f.write_str("changes that far back are not remembered"),
            StoreError::Unavailable(why) => write!(f, "the store is not reachable: {why}"),
            StoreError::Damaged(what) => write!(f, "the store holds what this version did not write: {what}"),
            StoreError::Newer(what) => write!(f, "the store was written by a newer version: {what}"),
        }
    }
}

impl std::error::Error for StoreError {}

/// What the control plane keeps. Everything is safe to call from many tasks at once.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// True if several servers may use it at the same time.
    fn shared(&self) -> bool;

    /// One resource.
    async fn get(&self, kind: &str, name: &str) -> Result<Option<Resource>, StoreError>;

    /// Resources of a kind, by name, from behind `after`, at most `limit` (up to [`PAGE_MAX`]).
    async fn list(&self, kind: &str, after: Option<&str>, limit: usize) -> Result<Vec<Resource>, StoreError>;

    /// Earlier versions of a resource, newest first, older than `before`, the present one included.
    async fn history(
        &self,
        kind: &str,
        name: &str,
        before: Option<Generation>,
        limit: usize,
    ) -> Result<Vec<Resource>, StoreError>;

    /// Makes a change durable, whole or not at all. Many at once share one write to the disk.
    async fn commit(&self, commit: Commit) -> Result<Committed, StoreError>;

    /// What an idempotent request was answered, if it went through before.
    async fn remembered(&self, scope: &str, key: &str, digest: &[u8; 32]) -> Result<Option<String>, StoreError>;

    /// The newest commit's number.
    async fn generation(&self) -> Result<Generation, StoreError>;

    /// Changes behind `after`, oldest first. About [`PAGE_MAX`] at a time and whole commits only, so that the last
    /// one's generation is where to go on; more only if a single commit has more. Nothing: there are no newer ones.
    async fn changes(&self, after: Generation) -> Result<Vec<Change>, StoreError>;

    /// Marked as changed after each commit, by whichever server, and where word from others may get lost, now and
    /// then without one. Who wakes up asks [`Store::changes`].
    fn changed(&self) -> tokio::sync::watch::Receiver<Generation>;

    /// Adds rows. Rows whose key their source has used are passed over. Waits when too many are on their way: that is
    /// the back-pressure that agents feel. Rows are not written through to the disk at once: those of the last second
    /// may be lost with the machine's power. After an error some may be there: send all again.
    async fn append(&self, stream: Stream, rows: Vec<Row>) -> Result<(), StoreError>;

    /// Reads rows, newest first.
    async fn rows(&self, stream: Stream, filter: &Filter) -> Result<Vec<Row>, StoreError>;

    /// Removes what is beyond the retention; how many rows went.
    async fn trim(&self, stream: Stream, retention: Retention, now_ms: u64) -> Result<u64, StoreError>;

    /// Lines of the audit log from `from` (1 is the first), oldest first, at most `limit` (up to [`PAGE_MAX`]).
    async fn audit(&self, from: u64, limit: usize) -> Result<Vec<AuditLine>, StoreError>;

    /// Number and MAC of the newest line of the audit log as the store remembers it apart from the lines.
    async fn audit_head(&self) -> Result<Option<(u64, String)>, StoreError>;

    /// Takes or renews a lease for `ttl_ms` by the store's own clock; false if another holder has it.
    async fn lease(&self, name: &str, holder: &str, ttl_ms: u64) -> Result<bool, StoreError>;

    /// Gives a lease back.
    async fn release(&self, name: &str, holder: &str) -> Result<(), StoreError>;

    /// True if a commit would go through now.
    async fn ready(&self) -> Result<(), StoreError>;
}
