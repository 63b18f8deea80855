//! A request that was read: every part of it is what the catalogue says.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, RawPathParams};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::request::Parts;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use keepwall_api::Labels;
use keepwall_api::operations::{IDEMPOTENCY_KEY_MAX, Match, Operation, PAGE_DEFAULT, Param, ParamKind};
use keepwall_api::problem::{self, Problem};
use keepwall_fleet::access::{Action, Resource, Target, Verdict};
use keepwall_store::{Expect, Remember};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::answer::Answer;
use super::{App, handler, problems};
use crate::auth::Principal;
use crate::fleet::Act;

/// How long the answer to an idempotent request is remembered, milliseconds: a day.
const REMEMBER_MS: u64 = 86_400_000;
/// Characters of a path parameter at most.
const PARAM_MAX: usize = 256;
/// Labels of a selector at most.
const LABELS_MAX: usize = 64;

/// One request on its way to its handler.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) app: Arc<App>,
    pub(super) op: Operation,
    pub(super) who: Option<Principal>,
    pub(super) act: Act,
    /// What If-Match says.
    pub(super) expect: Expect,
    path: BTreeMap<String, String>,
    query: BTreeMap<String, String>,
    body: Bytes,
}

impl Call {
    pub(super) async fn read(
        app: &Arc<App>,
        op: Operation,
        who: Option<Principal>,
        mut act: Act,
        params: Option<RawPathParams>,
        parts: &Parts,
        body: Body,
    ) -> Result<Call, Problem> {
        let path = path_params(params)?;
        let query = query(&op, parts)?;
        let expect = if_match(&op, &parts.headers)?;
        let body = read_body(&op, &parts.headers, body).await?;
        if let Some(key) = idempotency_key(&op, &parts.headers)? {
            let mut digest = Sha256::new();
            for part in [op.method.as_bytes(), parts.uri.to_string().as_bytes(), &body] {
                digest.update(part.len().to_be_bytes());
                digest.update(part);
            }
            act.remember = Some(Remember {
                scope: act.actor.clone(),
                key,
                digest: digest.finalize().into(),
                answer: String::new(),
                expires_ms: app.auth.now_ms() + REMEMBER_MS,
            });
        }
        Ok(Call { app: Arc::clone(app), op, who, act, expect, path, query, body })
    }

    /// Who does what, for a line of the audit log after the call is gone.
    pub(super) fn clone_for_audit(&self) -> Act {
        Act { remember: None, ..self.act.clone() }
    }

    /// The answer to a request that went through before: as it was given, or what is there now.
    pub(super) async fn again(mut self, answer: &str) -> Result<Answer, Problem> {
        let broken = || problem::BROKEN.because("the remembered answer cannot be read");
        if answer.is_empty() {
            // The fleet remembers that it was done; what came of it is read.
            let read = match self.op.id {
                "stop_rollout" | "resume_rollout" | "return_rollout" => "get_rollout",
                "change_instance" => "get_instance",
                "create_token" => {
                    let why = "this request has made a token before, and a secret is shown once: make another token";
                    return Err(problem::WRONG_STATE.because(why));
                }
                _ => return Ok(Answer::nothing()),
            };
            return handler(read).ok_or_else(broken)?(self).await;
        }
        let value = self.app.auth.remembered(answer).ok_or_else(broken)?;
        if let Some(name) = value["read"].as_str() {
            let read = match self.op.id {
                "create_user" | "change_user" => "get_user",
                _ => "get_service_account",
            };
            let location = matches!(self.op.id, "create_user" | "create_service_account");
            let place = format!("{}/{name}", self.op.path);
            self.path.insert("name".into(), name.to_owned());
            let run = handler(read).ok_or_else(broken)?;
            let answer = run(self).await?;
            return Ok(if location { answer.location(&place) } else { answer });
        }
        let body = if value["body"].is_object() { &value["body"] } else { &value };
        Ok(Answer::again(&self.op, body))
    }

    /// A parameter of the path.
    pub(super) fn param(&self, name: &str) -> &str {
        self.path.get(name).map_or("", String::as_str)
    }

    /// A parameter of the path that is a number.
    pub(super) fn number(&self, name: &str) -> Result<u64, Problem> {
        let text = self.param(name);
        text.parse().map_err(|_| problem::MALFORMED.at(name, format!("`{text}` is no number")))
    }

    /// A parameter of the query.
    pub(super) fn query(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }

    /// A parameter of the query that is a number; its range was looked at.
    pub(super) fn query_number(&self, name: &str) -> Option<u64> {
        self.query(name)?.parse().ok()
    }

    /// Items of a page.
    pub(super) fn limit(&self) -> usize {
        usize::try_from(self.query_number("limit").unwrap_or(PAGE_DEFAULT)).unwrap_or(1)
    }

    /// What the cursor stands for.
    pub(super) fn cursor(&self) -> Result<Option<String>, Problem> {
        let Some(text) = self.query("cursor").filter(|text| !text.is_empty()) else { return Ok(None) };
        let bytes = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let plain = bytes.filter(|text| !text.chars().any(char::is_control));
        plain.map(Some).ok_or_else(|| problem::MALFORMED.at("cursor", "this is no cursor of ours"))
    }

    /// What a cursor that is a number stands for.
    pub(super) fn cursor_number(&self) -> Result<Option<u64>, Problem> {
        let Some(text) = self.cursor()? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| problem::MALFORMED.at("cursor", "this is no cursor of ours"))
    }

    /// The selector of labels: `tier=web,site=a`.
    pub(super) fn labels(&self) -> Result<Labels, Problem> {
        let text = self.query("labels").unwrap_or_default();
        let parts = text.split(',').filter(|part| !part.is_empty());
        let mut labels = Labels::new();
        for part in parts {
            let (key, value) = part.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or_else(|| {
                problem::INVALID.at("labels", format!("`{part}` is no label: write KEY=VALUE,KEY=VALUE"))
            })?;
            labels.insert(key.to_owned(), value.to_owned());
        }
        if labels.len() > LABELS_MAX {
            return Err(problem::INVALID.at("labels", format!("more than {LABELS_MAX} labels")));
        }
        Ok(labels)
    }

    /// The body.
    pub(super) fn body<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        parse(&self.body)
    }

    /// Who asks; every operation that needs it has it.
    pub(super) fn who(&self) -> Result<&Principal, Problem> {
        self.who.as_ref().ok_or_else(|| problem::UNAUTHENTICATED.because("the request has no credentials"))
    }

    /// The user who asks; keys of theirs count, the local root does not.
    pub(super) fn user(&self) -> Result<&str, Problem> {
        let user = self.who()?.user.as_str();
        if user.is_empty() {
            return Err(problem::WRONG_STATE.because("the local root is no user: name one, or log in"));
        }
        Ok(user)
    }

    /// Lets through what they may.
    pub(super) fn allowed(&self, resource: Resource, action: Action, target: Target<'_>) -> Result<(), Problem> {
        match self.who()?.permits(resource, action, target) {
            Verdict::Allow(_) => Ok(()),
            Verdict::Deny(why) => Err(problems::forbidden(&why)),
        }
    }

    /// True if they may read what has these labels.
    pub(super) fn sees(&self, resource: Resource, labels: &Labels) -> bool {
        self.who.as_ref().is_some_and(|who| who.permits(resource, Action::Read, Target::One(labels)).is_allow())
    }
}

/// The cursor that stands for something.
pub(super) fn cursor(text: impl ToString) -> String {
    URL_SAFE_NO_PAD.encode(text.to_string())
}

/// JSON into what a handler takes: what is no JSON is malformed, what is JSON of another form is invalid.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    // Twice through the parser, so that the two mistakes are told apart and names are kept in order.
    let value: Value =
        serde_json::from_slice(bytes).map_err(|error| problem::MALFORMED.at("", format!("the body: {error}")))?;
    if !value.is_object() {
        return Err(problem::INVALID.at("", "the body must be an object"));
    }
    drop(value);
    serde_json::from_slice(bytes).map_err(|error| problem::INVALID.at("", error.to_string()))
}

fn path_params(params: Option<RawPathParams>) -> Result<BTreeMap<String, String>, Problem> {
    let params = params.ok_or_else(|| problem::MALFORMED.because("the path is not UTF-8"))?;
    let mut out = BTreeMap::new();
    for (name, value) in &params {
        if value.chars().count() > PARAM_MAX || value.chars().any(char::is_control) {
            return Err(problem::MALFORMED.at(name, "it is too long, or holds control characters"));
        }
        out.insert(name.to_owned(), value.to_owned());
    }
    Ok(out)
}

fn query(op: &Operation, parts: &Parts) -> Result<BTreeMap<String, String>, Problem> {
    let all: Query<Vec<(String, String)>> = Query::try_from_uri(&parts.uri)
        .map_err(|_| problem::MALFORMED.because("the query is not KEY=VALUE&KEY=VALUE"))?;
    let mut out = BTreeMap::new();
    for (name, value) in all.0 {
        let Some(param) = op.query.iter().find(|param| param.name == name) else {
            let known: Vec<&str> = op.query.iter().map(|param| param.name).collect();
            let known = if known.is_empty() { "it has none".to_owned() } else { known.join(", ") };
            let name: String = name.chars().take(64).collect();
            return Err(problem::MALFORMED.at(name, format!("this operation has no such parameter; {known}")));
        };
        if let Some(why) = complaint(param, &value) {
            return Err(problem::MALFORMED.at(param.name, why));
        }
        if out.insert(name, value).is_some() {
            return Err(problem::MALFORMED.at(param.name, "it stands there twice"));
        }
    }
    match op.query.iter().find(|param| param.required && !out.contains_key(param.name)) {
        Some(param) => Err(problem::MALFORMED.at(param.name, "this parameter is needed")),
        None => Ok(out),
    }
}

fn complaint(param: &Param, value: &str) -> Option<String> {
    match param.kind {
        ParamKind::Text(max) => {
            let bad = value.chars().count() as u64 > max || value.chars().any(char::is_control);
            bad.then(|| format!("it has at most {max} characters, none of them control characters"))
        }
        ParamKind::Number(min, max) => {
            let plain = value.bytes().all(|b| b.is_ascii_digit());
            let good = plain && value.parse().is_ok_and(|number: u64| (min..=max).contains(&number));
            (!good).then(|| format!("a number from {min} to {max}"))
        }
        ParamKind::Word(words) => (!words.contains(&value)).then(|| format!("one of {}", words.join(", "))),
        ParamKind::Flag => (value != "true" && value != "false").then(|| "true or false".to_owned()),
    }
}

/// The one value of a header.
fn one<'h>(headers: &'h HeaderMap, name: &'static str) -> Result<Option<&'h str>, Problem> {
    let mut all = headers.get_all(name).iter();
    let (first, second) = (all.next(), all.next());
    if second.is_some() {
        return Err(problem::MALFORMED.at(name, "this header stands there twice"));
    }
    let text = first.map(|value| value.to_str()).transpose();
    text.map_err(|_| problem::MALFORMED.at(name, "this header is no plain text"))
}

fn if_match(op: &Operation, headers: &HeaderMap) -> Result<Expect, Problem> {
    if op.if_match == Match::No {
        return Ok(Expect::Any);
    }
    match one(headers, "if-match")? {
        None if op.if_match == Match::Must => {
            Err(problem::PRECONDITION.at("If-Match", "send the ETag of what you have read"))
        }
        None => Ok(Expect::Any),
        Some(text) => parse_etag(text).ok_or_else(|| {
            problem::MALFORMED.at("If-Match", "one ETag in double quotes as it was given, as in \"17\", or *")
        }),
    }
}

/// `"17"` or `*`.
fn parse_etag(text: &str) -> Option<Expect> {
    if text == "*" {
        return Some(Expect::Present);
    }
    let number = text.strip_prefix('"')?.strip_suffix('"')?;
    let plain = (1..=19).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
    let revision = number.parse().ok().filter(|_| plain)?;
    // Revision 0 is what has never been written.
    Some(if revision == 0 { Expect::Absent } else { Expect::Revision(revision) })
}

fn idempotency_key(op: &Operation, headers: &HeaderMap) -> Result<Option<String>, Problem> {
    if !op.idempotent {
        return Ok(None);
    }
    let Some(key) = one(headers, "idempotency-key")? else { return Ok(None) };
    if !(1..=IDEMPOTENCY_KEY_MAX).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_graphic()) {
        let why = format!("1 to {IDEMPOTENCY_KEY_MAX} visible ASCII characters");
        return Err(problem::MALFORMED.at("Idempotency-Key", why));
    }
    Ok(Some(key.to_owned()))
}

async fn read_body(op: &Operation, headers: &HeaderMap, body: Body) -> Result<Bytes, Problem> {
    let too_large = || problem::TOO_LARGE.because(format!("the body has more than {} bytes", op.body_max));
    let length = one(headers, "content-length")?.and_then(|text| text.parse::<u64>().ok());
    if length.is_some_and(|length| length > op.body_max as u64) {
        return Err(too_large());
    }
    let bytes = match Limited::new(body, op.body_max).collect().await {
        Ok(all) => all.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => return Err(too_large()),
        Err(error) => return Err(problem::MALFORMED.because(format!("the body ends early: {error}"))),
    };
    if op.body.is_none() {
        // A body that nobody asked for is not looked at.
        return Ok(Bytes::new());
    }
    let media = one(headers, header::CONTENT_TYPE.as_str())?.unwrap_or_default();
    let essence = media.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let named = if essence.is_empty() { "none was named".to_owned() } else { format!("it is `{essence}`") };
        return Err(problem::MEDIA.because(named));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etag_is_a_number_in_quotes() {
        assert_eq!(parse_etag("\"17\""), Some(Expect::Revision(17)));
        assert_eq!(parse_etag("\"0\""), Some(Expect::Absent));
        assert_eq!(parse_etag("*"), Some(Expect::Present));
        for bad in ["", "17", "\"\"", "W/\"17\"", "\"17\", \"18\"", "\"-1\"", "\"+1\"", "\"99999999999999999999\""] {
            assert_eq!(parse_etag(bad), None, "{bad}");
        }
    }
}
