//! YAML as a tree in which every node knows the bytes it was written in.
//!
//! Only what a posture needs: mappings with text keys, sequences, scalars. Anchors, aliases, tags, merge keys,
//! directives, a second document and tabs are refused here, so nobody further on has to think of them. Scalars
//! stay text; what they mean is decided by whoever reads the field, so `on` is never a surprise boolean.

use std::collections::HashMap;
use std::sync::Arc;

use keepwall_core::Place;
use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use crate::problem::{Complaint, Problems, is_direction_control, quote};

/// The largest file that is looked at. A posture at every quota of the cloud is a few hundred kilobytes.
pub const FILE_BYTES_MAX: usize = 4 << 20;
/// Mappings, sequences and scalars over all files.
pub const NODES_MAX: usize = 1_000_000;
/// Nesting. The format itself needs nine levels.
pub const DEPTH_MAX: usize = 32;

/// Where something was written: bytes `start..end`, and the line and column (in characters, from 1) of its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// One node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) span: Span,
    pub(crate) kind: Kind,
}

#[derive(Debug)]
pub(crate) enum Kind {
    /// Text, and whether it was plain (unquoted).
    Scalar { text: String, plain: bool },
    /// `[a, b]` if `flow`, else `- a`, `- b`.
    Sequence { items: Vec<Node>, flow: bool },
    /// `{a: b}` if `flow`, else `a: b`.
    Mapping { entries: Vec<(Key, Node)>, flow: bool },
    /// Something that was refused already; readers keep quiet about it.
    Refused,
}

/// The key of a mapping entry.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) text: String,
    pub(crate) span: Span,
}

impl Node {
    /// True for nothing at all, `~` and `null`.
    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The value behind a key of a mapping.
    pub(crate) fn entry(&self, key: &str) -> Option<(&Key, &Node)> {
        self.entries().iter().find(|(k, _)| k.text == key).map(|(k, v)| (k, v))
    }

    pub(crate) fn entries(&self) -> &[(Key, Node)] {
        match &self.kind {
            Kind::Mapping { entries, .. } => entries,
            _ => &[],
        }
    }

    pub(crate) fn items(&self) -> &[Node] {
        match &self.kind {
            Kind::Sequence { items, .. } => items,
            _ => &[],
        }
    }

    /// `a list`, `a mapping`, … for messages.
    pub(crate) fn shape(&self) -> &'static str {
        match &self.kind {
            _ if self.is_null() => "nothing",
            Kind::Scalar { .. } => "a single value",
            Kind::Sequence { .. } => "a list",
            Kind::Mapping { .. } => "a mapping",
            Kind::Refused => "something refused",
        }
    }
}

/// A file with an index of its lines.
pub(crate) struct Source<'a> {
    pub(crate) name: Arc<str>,
    pub(crate) text: &'a str,
    /// Where each line begins.
    lines: Vec<usize>,
    /// The byte of every `STRIDE`th character after the byte order mark.
    chars: Vec<usize>,
}

const STRIDE: usize = 64;
const BYTE_ORDER_MARK: &str = "\u{feff}";

impl<'a> Source<'a> {
    pub(crate) fn new(name: &Arc<str>, text: &'a str) -> Source<'a> {
        let body = text.len() - text.trim_start_matches(BYTE_ORDER_MARK).len();
        let lines = std::iter::once(body).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let chars = text[body..].char_indices().step_by(STRIDE).map(|(at, _)| body + at).collect();
        Source { name: Arc::clone(name), text, lines, chars }
    }

    /// The text behind the byte order mark, if there is one.
    fn body(&self) -> &'a str {
        &self.text[self.lines.first().copied().unwrap_or(0)..]
    }

    pub(crate) fn place(&self, span: Span) -> Place {
        Place::new(&self.name, span.line, span.column)
    }

    /// A line by its number from 1, without its line end; empty if there is none.
    pub(crate) fn line_text(&self, line: u32) -> &'a str {
        let Some(index) = (line as usize).checked_sub(1) else { return "" };
        let Some(&start) = self.lines.get(index) else { return "" };
        let end = self.lines.get(index + 1).copied().unwrap_or(self.text.len());
        self.text[start..end].trim_end_matches(['\n', '\r'])
    }

    /// The byte of a parser mark.
    fn byte(&self, mark: Marker) -> usize {
        let Some(&base) = self.chars.get(mark.index() / STRIDE) else { return self.text.len() };
        self.text[base..].char_indices().nth(mark.index() % STRIDE).map_or(self.text.len(), |(at, _)| base + at)
    }

    fn span(&self, start: Marker, end: Marker) -> Span {
        let from = self.byte(start);
        // A scalar's end may lie behind blanks; nothing of ours begins or ends with one.
        let to = from + self.text.get(from..self.byte(end).max(from)).unwrap_or("").trim_end().len();
        Span { start: from, end: to, line: number(start.line()), column: number(start.col() + 1) }
    }

    /// The span of one character at a byte.
    fn span_at(&self, byte: usize) -> Span {
        let line = self.lines.partition_point(|start| *start <= byte).max(1);
        let start = self.lines[line - 1];
        let column = self.text.get(start..byte).unwrap_or("").chars().count() + 1;
        Span { start: byte, end: byte, line: number(line), column: number(column) }
    }
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The first thing in a file, for problems about the file as a whole.
pub(crate) const TOP: Span = Span { start: 0, end: 0, line: 1, column: 1 };

/// Reads a file. `None` if it is no YAML, or empty; what is refused is in `problems` then and also when a tree
/// comes back. `nodes` counts over several files.
pub(crate) fn build(source: &Source<'_>, nodes: &mut usize, problems: &mut Problems) -> Option<Node> {
    if source.text.len() > FILE_BYTES_MAX {
        let size = source.text.len();
        problems.add(source, TOP, Complaint::new(format!("the file has {size} bytes; the most is {FILE_BYTES_MAX}")));
        return None;
    }
    if !scan_characters(source, problems) {
        return None;
    }
    let root = Builder { source, nodes, problems, stack: Vec::new(), root: None, scalars: Vec::new() }.run()?;
    Some(root)
}

/// Refuses characters that no posture needs and that would make the text mean something else than it shows,
/// and directives.
fn scan_characters(source: &Source<'_>, problems: &mut Problems) -> bool {
    let start = source.text.len() - source.body().len();
    let mut good = true;
    let mut refuse = |byte: usize, complaint: Complaint| {
        good = false;
        problems.add(source, source.span_at(byte), complaint);
    };
    let bytes = source.text.as_bytes();
    // One problem a line is enough, and finding a column costs a walk along its line.
    let mut refused_line_end = 0;
    for (at, c) in source.body().char_indices().map(|(at, c)| (start + at, c)) {
        let allowed = match c {
            '\n' | '\t' => true,
            '\r' => bytes.get(at + 1) == Some(&b'\n'),
            '\u{feff}' => false,
            c => !c.is_control() && !is_direction_control(c),
        };
        if !allowed && at >= refused_line_end {
            refused_line_end = source.text[at..].find('\n').map_or(source.text.len(), |next| at + next + 1);
            let code = c as u32;
            refuse(at, Complaint::new(format!("the character U+{code:04X} is not allowed in a posture")));
        }
    }
    let mut offset = start;
    for line in source.body().split_inclusive('\n') {
        let text = line.trim();
        if text.starts_with('%') && line.starts_with('%') {
            refuse(offset, Complaint::new("YAML directives are not allowed").expected("a posture without `%` lines"));
        }
        if !(text.is_empty() || text.starts_with('#') || line.starts_with('%')) {
            break;
        }
        offset += line.len();
    }
    good
}

/// A collection that is not closed yet.
enum Frame {
    Sequence { span: Span, items: Vec<Node>, refused: bool },
    Mapping { span: Span, entries: Vec<(Key, Node)>, key: Option<Key>, refused: bool },
}

struct Builder<'s, 'a> {
    source: &'s Source<'a>,
    nodes: &'s mut usize,
    problems: &'s mut Problems,
    stack: Vec<Frame>,
    root: Option<Node>,
    /// Every scalar's bytes in file order, to tell a `#` or a tab in a text from one outside.
    scalars: Vec<(usize, usize)>,
}

impl Builder<'_, '_> {
    fn run(mut self) -> Option<Node> {
        let mut parser = Parser::new_from_str(self.source.body());
        let mut documents = 0;
        // Each event consumes input or closes a frame, so the loop ends with the file.
        while let Some(event) = parser.next_event() {
            let (event, span) = match event {
                Ok(event) => event,
                Err(error) => {
                    self.syntax_error(*error.marker(), error.info());
                    return None;
                }
            };
            let at = self.source.span(span.start, span.end);
            match event {
                Event::DocumentStart(_) => {
                    documents += 1;
                    if documents > 1 {
                        let complaint = Complaint::new("a second YAML document begins here");
                        self.problems.add(self.source, at, complaint.expected("one document in a file"));
                        return None;
                    }
                }
                Event::Alias(_) => {
                    self.refuse(at, "aliases (`*name`) are not allowed", "the value itself");
                    self.push(Node { span: at, kind: Kind::Refused });
                }
                Event::Scalar(text, style, anchor, tag) => {
                    let refused = self.refuse_decoration(at, anchor, tag.is_some());
                    let plain = style == ScalarStyle::Plain;
                    let at = self.exact(at, style);
                    if plain && text.is_empty() {
                        self.push_null(at, refused);
                    } else {
                        self.scalars.push((at.start, at.end));
                        let kind =
                            if refused { Kind::Refused } else { Kind::Scalar { text: text.into_owned(), plain } };
                        self.push(Node { span: at, kind });
                    }
                }
                Event::SequenceStart(anchor, tag) => {
                    let refused = self.refuse_decoration(at, anchor, tag.is_some());
                    self.stack.push(Frame::Sequence { span: at, items: Vec::new(), refused });
                }
                Event::MappingStart(anchor, tag) => {
                    let refused = self.refuse_decoration(at, anchor, tag.is_some());
                    self.stack.push(Frame::Mapping { span: at, entries: Vec::new(), key: None, refused });
                }
                Event::SequenceEnd | Event::MappingEnd => self.close(),
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
            }
            if self.stack.len() > DEPTH_MAX {
                let complaint = Complaint::new(format!("nested deeper than {DEPTH_MAX} levels"));
                self.problems.add(self.source, at, complaint);
                return None;
            }
            *self.nodes += 1;
            if *self.nodes > NODES_MAX {
                self.problems.add(
                    self.source,
                    at,
                    Complaint::new(format!("more than {NODES_MAX} values in all files")),
                );
                return None;
            }
        }
        self.refuse_tabs();
        self.root
    }

    /// The bytes of a scalar with its quotes or its block indicator, and nothing else: the parser counts blanks and
    /// a comment behind a quoted text to it, and leaves the indicator out.
    fn exact(&self, at: Span, style: ScalarStyle) -> Span {
        let text = self.source.text;
        match style {
            ScalarStyle::Plain => at,
            ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted => Span { end: closing_quote(text, at.start), ..at },
            ScalarStyle::Literal | ScalarStyle::Folded => {
                let Some(Frame::Mapping { key: Some(key), .. }) = self.stack.last() else { return at };
                let between = text.get(key.span.end..at.start).unwrap_or("");
                match between.find(['|', '>']) {
                    Some(indicator) => Span { end: at.end, ..self.source.span_at(key.span.end + indicator) },
                    None => at,
                }
            }
        }
    }

    fn refuse(&mut self, at: Span, message: &str, expected: &str) {
        self.problems.add(self.source, at, Complaint::new(message).expected(expected));
    }

    /// True if something was refused.
    fn refuse_decoration(&mut self, at: Span, anchor: usize, tagged: bool) -> bool {
        if anchor != 0 {
            self.refuse(at, "anchors (`&name`) are not allowed", "each value written where it is meant");
        }
        if tagged {
            self.refuse(at, "tags (`!name`) are not allowed", "a plain value");
        }
        anchor != 0 || tagged
    }

    fn syntax_error(&mut self, mark: Marker, info: &str) {
        let mut at = self.source.span(mark, mark);
        // The end of the file has a line of its own only if one was begun.
        at.line = at.line.max(1);
        let before = self.source.line_text(at.line).chars().take(at.column as usize).collect::<String>();
        let complaint = if before.contains('\t') {
            Complaint::new("this is not valid YAML: a tab stands where YAML wants spaces").expected("spaces")
        } else {
            Complaint::new(format!("this is not valid YAML: {info}"))
        };
        self.problems.add(self.source, at, complaint);
    }

    /// Nothing was written: the place is the key's, for that is what a reader looks for.
    fn push_null(&mut self, at: Span, refused: bool) {
        let span = match self.stack.last() {
            Some(Frame::Mapping { key: Some(key), .. }) => Span { start: key.span.end, end: key.span.end, ..key.span },
            _ => Span { end: at.start, ..at },
        };
        let kind = if refused { Kind::Refused } else { Kind::Scalar { text: String::new(), plain: true } };
        self.push(Node { span, kind });
    }

    fn push(&mut self, node: Node) {
        match self.stack.last_mut() {
            None => self.root = Some(node),
            Some(Frame::Sequence { items, .. }) => items.push(node),
            Some(Frame::Mapping { entries, key, .. }) => match key.take() {
                Some(key) => entries.push((key, node)),
                None => {
                    *key = Some(match node.kind {
                        Kind::Scalar { text, .. } => Key { text, span: node.span },
                        _ => {
                            let complaint = Complaint::new("a key must be a single word");
                            self.problems.add(self.source, node.span, complaint.expected("`name: value`"));
                            Key { text: String::new(), span: node.span }
                        }
                    });
                }
            },
        }
    }

    fn close(&mut self) {
        let Some(frame) = self.stack.pop() else { return };
        // A flow collection ends with its bracket, a block collection with its last child. The parser's own mark of
        // the end may lie at a comma before the bracket.
        let ended = |start: Span, flow: bool, last: Option<usize>| Span {
            end: match flow {
                true => closing_bracket(self.source.text, last.unwrap_or(start.start + 1)),
                false => last.unwrap_or(start.end),
            },
            ..start
        };
        // The parser's mark of a block sequence may lie at its first item.
        let opens = |span: Span, bracket: u8, first: Option<usize>| {
            self.source.text.as_bytes().get(span.start) == Some(&bracket) && first != Some(span.start)
        };
        let node = match frame {
            Frame::Sequence { span, items, refused } => {
                let flow = opens(span, b'[', items.first().map(|item| item.span.start));
                let span = ended(span, flow, items.last().map(|item| item.span.end));
                Node { span, kind: if refused { Kind::Refused } else { Kind::Sequence { items, flow } } }
            }
            Frame::Mapping { span, entries, refused, .. } => {
                let flow = opens(span, b'{', entries.first().map(|(key, _)| key.span.start));
                let span = ended(span, flow, entries.last().map(|(key, value)| value.span.end.max(key.span.end)));
                let entries = self.unique(entries);
                Node { span, kind: if refused { Kind::Refused } else { Kind::Mapping { entries, flow } } }
            }
        };
        self.push(node);
    }

    /// Refuses merge keys and second entries of a key.
    fn unique(&mut self, entries: Vec<(Key, Node)>) -> Vec<(Key, Node)> {
        let mut seen: HashMap<String, Span> = HashMap::with_capacity(entries.len());
        let mut kept = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            if key.text == "<<" {
                self.refuse(key.span, "merge keys (`<<`) are not allowed", "each field written out");
                continue;
            }
            if let Some(first) = seen.get(&key.text) {
                let first = self.source.place(*first);
                let complaint = Complaint::new(format!(
                    "{} is given twice; the first time at {first}:{}",
                    quote(&key.text),
                    first.column
                ));
                self.problems.add(self.source, key.span, complaint.expected("each key once"));
                continue;
            }
            seen.insert(key.text.clone(), key.span);
            kept.push((key, value));
        }
        kept
    }

    /// Tabs stand in comments only: everywhere else YAML itself disagrees about them.
    fn refuse_tabs(&mut self) {
        let mut offset = 0;
        for line in self.source.text.split_inclusive('\n') {
            if let Some(tab) = line.find('\t') {
                let in_comment =
                    comment_start(self.source.text, offset, &self.scalars).is_some_and(|c| c < offset + tab);
                if !in_comment {
                    let at = self.source.span_at(offset + tab);
                    self.refuse(at, "tabs are not allowed", "spaces");
                }
            }
            if self.problems.is_full() {
                return;
            }
            offset += line.len();
        }
    }
}

/// Behind the quote that closes the text whose opening quote stands at `start`.
fn closing_quote(text: &str, start: usize) -> usize {
    let bytes = text.as_bytes();
    let Some(quote) = bytes.get(start) else { return text.len() };
    let mut at = start + 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'\\' if *quote == b'"' => at += 2,
            byte if byte == quote && *quote == b'\'' && bytes.get(at + 1) == Some(quote) => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// Behind the bracket that closes a flow collection whose last child ends at `from`: only commas, the colon of a
/// key with nothing behind it, blanks and comments stand between.
fn closing_bracket(text: &str, from: usize) -> usize {
    let bytes = text.as_bytes();
    let mut at = from;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b']' | b'}' => return at + 1,
            b'#' => at = text[at..].find('\n').map_or(text.len(), |newline| at + newline),
            _ => at += 1,
        }
    }
    text.len()
}

/// Where the comment of the line that begins at `line` begins, given the bytes of all scalars in order.
pub(crate) fn comment_start(text: &str, line: usize, scalars: &[(usize, usize)]) -> Option<usize> {
    let end = text[line..].find('\n').map_or(text.len(), |at| line + at);
    let bytes = text.as_bytes();
    (line..end).find(|&at| {
        let opens = bytes[at] == b'#' && (at == line || matches!(bytes[at - 1], b' ' | b'\t'));
        opens && !within(scalars, at)
    })
}

/// True if a byte lies in one of the scalars.
fn within(scalars: &[(usize, usize)], at: usize) -> bool {
    let after = scalars.partition_point(|(start, _)| *start <= at);
    after.checked_sub(1).and_then(|index| scalars.get(index)).is_some_and(|(_, end)| at < *end)
}

/// The bytes of every scalar, keys included, in file order.
pub(crate) fn scalars(root: &Node) -> Vec<(usize, usize)> {
    let mut out = Vec::new();
    collect_scalars(root, &mut out);
    out.sort_unstable();
    out
}

/// Recursion is bounded by [`DEPTH_MAX`].
fn collect_scalars(node: &Node, out: &mut Vec<(usize, usize)>) {
    match &node.kind {
        Kind::Scalar { .. } => out.push((node.span.start, node.span.end)),
        Kind::Sequence { items, .. } => items.iter().for_each(|item| collect_scalars(item, out)),
        Kind::Mapping { entries, .. } => {
            for (key, value) in entries {
                out.push((key.span.start, key.span.end));
                collect_scalars(value, out);
            }
        }
        Kind::Refused => {}
    }
}
