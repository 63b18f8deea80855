//! Plan, apply, confirm, revert: every change is shown, applied whole, and takes itself back unless it is confirmed.

use std::collections::BTreeMap;
use std::io::{BufRead, IsTerminal};
use std::path::Path;

use keepwall_core::Generation;
use keepwall_link::{Applied, ForeignDrop, Request, Response, Status};
use keepwall_secgroup::check::Checked;
use keepwall_secgroup::intent::{Intent, IntentRule, resolve};
use keepwall_secgroup::reach::{ReachChange, difference, machine_matrix};
use keepwall_secgroup::spec::{Direction, Policy};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Context;
use crate::agent::unexpected;
use crate::cli;
use crate::failure::Failure;
use crate::posture;
use crate::ui;

/// The format of a saved plan.
const FORMAT: u32 = 1;
/// A saved plan is never larger than a frame to the agent.
const PLAN_BYTES_MAX: u64 = keepwall_link::FRAME_BYTES_MAX as u64;

/// A plan as it is saved: what was shown is what is applied.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    format: u32,
    /// The generation that it was made against.
    base: Generation,
    intent: Intent,
    /// Of the intent, so that a plan edited by hand is not mistaken for one that was shown.
    digest: String,
}

fn digest(intent: &Intent) -> Result<String, Failure> {
    let bytes = serde_json::to_vec(intent).map_err(|e| Failure::plain(e.to_string()))?;
    Ok(Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect())
}

/// A rule that appears, goes, or stays with another meaning is one of each.
#[derive(Serialize)]
struct RuleChange {
    interface: String,
    direction: Direction,
    added: bool,
    rule: String,
    id: String,
    place: String,
}

/// The difference that a plan makes.
#[derive(Serialize)]
struct Difference {
    rules: Vec<RuleChange>,
    reach: Vec<ReachChangeRow>,
    other: Vec<String>,
}

#[derive(Serialize)]
struct ReachChangeRow {
    from: String,
    to: String,
    what: String,
    opened: bool,
}

impl Difference {
    fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.reach.is_empty() && self.other.is_empty()
    }
}

pub fn say_rule(rule: &IntentRule, direction: Direction) -> String {
    let policy = if rule.policy == Policy::Accept { "accept" } else { "drop" };
    let ports = rule.ports.map(|r| if r.first() == r.last() { format!(" {}", r.first()) } else { format!(" {r}") });
    let arrow = if direction == Direction::Ingress { "from" } else { "to" };
    let mut text = format!("{policy} {}{} {arrow} {}", rule.protocol, ports.unwrap_or_default(), rule.peer);
    if let Some(local) = rule.local {
        text.push_str(&format!(" ({} {local})", if direction == Direction::Ingress { "to" } else { "from" }));
    }
    if let Some(source) = rule.source_ports {
        text.push_str(&format!(" source ports {source}"));
    }
    format!("{text} · priority {}", rule.priority)
}

fn compare(before: Option<&Intent>, after: &Intent) -> Difference {
    let key = |a: &str, d: Direction, r: &IntentRule| (a.to_owned(), d == Direction::Egress, r.id.clone());
    let index = |intent: Option<&Intent>| -> BTreeMap<(String, bool, String), (Direction, IntentRule)> {
        let mut out = BTreeMap::new();
        for attachment in intent.into_iter().flat_map(|i| &i.attachments) {
            for direction in Direction::BOTH {
                for rule in attachment.rules(direction) {
                    out.insert(key(&attachment.name, direction, rule), (direction, rule.clone()));
                }
            }
        }
        out
    };
    let (old, new) = (index(before), index(Some(after)));
    let mut rules = Vec::new();
    for (from, to, added) in [(&old, &new, false), (&new, &old, true)] {
        for ((interface, _, id), (direction, rule)) in from.iter().filter(|(key, _)| !to.contains_key(*key)) {
            rules.push(RuleChange {
                interface: interface.clone(),
                direction: *direction,
                added,
                rule: say_rule(rule, *direction),
                id: id.clone(),
                place: rule.place.to_string(),
            });
        }
    }
    rules.sort_by(|a, b| {
        (&a.interface, a.direction, &a.rule, a.added).cmp(&(&b.interface, b.direction, &b.rule, b.added))
    });
    let empty;
    let old_intent = match before {
        Some(intent) => intent,
        None => {
            empty = Intent::empty(&after.instance);
            &empty
        }
    };
    let reach = match before {
        // Nothing enforced is everything open: the list of what ends would be endless.
        None => Vec::new(),
        Some(_) => difference(&machine_matrix(old_intent, Some(after)), &machine_matrix(after, Some(old_intent))),
    };
    let reach = reach
        .into_iter()
        .map(|ReachChange { from, to, what, opened }| ReachChangeRow { from, to, what, opened })
        .collect();
    let mut other = Vec::new();
    let names = |intent: &Intent| -> Vec<String> {
        intent.attachments.iter().map(|a| format!("{} on {}", a.name, a.device)).collect()
    };
    let (was, is) = (names(old_intent), names(after));
    other.extend(is.iter().filter(|n| !was.contains(n)).map(|n| format!("interface {n} becomes protected")));
    other.extend(was.iter().filter(|n| !is.contains(n)).map(|n| format!("interface {n} is no longer protected")));
    for (name, members) in &after.sets {
        if let Some(old) = old_intent.sets.get(name)
            && old != members
        {
            let text = |prefixes: &[keepwall_core::Prefix], not: &[keepwall_core::Prefix], sign: &str| -> String {
                prefixes.iter().filter(|p| !not.contains(p)).map(|p| format!(" {sign}{p}")).collect()
            };
            other.push(format!("{name}:{}{}", text(members, old, "+"), text(old, members, "-")));
        }
    }
    if before.is_some() {
        if old_intent.observe != after.observe {
            other.push(
                if after.observe { "observe only: nothing is dropped" } else { "enforce: what is denied is dropped" }
                    .into(),
            );
        }
        let settings = |i: &Intent| {
            (i.on_deny, i.session_idle_s, i.service_prefixes.clone(), i.block_outbound_smtp, i.flow_log_per_s)
        };
        if settings(old_intent) != settings(after) {
            other.push("settings change".into());
        }
        if other.is_empty() && rules.is_empty() && old_intent != after {
            // Places, labels, limits: nothing that a packet notices, but the record should say the same as the file.
            let same_rules = old_intent.attachments.iter().zip(&after.attachments).all(|(a, b)| {
                a.default_policy(Direction::Egress) == b.default_policy(Direction::Egress) && a.inner == b.inner
            });
            if !same_rules {
                other.push("group types or intra-group access change".into());
            }
        }
    }
    Difference { rules, reach, other }
}

fn show(before: Option<&Intent>, after: &Intent, difference: &Difference) {
    ui::out(format!("{} {}", ui::bold("Instance"), after.instance));
    for text in &difference.other {
        ui::out(format!("  {} {text}", ui::yellow("~")));
    }
    if !difference.rules.is_empty() {
        ui::out("");
        ui::out(ui::bold("Rules"));
        let mut last = String::new();
        for change in &difference.rules {
            let heading = format!("{} {}", change.interface, change.direction);
            if heading != last {
                ui::out(format!("  {heading}"));
                last = heading;
            }
            let (sign, rule) =
                if change.added { (ui::green("+"), change.rule.clone()) } else { (ui::red("-"), change.rule.clone()) };
            ui::out(format!("    {sign} {rule}  {}", ui::dim(&change.place)));
        }
    }
    match before {
        None => {
            ui::out("");
            ui::out(ui::bold("Who can reach what, once this is applied (now: nothing is enforced)"));
            let rows: Vec<Vec<String>> = machine_matrix(after, None)
                .into_iter()
                .map(|((from, to), what)| {
                    vec![format!("  {from}"), "→".into(), to, what.into_iter().collect::<Vec<_>>().join(", ")]
                })
                .collect();
            ui::table(&["  From", "", "To", "On"], &rows);
        }
        Some(_) if !difference.reach.is_empty() => {
            ui::out("");
            ui::out(ui::bold("Who can reach what"));
            let rows: Vec<Vec<String>> = (difference.reach.iter())
                .map(|c| {
                    let sign = if c.opened { ui::green("+ opens ") } else { ui::red("- closes") };
                    vec![format!("  {sign}"), c.from.clone(), "→".into(), c.to.clone(), c.what.clone()]
                })
                .collect();
            ui::table(&["  Change", "From", "", "To", "On"], &rows);
        }
        Some(_) => {}
    }
}

fn current(context: &Context) -> Result<(Option<Intent>, Status), Failure> {
    let status = status(context)?;
    match context.agent.ask(Request::Intent)? {
        Response::Intent(intent) => Ok((intent.map(|i| *i), status)),
        other => Err(unexpected(&other)),
    }
}

pub fn status(context: &Context) -> Result<Status, Failure> {
    match context.agent.ask(Request::Status)? {
        Response::Status(status) => Ok(*status),
        other => Err(unexpected(&other)),
    }
}

fn make(context: &Context, observe: bool) -> Result<(Checked, Intent, usize), Failure> {
    let checked = posture::load(context.global.posture.as_deref())?;
    let tests = posture::tests_pass(&checked)?;
    let name = posture::instance(&checked, context.global.instance.as_deref())?;
    let mut intent = resolve(&checked, &name).map_err(|error| Failure::plain(error.to_string()))?;
    intent.observe = observe;
    Ok((checked, intent, tests))
}

/// An intent without the places where its rules stand: a comment added above a rule changes no packet.
fn placeless(intent: &Intent) -> Intent {
    let mut intent = intent.clone();
    for attachment in &mut intent.attachments {
        for rule in attachment.ingress.iter_mut().chain(&mut attachment.egress) {
            rule.place = keepwall_core::Place::default();
        }
    }
    intent
}

/// True if more changes than where rules are written.
pub fn changes(before: Option<&Intent>, after: &Intent) -> bool {
    before.map(placeless) != Some(placeless(after))
}

/// Tells the agent where rules are written now; nothing is dropped, let in or cut by that.
fn move_places(context: &Context, intent: Intent, base: Generation) -> Result<(), Failure> {
    let request = Request::Apply(Box::new(keepwall_link::Apply {
        intent,
        base: Some(base),
        confirm_within_s: None,
        danger_cut_session: true,
        note: "rules moved within the file".into(),
        fleet: None,
    }));
    match context.agent.ask(request)? {
        Response::Applied(_) => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// A machine of a fleet is not planned for by hand: what would be shown could not be applied.
fn must_be_its_own(context: &Context) -> Result<(), Failure> {
    let Some(server) = status(context)?.server else { return Ok(()) };
    let own = context.global.socket.with_file_name("server.sock");
    let help = match own.exists() {
        true => format!("ask its own server: keepwall --server unix:{} …; or keepwall leave", own.display()),
        false => "choose that server (keepwall context add); or take this machine out: keepwall leave".to_owned(),
    };
    Err(Failure::new(format!("this machine is in the fleet of {server}, which decides what is enforced here"), help))
}

pub fn plan(context: &Context, args: &cli::Plan) -> Result<u8, Failure> {
    must_be_its_own(context)?;
    let (_, intent, tests) = make(context, args.observe)?;
    let (before, status) = current(context)?;
    let difference = compare(before.as_ref(), &intent);
    let changed = changes(before.as_ref(), &intent);
    if context.global.json {
        ui::json(&serde_json::json!({
            "instance": intent.instance, "base": status.generation, "changed": changed, "difference": difference,
        }));
    } else if !changed {
        ui::out(format!("{} The machine enforces this posture already ({}).", ui::green("✓"), status.generation));
    } else {
        show(before.as_ref(), &intent, &difference);
        if difference.is_empty() && before.is_some() {
            ui::out("  Only names or limits change; no packet is treated differently.");
        }
        ui::out("");
        let (added, removed) =
            (difference.rules.iter().filter(|r| r.added).count(), difference.rules.iter().filter(|r| !r.added).count());
        let tests = match tests {
            0 => "the posture has no tests".to_owned(),
            n => format!("{n} policy tests pass"),
        };
        ui::out(format!(
            "Plan: {} to add, {} to remove; {tests}.",
            ui::green(&added.to_string()),
            ui::red(&removed.to_string())
        ));
    }
    if let Some(path) = &args.out {
        let saved = Saved { format: FORMAT, base: status.generation, digest: digest(&intent)?, intent };
        let text = serde_json::to_string(&saved).map_err(|e| Failure::plain(e.to_string()))?;
        posture::write(path, &text)?;
        ui::say(format!("Saved. Apply exactly this with: keepwall apply {}", path.display()));
    }
    Ok(if args.detailed_exitcode && changed { 2 } else { 0 })
}

fn read_plan(path: &Path) -> Result<Saved, Failure> {
    let bad = |why: String| {
        Failure::new(format!("{}: {why}", path.display()), "make a new plan with `keepwall plan --out FILE`")
    };
    let size = std::fs::metadata(path).map_err(|e| bad(e.to_string()))?.len();
    if size > PLAN_BYTES_MAX {
        return Err(bad(format!("{size} bytes are more than any plan has")));
    }
    let text = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
    let saved: Saved = serde_json::from_slice(&text).map_err(|e| bad(format!("not a saved plan: {e}")))?;
    if saved.format != FORMAT {
        return Err(bad(format!("a plan of format {}; this version knows {FORMAT}", saved.format)));
    }
    if digest(&saved.intent)? != saved.digest {
        return Err(bad("the plan was changed after it was made".into()));
    }
    saved.intent.validate().map_err(bad)?;
    Ok(saved)
}

/// Asks a person; without a terminal there is nobody to ask.
pub fn agreed(question: &str, yes: bool) -> Result<bool, Failure> {
    if yes {
        return Ok(true);
    }
    if !std::io::stdin().is_terminal() {
        return Err(Failure::new(
            format!("nobody is at a terminal to answer: {question}"),
            "nothing was changed; look at what it would do, then add --yes",
        ));
    }
    ui::say(format!("{question} [y/N] "));
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let agreed = matches!(line.trim().to_lowercase().as_str(), "y" | "yes");
    if !agreed {
        ui::say("Nothing was changed.");
    }
    Ok(agreed)
}

pub fn apply(context: &Context, args: &cli::Apply) -> Result<u8, Failure> {
    if !args.pace.is_usual() {
        return Err(Failure::new(
            "waves are for a fleet, and no server is chosen",
            "choose one with --server, --context or `keepwall context use`; or leave them out for this machine",
        ));
    }
    must_be_its_own(context)?;
    let (before, status) = current(context)?;
    let (intent, base) = match &args.plan {
        Some(path) => {
            let saved = read_plan(path)?;
            (saved.intent, saved.base)
        }
        None => (make(context, args.observe)?.1, status.generation),
    };
    let difference = compare(before.as_ref(), &intent);
    if !changes(before.as_ref(), &intent) && status.pending.is_none() {
        if before.as_ref() != Some(&intent) {
            move_places(context, intent, base)?;
        }
        ui::out(format!("{} The machine enforces this posture already ({}).", ui::green("✓"), status.generation));
        return Ok(0);
    }
    if !context.global.json {
        show(before.as_ref(), &intent, &difference);
        ui::out("");
    }
    if !agreed("Apply this?", args.yes)? {
        return Ok(1);
    }
    let request = Request::Apply(Box::new(keepwall_link::Apply {
        intent,
        base: Some(base),
        confirm_within_s: (!args.danger_no_confirm).then_some(args.confirm_within),
        danger_cut_session: args.danger_cut_session,
        note: args.note.clone(),
        fleet: None,
    }));
    let applied = match context.agent.ask(request)? {
        Response::Applied(applied) => applied,
        other => return Err(unexpected(&other)),
    };
    let foreign = foreign(context);
    if context.global.json {
        ui::json(&serde_json::json!({ "applied": applied, "dropped_by_others": foreign }));
    } else {
        say_applied(&applied);
        say_foreign(&foreign);
    }
    Ok(0)
}

fn say_applied(applied: &Applied) {
    ui::out(format!("{} Applied: {} is in force.", ui::green("✓"), applied.generation));
    if applied.sessions_cut > 0 {
        let s = if applied.sessions_cut == 1 { "" } else { "s" };
        ui::out(format!(
            "  {} established session{s} ended: the change denies what {} allowed.",
            applied.sessions_cut,
            if s.is_empty() { "was" } else { "were" }
        ));
    }
    for warning in &applied.warnings {
        ui::out(format!("  {} {warning}", ui::yellow("!")));
    }
    if let Some(seconds) = applied.confirm_within_s {
        ui::out("");
        ui::out(format!("{} It reverts by itself in {seconds} seconds.", ui::yellow("Not permanent yet.")));
        ui::out("  To keep it: open a new session to this machine, and run there");
        ui::out(ui::bold("    keepwall confirm"));
        ui::out("  If you cannot get in, do nothing: the old rules come back.");
    }
}

/// What other tables do with what ours allow; empty if that cannot be found out.
pub fn foreign(context: &Context) -> Vec<ForeignDrop> {
    match context.agent.ask(Request::Foreign) {
        Ok(Response::Foreign(drops)) => drops,
        _ => Vec::new(),
    }
}

pub fn say_foreign(drops: &[ForeignDrop]) {
    if drops.is_empty() {
        return;
    }
    ui::out("");
    ui::out(ui::yellow("Another firewall on this machine drops what these rules allow:"));
    const SHOWN: usize = 12;
    for drop in drops.iter().take(SHOWN) {
        let rule = drop.rule.map_or("its policy".to_owned(), |n| format!("rule {n}"));
        let sure = if drop.certain { "drops" } else { "may drop" };
        ui::out(format!(
            "  table {} chain {} ({rule}) {sure} {}  — allowed by {}",
            drop.table, drop.chain, drop.example, drop.ours
        ));
    }
    if drops.len() > SHOWN {
        ui::out(format!("  … and {} more (keepwall status --json)", drops.len() - SHOWN));
    }
    ui::out("  Keepwall never touches other tables: allow it there too, or retire that firewall.");
}

pub fn confirm(context: &Context, args: &cli::Confirm) -> Result<u8, Failure> {
    let Some(pending) = status(context)?.pending else {
        return Err(Failure::new("nothing waits for a confirmation", "see `keepwall status`"));
    };
    let request = Request::Confirm { generation: pending.generation, danger_same_session: args.danger_same_session };
    done(context, request)
}

pub fn revert(context: &Context) -> Result<u8, Failure> {
    done(context, Request::Revert { generation: None })
}

pub fn remove(context: &Context, yes: bool) -> Result<u8, Failure> {
    if !agreed("Stop enforcing on this machine? Everything that listens becomes reachable again.", yes)? {
        return Ok(1);
    }
    done(context, Request::Remove)
}

fn done(context: &Context, request: Request) -> Result<u8, Failure> {
    match context.agent.ask(request)? {
        Response::Done(text) if context.global.json => ui::json(&serde_json::json!({ "done": text })),
        Response::Done(text) => ui::out(format!("{} {text}.", ui::green("✓"))),
        other => return Err(unexpected(&other)),
    }
    Ok(0)
}
