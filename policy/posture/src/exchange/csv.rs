//! CSV after RFC 4180: CRLF, quotes where needed, a header with the cloud's field names.
//!
//! A spreadsheet takes a cell that begins with `=`, `+`, `-` or `@` for a formula, and a description comes from
//! whoever may write one. So such cells are written with an apostrophe in front, which reading takes off again.

use keepwall_secgroup::spec::Group;

use super::row::{self, COLUMNS, Row};
use super::{IMPORT_BYTES_MAX, IMPORT_ERRORS_MAX, IMPORT_RULES_MAX, ImportError, Imported, read_rows, singles};
use crate::problem::quote;

/// What a spreadsheet may take for the beginning of a formula, and the apostrophe that guards against it.
const GUARDED: [char; 7] = ['=', '+', '-', '@', '\t', '\r', '\''];

/// A group's rules as CSV that [`from_csv`] reads.
#[must_use]
pub fn to_csv(group: &Group) -> String {
    let mut out = COLUMNS.join(",");
    out.push_str("\r\n");
    for (direction, rule) in singles(group) {
        let row = row::write(direction, &rule);
        let cells: Vec<String> =
            COLUMNS.iter().map(|column| cell(row.get(column).map_or("", String::as_str))).collect();
        out.push_str(&cells.join(","));
        out.push_str("\r\n");
    }
    out
}

fn cell(text: &str) -> String {
    let guarded = if text.starts_with(GUARDED) { format!("'{text}") } else { text.to_owned() };
    if guarded.contains(['"', ',', '\r', '\n']) { format!("\"{}\"", guarded.replace('"', "\"\"")) } else { guarded }
}

/// The text of a cell without the guard that [`cell`] puts in front.
fn unguarded(text: String) -> String {
    match text.strip_prefix('\'') {
        Some(rest) if rest.starts_with(GUARDED) => rest.to_owned(),
        _ => text,
    }
}

/// Reads rules. The columns may stand in any order; a byte order mark and a missing last line end are fine.
///
/// # Errors
/// Everything that is wrong with row and column, at most [`IMPORT_ERRORS_MAX`].
pub fn from_csv(text: &str) -> Imported {
    if text.len() > IMPORT_BYTES_MAX {
        return Err(ImportError::file(format!("the file is larger than {IMPORT_BYTES_MAX} bytes")));
    }
    let mut records = Records { rest: text.strip_prefix('\u{feff}').unwrap_or(text), row: 0 };
    let header = match records.next() {
        Some(header) => header.map_err(|error| vec![error])?,
        None => return Err(ImportError::file("the file is empty; expected a header with field names")),
    };
    let columns = columns(&header)?;
    let mut rows = Vec::new();
    let mut errors = Vec::new();
    while let Some(record) = records.next() {
        let number = records.row;
        match record {
            Err(error) => {
                // Behind a broken quote nothing is what it seems.
                errors.push(error);
                break;
            }
            Ok(cells) if cells.iter().all(String::is_empty) => continue,
            Ok(cells) if cells.len() != columns.len() => {
                let message = format!("the row has {} cells and the header {}", cells.len(), columns.len());
                errors.push(ImportError::new(number, "", message));
            }
            Ok(cells) => {
                let filled = columns.iter().zip(cells).filter(|(_, cell)| !cell.is_empty());
                let row: Row = filled.filter_map(|(column, cell)| Some(((*column)?, unguarded(cell)))).collect();
                rows.push((number, row));
            }
        }
        if rows.len() > IMPORT_RULES_MAX || errors.len() >= IMPORT_ERRORS_MAX {
            break;
        }
    }
    if errors.is_empty() { read_rows(rows) } else { Err(errors) }
}

fn columns(header: &[String]) -> Result<Vec<Option<&'static str>>, Vec<ImportError>> {
    let mut columns: Vec<Option<&'static str>> = Vec::new();
    let mut errors = Vec::new();
    for name in header.iter().map(|name| name.trim()) {
        match row::column(name) {
            Ok(Some(column)) if columns.contains(&Some(column)) => {
                errors.push(ImportError::new(1, column, "the column stands twice"));
            }
            Ok(column) => columns.push(column),
            Err(message) => errors.push(ImportError::new(1, name, message)),
        }
        if errors.len() >= IMPORT_ERRORS_MAX {
            break;
        }
    }
    for needed in ["Direction", "IpProtocol"] {
        if errors.is_empty() && !columns.contains(&Some(needed)) {
            errors.push(ImportError::new(1, needed, "the column is missing"));
        }
    }
    if errors.is_empty() { Ok(columns) } else { Err(errors) }
}

/// The records of a text.
struct Records<'t> {
    rest: &'t str,
    /// The record that was read last, from 1.
    row: usize,
}

impl Records<'_> {
    fn next(&mut self) -> Option<Result<Vec<String>, ImportError>> {
        if self.rest.is_empty() {
            return None;
        }
        self.row += 1;
        let mut cells = Vec::new();
        // Each cell consumes its text and a separator, so the loop ends with the text.
        loop {
            let column = cells.len() + 1;
            let cell = match self.rest.strip_prefix('"') {
                Some(quoted) => self.quoted(quoted, column),
                None => self.bare(column),
            };
            match cell {
                Ok(cell) => cells.push(cell),
                Err(error) => return Some(Err(error)),
            }
            if let Some(rest) = self.rest.strip_prefix(',') {
                self.rest = rest;
                continue;
            }
            let end = self.rest.strip_prefix("\r\n").or_else(|| self.rest.strip_prefix('\n'));
            return Some(match (end, self.rest) {
                (Some(rest), _) => {
                    self.rest = rest;
                    Ok(cells)
                }
                (None, "") => Ok(cells),
                (None, _) => Err(self.error(column, "something stands behind the closing quote")),
            });
        }
    }

    fn error(&self, column: usize, message: &str) -> ImportError {
        ImportError::new(self.row, &format!("{column}"), message)
    }

    fn bare(&mut self, column: usize) -> Result<String, ImportError> {
        let end = self.rest.find([',', '\n']).unwrap_or(self.rest.len());
        let end = if self.rest[..end].ends_with('\r') { end - 1 } else { end };
        let (cell, rest) = self.rest.split_at(end);
        if cell.contains('"') {
            let shown = quote(cell);
            return Err(
                self.error(column, &format!("a quote stands in the bare cell {shown}; expected quotes around it"))
            );
        }
        self.rest = rest;
        // A carriage return at the very end belongs to no cell.
        if self.rest == "\r" {
            self.rest = "";
        }
        Ok(cell.to_owned())
    }

    fn quoted(&mut self, text: &str, column: usize) -> Result<String, ImportError> {
        let mut cell = String::new();
        let mut from = 0;
        while let Some(at) = text[from..].find('"').map(|at| from + at) {
            cell.push_str(&text[from..at]);
            if !text[at + 1..].starts_with('"') {
                let used = self.rest.len() - text.len() + at + 1;
                self.rest = &self.rest[used..];
                return Ok(cell);
            }
            cell.push('"');
            from = at + 2;
        }
        Err(self.error(column, "the quoted cell does not end"))
    }
}
