//! The tables, by version, in a schema of their own. A released migration is never edited: the next one is added
//! behind it.

use super::link::Link;
use crate::plan::State;
use crate::{StoreError, limits::signed};

/// `keepwall` and a number: locks that everybody takes who uses this schema.
const LOCKS: i64 = 0x6b65_6570_7761_6c00;
/// Held while commits are written: who has it gives the next generation.
pub(super) const COMMIT_LOCK: i64 = LOCKS + 1;
const MIGRATION_LOCK: i64 = LOCKS + 2;
/// The oldest PostgreSQL that this is tested with.
const SERVER_VERSION_MIN: i32 = 150_000;

/// The n-th leads from version n to n+1.
const MIGRATIONS: &[&str] = &[include_str!("schema-1.sql")];

/// Brings the schema to the present version, in one transaction: PostgreSQL needs no copy to go back to.
pub(super) async fn migrate(link: &mut Link, audit_key: &[u8; 32]) -> Result<(), StoreError> {
    suitable(link).await?;
    let transaction = link.client.transaction().await?;
    transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&MIGRATION_LOCK]).await?;
    let there: bool = transaction.query_one("SELECT to_regclass('keepwall.version') IS NOT NULL", &[]).await?.get(0);
    if !there {
        transaction
            .batch_execute(
                "CREATE SCHEMA IF NOT EXISTS keepwall; REVOKE ALL ON SCHEMA keepwall FROM PUBLIC;
                 CREATE TABLE keepwall.version (version integer NOT NULL); INSERT INTO keepwall.version VALUES (0)",
            )
            .await?;
    }
    let version: i32 = transaction.query_one("SELECT version FROM keepwall.version", &[]).await?.get(0);
    let from = usize::try_from(version).map_err(|_| StoreError::Damaged(format!("version {version}")))?;
    if from > MIGRATIONS.len() {
        let known = MIGRATIONS.len();
        return Err(StoreError::Newer(format!("version {from}, this program knows {known}; run the newer program")));
    }
    if from < MIGRATIONS.len() {
        for migration in &MIGRATIONS[from..] {
            transaction.batch_execute(migration).await?;
        }
        transaction.execute("UPDATE keepwall.version SET version = $1", &[&(MIGRATIONS.len() as i32)]).await?;
    }
    let new = State::new(audit_key);
    transaction
        .execute(
            "INSERT INTO keepwall.state (one, generation, changes, changes_gone, audit_number, audit_mac, audit_seal)
             VALUES (true, $1, 0, 0, 0, '', $2) ON CONFLICT DO NOTHING",
            &[&signed(new.generation), &new.audit_seal],
        )
        .await?;
    transaction.commit().await?;
    Ok(())
}

async fn suitable(link: &Link) -> Result<(), StoreError> {
    let row = link
        .client
        .query_one(
            "SELECT current_setting('server_version_num')::integer, current_setting('server_encoding'),
                    current_setting('fsync')",
            &[],
        )
        .await?;
    let (version, encoding, fsync): (i32, String, String) = (row.get(0), row.get(1), row.get(2));
    if version < SERVER_VERSION_MIN {
        let have = version / 10_000;
        return Err(StoreError::Unavailable(format!("PostgreSQL {have} is too old; 15 or newer is needed")));
    }
    if encoding != "UTF8" {
        return Err(StoreError::Unavailable(format!("the database is in {encoding}; make one with ENCODING 'UTF8'")));
    }
    if fsync != "on" {
        tracing::warn!("PostgreSQL runs with fsync off: what is acknowledged is lost with the machine's power");
    }
    Ok(())
}
