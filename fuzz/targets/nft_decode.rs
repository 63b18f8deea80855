//! Any bytes as the kernel's netlink answers: read or refused, never a panic.
//!
//! Tables that read well are then run with a packet, as the search for other firewalls' drops does: the tables of
//! others are foreign too.

#![no_main]

use keepwall_ir::nft::Hook;
use keepwall_ir::nft::decode::{self, Dump};
use keepwall_ir::nft::interpret::{self, Connection, Packet};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut dump = Dump::new();
    for message in decode::messages(bytes).map_while(Result::ok) {
        let _ = dump.push(&message);
        let _ = decode::reply(&message);
        let _ = decode::generation(&message);
        let _ = decode::change(&message);
        let _ = decode::trace(&message);
        let _ = decode::logged(&message);
        let _ = decode::flow(&message);
    }
    let _ = (dump.maps(), dump.tables(), dump.elements());
    for mut dumped in dump.finish() {
        decode::normalise(&mut dumped.table);
        assert!(decode::is_normalised(&dumped.table));
        for hook in [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output] {
            let _ = interpret::run(&dumped.table, hook, &packet());
        }
    }
});

/// A TCP SYN from 203.0.113.7 to 10.0.0.5:22.
fn packet() -> Packet {
    let mut network = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    network.extend([203, 0, 113, 7, 10, 0, 0, 5]);
    let mut transport = vec![0xc0, 0, 0, 22];
    transport.resize(20, 0);
    Packet {
        iif: "eth0".into(),
        nfproto: 2,
        network,
        transport,
        l4proto: 6,
        iif_type: 1,
        ct: Some(Connection {
            state: 8,
            original_destination: vec![10, 0, 0, 5],
            original_port: 22,
            ..Connection::default()
        }),
        ..Packet::default()
    }
}
