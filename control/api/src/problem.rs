//! What an answer looks like when something is refused (RFC 9457), and every code that there is.
//!
//! Codes are stable: programs may decide by them. Titles and details are for people and may change.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fleet::Report;

/// The media type of a problem.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// What was refused, and the way out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Where the code is explained.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code in words.
    pub title: String,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// What it was in this case.
    pub detail: String,
    /// The path that was asked.
    pub instance: String,
    /// For programs; see the catalogue.
    pub code: String,
    /// The same id as in logs and audit log.
    pub request_id: String,
    /// Field by field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// What a posture would have meant, if one was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<Box<Report>>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// JSON pointer into the request, a parameter's or a header's name, or a place in a posture file.
    pub pointer: String,
    /// What is wrong.
    pub message: String,
    /// The way out, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub help: String,
}

/// A kind of problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    /// For programs.
    pub code: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// For people.
    pub title: &'static str,
    /// What to do.
    pub help: &'static str,
}

macro_rules! codes {
    ($($name:ident = $code:literal $status:literal $title:literal, $help:literal;)*) => {
        $(
            #[doc = concat!($status, ": ", $title, ". ", $help)]
            pub const $name: Code = Code { code: $code, status: $status, title: $title, help: $help };
        )*
        /// All of them.
        pub const CODES: &[Code] = &[$($name),*];
    };
}

codes! {
    MALFORMED = "malformed" 400 "The request cannot be read",
        "Look at `errors`: a header, a parameter or the JSON itself is wrong.";
    UNAUTHENTICATED = "unauthenticated" 401 "No valid credentials",
        "Send `Authorization: Bearer TOKEN` with a session's token or an API key that is neither expired nor revoked.";
    LOGIN_FAILED = "login_failed" 401 "Name, password or code is wrong",
        "Which of them is not said. A code works once; wait for the next one.";
    FORBIDDEN = "forbidden" 403 "Not permitted",
        "The detail names the roles that may. Ask an administrator for a binding.";
    NOT_FOUND = "not_found" 404 "There is no such thing",
        "List what there is; a part of a fleet outside one's scope looks the same as one that does not exist.";
    METHOD_NOT_ALLOWED = "method_not_allowed" 405 "This path has no such method",
        "The header `Allow` lists those it has.";
    TIMED_OUT = "timed_out" 503 "It took too long",
        "The change may or may not have gone through: send it again with the same Idempotency-Key.";
    EXISTS = "exists" 409 "It exists already",
        "Change the one that exists, or take another name.";
    HAND_WRITTEN = "hand_written" 409 "It stands in a file that was written by hand",
        "Change that file: PUT /posture/files/NAME, or the rules one by one, which keeps its comments.";
    WRONG_STATE = "wrong_state" 409 "Not in this state",
        "Look at what state it is in (the detail says it), and ask again when that allows it.";
    CONFLICT = "conflict" 409 "Somebody else was faster",
        "Read it again, and repeat the change.";
    KEY_REUSED = "idempotency_key_reused" 409 "The idempotency key was used for another request",
        "Take a new key for a new request.";
    CHANGED = "changed_meanwhile" 412 "It is not as If-Match says",
        "Read it again, look at what changed, and send the new ETag.";
    TOO_LARGE = "too_large" 413 "The request is too large",
        "The detail names the limit.";
    MEDIA = "unsupported_media_type" 415 "The body is not JSON",
        "Send `Content-Type: application/json`.";
    INVALID = "invalid" 422 "The request says something that cannot be",
        "Each of `errors` names a field and the way out.";
    POSTURE_REFUSED = "posture_refused" 422 "The posture does not hold",
        "`report` has the problems with their places, and the tests that fail.";
    PRECONDITION = "precondition_required" 428 "If-Match is needed",
        "Read the posture, and send its ETag as If-Match, so that nobody's change is lost.";
    THROTTLED = "throttled" 429 "Too many attempts",
        "Wait as long as `Retry-After` says.";
    HEADERS_TOO_LARGE = "headers_too_large" 431 "The request's headers are too large",
        "Send fewer and shorter headers.";
    BROKEN = "internal" 500 "Something is broken here",
        "It is not your request. The server's log has the request id.";
    UNAVAILABLE = "unavailable" 503 "Not available now",
        "Try again as `Retry-After` says, with the same Idempotency-Key.";
}

impl Code {
    /// A problem of this kind.
    #[must_use]
    pub fn because(&self, detail: impl Into<String>) -> Problem {
        Problem {
            kind: format!("urn:keepwall:problem:{}", self.code),
            title: self.title.to_owned(),
            status: self.status,
            detail: detail.into(),
            code: self.code.to_owned(),
            ..Problem::default()
        }
    }

    /// A problem of this kind with one field.
    #[must_use]
    pub fn at(&self, pointer: impl Into<String>, message: impl Into<String>) -> Problem {
        let message = message.into();
        let error = FieldError { pointer: pointer.into(), message: message.clone(), help: String::new() };
        Problem { errors: vec![error], ..self.because(message) }
    }
}

impl Problem {
    /// The catalogue's advice for its code, or empty.
    #[must_use]
    pub fn help(&self) -> &'static str {
        CODES.iter().find(|code| code.code == self.code).map_or("", |code| code.help)
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.title)?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        self.errors
            .iter()
            .filter(|error| error.message != self.detail)
            .try_for_each(|error| write!(f, "\n  {}: {}", error.pointer, error.message))
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::CODES;

    #[test]
    fn no_code_stands_for_two_things() {
        let mut codes: Vec<&str> = CODES.iter().map(|code| code.code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), CODES.len());
    }

    #[test]
    fn the_manual_names_every_code() {
        let manual = include_str!("../../../docs/api.md");
        for code in CODES {
            assert!(manual.contains(&format!("| `{}` | {} |", code.code, code.status)), "{}", code.code);
        }
    }
}
