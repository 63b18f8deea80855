//! The lock-out drill: a plan that cuts SSH takes itself back, with the agent alive and with the agent killed.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use keepwall_sys::dial;

use crate::machine::{DIRECTORY, inside, keepwall, kill_agent, start_agent};
use crate::probe::{Probe, arrives};
use crate::serve::{GREETING, PUSH};
use crate::{Error, Line, Programs};

/// How long the drill gives for a confirmation that never comes.
const WINDOW_S: u64 = 5;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address of this module")
}

fn ssh() -> Probe {
    Probe { from: "client", source: ip("10.77.0.10"), destination: ip("10.77.1.10"), protocol: 6, port: 22 }
}

/// An operator's session: a TCP connection that stays open.
fn session() -> Result<TcpStream, Error> {
    inside("client", || {
        let (from, to) = (SocketAddr::new(ip("10.77.0.10"), 0), SocketAddr::new(ip("10.77.1.10"), 22));
        let mut stream =
            dial::tcp(from, to, Duration::from_secs(2)).map_err(|e| format!("no session to web:22: {e}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(1))).map_err(|e| e.to_string())?;
        stream.read_exact(&mut [0; GREETING.len()]).map_err(|e| format!("no greeting: {e}"))?;
        Ok(stream)
    })
}

fn alive(stream: &mut TcpStream) -> bool {
    let mut answer = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut answer).is_ok() && &answer == b"ping"
}

/// True if nothing comes any more, once what was on its way is read.
fn falls_silent(stream: &mut TcpStream) -> Result<bool, Error> {
    stream.set_read_timeout(Some(Duration::from_millis(400))).map_err(|e| e.to_string())?;
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(1_200) {
        if stream.read(&mut [0; 4096]).is_err() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What sshd would have put into the environment of a shell in this session.
fn environment(stream: &TcpStream) -> Result<String, Error> {
    let local = stream.local_addr().map_err(|e| e.to_string())?;
    Ok(format!("{} {} 10.77.1.10 22", local.ip(), local.port()))
}

fn line(what: &str, expected: &str, good: bool, seen: impl Into<String>) -> Line {
    Line { what: what.into(), expected: expected.into(), seen: seen.into(), good }
}

/// Waits until SSH gets in again; how long that took.
fn until_open(limit: Duration) -> Result<Option<Duration>, Error> {
    let started = Instant::now();
    while started.elapsed() < limit {
        if arrives(&ssh())? {
            return Ok(Some(started.elapsed()));
        }
        sleep(Duration::from_millis(100));
    }
    Ok(None)
}

/// The example's posture without its rule for SSH.
fn without_ssh(posture: &Path) -> Result<PathBuf, Error> {
    let text = std::fs::read_to_string(posture).map_err(|e| e.to_string())?;
    let mut text = keepwall_posture::edit::remove_rule(
        &text,
        "web",
        keepwall_secgroup::spec::Direction::Ingress,
        &keepwall_posture::edit::RuleSelector::Index(1),
    )
    .map_err(|e| e.to_string())?
    .text;
    // Its tests ask for SSH, and would stop the plan before it could do harm.
    if let Some(at) = text.find("\ntests:") {
        text.truncate(at + 1);
    }
    let path = Path::new(DIRECTORY).join("no-ssh.yaml");
    std::fs::write(&path, text).map_err(|e| e.to_string())?;
    Ok(path)
}

/// Runs the drill in a lab that is up and enforces the example.
///
/// # Errors
/// The lab is not up, or a command cannot be run; what goes wrong in the drill itself is a line.
pub fn drill(programs: &Programs, posture: &Path, mut each: impl FnMut(&Line)) -> Result<Vec<Line>, Error> {
    let mut lines = Vec::new();
    let mut add = |line: Line| {
        each(&line);
        lines.push(line);
    };
    let cut = without_ssh(posture)?;
    let window = WINDOW_S.to_string();
    let apply = ["apply", "--yes", "--confirm-within", &window];
    let forced = ["apply", "--yes", "--confirm-within", &window, "--danger-cut-session"];
    let run = |posture: &Path, arguments: &[&str], ssh: &str| keepwall(programs, "web", posture, arguments, Some(ssh));

    let mut open = session()?;
    let from_ssh = environment(&open)?;
    let out = run(&cut, &apply, &from_ssh)?;
    let words = String::from_utf8_lossy(&out.stderr).into_owned();
    add(line(
        "apply a plan that cuts the operator's own SSH",
        "refused, with the session named",
        !out.status.success() && words.contains("lock you out") && words.contains("10.77.0.10"),
        words.lines().next().unwrap_or("accepted").to_owned(),
    ));
    add(line("the session and a new one", "both alive", alive(&mut open) && arrives(&ssh())?, "tried"));

    let mut pushed = session()?;
    pushed.write_all(PUSH).map_err(|e| e.to_string())?;
    let talks = pushed.read_exact(&mut [0; 8]).is_ok();
    let out = run(&cut, &forced, &from_ssh)?;
    add(line("apply it by force, to be confirmed", "applied", out.status.success(), "applied, unconfirmed"));
    let (dead, closed) = (!alive(&mut open), !arrives(&ssh())?);
    add(line(
        "the session, and a new one",
        "both cut",
        dead && closed,
        format!("session {}, new one {}", word(!dead), word(!closed)),
    ));
    let silent = falls_silent(&mut pushed)?;
    add(line(
        "a session in which the server talks by itself",
        "cut too: it does not come back from the inside",
        talks && silent,
        if silent { "silent" } else { "still talking" },
    ));
    let back = until_open(Duration::from_secs(WINDOW_S + 6))?;
    add(line("wait, confirming nothing", "SSH gets in again by itself", back.is_some(), took(back)));

    let open = session()?;
    let out = run(&cut, &forced, &environment(&open)?)?;
    let applied = out.status.success();
    kill_agent("web")?;
    add(line("apply it again, then kill -9 the agent", "applied, agent dead", applied, "killed"));
    add(line(
        "a new session while the agent is dead",
        "still cut: rules outlive the agent",
        !arrives(&ssh())?,
        "tried",
    ));
    let back = until_open(Duration::from_secs(WINDOW_S + 10))?;
    add(line("wait, with no agent", "the watchdog reverts: SSH gets in", back.is_some(), took(back)));
    start_agent(programs, "web")?;
    add(line(
        "start the agent again",
        "it enforces the confirmed rules",
        arrives(&ssh())? && !web(8080)?,
        "ssh in, 8080 closed",
    ));

    let mut old = session()?;
    let out = run(&harmless(posture)?, &apply, &environment(&old)?)?;
    add(line("apply a change that keeps SSH", "applied", out.status.success(), "applied, unconfirmed"));
    let out = run(posture, &["confirm"], &environment(&old)?)?;
    let words = String::from_utf8_lossy(&out.stderr).into_owned();
    add(line(
        "confirm from the session of before",
        "refused: it proves nothing",
        !out.status.success() && words.contains("open before"),
        words.lines().next().unwrap_or("").to_owned(),
    ));
    let new = session()?;
    let out = run(posture, &["confirm"], &environment(&new)?)?;
    add(line(
        "confirm from a new session",
        "confirmed",
        out.status.success(),
        String::from_utf8_lossy(&out.stdout).trim().to_owned(),
    ));
    sleep(Duration::from_secs(WINDOW_S + 1));
    add(line(
        "wait longer than the window",
        "the change stays, sessions live",
        web(8080)? && alive(&mut old),
        "8080 open, session alive",
    ));
    // The other setting: what is established lives on, and only new sessions meet the new rules.
    let keep = Path::new(DIRECTORY).join("keep.yaml");
    let text = std::fs::read_to_string(&cut).map_err(|e| e.to_string())?.replace("on_deny: cut", "on_deny: keep");
    std::fs::write(&keep, text).map_err(|e| e.to_string())?;
    let mut kept = session()?;
    let out = keepwall(programs, "web", &keep, &["apply", "--yes", "--danger-no-confirm"], None)?;
    let (lives, closed) = (alive(&mut kept), !arrives(&ssh())?);
    add(line(
        "cut SSH with sessions.on_deny: keep",
        "the session lives, a new one is refused",
        out.status.success() && lives && closed,
        format!("session {}, new one {}", word(lives), word(!closed)),
    ));
    // Leave the lab as it was found.
    let out = keepwall(programs, "web", posture, &["apply", "--yes", "--danger-no-confirm"], None)?;
    add(line("back to the example", "applied", out.status.success(), "applied"));
    Ok(lines)
}

fn web(port: u16) -> Result<bool, Error> {
    arrives(&Probe { port, ..ssh() })
}

fn word(alive: bool) -> &'static str {
    if alive { "alive" } else { "cut" }
}

fn took(back: Option<Duration>) -> String {
    back.map_or("still locked out".into(), |d| format!("open again {:.1} s later", d.as_secs_f32()))
}

/// The example and one port more.
fn harmless(posture: &Path) -> Result<PathBuf, Error> {
    let text = std::fs::read_to_string(posture).map_err(|e| e.to_string())?;
    let rule = keepwall_posture::NewRule::accept(
        keepwall_core::Protocol::TCP,
        vec![keepwall_secgroup::spec::PortSel::Range("8080".parse().map_err(|_| "a port")?)],
        keepwall_secgroup::spec::Peer::Any,
    );
    let edited = keepwall_posture::edit::add_rule(&text, "web", keepwall_secgroup::spec::Direction::Ingress, &rule)
        .map_err(|e| e.to_string())?;
    let path = Path::new(DIRECTORY).join("harmless.yaml");
    std::fs::write(&path, edited.text).map_err(|e| e.to_string())?;
    Ok(path)
}
