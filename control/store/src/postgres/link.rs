//! A connection to PostgreSQL: where to, how protected, and when to try again.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, Row, Statement};

use super::tls::Tls;
use crate::StoreError;

/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(5);
/// A network that swallows everything is noticed after this long.
const SILENCE: Duration = Duration::from_secs(10);
/// The wait between attempts grows from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Where Debian, Fedora and Alpine keep the authorities that the system trusts.
const SYSTEM_AUTHORITIES: &[&str] =
    &["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Statements that hang are ended by the server, and so are transactions of a server of ours that stopped in the
/// middle: it holds the lock that the others wait for. Who set synchronous_commit to more than `on` keeps that.
const SESSION: &str = "SET statement_timeout = '60s'; SET idle_in_transaction_session_timeout = '10s';
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') IN ('off', 'local')";

/// Where to connect to, checked.
#[derive(Clone)]
pub(super) struct Target {
    config: Config,
    tls: Option<Tls>,
}

impl Target {
    /// Reads a connection string, `host=… user=…` or `postgresql://…`, with `sslmode` and `sslrootcert` as libpq
    /// knows them.
    pub(super) fn parse(text: &str) -> Result<Target, StoreError> {
        let wrong = |why: String| StoreError::Unavailable(format!("the connection string of PostgreSQL: {why}"));
        let (rest, ours) = take_options(text).map_err(wrong)?;
        let mut config: Config = rest.parse().map_err(|error| wrong(chain(&error)))?;
        let local = config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_)));
        let protect = match ours.get("sslmode").map(String::as_str) {
            Some("disable") => false,
            Some("require" | "verify-ca" | "verify-full") => true,
            None => !local,
            Some(mode @ ("allow" | "prefer")) => {
                let why =
                    format!("sslmode={mode} protects from nobody; say verify-full, or disable on a trusted network");
                return Err(wrong(why));
            }
            Some(mode) => return Err(wrong(format!("sslmode={mode} is not known"))),
        };
        config.ssl_mode(if protect { SslMode::Require } else { SslMode::Disable });
        if config.get_application_name().is_none() {
            config.application_name("keepwalld");
        }
        config.connect_timeout(CONNECT).tcp_user_timeout(SILENCE).keepalives_idle(SILENCE);
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        let tls = if protect { Some(Tls::new(client_config(ours.get("sslrootcert")).map_err(wrong)?)) } else { None };
        Ok(Target { config, tls })
    }

    /// Connects; `told` gets the payloads of notifications.
    pub(super) async fn connect(&self, told: Option<mpsc::Sender<String>>) -> Result<Link, StoreError> {
        let connect = async {
            let client = match &self.tls {
                Some(tls) => {
                    let (client, connection) = self.config.connect(tls.clone()).await?;
                    drive(connection, told);
                    client
                }
                None => {
                    let (client, connection) = self.config.connect(NoTls).await?;
                    drive(connection, told);
                    client
                }
            };
            client.batch_execute(SESSION).await?;
            Ok(Link { client, statements: Mutex::new(HashMap::new()) })
        };
        match tokio::time::timeout(2 * CONNECT, connect).await {
            Ok(link) => link,
            Err(_) => Err(StoreError::Unavailable("PostgreSQL does not answer".to_owned())),
        }
    }

    /// Connects, again and again until `deadline`.
    pub(super) async fn connect_until(&self, deadline: Instant) -> Result<Link, StoreError> {
        let mut pause = Backoff::default();
        loop {
            match tokio::time::timeout_at(deadline, self.connect(None)).await {
                Ok(Ok(link)) => return Ok(link),
                Ok(Err(error)) if !pause.until(deadline).await => return Err(error),
                Ok(Err(_)) => {}
                Err(_) => return Err(StoreError::Unavailable("PostgreSQL does not answer".to_owned())),
            }
        }
    }
}

/// Longer and longer pauses.
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff(BACKOFF.0)
    }
}

impl Backoff {
    pub(super) async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(BACKOFF.1);
    }

    /// False if the deadline comes first.
    pub(super) async fn until(&mut self, deadline: Instant) -> bool {
        if Instant::now() + self.0 >= deadline {
            return false;
        }
        self.wait().await;
        true
    }
}

/// One connection and the statements that it has prepared.
pub(super) struct Link {
    pub(super) client: Client,
    statements: Mutex<HashMap<String, Statement>>,
}

pub(super) type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Link {
    pub(super) async fn statement(&self, sql: &str) -> Result<Statement, tokio_postgres::Error> {
        let known = self.statements.lock().unwrap_or_else(PoisonError::into_inner).get(sql).cloned();
        if let Some(statement) = known {
            return Ok(statement);
        }
        let statement = self.client.prepare(sql).await?;
        self.statements.lock().unwrap_or_else(PoisonError::into_inner).insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    pub(super) async fn query(&self, sql: &str, params: Params<'_>) -> Result<Vec<Row>, tokio_postgres::Error> {
        let statement = self.statement(sql).await?;
        self.client.query(&statement, params).await
    }

    pub(super) async fn execute(&self, sql: &str, params: Params<'_>) -> Result<u64, tokio_postgres::Error> {
        let statement = self.statement(sql).await?;
        self.client.execute(&statement, params).await
    }
}

/// Moves bytes until the client is dropped or the connection breaks.
fn drive<S, T>(mut connection: tokio_postgres::Connection<S, T>, told: Option<mpsc::Sender<String>>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let (AsyncMessage::Notification(notification), Some(told)) = (message, &told) {
                // A full queue holds newer word than it needs.
                let _ = told.try_send(notification.payload().to_owned());
            }
        }
    });
}

/// Whether the same may well work on another connection: this one broke, the server starts or stops, or two
/// transactions stood in each other's way.
pub(super) fn transient(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        None => true,
        Some(code) => {
            [SqlState::T_R_DEADLOCK_DETECTED, SqlState::T_R_SERIALIZATION_FAILURE, SqlState::TOO_MANY_CONNECTIONS]
                .contains(code)
                || ["08", "57P", "25P03", "25006"].iter().any(|class| code.code().starts_with(class))
        }
    }
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> StoreError {
        StoreError::Unavailable(chain(&error))
    }
}

/// The error with its causes; tokio-postgres says only "db error" itself.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn client_config(authorities: Option<&String>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    let system = || SYSTEM_AUTHORITIES.iter().find(|path| std::path::Path::new(path).exists()).copied();
    let file = match authorities.map(String::as_str) {
        Some("system") | None => {
            system().ok_or("this system trusts no authorities; name a file by sslrootcert=".to_owned())?
        }
        Some(file) => file,
    };
    let certificates = CertificateDer::pem_file_iter(file).map_err(|error| format!("{file}: {error}"))?;
    roots.add_parsable_certificates(certificates.filter_map(Result::ok));
    if roots.is_empty() {
        return Err(format!("{file} holds no certificate"));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(|error| error.to_string())?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Splits off the options that tokio-postgres does not read as libpq does.
fn take_options(text: &str) -> Result<(String, HashMap<String, String>), String> {
    let mut ours = HashMap::new();
    let mut take = |name: &str, value: &str| {
        let is_ours = matches!(name, "sslmode" | "sslrootcert");
        if is_ours {
            ours.insert(name.to_owned(), value.to_owned());
        }
        is_ours
    };
    if text.starts_with("postgres://") || text.starts_with("postgresql://") {
        let Some((address, options)) = text.split_once('?') else { return Ok((text.to_owned(), ours)) };
        let mut rest = Vec::new();
        for option in options.split('&') {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            if !take(name, &percent_decoded(value)?) {
                rest.push(option);
            }
        }
        return Ok((format!("{address}?{}", rest.join("&")), ours));
    }
    let mut rest = String::new();
    let mut left = text.trim_start();
    while !left.is_empty() {
        let (name, behind) = left.split_once('=').ok_or("not of the form name=value name=value …")?;
        let (value, raw) = value_at_start(behind.trim_start())?;
        if !take(name.trim(), &value) {
            rest.push_str(&format!("{}={raw} ", name.trim()));
        }
        left = behind.trim_start()[raw.len()..].trim_start();
    }
    Ok((rest, ours))
}

/// A value with backslashes and quotes taken away, and as it was written.
fn value_at_start(text: &str) -> Result<(String, &str), String> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut characters = text.char_indices().skip(usize::from(quoted));
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.push(characters.next().ok_or("ends with a backslash")?.1),
            '\'' if quoted => return Ok((value, &text[..=at])),
            _ if !quoted && character.is_whitespace() => return Ok((value, &text[..at])),
            _ => value.push(character),
        }
    }
    if quoted { Err("a quote is not closed".to_owned()) } else { Ok((value, text)) }
}

fn percent_decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        let (byte, behind) = match (first, behind) {
            (b'%', [high, low, behind @ ..]) => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16).ok_or(format!("`{text}` is not encoded well"));
                ((digit(high)? * 16 + digit(low)?) as u8, behind)
            }
            _ => (*first, behind),
        };
        bytes.push(byte);
        rest = behind;
    }
    String::from_utf8(bytes).map_err(|_| format!("`{text}` is not UTF-8"))
}

/// The future that tokio-postgres wants of a handshake.
pub(super) type Handshake<T> = Pin<Box<dyn Future<Output = std::io::Result<T>> + Send>>;

/// The name that the server's certificate has to carry.
pub(super) fn server_name(host: &str) -> Result<ServerName<'static>, String> {
    ServerName::try_from(host.to_owned()).map_err(|_| format!("`{host}` is no name that a certificate could have"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn options(text: &str) -> (String, Option<String>, Option<String>) {
        let (rest, ours) = take_options(text).unwrap();
        (rest.trim().to_owned(), ours.get("sslmode").cloned(), ours.get("sslrootcert").cloned())
    }

    #[test]
    fn both_forms_of_a_connection_string_are_read() {
        let ca = || Some("/a b/ca.pem".to_owned());
        let full = || Some("verify-full".to_owned());
        let (rest, mode, root) = options("host=db password='it\\'s = x' sslmode=verify-full sslrootcert='/a b/ca.pem'");
        assert_eq!((rest.as_str(), mode, root), ("host=db password='it\\'s = x'", full(), ca()));
        let (rest, mode, root) =
            options("postgresql://u:p@db/x?sslrootcert=%2Fa%20b/ca.pem&connect_timeout=3&sslmode=verify-full");
        assert_eq!((rest.as_str(), mode, root), ("postgresql://u:p@db/x?connect_timeout=3", full(), ca()));
        assert!(take_options("host=db password='x").is_err());
        assert!(take_options("nonsense").is_err());
    }

    #[test]
    fn another_machine_is_spoken_to_in_the_open_only_when_told_so() {
        assert!(Target::parse("host=/run/postgresql").unwrap().tls.is_none());
        assert!(Target::parse("host=db.example sslmode=disable").unwrap().tls.is_none());
        for bad in ["host=db sslmode=prefer", "host=db sslmode=no", "host=db sslrootcert=/nowhere", "host=db port=x"] {
            assert!(matches!(Target::parse(bad), Err(StoreError::Unavailable(_))), "{bad}");
        }
    }
}
