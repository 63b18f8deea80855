//! Connections that the kernel tracks: look at them, mark them, forget them.

use std::ops::ControlFlow;

use keepwall_ir::nft::decode::{self, Flow};
use keepwall_ir::nft::encode::{self, Subject};

use crate::error::{ENOENT, NftError, refused};
use crate::kernel::{Dumped, Kernel};

/// Requests in one send: their answers, below 100 bytes each, must fit the receive queue.
const REQUESTS_PER_SEND: usize = 1024;

/// A conversation with conntrack, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Conntrack {
    kernel: Kernel,
}

/// What became of flows that were to be marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marked {
    /// Now have the mark.
    pub changed: usize,
    /// Were gone already.
    pub gone: usize,
}

impl Conntrack {
    /// Opens it.
    ///
    /// # Errors
    /// The kernel cannot be reached.
    pub fn open() -> Result<Conntrack, NftError> {
        Ok(Conntrack { kernel: Kernel::open()? })
    }

    /// Hands each flow (of IPv4 `Some(false)`, IPv6 `Some(true)`, or both) to `each`, until it breaks off: how many are
    /// kept is the caller's to bound. Flows that come or go meanwhile may be missing or seen twice.
    ///
    /// # Errors
    /// The kernel cannot be reached or refuses.
    pub fn flows(&mut self, ipv6: Option<bool>, mut each: impl FnMut(Flow) -> ControlFlow<()>) -> Result<(), NftError> {
        let outcome = self.kernel.ask(
            "conntrack",
            |seq| encode::dump_flows(seq, ipv6),
            |message| Ok(decode::flow(message).is_none_or(|flow| each(flow).is_continue())),
        )?;
        if matches!(outcome, Dumped::BrokenOff) {
            self.kernel = Kernel::open()?;
        }
        Ok(())
    }

    /// Sets the bits of `mask` in the mark of each of these flows to those of its mark.
    ///
    /// # Errors
    /// The kernel refuses one for another reason than that it is gone; others may be marked.
    pub fn set_marks<'f>(
        &mut self,
        flows: impl IntoIterator<Item = (&'f Flow, u32)>,
        mask: u32,
    ) -> Result<Marked, NftError> {
        let mut flows = flows.into_iter().peekable();
        let mut marked = Marked::default();
        while flows.peek().is_some() {
            let first_seq = self.kernel.take_seq(u32::try_from(REQUESTS_PER_SEND).unwrap_or(u32::MAX));
            let mut bytes = Vec::new();
            let mut count = 0;
            let mut seq = first_seq;
            for (flow, mark) in flows.by_ref().take(REQUESTS_PER_SEND) {
                bytes.extend(encode::flow_set_mark(seq, flow, mark, mask));
                seq = seq.wrapping_add(1);
                count += 1;
            }
            self.kernel.ask_many(&bytes, first_seq, count, |_, error| {
                match error {
                    None => marked.changed += 1,
                    Some(error) if error.errno == ENOENT => marked.gone += 1,
                    Some(error) => return Err(refused("conntrack", Subject::Batch, error)),
                }
                Ok(())
            })?;
        }
        Ok(marked)
    }

    /// Forgets one flow; `false` if it was gone already. Its next packet is a new one.
    ///
    /// # Errors
    /// The kernel cannot be reached or refuses.
    pub fn delete(&mut self, flow: &Flow) -> Result<bool, NftError> {
        let outcome = self.kernel.ask("conntrack", |seq| encode::flow_delete(seq, flow), |_| Ok(true))?;
        Ok(!matches!(outcome, Dumped::Missing))
    }

    /// Forgets every flow of the network namespace. For tests: on a real machine it cuts established sessions.
    ///
    /// # Errors
    /// The kernel cannot be reached or refuses.
    pub fn danger_flush(&mut self) -> Result<(), NftError> {
        self.kernel.ask("conntrack", encode::flows_flush, |_| Ok(true))?;
        Ok(())
    }
}
