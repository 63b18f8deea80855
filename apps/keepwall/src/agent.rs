//! The command line's end of the local link.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use keepwall_link::{Envelope, Event, FRAME_BYTES_MAX, Request, Response, VERSION, read_frame, write_frame};

use crate::failure::Failure;

/// Applying 10,000 rules takes under a second; an agent that is silent this long is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// The agent behind a socket.
#[derive(Clone, Debug)]
pub struct Agent {
    socket: std::path::PathBuf,
}

impl Agent {
    pub fn at(socket: &Path) -> Agent {
        Agent { socket: socket.to_owned() }
    }

    /// True if somebody answers there.
    pub fn is_up(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    fn connect(&self) -> Result<UnixStream, Failure> {
        UnixStream::connect(&self.socket).map_err(|error| {
            let socket = self.socket.display();
            match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::new(
                    format!("no agent is running (nobody listens at {socket})"),
                    "start one with `keepwall up`, or `systemctl start keepwall-agent`",
                ),
                io::ErrorKind::PermissionDenied => Failure::new(
                    format!("you may not talk to the agent at {socket}"),
                    "run this as root (sudo keepwall …)",
                ),
                _ => Failure::plain(format!("cannot reach the agent at {socket}: {error}")),
            }
        })
    }

    /// One request, one answer.
    pub fn ask(&self, request: Request) -> Result<Response, Failure> {
        let mut stream = self.connect()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write_frame(&mut stream, &Envelope { version: VERSION, request })?;
        match read_frame(&mut stream, FRAME_BYTES_MAX)? {
            Response::Refused(refused) => Err(refused.into()),
            other => Ok(other),
        }
    }

    /// One request, a stream of events; ends when `each` returns false or the agent says so.
    pub fn stream(&self, request: Request, mut each: impl FnMut(Event) -> bool) -> Result<(), Failure> {
        let mut stream = self.connect()?;
        write_frame(&mut stream, &Envelope { version: VERSION, request })?;
        loop {
            match read_frame(&mut stream, FRAME_BYTES_MAX)? {
                Response::Refused(refused) => return Err(refused.into()),
                Response::Event(event) => {
                    if !each(*event) {
                        return Ok(());
                    }
                }
                Response::End => return Ok(()),
                other => return Err(Failure::plain(format!("an unexpected answer: {other:?}"))),
            }
        }
    }
}

/// An answer of another kind than asked for: versions do not fit.
pub fn unexpected(response: &Response) -> Failure {
    Failure::new(
        format!("the agent gave another answer than asked for: {response:?}").chars().take(300).collect::<String>(),
        "keepwall and keepwall-agent should have the same version",
    )
}
