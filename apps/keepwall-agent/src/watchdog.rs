//! Reverts an unconfirmed change even if nobody is left to do it.
//!
//! A separate small process, in a session of its own: `kill -9` of the command line or of the agent does not reach it.
//! It reads one state file and waits. When the time is over it asks the agent to revert; if the agent is dead it does
//! it itself; if the agent lives and does not answer, it is killed first, since nobody may stay locked out for a
//! process that hangs. Should this process die too, the next start of the agent, or the next boot, reverts.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use keepwall_core::Generation;
use keepwall_host::clock;
use keepwall_host::process::{Process, Signal};
use keepwall_host::state::{LockError, StateDir, holder};
use keepwall_link::{Envelope, Request, Response, VERSION, read_frame, write_frame};

use crate::agent;
use crate::log;
use crate::record;

const POLL: Duration = Duration::from_millis(200);
/// An agent that reverts by itself needs less; then there is nothing left to do.
const GRACE: Duration = Duration::from_millis(500);
/// How long a living agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

pub(crate) fn run(state: &Path, socket: &Path, generation: Generation) -> Result<(), String> {
    let boot = record::boot();
    let waiting = || match record::pending(state) {
        Ok(Some(pending)) if pending.record.generation == generation => Some(pending.left_ms(clock::now_ms(), &boot)),
        // Confirmed, reverted or replaced; a state that cannot be read is left to the agent.
        _ => None,
    };
    loop {
        match waiting() {
            None => return Ok(()),
            Some(0) => break,
            Some(left) => sleep(POLL.min(Duration::from_millis(left))),
        }
    }
    sleep(GRACE);
    // Bounded: each round either finds it done, does it, or kills whoever is in the way.
    for _ in 0..10 {
        if waiting().is_none() || ask(socket, generation) {
            return Ok(());
        }
        match StateDir::lock(state) {
            // The agent is dead: its lock is gone with it. Restore as a boot would.
            Ok(lock) => {
                drop(lock);
                return revert_here(state);
            }
            Err(LockError::Held(Some(pid))) => {
                log(format!("the agent (process {pid}) does not revert {generation}; ending it"));
                if let Ok(process) = Process::open(pid)
                    && holder(state) == Some(pid)
                {
                    let _ = process.signal(Signal::Kill);
                    let _ = process.wait(Some(PATIENCE));
                }
            }
            Err(error) => log(format!("cannot lock the state: {error}")),
        }
        sleep(POLL);
    }
    Err(format!("{generation} could not be reverted"))
}

/// True if the agent has done it.
fn ask(socket: &Path, generation: Generation) -> bool {
    let work = || -> Option<()> {
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        let request = Request::Revert { generation: Some(generation) };
        write_frame(&mut stream, &Envelope { version: VERSION, request }).ok()?;
        match read_frame(&mut stream, 64 * 1024).ok()? {
            Response::Done(_) => Some(()),
            // It may have been faster by itself.
            Response::Refused(refused) if refused.code == "nothing-pending" => Some(()),
            _ => None,
        }
    };
    work().is_some()
}

fn revert_here(state: &Path) -> Result<(), String> {
    agent::revert_without_agent(state)
}
