//! What is wrong with a posture, said so that the person who wrote it can put it right.

use std::fmt;

use keepwall_core::Place;

use crate::tree::{Source, Span};

/// As many problems as one parse reports; whoever has fifty mistakes fixes some and tries again.
pub const PROBLEMS_MAX: usize = 50;

/// A longer source line is shown as a window around the caret: a file of one 4 MiB line must not be printed
/// once per problem.
const LINE_SHOWN_MAX: usize = 160;

/// A message echoes foreign text; more of it than this helps nobody.
const MESSAGE_MAX: usize = 600;

/// Something in a posture that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where it stands; line and column count from 1, a column counts characters.
    pub place: Place,
    /// What is wrong, in one sentence without a full stop.
    pub message: String,
    /// What would have been right; empty if the message says it already.
    pub expected: String,
    /// The word that was probably meant.
    pub suggestion: Option<String>,
    /// The source line, or the part of a very long one that is worth showing. No control characters.
    pub line_text: String,
    /// The character of `line_text` to point at, from 1.
    pub caret: u32,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { file, line, column } = &self.place;
        write!(f, "{file}:{line}:{column}: error: {}", self.message)?;
        if !self.line_text.is_empty() {
            write!(f, "\n{line:>5} | {}", self.line_text)?;
            write!(f, "\n      | {}^", " ".repeat(self.caret.saturating_sub(1) as usize))?;
        }
        if !self.expected.is_empty() {
            write!(f, "\n      = expected {}", self.expected)?;
        }
        if let Some(word) = &self.suggestion {
            write!(f, "\n      = did you mean `{word}`?")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

/// What is wrong with one piece of text, before it is known where that text stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Complaint {
    pub(crate) message: String,
    pub(crate) expected: String,
    pub(crate) suggestion: Option<String>,
}

impl Complaint {
    pub(crate) fn new(message: impl Into<String>) -> Complaint {
        Complaint { message: message.into(), ..Complaint::default() }
    }

    pub(crate) fn expected(mut self, expected: impl Into<String>) -> Complaint {
        self.expected = expected.into();
        self
    }

    pub(crate) fn suggest(mut self, word: Option<impl Into<String>>) -> Complaint {
        self.suggestion = word.map(Into::into);
        self
    }

    /// All of it in one line, for errors that show no source.
    pub(crate) fn sentence(&self) -> String {
        let mut text = printable(&self.message);
        if !self.expected.is_empty() {
            text.push_str("; expected ");
            text.push_str(&printable(&self.expected));
        }
        if let Some(word) = &self.suggestion {
            text.push_str(&format!("; did you mean `{}`?", printable(word)));
        }
        text
    }
}

/// Problems found so far, at most [`PROBLEMS_MAX`].
#[derive(Debug, Default)]
pub(crate) struct Problems {
    found: Vec<Problem>,
}

impl Problems {
    pub(crate) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub(crate) fn count(&self) -> usize {
        self.found.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.found.len() >= PROBLEMS_MAX
    }

    pub(crate) fn add(&mut self, source: &Source<'_>, span: Span, complaint: Complaint) {
        if self.is_full() {
            return;
        }
        let (line_text, caret) = window(source.line_text(span.line), span.column);
        self.found.push(Problem {
            place: source.place(span),
            message: printable(&complaint.message),
            expected: printable(&complaint.expected),
            suggestion: complaint.suggestion.map(|word| printable(&word)),
            line_text,
            caret,
        });
    }

    /// By file as given, then by line: the order in which one fixes them.
    pub(crate) fn into_sorted(mut self, files: &[crate::SourceFile]) -> Vec<Problem> {
        let rank = |problem: &Problem| files.iter().position(|file| file.name == problem.place.file);
        self.found.sort_by_cached_key(|problem| (rank(problem), problem.place.line, problem.place.column));
        self.found.dedup();
        self.found
    }
}

/// The part of a line around `column`, and where the column is in it.
fn window(line: &str, column: u32) -> (String, u32) {
    let at = column.saturating_sub(1) as usize;
    let skip = if at < LINE_SHOWN_MAX { 0 } else { at - LINE_SHOWN_MAX / 2 };
    // One character stays one character, so that the caret stays under what it points at.
    let plain = |c: char| if c.is_control() || is_direction_control(c) { '\u{fffd}' } else { c };
    let shown: String = line.chars().skip(skip).take(LINE_SHOWN_MAX).map(plain).collect();
    let caret = at - skip + 1;
    (shown.trim_end().to_owned(), u32::try_from(caret).unwrap_or(u32::MAX))
}

/// Characters that make a terminal show a text in another order than a machine reads it.
pub(crate) fn is_direction_control(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{61c}')
}

/// Foreign text made safe for a terminal and short enough to read.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == MESSAGE_MAX {
            out.push('…');
            break;
        }
        if c.is_control() || is_direction_control(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// A word of foreign text in a message: quoted, and cut where it stops being helpful.
pub(crate) fn quote(text: &str) -> String {
    const WORD_SHOWN_MAX: usize = 60;
    let mut shown: String = text.chars().take(WORD_SHOWN_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("`{shown}`")
}
