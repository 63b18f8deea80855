//! The kernel's own account of single packets (`meta nftrace`).
//!
//! A small table of our own marks the packets that are asked about, early; every table's rules then report what they
//! do with them. It is owned and not persistent: it vanishes with this process, however that ends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use keepwall_ir::nft::decode::{Trace, TraceStep};
use keepwall_ir::nft::{
    Base, Chain, CmpOp, Expr, Hook, Meta, PayloadBase, Rule, TABLE_OWNER, Table, TableFamily, Verdict,
};

use crate::{Nft, NftError, TraceListener};

/// Name of the table that marks packets.
pub const TRACE_TABLE: &str = "keepwall-trace";
/// Before conntrack and before raw tables, so that all that follows is reported.
const PRIORITY: i32 = -310;
/// Packets marked per second at most: each makes a message for every rule that it meets.
const PER_SECOND: u64 = 50;
/// Names of other tables' rules are looked up once; at most this many elements of their sets are read for that.
const ELEMENTS_MAX: usize = 0;

/// Which packets; all fields that are there must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceFilter {
    /// Source address.
    pub source: Option<IpAddr>,
    /// Destination address, before destination NAT.
    pub destination: Option<IpAddr>,
    /// Protocol number.
    pub protocol: Option<u8>,
    /// Destination port.
    pub port: Option<u16>,
}

/// What one rule, or a chain's end, did with one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedStep {
    /// The same for all steps of one packet.
    pub packet: u32,
    /// `inet keepwall`.
    pub table: String,
    /// Chain.
    pub chain: String,
    /// The rule's comment, or its number from 1; `policy` at the end of a base chain.
    pub rule: String,
    /// `accept`, `drop`, `jump x`, …
    pub verdict: String,
    /// Device index it came in by.
    pub iif: Option<u32>,
    /// Device index it leaves by.
    pub oif: Option<u32>,
    /// Empty but for the steps with which the kernel sends it.
    pub network_header: Vec<u8>,
    /// Likewise.
    pub transport_header: Vec<u8>,
}

/// A running trace.
#[derive(Debug)]
pub struct Tracer {
    listener: TraceListener,
    /// Chain and handle to what the rule is called.
    rules: BTreeMap<(String, String, u64), String>,
    /// Owns the marking table.
    _nft: Nft,
}

impl Tracer {
    /// Starts to mark and to listen.
    ///
    /// # Errors
    /// Another trace runs, or the kernel cannot trace.
    pub fn start(filter: &TraceFilter) -> Result<Tracer, NftError> {
        let listener = TraceListener::open()?;
        let mut nft = Nft::open()?;
        let mut rules = BTreeMap::new();
        for dumped in nft.observe_all(ELEMENTS_MAX)? {
            let table = table_name(dumped.table.family, &dumped.table.name);
            for chain in &dumped.table.chains {
                let handles = dumped.rule_handles.get(&chain.name).into_iter().flatten();
                for (number, (handle, rule)) in (1..).zip(handles.zip(&chain.rules)) {
                    let name = if rule.comment.is_empty() { format!("rule {number}") } else { rule.comment.clone() };
                    rules.insert((table.clone(), chain.name.clone(), *handle), name);
                }
            }
        }
        nft.replace(&table(filter))?;
        Ok(Tracer { listener, rules, _nft: nft })
    }

    /// The next step; `None` if none comes within `timeout`.
    ///
    /// # Errors
    /// The socket fails.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<TracedStep>, NftError> {
        let Some(trace) = self.listener.next(timeout)? else { return Ok(None) };
        if trace.table == TRACE_TABLE {
            return Ok(None);
        }
        Ok(Some(self.step(trace)))
    }

    fn step(&self, trace: Trace) -> TracedStep {
        let table = table_name(trace.family, &trace.table);
        let rule = match (trace.step, trace.rule_handle) {
            (TraceStep::Rule, Some(handle)) => {
                let known = self.rules.get(&(table.clone(), trace.chain.clone(), handle));
                known.cloned().unwrap_or_else(|| format!("handle {handle}"))
            }
            (TraceStep::Policy, _) => "policy".to_owned(),
            (TraceStep::Return, _) => "end of chain".to_owned(),
            (TraceStep::Rule, None) => "rule".to_owned(),
        };
        TracedStep {
            packet: trace.id,
            table,
            chain: trace.chain,
            rule,
            verdict: trace.verdict.as_ref().map_or_else(String::new, verdict_name),
            iif: trace.iif,
            oif: trace.oif,
            network_header: trace.network_header,
            transport_header: trace.transport_header,
        }
    }
}

pub(crate) fn table_name(family: TableFamily, name: &str) -> String {
    let family = match family {
        TableFamily::Inet => "inet",
        TableFamily::Ip => "ip",
        TableFamily::Arp => "arp",
        TableFamily::Netdev => "netdev",
        TableFamily::Bridge => "bridge",
        TableFamily::Ip6 => "ip6",
    };
    format!("{family} {name}")
}

fn verdict_name(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accept => "accept".to_owned(),
        Verdict::Drop => "drop".to_owned(),
        Verdict::Continue => "continue".to_owned(),
        Verdict::Return => "return".to_owned(),
        Verdict::Jump(chain) => format!("jump {chain}"),
        Verdict::Goto(chain) => format!("goto {chain}"),
        Verdict::Queue => "queue".to_owned(),
    }
}

fn table(filter: &TraceFilter) -> Table {
    let cmp = |data: Vec<u8>| Expr::Cmp { sreg: 0, op: CmpOp::Eq, data };
    let network = |offset, len| Expr::Payload { base: PayloadBase::Network, offset, len, dreg: 0 };
    let mut exprs = Vec::new();
    if let Some(any) = filter.source.or(filter.destination) {
        exprs.extend([Expr::Meta { key: Meta::NfProto, dreg: 0 }, cmp(vec![if any.is_ipv4() { 2 } else { 10 }])]);
    }
    for (address, offset4, offset6) in [(filter.source, 12, 8), (filter.destination, 16, 24)] {
        match address {
            Some(IpAddr::V4(a)) => exprs.extend([network(offset4, 4), cmp(a.octets().to_vec())]),
            Some(IpAddr::V6(a)) => exprs.extend([network(offset6, 16), cmp(a.octets().to_vec())]),
            None => {}
        }
    }
    if let Some(protocol) = filter.protocol {
        exprs.extend([Expr::Meta { key: Meta::L4Proto, dreg: 0 }, cmp(vec![protocol])]);
    }
    if let Some(port) = filter.port {
        let port_field = Expr::Payload { base: PayloadBase::Transport, offset: 2, len: 2, dreg: 0 };
        exprs.extend([port_field, cmp(port.to_be_bytes().to_vec())]);
    }
    exprs.push(Expr::Limit { per_s: PER_SECOND, burst: 50, over: false });
    exprs.push(Expr::TraceOn);
    let chain = |name: &str, hook| Chain {
        name: name.to_owned(),
        base: Some(Base { kind: "filter".to_owned(), hook, priority: PRIORITY, accept: true }),
        rules: vec![Rule { exprs: exprs.clone(), comment: String::new() }],
    };
    Table {
        family: TableFamily::Inet,
        name: TRACE_TABLE.to_owned(),
        flags: TABLE_OWNER,
        maps: Vec::new(),
        chains: vec![chain("output", Hook::Output), chain("prerouting", Hook::Prerouting)],
        timeouts: Vec::new(),
    }
}
