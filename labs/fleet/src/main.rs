//! `keepwall-fleet-lab bench`, and the processes that it starts.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["bench", rest @ ..] => keepwall_fleet_lab::bench::run(rest),
        ["swarm"] => keepwall_fleet_lab::bench::swarm(),
        _ => Err("usage: keepwall-fleet-lab bench [--agents N] [--server PATH] [--baseline PATH]".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("keepwall-fleet-lab: {why}");
            ExitCode::FAILURE
        }
    }
}
