//! `keepwall-agent`: the one process that runs as root and changes the kernel.
//!
//! ```text
//! keepwall-agent run       listen on the local socket, enforce, repair
//! keepwall-agent restore   load the last confirmed state and end: at boot, before the network is up
//! keepwall-agent watchdog  revert an unconfirmed change if the agent does not (started by the agent itself)
//! ```
//!
//! It parses no posture and no YAML: it takes resolved intents over a local socket, from root, or on a machine that is
//! bound to a control plane from the one user that hands on what that decides (see `fleet`).

mod agent;
mod cut;
mod enforce;
mod fleet;
mod packet;
mod record;
mod serve;
mod stream;
mod watchdog;

use std::path::PathBuf;
use std::process::ExitCode;

use keepwall_core::Generation;

const HELP: &str = "\
keepwall-agent enforces security groups on this machine.

Usage:
  keepwall-agent run      [--state DIR] [--socket PATH]
  keepwall-agent restore  [--state DIR]
  keepwall-agent watchdog --generation N [--state DIR] [--socket PATH]

  run       Listen for `keepwall` on the local socket and enforce what root applies.
            With nothing applied it only observes.
  restore   Load the last confirmed state and end. For boot, before the network is up.
  watchdog  Wait until generation N is confirmed; if it is not in time, have it
            reverted, and revert it here if the agent is dead. Started by the agent.

Options:
  --state DIR    Where the confirmed state is kept  [default: /var/lib/keepwall/agent]
  --socket PATH  Where to listen                    [default: /run/keepwall/agent.sock]
  --version      Print the version
  --help         Print this

Exit codes: 0 done, 1 failed, 2 wrong usage.
";

/// What was asked for on the command line.
struct Arguments {
    command: String,
    state: PathBuf,
    socket: PathBuf,
    generation: Option<Generation>,
}

fn arguments() -> Result<Arguments, String> {
    let mut out = Arguments {
        command: String::new(),
        state: keepwall_link::STATE.into(),
        socket: keepwall_link::SOCKET.into(),
        generation: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--state" => out.state = value()?.into(),
            "--socket" => out.socket = value()?.into(),
            "--generation" => {
                let number = value()?.parse().map_err(|_| "--generation takes a number".to_owned())?;
                out.generation = Some(Generation(number));
            }
            "--help" | "-h" | "help" => out.command = "help".into(),
            "--version" | "-V" => out.command = "version".into(),
            command if !command.starts_with('-') && out.command.is_empty() => out.command = command.to_owned(),
            other => return Err(format!("`{other}` is not understood")),
        }
    }
    Ok(out)
}

/// One line to the log, which under systemd is the journal.
#[allow(clippy::print_stderr, reason = "the log of a daemon is its standard error")]
pub(crate) fn log(text: impl AsRef<str>) {
    eprintln!("keepwall-agent: {}", text.as_ref());
}

#[allow(clippy::print_stdout, reason = "help and version are data")]
fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            log(format!("{error}; see keepwall-agent --help"));
            return ExitCode::from(2);
        }
    };
    let done = match arguments.command.as_str() {
        "run" => serve::run(&arguments.state, &arguments.socket),
        "restore" => agent::restore(&arguments.state),
        "watchdog" => match arguments.generation {
            Some(generation) => watchdog::run(&arguments.state, &arguments.socket, generation),
            None => Err("watchdog needs --generation".to_owned()),
        },
        "version" => {
            println!("keepwall-agent {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        "help" | "" => {
            print!("{HELP}");
            Ok(())
        }
        other => {
            log(format!("there is no command `{other}`; see keepwall-agent --help"));
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(error);
            ExitCode::FAILURE
        }
    }
}
