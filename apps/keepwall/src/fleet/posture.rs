//! The posture of a fleet: asked about, declared, looked back at.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path};

use keepwall_api::{PostureChange, PostureFile, PostureQuestion, PostureVersion, Report, ReturnChange};
use keepwall_client::{Client, ListPosturesQuery, Tagged};

use super::{Server, count, pages, rollouts, some};
use crate::Context;
use crate::cli;
use crate::failure::Failure;
use crate::plan::agreed;
use crate::{posture, time, ui};

/// Reachability changes and findings that are shown; `--json` has all.
const SHOWN_MAX: usize = 40;

/// The posture's files here, by the names that the server gives them: as seen from the posture's own place.
fn local(context: &Context) -> Result<Vec<PostureFile>, Failure> {
    let root = posture::locate(context.global.posture.as_deref())?;
    let files = posture::read(&root)?;
    let name = |file: &keepwall_posture::SourceFile| -> String {
        let path = Path::new(&*file.name);
        let inside = path.strip_prefix(&root).ok().filter(|rest| !rest.as_os_str().is_empty());
        let alone = || path.file_name().map(Path::new);
        inside.or_else(alone).unwrap_or(path).display().to_string()
    };
    Ok(files.into_iter().map(|file| PostureFile { name: name(&file), text: file.text }).collect())
}

fn ask(client: &Client, files: &[PostureFile]) -> Result<Report, Failure> {
    Ok(client.check_posture(&PostureQuestion { files: files.to_vec() })?)
}

/// Shows every problem and every failed test; if there is one, nothing goes on.
fn must_hold(files: &[PostureFile], report: &Report) -> Result<(), Failure> {
    for problem in &report.problems {
        let line = |place: &str| -> Option<(String, usize, usize)> {
            let mut parts = place.rsplitn(3, ':');
            let (column, line, name) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
            Some((name.to_owned(), line, column))
        };
        let text = line(&problem.place).and_then(|(name, line, column)| {
            let file = files.iter().find(|file| file.name == name)?;
            Some((file.text.lines().nth(line.checked_sub(1)?)?.to_owned(), line, column))
        });
        ui::say(posture::with_line(
            &problem.place,
            &problem.message,
            text.as_ref().map(|(t, l, c)| (t.as_str(), *l, *c)),
            &problem.help,
        ));
    }
    if !report.problems.is_empty() {
        return Err(posture::refusal(report.problems.len()));
    }
    let failed: Vec<_> = report.tests.iter().filter(|test| !test.holds).collect();
    for test in &failed {
        ui::say(format!("{} {}: {}\n    {}", ui::red("✗ failed"), test.place, test.test, test.why));
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failure {
        message: format!("{} of {} tests of the posture fail; nothing was changed", failed.len(), report.tests.len()),
        help: "change the rules, or the test if it is wrong (`keepwall test` runs them alone)".into(),
        code: 3,
    })
}

fn worth(report: &Report) -> u64 {
    report.findings.iter().filter(|finding| !matches!(finding.severity.as_str(), "info" | "low")).count() as u64
}

pub fn check(context: &Context, server: &Server) -> Result<u8, Failure> {
    let files = local(context)?;
    let report = ask(&server.client, &files)?;
    if context.global.json {
        ui::json(&report);
        return Ok(code(&report));
    }
    must_hold(&files, &report)?;
    ui::out(format!(
        "{} The posture is valid for the fleet at {}: {}, {} pass.",
        ui::green("✓"),
        server.label(),
        count(files.len() as u64, "file"),
        count(report.tests.len() as u64, "test")
    ));
    say_findings(&report);
    Ok(0)
}

/// 1 for problems, 3 for failed tests.
fn code(report: &Report) -> u8 {
    match (report.problems.is_empty(), report.holds()) {
        (false, _) => 1,
        (true, false) => 3,
        (true, true) => 0,
    }
}

pub fn test(context: &Context, server: &Server) -> Result<u8, Failure> {
    let files = local(context)?;
    let report = ask(&server.client, &files)?;
    if context.global.json {
        ui::json(&report.tests);
        return Ok(code(&report));
    }
    must_hold(&files, &Report { tests: Vec::new(), ..report.clone() })?;
    for test in &report.tests {
        if test.holds {
            ui::out(format!("{} {}", ui::green("✓"), test.test));
        } else {
            ui::out(format!("{} {}  {}", ui::red("✗"), test.test, ui::dim(&test.place)));
            ui::out(format!("    {}", test.why));
        }
    }
    let failed = report.tests.iter().filter(|test| !test.holds).count();
    ui::out(format!("{} passed, {failed} failed", report.tests.len() - failed));
    Ok(code(&report))
}

/// Rules of the declared posture that do nothing, do too much, or were never needed.
pub fn health(context: &Context, server: &Server) -> Result<u8, Failure> {
    let found = server.client.get_posture()?;
    let report = ask(&server.client, found.files.as_deref().unwrap_or_default())?;
    let bad = worth(&report) > 0;
    if context.global.json {
        ui::json(&report.findings);
    } else if report.findings.is_empty() {
        ui::out(format!("{} Nothing to say: every rule decides something, and none is wide open.", ui::green("✓")));
    } else {
        say_findings(&report);
    }
    Ok(if bad { 3 } else { 0 })
}

fn say_findings(report: &Report) {
    for finding in report.findings.iter().take(SHOWN_MAX) {
        let severity = match finding.severity.as_str() {
            "critical" | "high" => ui::red(&format!("{:<8}", finding.severity)),
            "medium" => ui::yellow("medium  "),
            other => ui::dim(&format!("{other:<8}")),
        };
        ui::out(format!("{severity}  {}  {}", finding.message, ui::dim(&finding.place)));
        if !finding.help.is_empty() {
            ui::out(format!("          → {}", finding.help));
        }
    }
    more(report.findings.len());
}

fn more(all: usize) {
    if all > SHOWN_MAX {
        ui::out(ui::dim(&format!("  … and {} more (--json has all)", all - SHOWN_MAX)));
    }
}

/// What a change would do.
struct Planned {
    files: Vec<PostureFile>,
    before: Tagged<PostureVersion>,
    report: Report,
}

impl Planned {
    fn make(context: &Context, server: &Server) -> Result<Planned, Failure> {
        let files = local(context)?;
        let before = server.client.get_posture()?;
        let report = ask(&server.client, &files)?;
        Ok(Planned { files, before, report })
    }

    fn there(&self) -> BTreeMap<&str, &str> {
        let files = self.before.files.iter().flatten();
        files.map(|file| (file.name.as_str(), file.text.as_str())).collect()
    }

    fn here(&self) -> BTreeMap<&str, &str> {
        self.files.iter().map(|file| (file.name.as_str(), file.text.as_str())).collect()
    }

    fn changes(&self) -> bool {
        self.there() != self.here()
    }

    fn show(&self, server: &Server) {
        let revision = match self.before.revision {
            0 => "nothing was declared before".to_owned(),
            n => format!("now revision {n}, by {}, {}", self.before.actor, time::when(&self.before.time)),
        };
        ui::out(format!("{} {} ({revision})", ui::bold("Fleet"), server.label()));
        let (old, new) = (self.there(), self.here());
        for name in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
            match (old.get(name), new.get(name)) {
                (None, Some(_)) => ui::out(format!("  {} {name} is new", ui::green("+"))),
                (Some(_), None) => ui::out(format!("  {} {name} goes: it is not among your files", ui::red("-"))),
                (old, new) if old != new => ui::out(format!("  {} {name} changes", ui::yellow("~"))),
                _ => {}
            }
        }
        show_effect(&self.report, self.before.revision == 0);
    }
}

/// What a change does. Before the first posture everything is open: what that lets through is no change that opens it.
fn show_effect(report: &Report, first: bool) {
    if !report.changed.is_empty() {
        ui::out("");
        ui::out(ui::bold("Machines that change"));
        ui::out(format!("  {}", some_of(&report.changed, report.changed_count)));
    }
    if !report.reach.is_empty() {
        ui::out("");
        ui::out(ui::bold(if first {
            "Who can reach what, once this is applied (now: nothing is enforced)"
        } else {
            "Who can reach what"
        }));
        let rows: Vec<Vec<String>> = (report.reach.iter().take(SHOWN_MAX))
            .map(|change| {
                let sign = match (first, change.opens) {
                    (true, _) => String::new(),
                    (false, true) => ui::green("+ opens "),
                    (false, false) => ui::red("- closes"),
                };
                vec![format!("  {sign}"), change.from.clone(), "→".into(), change.to.clone(), change.on.clone()]
            })
            .collect();
        ui::table(&[if first { "" } else { "  Change" }, "From", "", "To", "On"], &rows);
        more(report.reach.len());
    }
}

fn some_of(names: &[String], all: u64) -> String {
    const NAMES: usize = 12;
    let shown = names.iter().take(NAMES).cloned().collect::<Vec<_>>().join(", ");
    let more = all.saturating_sub(names.len().min(NAMES) as u64);
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}

fn only_for_one_machine(what: &str, asked: bool) -> Result<(), Failure> {
    match asked {
        false => Ok(()),
        true => Err(Failure::new(
            format!("{what} is for one machine, and a server is chosen"),
            "leave it out; or `--context none` for this machine",
        )),
    }
}

pub fn plan(context: &Context, server: &Server, args: &cli::Plan) -> Result<u8, Failure> {
    only_for_one_machine("a saved plan (--out)", args.out.is_some())?;
    only_for_one_machine("--observe", args.observe)?;
    let planned = Planned::make(context, server)?;
    let changed = planned.changes();
    if context.global.json {
        let Planned { before, report, .. } = &planned;
        ui::json(&serde_json::json!({ "base": before.revision, "changed": changed, "report": report }));
        if code(report) != 0 {
            return Ok(code(report));
        }
    } else {
        must_hold(&planned.files, &planned.report)?;
        if changed {
            planned.show(server);
            ui::out("");
            say_plan(&planned.report);
        } else {
            ui::out(format!(
                "{} The fleet at {} is told this posture already (revision {}).",
                ui::green("✓"),
                server.label(),
                planned.before.revision
            ));
        }
    }
    Ok(if args.detailed_exitcode && changed { 2 } else { 0 })
}

fn say_plan(report: &Report) {
    let machines = match report.changed_count {
        0 => "no machine changes".to_owned(),
        1 => "1 machine changes".to_owned(),
        n => format!("{n} machines change"),
    };
    let tests = match report.tests.len() {
        0 => "the posture has no tests".to_owned(),
        1 => "1 policy test passes".to_owned(),
        n => format!("{n} policy tests pass"),
    };
    let look = match worth(report) {
        0 => String::new(),
        1 => "; 1 thing deserves a look: keepwall check".to_owned(),
        n => format!("; {n} things deserve a look: keepwall check"),
    };
    ui::out(format!("Plan: {machines}; {tests}{look}."));
}

pub fn apply(context: &Context, server: &Server, args: &cli::Apply) -> Result<u8, Failure> {
    only_for_one_machine("a saved plan", args.plan.is_some())?;
    only_for_one_machine("--observe", args.observe)?;
    only_for_one_machine("--danger-no-confirm", args.danger_no_confirm)?;
    only_for_one_machine("--danger-cut-session", args.danger_cut_session)?;
    let json = context.global.json;
    let planned = Planned::make(context, server)?;
    if json && code(&planned.report) != 0 {
        ui::json(&serde_json::json!({ "base": planned.before.revision, "report": planned.report }));
        return Ok(code(&planned.report));
    }
    must_hold(&planned.files, &planned.report)?;
    let revision = planned.before.etag.unwrap_or(planned.before.revision);
    if !planned.changes() {
        if json {
            ui::json(&serde_json::json!({ "base": revision, "changed": false }));
        } else {
            ui::out(format!(
                "{} The fleet at {} is told this posture already (revision {revision}); see keepwall status.",
                ui::green("✓"),
                server.label()
            ));
        }
        return Ok(0);
    }
    if !json {
        planned.show(server);
        ui::out("");
        say_plan(&planned.report);
    }
    if !agreed("Tell the fleet?", args.yes)? {
        return Ok(1);
    }
    let change = PostureChange {
        files: planned.files,
        reason: args.note.clone(),
        rollout: args.pace.policy(args.confirm_within),
    };
    let accepted = server.client.put_posture(&change, revision)?;
    sent(json, server, &accepted.rollout, args.pace.detach)
}

/// A change was accepted: watch it, or say how.
pub fn sent(json: bool, server: &Server, rollout: &str, detach: bool) -> Result<u8, Failure> {
    if detach { rollouts::under_way(json, rollout) } else { rollouts::follow(json, &server.client, rollout) }
}

pub fn run(context: &Context, server: &Server, command: &cli::Posture) -> Result<u8, Failure> {
    let (client, json) = (&server.client, context.global.json);
    match command {
        cli::Posture::Show { file: None } => show(json, client),
        cli::Posture::Show { file: Some(name) } => {
            let file = client.get_file(name)?;
            if json {
                ui::json(&file.value);
            } else {
                ui::out(file.text.trim_end());
            }
            Ok(0)
        }
        cli::Posture::History { count } => history(json, client, *count),
        cli::Posture::Diff { revision, to } => diff(json, client, *revision, *to),
        cli::Posture::Return { revision, pace, yes, note } => {
            let before = client.get_posture()?;
            let files = client.get_posture_at(*revision)?.value.files.unwrap_or_default();
            let report = ask(client, &files)?;
            if !json {
                ui::out(format!(
                    "{} {} back to revision {revision} (now {})",
                    ui::bold("Fleet"),
                    server.label(),
                    before.revision
                ));
                show_effect(&report, false);
                ui::out("");
            }
            must_hold(&files, &report)?;
            if !json {
                say_plan(&report);
            }
            if !agreed("Tell the fleet?", *yes)? {
                return Ok(1);
            }
            let usual = keepwall_api::RolloutPolicy::default().confirm_within_s;
            let change = ReturnChange { reason: note.clone(), rollout: pace.policy(usual) };
            let accepted = client.return_to_posture(*revision, &change, Some(before.revision))?;
            sent(json, server, &accepted.rollout, pace.detach)
        }
        cli::Posture::Pull { directory, revision } => pull(json, client, directory, *revision),
    }
}

fn show(json: bool, client: &Client) -> Result<u8, Failure> {
    let found = client.get_posture()?;
    if json {
        ui::json(&found.value);
        return Ok(0);
    }
    if found.revision == 0 {
        ui::out("Nothing is declared yet, so nothing is enforced: write a posture, then keepwall apply.");
        return Ok(0);
    }
    ui::out(format!("{} {}, by {}, {}", ui::bold("Revision"), found.revision, found.actor, time::date(&found.time)));
    if let Some(earlier) = found.returned_to {
        ui::out(format!("  the same as revision {earlier}"));
    }
    if !found.reason.is_empty() {
        ui::out(format!("  {}", found.reason));
    }
    ui::out("");
    let rows: Vec<Vec<String>> = (found.files.iter().flatten())
        .map(|file| vec![file.name.clone(), file.text.lines().count().to_string()])
        .collect();
    ui::table(&["File", "Lines"], &rows);
    ui::out(ui::dim("keepwall posture show FILE prints one; keepwall posture pull DIR fetches all."));
    Ok(0)
}

fn history(json: bool, client: &Client, count: usize) -> Result<u8, Failure> {
    let all = pages(count, |cursor, limit| {
        client.list_postures(&ListPosturesQuery { cursor, limit }).map(|page| (page.items, page.next))
    })?;
    if json {
        ui::json(&all);
        return Ok(0);
    }
    if all.is_empty() {
        ui::out("Nothing was ever declared.");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = (all.into_iter())
        .map(|one| {
            let returned = one.returned_to.map_or(String::new(), |to| format!("returns to {to}; "));
            vec![one.revision.to_string(), time::date(&one.time), one.actor, format!("{returned}{}", one.reason)]
        })
        .collect();
    ui::table(&["Revision", "Declared", "By", "Why"], &rows);
    Ok(0)
}

fn diff(json: bool, client: &Client, revision: u64, to: Option<u64>) -> Result<u8, Failure> {
    let old = client.get_posture_at(revision)?.value;
    let new = match to {
        Some(to) => client.get_posture_at(to)?.value,
        None => client.get_posture()?.value,
    };
    let by_name = |version: &PostureVersion| -> BTreeMap<String, String> {
        version.files.iter().flatten().map(|file| (file.name.clone(), file.text.clone())).collect()
    };
    let (from, into) = (by_name(&old), by_name(&new));
    let names: BTreeSet<&String> = from.keys().chain(into.keys()).filter(|n| from.get(*n) != into.get(*n)).collect();
    if json {
        let rows: Vec<_> = (names.iter())
            .map(|name| serde_json::json!({ "file": name, "before": from.get(*name), "after": into.get(*name) }))
            .collect();
        ui::json(&serde_json::json!({ "from": old.revision, "to": new.revision, "files": rows }));
        return Ok(0);
    }
    if names.is_empty() {
        ui::out(format!("Revisions {} and {} have the same files.", old.revision, new.revision));
    }
    for name in names {
        ui::out(ui::bold(name));
        let text = |files: &BTreeMap<String, String>| files.get(name).cloned().unwrap_or_default();
        for line in line_diff(&text(&from), &text(&into)) {
            match line.chars().next() {
                Some('+') => ui::out(ui::green(&line)),
                Some('-') => ui::out(ui::red(&line)),
                _ => ui::out(ui::dim(&line)),
            }
        }
    }
    Ok(0)
}

/// Lines that stay around what changes.
const AROUND: usize = 2;
/// Cells of the table that finds what two texts share; beyond, what differs is shown as a whole.
const CELLS_MAX: usize = 4_000_000;

/// What goes and what comes, line by line, with a few lines around.
fn line_diff(old: &str, new: &str) -> Vec<String> {
    let (a, b): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let head = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let tail = a[head..].iter().rev().zip(b[head..].iter().rev()).take_while(|(x, y)| x == y).count();
    let (mid_a, mid_b) = (&a[head..a.len() - tail], &b[head..b.len() - tail]);
    let mut out: Vec<String> = a[head.saturating_sub(AROUND)..head].iter().map(|line| format!("  {line}")).collect();
    let mut step = |sign: char, line: &str| out.push(format!("{sign} {line}"));
    if mid_a.len().saturating_mul(mid_b.len()) > CELLS_MAX {
        mid_a.iter().for_each(|line| step('-', line));
        mid_b.iter().for_each(|line| step('+', line));
    } else {
        let width = mid_b.len() + 1;
        // How many lines the rests behind (i, j) share.
        let mut shared = vec![0_u32; (mid_a.len() + 1) * width];
        for i in (0..mid_a.len()).rev() {
            for j in (0..mid_b.len()).rev() {
                shared[i * width + j] = match mid_a[i] == mid_b[j] {
                    true => shared[(i + 1) * width + j + 1] + 1,
                    false => shared[(i + 1) * width + j].max(shared[i * width + j + 1]),
                };
            }
        }
        let (mut i, mut j) = (0, 0);
        while i < mid_a.len() || j < mid_b.len() {
            if i < mid_a.len() && j < mid_b.len() && mid_a[i] == mid_b[j] {
                step(' ', mid_a[i]);
                (i, j) = (i + 1, j + 1);
            } else if j == mid_b.len() || (i < mid_a.len() && shared[(i + 1) * width + j] >= shared[i * width + j + 1])
            {
                step('-', mid_a[i]);
                i += 1;
            } else {
                step('+', mid_b[j]);
                j += 1;
            }
        }
    }
    out.extend(a[a.len() - tail..].iter().take(AROUND).map(|line| format!("  {line}")));
    out
}

/// A name that stays below the directory it is put in.
fn inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

fn pull(json: bool, client: &Client, directory: &Path, revision: Option<u64>) -> Result<u8, Failure> {
    let found = match revision {
        Some(revision) => client.get_posture_at(revision)?.value,
        None => client.get_posture()?.value,
    };
    let files = found.files.unwrap_or_default();
    if files.is_empty() {
        return Err(Failure::new("nothing is declared yet, so there is nothing to fetch", "keepwall apply"));
    }
    if let Some(file) = files.iter().find(|file| !inside(&file.name)) {
        return Err(Failure::new(
            format!("the server has a file `{}`, which would be written elsewhere", file.name),
            "nothing was written",
        ));
    }
    if std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Failure::new(
            format!("{} is not empty; nothing was written", directory.display()),
            "choose a directory that does not exist yet",
        ));
    }
    for file in &files {
        let path = directory.join(&file.name);
        let work = || -> std::io::Result<()> {
            if let Some(above) = path.parent() {
                std::fs::create_dir_all(above)?;
            }
            let mut out = std::fs::File::options().write(true).create_new(true).mode(0o644).open(&path)?;
            out.write_all(file.text.as_bytes())
        };
        work().map_err(|error| Failure::plain(format!("cannot write {}: {error}", path.display())))?;
    }
    if json {
        let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        ui::json(&serde_json::json!({ "revision": found.revision, "directory": directory, "files": names }));
        return Ok(0);
    }
    ui::out(format!(
        "{} Revision {} is in {}: {}. Edit it, then keepwall apply --posture {}",
        ui::green("✓"),
        found.revision,
        directory.display(),
        some(&files.iter().map(|file| file.name.clone()).collect::<Vec<_>>()),
        directory.display()
    ));
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_shows_what_goes_and_comes_with_a_little_around() {
        let old = "a\nb\nc\nd\ne\nf\n";
        let new = "a\nb\nc\nD\ne\nf\ng\n";
        assert_eq!(line_diff(old, new), ["  b", "  c", "- d", "+ D", "  e", "  f", "+ g"]);
        assert_eq!(line_diff("", "x\n"), ["+ x"]);
        assert_eq!(line_diff("x\n", ""), ["- x"]);
        assert!(line_diff(old, old).iter().all(|line| line.starts_with("  ")));
    }

    #[test]
    fn nothing_is_written_outside_the_directory() {
        assert!(inside("web.yaml") && inside("api/security-groups/web.yaml"));
        for bad in ["", "/etc/passwd", "../x", "a/../../x", "./x", ".."] {
            assert!(!inside(bad), "{bad}");
        }
    }
}
