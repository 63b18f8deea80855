//! Established sessions when a change turns their verdict.
//!
//! A session that was let in and would now be refused gets our bit in its connection mark, and the rules drop what
//! carries it, in both directions. Forgetting the session instead would not do: the next packet from the inside would
//! start a new one, outbound, which most groups let pass.
//!
//! Sessions whose verdict did not change are not touched, whatever that verdict is.

use std::ops::ControlFlow;

use keepwall_nft::{Conntrack, Flow};
use keepwall_secgroup::intent::Intent;
use keepwall_secgroup::judge::judge;
use keepwall_secgroup::lower::CUT_MARK;
use keepwall_sensors::interfaces::Interface;

use crate::enforce::chain;
use crate::packet::views;

/// More sessions than a full default conntrack table are not judged.
const FLOWS_MAX: usize = 1 << 20;

/// Cuts what `after` refuses and `before` (nothing: everything) let pass; takes back cuts that `after` allows.
/// Returns how many were cut.
pub(crate) fn cut(before: Option<&Intent>, after: &Intent, interfaces: &[Interface]) -> Result<u64, String> {
    let mut conntrack = Conntrack::open().map_err(|error| chain(&error))?;
    let mut changes: Vec<(Flow, u32)> = Vec::new();
    let mut seen = 0;
    conntrack
        .flows(None, |flow| {
            seen += 1;
            let marked = flow.mark & CUT_MARK != 0;
            let allows = |intent: &Intent| {
                views(intent, interfaces, &flow).iter().all(|(a, packet)| judge(intent, a, packet).is_allow())
            };
            match (allows(after), marked) {
                (true, true) => changes.push((flow, 0)),
                (false, false) if before.is_none_or(allows) => changes.push((flow, CUT_MARK)),
                _ => {}
            }
            if seen < FLOWS_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .map_err(|error| chain(&error))?;
    let cut = changes.iter().filter(|(_, mark)| *mark != 0).count() as u64;
    conntrack.set_marks(changes.iter().map(|(flow, mark)| (flow, *mark)), CUT_MARK).map_err(|error| chain(&error))?;
    Ok(cut)
}
