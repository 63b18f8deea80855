//! Questions about the posture alone: is it right, what does it mean, who reaches whom.

use std::net::IpAddr;

use keepwall_core::{Family, Finding, Protocol, Severity};
use keepwall_link::{Counters, Request, Response};
use keepwall_secgroup::check::Checked;
use keepwall_secgroup::evaluate::{Packet, Reason, Verdict, evaluate};
use keepwall_secgroup::health::findings;
use keepwall_secgroup::reach::{describe, matrix, run_tests};
use keepwall_secgroup::spec::Direction;

use crate::Context;
use crate::cli;
use crate::failure::Failure;
use crate::posture;
use crate::ui;

pub fn check(context: &Context) -> Result<u8, Failure> {
    let checked = posture::load(context.global.posture.as_deref())?;
    let tests = posture::tests_pass(&checked)?;
    let spec = checked.spec();
    let rules: usize = spec.groups.iter().map(|g| g.ingress.len() + g.egress.len()).sum();
    let findings = findings(&checked, None);
    if context.global.json {
        ui::json(&serde_json::json!({
            "instances": spec.instances.len(), "groups": spec.groups.len(), "rules": rules, "tests": tests,
            "findings": findings,
        }));
        return Ok(0);
    }
    ui::out(format!(
        "{} The posture is valid: {} instances, {} groups, {rules} rules; {tests} tests pass.",
        ui::green("✓"),
        spec.instances.len(),
        spec.groups.len()
    ));
    let worth = findings.iter().filter(|f| f.severity > Severity::Note).count();
    if worth > 0 {
        ui::out(format!("  {worth} things deserve a look: keepwall health"));
    }
    Ok(0)
}

pub fn test(context: &Context) -> Result<u8, Failure> {
    let checked = posture::load(context.global.posture.as_deref())?;
    let results = run_tests(&checked);
    if context.global.json {
        let rows: Vec<_> = (results.iter())
            .map(|r| serde_json::json!({
                "test": describe(&r.test), "place": r.test.place.to_string(), "passed": r.failure.is_none(), "failure": r.failure,
            }))
            .collect();
        ui::json(&rows);
    } else {
        for result in &results {
            match &result.failure {
                None => ui::out(format!("{} {}", ui::green("✓"), describe(&result.test))),
                Some(why) => {
                    ui::out(format!(
                        "{} {}  {}",
                        ui::red("✗"),
                        describe(&result.test),
                        ui::dim(&result.test.place.to_string())
                    ));
                    ui::out(format!("    {why}"));
                }
            }
        }
        let failed = results.iter().filter(|r| r.failure.is_some()).count();
        ui::out(format!("{} passed, {failed} failed", results.len() - failed));
    }
    Ok(if results.iter().any(|r| r.failure.is_some()) { 3 } else { 0 })
}

pub fn health(context: &Context) -> Result<u8, Failure> {
    let checked = posture::load(context.global.posture.as_deref())?;
    let counters: Option<Counters> = match context.agent.ask(Request::Counters) {
        Ok(Response::Counters(counters)) if !counters.rules.is_empty() => Some(counters),
        _ => None,
    };
    let hits = counters.map(|c| (c.rules.into_iter().map(|(id, (packets, _))| (id, packets)).collect(), c.since_s));
    let found = findings(&checked, hits.as_ref().map(|(hits, since)| (hits, *since)));
    show_findings(context, &found);
    Ok(if found.iter().any(|f| f.severity > Severity::Note) { 3 } else { 0 })
}

fn show_findings(context: &Context, findings: &[Finding]) {
    if context.global.json {
        return ui::json(&findings);
    }
    if findings.is_empty() {
        return ui::out(format!(
            "{} Nothing to say: every rule decides something, and none is wide open.",
            ui::green("✓")
        ));
    }
    for finding in findings {
        let severity = match finding.severity {
            Severity::Critical => ui::red("critical"),
            Severity::Warning => ui::yellow("warning "),
            Severity::Note => ui::dim("note    "),
        };
        ui::out(format!("{severity}  {}  {}  {}", ui::bold(&finding.resource), finding.kind, ui::dim(&finding.place)));
        ui::out(format!("          {}", finding.why));
        ui::out(format!("          → {}", finding.fix));
    }
}

/// One interface's answer.
struct Answer {
    interface: String,
    direction: Direction,
    verdict: Verdict,
}

fn word(verdict: &Verdict) -> String {
    if verdict.is_allow() { ui::green("✓ allow") } else { ui::red("✗ deny") }
}

pub fn explain(context: &Context, question: &cli::Question) -> Result<u8, Failure> {
    let checked = posture::load(context.global.posture.as_deref())?;
    let protocol: Protocol =
        question.protocol.parse().map_err(|e: keepwall_core::ProtocolError| Failure::plain(e.to_string()))?;
    let Protocol::Number(number) = protocol else {
        return Err(Failure::plain("a packet has one protocol; `all` is for rules"));
    };
    if protocol.has_ports() && question.port.is_none() {
        return Err(Failure::new(format!("{protocol} needs a port"), "add --port, or --protocol icmp"));
    }
    let from = ends(&checked, &question.from)?;
    let to = ends(&checked, &question.to)?;
    let mut asked = Vec::new();
    for source in &from {
        for target in to.iter().filter(|t| Family::of(t.address) == Family::of(source.address)) {
            if protocol.family().is_some_and(|f| f != Family::of(source.address)) {
                continue;
            }
            asked.push((source, target, answers(&checked, source, target, number, question)));
        }
    }
    if asked.is_empty() {
        return Err(Failure::new(
            format!("{} and {} have no address family in common for {protocol}", question.from, question.to),
            "name addresses of one family; icmp is IPv4, icmpv6 is IPv6",
        ));
    }
    if context.global.json {
        let rows: Vec<_> = (asked.iter())
            .map(|(source, target, answers)| {
                serde_json::json!({
                    "from": source.address, "to": target.address, "protocol": protocol.to_string(), "port": question.port,
                    "allowed": answers.iter().all(|a| a.verdict.is_allow()),
                    "steps": answers.iter().map(|a| serde_json::json!({
                        "interface": a.interface, "direction": a.direction, "allow": a.verdict.is_allow(),
                        "reason": a.verdict.reason().to_string(),
                    })).collect::<Vec<_>>(),
                })
            })
            .collect();
        ui::json(&rows);
        return Ok(0);
    }
    for (source, target, answers) in &asked {
        let allowed = answers.iter().all(|a| a.verdict.is_allow());
        let port = question.port.map_or(String::new(), |p| format!(" port {p}"));
        let mark = if allowed { ui::green("✓ allowed") } else { ui::red("✗ denied") };
        ui::out(format!("{mark}  {protocol}{port} from {} to {}", source.name(), target.name()));
        if answers.is_empty() {
            ui::out("    neither end is an interface of this posture, so nothing here decides it");
        }
        for answer in answers {
            ui::out(format!(
                "    {} {}: {}: {}",
                answer.interface,
                answer.direction,
                word(&answer.verdict),
                answer.verdict.reason()
            ));
            if let Reason::Default(_) = answer.verdict.reason()
                && !answer.verdict.is_allow()
            {
                let (side, key, peer) = match answer.direction {
                    Direction::Ingress => ("ingress", "from", source.address),
                    Direction::Egress => ("egress", "to", target.address),
                };
                let ports = question.port.map_or(String::new(), |p| format!(", ports: {p}"));
                ui::out(ui::dim(&format!(
                    "      to allow it, add under {side}: - {{ policy: accept, protocol: {protocol}{ports}, {key}: {peer} }}"
                )));
            }
        }
    }
    Ok(0)
}

/// One end of a question: an address, and whose it is.
struct End {
    address: IpAddr,
    /// Instance and interface, if it is one of the posture's.
    at: Option<(usize, usize)>,
    label: String,
}

impl End {
    fn name(&self) -> String {
        if self.at.is_some() { format!("{} ({})", self.label, self.address) } else { self.address.to_string() }
    }
}

fn ends(checked: &Checked, text: &str) -> Result<Vec<End>, Failure> {
    let spec = checked.spec();
    let mut out = Vec::new();
    let address: Option<IpAddr> = text.parse().ok();
    for (i, instance) in spec.instances.iter().enumerate() {
        for (n, interface) in instance.interfaces.iter().enumerate() {
            let label = format!("{}/{}", instance.name, interface.name);
            for own in &interface.addresses {
                if instance.name == text || label == text || address == Some(*own) {
                    out.push(End { address: *own, at: Some((i, n)), label: label.clone() });
                }
            }
            // Behind a public address stands the private one that rules see.
            if let (Some(address), Some(private)) = (address, interface.addresses.first())
                && interface.public.contains(&address)
            {
                out.push(End { address: *private, at: Some((i, n)), label: label.clone() });
            }
            // An instance whose addresses nobody wrote down is still its own interface.
            if interface.addresses.is_empty() && (instance.name == text || label == text) {
                for address in [IpAddr::from([0, 0, 0, 0]), IpAddr::from([0u16; 8])] {
                    out.push(End { address, at: Some((i, n)), label: label.clone() });
                }
            }
        }
    }
    if let (Some(address), true) = (address, out.is_empty()) {
        out.push(End { address, at: None, label: String::new() });
    }
    if !out.is_empty() {
        return Ok(out);
    }
    let names: Vec<&str> = spec.instances.iter().map(|i| i.name.as_str()).collect();
    let help = match keepwall_core::nearest(text, names.iter().copied()) {
        Some(near) => format!("did you mean {near}?"),
        None => format!("instances: {}", names.join(", ")),
    };
    Err(Failure::new(format!("`{text}` is neither an address nor an instance of the posture"), help))
}

fn answers(checked: &Checked, source: &End, target: &End, protocol: u8, question: &cli::Question) -> Vec<Answer> {
    let mut out = Vec::new();
    for (end, other, direction) in [(source, target, Direction::Egress), (target, source, Direction::Ingress)] {
        let Some((instance, interface)) = end.at else { continue };
        let packet = Packet {
            direction,
            peer: other.address,
            local: end.address,
            protocol,
            source_port: question.source_port,
            destination_port: question.port.unwrap_or(0),
            icmp: match protocol {
                1 => Some((8, 0)),
                58 => Some((128, 0)),
                _ => None,
            },
        };
        let verdict = evaluate(checked, instance, interface, &packet);
        out.push(Answer { interface: end.label.clone(), direction, verdict });
    }
    out
}

pub fn reach(context: &Context, args: &cli::Reach) -> Result<u8, Failure> {
    let checked = posture::load(context.global.posture.as_deref())?;
    let matrix = matrix(&checked);
    let fits = |wanted: &Option<String>, name: &str| wanted.as_ref().is_none_or(|w| w == name);
    let rows: Vec<_> =
        matrix.into_iter().filter(|((from, to), _)| fits(&args.from, from) && fits(&args.to, to)).collect();
    if context.global.json {
        let rows: Vec<_> =
            (rows.iter()).map(|((from, to), what)| serde_json::json!({ "from": from, "to": to, "on": what })).collect();
        ui::json(&rows);
        return Ok(0);
    }
    if rows.is_empty() {
        ui::out("Nobody reaches anybody.");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|((from, to), what)| vec![from, "→".into(), to, what.into_iter().collect::<Vec<_>>().join(", ")])
        .collect();
    ui::table(&["From", "", "To", "On"], &rows);
    ui::out(ui::dim(legend(&rows)));
    Ok(0)
}

/// What a reach table leaves unsaid; `(part)` is explained where it stands.
pub fn legend(rows: &[Vec<String>]) -> &'static str {
    let part = rows.iter().any(|row| row.last().is_some_and(|on| on.contains("(part)")));
    if part {
        "(part): only some of those addresses. What is not listed is denied."
    } else {
        "What is not listed is denied."
    }
}

#[cfg(test)]
mod tests {
    use super::legend;

    #[test]
    fn the_legend_explains_only_what_the_table_has() {
        let row = |on: &str| vec!["web".to_owned(), "→".to_owned(), "db".to_owned(), on.to_owned()];
        assert!(!legend(&[row("tcp 80")]).contains("(part)"));
        assert!(legend(&[row("tcp 80"), row("tcp 22 (part), tcp 443")]).contains("(part)"));
    }
}
