//! The command line's words. Every help text is read by somebody who has never seen this program.

mod fleet;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use fleet::*;

/// Cloud-grade security groups for machines you own.
///
/// Write down who may talk to which machine (a posture), see what would change and who could reach what
/// (`plan`), apply it with a safety net (`apply`, then `confirm` from a new session), and ask why (`explain`).
#[derive(Debug, Parser)]
#[command(name = "keepwall", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "\
Start here:
  keepwall up                      what this machine exposes, and how to protect it
  keepwall lab                     a small cloud on this machine, proved with real packets
  keepwall plan && keepwall apply  the everyday loop

Several machines under one posture, with a server (keepwalld):
  keepwall context add prod --server https://HOST:7440   then the same words are about its fleet
  keepwall context none                                  and about this machine again

Exit codes: 0 done, 1 failed, 2 wrong usage (or, for plan --detailed-exitcode, changes),
3 failed policy tests or findings.")]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args, Clone)]
pub struct Global {
    /// Posture file or directory [default: ./keepwall.yaml, then /etc/keepwall/posture]
    #[arg(long, short = 'p', global = true, env = "KEEPWALL_POSTURE", value_name = "PATH")]
    pub posture: Option<PathBuf>,
    /// The agent's local socket
    #[arg(long, global = true, env = "KEEPWALL_SOCKET", value_name = "PATH", default_value = keepwall_link::SOCKET)]
    pub socket: PathBuf,
    /// Which server: https://HOST:PORT, http://127.0.0.1:PORT, unix:/PATH [env: KEEPWALL_SERVER=]
    #[arg(long, global = true, value_name = "URL", conflicts_with = "context")]
    pub server: Option<String>,
    /// Which context's server; `none` is this machine [env: KEEPWALL_CONTEXT=]
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Which instance is meant [default: what this machine is, by host name]
    #[arg(long, global = true, env = "KEEPWALL_INSTANCE", value_name = "NAME")]
    pub instance: Option<String>,
    /// Print data as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// No colours (as does the NO_COLOR variable)
    #[arg(long, global = true)]
    pub no_color: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start agent and server, observing only, and show what this machine exposes and how to protect it
    Up(Up),
    /// Stop what `up` started; what is enforced stays enforced
    Down(Down),
    /// Show what listens on this machine and from where it can be reached
    Exposure,
    /// Take this machine into a fleet: from then on its server decides what is enforced here
    Enroll(Enroll),
    /// Take this machine out of its fleet; what is enforced stays enforced
    Leave(Leave),
    /// Check the posture: spelling, names, quotas, its own tests
    Check,
    /// Run the posture's own tests (`tests:`)
    Test,
    /// Find rules that do nothing, do too much, or were never needed
    Health,
    /// Show what applying the posture would change: rules, and who can reach what
    Plan(Plan),
    /// Apply the posture (or a saved plan); reverts by itself unless confirmed
    Apply(Apply),
    /// Keep what was applied. Run it in a session opened after the change
    Confirm(Confirm),
    /// Take an unconfirmed change back now; with a server, the change that is on its way
    Revert,
    /// Stop enforcing on this machine and forget its state
    Remove(Yes),
    /// Show what is enforced, what waits for confirmation, and whether the kernel agrees
    Status,
    /// Compare the kernel with what it should hold, and repair it
    Verify,
    /// Show declared, resolved and loaded state side by side, with every oddity
    Debug,
    /// Say what happens to a packet, and which rule in which file decides it
    Explain(Question),
    /// Prove it in the kernel: follow real packets rule by rule, and compare with the model
    Trace(Trace),
    /// Show who can reach whom on what
    Reach(Reach),
    /// Watch accepted and denied flows with the names of their rules
    Flows(Flows),
    /// Show packets and bytes by rule
    Counters,
    /// Propose the smallest group that allows what this machine listens for
    Suggest(Suggest),
    /// Work with security groups: rules, members, import and export, snapshots
    Sg(SgArgs),
    /// A small cloud in network namespaces on this machine: enforce an example and prove each line
    Lab(Lab),
    /// Choose which server commands go to, or this machine
    #[command(subcommand)]
    Context(ContextCommand),
    /// Log in at the server of a context
    Login(Login),
    /// End the session at the server of a context
    Logout,
    /// Show who you are at the server, and what you may
    Whoami,
    /// Posture of the fleet: what is declared, its history, return to an earlier one (needs a server)
    #[command(subcommand)]
    Posture(Posture),
    /// Changes on their way through the fleet (needs a server)
    #[command(subcommand)]
    Rollout(Rollout),
    /// Machines of the fleet (needs a server)
    #[command(subcommand)]
    Instance(Instance),
    /// Tokens that let machines into the fleet (needs a server)
    #[command(subcommand)]
    Token(Token),
    /// What was concluded about machines (needs a server)
    #[command(subcommand)]
    Finding(FindingCommand),
    /// What machines report, and what happens now (needs a server)
    #[command(subcommand)]
    Event(EventCommand),
    /// People who may log in (needs a server)
    #[command(subcommand)]
    User(User),
    /// Accounts for programs (needs a server)
    #[command(subcommand)]
    ServiceAccount(ServiceAccount),
    /// API keys (needs a server)
    #[command(subcommand)]
    Key(Key),
    /// Who did what, and whether that record is whole (needs a server)
    #[command(subcommand)]
    Audit(Audit),
    /// Print shell completions
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory
    Man {
        /// Where to
        directory: PathBuf,
    },
}

impl Command {
    /// Its word, if it is about this machine and no other.
    pub fn only_here(&self) -> Option<&'static str> {
        Some(match self {
            Command::Up(_) => "up",
            Command::Down(_) => "down",
            Command::Exposure => "exposure",
            Command::Confirm(_) => "confirm",
            Command::Remove(_) => "remove",
            Command::Verify => "verify",
            Command::Debug => "debug",
            Command::Trace(_) => "trace",
            Command::Flows(_) => "flows",
            Command::Counters => "counters",
            Command::Suggest(_) => "suggest",
            Command::Lab(_) => "lab",
            _ => return None,
        })
    }

    /// Its word, if it means nothing without a server.
    pub fn only_there(&self) -> Option<&'static str> {
        Some(match self {
            Command::Login(_) => "login",
            Command::Logout => "logout",
            Command::Whoami => "whoami",
            Command::Posture(_) => "posture",
            Command::Rollout(_) => "rollout",
            Command::Instance(_) => "instance",
            Command::Token(_) => "token",
            Command::Finding(_) => "finding",
            Command::Event(_) => "event",
            Command::User(_) => "user",
            Command::ServiceAccount(_) => "service-account",
            Command::Key(_) => "key",
            Command::Audit(_) => "audit",
            _ => return None,
        })
    }
}

#[derive(Debug, Args)]
pub struct Up {
    /// Only look: start nothing
    #[arg(long, conflicts_with = "fleet")]
    pub no_agent: bool,
    /// Start no server beside the agent
    #[arg(long, conflicts_with = "fleet")]
    pub no_server: bool,
    /// Take this machine into the fleet of its own server: it is told by `keepwall --server …` from then on, and
    /// changes are confirmed by contact with that server instead of by you in a new session
    #[arg(long)]
    pub fleet: bool,
    /// Where the agent keeps its state
    #[arg(long, value_name = "DIR", default_value = keepwall_link::STATE)]
    pub state: PathBuf,
}

#[derive(Debug, Args)]
pub struct Down {
    /// Also stop enforcing: remove the rules and forget the state
    #[arg(long)]
    pub remove: bool,
}

#[derive(Debug, Args)]
pub struct Enroll {
    /// The one-time token that the server made, or `-` to read it from standard input
    pub token: String,
    /// An HTTP proxy on the way to the server [default: https_proxy and no_proxy of the environment]
    #[arg(long, value_name = "http://HOST:PORT")]
    pub proxy: Option<String>,
    /// Where this machine's key and certificate are kept
    #[arg(long, value_name = "DIR", default_value = keepwall_uplink::identity::STATE)]
    pub state: PathBuf,
    /// Where the agent keeps its state, if it has to be started
    #[arg(long, value_name = "DIR", default_value = keepwall_link::STATE)]
    pub agent_state: PathBuf,
}

#[derive(Debug, Args)]
pub struct Leave {
    /// Where this machine's key and certificate are kept
    #[arg(long, value_name = "DIR", default_value = keepwall_uplink::identity::STATE)]
    pub state: PathBuf,
    /// Where the agent keeps its state, if it has to be started
    #[arg(long, value_name = "DIR", default_value = keepwall_link::STATE)]
    pub agent_state: PathBuf,
}

#[derive(Debug, Args)]
pub struct Yes {
    /// Do not ask
    #[arg(long, short = 'y')]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct Plan {
    /// Save the plan, to be applied exactly as shown
    #[arg(long, short = 'o', value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Exit with 0 if nothing would change, 2 if something would
    #[arg(long)]
    pub detailed_exitcode: bool,
    /// Plan to log what would be dropped, and drop nothing
    #[arg(long)]
    pub observe: bool,
}

#[derive(Debug, Args)]
pub struct Apply {
    /// A plan saved by `plan --out`; refused if the machine has moved on since
    pub plan: Option<PathBuf>,
    /// Revert unless confirmed within this many seconds (5-3600); machines of a fleet confirm by themselves
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(5..=3600))]
    pub confirm_within: u32,
    /// Make it permanent at once: nothing reverts if you are locked out
    #[arg(long)]
    pub danger_no_confirm: bool,
    /// Go on although a new session like yours would be refused afterwards
    #[arg(long)]
    pub danger_cut_session: bool,
    /// Log what would be dropped, and drop nothing
    #[arg(long)]
    pub observe: bool,
    /// Do not ask
    #[arg(long, short = 'y')]
    pub yes: bool,
    /// Why, for the record
    #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
    pub note: String,
    #[command(flatten)]
    pub pace: Pace,
}

#[derive(Debug, Args)]
pub struct Confirm {
    /// Take the word of a session that was open before the change, which proves little
    #[arg(long)]
    pub danger_same_session: bool,
}

#[derive(Debug, Args)]
pub struct Question {
    /// Who opens the session: an address, or an instance of the posture
    #[arg(long, value_name = "WHO")]
    pub from: String,
    /// Whom to: an instance of the posture, or an address
    #[arg(long, value_name = "WHOM")]
    pub to: String,
    /// Destination port
    #[arg(long)]
    pub port: Option<u16>,
    /// tcp, udp, icmp, icmpv6, gre, or a number
    #[arg(long, default_value = "tcp")]
    pub protocol: String,
    /// Source port
    #[arg(long, default_value_t = keepwall_secgroup::judge::EPHEMERAL)]
    pub source_port: u16,
}

#[derive(Debug, Args)]
pub struct Trace {
    /// Only packets from this address
    #[arg(long, value_name = "ADDRESS")]
    pub from: Option<IpAddr>,
    /// Only packets to this address
    #[arg(long, value_name = "ADDRESS")]
    pub to: Option<IpAddr>,
    /// Only packets to this port
    #[arg(long)]
    pub port: Option<u16>,
    /// Only this protocol
    #[arg(long)]
    pub protocol: Option<String>,
    /// How long to wait, in seconds (1-300)
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=300))]
    pub seconds: u32,
    /// Stop after this many packets (1-1000)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub packets: u32,
}

#[derive(Debug, Args)]
pub struct Reach {
    /// Only this source
    #[arg(long)]
    pub from: Option<String>,
    /// Only this destination
    #[arg(long)]
    pub to: Option<String>,
}

#[derive(Debug, Args)]
pub struct Flows {
    /// Only accepted or only denied ones
    #[arg(long, value_enum)]
    pub verdict: Option<VerdictFilter>,
    /// Only this port, as source or destination
    #[arg(long)]
    pub port: Option<u16>,
    /// Only this address, as source or destination
    #[arg(long)]
    pub address: Option<IpAddr>,
    /// Only flows decided by a rule of this group
    #[arg(long, value_name = "NAME")]
    pub group: Option<String>,
    /// Stop after this many
    #[arg(long, short = 'n', value_name = "COUNT")]
    pub count: Option<u64>,
    /// Established sessions now, instead of what happens from now on
    #[arg(long)]
    pub established: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VerdictFilter {
    Accept,
    Drop,
}

#[derive(Debug, Args)]
pub struct Suggest {
    /// Watch flows for this many seconds first (needs an applied posture; `apply --observe` drops nothing)
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86400))]
    pub watch: Option<u32>,
    /// Write the proposal to a new posture file
    #[arg(long, value_name = "FILE")]
    pub write: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Lab {
    #[command(subcommand)]
    pub command: Option<LabCommand>,
    /// The posture to enforce in the lab
    #[arg(long, value_name = "FILE")]
    pub example: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// Make the lab and leave it running, to play with
    Up,
    /// Prove every line of the posture with real packets, in a lab that is up
    Prove,
    /// Lock-out drill: cut SSH, watch it revert, with the agent alive and with the agent killed
    Drill,
    /// Coexistence drill: other firewalls' tables beside ours
    Coexist,
    /// Fleet drill: a server and four machines, through a bad change, kills, a cut cable and a revocation
    Fleet,
    /// Run a command in one of the lab's machines (client, attacker, web, db)
    Exec {
        /// Which machine
        machine: String,
        /// What to run
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Remove the lab; leaves nothing behind
    Down,
    /// The lab's listeners, started by the lab itself
    #[command(hide = true)]
    Serve,
    /// The server of the fleet drill, started by the lab itself
    #[command(hide = true)]
    Server,
}

#[derive(Debug, Args)]
pub struct SgArgs {
    #[command(subcommand)]
    pub command: Sg,
    /// Do not ask. With a server, a change goes to the fleet at once; without, only to the file
    #[arg(long, short = 'y', global = true)]
    pub yes: bool,
}

#[derive(Debug, Subcommand)]
pub enum Sg {
    /// List groups with type, members and rules
    List,
    /// Show a group: every rule, implicit ones too, with counters if the agent enforces it
    Show {
        /// Group name
        group: String,
    },
    /// Create a group without rules
    Create(SgCreate),
    /// Copy a group's rules into a new group
    Clone {
        /// Group to copy
        group: String,
        /// Name of the new one
        new_name: String,
    },
    /// Delete a group that has no members and that no rule names
    Delete {
        /// Group name
        group: String,
    },
    /// Let members of a basic group reach each other, or isolate them
    InnerAccess {
        /// Group name
        group: String,
        /// accept or drop
        access: AccessWord,
    },
    /// Put an interface into a group
    Join(Membership),
    /// Take an interface out of a group
    Leave(Membership),
    /// Add, remove or change rules
    #[command(subcommand)]
    Rule(RuleCommand),
    /// Write a group's rules as JSON or CSV to standard output
    Export {
        /// Group name
        group: String,
        /// Format
        #[arg(long, value_enum, default_value_t = Format::Json)]
        format: Format,
    },
    /// Add the rules of a JSON or CSV file (at most 200); never overwrites
    Import {
        /// Group name
        group: String,
        /// File; its ending decides the format
        file: PathBuf,
    },
    /// List or restore what a group's rules were before earlier changes
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
}

#[derive(Debug, Args)]
pub struct SgCreate {
    /// 2-128 characters, a letter first
    pub name: String,
    /// An advanced group: isolated, nothing leaves unless allowed
    #[arg(long)]
    pub advanced: bool,
    /// 2-256 characters
    #[arg(long, default_value = "")]
    pub description: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AccessWord {
    Accept,
    Drop,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Format {
    Json,
    Csv,
}

#[derive(Debug, Args)]
pub struct Membership {
    /// Group name
    pub group: String,
    /// instance, or instance/interface where it has several
    pub member: String,
}

#[derive(Debug, Subcommand)]
pub enum RuleCommand {
    /// Add a rule; one that exists already is fine
    Add(RuleArgs),
    /// Remove a rule by what it says, or by number with --number; one that is not there is fine
    Remove(RuleRemove),
    /// Change a rule's priority, policy, ports or description
    Set(RuleSet),
}

#[derive(Debug, Args)]
pub struct RuleArgs {
    /// Group name
    pub group: String,
    /// Outbound instead of inbound
    #[arg(long)]
    pub egress: bool,
    /// drop instead of accept
    #[arg(long)]
    pub drop: bool,
    /// tcp, udp, icmp, icmpv6, gre, all, or a number
    #[arg(long, default_value = "tcp")]
    pub protocol: String,
    /// 22, 22/22, 8000-8100, 80,443, all, or port-list:NAME
    #[arg(long)]
    pub ports: Option<String>,
    /// The other side: CIDR, address, any, group:NAME or prefix-list:NAME; several with commas
    #[arg(long, value_name = "PEER")]
    pub peer: String,
    /// 1 (highest) to 100
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub priority: u8,
    /// This side's private address block (5-tuple rules)
    #[arg(long)]
    pub local: Option<String>,
    /// Source ports (5-tuple rules)
    #[arg(long)]
    pub source_ports: Option<String>,
    /// 1-512 characters
    #[arg(long, default_value = "")]
    pub description: String,
}

#[derive(Debug, Args)]
pub struct RuleRemove {
    /// Group name
    pub group: String,
    /// Outbound instead of inbound
    #[arg(long)]
    pub egress: bool,
    /// The rule's number, as `sg show` counts
    #[arg(long, conflicts_with_all = ["peer", "ports"])]
    pub number: Option<usize>,
    /// drop instead of accept
    #[arg(long)]
    pub drop: bool,
    /// Protocol
    #[arg(long, default_value = "tcp")]
    pub protocol: String,
    /// Ports
    #[arg(long)]
    pub ports: Option<String>,
    /// The other side
    #[arg(long, value_name = "PEER", required_unless_present = "number")]
    pub peer: Option<String>,
    /// Priority
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub priority: u8,
}

#[derive(Debug, Args)]
pub struct RuleSet {
    /// Group name
    pub group: String,
    /// The rule's number, as `sg show` counts
    pub number: usize,
    /// Outbound instead of inbound
    #[arg(long)]
    pub egress: bool,
    /// New priority
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub priority: Option<u8>,
    /// New policy: accept or drop
    #[arg(long)]
    pub policy: Option<AccessWord>,
    /// New ports
    #[arg(long)]
    pub ports: Option<String>,
    /// New description
    #[arg(long)]
    pub description: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// List a group's snapshots
    List {
        /// Group name
        group: String,
    },
    /// Replace all of a group's rules by those of a snapshot
    Restore {
        /// Group name
        group: String,
        /// Which, as `list` names it
        id: String,
    },
}
