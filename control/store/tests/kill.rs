//! What was acknowledged is there, once, whatever was killed.
//!
//! A child process (this program again) commits numbered resources and prints each number when it is acknowledged.
//! It is killed at a random moment; then all that it printed has to be there, each with its line in the audit log,
//! and nothing half. `KEEPWALL_KILL_ROUNDS` sets how often.

#![allow(clippy::unwrap_used, missing_docs, dead_code, reason = "tests")]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{Directory, KEY, Place, ops, play, put, verified};
use keepwall_store::postgres::PostgresStore;
use keepwall_store::sqlite::SqliteStore;
use keepwall_store::testing::TestPostgres;
use keepwall_store::{Expect, PAGE_MAX, Store};

const ROUNDS: usize = 20;
/// In the child's environment: where it writes, and what its first number is.
const CHILD: &str = "KEEPWALL_KILL_CHILD";
const CHILD_FROM: &str = "KEEPWALL_KILL_FROM";
/// Tasks that commit at once, so that group commit is what is killed.
const WRITERS: u64 = 8;
/// Each n-th death is PostgreSQL's own.
const POSTGRES_DIES_EVERY: usize = 4;

fn rounds() -> usize {
    std::env::var("KEEPWALL_KILL_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap())
}

#[test]
#[ignore = "the child that the other tests start and kill"]
fn child() {
    let Ok(place) = std::env::var(CHILD) else { return };
    let from: u64 = std::env::var(CHILD_FROM).unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store: Arc<dyn Store> = match place.split_once(':') {
            Some(("sqlite", path)) => Arc::new(SqliteStore::open(Path::new(path), KEY).unwrap()),
            Some(("postgres", config)) => Arc::new(PostgresStore::connect(config, KEY).await.unwrap()),
            _ => panic!("{place}"),
        };
        let writers: Vec<_> =
            (0..WRITERS).map(|writer| tokio::spawn(write(Arc::clone(&store), from + writer))).collect();
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

async fn write(store: Arc<dyn Store>, from: u64) {
    for number in (from..).step_by(WRITERS as usize) {
        let mut commit = ops(vec![put(&format!("{number:09}"), Expect::Absent, "x")]);
        commit.audit.push(number.to_string());
        store.commit(commit).await.unwrap();
        // Written in one piece, and by itself: a line is acknowledged whole or not at all.
        std::io::stdout().write_all(format!("\nacknowledged {number}\n").as_bytes()).unwrap();
    }
}

/// Lets the child work for a moment, kills it; the numbers that it acknowledged. `kill` comes before its own end.
fn round(place: &str, from: u64, moment: Duration, kill: impl FnOnce()) -> BTreeSet<u64> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD, place)
        .env(CHILD_FROM, from.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let (first, started) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let lines = output.lines().map_while(Result::ok);
        let numbers = lines.filter_map(|line| line.strip_prefix("acknowledged ")?.parse().ok());
        // Nobody waits for more than the first.
        numbers.inspect(|_| _ = first.send(())).collect()
    });
    started.recv_timeout(Duration::from_secs(30)).expect("the child gets to work");
    std::thread::sleep(moment);
    kill();
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap()
}

/// A moment between 0 and 100 ms: from the hasher's keys, which are random.
fn moment() -> Duration {
    use std::hash::{BuildHasher, RandomState};
    Duration::from_micros(RandomState::new().hash_one(0) % 100_000)
}

/// All that was acknowledged is there; all that is there is whole.
async fn check(store: &dyn Store, acknowledged: &BTreeSet<u64>) -> BTreeSet<u64> {
    let mut there = BTreeSet::new();
    let mut revisions = BTreeSet::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.list("thing", after.as_deref(), PAGE_MAX).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.name.clone());
        for resource in page {
            there.insert(resource.name.parse::<u64>().unwrap());
            assert!(revisions.insert(resource.revision), "one commit, one resource");
        }
    }
    let lost: Vec<_> = acknowledged.difference(&there).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    assert_eq!(revisions, (1..=there.len() as u64).collect(), "no gaps, nothing twice");
    assert_eq!(store.generation().await, Ok(there.len() as u64));

    assert_eq!(verified(store).await.unwrap().lines, there.len() as u64);
    let mut told = BTreeSet::new();
    let mut from = 1;
    loop {
        let page = store.audit(from, PAGE_MAX).await.unwrap();
        let Some(last) = page.last() else { break };
        from = last.number + 1;
        for line in page {
            assert!(told.insert(line.entry.parse::<u64>().unwrap()), "told once");
        }
    }
    assert_eq!(told, there);
    there
}

#[expect(clippy::print_stdout, reason = "how much was tried is worth a look")]
fn all_rounds(place: Place, name: &str, postgres: Option<&TestPostgres>) {
    let mut acknowledged = BTreeSet::new();
    let mut there = BTreeSet::new();
    play(place, async |place| {
        for number in 0..rounds() {
            let kill = || match postgres {
                Some(postgres) if number % POSTGRES_DIES_EVERY == 0 => postgres.kill9(),
                _ => {}
            };
            let from = there.last().map_or(1, |last| last + 1);
            acknowledged.extend(round(name, from, moment(), kill));
            let store = place.open().await;
            there = check(&*store, &acknowledged).await;
        }
        println!("{} kills, {} commits acknowledged, {} there", rounds(), acknowledged.len(), there.len());
    });
}

#[test]
fn killed_on_sqlite_nothing_acknowledged_is_lost() {
    let directory = Directory::new();
    let name = format!("sqlite:{}", Place::path(&directory).display());
    all_rounds(Place::Sqlite(directory), &name, None);
}

#[test]
fn killed_on_postgresql_nothing_acknowledged_is_lost() {
    let Some(postgres) = TestPostgres::start() else { return };
    let config = postgres.config();
    all_rounds(Place::Postgres(config.clone()), &format!("postgres:{config}"), Some(&postgres));
}
