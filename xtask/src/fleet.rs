//! Fleets on one machine: `cargo xtask bench fleet` measures one, `cargo xtask fleet-check` kills servers and cuts
//! cables for longer than tests do.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::{root, say};

const BENCH: &str = "\
cargo xtask bench fleet [--agents N]

  --agents  machines that call one server (10000)";
const CHECK: &str = "\
cargo xtask fleet-check [--rounds N] [--seconds N] [--runs N]

  --rounds   how often servers are killed, on SQLite and again on PostgreSQL (100)
  --seconds  how long a cable is cut (60); needs root
  --runs     simulated fleets (10000)";

/// Where cargo builds.
fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |target| root().join(target))
}

fn run(command: &mut Command, what: &str) -> Result<(), String> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(format!("{what} failed; see above")),
        Err(error) => Err(format!("cannot start {what}: {error}")),
    }
}

fn cargo(directory: &Path) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(directory);
    cargo
}

/// `cargo xtask bench fleet`: server, swarms and the gRPC stand-in, built alike.
pub(crate) fn bench(args: &[String]) -> Result<(), String> {
    if !matches!(args, [] | [_, _]) || args.first().is_some_and(|name| name != "--agents") {
        return Err(BENCH.to_owned());
    }
    let target = target();
    let ours = ["build", "--locked", "--profile", "lab", "-p", "keepwalld", "-p", "keepwall-fleet-lab"];
    run(cargo(&root()).args(ours), "building the server and the swarms")?;
    let grpc = target.join("grpc");
    let theirs = ["build", "--locked", "--release", "--target-dir"];
    run(cargo(&root().join("labs/grpc")).args(theirs).arg(&grpc), "building the gRPC stand-in")?;
    let mut bench = Command::new(target.join("lab/keepwall-fleet-lab"));
    bench.arg("bench").args(args).arg("--server").arg(target.join("lab/keepwalld"));
    bench.arg("--baseline").arg(grpc.join("release/keepwall-grpc-stand-in"));
    run(&mut bench, "the bench")
}

/// `cargo xtask fleet-check`
pub(crate) fn check(args: &[String]) -> Result<(), String> {
    let (mut rounds, mut seconds, mut runs) = (100, 60, 10_000);
    for pair in args.chunks(2) {
        let [name, value] = pair else { return Err(CHECK.to_owned()) };
        let number: u64 = value.parse().map_err(|_| CHECK.to_owned())?;
        match name.as_str() {
            "--rounds" => rounds = number,
            "--seconds" => seconds = number,
            "--runs" => runs = number,
            _ => return Err(CHECK.to_owned()),
        }
    }
    let checks = [
        ("servers killed while somebody writes", "keepwall-fleet-lab", "kill", "KEEPWALL_KILL_ROUNDS", rounds),
        ("a cable cut while both sides change", "keepwall-fleet-lab", "cut", "KEEPWALL_CUT_SECONDS", seconds),
        ("simulated fleets", "keepwall-fleet", "simulation", "KEEPWALL_SIMULATION_RUNS", runs),
    ];
    let mut summary = Vec::new();
    let mut failed = 0;
    for (what, package, test, name, number) in checks {
        say(format!("== {what}: {number}"));
        let begun = Instant::now();
        let arguments = ["test", "--locked", "--quiet", "-p", package, "--test", test, "--", "--nocapture"];
        let done = run(cargo(&root()).args(arguments).arg("--test-threads=1").env(name, number.to_string()), what);
        failed += usize::from(done.is_err());
        let mark = if done.is_ok() { "✓" } else { "✗" };
        summary.push(format!("  {mark} {what:<42}{name}={number:<8}{:>6} s", begun.elapsed().as_secs()));
    }
    say("\nsummary");
    summary.iter().for_each(say);
    if failed == 0 { Ok(()) } else { Err(format!("{failed} of {} checks failed", checks.len())) }
}
