//! Findings, events, the audit log, and questions to the posture.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream::{self, Stream as _};
use keepwall_api::problem::{self, Problem};
use keepwall_api::{
    AuditPage, AuditVerdict, AuditView, Explanation, ExplanationStep, Explanations, Observation, ObservationPage,
    ReachPage, ReachRow, SeverityWord,
};
use keepwall_core::{Family, Protocol, nearest};
use keepwall_fleet::access::{Action, Resource, Target};
use keepwall_fleet::world::World;
use keepwall_secgroup::check::Checked;
use keepwall_secgroup::evaluate::{Packet, evaluate};
use keepwall_secgroup::reach::matrix;
use keepwall_secgroup::spec::Direction;
use keepwall_store::{Filter, Row, Stream};
use serde_json::Value;
use tokio::sync::broadcast::error::RecvError;

use super::answer::Answer;
use super::call::{Call, cursor};
use super::{fleet, problems};
use crate::auth::Principal;
use crate::fleet::{Live, rfc3339};

pub(super) async fn openapi(_: Call) -> Result<Answer, Problem> {
    Ok(Answer::json(&keepwall_api::openapi::document()))
}

pub(super) async fn findings(call: Call) -> Result<Answer, Problem> {
    rows(call, Stream::Finding, Resource::Finding).await
}

pub(super) async fn events(call: Call) -> Result<Answer, Problem> {
    rows(call, Stream::Event, Resource::Event).await
}

/// Pages that are read for one page of an answer at most.
const PAGES_MAX: usize = 20;

async fn rows(call: Call, stream: Stream, resource: Resource) -> Result<Answer, Problem> {
    let limit = call.limit();
    let severity = SeverityWord::ALL.iter().position(|word| {
        let text = format!("{word:?}").to_lowercase();
        call.query("severity") == Some(text.as_str())
    });
    let mut filter = Filter {
        source: call.query("source").map(str::to_owned),
        kind: call.query("kind").map(str::to_owned),
        severity_min: severity.and_then(|n| u8::try_from(n).ok()).unwrap_or(0),
        before: call.cursor_number()?,
        limit,
    };
    let everything = call.allowed(resource, Action::Read, Target::Whole).is_ok();
    let mut visible: HashMap<String, bool> = HashMap::new();
    let mut items = Vec::new();
    let mut more = true;
    for _ in 0..PAGES_MAX {
        let page = call.app.store.rows(stream, &filter).await.map_err(problems::store)?;
        more = page.len() == limit;
        for row in page {
            if items.len() == limit {
                more = true;
                break;
            }
            filter.before = Some(row.id);
            if everything || sees(&call, resource, &row.source, &mut visible).await? {
                items.push(observation(row));
            }
        }
        if !more || items.len() == limit {
            break;
        }
    }
    let next = filter.before.filter(|_| more).map(cursor);
    Ok(Answer::json(&ObservationPage { items, next }))
}

/// Whether what a machine says may be seen. What the server itself says is for those who may see everything.
async fn sees(
    call: &Call,
    resource: Resource,
    source: &str,
    visible: &mut HashMap<String, bool>,
) -> Result<bool, Problem> {
    if let Some(known) = visible.get(source) {
        return Ok(*known);
    }
    let labels = if source.is_empty() { None } else { fleet::labels_of(call, source).await? };
    let sees = labels.is_some_and(|labels| call.sees(resource, &labels));
    visible.insert(source.to_owned(), sees);
    Ok(sees)
}

fn observation(row: Row) -> Observation {
    Observation {
        id: row.id,
        source: row.source,
        time: rfc3339(row.time_ms),
        kind: row.kind,
        severity: SeverityWord::ALL.get(usize::from(row.severity)).copied().unwrap_or(SeverityWord::Critical),
        body: serde_json::from_str(&row.body).unwrap_or(Value::String(row.body)),
    }
}

/// How often a silent stream says that it lives, and the credential behind it is looked at again.
const HEARTBEAT: Duration = Duration::from_secs(15);

struct Watch {
    receiver: tokio::sync::broadcast::Receiver<Live>,
    call: Call,
    /// The bearer token is not kept; who it stood for is asked for by its credential.
    who: Principal,
    kind: Option<String>,
    _place: tokio::sync::OwnedSemaphorePermit,
}

pub(super) async fn live(call: Call) -> Result<Answer, Problem> {
    let place = Arc::clone(&call.app.watchers)
        .try_acquire_owned()
        .map_err(|_| problem::THROTTLED.because(format!("{} watch already", call.app.settings.watchers_max)))?;
    let watch = Watch {
        receiver: call.app.fleet.live(),
        who: call.who()?.clone(),
        kind: call.query("kind").map(str::to_owned),
        call,
        _place: place,
    };
    let begin = stream::iter([Ok::<Bytes, std::convert::Infallible>(Bytes::from_static(b": watching\n\n"))]);
    let rest = stream::unfold(watch, |mut watch| async move {
        let text = next_event(&mut watch).await?;
        Some((Ok(Bytes::from(text)), watch))
    });
    let stream = futures_util::StreamExt::chain(begin, rest);
    debug_assert!(stream.size_hint().1.is_none());
    Ok(Answer::live(Body::from_stream(stream)))
}

/// The next thing to say; `None` ends the stream.
async fn next_event(watch: &mut Watch) -> Option<String> {
    loop {
        let event = match tokio::time::timeout(HEARTBEAT, watch.receiver.recv()).await {
            Err(_) => {
                // Whoever was shut out meanwhile sees nothing more.
                let still = watch.call.app.auth.again(&watch.who).await;
                watch.who = still.ok().flatten()?;
                return Some(": alive\n\n".to_owned());
            }
            Ok(Err(RecvError::Closed)) => return None,
            Ok(Err(RecvError::Lagged(missed))) => {
                return Some(format!("event: lagged\ndata: {{\"missed\":{missed}}}\n\n"));
            }
            Ok(Ok(event)) => event,
        };
        if watch.kind.as_ref().is_some_and(|kind| kind != event.kind) || !watch.sees(&event) {
            continue;
        }
        // JSON has no line breaks of its own, so one `data` line holds it.
        let body: Value = serde_json::from_str(&event.body).unwrap_or_default();
        let data = serde_json::json!({ "kind": event.kind, "name": event.name, "body": body });
        return Some(format!("event: {}\ndata: {data}\n\n", event.kind));
    }
}

impl Watch {
    fn sees(&self, event: &Live) -> bool {
        let resource = match event.kind {
            "rollout" => Resource::Rollout,
            "posture" => Resource::Posture,
            "finding" => Resource::Finding,
            "instance" => Resource::Instance,
            _ => Resource::Event,
        };
        self.who.permits(resource, Action::Read, Target::One(&event.labels)).is_allow()
    }
}

pub(super) async fn audit(call: Call) -> Result<Answer, Problem> {
    call.allowed(Resource::Audit, Action::Read, Target::Whole)?;
    let limit = call.limit();
    let from = call.cursor_number()?.unwrap_or(1).max(1);
    let lines = call.app.store.audit(from, limit).await.map_err(problems::store)?;
    let next = lines.last().filter(|_| lines.len() == limit).map(|last| cursor(last.number.saturating_add(1)));
    let items = lines.into_iter().map(|line| AuditView {
        number: line.number,
        time: rfc3339(line.time_ms),
        entry: serde_json::from_str(&line.entry).unwrap_or(Value::String(line.entry)),
        mac: line.mac,
    });
    Ok(Answer::json(&AuditPage { items: items.collect(), next }))
}

pub(super) async fn verify_audit(call: Call) -> Result<Answer, Problem> {
    call.allowed(Resource::Audit, Action::Read, Target::Whole)?;
    let verified = crate::run::verify_audit(&call.app.store, call.app.auth.seal()).await.map_err(problems::store)?;
    Ok(Answer::json(&match verified {
        Ok(verified) => AuditVerdict { holds: true, lines: verified.lines, why: String::new() },
        Err(broken) => AuditVerdict { holds: false, lines: broken.number.saturating_sub(1), why: broken.to_string() },
    }))
}

fn world(call: &Call) -> Result<Arc<World>, Problem> {
    let world = call.app.fleet.world();
    world.ok_or_else(|| problem::INVALID.because("no posture has been declared, so there is nothing to ask"))
}

/// A question that walks the whole posture, beside the requests that do not.
async fn ponder<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| problem::BROKEN.because("the question could not be answered"))
}

/// Instances up to which a matrix is made: it grows with their square.
const REACH_INSTANCES_MAX: usize = 300;

pub(super) async fn reach(call: Call) -> Result<Answer, Problem> {
    let world = world(&call)?;
    let count = world.checked().spec().instances.len();
    if count > REACH_INSTANCES_MAX {
        let why = format!("{count} instances are too many for a matrix; ask about two of them with /explain");
        return Err(problem::INVALID.because(why));
    }
    let rows = ponder(move || matrix(world.checked())).await?;
    let fits = |wanted: Option<&str>, name: &str| wanted.is_none_or(|wanted| wanted == name);
    let skip = usize::try_from(call.cursor_number()?.unwrap_or(0)).unwrap_or(usize::MAX);
    let limit = call.limit();
    let rows: Vec<ReachRow> = rows
        .into_iter()
        .filter(|((from, to), _)| fits(call.query("from"), from) && fits(call.query("to"), to))
        .map(|((from, to), on)| ReachRow { from, to, on: on.into_iter().collect() })
        .collect();
    let next = (rows.len() > skip.saturating_add(limit)).then(|| cursor(skip + limit));
    let items = rows.into_iter().skip(skip).take(limit).collect();
    Ok(Answer::json(&ReachPage { items, next }))
}

/// Pairs of addresses that one question is answered for.
const EXPLANATIONS_MAX: usize = 1_000;

pub(super) async fn explain(call: Call) -> Result<Answer, Problem> {
    let world = world(&call)?;
    let text = call.query("protocol").unwrap_or("tcp");
    let protocol = text.parse::<Protocol>().map_err(|error| problem::INVALID.at("protocol", error.to_string()))?;
    let Protocol::Number(number) = protocol else {
        return Err(problem::INVALID.at("protocol", "a packet has one protocol; `all` is for rules"));
    };
    let port = call.query_number("port").and_then(|port| u16::try_from(port).ok());
    if protocol.has_ports() && port.is_none() {
        return Err(problem::INVALID.at("port", format!("{protocol} needs a port")));
    }
    let question = Question {
        from: call.query("from").unwrap_or_default().to_owned(),
        to: call.query("to").unwrap_or_default().to_owned(),
        protocol,
        number,
        port,
        source_port: call.query_number("source_port").and_then(|port| u16::try_from(port).ok()).unwrap_or(40_000),
    };
    let items = ponder(move || question.answer(world.checked())).await??;
    Ok(Answer::json(&Explanations { items }))
}

struct Question {
    from: String,
    to: String,
    protocol: Protocol,
    number: u8,
    port: Option<u16>,
    source_port: u16,
}

/// One end: an address, and whose it is.
struct End {
    address: IpAddr,
    at: Option<(usize, usize, String)>,
}

impl Question {
    fn answer(&self, checked: &Checked) -> Result<Vec<Explanation>, Problem> {
        let (from, to) = (ends(checked, "from", &self.from)?, ends(checked, "to", &self.to)?);
        let mut out = Vec::new();
        for source in &from {
            for target in to.iter().filter(|target| Family::of(target.address) == Family::of(source.address)) {
                let other = self.protocol.family().is_some_and(|family| family != Family::of(source.address));
                if other || out.len() == EXPLANATIONS_MAX {
                    continue;
                }
                let steps = [(source, target, Direction::Egress), (target, source, Direction::Ingress)];
                let steps: Vec<ExplanationStep> =
                    steps.into_iter().filter_map(|(end, peer, way)| self.step(checked, end, peer, way)).collect();
                out.push(Explanation {
                    from: source.address.to_string(),
                    to: target.address.to_string(),
                    protocol: self.protocol.to_string(),
                    port: self.port,
                    allowed: steps.iter().all(|step| step.allow),
                    steps,
                });
            }
        }
        if out.is_empty() {
            let why = format!("{} and {} have no address family in common for {}", self.from, self.to, self.protocol);
            return Err(problem::INVALID.because(why));
        }
        Ok(out)
    }

    fn step(&self, checked: &Checked, end: &End, peer: &End, direction: Direction) -> Option<ExplanationStep> {
        let (instance, interface, label) = end.at.as_ref()?;
        let packet = Packet {
            direction,
            peer: peer.address,
            local: end.address,
            protocol: self.number,
            source_port: self.source_port,
            destination_port: self.port.unwrap_or(0),
            // Echo requests stand for ICMP.
            icmp: match self.number {
                1 => Some((8, 0)),
                58 => Some((128, 0)),
                _ => None,
            },
        };
        let verdict = evaluate(checked, *instance, *interface, &packet);
        Some(ExplanationStep {
            interface: label.clone(),
            direction: direction.to_string(),
            allow: verdict.is_allow(),
            reason: verdict.reason().to_string(),
        })
    }
}

fn ends(checked: &Checked, parameter: &'static str, text: &str) -> Result<Vec<End>, Problem> {
    let spec = checked.spec();
    let address: Option<IpAddr> = text.parse().ok();
    let mut out = Vec::new();
    for (i, instance) in spec.instances.iter().enumerate() {
        for (n, interface) in instance.interfaces.iter().enumerate() {
            let label = format!("{}/{}", instance.name, interface.name);
            let named = instance.name == text || label == text;
            let own = interface.addresses.iter().filter(|own| named || address == Some(**own));
            out.extend(own.map(|own| End { address: *own, at: Some((i, n, label.clone())) }));
            // Behind a public address stands the private one that rules see.
            let public = address.is_some_and(|address| interface.public.contains(&address));
            if let Some(private) = interface.addresses.first().filter(|_| public) {
                out.push(End { address: *private, at: Some((i, n, label.clone())) });
            }
            // An instance whose addresses nobody wrote down is still its own interface.
            if interface.addresses.is_empty() && named {
                let all = [IpAddr::from([0; 4]), IpAddr::from([0_u16; 8])];
                out.extend(all.map(|address| End { address, at: Some((i, n, label.clone())) }));
            }
        }
    }
    if let (Some(address), true) = (address, out.is_empty()) {
        out.push(End { address, at: None });
    }
    if !out.is_empty() {
        return Ok(out);
    }
    let near = nearest(text, spec.instances.iter().map(|instance| instance.name.as_str()));
    let near = near.map_or(String::new(), |near| format!("; did you mean {near}?"));
    Err(problem::INVALID.at(parameter, format!("`{text}` is neither an address nor an instance{near}")))
}
