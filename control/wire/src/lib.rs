//! What an instance and the control plane say to each other.
//!
//! A frame is a length (4 bytes, big-endian) and that many bytes of a protobuf message: [`FromAgent`] one way,
//! [`FromServer`] the other. The same frames travel in two ways:
//!
//! - **stream** (ALPN [`ALPN`]): one TLS connection, frames in both directions as they come;
//! - **long poll** (ALPN `http/1.1`, `POST` [`POLL_PATH`]): for proxies that break long streams. The body of a request
//!   holds frames of the instance, the body of the answer those of the server, which waits up to [`POLL_WAIT_S`] for
//!   one worth sending.
//!
//! Unknown fields are skipped, as protobuf has it: a newer side may say more. What decides about enforcement is not
//! in such fields: a bundle of an unknown format is refused whole ([`keepwall_secgroup::intent::FORMAT`]).

mod convert;
mod messages;

pub use convert::{
    BadMessage, Body, offer_frame, read_body, read_hello, read_offer, state_of, write_change, write_hello, write_whole,
};
pub use messages::*;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// The stream's name in the TLS handshake; the number is the protocol's version.
pub const ALPN: &[u8] = b"keepwall/1";
/// The probe's: connects, is greeted by one byte, and ends. What proves that a new connection gets through.
pub const ALPN_PROBE: &[u8] = b"keepwall-probe/1";
/// Where a long poll goes.
pub const POLL_PATH: &str = "/agent/v1/poll";
/// Where a machine enrols: JSON, with a one-time token.
pub const ENROLL_PATH: &str = "/agent/v1/enroll";
/// How long the server holds a poll that has nothing to carry, seconds: less than proxies wait.
pub const POLL_WAIT_S: u64 = 25;
/// The largest frame of an instance. Reports are split; nothing else is near it.
pub const AGENT_FRAME_MAX: usize = 256 * 1024;
/// The largest frame of the server: whole rules of a large machine.
pub const SERVER_FRAME_MAX: usize = 64 * 1024 * 1024;
/// The most rows of one report.
pub const REPORT_ROWS_MAX: usize = 256;
/// How often an instance says that it is there, seconds, unless it said something else. The server may ask for less.
pub const HEARTBEAT_S: u32 = 20;
/// Both sides give a connection up when what they sent is not acknowledged for so long: `TCP_USER_TIMEOUT`, tcp(7).
pub const UNACKNOWLEDGED: std::time::Duration = std::time::Duration::from_secs(15);
/// Bytes of the length before each message.
pub const HEAD: usize = 4;

/// A frame cannot be read; the connection is of no more use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// Longer than allowed.
    TooLong {
        /// What was announced.
        len: usize,
        /// What is allowed.
        max: usize,
    },
    /// No such message.
    Malformed(String),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FrameError::TooLong { len, max } => write!(f, "a frame of {len} bytes; at most {max} are taken"),
            FrameError::Malformed(why) => write!(f, "not a frame of this protocol: {why}"),
        }
    }
}

impl std::error::Error for FrameError {}

/// A message with its length before it.
#[must_use]
pub fn frame(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut out = BytesMut::with_capacity(HEAD + len);
    out.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
    // Only a buffer that is too small fails, and this one grows.
    let _ = message.encode(&mut out);
    out.freeze()
}

/// The length that a frame's head announces.
///
/// # Errors
/// Over `max`.
pub fn length(head: [u8; HEAD], max: usize) -> Result<usize, FrameError> {
    let len = u32::from_be_bytes(head) as usize;
    if len > max { Err(FrameError::TooLong { len, max }) } else { Ok(len) }
}

/// A message from a frame's body.
///
/// # Errors
/// It is none.
pub fn message<M: Message + Default>(body: impl Buf) -> Result<M, FrameError> {
    M::decode(body).map_err(|error| FrameError::Malformed(error.to_string()))
}

/// All frames of a poll's body.
///
/// # Errors
/// One is too long, cut off, or no message.
pub fn frames<M: Message + Default>(mut bytes: &[u8], max: usize) -> Result<Vec<M>, FrameError> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else {
            return Err(FrameError::Malformed("it ends within a length".into()));
        };
        let len = length(*head, max)?;
        let Some((body, rest)) = rest.split_at_checked(len) else {
            return Err(FrameError::Malformed(format!("it ends after {} of {len} bytes", rest.len())));
        };
        out.push(message(body)?);
        bytes = rest;
    }
    Ok(out)
}

/// For the fuzzer: any bytes are frames or an error, and what is in them a bundle or an error.
pub fn fuzz_frames(bytes: &[u8]) {
    let _ = frames::<FromAgent>(bytes, AGENT_FRAME_MAX).map(|all| {
        for one in all {
            if let Some(from_agent::Say::Hello(hello)) = one.say {
                let _ = read_hello(&hello);
            }
        }
    });
    for one in frames::<FromServer>(bytes, SERVER_FRAME_MAX).unwrap_or_default() {
        if let Some(from_server::Say::Offer(offer)) = one.say
            && let Ok((_, body)) = read_offer(&offer)
        {
            match body {
                Body::Whole(bundle) => drop(bundle.intent()),
                Body::Change(change) => {
                    let empty = keepwall_fleet::bundle::Bundle::from_parts(Vec::new(), Default::default());
                    let _ = empty.map(|empty| empty.changed(&change));
                }
            }
        }
    }
}
