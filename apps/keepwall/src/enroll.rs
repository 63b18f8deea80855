//! Into a fleet, and out of it: the agent, the uplink beside it, and the binding between both.

use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use keepwall_host::process::{self, User};
use keepwall_link::{FleetState, Request, Response};
use keepwall_uplink::Identity;
use keepwall_uplink::contact::{Contact, Noted};
use keepwall_uplink::token::Token;
use serde::{Deserialize, Serialize};

use crate::agent::unexpected;
use crate::cli;
use crate::daemons::{self, Daemon};
use crate::failure::Failure;
use crate::{Context, exposure, ui};

const UPLINK: &str = "keepwall-uplink";
/// See [`daemons::account`].
const UPLINK_ID: u32 = 64_917;
/// A server that is dialled by a whole fleet answers late; then enrolment is done, and contact comes by itself.
const CONTACT_WITHIN: Duration = Duration::from_secs(30);
/// How long the first posture is awaited, once there is contact.
const POSTURE_WITHIN: Duration = Duration::from_secs(2);
/// A token has less.
const TOKEN_BYTES_MAX: u64 = 4_096;
/// Variables that say how to get out of this network.
const PROXIES: [&str; 4] = ["https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"];

/// What enrolment brought, as the uplink says it.
#[derive(Deserialize)]
struct Enrolled {
    instance: String,
    server: String,
    left_out: Vec<String>,
    /// False if the machine had a certificate before, and the token was shown to nobody.
    #[serde(skip, default = "yes")]
    by_token: bool,
}

/// How it stands with the server.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// By the uplink's last word.
    Known(Noted),
    /// The uplink has just begun.
    Dialling,
    /// There is no uplink.
    NoUplink,
}

fn yes() -> bool {
    true
}

fn root() -> Result<(), Failure> {
    match process::user().uid {
        0 => Ok(()),
        _ => Err(Failure::new(
            "this starts and stops what enforces on this machine",
            "run this as root (sudo keepwall …)",
        )),
    }
}

fn read_token(word: &str) -> Result<(Token, String), Failure> {
    let mut text = word.to_owned();
    if word == "-" {
        text.clear();
        std::io::stdin().take(TOKEN_BYTES_MAX).read_to_string(&mut text)?;
    }
    let token = text.parse().map_err(|why| Failure::new(why, "make one at the server: keepwall token create"))?;
    Ok((token, text.trim().to_owned()))
}

/// What the agent says about a fleet; `None` if the machine is in none.
pub fn fleet(context: &Context) -> Result<Option<FleetState>, Failure> {
    let bound = match context.agent.ask(Request::Status)? {
        Response::Status(status) => status.server.is_some(),
        other => return Err(unexpected(&other)),
    };
    if !bound {
        return Ok(None);
    }
    match context.agent.ask(Request::Fleet)? {
        Response::Fleet(fleet) => Ok(Some(fleet)),
        other => Err(unexpected(&other)),
    }
}

/// True if the uplink is systemd's on this machine.
fn uplink_unit(context: &Context, state: &Path) -> bool {
    daemons::usual(&context.global.socket)
        && state == Path::new(keepwall_uplink::identity::STATE)
        && daemons::has_unit(UPLINK)
}

fn start_uplink(context: &Context, state: &Path, user: User) -> Result<(), Failure> {
    if uplink_unit(context, state) {
        daemons::systemctl(&["enable", "--quiet", "keepwall-uplink.service"])?;
        return daemons::systemctl(&["restart", "keepwall-uplink.service"]);
    }
    let daemon = Daemon::of(UPLINK, &context.global.socket);
    daemon.stop()?;
    let mut uplink = daemons::unprivileged(UPLINK, user);
    uplink.command.arg("run").arg("--state").arg(state).arg("--socket").arg(&context.global.socket);
    daemon.start(&mut uplink.command)
}

/// Ends the uplink. False if it did not run.
fn stop_uplink(context: &Context, state: &Path) -> Result<bool, Failure> {
    let unit = uplink_unit(context, state);
    let ran = unit && daemons::systemctl(&["is-active", "--quiet", "keepwall-uplink.service"]).is_ok();
    if unit {
        daemons::systemctl(&["disable", "--quiet", "--now", "keepwall-uplink.service"])?;
    }
    Ok(Daemon::of(UPLINK, &context.global.socket).stop()? || ran)
}

/// Starts the uplink of a machine that is in a fleet and has none running: after a boot without systemd.
pub fn resume(context: &Context) -> Result<(), Failure> {
    let state = Path::new(keepwall_uplink::identity::STATE);
    let daemon = Daemon::of(UPLINK, &context.global.socket);
    let ours = daemons::usual(&context.global.socket) && process::user().uid == 0;
    if !ours || uplink_unit(context, state) || daemon.running().is_some() || fleet(context)?.is_none() {
        return Ok(());
    }
    match Identity::load(state) {
        Ok(_) => start_uplink(context, state, daemons::account(UPLINK, UPLINK_ID)),
        Err(_) => Ok(()),
    }
}

/// Ends the uplink that was started without systemd; it has nobody to serve without the agent.
pub fn pause(context: &Context) -> Result<(), Failure> {
    Daemon::of(UPLINK, &context.global.socket).stop().map(|_| ())
}

/// How it stands with the server of this machine's fleet; `None` where the uplink's directory is not the usual one.
pub fn contact(context: &Context, fleet: &FleetState) -> Option<Standing> {
    let state = Path::new(keepwall_uplink::identity::STATE);
    let ours = |known: &Identity| (&known.server, &known.instance) == (&fleet.server, &fleet.instance);
    Identity::load(state).ok().filter(ours)?;
    let runs = if uplink_unit(context, state) {
        daemons::systemctl(&["is-active", "--quiet", "keepwall-uplink.service"]).is_ok()
    } else {
        Daemon::of(UPLINK, &context.global.socket).running().is_some()
    };
    let noted = Noted::read(state);
    Some(match (runs, noted) {
        (true, Some(noted)) => Standing::Known(noted),
        (true, None) => Standing::Dialling,
        (false, _) => Standing::NoUplink,
    })
}

pub fn enroll(context: &Context, args: &cli::Enroll) -> Result<u8, Failure> {
    let (token, word) = read_token(&args.token)?;
    root()?;
    exposure::ensure_agent(context, &args.agent_state)?;
    let bound = fleet(context)?;
    let known = Identity::load(&args.state).ok();
    if let Some(bound) = &bound
        && known.as_ref().is_none_or(|known| (&known.server, &known.instance) != (&bound.server, &bound.instance))
    {
        return Err(Failure::new(
            format!("this machine is in the fleet of {} already, as {}", bound.server, bound.instance),
            "take it out first: keepwall leave",
        ));
    }
    let user = daemons::account(UPLINK, UPLINK_ID);
    daemons::give(&args.state, user)?;
    let enrolled = match known {
        None => ask_in(context, args, &token, &word, user)?,
        // An enrolment that was cut short after the token was used: the rest of it.
        Some(known) if known.server == token.server => {
            Enrolled { instance: known.instance, server: known.server, left_out: Vec::new(), by_token: false }
        }
        Some(known) => {
            return Err(Failure::new(
                format!("this machine has enrolled at {} already, as {}", known.server, known.instance),
                "forget that first: keepwall leave",
            ));
        }
    };
    let bind = Request::Bind { instance: enrolled.instance.clone(), server: enrolled.server.clone(), uid: user.uid };
    match context.agent.ask(bind)? {
        Response::Done(_) => {}
        other => return Err(unexpected(&other)),
    }
    Noted::remove(&args.state);
    start_uplink(context, &args.state, user)?;
    let noted = || Noted::read(&args.state).map(|noted| noted.contact);
    // A server that takes the certificate no more does not change its mind.
    wait(CONTACT_WITHIN, || Ok(matches!(noted(), Some(Contact::Made | Contact::Revoked))))?;
    let contact = noted() == Some(Contact::Made);
    let decided = |fleet: Option<FleetState>| fleet.is_some_and(|fleet| fleet.held.generation > 0);
    if contact {
        wait(POSTURE_WITHIN, || Ok(decided(fleet(context)?)))?;
    }
    report(context, &args.state, &enrolled, contact)?;
    Ok(0)
}

/// Shows the token, as the uplink's user: the key is made and stays there.
fn ask_in(context: &Context, args: &cli::Enroll, token: &Token, word: &str, user: User) -> Result<Enrolled, Failure> {
    let mut uplink = daemons::unprivileged(UPLINK, user);
    let command = uplink.command.args(["enroll", "-"]).arg("--state").arg(&args.state);
    if let Some(proxy) = &args.proxy {
        command.args(["--proxy", proxy]);
    }
    if let Some(name) = &context.global.instance {
        command.args(["--hostname", name]);
    }
    command.envs(PROXIES.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    let started = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = started.map_err(|error| daemons::not_started(UPLINK, &error))?;
    // By a pipe, not as an argument: arguments are for everybody to see.
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(word.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = words.lines().last().unwrap_or("it said nothing");
        let last = last.strip_prefix("keepwall-uplink: ").unwrap_or(last);
        return Err(Failure::new(format!("this machine could not enrol at {}: {last}", token.server), way_in(last)));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| Failure::new(format!("keepwall-uplink: {error}"), "install the same version of all programs"))
}

/// What to do about a refusal in these words.
fn way_in(words: &str) -> &'static str {
    if words.starts_with("cannot reach") {
        "nothing has changed here, and the token is good still; see that keepwalld runs there, that `agents.listen` is \
         not loopback, and that no firewall is between; then run the same line again"
    } else if words.contains("is enrolled already") {
        "at the server: keepwall token create --instance NAME for the same machine anew, or keepwall instance remove NAME"
    } else {
        "nothing has changed here; at the server: keepwall token create, and run here what it prints"
    }
}

/// Looks until it is so. False if the time is over before.
fn wait(within: Duration, mut so: impl FnMut() -> Result<bool, Failure>) -> Result<bool, Failure> {
    let started = Instant::now();
    while !so()? {
        if started.elapsed() > within {
            return Ok(false);
        }
        sleep(Duration::from_millis(50));
    }
    Ok(true)
}

fn report(context: &Context, state: &Path, enrolled: &Enrolled, contact: bool) -> Result<(), Failure> {
    let held = fleet(context)?.map_or(0, |fleet| fleet.held.generation);
    let status = crate::plan::status(context)?;
    if context.global.json {
        ui::json(&serde_json::json!({
            "instance": enrolled.instance, "server": enrolled.server, "left_out": enrolled.left_out,
            "contact": contact, "generation": held, "mode": status.mode,
        }));
        return Ok(());
    }
    ui::out(format!(
        "{} This machine is {} in the fleet of {}{}.",
        ui::green("✓"),
        ui::bold(&enrolled.instance),
        enrolled.server,
        if enrolled.by_token { "" } else { "; it was already, so the token was not used" }
    ));
    for address in &enrolled.left_out {
        ui::out(format!("  {} {} does not count as this machine's: {}", ui::yellow("!"), address, left_out(address)));
    }
    let log = if uplink_unit(context, state) {
        "journalctl -u keepwall-uplink".to_owned()
    } else {
        Daemon::of(UPLINK, &context.global.socket).log.display().to_string()
    };
    if !contact {
        ui::out(format!("{} There is no contact yet; the uplink goes on trying (see {log}).", ui::yellow("!")));
        if !enrolled.by_token {
            ui::out("  If its certificate was revoked: keepwall leave, then this line again.");
        }
    } else if held > 0 {
        ui::out(format!("{} Contact is made, and generation {held} of the fleet is in force here.", ui::green("✓")));
    } else if status.mode == "observing" {
        ui::out(format!(
            "{} Contact is made. Nothing is decided for this machine yet, so nothing is blocked.",
            ui::green("✓")
        ));
    } else {
        ui::out(format!(
            "{} Contact is made. Nothing is decided for this machine yet; what was in force stays.",
            ui::green("✓")
        ));
    }
    ui::out("");
    ui::out(format!(
        "From now on {} decides what is enforced here; `keepwall apply` by hand is refused.",
        enrolled.server
    ));
    ui::out("What cuts this machine off from there is taken back by itself; without contact, what is in force stays.");
    ui::out("");
    ui::out("  keepwall status   what is in force here");
    ui::out("  keepwall leave    take this machine out of the fleet again");
    Ok(())
}

/// Why an address stands for nothing.
fn left_out(address: &str) -> &'static str {
    match address.parse::<IpAddr>() {
        Ok(address) if !keepwall_sensors::listeners::is_public(address) => "the token admits other networks",
        _ => "the token does not admit it (a token admits private addresses unless it says otherwise)",
    }
}

pub fn leave(context: &Context, args: &cli::Leave) -> Result<u8, Failure> {
    root()?;
    let ran = stop_uplink(context, &args.state)?;
    exposure::ensure_agent(context, &args.agent_state)?;
    let bound = fleet(context)?;
    match context.agent.ask(Request::Unbind)? {
        Response::Done(_) => {}
        other => return Err(unexpected(&other)),
    }
    let known = Identity::load(&args.state).ok();
    let forgotten = Identity::remove(&args.state).map_err(Failure::plain)?;
    Noted::remove(&args.state);
    let status = crate::plan::status(context)?;
    let place = bound.map(|b| (b.server, b.instance)).or(known.map(|k| (k.server, k.instance)));
    if context.global.json {
        let (server, instance) = place.unzip();
        ui::json(&serde_json::json!({ "server": server, "instance": instance, "mode": status.mode }));
        return Ok(0);
    }
    let Some((server, instance)) = place else {
        let also = if ran || forgotten { "; what was left of one is gone" } else { "" };
        ui::out(format!("{} This machine is in no fleet{also}.", ui::green("✓")));
        return Ok(0);
    };
    ui::out(format!(
        "{} This machine has left the fleet of {server}: its key is gone, and nothing is taken from there.",
        ui::green("✓")
    ));
    if status.mode == "observing" {
        ui::out("  Nothing was enforced, and nothing is.");
    } else {
        ui::out(format!("  What is enforced stays ({}, {}). It is yours again:", status.generation, status.mode));
        ui::out("    keepwall apply    change it");
        ui::out("    keepwall remove   stop enforcing");
    }
    ui::out(format!("  {server} still lists it; to end that, there: keepwall instance remove {instance}"));
    Ok(0)
}
