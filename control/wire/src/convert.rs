//! Between messages and what they mean.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use keepwall_core::{Family, Prefix};
use keepwall_fleet::bundle::{Bundle, Change, Digest, MEMBERS_MAX, SETS_MAX, Set, SetChange};
use keepwall_fleet::sync::{self, Applied, Refusal};
use prost::Message;

use crate::messages as wire;

/// A message that cannot mean anything. The connection is of no more use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadMessage(pub String);

impl std::fmt::Display for BadMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadMessage {}

fn bad<T>(why: impl Into<String>) -> Result<T, BadMessage> {
    Err(BadMessage(why.into()))
}

/// A state as a message.
impl From<sync::State> for wire::State {
    fn from(state: sync::State) -> wire::State {
        wire::State { generation: state.generation, digest: Bytes::copy_from_slice(&state.digest) }
    }
}

fn digest(bytes: &[u8]) -> Result<Digest, BadMessage> {
    bytes.try_into().map_err(|_| BadMessage(format!("a digest of {} bytes; it has 32", bytes.len())))
}

/// A state from its message; absent is generation 0.
///
/// # Errors
/// A digest of another length.
pub fn state_of(state: Option<&wire::State>) -> Result<sync::State, BadMessage> {
    match state {
        None => Ok(sync::State::default()),
        Some(state) => Ok(sync::State { generation: state.generation, digest: digest(&state.digest)? }),
    }
}

/// A hello as a message; version and status are the caller's to add.
#[must_use]
pub fn write_hello(hello: &sync::Hello) -> wire::Hello {
    wire::Hello {
        instance: hello.instance.clone(),
        held: (hello.held.generation > 0).then(|| hello.held.into()),
        tried: (hello.tried.generation > 0).then(|| hello.tried.into()),
        failed: hello.failed,
        ..wire::Hello::default()
    }
}

/// A hello from its message.
///
/// # Errors
/// A digest of another length.
pub fn read_hello(hello: &wire::Hello) -> Result<sync::Hello, BadMessage> {
    Ok(sync::Hello {
        instance: hello.instance.clone(),
        held: state_of(hello.held.as_ref())?,
        tried: state_of(hello.tried.as_ref())?,
        failed: hello.failed,
    })
}

impl wire::Outcome {
    /// An outcome as a message.
    #[must_use]
    pub fn of(outcome: &sync::Outcome, detail: impl Into<String>) -> wire::Outcome {
        let result = match outcome.result {
            Applied::Yes => 1,
            Applied::Failed => 2,
            Applied::Refused(Refusal::OtherInstance) => 3,
            Applied::Refused(Refusal::Older) => 4,
            Applied::Refused(Refusal::OtherBase) => 5,
            Applied::Refused(Refusal::BadBody) => 6,
        };
        wire::Outcome { state: Some(outcome.state.into()), result, detail: detail.into() }
    }

    /// An outcome from its message.
    ///
    /// # Errors
    /// A result that this version does not know.
    pub fn read(&self) -> Result<sync::Outcome, BadMessage> {
        let result = match self.result {
            1 => Applied::Yes,
            2 => Applied::Failed,
            3 => Applied::Refused(Refusal::OtherInstance),
            4 => Applied::Refused(Refusal::Older),
            5 => Applied::Refused(Refusal::OtherBase),
            6 => Applied::Refused(Refusal::BadBody),
            other => return bad(format!("an outcome of kind {other}")),
        };
        Ok(sync::Outcome { state: state_of(self.state.as_ref())?, result })
    }
}

/// What an offer carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Everything.
    Whole(Bundle),
    /// What differs from the base.
    Change(Change),
}

/// A whole bundle as the body of an offer.
#[must_use]
pub fn write_whole(bundle: &Bundle) -> Bytes {
    let set = |(name, set): (&Arc<str>, &Set)| {
        set_message(&SetChange { name: name.to_string(), anew: true, add: set.to_vec(), remove: Vec::new() })
    };
    let whole =
        wire::Whole { rules: Bytes::copy_from_slice(bundle.rules()), sets: bundle.sets().iter().map(set).collect() };
    whole.encode_to_vec().into()
}

/// A change as the body of an offer. The same bytes serve every machine that it fits.
#[must_use]
pub fn write_change(change: &Change) -> Bytes {
    let change = wire::Change {
        rules: change.rules.as_ref().map(|rules| Bytes::copy_from_slice(rules)),
        sets: change.sets.iter().map(set_message).collect(),
        gone: change.gone.clone(),
    };
    change.encode_to_vec().into()
}

/// An offer as a frame. Only the head is made for each machine: the body is copied as it is.
#[must_use]
pub fn offer_frame(
    instance: &str,
    state: sync::State,
    base: Option<Digest>,
    body: &Bytes,
    confirm_within_s: u32,
    note: &str,
) -> Bytes {
    crate::frame(&wire::FromServer {
        say: Some(wire::from_server::Say::Offer(wire::Offer {
            instance: instance.to_owned(),
            state: Some(state.into()),
            base: base.map(|base| Bytes::copy_from_slice(&base)).unwrap_or_default(),
            body: body.clone(),
            confirm_within_s,
            note: note.to_owned(),
        })),
    })
}

/// An offer's head and body from its message.
///
/// # Errors
/// Anything that cannot be.
pub fn read_offer(offer: &wire::Offer) -> Result<(sync::Offer, Body), BadMessage> {
    let base = if offer.base.is_empty() { None } else { Some(digest(&offer.base)?) };
    let head = sync::Offer { instance: offer.instance.clone(), state: state_of(offer.state.as_ref())?, base };
    let body = read_body(offer.body.clone(), base.is_none())?;
    Ok((head, body))
}

/// The body of an offer.
///
/// # Errors
/// Anything that cannot be.
pub fn read_body(bytes: Bytes, whole: bool) -> Result<Body, BadMessage> {
    let undecodable = |error: prost::DecodeError| BadMessage(format!("an offer's body: {error}"));
    if whole {
        let whole = wire::Whole::decode(bytes).map_err(undecodable)?;
        if whole.sets.len() > SETS_MAX {
            return bad(format!("more than {SETS_MAX} sets"));
        }
        let mut sets = std::collections::BTreeMap::new();
        for set in &whole.sets {
            let set = set_change(set)?;
            if sets.insert(set.name.as_str().into(), Set::new(set.add)).is_some() {
                return bad(format!("set `{}` comes twice", set.name));
            }
        }
        let bundle = Bundle::from_parts(whole.rules.to_vec(), sets).map_err(|error| BadMessage(error.to_string()))?;
        return Ok(Body::Whole(bundle));
    }
    let change = wire::Change::decode(bytes).map_err(undecodable)?;
    if change.sets.len() > SETS_MAX || change.gone.len() > SETS_MAX {
        return bad(format!("more than {SETS_MAX} sets"));
    }
    Ok(Body::Change(Change {
        rules: change.rules.map(|rules| rules.to_vec()),
        sets: change.sets.iter().map(set_change).collect::<Result<_, _>>()?,
        gone: change.gone,
    }))
}

fn set_message(set: &SetChange) -> wire::Set {
    let (add_v4, add_v6) = pack(&set.add);
    let (remove_v4, remove_v6) = pack(&set.remove);
    wire::Set { name: set.name.clone(), anew: set.anew, add_v4, add_v6, remove_v4, remove_v6 }
}

fn set_change(set: &wire::Set) -> Result<SetChange, BadMessage> {
    Ok(SetChange {
        name: set.name.clone(),
        anew: set.anew,
        add: unpack(&set.add_v4, &set.add_v6)?,
        remove: unpack(&set.remove_v4, &set.remove_v6)?,
    })
}

fn pack(members: &[Prefix]) -> (Bytes, Bytes) {
    let (mut v4, mut v6) = (BytesMut::new(), BytesMut::new());
    for member in members {
        let out = match member.family() {
            Family::Ipv4 => &mut v4,
            Family::Ipv6 => &mut v6,
        };
        out.put_u8(member.len());
        match member.address() {
            IpAddr::V4(a) => out.put_slice(&a.octets()),
            IpAddr::V6(a) => out.put_slice(&a.octets()),
        }
    }
    (v4.freeze(), v6.freeze())
}

fn unpack(v4: &[u8], v6: &[u8]) -> Result<Vec<Prefix>, BadMessage> {
    let ((v4, v4_rest), (v6, v6_rest)) = (v4.as_chunks::<5>(), v6.as_chunks::<17>());
    if !v4_rest.is_empty() || !v6_rest.is_empty() {
        return bad("members of a set are cut off");
    }
    if v4.len() + v6.len() > MEMBERS_MAX {
        return bad(format!("more than {MEMBERS_MAX} members in a set"));
    }
    let prefix = |address: IpAddr, len: u8| Prefix::new(address, len).map_err(|error| BadMessage(error.to_string()));
    let mut out = Vec::with_capacity(v4.len() + v6.len());
    for [len, a, b, c, d] in v4 {
        out.push(prefix(Ipv4Addr::new(*a, *b, *c, *d).into(), *len)?);
    }
    for [len, address @ ..] in v6 {
        out.push(prefix(Ipv6Addr::from(*address).into(), *len)?);
    }
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_and_a_change_arrive_as_they_were_sent() {
        let members = |all: &[&str]| Set::new(all.iter().map(|m| m.parse().unwrap()).collect());
        let a = Bundle::from_parts(
            b"{}".to_vec(),
            [("group:web".into(), members(&["10.0.0.1", "10.0.0.0/24", "fd00::/8"]))].into(),
        )
        .unwrap();
        let b =
            Bundle::from_parts(b"{ }".to_vec(), [("group:db".into(), members(&["0.0.0.0/0", "::/0"]))].into()).unwrap();
        let state = sync::State { generation: 7, digest: a.digest() };
        let frame = offer_frame("web-1", state, None, &write_whole(&a), 60, "");
        let [wire::FromServer { say: Some(wire::from_server::Say::Offer(offer)) }] =
            &crate::frames::<wire::FromServer>(&frame, crate::SERVER_FRAME_MAX).unwrap()[..]
        else {
            panic!("no offer")
        };
        let head = sync::Offer { instance: "web-1".into(), state, base: None };
        assert_eq!(read_offer(offer).unwrap(), (head, Body::Whole(a.clone())));
        let change = a.change_to(&b);
        let Body::Change(arrived) = read_body(write_change(&change), false).unwrap() else { panic!("whole") };
        assert_eq!(a.changed(&arrived).unwrap(), b);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let set = |add: &'static [u8]| wire::Set {
            name: "x".into(),
            add_v4: Bytes::from_static(add),
            ..wire::Set::default()
        };
        let body = |set| wire::Change { sets: vec![set], ..wire::Change::default() }.encode_to_vec().into();
        assert!(read_body(body(set(&[24, 10, 0, 0, 0])), false).is_ok());
        // Host bits set, a length that no address has, a cut member.
        for wrong in [&[24, 10, 0, 0, 1][..], &[33, 10, 0, 0, 0], &[24, 10, 0]] {
            assert!(read_body(body(set(wrong)), false).is_err());
        }
        let head = crate::length([0, 4, 0, 1], crate::AGENT_FRAME_MAX);
        assert_eq!(head, Err(crate::FrameError::TooLong { len: 262_145, max: 262_144 }));
        assert!(crate::frames::<wire::FromAgent>(&[0, 0, 0, 9, 1], 100).is_err());
    }
}
