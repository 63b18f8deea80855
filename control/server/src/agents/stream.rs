//! One instance's stream, for as long as it lasts: days, mostly in silence.
//!
//! Ten thousand of them are open at once, so a stream holds no buffer while nothing comes: a frame's memory is taken
//! when its length is known and its bytes arrive, and given back when it is read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use keepwall_fleet::sync::Session;
use keepwall_wire::{
    AGENT_FRAME_MAX, FromAgent, FromServer, Goodbye, HEAD, HEARTBEAT_S, Hello, Kept, Renewed, Welcome, from_agent,
    from_server, read_hello,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::Agents;
use super::tls::Tls;
use crate::fleet::Handle;

/// How long the first frame may take.
const HELLO: Duration = Duration::from_secs(20);
/// A stream without a word for three heartbeats is dead.
const SILENCE: Duration = Duration::from_secs(HEARTBEAT_S as u64 * 3);
/// How long a frame may take to leave: an instance that reads slower is let go.
const WRITE: Duration = Duration::from_secs(60);

/// What one read brought.
enum Got {
    Frame(Vec<u8>),
    Wake,
    /// In words; empty: the other side closed.
    End(&'static str),
}

fn say(say: from_server::Say) -> Bytes {
    keepwall_wire::frame(&FromServer { say: Some(say) })
}

async fn write(tls: &mut Tls, frame: &[u8]) -> bool {
    let sent = async {
        tls.write_all(frame).await?;
        tls.flush().await
    };
    // Boxed: it is seldom, and thousands of tasks that wait for something else would have its size.
    matches!(Box::pin(tokio::time::timeout(WRITE, sent)).await, Ok(Ok(())))
}

/// A frame that arrives in pieces, between which other things happen.
#[derive(Default)]
struct Inbox {
    head: [u8; HEAD],
    head_got: usize,
    body: Vec<u8>,
    body_len: usize,
}

impl Inbox {
    /// Reads on. Nothing is lost if it is dropped while it waits.
    async fn frame(&mut self, tls: &mut Tls) -> Got {
        /// Memory for a frame grows with what arrives, in steps of this.
        const STEP: usize = 16 * 1024;
        while self.head_got < HEAD {
            match tls.read(&mut self.head[self.head_got..]).await {
                Ok(0) | Err(_) => return Got::End(""),
                Ok(n) => self.head_got += n,
            }
            if self.head_got == HEAD {
                match keepwall_wire::length(self.head, AGENT_FRAME_MAX) {
                    Ok(len) => self.body_len = len,
                    Err(_) => return Got::End("a frame that is too long"),
                }
            }
        }
        while self.body.len() < self.body_len {
            let left = self.body_len - self.body.len();
            self.body.reserve(left.min(STEP));
            let mut limited = (&mut *tls).take(left as u64);
            match limited.read_buf(&mut self.body).await {
                Ok(0) | Err(_) => return Got::End(""),
                Ok(_) => {}
            }
        }
        self.head_got = 0;
        self.body_len = 0;
        Got::Frame(std::mem::take(&mut self.body))
    }
}

impl Agents {
    /// Serves one stream to its end.
    pub(super) async fn stream(self: Arc<Self>, mut tls: Box<Tls>, address: SocketAddr) {
        let Ok(_place) = self.connections.acquire().await else { return };
        // What is done once in the life of a stream is boxed: ten thousand tasks would have its size for days.
        let Some((instance, certificate)) = Box::pin(self.owner(&tls, address)).await else {
            let _ = write(&mut tls, &say(goodbye("revoked", 3_600_000))).await;
            let _ = tls.shutdown().await;
            return;
        };
        let mut inbox = Inbox::default();
        let first = tokio::time::timeout(HELLO, inbox.frame(&mut tls)).await;
        let Ok(Got::Frame(bytes)) = first else { return };
        let Some(hello) = hello_of(&bytes) else { return };
        let Ok(introduced) = read_hello(&hello) else { return };
        if introduced.instance != *instance {
            let why = format!("it calls itself `{}`", introduced.instance.escape_default());
            Box::pin(self.refuse(address, &instance, &why)).await;
            let _ = write(&mut tls, &say(goodbye("revoked", 3_600_000))).await;
            return;
        }
        let mut session = Session::new(&introduced);
        drop(bytes);
        let handle = self.fleet.open_stream(&instance);
        self.take_held(&instance, &session, Some(&hello.version));
        if let Some(status) = &hello.status {
            self.take_status(&instance, status);
        }
        drop(hello);
        let welcome = Welcome { heartbeat_s: HEARTBEAT_S, spread_ms: self.spread_ms(), kept: 0 };
        let reason = if write(&mut tls, &say(from_server::Say::Welcome(welcome))).await {
            self.converse(&mut tls, &mut inbox, &instance, &certificate, &mut session, &handle).await
        } else {
            ""
        };
        if !reason.is_empty() {
            let retry_after_ms = match reason {
                "revoked" => 3_600_000,
                _ => 0,
            };
            let _ = tokio::time::timeout(HELLO, write(&mut tls, &say(goodbye(reason, retry_after_ms)))).await;
        }
        if self.fleet.close_stream(&instance, &handle) {
            self.fleet.heard(&instance, |record| record.server = Arc::default());
        }
        let _ = tokio::time::timeout(HELLO, tls.shutdown()).await;
    }

    /// Until the end, and why it ends.
    async fn converse(
        &self,
        tls: &mut Tls,
        inbox: &mut Inbox,
        instance: &Arc<str>,
        certificate: &[u8; 32],
        session: &mut Session,
        handle: &Handle,
    ) -> &'static str {
        let mut stop = self.stop.clone();
        loop {
            if let Some(reason) = handle.ended() {
                return reason;
            }
            if let Some(offer) = self.next_offer(instance, session)
                && !write(tls, &offer).await
            {
                return "";
            }
            let got = tokio::select! {
                got = tokio::time::timeout(SILENCE, inbox.frame(tls)) => got.unwrap_or(Got::End("silence")),
                () = handle.wake.notified() => Got::Wake,
                _ = stop.wait_for(|stop| *stop) => Got::End("shutdown"),
            };
            let frame = match got {
                Got::Frame(frame) => frame,
                Got::Wake => continue,
                Got::End(reason) => return reason,
            };
            let Ok(FromAgent { say: Some(said) }) = keepwall_wire::message(frame.as_slice()) else {
                return "protocol";
            };
            match said {
                from_agent::Say::Hello(_) => return "protocol",
                from_agent::Say::Heartbeat(_) => {}
                from_agent::Say::Outcome(outcome) => match outcome.read() {
                    Ok(read) => self.take_outcome(instance, session, &read, &outcome.detail),
                    Err(_) => return "protocol",
                },
                from_agent::Say::Status(status) => self.take_status(instance, &status),
                from_agent::Say::Report(report) => {
                    // Nothing else is read from this instance until its rows are safe: that is the back-pressure.
                    match Box::pin(self.take_report(instance, report)).await {
                        Ok(through) => {
                            if !write(tls, &say(from_server::Say::Kept(Kept { through }))).await {
                                return "";
                            }
                        }
                        Err(_) => return "protocol",
                    }
                }
                from_agent::Say::Renew(renew) => {
                    let answer = match Box::pin(self.fleet.renew(instance, certificate, &renew.request)).await {
                        Ok(chain) => {
                            Renewed { chain: chain.into_iter().map(Bytes::from).collect(), refused: String::new() }
                        }
                        Err(refused) => Renewed { chain: Vec::new(), refused },
                    };
                    if !write(tls, &say(from_server::Say::Renewed(answer))).await {
                        return "";
                    }
                }
            }
        }
    }

    /// How long a fleet of this size takes to come back: about 2,000 machines a second.
    pub(super) fn spread_ms(&self) -> u32 {
        u32::try_from(self.fleet.streams() / 2).unwrap_or(60_000).clamp(500, 60_000)
    }
}

fn goodbye(reason: &str, retry_after_ms: u32) -> from_server::Say {
    from_server::Say::Goodbye(Goodbye { reason: reason.to_owned(), retry_after_ms })
}

fn hello_of(bytes: &[u8]) -> Option<Hello> {
    match keepwall_wire::message::<FromAgent>(bytes).ok()?.say? {
        from_agent::Say::Hello(hello) => Some(hello),
        _ => None,
    }
}
