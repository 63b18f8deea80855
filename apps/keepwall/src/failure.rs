//! How a command ends badly: what is wrong, the way out, and the exit code.

use keepwall_api::Problem;
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

/// A refusal in words. Where the detail says all, the code's title in front of it says nothing.
fn words(problem: &Problem) -> String {
    if problem.detail.is_empty() || !matches!(problem.code.as_str(), "invalid" | "wrong_state") {
        return problem.to_string();
    }
    let mut plain = Problem { title: problem.detail.clone(), detail: String::new(), ..problem.clone() };
    plain.errors.retain(|one| one.message != problem.detail);
    plain.to_string()
}

/// Failed tests and problems of a posture that are told with a refusal; a plan shows all of them.
const TOLD_MAX: usize = 20;

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let problem = match &error {
            Error::Refused(problem) => problem,
            // A path: the local socket, and so this machine's own server.
            Error::Unreachable(why) if why.starts_with('/') && !why.contains("denied") => {
                return Failure::new(
                    format!("no server is running here ({why})"),
                    "start it: systemctl start keepwalld, or keepwall --context none up",
                );
            }
            Error::Unreachable(why) if why.contains("UnknownIssuer") => {
                return Failure::new(
                    format!("nobody whom this system trusts vouches for the server ({why})"),
                    "keepwall context remove NAME, then add it with --ca-sha256: `keepwalld authority` prints that there",
                );
            }
            _ => return Failure::new(error.to_string(), error.help()),
        };
        let mut message = format!("{} ({})", words(problem), problem.code);
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
            "wrong_state" => {
                "keepwall status says how things stand; keepwall revert takes back a change that is on its way or stopped"
                    .to_owned()
            }
            "invalid" if problem.detail.starts_with("no posture has been declared") => {
                "declare one: keepwall plan, then keepwall apply".to_owned()
            }
            "invalid" => problem.errors.iter().map(|one| one.help.as_str()).find(|help| !help.is_empty()).map_or_else(
                || "keepwall WORD --help says what each option takes".to_owned(),
                str::to_owned,
            ),
            "timed_out" | "unavailable" => "try again in a moment".to_owned(),
            "internal" => format!("the server's log has more, under {}", problem.request_id),
            _ => error.help(),
        };
        Failure { message, help, code }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use keepwall_api::problem;

    use super::*;

    #[test]
    fn a_server_of_this_machine_that_does_not_run_is_started_here() {
        let of = |why: &str| Failure::from(Error::Unreachable(why.into())).help;
        assert!(of("/run/keepwall/server.sock: No such file or directory").contains("keepwalld"));
        assert!(!of("10.0.0.1:7440: Connection refused").contains("systemctl"));
        assert!(of("10.0.0.1:7440: invalid peer certificate: UnknownIssuer").contains("--ca-sha256"));
    }

    #[test]
    fn a_refusal_says_once_what_is_wrong_and_what_a_person_can_do() {
        let refused = |problem| Failure::from(Error::Refused(Box::new(problem)));
        let failure = refused(problem::INVALID.at("", "no posture has been declared, so …"));
        assert_eq!(failure.message, "no posture has been declared, so … (invalid)");
        assert!(failure.help.contains("keepwall apply"), "{}", failure.help);
        let failure = refused(problem::WRONG_STATE.because("ro-1 has stopped"));
        assert_eq!(failure.message, "ro-1 has stopped (wrong_state)");
        assert!(failure.help.contains("keepwall revert"), "{}", failure.help);
        let failure = refused(problem::EXISTS.because("web"));
        assert_eq!(failure.message, "It exists already: web (exists)");
    }
}
