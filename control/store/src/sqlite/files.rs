//! The files of a store: who has them, what they are, copies of them, and the way back to a copy.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::{count, now_ms, said, schema};
use crate::plan;
use crate::{Generation, StoreError};

/// How long a connection waits for the file's other writer.
const BUSY: Duration = Duration::from_secs(10);
/// The log of writes is cut back to this many bytes after it grew.
const JOURNAL_BYTES_MAX: i64 = 64 * 1024 * 1024;
/// Prepared statements kept by a connection: about as many as there are.
const STATEMENTS: usize = 64;

/// `path` with something behind its name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

/// Where rows are.
pub(super) fn observations(path: &Path) -> PathBuf {
    beside(path, ".observations")
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Unavailable(format!("{}: {error}", path.display()))
}

/// Makes what happened to names in the directory of `path` durable.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    let directory = directory(path);
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(|error| failed(directory, &error))
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// Makes this process the only one that has the store. Given back when the file is closed, however the process ends.
pub(super) fn lock(path: &Path) -> Result<File, StoreError> {
    let path = beside(path, ".lock");
    let mut file = private().create(true).truncate(false).open(&path).map_err(|error| failed(&path, &error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => return Err(failed(&path, &error)),
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Who it is only helps to find it.
            let _ = file.take(64).read_to_string(&mut holder);
            let why = format!("the store is in use by process {}; stop it first", holder.trim());
            return Err(failed(&path, &why));
        }
    }
    let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(|error| failed(&path, &error))?;
    Ok(file)
}

/// Opens a file of this kind in its present version, or makes it.
pub(super) fn open(path: &Path, kind: &schema::Kind) -> Result<Connection, StoreError> {
    let file = private().create(true).truncate(false).open(path).map_err(|error| failed(path, &error))?;
    file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(|error| failed(path, &error))?;
    sync_directory(path)?;
    let mut connection = Connection::open(path).map_err(said)?;
    connection.busy_timeout(BUSY).map_err(said)?;
    migrate(&mut connection, path, kind)?;
    drop(connection);
    connect(path, kind)
}

/// A connection to a file that [`open`] has seen.
pub(super) fn connect(path: &Path, kind: &schema::Kind) -> Result<Connection, StoreError> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(said)?;
    let set = || {
        connection.busy_timeout(BUSY)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", kind.synchronous)?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "journal_size_limit", JOURNAL_BYTES_MAX)?;
        // What is in the database is not code: views and triggers that somebody planted call nothing.
        connection.pragma_update(None, "trusted_schema", false)
    };
    set().map_err(said)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    Ok(connection)
}

/// The version of a file of this kind; 0 if it is empty.
fn version(connection: &Connection, path: &Path, kind: &schema::Kind) -> Result<usize, StoreError> {
    let number = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(said);
    let id = number("PRAGMA application_id")?;
    let version = number("PRAGMA user_version")?;
    let empty = number("SELECT count(*) FROM sqlite_schema")? == 0;
    if empty && id == 0 && version == 0 {
        return Ok(0);
    }
    if id != i64::from(kind.application_id) {
        return Err(StoreError::Damaged(format!("{} is a database, but not this store's", path.display())));
    }
    match usize::try_from(version) {
        Ok(version) if (1..=kind.migrations.len()).contains(&version) => Ok(version),
        Ok(version) if version > kind.migrations.len() => Err(StoreError::Newer(format!(
            "{} has version {version}, this program knows {}; run the newer program, or restore a backup of before",
            path.display(),
            kind.migrations.len()
        ))),
        _ => Err(StoreError::Damaged(format!("{} has version {version}", path.display()))),
    }
}

/// Brings a file to the present version, whole or not at all; a copy stays beside it.
pub(super) fn migrate(connection: &mut Connection, path: &Path, kind: &schema::Kind) -> Result<(), StoreError> {
    let from = version(connection, path, kind)?;
    if from == kind.migrations.len() {
        return Ok(());
    }
    if from > 0 {
        let aside = beside(path, &format!(".{}.version-{from}", date(connection)?));
        copy(path, &aside)?;
        tracing::info!(copy = %aside.display(), "the store is of an earlier version; a copy was made");
    }
    let mut migrate = || {
        let transaction = connection.transaction()?;
        for migration in &kind.migrations[from..] {
            transaction.execute_batch(migration)?;
        }
        transaction.pragma_update(None, "application_id", kind.application_id)?;
        transaction.pragma_update(None, "user_version", kind.migrations.len() as i64)?;
        transaction.commit()
    };
    migrate().map_err(said)
}

/// Now, as a part of a name: `20261122T101500.123Z`.
fn date(connection: &Connection) -> Result<String, StoreError> {
    connection.query_row("SELECT strftime('%Y%m%dT%H%M%fZ')", [], |row| row.get(0)).map_err(said)
}

/// Copies a database at one moment of its life, whether a server has it open or not. What is there under that name
/// is never touched.
///
/// # Errors
/// Something stands there already, or the disk.
pub fn copy(from: &Path, to: &Path) -> Result<(), StoreError> {
    let partial = beside(to, ".partial");
    let text = partial.to_str().ok_or_else(|| failed(to, &"the name is not UTF-8"))?;
    let file = private().create_new(true).open(&partial).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => failed(&partial, &"left by another copy; remove it if that one has ended"),
        _ => failed(&partial, &error),
    })?;
    let made = || {
        let source = Connection::open_with_flags(from, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(said)?;
        source.busy_timeout(BUSY).map_err(said)?;
        source.execute("VACUUM INTO ?1", [text]).map_err(said)?;
        file.sync_all().map_err(|error| failed(&partial, &error))?;
        // Unlike a rename, a link does not replace what is there.
        fs::hard_link(&partial, to).map_err(|error| failed(to, &error))
    };
    let made = made();
    fs::remove_file(&partial).map_err(|error| failed(&partial, &error))?;
    made?;
    sync_directory(to)
}

/// What a restore did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The generation that the store counts on from: above all that were there before.
    pub generation: Generation,
    /// Where what was there before is kept, if there was something.
    pub aside: Option<PathBuf>,
}

/// Puts the backup `from` in the place of the store `to`, which nobody may have open. What was there is kept beside it
/// under a dated name; rows stay as they are.
///
/// The epoch grows, so agents accept what is said from now on, and who follows changes reads everything anew.
///
/// # Errors
/// `from` is not a whole backup of this or an earlier version, or `to` is in use: nothing was changed.
pub fn restore(from: &Path, to: &Path) -> Result<Restored, StoreError> {
    let _lock = lock(to)?;
    let backup = Connection::open_with_flags(from, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(said)?;
    if version(&backup, from, &schema::MAIN)? == 0 {
        return Err(StoreError::Damaged(format!("{} is empty", from.display())));
    }
    let integrity: String = backup.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(said)?;
    if integrity != "ok" {
        return Err(StoreError::Damaged(format!("{} is damaged: {integrity}", from.display())));
    }
    let date = date(&backup)?;
    let known = generation(&backup)?;
    drop(backup);

    let next = beside(to, ".restoring");
    for leftover in [beside(&next, "-journal"), beside(&next, ".partial"), next.clone()] {
        remove(&leftover)?;
    }
    copy(from, &next)?;
    let there = to.try_exists().map_err(|error| failed(to, &error))?;
    let present = if there { close(to) } else { Ok(0) };
    let generation = plan::next_epoch(known.max(present.clone().unwrap_or(0)), now_ms())?;
    raise(&next, generation)?;
    let owner = fs::metadata(directory(to)).map_err(|error| failed(to, &error))?;
    if fs::metadata(&next).is_ok_and(|made| made.uid() != owner.uid()) {
        // Root restores for a server that has a user of its own.
        std::os::unix::fs::chown(&next, Some(owner.uid()), Some(owner.gid())).map_err(|error| failed(&next, &error))?;
    }

    let aside = beside(to, &format!(".{date}.{}", if present.is_ok() { "replaced" } else { "damaged" }));
    // A log of writes without its database, or beside another one, would be played into it.
    for suffix in ["-wal", "-shm"] {
        let log = beside(to, suffix);
        if log.try_exists().map_err(|error| failed(&log, &error))? {
            fs::rename(&log, beside(&aside, suffix)).map_err(|error| failed(&log, &error))?;
        }
    }
    if there {
        fs::hard_link(to, &aside).map_err(|error| failed(&aside, &error))?;
        sync_directory(to)?;
    }
    fs::rename(&next, to).map_err(|error| failed(to, &error))?;
    sync_directory(to)?;
    Ok(Restored { generation, aside: there.then_some(aside) })
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path, &error)),
        _ => Ok(()),
    }
}

fn generation(connection: &Connection) -> Result<Generation, StoreError> {
    connection.query_row("SELECT generation FROM state", [], |row| count(row, 0)).map_err(said)
}

/// Brings all that is written into the one file; its newest generation.
fn close(path: &Path) -> Result<Generation, StoreError> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(said)?;
    let generation = generation(&connection)?;
    connection.pragma_update(None, "journal_mode", "DELETE").map_err(said)?;
    Ok(generation)
}

/// Starts another epoch. Changes of earlier ones are nothing that could be followed from.
fn raise(path: &Path, generation: Generation) -> Result<(), StoreError> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(said)?;
    connection.pragma_update(None, "synchronous", "EXTRA").map_err(said)?;
    let number = crate::limits::signed(generation);
    connection.execute("UPDATE state SET generation = ?1, changes_gone = ?1", [number]).map_err(said)?;
    drop(connection);
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| failed(path, &error))
}
