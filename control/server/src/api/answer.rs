//! What comes out of a handler, and the response that it becomes.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, header};
use keepwall_api::BASE;
use keepwall_api::operations::{Gives, Operation};
use serde::Serialize;
use serde_json::Value;

use super::status;

/// An answer that is no refusal.
pub(super) struct Answer {
    body: Content,
    etag: Option<u64>,
    location: Option<String>,
}

enum Content {
    None,
    Json(Vec<u8>),
    Live(Body),
}

impl Answer {
    /// Nothing to say.
    pub(super) fn nothing() -> Answer {
        Answer { body: Content::None, etag: None, location: None }
    }

    /// JSON.
    pub(super) fn json<T: Serialize>(value: &T) -> Answer {
        let body = serde_json::to_vec(value).expect("our own types are JSON");
        Answer { body: Content::Json(body), etag: None, location: None }
    }

    /// Server-sent events.
    pub(super) fn live(body: Body) -> Answer {
        Answer { body: Content::Live(body), etag: None, location: None }
    }

    /// With the revision that If-Match takes.
    pub(super) fn etag(self, revision: u64) -> Answer {
        Answer { etag: Some(revision), ..self }
    }

    /// With where it is, below the API's base.
    pub(super) fn location(self, path: &str) -> Answer {
        Answer { location: Some(format!("{BASE}{path}")), ..self }
    }

    /// As it was given before: the headers follow from the body.
    pub(super) fn again(op: &Operation, body: &Value) -> Answer {
        let Gives::One(_) = op.gives else { return Answer::nothing() };
        let mut answer = Answer::json(body);
        if op.etag {
            answer.etag = body["revision"].as_u64();
        }
        if let Some(rollout) = body["rollout"].as_str().filter(|_| op.location) {
            answer = answer.location(&format!("/operations/{rollout}"));
        } else if let Some(id) = body["id"].as_str().or(body["name"].as_str()).filter(|_| op.location) {
            answer = answer.location(&format!("{}/{id}", op.path));
        }
        answer
    }

    pub(super) fn response(self, op: &Operation) -> Response {
        let (body, media) = match self.body {
            Content::None => (Body::empty(), None),
            Content::Json(bytes) => (Body::from(bytes), Some("application/json")),
            Content::Live(body) => (body, Some("text/event-stream")),
        };
        let mut response = Response::new(body);
        *response.status_mut() = status(op.status);
        let headers = response.headers_mut();
        if let Some(media) = media {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
        }
        if let Some(etag) = self.etag.and_then(|revision| HeaderValue::from_str(&format!("\"{revision}\"")).ok()) {
            headers.insert(header::ETAG, etag);
        }
        if let Some(location) = self.location.and_then(|path| HeaderValue::from_str(&path).ok()) {
            headers.insert(header::LOCATION, location);
        }
        response
    }
}
