//! A guest sends from its own addresses only, whatever its groups let out. Real packets; needs root.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]

use keepwall_packets::draw::{self, Case, Dice, Path, Trip};
use keepwall_packets::kernel::{in_kernel, no_root};
use keepwall_packets::model::{expected, interpreted, lowered};

fn trip(source: &str, destination: &str) -> Trip {
    Trip {
        path: Path::FromGuest,
        guest: 1,
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol: 17,
        source_port: 4000,
        destination_port: 4000,
        icmp: None,
    }
}

/// A drawn case without rules whose guest may send whatever it wants.
fn lets_everything_out() -> Case {
    (0..)
        .map(|seed| draw::case(&mut Dice::new(seed), 0))
        .find(|case| {
            ["10.2.0.2", "fd00:2::2"]
                .iter()
                .zip(["198.51.100.1", "2001:db8::1"])
                .all(|(a, b)| expected(case, &trip(a, b)))
        })
        .unwrap()
}

#[test]
fn a_guests_own_addresses_get_out_and_borrowed_ones_do_not() {
    let case = lets_everything_out();
    let table = lowered(&case, "t").table;
    let trips = [
        (trip("10.2.0.2", "198.51.100.1"), true),
        (trip("fd00:2::2", "2001:db8::1"), true),
        // The neighbour's, the host's, a stranger's.
        (trip("10.3.0.2", "198.51.100.1"), false),
        (trip("10.1.0.1", "198.51.100.1"), false),
        (trip("203.0.113.7", "198.51.100.1"), false),
        (trip("fd00:3::2", "2001:db8::1"), false),
        (trip("2001:db8::99", "2001:db8::1"), false),
    ];
    let router = Trip { protocol: 58, icmp: Some((134, 0)), source_port: 0, destination_port: 0, ..trips[1].0 };
    assert!(!interpreted(&table, &router) && !expected(&case, &router), "a guest is no router");
    for (trip, own) in &trips {
        assert_eq!(interpreted(&table, trip), *own, "{trip:?}");
    }
    let arrived = in_kernel(|harness| {
        harness.load(&table)?;
        harness.arrived(&trips.map(|(trip, _)| trip))
    });
    match arrived {
        Err(failure) if no_root(&failure) => eprintln!("skipped: needs root"),
        other => assert_eq!(other.unwrap(), trips.map(|(_, own)| own)),
    }
}
