//! Posture files on disk: which, what is in them, and writing one back.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use keepwall_posture::{SourceFile, parse};
use keepwall_secgroup::check::{Checked, check};
use keepwall_secgroup::reach::{describe, run_tests};

use crate::failure::Failure;
use crate::ui;

/// Where a posture is looked for: what was named, `keepwall.yaml` here, then the system's own.
pub fn locate(named: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let usual = ["keepwall.yaml", "/etc/keepwall/posture"];
    usual.iter().map(PathBuf::from).find(|path| path.exists()).ok_or_else(|| {
        Failure::new(
            format!("there is no posture: neither {} exists", usual.join(" nor ")),
            "name one with --posture FILE, or write a first one with `keepwall suggest --write keepwall.yaml`",
        )
    })
}

/// How deep a posture's directories go: those that hold it, and not a link to all of the disk.
const DEPTH_MAX: usize = 8;

/// Every `.yaml` and `.yml` below a directory. What is hidden (`.git`, our own `.keepwall`) is not looked at.
fn collect(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || found.len() > keepwall_posture::FILES_MAX {
            continue;
        }
        if path.is_dir() && depth < DEPTH_MAX {
            collect(&path, depth + 1, found)?;
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            found.push(path);
        }
    }
    Ok(())
}

/// The files of a posture: itself, or every `.yaml` and `.yml` of a directory, with those below, by name.
pub fn read(path: &Path) -> Result<Vec<SourceFile>, Failure> {
    let failed = |path: &Path, error: std::io::Error| {
        Failure::new(format!("cannot read {}: {error}", path.display()), "check the path and that you may read it")
    };
    let metadata = fs::metadata(path).map_err(|error| failed(path, error))?;
    let mut paths = vec![path.to_owned()];
    if metadata.is_dir() {
        paths.clear();
        collect(path, 0, &mut paths).map_err(|error| failed(path, error))?;
        paths.sort();
        if paths.is_empty() {
            return Err(Failure::new(format!("{} holds no .yaml file", path.display()), "put the posture there"));
        }
    }
    let mut files = Vec::new();
    for path in paths {
        let size = fs::metadata(&path).map_err(|error| failed(&path, error))?.len();
        if size > keepwall_posture::FILE_BYTES_MAX as u64 {
            return Err(Failure::new(
                format!(
                    "{} has {size} bytes; a posture file has at most {}",
                    path.display(),
                    keepwall_posture::FILE_BYTES_MAX
                ),
                "split it into several files in a directory",
            ));
        }
        let bytes = fs::read(&path).map_err(|error| failed(&path, error))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            Failure::new(format!("{} is not UTF-8: byte {at}", path.display()), "save it as UTF-8")
        })?;
        files.push(SourceFile::new(&path.display().to_string(), text));
    }
    Ok(files)
}

/// Reads and checks; prints every problem.
pub fn load(named: Option<&Path>) -> Result<Checked, Failure> {
    let path = locate(named)?;
    checked(&read(&path)?)
}

pub fn checked(files: &[SourceFile]) -> Result<Checked, Failure> {
    let spec = parse(files).map_err(|problems| {
        for problem in &problems {
            ui::say(format!("{problem}\n"));
        }
        refusal(problems.len())
    })?;
    check(spec).map_err(|problems| {
        for problem in &problems {
            ui::say(located(files, problem));
        }
        refusal(problems.len())
    })
}

pub fn refusal(count: usize) -> Failure {
    let s = if count == 1 { "" } else { "s" };
    Failure::new(format!("the posture has {count} problem{s}; nothing was changed"), "")
}

/// A checker's problem in the form of the parser's: place, message, the line, the way out.
fn located(files: &[SourceFile], problem: &keepwall_secgroup::check::Problem) -> String {
    let place = &problem.place;
    let (line, column) = (place.line as usize, place.column as usize);
    let file = files.iter().find(|file| *file.name == *place.file);
    let text = file.and_then(|file| file.text.lines().nth(line.checked_sub(1)?));
    let place = if line == 0 { String::new() } else { format!("{}:{line}:{column}", place.file) };
    with_line(&place, &problem.message, text.map(|text| (text, line, column)), &problem.help)
}

/// A problem with its place, if it has one, and the line (text, number, column) that it is in.
pub fn with_line(place: &str, message: &str, line: Option<(&str, usize, usize)>, help: &str) -> String {
    let mut text = if place.is_empty() { String::new() } else { format!("{place}: ") };
    text.push_str(&format!("error: {message}"));
    if let Some((line, number, column)) = line {
        let shown: String = line.chars().take(160).collect();
        let caret = " ".repeat(column.saturating_sub(1).min(160));
        text.push_str(&format!("\n{number:>5} | {shown}\n      | {caret}^"));
    }
    if !help.is_empty() {
        text.push_str(&format!("\n      = {help}"));
    }
    text.push('\n');
    text
}

/// Runs the posture's own tests; a failure stops whatever comes after.
pub fn tests_pass(checked: &Checked) -> Result<usize, Failure> {
    let results = run_tests(checked);
    let failed: Vec<_> = results.iter().filter_map(|r| r.failure.as_ref().map(|why| (r, why))).collect();
    for (result, why) in &failed {
        ui::say(format!("{} {}: {}\n    {why}", ui::red("✗ failed"), result.test.place, describe(&result.test)));
    }
    if failed.is_empty() {
        return Ok(results.len());
    }
    Err(Failure {
        message: format!("{} of {} tests of the posture fail; nothing was changed", failed.len(), results.len()),
        help: "change the rules, or the test if it is wrong (`keepwall test` runs them alone)".into(),
        code: 3,
    })
}

/// Which instance this machine is: named, by host name, or the only one that is no guest.
pub fn instance(checked: &Checked, named: Option<&str>) -> Result<String, Failure> {
    if let Some(name) = named {
        return Ok(name.to_owned());
    }
    let hosts: Vec<&str> = (checked.spec().instances.iter())
        .filter(|i| i.interfaces.iter().any(|x| x.host.is_none()))
        .map(|i| i.name.as_str())
        .collect();
    let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let own = own.trim();
    match (hosts.as_slice(), hosts.iter().find(|host| **host == own)) {
        (_, Some(host)) => Ok((*host).to_owned()),
        ([only], None) => Ok((*only).to_owned()),
        _ => Err(Failure::new(
            format!("the posture does not say which instance this machine ({own}) is"),
            format!("name it with --instance; declared: {}", hosts.join(", ")),
        )),
    }
}

/// Replaces a file whole: beside it, synced, renamed, with the old one's mode.
pub fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let part = path.with_extension("yaml.part");
    let work = || -> std::io::Result<()> {
        let mut file = fs::File::create(&part)?;
        file.write_all(text.as_bytes())?;
        if let Ok(metadata) = fs::metadata(path) {
            file.set_permissions(metadata.permissions())?;
        }
        file.sync_all()?;
        fs::rename(&part, path)
    };
    work().map_err(|error| {
        let _ = fs::remove_file(&part);
        Failure::plain(format!("cannot write {}: {error}; the old file is still there", path.display()))
    })
}
