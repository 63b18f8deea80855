//! Which server commands go to: named on the command line, in the environment, or in the file of contexts.
//!
//! The file is its user's alone, because tokens are in it: one that others may read is refused, not mended.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use keepwall_api::Secret;
use keepwall_client::Trust;
use serde::{Deserialize, Serialize};

use crate::Context;
use crate::cli::{ContextCommand, Global};
use crate::failure::Failure;
use crate::ui;

/// The context that stands for this machine; none can be called so.
const THIS_MACHINE: &str = "none";
/// A few hundred contexts with their authorities are less.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// An authority is a few kilobytes.
const CA_BYTES_MAX: u64 = 1 << 20;
const NAME_CHARACTERS_MAX: usize = 64;

/// The whole file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Contexts {
    current: Option<String>,
    contexts: BTreeMap<String, Entry>,
}

/// One server under a name.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Entry {
    server: String,
    /// PEM of the authority that vouches for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<String>,
    /// Or the digest of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_sha256: Option<String>,
    /// Who is logged in.
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<Secret>,
}

impl Entry {
    fn trust(&self) -> Result<Trust, Failure> {
        match (&self.ca, &self.ca_sha256) {
            (Some(pem), _) => Ok(Trust::Pem(pem.clone())),
            (None, Some(text)) => digest(text).map(Trust::Pinned),
            (None, None) => Ok(Trust::System),
        }
    }
}

/// The server that was chosen, and how to speak with it.
#[derive(Debug)]
pub struct Aim {
    /// How it is called.
    pub label: String,
    pub server: String,
    pub trust: Trust,
    pub token: Option<Secret>,
    /// The context it came from, where a token can be kept.
    pub context: Option<String>,
    /// What chose it.
    pub why: String,
}

fn digest(text: &str) -> Result<[u8; 32], Failure> {
    let plain: String = text.chars().filter(|c| *c != ':').collect();
    keepwall_core::unhex(&plain).ok_or_else(|| {
        Failure::new("a SHA-256 has 64 hexadecimal digits", "`keepwalld authority` prints it, at the server")
    })
}

fn path() -> Result<PathBuf, Failure> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")));
    base.map(|base| base.join("keepwall").join("contexts.json")).ok_or_else(|| {
        Failure::new("there is no place for contexts: neither HOME nor XDG_CONFIG_HOME is set", "set HOME")
    })
}

impl Contexts {
    fn load() -> Result<Contexts, Failure> {
        let Ok(path) = path() else { return Ok(Contexts::default()) };
        let failed = |error: std::io::Error| Failure::plain(format!("cannot read {}: {error}", path.display()));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Contexts::default()),
            Err(error) => return Err(failed(error)),
        };
        let mode = file.metadata().map_err(failed)?.mode();
        if mode & 0o077 != 0 {
            return Err(Failure::new(
                format!(
                    "{} may be read or changed by others (mode {:o}); tokens are in it",
                    path.display(),
                    mode & 0o777
                ),
                format!("if nobody did: chmod 600 {}; else log in anew after that", path.display()),
            ));
        }
        let mut text = String::new();
        file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
        serde_json::from_str(&text).map_err(|error| {
            Failure::new(
                format!("{} is not understood: {error}", path.display()),
                "mend it, or remove it and add the contexts again",
            )
        })
    }

    fn save(&self) -> Result<(), Failure> {
        let path = path()?;
        let text = serde_json::to_string_pretty(self).map_err(|error| Failure::plain(error.to_string()))?;
        let part = path.with_extension(format!("json.{}", std::process::id()));
        let work = || -> std::io::Result<()> {
            if let Some(directory) = path.parent() {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
            }
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&part)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&part, &path)
        };
        work().map_err(|error| {
            let _ = fs::remove_file(&part);
            Failure::plain(format!("cannot write {}: {error}", path.display()))
        })
    }

    fn get(&self, name: &str) -> Result<&Entry, Failure> {
        self.contexts.get(name).ok_or_else(|| {
            let help = match keepwall_core::nearest(name, self.contexts.keys().map(String::as_str)) {
                Some(near) => format!("did you mean {near}?"),
                None if self.contexts.is_empty() => "keepwall context add NAME --server URL".to_owned(),
                None => "see `keepwall context list`".to_owned(),
            };
            Failure::new(format!("there is no context `{name}`"), help)
        })
    }

    fn aim(&self, name: &str, why: String) -> Result<Aim, Failure> {
        let entry = self.get(name)?;
        Ok(Aim {
            label: name.to_owned(),
            server: entry.server.clone(),
            trust: entry.trust()?,
            token: entry.token.clone(),
            context: Some(name.to_owned()),
            why,
        })
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The server that commands go to, or none for this machine.
pub fn choose(global: &Global) -> Result<Option<Aim>, Failure> {
    let (server, context, why) = match (&global.server, &global.context) {
        (None, None) => (variable("KEEPWALL_SERVER"), variable("KEEPWALL_CONTEXT"), "the environment"),
        (server, context) => (server.clone(), context.clone(), "the command line"),
    };
    let contexts = Contexts::load()?;
    let named = |option: &str| format!("{option}, from {why}");
    let aim = match (server, context) {
        (Some(_), Some(_)) => {
            return Err(Failure::new("KEEPWALL_SERVER and KEEPWALL_CONTEXT are both set", "set one of them"));
        }
        (Some(server), None) => {
            // A context of the same server knows whom to trust, and who is logged in.
            match contexts.contexts.iter().find(|(_, entry)| entry.server == server) {
                Some((name, _)) => Some(contexts.aim(name, named("its address"))?),
                None => Some(Aim {
                    label: server.clone(),
                    server,
                    trust: Trust::System,
                    token: None,
                    context: None,
                    why: named("its address"),
                }),
            }
        }
        (None, Some(name)) if name == THIS_MACHINE => None,
        (None, Some(name)) => Some(contexts.aim(&name, named("its context"))?),
        (None, None) => match &contexts.current {
            Some(name) => Some(contexts.aim(name, "the context in use".into())?),
            None => None,
        },
    };
    let token = variable("KEEPWALL_TOKEN").map(Secret);
    Ok(aim.map(|aim| Aim { token: token.or(aim.token), ..aim }))
}

/// This machine's own server, for words that mean nothing without one.
pub fn own(socket: &Path) -> Option<Aim> {
    let socket = socket.with_file_name("server.sock");
    socket.exists().then(|| Aim {
        label: "this machine's own server".into(),
        server: format!("unix:{}", socket.display()),
        trust: Trust::System,
        token: variable("KEEPWALL_TOKEN").map(Secret),
        context: None,
        why: "no other was chosen, and this machine runs one".into(),
    })
}

/// Keeps who is logged in, or that nobody is.
pub fn remember(context: &str, user: Option<String>, token: Option<Secret>) -> Result<(), Failure> {
    let mut contexts = Contexts::load()?;
    contexts.get(context)?;
    if let Some(entry) = contexts.contexts.get_mut(context) {
        entry.user = user;
        entry.token = token;
    }
    contexts.save()
}

fn check_name(name: &str) -> Result<(), Failure> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let sane = !name.is_empty() && name.len() <= NAME_CHARACTERS_MAX && name.chars().all(plain);
    match sane && name != THIS_MACHINE {
        true => Ok(()),
        false => Err(Failure::new(
            format!("a context cannot be called `{name}`"),
            "1 to 64 letters, digits, `-`, `_` and `.`; `none` stands for this machine",
        )),
    }
}

pub fn run(context: &Context, command: &ContextCommand) -> Result<u8, Failure> {
    let mut contexts = Contexts::load()?;
    match command {
        ContextCommand::List => return list(context, &contexts),
        ContextCommand::Show => return show(context),
        ContextCommand::Use { name } if name == THIS_MACHINE => contexts.current = None,
        ContextCommand::None => contexts.current = None,
        ContextCommand::Use { name } => {
            contexts.get(name)?;
            contexts.current = Some(name.clone());
        }
        ContextCommand::Add { name, ca, ca_sha256 } => {
            check_name(name)?;
            if contexts.contexts.contains_key(name) {
                return Err(Failure::new(
                    format!("there is a context `{name}` already"),
                    format!("keepwall context remove {name}, or choose another name"),
                ));
            }
            let server = context.global.server.clone().or_else(|| variable("KEEPWALL_SERVER")).ok_or_else(|| {
                Failure::new("which server?", format!("keepwall context add {name} --server https://HOST:7440"))
            })?;
            if let Some(text) = ca_sha256 {
                digest(text)?;
            }
            let ca = ca.as_deref().map(read_ca).transpose()?;
            let entry = Entry { server, ca, ca_sha256: ca_sha256.clone(), ..Entry::default() };
            // Says what is wrong with the address, and whether there is an authority in the file.
            let mut settings = keepwall_client::Settings::new(&entry.server);
            settings.trust = entry.trust()?;
            keepwall_client::Client::new(settings)?;
            contexts.contexts.insert(name.clone(), entry);
            contexts.current = Some(name.clone());
        }
        ContextCommand::Remove { name } => {
            contexts.get(name)?;
            contexts.contexts.remove(name);
            contexts.current.take_if(|current| current == name);
        }
    }
    contexts.save()?;
    if context.global.json {
        ui::json(&serde_json::json!({ "current": contexts.current }));
        return Ok(0);
    }
    if let ContextCommand::Remove { name } = command {
        ui::out(format!(
            "{} {name} is forgotten here. A session that was open ends by itself within a day.",
            ui::green("✓")
        ));
    }
    match contexts.current.as_deref().and_then(|name| Some((name, contexts.contexts.get(name)?))) {
        None => ui::out(format!("{} Commands are about this machine.", ui::green("✓"))),
        Some((name, entry)) => {
            ui::out(format!("{} Commands go to {name} ({}) from now on.", ui::green("✓"), entry.server));
            if entry.token.is_none() && !entry.server.starts_with("unix:") {
                ui::out("  Nobody is logged in there: keepwall login");
            }
        }
    }
    Ok(0)
}

fn read_ca(path: &Path) -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::plain(format!("cannot read {}: {error}", path.display()));
    let mut text = String::new();
    File::open(path).map_err(failed)?.take(CA_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

fn list(context: &Context, contexts: &Contexts) -> Result<u8, Failure> {
    let trust = |entry: &Entry| match (&entry.ca, &entry.ca_sha256) {
        _ if !entry.server.starts_with("https:") => "",
        (Some(_), _) => "its own authority",
        (None, Some(_)) => "a pinned authority",
        (None, None) => "this system's authorities",
    };
    if context.global.json {
        let rows: Vec<_> = (contexts.contexts.iter())
            .map(|(name, entry)| {
                serde_json::json!({
                    "name": name, "current": contexts.current.as_ref() == Some(name), "server": entry.server,
                    "trust": trust(entry), "user": entry.user, "logged_in": entry.token.is_some(),
                })
            })
            .collect();
        ui::json(&rows);
        return Ok(0);
    }
    if contexts.contexts.is_empty() {
        ui::out("There are no contexts; commands are about this machine.");
        ui::out("  keepwall context add NAME --server https://HOST:7440   write down a server");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = (contexts.contexts.iter())
        .map(|(name, entry)| {
            let used = contexts.current.as_ref() == Some(name);
            let user = match (&entry.token, &entry.user) {
                (None, _) => ui::dim("nobody"),
                (Some(_), Some(user)) => user.clone(),
                (Some(_), None) => "an API key".into(),
            };
            vec![
                if used { ui::green("●") } else { " ".into() },
                name.clone(),
                entry.server.clone(),
                user,
                ui::dim(trust(entry)),
            ]
        })
        .collect();
    ui::table(&["", "Context", "Server", "Logged in", "Vouched for by"], &rows);
    if contexts.current.is_none() {
        ui::out("None is in use: commands are about this machine.");
    }
    Ok(0)
}

fn show(context: &Context) -> Result<u8, Failure> {
    let aim = choose(&context.global)?;
    if context.global.json {
        ui::json(&match &aim {
            None => serde_json::json!({ "server": null }),
            Some(aim) => serde_json::json!({
                "server": aim.server, "context": aim.context, "why": aim.why, "logged_in": aim.token.is_some(),
            }),
        });
        return Ok(0);
    }
    match aim {
        None => ui::out("Commands are about this machine: no server is chosen."),
        Some(aim) => {
            let name = aim.context.map_or(String::new(), |name| format!("{name}, "));
            ui::out(format!("Commands go to {name}{} ({}).", aim.server, aim.why));
        }
    }
    Ok(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn digests_have_64_digits_with_or_without_colons() {
        assert_eq!(digest(&"0f".repeat(32)).unwrap(), [15; 32]);
        assert_eq!(digest(&vec!["0F"; 32].join(":")).unwrap(), [15; 32]);
        for bad in ["", &"0f".repeat(31), &"0f".repeat(33), &"0g".repeat(32), &"é".repeat(32)] {
            assert!(digest(bad).is_err(), "{bad}");
        }
    }
}
