//! `keepwall`: the command line. It reads postures and shows; what changes the kernel is `keepwall-agent`'s.

#![allow(unreachable_pub, missing_docs, reason = "a program: nothing of it is used from outside")]

mod agent;
mod cli;
mod daemons;
mod enroll;
mod explain;
mod exposure;
mod failure;
mod lab;
mod plan;
mod posture;
mod sg;
mod ui;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use agent::Agent;
use cli::{Cli, Command, Global};
use failure::Failure;

/// What every command has at hand.
pub struct Context {
    pub global: Global,
    pub agent: Agent,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    ui::start(cli.global.no_color);
    let context = Context { agent: Agent::at(&cli.global.socket), global: cli.global };
    match run(&context, cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            ui::say(format!("{} {}", ui::red("error:"), failure.message));
            if !failure.help.is_empty() {
                ui::say(format!("  {} {}", ui::bold("try:"), failure.help));
            }
            ExitCode::from(failure.code)
        }
    }
}

fn run(context: &Context, command: Command) -> Result<u8, Failure> {
    match command {
        Command::Up(up) => exposure::up(context, &up),
        Command::Down(down) => exposure::down(context, &down),
        Command::Exposure => exposure::show(context),
        Command::Enroll(args) => enroll::enroll(context, &args),
        Command::Leave(args) => enroll::leave(context, &args),
        Command::Suggest(suggest) => exposure::suggest(context, &suggest),
        Command::Check => explain::check(context),
        Command::Test => explain::test(context),
        Command::Health => explain::health(context),
        Command::Explain(question) => explain::explain(context, &question),
        Command::Reach(reach) => explain::reach(context, &reach),
        Command::Plan(plan) => plan::plan(context, &plan),
        Command::Apply(apply) => plan::apply(context, &apply),
        Command::Confirm(confirm) => plan::confirm(context, &confirm),
        Command::Revert => plan::revert(context),
        Command::Remove(yes) => plan::remove(context, yes.yes),
        Command::Status => watch::status(context),
        Command::Verify => watch::verify(context),
        Command::Debug => watch::debug(context),
        Command::Counters => watch::counters(context),
        Command::Flows(flows) => watch::flows(context, &flows),
        Command::Trace(trace) => watch::trace(context, &trace),
        Command::Sg(command) => sg::run(context, command),
        Command::Lab(command) => lab::run(context, &command),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "keepwall", &mut std::io::stdout());
            Ok(0)
        }
        Command::Man { directory } => {
            std::fs::create_dir_all(&directory)?;
            clap_mangen::generate_to(Cli::command(), &directory)?;
            ui::say(format!("man pages are in {}", directory.display()));
            Ok(0)
        }
    }
}
