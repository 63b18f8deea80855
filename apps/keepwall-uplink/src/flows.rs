//! Flow records as events, if they are wanted: so many a second at most, the rest is counted.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use keepwall_link::{
    Envelope, Event, FRAME_BYTES_MAX_UNPRIVILEGED, Request, Response, VERSION, read_frame, write_frame,
};

use crate::agent::Agent;
use crate::rows::FLOW;

/// After a stream that ended: the agent restarts, or somebody runs `keepwall flows`, and only one can.
const AGAIN: Duration = Duration::from_secs(30);

/// Lets so many through in each second.
struct Pace {
    per_s: u32,
    since: Instant,
    left: u32,
}

impl Pace {
    fn new(per_s: u32, now: Instant) -> Pace {
        Pace { per_s, since: now, left: per_s }
    }

    fn lets(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            (self.since, self.left) = (now, self.per_s);
        }
        let lets = self.left > 0;
        self.left = self.left.saturating_sub(1);
        lets
    }
}

/// Reads the agent's flow records for ever. Blocks: give it a thread.
pub(crate) fn follow(socket: &Path, agent: &Agent, per_s: u32) {
    let mut pace = Pace::new(per_s, Instant::now());
    loop {
        let why = stream(socket, agent, &mut pace);
        tracing::info!(why, "no flow records for {} s", AGAIN.as_secs());
        sleep(AGAIN);
    }
}

/// Why it ended.
fn stream(socket: &Path, agent: &Agent, pace: &mut Pace) -> String {
    let open = || -> std::io::Result<UnixStream> {
        let mut stream = UnixStream::connect(socket)?;
        write_frame(&mut stream, &Envelope { version: VERSION, request: Request::Flows })?;
        Ok(stream)
    };
    let mut stream = match open() {
        Ok(stream) => stream,
        Err(error) => return format!("{}: {error}", socket.display()),
    };
    loop {
        let event = match read_frame(&mut stream, FRAME_BYTES_MAX_UNPRIVILEGED * 4) {
            Ok(Response::Event(event)) => *event,
            Ok(Response::Refused(refused)) => return refused.message,
            Ok(_) => return "the stream ended".into(),
            Err(error) => return error.to_string(),
        };
        match event {
            Event::Flow(flow) if pace.lets(Instant::now()) => agent.with_rows(|rows| rows.event(FLOW, 0, &flow)),
            Event::Flow(_) => agent.with_rows(|rows| rows.lost(1)),
            Event::Lost(count) => agent.with_rows(|rows| rows.lost(count)),
            Event::Ready | Event::Trace(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_kept_in_every_second() {
        let start = Instant::now();
        let mut pace = Pace::new(3, start);
        let mut let_through =
            |at_ms: u64, times: u32| (0..times).filter(|_| pace.lets(start + Duration::from_millis(at_ms))).count();
        assert_eq!((let_through(0, 2), let_through(500, 5), let_through(999, 5)), (2, 1, 0));
        assert_eq!((let_through(1000, 9), let_through(5000, 9)), (3, 3));
    }
}
