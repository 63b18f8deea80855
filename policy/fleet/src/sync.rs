//! How an instance and the control plane come to mean the same: both sides as values, without a clock or a socket.
//!
//! ```text
//!  server: Session                        instance: Holder
//!     │ ◀──────────── hello ────────────────── │  what I hold; the highest generation I ever tried
//!     │ ── desired (generation, base, digest) ▶ │  refuse: another machine's, an older one, another base
//!     │                                         │  else: remember it as tried, apply, prove contact, confirm
//!     │ ◀──────────── outcome ───────────────── │  applied, refused, failed, reverted
//! ```
//!
//! Whatever the network loses, repeats or reorders, and whichever server or agent restarts: an instance never goes
//! back to an older generation, never takes what is meant for another, and in the end holds what is desired. One
//! offer is on its way at a time, so a slow instance slows nobody and queues nothing.

use crate::bundle::Digest;

/// What a machine is to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// When it was decided.
    pub generation: u64,
    /// What was decided.
    pub digest: Digest,
}

/// How an instance introduces itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Which machine.
    pub instance: String,
    /// What is confirmed there; generation 0 if nothing of this control plane's is.
    pub held: State,
    /// The newest offer that it ever began to apply, confirmed or not.
    pub tried: State,
    /// True if that offer failed or was taken back.
    pub failed: bool,
}

/// An offer of the control plane, without its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// For this machine only.
    pub instance: String,
    /// What it will hold.
    pub state: State,
    /// What the body changes, or none if the body is whole.
    pub base: Option<Digest>,
}

/// What became of an offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Of which.
    pub state: State,
    /// How it went.
    pub result: Applied,
}

/// How an offer went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// In force and confirmed.
    Yes,
    /// Refused before anything was touched.
    Refused(Refusal),
    /// The machine could not, or took it back: it is as it was.
    Failed,
}

/// Why an instance does not take an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is for another machine.
    OtherInstance,
    /// A newer one was tried already.
    Older,
    /// It changes a state that is not held: send it whole.
    OtherBase,
    /// The body does not lead to what was announced, or is no intent.
    BadBody,
}

/// What the instance does with an offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Remember it as tried, on disk; then apply it.
    Apply,
    /// It is in force already: say so again.
    Again(Outcome),
    /// No.
    Refuse(Outcome),
}

/// The instance's side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    instance: String,
    held: State,
    tried: State,
    failed: bool,
}

impl Holder {
    /// As the state on disk says. An offer that was tried and is not held counts as failed: the machine went back.
    #[must_use]
    pub fn new(instance: &str, held: State, tried: State) -> Holder {
        Holder { instance: instance.to_owned(), held, tried, failed: tried.generation > held.generation }
    }

    /// How it introduces itself.
    #[must_use]
    pub fn hello(&self) -> Hello {
        Hello { instance: self.instance.clone(), held: self.held, tried: self.tried, failed: self.failed }
    }

    /// What is held, confirmed.
    #[must_use]
    pub fn held(&self) -> State {
        self.held
    }

    /// The newest offer that was ever begun.
    #[must_use]
    pub fn tried(&self) -> State {
        self.tried
    }

    /// Looks at an offer.
    #[must_use]
    pub fn decide(&self, offer: &Offer) -> Decision {
        let refuse = |why| Decision::Refuse(Outcome { state: offer.state, result: Applied::Refused(why) });
        if offer.instance != self.instance {
            return refuse(Refusal::OtherInstance);
        }
        if offer.state == self.held {
            return Decision::Again(Outcome { state: offer.state, result: Applied::Yes });
        }
        // The very offer that was tried may be tried again: a crash came between. Any other of its number is a lie.
        let again = offer.state == self.tried;
        if offer.state.generation <= self.tried.generation.max(self.held.generation) && !again {
            return refuse(Refusal::Older);
        }
        if offer.base.is_some_and(|base| base != self.held.digest) {
            return refuse(Refusal::OtherBase);
        }
        Decision::Apply
    }

    /// From now on this offer counts as tried.
    pub fn begin(&mut self, state: State) {
        self.tried = state;
        self.failed = true;
    }

    /// The offer that was begun is in force and confirmed.
    pub fn applied(&mut self, state: State) -> Outcome {
        (self.held, self.failed) = (state, false);
        Outcome { state, result: Applied::Yes }
    }

    /// The offer that was begun did not go in, or was taken back.
    pub fn failed(&mut self, state: State) -> Outcome {
        self.failed = true;
        Outcome { state, result: Applied::Failed }
    }
}

/// The control plane's side of one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    held: State,
    /// No offer with this number or a lower one will be taken, except that very one.
    tried: State,
    /// What is on its way and has not been answered.
    offered: Option<State>,
    /// What the instance could not do; not offered again until something else is desired or somebody asks.
    failed: Option<Digest>,
    /// The instance does not hold the base that we thought: the next offer is whole.
    whole: bool,
}

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing: it holds what it should, or an answer is awaited, or it failed at just this.
    Nothing,
    /// This server has not heard yet of what the instance holds: wait for a newer generation.
    Behind,
    /// Offer this, as a change of what the instance holds where that is known, else whole.
    Offer {
        /// What to offer.
        state: State,
        /// The digest that a change may build on.
        base: Option<Digest>,
    },
}

impl Session {
    /// A stream begins.
    #[must_use]
    pub fn new(hello: &Hello) -> Session {
        Session {
            held: hello.held,
            tried: if hello.tried.generation >= hello.held.generation { hello.tried } else { hello.held },
            offered: None,
            failed: hello.failed.then_some(hello.tried.digest),
            whole: hello.held.generation == 0,
        }
    }

    /// What the instance holds, as far as is known here.
    #[must_use]
    pub fn held(&self) -> State {
        self.held
    }

    /// The newest offer that the instance began, as far as is known here.
    #[must_use]
    pub fn tried(&self) -> State {
        self.tried
    }

    /// What the instance could not do, if that is the newest thing it was offered.
    #[must_use]
    pub fn failed(&self) -> Option<Digest> {
        self.failed
    }

    /// True if it holds what is desired.
    #[must_use]
    pub fn in_sync(&self, desired: &State) -> bool {
        self.held.digest == desired.digest && self.held.generation != 0
    }

    /// What to send, given what is desired now.
    #[must_use]
    pub fn next(&self, desired: &State) -> Next {
        if self.offered.is_some() || self.failed == Some(desired.digest) {
            return Next::Nothing;
        }
        if self.in_sync(desired) {
            return Next::Nothing;
        }
        if desired.generation <= self.tried.generation && *desired != self.tried {
            return Next::Behind;
        }
        Next::Offer { state: *desired, base: (!self.whole).then_some(self.held.digest) }
    }

    /// An offer is on its way.
    pub fn offered(&mut self, state: State) {
        self.offered = Some(state);
    }

    /// An answer came. An answer to nothing that was offered on this stream is passed over; false then.
    pub fn answered(&mut self, outcome: &Outcome) -> bool {
        let Some(offered) = self.offered.filter(|state| *state == outcome.state) else { return false };
        self.offered = None;
        match outcome.result {
            Applied::Yes => {
                (self.held, self.failed, self.whole) = (offered, None, false);
                self.tried = offered;
            }
            Applied::Failed => {
                self.failed = Some(offered.digest);
                self.tried = offered;
            }
            Applied::Refused(Refusal::OtherBase) if !self.whole => self.whole = true,
            // It has been told something newer, by another server perhaps. What it has, its next hello tells.
            Applied::Refused(Refusal::Older) => self.tried.generation = self.tried.generation.max(offered.generation),
            Applied::Refused(_) => self.failed = Some(offered.digest),
        }
        true
    }

    /// Somebody asked at this generation to try again: what failed before counts no more.
    pub fn forgive(&mut self, asked: u64) {
        if self.tried.generation < asked {
            self.failed = None;
        }
    }
}
