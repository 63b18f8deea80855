//! What goes on: status, counters, flows, traces.

use keepwall_link::{Drift, Event, FleetState, Flow, Request, Response, Status, TraceFilter};
use keepwall_secgroup::intent::Intent;
use keepwall_secgroup::spec::Direction;
use keepwall_uplink::contact::{Contact, Noted};

use crate::Context;
use crate::agent::unexpected;
use crate::cli::{self, VerdictFilter};
use crate::enroll::Standing;
use crate::failure::Failure;
use crate::plan::{foreign, say_foreign, say_rule};
use crate::{time, ui};

pub fn status(context: &Context) -> Result<u8, Failure> {
    let status = crate::plan::status(context)?;
    let foreign = foreign(context);
    let fleet = crate::enroll::fleet(context)?;
    let standing = fleet.as_ref().and_then(|fleet| crate::enroll::contact(context, fleet));
    if context.global.json {
        ui::json(&serde_json::json!({ "status": status, "contact": standing, "dropped_by_others": foreign }));
        return Ok(0);
    }
    let mode = match status.mode.as_str() {
        "enforcing" => ui::green("● enforcing"),
        "observe-only" => ui::yellow("● observe only: nothing is dropped"),
        _ => ui::yellow("○ observing: nothing is applied"),
    };
    let instance = status.instance.as_deref().map_or(String::new(), |i| format!(" as {i}"));
    ui::out(format!(
        "{mode}{instance}  {}",
        ui::dim(&format!("agent {} (process {}), up {} s", status.version, status.pid, status.uptime_s))
    ));
    if let Some(fleet) = &fleet {
        ui::out(format!("  in the fleet of {}, which decides what is enforced here", fleet.server));
    }
    if let Some(standing) = &standing {
        ui::out(format!("  {}", say_standing(standing)));
    }
    if let Some(pending) = &status.pending {
        ui::out(format!(
            "{} {} reverts in {} s unless somebody runs `keepwall confirm` in a new session",
            ui::yellow("!"),
            pending.generation,
            pending.left_ms.div_ceil(1000)
        ));
    }
    if status.generation.0 > 0 {
        ui::out(format!("  in force: {}", in_force(&status, fleet.as_ref())));
        if status.mode == "enforcing" && status.attachments.is_empty() {
            ui::out(format!(
                "  {} no security group covers an interface of this machine: all of it is open",
                ui::yellow("!")
            ));
            if let (Some(_), Some(instance)) = (&fleet, &status.instance) {
                ui::out(format!(
                    "    at the server: keepwall instance label {instance} KEY=VALUE, as a group's `members` say"
                ));
            }
        } else {
            say_drift(&status.drift);
        }
        if status.repairs > 0 {
            ui::out(format!(
                "  {} our table was changed {} since the agent started, and repaired each time",
                ui::yellow("!"),
                if status.repairs == 1 { "once".to_owned() } else { format!("{} times", status.repairs) }
            ));
        }
    }
    if !status.attachments.is_empty() {
        ui::out("");
        let rows: Vec<Vec<String>> = (status.attachments.iter())
            .map(|a| {
                vec![
                    a.name.clone(),
                    a.device.clone(),
                    if a.present { ui::green("✓ there") } else { ui::yellow("absent") },
                    a.groups.join(", "),
                    a.ingress_rules.to_string(),
                    a.egress_rules.to_string(),
                ]
            })
            .collect();
        ui::table(&["Interface", "Device", "Now", "Groups", "Rules in", "Rules out"], &rows);
    }
    for text in &status.degraded {
        ui::out(format!("{} {text}", ui::yellow("!")));
    }
    say_foreign(&foreign);
    Ok(0)
}

fn say_standing(standing: &Standing) -> String {
    let (warn, since) = (ui::yellow("!"), |noted: &Noted| time::since(noted.since_s));
    match standing {
        Standing::NoUplink => {
            format!(
                "{warn} no contact, the uplink does not run: systemctl start keepwall-uplink, or keepwall down and up"
            )
        }
        Standing::Dialling => format!("{warn} no contact yet"),
        Standing::Known(noted) => match &noted.contact {
            Contact::Made => format!("{} in contact; connected {}", ui::green("✓"), since(noted)),
            Contact::Lost { why } => {
                let why = keepwall_sensors::processes::clean(why.as_bytes());
                format!("{warn} no contact, lost {}: {why}; what is in force stays", since(noted))
            }
            Contact::Revoked => format!(
                "{} no contact: it was removed there, or its certificate was revoked ({}). To let it in again: \
                 keepwall leave, then a new token",
                ui::red("✗"),
                since(noted)
            ),
        },
    }
}

/// Which state is in force, by the fleet's number if it is a fleet's, and what a restart comes back to.
fn in_force(status: &Status, fleet: Option<&FleetState>) -> String {
    let held = fleet.map_or(0, |fleet| fleet.held.generation);
    match status.confirmed {
        Some(confirmed) if confirmed == status.generation && held > 0 => {
            format!("generation {held} of the fleet; a restart comes back to it")
        }
        Some(confirmed) if confirmed == status.generation => {
            format!("{}; a restart comes back to it", status.generation)
        }
        Some(confirmed) => format!("{}; a restart comes back to: {confirmed}", status.generation),
        None => format!("{}; a restart comes back to: nothing yet", status.generation),
    }
}

fn say_drift(drift: &Drift) {
    match drift {
        Drift::NoTable => {}
        Drift::None => ui::out(format!("  {} the kernel holds just this", ui::green("✓"))),
        Drift::Repaired(what) => {
            ui::out(format!("  {} somebody changed our table; repaired: {}", ui::yellow("!"), what.join("; ")))
        }
        Drift::Contested(what) => {
            ui::out(format!("  {} somebody keeps changing our table: {}", ui::red("✗"), what.join("; ")))
        }
    }
}

pub fn verify(context: &Context) -> Result<u8, Failure> {
    match context.agent.ask(Request::Verify)? {
        Response::Verified(drift) => {
            if context.global.json {
                ui::json(&drift);
            } else if drift == Drift::NoTable {
                ui::out("Nothing is enforced, so there is nothing to compare.");
            } else {
                say_drift(&drift);
            }
            Ok(if matches!(drift, Drift::Contested(_)) { 3 } else { 0 })
        }
        other => Err(unexpected(&other)),
    }
}

fn intent(context: &Context) -> Result<Option<Intent>, Failure> {
    match context.agent.ask(Request::Intent)? {
        Response::Intent(intent) => Ok(intent.map(|i| *i)),
        other => Err(unexpected(&other)),
    }
}

/// Four columns that are never merged: what was written, what it came to, what the agent holds, what the kernel says.
pub fn debug(context: &Context) -> Result<u8, Failure> {
    let mut oddities = Vec::new();
    let declared = crate::posture::load(context.global.posture.as_deref());
    let resolved = declared.as_ref().ok().and_then(|checked| {
        let name = crate::posture::instance(checked, context.global.instance.as_deref()).ok()?;
        keepwall_secgroup::intent::resolve(checked, &name).ok()
    });
    let loaded = intent(context);
    let observed = context.agent.ask(Request::Verify);
    let rows = [
        (
            "declared",
            match &declared {
                Ok(checked) => format!(
                    "{} groups, {} rules as written",
                    checked.spec().groups.len(),
                    checked.spec().groups.iter().map(|g| g.ingress.len() + g.egress.len()).sum::<usize>()
                ),
                Err(failure) => {
                    oddities.push(format!("the posture cannot be used: {}", failure.message));
                    "not usable".into()
                }
            },
        ),
        (
            "resolved",
            match &resolved {
                Some(intent) => count(intent),
                None => "not possible".into(),
            },
        ),
        (
            "loaded",
            match &loaded {
                Ok(Some(intent)) => count(intent),
                Ok(None) => "nothing is applied".into(),
                Err(failure) => {
                    oddities.push(failure.message.clone());
                    "unknown".into()
                }
            },
        ),
        (
            "observed",
            match &observed {
                Ok(Response::Verified(drift)) => format!("{drift:?}"),
                Ok(_) => "unknown".into(),
                Err(failure) => {
                    oddities.push(failure.message.clone());
                    "unknown".into()
                }
            },
        ),
    ];
    if let (Some(resolved), Ok(Some(loaded))) = (&resolved, &loaded)
        && crate::plan::changes(Some(loaded), resolved)
    {
        oddities.push("what is written is not what is loaded: see `keepwall plan`".into());
    }
    if context.global.json {
        ui::json(&serde_json::json!({ "columns": rows, "oddities": oddities }));
        return Ok(0);
    }
    ui::table(&["Source", "What it says"], &rows.map(|(name, text)| vec![name.to_owned(), text]));
    for oddity in oddities {
        ui::out(format!("{} {oddity}", ui::yellow("!")));
    }
    Ok(0)
}

fn count(intent: &Intent) -> String {
    let rules: usize = intent.attachments.iter().map(|a| a.ingress.len() + a.egress.len()).sum();
    let members: usize = intent.sets.values().map(Vec::len).sum();
    format!(
        "{}: {} interfaces, {rules} rules, {members} addresses in {} sets",
        intent.instance,
        intent.attachments.len(),
        intent.sets.len()
    )
}

pub fn counters(context: &Context) -> Result<u8, Failure> {
    let counters = match context.agent.ask(Request::Counters)? {
        Response::Counters(counters) => counters,
        other => return Err(unexpected(&other)),
    };
    if context.global.json {
        ui::json(&counters);
        return Ok(0);
    }
    let Some(intent) = intent(context)? else {
        ui::out("Nothing is enforced, so nothing is counted.");
        return Ok(0);
    };
    let mut rows = Vec::new();
    for attachment in &intent.attachments {
        for direction in Direction::BOTH {
            for rule in attachment.rules(direction) {
                let (packets, bytes) = counters.rules.get(&rule.id).copied().unwrap_or_default();
                rows.push(vec![
                    rule.label.clone(),
                    packets.to_string(),
                    bytes.to_string(),
                    say_rule(rule, direction),
                    ui::dim(&rule.place.to_string()),
                ]);
            }
        }
    }
    ui::table(&["Rule", "Packets", "Bytes", "Says", "Written at"], &rows);
    ui::out(ui::dim(&format!(
        "Since {} s. First packets of sessions: established ones ask no rule.",
        counters.since_s
    )));
    Ok(0)
}

pub fn flows(context: &Context, args: &cli::Flows) -> Result<u8, Failure> {
    let fits = |flow: &Flow| {
        let verdict = match args.verdict {
            Some(VerdictFilter::Accept) => flow.verdict == "accept",
            Some(VerdictFilter::Drop) => flow.verdict != "accept" && flow.verdict != "established",
            None => true,
        };
        verdict
            && args.port.is_none_or(|port| flow.source_port == port || flow.destination_port == port)
            && args.address.is_none_or(|address| flow.source == address || flow.destination == address)
            && args.group.as_ref().is_none_or(|group| {
                flow.rule.starts_with(&format!("{group}/")) || flow.rule.starts_with(&format!("rule {group}/"))
            })
    };
    if args.established {
        let flows = match context.agent.ask(Request::Sessions)? {
            Response::Sessions(flows) => flows,
            other => return Err(unexpected(&other)),
        };
        let flows: Vec<Flow> =
            flows.into_iter().filter(|f| fits(f)).take(args.count.unwrap_or(u64::MAX) as usize).collect();
        if context.global.json {
            ui::json(&flows);
        } else {
            flows.iter().for_each(say_flow);
            ui::say(format!("{} sessions", flows.len()));
        }
        return Ok(0);
    }
    let mut left = args.count.unwrap_or(u64::MAX);
    context.agent.stream(Request::Flows, |event| {
        match event {
            Event::Ready => ui::say("Watching. Each new session and each denied packet is one line; Ctrl-C ends."),
            Event::Flow(flow) if fits(&flow) => {
                if context.global.json {
                    ui::out(serde_json::to_string(&flow).unwrap_or_default());
                } else {
                    say_flow(&flow);
                }
                left = left.saturating_sub(1);
            }
            Event::Lost(count) => {
                ui::say(format!("({count} times the kernel was faster than this command; some flows were not seen)"))
            }
            Event::Flow(_) | Event::Trace(_) => {}
        }
        left > 0
    })?;
    Ok(0)
}

fn say_flow(flow: &Flow) {
    let end = |address: std::net::IpAddr, port: u16| match (address, port) {
        (address, 0) => address.to_string(),
        (std::net::IpAddr::V6(a), port) => format!("[{a}]:{port}"),
        (address, port) => format!("{address}:{port}"),
    };
    let verdict = match flow.verdict.as_str() {
        "accept" => ui::green("✓ accept "),
        "established" => ui::green("● session"),
        other => ui::red(&format!("✗ {other:<7}")),
    };
    let by = if flow.rule.is_empty() { String::new() } else { format!("by {}", flow.rule) };
    let place = if flow.place.is_empty() { String::new() } else { ui::dim(&format!(" ({})", flow.place)) };
    ui::out(format!(
        "{verdict} {:<7} {:<14} {:<6} {} → {}  {by}{place}",
        flow.direction,
        flow.interface,
        flow.protocol,
        end(flow.source, flow.source_port),
        end(flow.destination, flow.destination_port)
    ));
}

pub fn trace(context: &Context, args: &cli::Trace) -> Result<u8, Failure> {
    let protocol = match &args.protocol {
        None => None,
        Some(text) => match text.parse() {
            Ok(keepwall_core::Protocol::Number(number)) => Some(number),
            Ok(keepwall_core::Protocol::All) => None,
            Err(error) => return Err(Failure::plain(error.to_string())),
        },
    };
    let filter = TraceFilter {
        source: args.from,
        destination: args.to,
        protocol: protocol.or(args.port.map(|_| 6)),
        port: args.port,
        seconds: args.seconds,
        packets: args.packets,
    };
    let mut packets: Vec<u32> = Vec::new();
    let mut kernel: std::collections::BTreeMap<u32, String> = Default::default();
    let mut model: std::collections::BTreeMap<u32, String> = Default::default();
    context.agent.stream(Request::Trace(filter), |event| {
        match event {
            Event::Ready => ui::say(format!("Waiting up to {} s for matching packets; send one now.", args.seconds)),
            Event::Trace(step) => {
                if context.global.json {
                    ui::out(serde_json::to_string(&step).unwrap_or_default());
                } else {
                    if !packets.contains(&step.packet) {
                        ui::out(format!("{} {}", ui::bold("packet"), step.summary));
                        packets.push(step.packet);
                    }
                    let table = if step.ours { step.table.clone() } else { ui::yellow(&step.table) };
                    let verdict = match step.verdict.as_str() {
                        "accept" => ui::green("accept"),
                        "drop" => ui::red("drop"),
                        other => other.to_owned(),
                    };
                    ui::out(format!("    {table} {}: {} → {verdict}", step.chain, step.rule));
                }
                if !packets.contains(&step.packet) {
                    packets.push(step.packet);
                }
                if step.ours && (step.verdict == "drop" || step.verdict == "accept") {
                    kernel.insert(step.packet, step.verdict.clone());
                }
                if let Some(said) = step.model {
                    model.insert(step.packet, said);
                }
            }
            Event::Flow(_) | Event::Lost(_) => {}
        }
        true
    })?;
    if packets.is_empty() {
        return Err(Failure::new("no matching packet came", "widen the filter, or wait longer with --seconds"));
    }
    let mut disagree = false;
    for packet in &packets {
        let (Some(kernel), Some(model)) = (kernel.get(packet), model.get(packet)) else { continue };
        let agree = model.starts_with(kernel.as_str());
        disagree |= !agree;
        let mark = if agree {
            ui::green("✓ model and kernel agree")
        } else {
            ui::red("✗ model and kernel disagree: please report this")
        };
        ui::say(format!("{mark}: kernel {kernel}; model {model}"));
    }
    Ok(if disagree { 3 } else { 0 })
}
