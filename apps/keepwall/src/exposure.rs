//! The first five minutes: what this machine exposes, the group that would allow just that, how to apply it safely.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use keepwall_core::{AddrRange, Family, Prefix};
use keepwall_host::process::{Process, Signal, user};
use keepwall_link::{Event, Flow, Request, Response};
use keepwall_secgroup::evaluate::Packet;
use keepwall_secgroup::intent::Intent;
use keepwall_secgroup::judge::{EPHEMERAL, judge};
use keepwall_secgroup::spec::Direction;
use keepwall_sensors::interfaces::{self, Interface};
use keepwall_sensors::listeners::{self, Listener, Scope};
use keepwall_sensors::sessions::{self, Session};
use serde::Serialize;

use crate::Context;
use crate::agent::unexpected;
use crate::cli;
use crate::daemons::{self, Daemon};
use crate::failure::Failure;
use crate::own;
use crate::posture;
use crate::ui;

const AGENT: &str = "keepwall-agent";
const AGENT_UNIT: &str = "keepwall-agent.service";
/// An agent that has not opened its socket by then is not coming.
const AGENT_STARTS_WITHIN: Duration = Duration::from_secs(8);

/// One row of the exposure table.
#[derive(Serialize)]
struct Exposed {
    #[serde(flatten)]
    listener: Listener,
    /// What the agent's rules do with somebody on the Internet, where they are in force.
    enforced: Option<bool>,
}

/// What a look at this machine gives.
struct Seen {
    interfaces: Vec<Interface>,
    rows: Vec<Exposed>,
    intent: Option<Intent>,
}

fn look(context: &Context) -> Result<Seen, Failure> {
    let interfaces = interfaces::all()?;
    let intent = match context.agent.ask(Request::Intent) {
        Ok(Response::Intent(intent)) => intent.map(|i| *i),
        _ => None,
    };
    let mut found = listeners::all(&interfaces);
    if let Ok(Response::Published(published)) = context.agent.ask(Request::Published) {
        for port in published {
            // docker-proxy listens as well, unless it is switched off: one row for each port.
            let address = port.address.unwrap_or(IpAddr::from([0, 0, 0, 0]));
            if found.iter().any(|l| l.protocol == port.protocol && l.port == port.port && l.published.is_some()) {
                continue;
            }
            let (scope, devices) = listeners::reach(address, &interfaces);
            found.push(Listener {
                protocol: port.protocol,
                address,
                port: port.port,
                pid: None,
                process: port.by,
                published: Some(port.target),
                scope,
                devices,
            });
        }
    }
    let mut rows: Vec<Exposed> = (found.into_iter())
        .map(|listener| {
            let enforced = intent.as_ref().and_then(|intent| lets_strangers_in(intent, &interfaces, &listener));
            Exposed { listener, enforced }
        })
        .collect();
    rows.sort_by(|a, b| (b.listener.scope, a.listener.port).cmp(&(a.listener.scope, b.listener.port)));
    Ok(Seen { interfaces, rows, intent })
}

/// Whether our rules let a stranger reach it; `None` where no device that leads there is protected.
fn lets_strangers_in(intent: &Intent, interfaces: &[Interface], listener: &Listener) -> Option<bool> {
    let mut answer = None;
    for attachment in intent.attachments.iter().filter(|a| !a.guest && listener.devices.contains(&a.device)) {
        let own = interfaces.iter().filter(|i| i.name == attachment.device).flat_map(|i| &i.addresses);
        for local in own.map(|a| a.address) {
            let peer: IpAddr = match Family::of(local) {
                Family::Ipv4 => [203, 0, 113, 99].into(),
                Family::Ipv6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x99].into(),
            };
            let packet = Packet {
                direction: Direction::Ingress,
                peer,
                local,
                protocol: listener.protocol,
                source_port: EPHEMERAL,
                destination_port: listener.port,
                icmp: None,
            };
            let allowed = intent.observe || judge(intent, attachment, &packet).is_allow();
            answer = Some(answer.unwrap_or(false) || allowed);
        }
    }
    answer
}

fn proto(number: u8) -> &'static str {
    if number == 6 { "tcp" } else { "udp" }
}

fn print(rows: &[Exposed], intent: Option<&Intent>) {
    let table: Vec<Vec<String>> = (rows.iter())
        .map(|row| {
            let l = &row.listener;
            let scope = match (l.scope, row.enforced) {
                (Scope::Local, _) => ui::green("this machine only"),
                (_, Some(false)) => ui::green("denied to strangers"),
                (Scope::Network, _) => ui::yellow("attached networks"),
                (Scope::Internet, Some(true)) => ui::red("the Internet (a rule allows it)"),
                (Scope::Internet, None) => ui::red("the Internet"),
            };
            let process = match &l.published {
                Some(target) => format!("{} → container {target}", l.process),
                None => l.process.clone(),
            };
            let pid = l.pid.map_or(String::new(), |pid| format!(" ({pid})"));
            let address = match l.address {
                a if a.is_unspecified() && a.is_ipv4() => "all IPv4".to_owned(),
                a if a.is_unspecified() => "all (IPv4+IPv6)".to_owned(),
                a => a.to_string(),
            };
            vec![
                format!("{} {}", proto(l.protocol), l.port),
                address,
                format!("{process}{pid}"),
                scope,
                l.devices.join(", "),
            ]
        })
        .collect();
    if table.is_empty() {
        return ui::out("Nothing listens on this machine.");
    }
    ui::table(&["Port", "Bound to", "Process", "Reachable from", "By device"], &table);
    let modelled = if intent.is_some() { "addresses and Keepwall's own rules" } else { "addresses alone" };
    ui::out(ui::dim(&format!("Modelled from {modelled}; other firewalls may deny more.")));
}

pub fn show(context: &Context) -> Result<u8, Failure> {
    let Seen { rows, intent, .. } = look(context)?;
    if context.global.json {
        ui::json(&rows);
    } else {
        print(&rows, intent.as_ref());
    }
    Ok(0)
}

/// True if the agent is systemd's on this machine.
fn agent_unit(context: &Context, state: &Path) -> bool {
    daemons::usual(&context.global.socket) && state == Path::new(keepwall_link::STATE) && daemons::has_unit(AGENT)
}

/// Makes sure that the agent runs, now and after a boot where systemd sees to that.
pub fn ensure_agent(context: &Context, state: &Path) -> Result<(), Failure> {
    let unit = agent_unit(context, state);
    if unit {
        // One that runs already too: nothing else starts it after a boot.
        daemons::systemctl(&["enable", "--quiet", "keepwall-restore.service", AGENT_UNIT])?;
    }
    if context.agent.is_up() {
        return Ok(());
    }
    if !unit {
        return start_agent(context, state);
    }
    daemons::systemctl(&["start", AGENT_UNIT])?;
    await_agent(context, || "see journalctl -u keepwall-agent".to_owned())
}

/// Starts an agent that outlives this command; its log goes beside its state.
fn start_agent(context: &Context, state: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(state).map_err(|error| {
        Failure::new(format!("cannot make {}: {error}", state.display()), "run this as root (sudo keepwall up)")
    })?;
    let mut daemon = Daemon::of(AGENT, &context.global.socket);
    daemon.log = state.join("agent.log");
    let mut command = Command::new(daemons::program(AGENT));
    command.arg("run").arg("--state").arg(state).arg("--socket").arg(&context.global.socket);
    daemon.start(&mut command)?;
    await_agent(context, || format!("{} (in {})", daemon.last_words(), daemon.log.display()))
}

/// Waits until the agent answers; `why` says more if it does not.
fn await_agent(context: &Context, why: impl Fn() -> String) -> Result<(), Failure> {
    let started = Instant::now();
    while !context.agent.is_up() {
        if started.elapsed() > AGENT_STARTS_WITHIN {
            return Err(Failure::plain(format!("the agent does not start: {}", why())));
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

pub fn up(context: &Context, args: &cli::Up) -> Result<u8, Failure> {
    let started = Instant::now();
    let mut agent = "was running already, observing only";
    if args.no_agent {
        agent = "was not started, as asked";
    } else {
        let ran = context.agent.is_up();
        // Who is not root cannot ask systemd for anything, and need not where it runs.
        if !ran || user().uid == 0 {
            ensure_agent(context, &args.state)?;
        }
        if !ran {
            agent = "has started and observes only";
            crate::enroll::resume(context)?;
        }
    }
    // What this machine exposes is shown also if the server does not start.
    let wanted = !args.no_agent && !args.no_server;
    let server = if wanted { own::start(context, &args.state).map(Some) } else { Ok(None) };
    show_up(context, agent, &server, started, args.fleet)?;
    let runs = server?.is_some();
    if runs && args.fleet {
        ui::out("");
        own::join(context, &args.state)?;
    }
    Ok(0)
}

fn show_up(
    context: &Context,
    agent: &str,
    server: &Result<Option<bool>, Failure>,
    started: Instant,
    fleet: bool,
) -> Result<(), Failure> {
    let Seen { interfaces, rows, intent } = look(context)?;
    let proposal = propose(&interfaces, rows.iter().map(|r| &r.listener), &[]);
    let runs = matches!(server, Ok(Some(_)));
    if context.global.json {
        ui::json(&serde_json::json!({ "agent": agent, "server": runs, "exposed": rows, "proposal": proposal }));
        return Ok(());
    }
    ui::out(ui::bold("What this machine exposes"));
    ui::out("");
    print(&rows, intent.as_ref());
    ui::out("");
    let public = rows.iter().filter(|r| r.listener.scope == Scope::Internet && r.enforced != Some(false)).count();
    let network = rows.iter().filter(|r| r.listener.scope == Scope::Network && r.enforced != Some(false)).count();
    ui::out(format!(
        "{public} reachable from the Internet, {network} from attached networks, {} from this machine only or denied.",
        rows.len() - public - network
    ));
    if let Some(intent) = &intent {
        ui::out("");
        ui::out(format!(
            "{} Keepwall protects this machine as {} (`keepwall status`).",
            ui::green("✓"),
            intent.instance
        ));
        if runs {
            own::say(context);
        }
        return Ok(());
    }
    if fleet && runs {
        // What it is to enforce is declared at the server, for all machines.
        return Ok(());
    }
    ui::out("");
    ui::out(ui::bold("The security group that allows just this"));
    ui::out("");
    for line in proposal.lines() {
        ui::out(format!("  {line}"));
    }
    ui::out("");
    ui::out(ui::bold("How to apply it safely"));
    ui::out("");
    ui::out("  keepwall suggest --write keepwall.yaml   write it down, then edit: who really needs what?");
    ui::out("  keepwall plan                            see what would change, and who could reach what");
    ui::out("  keepwall apply                           takes itself back after 60 s unless you confirm");
    ui::out("  keepwall confirm                         in a NEW session: proves that you still get in");
    ui::out("");
    let took = started.elapsed().as_secs_f32();
    ui::out(ui::dim(&format!("The agent {agent}; nothing is blocked. ({took:.1} s)")));
    if runs {
        own::say(context);
    }
    Ok(())
}

pub fn down(context: &Context, args: &cli::Down) -> Result<u8, Failure> {
    // Nobody is told anything more before the one who would be told ends.
    crate::enroll::pause(context)?;
    if own::stop(context)? {
        ui::out(format!("{} The server has ended; what it knows stays.", ui::green("✓")));
    }
    if !context.agent.is_up() {
        ui::out(format!("{} No agent is running.", ui::green("✓")));
        return Ok(0);
    }
    let status = crate::plan::status(context)?;
    if args.remove {
        crate::plan::remove(context, true)?;
    }
    let process = Process::open(status.pid)?;
    let unit = daemons::usual(&context.global.socket) && daemons::has_unit(AGENT);
    if unit {
        // Told to end, it would be started again; and after a boot.
        daemons::systemctl(&["disable", "--quiet", "--now", AGENT_UNIT])?;
    }
    // It may have been started without systemd.
    if !unit || !process.wait(Some(Duration::ZERO))? {
        process.signal(Signal::Terminate)?;
    }
    if !process.wait(Some(Duration::from_secs(5)))? {
        return Err(Failure::new(
            format!("the agent (process {}) does not end", status.pid),
            "kill it by hand; what it enforces stays",
        ));
    }
    let _ = std::fs::remove_file(&context.global.socket);
    let rest = if args.remove || status.instance.is_none() {
        "nothing is enforced"
    } else {
        "what it enforced stays in force"
    };
    ui::out(format!("{} The agent has ended; {rest}.", ui::green("✓")));
    Ok(0)
}

/// Sources named one by one before they are summed up as networks.
const PEERS_MAX: usize = 12;

/// A posture with one instance and the smallest group that lets in what listens here, as text with comments.
fn propose<'l>(interfaces: &[Interface], listeners: impl Iterator<Item = &'l Listener>, flows: &[Flow]) -> String {
    let name = hostname();
    let own_sessions: Vec<Session> = sessions::of_machine();
    let mut ports: BTreeMap<(u8, u16), (Scope, BTreeSet<String>)> = BTreeMap::new();
    for listener in listeners.filter(|l| l.scope != Scope::Local) {
        let what = match &listener.published {
            Some(target) => format!("container {target}"),
            None => listener.process.clone(),
        };
        let entry = ports.entry((listener.protocol, listener.port)).or_insert((listener.scope, BTreeSet::new()));
        entry.0 = entry.0.max(listener.scope);
        entry.1.insert(what);
    }
    let devices: Vec<&Interface> = interfaces
        .iter()
        .filter(|i| {
            i.up && !i.loopback && i.addresses.iter().any(|a| !link_local(a.address)) && !virtual_device(&i.name)
        })
        .collect();
    let networks: BTreeSet<String> = (devices.iter())
        .flat_map(|i| &i.addresses)
        .filter(|a| !link_local(a.address) && !listeners::is_public(a.address))
        .map(|a| network(a.address, a.prefix_len).to_string())
        .collect();

    let mut text = format!("version: 1\n\ninstances:\n  {name}:\n    interfaces:\n");
    if devices.is_empty() {
        text.push_str("      eth0: { groups: [this-machine] }   # no device with an address was found: name yours\n");
    }
    for device in &devices {
        let addresses: Vec<String> =
            device.addresses.iter().filter(|a| !link_local(a.address)).map(|a| quoted(a.address)).collect();
        text.push_str(&format!(
            "      {}: {{ addresses: [{}], groups: [this-machine] }}\n",
            device.name,
            addresses.join(", ")
        ));
    }
    text.push_str("\nsecurity_groups:\n  this-machine:\n    type: basic\n    description: What listens on this machine today\n    ingress:\n");
    if ports.is_empty() {
        text.push_str(
            "      # Nothing listens, so nothing is let in. Add a rule for SSH before you apply this from afar:\n",
        );
        text.push_str("      # - { protocol: tcp, ports: 22, from: 203.0.113.7, description: shell }\n");
    }
    for ((protocol, port), (scope, processes)) in &ports {
        let processes = processes.iter().cloned().collect::<Vec<_>>().join(", ");
        let seen = peers_of(flows, *protocol, *port);
        let (from, remark) = if !seen.is_empty() {
            (format!("[{}]", seen.join(", ")), "the sources that were seen")
        } else {
            let admins: BTreeSet<String> = (own_sessions.iter())
                .filter(|s| *protocol == 6 && s.local.port() == *port)
                .map(|s| quoted(s.remote.ip()))
                .collect();
            match (scope, admins.is_empty()) {
                (_, false) => (
                    format!("[{}]", admins.into_iter().collect::<Vec<_>>().join(", ")),
                    "where you are now; add your other places",
                ),
                (Scope::Internet, true) => ("any".to_owned(), "open to the world today: is that meant?"),
                _ if networks.is_empty() => ("any".to_owned(), "open today"),
                _ => (
                    format!("[{}]", networks.iter().map(|n| n.to_string()).map(quote).collect::<Vec<_>>().join(", ")),
                    "attached networks",
                ),
            }
        };
        let safe: String = processes
            .chars()
            .map(|c| if c.is_alphanumeric() || " .:-_,".contains(c) { c } else { '?' })
            .take(80)
            .collect();
        text.push_str(&format!(
            "      - {{ protocol: {}, ports: {port}, from: {from}, description: \"{safe}\" }}   # {remark}\n",
            proto(*protocol)
        ));
    }
    text.push_str("      - { protocol: icmp, from: any, description: ping }\n      - { protocol: icmpv6, from: any, description: ping }\n");
    text.push_str("    # No egress rules: everything may leave, and answers come back by themselves.\n\ntests:\n");
    let closed = [(3306u16, "a database"), (6379, "Redis"), (2375, "the Docker API")];
    for (port, what) in closed.iter().filter(|(port, _)| !ports.contains_key(&(6, *port))) {
        text.push_str(&format!("  - expect: deny internet -> {name}:{port}   # {what} never faces the world\n"));
    }
    text
}

/// The sources that were seen to open sessions to a port, summed up if there are many.
fn peers_of(flows: &[Flow], protocol: u8, port: u16) -> Vec<String> {
    let peers: BTreeSet<IpAddr> = (flows.iter())
        .filter(|f| f.direction == "ingress" && f.destination_port == port && f.protocol == proto(protocol))
        .map(|f| f.source)
        .collect();
    if peers.len() <= PEERS_MAX {
        return peers.into_iter().map(quoted).collect();
    }
    let wide: BTreeSet<Prefix> = peers.into_iter().map(|a| network(a, if a.is_ipv4() { 24 } else { 64 })).collect();
    if wide.len() <= PEERS_MAX { wide.into_iter().map(|p| quote(p.to_string())).collect() } else { vec!["any".into()] }
}

fn network(address: IpAddr, len: u8) -> Prefix {
    let family = Family::of(address);
    let host = u32::from(family.bits() - len.min(family.bits()));
    let number = AddrRange::number(address);
    let first = if host >= 128 { 0 } else { (number >> host) << host };
    Prefix::new(AddrRange::address(family, first), len.min(family.bits())).unwrap_or(Prefix::host(address))
}

fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// Devices that carry containers and tunnels, not this machine's own traffic: what enters by them has entered already.
fn virtual_device(name: &str) -> bool {
    ["docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "tap", "vnet"].iter().any(|p| name.starts_with(p))
}

fn quote(text: String) -> String {
    if text.contains(':') { format!("\"{text}\"") } else { text }
}

fn quoted(address: IpAddr) -> String {
    quote(address.to_string())
}

fn hostname() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String =
        text.trim().chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')).take(60).collect();
    if keepwall_core::check_name(&name).is_ok() && name != "internet" { name } else { "this-host".to_owned() }
}

pub fn suggest(context: &Context, args: &cli::Suggest) -> Result<u8, Failure> {
    let mut flows: Vec<Flow> = Vec::new();
    if let Some(seconds) = args.watch {
        let end = Instant::now() + Duration::from_secs(u64::from(seconds));
        if let Response::Sessions(now) = context.agent.ask(Request::Sessions)? {
            flows.extend(now);
        }
        ui::say(format!("Watching sessions for {seconds} s …"));
        watch_until(context, end, &mut flows)?;
        if crate::plan::status(context)?.mode == "enforcing" {
            // What is denied now is denied for a reason; nobody gets in by knocking often.
            flows.retain(|flow| matches!(flow.verdict.as_str(), "accept" | "established"));
        }
        ui::say(format!("Saw {} flows.", flows.len()));
    }
    let Seen { interfaces, rows, .. } = look(context)?;
    let text = propose(&interfaces, rows.iter().map(|r| &r.listener), &flows);
    // What is proposed must be a posture, whatever process names and addresses there were.
    posture::checked(&[keepwall_posture::SourceFile::new("proposal", text.clone())])?;
    match &args.write {
        None => ui::out(text.trim_end()),
        Some(path) if path.exists() => {
            return Err(Failure::new(
                format!("{} exists already", path.display()),
                "choose another name; nothing was written",
            ));
        }
        Some(path) => {
            posture::write(path, &text)?;
            ui::out(format!(
                "{} Written to {}. Read it, then: keepwall plan --posture {}",
                ui::green("✓"),
                path.display(),
                path.display()
            ));
        }
    }
    Ok(0)
}

/// More flows than this teach nothing new.
const FLOWS_MAX: usize = 100_000;

fn watch_until(context: &Context, end: Instant, flows: &mut Vec<Flow>) -> Result<(), Failure> {
    // The stream ends with this process's patience, not with the next packet: look at sessions until then, and take
    // what the log tells meanwhile from a thread of its own.
    let (sender, receiver) = std::sync::mpsc::sync_channel(1024);
    let agent = context.agent.clone();
    std::thread::spawn(move || {
        let _ = agent.stream(Request::Flows, |event| match event {
            Event::Flow(flow) => sender.send(flow).is_ok(),
            _ => true,
        });
    });
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        if let Ok(flow) = receiver.recv_timeout(left)
            && flows.len() < FLOWS_MAX
        {
            flows.push(flow);
        } else if flows.len() >= FLOWS_MAX {
            break;
        }
    }
    match context.agent.ask(Request::Sessions)? {
        Response::Sessions(now) => flows.extend(now),
        other => return Err(unexpected(&other)),
    }
    Ok(())
}
