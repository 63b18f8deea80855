//! What CI runs, in the order in which it fails soonest.

use std::process::{Command, Stdio};

use crate::{openapi, root, say, tidy};

/// `cargo xtask ci [--no-tests]`
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let tests = match args {
        [] => true,
        [flag] if flag == "--no-tests" => false,
        _ => return Err("it takes nothing, or --no-tests".into()),
    };
    cargo(&["fmt", "--all", "--check"], "run `cargo fmt`")?;
    let strict = ["clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "-D", "warnings"];
    cargo(&strict, "mend what it names; an exception is `#[expect(…, reason = \"…\")]`")?;
    say("== tidy");
    tidy::run(&[])?;
    say("== openapi --check");
    openapi::run(&["--check".to_owned()])?;
    if present("cargo-deny") {
        let what = ["deny", "--offline", "check", "bans", "licenses", "sources"];
        cargo(&what, "see deny.toml: a licence or a source that is not on the list needs a reason there")?;
    } else {
        say("== cargo-deny is not installed: licences, bans and sources are not checked (cargo install cargo-deny)");
    }
    if tests {
        cargo(&["test", "--workspace", "--locked", "--quiet"], "a test failed; its output is above")?;
    }
    Ok(())
}

fn present(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.is_ok_and(|status| status.success())
}

fn cargo(args: &[&str], help: &str) -> Result<(), String> {
    say(format!("== cargo {}", args.join(" ")));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo).args(args).current_dir(root()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(format!("`cargo {}` failed: {help}", args.join(" "))),
        Err(error) => Err(format!("cannot start cargo: {error}")),
    }
}
