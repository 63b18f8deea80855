//! Any bytes as an intent, from the socket or from a state file: what validates also lowers (or is refused as too
//! large), to the same table each time, and judges.

#![no_main]

use keepwall_secgroup::evaluate::Packet;
use keepwall_secgroup::intent::Intent;
use keepwall_secgroup::judge::{judge, probes};
use keepwall_secgroup::lower::lower;
use keepwall_secgroup::spec::Direction;
use libfuzzer_sys::fuzz_target;

/// A number in a file may ask for any amount of work; here it gets little.
const ELEMENTS_MAX: u32 = 20_000;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut intent) = Intent::from_json(bytes) else { return };
    intent.elements_max = intent.elements_max.min(ELEMENTS_MAX);
    match lower(&intent, "fuzz") {
        Ok(lowered) => assert_eq!(lower(&intent, "fuzz").map(|again| again.table), Ok(lowered.table)),
        Err(large) => drop(large.to_string()),
    }
    let _ = probes(&intent);
    for attachment in &intent.attachments {
        for direction in Direction::BOTH {
            let packet = Packet {
                direction,
                peer: [10, 0, 0, 9].into(),
                local: [10, 0, 0, 5].into(),
                protocol: 6,
                source_port: 49_152,
                destination_port: 22,
                icmp: None,
            };
            let _ = judge(&intent, attachment, &packet).reason().to_string();
        }
    }
});
