//! From errors of the parts to problems of the API: whose fault it is decides the status.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, header};
use keepwall_api::problem::{self, FieldError, MEDIA_TYPE, Problem};
use keepwall_fleet::access::Denied;
use keepwall_store::StoreError;

use super::{Edge, status};
use crate::auth::AuthError;
use crate::fleet::FleetError;

/// Seconds after which to come again when nobody knows better.
const RETRY_S: u64 = 2;
/// Entries of `errors` at most.
const ERRORS_MAX: usize = 100;

/// A problem as an answer.
pub(super) fn response(mut problem: Problem, edge: &Edge) -> Response {
    edge.path.clone_into(&mut problem.instance);
    edge.request_id.clone_into(&mut problem.request_id);
    problem.errors.truncate(ERRORS_MAX);
    let wait = problem.errors.iter().find(|error| error.pointer == RETRY_AFTER);
    let wait = wait.and_then(|error| error.message.parse().ok()).unwrap_or(RETRY_S);
    problem.errors.retain(|error| error.pointer != RETRY_AFTER);
    if problem.status >= 500 {
        tracing::error!(code = problem.code, detail = problem.detail, request = problem.request_id, "failed");
    }
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status(problem.status);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    if matches!(problem.status, 429 | 503) {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(wait));
    }
    if problem.status == 401 {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"keepwall\""));
    }
    response
}

/// Carries the seconds to the header.
const RETRY_AFTER: &str = "retry-after";

fn later(mut problem: Problem, seconds: u64) -> Problem {
    problem.errors =
        vec![FieldError { pointer: RETRY_AFTER.into(), message: seconds.to_string(), help: String::new() }];
    problem
}

pub(super) fn store(error: StoreError) -> Problem {
    match error {
        StoreError::Conflict { .. } => problem::CONFLICT.because(error.to_string()),
        StoreError::KeyReused(_) => problem::KEY_REUSED.because(error.to_string()),
        StoreError::TooLarge(why) => problem::INVALID.because(why),
        StoreError::ChangesGone | StoreError::Unavailable(_) => problem::UNAVAILABLE.because(error.to_string()),
        StoreError::Damaged(_) | StoreError::Newer(_) => problem::BROKEN.because(error.to_string()),
    }
}

pub(super) fn forbidden(why: &Denied) -> Problem {
    problem::FORBIDDEN.because(why.to_string())
}

/// Of the fleet. `Before` is for [`super::Call::again`] and never gets here.
pub(super) fn fleet(error: FleetError) -> Problem {
    match error {
        FleetError::Invalid { pointer, message } => problem::INVALID.at(pointer, message),
        FleetError::NotPermitted(instance) => {
            problem::FORBIDDEN.because(format!("it would change `{instance}`, which is outside your scope"))
        }
        FleetError::NotFound(what) => problem::NOT_FOUND.because(what),
        FleetError::Wrong(why) => problem::WRONG_STATE.because(why),
        FleetError::Before(_) => problem::CONFLICT.because("the same request is being worked on"),
        FleetError::Store(error) => store(error),
        FleetError::Refused(report) => {
            let problems = report.problems.iter().map(|one| FieldError {
                pointer: one.place.clone(),
                message: one.message.clone(),
                help: one.help.clone(),
            });
            let tests = report.tests.iter().filter(|test| !test.holds).map(|test| FieldError {
                pointer: test.place.clone(),
                message: format!("{} does not hold: {}", test.test, test.why),
                help: String::new(),
            });
            let errors: Vec<FieldError> = problems.chain(tests).collect();
            let count = errors.len();
            let detail = format!("{count} problem{}; nothing was changed", if count == 1 { "" } else { "s" });
            Problem { errors, report: Some(report), ..problem::POSTURE_REFUSED.because(detail) }
        }
    }
}

pub(super) fn auth(error: AuthError) -> Problem {
    match error {
        AuthError::Failed => problem::LOGIN_FAILED.because(""),
        AuthError::Throttled(seconds) => {
            later(problem::THROTTLED.because(format!("come again in {seconds} seconds")), seconds)
        }
        AuthError::Busy => problem::UNAVAILABLE.because("too many log in at once"),
        AuthError::Invalid(pointer, message) => problem::INVALID.at(pointer, message),
        AuthError::NotFound(what) => problem::NOT_FOUND.because(what),
        AuthError::Wrong(why) => problem::WRONG_STATE.because(why),
        AuthError::Exists(what) => problem::EXISTS.because(what),
        AuthError::NoRole(why) => problem::FORBIDDEN.because(why),
        AuthError::Provider(why) => problem::UNAVAILABLE.because(format!("the identity provider: {why}")),
        AuthError::Before(_) => problem::CONFLICT.because("the same request is being worked on"),
        AuthError::Store(error) => store(error),
    }
}

/// Of the store, for a change: whether the caller's If-Match was wrong, or somebody was faster than our own.
pub(super) fn conflict(call: &super::Call, error: StoreError) -> Problem {
    match error {
        StoreError::Conflict { .. } if call.expect != keepwall_store::Expect::Any => {
            problem::CHANGED.because(error.to_string())
        }
        other => store(other),
    }
}
