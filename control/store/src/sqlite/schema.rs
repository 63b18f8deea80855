//! The tables, by version. A released migration is never edited: the next one is added behind it.

/// One of the two files.
pub(super) struct Kind {
    /// What SQLite's header says the file is.
    pub(super) application_id: i32,
    /// How far a commit is written through.
    pub(super) synchronous: &'static str,
    /// The n-th leads from version n to n+1.
    pub(super) migrations: &'static [&'static str],
}

/// What is declared.
pub(super) const MAIN: Kind =
    Kind { application_id: 0x4b57_4d4e, synchronous: "FULL", migrations: &[include_str!("main-1.sql")] };

/// What is seen. The last second may be lost with the power; never more, and never the file.
pub(super) const OBSERVATIONS: Kind =
    Kind { application_id: 0x4b57_4f42, synchronous: "NORMAL", migrations: &[include_str!("observations-1.sql")] };
