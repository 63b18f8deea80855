//! Administration sessions: who would be cut off if a change went wrong.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{processes, sockets};

/// A remote session into this machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Session {
    /// Where the operator sits.
    pub remote: SocketAddr,
    /// The address and port of this machine that they use.
    pub local: SocketAddr,
}

/// Ancestors looked at; a deeper process tree is somebody's trick.
const ANCESTORS_MAX: usize = 64;

/// The SSH session that a process was started from, if any: the nearest ancestor that says so.
///
/// `sudo` clears the environment, so the process's own is not enough; its parents' are asked too. What an ancestor
/// says counts only if the socket table has that connection.
#[must_use]
pub fn of_process(pid: u32) -> Option<Session> {
    let established: Vec<Session> = established_tcp();
    let mut pid = Some(pid);
    for _ in 0..ANCESTORS_MAX {
        let current = pid?;
        if let Some(session) = processes::variable(current, "SSH_CONNECTION").and_then(|text| parse(&text))
            && established.contains(&session)
        {
            return Some(session);
        }
        pid = processes::parent(current);
    }
    None
}

/// `client port server port`, as sshd writes it.
fn parse(text: &str) -> Option<Session> {
    let mut fields = text.split_ascii_whitespace();
    let mut end = || -> Option<SocketAddr> {
        let address: IpAddr = fields.next()?.parse().ok()?;
        Some(SocketAddr::new(address.to_canonical(), fields.next()?.parse().ok()?))
    };
    Some(Session { remote: end()?, local: end()? })
}

/// Every SSH connection into this machine, by the process that holds it.
#[must_use]
pub fn of_machine() -> Vec<Session> {
    let owners = processes::by_socket();
    let mut out: Vec<Session> = (sockets::all().into_iter())
        .filter(|socket| socket.protocol == 6 && socket.state == 1)
        .filter(|socket| owners.get(&socket.inode).is_some_and(|pid| processes::name(*pid).starts_with("sshd")))
        .map(|socket| canonical(&socket))
        .collect();
    out.sort_by_key(|session| (session.remote, session.local));
    out.dedup();
    out
}

/// More connections than this are not remembered; whoever has more to SSH has another problem.
const SESSIONS_MAX: usize = 10_000;

/// Every connection that is open now to a port that administration sessions use: a confirmation over one of these
/// proves nothing about a change that comes after. `pid` is the process that asks for the change.
#[must_use]
pub fn before_a_change(pid: u32) -> Vec<Session> {
    let mut ports: Vec<u16> = of_machine().iter().map(|session| session.local.port()).collect();
    ports.extend(of_process(pid).map(|session| session.local.port()));
    ports.push(22);
    established_tcp().into_iter().filter(|session| ports.contains(&session.local.port())).take(SESSIONS_MAX).collect()
}

fn established_tcp() -> Vec<Session> {
    sockets::all().iter().filter(|s| s.protocol == 6 && s.state == 1).map(canonical).collect()
}

/// A dual-stack socket shows IPv4 peers as mapped addresses; packets carry plain ones.
fn canonical(socket: &sockets::Socket) -> Session {
    let plain = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
    Session { remote: plain(socket.remote), local: plain(socket.local) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sshs_variable_is_read() {
        let session = parse("203.0.113.7 50522 10.0.0.5 22").expect("a good value");
        assert_eq!(session.remote.to_string(), "203.0.113.7:50522");
        assert_eq!(session.local.to_string(), "10.0.0.5:22");
        assert_eq!(parse("203.0.113.7 50522 10.0.0.5"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_variable_without_its_connection_is_not_believed() {
        // This test runs in no SSH session whose connection this machine has.
        assert_eq!(of_process(std::process::id()).filter(|s| s.remote.port() == 0), None);
    }
}
