//! A group's rules as files that the cloud's console writes and reads: JSON and CSV with its field names.
//!
//! A written rule becomes one row per combination of port, source port and peer, as the cloud counts them; `any`
//! becomes a row for `0.0.0.0/0` and one for `::/0`. What was exported imports as exactly these rows. Group and
//! list identifiers are the names that the posture uses.
//!
//! An import only reads: what comes of it is added by [`crate::edit::add_rules`], which overwrites nothing.

mod csv;
mod json;
mod row;

use std::fmt;

use keepwall_secgroup::spec::{Direction, Group};

pub use csv::{from_csv, to_csv};
pub use json::{from_json, to_json};

use crate::problem::printable;
use crate::rule::NewRule;

/// Rules in one import (semantics §1.10).
pub const IMPORT_RULES_MAX: usize = 200;

/// The largest file that is looked at; 200 rules are far smaller.
pub const IMPORT_BYTES_MAX: usize = 4 << 20;

/// Errors of one import; more are not reported.
pub const IMPORT_ERRORS_MAX: usize = 50;

/// Why an import was refused. Nothing of it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportError {
    /// CSV: the row from 1, the header being row 1. JSON: the rule from 1. 0 if it is about the whole file.
    pub row: usize,
    /// The column or field; empty if it is about the whole row.
    pub column: String,
    /// What is wrong and what was expected.
    pub message: String,
}

impl ImportError {
    fn new(row: usize, column: &str, message: impl Into<String>) -> ImportError {
        ImportError { row, column: printable(column), message: printable(&message.into()) }
    }

    fn file(message: impl Into<String>) -> Vec<ImportError> {
        vec![ImportError::new(0, "", message)]
    }
}

impl fmt::Display for ImportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.row, self.column.as_str()) {
            (0, _) => write!(f, "{}", self.message),
            (row, "") => write!(f, "row {row}: {}", self.message),
            (row, column) => write!(f, "row {row}, column {column}: {}", self.message),
        }
    }
}

impl std::error::Error for ImportError {}

/// What an import read.
pub type Imported = Result<Vec<(Direction, NewRule)>, Vec<ImportError>>;

/// The rules of a group, inbound first, one for each combination.
#[must_use]
pub fn singles(group: &Group) -> Vec<(Direction, NewRule)> {
    let of = |direction| group.rules(direction).iter().map(move |rule| (direction, NewRule::of(rule)));
    Direction::BOTH
        .into_iter()
        .flat_map(of)
        .flat_map(|(direction, rule)| rule.singles().into_iter().map(move |single| (direction, single)))
        .collect()
}

/// Rows with their numbers as rules, or everything that is wrong with them.
fn read_rows(rows: Vec<(usize, row::Row)>) -> Imported {
    if rows.len() > IMPORT_RULES_MAX {
        return Err(ImportError::file(format!("more than {IMPORT_RULES_MAX} rules; import them in parts")));
    }
    let mut rules = Vec::new();
    let mut errors = Vec::new();
    for (number, row) in rows {
        match row::read(&row) {
            Ok(rule) => rules.push(rule),
            Err(faults) => {
                errors.extend(faults.into_iter().map(|(column, message)| ImportError::new(number, column, message)));
            }
        }
    }
    errors.truncate(IMPORT_ERRORS_MAX);
    if errors.is_empty() { Ok(rules) } else { Err(errors) }
}

#[cfg(test)]
mod tests;
