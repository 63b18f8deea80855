//! Enrolment: a key is made here, the token lets it in, a certificate comes back.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::StatusCode;
use hyper_util::rt::TokioIo;
use keepwall_wire::ENROLL_PATH;
use serde::{Deserialize, Serialize};

use crate::dial::Route;
use crate::identity::{Identity, Request};
use crate::tls::{Speak, Tls};
use crate::token::Token;

/// The largest answer.
const ANSWER_BYTES_MAX: usize = 256 * 1024;
/// As often it is asked again if an answer was lost, or the server says that it is busy.
const AGAIN_MAX: u32 = 10;
/// After so long.
const AGAIN: Duration = Duration::from_secs(1);

/// What this machine says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// How it calls itself.
    pub hostname: String,
    /// Devices and their addresses.
    pub interfaces: Vec<(String, Vec<IpAddr>)>,
}

#[derive(Serialize)]
struct Interface<'a> {
    device: &'a str,
    addresses: &'a [IpAddr],
}

#[derive(Serialize)]
struct Ask<'a> {
    token: &'a str,
    request: String,
    hostname: &'a str,
    interfaces: Vec<Interface<'a>>,
    version: &'a str,
}

#[derive(Deserialize)]
struct Answer {
    instance: String,
    chain: Vec<String>,
    left_out: Vec<String>,
}

#[derive(Deserialize)]
struct Refusal {
    detail: String,
}

/// What enrolment brought.
#[derive(Debug)]
pub struct Enrolled {
    /// To be saved.
    pub identity: Identity,
    /// Addresses that the token does not allow and that stand for nothing.
    pub left_out: Vec<String>,
}

/// Sends what a machine says, and hears the answer.
async fn post(route: &Route, tls: &Tls, body: Bytes, sent: &mut bool) -> Result<(StatusCode, Bytes), String> {
    let stream = route.dial(tls.speaking(Speak::Http)).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    let http = hyper::Request::post(ENROLL_PATH)
        .header("host", &route.server)
        .header("content-type", "application/json")
        .body(Full::<Bytes>::from(body))
        .map_err(|error| error.to_string())?;
    *sent = true;
    let answered = async {
        let response = sender.send_request(http).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
    };
    let answered = tokio::time::timeout(crate::dial::DIAL, answered).await;
    answered.map_err(|_| format!("{} does not answer", route.server))?
}

/// Enrols. The same `request` may be shown again if no answer came, and is, for a while.
///
/// # Errors
/// In words: not reachable, not the server of the token, refused and why.
pub async fn enroll(
    token: &Token,
    facts: &Facts,
    request: &Request,
    proxy: Option<String>,
    from: Option<IpAddr>,
) -> Result<Enrolled, String> {
    let route = Route { server: token.server.clone(), proxy: proxy.clone(), from };
    let tls = Tls::pinned(token.authority)?;
    let ask = Ask {
        token: &token.secret,
        request: STANDARD.encode(request.der()?),
        hostname: &facts.hostname,
        interfaces: facts.interfaces.iter().map(|(device, addresses)| Interface { device, addresses }).collect(),
        version: env!("CARGO_PKG_VERSION"),
    };
    let body = serde_json::to_vec(&ask).map_err(|error| error.to_string())?;
    let body = Bytes::from(body);
    let mut tries = 0;
    let (status, body) = loop {
        let mut sent = false;
        let why = match post(&route, &tls, body.clone(), &mut sent).await {
            Ok((StatusCode::SERVICE_UNAVAILABLE, _)) if tries < AGAIN_MAX => "the server is busy".to_owned(),
            Ok(answered) => break answered,
            Err(why) => why,
        };
        // The token may be used up by an answer that was lost; with the same key it is answered again.
        tries += u32::from(sent || tries > 0);
        if tries == 0 || tries > AGAIN_MAX {
            return Err(why);
        }
        tracing::warn!(why, "the answer was lost; asking again");
        tokio::time::sleep(AGAIN).await;
    };
    if status != StatusCode::CREATED {
        let detail = serde_json::from_slice::<Refusal>(&body).map(|refusal| refusal.detail);
        return Err(detail.unwrap_or_else(|_| format!("the server answers {status}")));
    }
    let answer: Answer =
        serde_json::from_slice(&body).map_err(|error| format!("the server's answer is not understood: {error}"))?;
    let chain: Result<Vec<Vec<u8>>, _> = answer.chain.iter().map(|c| STANDARD.decode(c)).collect();
    let chain = chain.map_err(|error| format!("the server's answer is not understood: {error}"))?;
    let authority = chain.last().map(|der| ring::digest::digest(&ring::digest::SHA256, der));
    if authority.as_ref().map(AsRef::as_ref) != Some(&token.authority[..]) {
        return Err("the server answers with another authority than the token names".into());
    }
    let identity = Identity::new(&answer.instance, &token.server, proxy, &chain, &request.key())
        .ok_or("the server's answer has no certificate")?;
    // Better to learn now than at the next start.
    identity.tls()?;
    Ok(Enrolled { identity, left_out: answer.left_out })
}
