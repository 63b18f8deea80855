//! Changes on their way: watched, stopped, resumed, returned.

use std::io::IsTerminal as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use keepwall_api::{RolloutState, RolloutView};
use keepwall_client::{Client, Error, ListRolloutsQuery};

use super::{Server, clean, count, pages, some};
use crate::Context;
use crate::cli::Rollout;
use crate::failure::Failure;
use crate::{time, ui};

/// How often a rollout that is watched is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A server that is away for longer while one watches is not waited for.
const AWAY_MAX: Duration = Duration::from_secs(30);
/// Characters of a bar.
const BAR: u64 = 24;
/// Failed machines whose words are shown.
const WORDS_MAX: usize = 5;

pub fn run(context: &Context, server: &Server, command: &Rollout) -> Result<u8, Failure> {
    let client = &server.client;
    let json = context.global.json;
    match command {
        Rollout::List { count } => list(json, client, *count),
        Rollout::Show { id } => {
            let view = client.get_rollout(&named(client, id.as_deref())?)?.value;
            show(json, client, &view)
        }
        Rollout::Follow { id } => {
            let id = named(client, id.as_deref())?;
            follow(json, client, &id)
        }
        Rollout::Stop { id } => {
            let view = client.stop_rollout(&named(client, id.as_deref())?)?.value;
            if json {
                ui::json(&view);
                return Ok(0);
            }
            ui::out(format!("{} {} goes no further; {} it already.", ui::green("✓"), view.id, have(&view)));
            ways_on(&view);
            Ok(0)
        }
        Rollout::Resume { id, detach } => {
            let view = client.resume_rollout(&named(client, id.as_deref())?)?.value;
            if *detach { under_way(json, &view.id) } else { follow(json, client, &view.id) }
        }
        Rollout::Return { id } => give_back(json, client, &named(client, id.as_deref())?),
    }
}

/// `keepwall revert`: the change that is on its way or stopped goes back.
pub fn revert(context: &Context, server: &Server) -> Result<u8, Failure> {
    let newest = newest(&server.client)?;
    match newest.state {
        RolloutState::Running | RolloutState::Stopped => give_back(context.global.json, &server.client, &newest.id),
        _ => Err(Failure::new(
            "no change is on its way",
            "to declare an earlier posture again: keepwall posture history, then keepwall posture return REVISION",
        )),
    }
}

fn give_back(json: bool, client: &Client, id: &str) -> Result<u8, Failure> {
    let view = client.return_rollout(id)?.value;
    if json {
        ui::json(&view);
    } else {
        ui::out(format!("{} {} is taken back: all machines go back to the posture before.", ui::green("✓"), view.id));
        ui::out("  keepwall status   who is there already");
    }
    Ok(0)
}

fn newest(client: &Client) -> Result<RolloutView, Failure> {
    let page = client.list_rollouts(&ListRolloutsQuery { limit: Some(1), cursor: None })?;
    let newest = page.items.into_iter().next();
    newest.ok_or_else(|| Failure::new("there was no rollout yet", "one begins with `keepwall apply`"))
}

fn named(client: &Client, id: Option<&str>) -> Result<String, Failure> {
    id.map_or_else(|| newest(client).map(|view| view.id), |id| Ok(id.to_owned()))
}

fn word(state: RolloutState) -> String {
    match state {
        RolloutState::Running => ui::yellow("running"),
        RolloutState::Stopped => ui::red("stopped"),
        RolloutState::Done => ui::green("done"),
        RolloutState::Returned => ui::yellow("returned"),
    }
}

fn applied(view: &RolloutView) -> u64 {
    view.waves.iter().map(|wave| wave.applied).sum()
}

fn total(view: &RolloutView) -> u64 {
    view.waves.iter().map(|wave| wave.total).sum()
}

fn have(view: &RolloutView) -> String {
    match applied(view) {
        1 => "1 machine has".into(),
        n => format!("{n} machines have"),
    }
}

fn names(view: &RolloutView, which: impl Fn(&keepwall_api::WaveView) -> &Vec<String>) -> Vec<String> {
    view.waves.iter().flat_map(|wave| which(wave).iter().cloned()).collect()
}

fn list(json: bool, client: &Client, count: usize) -> Result<u8, Failure> {
    let all = pages(count, |cursor, limit| {
        client.list_rollouts(&ListRolloutsQuery { cursor, limit }).map(|page| (page.items, page.next))
    })?;
    if json {
        ui::json(&all);
        return Ok(0);
    }
    if all.is_empty() {
        ui::out("There was no rollout yet; one begins with `keepwall apply`.");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = (all.iter())
        .map(|view| {
            vec![
                view.id.clone(),
                word(view.state),
                format!("{} → {}", view.from_revision, view.to_revision),
                format!("{}/{}", applied(view), total(view)),
                view.actor.clone(),
                time::when(&view.started),
                ui::dim(&clean(&view.detail)),
            ]
        })
        .collect();
    ui::table(&["Rollout", "State", "Posture", "Machines", "By", "Started", ""], &rows);
    Ok(0)
}

fn lines(view: &RolloutView) -> Vec<String> {
    let mut out = vec![format!("{}  {}  {}", ui::bold(&view.id), word(view.state), ui::dim(&clean(&view.detail)))];
    for (n, wave) in view.waves.iter().enumerate() {
        let filled = if wave.total == 0 { BAR } else { (BAR * wave.applied).div_ceil(wave.total).min(BAR) };
        let bar: String = (0..BAR).map(|at| if at < filled { '█' } else { '░' }).collect();
        let state = match (wave.open, wave.applied == wave.total) {
            (false, _) => ui::dim("waits"),
            (true, true) => ui::green("✓"),
            (true, false) => String::new(),
        };
        let mut line = format!("  wave {:<2} {bar}  {}/{} {state}", n + 1, wave.applied, wave.total);
        if !wave.failed.is_empty() {
            line.push_str(&format!("  {} {}", ui::red("failed:"), some(&wave.failed)));
        }
        if !wave.lost.is_empty() {
            line.push_str(&format!("  {} {}", ui::yellow("not connected:"), some(&wave.lost)));
        }
        out.push(line);
    }
    out
}

fn show(json: bool, client: &Client, view: &RolloutView) -> Result<u8, Failure> {
    if json {
        ui::json(view);
        return Ok(0);
    }
    lines(view).iter().for_each(ui::out);
    ui::out("");
    ui::out(format!("  posture {} → {}, by {}", view.from_revision, view.to_revision, view.actor));
    ui::out(format!("  started {}", time::date(&view.started)));
    if let Some(ended) = &view.ended {
        ui::out(format!("  ended   {}", time::date(ended)));
    }
    say_failures(client, view);
    ways_on(view);
    Ok(0)
}

/// What machines said that did not take it.
fn say_failures(client: &Client, view: &RolloutView) {
    for name in names(view, |wave| &wave.failed).iter().take(WORDS_MAX) {
        // A machine that is gone meanwhile says nothing any more.
        if let Ok(found) = client.get_instance(name)
            && !found.status.failure.is_empty()
        {
            ui::out(format!("  {} {name}: {}", ui::red("✗"), clean(&found.status.failure)));
        }
    }
}

fn ways_on(view: &RolloutView) {
    if view.state == RolloutState::Stopped {
        ui::out(format!("  keepwall rollout resume {}   go on; machines that failed are tried again", view.id));
        ui::out(format!("  keepwall rollout return {}   all machines go back to the posture before", view.id));
    }
}

/// A change was accepted, and nobody waits for it.
pub fn under_way(json: bool, id: &str) -> Result<u8, Failure> {
    if json {
        ui::json(&serde_json::json!({ "rollout": id }));
    } else {
        ui::out(format!("{} {id} is on its way.", ui::green("✓")));
        ui::out(format!("  keepwall rollout follow {id}   watch it"));
        ui::out(format!("  keepwall rollout stop {id}     go no further"));
    }
    Ok(0)
}

/// Watches until nothing more happens by itself. 0 if everybody has it, else 1.
pub fn follow(json: bool, client: &Client, id: &str) -> Result<u8, Failure> {
    leave_on_interrupt(id);
    let draws = !json && std::io::stderr().is_terminal();
    let mut drawn: Vec<String> = Vec::new();
    let mut seen = Instant::now();
    let view = loop {
        match client.get_rollout(id) {
            Ok(found) => {
                seen = Instant::now();
                let now = lines(&found);
                if !json && now != drawn {
                    draw(draws, drawn.len(), &now, &found);
                    drawn = now;
                }
                if found.state != RolloutState::Running {
                    break found.value;
                }
            }
            // The server may be restarting; what is on its way does not depend on us.
            Err(Error::Unreachable(_)) if seen.elapsed() < AWAY_MAX => {}
            Err(error) => return Err(error.into()),
        }
        sleep(LOOK_EVERY);
    };
    if json {
        ui::json(&view);
    } else {
        conclude(client, &view);
    }
    Ok(if view.state == RolloutState::Done { 0 } else { 1 })
}

fn draw(terminal: bool, before: usize, lines: &[String], view: &RolloutView) {
    if terminal {
        let up = if before > 0 { format!("\x1b[{before}A\x1b[J") } else { String::new() };
        ui::say(format!("{up}{}", lines.join("\n")));
    } else {
        let open = view.waves.iter().filter(|wave| wave.open).count();
        let waves = match open {
            0 => count(view.waves.len() as u64, "wave"),
            _ => format!("wave {open} of {}", view.waves.len()),
        };
        ui::say(format!("{waves}: {}/{} machines; {}", applied(view), total(view), clean(&view.detail)));
    }
}

fn conclude(client: &Client, view: &RolloutView) {
    match view.state {
        RolloutState::Running => {}
        RolloutState::Done if total(view) == 0 => {
            ui::out(format!("{} Declared as revision {}; no machine has to change.", ui::green("✓"), view.to_revision));
        }
        RolloutState::Done => ui::out(format!(
            "{} Done: {} it, applied and confirmed (revision {}).",
            ui::green("✓"),
            have(view),
            view.to_revision
        )),
        RolloutState::Stopped => {
            let rest = total(view).saturating_sub(applied(view));
            ui::out(format!(
                "{} {}. {} the change; {} not.",
                ui::red("✗"),
                clean(&view.detail),
                capital(&have(view)),
                count(rest, "machine") + if rest == 1 { " does" } else { " do" }
            ));
            say_failures(client, view);
            ways_on(view);
        }
        RolloutState::Returned => {
            ui::out(format!(
                "{} {}. All machines go back to what they had before (revision {}).",
                ui::red("✗"),
                clean(&view.detail),
                view.from_revision
            ));
            say_failures(client, view);
        }
    }
}

fn capital(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or(String::new(), |first| first.to_uppercase().collect::<String>() + rest.as_str())
}

/// Ctrl-C ends the watching, not the rollout, and says so.
fn leave_on_interrupt(id: &str) {
    let id = id.to_owned();
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            ui::say(format!("\n{id} goes on without you:"));
            ui::say(format!("  keepwall rollout follow {id}   watch it again"));
            ui::say(format!("  keepwall rollout stop {id}     go no further"));
            ui::say(format!("  keepwall rollout return {id}   back to the posture before"));
            std::process::exit(130);
        }
    });
}
