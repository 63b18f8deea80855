//! How a command ends badly: what is wrong, the way out, and the exit code.

use keepwall_client::Error;
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

/// Failed tests and problems of a posture that are told with a refusal; a plan shows all of them.
const TOLD_MAX: usize = 20;

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let Error::Refused(problem) = &error else { return Failure::new(error.to_string(), error.help()) };
        let mut message = format!("{problem} ({})", problem.code);
        let mut code = 1;
        if let Some(report) = &problem.report {
            let problems = report.problems.iter().map(|one| (&one.place, &one.message));
            let tests = report.tests.iter().filter(|test| !test.holds).map(|test| (&test.place, &test.why));
            for (place, why) in problems.chain(tests).take(TOLD_MAX) {
                message.push_str(&format!("\n  {place}: {why}"));
            }
            code = if report.problems.is_empty() { 3 } else { 1 };
        }
        // The catalogue speaks to whoever writes programs; here sits somebody at a command line.
        let help = match problem.code.as_str() {
            "unauthenticated" => "keepwall login; or an API key in KEEPWALL_TOKEN".to_owned(),
            "login_failed" => "which of them is not said; a code works once, so wait for the next one".to_owned(),
            "changed_meanwhile" | "conflict" => "somebody else was faster: look again, then repeat it".to_owned(),
            "hand_written" => "keepwall posture pull DIR, edit it there, then keepwall apply --posture DIR".to_owned(),
            "timed_out" | "unavailable" => "try again in a moment".to_owned(),
            "internal" => format!("the server's log has more, under {}", problem.request_id),
            _ => error.help(),
        };
        Failure { message, help, code }
    }
}
