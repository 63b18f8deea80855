//! Who can reach whom on what: for policy tests, the matrix, and the difference that a change makes.
//!
//! Exact over address ranges and ports: the space is cut at every rule's edge, as the compiler does, and each
//! piece is judged. What is fixed is the source port (an ephemeral one) and that routing delivers: this is
//! about security groups, not about cables.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use keepwall_core::{AddrRange, Family, Prefix, Protocol};

use crate::cells::{Flat, first_match, sweep_peers};
use crate::check::Checked;
use crate::intent::{Attachment, Intent, IntentPeer, resolve};
use crate::judge::EPHEMERAL;
use crate::lower::{flatten, ranges_of};
use crate::spec::{Direction, Endpoint, Policy, PolicyTest};

/// Ports of one protocol that are all treated alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The lowest port (or 0 for protocols without).
    pub first: u16,
    /// The highest, included.
    pub last: u16,
    /// Whether it passes.
    pub allow: bool,
    /// What decides: a rule's label, or `default`.
    pub by: String,
}

/// The posture with each interface's resolved rules at hand.
pub struct Atlas<'a> {
    checked: &'a Checked,
    intents: Vec<Intent>,
    /// (instance, interface) to (intent, attachment).
    at: HashMap<(usize, usize), (usize, usize)>,
}

/// Non-public IPv4 (RFC 6890 and multicast): what "internet" leaves out.
const NOT_INTERNET: [&str; 9] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

impl<'a> Atlas<'a> {
    /// Resolves every machine of the posture.
    #[must_use]
    pub fn new(checked: &'a Checked) -> Atlas<'a> {
        let mut intents = Vec::new();
        let mut at = HashMap::new();
        let spec = checked.spec();
        for instance in &spec.instances {
            let Ok(intent) = resolve(checked, &instance.name) else { continue };
            for (a, attachment) in intent.attachments.iter().enumerate() {
                for (i, owner) in spec.instances.iter().enumerate() {
                    for (n, interface) in owner.interfaces.iter().enumerate() {
                        if attachment.name == format!("{}/{}", owner.name, interface.name) {
                            at.insert((i, n), (intents.len(), a));
                        }
                    }
                }
            }
            intents.push(intent);
        }
        Atlas { checked, intents, at }
    }

    fn attachment(&self, which: (usize, usize)) -> Option<(&Intent, &Attachment)> {
        self.at.get(&which).map(|(intent, a)| (&self.intents[*intent], &self.intents[*intent].attachments[*a]))
    }

    /// How the interface treats `protocol` with each peer of `within`.
    fn survey(
        &self,
        which: (usize, usize),
        direction: Direction,
        within: &[AddrRange],
        local: IpAddr,
        protocol: u8,
    ) -> Vec<(AddrRange, Rc<Vec<Piece>>)> {
        match self.attachment(which) {
            Some((intent, attachment)) => survey(intent, attachment, direction, within, local, protocol),
            None => {
                // No groups, no enforcement.
                let open = Rc::new(vec![Piece { first: 0, last: u16::MAX, allow: true, by: "not protected".into() }]);
                within.iter().map(|range| (*range, Rc::clone(&open))).collect()
            }
        }
    }

    /// The interfaces that a name stands for.
    fn interfaces(&self, name: &str) -> Vec<(usize, usize)> {
        let spec = self.checked.spec();
        let mut out = Vec::new();
        for (i, instance) in spec.instances.iter().enumerate() {
            for n in 0..instance.interfaces.len() {
                if instance.name == name || self.checked.groups_of(i, n).any(|group| group.name == name) {
                    out.push((i, n));
                }
            }
        }
        // An instance of that name wins over a group of that name.
        if spec.instances.iter().any(|i| i.name == name) {
            out.retain(|(i, _)| spec.instances[*i].name == name);
        }
        out
    }

    fn addresses(&self, which: (usize, usize)) -> &[IpAddr] {
        &self.checked.spec().instances[which.0].interfaces[which.1].addresses
    }

    /// What an endpoint means as addresses without an interface of ours; `None` if it is interfaces.
    fn outside(&self, end: &Endpoint, family: Family) -> Option<Vec<AddrRange>> {
        match end {
            Endpoint::Internet => Some(self.internet(family)),
            Endpoint::Prefix(prefix) => Some(if prefix.family() == family { vec![prefix.range()] } else { vec![] }),
            Endpoint::Name(name) => {
                if !self.interfaces(name).is_empty() {
                    return None;
                }
                let list = self.checked.spec().prefix_lists.iter().find(|l| l.name == *name)?;
                Some(list.entries.iter().map(|(p, _)| p.range()).filter(|r| r.family == family).collect())
            }
        }
    }

    /// Global unicast addresses less those of instances.
    #[must_use]
    pub fn internet(&self, family: Family) -> Vec<AddrRange> {
        let mut ranges = public(family);
        let mut holes: Vec<AddrRange> = Vec::new();
        for instance in &self.checked.spec().instances {
            for interface in &instance.interfaces {
                let all = interface.addresses.iter().chain(&interface.public);
                holes.extend(all.filter(|a| Family::of(**a) == family).map(|a| AddrRange::host(*a)));
            }
        }
        subtract(&mut ranges, &holes);
        ranges
    }

    /// Every pair of source and destination that a question is about, each as pieces of (peer, ports).
    fn sessions(&self, from: &Endpoint, to: &Endpoint, protocol: u8) -> Vec<Session> {
        let mut out = Vec::new();
        let spec = self.checked.spec();
        let label = |which: (usize, usize)| {
            format!("{}/{}", spec.instances[which.0].name, spec.instances[which.0].interfaces[which.1].name)
        };
        for family in Family::BOTH {
            if (protocol == 1 && family == Family::Ipv6) || (protocol == 58 && family == Family::Ipv4) {
                continue;
            }
            match (self.outside(from, family), self.outside(to, family)) {
                (Some(sources), None) => {
                    let Endpoint::Name(name) = to else { continue };
                    for which in self.interfaces(name) {
                        for local in self.locals(which, family) {
                            for (peer, pieces) in self.survey(which, Direction::Ingress, &sources, local, protocol) {
                                out.push(Session { family, from: peer.to_string(), to: label(which), pieces });
                            }
                        }
                    }
                }
                (None, Some(destinations)) => {
                    let Endpoint::Name(name) = from else { continue };
                    for which in self.interfaces(name) {
                        for local in self.locals(which, family) {
                            for (peer, pieces) in self.survey(which, Direction::Egress, &destinations, local, protocol)
                            {
                                out.push(Session { family, from: label(which), to: peer.to_string(), pieces });
                            }
                        }
                    }
                }
                (None, None) => {
                    let (Endpoint::Name(from), Endpoint::Name(to)) = (from, to) else { continue };
                    for source in self.interfaces(from) {
                        for target in self.interfaces(to).into_iter().filter(|target| *target != source) {
                            out.extend(self.between(source, target, family, protocol, &label));
                        }
                    }
                }
                // Neither end is ours: nothing here decides it.
                (Some(_), Some(_)) => {}
            }
        }
        out
    }

    /// The addresses of an interface; one that nobody wrote down stands for all of its family.
    fn locals(&self, which: (usize, usize), family: Family) -> Vec<IpAddr> {
        let all = self.addresses(which);
        if all.is_empty() {
            return vec![AddrRange::address(family, 0)];
        }
        all.iter().copied().filter(|a| Family::of(*a) == family).collect()
    }

    fn between(
        &self,
        source: (usize, usize),
        target: (usize, usize),
        family: Family,
        protocol: u8,
        label: &dyn Fn((usize, usize)) -> String,
    ) -> Vec<Session> {
        let of_family = |which| self.addresses(which).iter().copied().filter(move |a| Family::of(*a) == family);
        let mut out = Vec::new();
        for from in of_family(source) {
            for to in of_family(target) {
                let leaves = self.survey(source, Direction::Egress, &[AddrRange::host(to)], from, protocol);
                let enters = self.survey(target, Direction::Ingress, &[AddrRange::host(from)], to, protocol);
                let (Some((_, leaves)), Some((_, enters))) = (leaves.first(), enters.first()) else { continue };
                out.push(Session {
                    family,
                    from: label(source),
                    to: label(target),
                    pieces: Rc::new(both(leaves, enters)),
                });
            }
        }
        out
    }
}

/// How an interface treats `protocol` with each peer of `within`: ranges with the pieces of their ports, together
/// covering all of `within`.
#[must_use]
pub fn survey(
    intent: &Intent,
    attachment: &Attachment,
    direction: Direction,
    within: &[AddrRange],
    local: IpAddr,
    protocol: u8,
) -> Vec<(AddrRange, Rc<Vec<Piece>>)> {
    let Some(family) = within.first().map(|range| range.family) else { return Vec::new() };
    let (mut flats, decides) = flatten(intent, attachment, direction, family);
    let mut deciders: Vec<(Policy, String)> = decides.iter().map(|d| (d.policy, d.label.to_owned())).collect();
    if direction == Direction::Egress {
        // What comes before all rules, in the same terms.
        if intent.block_outbound_smtp {
            flats.insert(0, everything(family, (6, 6), Some((25, 25))));
            deciders.insert(0, (Policy::Drop, "settings.block_outbound_smtp".into()));
        }
        let services = ranges_of(&intent.service_prefixes, family);
        if !services.is_empty() {
            flats.insert(0, Flat { peers: services, any_peer: false, ..everything(family, (0, 255), None) });
            deciders.insert(0, (Policy::Accept, "settings.service_prefixes".into()));
        }
    }
    let local = AddrRange::number(local);
    let relevant: Vec<usize> = (0..flats.len())
        .filter(|i| {
            let flat = &flats[*i];
            (flat.protocols.0..=flat.protocols.1).contains(&protocol)
                && flat.local.is_none_or(|(first, last)| first <= local && local <= last)
                && flat.source_ports.is_none_or(|(first, last)| first <= EPHEMERAL && EPHEMERAL <= last)
                && flat.peers.iter().any(|peer| within.iter().any(|w| peer.0 <= w.last && w.first <= peer.1))
        })
        .collect();
    let default = attachment.default_policy(direction) == Policy::Accept;
    let mut cache: HashMap<Vec<usize>, Rc<Vec<Piece>>> = HashMap::new();
    let mut pieces_of = |active: &[usize]| -> Rc<Vec<Piece>> {
        let make = || {
            let ranges: Vec<(u32, u32, usize)> = (active.iter())
                .map(|i| {
                    let (first, last) = flats[*i].ports.unwrap_or((0, u16::MAX));
                    (u32::from(first), u32::from(last), *i)
                })
                .collect();
            let mut pieces = Vec::new();
            let mut next = 0u32;
            let mut push = |first: u32, last: u32, allow: bool, by: &str| {
                #[expect(clippy::cast_possible_truncation, reason = "bounds come from u16")]
                pieces.push(Piece { first: first as u16, last: last as u16, allow, by: by.to_owned() });
            };
            first_match(&ranges, |first, last, rule| {
                if next < first {
                    push(next, first - 1, default, "default");
                }
                push(first, last, deciders[rule].0 == Policy::Accept, &deciders[rule].1);
                next = last + 1;
            });
            if next <= u32::from(u16::MAX) {
                push(next, u32::from(u16::MAX), default, "default");
            }
            Rc::new(pieces)
        };
        Rc::clone(cache.entry(active.to_vec()).or_insert_with(make))
    };
    let mut known: Vec<(AddrRange, Rc<Vec<Piece>>)> = Vec::new();
    sweep_peers(&flats, &relevant, family.max(), |(first, last), active| {
        for w in within {
            let (first, last) = (first.max(w.first), last.min(w.last));
            if first <= last {
                known.push((AddrRange { family, first, last }, pieces_of(active)));
            }
        }
    });
    let mut rest: Vec<AddrRange> = within.to_vec();
    let covered: Vec<AddrRange> = known.iter().map(|(range, _)| *range).collect();
    subtract(&mut rest, &covered);
    known.extend(rest.into_iter().map(|range| (range, pieces_of(&[]))));
    known.sort_by_key(|(range, _)| range.first);
    known
}

/// Global unicast addresses.
fn public(family: Family) -> Vec<AddrRange> {
    let parse = |text: &str| text.parse::<Prefix>().map(|p| p.range()).ok();
    match family {
        Family::Ipv4 => {
            let mut ranges = vec![AddrRange::everything(family)];
            subtract(&mut ranges, &NOT_INTERNET.iter().filter_map(|t| parse(t)).collect::<Vec<_>>());
            ranges
        }
        Family::Ipv6 => parse("2000::/3").into_iter().collect(),
    }
}

/// The matrix of one machine from what it is told, without the posture: every peer that a rule names, and the
/// Internet, to and from each of its interfaces. `others` adds the peers of another intent, so that the matrices
/// of two can be compared.
#[must_use]
pub fn machine_matrix(intent: &Intent, others: Option<&Intent>) -> Matrix {
    let mut peers: BTreeMap<String, Vec<Prefix>> = BTreeMap::new();
    for of in [Some(intent), others].into_iter().flatten() {
        for rule in of.attachments.iter().flat_map(|a| a.ingress.iter().chain(&a.egress)) {
            match &rule.peer {
                IntentPeer::Prefix(prefix) if prefix.is_everything() => {}
                IntentPeer::Prefix(prefix) => {
                    peers.insert(prefix.to_string(), vec![*prefix]);
                }
                IntentPeer::Set(name) => {
                    // The set as this intent has it; a set that only the other one knows is taken from there.
                    let members = intent.sets.get(name).or_else(|| of.sets.get(name));
                    peers.insert(name.clone(), members.cloned().unwrap_or_default());
                }
            }
        }
    }
    let mut out = Matrix::new();
    for attachment in &intent.attachments {
        for direction in Direction::BOTH {
            let named = peers.iter().map(|(name, members)| (name.as_str(), Some(members)));
            for (name, members) in named.chain([("internet", None)]) {
                let what = machine_open(intent, attachment, direction, members);
                let key = match direction {
                    Direction::Ingress => (name.to_owned(), attachment.name.clone()),
                    Direction::Egress => (attachment.name.clone(), name.to_owned()),
                };
                if !what.is_empty() && out.len() < MATRIX_ROWS_MAX {
                    out.insert(key, what);
                }
            }
        }
    }
    out
}

fn machine_open(
    intent: &Intent,
    attachment: &Attachment,
    direction: Direction,
    members: Option<&Vec<Prefix>>,
) -> BTreeSet<String> {
    let mut sessions: BTreeMap<u8, Vec<Rc<Vec<Piece>>>> = BTreeMap::new();
    for family in Family::BOTH {
        let within: Vec<AddrRange> = match members {
            Some(members) => members.iter().map(Prefix::range).filter(|r| r.family == family).collect(),
            None => public(family),
        };
        let mut locals: Vec<IpAddr> =
            attachment.addresses.iter().copied().filter(|a| Family::of(*a) == family).collect();
        if attachment.addresses.is_empty() {
            locals.push(AddrRange::address(family, 0));
        }
        for protocol in PROTOCOLS {
            if Protocol::Number(protocol).family().is_some_and(|bound| bound != family) {
                continue;
            }
            for local in &locals {
                let pieces = survey(intent, attachment, direction, &within, *local, protocol);
                sessions.entry(protocol).or_default().extend(pieces.into_iter().map(|(_, pieces)| pieces));
            }
        }
    }
    words(&sessions)
}

/// The protocols that a matrix looks at: those with names, and ESP for "all others".
const PROTOCOLS: [u8; 6] = [6, 17, 1, 58, 47, 50];

struct Session {
    family: Family,
    from: String,
    to: String,
    pieces: Rc<Vec<Piece>>,
}

fn everything(family: Family, protocols: (u8, u8), ports: Option<(u16, u16)>) -> Flat {
    Flat { peers: vec![(0, family.max())], any_peer: true, local: None, protocols, ports, source_ports: None }
}

/// Two covers of all ports as one: what both allow; a denial names the side that denies.
fn both(a: &[Piece], b: &[Piece]) -> Vec<Piece> {
    let mut out = Vec::new();
    for x in a {
        for y in b {
            let (first, last) = (x.first.max(y.first), x.last.min(y.last));
            if first <= last {
                let by = match (x.allow, y.allow) {
                    (false, _) => format!("egress of the sender: {}", x.by),
                    (true, _) => y.by.clone(),
                };
                out.push(Piece { first, last, allow: x.allow && y.allow, by });
            }
        }
    }
    out
}

/// Cuts `holes` out of `ranges`, all of one family.
fn subtract(ranges: &mut Vec<AddrRange>, holes: &[AddrRange]) {
    let mut holes: Vec<AddrRange> = holes.to_vec();
    holes.sort_by_key(|hole| hole.first);
    let mut out = Vec::new();
    ranges.sort_by_key(|range| range.first);
    for range in ranges.iter() {
        let mut first = Some(range.first);
        for hole in holes.iter().filter(|hole| hole.first <= range.last && range.first <= hole.last) {
            let Some(start) = first else { break };
            if start < hole.first {
                out.push(AddrRange { first: start, last: hole.first - 1, ..*range });
            }
            first = if hole.last >= range.last { None } else { Some(start.max(hole.last + 1)) };
        }
        if let Some(start) = first {
            out.push(AddrRange { first: start, ..*range });
        }
    }
    *ranges = out;
}

/// How a policy test came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestResult {
    /// The test.
    pub test: PolicyTest,
    /// `None` if it holds; else why not, with an example.
    pub failure: Option<String>,
}

/// The text of a test, as it is written in a posture.
#[must_use]
pub fn describe(test: &PolicyTest) -> String {
    let ports = match test.ports {
        Some(range) if range.first() == range.last() => format!(":{}/{}", range.first(), test.protocol),
        Some(range) => format!(":{}-{}/{}", range.first(), range.last(), test.protocol),
        None if test.protocol.has_ports() => format!(":all/{}", test.protocol),
        None => format!(":{}", test.protocol),
    };
    format!("{} {} -> {}{ports}", if test.allow { "allow" } else { "deny" }, test.from, test.to)
}

/// Runs the posture's own tests.
#[must_use]
pub fn run_tests(checked: &Checked) -> Vec<TestResult> {
    let atlas = Atlas::new(checked);
    (checked.spec().tests.iter())
        .map(|test| TestResult { test: test.clone(), failure: failure(&atlas, test) })
        .collect()
}

fn failure(atlas: &Atlas<'_>, test: &PolicyTest) -> Option<String> {
    // `all` asks about each of the protocols that rules name.
    let protocols: Vec<u8> = match test.protocol {
        Protocol::All => vec![6, 17, 1, 58, 47],
        Protocol::Number(number) => vec![number],
    };
    let (first, last) = test.ports.map_or((1, u16::MAX), |range| (range.first(), range.last()));
    let mut seen = false;
    for protocol in protocols {
        for session in atlas.sessions(&test.from, &test.to, protocol) {
            seen = true;
            let portless = !Protocol::Number(protocol).has_ports();
            let wrong = (session.pieces.iter())
                .find(|piece| piece.allow != test.allow && (portless || (piece.first <= last && first <= piece.last)));
            if let Some(piece) = wrong {
                let port = if portless { String::new() } else { format!(" port {}", piece.first.max(first)) };
                return Some(format!(
                    "{} {}{port} from {} to {} is {} by {}",
                    session.family,
                    Protocol::Number(protocol),
                    session.from,
                    session.to,
                    if piece.allow { "allowed" } else { "denied" },
                    piece.by
                ));
            }
        }
    }
    (!seen).then(|| {
        format!("nothing to test: {} and {} have no interface and address family in common", test.from, test.to)
    })
}

/// Who reaches whom: (from, to) to what, in words such as `tcp 443`, `udp 53-60`, `icmp`.
pub type Matrix = BTreeMap<(String, String), BTreeSet<String>>;

/// More rows than this are cut: a matrix is for reading.
pub const MATRIX_ROWS_MAX: usize = 10_000;

/// The matrix of the posture: from the Internet, from every block and list that a rule names, and from every
/// instance, to every instance; and from every instance to the Internet.
#[must_use]
pub fn matrix(checked: &Checked) -> Matrix {
    let atlas = Atlas::new(checked);
    let spec = checked.spec();
    let instances: Vec<Endpoint> = spec.instances.iter().map(|i| Endpoint::Name(i.name.clone())).collect();
    let mut sources = vec![Endpoint::Internet];
    let mut named = BTreeSet::new();
    for rule in spec.groups.iter().flat_map(|g| &g.ingress) {
        for peer in &rule.peers {
            match &peer.peer {
                crate::spec::Peer::Prefix(prefix) if !prefix.is_everything() => {
                    named.insert(prefix.to_string());
                }
                crate::spec::Peer::PrefixList(name) => {
                    named.insert(name.clone());
                }
                _ => {}
            }
        }
    }
    sources.extend(named.into_iter().map(|text| text.parse().map_or(Endpoint::Name(text), Endpoint::Prefix)));
    sources.extend(instances.iter().cloned());
    let mut out = Matrix::new();
    let pairs = (sources.iter().flat_map(|from| instances.iter().map(move |to| (from, to))))
        .chain(instances.iter().map(|from| (from, &Endpoint::Internet)));
    for (from, to) in pairs.filter(|(from, to)| from != to) {
        let what = open(&atlas, from, to);
        if !what.is_empty() && out.len() < MATRIX_ROWS_MAX {
            out.insert((from.to_string(), to.to_string()), what);
        }
    }
    out
}

/// What passes from one end to the other.
fn open(atlas: &Atlas<'_>, from: &Endpoint, to: &Endpoint) -> BTreeSet<String> {
    let pieces_of = |protocol| atlas.sessions(from, to, protocol).into_iter().map(|s| s.pieces).collect();
    words(&PROTOCOLS.map(|protocol| (protocol, pieces_of(protocol))).into_iter().collect())
}

/// What is open, in words. `(part)` marks what only some of the addresses may do.
fn words(sessions: &BTreeMap<u8, Vec<Rc<Vec<Piece>>>>) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    let mut everything = true;
    for (protocol, sessions) in sessions.iter().filter(|(_, sessions)| !sessions.is_empty()) {
        let allowed: Vec<Vec<(u16, u16)>> = sessions.iter().map(|pieces| merged(pieces)).collect();
        let mut ranges: Vec<(u16, u16)> = allowed.iter().flatten().copied().collect();
        ranges.sort_unstable();
        ranges.dedup();
        let name = match protocol {
            50 => "other protocols".to_owned(),
            number => Protocol::Number(*number).to_string(),
        };
        for range in &ranges {
            let whole = allowed.iter().all(|of| of.iter().any(|r| r.0 <= range.0 && range.1 <= r.1));
            let part = if whole { "" } else { " (part)" };
            let ports = match range {
                (0 | 1, u16::MAX) => String::new(),
                (first, last) if first == last => format!(" {first}"),
                (first, last) => format!(" {first}-{last}"),
            };
            out.insert(format!("{name}{ports}{part}"));
        }
        everything &= allowed.iter().all(|of| of.contains(&(0, u16::MAX)));
    }
    if everything && !out.is_empty() { BTreeSet::from(["everything".to_owned()]) } else { out }
}

fn merged(pieces: &[Piece]) -> Vec<(u16, u16)> {
    let mut out: Vec<(u16, u16)> = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.allow) {
        match out.last_mut() {
            Some(last) if u32::from(last.1) + 1 == u32::from(piece.first) => last.1 = piece.last,
            _ => out.push((piece.first, piece.last)),
        }
    }
    out
}

/// One line of a reachability difference.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReachChange {
    /// Who.
    pub from: String,
    /// Whom.
    pub to: String,
    /// On what.
    pub what: String,
    /// True if it becomes possible, false if it ends.
    pub opened: bool,
}

/// What becomes possible and what ends.
#[must_use]
pub fn difference(before: &Matrix, after: &Matrix) -> Vec<ReachChange> {
    let empty = BTreeSet::new();
    let keys: BTreeSet<&(String, String)> = before.keys().chain(after.keys()).collect();
    let mut out = Vec::new();
    for key in keys {
        let (old, new) = (before.get(key).unwrap_or(&empty), after.get(key).unwrap_or(&empty));
        for (what, opened) in new.difference(old).map(|w| (w, true)).chain(old.difference(new).map(|w| (w, false))) {
            out.push(ReachChange { from: key.0.clone(), to: key.1.clone(), what: what.clone(), opened });
        }
    }
    out
}
