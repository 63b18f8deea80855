//! Questions and answers: one netlink socket, one question at a time.

use std::io;
use std::time::Duration;

use keepwall_ir::nft::decode::{self, KernelError, Message, Reply};
use keepwall_ir::nft::encode::{Subject, Transaction};
use keepwall_sys::netlink::{Protocol, RecvError, Socket};

use crate::error::{EMSGSIZE, NftError, refused};

/// The kernel works while a request is sent, so its answer is there at once; a dump goes on as it is read. This is for
/// the case that it never comes.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// One conversation with netfilter.
#[derive(Debug)]
pub(crate) struct Kernel {
    socket: Socket,
    seq: u32,
}

/// How a dump went.
pub(crate) enum Dumped {
    /// To its end.
    Whole,
    /// To its end, but something changed meanwhile.
    Interrupted,
    /// What was asked for is not there.
    Missing,
    /// The caller had enough: this conversation is over, as answers would still come.
    BrokenOff,
}

impl Kernel {
    pub(crate) fn open() -> Result<Kernel, NftError> {
        let doing = "opening a netlink socket";
        let socket = Socket::open(Protocol::Netfilter).map_err(|source| NftError::Unreachable { doing, source })?;
        Ok(Kernel { socket, seq: 1 })
    }

    pub(crate) fn port(&self) -> u32 {
        self.socket.port()
    }

    /// The number of the next message; `count` of them are taken.
    pub(crate) fn take_seq(&mut self, count: u32) -> u32 {
        let first = self.seq;
        self.seq = self.seq.wrapping_add(count).max(1);
        first
    }

    /// Carries out a transaction, whole or not at all.
    pub(crate) fn transact(&mut self, table: &str, transaction: &Transaction) -> Result<(), NftError> {
        const DOING: &str = "changing nf_tables";
        if transaction.empty {
            return Ok(());
        }
        self.take_seq(u32::try_from(transaction.subjects.len()).unwrap_or(u32::MAX));
        self.socket.send(&transaction.bytes).map_err(|source| {
            if source.raw_os_error() == Some(EMSGSIZE) {
                return NftError::TooLarge { table: table.to_owned(), bytes: transaction.bytes.len() };
            }
            NftError::Unreachable { doing: DOING, source }
        })?;
        let mut acknowledged = false;
        let mut first: Option<(u32, KernelError)> = None;
        loop {
            let bytes = match self.socket.recv(Some(Duration::ZERO)) {
                Ok(bytes) => bytes,
                Err(RecvError::TimedOut) => break,
                Err(source) => return Err(NftError::Unanswered { doing: DOING, source }),
            };
            for message in decode::messages(bytes) {
                let message = message.map_err(|source| NftError::Garbled { source })?;
                match decode::reply(&message) {
                    Some(Reply::Ack) if message.seq == transaction.ack_seq => acknowledged = true,
                    // One error is enough for nothing to be in force, even if the last message is acknowledged; the
                    // first says most.
                    Some(Reply::Error(error)) if transaction.subject(message.seq).is_some() && first.is_none() => {
                        first = Some((message.seq, error));
                    }
                    _ => {}
                }
            }
        }
        match first {
            Some((seq, error)) => {
                let subject = transaction.subject(seq).cloned().unwrap_or(Subject::Batch);
                Err(refused(table, subject, error))
            }
            None if acknowledged => Ok(()),
            None => Err(NftError::Unanswered { doing: DOING, source: RecvError::TimedOut }),
        }
    }

    /// Asks, and hands each object of the answer to `each`, which says whether it wants more.
    pub(crate) fn ask(
        &mut self,
        what: &str,
        request: impl FnOnce(u32) -> Vec<u8>,
        mut each: impl FnMut(&Message<'_>) -> Result<bool, NftError>,
    ) -> Result<Dumped, NftError> {
        const DOING: &str = "reading from netfilter";
        const EINTR: i32 = 4;
        let seq = self.take_seq(1);
        let request = request(seq);
        let flags = request.get(6..8).map_or(0, |f| u16::from_ne_bytes([f[0], f[1]]));
        let one_object = flags & (keepwall_ir::nft::encode::DUMP | keepwall_ir::nft::encode::ACK) == 0;
        self.socket.send(&request).map_err(|source| NftError::Unreachable { doing: DOING, source })?;
        let mut interrupted = false;
        loop {
            let bytes = self.socket.recv(Some(ANSWER_WITHIN));
            let bytes = bytes.map_err(|source| NftError::Unanswered { doing: DOING, source })?;
            for message in decode::messages(bytes) {
                let message = message.map_err(|source| NftError::Garbled { source })?;
                if message.seq != seq {
                    continue; // The rest of an earlier answer.
                }
                interrupted |= message.interrupted();
                let ended = |interrupted| Ok(if interrupted { Dumped::Interrupted } else { Dumped::Whole });
                match decode::reply(&message) {
                    Some(Reply::Done(None) | Reply::Ack) => return ended(interrupted),
                    Some(Reply::Done(Some(error)) | Reply::Error(error)) => match error.errno {
                        crate::error::ENOENT => return Ok(Dumped::Missing),
                        EINTR => return Ok(Dumped::Interrupted),
                        _ => return Err(refused(what, Subject::Batch, error)),
                    },
                    Some(Reply::Overrun) => interrupted = true,
                    Some(Reply::Nothing) => {}
                    None => {
                        if !each(&message)? {
                            return Ok(Dumped::BrokenOff);
                        }
                        if one_object {
                            return ended(interrupted);
                        }
                    }
                }
            }
        }
    }

    /// Sends several requests at once, numbered from `first_seq`, each of which is acknowledged; hands each answer,
    /// with the position of its request, to `each`.
    pub(crate) fn ask_many(
        &mut self,
        bytes: &[u8],
        first_seq: u32,
        count: usize,
        mut each: impl FnMut(usize, Option<KernelError>) -> Result<(), NftError>,
    ) -> Result<(), NftError> {
        const DOING: &str = "changing conntrack";
        self.socket.send(bytes).map_err(|source| NftError::Unreachable { doing: DOING, source })?;
        let mut answers = 0;
        while answers < count {
            let bytes = self.socket.recv(Some(ANSWER_WITHIN));
            let bytes = bytes.map_err(|source| NftError::Unanswered { doing: DOING, source })?;
            for message in decode::messages(bytes) {
                let message = message.map_err(|source| NftError::Garbled { source })?;
                let position = usize::try_from(message.seq.wrapping_sub(first_seq)).unwrap_or(usize::MAX);
                if position >= count {
                    continue;
                }
                match decode::reply(&message) {
                    Some(Reply::Ack) => each(position, None)?,
                    Some(Reply::Error(error)) => each(position, Some(error))?,
                    _ => continue,
                }
                answers += 1;
            }
        }
        Ok(())
    }
}

impl From<io::Error> for NftError {
    fn from(source: io::Error) -> NftError {
        NftError::Unreachable { doing: "talking to netfilter", source }
    }
}
