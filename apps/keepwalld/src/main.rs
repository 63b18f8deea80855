//! `keepwalld`: the control plane. It needs no privilege, and says so to whoever starts it as root.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use keepwall_server::config::{self, Config};
use keepwall_server::run::{Running, database, seal, state_directory};

/// How often free memory is given back.
const TRIM_EVERY: Duration = Duration::from_secs(20);

const HELP: &str = "\
keepwalld is Keepwall's control plane: API, store, controller.

Usage:
  keepwalld run       [--config FILE]
  keepwalld check     [--config FILE]
  keepwalld authority [--config FILE]
  keepwalld backup    [--config FILE] TO
  keepwalld restore   [--config FILE] FROM
  keepwalld verify    [--config FILE]

  run        Serve until told to stop (SIGTERM).
  check      Read the configuration and say what is wrong with it.
  authority  Print the SHA-256 of the fleet's own authority, which people elsewhere
             give as `keepwall context add … --ca-sha256`; a running server may go on.
  backup     Copy the SQLite store to the new file TO; a running server may go on.
             For PostgreSQL use its own tools (pg_dump, pg_basebackup).
  restore    Put the SQLite store of FROM in place; the present one is kept beside it.
             The server must not run.
  verify     Read the audit log from its first line and check the chain.

Options:
  --config FILE  [default: /etc/keepwall/server.toml; without that file, defaults]
  --version      Print the version
  --help         Print this

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the audit log was tampered with.
";

/// What was asked for.
struct Arguments {
    command: String,
    config: Option<PathBuf>,
    path: Option<PathBuf>,
}

fn arguments() -> Result<Arguments, String> {
    let mut out = Arguments { command: String::new(), config: None, path: None };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--config" => out.config = Some(args.next().ok_or("--config needs a file")?.into()),
            "--help" | "-h" | "help" => out.command = "help".into(),
            "--version" | "-V" => out.command = "version".into(),
            word if word.starts_with('-') => return Err(format!("`{word}` is not understood")),
            word if out.command.is_empty() => out.command = word.to_owned(),
            path if out.path.is_none() => out.path = Some(path.into()),
            other => return Err(format!("`{other}` is one word too many")),
        }
    }
    Ok(out)
}

#[allow(clippy::print_stdout, reason = "what was asked for")]
fn say(text: &str) {
    println!("{text}");
}

#[allow(clippy::print_stderr, reason = "before and beside the log")]
fn complain(text: &str) {
    eprintln!("keepwalld: {text}");
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(why) => {
            complain(&format!("{why}; see keepwalld --help"));
            return ExitCode::from(2);
        }
    };
    match arguments.command.as_str() {
        "help" | "" => {
            say(HELP.trim_end());
            return ExitCode::SUCCESS;
        }
        "version" => {
            say(concat!("keepwalld ", env!("CARGO_PKG_VERSION")));
            return ExitCode::SUCCESS;
        }
        "run" | "check" | "authority" | "backup" | "restore" | "verify" => {}
        other => {
            complain(&format!("there is no command `{other}`; see keepwalld --help"));
            return ExitCode::from(2);
        }
    }
    let path = arguments.config.clone().unwrap_or_else(|| config::PATH.into());
    let done = Config::load(&path, arguments.config.is_some()).and_then(|config| perform(&arguments, &config));
    match done {
        Ok(code) => code,
        Err(why) => {
            complain(&why);
            ExitCode::FAILURE
        }
    }
}

fn perform(arguments: &Arguments, config: &Config) -> Result<ExitCode, String> {
    let path = || arguments.path.as_deref().ok_or("which file? see keepwalld --help");
    match arguments.command.as_str() {
        "check" => say("the configuration is in order"),
        "run" => runtime()?.block_on(run(config))?,
        "backup" => backup(config, path()?)?,
        "restore" => restore(config, path()?)?,
        "authority" => say(&runtime()?.block_on(authority(config))?),
        _ => return runtime()?.block_on(verify(config)),
    }
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    keepwall_host::memory::one_arena();
    tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|error| error.to_string())
}

async fn run(config: &Config) -> Result<(), String> {
    keepwall_server::run::log(config);
    use std::os::unix::fs::MetadataExt as _;
    if std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
        tracing::warn!("running as root, which the control plane does not need: give it a user of its own");
    }
    // Storms leave holes; what is free goes back to the machine.
    std::thread::Builder::new()
        .name("memory".into())
        .stack_size(64 * 1024)
        .spawn(|| {
            loop {
                std::thread::sleep(TRIM_EVERY);
                keepwall_host::memory::trim();
            }
        })
        .map_err(|error| error.to_string())?;
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    let running = Running::start(config).await?;
    keepwall_server::run::notify_ready();
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending");
    running.stop().await;
    Ok(())
}

fn backup(config: &Config, to: &Path) -> Result<(), String> {
    if config.store.postgres.is_some() {
        return Err("this store is PostgreSQL: use pg_dump or pg_basebackup, and keep the seal key with it".into());
    }
    keepwall_store::sqlite::copy(&database(config), to).map_err(|error| error.to_string())?;
    say(&format!("copied to {}; without the seal key nobody can use it, so keep a copy of that too", to.display()));
    Ok(())
}

fn restore(config: &Config, from: &Path) -> Result<(), String> {
    if config.store.postgres.is_some() {
        return Err("this store is PostgreSQL: restore it with its own tools, then run `keepwalld run`".into());
    }
    state_directory(&config.state)?;
    let restored = keepwall_store::sqlite::restore(from, &database(config)).map_err(|error| error.to_string())?;
    if let Some(aside) = restored.aside {
        say(&format!("what was there is kept as {}", aside.display()));
    }
    say(&format!("restored; the next change has a generation above {}, newer than all before", restored.generation));
    Ok(())
}

/// What a person elsewhere trusts this server by. Where the server never ran there is no authority, and none is made.
async fn authority(config: &Config) -> Result<String, String> {
    let key = config.store.seal_key.clone().unwrap_or_else(|| config.state.join("seal.key"));
    if !key.try_exists().map_err(|error| format!("{}: {error}", key.display()))? {
        return Err(format!("{} is not there: start the server once, it makes its authority then", key.display()));
    }
    let seal = seal(config)?;
    // A store in a file is its server's alone while that runs; of a copy one may ask.
    let aside = Config { state: config.state.join(format!("authority.{}", std::process::id())), ..config.clone() };
    let in_a_file = config.store.postgres.is_none();
    if in_a_file {
        state_directory(&aside.state)?;
    }
    let load = async {
        if in_a_file {
            keepwall_store::sqlite::copy(&database(config), &database(&aside)).map_err(|error| error.to_string())?;
        }
        let store = keepwall_server::run::open_store(&aside, &seal).await?;
        keepwall_server::ca::Authority::load(&store, &seal).await
    };
    let loaded = load.await;
    if in_a_file {
        let _ = std::fs::remove_dir_all(&aside.state);
    }
    Ok(keepwall_core::hex(&loaded?.digest()))
}

async fn verify(config: &Config) -> Result<ExitCode, String> {
    let seal = seal(config)?;
    let store = keepwall_server::run::open_store(config, &seal).await?;
    match keepwall_server::run::verify_audit(&store, &seal).await.map_err(|error| error.to_string())? {
        Ok(verified) => {
            say(&format!(
                "{} lines, all as they were written; the last one's seal is {}",
                verified.lines, verified.mac
            ));
            Ok(ExitCode::SUCCESS)
        }
        Err(broken) => {
            complain(&format!("the audit log was tampered with at line {}: {}", broken.number, broken.why));
            Ok(ExitCode::from(3))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_authority_of_a_running_server_is_told_and_none_is_made() {
        let state = std::env::temp_dir().join(format!("keepwalld-authority-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&state);
        let any = "listen = \"127.0.0.1:0\"";
        let text = format!("state = {state:?}\n[api]\n{any}\nsocket = \"\"\n[agents]\n{any}\n[metrics]\n{any}\n");
        let config = Config::parse(&text).unwrap();
        let runtime = runtime().unwrap();
        let why = runtime.block_on(authority(&config)).unwrap_err();
        assert!(why.contains("start the server once") && !state.exists(), "{why}");
        let running = runtime.block_on(Running::start(&config)).unwrap();
        let told = runtime.block_on(authority(&config)).unwrap();
        assert_eq!(told, keepwall_core::hex(&running.fleet.authority().digest()));
        let left = std::fs::read_dir(&state).unwrap().flatten().any(|entry| entry.path().is_dir());
        assert!(!left, "the copy is gone");
        runtime.block_on(running.stop());
        std::fs::remove_dir_all(state).unwrap();
    }
}
