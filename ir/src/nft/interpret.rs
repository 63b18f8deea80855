//! What a table does to one packet, without a kernel.
//!
//! Follows `nft_do_chain` of the kernel: base chains of a hook in order of priority, expressions until one
//! breaks off, jumps with a bounded stack. Used to prove that lowered rules mean what the policy says, and to
//! say of foreign tables what they would do.
//!
//! Where a table holds an expression that we do not know, both answers are followed, so that
//! [`Outcome::accept`] and [`Outcome::drop`] may both be possible.
//!
//! Not modelled: rates (a `limit` always has room), NAT, changes to the packet, queues (an `NF_QUEUE` verdict
//! counts as accepted).

use super::{
    Chain, CmpOp, CtKey, ElementData, Expr, FieldRange, Hook, LookupInto, Map, Meta, PayloadBase, Table, Verdict,
};

/// A packet at a hook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Device it came in by, empty if none.
    pub iif: String,
    /// Device it leaves by, empty if none.
    pub oif: String,
    /// 2 or 10.
    pub nfproto: u8,
    /// Link-layer header, may be empty.
    pub link: Vec<u8>,
    /// From the network header on, as much as there is before the transport header.
    pub network: Vec<u8>,
    /// From the transport header on.
    pub transport: Vec<u8>,
    /// Layer-4 protocol.
    pub l4proto: u8,
    /// `ARPHRD_*` of the incoming device.
    pub iif_type: u16,
    /// Packet mark.
    pub mark: u32,
    /// Its connection, if it is tracked.
    pub ct: Option<Connection>,
}

/// What conntrack knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// One state bit: invalid 1, established 2, related 4, new 8, untracked 64.
    pub state: u32,
    /// `IPS_*` bits.
    pub status: u32,
    /// Connection mark.
    pub mark: u32,
    /// Destination address of the first packet, 4 or 16 bytes.
    pub original_destination: Vec<u8>,
    /// Destination port of the first packet.
    pub original_port: u16,
}

/// What may become of a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// It may pass.
    pub accept: bool,
    /// It may be dropped.
    pub drop: bool,
    /// Where it is dropped: chain, and rule number from 0 (`None`: the chain's policy).
    pub dropped_at: Option<(String, Option<usize>)>,
    /// Elements of verdict maps that matched on the way: map and element number.
    pub hits: Vec<(String, usize)>,
    /// `log` prefixes on the way.
    pub logs: Vec<String>,
}

/// The kernel's own jump depth (`NFT_JUMP_STACK_SIZE`).
const DEPTH_MAX: usize = 16;
/// Foreign tables decide how many rules a packet meets and how often unknown expressions fork; beyond this many
/// steps both outcomes are called possible.
const STEPS_MAX: usize = 200_000;

/// Forks and base chains within each other: each is a frame on the stack, of which the agent's threads have 2 MiB.
/// Foreign tables decide how many; beyond this both outcomes are called possible.
const NESTED_MAX: usize = 256;

/// What `table` does to `packet` at `hook`.
#[must_use]
pub fn run(table: &Table, hook: Hook, packet: &Packet) -> Outcome {
    let mut bases: Vec<&Chain> =
        table.chains.iter().filter(|chain| chain.base.as_ref().is_some_and(|base| base.hook == hook)).collect();
    bases.sort_by_key(|chain| chain.base.as_ref().map_or(0, |base| base.priority));
    let mut machine = Machine { table, packet, out: Outcome::default(), steps: 0, nested: 0 };
    machine.bases(&bases, &State { registers: [0; 64], mark: packet.mark });
    machine.out
}

#[derive(Clone)]
struct State {
    registers: [u8; 64],
    mark: u32,
}

struct Machine<'a> {
    table: &'a Table,
    packet: &'a Packet,
    out: Outcome,
    steps: usize,
    nested: usize,
}

/// Where to go on: a chain, the next rule in it, the next expression of that rule.
type Frame<'a> = (&'a Chain, usize);

enum Step {
    Next,
    Break,
    Verdict(Verdict),
    /// Next, or break: nobody knows.
    Either,
}

impl<'a> Machine<'a> {
    fn bases(&mut self, bases: &[&'a Chain], state: &State) {
        match bases.split_first() {
            None => self.out.accept = true,
            Some((chain, rest)) => self.nested(vec![(chain, 0)], 0, state.clone(), rest),
        }
    }

    fn dropped(&mut self, chain: &str, rule: Option<usize>) {
        self.out.drop = true;
        if self.out.dropped_at.is_none() {
            self.out.dropped_at = Some((chain.to_owned(), rule));
        }
    }

    /// [`Machine::rules`], unless that is too deep already.
    fn nested(&mut self, stack: Vec<Frame<'a>>, expr: usize, state: State, rest: &[&'a Chain]) {
        if self.nested >= NESTED_MAX {
            (self.out.accept, self.out.drop) = (true, true);
            return;
        }
        self.nested += 1;
        self.rules(stack, expr, state, rest);
        self.nested -= 1;
    }

    /// Runs from the top of the stack; `expr` is the expression to start with in the first rule.
    fn rules(&mut self, mut stack: Vec<Frame<'a>>, mut expr: usize, mut state: State, rest: &[&'a Chain]) {
        loop {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                self.out.accept = true;
                self.out.drop = true;
                return;
            }
            let Some((chain, at)) = stack.last_mut() else { return };
            let chain: &'a Chain = chain;
            let Some(rule) = chain.rules.get(*at) else {
                // The end of a chain: back to the caller, or the policy.
                match (stack.len(), &chain.base) {
                    (1, Some(base)) if base.accept => return self.bases(rest, &state),
                    (1, _) => return self.dropped(&chain.name, None),
                    _ => {
                        stack.pop();
                        continue;
                    }
                }
            };
            let number = *at;
            let mut verdict = None;
            while let Some(current) = rule.exprs.get(expr) {
                self.steps += 1;
                expr += 1;
                match self.step(current, &mut state) {
                    Step::Next => {}
                    Step::Break => break,
                    Step::Verdict(Verdict::Continue) => break,
                    Step::Verdict(other) => {
                        verdict = Some(other);
                        break;
                    }
                    Step::Either => {
                        // One run in which the expression matches; this one goes on as if it had not.
                        if self.steps < STEPS_MAX {
                            self.nested(stack.clone(), expr, state.clone(), rest);
                        }
                        break;
                    }
                }
            }
            expr = 0;
            let Some(top) = stack.last_mut() else { return };
            top.1 = number + 1;
            match verdict {
                None | Some(Verdict::Continue) => {}
                Some(Verdict::Accept | Verdict::Queue) => return self.bases(rest, &state),
                Some(Verdict::Drop) => return self.dropped(&chain.name, Some(number)),
                Some(Verdict::Return) => {
                    let (first, _) = stack[0];
                    stack.pop();
                    if stack.is_empty() {
                        match &first.base {
                            Some(base) if base.accept => return self.bases(rest, &state),
                            _ => return self.dropped(&first.name, None),
                        }
                    }
                }
                Some(Verdict::Jump(name) | Verdict::Goto(name)) if !self.has_chain(&name) => {
                    return self.dropped(&chain.name, Some(number));
                }
                Some(Verdict::Jump(name)) => {
                    if stack.len() >= DEPTH_MAX {
                        return self.dropped(&chain.name, Some(number));
                    }
                    stack.extend(self.chain(&name).map(|chain| (chain, 0)));
                }
                Some(Verdict::Goto(name)) => {
                    // A goto from a base chain ends in its policy; the frame stays, at its end, to say so.
                    if stack.len() == 1 {
                        stack[0].1 = stack[0].0.rules.len();
                    } else {
                        stack.pop();
                    }
                    stack.extend(self.chain(&name).map(|chain| (chain, 0)));
                }
            }
        }
    }

    fn chain(&self, name: &str) -> Option<&'a Chain> {
        self.table.chains.iter().find(|chain| chain.name == name)
    }

    fn has_chain(&self, name: &str) -> bool {
        self.chain(name).is_some()
    }

    fn step(&mut self, expr: &Expr, state: &mut State) -> Step {
        let packet = self.packet;
        match expr {
            Expr::Meta { key, dreg } => {
                let value: Vec<u8> = match key {
                    Meta::NfProto => vec![packet.nfproto],
                    Meta::L4Proto => vec![packet.l4proto],
                    Meta::IifName => super::ifname(&packet.iif),
                    Meta::OifName => super::ifname(&packet.oif),
                    Meta::Mark => state.mark.to_ne_bytes().to_vec(),
                    Meta::IifType => packet.iif_type.to_ne_bytes().to_vec(),
                    Meta::PktType => vec![0],
                    Meta::Protocol => {
                        let protocol: u16 = if packet.nfproto == 2 { 0x0800 } else { 0x86dd };
                        protocol.to_be_bytes().to_vec()
                    }
                    Meta::Other(_) => return Step::Either,
                };
                store(state, *dreg, &value)
            }
            Expr::MarkSet { sreg } => match load(state, *sreg, 4) {
                Some(value) => {
                    state.mark = u32::from_ne_bytes([value[0], value[1], value[2], value[3]]);
                    Step::Next
                }
                None => Step::Break,
            },
            Expr::Payload { base, offset, len, dreg } => {
                let from = match base {
                    PayloadBase::Link => &packet.link,
                    PayloadBase::Network => &packet.network,
                    PayloadBase::Transport => &packet.transport,
                    PayloadBase::Inner => return Step::Either,
                };
                let range = (*offset as usize)..(*offset as usize).saturating_add(*len as usize);
                match from.get(range) {
                    Some(value) => store(state, *dreg, value),
                    None => Step::Break,
                }
            }
            Expr::Ct { key, dreg } => {
                let Some(ct) = &packet.ct else {
                    // `ct state` of an untracked packet is "untracked"; everything else breaks off.
                    return if *key == CtKey::State { store(state, *dreg, &64u32.to_ne_bytes()) } else { Step::Break };
                };
                match key {
                    CtKey::State => store(state, *dreg, &ct.state.to_ne_bytes()),
                    CtKey::Status => store(state, *dreg, &ct.status.to_ne_bytes()),
                    CtKey::Mark => store(state, *dreg, &ct.mark.to_ne_bytes()),
                    CtKey::Direction => store(state, *dreg, &[0]),
                    CtKey::OriginalDst4 | CtKey::OriginalDst6 => {
                        let wanted = if *key == CtKey::OriginalDst4 { 4 } else { 16 };
                        if ct.original_destination.len() == wanted {
                            store(state, *dreg, &ct.original_destination)
                        } else {
                            Step::Break
                        }
                    }
                    CtKey::OriginalDport => store(state, *dreg, &ct.original_port.to_be_bytes()),
                    CtKey::Other(_) => Step::Either,
                }
            }
            Expr::Bitwise { sreg, dreg, mask, xor } => match load(state, *sreg, mask.len()) {
                Some(value) => {
                    let out: Vec<u8> = (value.iter().zip(mask))
                        .zip(xor.iter().chain(std::iter::repeat(&0)))
                        .map(|((value, mask), xor)| (value & mask) ^ xor)
                        .collect();
                    store(state, *dreg, &out)
                }
                None => Step::Break,
            },
            Expr::Cmp { sreg, op, data } => match load(state, *sreg, data.len()) {
                Some(value) => {
                    let order = value.as_slice().cmp(data.as_slice());
                    when(match op {
                        CmpOp::Eq => order.is_eq(),
                        CmpOp::Neq => order.is_ne(),
                        CmpOp::Lt => order.is_lt(),
                        CmpOp::Lte => order.is_le(),
                        CmpOp::Gt => order.is_gt(),
                        CmpOp::Gte => order.is_ge(),
                    })
                }
                None => Step::Break,
            },
            Expr::Range { sreg, invert, from, to } => match load(state, *sreg, from.len()) {
                Some(value) => {
                    when((from.as_slice() <= value.as_slice() && value.as_slice() <= to.as_slice()) != *invert)
                }
                None => Step::Break,
            },
            Expr::Lookup { map, sreg, into, invert } => {
                let Some(map) = self.table.maps.iter().find(|candidate| candidate.name == *map) else {
                    return Step::Either;
                };
                self.lookup(map, *sreg, *into, *invert, state)
            }
            Expr::Log { prefix, .. } => {
                self.out.logs.push(prefix.clone());
                Step::Next
            }
            Expr::Limit { over, .. } => when(!over),
            Expr::Counter { .. } | Expr::TraceOn | Expr::CtTimeoutSet { .. } => Step::Next,
            Expr::Verdict(verdict) => Step::Verdict(verdict.clone()),
            Expr::Immediate { dreg, data } => store(state, *dreg, data),
            Expr::Unknown { name, data } => xt(name, data, packet),
        }
    }

    fn lookup(&mut self, map: &'a Map, sreg: u8, into: LookupInto, invert: bool, state: &mut State) -> Step {
        let mut key: Vec<&[u8]> = Vec::with_capacity(map.key.len());
        let mut reg = sreg;
        let registers = state.registers;
        for field in &map.key {
            let start = usize::from(reg) * 4;
            match registers.get(start..start + field.len()) {
                Some(value) => key.push(value),
                None => return Step::Break,
            }
            reg = reg.saturating_add(field.regs());
        }
        let found = map.elements.iter().position(|element| {
            element.key.len() == key.len()
                && element.key.iter().zip(&key).all(|(range, value): (&FieldRange, _)| range.contains(value))
        });
        match (found, invert) {
            (None, false) | (Some(_), true) => Step::Break,
            (None, true) => Step::Next,
            (Some(index), false) => match (&map.elements[index].data, into) {
                (ElementData::Verdict(verdict), LookupInto::Verdict) => {
                    self.out.hits.push((map.name.clone(), index));
                    Step::Verdict(verdict.clone())
                }
                (ElementData::Mark(mark), LookupInto::Register(dreg)) => store(state, dreg, &mark.to_ne_bytes()),
                _ => Step::Next,
            },
        }
    }
}

fn when(matched: bool) -> Step {
    if matched { Step::Next } else { Step::Break }
}

fn load(state: &State, reg: u8, len: usize) -> Option<Vec<u8>> {
    let start = usize::from(reg) * 4;
    state.registers.get(start..start.checked_add(len)?).map(<[u8]>::to_vec)
}

/// Writes whole registers: what a value does not fill is zero, as in the kernel.
fn store(state: &mut State, reg: u8, value: &[u8]) -> Step {
    let start = usize::from(reg) * 4;
    let end = start + value.len().div_ceil(4) * 4;
    match state.registers.get_mut(start..end) {
        Some(slot) => {
            slot.fill(0);
            slot[..value.len()].copy_from_slice(value);
            Step::Next
        }
        None => Step::Break,
    }
}

/// iptables-nft keeps the old matches and targets as opaque blobs. The few that decide most rules are read.
fn xt(name: &str, data: &[u8], packet: &Packet) -> Step {
    if name == "reject" {
        // Not silent, but gone all the same.
        return Step::Verdict(Verdict::Drop);
    }
    let (Some(kind), info) = (attribute(data, 1), attribute(data, 3).unwrap_or_default()) else { return Step::Either };
    let kind = String::from_utf8_lossy(kind.strip_suffix(b"\0").unwrap_or(kind)).into_owned();
    let port = |at: usize| -> Option<u16> {
        Some(u16::from_be_bytes([*packet.transport.get(at)?, *packet.transport.get(at + 1)?]))
    };
    let word = |at: usize| -> Option<u16> { Some(u16::from_ne_bytes([*info.get(at)?, *info.get(at + 1)?])) };
    match (name, kind.as_str()) {
        ("target", "REJECT" | "DROP") => Step::Verdict(Verdict::Drop),
        ("target", "ACCEPT") => Step::Verdict(Verdict::Accept),
        ("target", "LOG" | "NFLOG" | "CONNMARK" | "MARK" | "TCPMSS") | ("match", "comment") => Step::Next,
        ("match", "tcp" | "udp") => {
            let ports = (|| {
                let (source, destination) = (port(0)?, port(2)?);
                let flags_at = if kind == "tcp" { 11 } else { 8 };
                // TCP flags and options, and inverted ranges, are left open.
                if *info.get(flags_at)? != 0 || (kind == "tcp" && (*info.get(8)? != 0 || *info.get(9)? != 0)) {
                    return None;
                }
                Some((word(0)?..=word(2)?).contains(&source) && (word(4)?..=word(6)?).contains(&destination))
            })();
            ports.map_or(Step::Either, when)
        }
        ("match", "conntrack") => {
            // struct xt_conntrack_mtinfo{1,2,3}: eight addresses, two times, five ports, then the flag words.
            const FLAGS_AT: usize = 8 * 16 + 2 * 4 + 5 * 2;
            const STATE: u16 = 1;
            let matched = (|| {
                let (flags, inverted, states) = (word(FLAGS_AT)?, word(FLAGS_AT + 2)?, word(FLAGS_AT + 4)?);
                if flags != STATE {
                    return None;
                }
                let state = packet.ct.as_ref().map_or(64, |ct| ct.state);
                Some((u32::from(states) & state != 0) != (inverted & STATE != 0))
            })();
            matched.map_or(Step::Either, when)
        }
        _ => Step::Either,
    }
}

/// The first netlink attribute of that kind.
fn attribute(mut data: &[u8], wanted: u16) -> Option<&[u8]> {
    while data.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([data[0], data[1]]));
        let kind = u16::from_ne_bytes([data[2], data[3]]) & 0x3fff;
        let value = data.get(4..len)?;
        if kind == wanted {
            return Some(value);
        }
        data = data.get(len.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::{Base, Rule, TableFamily};
    use super::*;

    fn table(chains: Vec<Chain>) -> Table {
        Table { family: TableFamily::Inet, name: "t".into(), flags: 0, maps: vec![], chains, timeouts: vec![] }
    }

    fn base(name: &str, priority: i32, accept: bool, rules: Vec<Vec<Expr>>) -> Chain {
        let base = Base { kind: "filter".into(), hook: Hook::Input, priority, accept };
        Chain {
            name: name.into(),
            base: Some(base),
            rules: rules.into_iter().map(|exprs| Rule { exprs, ..Rule::default() }).collect(),
        }
    }

    #[test]
    fn an_accept_ends_only_its_own_base_chain() {
        let tables = table(vec![
            base("later", 10, true, vec![vec![Expr::Verdict(Verdict::Drop)]]),
            base("early", 0, false, vec![vec![Expr::Verdict(Verdict::Accept)]]),
        ]);
        let out = run(&tables, Hook::Input, &Packet::default());
        assert!(out.drop && !out.accept);
        assert_eq!(out.dropped_at, Some(("later".into(), Some(0))));
    }

    #[test]
    fn a_goto_from_a_base_chain_ends_in_its_policy() {
        let mut chain = base(
            "in",
            0,
            false,
            vec![vec![Expr::Verdict(Verdict::Goto("x".into()))], vec![Expr::Verdict(Verdict::Accept)]],
        );
        let empty = Chain { name: "x".into(), base: None, rules: vec![] };
        assert!(run(&table(vec![chain.clone(), empty.clone()]), Hook::Input, &Packet::default()).drop);
        chain.rules[0].exprs = vec![Expr::Verdict(Verdict::Jump("x".into()))];
        assert!(run(&table(vec![chain, empty]), Hook::Input, &Packet::default()).accept);
    }

    #[test]
    fn an_unknown_expression_leaves_both_outcomes_open() {
        let unknown = Expr::Unknown { name: "osf".into(), data: vec![] };
        let out = run(
            &table(vec![base("in", 0, true, vec![vec![unknown, Expr::Verdict(Verdict::Drop)]])]),
            Hook::Input,
            &Packet::default(),
        );
        assert!(out.accept && out.drop);
    }

    #[test]
    fn a_long_table_of_things_that_nobody_knows_ends_with_both_outcomes_open() {
        // Each unknown expression forks; without a bound the forks nest until the stack is gone.
        let rule = || vec![Expr::Unknown { name: "osf".into(), data: vec![] }, Expr::Counter { packets: 0, bytes: 0 }];
        let mut rules: Vec<Vec<Expr>> = (0..40_000).map(|_| rule()).collect();
        rules.push(vec![Expr::Verdict(Verdict::Drop)]);
        let table = table(vec![base("in", 0, true, rules)]);
        // As small as a thread of the agent.
        let run = move || run(&table, Hook::Input, &Packet::default());
        let out =
            std::thread::Builder::new().stack_size(2 << 20).spawn(run).expect("a thread").join().expect("no overflow");
        assert!(out.drop);
    }

    #[test]
    fn jumps_in_a_circle_end() {
        let chain = base("in", 0, true, vec![vec![Expr::Verdict(Verdict::Jump("x".into()))]]);
        let x = Chain {
            name: "x".into(),
            base: None,
            rules: vec![Rule { exprs: vec![Expr::Verdict(Verdict::Jump("x".into()))], ..Rule::default() }],
        };
        assert!(run(&table(vec![chain, x]), Hook::Input, &Packet::default()).drop);
    }
}
