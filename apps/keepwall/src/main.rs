//! `keepwall`: the command line. It reads postures and shows; what changes the kernel is `keepwall-agent`'s, and what a
//! fleet is told is `keepwalld`'s. The same words are about this machine, or about the fleet of a server.

#![allow(unreachable_pub, missing_docs, reason = "a program: nothing of it is used from outside")]

mod agent;
mod cli;
mod contexts;
mod daemons;
mod enroll;
mod explain;
mod exposure;
mod failure;
mod fleet;
mod lab;
mod own;
mod plan;
mod posture;
mod sg;
mod time;
mod ui;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use agent::Agent;
use cli::{Cli, Command, Global};
use failure::Failure;
use fleet::Server;

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
        Command::Context(command) => contexts::run(context, &command),
        Command::Enroll(args) => enroll::enroll(context, &args),
        Command::Leave(args) => enroll::leave(context, &args),
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
        // The lab's own programs are machines of their own.
        Command::Lab(command) if lab::is_internal(&command) => lab::run(context, &command),
        command => aimed(context, command),
    }
}

/// Commands whose meaning depends on whether a server is chosen.
fn aimed(context: &Context, command: Command) -> Result<u8, Failure> {
    let chosen = contexts::choose(&context.global)?;
    let aim = match (command.only_here(), command.only_there(), chosen) {
        (Some(word), _, Some(aim)) => return Err(only_here(word, &aim)),
        (_, None, chosen) => chosen,
        (_, Some(word), chosen) => {
            Some(chosen.or_else(|| contexts::own(&context.global.socket)).ok_or_else(|| no_server(word))?)
        }
    };
    match (aim, command) {
        (None, command) => here(context, command),
        (Some(aim), Command::Login(args)) => fleet::session::login(context, aim, &args),
        (Some(aim), Command::Logout) => fleet::session::logout(context, aim),
        (Some(aim), command) => there(context, &Server::open(aim)?, command),
    }
}

fn only_here(word: &str, aim: &contexts::Aim) -> Failure {
    let help = match word {
        "confirm" => {
            "machines of a fleet confirm by themselves, by keeping contact: keepwall rollout follow".to_owned()
        }
        _ => format!("on the machine that is meant: keepwall --context none {word}"),
    };
    Failure::new(format!("`{word}` is about one machine, and {} is chosen ({})", aim.label, aim.why), help)
}

fn no_server(word: &str) -> Failure {
    Failure::new(
        format!("`{word}` needs a server, and none is chosen"),
        "keepwall context add NAME --server https://HOST:7440; or --server URL; or `keepwall up` for one on this machine",
    )
}

/// This machine.
fn here(context: &Context, command: Command) -> Result<u8, Failure> {
    match command {
        Command::Up(up) => exposure::up(context, &up),
        Command::Down(down) => exposure::down(context, &down),
        Command::Exposure => exposure::show(context),
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
        Command::Sg(args) => sg::run(context, args.command),
        Command::Lab(command) => lab::run(context, &command),
        other => Err(no_server(other.only_there().unwrap_or("this"))),
    }
}

/// A fleet.
fn there(context: &Context, server: &Server, command: Command) -> Result<u8, Failure> {
    match command {
        Command::Check => fleet::posture::check(context, server),
        Command::Test => fleet::posture::test(context, server),
        Command::Health => fleet::posture::health(context, server),
        Command::Plan(plan) => fleet::posture::plan(context, server, &plan),
        Command::Apply(apply) => fleet::posture::apply(context, server, &apply),
        Command::Revert => fleet::rollouts::revert(context, server),
        Command::Status => fleet::instances::status(context, server),
        Command::Explain(question) => fleet::observed::explain(context, server, &question),
        Command::Reach(reach) => fleet::observed::reach(context, server, &reach),
        Command::Sg(args) => fleet::sg::run(context, server, args.command, args.yes),
        Command::Whoami => fleet::session::whoami(context, server),
        Command::Posture(command) => fleet::posture::run(context, server, &command),
        Command::Rollout(command) => fleet::rollouts::run(context, server, &command),
        Command::Instance(command) => fleet::instances::run(context, server, &command),
        Command::Token(command) => fleet::instances::token(context, server, &command),
        Command::Finding(command) => fleet::observed::finding(context, server, &command),
        Command::Event(command) => fleet::observed::event(context, server, &command),
        Command::User(command) => fleet::access::user(context, server, &command),
        Command::ServiceAccount(command) => fleet::access::service_account(context, server, &command),
        Command::Key(command) => fleet::access::key(context, server, &command),
        Command::Audit(command) => fleet::observed::audit(context, server, &command),
        other => Err(only_here(other.only_here().unwrap_or("this"), &server.aim)),
    }
}
