//! What the command line and the agent of one machine say to each other.
//!
//! A frame is a length (4 bytes, big-endian) and that many bytes of JSON. The client sends one [`Request`]; the
//! agent answers with one [`Response`], or, where the request is a stream, with [`Response::Event`]s until either
//! side closes. One request per connection, which is also what makes a confirmation come "over a new connection".
//!
//! The agent trusts the kernel's word on who connected, and nothing in the request.

use std::io::{self, Read, Write};

use keepwall_core::Generation;
use keepwall_secgroup::intent::Intent;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The version of this protocol; another is refused with words.
pub const VERSION: u32 = 1;

/// The largest frame that root may send: an intent of 10,000 rules has about 4 MiB.
pub const FRAME_BYTES_MAX: u32 = 64 * 1024 * 1024;

/// The largest frame of anybody else: their requests have no body to speak of.
pub const FRAME_BYTES_MAX_UNPRIVILEGED: u32 = 4 * 1024;

/// Where the agent listens unless told otherwise.
pub const SOCKET: &str = "/run/keepwall/agent.sock";
/// Where the agent keeps its state unless told otherwise.
pub const STATE: &str = "/var/lib/keepwall/agent";

/// A request with the protocol's version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// What is wanted.
    pub request: Request,
}

/// What the command line wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What is enforced, and how it goes. Anybody who reaches the socket may ask.
    Status,
    /// The intent in force. Root only: it names everybody's addresses.
    Intent,
    /// From now on this machine is told by a control plane, through a process without privilege. Root only.
    Bind {
        /// This machine's name in the fleet.
        instance: String,
        /// `host:port` of the control plane.
        server: String,
        /// Who may hand on what the control plane decides, besides root; not root itself.
        uid: u32,
    },
    /// The machine is its own again; what is enforced stays. Root only.
    Unbind,
    /// What the control plane has brought. Root and the bound user.
    Fleet,
    /// Enforce this instead. Root only.
    Apply(Box<Apply>),
    /// What was applied works: keep it. Root only, and over a session opened since.
    Confirm {
        /// The generation that is meant, so that a late confirmation confirms nothing else.
        generation: Generation,
        /// Take the word of a session that was open before the change, which proves little.
        danger_same_session: bool,
    },
    /// Back to the last confirmed state, now. Root only.
    Revert {
        /// Only if this is the generation that waits for its confirmation.
        generation: Option<Generation>,
    },
    /// Stop enforcing: remove the table and forget the state. Root only.
    Remove,
    /// Packets and bytes by rule id.
    Counters,
    /// What other tables do with traffic that our rules let in. Root only.
    Foreign,
    /// Ports that destination NAT sends elsewhere (containers). Root only.
    Published,
    /// Compare the kernel with what it should hold; repair. Root only.
    Verify,
    /// A stream of accepted and denied flows. Root only.
    Flows,
    /// A stream of the kernel's own trace of matching packets. Root only.
    Trace(TraceFilter),
    /// Established sessions as conntrack knows them, bounded. Root only.
    Sessions,
}

impl Request {
    /// True if not everybody may ask it: only root, and part of it the user that the machine is bound to.
    #[must_use]
    pub fn needs_root(&self) -> bool {
        !matches!(self, Request::Status | Request::Counters)
    }
}

/// A change of what is enforced.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// What to enforce.
    pub intent: Intent,
    /// The generation that the plan was made against; refused if the agent has moved on. `None` skips the check.
    pub base: Option<Generation>,
    /// Revert by itself unless confirmed within this many seconds, 5-3,600. `None` needs no confirmation.
    pub confirm_within_s: Option<u32>,
    /// Go on even if the current administration session would be refused afterwards.
    pub danger_cut_session: bool,
    /// Who asked for it and why, for the status.
    pub note: String,
    /// The control plane's decision that this is. Only on a bound machine, and there nothing else is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fleet: Option<Mark>,
}

/// A decision of a control plane: when it was made, and the digest of what was decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// The control plane's generation; it is not the agent's own. 0 means that nothing was decided yet.
    pub generation: u64,
    /// SHA-256 of the bundle; 64 hex digits where it is written down.
    #[serde(with = "hex")]
    pub digest: [u8; 32],
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the fleet's generation {}", self.generation)
    }
}

/// 32 bytes as 64 hex digits.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 32], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&keepwall_core::hex(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(from)?;
        keepwall_core::unhex(&text).ok_or_else(|| D::Error::custom("a digest has 64 hex digits"))
    }
}

/// Which packets to trace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceFilter {
    /// Source address.
    pub source: Option<std::net::IpAddr>,
    /// Destination address.
    pub destination: Option<std::net::IpAddr>,
    /// Protocol number.
    pub protocol: Option<u8>,
    /// Destination port.
    pub port: Option<u16>,
    /// How long, 1-300 seconds.
    pub seconds: u32,
    /// Stop after this many packets, 1-1,000.
    pub packets: u32,
}

/// What the agent says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// To `Status`.
    Status(Box<Status>),
    /// To `Intent`; `None` if nothing is enforced.
    Intent(Option<Box<Intent>>),
    /// To `Fleet`.
    Fleet(FleetState),
    /// To `Apply`.
    Applied(Applied),
    /// To `Confirm`, `Revert`, `Remove`, `Bind`, `Unbind`: done, in words.
    Done(String),
    /// To `Counters`.
    Counters(Counters),
    /// To `Foreign`.
    Foreign(Vec<ForeignDrop>),
    /// To `Published`.
    Published(Vec<Published>),
    /// To `Verify`.
    Verified(Drift),
    /// To `Sessions`.
    Sessions(Vec<Flow>),
    /// One of a stream.
    Event(Box<Event>),
    /// The stream ends by itself.
    End,
    /// No, and why.
    Refused(Refused),
}

/// Why a request was refused. What was enforced before still is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// A stable word: `not-root`, `bad-request`, `state-moved`, `would-cut-session`, `too-large`, `kernel`,
    /// `nothing-pending`, `same-session`, `busy`, `pending`, `disk`, `watchdog`; about fleets `bound`, `not-bound`,
    /// `other-instance`, `older`, `other-digest`.
    pub code: String,
    /// What is wrong.
    pub message: String,
    /// The way out, or empty.
    pub help: String,
}

/// What is enforced.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// `observing` (no table), `enforcing`, `observe-only` (a table that drops nothing).
    pub mode: String,
    /// The machine's instance name, if an intent is in force.
    pub instance: Option<String>,
    /// What is in force now.
    pub generation: Generation,
    /// What a restart would come back to.
    pub confirmed: Option<Generation>,
    /// What waits for a confirmation.
    pub pending: Option<Pending>,
    /// The control plane that the machine is bound to, `host:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// Enforced interfaces: name, device, groups, and whether the device is there.
    pub attachments: Vec<AttachmentStatus>,
    /// The kernel against what it should hold.
    pub drift: Drift,
    /// How often the table had to be repaired since the agent started.
    pub repairs: u64,
    /// What this kernel lacks and what we do instead.
    pub degraded: Vec<String>,
}

/// An applied state that nobody has confirmed yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Which.
    pub generation: Generation,
    /// Until it reverts, in milliseconds.
    pub left_ms: u64,
    /// The control plane's decision, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fleet: Option<Mark>,
}

/// What a control plane has brought to this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetState {
    /// This machine's name in the fleet.
    pub instance: String,
    /// `host:port` of the control plane.
    pub server: String,
    /// What is confirmed; generation 0 if nothing of this control plane's is.
    pub held: Mark,
    /// The newest decision that was ever begun, confirmed or not.
    pub tried: Mark,
    /// What `held` stands for; `None` if that is generation 0.
    pub intent: Option<Box<Intent>>,
}

/// One enforced interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentStatus {
    /// `instance/interface`.
    pub name: String,
    /// Linux device.
    pub device: String,
    /// True if such a device exists now.
    pub present: bool,
    /// Its groups.
    pub groups: Vec<String>,
    /// Inbound rules.
    pub ingress_rules: usize,
    /// Outbound rules.
    pub egress_rules: usize,
}

/// Whether the kernel holds what it should.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Drift {
    /// Nothing is enforced.
    NoTable,
    /// It does.
    None,
    /// It did not, and was put right.
    Repaired(Vec<String>),
    /// It does not, and putting it right did not help: somebody else keeps changing it.
    Contested(Vec<String>),
}

/// An apply that went through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Now in force.
    pub generation: Generation,
    /// `unchanged`, `elements` (one map, in place), `replaced`.
    pub outcome: String,
    /// Sessions that were cut because their verdict changed.
    pub sessions_cut: u64,
    /// Seconds until it reverts unless confirmed.
    pub confirm_within_s: Option<u32>,
    /// True if it is confirmed already: nothing of the control plane's change reached the kernel, so it cuts nobody off.
    #[serde(default)]
    pub confirmed: bool,
    /// What to know.
    pub warnings: Vec<String>,
}

/// Packets by rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Counting since this many seconds.
    pub since_s: u64,
    /// Rule id to packets and bytes. First packets of sessions: established ones ask no rule.
    pub rules: std::collections::BTreeMap<String, (u64, u64)>,
}

/// Traffic that we allow and another table drops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignDrop {
    /// `ip filter`.
    pub table: String,
    /// `INPUT`.
    pub chain: String,
    /// Rule number from 1, or none for the chain's policy.
    pub rule: Option<usize>,
    /// Our rule that allows it.
    pub ours: String,
    /// Example: `tcp 203.0.113.99 -> 10.0.0.5:443`.
    pub example: String,
    /// False if the other table holds something that we cannot read, so that it may drop.
    pub certain: bool,
}

/// A port of this machine that leads elsewhere, to a container for instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// 6 or 17.
    pub protocol: u8,
    /// The port that is asked for.
    pub port: u16,
    /// The address that is asked for, none for any of this machine.
    pub address: Option<std::net::IpAddr>,
    /// Where it ends.
    pub target: std::net::SocketAddr,
    /// Table and chain that say so.
    pub by: String,
}

/// A flow, seen once when it starts, or each denied packet (rate-limited).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Microseconds since 1970, by the kernel's clock; 0 if unknown.
    pub time_us: u64,
    /// `accept`, `drop`, `cut`, `invalid`, `spoofed`.
    pub verdict: String,
    /// `ingress`, `egress`, or empty.
    pub direction: String,
    /// `instance/interface`, or empty.
    pub interface: String,
    /// `tcp`, `udp`, …
    pub protocol: String,
    /// Sender.
    pub source: std::net::IpAddr,
    /// Receiver.
    pub destination: std::net::IpAddr,
    /// 0 if there is none.
    pub source_port: u16,
    /// 0 if there is none.
    pub destination_port: u16,
    /// The deciding rule's label, or why there is none.
    pub rule: String,
    /// Where that rule was written; empty if that is known at a fleet's server only.
    pub place: String,
}

/// One of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The stream is set up: what happens from now on is seen.
    Ready,
    /// To `Flows`.
    Flow(Flow),
    /// To `Flows`: this many were not seen because they came too fast.
    Lost(u64),
    /// To `Trace`.
    Trace(TraceStep),
}

/// What one rule, chain policy or hook did with a traced packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceStep {
    /// The same for all steps of one packet.
    pub packet: u32,
    /// `inet keepwall`.
    pub table: String,
    /// Chain.
    pub chain: String,
    /// The rule's comment or its handle, or `policy`.
    pub rule: String,
    /// `accept`, `drop`, `continue`, `jump x`, …
    pub verdict: String,
    /// The packet, where the kernel sent it.
    pub summary: String,
    /// The model's word on this packet, with the first step.
    pub model: Option<String>,
    /// True if the table is ours.
    pub ours: bool,
}

/// A frame cannot be read.
#[derive(Debug)]
pub enum FrameError {
    /// The other side closed between frames.
    Closed,
    /// Longer than allowed.
    TooLong {
        /// What was announced.
        len: u32,
        /// What is allowed.
        max: u32,
    },
    /// Not what it should be.
    Malformed(String),
    /// Anything else.
    Io(io::Error),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FrameError::Closed => f.write_str("the other side closed the connection"),
            FrameError::TooLong { len, max } => write!(f, "a frame of {len} bytes; at most {max} are taken"),
            FrameError::Malformed(why) => write!(f, "not understood: {why}"),
            FrameError::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for FrameError {}

/// Writes one frame.
///
/// # Errors
/// The other side is gone.
pub fn write_frame<T: Serialize>(to: &mut impl Write, message: &T) -> io::Result<()> {
    let json = serde_json::to_vec(message).map_err(io::Error::other)?;
    let len = u32::try_from(json.len()).ok().filter(|len| *len <= FRAME_BYTES_MAX);
    let len = len.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the message is too long for a frame"))?;
    let mut frame = Vec::with_capacity(json.len() + 4);
    frame.extend(len.to_be_bytes());
    frame.extend(json);
    to.write_all(&frame)?;
    to.flush()
}

/// Reads one frame of at most `max` bytes. Memory is taken as bytes arrive, not as they are announced.
///
/// # Errors
/// See [`FrameError`].
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read, max: u32) -> Result<T, FrameError> {
    let mut head = [0; 4];
    match from.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(FrameError::Closed),
        other => other.map_err(FrameError::Io)?,
    }
    let len = u32::from_be_bytes(head);
    if len > max {
        return Err(FrameError::TooLong { len, max });
    }
    let mut json = Vec::new();
    from.take(u64::from(len)).read_to_end(&mut json).map_err(FrameError::Io)?;
    if json.len() != len as usize {
        return Err(FrameError::Malformed(format!("the frame ends after {} of {len} bytes", json.len())));
    }
    serde_json::from_slice(&json).map_err(|error| FrameError::Malformed(error.to_string()))
}

/// For the fuzzer: any bytes are a request or an error, and never a panic.
pub fn fuzz_request(bytes: &[u8]) {
    if let Ok(envelope) = read_frame::<Envelope>(&mut &bytes[..], FRAME_BYTES_MAX)
        && let Request::Apply(apply) = envelope.request
    {
        let _ = apply.intent.validate();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_went() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &Envelope { version: VERSION, request: Request::Revert { generation: None } }).unwrap();
        let back: Envelope = read_frame(&mut bytes.as_slice(), 1024).unwrap();
        assert!(matches!(back.request, Request::Revert { generation: None }));
        assert!(matches!(read_frame::<Envelope>(&mut &[][..], 1024), Err(FrameError::Closed)));
    }

    #[test]
    fn a_mark_is_written_in_hex_and_nothing_else_is_read() {
        let mark = Mark { generation: 7, digest: [0xa5; 32] };
        let json = serde_json::to_string(&mark).unwrap();
        assert_eq!(json, format!(r#"{{"generation":7,"digest":"{}"}}"#, "a5".repeat(32)));
        assert_eq!(serde_json::from_str::<Mark>(&json).unwrap(), mark);
        for wrong in ["", "a5", &"+5".repeat(32), &"zz".repeat(32), &"é".repeat(32), &"a5".repeat(33)] {
            let json = format!(r#"{{"generation":7,"digest":"{wrong}"}}"#);
            assert!(serde_json::from_str::<Mark>(&json).is_err(), "{wrong}");
        }
    }

    #[test]
    fn long_short_and_foreign_frames_are_refused() {
        let huge = [0xff, 0xff, 0xff, 0xff];
        assert!(matches!(read_frame::<Envelope>(&mut &huge[..], 4096), Err(FrameError::TooLong { .. })));
        let short = [0, 0, 0, 9, b'{'];
        assert!(matches!(read_frame::<Envelope>(&mut &short[..], 4096), Err(FrameError::Malformed(_))));
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &serde_json::json!({"version": 1, "request": "status", "extra": 1})).unwrap();
        assert!(matches!(read_frame::<Envelope>(&mut bytes.as_slice(), 4096), Err(FrameError::Malformed(_))));
    }
}
