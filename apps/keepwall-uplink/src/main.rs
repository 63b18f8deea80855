//! `keepwall-uplink`: speaks with the control plane for this machine's agent. No privilege: it refuses to run as root.
//!
//! ```text
//!  control plane ◀══ one TLS connection ══▶ keepwall-uplink ◀── local socket ──▶ keepwall-agent (root)
//! ```
//!
//! It holds the machine's key and hands on what it is told. What that is worth, the agent decides.

mod agent;
mod facts;
mod flows;
mod rows;

use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;

use keepwall_uplink::token::Token;
use keepwall_uplink::{Identity, Pace, Uplink, enroll, identity};

use agent::Agent;

const HELP: &str = "\
keepwall-uplink speaks with a Keepwall control plane for this machine's agent.

Usage:
  keepwall-uplink run          [--state DIR] [--socket PATH] [--flows N]
  keepwall-uplink enroll TOKEN [--state DIR] [--proxy URL] [--hostname NAME]

  run     Keep one connection to the server, hand on what it decides, report.
  enroll  Make a key, show the token, keep the certificate; prints JSON. `keepwall
          enroll` does this and all the rest. With `-` the token is read from
          standard input.

Options:
  --state DIR      Where key and certificate are kept [default: /var/lib/keepwall/uplink]
  --socket PATH    The agent's local socket           [default: /run/keepwall/agent.sock]
  --flows N        Report up to N flow records per second, 0-1000 [default: 0, none]
  --proxy URL      An HTTP proxy on the way to the server, http://HOST:PORT
                   [default: https_proxy and no_proxy of the environment]
  --hostname NAME  How this machine calls itself      [default: its host name]
  --allow-root     Run as root all the same, for tests
  --version        Print the version
  --help           Print this

Environment:
  KEEPWALL_LOG     What to log: error, warn, info, debug, trace [default: info]

Exit codes: 0 done, 1 failed, 2 wrong usage.
";

/// Flow records per second at most.
const FLOWS_MAX: u32 = 1_000;
/// A token has less.
const TOKEN_BYTES_MAX: u64 = 4_096;

/// What was asked for.
struct Arguments {
    command: String,
    token: Option<String>,
    state: PathBuf,
    socket: PathBuf,
    flows: u32,
    proxy: Option<String>,
    hostname: Option<String>,
    allow_root: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut out = Arguments {
        command: String::new(),
        token: None,
        state: identity::STATE.into(),
        socket: keepwall_link::SOCKET.into(),
        flows: 0,
        proxy: None,
        hostname: None,
        allow_root: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--state" => out.state = value()?.into(),
            "--socket" => out.socket = value()?.into(),
            "--flows" => {
                let number = value()?.parse().ok().filter(|number| *number <= FLOWS_MAX);
                out.flows = number.ok_or_else(|| format!("--flows takes a number from 0 to {FLOWS_MAX}"))?;
            }
            "--proxy" => out.proxy = Some(value()?),
            "--hostname" => out.hostname = Some(value()?),
            "--allow-root" => out.allow_root = true,
            "--help" | "-h" | "help" => out.command = "help".into(),
            "--version" | "-V" => out.command = "version".into(),
            word if word.starts_with('-') && word != "-" => return Err(format!("`{word}` is not understood")),
            word if out.command.is_empty() => out.command = word.to_owned(),
            token if out.command == "enroll" && out.token.is_none() => out.token = Some(token.to_owned()),
            other => return Err(format!("`{}` is one word too many", other.escape_debug())),
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
    eprintln!("keepwall-uplink: {text}");
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(why) => {
            complain(&format!("{why}; see keepwall-uplink --help"));
            return ExitCode::from(2);
        }
    };
    match arguments.command.as_str() {
        "help" | "" => {
            say(HELP.trim_end());
            return ExitCode::SUCCESS;
        }
        "version" => {
            say(concat!("keepwall-uplink ", env!("CARGO_PKG_VERSION")));
            return ExitCode::SUCCESS;
        }
        "run" | "enroll" => {}
        other => {
            complain(&format!("there is no command `{other}`; see keepwall-uplink --help"));
            return ExitCode::from(2);
        }
    }
    if keepwall_host::process::user().uid == 0 && !arguments.allow_root {
        complain("this needs no privilege and runs as no root; `keepwall enroll` starts it as another user");
        return ExitCode::FAILURE;
    }
    // One thread for what is awaited, and a few for the agent's socket and for names.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build();
    let runtime = runtime.map_err(|error| error.to_string());
    let done = runtime.and_then(|runtime| match arguments.command.as_str() {
        "run" => runtime.block_on(run(&arguments)),
        _ => runtime.block_on(enroll(&arguments)),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            complain(&why);
            ExitCode::FAILURE
        }
    }
}

fn log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("KEEPWALL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .with_env_filter(filter)
        .init();
}

async fn run(arguments: &Arguments) -> Result<(), String> {
    use tokio::signal::unix::{SignalKind, signal};
    log();
    // Started by a handle instead of a path, it would be called by that handle's number.
    let _ = std::fs::write("/proc/self/comm", "keepwall-uplink");
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    let identity = Identity::load(&arguments.state)?;
    let agent = Agent::new(&arguments.socket, &arguments.state);
    if arguments.flows > 0 {
        let (socket, agent, per_s) = (arguments.socket.clone(), agent.clone(), arguments.flows);
        let started =
            std::thread::Builder::new().name("flows".into()).spawn(move || flows::follow(&socket, &agent, per_s));
        started.map_err(|error| format!("cannot start a thread: {error}"))?;
    }
    tracing::info!(instance = identity.instance, server = identity.server, "starting");
    let uplink = Uplink::new(agent, identity, Some(arguments.state.clone()), Pace::default())?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut running = tokio::spawn(uplink.run(stopped));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = &mut running => return ended.map(|_| ()).map_err(|error| format!("it broke off: {error}")),
    }
    tracing::info!("ending");
    let _ = stop.send(true);
    running.await.map(|_| ()).map_err(|error| format!("it broke off: {error}"))
}

async fn enroll(arguments: &Arguments) -> Result<(), String> {
    let token = arguments.token.as_deref().ok_or("which token? see keepwall-uplink --help")?;
    let mut read = String::new();
    if token == "-" {
        std::io::stdin()
            .take(TOKEN_BYTES_MAX)
            .read_to_string(&mut read)
            .map_err(|error| format!("the token: {error}"))?;
    }
    let token: Token = if token == "-" { read.parse() } else { token.parse() }?;
    if let Ok(identity) = Identity::load(&arguments.state) {
        return Err(format!(
            "this machine has enrolled already, at {} as {}; to enrol it anew: keepwall leave",
            identity.server, identity.instance
        ));
    }
    let facts = facts::look(arguments.hostname.clone())?;
    let proxy = arguments.proxy.clone().or_else(|| facts::proxy(&token.server, |name| std::env::var(name).ok()));
    let enrolled = enroll::enroll(&token, &facts, &identity::Request::new()?, proxy, None).await?;
    enrolled.identity.save(&arguments.state)?;
    let result = serde_json::json!({
        "instance": enrolled.identity.instance,
        "server": enrolled.identity.server,
        "proxy": enrolled.identity.proxy,
        "left_out": enrolled.left_out,
    });
    say(&result.to_string());
    Ok(())
}
