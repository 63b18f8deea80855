//! What goes on, as a stream: flows with the names of their rules, and the kernel's own traces.

use std::net::IpAddr;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use keepwall_core::Protocol;
use keepwall_link::{Event, Flow, Refused, Response, TraceFilter, TraceStep, write_frame};
use keepwall_nft::{Conntrack, LogListener, Logged, Tracer};
use keepwall_secgroup::evaluate::{Reason, Verdict};
use keepwall_secgroup::intent::Intent;
use keepwall_secgroup::judge::judge;
use keepwall_secgroup::lower::LOG_GROUP;
use keepwall_secgroup::spec::Direction;

use crate::agent::devices;
use crate::enforce::chain;
use crate::packet::{Ends, views};
use crate::serve::{Shared, hold};

/// Bytes of each packet that are asked for: enough for addresses and ports behind IPv6 extension headers.
const SNAPLEN: u32 = 128;
/// Between events the reader is checked for being there still.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Sessions reported at once.
const SESSIONS_MAX: usize = 10_000;

fn refuse(stream: &mut UnixStream, message: String, help: &str) {
    let refused = Refused { code: "kernel".into(), message, help: help.into() };
    let _ = write_frame(stream, &Response::Refused(refused));
}

/// False if the reader is gone.
fn send(stream: &mut UnixStream, event: Event) -> bool {
    write_frame(stream, &Response::Event(Box::new(event))).is_ok()
}

/// True if the reader has closed its end.
fn gone(stream: &UnixStream) -> bool {
    use std::io::Read;
    let mut byte = [0u8; 1];
    let looked = stream.set_nonblocking(true).and_then(|()| (&*stream).read(&mut byte));
    let _ = stream.set_nonblocking(false);
    // A client sends nothing after its request, so a byte is as strange as an end.
    !matches!(looked, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

pub(crate) fn flows(mut stream: UnixStream, shared: &Shared) {
    let mut log = match LogListener::open(LOG_GROUP, SNAPLEN) {
        Ok(log) => log,
        Err(error) => {
            return refuse(&mut stream, chain(&error), "only one `keepwall flows` can run at a time on a machine");
        }
    };
    /// Stops the records however the stream ends.
    struct Unwatch<'a>(&'a Shared);
    impl Drop for Unwatch<'_> {
        fn drop(&mut self) {
            if let Err(why) = hold(self.0).watch(false) {
                crate::log(format!("flow records go on without a reader: {why}"));
            }
        }
    }
    let _unwatch = Unwatch(shared);
    if let Err(why) = hold(shared).watch(true) {
        return refuse(&mut stream, why, "");
    }
    if !send(&mut stream, Event::Ready) {
        return;
    }
    let mut intent = hold(shared).intent().cloned();
    let mut looked = Instant::now();
    let mut lost = 0;
    loop {
        if looked.elapsed() > HEARTBEAT {
            intent = hold(shared).intent().cloned();
            looked = Instant::now();
            if gone(&stream) {
                return;
            }
        }
        match log.next(HEARTBEAT) {
            Ok(Some(logged)) => {
                if let Some(flow) = flow(&logged, intent.as_ref())
                    && !send(&mut stream, Event::Flow(flow))
                {
                    return;
                }
            }
            Ok(None) => {}
            Err(error) => return refuse(&mut stream, chain(&error), ""),
        }
        if log.times_lost() != lost {
            let more = log.times_lost() - lost;
            lost = log.times_lost();
            if !send(&mut stream, Event::Lost(more)) {
                return;
            }
        }
    }
}

/// `kw1 DEVICE in|out accept|drop`, `kw1 invalid`, `kw1 cut`, `kw1 DEVICE spoofed`: what our rules say.
fn flow(logged: &Logged, intent: Option<&Intent>) -> Option<Flow> {
    let ends = Ends::parse(&logged.payload)?;
    let words: Vec<&str> = logged.prefix.split_whitespace().collect();
    let (device, direction, verdict) = match words.as_slice() {
        ["kw1", device, "in", verdict] => (*device, Some(Direction::Ingress), *verdict),
        ["kw1", device, "out", verdict] => (*device, Some(Direction::Egress), *verdict),
        ["kw1", device, "spoofed"] => (*device, None, "spoofed"),
        ["kw1", verdict] => ("", None, *verdict),
        _ => return None,
    };
    let attachment = intent.and_then(|i| i.attachments.iter().find(|a| a.device == device));
    let (rule, place) = match (intent, attachment, direction) {
        (Some(intent), Some(attachment), Some(direction)) => {
            match judge(intent, attachment, &ends.seen(direction)).reason() {
                // The rules of a fleet come without places: the posture is at the server.
                Reason::Rule { label, place, .. } if place.line == 0 => (label.clone(), String::new()),
                Reason::Rule { label, place, .. } => (label.clone(), place.to_string()),
                other => (other.to_string(), String::new()),
            }
        }
        _ => (String::new(), String::new()),
    };
    Some(Flow {
        time_us: logged.timestamp_us.unwrap_or(0),
        verdict: verdict.to_owned(),
        direction: direction.map(|d| d.to_string()).unwrap_or_default(),
        interface: attachment.map_or_else(|| device.to_owned(), |a| a.name.clone()),
        protocol: Protocol::Number(ends.protocol).to_string(),
        source: ends.source,
        destination: ends.destination,
        source_port: ends.source_port,
        destination_port: ends.destination_port,
        rule,
        place,
    })
}

/// Established sessions, each with the rule that lets it in now.
pub(crate) fn sessions(shared: &Shared) -> Result<Vec<Flow>, String> {
    let intent = hold(shared).intent().cloned();
    let devices = devices();
    let mut conntrack = Conntrack::open().map_err(|error| chain(&error))?;
    let mut out = Vec::new();
    conntrack
        .flows(None, |flow| {
            let (source_port, destination_port) = match flow.original.rest {
                keepwall_nft::TupleRest::Ports { src, dst } => (src, dst),
                _ => (0, 0),
            };
            let view = intent.as_ref().and_then(|i| Some((i, views(i, &devices, &flow).into_iter().next()?)));
            let (interface, direction, rule) = match view {
                Some((intent, (attachment, packet))) => {
                    let verdict: Verdict = judge(intent, attachment, &packet);
                    (attachment.name.clone(), packet.direction.to_string(), verdict.reason().to_string())
                }
                None => Default::default(),
            };
            out.push(Flow {
                time_us: 0,
                verdict: "established".into(),
                direction,
                interface,
                protocol: Protocol::Number(flow.original.protocol).to_string(),
                source: flow.original.src,
                destination: flow.original.dst,
                source_port,
                destination_port,
                rule,
                place: String::new(),
            });
            if out.len() < SESSIONS_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .map_err(|error| chain(&error))?;
    Ok(out)
}

pub(crate) fn trace(mut stream: UnixStream, shared: &Shared, filter: &TraceFilter) {
    if !(1..=300).contains(&filter.seconds) || !(1..=1_000).contains(&filter.packets) {
        return refuse(&mut stream, "a trace takes 1 to 300 seconds and 1 to 1,000 packets".into(), "");
    }
    let wanted = keepwall_nft::TraceFilter {
        source: filter.source,
        destination: filter.destination,
        protocol: filter.protocol,
        port: filter.port,
    };
    let mut tracer = match Tracer::start(&wanted) {
        Ok(tracer) => tracer,
        Err(error) => return refuse(&mut stream, chain(&error), ""),
    };
    let intent = hold(shared).intent().cloned();
    let interfaces = devices();
    if !send(&mut stream, Event::Ready) {
        return;
    }
    let end = Instant::now() + Duration::from_secs(u64::from(filter.seconds));
    let mut packets = std::collections::BTreeSet::new();
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        let step = match tracer.next(left.min(HEARTBEAT)) {
            Ok(Some(step)) => step,
            Ok(None) if gone(&stream) => return,
            Ok(None) => continue,
            Err(error) => return refuse(&mut stream, chain(&error), ""),
        };
        let first = packets.insert(step.packet);
        if packets.len() > filter.packets as usize {
            break;
        }
        let ends = ends_of(&step);
        let device = |index: Option<u32>| {
            index.and_then(|n| interfaces.iter().find(|i| i.index == n)).map_or("", |i| i.name.as_str())
        };
        let (iif, oif) = (device(step.iif), device(step.oif));
        let summary = ends.map(|e| describe(&e, iif, oif)).unwrap_or_default();
        let model = match (&intent, ends, first) {
            (Some(intent), Some(ends), _) if !summary.is_empty() => model(intent, &ends, iif, oif),
            _ => None,
        };
        let event = TraceStep {
            packet: step.packet,
            ours: step.table == "inet keepwall",
            table: step.table,
            chain: step.chain,
            rule: step.rule,
            verdict: step.verdict,
            summary,
            model,
        };
        if !send(&mut stream, Event::Trace(event)) {
            return;
        }
    }
    let _ = write_frame(&mut stream, &Response::End);
}

fn ends_of(step: &keepwall_nft::TracedStep) -> Option<Ends> {
    let mut ends = Ends::parse(&step.network_header)?;
    ends.set_transport(&step.transport_header);
    Some(ends)
}

fn describe(ends: &Ends, iif: &str, oif: &str) -> String {
    let port = |address: IpAddr, port: u16| match (address, port) {
        (address, 0) => address.to_string(),
        (IpAddr::V4(a), port) => format!("{a}:{port}"),
        (IpAddr::V6(a), port) => format!("[{a}]:{port}"),
    };
    let way = match (iif, oif) {
        ("", "") => String::new(),
        ("", oif) => format!(" out {oif}"),
        (iif, "") => format!(" in {iif}"),
        (iif, oif) => format!(" in {iif} out {oif}"),
    };
    format!(
        "{} {} -> {}{way}",
        Protocol::Number(ends.protocol),
        port(ends.source, ends.source_port),
        port(ends.destination, ends.destination_port)
    )
}

/// What the policy says about a packet on these devices; `None` where it says nothing.
fn model(intent: &Intent, ends: &Ends, iif: &str, oif: &str) -> Option<String> {
    let mut verdicts = Vec::new();
    for attachment in &intent.attachments {
        let directions = [(iif, attachment.guest), (oif, !attachment.guest)];
        for (device, egress) in directions {
            if device == attachment.device {
                let direction = if egress { Direction::Egress } else { Direction::Ingress };
                verdicts.push(judge(intent, attachment, &ends.seen(direction)));
            }
        }
    }
    let deciding = verdicts.iter().find(|v| !v.is_allow()).or(verdicts.last())?;
    let word = if deciding.is_allow() { "accept" } else { "drop" };
    Some(format!("{word}: {}", deciding.reason()))
}
