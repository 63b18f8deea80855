//! The program from outside: what it says when it cannot do what it is asked.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("keepwall-uplink-program-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn uplink(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keepwall-uplink"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for name in ["https_proxy", "HTTPS_PROXY"] {
        command.env_remove(name);
    }
    let mut child = command.spawn().unwrap();
    // It may have ended without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn root_is_refused_and_wrong_usage_is_named() {
    if keepwall_host::process::user().uid == 0 {
        let output = uplink(&["run"], "");
        assert!(output.status.code() == Some(1) && words(&output).contains("no root"), "{output:?}");
    }
    for wrong in [&["dance"][..], &["run", "--flows", "1001"], &["run", "--state"], &["run", "x"], &["--what"]] {
        let output = uplink(wrong, "");
        assert!(output.status.code() == Some(2) && words(&output).contains("--help"), "{wrong:?}: {output:?}");
    }
    assert!(String::from_utf8(uplink(&["--help"], "").stdout).unwrap().contains("enroll TOKEN"));
}

#[test]
fn without_an_identity_there_is_nothing_to_run() {
    let scratch = Scratch::new("none");
    let output = uplink(&["run", "--allow-root", "--state", scratch.0.to_str().unwrap()], "");
    assert!(output.status.code() == Some(1) && words(&output).contains("keepwall enroll"), "{output:?}");
}

#[test]
fn a_token_is_read_from_the_input_and_a_server_that_is_not_there_leaves_nothing_behind() {
    let scratch = Scratch::new("token");
    let enroll = |token: &str, input: &str| {
        uplink(&["enroll", token, "--allow-root", "--state", scratch.0.to_str().unwrap()], input)
    };
    assert!(words(&enroll("kw1.nonsense", "")).contains("no enrolment token"));
    assert!(words(&enroll("-", "kw1.nonsense\n")).contains("no enrolment token"));
    // A port that nobody listens at: bound a moment ago, and closed.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let output = enroll("-", &token(&format!("127.0.0.1:{port}")));
    assert!(output.status.code() == Some(1) && words(&output).contains("cannot reach"), "{output:?}");
    assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 0);
}

/// A token as a server writes it.
fn token(server: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let text = format!("{server}\n{}\net-1.AAEC", "00".repeat(32));
    let mut out = String::from("kw1.");
    for three in text.as_bytes().chunks(3) {
        let bits = three.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for n in 0..=three.len() {
            out.push(char::from(DIGITS[(bits >> (18 - 6 * n)) as usize & 63]));
        }
    }
    out
}
