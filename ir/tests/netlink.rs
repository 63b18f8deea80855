//! The two directions of the netlink form agree, and foreign bytes do no harm.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use keepwall_ir::nft::decode::{self, DecodeError, Dump, Flow, Reply, Tuple, TupleRest};
use keepwall_ir::nft::encode::{self, At, Batch, EncodeError, Subject};
use keepwall_ir::nft::*;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};

// ---- random tables

const FIELDS: [FieldType; 8] = [
    FieldType::Ipv4Addr,
    FieldType::Ipv6Addr,
    FieldType::InetProto,
    FieldType::InetService,
    FieldType::IfName,
    FieldType::Mark,
    FieldType::CtState,
    FieldType::EtherAddr,
];

fn name() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9_.-]{0,30}"
}

fn comment() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[ -~]{1,128}", "ü{1,64}"]
}

fn bytes_of(len: usize) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => vec(any::<u8>(), len..=len),
        1 => Just(vec![0; len]),
        1 => Just(vec![0xff; len]),
    ]
}

fn range_of(field: FieldType, interval: bool) -> BoxedStrategy<FieldRange> {
    let len = field.len();
    if interval {
        let bounds = (bytes_of(len), bytes_of(len));
        bounds.prop_map(|(a, b)| FieldRange::new(a.clone().min(b.clone()), a.max(b))).boxed()
    } else {
        bytes_of(len).prop_map(FieldRange::exact).boxed()
    }
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        Just(Verdict::Accept),
        Just(Verdict::Drop),
        Just(Verdict::Continue),
        Just(Verdict::Return),
        name().prop_map(Verdict::Jump),
        name().prop_map(Verdict::Goto),
    ]
}

fn data(kind: MapData) -> BoxedStrategy<ElementData> {
    match kind {
        MapData::Nothing => Just(ElementData::Nothing).boxed(),
        MapData::Verdict => verdict().prop_map(ElementData::Verdict).boxed(),
        MapData::Mark => any::<u32>().prop_map(ElementData::Mark).boxed(),
    }
}

fn map() -> impl Strategy<Value = Map> {
    let kinds = select(vec![MapData::Nothing, MapData::Verdict, MapData::Mark]);
    let shape = (name(), vec(select(FIELDS.to_vec()), 1..=5), any::<bool>(), kinds, any::<bool>());
    shape.prop_flat_map(|(name, key, interval, kind, counters)| {
        // Disjoint by the first field: sorted bounds, taken in pairs. Neighbours may touch.
        let firsts = btree_set(bytes_of(key[0].len()), 0..12);
        let others: Vec<_> = key[1..].iter().map(|field| range_of(*field, interval)).collect();
        let rest = vec((others, data(kind), comment()), 12);
        (firsts, rest).prop_map(move |(firsts, rest)| {
            let firsts: Vec<Vec<u8>> = firsts.into_iter().collect();
            let ranges: Vec<FieldRange> = if interval {
                let pairs = firsts.chunks_exact(2).map(|pair| FieldRange::new(pair[0].clone(), pair[1].clone()));
                pairs.collect()
            } else {
                firsts.into_iter().map(FieldRange::exact).collect()
            };
            let elements = ranges.into_iter().zip(rest).map(|(first, (others, data, comment))| {
                let key = std::iter::once(first).chain(others).collect();
                Element { key, data, comment }
            });
            Map { name: name.clone(), key: key.clone(), interval, data: kind, counters, elements: elements.collect() }
        })
    })
}

fn expr(maps: Vec<Map>) -> impl Strategy<Value = Expr> {
    let meta = select(vec![
        Meta::NfProto,
        Meta::L4Proto,
        Meta::IifName,
        Meta::OifName,
        Meta::Mark,
        Meta::IifType,
        Meta::PktType,
        Meta::Protocol,
        Meta::Other(4),
    ]);
    let ct = select(vec![
        CtKey::State,
        CtKey::Status,
        CtKey::Mark,
        CtKey::Direction,
        CtKey::OriginalDst4,
        CtKey::OriginalDst6,
        CtKey::OriginalDport,
        CtKey::Other(5),
    ]);
    let base = select(vec![PayloadBase::Link, PayloadBase::Network, PayloadBase::Transport, PayloadBase::Inner]);
    let op = select(vec![CmpOp::Eq, CmpOp::Neq, CmpOp::Lt, CmpOp::Lte, CmpOp::Gt, CmpOp::Gte]);
    let pair = (1usize..16).prop_flat_map(|len| (bytes_of(len), bytes_of(len)));
    let reg = 0u8..12;
    let lookup =
        (any::<Index>(), reg.clone(), reg.clone(), any::<bool>()).prop_map(move |(index, sreg, dreg, invert)| {
            if maps.is_empty() {
                return Expr::TraceOn;
            }
            let map = &maps[index.index(maps.len())];
            let into = match map.data {
                MapData::Nothing => LookupInto::Nothing,
                MapData::Verdict => LookupInto::Verdict,
                MapData::Mark => LookupInto::Register(dreg),
            };
            Expr::Lookup { map: map.name.clone(), sreg, into, invert }
        });
    prop_oneof![
        (meta, reg.clone()).prop_map(|(key, dreg)| Expr::Meta { key, dreg }),
        Just(Expr::TraceOn),
        reg.clone().prop_map(|sreg| Expr::MarkSet { sreg }),
        (base, 0u32..256, 1u32..=16, reg.clone()).prop_map(|(base, offset, len, dreg)| Expr::Payload {
            base,
            offset,
            len,
            dreg
        }),
        (ct, reg.clone()).prop_map(|(key, dreg)| Expr::Ct { key, dreg }),
        name().prop_map(|name| Expr::CtTimeoutSet { name }),
        (reg.clone(), reg.clone(), pair.clone()).prop_map(|(sreg, dreg, (mask, xor))| Expr::Bitwise {
            sreg,
            dreg,
            mask,
            xor
        }),
        (reg.clone(), op, vec(any::<u8>(), 1..=16)).prop_map(|(sreg, op, data)| Expr::Cmp { sreg, op, data }),
        (reg.clone(), any::<bool>(), pair).prop_map(|(sreg, invert, (from, to))| Expr::Range {
            sreg,
            invert,
            from,
            to
        }),
        lookup,
        (any::<u64>(), any::<u64>()).prop_map(|(packets, bytes)| Expr::Counter { packets, bytes }),
        (any::<u64>(), any::<u32>(), any::<bool>()).prop_map(|(per_s, burst, over)| Expr::Limit { per_s, burst, over }),
        (any::<u16>(), "[ -~]{0,127}", any::<u32>()).prop_map(|(group, prefix, snaplen)| Expr::Log {
            group,
            prefix,
            snaplen
        }),
        verdict().prop_map(Expr::Verdict),
        (reg, vec(any::<u8>(), 1..=16)).prop_map(|(dreg, data)| Expr::Immediate { dreg, data }),
    ]
}

fn chain(maps: Vec<Map>) -> impl Strategy<Value = Chain> {
    let hook = select(vec![Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting]);
    let kind = select(vec!["filter".to_owned(), "nat".to_owned(), "route".to_owned()]);
    let base = (kind, hook, any::<i32>(), any::<bool>()).prop_map(|(kind, hook, priority, accept)| Base {
        kind,
        hook,
        priority,
        accept,
    });
    let rules = vec((vec(expr(maps), 0..8), comment()).prop_map(|(exprs, comment)| Rule { exprs, comment }), 0..5);
    (name(), proptest::option::of(base), rules).prop_map(|(name, base, rules)| Chain { name, base, rules })
}

fn timeout() -> impl Strategy<Value = CtTimeout> {
    let policy = proptest::collection::btree_map(1u16..=11, any::<u32>(), 0..6);
    (name(), select(vec![6u8, 17]), select(vec![2u16, 10]), policy).prop_map(|(name, l4proto, l3proto, policy)| {
        CtTimeout { name, l4proto, l3proto, policy: policy.into_iter().collect() }
    })
}

fn table() -> impl Strategy<Value = Table> {
    let family = select(vec![TableFamily::Inet, TableFamily::Ip, TableFamily::Ip6, TableFamily::Bridge]);
    vec(map(), 0..4).prop_flat_map(move |mut maps| {
        maps.sort_by(|a, b| a.name.cmp(&b.name));
        maps.dedup_by(|a, b| a.name == b.name);
        let chains = vec(chain(maps.clone()), 0..4);
        (family.clone(), name(), 0u32..8, chains, vec(timeout(), 0..3)).prop_map(
            move |(family, name, flags, mut chains, mut timeouts)| {
                chains.sort_by(|a, b| a.name.cmp(&b.name));
                chains.dedup_by(|a, b| a.name == b.name);
                timeouts.sort_by(|a, b| a.name.cmp(&b.name));
                timeouts.dedup_by(|a, b| a.name == b.name);
                Table { family, name, flags, maps: maps.clone(), chains, timeouts }
            },
        )
    })
}

/// The whole table in one transaction.
fn encoded(table: &Table) -> Result<Vec<u8>, EncodeError> {
    let at = At { family: table.family, table: &table.name };
    let mut batch = Batch::new(1);
    batch.new_table(at, table.flags)?;
    for timeout in &table.timeouts {
        batch.new_timeout(at, timeout)?;
    }
    for chain in &table.chains {
        batch.new_chain(at, chain)?;
    }
    for map in &table.maps {
        batch.new_map(at, map, 0)?;
        batch.new_elements(at, map, &map.elements)?;
    }
    for chain in &table.chains {
        for rule in &chain.rules {
            batch.new_rule(at, &chain.name, rule)?;
        }
    }
    Ok(batch.finish().bytes)
}

fn decoded(bytes: &[u8]) -> Result<Vec<decode::Dumped>, DecodeError> {
    let mut dump = Dump::new();
    for message in decode::messages(bytes) {
        dump.push(&message?)?;
    }
    Ok(dump.finish())
}

/// Everything that reads foreign bytes.
fn decode_everything(bytes: &[u8]) {
    let _ = decoded(bytes);
    for message in decode::messages(bytes).map_while(Result::ok) {
        let _ = decode::reply(&message);
        let _ = decode::generation(&message);
        let _ = decode::change(&message);
        let _ = decode::trace(&message);
        let _ = decode::logged(&message);
        let _ = decode::flow(&message);
    }
}

fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(16 + payload.len()).unwrap().to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(payload);
    bytes
}

proptest! {
    #[test]
    fn a_table_that_is_written_reads_back_as_the_same(table in table()) {
        let mut wanted = table.clone();
        decode::normalise(&mut wanted);
        prop_assert!(decode::is_normalised(&wanted));
        let mut found = decoded(&encoded(&table).unwrap()).unwrap();
        prop_assert_eq!(found.len(), 1);
        let mut found = found.remove(0);
        decode::normalise(&mut found.table);
        prop_assert_eq!(found.not_understood, Vec::<String>::new());
        prop_assert_eq!(found.table, wanted);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in vec(any::<u8>(), 0..512)) {
        decode_everything(&bytes);
    }

    #[test]
    fn arbitrary_attributes_of_every_message_do_no_harm(
        subsystem in select(vec![0u16, 1, 4, 10]),
        number in 0u16..32,
        flags in any::<u16>(),
        payload in vec(any::<u8>(), 0..512),
    ) {
        decode_everything(&message(subsystem << 8 | number, flags, &payload));
    }

    #[test]
    fn a_table_with_some_bytes_changed_does_no_harm(
        table in table(),
        changes in vec((any::<Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = encoded(&table).unwrap();
        for (index, value) in changes {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        decode_everything(&bytes);
    }

    #[test]
    fn any_flow_survives_its_own_key(four in any::<bool>(), a in any::<u128>(), b in any::<u128>(), kind in 0..3, n in any::<u32>()) {
        let address = |n: u128| -> IpAddr {
            if four { Ipv4Addr::from((n >> 96) as u32).into() } else { Ipv6Addr::from(n).into() }
        };
        let [n0, n1, n2, n3] = n.to_be_bytes();
        let rest = match kind {
            0 => TupleRest::Ports { src: u16::from_be_bytes([n0, n1]), dst: u16::from_be_bytes([n2, n3]) },
            1 => TupleRest::Icmp { id: u16::from_be_bytes([n0, n1]), kind: n2, code: n3 },
            _ => TupleRest::Nothing,
        };
        let original = Tuple { src: address(a), dst: address(b), protocol: n0, rest };
        let flow = Flow {
            original, reply: original, zone: 7, mark: 0, status: 0, timeout_s: 0, tcp_state: None, id: Some(n),
            counters_original: None, counters_reply: None,
        };
        let bytes = encode::flow_set_mark(1, &flow, 0xffff, 0xff);
        // The reply's tuple is no part of a key; with the original's in its place the message is as a dump's.
        let mut as_dumped = bytes.clone();
        let tuple_len = usize::from(u16::from_ne_bytes([bytes[20], bytes[21]]));
        let mut reply = bytes[20..20 + tuple_len].to_vec();
        reply[2..4].copy_from_slice(&(2u16 | 0x8000).to_ne_bytes());
        as_dumped.extend_from_slice(&reply);
        let len = u32::try_from(as_dumped.len()).unwrap();
        as_dumped[..4].copy_from_slice(&len.to_ne_bytes());
        let message = decode::messages(&as_dumped).next().unwrap().unwrap();
        let found = decode::flow(&message).unwrap();
        prop_assert_eq!((found.original, found.zone, found.mark), (flow.original, 7, 0xff));
    }
}

// ---- single cases

fn element(first: u8, last: u8) -> Element {
    Element { key: vec![FieldRange::new([first], [last])], data: ElementData::Nothing, comment: String::new() }
}

fn protocols(elements: Vec<Element>) -> Map {
    Map {
        name: "m".to_owned(),
        key: vec![FieldType::InetProto],
        interval: true,
        data: MapData::Nothing,
        counters: false,
        elements,
    }
}

const AT: At<'static> = At { family: TableFamily::Inet, table: "t" };

#[test]
fn ten_thousand_long_elements_are_spread_over_messages_that_fit() {
    let key = vec![FieldType::Ipv6Addr, FieldType::Ipv6Addr, FieldType::InetProto, FieldType::InetService];
    let element = |n: u32| Element {
        key: key
            .iter()
            .map(|field| {
                let mut value = n.to_be_bytes().to_vec();
                value.resize(field.len(), 0);
                FieldRange::exact(value)
            })
            .collect(),
        data: ElementData::Verdict(Verdict::Jump("a".repeat(255))),
        comment: "c".repeat(128),
    };
    let map = Map {
        name: "m".to_owned(),
        key: key.clone(),
        interval: true,
        data: MapData::Verdict,
        counters: true,
        elements: (0..10_000).map(|n| element(n << 16)).collect(),
    };
    let mut wanted = Table {
        family: TableFamily::Inet,
        name: "t".to_owned(),
        flags: 0,
        maps: vec![map],
        chains: vec![],
        timeouts: vec![],
    };
    let bytes = encoded(&wanted).unwrap();
    assert!(decode::messages(&bytes).all(|message| message.unwrap().payload.len() < 65_536));
    let mut found = decoded(&bytes).unwrap().remove(0).table;
    decode::normalise(&mut found);
    decode::normalise(&mut wanted);
    assert_eq!(found, wanted);
}

#[test]
fn ranges_touch_each_other_and_both_ends_of_the_space() {
    for elements in [
        vec![element(0, 255)],
        vec![element(0, 0), element(255, 255)],
        vec![element(0, 127), element(128, 255)],
        vec![element(1, 1), element(2, 2), element(4, 254)],
        vec![],
    ] {
        let table = Table {
            family: TableFamily::Inet,
            name: "t".to_owned(),
            flags: 0,
            maps: vec![protocols(elements)],
            chains: vec![],
            timeouts: vec![],
        };
        assert_eq!(decoded(&encoded(&table).unwrap()).unwrap().remove(0).table, table);
    }
}

#[test]
fn what_the_kernel_would_refuse_is_refused_with_a_sentence() {
    let mut batch = Batch::new(1);
    let long = "n".repeat(256);
    assert!(matches!(batch.new_table(At { table: &long, ..AT }, 0), Err(EncodeError::Name(_))));
    assert!(matches!(batch.del_map(AT, ""), Err(EncodeError::Name(_))));
    assert!(matches!(batch.del_map(AT, "a\0b"), Err(EncodeError::Name(_))));
    let mut rule = |expr: Expr| batch.new_rule(AT, "c", &Rule { exprs: vec![expr], comment: String::new() });
    let refused = rule(Expr::Meta { key: Meta::IifName, dreg: 13 });
    assert_eq!(refused, Err(EncodeError::Register { chain: "c".to_owned(), register: 13 }));
    assert!(rule(Expr::Meta { key: Meta::IifName, dreg: 12 }).is_ok());
    assert!(rule(Expr::Unknown { name: "xt".to_owned(), data: vec![] }).is_err());
    assert!(rule(Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: vec![] }).is_err());
    assert!(rule(Expr::Cmp { sreg: 0, op: CmpOp::Eq, data: vec![0; 65] }).is_err());
    assert!(rule(Expr::Log { group: 1, prefix: "p".repeat(128), snaplen: 0 }).is_err());
    assert!(rule(Expr::Log { group: 1, prefix: "p".repeat(127), snaplen: 0 }).is_ok());
    assert!(rule(Expr::Range { sreg: 0, invert: false, from: vec![1], to: vec![1, 2] }).is_err());
    assert!(rule(Expr::Verdict(Verdict::Queue)).is_err());
    let many = Rule { exprs: vec![Expr::TraceOn; 128], comment: String::new() };
    assert!(matches!(batch.new_rule(AT, "c", &many), Err(EncodeError::Rule { .. })));
    let chatty = Rule { exprs: vec![], comment: "c".repeat(129) };
    assert!(matches!(batch.new_rule(AT, "c", &chatty), Err(EncodeError::Comment(_))));

    let exact = Map { interval: false, ..protocols(vec![]) };
    assert!(batch.new_elements(AT, &exact, &[element(1, 1)]).is_ok());
    assert!(batch.new_elements(AT, &exact, &[element(1, 2)]).is_err(), "a range without intervals");
    assert!(batch.new_elements(AT, &protocols(vec![]), &[element(2, 1)]).is_err(), "reversed");
    let mut wide = element(1, 2);
    wide.key[0].last.push(0);
    assert!(batch.new_elements(AT, &protocols(vec![]), &[wide]).is_err(), "too long");
    let marked = Element { data: ElementData::Mark(1), ..element(1, 2) };
    assert!(batch.new_elements(AT, &protocols(vec![]), &[marked]).is_err(), "data in a set");
    let six = Map { key: vec![FieldType::InetProto; 6], ..protocols(vec![]) };
    assert!(matches!(batch.new_map(AT, &six, 0), Err(EncodeError::Key { .. })));
    let ingress = Base { kind: "filter".to_owned(), hook: Hook::Ingress, priority: 0, accept: true };
    let ingress = Chain { name: "c".to_owned(), base: Some(ingress), rules: vec![] };
    assert!(matches!(batch.new_chain(AT, &ingress), Err(EncodeError::Hook { .. })));
}

#[test]
fn each_message_of_a_transaction_knows_what_it_is_about() {
    let mut batch = Batch::new(100);
    assert!(batch.is_empty());
    batch.new_table(AT, 6).unwrap();
    batch.flush_chain(AT, "input").unwrap();
    let transaction = batch.finish();
    assert_eq!(transaction.subject(100), Some(&Subject::Batch));
    assert_eq!(transaction.subject(101), Some(&Subject::Table));
    assert_eq!(transaction.subject(102), Some(&Subject::Chain("input".to_owned())));
    assert_eq!((transaction.subject(99), transaction.subject(104)), (None, None));
    assert_eq!(transaction.ack_seq, 102);
    let asking: Vec<u32> = decode::messages(&transaction.bytes)
        .map(Result::unwrap)
        .filter(|message| message.flags & encode::ACK != 0)
        .map(|message| message.seq)
        .collect();
    assert_eq!(asking, [102], "the last that does something");
    assert!(Batch::new(1).finish().empty);
}

#[test]
fn a_refusal_tells_its_number_its_words_and_its_place() {
    let mut payload = (-17i32).to_ne_bytes().to_vec();
    payload.extend_from_slice(&[0; 16]);
    payload.extend_from_slice(&[8, 0, 1, 0, b'n', b'o', 0, 0]);
    payload.extend_from_slice(&[8, 0, 2, 0]);
    payload.extend_from_slice(&24u32.to_ne_bytes());
    let parse = |flags: u16, payload: &[u8]| {
        let bytes = message(2, flags, payload);
        decode::reply(&decode::messages(&bytes).next().unwrap().unwrap()).unwrap()
    };
    let Reply::Error(error) = parse(0x300, &payload) else { panic!("no error") };
    assert_eq!((error.errno, error.message.as_deref(), error.offset), (17, Some("no"), Some(24)));
    assert_eq!(parse(0, &[0; 20]), Reply::Ack);
    assert!(matches!(parse(0, &[]), Reply::Error(_)), "an answer that is too short is no success");
    let Reply::Error(error) = parse(0, &i32::MIN.to_ne_bytes()) else { panic!("no error") };
    assert_eq!(error.errno, i32::MAX);
}

#[test]
fn wide_registers_are_numbered_as_narrow_ones() {
    // The kernel shows what was loaded into register 8 + 4 as wide register 2.
    for (shown, meant) in [
        (1u8, Some(0u8)),
        (2, Some(4)),
        (4, Some(12)),
        (8, Some(0)),
        (9, Some(1)),
        (23, Some(15)),
        (5, None),
        (24, None),
    ] {
        let rule = Rule { exprs: vec![Expr::Meta { key: Meta::Mark, dreg: 7 }], comment: String::new() };
        let table = Table {
            family: TableFamily::Inet,
            name: "t".to_owned(),
            flags: 0,
            maps: vec![],
            chains: vec![Chain { name: "c".to_owned(), base: None, rules: vec![rule] }],
            timeouts: vec![],
        };
        let mut bytes = encoded(&table).unwrap();
        let at = bytes.windows(8).rposition(|w| w == [8, 0, 1, 0, 0, 0, 0, 15]).unwrap();
        bytes[at + 7] = shown;
        let exprs = decoded(&bytes).unwrap().remove(0).table.chains.remove(0).rules.remove(0).exprs;
        match meant {
            Some(dreg) => assert_eq!(exprs, [Expr::Meta { key: Meta::Mark, dreg }]),
            None => assert!(matches!(exprs[0], Expr::Unknown { .. })),
        }
    }
}

#[test]
fn a_lookup_in_a_map_that_is_not_there_is_not_understood() {
    let lookup = Expr::Lookup { map: "gone".to_owned(), sreg: 0, into: LookupInto::Verdict, invert: false };
    let table = Table {
        family: TableFamily::Inet,
        name: "t".to_owned(),
        flags: 0,
        maps: vec![],
        chains: vec![Chain {
            name: "c".to_owned(),
            base: None,
            rules: vec![Rule { exprs: vec![lookup], comment: String::new() }],
        }],
        timeouts: vec![],
    };
    let found = decoded(&encoded(&table).unwrap()).unwrap().remove(0).table;
    assert!(matches!(&found.chains[0].rules[0].exprs[0], Expr::Unknown { name, .. } if name == "lookup"));
}
