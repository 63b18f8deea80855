//! What was seen and done in a fleet, and questions to its posture.

use keepwall_api::{AuditView, Observation, SeverityWord};
use keepwall_client::{
    Client, ExplainQuery, ListAuditQuery, ListEventsQuery, ListFindingsQuery, LiveQuery, ReachQuery,
};
use serde_json::Value;

use super::{Server, clean, pages};
use crate::Context;
use crate::cli::{self, Audit, EventCommand, FindingCommand, Seen};
use crate::failure::Failure;
use crate::{time, ui};

pub fn reach(context: &Context, server: &Server, args: &cli::Reach) -> Result<u8, Failure> {
    let rows = pages(usize::MAX, |cursor, limit| {
        let query = ReachQuery { from: args.from.clone(), to: args.to.clone(), cursor, limit };
        server.client.reach(&query).map(|page| (page.items, page.next))
    })?;
    if context.global.json {
        ui::json(&rows);
        return Ok(0);
    }
    if rows.is_empty() {
        ui::out("Nobody reaches anybody.");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|row| vec![row.from, "→".into(), row.to, row.on.join(", ")]).collect();
    ui::table(&["From", "", "To", "On"], &rows);
    ui::out(ui::dim(crate::explain::legend(&rows)));
    Ok(0)
}

pub fn explain(context: &Context, server: &Server, question: &cli::Question) -> Result<u8, Failure> {
    let query = ExplainQuery {
        from: question.from.clone(),
        to: question.to.clone(),
        protocol: Some(question.protocol.clone()),
        port: question.port.map(u64::from),
        source_port: Some(question.source_port.into()),
    };
    let found = server.client.explain(&query)?;
    if context.global.json {
        ui::json(&found.items);
        return Ok(0);
    }
    for one in &found.items {
        let mark = if one.allowed { ui::green("✓ allowed") } else { ui::red("✗ denied") };
        let port = one.port.map_or(String::new(), |port| format!(" port {port}"));
        ui::out(format!("{mark}  {}{port} from {} to {}", one.protocol, one.from, one.to));
        if one.steps.is_empty() {
            ui::out("    neither end is a machine of this fleet, so nothing here decides it");
        }
        for step in &one.steps {
            let word = if step.allow { ui::green("✓ allow") } else { ui::red("✗ deny") };
            ui::out(format!("    {} {}: {word}: {}", step.interface, step.direction, step.reason));
        }
    }
    Ok(0)
}

fn severity(word: SeverityWord) -> String {
    let text = format!("{:<8}", format!("{word:?}").to_lowercase());
    match word {
        SeverityWord::Critical | SeverityWord::High => ui::red(&text),
        SeverityWord::Medium => ui::yellow(&text),
        SeverityWord::Info | SeverityWord::Low => ui::dim(&text),
    }
}

/// A value in a line: `drift=table removed port=22`.
fn line(value: &Value) -> String {
    let plain = |value: &Value| match value {
        Value::String(text) => clean(text),
        other => clean(&other.to_string()),
    };
    match value {
        Value::Object(fields) => {
            let field = |(key, value): (&String, &Value)| format!("{}={}", clean(key), plain(value));
            fields.iter().map(field).collect::<Vec<_>>().join(" ")
        }
        Value::Null => String::new(),
        other => plain(other),
    }
}

fn show(json: bool, all: &[Observation], none: &str) {
    if json {
        return ui::json(&all);
    }
    if all.is_empty() {
        return ui::out(none);
    }
    let rows: Vec<Vec<String>> = (all.iter())
        .map(|one| {
            let source = if one.source.is_empty() { "the server".into() } else { one.source.clone() };
            vec![time::when(&one.time), severity(one.severity), source, clean(&one.kind), line(&one.body)]
        })
        .collect();
    ui::table(&["When", "Severity", "Machine", "Kind", "What"], &rows);
}

fn word(seen: &Seen) -> Option<String> {
    seen.severity.map(|severity| format!("{severity:?}").to_lowercase())
}

pub fn finding(context: &Context, server: &Server, FindingCommand::List(seen): &FindingCommand) -> Result<u8, Failure> {
    let (source, kind, severity) = (&seen.from, &seen.kind, word(seen));
    let all = pages(seen.count, |cursor, limit| {
        let (source, kind, severity) = (source.clone(), kind.clone(), severity.clone());
        let query = ListFindingsQuery { source, kind, severity, cursor, limit };
        server.client.list_findings(&query).map(|page| (page.items, page.next))
    })?;
    show(context.global.json, &all, "There are no findings.");
    Ok(0)
}

pub fn event(context: &Context, server: &Server, command: &EventCommand) -> Result<u8, Failure> {
    let seen = match command {
        EventCommand::Watch { kind } => return watch(context.global.json, &server.client, kind.clone()),
        EventCommand::List(seen) => seen,
    };
    let (source, kind, severity) = (&seen.from, &seen.kind, word(seen));
    let all = pages(seen.count, |cursor, limit| {
        let (source, kind, severity) = (source.clone(), kind.clone(), severity.clone());
        let query = ListEventsQuery { source, kind, severity, cursor, limit };
        server.client.list_events(&query).map(|page| (page.items, page.next))
    })?;
    show(context.global.json, &all, "There are no events.");
    Ok(0)
}

fn watch(json: bool, client: &Client, kind: Option<String>) -> Result<u8, Failure> {
    let live = client.live(&LiveQuery { kind })?;
    ui::say("Watching. Each event is one line; Ctrl-C ends.");
    for event in live {
        let event = event?;
        if json {
            ui::out(event.data.to_string());
        } else if event.kind == "lagged" {
            ui::say(format!("({} events came faster than this command read; they were missed)", event.data["missed"]));
        } else {
            let name = event.data["name"].as_str().map(clean).unwrap_or_default();
            let now = ui::dim(&time::utc(time::now())[11..]);
            ui::out(format!("{now}  {:<9} {}  {}", clean(&event.kind), ui::bold(&name), line(&event.data["body"])));
        }
    }
    Err(Failure::new("the server has ended the stream", "it may be restarting: run the command again"))
}

pub fn audit(context: &Context, server: &Server, command: &Audit) -> Result<u8, Failure> {
    let json = context.global.json;
    match command {
        Audit::Verify => {
            let verdict = server.client.verify_audit()?;
            if json {
                ui::json(&verdict);
            } else if verdict.holds {
                ui::out(format!("{} {} lines, all as they were written.", ui::green("✓"), verdict.lines));
            } else {
                ui::out(format!("{} The audit log was tampered with: {}", ui::red("✗"), clean(&verdict.why)));
                ui::out(format!("  the {} lines before are as they were written", verdict.lines));
            }
            Ok(if verdict.holds { 0 } else { 3 })
        }
        Audit::List { count } => {
            // The log is read from its beginning; what is asked for is its end.
            let mut all = pages(usize::MAX, |cursor, limit| {
                server.client.list_audit(&ListAuditQuery { cursor, limit }).map(|page| (page.items, page.next))
            })?;
            let lines = all.split_off(all.len().saturating_sub(*count));
            if json {
                ui::json(&lines);
                return Ok(0);
            }
            ui::table(
                &["Line", "When", "Who", "From", "Did", "What", ""],
                &lines.iter().map(audit_row).collect::<Vec<_>>(),
            );
            Ok(0)
        }
    }
}

fn audit_row(one: &AuditView) -> Vec<String> {
    let text = |key: &str| one.entry[key].as_str().map(clean).unwrap_or_default();
    // A refusal says why; a change is in --json, before and after.
    let why = one.entry["after"]["why"].as_str().or(one.entry["after"]["reason"].as_str()).map(clean);
    vec![
        one.number.to_string(),
        time::when(&one.time),
        text("actor"),
        text("address"),
        text("action"),
        text("target"),
        ui::dim(&why.unwrap_or_default()),
    ]
}
