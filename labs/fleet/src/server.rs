//! A server of one's own, in a directory that goes with it.

use std::path::{Path, PathBuf};

use keepwall_server::config::Config;

/// A directory that goes when it is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new one.
    ///
    /// # Errors
    /// The disk.
    pub fn new(name: &str) -> std::io::Result<Scratch> {
        let path =
            std::env::temp_dir().join(format!("keepwall-{name}-{}-{}", std::process::id(), crate::machine::now_us()));
        std::fs::create_dir_all(&path)?;
        Ok(Scratch(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A configuration on loopback and free ports, with all state below `directory`.
///
/// # Panics
/// Never: constants.
#[must_use]
pub fn config(directory: &Path) -> Config {
    let mut config =
        Config { state: directory.join("state"), log: "warn".into(), log_json: false, ..Config::default() };
    let free = "127.0.0.1:0".parse().expect("an address");
    config.api.listen = free;
    config.api.socket = directory.join("server.sock");
    config.agents.listen = free;
    config.metrics.listen = free;
    config
}
