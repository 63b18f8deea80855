//! The project's own chores: `cargo xtask help` lists them.

pub mod bench;
mod ci;
mod deb;
mod fleet;
mod fuzz;
mod openapi;
mod tidy;
pub mod traffic;
pub mod verdicts;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HELP: &str = "\
cargo xtask COMMAND

Every day:
  tidy                 layers, lints, links and other things that the compiler does not hold
  ci                   fmt, clippy, tidy, cargo-deny, all tests: what CI runs
  openapi              docs/openapi.json and the client from control/api; --check only compares
  deb                  the Debian package
  fuzz smoke           every fuzz target for a short while; see `fuzz help`

Proofs (see CONTRIBUTING.md; those with real packets need root and use namespaces of their own):
  verdicts             reference, tables and kernel agree on random packets; mutants are noticed
  traffic              replacing rules under traffic loses and leaks nothing
  bench packet-path    cost per packet and per update, as ratios
  bench fleet          10,000 machines on one server: memory, pushes, joins; beside gRPC
  fleet-check          servers killed and cables cut, again and again: nothing is lost, everybody arrives

  help                 this
";

type Chore = fn(&[String]) -> Result<(), String>;

/// Each command with what runs it.
const CHORES: &[(&str, Chore)] = &[
    ("tidy", tidy::run),
    ("ci", ci::run),
    ("openapi", openapi::run),
    ("deb", deb::run),
    ("fuzz", fuzz::run),
    ("bench", bench::run),
    ("fleet-check", fleet::check),
    ("verdicts", verdicts::run),
    ("traffic", traffic::run),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", &args[..]),
    };
    if matches!(command, "help" | "--help" | "-h") {
        say(HELP.trim_end());
        return ExitCode::SUCCESS;
    }
    let Some((_, chore)) = CHORES.iter().find(|(name, _)| *name == command) else {
        say(format!("there is no chore `{command}`\n\n{}", HELP.trim_end()));
        return ExitCode::from(2);
    };
    match chore(rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            say(format!("{command}: {why}"));
            ExitCode::FAILURE
        }
    }
}

/// To the person who runs the chore.
#[allow(clippy::print_stdout, reason = "a chore talks to whoever runs it")]
pub(crate) fn say(text: impl AsRef<str>) {
    println!("{}", text.as_ref());
}

/// The root of the workspace.
pub(crate) fn root() -> PathBuf {
    // xtask stands just below it.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}
