//! The words that need a server.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use keepwall_api::{BindingBody, Labels, OnFailure, RoleWord, RolloutPolicy, WaveSpec};

/// Seconds in words: `90`, `90s`, `15m`, `8h`, `7d`.
pub fn duration(text: &str) -> Result<u32, String> {
    let bad = || format!("`{text}` is no duration: write 90s, 15m, 8h or 7d");
    let (digits, unit) = match text.char_indices().next_back() {
        Some((at, unit)) if !unit.is_ascii_digit() => (&text[..at], unit),
        _ => (text, 's'),
    };
    let factor: u32 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(bad()),
    };
    digits.parse::<u32>().ok().and_then(|count| count.checked_mul(factor)).ok_or_else(bad)
}

/// `key=value`
pub fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is no label: write key=value")),
    }
}

fn labels(text: &str) -> Result<Labels, String> {
    text.split(',').map(label).collect()
}

/// `1`, `10%`, `env=test,role=web`
pub fn wave(text: &str) -> Result<WaveSpec, String> {
    let bad = || format!("`{text}` is no wave: write a number of machines (1), a share (10%), or labels (env=test)");
    if text.contains('=') {
        return labels(text).map(WaveSpec::Labels);
    }
    match text.strip_suffix('%') {
        Some(share) => match share.parse() {
            Ok(share @ 1..=100) => Ok(WaveSpec::Percent(share)),
            _ => Err(bad()),
        },
        None => match text.parse() {
            Ok(count @ 1..) => Ok(WaveSpec::Count(count)),
            _ => Err(bad()),
        },
    }
}

/// `viewer`, or `operator:env=test,role=web`
pub fn binding(text: &str) -> Result<BindingBody, String> {
    let (role, scope) = match text.split_once(':') {
        Some((role, scope)) => (role, labels(scope)?),
        None => (text, Labels::new()),
    };
    let role = match role {
        "viewer" => RoleWord::Viewer,
        "operator" => RoleWord::Operator,
        "security" => RoleWord::Security,
        "admin" => RoleWord::Admin,
        other => return Err(format!("`{other}` is no role: viewer, operator, security, admin")),
    };
    Ok(BindingBody { role, scope })
}

/// How a change reaches the machines of a fleet.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "With a server")]
pub struct Pace {
    /// Next wave: so many machines (1), a share (10%), or those with labels (env=test,role=web); may be repeated.
    /// All other machines follow after the last one [default: 1]
    #[arg(long = "wave", value_name = "WAVE", value_parser = wave)]
    pub waves: Vec<WaveSpec>,
    /// How long each wave must keep contact before the next begins: 30s, 10m (at most 24h) [default: 0]
    #[arg(long, value_name = "SECONDS", value_parser = duration)]
    pub soak: Option<u32>,
    /// How many machines may fail or lose contact before it stops [default: 0]
    #[arg(long, value_name = "COUNT")]
    pub max_failures: Option<u32>,
    /// When it stops, all machines go back to the state before
    #[arg(long)]
    pub return_on_failure: bool,
    /// Do not wait for the machines
    #[arg(long)]
    pub detach: bool,
}

impl Pace {
    /// True if nothing of it was asked for.
    pub fn is_usual(&self) -> bool {
        self.waves.is_empty()
            && self.soak.is_none()
            && self.max_failures.is_none()
            && !self.return_on_failure
            && !self.detach
    }

    pub fn policy(&self, confirm_within_s: u32) -> RolloutPolicy {
        let usual = RolloutPolicy::default();
        RolloutPolicy {
            waves: if self.waves.is_empty() { usual.waves } else { self.waves.clone() },
            soak_s: self.soak.unwrap_or(usual.soak_s),
            confirm_within_s,
            failures_max: self.max_failures.unwrap_or(usual.failures_max),
            on_failure: if self.return_on_failure { OnFailure::Return } else { OnFailure::Stop },
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// List contexts; the one in use is marked
    List,
    /// Show which server commands go to, and why
    Show,
    /// Send commands to this context's server from now on
    Use {
        /// Name of the context
        name: String,
    },
    /// Write down a server under a name, and use it
    Add {
        /// A name for it: letters, digits, and - . _
        name: String,
        /// PEM file with the authority that vouches for the server
        #[arg(long, value_name = "FILE", conflicts_with = "ca_sha256")]
        ca: Option<PathBuf>,
        /// SHA-256 of the server's own authority: what `keepwalld authority` prints there
        #[arg(long, value_name = "HEX")]
        ca_sha256: Option<String>,
    },
    /// Forget a context and its token
    Remove {
        /// Name of the context
        name: String,
    },
    /// Use no server: commands are about this machine again
    None,
}

#[derive(Debug, Args)]
pub struct Login {
    /// Who you are [default: you are asked]
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Take an API key from standard input instead of name and password
    #[arg(long, conflicts_with = "user")]
    pub token_stdin: bool,
}

#[derive(Debug, Subcommand)]
pub enum Posture {
    /// Show what is declared: its files, who declared it, why
    Show {
        /// Print this file instead
        file: Option<String>,
    },
    /// List what was declared before, newest first
    History {
        /// How many
        #[arg(long, short = 'n', default_value_t = 20)]
        count: usize,
    },
    /// Show how the files differ between two postures
    Diff {
        /// A revision, as `history` lists them
        revision: u64,
        /// Another one [default: the one that is declared now]
        to: Option<u64>,
    },
    /// Declare an earlier posture again
    Return {
        /// A revision, as `history` lists them
        revision: u64,
        #[command(flatten)]
        pace: Pace,
        /// Do not ask
        #[arg(long, short = 'y')]
        yes: bool,
        /// Why, for the record
        #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
        note: String,
    },
    /// Write the declared files into a new directory, to be edited and applied again
    Pull {
        /// A directory that does not exist yet, or is empty
        directory: PathBuf,
        /// That of this revision [default: the one that is declared now]
        #[arg(long)]
        revision: Option<u64>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Instance {
    /// List machines
    List {
        /// Only those with this label; may be repeated
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
        labels: Vec<(String, String)>,
    },
    /// Show all that is known of a machine
    Show {
        /// Its name
        name: String,
    },
    /// Set labels (key=value) and take labels away (key-); groups may change by that
    Label {
        /// Its name
        name: String,
        /// key=value, or key- to take it away
        #[arg(required = true, value_name = "KEY=VALUE|KEY-")]
        changes: Vec<String>,
    },
    /// Forget a machine: its certificate is worth nothing from then on
    Remove(OneOf),
    /// Take a machine's certificate away: it must enrol again
    Revoke(OneOf),
    /// Print what a machine should enforce now, as JSON
    Intent {
        /// Its name
        name: String,
    },
}

/// Something by its name, to be changed for good.
#[derive(Debug, Args)]
pub struct OneOf {
    /// Its name
    pub name: String,
    /// Do not ask
    #[arg(long, short = 'y')]
    pub yes: bool,
}

#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make a token that lets machines into the fleet, and print what to run on them
    #[command(after_help = "\
With --instance NAME the token is for the one machine that will have this name;
without, a machine is called by its host name.")]
    Create {
        /// Label that the machine gets; may be repeated
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
        labels: Vec<(String, String)>,
        /// How many machines it lets in (1-1000)
        #[arg(long, value_name = "COUNT", default_value_t = 1)]
        uses: u32,
        /// How long it is good: 15m, 1h, 7d (1m-7d)
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
        ttl: u32,
        /// Addresses that machines may have; may be repeated [default: private ranges]
        #[arg(long, value_name = "CIDR")]
        addresses_within: Vec<String>,
        /// Print cloud-init user data, and nothing else
        #[arg(long)]
        cloud_init: bool,
    },
    /// List tokens, without their secrets
    List,
    /// Take a token back; machines that came by it stay
    Delete {
        /// As `list` shows it
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum Rollout {
    /// List changes on their way and done, newest first
    List {
        /// How many
        #[arg(long, short = 'n', default_value_t = 20)]
        count: usize,
    },
    /// Show one: wave by wave, who failed and why
    Show {
        /// As `list` shows it [default: the newest]
        id: Option<String>,
    },
    /// Watch one until it is over
    Follow {
        /// As `list` shows it [default: the newest]
        id: Option<String>,
    },
    /// Go no further; machines that have the change keep it
    Stop {
        /// As `list` shows it [default: the newest]
        id: Option<String>,
    },
    /// Go on after a stop; machines that failed are tried again
    Resume {
        /// As `list` shows it [default: the newest]
        id: Option<String>,
        /// Do not wait for the machines
        #[arg(long)]
        detach: bool,
    },
    /// All machines go back to the posture before
    Return {
        /// As `list` shows it [default: the newest]
        id: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum User {
    /// List people
    List,
    /// Make a user; you are asked for the password
    #[command(after_help = ROLES)]
    Add {
        /// Small letters, digits, - _ . @
        name: String,
        /// What they may; may be repeated
        #[arg(long = "role", value_name = "ROLE[:LABELS]", value_parser = binding)]
        roles: Vec<BindingBody>,
        /// Read the password from standard input
        #[arg(long)]
        password_stdin: bool,
    },
    /// Remove a user, with their sessions and keys
    Remove(OneOf),
    /// Change a password: your own, or somebody's as an administrator
    Passwd {
        /// Whose [default: your own]
        name: Option<String>,
        /// Read the new password from standard input (for others than yourself)
        #[arg(long, requires = "name")]
        password_stdin: bool,
    },
    /// Set what a user may; what they had before is replaced
    #[command(after_help = ROLES)]
    Role {
        /// Whose
        name: String,
        /// All that they may from now on; none means nothing
        #[arg(value_name = "ROLE[:LABELS]", value_parser = binding)]
        roles: Vec<BindingBody>,
    },
    /// Shut a user out, or let them in again
    Disable {
        /// Whom
        name: String,
        /// Let them in again
        #[arg(long)]
        undo: bool,
    },
    /// Codes of an authenticator app at login
    #[command(subcommand)]
    Totp(Totp),
}

const ROLES: &str = "\
Roles:
  viewer    sees posture, machines, rollouts, findings and events
  operator  keeps machines and rollouts
  security  changes the posture; reads the audit log
  admin     everything
Behind a colon stand labels that a machine must carry: operator:env=test,role=web.
Without them a role holds everywhere.";

#[derive(Debug, Subcommand)]
pub enum Totp {
    /// Ask for codes when you log in
    Enable,
    /// Ask you for codes no more
    Disable,
    /// Forget a user's authenticator, as when it was lost
    Forget {
        /// Whose
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum ServiceAccount {
    /// List service accounts
    List,
    /// Make an account that has only keys
    #[command(after_help = ROLES)]
    Add {
        /// Small letters, digits, - _ . @
        name: String,
        /// What it may; may be repeated
        #[arg(long = "role", value_name = "ROLE[:LABELS]", value_parser = binding)]
        roles: Vec<BindingBody>,
    },
    /// Set what it may; what it had before is replaced
    #[command(after_help = ROLES)]
    Role {
        /// Which
        name: String,
        /// All that it may from now on; none means nothing
        #[arg(value_name = "ROLE[:LABELS]", value_parser = binding)]
        roles: Vec<BindingBody>,
    },
    /// Remove it, with its keys
    Remove(OneOf),
}

#[derive(Debug, Subcommand)]
pub enum Key {
    /// List your API keys, without their secrets
    List {
        /// Those of others too
        #[arg(long)]
        all: bool,
    },
    /// Make an API key, and print it this once
    #[command(after_help = ROLES)]
    Create {
        /// For this service account or user [default: yourself]
        #[arg(long, value_name = "NAME")]
        owner: Option<String>,
        /// What it is for
        #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
        note: String,
        /// How long it is good: 8h, 90d (1m-365d)
        #[arg(long, value_name = "TIME", default_value = "90d", value_parser = duration)]
        ttl: u32,
        /// Narrow it to this; may be repeated [default: all that its owner may]
        #[arg(long = "role", value_name = "ROLE[:LABELS]", value_parser = binding)]
        roles: Vec<BindingBody>,
    },
    /// Take a key back
    Delete {
        /// As `list` shows it
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Show who did what, newest last
    List {
        /// How many
        #[arg(long, short = 'n', default_value_t = 50)]
        count: usize,
    },
    /// Check that no line was changed or taken away since it was written
    Verify,
}

/// Which of what was seen.
#[derive(Debug, Args)]
pub struct Seen {
    /// Only from this machine
    #[arg(long, value_name = "INSTANCE")]
    pub from: Option<String>,
    /// Only of this kind: drift, flow, lost, …
    #[arg(long)]
    pub kind: Option<String>,
    /// Only this bad or worse
    #[arg(long, value_enum)]
    pub severity: Option<SeverityWord>,
    /// How many
    #[arg(long, short = 'n', default_value_t = 50)]
    pub count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SeverityWord {
    Info,
    Low,
    Medium,
    High,
    Critical,
}

#[derive(Debug, Subcommand)]
pub enum FindingCommand {
    /// List what was concluded about machines, newest first
    List(Seen),
}

#[derive(Debug, Subcommand)]
pub enum EventCommand {
    /// List what machines reported, newest first
    List(Seen),
    /// Watch what happens, as it happens
    Watch {
        /// Only this: instance, rollout, posture, finding, event
        #[arg(long)]
        kind: Option<String>,
    },
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn durations_waves_and_roles_are_read_and_mistakes_are_named() {
        assert_eq!([duration("90"), duration("15m"), duration("7d")], [Ok(90), Ok(900), Ok(604_800)]);
        for bad in ["", "h", "1w", "-1s", "99999999d", "1h30m", "é"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(wave("3"), Ok(WaveSpec::Count(3)));
        assert_eq!(wave("10%"), Ok(WaveSpec::Percent(10)));
        let labels = Labels::from([("env".into(), "test".into()), ("role".into(), "web".into())]);
        assert_eq!(wave("env=test,role=web"), Ok(WaveSpec::Labels(labels.clone())));
        for bad in ["0", "0%", "101%", "env=", "=x", "ten"] {
            assert!(wave(bad).is_err(), "{bad}");
        }
        assert_eq!(
            binding("operator:env=test,role=web").unwrap(),
            BindingBody { role: RoleWord::Operator, scope: labels }
        );
        assert!(binding("root").unwrap_err().contains("viewer"));
    }
}
