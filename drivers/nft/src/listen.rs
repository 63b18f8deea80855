//! What the kernel tells by itself. Each listener counts what it was too slow for.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use keepwall_ir::nft::decode::{self, Change, Generation, Logged, Message, Reply, Trace};
use keepwall_ir::nft::encode::{self, Subject};
use keepwall_sys::netlink::{Protocol, RecvError, Socket};

use crate::error::{EBUSY, NftError, refused};

/// `NFNLGRP_NFTABLES`.
const GROUP_CHANGES: u32 = 7;
/// `NFNLGRP_NFTRACE`.
const GROUP_TRACES: u32 = 9;
/// How long to wait for the kernel's word on a log group.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Hears the steps of traced packets (`meta nftrace`), of all tables of the network namespace.
#[derive(Debug)]
pub struct TraceListener(Listener<Trace>);

impl TraceListener {
    /// Listens from now on.
    ///
    /// # Errors
    /// The kernel cannot be reached, or this process may not.
    pub fn open() -> Result<TraceListener, NftError> {
        Ok(TraceListener(Listener::group(GROUP_TRACES)?))
    }

    /// The next step; `None` if none comes within `timeout`.
    ///
    /// # Errors
    /// The socket fails.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Trace>, NftError> {
        self.0.next(timeout, decode::trace)
    }

    /// How often steps were lost because they were not read fast enough.
    #[must_use]
    pub fn times_lost(&self) -> u64 {
        self.0.lost
    }
}

/// Hears the packets of one `log group`.
#[derive(Debug)]
pub struct LogListener(Listener<Logged>);

impl LogListener {
    /// Binds to a group; the first `snaplen` bytes of each packet are copied (0: all).
    ///
    /// # Errors
    /// [`NftError::GroupTaken`] if another process is bound to it; `EPERM` without `CAP_NET_ADMIN`.
    pub fn open(group: u16, snaplen: u32) -> Result<LogListener, NftError> {
        let mut listener = Listener::new()?;
        let doing = "binding to a log group";
        let snaplen = if snaplen == 0 { 0xffff } else { snaplen };
        listener.socket.send(&encode::log_bind(1, group, snaplen)).map_err(unreachable(doing))?;
        loop {
            let bytes = listener.socket.recv(Some(ANSWER_WITHIN));
            let bytes = bytes.map_err(|source| NftError::Unanswered { doing, source })?;
            for message in decode::messages(bytes).map_while(Result::ok) {
                match decode::reply(&message) {
                    Some(Reply::Ack) => return Ok(LogListener(listener)),
                    // The kernel says EPERM for a group of another process, as it does without the privilege.
                    Some(Reply::Error(error)) if error.errno == EBUSY || is_bound(group) => {
                        return Err(NftError::GroupTaken { group });
                    }
                    Some(Reply::Error(error)) => {
                        return Err(refused(&format!("log group {group}"), Subject::Batch, error));
                    }
                    _ => listener.waiting.extend(decode::logged(&message)),
                }
            }
        }
    }

    /// The next packet; `None` if none comes within `timeout`.
    ///
    /// # Errors
    /// The socket fails.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Logged>, NftError> {
        self.0.next(timeout, decode::logged)
    }

    /// How often packets were lost because they were not read fast enough.
    #[must_use]
    pub fn times_lost(&self) -> u64 {
        self.0.lost
    }
}

/// True if some process is bound to the group: each line of this file starts with a group.
fn is_bound(group: u16) -> bool {
    let bound = std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_log").unwrap_or_default();
    bound.lines().filter_map(|line| line.split_whitespace().next()).any(|first| first.parse() == Ok(group))
}

/// What a [`ChangeListener`] hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeEvent {
    /// Something in a table changed.
    Changed(Change),
    /// The changes before this were one transaction, by this process.
    Committed(Generation),
}

/// Hears all changes of all tables of the network namespace, also our own: tell them by their port.
#[derive(Debug)]
pub struct ChangeListener(Listener<ChangeEvent>);

impl ChangeListener {
    /// Listens from now on.
    ///
    /// # Errors
    /// The kernel cannot be reached, or this process may not.
    pub fn open() -> Result<ChangeListener, NftError> {
        Ok(ChangeListener(Listener::group(GROUP_CHANGES)?))
    }

    /// The next change; `None` if none comes within `timeout`.
    ///
    /// # Errors
    /// The socket fails.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<ChangeEvent>, NftError> {
        self.0.next(timeout, |message| {
            let changed = decode::change(message).map(ChangeEvent::Changed);
            changed.or_else(|| decode::generation(message).map(ChangeEvent::Committed))
        })
    }

    /// How often changes were lost because they were not read fast enough; then only looking again helps.
    #[must_use]
    pub fn times_lost(&self) -> u64 {
        self.0.lost
    }
}

#[derive(Debug)]
struct Listener<T> {
    socket: Socket,
    /// What came in the same read, at most 256 KiB of messages.
    waiting: VecDeque<T>,
    lost: u64,
}

impl<T> Listener<T> {
    fn new() -> Result<Listener<T>, NftError> {
        let socket = Socket::open(Protocol::Netfilter).map_err(unreachable("opening a netlink socket"))?;
        Ok(Listener { socket, waiting: VecDeque::new(), lost: 0 })
    }

    fn group(group: u32) -> Result<Listener<T>, NftError> {
        let listener = Listener::new()?;
        listener.socket.join(group).map_err(unreachable("listening to nf_tables"))?;
        Ok(listener)
    }

    fn next(&mut self, timeout: Duration, parse: impl Fn(&Message<'_>) -> Option<T>) -> Result<Option<T>, NftError> {
        let doing = "listening to netfilter";
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Ok(Some(event));
            }
            let left = deadline.map_or(timeout, |deadline| deadline.saturating_duration_since(Instant::now()));
            match self.socket.recv(Some(left)) {
                // What does not parse is passed over: foreign bytes must not stop a listener.
                Ok(bytes) => {
                    let events = decode::messages(bytes).map_while(Result::ok).filter_map(|message| parse(&message));
                    self.waiting.extend(events);
                }
                Err(RecvError::Lost) => self.lost = self.lost.saturating_add(1),
                Err(RecvError::TimedOut) => return Ok(None),
                Err(source) => return Err(NftError::Unanswered { doing, source }),
            }
        }
    }
}

fn unreachable(doing: &'static str) -> impl Fn(io::Error) -> NftError {
    move |source| NftError::Unreachable { doing, source }
}
