//! The lab and its drills, as a user runs them. Needs root; the lab holds a lock, so tests take turns.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard};

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn keepwall() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keepwall"));
    command.env_remove("KEEPWALL_POSTURE").env("NO_COLOR", "1");
    command
}

/// The reason to skip, said aloud.
fn cannot() -> Option<&'static str> {
    let beside = |name| PathBuf::from(env!("CARGO_BIN_EXE_keepwall")).with_file_name(name).exists();
    let why = if std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) != 0) {
        "needs root"
    } else if !["keepwall-agent", "keepwall-uplink", "keepwalld"].into_iter().all(beside) {
        "needs the other programs beside keepwall: cargo build --workspace"
    } else {
        return None;
    };
    eprintln!("skipped: {why}");
    Some(why)
}

fn run(arguments: &[&str]) -> Output {
    keepwall().args(arguments).output().unwrap()
}

fn rows(output: &Output) -> Vec<serde_json::Value> {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("no JSON: {}", String::from_utf8_lossy(&output.stderr)))
}

/// Nothing of a lab is left: no files, no namespaces, no processes.
fn nothing_left() {
    for file in ["/run/keepwall-lab", "/run/keepwall-lab.lock", "/run/keepwall-lab.yaml"] {
        assert!(!Path::new(file).exists(), "{file}");
    }
    let names = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    assert_eq!(names.filter(|n| n.file_name().to_string_lossy().starts_with("kwlab-")).count(), 0);
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let words = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        assert!(!words.contains("/run/keepwall-lab/"), "{words}");
    }
}

#[test]
fn every_line_of_the_example_is_proved_and_nothing_is_left() {
    let _turn = turn();
    if cannot().is_some() {
        return;
    }
    let output = run(&["lab", "--json"]);
    let rows = rows(&output);
    assert!(output.status.success() && rows.len() >= 18, "{} rows", rows.len());
    for row in &rows {
        assert_eq!(row["holds"], true, "{row}");
    }
    // Both colours, and both address families.
    for (key, value) in [("expected", "arrives"), ("expected", "dropped")] {
        assert!(rows.iter().any(|row| row[key] == value));
    }
    assert!(rows.iter().any(|row| row["packet"].as_str().unwrap().contains("fd77")));
    nothing_left();
}

#[test]
fn a_posture_that_opens_a_port_is_seen_not_to_deny_it() {
    let _turn = turn();
    if cannot().is_some() {
        return;
    }
    // The posture's own tests are checked before anything is applied, so the lab refuses to start.
    let text = std::fs::read_to_string("../../examples/web-and-db.yaml").unwrap();
    let wrong = text.replace("ports: 3306, from: group:web", "ports: 3306, from: any");
    assert_ne!(text, wrong);
    let path = std::env::temp_dir().join(format!("keepwall-lab-wrong-{}.yaml", std::process::id()));
    std::fs::write(&path, wrong).unwrap();
    let output = run(&["lab", "--json", "--example", path.to_str().unwrap()]);
    std::fs::remove_file(&path).unwrap();
    assert!(!output.status.success());
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("deny internet -> db:3306/tcp"), "{words}");
    nothing_left();
}

#[test]
fn a_killed_lab_is_cleared_away_by_the_next_one() {
    let _turn = turn();
    if cannot().is_some() {
        return;
    }
    let mut child = keepwall().args(["lab", "--json"]).stdout(std::process::Stdio::null()).spawn().unwrap();
    // Long enough to have made machines and agents, too short to be done.
    std::thread::sleep(std::time::Duration::from_millis(250));
    child.kill().unwrap();
    child.wait().unwrap();
    let output = run(&["lab", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    nothing_left();
}

#[test]
fn a_killed_fleet_is_cleared_away_with_its_server_and_its_machines() {
    let _turn = turn();
    if cannot().is_some() {
        return;
    }
    let mut child = keepwall().args(["lab", "fleet", "--json"]).stdout(std::process::Stdio::null()).spawn().unwrap();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !Path::new("/run/keepwall-lab/web1/keepwall-uplink.pid").exists() && child.try_wait().unwrap().is_none() {
        assert!(std::time::Instant::now() < end, "no machine enrols");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(run(&["lab", "down"]).status.success());
    nothing_left();
}

fn drill(which: &str) {
    let _turn = turn();
    if cannot().is_some() {
        return;
    }
    let output = run(&["lab", which, "--json"]);
    if String::from_utf8_lossy(&output.stderr).contains("is needed for this drill") {
        eprintln!("skipped: nftables or iptables is not installed");
        return;
    }
    for row in rows(&output) {
        assert_eq!(row["good"], true, "{row}");
    }
    assert!(output.status.success());
    nothing_left();
}

#[test]
fn nobody_is_locked_out() {
    drill("drill");
}

#[test]
fn a_fleet_goes_on_through_waves_kills_cuts_and_a_revoked_machine() {
    drill("fleet");
}

#[test]
fn other_firewalls_are_neither_touched_nor_believed() {
    drill("coexist");
}
