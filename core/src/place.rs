//! Where something was written.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A place in a posture file. Lines and columns count from 1; a column counts characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The file as the operator named it.
    pub file: Arc<str>,
    /// From 1; 0 if the thing was not written in a file.
    pub line: u32,
    /// From 1.
    pub column: u32,
}

impl Place {
    /// A place in `file`.
    #[must_use]
    pub fn new(file: &Arc<str>, line: u32, column: u32) -> Place {
        Place { file: Arc::clone(file), line, column }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str("(built in)"),
            line => write!(f, "{}:{line}", self.file),
        }
    }
}
