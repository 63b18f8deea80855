//! What the uplink serves: the agent of this machine, or in a test something that stands for it.

use std::future::Future;

use keepwall_fleet::bundle::Bundle;
use keepwall_fleet::sync::State;
use keepwall_wire::Status;

use crate::contact::Contact;

/// What is in force on the machine.
#[derive(Clone, Debug)]
pub struct InForce {
    /// Confirmed; generation 0 if nothing of the control plane's is.
    pub held: State,
    /// The newest that was ever begun.
    pub tried: State,
    /// What `held` stands for.
    pub bundle: Bundle,
}

/// What became of an apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// In force, and to be confirmed once it is proved that the server can still be reached.
    ToBeProved,
    /// In force and confirmed: nothing changed that could cut anybody off.
    Confirmed,
}

/// The machine that is told. It remembers on disk what it began and what it holds.
pub trait Machine: Send + Sync + 'static {
    /// What is in force now.
    fn in_force(&self) -> impl Future<Output = Result<InForce, String>> + Send;
    /// Puts a bundle in force, which reverts by itself unless it is confirmed in time.
    fn apply(
        &self,
        state: State,
        bundle: &Bundle,
        confirm_within_s: u32,
        note: &str,
    ) -> impl Future<Output = Result<Applied, String>> + Send;
    /// Keeps it.
    fn confirm(&self, state: State) -> impl Future<Output = Result<(), String>> + Send;
    /// Takes it back.
    fn revert(&self, state: State) -> impl Future<Output = Result<(), String>> + Send;
    /// How it does, with what is worth a finding; `None` while the agent does not answer.
    fn status(&self) -> impl Future<Output = Option<Status>> + Send;
    /// Findings and events since the last call, at most so many; the number of the last one.
    fn rows(&self, max: usize) -> impl Future<Output = keepwall_wire::Report> + Send;
    /// Rows up to this one are kept by the server.
    fn kept(&self, through: u64) -> impl Future<Output = ()> + Send;
    /// How it stands with the server from now on. Whoever does not keep that need not.
    fn contact(&self, contact: Contact) -> impl Future<Output = ()> + Send {
        drop(contact);
        async {}
    }
}
