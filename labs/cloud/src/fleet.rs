//! The fleet drill: one server, four machines, and what may go wrong between them.
//!
//! ```text
//!   client   10.77.0.10  (the office) ───┐            ┌── server  10.77.10.10  keepwalld
//!                                        │            ├── web1    10.77.11.10  ┐
//!   attacker 10.77.9.66               ───┼── router ──┼── web2    10.77.12.10  │ keepwall-agent and
//!            203.0.113.66 (stands for    │            ├── db1     10.77.13.10  │ keepwall-uplink each
//!            the Internet)                            └── bastion 10.77.14.10  ┘
//! ```
//!
//! The operator sits at the server and has nothing but `keepwall`. What machines enforce is seen by packets alone.
//!
//! Not shown here: thousands of machines, PostgreSQL, cuts that last for minutes. `labs/fleet` has those.

mod control;

use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::machine::{FLEET, cable, inside, kill_agent, make, start_agent};
use crate::probe::{Probe, arrives};
use crate::prove::start_listeners;
use crate::{Error, Line, Programs};
pub use control::config;
use control::{Server, Told};

/// The machines of the fleet with their labels.
const MEMBERS: [(&str, &[&str]); 4] = [
    ("web1", &["role=web"]),
    ("web2", &["role=web", "canary=yes"]),
    ("db1", &["role=db"]),
    ("bastion", &["role=bastion"]),
];
/// What is first told, before all others.
const CANARY: &str = "web2";
/// What is waited for longest: a machine that lost its server comes back.
const PATIENCE: Duration = Duration::from_secs(45);
/// A machine that is in contact has a change by then.
const AT_ONCE: Duration = Duration::from_secs(10);
/// How long a machine has to prove that a change leaves it in contact; long enough for packets to show what it tries.
const CONFIRM_WITHIN_S: &str = "8";
/// How long the first wave is watched before the next begins; long enough for packets to show the difference.
const SOAK: &str = "4s";
const LOOK_EVERY: Duration = Duration::from_millis(50);

const POSTURE: &str = include_str!("fleet/posture.yaml");
/// Rules that the drill puts in, each where the posture has a comment for it.
const SITE_80: &str = "      - { policy: accept, protocol: tcp, ports: 80, from: any, description: the old site }";
const HEALTH: &str =
    "      - { policy: accept, protocol: tcp, ports: 8080, from: 10.77.0.10, description: health checks }";
const NO_SERVER: &str =
    "    egress:\n      - { policy: drop, protocol: all, to: 10.77.10.0/24, description: nobody is there any more }";

/// A packet and what should become of it.
#[derive(Clone, Copy, Debug)]
struct Want {
    from: &'static str,
    to: &'static str,
    port: u16,
    arrives: bool,
}

const fn allowed(from: &'static str, to: &'static str, port: u16) -> Want {
    Want { from, to, port, arrives: true }
}

const fn denied(from: &'static str, to: &'static str, port: u16) -> Want {
    Want { from, to, port, arrives: false }
}

/// One that is let in and one that is not, for each machine; and what groups let in.
const WANTS: [Want; 12] = [
    allowed("attacker", "web1", 443),
    denied("attacker", "web1", 22),
    allowed("attacker", "web2", 443),
    denied("attacker", "web2", 22),
    allowed("web2", "db1", 3306),
    denied("attacker", "db1", 3306),
    allowed("client", "bastion", 22),
    denied("attacker", "bastion", 22),
    allowed("bastion", "web1", 22),
    denied("web1", "web2", 8080),
    denied("bastion", "db1", 8080),
    denied("client", "db1", 22),
];

/// Where packets of this machine come from, and where they go to: the Internet's for the attacker.
fn address(name: &str) -> &'static str {
    let machine = FLEET.iter().find(|machine| machine.name == name).expect("a machine of this module's own tables");
    machine.extra.first().map_or(machine.addresses[0].0, |(address, _)| address)
}

impl Want {
    fn probe(&self) -> Probe {
        let ip = |name| address(name).parse().expect("an address of this lab's own tables");
        Probe { from: self.from, source: ip(self.from), destination: ip(self.to), protocol: 6, port: self.port }
    }

    fn words(&self, arrived: bool) -> String {
        let what = if arrived { "arrived" } else { "was dropped" };
        format!("{} → {}:{} {what}", self.from, self.to, self.port)
    }
}

/// Tries them all at once; in words, those that are not as they should be.
fn wrong(wants: &[Want]) -> Result<Vec<String>, Error> {
    let arrived: Vec<Result<bool, Error>> = thread::scope(|scope| {
        let threads: Vec<_> = wants.iter().map(|want| scope.spawn(|| arrives(&want.probe()))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a probe failed".into()))).collect()
    });
    let mut out = Vec::new();
    for (want, arrived) in wants.iter().zip(arrived) {
        let arrived = arrived?;
        if arrived != want.arrives {
            out.push(want.words(arrived));
        }
    }
    Ok(out)
}

/// Waits until it is so; how long that took, or nothing if the time is over before.
fn until(within: Duration, mut so: impl FnMut() -> Result<bool, Error>) -> Result<Option<Duration>, Error> {
    let started = Instant::now();
    loop {
        if so()? {
            return Ok(Some(started.elapsed()));
        }
        if started.elapsed() > within {
            return Ok(None);
        }
        sleep(LOOK_EVERY);
    }
}

fn took(what: &str, time: Option<Duration>, within: Duration) -> String {
    match time {
        Some(time) => format!("{what} after {:.1} s", time.as_secs_f32()),
        None => format!("not within {} s: {what}", within.as_secs()),
    }
}

/// A line of a log without its time.
fn words(line: &str) -> String {
    line.split_once("INFO ").map_or(line, |(_, words)| words).to_owned()
}

/// The posture with more rules: `(where, which)`.
fn posture(more: &[(&str, &str)]) -> String {
    more.iter().fold(POSTURE.to_owned(), |text, (place, rule)| {
        let place = format!("#{place}\n");
        text.replace(&place, &format!("{rule}\n{place}"))
    })
}

/// The drill in its course.
struct Drill<'a> {
    programs: &'a Programs,
    server: Server,
    each: &'a mut dyn FnMut(&Line),
    lines: Vec<Line>,
    /// The token that db1 came by.
    used: String,
}

impl Drill<'_> {
    fn line(&mut self, what: &str, expected: &str, good: bool, seen: impl Into<String>) {
        let line = Line { what: what.into(), expected: expected.into(), seen: seen.into(), good };
        (self.each)(&line);
        self.lines.push(line);
    }

    /// A line about packets that are tried now.
    fn packets(&mut self, what: &str, expected: &str, wants: &[Want]) -> Result<(), Error> {
        let wrong = wrong(wants)?;
        let seen = match wants {
            _ if !wrong.is_empty() => wrong.join(", "),
            [want] => want.words(want.arrives),
            _ => format!("{} packets, all so", wants.len()),
        };
        self.line(what, expected, wrong.is_empty(), seen);
        Ok(())
    }

    /// A line about packets that are tried until they are as they should be.
    fn packets_within(&mut self, what: &str, expected: &str, within: Duration, wants: &[Want]) -> Result<(), Error> {
        let time = until(within, || Ok(wrong(wants)?.is_empty()))?;
        let words: Vec<String> = wants.iter().map(|want| want.words(want.arrives)).collect();
        self.line(what, expected, time.is_some(), took(&words.join(", "), time, within));
        Ok(())
    }

    fn keepwall(&self, arguments: &[&str]) -> Result<Told, Error> {
        self.server.operator(self.programs, arguments)
    }

    fn json(&self, arguments: &[&str]) -> Result<Value, Error> {
        self.keepwall(&[arguments, &["--json"]].concat())?.json()
    }

    /// What the server knows of a machine.
    fn status(&self, name: &str) -> Result<Value, Error> {
        Ok(self.json(&["instance", "show", name])?["status"].clone())
    }

    /// Waits until the server's summary says so of all machines.
    fn all(&self, key: &str) -> Result<Option<Duration>, Error> {
        until(PATIENCE, || Ok(self.json(&["status"])?["summary"][key] == MEMBERS.len()))
    }

    fn newest_rollout(&self) -> Result<Value, Error> {
        self.json(&["rollout", "show"])
    }

    fn rollout_is(&self, state: &str) -> Result<Option<Duration>, Error> {
        until(PATIENCE, || Ok(self.newest_rollout()?["state"] == state))
    }

    fn declare(&self, text: &str, arguments: &[&str]) -> Result<Told, Error> {
        let path = self.server.write_posture(text)?;
        self.keepwall(&[&["--posture", &path, "apply", "--yes"], arguments].concat())
    }

    fn enrol(&mut self) -> Result<(), Error> {
        let mut tokens = Vec::new();
        for (name, labels) in MEMBERS {
            let mut arguments = vec!["token", "create"];
            labels.iter().for_each(|label| arguments.extend(["--label", label]));
            let made = self.json(&arguments)?;
            tokens.push((name, made["token"].as_str().unwrap_or_default().to_owned()));
        }
        let programs = self.programs;
        let told: Vec<Result<Told, Error>> = thread::scope(|scope| {
            let enrol = |(name, token): &(&'static str, String)| control::enrol(programs, name, token);
            let threads: Vec<_> = tokens.iter().map(|one| scope.spawn(move || enrol(one))).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("an enrolment failed".into()))).collect()
        });
        told.into_iter().try_for_each(|told| told?.success())?;
        let connected = self.all("connected")?;
        let list = self.json(&["instance", "list"])?;
        let names: Vec<&str> = list.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str()).collect();
        let seen = took(&format!("{} in contact", names.join(", ")), connected, PATIENCE);
        self.line(
            "run `keepwall enroll kw1.…` on four machines, each with a token of its own",
            "each is in the fleet and in contact",
            connected.is_some(),
            seen,
        );
        self.used = tokens.into_iter().find(|(name, _)| *name == "db1").map(|(_, token)| token).unwrap_or_default();
        Ok(())
    }

    fn first_posture(&mut self) -> Result<(), Error> {
        let open: Vec<Want> = WANTS.iter().map(|want| Want { arrives: true, ..*want }).collect();
        self.packets(
            "one packet that will be let in and one that will not, for each",
            "nothing is declared: all arrive",
            &open,
        )?;
        let told = self.declare(POSTURE, &["-m", "the first", "--wave", "canary=yes", "--soak", SOAK, "--detach"])?;
        told.success()?;
        let canary = until(AT_ONCE, || Ok(wrong(&WANTS[2..4])?.is_empty()))?;
        let others: Vec<Want> = (open.iter()).filter(|want| want.to != CANARY).copied().collect();
        let late = wrong(&others)?;
        self.line(
            "declare a posture, first wave: `canary=yes`",
            "web2 enforces it while the others wait",
            canary.is_some() && late.is_empty(),
            if late.is_empty() { took("web2 enforces", canary, AT_ONCE) } else { late.join(", ") },
        );
        let done = self.rollout_is("done")?;
        let view = self.newest_rollout()?;
        let waves: Vec<String> = (view["waves"].as_array().into_iter().flatten())
            .map(|wave| format!("{} of {}", wave["applied"], wave["total"]))
            .collect();
        self.line("wait for the last wave", "1 machine, then 3", waves == ["1 of 1", "3 of 3"], {
            format!("{}; {}", waves.join(", then "), took("done", done, PATIENCE))
        });
        self.packets("the same packets", "what a rule lets in arrives, the rest is dropped", &WANTS)
    }

    /// A label makes a machine a member; nobody is told a whole posture for that.
    fn join(&mut self) -> Result<(), Error> {
        let before = control::table("web1")?;
        self.keepwall(&["instance", "label", "bastion", "duty=backup"])?.success()?;
        self.packets_within(
            "label the bastion `duty=backup`",
            "at once it is in the group that fetches backups",
            AT_ONCE,
            &[allowed("bastion", "db1", 8080), allowed("bastion", "web1", 8080), denied("attacker", "web1", 8080)],
        )?;
        let after = control::table("web1")?;
        let same = before.chains == after.chains;
        self.line(
            "what that changed in web1's table",
            "one element more, no chain is new",
            same && after.elements == before.elements + 1,
            format!(
                "{} elements before, {} now; {}",
                before.elements,
                after.elements,
                if same { "chains as before" } else { "other chains" }
            ),
        );
        Ok(())
    }

    fn cut_off(&mut self) -> Result<(), Error> {
        let out = |arrives| [Want { arrives, ..allowed(CANARY, "server", 80) }];
        let bad = posture(&[("web", NO_SERVER)]);
        let pace = ["--wave", "canary=yes", "--confirm-within", CONFIRM_WITHIN_S, "--detach"];
        self.declare(&bad, &[&["-m", "nobody is there any more"][..], &pace].concat())?.success()?;
        let cut = until(AT_ONCE, || Ok(wrong(&out(false))?.is_empty()))?;
        let spared = wrong(&[allowed("web1", "server", 80)])?.is_empty();
        self.line(
            "declare: web servers send nothing to the server's network",
            "web2 tries it, and is cut off from the server; web1 is not told",
            cut.is_some() && spared,
            took("web2 → server was dropped", cut, AT_ONCE) + if spared { "" } else { ", and web1's too" },
        );
        let back = until(PATIENCE, || Ok(wrong(&out(true))?.is_empty()))?;
        self.line(
            "do nothing",
            "web2 goes back by itself",
            back.is_some(),
            took("web2 → server arrived", back, PATIENCE),
        );
        let stopped = self.rollout_is("stopped")?;
        let view = self.newest_rollout()?;
        let failed = &view["waves"][0]["failed"];
        let good = stopped.is_some() && *failed == serde_json::json!([CANARY]) && view["waves"][1]["open"] == false;
        let why = self.status(CANARY)?["failure"].as_str().unwrap_or_default().to_owned();
        self.line(
            "ask what became of the change",
            "it has stopped and names web2",
            good && !why.is_empty(),
            format!("{} ({why})", view["detail"].as_str().unwrap_or_default()),
        );
        self.keepwall(&["rollout", "return"])?.success()?;
        let synced = self.all("in_sync")?;
        self.line(
            "keepwall rollout return",
            "all have what they had",
            synced.is_some(),
            took("all in sync", synced, PATIENCE),
        );
        Ok(())
    }

    fn kill_server(&mut self) -> Result<(), Error> {
        self.server.kill()?;
        let told = self.keepwall(&["status"])?;
        self.line("kill -9 the server, ask for the status", "an error in words", !told.good, told.first_line());
        let mut wants = WANTS.to_vec();
        wants.retain(|want| (want.from, want.port) != ("bastion", 8080));
        self.packets("packets, without a server", "machines enforce what they have", &wants)?;
        let contacts = MEMBERS.map(|(name, _)| control::contacts(name));
        self.server.start(self.programs)?;
        // What a server remembers of the one before it is not what is wanted here.
        let back = until(PATIENCE, || {
            Ok(MEMBERS.iter().zip(contacts).all(|((name, _), before)| control::contacts(name) > before))
        })?;
        self.line("start it again", "all machines come back", back.is_some(), took("all in contact", back, PATIENCE));
        let told = self.declare(&posture(&[("web", SITE_80)]), &["-m", "the old site"])?;
        self.line("declare: port 80 too", "it is rolled out", told.good, told.last_line());
        let wants = [allowed("attacker", "web1", 80), allowed("attacker", "web2", 80), denied("attacker", "db1", 80)];
        self.packets("packets to port 80", "they arrive at web servers, and nowhere else", &wants)
    }

    fn cut_cable(&mut self) -> Result<(), Error> {
        let others =
            [allowed("client", "web2", 8080), allowed("client", "db1", 8080), allowed("client", "bastion", 8080)];
        let held = control::in_force(self.programs, "web1")?;
        cable("web1", false)?;
        let more = [("web", SITE_80), ("web", HEALTH), ("db", HEALTH), ("bastion", HEALTH)];
        let pace = ["--wave", "canary=yes", "--confirm-within", CONFIRM_WITHIN_S, "--max-failures", "1", "--detach"];
        self.declare(&posture(&more), &[&["-m", "health checks"][..], &pace].concat())?.success()?;
        self.packets_within(
            "cut web1's cable; declare: health checks",
            "the others have it at once",
            AT_ONCE,
            &others,
        )?;
        let now = control::in_force(self.programs, "web1")?;
        let (good, seen) = (now == held, format!("generation {held} before, {now} now"));
        self.line("web1 meanwhile", "it enforces what it had", good, seen);
        cable("web1", true)?;
        let whole = [allowed("client", "web1", 8080)];
        self.packets_within("mend the cable", "web1 has the change too", PATIENCE, &whole)?;
        let synced = self.all("in_sync")?;
        let done = self.rollout_is("done")?;
        self.line(
            "the server",
            "all are in sync",
            synced.is_some() && done.is_some(),
            took("all in sync", synced, PATIENCE),
        );
        Ok(())
    }

    fn drift(&mut self) -> Result<(), Error> {
        let closed = [denied("attacker", "web1", 22), allowed("attacker", "web1", 443)];
        let flush = || inside("web1", || control::nft(&["flush", "table", "inet", "keepwall"]));
        let said = flush()?;
        let closed_still = until(AT_ONCE, || Ok(wrong(&closed)?.is_empty()))?;
        self.line(
            "nft flush table inet keepwall, on web1",
            "the kernel refuses it, or it is put right at once",
            closed_still.is_some(),
            said.lines().next().unwrap_or("flushed, and put right").to_owned(),
        );
        kill_agent("web1")?;
        flush()?;
        self.packets(
            "kill -9 its agent first, then flush",
            "web1 is open: nobody looks after the table",
            &[allowed("attacker", "web1", 22)],
        )?;
        start_agent(self.programs, "web1")?;
        self.packets_within("start the agent again", "it puts the table right", AT_ONCE, &closed)?;
        let mut seen = String::new();
        let told = until(PATIENCE, || {
            let found = self.json(&["finding", "list", "--from", "web1", "--kind", "drift"])?;
            seen = found[0]["body"]["why"].as_str().unwrap_or_default().to_owned();
            Ok(!seen.is_empty())
        })?;
        let seen = if told.is_some() { seen } else { took("a finding", told, PATIENCE) };
        self.line("keepwall finding list", "the server was told", told.is_some(), seen);
        Ok(())
    }

    fn revoke(&mut self) -> Result<(), Error> {
        self.keepwall(&["instance", "revoke", "db1", "--yes"])?.success()?;
        let mut seen = String::new();
        let refused = until(PATIENCE, || {
            seen = control::uplink_says("db1");
            Ok(self.status("db1")?["connected"] == false && seen.contains("revoked"))
        })?;
        self.line("keepwall instance revoke db1", "its connection ends at once", refused.is_some(), words(&seen));
        let again = control::dials_again(self.programs, "db1", &self.used)?;
        self.line("start its uplink anew", "it is refused", again.contains("removed or revoked"), words(&again));
        self.keepwall(&["instance", "label", "bastion", "duty-"])?.success()?;
        self.packets_within(
            "take the bastion's label `duty` away",
            "web1 hears of it; db1, which is told nothing, enforces what it had",
            AT_ONCE,
            &[denied("bastion", "web1", 8080), allowed("bastion", "db1", 8080), denied("attacker", "db1", 3306)],
        )?;
        control::leave(self.programs, "db1")?.success()?;
        let told = control::enrol(self.programs, "db1", &self.used)?;
        self.line(
            "on db1: keepwall leave, then enroll with its old token",
            "refused: it was good once",
            !told.good,
            told.first_line(),
        );
        let made = self.json(&["token", "create", "--instance", "db1", "--label", "role=db"])?;
        let told = control::enrol(self.programs, "db1", made["token"].as_str().unwrap_or_default())?;
        self.line("enroll with a new token", "it is in the fleet again", told.good, told.first_line());
        self.packets_within(
            "the bastion's packets to db1",
            "db1 has heard of it too",
            PATIENCE,
            &[denied("bastion", "db1", 8080), allowed("web1", "db1", 3306)],
        )
    }

    fn end(&mut self) -> Result<(), Error> {
        self.all("in_sync")?;
        let told = self.json(&["status"])?;
        let sum = &told["summary"];
        let good = ["machines", "enrolled", "connected", "in_sync"].iter().all(|key| sum[key] == MEMBERS.len())
            && sum["failed"] == 0
            && sum["drifting"] == 0;
        self.line("keepwall status", "four machines, all in contact and in sync", good, sum.to_string());
        self.packets("all packets again", "as the posture says", &WANTS)
    }
}

/// Runs the drill in a lab of its own, which is made here.
///
/// # Errors
/// Not root, or a program cannot be run; what goes wrong in the drill itself is a line.
pub fn fleet(programs: &Programs, say: impl Fn(&str), mut each: impl FnMut(&Line)) -> Result<Vec<Line>, Error> {
    control::nft(&["--version"])?;
    say("making a server, four machines, a client, an attacker and a router …");
    make(&FLEET)?;
    start_listeners(programs)?;
    say("starting keepwalld …");
    let server = Server::new(address("server"))?;
    let mut drill = Drill { programs, server, each: &mut each, lines: Vec::new(), used: String::new() };
    drill.server.start(programs)?;
    drill.keepwall(&["context", "add", "lab", "--server", &drill.server.url()])?.success()?;
    say("enrolling four machines …");
    drill.enrol()?;
    drill.first_posture()?;
    drill.join()?;
    say("a change that cuts a machine off …");
    drill.cut_off()?;
    say("the server dies …");
    drill.kill_server()?;
    say("a cable is cut …");
    drill.cut_cable()?;
    say("somebody flushes the table …");
    drill.drift()?;
    say("a machine is revoked …");
    drill.revoke()?;
    drill.end()?;
    Ok(drill.lines)
}
