//! The API for Rust programs: one method per operation, made from its OpenAPI document, over a small transport.
//!
//! A [`Client`] blocks: it drives its own runtime on the thread that calls it, one connection at a time. Answers are
//! bounded in size and time. A write carries an idempotency key of its own, so that it is sent again on a broken
//! connection without being done twice.
//!
//! Not here: which server and which credentials to use; that is its user's configuration.

mod generated;
mod transport;
mod trust;

use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use keepwall_api::Problem;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use generated::*;
use transport::Transport;
pub use transport::{Live, LiveEvent};
pub use trust::Trust;

/// Why a call did not give what it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The server refused, and says why. What was there still is.
    Refused(Box<Problem>),
    /// The server could not be asked, or its answer could not be read. A change may or may not have gone through.
    Unreachable(String),
    /// The address of the server is none.
    Address(String),
}

impl Error {
    /// The problem's stable code, if the server refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Error::Refused(problem) => Some(&problem.code),
            _ => None,
        }
    }

    /// What to do about it, or empty.
    #[must_use]
    pub fn help(&self) -> String {
        match self {
            Error::Refused(problem) => {
                let own = problem.errors.iter().map(|error| error.help.as_str()).find(|help| !help.is_empty());
                own.unwrap_or_else(|| problem.help()).to_owned()
            }
            Error::Unreachable(_) => "is the server running, and is its address right?".to_owned(),
            Error::Address(_) => "write https://HOST:PORT, http://127.0.0.1:PORT, or unix:/PATH".to_owned(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Refused(problem) => problem.fmt(f),
            Error::Unreachable(why) | Error::Address(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {}

/// An answer with the revision that If-Match takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tagged<T> {
    /// What was asked for.
    pub value: T,
    /// Its revision.
    pub etag: Option<u64>,
}

impl<T> Deref for Tagged<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// How to reach a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `https://HOST:PORT`, `http://127.0.0.1:PORT` (loopback only), or `unix:/PATH`.
    pub server: String,
    /// A session's token or an API key; the local socket needs none for root.
    pub token: Option<keepwall_api::Secret>,
    /// Whose word proves that it is the server, for https.
    pub trust: Trust,
    /// How long one call may take.
    pub timeout: Duration,
}

impl Settings {
    /// A server, trusted by the system's own authorities, without credentials.
    #[must_use]
    pub fn new(server: &str) -> Settings {
        let server = server.to_owned();
        Settings { server, token: None, trust: Trust::System, timeout: Duration::from_secs(60) }
    }
}

/// A server, ready to be asked.
pub struct Client {
    transport: Transport,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    /// Nothing is connected before the first call.
    ///
    /// # Errors
    /// The address is none, or the certificates that should be trusted cannot be read.
    pub fn new(settings: Settings) -> Result<Client, Error> {
        Ok(Client { transport: Transport::new(settings)? })
    }

    pub(crate) fn nothing(&self, request: Request) -> Result<(), Error> {
        self.transport.send(&request).map(drop)
    }

    pub(crate) fn json<T: DeserializeOwned>(&self, request: Request) -> Result<T, Error> {
        self.tagged(request).map(|tagged| tagged.value)
    }

    pub(crate) fn tagged<T: DeserializeOwned>(&self, request: Request) -> Result<Tagged<T>, Error> {
        let (body, etag) = self.transport.send(&request)?;
        let value = serde_json::from_slice(&body)
            .map_err(|error| Error::Unreachable(format!("the server's answer is not understood: {error}")))?;
        Ok(Tagged { value, etag })
    }

    pub(crate) fn stream(&self, request: Request) -> Result<Live<'_>, Error> {
        self.transport.live(&request)
    }
}

/// A request as the generated methods make it.
pub(crate) struct Request {
    method: &'static str,
    path: String,
    body: Option<Vec<u8>>,
    if_match: Option<u64>,
    once: bool,
}

impl Request {
    pub(crate) fn new(method: &'static str, path: impl Into<String>) -> Request {
        Request { method, path: path.into(), body: None, if_match: None, once: false }
    }

    pub(crate) fn query(mut self, pairs: Vec<(&'static str, String)>) -> Request {
        for (n, (name, value)) in pairs.into_iter().enumerate() {
            self.path.push(if n == 0 { '?' } else { '&' });
            self.path.push_str(name);
            self.path.push('=');
            self.path.push_str(&segment(value));
        }
        self
    }

    pub(crate) fn body<T: Serialize>(self, body: &T) -> Request {
        let body = serde_json::to_vec(body).expect("the API's own types are JSON");
        Request { body: Some(body), ..self }
    }

    pub(crate) fn if_match(self, if_match: Option<u64>) -> Request {
        Request { if_match, ..self }
    }

    /// Carries an idempotency key.
    pub(crate) fn once(self) -> Request {
        Request { once: true, ..self }
    }
}

/// A value as one segment of a path or one value of a query.
pub(crate) fn segment(value: impl ToString) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~');
    let text = value.to_string();
    // A path of dots means another place to whoever normalises paths on the way.
    let dots = text == "." || text == "..";
    text.bytes().map(|b| if plain(b) && !dots { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::{Request, segment};

    #[test]
    fn what_stands_in_a_path_is_one_segment() {
        assert_eq!(segment("api/web.yaml"), "api%2Fweb.yaml");
        assert_eq!(segment(".."), "%2E%2E");
        assert_eq!(segment("数"), "%E6%95%B0");
        let request = Request::new("GET", "/x").query(vec![("a", "1&2".into()), ("b", "c d".into())]);
        assert_eq!(request.path, "/x?a=1%262&b=c%20d");
    }
}
