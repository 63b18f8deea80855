//! The messages. Field numbers are never used again for something else.

use bytes::Bytes;

/// What an instance says.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FromAgent {
    /// One of these.
    #[prost(oneof = "from_agent::Say", tags = "1, 2, 3, 4, 5, 6")]
    pub say: Option<from_agent::Say>,
}

/// Parts of [`FromAgent`].
pub mod from_agent {
    /// What it says.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Say {
        /// First of all: who it is and what it holds.
        #[prost(message, tag = "1")]
        Hello(super::Hello),
        /// How an offer went.
        #[prost(message, tag = "2")]
        Outcome(super::Outcome),
        /// How it does; when something changed, and now and then.
        #[prost(message, tag = "3")]
        Status(super::Status),
        /// Findings and events.
        #[prost(message, tag = "4")]
        Report(super::Report),
        /// A new certificate is wanted.
        #[prost(message, tag = "5")]
        Renew(super::Renew),
        /// It is there.
        #[prost(message, tag = "6")]
        Heartbeat(super::Heartbeat),
    }
}

/// What the server says.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FromServer {
    /// One of these.
    #[prost(oneof = "from_server::Say", tags = "1, 2, 3, 4, 5")]
    pub say: Option<from_server::Say>,
}

/// Parts of [`FromServer`].
pub mod from_server {
    /// What it says.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Say {
        /// To a hello.
        #[prost(message, tag = "1")]
        Welcome(super::Welcome),
        /// Enforce this.
        #[prost(message, tag = "2")]
        Offer(super::Offer),
        /// Rows up to here are safe.
        #[prost(message, tag = "3")]
        Kept(super::Kept),
        /// The new certificate.
        #[prost(message, tag = "4")]
        Renewed(super::Renewed),
        /// The stream ends here, and why.
        #[prost(message, tag = "5")]
        Goodbye(super::Goodbye),
    }
}

/// A generation and what was decided in it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct State {
    /// When.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// What: SHA-256, 32 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub digest: Bytes,
}

/// Who an instance is and what it holds.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    /// Its name, which its certificate must bear too.
    #[prost(string, tag = "1")]
    pub instance: String,
    /// What is confirmed there.
    #[prost(message, optional, tag = "2")]
    pub held: Option<State>,
    /// The newest offer that it ever began.
    #[prost(message, optional, tag = "3")]
    pub tried: Option<State>,
    /// True if that one failed or was taken back.
    #[prost(bool, tag = "4")]
    pub failed: bool,
    /// The agent's version, for people.
    #[prost(string, tag = "5")]
    pub version: String,
    /// How it does.
    #[prost(message, optional, tag = "6")]
    pub status: Option<Status>,
    /// The newest report that it knows to be kept.
    #[prost(uint64, tag = "7")]
    pub kept: u64,
}

/// How an offer went.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Outcome {
    /// Of which offer.
    #[prost(message, optional, tag = "1")]
    pub state: Option<State>,
    /// How: 1 applied, 2 failed or taken back, 3 for another instance, 4 older, 5 other base, 6 bad body.
    #[prost(uint32, tag = "2")]
    pub result: u32,
    /// In words.
    #[prost(string, tag = "3")]
    pub detail: String,
}

/// How an instance does.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// `observing`, `enforcing`, `observe-only`.
    #[prost(string, tag = "1")]
    pub mode: String,
    /// How the kernel differs from what it should hold.
    #[prost(string, repeated, tag = "2")]
    pub drift: Vec<String>,
    /// What the machine lacks and what it does instead.
    #[prost(string, repeated, tag = "3")]
    pub degraded: Vec<String>,
}

/// Findings and events, in order.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Report {
    /// The number of the last row; they count from 1 without gaps, but for those that were lost.
    #[prost(uint64, tag = "1")]
    pub through: u64,
    /// At most [`crate::REPORT_ROWS_MAX`].
    #[prost(message, repeated, tag = "2")]
    pub rows: Vec<Row>,
    /// Rows that were dropped since the last report because they came too fast.
    #[prost(uint64, tag = "3")]
    pub lost: u64,
}

/// Something seen or concluded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Row {
    /// True: a finding. False: an event.
    #[prost(bool, tag = "1")]
    pub finding: bool,
    /// Unique on its machine: sent again, it is the same.
    #[prost(string, tag = "2")]
    pub key: String,
    /// Milliseconds since 1970.
    #[prost(uint64, tag = "3")]
    pub time_ms: u64,
    /// `drift`, `flow`, …
    #[prost(string, tag = "4")]
    pub kind: String,
    /// 0 information to 4 critical.
    #[prost(uint32, tag = "5")]
    pub severity: u32,
    /// JSON.
    #[prost(string, tag = "6")]
    pub body: String,
}

/// A new certificate is wanted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Renew {
    /// A certificate request (PKCS #10), DER. Only its key counts.
    #[prost(bytes = "bytes", tag = "1")]
    pub request: Bytes,
}

/// It is there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Heartbeat {}

/// To a hello.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Welcome {
    /// Heartbeats at least this often, seconds.
    #[prost(uint32, tag = "1")]
    pub heartbeat_s: u32,
    /// After a loss, dial again at a random moment within this many milliseconds: as long as the fleet is large.
    #[prost(uint32, tag = "2")]
    pub spread_ms: u32,
    /// Rows up to here are safe.
    #[prost(uint64, tag = "3")]
    pub kept: u64,
}

/// Enforce this.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Offer {
    /// For this machine.
    #[prost(string, tag = "1")]
    pub instance: String,
    /// What it will hold.
    #[prost(message, optional, tag = "2")]
    pub state: Option<State>,
    /// What the change builds on; empty if the body is whole.
    #[prost(bytes = "bytes", tag = "3")]
    pub base: Bytes,
    /// A [`Whole`] or a [`Change`], by `base`. Apart, because thousands of machines share one.
    #[prost(bytes = "bytes", tag = "4")]
    pub body: Bytes,
    /// It must be applied, proved and confirmed within this many seconds.
    #[prost(uint32, tag = "5")]
    pub confirm_within_s: u32,
    /// For people: which change this belongs to.
    #[prost(string, tag = "6")]
    pub note: String,
}

/// A whole bundle.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Whole {
    /// The intent without sets, JSON.
    #[prost(bytes = "bytes", tag = "1")]
    pub rules: Bytes,
    /// All sets.
    #[prost(message, repeated, tag = "2")]
    pub sets: Vec<Set>,
}

/// From one bundle to another.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Change {
    /// New rules, or absent.
    #[prost(bytes = "bytes", optional, tag = "1")]
    pub rules: Option<Bytes>,
    /// Sets that differ.
    #[prost(message, repeated, tag = "2")]
    pub sets: Vec<Set>,
    /// Sets that go.
    #[prost(string, repeated, tag = "3")]
    pub gone: Vec<String>,
}

/// A set, or what changes of it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Set {
    /// `group:web`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// True: it begins empty.
    #[prost(bool, tag = "2")]
    pub anew: bool,
    /// Members that come: prefix length and address, 5 bytes each.
    #[prost(bytes = "bytes", tag = "3")]
    pub add_v4: Bytes,
    /// Members that come: prefix length and address, 17 bytes each.
    #[prost(bytes = "bytes", tag = "4")]
    pub add_v6: Bytes,
    /// Members that go, likewise.
    #[prost(bytes = "bytes", tag = "5")]
    pub remove_v4: Bytes,
    /// Members that go, likewise.
    #[prost(bytes = "bytes", tag = "6")]
    pub remove_v6: Bytes,
}

/// Rows up to here are safe.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Kept {
    /// The number of the last one.
    #[prost(uint64, tag = "1")]
    pub through: u64,
}

/// The new certificate.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Renewed {
    /// Chain, DER, the instance's own first, the authority's last. Empty if it was refused.
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub chain: Vec<Bytes>,
    /// Why not, if it was refused.
    #[prost(string, tag = "2")]
    pub refused: String,
}

/// The stream ends here.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Goodbye {
    /// Why: `shutdown`, `revoked`, `replaced`, `protocol`, `busy`.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// Dial again after this many milliseconds at least; 0: as usual.
    #[prost(uint32, tag = "2")]
    pub retry_after_ms: u32,
}
