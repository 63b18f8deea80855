//! This machine's own server: `keepwalld` beside the agent, as somebody without privilege.
//!
//! It listens on loopback and at a local socket. With nothing declared it tells nobody anything, so it changes nothing;
//! and this machine is not in its fleet unless somebody asks for that (`up --fleet`). One machine's best proof that
//! nobody is locked out is a person's new session, and a server on the same machine is always within reach.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use keepwall_api::TokenSpec;
use keepwall_host::process::User;

use crate::contexts;
use crate::daemons::{self, Daemon};
use crate::failure::Failure;
use crate::fleet::Server;
use crate::{Context, cli, enroll, ui};

pub const PROGRAM: &str = "keepwalld";
const UNIT: &str = "keepwalld.service";
/// The account that it runs as; without it, see [`daemons::account`].
const ACCOUNT: &str = "keepwall";
const ACCOUNT_ID: u32 = 64_900;
/// What the administrator wrote about the server, if anything.
const CONFIG: &str = "/etc/keepwall/server.toml";
/// Key, authority and store are made within this also on a slow disk.
const STARTS_WITHIN: Duration = Duration::from_secs(8);
/// A token for a machine that enrols at once.
const TOKEN_S: u32 = 300;

/// Where a program keeps its state on a machine whose agent keeps its own at `state`.
fn beside(state: &Path, name: &str) -> PathBuf {
    if state == Path::new(keepwall_link::STATE) { state.with_file_name(name) } else { state.join(name) }
}

/// Where its parts are, on the machine whose agent listens at `socket`.
struct Places {
    /// Root's: what is found here is what root put here.
    run: PathBuf,
    /// The server's own, where it can make its socket.
    door: PathBuf,
    state: PathBuf,
}

impl Places {
    fn of(socket: &Path, state: &Path) -> Places {
        let run = socket.parent().unwrap_or(Path::new("/")).to_owned();
        Places { door: run.join("server"), state: beside(state, "server"), run }
    }

    fn socket(&self) -> PathBuf {
        self.door.join("api.sock")
    }

    /// Where everybody looks for the socket.
    fn link(&self) -> PathBuf {
        self.run.join("server.sock")
    }
}

fn by_systemd(context: &Context) -> bool {
    daemons::usual(&context.global.socket) && daemons::has_unit(PROGRAM)
}

fn is_up(link: &Path) -> bool {
    UnixStream::connect(link).is_ok()
}

/// Whom it runs as, where systemd does not say so.
pub fn user() -> User {
    daemons::account(ACCOUNT, ACCOUNT_ID)
}

/// Starts it unless it runs. False if it ran already.
pub fn start(context: &Context, state: &Path) -> Result<bool, Failure> {
    let places = Places::of(&context.global.socket, state);
    if is_up(&places.link()) {
        return Ok(false);
    }
    let daemon = Daemon::of(PROGRAM, &context.global.socket);
    if by_systemd(context) {
        daemons::systemctl(&["enable", "--quiet", "--now", UNIT])?;
    } else {
        let user = user();
        daemons::give(&places.state, user)?;
        prepare(&places, user)?;
        daemon.stop()?;
        let mut server = daemons::unprivileged(PROGRAM, user);
        server.command.arg("run").arg("--config").arg(places.run.join("keepwalld.toml"));
        daemon.start(&mut server.command)?;
    }
    let started = Instant::now();
    while !is_up(&places.link()) {
        if !by_systemd(context) && daemon.running().is_none() || started.elapsed() > STARTS_WITHIN {
            let why = daemon.last_words();
            return Err(Failure::new(
                format!("the server does not start: {why}"),
                format!("its log is {}; `keepwall up --no-server` does without", daemon.log.display()),
            ));
        }
        sleep(Duration::from_millis(20));
    }
    Ok(true)
}

/// Its door and its configuration: the administrator's, with the places that fit a server without privilege.
fn prepare(places: &Places, user: User) -> Result<(), Failure> {
    let config = configuration(&read_config()?, places)?;
    let work = || -> std::io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&places.run)?;
        fs::DirBuilder::new().recursive(true).mode(0o711).create(&places.door)?;
        let door = File::open(&places.door)?;
        fchown(&door, Some(user.uid), Some(user.gid))?;
        door.set_permissions(Permissions::from_mode(0o711))?;
        // The directory of all sockets is root's, so that nobody takes the agent's place; a link leads to the server's.
        let (link, beside) = (places.link(), places.run.join("server.sock.new"));
        let _ = fs::remove_file(&beside);
        symlink(places.socket(), &beside)?;
        fs::rename(&beside, &link)?;
        let (file, beside) = (places.run.join("keepwalld.toml"), places.run.join("keepwalld.toml.new"));
        let _ = fs::remove_file(&beside);
        // A password of a store may be in it.
        let mut out = File::options().write(true).create_new(true).mode(0o600).open(&beside)?;
        out.write_all(config.as_bytes())?;
        fchown(&out, Some(user.uid), Some(user.gid))?;
        fs::rename(&beside, &file)
    };
    work().map_err(|error| {
        Failure::new(format!("cannot prepare {}: {error}", places.run.display()), "run this as root (sudo keepwall …)")
    })
}

fn read_config() -> Result<String, Failure> {
    match fs::read_to_string(CONFIG) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(Failure::plain(format!("cannot read {CONFIG}: {error}"))),
    }
}

fn configuration(text: &str, places: &Places) -> Result<String, Failure> {
    let bad = |why: String| Failure::new(format!("{CONFIG}: {why}"), format!("keepwalld check --config {CONFIG}"));
    let mut config: toml::Table = text.parse().map_err(|error: toml::de::Error| bad(error.to_string()))?;
    let string = |path: &Path| toml::Value::String(path.display().to_string());
    config.entry("state").or_insert_with(|| string(&places.state));
    config.entry("log_json").or_insert(toml::Value::Boolean(false));
    let api = config.entry("api").or_insert_with(|| toml::Value::Table(toml::Table::new()));
    let api = api.as_table_mut().ok_or_else(|| bad("`api` is a table".into()))?;
    api.insert("socket".into(), string(&places.socket()));
    Ok(format!("# Made by `keepwall up` from {CONFIG}; changes here are lost.\n{config}"))
}

/// Ends it. False if it did not run.
pub fn stop(context: &Context) -> Result<bool, Failure> {
    if by_systemd(context) && daemons::systemctl(&["is-active", "--quiet", UNIT]).is_ok() {
        daemons::systemctl(&["disable", "--quiet", "--now", UNIT])?;
        return Ok(true);
    }
    Daemon::of(PROGRAM, &context.global.socket).stop()
}

/// Takes this machine into the fleet of its own server.
pub fn join(context: &Context, state: &Path) -> Result<(), Failure> {
    if let Some(server) = crate::plan::status(context)?.server {
        ui::out(format!("{} This machine is in the fleet of {server} already.", ui::green("✓")));
        return Ok(());
    }
    let aim = contexts::own(&context.global.socket)
        .ok_or_else(|| Failure::new("this machine runs no server", "leave --no-server out"))?;
    let spec = TokenSpec { instance: context.global.instance.clone(), ttl_s: TOKEN_S, ..TokenSpec::default() };
    let made = Server::open(aim)?.client.create_token(&spec)?;
    let args =
        cli::Enroll { token: made.token, proxy: None, state: beside(state, "uplink"), agent_state: state.to_owned() };
    enroll::enroll(context, &args).map(drop)
}

/// Where it is, and how a machine comes to it.
pub fn say(context: &Context) {
    let socket = context.global.socket.with_file_name("server.sock");
    ui::out(ui::dim(&format!(
        "A server for a fleet runs too, at unix:{}; it tells machines only what is declared there.",
        socket.display()
    )));
    ui::out(ui::dim(&format!(
        "To add machines: set [agents] listen and public in {CONFIG}, `keepwall down`, `up`, `token create`."
    )));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use keepwall_server::config;

    use super::*;

    #[test]
    fn the_server_is_where_everybody_looks_for_it() {
        let places = Places::of(Path::new(keepwall_link::SOCKET), Path::new(keepwall_link::STATE));
        assert_eq!(places.socket(), Path::new(config::SOCKET));
        assert_eq!(places.link(), Path::new("/run/keepwall/server.sock"));
        assert_eq!(places.state, Path::new(config::STATE));
        assert_eq!(config::PATH, CONFIG);
    }

    #[test]
    fn what_the_administrator_wrote_stays_but_for_the_socket() {
        let places = Places::of(Path::new("/tmp/x/agent.sock"), Path::new("/tmp/y"));
        let made = config::Config::parse(&configuration("", &places).unwrap()).unwrap();
        assert_eq!(made.api.socket, Path::new("/tmp/x/server/api.sock"));
        assert_eq!((made.state, made.log_json), (PathBuf::from("/tmp/y/server"), false));
        let own = "state = \"/srv/k\"\n[api]\nsocket = \"/elsewhere\"\ntls = true\n[agents]\nlisten = \"[::1]:9\"\n";
        let made = config::Config::parse(&configuration(own, &places).unwrap()).unwrap();
        assert_eq!((made.state, made.agents.listen.port()), (PathBuf::from("/srv/k"), 9));
        assert!(made.api.tls && made.api.socket == Path::new("/tmp/x/server/api.sock"));
        for bad in ["api = 1", "state = "] {
            assert!(configuration(bad, &places).unwrap_err().message.contains(CONFIG));
        }
    }
}
