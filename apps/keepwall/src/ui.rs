//! What a person sees: tables, colours, marks. Standard output is data, standard error is talk.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the one module that prints")]

use std::io::{IsTerminal, Write};
use std::sync::OnceLock;

static COLOUR: OnceLock<bool> = OnceLock::new();

/// Decides once whether to colour: not if asked not to, nor by NO_COLOR, nor into a file.
pub fn start(no_color: bool) {
    let wanted = !no_color
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
        && std::io::stdout().is_terminal();
    let _ = COLOUR.set(wanted);
}

fn paint(code: &str, text: &str) -> String {
    if *COLOUR.get().unwrap_or(&false) { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

pub fn bold(text: &str) -> String {
    paint("1", text)
}
pub fn dim(text: &str) -> String {
    paint("2", text)
}
pub fn green(text: &str) -> String {
    paint("32", text)
}
pub fn red(text: &str) -> String {
    paint("31", text)
}
pub fn yellow(text: &str) -> String {
    paint("33", text)
}

/// A line of data.
pub fn out(text: impl AsRef<str>) {
    // A reader that closed the pipe has seen enough.
    if writeln!(std::io::stdout(), "{}", text.as_ref()).is_err() {
        std::process::exit(0);
    }
}

/// A line of talk.
pub fn say(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr(), "{}", text.as_ref());
}

/// JSON on standard output.
pub fn json(value: &impl serde::Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => out(text),
        Err(error) => say(format!("cannot write JSON: {error}")),
    }
}

/// Width as a terminal shows it: escape sequences take no room, wide characters two columns.
fn width(text: &str) -> usize {
    let mut width = 0;
    let mut escape = false;
    for c in text.chars() {
        match (escape, c) {
            (true, 'm') => escape = false,
            (true, _) => {}
            (false, '\x1b') => escape = true,
            (false, c) => {
                width +=
                    if ('\u{1100}'..='\u{115f}').contains(&c) || ('\u{2e80}'..='\u{ffdc}').contains(&c) { 2 } else { 1 }
            }
        }
    }
    width
}

/// Columns under bold headings, two blanks apart.
pub fn table(headings: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = headings.iter().map(|h| width(h)).collect();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            if let Some(w) = widths.get_mut(column) {
                *w = (*w).max(width(cell));
            }
        }
    }
    let line = |cells: &[String]| {
        let mut text = String::new();
        for (n, cell) in cells.iter().enumerate() {
            text.push_str(cell);
            if n + 1 < cells.len() {
                text.push_str(&" ".repeat(widths.get(n).map_or(0, |w| w.saturating_sub(width(cell))) + 2));
            }
        }
        text
    };
    out(line(&headings.iter().map(|h| bold(h)).collect::<Vec<_>>()));
    for row in rows {
        out(line(row));
    }
}
