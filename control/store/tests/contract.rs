//! What every store does. Each story is played on SQLite and on PostgreSQL.

#![allow(clippy::unwrap_used, missing_docs, dead_code, reason = "tests")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Directory, KEY, Place, now, ops, play, put, verified};
use keepwall_store::postgres::PostgresStore;
use keepwall_store::sqlite::{SqliteStore, restore};
use keepwall_store::testing::TestPostgres;
use keepwall_store::{
    BODY_BYTES_MAX, CHANGES_KEPT, Commit, Committed, EPOCH_SHIFT, Expect, Filter, NAME_BYTES_MAX, OPS_MAX, Op,
    PAGE_MAX, ROW_BYTES_MAX, Remember, Retention, Row, Store, StoreError, Stream,
};

macro_rules! stories {
    ($($story:ident)*) => {
        mod on_sqlite {
            $(#[test] fn $story() { super::common::play_on_sqlite(super::$story) })*
        }
        mod on_postgres {
            $(#[test] fn $story() { super::common::play_on_postgres(stringify!($story), super::$story) })*
        }
    };
}

stories! {
    what_is_written_is_read
    expectations_decide
    a_commit_goes_through_whole_or_not_at_all
    the_same_request_gets_the_same_answer
    history_keeps_what_it_is_told_to
    generations_have_no_gaps_under_sixteen_writers
    one_of_many_wins
    changes_tell_of_every_commit
    a_commit_is_never_cut_in_two_pages
    changes_far_back_are_gone
    changes_wake_who_waits
    a_lease_has_one_holder_until_it_expires
    rows_are_kept_once_filtered_and_trimmed
    a_flood_of_rows_stops_no_commit
    tampering_with_the_audit_log_is_found
    another_audit_key_is_refused
    what_is_too_large_is_refused
    a_newer_version_is_refused
    a_store_that_is_open_is_ready
    what_was_there_is_there_after_opening_again
}

fn conflict(name: &str, actual: Option<u64>) -> Result<Committed, StoreError> {
    Err(StoreError::Conflict { kind: "thing".into(), name: name.into(), actual })
}

async fn what_is_written_is_read(place: Arc<Place>) {
    let store = place.open().await;
    assert_eq!(store.get("thing", "a").await, Ok(None));
    // In order of their bytes, whatever the language of the database says.
    let names = ["B", "a", "a b", "a-b", "b", "é", "家"];
    for name in names.iter().rev() {
        store.commit(ops(vec![put(name, Expect::Absent, "ü")])).await.unwrap();
    }
    let read = store.get("thing", "家").await.unwrap().unwrap();
    assert_eq!((read.revision, read.body.as_str(), read.created_ms), (1, "\"ü\"", read.updated_ms));
    assert_eq!(read.read::<String>(), Ok("ü".to_owned()));
    assert!(matches!(read.read::<u64>(), Err(StoreError::Damaged(_))));

    let all = store.list("thing", None, PAGE_MAX).await.unwrap();
    assert_eq!(all.iter().map(|resource| resource.name.as_str()).collect::<Vec<_>>(), names);
    let page = store.list("thing", Some("a b"), 2).await.unwrap();
    assert_eq!(page.iter().map(|resource| resource.name.as_str()).collect::<Vec<_>>(), ["a-b", "b"]);
    assert_eq!(store.list("other", None, 5).await, Ok(vec![]));

    store.commit(ops(vec![put("a", Expect::Any, "2"), Op::delete("thing", "b", Expect::Present)])).await.unwrap();
    let again = store.get("thing", "a").await.unwrap().unwrap();
    assert_eq!((again.revision, again.created_ms), (8, all[1].created_ms));
    assert_eq!(store.get("thing", "b").await, Ok(None));
    assert_eq!(store.generation().await, Ok(8));
}

async fn expectations_decide(place: Arc<Place>) {
    let store = place.open().await;
    let one = |op| store.commit(ops(vec![op]));
    assert_eq!(one(put("a", Expect::Present, "1")).await, conflict("a", None));
    assert_eq!(one(put("a", Expect::Revision(1), "1")).await, conflict("a", None));
    assert_eq!(one(Op::delete("thing", "a", Expect::Present)).await, conflict("a", None));
    assert_eq!(one(put("a", Expect::Absent, "1")).await, Ok(Committed::Now(1)));
    assert_eq!(one(put("a", Expect::Absent, "1")).await, conflict("a", Some(1)));
    assert_eq!(one(put("a", Expect::Revision(1), "2")).await, Ok(Committed::Now(2)));
    assert_eq!(one(put("a", Expect::Revision(1), "3")).await, conflict("a", Some(2)));
    assert_eq!(one(Op::delete("thing", "a", Expect::Revision(u64::MAX))).await, conflict("a", Some(2)));
    assert_eq!(one(Op::delete("thing", "a", Expect::Revision(2))).await, Ok(Committed::Now(3)));
    assert_eq!(one(Op::delete("thing", "a", Expect::Any)).await, Ok(Committed::Now(4)));
    // A later operation sees the earlier ones of its commit.
    let sequence = vec![
        put("b", Expect::Absent, "1"),
        put("b", Expect::Revision(5), "2"),
        Op::delete("thing", "b", Expect::Present),
        put("b", Expect::Absent, "3"),
    ];
    assert_eq!(store.commit(ops(sequence)).await, Ok(Committed::Now(5)));
    assert_eq!(store.get("thing", "b").await.unwrap().unwrap().body, "\"3\"");
}

async fn a_commit_goes_through_whole_or_not_at_all(place: Arc<Place>) {
    let store = place.open().await;
    let audit = vec!["{}".to_owned()];
    let remember = remember("k", 1, u64::MAX >> 1);
    let refused = Commit {
        ops: vec![put("a", Expect::Absent, "1"), put("b", Expect::Present, "1")],
        audit: audit.clone(),
        remember: Some(remember.clone()),
    };
    assert_eq!(store.commit(refused).await, conflict("b", None));
    assert_eq!(store.get("thing", "a").await, Ok(None));
    assert_eq!(store.audit(1, 10).await, Ok(vec![]));
    assert_eq!(store.audit_head().await, Ok(None));
    assert_eq!(store.remembered("me", "k", &remember.digest).await, Ok(None));
    assert_eq!(store.generation().await, Ok(0));
    assert_eq!(store.changes(0).await, Ok(vec![]));

    // Among hundreds at once, of which every other is refused.
    let tries = (0..200).map(|n| {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            let second = put("gate", if n % 2 == 0 { Expect::Absent } else { Expect::Present }, "x");
            let name = format!("n-{n}");
            let mut commit =
                ops(vec![put(&name, Expect::Absent, "x"), second, Op::delete("thing", "gate", Expect::Any)]);
            commit.audit.push(format!("{{\"n\":{n}}}"));
            (n, store.commit(commit).await.is_ok())
        })
    });
    for task in tries.collect::<Vec<_>>() {
        let (n, went) = task.await.unwrap();
        assert_eq!(went, n % 2 == 0, "{n}");
        assert_eq!(store.get("thing", &format!("n-{n}")).await.unwrap().is_some(), went);
    }
    assert_eq!(store.generation().await, Ok(100));
    assert_eq!(verified(&*store).await.unwrap().lines, 100);
}

fn remember(key: &str, digest: u8, expires_ms: u64) -> Remember {
    Remember {
        scope: "me".into(),
        key: key.into(),
        digest: [digest; 32],
        answer: format!("answer to {digest}"),
        expires_ms,
    }
}

fn clock_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

async fn the_same_request_gets_the_same_answer(place: Arc<Place>) {
    let [store, other] = place.open_two().await;
    let request = |digest, expires_ms| Commit {
        ops: vec![put("a", Expect::Any, "x")],
        audit: vec!["{}".into()],
        remember: Some(remember("k", digest, expires_ms)),
    };
    let far = clock_ms() + 3_600_000;
    assert_eq!(store.commit(request(1, far)).await, Ok(Committed::Now(1)));
    assert_eq!(other.commit(request(1, far)).await, Ok(Committed::Before("answer to 1".into())));
    assert_eq!(other.commit(request(2, far)).await, Err(StoreError::KeyReused("k".into())));
    assert_eq!(other.remembered("me", "k", &[1; 32]).await, Ok(Some("answer to 1".into())));
    assert_eq!(other.remembered("me", "k", &[2; 32]).await, Err(StoreError::KeyReused("k".into())));
    assert_eq!(other.remembered("you", "k", &[2; 32]).await, Ok(None));
    assert_eq!((store.generation().await, verified(&*store).await.unwrap().lines), (Ok(1), 1));

    // Sent twenty times at once, it goes through once.
    let twins = (0..20).map(|n| {
        let store = Arc::clone(if n % 2 == 0 { &store } else { &other });
        let mut commit = request(3, far);
        commit.remember.as_mut().unwrap().key = "twin".into();
        tokio::spawn(async move { store.commit(commit).await.unwrap() })
    });
    let mut went = 0;
    for twin in twins.collect::<Vec<_>>() {
        went += usize::from(matches!(twin.await.unwrap(), Committed::Now(_)));
    }
    assert_eq!(went, 1);

    // Expired, the key is as good as new.
    let mut soon = request(4, clock_ms() + 300);
    soon.remember.as_mut().unwrap().key = "soon".into();
    now(store.commit(soon.clone()).await.unwrap());
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(store.remembered("me", "soon", &[4; 32]).await, Ok(None));
    soon.remember.as_mut().unwrap().digest = [5; 32];
    now(store.commit(soon).await.unwrap());
}

async fn history_keeps_what_it_is_told_to(place: Arc<Place>) {
    let store = place.open().await;
    let write = |n: u64, keep| {
        let body = n.to_string();
        let op = Op::Put { kind: "thing".into(), name: "a".into(), expect: Expect::Any, body, keep };
        store.commit(ops(vec![op]))
    };
    let bodies = async |before, limit| -> Vec<String> {
        let versions = store.history("thing", "a", before, limit).await.unwrap();
        assert!(versions.is_sorted_by(|newer, older| newer.revision > older.revision));
        versions.into_iter().map(|version| version.body).collect()
    };
    for n in 1..=5 {
        write(n, 3).await.unwrap();
    }
    assert_eq!(bodies(None, 10).await, ["5", "4", "3", "2"]);
    assert_eq!(bodies(Some(4), 1).await, ["3"]);
    write(6, 1).await.unwrap();
    assert_eq!(bodies(None, 10).await, ["6", "5"]);
    write(7, 0).await.unwrap();
    assert_eq!(bodies(None, 10).await, ["7"]);
    // Many at once, so that some are replaced within one batch.
    let writes: Vec<_> = (0..100)
        .map(|n| {
            let store = Arc::clone(&store);
            let op = Op::Put {
                kind: "thing".into(),
                name: "a".into(),
                expect: Expect::Any,
                body: format!("m{n}"),
                keep: 50,
            };
            tokio::spawn(async move { store.commit(ops(vec![op])).await.unwrap() })
        })
        .collect();
    for write in writes {
        write.await.unwrap();
    }
    let versions = store.history("thing", "a", None, 100).await.unwrap();
    let revisions: Vec<_> = versions.iter().map(|version| version.revision).collect();
    assert_eq!(revisions, (57..=107).rev().collect::<Vec<_>>());
    assert_eq!(versions.iter().map(|version| &version.body).collect::<BTreeSet<_>>().len(), 51);
    store.commit(ops(vec![Op::delete("thing", "a", Expect::Any)])).await.unwrap();
    assert!(bodies(None, 10).await.is_empty());
}

async fn generations_have_no_gaps_under_sixteen_writers(place: Arc<Place>) {
    const EACH: u64 = 25;
    let stores = place.open_two().await;
    let writers: Vec<_> = (0..16)
        .map(|writer| {
            let store = Arc::clone(&stores[writer % 2]);
            tokio::spawn(async move {
                let mut generations = Vec::new();
                for n in 0..EACH {
                    let mut commit = ops(vec![put(&format!("{writer}-{n}"), Expect::Absent, "x")]);
                    commit.audit.push(format!("{{\"writer\":{writer},\"n\":{n}}}"));
                    let generation = now(store.commit(commit).await.unwrap());
                    assert!(generations.last().is_none_or(|last| *last < generation));
                    generations.push(generation);
                }
                generations
            })
        })
        .collect();
    let mut all = BTreeSet::new();
    for writer in writers {
        all.extend(writer.await.unwrap());
    }
    assert_eq!(all, (1..=16 * EACH).collect());
    assert_eq!(verified(&*stores[1]).await.unwrap().lines, 16 * EACH);
    let changes = stores[0].changes(0).await.unwrap();
    assert_eq!(changes.iter().map(|change| change.generation).collect::<Vec<_>>(), (1..=16 * EACH).collect::<Vec<_>>());
}

async fn one_of_many_wins(place: Arc<Place>) {
    let stores = place.open_two().await;
    let tries: Vec<_> = (0..50)
        .map(|n: usize| {
            let store = Arc::clone(&stores[n % 2]);
            tokio::spawn(async move { store.commit(ops(vec![put("a", Expect::Absent, "x")])).await })
        })
        .collect();
    let mut won = 0;
    for one in tries {
        match one.await.unwrap() {
            Ok(_) => won += 1,
            Err(error) => assert_eq!(Err(error), conflict("a", Some(1))),
        }
    }
    assert_eq!(won, 1);
}

async fn changes_tell_of_every_commit(place: Arc<Place>) {
    let [store, other] = place.open_two().await;
    store.commit(ops(vec![put("a", Expect::Any, "1"), put("b", Expect::Any, "1")])).await.unwrap();
    store
        .commit(ops(vec![Op::delete("thing", "a", Expect::Any), Op::delete("thing", "c", Expect::Any)]))
        .await
        .unwrap();
    let changes = other.changes(0).await.unwrap();
    let told: Vec<_> = changes.iter().map(|change| (change.generation, change.name.as_str(), change.deleted)).collect();
    assert_eq!(told, [(1, "a", false), (1, "b", false), (2, "a", true)]);
    assert_eq!(other.changes(1).await.unwrap().len(), 1);
    assert_eq!(other.changes(2).await, Ok(vec![]));
    assert_eq!(other.changes(3).await, Err(StoreError::ChangesGone), "from a future that is not ours");
    assert_eq!(other.changes(1 << EPOCH_SHIFT).await, Err(StoreError::ChangesGone));
}

async fn a_commit_is_never_cut_in_two_pages(place: Arc<Place>) {
    let store = place.open().await;
    let many = |count: usize| ops((0..count).map(|n| put(&format!("{n}"), Expect::Any, "x")).collect());
    for count in [600, 600, 2_500, 1] {
        store.commit(many(count)).await.unwrap();
    }
    let mut after = 0;
    let mut pages = Vec::new();
    loop {
        let page = store.changes(after).await.unwrap();
        let Some(last) = page.last() else { break };
        after = last.generation;
        pages.push(page.len());
    }
    assert_eq!(pages, [600, 600, 2_500, 1]);
}

async fn changes_far_back_are_gone(place: Arc<Place>) {
    let store = place.open().await;
    let commits = CHANGES_KEPT as usize / OPS_MAX + 1;
    for _ in 0..commits {
        store.commit(ops((0..OPS_MAX).map(|n| put(&format!("{n}"), Expect::Any, "x")).collect())).await.unwrap();
    }
    assert_eq!(store.changes(0).await, Err(StoreError::ChangesGone));
    assert_eq!(store.changes(1).await.unwrap().len(), OPS_MAX);
}

async fn changes_wake_who_waits(place: Arc<Place>) {
    let [store, other] = place.open_two().await;
    let mut changed = other.changed();
    changed.mark_unchanged();
    let generation = now(store.commit(ops(vec![put("a", Expect::Any, "x")])).await.unwrap());
    let woken = async {
        while *changed.borrow_and_update() < generation {
            changed.changed().await.unwrap();
        }
    };
    // Well below the time after which who follows looks without word.
    tokio::time::timeout(Duration::from_secs(3), woken).await.unwrap();
    assert_eq!(other.changes(0).await.unwrap().len(), 1);
}

async fn a_lease_has_one_holder_until_it_expires(place: Arc<Place>) {
    let [store, other] = place.open_two().await;
    assert_eq!(store.lease("rollout", "one", 60_000).await, Ok(true));
    assert_eq!(store.lease("rollout", "one", 60_000).await, Ok(true), "renewed");
    assert_eq!(other.lease("rollout", "two", 60_000).await, Ok(false));
    assert_eq!(other.lease("else", "two", u64::MAX).await, Ok(true));
    other.release("rollout", "two").await.unwrap();
    assert_eq!(other.lease("rollout", "two", 60_000).await, Ok(false), "only the holder gives it back");
    store.release("rollout", "one").await.unwrap();
    assert_eq!(other.lease("rollout", "two", 200).await, Ok(true));
    assert_eq!(store.lease("rollout", "one", 60_000).await, Ok(false));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(store.lease("rollout", "one", 60_000).await, Ok(true), "expired");
}

fn row(source: &str, key: &str, time_ms: u64, kind: &str, severity: u8) -> Row {
    let body = "{\"seen\":true}".to_owned();
    Row { id: 0, source: source.into(), key: key.into(), time_ms, kind: kind.into(), severity, body }
}

async fn rows_are_kept_once_filtered_and_trimmed(place: Arc<Place>) {
    let [store, other] = place.open_two().await;
    let stream = Stream::Finding;
    let rows: Vec<_> = (0..10)
        .map(|n| {
            let kind = if n % 2 == 0 { "drift" } else { "flow" };
            row(if n < 5 { "i-1" } else { "i-2" }, &n.to_string(), 1_000 + n, kind, (n % 5) as u8)
        })
        .collect();
    store.append(stream, rows.clone()).await.unwrap();
    // Again from elsewhere, once even within one call, and the same key of another source.
    let mut again = rows.clone();
    again.extend(rows.clone());
    again.push(row("", "0", 5_000, "drift", 0));
    other.append(stream, again).await.unwrap();

    let read = async |filter: Filter| store.rows(stream, &Filter { limit: 100, ..filter }).await.unwrap();
    let keys = async |filter| read(filter).await.into_iter().map(|row| row.key).collect::<Vec<_>>();
    let all = read(Filter::default()).await;
    assert_eq!(all.len(), 11);
    assert!(all.is_sorted_by(|newer, older| newer.id > older.id && older.id > 0));
    assert_eq!(Row { id: 0, ..all[1].clone() }, rows[9]);
    assert_eq!(keys(Filter { source: Some("i-2".into()), ..Filter::default() }).await, ["9", "8", "7", "6", "5"]);
    assert_eq!(keys(Filter { source: Some(String::new()), ..Filter::default() }).await, ["0"]);
    let both = Filter { kind: Some("flow".into()), source: Some("i-1".into()), ..Filter::default() };
    assert_eq!(keys(both).await, ["3", "1"]);
    assert_eq!(keys(Filter { severity_min: 4, ..Filter::default() }).await, ["9", "4"]);
    assert_eq!(keys(Filter { before: Some(all[8].id), ..Filter::default() }).await, ["1", "0"]);
    assert_eq!(store.rows(stream, &Filter { limit: 3, ..Filter::default() }).await.unwrap().len(), 3);
    assert_eq!(store.rows(Stream::Event, &Filter { limit: 3, ..Filter::default() }).await, Ok(vec![]));

    let everything = Retention { rows_max: 100, age_ms_max: u64::MAX };
    assert_eq!(store.trim(stream, everything, 10_000).await, Ok(0));
    assert_eq!(store.trim(stream, Retention { rows_max: 8, ..everything }, 10_000).await, Ok(3));
    assert_eq!(keys(Filter::default()).await, ["0", "9", "8", "7", "6", "5", "4", "3"]);
    assert_eq!(store.trim(stream, Retention { age_ms_max: 1_000, ..everything }, 2_006).await, Ok(3));
    assert_eq!(keys(Filter::default()).await, ["0", "9", "8", "7", "6"]);
    assert_eq!(store.trim(stream, Retention { rows_max: 0, ..everything }, 10_000).await, Ok(5));
    store.append(stream, vec![row("i-1", "new", 1, "drift", 0)]).await.unwrap();
    assert!(read(Filter::default()).await[0].id > all[0].id, "an id is never given twice");
}

#[expect(clippy::print_stdout, reason = "how long it took is worth a look")]
async fn a_flood_of_rows_stops_no_commit(place: Arc<Place>) {
    const ROWS: u64 = 200_000;
    let store = place.open().await;
    let over = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let floods: Vec<_> = (0..8)
        .map(|source| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for part in 0..ROWS / 8 / 2_500 {
                    let keys = part * 2_500..(part + 1) * 2_500;
                    let rows = keys.map(|n| row(&format!("i-{source}"), &n.to_string(), n, "flow", 0)).collect();
                    store.append(Stream::Event, rows).await.unwrap();
                }
            })
        })
        .collect();
    let commits = {
        let (store, over) = (Arc::clone(&store), Arc::clone(&over));
        tokio::spawn(async move {
            let mut times = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let before = Instant::now();
                store.commit(ops(vec![put("a", Expect::Any, "x")])).await.unwrap();
                times.push(before.elapsed());
            }
            times
        })
    };
    for flood in floods {
        flood.await.unwrap();
    }
    let flooded = started.elapsed();
    over.store(true, Ordering::Relaxed);
    let mut times = commits.await.unwrap();
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "{ROWS} rows in {flooded:.2?} ({:.0}/s); meanwhile {} commits, p50 {:.2?}, p99 {:.2?}, longest {:.2?}",
        ROWS as f64 / flooded.as_secs_f64(),
        times.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
    assert!(times.len() >= 10, "commits go through during the flood: {}", times.len());
    let trimmed = store.trim(Stream::Event, Retention { rows_max: 1_000, age_ms_max: u64::MAX }, 1).await;
    assert_eq!(trimmed, Ok(ROWS - 1_000), "each row was kept once");
}

async fn tampering_with_the_audit_log_is_found(place: Arc<Place>) {
    let store = place.open().await;
    for n in 1..=20 {
        store.commit(Commit { audit: vec![format!("{{\"n\":{n}}}")], ..Commit::default() }).await.unwrap();
    }
    assert_eq!(verified(&*store).await.unwrap().lines, 20);
    let lines = store.audit(1, PAGE_MAX).await.unwrap();
    let tampers = [
        ("UPDATE %audit SET entry = '{\"n\":50}' WHERE number = 5", 5),
        ("UPDATE %audit SET time_ms = time_ms + 1 WHERE number = 7", 7),
        ("DELETE FROM %audit WHERE number = 9", 9),
        ("DELETE FROM %audit WHERE number > 15", 16),
        ("DELETE FROM %audit", 1),
    ];
    for (sql, number) in tampers {
        place.tamper(sql).await;
        assert_eq!(verified(&*store).await.unwrap_err().number, number, "{sql}");
        place.tamper("DELETE FROM %audit").await;
        for line in &lines {
            let keepwall_store::AuditLine { number, time_ms, entry, mac } = line;
            place.tamper(&format!("INSERT INTO %audit VALUES ({number}, {time_ms}, '{entry}', '{mac}')")).await;
        }
        assert_eq!(verified(&*store).await.unwrap().lines, 20);
    }
    // Who cuts the tail and makes the head agree cannot seal it.
    let mac = &lines[14].mac;
    place.tamper("DELETE FROM %audit WHERE number > 15").await;
    place.tamper(&format!("UPDATE %state SET audit_number = 15, audit_mac = '{mac}'")).await;
    assert!(matches!(store.audit_head().await, Err(StoreError::Damaged(_))));
}

async fn another_audit_key_is_refused(place: Arc<Place>) {
    place.open().await.commit(Commit { audit: vec!["{}".into()], ..Commit::default() }).await.unwrap();
    let error = match &*place {
        Place::Sqlite(directory) => SqliteStore::open(&Place::path(directory), [1; 32]).err(),
        Place::Postgres(config) => PostgresStore::connect(config, [1; 32]).await.err(),
    };
    assert!(matches!(error, Some(StoreError::Damaged(why)) if why.contains("key")));
}

async fn what_is_too_large_is_refused(place: Arc<Place>) {
    let store = place.open().await;
    let long = "x".repeat(NAME_BYTES_MAX + 1);
    let raw = |name: &str, body: String| {
        let op = Op::Put { kind: "thing".into(), name: name.into(), expect: Expect::Any, body, keep: 0 };
        ops(vec![op])
    };
    let big = || "x".repeat(BODY_BYTES_MAX);
    let mut both = raw("a", big());
    both.ops.extend(raw("b", big()).ops);
    let mut line = raw("a", "1".into());
    line.audit.push("x".repeat(BODY_BYTES_MAX + 1));
    let refused = [
        raw(&long, "1".into()),
        raw("", "1".into()),
        raw("a\0b", "1".into()),
        raw("a", "\0".into()),
        raw("a", big() + "x"),
        ops(vec![put("a", Expect::Any, "x"); OPS_MAX + 1]),
        both,
        line,
    ];
    for commit in refused {
        assert!(matches!(store.commit(commit).await, Err(StoreError::TooLarge(_))));
    }
    assert!(matches!(store.get("thing", "a\0").await, Err(StoreError::TooLarge(_))));
    for bad in [row(&long, "a", 1, "k", 0), row("a", "", 1, "k", 0), row("a", "a", u64::MAX, "k", 0)] {
        assert!(matches!(store.append(Stream::Event, vec![bad]).await, Err(StoreError::TooLarge(_))));
    }
    let mut bad = row("a", "a", 1, "k", 0);
    bad.body = "x".repeat(ROW_BYTES_MAX);
    assert!(matches!(store.append(Stream::Event, vec![bad]).await, Err(StoreError::TooLarge(_))));
    assert_eq!(store.generation().await, Ok(0));
    // What is just within the limits goes through.
    store.commit(raw(&long[1..], big())).await.unwrap();
    assert_eq!(store.get("thing", &long[1..]).await.unwrap().unwrap().body.len(), BODY_BYTES_MAX);
}

async fn a_newer_version_is_refused(place: Arc<Place>) {
    drop(place.open().await);
    let error = match &*place {
        Place::Sqlite(directory) => {
            place.tamper("PRAGMA user_version = 99").await;
            SqliteStore::open(&Place::path(directory), KEY).err()
        }
        Place::Postgres(config) => {
            place.tamper("UPDATE %version SET version = 99").await;
            PostgresStore::connect(config, KEY).await.err()
        }
    };
    assert!(matches!(error, Some(StoreError::Newer(_))), "{error:?}");
}

async fn a_store_that_is_open_is_ready(place: Arc<Place>) {
    let store = place.open().await;
    assert_eq!(store.ready().await, Ok(()));
    assert_eq!(store.generation().await, Ok(0), "asking changes nothing");
}

async fn what_was_there_is_there_after_opening_again(place: Arc<Place>) {
    let store = place.open().await;
    store.commit(ops(vec![put("a", Expect::Any, "x")])).await.unwrap();
    store.append(Stream::Event, vec![row("a", "a", 1, "k", 0)]).await.unwrap();
    drop(store);
    let store = place.open().await;
    assert_eq!(*store.changed().borrow(), 1);
    assert!(store.get("thing", "a").await.unwrap().is_some());
    assert_eq!(store.rows(Stream::Event, &Filter { limit: 9, ..Filter::default() }).await.unwrap().len(), 1);
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn two_processes_do_not_share_a_file_and_nobody_else_reads_it() {
    common::play_on_sqlite(async |place| {
        let Place::Sqlite(directory) = &*place else { unreachable!("played on SQLite") };
        let path = Place::path(directory);
        let store = place.open().await;
        store.commit(ops(vec![put("a", Expect::Any, "x")])).await.unwrap();
        let error = SqliteStore::open(&path, KEY).err();
        let process = std::process::id().to_string();
        assert!(matches!(error, Some(StoreError::Unavailable(why)) if why.contains(&process)));
        assert!(matches!(restore(&path, &path), Err(StoreError::Unavailable(_))));
        for name in common::names(&directory.0) {
            assert_eq!(mode(&directory.0.join(&name)), 0o600, "{name}");
        }
        drop(store);
        place.open().await;
    });
}

#[test]
fn a_backup_comes_back_in_another_epoch_and_what_was_there_stays_aside() {
    common::play_on_sqlite(async |place| {
        let Place::Sqlite(directory) = &*place else { unreachable!("played on SQLite") };
        let (path, backup) = (Place::path(directory), directory.0.join("backup"));
        let store = Arc::new(SqliteStore::open(&path, KEY).unwrap());
        let write = |n: u64| {
            let store = Arc::clone(&store);
            let mut commit = ops(vec![put(&n.to_string(), Expect::Absent, "x")]);
            commit.audit.push(n.to_string());
            async move { now(store.commit(commit).await.unwrap()) }
        };
        for n in 1..=10 {
            write(n).await;
        }
        // While others write.
        let (saved, _) = tokio::join!(store.backup(&backup), async {
            for n in 11..=60 {
                write(n).await;
            }
        });
        saved.unwrap();
        assert_eq!(mode(&backup), 0o600);
        assert!(matches!(store.backup(&backup).await, Err(StoreError::Unavailable(_))), "never overwritten");
        drop(store);

        let restored = restore(&backup, &path).unwrap();
        assert!(restored.generation > 60 && restored.generation.trailing_zeros() >= EPOCH_SHIFT);
        let store = place.open().await;
        let count = store.list("thing", None, PAGE_MAX).await.unwrap().len();
        assert!((10..=60).contains(&count));
        assert_eq!(verified(&*store).await.unwrap().lines, count as u64, "a backup is of one moment");
        assert_eq!(store.generation().await, Ok(restored.generation));
        assert_eq!(store.changes(5).await, Err(StoreError::ChangesGone));
        assert_eq!(store.changes(restored.generation).await, Ok(vec![]));
        let next = now(store.commit(ops(vec![put("next", Expect::Absent, "x")])).await.unwrap());
        assert_eq!(next, restored.generation + 1);
        assert_eq!(store.changes(restored.generation).await.unwrap().len(), 1);
        drop(store);

        // Again from the same backup: newer still, and from what stayed aside: all is there.
        let again = restore(&backup, &path).unwrap();
        assert!(again.generation > next);
        let third = restore(&restored.aside.unwrap(), &path).unwrap();
        assert!(third.generation > again.generation);
        let store = place.open().await;
        assert_eq!(store.list("thing", None, PAGE_MAX).await.unwrap().len(), 60);
    });
}

#[test]
fn what_root_restores_belongs_to_the_server() {
    common::play_on_sqlite(async |place| {
        let Place::Sqlite(directory) = &*place else { unreachable!("played on SQLite") };
        let (path, backup) = (Place::path(directory), directory.0.join("backup"));
        place.open().await.commit(ops(vec![put("a", Expect::Any, "x")])).await.unwrap();
        keepwall_store::sqlite::copy(&path, &backup).unwrap();
        // Nobody has this number. Only root may give it a directory; for others there is nothing to see.
        if std::os::unix::fs::chown(&directory.0, Some(64_900), Some(64_901)).is_err() {
            return;
        }
        restore(&backup, &path).unwrap();
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!((made.uid(), made.gid()), (64_900, 64_901));
    });
}

#[test]
fn what_is_no_whole_backup_is_not_restored() {
    common::play_on_sqlite(async |place| {
        let Place::Sqlite(directory) = &*place else { unreachable!("played on SQLite") };
        let (path, backup) = (Place::path(directory), directory.0.join("backup"));
        let store = SqliteStore::open(&path, KEY).unwrap();
        for n in 0..300 {
            store.commit(ops(vec![put(&n.to_string(), Expect::Any, &"x".repeat(500))])).await.unwrap();
        }
        store.backup(&backup).await.unwrap();
        drop(store);
        let good = std::fs::read(&backup).unwrap();
        let refused = |bytes: &[u8]| {
            std::fs::write(&backup, bytes).unwrap();
            assert!(matches!(restore(&backup, &path), Err(StoreError::Damaged(_))));
        };
        refused(&good[..good.len() / 2]);
        refused(b"");
        refused(&b"something else altogether".repeat(300));
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle..middle + 6_000].fill(0x5a);
        refused(&bad);
        let store = place.open().await;
        assert_eq!(store.generation().await, Ok(300), "what was there still is");
        drop(store);
        // A damaged store gives way to a good backup, and is kept all the same.
        std::fs::write(&backup, &good).unwrap();
        std::fs::write(&path, b"damaged beyond all reading").unwrap();
        let restored = restore(&backup, &path).unwrap();
        assert_eq!(std::fs::read(restored.aside.unwrap()).unwrap(), b"damaged beyond all reading");
        assert_eq!(place.open().await.list("thing", None, PAGE_MAX).await.unwrap().len(), 300);
    });
}

#[test]
fn an_epoch_is_raised_under_servers_that_run() {
    common::play_on_postgres("an_epoch_is_raised", async |place| {
        let Place::Postgres(config) = &*place else { unreachable!("played on PostgreSQL") };
        let one = PostgresStore::connect(config, KEY).await.unwrap();
        let two = PostgresStore::connect(config, KEY).await.unwrap();
        one.commit(ops(vec![put("a", Expect::Any, "x")])).await.unwrap();
        let raised = one.raise_epoch().await.unwrap();
        assert!(raised.trailing_zeros() >= EPOCH_SHIFT);
        assert_eq!(two.commit(ops(vec![put("a", Expect::Any, "x")])).await, Ok(Committed::Now(raised + 1)));
        assert_eq!(one.changes(1).await, Err(StoreError::ChangesGone));
    });
}

#[test]
fn a_restart_of_postgresql_loses_nothing_and_writes_nothing_twice() {
    const ROUNDS: usize = 6;
    let Some(postgres) = TestPostgres::start() else { return };
    let place = Place::Postgres(postgres.config());
    play(place, async |place| {
        let stores = place.open_two().await;
        let over = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..8)
            .map(|writer| {
                let (store, over) = (Arc::clone(&stores[writer % 2]), Arc::clone(&over));
                tokio::spawn(async move {
                    let (mut sure, mut unsure) = (BTreeSet::new(), BTreeSet::new());
                    let mut n = 0;
                    while !over.load(Ordering::Relaxed) {
                        let name = format!("{writer}-{n}");
                        let mut commit = ops(vec![put(&name, Expect::Absent, "x")]);
                        commit.audit.push(name.clone());
                        match store.commit(commit).await {
                            Ok(_) => sure.insert(name),
                            Err(StoreError::Unavailable(_)) => unsure.insert(name),
                            Err(error) => panic!("{name}: {error}"),
                        };
                        n += 1;
                    }
                    (sure, unsure)
                })
            })
            .collect();
        for round in 0..ROUNDS {
            tokio::time::sleep(Duration::from_millis(300)).await;
            tokio::task::block_in_place(|| if round % 2 == 0 { postgres.restart() } else { postgres.kill9() });
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        over.store(true, Ordering::Relaxed);
        let (mut sure, mut unsure) = (BTreeSet::new(), BTreeSet::new());
        for writer in writers {
            let (its_sure, its_unsure) = writer.await.unwrap();
            sure.extend(its_sure);
            unsure.extend(its_unsure);
        }
        assert!(sure.len() > 100, "writers went on: {}", sure.len());
        assert!(unsure.is_empty(), "PostgreSQL was back soon enough to find out: {unsure:?}");
        assert_eq!(verified(&*stores[0]).await.unwrap().lines, sure.len() as u64);
        assert_eq!(stores[1].generation().await, Ok(sure.len() as u64));
        let mut there = BTreeSet::new();
        while let Ok(page) = stores[1].list("thing", there.last().map(String::as_str), PAGE_MAX).await
            && !page.is_empty()
        {
            there.extend(page.into_iter().map(|resource| resource.name));
        }
        assert_eq!(there, sure);
    });
}

#[test]
fn without_postgresql_calls_end_in_time_and_work_again_later() {
    let Some(postgres) = TestPostgres::start() else { return };
    play(Place::Postgres(postgres.config()), async |place| {
        let store = place.open().await;
        store.commit(ops(vec![put("a", Expect::Any, "x")])).await.unwrap();
        let away = tokio::task::block_in_place(|| postgres.stop());
        let started = Instant::now();
        let (write, read, ready) =
            tokio::join!(store.commit(ops(vec![put("b", Expect::Any, "x")])), store.get("thing", "a"), store.ready());
        assert!(matches!(write, Err(StoreError::Unavailable(_))));
        assert!(matches!(read, Err(StoreError::Unavailable(_))));
        assert!(matches!(ready, Err(StoreError::Unavailable(_))));
        assert!(started.elapsed() < Duration::from_secs(30));
        tokio::task::block_in_place(|| drop(away));
        assert_eq!(store.commit(ops(vec![put("c", Expect::Any, "x")])).await, Ok(Committed::Now(2)));
        assert!(store.get("thing", "b").await.unwrap().is_none());
    });
}

#[test]
fn tls_is_used_and_the_servers_name_is_checked() {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = ["ssl=on".to_owned(), "listen_addresses=127.0.0.1".to_owned(), format!("port={port}")];
    let (certificate, key) = (certified.cert.pem(), certified.signing_key.serialize_pem());
    let files = [("server.crt", certificate.as_str()), ("server.key", key.as_str())];
    let Some(postgres) = TestPostgres::start_with(&settings, &files) else { return };
    let directory = Directory::new();
    let authority = directory.0.join("authority.pem");
    std::fs::write(&authority, &certificate).unwrap();
    let authority = authority.display();
    play(Place::Postgres(postgres.config()), async |_| {
        let base = format!("port={port} user=keepwall dbname=keepwall connect_timeout=2");
        let trusted = format!("{base} host=localhost sslmode=verify-full sslrootcert={authority}");
        let store = PostgresStore::connect(&trusted, KEY).await.unwrap();
        store.commit(ops(vec![put("a", Expect::Any, "x")])).await.unwrap();
        // Without a word TLS is meant, and this authority is not the system's.
        let another_name = format!("{base} host=127.0.0.1 sslrootcert={authority}");
        for refused in [format!("{base} host=localhost"), another_name] {
            let error = PostgresStore::connect(&refused, KEY).await.err();
            let Some(StoreError::Unavailable(why)) = error else { panic!("{refused}: {error:?}") };
            assert!(why.contains("certificate") || why.contains("authorities"), "{why}");
        }
        let open = format!("{base} host=127.0.0.1 sslmode=disable");
        assert_eq!(PostgresStore::connect(&open, KEY).await.unwrap().generation().await, Ok(1));
    });
}
