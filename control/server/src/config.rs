//! The server's configuration: one TOML file, every field with its default, range and meaning here.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the configuration is unless told otherwise.
pub const PATH: &str = "/etc/keepwall/server.toml";
/// Where the server keeps its state unless told otherwise.
pub const STATE: &str = "/var/lib/keepwall/server";
/// The API's local socket: root is admin there, by the kernel's word. In a directory of the server's own: the one above
/// is root's, who makes `/run/keepwall/server.sock` lead here.
pub const SOCKET: &str = "/run/keepwall/server/api.sock";

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory of the store, the seal key and backups. Mode 0700.
    pub state: PathBuf,
    /// What is known, and where.
    pub store: StoreConfig,
    /// For people and tools.
    pub api: ApiConfig,
    /// For instances.
    pub agents: AgentsConfig,
    /// For monitoring.
    pub metrics: MetricsConfig,
    /// How long what was seen is kept.
    pub retention: RetentionConfig,
    /// Logs: `info`, `debug`, or as `RUST_LOG` has it.
    pub log: String,
    /// Log lines as JSON. Default: true.
    pub log_json: bool,
    /// Log-on by an identity provider, if there is one.
    pub oidc: Option<crate::auth::oidc::OidcConfig>,
}

/// What is known, and where.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// A PostgreSQL connection (`host=… user=… dbname=… sslmode=verify-full`), 15 or newer. Without it, SQLite in
    /// `state`.
    pub postgres: Option<String>,
    /// The file that seals secrets, 32 random bytes, mode 0600; made if it is not there. Servers of one store share
    /// it. Default: `seal.key` in `state`.
    pub seal_key: Option<PathBuf>,
}

/// For people and tools.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// Where to listen. Default: 127.0.0.1:7440. Off loopback it is TLS, always.
    pub listen: SocketAddr,
    /// The local socket; empty for none.
    pub socket: PathBuf,
    /// Certificate chain, PEM. Without it, one of the fleet's own authority.
    pub certificate: Option<PathBuf>,
    /// Its key, PEM.
    pub key: Option<PathBuf>,
    /// TLS on loopback too.
    pub tls: bool,
    /// Names and addresses by which people reach it, for the certificate and for links. The first one is shown.
    pub names: Vec<String>,
}

/// For instances.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentsConfig {
    /// Where to listen. Default: 127.0.0.1:7443; for a fleet, 0.0.0.0:7443.
    pub listen: SocketAddr,
    /// `host:port` by which instances reach it, as tokens carry it. Default: `listen`.
    pub public: Option<String>,
    /// Directory with the programs that a new machine may fetch. Default: where this program is.
    pub programs: Option<PathBuf>,
    /// Streams and requests at once.
    pub connections_max: usize,
}

/// For monitoring.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// Where `/metrics`, `/healthz` and `/readyz` are. Default: 127.0.0.1:7441. No secrets, and no TLS.
    pub listen: SocketAddr,
}

/// How long what was seen is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Findings at most. Default: 200,000.
    pub findings_max: u64,
    /// Findings go after this many days. Default: 180.
    pub findings_days: u32,
    /// Events at most. Default: 1,000,000.
    pub events_max: u64,
    /// Events go after this many days. Default: 7.
    pub events_days: u32,
}

const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), port)
}

impl Default for Config {
    fn default() -> Config {
        Config {
            state: STATE.into(),
            store: StoreConfig::default(),
            api: ApiConfig::default(),
            agents: AgentsConfig::default(),
            metrics: MetricsConfig::default(),
            retention: RetentionConfig::default(),
            log: "info".into(),
            log_json: true,
            oidc: None,
        }
    }
}

#[expect(clippy::derivable_impls, reason = "every default stands here, beside its meaning")]
impl Default for StoreConfig {
    fn default() -> StoreConfig {
        StoreConfig { postgres: None, seal_key: None }
    }
}

impl Default for ApiConfig {
    fn default() -> ApiConfig {
        ApiConfig {
            listen: loopback(7440),
            socket: SOCKET.into(),
            certificate: None,
            key: None,
            tls: false,
            names: Vec::new(),
        }
    }
}

impl Default for AgentsConfig {
    fn default() -> AgentsConfig {
        AgentsConfig { listen: loopback(7443), public: None, programs: None, connections_max: 100_000 }
    }
}

impl Default for MetricsConfig {
    fn default() -> MetricsConfig {
        MetricsConfig { listen: loopback(7441) }
    }
}

impl Default for RetentionConfig {
    fn default() -> RetentionConfig {
        RetentionConfig { findings_max: 200_000, findings_days: 180, events_max: 1_000_000, events_days: 7 }
    }
}

impl Config {
    /// From a file. A file that is not there is a default configuration, unless it was asked for by name.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong: which line, and what.
    pub fn load(path: &Path, by_name: bool) -> Result<Config, String> {
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(&text).map_err(|why| format!("{}: {why}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !by_name => Ok(Config::default()),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// From text.
    ///
    /// # Errors
    /// What is wrong, with its line.
    pub fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.api.certificate.is_some() != self.api.key.is_some() {
            return Err("api.certificate and api.key come together".into());
        }
        if self.agents.connections_max == 0 {
            return Err("agents.connections_max is at least 1".into());
        }
        if let Some(public) = &self.agents.public {
            let port = public.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if port.is_none() || public.contains(char::is_whitespace) {
                return Err(format!("agents.public is `host:port`, not `{public}`"));
            }
        } else if self.agents.listen.ip().is_unspecified() {
            return Err(format!(
                "agents.listen is every address ({}): say by which one instances reach it, with agents.public = \
                 \"host:{}\"",
                self.agents.listen,
                self.agents.listen.port()
            ));
        }
        Ok(())
    }

    /// `host:port` for instances.
    #[must_use]
    pub fn agents_public(&self) -> String {
        self.agents.public.clone().unwrap_or_else(|| self.agents.listen.to_string())
    }

    /// True if the API speaks TLS: always, off loopback.
    #[must_use]
    pub fn api_tls(&self) -> bool {
        self.api.tls || self.api.certificate.is_some() || !self.api.listen.ip().is_loopback()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default_and_stays_on_loopback() {
        let config = Config::parse("").unwrap();
        assert_eq!(config, Config::default());
        assert!(!config.api_tls() && config.api.listen.ip().is_loopback());
        assert_eq!(config.agents_public(), "127.0.0.1:7443");
    }

    #[test]
    fn off_loopback_is_tls_and_mistakes_are_named() {
        assert!(Config::parse("[api]\nlisten = \"0.0.0.0:7440\"").unwrap().api_tls());
        let told = |text| Config::parse(text).unwrap_err();
        assert!(told("[agents]\nlisten = \"0.0.0.0:7443\"").contains("agents.public"));
        assert!(told("[api]\nlissten = \"x\"").contains("lissten"));
        assert!(told("[api]\nkey = \"/x\"").contains("come together"));
    }
}
