//! Many instances in one process, told what to do by lines of JSON.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use keepwall_uplink::enroll::{Facts, enroll};
use keepwall_uplink::identity::Request;
use keepwall_uplink::token::Token;
use keepwall_uplink::{Identity, Pace, Uplink};
use tokio::sync::{Semaphore, watch};

use crate::machine::{Log, StandIn};

/// One machine of a swarm.
pub struct Member {
    /// Its identity.
    pub identity: Identity,
    /// What stands for it.
    pub machine: StandIn,
}

/// Enrols `count` machines called `PREFIX-0`, `PREFIX-1`, …, each with an address out of 10.0.0.0/8, `parallel` at a
/// time. Keys are made before, so that what is timed is what a server sees; the time in seconds comes back too.
///
/// # Errors
/// One of them was not let in.
pub async fn enrol(
    tokens: &[Token],
    prefix: &str,
    first_address: u32,
    count: usize,
    parallel: usize,
    from: Option<IpAddr>,
    log: &Arc<Log>,
) -> Result<(Vec<Member>, f64), String> {
    let requests: Vec<Request> = (0..count).map(|_| Request::new()).collect::<Result<_, _>>()?;
    let begun = std::time::Instant::now();
    let turns = Arc::new(Semaphore::new(parallel));
    let mut tasks = Vec::with_capacity(count);
    for (n, request) in requests.into_iter().enumerate() {
        let (turns, token) = (Arc::clone(&turns), tokens[n % tokens.len()].clone());
        let facts = facts(&format!("{prefix}-{n}"), first_address + u32::try_from(n).unwrap_or(0));
        let log = Arc::clone(log);
        tasks.push(tokio::spawn(async move {
            let _turn = turns.acquire().await.map_err(|error| error.to_string())?;
            let mut last = String::new();
            // A machine asks again; so does this one.
            for _ in 0..5 {
                match enroll(&token, &facts, &request, None, from).await {
                    Ok(enrolled) => {
                        let machine = StandIn::new(&enrolled.identity.instance, log);
                        return Ok(Member { identity: enrolled.identity, machine });
                    }
                    Err(why) => last = why,
                }
            }
            Err(last)
        }));
    }
    let mut members = Vec::with_capacity(count);
    for task in tasks {
        members.push(task.await.map_err(|error| error.to_string())??);
    }
    Ok((members, begun.elapsed().as_secs_f64()))
}

/// What a machine says of itself: one interface, one address.
#[must_use]
pub fn facts(hostname: &str, address: u32) -> Facts {
    let address = IpAddr::V4(std::net::Ipv4Addr::from(u32::from_be_bytes([10, 0, 0, 0]) + address));
    Facts { hostname: hostname.to_owned(), interfaces: vec![("eth0".into(), vec![address])] }
}

/// Members whose uplinks run.
pub struct Swarm {
    stop: watch::Sender<bool>,
    running: Arc<AtomicUsize>,
}

impl Swarm {
    /// Starts the uplinks of all members.
    ///
    /// # Errors
    /// An identity is damaged.
    pub fn start(members: &[Member], pace: Pace, from: Option<IpAddr>) -> Result<Swarm, String> {
        let (stop, stopped) = watch::channel(false);
        let running = Arc::new(AtomicUsize::new(members.len()));
        for member in members {
            let mut uplink = Uplink::new(member.machine.clone(), member.identity.clone(), None, pace)?;
            if let Some(from) = from {
                uplink = uplink.from_address(from);
            }
            let (stopped, running) = (stopped.clone(), Arc::clone(&running));
            tokio::spawn(async move {
                uplink.run(stopped).await;
                running.fetch_sub(1, Ordering::SeqCst);
            });
        }
        Ok(Swarm { stop, running })
    }

    /// Ends them all.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        while self.running.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Seldom looks, seldom beats: for fleets whose server is to be measured at rest.
#[must_use]
pub fn quiet() -> Pace {
    Pace { heartbeat: Duration::from_secs(20), status: Duration::from_secs(3_600) }
}
