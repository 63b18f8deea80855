//! What takes two versions of the tables to show.

use std::os::unix::fs::PermissionsExt;

use super::schema::Kind;
use super::*;

const ONE: Kind = Kind { application_id: 77, synchronous: "FULL", migrations: &["CREATE TABLE a (x INTEGER) STRICT;"] };
const TWO: Kind = Kind {
    application_id: 77,
    synchronous: "FULL",
    migrations: &["CREATE TABLE a (x INTEGER) STRICT;", "ALTER TABLE a ADD COLUMN y INTEGER NOT NULL DEFAULT 5;"],
};
const BROKEN: Kind = Kind {
    application_id: 77,
    synchronous: "FULL",
    migrations: &["CREATE TABLE a (x INTEGER) STRICT;", "ALTER TABLE a ADD COLUMN y INTEGER; SELECT nothing;"],
};

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn directory(name: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("keepwall-store-{}-{name}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    directory
}

#[test]
fn a_copy_is_made_before_an_earlier_version_is_brought_up() {
    let directory = directory("migration");
    let path = directory.join("store");
    let first = files::open(&path, &ONE).unwrap();
    first.execute("INSERT INTO a VALUES (3)", []).unwrap();
    // Still open, its write is only in the log of writes: the copy has to hold it all the same.
    let second = files::open(&path, &TWO).unwrap();
    assert_eq!(second.query_row("SELECT x + y FROM a", [], |row| row.get::<_, i64>(0)), Ok(8));
    drop((first, second));

    let copies: Vec<_> = names(&directory).into_iter().filter(|name| name.ends_with(".version-1")).collect();
    let [copy] = copies.as_slice() else { panic!("one copy, but there are {copies:?}") };
    let copy = directory.join(copy);
    assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
    let old = files::open(&copy, &ONE).unwrap();
    assert_eq!(old.query_row("SELECT x FROM a", [], |row| row.get::<_, i64>(0)), Ok(3));
    drop(old);

    files::open(&path, &TWO).unwrap();
    let copies = names(&directory).into_iter().filter(|name| name.ends_with(".version-1")).count();
    assert_eq!(copies, 1, "what is up to date needs no copy");
    assert!(matches!(files::open(&path, &ONE), Err(StoreError::Newer(_))));
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_migration_that_fails_leaves_what_was_there() {
    let directory = directory("broken");
    let path = directory.join("store");
    files::open(&path, &ONE).unwrap();
    assert!(files::open(&path, &BROKEN).is_err());
    let still = files::open(&path, &ONE).unwrap();
    assert!(still.prepare("SELECT y FROM a").is_err());
    drop(still);
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn the_database_of_somebody_else_is_not_touched() {
    let directory = directory("foreign");
    let path = directory.join("store");
    let foreign = Connection::open(&path).unwrap();
    foreign.execute_batch("CREATE TABLE theirs (x); PRAGMA user_version = 1").unwrap();
    drop(foreign);
    let before = std::fs::read(&path).unwrap();
    assert!(matches!(SqliteStore::open(&path, [0; 32]), Err(StoreError::Damaged(_))));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    std::fs::write(&path, "not a database at all, but long enough to have a header of its own").unwrap();
    assert!(matches!(SqliteStore::open(&path, [0; 32]), Err(StoreError::Damaged(_))));
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn commits_are_written_through_to_the_disk() {
    let directory = directory("pragmas");
    for (name, kind, level) in [("store", &schema::MAIN, 2), ("observations", &schema::OBSERVATIONS, 1)] {
        let connection = files::open(&directory.join(name), kind).unwrap();
        assert_eq!(connection.query_row("PRAGMA synchronous", [], |row| row.get::<_, i64>(0)), Ok(level));
        assert_eq!(connection.query_row("PRAGMA journal_mode", [], |row| row.get(0)), Ok("wal".to_owned()));
    }
    std::fs::remove_dir_all(directory).unwrap();
}
