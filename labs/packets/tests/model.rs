//! Reference evaluator, lowered tables and kernel agree; and they would not if a table were wrong.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]

use keepwall_packets::campaign::{self, Progress, Size, Tally};
use keepwall_packets::draw::{self, Dice};
use keepwall_packets::kernel::{self, in_kernel};
use keepwall_packets::model::lowered;

fn assert_they_agree(tally: &Tally) {
    assert!(tally.mismatches.is_empty(), "{}", tally.mismatches.join("\n"));
    for way in tally.ways {
        // A comparison in which one answer is rare proves little.
        assert!(way.allowed > way.pairs / 10 && way.allowed < way.pairs * 9 / 10, "{tally:?}");
        assert!(way.ipv6 > way.pairs / 4 && way.ipv6 < way.pairs * 3 / 4, "{tally:?}");
    }
}

#[test]
fn the_reference_and_the_tables_agree_on_random_policies() {
    let size = Size { pairs: 30_000, kernel: 0, seed: 0 };
    let tally = campaign::compare(size, &Progress::default(), None).unwrap();
    assert_they_agree(&tally);
    assert!(tally.by_class > 0 && tally.rules_max > 100, "all shapes are among them: {tally:?}");
}

#[test]
fn real_packets_meet_the_verdict_of_the_reference() {
    let size = Size { pairs: 12_000, kernel: 12_000, seed: 100_000 };
    match in_kernel(|harness| campaign::compare(size, &Progress::default(), Some(harness))) {
        Err(failure) if kernel::no_root(&failure) => eprintln!("skipped: needs root"),
        tally => assert_they_agree(&tally.unwrap()),
    }
}

#[test]
fn a_kernel_that_drops_everything_is_noticed() {
    let outcome = in_kernel(|harness| {
        let mut dice = Dice::new(1);
        let case = draw::case(&mut dice, 4);
        let mut table = lowered(&case, "t").table;
        for chain in table.chains.iter_mut().filter(|chain| chain.base.is_some()) {
            let drop = keepwall_ir::nft::Expr::Verdict(keepwall_ir::nft::Verdict::Drop);
            chain.rules = vec![keepwall_ir::nft::Rule { exprs: vec![drop], comment: String::new() }];
        }
        harness.load(&table)?;
        let trips: Vec<_> = draw::Path::ALL.iter().map(|path| draw::trip(&mut dice, &case, *path)).collect();
        harness.arrived(&trips)
    });
    match outcome {
        Err(failure) if kernel::no_root(&failure) => eprintln!("skipped: needs root"),
        arrived => assert_eq!(arrived.unwrap(), [false; 6]),
    }
}

#[test]
fn broken_tables_are_noticed() {
    let mutants = campaign::mutants(7, 40, &Progress::default());
    assert!(mutants.share() >= 0.99, "{mutants:?}");
    assert!(mutants.made >= 40 && mutants.equivalent < mutants.made * 2 / 3, "{mutants:?}");
}
