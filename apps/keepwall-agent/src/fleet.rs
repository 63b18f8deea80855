//! A machine that is bound to a control plane: who may ask what, and which decisions are taken.
//!
//! The uplink speaks with the control plane and has no privilege. Here, on the side that has, it is decided what that
//! is worth: whoever takes over the uplink, or replays what the control plane once said, can delay the newest
//! decision and put it in force again. It cannot bring back an older one, nor one for another machine.
//!
//! Not seen here: whether a decision is the control plane's own. What a dishonest server decides anew is taken.

use keepwall_fleet::bundle::Bundle;
use keepwall_link::{Apply, Mark, Refused, Request};
use serde::{Deserialize, Serialize};

use crate::agent::refused;

/// Names and addresses of machines are shorter than this.
const NAME_BYTES_MAX: usize = 255;

/// Which control plane, and how far it has brought us. On disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Binding {
    /// This machine's name in the fleet.
    pub(crate) instance: String,
    /// `host:port` of the control plane.
    pub(crate) server: String,
    /// The uplink's user.
    pub(crate) uid: u32,
    /// The newest decision that was ever begun.
    pub(crate) tried: Mark,
}

impl Binding {
    pub(crate) fn new(instance: String, server: String, uid: u32) -> Result<Binding, Refused> {
        let bad = |why: String| Err(refused("bad-request", why, "nothing was changed"));
        if uid == 0 {
            return bad("the uplink has no privilege, so it is not root's".into());
        }
        if keepwall_core::check_name(&instance).is_err() {
            return bad(format!("`{}` is no name of a machine", instance.escape_debug()));
        }
        if server.is_empty() || server.len() > NAME_BYTES_MAX || server.chars().any(|c| c.is_control() || c == ' ') {
            return bad("the control plane is named as `host:port`".into());
        }
        Ok(Binding { instance, server, uid, tried: Mark::default() })
    }

    /// Whether a decision of the control plane is for this machine, whole, and not older than what was begun.
    pub(crate) fn takes(&self, mark: &Mark, apply: &Apply) -> Result<(), Refused> {
        let no = |code: &str, message: String| Err(refused(code, message, "nothing was changed"));
        if apply.confirm_within_s.is_none() {
            return no("bad-request", "what a control plane decides reverts unless it is confirmed: say when".into());
        }
        if apply.intent.instance != self.instance {
            return no(
                "other-instance",
                format!("this is meant for `{}`; this machine is `{}`", apply.intent.instance, self.instance),
            );
        }
        // The very decision that was begun may be begun again: a crash came between. Any other of its number is a lie.
        if mark.generation <= self.tried.generation && *mark != self.tried {
            return no("older", format!("{mark} is not newer than what was begun: {}", self.tried));
        }
        if Bundle::of(apply.intent.clone()).digest() != mark.digest {
            return no("other-digest", "what arrived is not what was announced".into());
        }
        Ok(())
    }
}

/// The rules of a bound machine are not changed by hand.
pub(crate) fn only_from(server: &str) -> Refused {
    refused(
        "bound",
        format!("this machine is told by {server} what to enforce"),
        format!("change the posture at {server}; or take this machine out of the fleet first: keepwall leave"),
    )
}

/// Who may ask what. `pending` is what waits for a confirmation: the control plane's decision, if it is one.
pub(crate) fn may_ask(
    uid: u32,
    binding: Option<&Binding>,
    pending: Option<Option<Mark>>,
    request: &Request,
) -> Result<(), Refused> {
    if uid == 0 || !request.needs_root() {
        return Ok(());
    }
    if binding.is_none_or(|binding| binding.uid != uid) {
        return Err(refused("not-root", "only root may ask this of the agent", "run this as root (sudo keepwall …)"));
    }
    let allowed = match request {
        Request::Fleet | Request::Verify | Request::Flows => true,
        Request::Apply(apply) => apply.fleet.is_some() && apply.confirm_within_s.is_some(),
        Request::Confirm { .. } | Request::Revert { .. } => pending.is_none_or(|fleet| fleet.is_some()),
        _ => false,
    };
    if allowed { Ok(()) } else { Err(refused("not-root", "only root may ask this; the fleet's uplink may not", "")) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use keepwall_core::Generation;
    use keepwall_link::TraceFilter;
    use keepwall_secgroup::intent::Intent;

    fn apply(instance: &str, confirm_within_s: Option<u32>, fleet: Option<Mark>) -> Apply {
        Apply {
            intent: Intent::empty(instance),
            base: None,
            confirm_within_s,
            danger_cut_session: false,
            note: String::new(),
            fleet,
        }
    }

    fn mark(generation: u64, of: &Apply) -> Mark {
        Mark { generation, digest: Bundle::of(of.intent.clone()).digest() }
    }

    #[test]
    fn each_request_of_each_user() {
        const UPLINK: u32 = 61_184;
        let binding = Binding::new("web".into(), "server:7443".into(), UPLINK).unwrap();
        let a_mark = Some(Mark::default());
        let requests = [
            (Request::Status, "everybody"),
            (Request::Counters, "everybody"),
            (Request::Fleet, "uplink"),
            (Request::Verify, "uplink"),
            (Request::Flows, "uplink"),
            (Request::Apply(Box::new(apply("web", Some(60), a_mark))), "uplink"),
            (Request::Apply(Box::new(apply("web", None, a_mark))), "root"),
            (Request::Apply(Box::new(apply("web", Some(60), None))), "root"),
            (Request::Confirm { generation: Generation(1), danger_same_session: true }, "uplink"),
            (Request::Revert { generation: None }, "uplink"),
            (Request::Intent, "root"),
            (Request::Bind { instance: "x".into(), server: "y:1".into(), uid: 1 }, "root"),
            (Request::Unbind, "root"),
            (Request::Remove, "root"),
            (Request::Foreign, "root"),
            (Request::Published, "root"),
            (Request::Sessions, "root"),
            (Request::Trace(TraceFilter::default()), "root"),
        ];
        for (request, who) in &requests {
            let may = |uid: u32, binding| may_ask(uid, binding, Some(a_mark), request).is_ok();
            assert!(may(0, None) && may(0, Some(&binding)), "{request:?}");
            assert_eq!(may(UPLINK, Some(&binding)), *who != "root", "{request:?}");
            assert_eq!(may(UPLINK, None), *who == "everybody", "{request:?}");
            assert_eq!(may(UPLINK + 1, Some(&binding)), *who == "everybody", "{request:?}");
        }
        for (request, _) in &requests[8..10] {
            assert!(may_ask(UPLINK, Some(&binding), Some(None), request).is_err(), "an operator's own change");
            assert!(may_ask(UPLINK, Some(&binding), None, request).is_ok(), "the agent says that nothing waits");
        }
    }

    #[test]
    fn only_the_newest_decision_for_this_machine_is_taken() {
        let mut binding = Binding::new("web".into(), "server:7443".into(), 1).unwrap();
        let (ours, other) = (apply("web", Some(60), None), apply("db", Some(60), None));
        let code = |binding: &Binding, mark: Mark, apply: &Apply| binding.takes(&mark, apply).map_err(|r| r.code);
        assert_eq!(code(&binding, mark(5, &ours), &ours), Ok(()));
        assert_eq!(code(&binding, mark(5, &other), &other), Err("other-instance".into()));
        assert_eq!(code(&binding, mark(5, &other), &ours), Err("other-digest".into()));
        assert_eq!(code(&binding, mark(0, &ours), &ours), Err("older".into()), "0 means nothing");
        assert_eq!(code(&binding, mark(5, &ours), &apply("web", None, None)), Err("bad-request".into()));
        binding.tried = mark(5, &ours);
        assert_eq!(code(&binding, mark(4, &ours), &ours), Err("older".into()));
        assert_eq!(code(&binding, mark(5, &ours), &ours), Ok(()), "again, after a crash");
        assert_eq!(code(&binding, mark(6, &ours), &ours), Ok(()));
        binding.tried.digest[0] ^= 1;
        assert_eq!(code(&binding, mark(5, &ours), &ours), Err("older".into()), "another of the same number");
    }

    #[test]
    fn a_binding_names_a_machine_a_server_and_somebody_without_privilege() {
        for (instance, server, uid) in
            [("web", "s:1", 0), ("", "s:1", 1), ("a\nb", "s:1", 1), ("web", "", 1), ("web", "s 1", 1)]
        {
            assert!(Binding::new(instance.into(), server.into(), uid).is_err(), "{instance:?} {server:?} {uid}");
        }
    }
}
