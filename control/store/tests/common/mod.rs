//! Where the stories are played: SQLite and PostgreSQL.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use keepwall_store::audit::{Broken, Verified, Verifier};
use keepwall_store::postgres::PostgresStore;
use keepwall_store::sqlite::SqliteStore;
use keepwall_store::testing::TestPostgres;
use keepwall_store::{Commit, Committed, Expect, Generation, Op, PAGE_MAX, Store};

pub(crate) const KEY: [u8; 32] = [42; 32];

/// A directory that goes with the test.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    pub(crate) fn new() -> Directory {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("keepwall-store-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) enum Place {
    Sqlite(Directory),
    Postgres(String),
}

impl Place {
    pub(crate) fn path(directory: &Directory) -> PathBuf {
        directory.0.join("store.db")
    }

    pub(crate) async fn open(&self) -> Arc<dyn Store> {
        match self {
            Place::Sqlite(directory) => Arc::new(SqliteStore::open(&Place::path(directory), KEY).unwrap()),
            Place::Postgres(config) => Arc::new(PostgresStore::connect(config, KEY).await.unwrap()),
        }
    }

    /// Two servers where several may share a store; else the same one twice.
    pub(crate) async fn open_two(&self) -> [Arc<dyn Store>; 2] {
        let first = self.open().await;
        match self {
            Place::Sqlite(_) => [Arc::clone(&first), first],
            Place::Postgres(_) => [first, self.open().await],
        }
    }

    /// What somebody does behind the store's back. `%` stands before the names of tables.
    pub(crate) async fn tamper(&self, sql: &str) {
        match self {
            Place::Sqlite(directory) => {
                let database = rusqlite::Connection::open(Place::path(directory)).unwrap();
                database.execute_batch(&sql.replace('%', "")).unwrap();
            }
            Place::Postgres(config) => {
                let (client, connection) = tokio_postgres::connect(config, tokio_postgres::NoTls).await.unwrap();
                tokio::spawn(connection);
                client.batch_execute(&sql.replace('%', "keepwall.")).await.unwrap();
            }
        }
    }
}

/// One for all stories of a test program.
pub(crate) fn shared_postgres() -> Option<&'static TestPostgres> {
    static SHARED: OnceLock<Option<TestPostgres>> = OnceLock::new();
    SHARED.get_or_init(TestPostgres::start).as_ref()
}

pub(crate) fn play<F: Future<Output = ()>>(place: Place, story: impl FnOnce(Arc<Place>) -> F) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(story(Arc::new(place)));
}

pub(crate) fn play_on_sqlite<F: Future<Output = ()>>(story: impl FnOnce(Arc<Place>) -> F) {
    play(Place::Sqlite(Directory::new()), story);
}

pub(crate) fn play_on_postgres<F: Future<Output = ()>>(name: &str, story: impl FnOnce(Arc<Place>) -> F) {
    if let Some(postgres) = shared_postgres() {
        play(Place::Postgres(postgres.create_database(name)), story);
    }
}

pub(crate) fn put(name: &str, expect: Expect, body: &str) -> Op {
    Op::put("thing", name, expect, &body)
}

pub(crate) fn ops(ops: Vec<Op>) -> Commit {
    Commit { ops, ..Commit::default() }
}

pub(crate) fn now(committed: Committed) -> Generation {
    match committed {
        Committed::Now(generation) => generation,
        Committed::Before(answer) => panic!("went through before: {answer}"),
    }
}

/// Verifies the audit log page by page.
pub(crate) async fn verified(store: &dyn Store) -> Result<Verified, Broken> {
    let mut verifier = Verifier::new(KEY);
    loop {
        let page = store.audit(verifier.next_number(), PAGE_MAX).await.unwrap();
        if page.is_empty() {
            break;
        }
        for line in &page {
            verifier.line(line)?;
        }
    }
    let head = store.audit_head().await.unwrap();
    verifier.finish(head.as_ref().map(|(number, mac)| (*number, mac.as_str())))
}

pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
