//! Posture files: YAML in, a spec out, and edits that keep every comment.
//!
//! Pure: callers hand over names and texts, and get values, texts and problems back. What a posture may hold is
//! written down for people in `docs/posture.md` and for editors in `docs/posture.schema.json`.
//!
//! Only what one file can show is judged here: types, ranges, spelling. Whether a name means anything, and
//! whether quotas hold, is the `check` of `keepwall-secgroup`, which finds the places in the [`Spec`].

pub mod edit;
pub mod exchange;
mod keys;
mod problem;
mod read;
mod rule;
pub mod snapshot;
mod tree;

use std::sync::Arc;

use keepwall_secgroup::spec::Spec;

pub use problem::{PROBLEMS_MAX, Problem};
pub use rule::{NewRule, RULE_COMBINATIONS_MAX, RULE_DESCRIPTION_MAX};
pub use tree::{DEPTH_MAX, FILE_BYTES_MAX, NODES_MAX};

use problem::{Complaint, Problems};
use tree::{Source, TOP};

/// As many files as one posture has at most.
pub const FILES_MAX: usize = 1_000;

/// One file of a posture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// As the operator named it; places and problems repeat it.
    pub name: Arc<str>,
    /// Its whole content.
    pub text: String,
}

impl SourceFile {
    /// A file with a name.
    #[must_use]
    pub fn new(name: &str, text: impl Into<String>) -> SourceFile {
        SourceFile { name: name.into(), text: text.into() }
    }
}

/// Reads a posture of one or more files into one spec.
///
/// # Errors
/// Everything that is wrong, in file and line order, at most [`PROBLEMS_MAX`] problems; never an empty list.
pub fn parse(files: &[SourceFile]) -> Result<Spec, Vec<Problem>> {
    let mut problems = Problems::default();
    let sources: Vec<Source<'_>> =
        files.iter().take(FILES_MAX).map(|file| Source::new(&file.name, &file.text)).collect();
    if files.len() > FILES_MAX {
        let complaint = Complaint::new(format!("more than {FILES_MAX} files"));
        problems.add(&sources[0], TOP, complaint);
    }
    if files.is_empty() {
        let nothing = Source::new(&"(no file)".into(), "");
        problems.add(&nothing, TOP, Complaint::new("there is no posture file").expected("at least one"));
    }
    let mut nodes = 0;
    let mut parts = Vec::new();
    for source in &sources {
        let before = problems.count();
        match tree::build(source, &mut nodes, &mut problems) {
            Some(root) => parts.push((source, read::read(source, &root, &mut problems))),
            None if problems.count() == before => {
                let complaint =
                    Complaint::new("the file is empty").expected("a posture, which begins with `version: 1`");
                problems.add(source, TOP, complaint);
            }
            None => {}
        }
    }
    let spec = read::merge(parts, &mut problems);
    if problems.is_empty() { Ok(spec) } else { Err(problems.into_sorted(files)) }
}

/// Everything that reads foreign bytes, on these bytes: for the fuzzer. Never panics.
pub fn fuzz_parse(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match parse(&[SourceFile::new("fuzz.yaml", text.as_ref())]) {
        Err(problems) => problems.iter().for_each(|problem| drop(problem.to_string())),
        Ok(spec) => edit::fuzz_edits(&text, &spec),
    }
    drop(exchange::from_json(&text));
    drop(exchange::from_csv(&text));
    drop(snapshot::GroupSnapshot::parse(&text));
}
