//! What the compiler does not hold: who may use whom, where `unsafe` may stand, that links lead somewhere.
//!
//! Each complaint says what to do instead. Long files are mentioned, and are no failure.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{root, say};

/// Layers (top folders) and the layers that their crates may use; their own is always among them (architecture.md).
/// Tests may use anything.
const LAYERS: [(&str, &[&str]); 9] = [
    ("core", &[]),
    ("ir", &["core"]),
    ("policy", &["core", "ir"]),
    ("sys", &["core"]),
    ("drivers", &["core", "ir", "sys"]),
    ("sensors", &["core", "sys"]),
    ("dataplane", &["core", "policy", "sys"]),
    ("control", &["core", "policy"]),
    ("apps", &["core", "policy", "drivers", "sensors", "dataplane", "control", "labs"]),
];
/// These may use everything.
const FREE: [&str; 2] = ["labs", "xtask"];
/// Nothing here reads a clock, a file, a socket or the environment.
const PURE: [&str; 3] = ["core", "ir", "policy"];

/// Crates of others, budgeted by privilege: what is pure, or runs as root, or parses hostile bytes links little.
const BUDGET: [(&str, &[&str]); 8] = [
    ("core", &["serde"]),
    ("ir", &[]),
    ("policy", &["serde", "serde_json", "sha2", "saphyr-parser"]),
    ("sys", &["libc", "rustix"]),
    ("drivers", &["sha2"]),
    ("sensors", &["serde"]),
    // The part of control that the root agent links. The rest runs without privilege.
    ("control/link", &["serde", "serde_json"]),
    ("apps/keepwall-agent", &["serde", "serde_json"]),
];

/// A longer file is worth a thought.
const LINES_MAX: usize = 900;
/// Folders that hold nothing of ours.
const SKIPPED: [&str; 5] = ["target", ".git", "fuzz/target", "fuzz/corpus", "fuzz/artifacts"];

/// `cargo xtask tidy`
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    if !args.is_empty() {
        return Err("it takes no arguments".into());
    }
    let root = root();
    let mut complaints = Vec::new();
    let members = members(&root)?;
    for member in &members {
        manifest(&root, &members, member, &mut complaints);
    }
    let mut files = Vec::new();
    walk(&root, &root, &mut files).map_err(|error| format!("cannot read the tree: {error}"))?;
    let mut long = Vec::new();
    for path in &files {
        // Not text: not ours to judge.
        let Ok(text) = fs::read_to_string(root.join(path)) else { continue };
        lines(path, &text, &mut complaints);
        if path.ends_with(".md") {
            links(&root, path, &text, &mut complaints);
        }
        if path.ends_with(".rs") && text.lines().count() > LINES_MAX {
            long.push(format!("{path} ({})", text.lines().count()));
        }
    }
    named_tests(&root, &files, &mut complaints);
    if !long.is_empty() {
        say(format!("longer than {LINES_MAX} lines, worth a thought: {}", long.join(", ")));
    }
    if complaints.is_empty() {
        say(format!("tidy: {} crates, {} files", members.len(), files.len()));
        return Ok(());
    }
    complaints.sort();
    complaints.iter().for_each(say);
    Err(format!("{} complaints", complaints.len()))
}

/// A crate of the workspace.
struct Member {
    /// `policy/secgroup`
    folder: String,
    name: String,
    manifest: String,
}

impl Member {
    fn layer(&self) -> &str {
        self.folder.split('/').next().unwrap_or(&self.folder)
    }
}

fn members(root: &Path) -> Result<Vec<Member>, String> {
    let read = |path: PathBuf| fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()));
    let workspace = read(root.join("Cargo.toml"))?;
    let list = workspace.split("members = [").nth(1).and_then(|rest| rest.split(']').next()).unwrap_or_default();
    let mut out = Vec::new();
    for folder in list.split('"').skip(1).step_by(2) {
        let manifest = read(root.join(folder).join("Cargo.toml"))?;
        let name = section(&manifest, "package").find_map(|line| value(line, "name")).unwrap_or_default();
        out.push(Member { folder: folder.to_owned(), name, manifest });
    }
    if out.is_empty() { Err("Cargo.toml lists no members".into()) } else { Ok(out) }
}

/// The lines of one section of a manifest.
fn section<'a>(manifest: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let header = format!("[{name}]");
    manifest.lines().skip_while(move |line| line.trim() != header).skip(1).take_while(|line| !line.starts_with('['))
}

/// `key = "value"`
fn value(line: &str, key: &str) -> Option<String> {
    let (found, value) = line.split_once('=')?;
    (found.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
}

/// What a manifest depends on outside its tests, also in `[dependencies.NAME]` and per target.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut inside = false;
    for line in manifest.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            let header = header.rsplit_once("cfg(").map_or(header, |(_, rest)| rest);
            inside = header == "dependencies" || header.ends_with(".dependencies");
            if let Some((_, name)) = header.split_once("dependencies.")
                && !header.contains("dev-")
                && !header.contains("build-")
            {
                out.push(name.to_owned());
            }
        } else if inside && !line.is_empty() && !line.starts_with('#') {
            out.extend(line.split(['.', '=', ' ']).next().map(str::to_owned));
        }
    }
    out
}

fn manifest(root: &Path, members: &[Member], member: &Member, complaints: &mut Vec<String>) {
    let place = format!("{}/Cargo.toml", member.folder);
    let layer = member.layer();
    let allowed = LAYERS.iter().find(|(name, _)| *name == layer).map(|(_, allowed)| *allowed);
    if allowed.is_none() && !FREE.contains(&layer) {
        complaints.push(format!(
            "{place}: `{layer}` is no layer; put the crate into one of {}, labs, or name the layer in ARCHITECTURE.md and in xtask/src/tidy.rs",
            LAYERS.map(|(name, _)| name).join(", ")
        ));
    }
    for dependency in dependencies(&member.manifest) {
        match (members.iter().find(|other| other.name == dependency), allowed) {
            (Some(other), Some(allowed)) if other.layer() != layer && !allowed.contains(&other.layer()) => {
                complaints.push(format!(
                    "{place}: {layer} may not use {} (of {}); move the type that both need down into core, or hand the value over as an argument",
                    other.name,
                    other.layer()
                ));
            }
            (None, Some(_)) => {
                let budget = BUDGET.iter().find(|(of, _)| *of == member.folder || *of == layer);
                if let Some((of, budget)) = budget
                    && !budget.contains(&dependency.as_str())
                {
                    complaints.push(format!(
                        "{place}: `{dependency}` is not in the budget of {of}; write the few lines that you need of it, or add it to BUDGET in xtask/src/tidy.rs with the reason in the commit"
                    ));
                }
            }
            _ => {}
        }
    }
    let lints = section(&member.manifest, "lints").any(|line| line.trim() == "workspace = true");
    if layer == "sys" {
        if !member.manifest.contains("undocumented_unsafe_blocks = \"deny\"") {
            complaints
                .push(format!("{place}: deny clippy::undocumented_unsafe_blocks: each block says why it is sound"));
        }
    } else if !lints {
        complaints.push(format!("{place}: add `[lints]` with `workspace = true`"));
    }
    if PURE.contains(&layer) {
        let read = |folder: &str| fs::read_to_string(root.join(folder).join("clippy.toml")).ok();
        let (own, model) = (read(&member.folder), read("core"));
        if own.is_none() || own != model {
            complaints.push(format!(
                "{}/clippy.toml: {layer} is pure; copy core/clippy.toml, which bans clock, files, sockets and environment",
                member.folder
            ));
        }
    }
}

fn walk(root: &Path, folder: &Path, out: &mut Vec<String>) -> std::io::Result<()> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    entries.sort();
    for path in entries {
        let Ok(relative) = path.strip_prefix(root) else { continue };
        let name = relative.to_string_lossy().into_owned();
        if SKIPPED.contains(&name.as_str()) || path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            walk(root, &path, out)?;
        } else {
            out.push(name);
        }
    }
    Ok(())
}

/// Words in pieces, so that this file does not complain about itself.
const LATER: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
const MACHINE: [&str; 4] =
    [concat!("/wo", "rk/"), concat!("/tmp/tar", "get"), concat!("/ro", "ot/"), concat!("/ho", "me/")];
const UNSAFE: &str = concat!("un", "safe");

fn lines(path: &str, text: &str, complaints: &mut Vec<String>) {
    let rust = path.ends_with(".rs");
    for (n, line) in text.lines().enumerate() {
        let place = format!("{path}:{}", n + 1);
        if let Some(word) = LATER.iter().find(|word| has_word(line, word)) {
            complaints.push(format!("{place}: {word}: do it, or open an issue and say in the text what holds today"));
        }
        if let Some(prefix) = MACHINE.iter().find(|prefix| line.contains(*prefix)) {
            complaints
                .push(format!("{place}: `{prefix}…` is a path of one machine; use a relative path or an argument"));
        }
        let code = line.trim_start();
        let opens = ["{", "fn ", "impl ", "extern "].iter().any(|next| code.contains(&format!("{UNSAFE} {next}")));
        if rust && opens && !code.starts_with("//") && !path.starts_with("sys/") {
            complaints.push(format!("{place}: only sys may; put a safe door there and use it"));
        }
    }
}

fn has_word(line: &str, word: &str) -> bool {
    let edge = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
    line.match_indices(word)
        .any(|(at, _)| edge(line[..at].chars().next_back()) && edge(line[at + word.len()..].chars().next()))
}

/// Relative links of a page lead to something.
fn links(root: &Path, path: &str, text: &str, complaints: &mut Vec<String>) {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    let mut fenced = false;
    for (n, line) in text.lines().enumerate() {
        fenced ^= line.trim_start().starts_with("```");
        if fenced {
            continue;
        }
        for target in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            if !root.join(folder).join(target).exists() {
                complaints.push(format!("{path}:{}: there is no `{target}`; mend the link or write the page", n + 1));
            }
        }
    }
}

/// The page on known attacks names tests: each must be there.
const NAMES_TESTS: &str = "docs/known-attacks.md";

fn named_tests(root: &Path, files: &[String], complaints: &mut Vec<String>) {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let page = read(NAMES_TESTS);
    let code: String = files.iter().filter(|path| path.ends_with(".rs")).map(|path| read(path)).collect();
    // Every second piece stands between backticks; a test's name is a sentence with underscores.
    for name in page.split('`').skip(1).step_by(2) {
        let sentence = name.matches('_').count() >= 3 && name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        if sentence && !code.contains(&format!("fn {name}(")) {
            complaints.push(format!("{NAMES_TESTS}: there is no test `{name}`; name the one that covers the row now"));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn member(folder: &str, name: &str, dependencies: &str) -> Member {
        let manifest = format!(
            "[package]\nname = \"{name}\"\n[dependencies]\n{dependencies}\n[dev-dependencies]\nproptest.workspace = true\nkeepwall-nft.workspace = true\n[lints]\nworkspace = true\n"
        );
        Member { folder: folder.into(), name: name.into(), manifest }
    }

    fn complaints(member_under_test: Member) -> Vec<String> {
        let members = [
            member("ir", "keepwall-ir", ""),
            member("drivers/nft", "keepwall-nft", ""),
            member("policy/secgroup", "keepwall-secgroup", ""),
        ];
        let mut out = Vec::new();
        manifest(&root(), &members, &member_under_test, &mut out);
        out
    }

    #[test]
    fn a_layer_uses_only_what_is_below_it_and_tests_use_anything() {
        assert_eq!(complaints(member("policy/posture", "p", "keepwall-ir.workspace = true")), Vec::<String>::new());
        let found = complaints(member("policy/posture", "p", "keepwall-nft = { path = \"x\" }"));
        assert!(found[0].contains("policy may not use keepwall-nft (of drivers); move the type"), "{found:?}");
        let found = complaints(member("apps/keepwall", "a", "keepwall-ir.workspace = true"));
        assert!(found[0].contains("apps may not use keepwall-ir"), "{found:?}");
        assert!(complaints(member("labs/packets", "l", "keepwall-ir.workspace = true\nrand = \"1\"")).is_empty());
        assert!(complaints(member("plugins/x", "x", ""))[0].contains("`plugins` is no layer"));
    }

    #[test]
    fn what_runs_as_root_links_little() {
        let found = complaints(member("apps/keepwall-agent", "a", "serde.workspace = true\nclap.workspace = true"));
        assert!(
            found.len() == 1 && found[0].contains("`clap` is not in the budget of apps/keepwall-agent"),
            "{found:?}"
        );
        let found = complaints(member("core", "c", "\n[target.'cfg(unix)'.dependencies]\nlibc = \"1\""));
        assert!(found.iter().any(|text| text.contains("`libc`")), "{found:?}");
    }

    #[test]
    fn lines_that_should_not_stay_are_seen_and_words_that_hold_them_are_not() {
        let mut out = Vec::new();
        let bad = format!("// {} later\nlet x = \"{}x\";\n{UNSAFE} {{ }}\n", LATER[0], MACHINE[0]);
        lines("core/src/a.rs", &bad, &mut out);
        assert_eq!(out.len(), 3, "{out:?}");
        out.clear();
        lines("sys/src/a.rs", &format!("{UNSAFE} {{ }}\n// {UNSAFE} {{\nmktemp {}X\n", LATER[2]), &mut out);
        assert_eq!(out, Vec::<String>::new());
    }

    #[test]
    fn a_link_that_leads_nowhere_is_seen() {
        let mut out = Vec::new();
        let text =
            "[a](Cargo.toml) [b](no-such-page.md#x) [c](https://example.org/) [d](#here)\n```\n[e](nowhere)\n```\n";
        links(&root(), "page.md", text, &mut out);
        assert_eq!(out, ["page.md:1: there is no `no-such-page.md`; mend the link or write the page"]);
    }

    #[test]
    fn the_table_names_each_layer_once_and_only_layers() {
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        LAYERS.iter().for_each(|(name, _)| *names.entry(name).or_default() += 1);
        assert!(names.values().all(|count| *count == 1));
        assert!(LAYERS.iter().flat_map(|(_, of)| of.iter()).all(|of| names.contains_key(of) || FREE.contains(of)));
    }
}
