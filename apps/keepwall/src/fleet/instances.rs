//! Machines of a fleet, and the tokens that let them in.

use keepwall_api::{InstanceChange, InstanceView, RolloutState, TokenSpec};
use keepwall_client::{Client, ListInstancesQuery, ListRolloutsQuery, ListTokensQuery};

use super::{Server, clean, count, done, labels, pages};
use crate::Context;
use crate::cli::{Instance, Token, label};
use crate::failure::Failure;
use crate::plan::agreed;
use crate::{time, ui};

/// A fleet that is larger shows in `status` only machines that want a look; `instance list` has all.
const SHOWN_WHOLE_MAX: usize = 60;
/// Machines that are read for one table.
const MACHINES_MAX: usize = 100_000;

fn machines(client: &Client, labels: Option<String>) -> Result<Vec<InstanceView>, Failure> {
    Ok(pages(MACHINES_MAX, |cursor, limit| {
        let query = ListInstancesQuery { labels: labels.clone(), cursor, limit };
        client.list_instances(&query).map(|page| (page.items, page.next))
    })?)
}

/// True if it did not take what it should have; one that has come to where it should be has not failed any more.
fn failed(one: &InstanceView) -> bool {
    !one.status.failure.is_empty() && !one.status.in_sync
}

/// What a machine needs from a person, if anything.
fn trouble(one: &InstanceView) -> Option<String> {
    let status = &one.status;
    if failed(one) {
        return Some(ui::red(&clean(&status.failure)));
    }
    if !status.drift.is_empty() {
        return Some(ui::red(&clean(&format!("drift: {}", status.drift.join("; ")))));
    }
    if !one.enrolled {
        // Of what is only declared nothing was ever seen.
        return Some(match one.revision {
            0 => ui::dim("declared, has not enrolled"),
            _ => ui::yellow("its certificate was revoked, or has ended"),
        });
    }
    if !status.connected {
        return Some(ui::yellow("no contact"));
    }
    if !status.degraded.is_empty() {
        return Some(ui::yellow(&clean(&status.degraded.join("; "))));
    }
    match (status.in_sync, status.generation) {
        (true, _) => None,
        (false, 0) => Some(ui::dim("has been told nothing yet")),
        (false, _) => Some(ui::yellow("does not enforce yet what it should")),
    }
}

fn row(one: &InstanceView) -> Vec<String> {
    let status = &one.status;
    let contact = match (one.enrolled, status.connected) {
        (_, true) => ui::green("● connected"),
        (true, false) => ui::yellow("○ away"),
        (false, _) => ui::dim("– not enrolled"),
    };
    let sync = match (one.enrolled, status.in_sync) {
        (false, _) => String::new(),
        (true, true) => ui::green("✓"),
        (true, false) => ui::yellow("no"),
    };
    let seen = match (status.connected, &status.last_seen) {
        (true, _) => "now".into(),
        (false, Some(seen)) => time::when(seen),
        (false, None) => "never".into(),
    };
    vec![
        one.name.clone(),
        contact,
        sync,
        status.mode.clone(),
        seen,
        labels(&one.labels),
        trouble(one).unwrap_or_default(),
    ]
}

const HEADINGS: [&str; 7] = ["Machine", "Contact", "In sync", "Mode", "Seen", "Labels", ""];

pub fn status(context: &Context, server: &Server) -> Result<u8, Failure> {
    let client = &server.client;
    let posture = client.get_posture()?.value;
    let all = machines(client, None)?;
    let rollout = client.list_rollouts(&ListRolloutsQuery { limit: Some(1), cursor: None })?.items.into_iter().next();
    let rollout = rollout.filter(|one| matches!(one.state, RolloutState::Running | RolloutState::Stopped));
    let sum = |which: &dyn Fn(&InstanceView) -> bool| all.iter().filter(|one| which(one)).count();
    let enrolled = sum(&|one| one.enrolled);
    let connected = sum(&|one| one.status.connected);
    let in_sync = sum(&|one| one.enrolled && one.status.in_sync);
    let failed = sum(&failed);
    let drifting = sum(&|one| !one.status.drift.is_empty());
    if context.global.json {
        ui::json(&serde_json::json!({
            "posture": keepwall_api::PostureVersion { files: None, ..posture },
            "rollout": rollout,
            "summary": {
                "machines": all.len(), "enrolled": enrolled, "connected": connected, "in_sync": in_sync,
                "failed": failed, "drifting": drifting,
            },
            "machines": all,
        }));
        return Ok(0);
    }
    let declared = match posture.revision {
        0 => ui::yellow("nothing is declared yet, so nothing is enforced"),
        n => format!("revision {n}, by {}, {}", posture.actor, time::when(&posture.time)),
    };
    ui::out(format!("{} {}: {declared}", ui::bold("Fleet"), server.label()));
    if let Some(one) = &rollout {
        let how = match one.state {
            RolloutState::Running => ui::yellow("is on its way"),
            _ => ui::red("has stopped"),
        };
        let detail = clean(&one.detail);
        let detail = detail.strip_prefix("stopped: ").unwrap_or(&detail);
        ui::out(format!("{} {} {how}: {} (keepwall rollout show)", ui::yellow("!"), one.id, detail));
    }
    ui::out("");
    if all.is_empty() {
        ui::out("There are no machines yet: keepwall token create, and run on each machine what it prints.");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = (all.iter())
        .filter(|one| all.len() <= SHOWN_WHOLE_MAX || trouble(one).is_some())
        .take(SHOWN_WHOLE_MAX)
        .map(row)
        .collect();
    let hidden = all.len() - rows.len();
    if !rows.is_empty() {
        ui::table(&HEADINGS, &rows);
    }
    if hidden > 0 {
        ui::out(ui::dim(&format!("  … and {hidden} more (keepwall instance list)")));
    }
    ui::out("");
    let part =
        |n: usize, word: &str| if n > 0 { format!(", {}", ui::red(&format!("{n} {word}"))) } else { String::new() };
    ui::out(format!(
        "{}: {enrolled} enrolled, {connected} connected, {in_sync} in sync{}{}.",
        count(all.len() as u64, "machine"),
        part(failed, "failed"),
        part(drifting, "drifting")
    ));
    Ok(0)
}

pub fn run(context: &Context, server: &Server, command: &Instance) -> Result<u8, Failure> {
    let (client, json) = (&server.client, context.global.json);
    match command {
        Instance::List { labels } => {
            let selector: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            let all = machines(client, (!selector.is_empty()).then(|| selector.join(",")))?;
            if json {
                ui::json(&all);
            } else if all.is_empty() && !selector.is_empty() {
                ui::out(format!("No machine carries {}.", selector.join(", ")));
            } else if all.is_empty() {
                ui::out("There are no machines yet: keepwall token create, and run on each machine what it prints.");
            } else {
                ui::table(&HEADINGS, &all.iter().map(row).collect::<Vec<_>>());
            }
            Ok(0)
        }
        Instance::Show { name } => {
            let one = client.get_instance(name)?.value;
            if json {
                ui::json(&one);
            } else {
                show(&one);
            }
            Ok(0)
        }
        Instance::Label { name, changes } => {
            let found = client.get_instance(name)?;
            let mut wanted = found.labels.clone();
            for change in changes {
                match change.strip_suffix('-').filter(|key| !key.contains('=')) {
                    Some(key) => {
                        if wanted.remove(key).is_none() {
                            return Err(Failure::new(
                                format!("{name} has no label `{key}`"),
                                format!("see its labels with `keepwall instance show {name}`"),
                            ));
                        }
                    }
                    None => {
                        let (key, value) = label(change).map_err(Failure::plain)?;
                        wanted.insert(key, value);
                    }
                }
            }
            let change = InstanceChange { labels: Some(wanted), interfaces: None };
            let made = client.change_instance(name, &change, found.etag)?.value;
            if json {
                ui::json(&made);
                return Ok(0);
            }
            let now = if made.labels.is_empty() { "no labels".into() } else { labels(&made.labels) };
            done(json, &format!("{name} has {now}; groups that select by them follow at once"))
        }
        Instance::Remove(one) => {
            if !agreed(&format!("Remove {} from the fleet? It keeps what it enforces.", one.name), one.yes)? {
                return Ok(1);
            }
            client.delete_instance(&one.name, None)?;
            let code = done(json, &format!("{} is removed; its certificate is worth nothing any more", one.name))?;
            if !json {
                ui::say(format!("On {} itself, `keepwall leave` makes it its own again.", one.name));
            }
            Ok(code)
        }
        Instance::Revoke(one) => {
            let question = format!("Revoke the certificate of {}? It is cut off until it enrols again.", one.name);
            if !agreed(&question, one.yes)? {
                return Ok(1);
            }
            let found = client.get_instance(&one.name)?;
            client.revoke_instance(&one.name)?;
            let told = format!("the certificate of {} is worth nothing any more; it keeps what it enforces", one.name);
            let code = done(json, &told)?;
            if !json {
                // A machine has the labels of the token that it came by last.
                let with: String = found.labels.iter().map(|(key, value)| format!(" --label {key}={value}")).collect();
                ui::say(format!("To let it in again: keepwall token create --instance {}{with}", one.name));
                ui::say("and on the machine: keepwall leave, then what that prints.");
            }
            Ok(code)
        }
        Instance::Intent { name } => {
            ui::json(&client.get_intent(name)?);
            Ok(0)
        }
    }
}

fn show(one: &InstanceView) {
    let status = &one.status;
    let line = |key: &str, value: &str| {
        if !value.is_empty() {
            ui::out(format!("  {key:<12} {value}"));
        }
    };
    ui::out(ui::bold(&one.name));
    line("labels", &labels(&one.labels));
    for interface in &one.interfaces {
        let device =
            if interface.device == interface.name { String::new() } else { format!(" ({})", interface.device) };
        line("interface", &format!("{}{device}  {}", interface.name, interface.addresses.join(", ")));
    }
    line("came by", if one.declared { "a posture file" } else { "enrolment" });
    if !one.enrolled {
        return line(
            "enrolled",
            &ui::yellow("no: keepwall token create --instance NAME, and run on it what it prints"),
        );
    }
    let contact = match (status.connected, &status.last_seen) {
        (true, _) => ui::green("connected"),
        (false, Some(seen)) => ui::yellow(&format!("away, last seen {}", time::date(seen))),
        (false, None) => ui::yellow("never seen"),
    };
    line("contact", &contact);
    let sync = if status.in_sync { ui::green("what it should be") } else { ui::yellow("not what it should be") };
    match status.generation {
        0 => line("in force", "nothing yet"),
        n => line("in force", &format!("generation {n}, {sync}")),
    }
    line("mode", &status.mode);
    status.drift.iter().for_each(|text| line("drift", &ui::red(&clean(text))));
    status.degraded.iter().for_each(|text| line("lacks", &ui::yellow(&clean(text))));
    line("failure", &ui::red(&clean(&status.failure)));
    line("agent", &clean(&status.agent_version));
    if let Some(until) = &status.certificate_until {
        line("certificate", &format!("ends {}", time::date(until)));
    }
}

/// True for `127.0.0.1:7443`: what a server says that nobody gave an address.
fn is_loopback(server: &str) -> bool {
    server.parse().is_ok_and(|at: std::net::SocketAddr| at.ip().is_loopback())
}

pub fn token(context: &Context, server: &Server, command: &Token) -> Result<u8, Failure> {
    let (client, json) = (&server.client, context.global.json);
    match command {
        Token::Create { labels, uses, ttl, addresses_within, cloud_init } => {
            let spec = TokenSpec {
                instance: context.global.instance.clone(),
                labels: labels.iter().cloned().collect(),
                addresses_within: addresses_within.clone(),
                ttl_s: *ttl,
                uses: *uses,
            };
            let made = client.create_token(&spec)?;
            if json {
                ui::json(&made);
                return Ok(0);
            }
            let for_whom = match (&spec.instance, uses) {
                (Some(name), _) => format!("lets {name} in"),
                (None, 1) => "lets one machine in".into(),
                (None, n) => format!("lets {n} machines in"),
            };
            if *cloud_init {
                ui::out(made.cloud_init.trim_end());
            } else {
                ui::out(format!("On a machine that has Keepwall, as root:\n\n  {}\n", made.command));
                ui::out(format!("On a machine that has nothing yet, as root:\n\n  {}\n", made.install));
            }
            if made.token.parse::<keepwall_uplink::token::Token>().is_ok_and(|token| is_loopback(&token.server)) {
                ui::say(ui::yellow("Only this machine itself reaches the server: for others, set [agents] listen and"));
                ui::say(ui::yellow("public in /etc/keepwall/server.toml, and restart it."));
            }
            ui::say(format!(
                "Token {} {for_whom} and ends {}. It is shown this once: whoever has it can enrol a machine.",
                made.id,
                time::when(&made.expires)
            ));
            Ok(0)
        }
        Token::List => {
            let all = pages(usize::MAX, |cursor, limit| {
                client.list_tokens(&ListTokensQuery { cursor, limit }).map(|page| (page.items, page.next))
            })?;
            if json {
                ui::json(&all);
                return Ok(0);
            }
            if all.is_empty() {
                ui::out("There are no tokens: keepwall token create");
                return Ok(0);
            }
            let rows: Vec<Vec<String>> = (all.into_iter())
                .map(|one| {
                    let used = one.used_by.len();
                    vec![
                        one.id,
                        one.spec.instance.unwrap_or_else(|| "any".into()),
                        labels(&one.spec.labels),
                        format!("{used} of {}", one.spec.uses),
                        time::when(&one.expires),
                        one.actor,
                        super::some(&one.used_by),
                    ]
                })
                .collect();
            ui::table(&["Token", "For", "Labels", "Used", "Ends", "By", "Machines"], &rows);
            Ok(0)
        }
        Token::Delete { id } => {
            client.delete_token(id, None)?;
            done(json, &format!("{id} lets nobody in any more; machines that came by it stay"))
        }
    }
}
