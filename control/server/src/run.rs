//! The whole server: store, authority, fleet, and its three doors, from start to a clean end.

use std::fs::{OpenOptions, Permissions};
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use keepwall_store::audit::{Broken, Verified, Verifier};
use keepwall_store::postgres::PostgresStore;
use keepwall_store::sqlite::SqliteStore;
use keepwall_store::{PAGE_MAX, Retention, Store, StoreError, Stream};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::agents::{AgentLimits, Agents};
use crate::api::{ApiSettings, App, Peer, router, serve_connection};
use crate::auth::{Auth, AuthSettings};
use crate::ca::Authority;
use crate::config::{Config, RetentionConfig};
use crate::fleet::{Fleet, FleetSettings, now_ms};
use crate::metrics;
use crate::seal::{Seal, random};

/// Connections to the API at once; more wait in the kernel's queue.
const API_CONNECTIONS_MAX: usize = 4_096;
/// How long a TLS handshake with the API may take.
const HANDSHAKE: Duration = Duration::from_secs(15);
/// How often what is beyond its retention goes.
const TRIM_EVERY: Duration = Duration::from_secs(300);
/// How long streams have to end after a stop.
const FAREWELL: Duration = Duration::from_secs(3);

/// A server that runs.
pub struct Running {
    /// Where the API listens.
    pub api: SocketAddr,
    /// Where instances call.
    pub agents: SocketAddr,
    /// Where health and metrics are.
    pub metrics: SocketAddr,
    /// The fleet, for tests and benches in the same process.
    pub fleet: Arc<Fleet>,
    stop: watch::Sender<bool>,
}

/// The database file of a state directory.
#[must_use]
pub fn database(config: &Config) -> PathBuf {
    config.state.join("store.db")
}

/// The key that seals secrets; made if there is none.
///
/// # Errors
/// It cannot be read or made, or others may read it.
pub fn seal(config: &Config) -> Result<Seal, String> {
    let path = config.store.seal_key.clone().unwrap_or_else(|| config.state.join("seal.key"));
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut made = false;
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
        Ok(mut file) => {
            file.write_all(&random::<32>()).and_then(|()| file.sync_all()).map_err(failed)?;
            made = true;
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) if path.exists() => tracing::debug!(%error, "the seal key is there and cannot be written"),
        Err(error) => return Err(failed(error)),
    }
    let mut file = std::fs::File::open(&path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(format!("{}: others may read it; chmod 600 it", path.display()));
    }
    let mut key = [0; 32];
    let mut rest = Vec::new();
    file.read_exact(&mut key).and_then(|()| file.read_to_end(&mut rest)).map_err(failed)?;
    if !rest.is_empty() {
        return Err(format!("{}: a seal key has 32 bytes", path.display()));
    }
    if made {
        tracing::info!(path = %path.display(), "made a seal key; keep a copy of it apart from backups of the store");
    }
    Ok(Seal::new(&key))
}

/// The store that the configuration names.
///
/// # Errors
/// It cannot be opened; in words.
pub async fn open_store(config: &Config, seal: &Seal) -> Result<Arc<dyn Store>, String> {
    match &config.store.postgres {
        Some(connection) => {
            let store = PostgresStore::connect(connection, seal.audit_key()).await;
            Ok(Arc::new(store.map_err(|error| format!("PostgreSQL: {error}"))?))
        }
        None => {
            let path = database(config);
            let store = SqliteStore::open(&path, seal.audit_key());
            Ok(Arc::new(store.map_err(|error| format!("{}: {error}", path.display()))?))
        }
    }
}

/// Makes the state directory, for its owner alone.
///
/// # Errors
/// The disk; in words.
pub fn state_directory(path: &Path) -> Result<(), String> {
    std::fs::create_dir_all(path)
        .and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(0o700)))
        .map_err(|error| format!("{}: {error}", path.display()))
}

impl Running {
    /// Starts everything.
    ///
    /// # Errors
    /// What does not work, in words; nothing is left running then.
    pub async fn start(config: &Config) -> Result<Running, String> {
        state_directory(&config.state)?;
        let seal = Arc::new(seal(config)?);
        let store = open_store(config, &seal).await?;
        let authority = Arc::new(Authority::load(&store, &seal).await?);
        let bind = |address: SocketAddr| async move {
            TcpListener::bind(address).await.map_err(|error| format!("cannot listen at {address}: {error}"))
        };
        // All doors before the first word: a port that is taken must not leave half a server.
        let api = bind(config.api.listen).await?;
        let agents = bind(config.agents.listen).await?;
        let metrics = bind(config.metrics.listen).await?;
        let address = |listener: &TcpListener| listener.local_addr().map_err(|error| error.to_string());
        let (api_at, agents_at, metrics_at) = (address(&api)?, address(&agents)?, address(&metrics)?);
        let public = match (&config.agents.public, config.agents.listen.port()) {
            (None, 0) => agents_at.to_string(),
            _ => config.agents_public(),
        };
        let settings = FleetSettings { agents_public: public.clone(), public_key_pin: authority.pin()? };
        let fleet = Fleet::start(Arc::clone(&store), Arc::clone(&authority), settings)
            .await
            .map_err(|error| error.to_string())?;
        let auth_settings = AuthSettings { oidc: config.oidc.clone(), ..AuthSettings::default() };
        let auth = Arc::new(Auth::new(Arc::clone(&store), Arc::clone(&seal), auth_settings, Arc::new(now_ms))?);
        let app = Arc::new(App::new(Arc::clone(&fleet), Arc::clone(&store), Arc::clone(&auth), ApiSettings::default()));
        let routes = router(app);
        let (stop, stopped) = watch::channel(false);

        let host = public.rsplit_once(':').map_or(public.as_str(), |(host, _)| host);
        let mut names = config.api.names.clone();
        names.push(host.trim_matches(['[', ']']).to_owned());
        let tls = crate::agents::tls(&fleet, &names)?;
        let limits = AgentLimits { connections_max: config.agents.connections_max, ..AgentLimits::default() };
        let programs = config.agents.programs.clone().or_else(own_directory);
        tokio::spawn(Agents::serve(Arc::clone(&fleet), agents, tls, limits, programs, stopped.clone()));

        let acceptor = if config.api_tls() { Some(api_tls(config, &authority, &names)?) } else { None };
        tokio::spawn(serve_tcp(api, acceptor, routes.clone(), stopped.clone()));
        if !config.api.socket.as_os_str().is_empty() {
            let socket = local_socket(&config.api.socket)?;
            tokio::spawn(serve_socket(socket, routes, stopped.clone()));
        }
        tokio::spawn(keep_house(Arc::clone(&store), auth, config.retention, stopped.clone()));
        // Last: who sees the metrics finds all doors open.
        tokio::spawn(metrics::serve(Arc::clone(&fleet), metrics, stopped));
        tracing::info!(api = %api_at, agents = %agents_at, metrics = %metrics_at, tls = config.api_tls(), "listening");
        Ok(Running { api: api_at, agents: agents_at, metrics: metrics_at, fleet, stop })
    }

    /// Ends streams with a word, so that instances come back to another server at once.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let until = tokio::time::Instant::now() + FAREWELL;
        while self.fleet.streams() > 0 && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.fleet.leave().await;
    }
}

fn own_directory() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.to_owned())
}

fn api_tls(config: &Config, authority: &Authority, names: &[String]) -> Result<TlsAcceptor, String> {
    use rustls_pki_types::pem::PemObject as _;
    use rustls_pki_types::{CertificateDer, PrivateKeyDer};
    let (chain, key) = match (&config.api.certificate, &config.api.key) {
        (Some(certificate), Some(key)) => {
            let broken = |path: &Path, error: rustls_pki_types::pem::Error| format!("{}: {error}", path.display());
            let chain = CertificateDer::pem_file_iter(certificate)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(|error| broken(certificate, error))?;
            (chain, PrivateKeyDer::from_pem_file(key).map_err(|error| broken(key, error))?)
        }
        _ => authority.server(names)?,
    };
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| format!("api.certificate and api.key: {error}"))?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

fn local_socket(path: &Path) -> Result<UnixListener, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    // A socket that nobody listens at is left over; one where somebody does is another server's.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(format!("{}: another server listens there", path.display()));
    }
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    // Anybody on the machine may knock: who they are, the kernel says, and only root needs no credential.
    std::fs::set_permissions(path, Permissions::from_mode(0o666)).map_err(failed)?;
    Ok(listener)
}

async fn serve_tcp(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    routes: axum::Router,
    mut stop: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(API_CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let (tcp, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a request");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, routes) = (acceptor.clone(), routes.clone());
        tokio::spawn(async move {
            let _place = place;
            let _ = tcp.set_nodelay(true);
            let peer = Peer::Tcp(address);
            let served = match acceptor {
                None => serve_connection(tcp, routes, peer).await,
                Some(acceptor) => match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
                    Ok(Ok(tls)) => serve_connection(tls, routes, peer).await,
                    _ => return,
                },
            };
            if let Err(error) = served {
                tracing::debug!(%address, %error, "a connection to the API ended");
            }
        });
    }
}

async fn serve_socket(listener: UnixListener, routes: axum::Router, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(API_CONNECTIONS_MAX / 16));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(credentials) = stream.peer_cred() else { continue };
        let routes = routes.clone();
        tokio::spawn(async move {
            let _place = place;
            let peer = Peer::Unix { uid: credentials.uid() };
            if let Err(error) = serve_connection(stream, routes, peer).await {
                tracing::debug!(%error, "a connection to the local socket ended");
            }
        });
    }
}

/// What is beyond its retention, and sessions that are over, go.
async fn keep_house(
    store: Arc<dyn Store>,
    auth: Arc<Auth>,
    retention: RetentionConfig,
    mut stop: watch::Receiver<bool>,
) {
    let bounds = |rows_max: u64, days: u32| Retention { rows_max, age_ms_max: u64::from(days) * 86_400_000 };
    loop {
        for (stream, keep) in [
            (Stream::Finding, bounds(retention.findings_max, retention.findings_days)),
            (Stream::Event, bounds(retention.events_max, retention.events_days)),
        ] {
            match store.trim(stream, keep, now_ms()).await {
                Ok(0) => {}
                Ok(gone) => tracing::info!(gone, stream = stream.as_str(), "rows beyond their retention went"),
                Err(error) => tracing::warn!(%error, "rows beyond their retention stay for now"),
            }
        }
        if let Err(error) = auth.sweep().await {
            tracing::warn!(%error, "sessions that are over stay for now");
        }
        tokio::select! {
            () = tokio::time::sleep(TRIM_EVERY) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Starts the log: standard error, where systemd's journal reads it.
pub fn log(config: &Config) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .or_else(|_| tracing_subscriber::EnvFilter::try_new(&config.log))
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A second log in one process, as in tests, is no error.
    let _ = if config.log_json { log.json().try_init() } else { log.try_init() };
}

/// Tells systemd, if it waits for that, that the doors are open.
pub fn notify_ready() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = std::os::unix::net::UnixDatagram::unbound().and_then(|socket| {
        let name = path.to_string_lossy();
        match name.strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt as _;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(b"READY=1", &address)
            }
            None => socket.send_to(b"READY=1", &path),
        }
    });
    if let Err(error) = told {
        tracing::warn!(%error, "systemd cannot be told that the server is ready");
    }
}

/// Reads the audit log from its first line.
///
/// # Errors
/// The store.
pub async fn verify_audit(store: &Arc<dyn Store>, seal: &Seal) -> Result<Result<Verified, Broken>, StoreError> {
    let mut verifier = Verifier::new(seal.audit_key());
    // The head first: what is appended meanwhile is not looked at.
    let head = store.audit_head().await?;
    let last = head.as_ref().map_or(0, |(number, _)| *number);
    while verifier.next_number() <= last {
        let from = verifier.next_number();
        let lines = store.audit(from, PAGE_MAX).await?;
        for line in lines.iter().take_while(|line| line.number <= last) {
            if let Err(broken) = verifier.line(line) {
                return Ok(Err(broken));
            }
        }
        if verifier.next_number() == from {
            break;
        }
    }
    Ok(verifier.finish(head.as_ref().map(|(number, mac)| (*number, mac.as_str()))))
}
