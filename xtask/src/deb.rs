//! `cargo xtask deb`: the Debian package, from this tree, by one command.
//!
//! `dpkg-deb` puts it together; what is in it is the list below and nothing else. Nothing starts by itself.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{root, say};

const MAINTAINER: &str = "The Keepwall authors <keepwall@example.org>";
const PROGRAMS: [&str; 4] = ["keepwall", "keepwall-agent", "keepwall-uplink", "keepwalld"];
const UNITS: [&str; 4] =
    ["keepwall-agent.service", "keepwall-restore.service", "keepwall-uplink.service", "keepwalld.service"];
/// Programs without pages of clap's making: their `--help` is their page.
const DAEMONS: [(&str, &str); 3] = [
    ("keepwall-agent", "enforces security groups on this machine"),
    ("keepwall-uplink", "speaks with a Keepwall control plane for this machine's agent"),
    ("keepwalld", "Keepwall's control plane"),
];
/// Shell, where its completions go, and under which name.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/keepwall"),
    ("zsh", "usr/share/zsh/vendor-completions/_keepwall"),
    ("fish", "usr/share/fish/vendor_completions.d/keepwall.fish"),
];

fn run_it(command: &mut Command) -> Result<Vec<u8>, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

fn put(to: &Path, bytes: &[u8], mode: u32) -> Result<(), String> {
    let write = || {
        if let Some(directory) = to.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(to, bytes)?;
        fs::set_permissions(to, Permissions::from_mode(mode))
    };
    write().map_err(|error| format!("{}: {error}", to.display()))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn gzip(path: &Path) -> Result<(), String> {
    // No time and no name in it: the same tree makes the same package.
    run_it(Command::new("gzip").args(["-9nf"]).arg(path)).map(|_| ())
}

/// What git says of the last commit; nothing outside a clone.
fn of_last_commit(format: &str) -> Option<String> {
    let told = run_it(Command::new("git").current_dir(root()).args(["log", "-1"]).arg(format)).ok()?;
    Some(String::from_utf8_lossy(&told).trim().to_owned()).filter(|told| !told.is_empty())
}

/// A page of what a program says of itself, as it says it.
fn page(name: &str, what: &str, help: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let text: String = (help.lines())
        .map(|line| line.replace('\\', "\\e").replace('-', "\\-"))
        // At the beginning of a line these mean something to the formatter.
        .map(|line| if line.starts_with(['.', '\'']) { format!("\\&{line}\n") } else { line + "\n" })
        .collect();
    let name_escaped = name.replace('-', "\\-");
    format!(
        ".TH {} 8 \"\" \"{name} {version}\" \"Keepwall\"\n.SH NAME\n{name_escaped} \\- {what}\n.SH DESCRIPTION\n.nf\n\
         {text}.fi\n.SH SEE ALSO\n.BR keepwall (1),\n/usr/share/doc/keepwall/fleet.md\n",
        name.to_uppercase()
    )
}

/// `cargo xtask deb [--profile NAME]`
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let profile = match args {
        [] => "release",
        [flag, name] if flag == "--profile" => name,
        _ => return Err("usage: cargo xtask deb [--profile NAME]".into()),
    };
    let root = root();
    say(format!("building with the profile `{profile}` …"));
    let mut build = Command::new("cargo");
    build.current_dir(&root).args(["build", "--locked", "--profile", profile]);
    build.args(PROGRAMS.iter().flat_map(|program| ["--bin", program]));
    if !build.status().map_err(|error| format!("cargo: {error}"))?.success() {
        return Err("the build failed".into());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let built = target.join(profile);
    let tree = target.join("deb");
    let _ = fs::remove_dir_all(&tree);

    for program in PROGRAMS {
        let to = tree.join("usr/bin").join(program);
        put(&to, &read(&built.join(program))?, 0o755)?;
        run_it(Command::new("strip").arg(&to))?;
    }
    for unit in UNITS {
        let to = tree.join("usr/lib/systemd/system").join(unit);
        put(&to, &read(&root.join("packaging/systemd").join(unit))?, 0o644)?;
    }
    let debian = root.join("packaging/debian");
    let preset = "usr/lib/systemd/system-preset/90-keepwall.preset";
    put(&tree.join(preset), &read(&debian.join("90-keepwall.preset"))?, 0o644)?;
    put(&tree.join("usr/lib/sysusers.d/keepwall.conf"), &read(&debian.join("sysusers.conf"))?, 0o644)?;
    put(&tree.join("etc/keepwall/server.toml"), &read(&debian.join("server.toml"))?, 0o644)?;

    let keepwall = built.join("keepwall");
    for (shell, to) in COMPLETIONS {
        put(&tree.join(to), &run_it(Command::new(&keepwall).args(["completions", shell]))?, 0o644)?;
    }
    let man = tree.join("usr/share/man/man1");
    run_it(Command::new(&keepwall).arg("man").arg(&man))?;
    for page in fs::read_dir(&man).map_err(|error| error.to_string())? {
        gzip(&page.map_err(|error| error.to_string())?.path())?;
    }
    for (daemon, what) in DAEMONS {
        let help = run_it(Command::new(built.join(daemon)).arg("--help"))?;
        let to = tree.join(format!("usr/share/man/man8/{daemon}.8"));
        put(&to, page(daemon, what, &String::from_utf8_lossy(&help)).as_bytes(), 0o644)?;
        gzip(&to)?;
    }
    let version = env!("CARGO_PKG_VERSION");
    let doc = tree.join("usr/share/doc/keepwall");
    let date = of_last_commit("--format=%cD").unwrap_or_else(|| "Thu, 01 Jan 1970 00:00:00 +0000".into());
    let changelog = format!(
        "keepwall ({version}) unstable; urgency=medium\n\n  * What is new: CHANGELOG.md.gz beside this file.\n\n \
         -- {MAINTAINER}  {date}\n"
    );
    put(&doc.join("changelog"), changelog.as_bytes(), 0o644)?;
    gzip(&doc.join("changelog"))?;
    put(&doc.join("CHANGELOG.md"), &read(&root.join("CHANGELOG.md"))?, 0o644)?;
    gzip(&doc.join("CHANGELOG.md"))?;
    put(&doc.join("copyright"), &read(&debian.join("copyright"))?, 0o644)?;
    for guide in ["fleet.md", "posture.md"] {
        put(&doc.join(guide), &read(&root.join("docs").join(guide))?, 0o644)?;
    }

    let size = run_it(Command::new("du").args(["-sk", "--apparent-size"]).arg(&tree))?;
    let kib = String::from_utf8_lossy(&size).split_whitespace().next().unwrap_or("0").to_owned();
    let control = format!(
        "Package: keepwall\nVersion: {version}\nArchitecture: amd64\nMaintainer: {MAINTAINER}\n\
         Installed-Size: {kib}\nDepends: libc6 (>= 2.36), libgcc-s1, passwd\nRecommends: systemd\n\
         Section: admin\nPriority: optional\nDescription: cloud-grade security groups for machines you own\n \
         One posture, declared once, enforced on every machine: security groups with a\n cloud's exact semantics, \
         a control plane for fleets, and changes that revert by\n themselves unless they are confirmed. Nothing \
         starts by itself.\n"
    );
    put(&tree.join("DEBIAN/control"), control.as_bytes(), 0o644)?;
    put(&tree.join("DEBIAN/conffiles"), b"/etc/keepwall/server.toml\n", 0o644)?;
    for script in ["postinst", "prerm", "postrm"] {
        put(&tree.join("DEBIAN").join(script), &read(&debian.join(script))?, 0o755)?;
    }
    let package = target.join(format!("keepwall_{version}_amd64.deb"));
    let mut pack = Command::new("dpkg-deb");
    pack.args(["--root-owner-group", "--build"]).arg(&tree).arg(&package);
    // The same commit makes the same bytes, whenever it is built.
    if let Some(time) = of_last_commit("--format=%ct") {
        pack.env("SOURCE_DATE_EPOCH", time);
    }
    run_it(&mut pack)?;
    say(format!("{}: sudo apt install ./{}", package.display(), package.file_name().unwrap_or_default().display()));
    Ok(())
}
