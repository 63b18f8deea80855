//! Fuzzing on the stable compiler: libFuzzer by way of flags, without cargo-fuzz and without nightly.
//!
//! The targets are in `fuzz/`, a workspace of its own. A corpus is seeded from the examples and from what the product
//! itself writes (intents, frames, tables), because random bytes never get past a length or a brace.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use keepwall_core::Generation;
use keepwall_fleet::bundle::Bundle;
use keepwall_fleet::sync::State;
use keepwall_ir::nft::Table;
use keepwall_ir::nft::encode::{At, Batch};
use keepwall_link::{Apply, Envelope, Request, TraceFilter, VERSION, write_frame};
use keepwall_posture::{SourceFile, parse};
use keepwall_secgroup::check::check;
use keepwall_secgroup::intent::{Intent, resolve};
use keepwall_secgroup::lower::lower;
use keepwall_wire::{offer_frame, write_whole};

use crate::{root, say};

/// Each target with the longest input that is worth its time.
const TARGETS: [(&str, usize); 6] = [
    ("posture", 8 * 1024),
    ("nft_decode", 32 * 1024),
    ("link", 16 * 1024),
    ("intent", 16 * 1024),
    ("wire", 16 * 1024),
    ("api", 4 * 1024),
];

/// Links the whole server, which takes ten minutes to build so: not in `smoke`. The feature of its name builds it.
const HEAVY: &str = "api";

/// Coverage for libFuzzer; each flag is stable.
const FLAGS: [&str; 8] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg",
    "fuzzing",
];

/// Memory that a target may take, in MiB, and seconds that one input may take: an input that needs more is a finding.
const MEMORY_MIB: usize = 1024;
const INPUT_S: usize = 10;
/// How long each target of `smoke` runs, in seconds.
const SMOKE_S: u32 = 20;

const HELP: &str = "\
cargo xtask fuzz smoke [--seconds N]     every target but `api`, 20 seconds each
cargo xtask fuzz TARGET [--seconds N]    one target, 300 seconds
cargo xtask fuzz TARGET --input FILE     one input again
cargo xtask fuzz list                    the targets

The corpus grows in fuzz/corpus/TARGET; what breaks a target is kept in fuzz/artifacts/TARGET.
A C++ compiler is needed (apt install g++).";

/// `cargo xtask fuzz …`
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let (mut seconds, mut input, mut word) = (None, None, None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seconds" => {
                let text = args.next().ok_or("--seconds needs a number")?;
                seconds = Some(text.parse::<u32>().map_err(|_| format!("`{text}` is no number of seconds"))?);
            }
            "--input" => input = Some(args.next().ok_or("--input needs a file")?.as_str()),
            other if word.is_none() && !other.starts_with('-') => word = Some(other),
            other => return Err(format!("`{other}` is not understood\n{HELP}")),
        }
    }
    match (word, input) {
        (None | Some("help"), _) => {
            say(HELP);
            Ok(())
        }
        (Some("list"), _) => {
            TARGETS.iter().for_each(|(name, _)| say(name));
            Ok(())
        }
        (Some("smoke"), None) => {
            let binaries = build(false)?;
            seed()?;
            // All of them, then what broke: one crash hides no other.
            let broken: Vec<String> = (TARGETS.iter().filter(|(name, _)| *name != HEAVY))
                .filter_map(|target| fuzz(&binaries, *target, seconds.unwrap_or(SMOKE_S)).err())
                .collect();
            if broken.is_empty() { Ok(()) } else { Err(broken.join("\n")) }
        }
        (Some(name), input) => {
            let target = TARGETS.iter().find(|(target, _)| *target == name);
            let target = *target.ok_or_else(|| format!("there is no target `{name}`; see `cargo xtask fuzz list`"))?;
            let binaries = build(name == HEAVY)?;
            match input {
                Some(file) => again(&binaries, target, file),
                None => {
                    seed()?;
                    fuzz(&binaries, target, seconds.unwrap_or(300))
                }
            }
        }
    }
}

/// Builds the targets and says where they are.
fn build(all: bool) -> Result<PathBuf, String> {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let told = Command::new(compiler).arg("-vV").output().map_err(|error| format!("cannot start rustc: {error}"))?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let host = told.lines().find_map(|line| line.strip_prefix("host: ")).ok_or("rustc does not say its host")?;
    // Below the usual target directory if one is set, else beside the targets.
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => PathBuf::from(directory).join("fuzz"),
        None => root().join("fuzz/target"),
    };
    say("building the fuzz targets");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--locked", "--quiet", "--target", host])
        .args(if all { &["--features", HEAVY][..] } else { &[] })
        .current_dir(root().join("fuzz"))
        // With a target named, the flags do not reach build scripts.
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"))
        .env("CARGO_TARGET_DIR", &target)
        .status()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if !status.success() {
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        return Err(not_built(&compiler));
    }
    Ok(target.join(host).join("release"))
}

/// What to say where cargo has said why; of the C++ compiler only if there is none.
fn not_built(compiler: &OsStr) -> String {
    let started = Command::new(compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match started {
        Ok(_) => "the targets do not build; why is above".into(),
        Err(_) => "the targets do not build; libFuzzer needs a C++ compiler (apt install g++)".into(),
    }
}

fn corpus(target: &str) -> PathBuf {
    root().join("fuzz/corpus").join(target)
}

fn fuzz(binaries: &Path, (name, longest): (&str, usize), seconds: u32) -> Result<(), String> {
    say(format!("== {name}: {seconds} s"));
    let artifacts = root().join("fuzz/artifacts").join(name);
    fs::create_dir_all(&artifacts).map_err(|error| format!("{}: {error}", artifacts.display()))?;
    let before = newest(&artifacts);
    let status = Command::new(binaries.join(name))
        .arg(corpus(name))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={longest}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-timeout={INPUT_S}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-verbosity=0"])
        .status()
        .map_err(|error| format!("cannot start {name}: {error}"))?;
    if status.success() {
        return Ok(());
    }
    let found = newest(&artifacts).filter(|found| Some(found) != before.as_ref());
    let file = found.map_or_else(|| "(libFuzzer kept no input)".into(), |path| path.display().to_string());
    Err(format!(
        "{name} broke on {file}\n  \
         see it again:    cargo xtask fuzz {name} --input {file}\n  \
         make it a test:  {}",
        advice(name)
    ))
}

/// Where an input that broke a target goes, so that it never does again.
fn advice(target: &str) -> &'static str {
    match target {
        "posture" => {
            "copy it to policy/posture/tests/cases/NAME.yaml, with a comment on what it was, and mend the parser"
        }
        "nft_decode" => "put its bytes into a test in ir/tests/netlink.rs, with a sentence on what they were",
        "link" => "put its bytes into a test in control/link/src/lib.rs, with a sentence on what they were",
        "wire" => "put its bytes into a test in control/wire/src/convert.rs, with a sentence on what they were",
        "api" => "put its body into a test in control/server/src/api/tests.rs, with a sentence on what it was",
        _ => "put its text into a test in policy/secgroup/tests/meaning.rs, with a sentence on what it was",
    }
}

fn newest(folder: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(folder).ok()?.filter_map(Result::ok);
    files.max_by_key(|entry| entry.metadata().and_then(|data| data.modified()).ok()).map(|entry| entry.path())
}

fn again(binaries: &Path, (name, _): (&str, usize), file: &str) -> Result<(), String> {
    let status = Command::new(binaries.join(name)).arg(file).status();
    match status.map_err(|error| format!("cannot start {name}: {error}"))? {
        status if status.success() => Ok(()),
        _ => Err(format!("{name} breaks on {file}")),
    }
}

/// Gives each target something to start from.
fn seed() -> Result<(), String> {
    for (name, _) in TARGETS {
        fs::create_dir_all(corpus(name)).map_err(|error| format!("{}: {error}", corpus(name).display()))?;
    }
    let put = |target: &str, name: &str, bytes: &[u8]| {
        fs::write(corpus(target).join(name), bytes).map_err(|error| format!("cannot write a seed: {error}"))
    };
    for folder in ["examples", "policy/posture/tests/cases", "policy/secgroup/tests/cases"] {
        let entries = fs::read_dir(root().join(folder)).map_err(|error| format!("{folder}: {error}"))?;
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(".yaml"))
            else {
                continue;
            };
            let text = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            put("posture", name, &text)?;
            for (n, intent) in intents(&text).into_iter().enumerate() {
                let name = format!("{name}.{n}");
                let bundle = Bundle::of(intent.clone());
                let state = State { generation: 7, digest: bundle.digest() };
                put("wire", &name, &offer_frame("seed", state, None, &write_whole(&bundle), 60, ""))?;
                put("intent", &name, &serde_json::to_vec(&intent).map_err(|error| error.to_string())?)?;
                let apply = Apply {
                    intent: intent.clone(),
                    base: Some(Generation(7)),
                    confirm_within_s: Some(60),
                    danger_cut_session: false,
                    note: "seed".into(),
                    fleet: None,
                };
                put("link", &name, &frame(Request::Apply(Box::new(apply)))?)?;
                if let Some(bytes) = lower(&intent, "g1").ok().and_then(|lowered| encoded(&lowered.table)) {
                    put("nft_decode", &name, &bytes)?;
                }
            }
        }
    }
    // The first byte is the operation's number: one seed for each, of a body that fits some.
    for which in 0..32u8 {
        let mut bytes = vec![which];
        bytes.extend(
            br#"{"name":"web","files":[{"name":"a.yaml","text":"version: 1"}],"labels":{"a":"b"},"reason":"x"}"#,
        );
        put("api", &format!("seed.{which}"), &bytes)?;
    }
    let requests = [
        ("status", Request::Status),
        ("confirm", Request::Confirm { generation: Generation(1), danger_same_session: false }),
        ("revert", Request::Revert { generation: None }),
        ("trace", Request::Trace(TraceFilter { seconds: 10, packets: 1, ..TraceFilter::default() })),
    ];
    requests.into_iter().try_for_each(|(name, request)| put("link", name, &frame(request)?))
}

/// What each machine of a posture enforces; nothing of a posture that is refused.
fn intents(text: &[u8]) -> Vec<Intent> {
    let Ok(text) = std::str::from_utf8(text) else { return Vec::new() };
    let Ok(spec) = parse(&[SourceFile::new("seed.yaml", text)]) else { return Vec::new() };
    let Ok(checked) = check(spec) else { return Vec::new() };
    let names: Vec<String> = checked.spec().instances.iter().map(|instance| instance.name.clone()).collect();
    names.iter().filter_map(|name| resolve(&checked, name).ok()).filter(|i| !i.attachments.is_empty()).collect()
}

fn frame(request: Request) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    write_frame(&mut bytes, &Envelope { version: VERSION, request }).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// The table as the messages that load it, which are those of a dump.
fn encoded(table: &Table) -> Option<Vec<u8>> {
    let at = At { family: table.family, table: &table.name };
    let mut batch = Batch::new(1);
    batch.new_table(at, table.flags).ok()?;
    for chain in &table.chains {
        batch.new_chain(at, chain).ok()?;
    }
    for timeout in &table.timeouts {
        batch.new_timeout(at, timeout).ok()?;
    }
    for map in &table.maps {
        batch.new_map(at, map, 0).ok()?;
        batch.new_elements(at, map, &map.elements).ok()?;
    }
    for chain in &table.chains {
        for rule in &chain.rules {
            batch.new_rule(at, &chain.name, rule).ok()?;
        }
    }
    Some(batch.finish().bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiler_is_named_only_where_there_is_none() {
        assert!(!not_built(OsStr::new("true")).contains("C++"));
        assert!(not_built(OsStr::new("/nonexistent/c++")).contains("C++"));
    }
}
