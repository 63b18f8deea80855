//! Commits a second, with one writer and with 64, beside a bare loop of one-row transactions on the same disk.
//!
//! ```text
//! cargo run --release -p keepwall-store --features testing --example commits
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool for ourselves that prints")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keepwall_store::postgres::PostgresStore;
use keepwall_store::sqlite::SqliteStore;
use keepwall_store::testing::TestPostgres;
use keepwall_store::{Commit, Expect, Op, Store};

const KEY: [u8; 32] = [1; 32];
const FOR: Duration = Duration::from_secs(3);

fn main() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let directory = std::env::temp_dir().join(format!("keepwall-commits-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    runtime.block_on(async {
        let bare = bare_sqlite(&directory.join("bare"));
        let store = Arc::new(SqliteStore::open(&directory.join("store"), KEY).unwrap());
        report("SQLite", bare, store).await;
        let Some(postgres) = TestPostgres::start() else { return };
        let bare = bare_postgres(&postgres.create_database("bare")).await;
        report("PostgreSQL", bare, Arc::new(PostgresStore::connect(&postgres.config(), KEY).await.unwrap())).await;
    });
    std::fs::remove_dir_all(directory).unwrap();
}

async fn report(name: &str, bare: f64, store: Arc<dyn Store>) {
    let one = rate(&store, 1).await;
    let many = rate(&store, 64).await;
    println!("{name}: bare loop {bare:.0}/s; 1 writer {one:.0}/s; 64 writers {many:.0}/s ({:.1} x bare)", many / bare);
}

async fn rate(store: &Arc<dyn Store>, writers: usize) -> f64 {
    let started = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|writer| {
            let store = Arc::clone(store);
            tokio::spawn(async move {
                let mut count = 0;
                while started.elapsed() < FOR {
                    let op = Op::put("thing", &format!("{writers}-{writer}-{count}"), Expect::Absent, &"x".repeat(200));
                    let audit = vec!["{\"who\":\"me\",\"what\":\"put\"}".to_owned()];
                    store.commit(Commit { ops: vec![op], audit, remember: None }).await.unwrap();
                    count += 1;
                }
                count
            })
        })
        .collect();
    let mut count = 0;
    for task in tasks {
        count += task.await.unwrap();
    }
    f64::from(count) / started.elapsed().as_secs_f64()
}

fn bare_sqlite(path: &Path) -> f64 {
    let database = rusqlite::Connection::open(path).unwrap();
    database.pragma_update(None, "journal_mode", "WAL").unwrap();
    database.pragma_update(None, "synchronous", "FULL").unwrap();
    database.execute_batch("CREATE TABLE a (n INTEGER PRIMARY KEY, body TEXT)").unwrap();
    let mut insert = database.prepare("INSERT INTO a (body) VALUES (?1)").unwrap();
    let started = Instant::now();
    let mut count = 0;
    while started.elapsed() < FOR {
        insert.execute(["x".repeat(200)]).unwrap();
        count += 1;
    }
    f64::from(count) / started.elapsed().as_secs_f64()
}

async fn bare_postgres(config: &str) -> f64 {
    let (client, connection) = tokio_postgres::connect(config, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute("CREATE TABLE a (n bigserial PRIMARY KEY, body text)").await.unwrap();
    let insert = client.prepare("INSERT INTO a (body) VALUES ($1)").await.unwrap();
    let started = Instant::now();
    let mut count = 0;
    while started.elapsed() < FOR {
        client.execute(&insert, &[&"x".repeat(200)]).await.unwrap();
        count += 1;
    }
    f64::from(count) / started.elapsed().as_secs_f64()
}
