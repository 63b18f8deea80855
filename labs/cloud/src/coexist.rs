//! The coexistence drill: other firewalls' tables beside ours, as their own tools load them.
//!
//! ```text
//!   client ── router ── web ──(docker0 172.30.0.1)── container 172.30.0.2
//! ```
//!
//! Ours must leave theirs as they are, must not be fooled by what they let in, and must say what they drop.

use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use keepwall_sys::link;
use keepwall_sys::namespace::{self, NetNs};

use crate::machine::{DIRECTORY, inside, keepwall, sysctl};
use crate::probe::{Probe, arrives};
use crate::{Error, Line, Programs};

/// The container's namespace.
pub const CONTAINER: &str = "container";
/// The port that the "Docker" of the drill publishes.
const PUBLISHED: u16 = 8081;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address of this module")
}

fn web(port: u16) -> Probe {
    Probe { from: "client", source: ip("10.77.0.10"), destination: ip("10.77.1.10"), protocol: 6, port }
}

/// As ufw loads it: accept what is established, accept SSH, drop the rest.
const UFW: &str = "\
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:ufw-user-input - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -j ufw-user-input
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
COMMIT
";

/// As Docker loads it: destination NAT for a published port, masquerading, forwarding.
const DOCKER: &str = "\
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.30.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 172.30.0.2:80
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER -d 172.30.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
";

/// As firewalld loads it: one inet table of its own, zones, a reject at the end.
const FIREWALLD: &str = "\
table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname \"lo\" accept
		jump filter_IN_public
		reject with icmpx admin-prohibited
	}
	chain filter_IN_public {
		tcp dport 22 ct state new accept
		tcp dport 443 ct state new accept
		meta l4proto { icmp, ipv6-icmp } accept
	}
}
";

fn tool(program: &str, arguments: &[&str], input: &str) -> Result<String, Error> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{program} is needed for this drill: {e} (apt-get install nftables iptables)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).map_err(|e| e.to_string())?;
    }
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr)))
}

/// Every table of the machine but ours, without counters.
fn theirs() -> Result<String, Error> {
    let mut out = String::new();
    for line in tool("nft", &["list", "tables"], "")?.lines() {
        let mut words = line.split_whitespace().skip(1);
        if let (Some(family), Some(name)) = (words.next(), words.next())
            && !name.starts_with("keepwall")
        {
            out.push_str(&tool("nft", &["-s", "list", "table", family, name], "")?);
        }
    }
    Ok(out)
}

fn container() -> Result<(), Error> {
    let path = Path::new("/run/netns/kwlab-container");
    let made = namespace::in_a_new_one(|| -> std::io::Result<()> {
        namespace::pin(path)?;
        link::set_up("lo")
    });
    made.and_then(|r| r).map_err(|e| format!("making the container: {e}"))?;
    let ns = NetNs::open(path).map_err(|e| e.to_string())?;
    inside("web", || {
        let work = || -> std::io::Result<()> {
            link::add_veth("docker0", "eth0", &ns)?;
            link::set_up("docker0")?;
            link::add_address("docker0", ip("172.30.0.1"), 16)?;
            sysctl("ipv4/ip_forward", "1")
        };
        work().map_err(|e| format!("cabling the container: {e}"))
    })?;
    inside(CONTAINER, || {
        let work = || -> std::io::Result<()> {
            link::set_up("eth0")?;
            link::add_address("eth0", ip("172.30.0.2"), 16)?;
            link::add_route(ip("0.0.0.0"), 0, "eth0", Some(ip("172.30.0.1")))?;
            let listener = std::net::TcpListener::bind("0.0.0.0:80")?;
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let _ = stream.write_all(crate::serve::GREETING);
                }
            });
            Ok(())
        };
        work().map_err(|e| format!("setting the container up: {e}"))
    })
}

fn with_port(posture: &Path) -> Result<PathBuf, Error> {
    let text = std::fs::read_to_string(posture).map_err(|e| e.to_string())?;
    let rule = keepwall_posture::NewRule::accept(
        keepwall_core::Protocol::TCP,
        vec![keepwall_secgroup::spec::PortSel::Range(PUBLISHED.to_string().parse().map_err(|_| "a port")?)],
        keepwall_secgroup::spec::Peer::Any,
    );
    let edited = keepwall_posture::edit::add_rule(&text, "web", keepwall_secgroup::spec::Direction::Ingress, &rule)
        .map_err(|e| e.to_string())?;
    let path = Path::new(DIRECTORY).join("published.yaml");
    std::fs::write(&path, edited.text).map_err(|e| e.to_string())?;
    Ok(path)
}

/// Runs the drill in a lab that is up and enforces the example. The lab is taken down afterwards.
///
/// # Errors
/// The lab is not up, or nft or iptables-nft is not installed.
pub fn coexist(programs: &Programs, posture: &Path, mut each: impl FnMut(&Line)) -> Result<Vec<Line>, Error> {
    let mut lines = Vec::new();
    let mut add = |what: &str, expected: &str, good: bool, seen: String| {
        let line = Line { what: what.into(), expected: expected.into(), seen, good };
        each(&line);
        lines.push(line);
    };
    let apply = |posture: &Path| -> Result<String, Error> {
        let out = keepwall(programs, "web", posture, &["apply", "--yes", "--danger-no-confirm"], None)?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        if out.status.success() { Ok(text) } else { Err(text) }
    };
    let status = || -> Result<String, Error> {
        let out = keepwall(programs, "web", posture, &["status"], None)?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let seen = |arrived: bool| if arrived { "arrived" } else { "dropped" }.to_owned();

    // Docker: what it publishes goes past a firewall on the input chain.
    container()?;
    inside("web", || tool("iptables-nft-restore", &[], DOCKER).map(|_| ()))?;
    let before = inside("web", theirs)?;
    let arrived = arrives(&web(PUBLISHED))?;
    add("Docker publishes 8081, no rule allows it", "dropped", !arrived, seen(arrived));
    let out = keepwall(programs, "web", posture, &["exposure"], None)?;
    let words = String::from_utf8_lossy(&out.stdout).into_owned();
    let told =
        words.lines().find(|l| l.contains("tcp 8081") && l.contains("172.30.0.2:80")).map(|l| l.trim().to_owned());
    add(
        "what the machine exposes",
        "the published port and its container",
        told.is_some(),
        told.unwrap_or_else(|| "not a word".into()),
    );
    apply(&with_port(posture)?)?;
    let arrived = arrives(&web(PUBLISHED))?;
    add("a rule allows 8081, the port that was asked for", "arrives at the container", arrived, seen(arrived));
    apply(posture)?;
    let arrived = arrives(&web(PUBLISHED))?;
    add("the rule is taken away", "dropped", !arrived, seen(arrived));
    let after = inside("web", theirs)?;
    add(
        "Docker's tables",
        "untouched",
        before == after,
        if before == after { "the same to the letter" } else { "changed" }.into(),
    );

    // ufw: its input chain drops what we allow.
    inside("web", || tool("iptables-nft-restore", &[], UFW).map(|_| ()))?;
    let before = inside("web", theirs)?;
    let arrived = arrives(&web(443))?;
    add("ufw drops 443, our rule allows it", "dropped: any drop is final", !arrived, seen(arrived));
    let words = status()?;
    let told = words.lines().find(|l| l.contains("table ip filter") && l.contains("443")).map(|l| l.trim().to_owned());
    add(
        "the user is told",
        "status names ufw's table, chain and our rule",
        told.is_some(),
        told.unwrap_or_else(|| "not a word".into()),
    );
    let said_ssh = words.lines().any(|l| l.contains("port 22") && l.contains(" drops "));
    add(
        "of SSH, which ufw lets in",
        "nothing is said",
        !said_ssh,
        if said_ssh { "a false alarm" } else { "nothing" }.into(),
    );
    let words = apply(&with_port(posture)?)?;
    apply(posture)?;
    let after = inside("web", theirs)?;
    add(
        "apply beside ufw",
        "says what is dropped, touches nothing",
        before == after && words.contains("Another firewall"),
        if before == after { "told, untouched" } else { "changed" }.into(),
    );

    // firewalld, with a reject instead of a policy, and a reload that flushes what is not owned.
    inside("web", || tool("iptables-nft-restore", &[], "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n").map(|_| ()))?;
    inside("web", || tool("nft", &["-f", "-"], FIREWALLD).map(|_| ()))?;
    let words = status()?;
    let told =
        words.lines().find(|l| l.contains("inet firewalld") && l.contains("port 80")).map(|l| l.trim().to_owned());
    add(
        "firewalld rejects 80, our rule allows it",
        "status names it",
        told.is_some(),
        told.unwrap_or_else(|| "not a word".into()),
    );
    let flushed = inside("web", || Ok(tool("nft", &["flush", "ruleset"], "").is_ok()))?;
    let (ours, strangers) = (arrives(&web(443))?, arrives(&web(8080))?);
    add(
        "somebody runs nft flush ruleset",
        "our rules stay in force",
        ours && !strangers,
        format!(
            "flush {}, 443 {}, 8080 {}",
            if flushed { "succeeded" } else { "refused by the kernel" },
            seen(ours),
            seen(strangers)
        ),
    );
    Ok(lines)
}
