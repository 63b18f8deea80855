//! The command line without an agent: what it says, how it exits, what it does to files.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn keepwall(posture: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_keepwall"))
        .env("NO_COLOR", "1")
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .env_remove("KEEPWALL_SOCKET")
        .env_remove("KEEPWALL_SERVER")
        .env_remove("KEEPWALL_CONTEXT")
        .args(["--socket", "/nonexistent/agent.sock", "--posture"])
        .arg(posture)
        .args(arguments)
        .output()
        .unwrap()
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn example() -> PathBuf {
    PathBuf::from("../../examples/web-and-db.yaml")
}

/// A directory of this test's own, gone with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("keepwall-cli-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, text: &str) -> PathBuf {
        let path = self.0.join("posture.yaml");
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_examples_are_valid_and_pass_their_own_tests() {
    for entry in std::fs::read_dir("../../examples").unwrap().flatten() {
        let output = keepwall(&entry.path(), &["check"]);
        assert!(output.status.success(), "{}: {}", entry.path().display(), words(&output));
        assert!(keepwall(&entry.path(), &["test"]).status.success());
    }
}

#[test]
fn a_mistake_is_shown_with_its_line_and_the_word_that_was_meant() {
    let scratch = Scratch::new("mistake");
    let text = std::fs::read_to_string(example()).unwrap().replace("groups: [web]", "groups: [wbe]");
    let output = keepwall(&scratch.file(&text), &["check"]);
    let words = words(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(words.contains("there is no security group `wbe`") && words.contains("did you mean `web`?"), "{words}");
    assert!(words.contains("posture.yaml:20:") && words.contains("groups: [wbe]") && words.contains('^'), "{words}");
}

#[test]
fn a_failing_policy_test_exits_with_3_and_names_a_counterexample() {
    let scratch = Scratch::new("failing");
    let text = std::fs::read_to_string(example())
        .unwrap()
        .replace("expect: deny internet -> web:22", "expect: allow internet -> web:22");
    let output = keepwall(&scratch.file(&text), &["test"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(words(&output).contains("is denied by default"), "{}", words(&output));
}

#[test]
fn explain_names_rule_file_and_line_and_offers_the_missing_one() {
    let output = keepwall(&example(), &["explain", "--from", "10.77.0.10", "--to", "web", "--port", "22"]);
    let said = words(&output);
    assert!(
        said.contains("✓ allowed") && said.contains("rule web/ingress#2") && said.contains("web-and-db.yaml:51"),
        "{said}"
    );
    let output = keepwall(&example(), &["explain", "--from", "203.0.113.9", "--to", "db", "--port", "3306"]);
    let said = words(&output);
    assert!(said.contains("✗ denied") && said.contains("from: 203.0.113.9 }"), "{said}");
    let output = keepwall(&example(), &["explain", "--from", "203.0.113.9", "--to", "wbe", "--port", "22"]);
    assert!(words(&output).contains("did you mean web?"));
}

#[test]
fn without_an_agent_the_way_out_is_said() {
    let output = keepwall(&example(), &["plan", "--instance", "web"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(words(&output).contains("no agent is running") && words(&output).contains("keepwall up"));
}

#[test]
fn rules_are_added_once_removed_quietly_and_snapshots_bring_them_back() {
    let scratch = Scratch::new("rules");
    let original = std::fs::read_to_string(example()).unwrap();
    let path = scratch.file(&original);
    let run = |arguments: &[&str]| {
        let output = keepwall(&path, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", words(&output));
        words(&output)
    };
    let add = ["sg", "rule", "add", "web", "--ports", "8443", "--peer", "203.0.113.0/24", "--description", "staging"];
    run(&add);
    let once = std::fs::read_to_string(&path).unwrap();
    assert!(once.contains("8443") && once.contains("# Two machines, as in"), "comments stay");
    assert!(run(&add).contains("Nothing to do"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), once);
    run(&["sg", "rule", "remove", "web", "--ports", "9999", "--peer", "any"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), once, "removing what is not there changes nothing");
    let output = keepwall(&path, &["sg", "rule", "remove", "web", "--number", "99"]);
    assert!(!output.status.success(), "an unknown number is an error");

    let list: Vec<serde_json::Value> =
        serde_json::from_slice(&keepwall(&path, &["sg", "snapshot", "list", "web", "--json"]).stdout).unwrap();
    assert_eq!(list.len(), 1, "changes within five minutes give one snapshot");
    run(&["sg", "snapshot", "restore", "web", list[0]["id"].as_str().unwrap()]);
    assert_eq!(keepwall(&path, &["reach", "--json"]).stdout, keepwall(&example(), &["reach", "--json"]).stdout);
}

#[test]
fn groups_are_cloned_exported_imported_and_guarded() {
    let scratch = Scratch::new("groups");
    let path = scratch.file(&std::fs::read_to_string(example()).unwrap());
    let run = |arguments: &[&str]| keepwall(&path, arguments);
    assert!(run(&["sg", "clone", "web", "web2"]).status.success());
    for format in ["json", "csv"] {
        let file = scratch.0.join(format!("rules.{format}"));
        std::fs::write(&file, run(&["sg", "export", "db", "--format", format]).stdout).unwrap();
        let name = format!("copy-{format}");
        assert!(run(&["sg", "create", &name]).status.success());
        let output = run(&["sg", "import", &name, file.to_str().unwrap()]);
        assert!(output.status.success(), "{}", words(&output));
        let rules = |group: &str| {
            let shown: serde_json::Value =
                serde_json::from_slice(&run(&["sg", "show", group, "--json"]).stdout).unwrap();
            shown["rules"].as_array().unwrap().len()
        };
        assert_eq!(rules(&name), rules("db"));
    }
    let refused = run(&["sg", "delete", "web"]);
    assert!(!refused.status.success() && words(&refused).contains("still has members"));
    let refused = run(&["sg", "leave", "db", "db"]);
    assert!(!refused.status.success() && words(&refused).contains("last group"));
    assert!(run(&["sg", "join", "web2", "db"]).status.success());
    assert!(run(&["sg", "leave", "web2", "db"]).status.success());
    assert!(run(&["sg", "delete", "web2"]).status.success());
}

#[test]
fn a_plan_edited_by_hand_is_no_plan() {
    let scratch = Scratch::new("plan");
    let path = scratch.0.join("plan.json");
    std::fs::write(&path, "{\"format\":1}").unwrap();
    // There is no agent, so it must be asked for before the plan is read or after: either way nothing is applied.
    let output = keepwall(&example(), &["apply", path.to_str().unwrap(), "--yes"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn wrong_usage_exits_with_2_and_completions_and_man_pages_come_out() {
    assert_eq!(keepwall(&example(), &["frobnicate"]).status.code(), Some(2));
    assert!(words(&keepwall(&example(), &["completions", "bash"])).contains("_keepwall"));
    let scratch = Scratch::new("man");
    assert!(keepwall(&example(), &["man", scratch.0.to_str().unwrap()]).status.success());
    assert!(scratch.0.join("keepwall.1").exists() && scratch.0.join("keepwall-sg-rule-add.1").exists());
}
