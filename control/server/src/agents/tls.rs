//! TLS over connections that are silent for days.
//!
//! The usual wrapper keeps four kilobytes ready on each connection for what may come. Thousands of streams mostly
//! wait, so this drives rustls through its interface without buffers: memory is taken when bytes are there, and given
//! back when they are read or sent.

use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus, WriteTraffic,
};
use rustls::{CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;

/// Bytes that are taken from the network at once.
const READ: usize = 8 * 1024;
/// Plain bytes that are encrypted at once: four records.
const ENCRYPT_MAX: usize = 64 * 1024;
/// Bytes that are held of what is not a whole message yet. The largest handshake message has 64 KiB.
const INCOMING_MAX: usize = 128 * 1024;

/// A connection that a client opened.
pub(super) struct Tls {
    tcp: TcpStream,
    connection: UnbufferedServerConnection,
    /// What came and is no whole record yet.
    incoming: Vec<u8>,
    /// What was decrypted and not read yet.
    plain: Queue,
    /// What is encrypted and has not left yet.
    outgoing: Queue,
    /// The other side has said that nothing more comes.
    ended: bool,
    /// We have said it.
    closed: bool,
}

/// Bytes that go out at the front; no memory when there are none.
#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    gone: usize,
}

impl Queue {
    fn rest(&self) -> &[u8] {
        &self.bytes[self.gone..]
    }

    fn advance(&mut self, count: usize) {
        self.gone += count;
        if self.gone == self.bytes.len() {
            *self = Queue::default();
        }
    }

    /// Lets `write` put what it has at the end, in as much room as it asks for.
    fn put<E>(
        &mut self,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, E>,
        short: impl Fn(&E) -> Option<usize>,
    ) -> Result<(), E> {
        let end = self.bytes.len();
        let mut room = 0;
        loop {
            self.bytes.resize(end + room, 0);
            match write(&mut self.bytes[end..]) {
                Ok(written) => {
                    self.bytes.truncate(end + written);
                    return Ok(());
                }
                Err(error) => match short(&error) {
                    Some(required) if required > room => room = required,
                    _ => {
                        self.bytes.truncate(end);
                        return Err(error);
                    }
                },
            }
        }
    }
}

/// What to do once the connection can carry data.
enum Then<'a> {
    Nothing,
    Send(&'a [u8]),
    Close,
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

fn encrypt<D>(
    traffic: &mut WriteTraffic<'_, D>,
    outgoing: &mut Queue,
    mut write: impl FnMut(&mut WriteTraffic<'_, D>, &mut [u8]) -> Result<usize, EncryptError>,
) -> io::Result<()> {
    let short = |error: &EncryptError| match error {
        EncryptError::InsufficientSize(InsufficientSizeError { required_size }) => Some(*required_size),
        EncryptError::EncryptExhausted => None,
    };
    outgoing.put(|room| write(traffic, room), short).map_err(|error| broken(error.to_string()))
}

impl Tls {
    /// The handshake, to its end.
    ///
    /// # Errors
    /// The network's; or a `rustls::Error` as the inner error. The other side has been told then.
    pub(super) async fn accept(tcp: TcpStream, config: Arc<ServerConfig>) -> io::Result<Tls> {
        let mut tls = Tls {
            tcp,
            connection: UnbufferedServerConnection::new(config).map_err(broken)?,
            incoming: Vec::new(),
            plain: Queue::default(),
            outgoing: Queue::default(),
            ended: false,
            closed: false,
        };
        while tls.connection.is_handshaking() {
            if std::future::poll_fn(|cx| tls.poll_more(cx)).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let processed = tls.process(Then::Nothing);
            let flushed = tls.flush().await;
            processed?;
            flushed?;
        }
        Ok(tls)
    }

    /// Who is there, and what they want to speak.
    pub(super) fn state(&self) -> &CommonState {
        &self.connection
    }

    /// Takes in what came, as far as whole records go, and does what is asked as soon as that can be.
    fn process(&mut self, then: Then<'_>) -> io::Result<()> {
        let mut then = Some(then);
        let mut failed: Option<rustls::Error> = None;
        loop {
            let UnbufferedStatus { discard, state } = self.connection.process_tls_records(&mut self.incoming);
            let mut over = false;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        self.plain.bytes.extend_from_slice(record.map_err(broken)?.payload);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    let short = |error: &EncodeError| match error {
                        EncodeError::InsufficientSize(InsufficientSizeError { required_size }) => Some(*required_size),
                        EncodeError::AlreadyEncoded => None,
                    };
                    self.outgoing
                        .put(|room| data.encode(room), short)
                        .map_err(|error: EncodeError| broken(error.to_string()))?;
                }
                // It is queued, and nothing overtakes it.
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed) => self.ended = true,
                Ok(ConnectionState::Closed) => over = true,
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    over = true;
                    match then.take() {
                        Some(Then::Send(plain)) => {
                            encrypt(&mut traffic, &mut self.outgoing, |traffic, room| traffic.encrypt(plain, room))?;
                        }
                        Some(Then::Close) => {
                            encrypt(&mut traffic, &mut self.outgoing, |traffic, room| {
                                traffic.queue_close_notify(room)
                            })?;
                        }
                        Some(Then::Nothing) | None => {}
                    }
                }
                Ok(ConnectionState::BlockedHandshake) => over = true,
                // Early data is not offered.
                Ok(other) => return Err(broken(format!("{other:?}"))),
                Err(error) => (failed, then) = (Some(error), None),
            }
            self.incoming.drain(..discard);
            match failed.take() {
                // Once more, for the alert that tells the other side; what came stays where rustls has seen it.
                Some(error) if self.connection.wants_write() => failed = Some(error),
                Some(error) => return Err(broken(error)),
                None if over => break,
                None => {}
            }
        }
        if self.incoming.is_empty() {
            self.incoming = Vec::new();
        }
        match then {
            Some(Then::Send(_)) => Err(ErrorKind::BrokenPipe.into()),
            _ => Ok(()),
        }
    }

    /// Waits for bytes and takes them; none at the end.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.incoming.len() > INCOMING_MAX {
            return Poll::Ready(Err(broken("a message that does not end")));
        }
        loop {
            ready!(self.tcp.poll_read_ready(cx))?;
            let mut bytes = [0; READ];
            match self.tcp.try_read(&mut bytes) {
                Ok(count) => {
                    self.incoming.extend_from_slice(&bytes[..count]);
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outgoing.rest().is_empty() {
            let sent = ready!(Pin::new(&mut self.tcp).poll_write(cx, self.outgoing.rest()))?;
            if sent == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.outgoing.advance(sent);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Tls {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let tls = self.get_mut();
        loop {
            let rest = tls.plain.rest();
            if !rest.is_empty() {
                let count = rest.len().min(to.remaining());
                to.put_slice(&rest[..count]);
                tls.plain.advance(count);
                return Poll::Ready(Ok(()));
            }
            if tls.ended || to.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if ready!(tls.poll_more(cx))? == 0 {
                // Without a farewell it may be cut short.
                return Poll::Ready(Err(ErrorKind::UnexpectedEof.into()));
            }
            let processed = tls.process(Then::Nothing);
            // Keys may be renewed, or an alert wants out; what does not leave now leaves with the next write.
            if let Poll::Ready(Err(error)) = tls.poll_out(cx) {
                return Poll::Ready(Err(error));
            }
            processed?;
        }
    }
}

impl AsyncWrite for Tls {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, plain: &[u8]) -> Poll<io::Result<usize>> {
        let tls = self.get_mut();
        ready!(tls.poll_out(cx))?;
        let count = plain.len().min(ENCRYPT_MAX);
        tls.process(Then::Send(&plain[..count]))?;
        // It is ours now, whether all of it leaves at once or not.
        if let Poll::Ready(Err(error)) = tls.poll_out(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_out(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let tls = self.get_mut();
        if !tls.closed {
            tls.closed = true;
            tls.process(Then::Close)?;
        }
        ready!(tls.poll_out(cx))?;
        Pin::new(&mut tls.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, RootCertStore};
    use tokio::io::AsyncReadExt as _;
    use tokio_rustls::TlsConnector;

    use super::*;

    fn configs() -> (Arc<ServerConfig>, Arc<ClientConfig>) {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(["server.test".to_owned()]).unwrap().self_signed(&key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key.serialize_der().try_into().unwrap())
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        (Arc::new(server), Arc::new(client))
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (listener.accept().await.unwrap().0, ours)
    }

    fn name() -> ServerName<'static> {
        ServerName::try_from("server.test").unwrap()
    }

    #[tokio::test]
    async fn megabytes_go_both_ways_and_a_silent_connection_holds_no_buffer() {
        let (server, client) = configs();
        let (theirs, ours) = pair().await;
        let echo = tokio::spawn(async move {
            let mut tls = Tls::accept(theirs, server).await.unwrap();
            let mut bytes = vec![0; 3_000_000];
            tls.read_exact(&mut bytes).await.unwrap();
            tls.write_all(&bytes).await.unwrap();
            tls.flush().await.unwrap();
            // The farewell, and nothing else.
            assert_eq!(tls.read(&mut bytes).await.unwrap(), 0);
            let held = (tls.incoming.capacity(), tls.plain.bytes.capacity(), tls.outgoing.bytes.capacity());
            assert_eq!(held, (0, 0, 0));
            tls.shutdown().await.unwrap();
        });
        let mut tls = TlsConnector::from(client).connect(name(), ours).await.unwrap();
        let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let (mut read, mut write) = tokio::io::split(&mut tls);
        let mut back = vec![0; sent.len()];
        let send = async {
            write.write_all(&sent).await.unwrap();
            write.flush().await.unwrap();
        };
        let (_, got) = tokio::join!(send, read.read_exact(&mut back));
        got.unwrap();
        assert!(sent == back);
        tls.shutdown().await.unwrap();
        assert_eq!(tls.read(&mut back).await.unwrap(), 0);
        echo.await.unwrap();
    }

    #[tokio::test]
    async fn a_handshake_that_arrives_byte_by_byte_is_one_all_the_same() {
        let (server, client) = configs();
        let (theirs, ours) = pair().await;
        ours.set_nodelay(true).unwrap();
        let accepted = tokio::spawn(Tls::accept(theirs, server));
        let (near, far) = tokio::io::duplex(1);
        let relay = tokio::spawn(async move {
            let (mut far, mut ours) = (far, ours);
            let _ = tokio::io::copy_bidirectional_with_sizes(&mut far, &mut ours, 1, 1).await;
        });
        let mut tls = TlsConnector::from(client).connect(name(), near).await.unwrap();
        let mut served = accepted.await.unwrap().unwrap();
        tls.write_all(b"hello").await.unwrap();
        tls.flush().await.unwrap();
        let mut got = [0; 5];
        served.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"hello");
        relay.abort();
    }

    #[tokio::test]
    async fn what_is_not_tls_is_told_so_and_ends() {
        let (server, _) = configs();
        let (theirs, mut ours) = pair().await;
        let accepted = tokio::spawn(Tls::accept(theirs, server));
        ours.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let error = accepted.await.unwrap().map(|_| ()).unwrap_err();
        assert!(error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()), "{error}");
        let mut alert = Vec::new();
        ours.read_to_end(&mut alert).await.unwrap();
        assert_eq!(alert.first(), Some(&21), "an alert: {alert:?}");
    }

    #[tokio::test]
    async fn messages_after_a_wrong_one_change_nothing_about_the_answer() {
        // A handshake message that cannot come first, and one more, whole or begun: in one record, or in two.
        for bytes in [
            &[22, 3, 3, 0, 8, 11, 0, 0, 0, 11, 0, 0, 0][..],
            &[22, 3, 3, 0, 6, 11, 0, 0, 0, 11, 0],
            &[22, 3, 3, 0, 4, 11, 0, 0, 0, 22, 3, 3, 0, 4, 11, 0, 0, 0],
            &[22, 3, 3, 0, 2, 11, 0, 23, 3, 3, 0, 1, 0],
        ] {
            let (server, _) = configs();
            let (theirs, mut ours) = pair().await;
            let accepted = tokio::spawn(Tls::accept(theirs, server));
            ours.write_all(bytes).await.unwrap();
            let error = accepted.await.unwrap().map(|_| ()).unwrap_err();
            assert!(error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()), "{error}");
            let mut alert = Vec::new();
            ours.read_to_end(&mut alert).await.unwrap();
            assert!(alert.first().is_none_or(|kind| *kind == 21), "an alert: {alert:?}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_breaks_off_is_not_an_end() {
        let (server, client) = configs();
        let (theirs, ours) = pair().await;
        let accepted = tokio::spawn(Tls::accept(theirs, server));
        let tls = TlsConnector::from(client).connect(name(), ours).await.unwrap();
        let mut served = accepted.await.unwrap().unwrap();
        drop(tls.into_inner());
        // The system may call it a reset or an end; we do not call it the end of what was said.
        assert!(served.read(&mut [0; 10]).await.is_err());
    }
}
