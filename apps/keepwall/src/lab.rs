//! `keepwall lab`: the command line of the lab.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;

use keepwall_lab::prove::{self, Proof};
use keepwall_lab::{Line, Programs, coexist, drill, fleet, machine, serve};

use crate::Context;
use crate::cli::{self, LabCommand};
use crate::daemons::{self, program};
use crate::failure::Failure;
use crate::{own, ui};

/// The lab's example, in the program too, so that the lab works wherever it is started.
const EXAMPLE: &str = include_str!("../../../examples/web-and-db.yaml");

fn failed(error: String) -> Failure {
    Failure::plain(error)
}

fn programs() -> Result<Programs, Failure> {
    Ok(Programs { keepwall: std::env::current_exe()?, agent: program("keepwall-agent") })
}

/// The posture that the lab enforces: named, the repository's, or a copy of the built-in one.
fn example(args: &cli::Lab) -> Result<PathBuf, Failure> {
    if let Some(path) = &args.example {
        return std::fs::canonicalize(path).map_err(|e| Failure::plain(format!("{}: {e}", path.display())));
    }
    let here = PathBuf::from("examples/web-and-db.yaml");
    if std::fs::read_to_string(&here).is_ok_and(|text| text == EXAMPLE) {
        return Ok(here);
    }
    std::fs::write(machine::EXAMPLE, EXAMPLE).map_err(|error| {
        Failure::new(format!("cannot write {}: {error}", machine::EXAMPLE), "the lab needs root (sudo keepwall lab)")
    })?;
    Ok(machine::EXAMPLE.into())
}

/// Clears the lab away when a command ends, however it ends; `None` leaves it running.
struct Guard(bool);

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0
            && let Err(error) = machine::clear_all()
        {
            ui::say(format!("the lab could not be cleared away: {error}; `keepwall lab down` tries again"));
        }
    }
}

/// True for what the lab starts in its machines: they have no server to choose.
pub fn is_internal(args: &cli::Lab) -> bool {
    matches!(args.command, Some(LabCommand::Serve | LabCommand::Server))
}

pub fn run(context: &Context, args: &cli::Lab) -> Result<u8, Failure> {
    if let Some(LabCommand::Serve) = &args.command {
        serve::run().map_err(failed)?;
        return Ok(0);
    }
    if let Some(LabCommand::Server) = &args.command {
        return server();
    }
    if let Some(LabCommand::Exec { machine, command }) = &args.command {
        let code = prove::exec(machine, command).map_err(failed)?;
        return Ok(u8::try_from(code).unwrap_or(1));
    }
    let _lock = machine::lock().map_err(failed)?;
    match &args.command {
        Some(LabCommand::Down) => {
            machine::clear_all().map_err(failed)?;
            ui::out(format!("{} The lab is gone.", ui::green("✓")));
            Ok(0)
        }
        Some(LabCommand::Prove) => {
            let posture = example(args)?;
            let checked = prove::read(&posture).map_err(failed)?;
            let proofs = prove::prove(&checked, None).map_err(failed)?;
            Ok(show(context, &proofs, false))
        }
        Some(LabCommand::Up) => {
            let (_, proofs, posture) = enforced(context, args, false)?;
            let code = show(context, &proofs, true);
            ui::say("");
            ui::say(format!("The lab is up and enforces {}. Play with it:", posture.display()));
            ui::say("  keepwall lab exec attacker -- bash          a shell on the attacker's machine");
            ui::say(format!(
                "  keepwall --socket {} status   ask the web server's agent",
                machine::socket("web").display()
            ));
            ui::say(format!("  keepwall lab exec web -- keepwall --socket {} flows", machine::socket("web").display()));
            ui::say("  keepwall lab down                           and it is gone");
            Ok(code)
        }
        None => {
            let (_guard, proofs, _) = enforced(context, args, true)?;
            Ok(show(context, &proofs, true))
        }
        Some(LabCommand::Drill) => {
            let (_guard, _, posture) = enforced(context, args, true)?;
            let mut print = printer(context);
            let lines = drill::drill(&programs()?, &posture, |line| print(line)).map_err(failed)?;
            Ok(finish(context, &lines))
        }
        Some(LabCommand::Coexist) => {
            let (_guard, _, posture) = enforced(context, args, true)?;
            let mut print = printer(context);
            let lines = coexist::coexist(&programs()?, &posture, |line| print(line)).map_err(failed)?;
            Ok(finish(context, &lines))
        }
        Some(LabCommand::Fleet) => {
            let _guard = Guard(true);
            let mut print = printer(context);
            let lines = fleet::fleet(&programs()?, sayer(context), |line| print(line)).map_err(failed)?;
            Ok(finish(context, &lines))
        }
        Some(LabCommand::Serve | LabCommand::Server | LabCommand::Exec { .. }) => Ok(0),
    }
}

/// Becomes the server of the fleet drill, without privilege, in the namespace that this was started in.
fn server() -> Result<u8, Failure> {
    let user = own::user();
    daemons::give(&machine::directory("server").join("state"), user)?;
    let mut server = daemons::unprivileged(own::PROGRAM, user);
    let error = server.command.arg("run").arg("--config").arg(fleet::config()).exec();
    Err(daemons::not_started(own::PROGRAM, &error))
}

/// What is under way, unless data is asked for.
fn sayer(context: &Context) -> impl Fn(&str) + use<> {
    let json = context.global.json;
    move |text| {
        if !json {
            ui::say(ui::dim(text));
        }
    }
}

/// Makes the lab, tries every packet with nothing enforced, enforces the example, tries them again.
fn enforced(context: &Context, args: &cli::Lab, clear: bool) -> Result<(Guard, Vec<Proof>, PathBuf), Failure> {
    let posture = example(args)?;
    let programs = programs()?;
    let say = sayer(context);
    let mut guard = Guard(true);
    let checked = prove::up(&programs, &posture, &say).map_err(failed)?;
    say("trying every packet with nothing enforced …");
    let before = prove::prove(&checked, None).map_err(failed)?;
    say("applying the posture on web and db …");
    prove::enforce(&programs, &checked, &posture).map_err(failed)?;
    say("trying every packet again …");
    let proofs = prove::prove(&checked, Some(&before)).map_err(failed)?;
    guard.0 = clear;
    Ok((guard, proofs, posture))
}

fn show(context: &Context, proofs: &[Proof], with_before: bool) -> u8 {
    let holds = |p: &Proof| if with_before { p.holds() } else { p.after == p.allow };
    let bad = proofs.iter().filter(|p| !holds(p)).count();
    let code = if bad == 0 && !proofs.is_empty() { 0 } else { 3 };
    if context.global.json {
        let rows: Vec<_> = (proofs.iter())
            .map(|p| {
                serde_json::json!({
                    "test": p.test, "packet": p.packet, "expected": if p.allow { "arrives" } else { "dropped" },
                    "before": p.before, "after": p.after, "holds": holds(p),
                })
            })
            .collect();
        ui::json(&rows);
        return code;
    }
    let arrival = |arrived: bool| if arrived { "arrived" } else { "dropped" };
    let mut last = String::new();
    let rows: Vec<Vec<String>> = (proofs.iter())
        .map(|p| {
            let test = if p.test == last { String::new() } else { p.test.clone() };
            last.clone_from(&p.test);
            let after = if p.after { ui::green("arrived") } else { ui::red("dropped") };
            let verdict = if holds(p) { ui::green("✓ as written") } else { ui::red("✗ NOT as written") };
            vec![
                test,
                p.packet.clone(),
                if with_before { arrival(p.before).to_owned() } else { "–".into() },
                after,
                verdict,
            ]
        })
        .collect();
    ui::out("");
    ui::table(&["The posture says", "The packet", "Before", "Enforced", "Proved"], &rows);
    ui::out("");
    if bad == 0 {
        ui::out(format!(
            "{} {} packets, {} lines of the posture: the kernel does what is written.",
            ui::green("✓"),
            proofs.len(),
            tests(proofs)
        ));
    } else {
        ui::out(format!("{} {bad} of {} packets did not do what is written.", ui::red("✗"), proofs.len()));
    }
    code
}

fn tests(proofs: &[Proof]) -> usize {
    let mut names: Vec<&str> = proofs.iter().map(|p| p.test.as_str()).collect();
    names.dedup();
    names.len()
}

fn printer(context: &Context) -> impl FnMut(&Line) + use<> {
    let json = context.global.json;
    move |line| {
        if !json {
            let mark = if line.good { ui::green("✓") } else { ui::red("✗") };
            ui::out(format!("{mark} {}", line.what));
            ui::out(format!("    expected: {}", line.expected));
            ui::out(format!("    seen:     {}", line.seen));
        }
    }
}

fn finish(context: &Context, lines: &[Line]) -> u8 {
    let bad = lines.iter().filter(|line| !line.good).count();
    if context.global.json {
        let rows: Vec<_> = (lines.iter())
            .map(|l| serde_json::json!({ "what": l.what, "expected": l.expected, "seen": l.seen, "good": l.good }))
            .collect();
        ui::json(&rows);
    } else {
        ui::out(format!("{} passed, {bad} failed", lines.len() - bad));
    }
    if bad == 0 { 0 } else { 3 }
}
