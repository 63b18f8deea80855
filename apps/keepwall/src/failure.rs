//! How a command ends badly: what is wrong, the way out, and the exit code.

use keepwall_link::{FrameError, Refused};

/// A command that did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    /// What is wrong.
    pub message: String,
    /// What to do next, or empty.
    pub help: String,
    /// 1 failed, 3 findings or failed tests.
    pub code: u8,
}

impl Failure {
    pub fn new(message: impl Into<String>, help: impl Into<String>) -> Failure {
        Failure { message: message.into(), help: help.into(), code: 1 }
    }

    pub fn plain(message: impl Into<String>) -> Failure {
        Failure::new(message, "")
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Failure {
        Failure::new(refused.message, refused.help)
    }
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Failure {
        Failure::new(format!("the agent's answer was cut short: {error}"), "look at the agent's log; try again")
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::plain(error.to_string())
    }
}
