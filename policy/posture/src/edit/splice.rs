//! Changes to a text by the tree that was read from it: which bytes to replace, and nothing else.
//!
//! Each function returns patches. None of them is trusted: whoever applies them parses the result again and
//! compares it with what was meant.

use std::collections::BTreeSet;

use crate::tree::{Key, Kind, Node, comment_start};

/// Bytes `start..end` become `text`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Patch {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) text: String,
}

/// The way a text is written does not allow this edit.
#[derive(Debug)]
pub(super) struct Awkward;

pub(super) type Patches = Result<Vec<Patch>, Awkward>;

/// A parsed text.
pub(super) struct Doc<'t> {
    pub(super) text: &'t str,
    pub(super) root: Node,
    /// Bytes of all scalars in order.
    pub(super) scalars: Vec<(usize, usize)>,
}

/// A value with the key that it stands behind.
#[derive(Clone, Copy)]
pub(super) struct Spot<'d> {
    pub(super) key: Option<&'d Key>,
    pub(super) node: &'d Node,
    /// The mapping that holds the key is written in braces.
    pub(super) in_flow: bool,
}

/// Something to write, in both styles.
#[derive(Clone, Debug)]
pub(super) struct Value {
    /// On one line, for flow style.
    pub(super) flow: String,
    /// For block style, without the outer indentation. For a value of a key, empty means that the flow text
    /// follows the key; for an item, that it follows the dash.
    pub(super) block: Vec<String>,
}

impl Value {
    pub(super) fn flow(text: impl Into<String>) -> Value {
        Value { flow: text.into(), block: Vec::new() }
    }

    /// A sequence of items.
    pub(super) fn list(items: &[Value]) -> Value {
        Value { flow: format!("[{}]", joined(items)), block: dashed(items) }
    }
}

fn joined(items: &[Value]) -> String {
    items.iter().map(|item| item.flow.as_str()).collect::<Vec<_>>().join(", ")
}

/// The lines of items in block style.
fn dashed(items: &[Value]) -> Vec<String> {
    let mut lines = Vec::new();
    for item in items {
        match item.block.as_slice() {
            [] => lines.push(format!("- {}", item.flow)),
            [first, rest @ ..] => {
                lines.push(format!("- {first}"));
                lines.extend(rest.iter().map(|line| format!("  {line}")));
            }
        }
    }
    lines
}

/// The patched text; `None` if patches overlap.
pub(super) fn apply(text: &str, mut patches: Vec<Patch>) -> Option<String> {
    patches.sort_by_key(|patch| (patch.start, patch.end));
    let mut out = String::with_capacity(text.len() + 256);
    let mut done = 0;
    for patch in &patches {
        out.push_str(text.get(done..patch.start)?);
        out.push_str(&patch.text);
        done = patch.end;
    }
    out.push_str(text.get(done..)?);
    Some(out)
}

impl<'d> Doc<'d> {
    /// The value behind a path of keys.
    pub(super) fn walk(&self, path: &[&str]) -> Option<Spot<'_>> {
        let mut spot = Spot { key: None, node: &self.root, in_flow: false };
        for step in path {
            let in_flow = matches!(spot.node.kind, Kind::Mapping { flow: true, .. });
            let (key, node) = spot.node.entry(step)?;
            spot = Spot { key: Some(key), node, in_flow };
        }
        Some(spot)
    }

    fn eol(&self) -> &'static str {
        if self.text.contains("\r\n") { "\r\n" } else { "\n" }
    }

    fn line_start(&self, at: usize) -> usize {
        let start = self.text[..at].rfind('\n').map_or(0, |newline| newline + 1);
        // The mark at the top of a file is no part of its first line.
        if self.text[start..at].starts_with('\u{feff}') { start + '\u{feff}'.len_utf8() } else { start }
    }

    /// Before the line end.
    fn line_end(&self, at: usize) -> usize {
        let end = self.text[at..].find('\n').map_or(self.text.len(), |newline| at + newline);
        if self.text[at..end].ends_with('\r') { end - 1 } else { end }
    }

    /// Behind the line end.
    fn next_line(&self, at: usize) -> usize {
        self.text[at..].find('\n').map_or(self.text.len(), |newline| at + newline + 1)
    }

    /// What stands before a byte on its line, if that is blank.
    fn blank_before(&self, at: usize) -> Option<&str> {
        Some(&self.text[self.line_start(at)..at]).filter(|text| text.trim().is_empty())
    }

    /// New lines behind the line of a byte.
    fn lines_after(&self, at: usize, indent: &str, lines: &[String]) -> Patch {
        let at = self.line_end(at);
        let text = lines.iter().map(|line| format!("{}{indent}{line}", self.eol())).collect();
        Patch { start: at, end: at, text }
    }

    /// The lines in these bytes that hold a comment and nothing else.
    fn comment_lines(&self, start: usize, end: usize) -> String {
        let mut out = String::new();
        let mut at = start;
        while at < end {
            let next = self.next_line(at).min(end);
            let line = &self.text[at..next];
            let blank = line.len() - line.trim_start().len();
            if line[blank..].starts_with('#') && comment_start(self.text, at, &self.scalars) == Some(at + blank) {
                out.push_str(line);
            }
            at = next;
        }
        out
    }

    /// Other bytes in place of these; comment lines among them move behind the line.
    fn replace(&self, start: usize, end: usize, text: &str) -> Vec<Patch> {
        let mut patches = vec![Patch { start, end, text: text.to_owned() }];
        let first = self.next_line(start);
        if first < end {
            let kept = self.comment_lines(first, self.line_start(end));
            let kept = kept.trim_end_matches(['\r', '\n']);
            if !kept.is_empty() {
                let at = self.line_end(end);
                patches.push(Patch { start: at, end: at, text: format!("{}{kept}", self.eol()) });
            }
        }
        patches
    }

    /// Whole lines away, but for their comment lines.
    fn drop_lines(&self, start: usize, end: usize) -> Patch {
        Patch { start, end, text: self.comment_lines(start, end) }
    }

    /// The byte behind a key's colon.
    fn after_colon(&self, key: &Key) -> Result<usize, Awkward> {
        let rest = &self.text[key.span.end..];
        let blank = rest.len() - rest.trim_start_matches(' ').len();
        if rest[blank..].starts_with(':') { Ok(key.span.end + blank + 1) } else { Err(Awkward) }
    }

    /// Where an entry of a mapping ends: with its value, or with its colon.
    fn entry_end(&self, (key, value): &(Key, Node)) -> usize {
        let nothing = value.is_null() && value.span.start == value.span.end;
        if nothing { self.after_colon(key).unwrap_or(key.span.end) } else { value.span.end }
    }

    /// The comma behind a byte, if only blanks and comments stand between.
    fn comma_after(&self, at: usize) -> Option<usize> {
        self.find_outside_comments(at, self.text.len(), b',')
    }

    /// The first byte that is neither blank nor in a comment, if it is `wanted`.
    fn find_outside_comments(&self, from: usize, to: usize, wanted: u8) -> Option<usize> {
        let bytes = self.text.as_bytes();
        let mut at = from;
        while at < to {
            match bytes[at] {
                b'#' => at = self.next_line(at),
                b' ' | b'\t' | b'\r' | b'\n' => at += 1,
                found => return (found == wanted).then_some(at),
            }
        }
        None
    }

    /// The dash of an item of a block sequence.
    fn dash(&self, spot: Spot<'_>, index: usize) -> Result<usize, Awkward> {
        let items = spot.node.items();
        let from = match index.checked_sub(1) {
            Some(before) => items[before].span.end,
            None => self.after_colon(spot.key.ok_or(Awkward)?)?,
        };
        self.find_outside_comments(from, items[index].span.start, b'-').ok_or(Awkward)
    }

    /// Something behind a key that has nothing.
    fn fill(&self, spot: Spot<'_>, value: &Value) -> Patches {
        let key = spot.key.ok_or(Awkward)?;
        if spot.node.span.end > spot.node.span.start {
            // `~` or `null` was written.
            return Ok(self.replace(spot.node.span.start, spot.node.span.end, &value.flow));
        }
        if spot.in_flow || value.block.is_empty() {
            let (at, text) = match self.after_colon(key) {
                Ok(at) => (at, format!(" {}", value.flow)),
                Err(Awkward) => (key.span.end, format!(": {}", value.flow)),
            };
            return Ok(vec![Patch { start: at, end: at, text }]);
        }
        let indent = " ".repeat(key.span.column as usize - 1 + 2);
        Ok(vec![self.lines_after(self.after_colon(key)?, &indent, &value.block)])
    }

    /// Items at the end of the list behind `key` of a mapping; key and list are made if they are not there.
    pub(super) fn push(&self, mapping: Spot<'_>, key: &str, items: &[Value]) -> Patches {
        let in_flow = matches!(mapping.node.kind, Kind::Mapping { flow: true, .. });
        let Some((key_node, node)) = mapping.node.entry(key) else {
            return self.add_entry(mapping, key, &Value::list(items), false);
        };
        let spot = Spot { key: Some(key_node), node, in_flow };
        if node.is_null() {
            return self.fill(spot, &Value::list(items));
        }
        let Kind::Sequence { items: present, flow } = &node.kind else { return Err(Awkward) };
        let Some(last) = present.last() else { return self.push_first(spot, items) };
        if !flow {
            let dash = self.dash(spot, present.len() - 1)?;
            let indent = self.blank_before(dash).ok_or(Awkward)?;
            return Ok(vec![self.lines_after(last.span.end, indent, &dashed(items))]);
        }
        self.push_flow(last.span.start, last.span.end, node.span.end - 1, items)
    }

    /// The first items of `[]`.
    fn push_first(&self, spot: Spot<'_>, items: &[Value]) -> Patches {
        let span = spot.node.span;
        let inner = &self.text[span.start + 1..span.end - 1];
        if !inner.trim().is_empty() {
            // Comments stand between the brackets.
            let close = span.end - 1;
            let indent = self.blank_before(close).ok_or(Awkward)?;
            let at = self.line_start(close);
            return Ok(vec![Patch { start: at, end: at, text: format!("{indent}  {}{}", joined(items), self.eol()) }]);
        }
        let key = spot.key.ok_or(Awkward)?;
        let blocky = !spot.in_flow && !inner.contains('\n') && items.iter().any(|item| item.flow.starts_with('{'));
        if !blocky {
            return Ok(vec![Patch { start: span.start, end: span.end, text: format!("[{}]", joined(items)) }]);
        }
        let indent = " ".repeat(key.span.column as usize - 1 + 2);
        let bracket = Patch { start: self.after_colon(key)?, end: span.end, text: String::new() };
        Ok(vec![bracket, self.lines_after(span.end, &indent, &dashed(items))])
    }

    /// Items behind the last of a flow sequence that closes at `close`.
    fn push_flow(&self, start: usize, end: usize, close: usize, items: &[Value]) -> Patches {
        let comma = self.comma_after(end).filter(|comma| *comma < close);
        let own_lines = self.text[end..close].contains('\n').then(|| self.blank_before(start)).flatten();
        let Some(indent) = own_lines else {
            let (at, text) = match comma {
                Some(comma) => (comma + 1, format!(" {}", joined(items))),
                None => (end, format!(", {}", joined(items))),
            };
            return Ok(vec![Patch { start: at, end: at, text }]);
        };
        let mut lines: Vec<String> = items.iter().map(|item| format!("{},", item.flow)).collect();
        let mut patches = Vec::new();
        if comma.is_none() {
            patches.push(Patch { start: end, end, text: ",".to_owned() });
            if let Some(last) = lines.last_mut() {
                last.pop();
            }
        }
        patches.push(self.lines_after(comma.unwrap_or(end), indent, &lines));
        Ok(patches)
    }

    /// A new entry of a mapping. A `short` one goes behind the last short one instead of to the end.
    pub(super) fn add_entry(&self, mapping: Spot<'_>, key: &str, value: &Value, short: bool) -> Patches {
        let flow_text = format!("{key}: {}", value.flow);
        let lines: Vec<String> = match value.block.is_empty() {
            true => vec![flow_text.clone()],
            false => {
                std::iter::once(format!("{key}:")).chain(value.block.iter().map(|line| format!("  {line}"))).collect()
            }
        };
        if mapping.node.is_null() {
            return self.fill(mapping, &Value { flow: format!("{{ {flow_text} }}"), block: lines });
        }
        let Kind::Mapping { entries, flow } = &mapping.node.kind else { return Err(Awkward) };
        let span = mapping.node.span;
        let Some(last) = entries.last() else {
            let inner = &self.text[span.start + 1..span.end - 1];
            if !inner.trim().is_empty() {
                return Err(Awkward);
            }
            return Ok(vec![Patch { start: span.start, end: span.end, text: format!("{{ {flow_text} }}") }]);
        };
        if *flow {
            return self.push_flow(last.0.span.start, self.entry_end(last), span.end - 1, &[Value::flow(flow_text)]);
        }
        let is_short = |(_, node): &&(Key, Node)| match node.kind {
            Kind::Scalar { .. } => true,
            Kind::Sequence { flow, .. } | Kind::Mapping { flow, .. } => flow,
            Kind::Refused => false,
        };
        let anchor = entries.iter().rev().find(is_short).filter(|_| short).unwrap_or(last);
        let indent = " ".repeat(anchor.0.span.column as usize - 1);
        Ok(vec![self.lines_after(self.entry_end(anchor), &indent, &lines)])
    }

    /// Another value behind a key of a mapping; the key is made if it is not there.
    pub(super) fn set(&self, mapping: Spot<'_>, key: &str, text: &str) -> Patches {
        let in_flow = matches!(mapping.node.kind, Kind::Mapping { flow: true, .. });
        let value = Value::flow(text);
        let Some((key_node, node)) = mapping.node.entry(key) else { return self.add_entry(mapping, key, &value, true) };
        if node.is_null() {
            return self.fill(Spot { key: Some(key_node), node, in_flow }, &value);
        }
        let block = matches!(node.kind, Kind::Sequence { flow: false, .. } | Kind::Mapping { flow: false, .. });
        if !block {
            return Ok(self.replace(node.span.start, node.span.end, text));
        }
        let colon = self.after_colon(key_node)?;
        let below = self.next_line(colon);
        if below > node.span.start {
            return Err(Awkward);
        }
        let value = Patch { start: colon, end: colon, text: format!(" {text}") };
        Ok(vec![value, self.drop_lines(below, self.next_line(node.span.end))])
    }

    /// Items away from a list; an empty list stays.
    pub(super) fn remove_items(&self, list: Spot<'_>, which: &BTreeSet<usize>) -> Patches {
        let Kind::Sequence { items, flow } = &list.node.kind else { return Err(Awkward) };
        if *flow && which.len() == items.len() {
            // The closing bracket comes along: on a line of its own, with nothing before it, YAML may refuse it.
            return Ok(self.replace(list.node.span.start, list.node.span.end, "[]"));
        }
        if *flow {
            let parts: Vec<(usize, usize)> = items.iter().map(|item| (item.span.start, item.span.end)).collect();
            return Ok(self.remove_flow(&parts, list.node.span.end - 1, which));
        }
        let mut patches = Vec::new();
        for &index in which {
            let dash = self.dash(list, index)?;
            self.blank_before(dash).ok_or(Awkward)?;
            let end = items.get(index).ok_or(Awkward)?.span.end;
            patches.push(self.drop_lines(self.line_start(dash), self.next_line(end)));
        }
        if which.len() == items.len() {
            let colon = self.after_colon(list.key.ok_or(Awkward)?)?;
            patches.push(Patch { start: colon, end: colon, text: " []".to_owned() });
        }
        Ok(patches)
    }

    /// An entry away from a mapping, comments within it too; an empty mapping stays.
    pub(super) fn remove_entry(&self, mapping: Spot<'_>, key: &str) -> Patches {
        let Kind::Mapping { entries, flow } = &mapping.node.kind else { return Err(Awkward) };
        let index = entries.iter().position(|(own, _)| own.text == key).ok_or(Awkward)?;
        let parts: Vec<(usize, usize)> =
            entries.iter().map(|entry| (entry.0.span.start, self.entry_end(entry))).collect();
        if *flow {
            return Ok(self.remove_flow(&parts, mapping.node.span.end - 1, &BTreeSet::from([index])));
        }
        let (start, end) = parts[index];
        self.blank_before(start).ok_or(Awkward)?;
        let mut patches = vec![Patch { start: self.line_start(start), end: self.next_line(end), text: String::new() }];
        if entries.len() == 1 {
            let colon = self.after_colon(mapping.key.ok_or(Awkward)?)?;
            patches.push(Patch { start: colon, end: colon, text: " {}".to_owned() });
        }
        Ok(patches)
    }

    /// Parts away from between brackets, with one comma each. A trailing comma may stay; YAML allows it.
    fn remove_flow(&self, parts: &[(usize, usize)], close: usize, which: &BTreeSet<usize>) -> Vec<Patch> {
        let mut patches = Vec::new();
        let kept_before = |index: usize| (0..index).rev().find(|before| !which.contains(before));
        let kept_after = |index: usize| (index + 1..parts.len()).any(|after| !which.contains(&after));
        for &index in which {
            let Some(&(start, end)) = parts.get(index) else { continue };
            let comma = self.comma_after(end).filter(|comma| *comma < close);
            let before = kept_before(index).map(|before| parts[before].1);
            let one_line = before.filter(|before| !kept_after(index) && !self.text[*before..end].contains('\n'));
            if let Some(before) = one_line {
                // The last ones of a line: the comma before each goes with it.
                let from = if which.contains(&(index - 1)) { parts[index - 1].1 } else { before };
                patches.push(Patch { start: from, end, text: String::new() });
                continue;
            }
            let mut to = comma.map_or(end, |comma| comma + 1);
            if self.text[start..to].contains('\n') && comma.is_some() && self.text[end..to].contains('#') {
                // A comment stands between the part and its comma.
                patches.extend(self.replace(start, to, ""));
                continue;
            }
            if self.text[to..].starts_with(' ')
                && !self.text[to..].trim_start_matches(' ').starts_with(['#', '\r', '\n'])
            {
                to += 1;
            }
            let rest = self.text[to..self.line_end(to)].trim_start();
            let line_is_ours = self.blank_before(start).is_some() && (rest.is_empty() || rest.starts_with('#'));
            if line_is_ours {
                patches.push(self.drop_lines(self.line_start(start), self.next_line(to)));
            } else {
                patches.extend(self.replace(start, to, ""));
            }
        }
        patches
    }
}
