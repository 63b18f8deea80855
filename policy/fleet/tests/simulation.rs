//! A whole fleet with its failures, on one seed: servers that lag behind each other, a network that loses, repeats,
//! delays and reorders, instances that crash at any point, that fail, that revert.
//!
//! ```text
//!   truth (commits) ──lag──▶ server A ─┐                    ┌─ instance 0 (disk: held, tried)
//!                   ──lag──▶ server B ─┼── lossy network ───┼─ instance 1
//!                                      └────────────────────┴─ instance 2 …
//! ```
//!
//! At every step: no instance goes back to an older generation, none holds what was meant for another, none holds
//! what was never decided. In the end, when the network behaves, all hold what is desired.
//!
//! `KEEPWALL_SIMULATION_RUNS` sets how many seeds are tried (default 2,000), `KEEPWALL_SIMULATION_SEED` the first.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, HashMap, VecDeque};

use keepwall_fleet::bundle::{Bundle, Change, Digest, Set};
use keepwall_fleet::sync::{Applied, Decision, Hello, Holder, Next, Offer, Outcome, Refusal, Session, State};

/// xorshift64*: the same on every machine.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.roll() % n as u64) as usize
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.roll() % 100 < percent
    }
}

#[derive(Clone, Debug)]
enum Message {
    Hello { stream: u64, hello: Hello },
    Offer { stream: u64, offer: Offer, body: Body },
    Outcome { stream: u64, outcome: Outcome },
}

#[derive(Clone, Debug)]
enum Body {
    Whole(Bundle),
    Change(Change),
}

/// What survives a crash.
struct Disk {
    held: State,
    tried: State,
    bundle: Bundle,
}

struct Instance {
    name: String,
    disk: Disk,
    holder: Holder,
    /// The stream that it thinks is open, and to which server.
    stream: Option<(u64, usize)>,
    /// The highest generation that was ever in force here.
    highest: u64,
}

struct Server {
    /// Up to which commit it has heard.
    seen: u64,
    sessions: HashMap<usize, (u64, Session)>,
}

struct Run {
    dice: Dice,
    /// Desired bundles of each instance by commit.
    truth: Vec<Vec<Bundle>>,
    servers: Vec<Server>,
    instances: Vec<Instance>,
    network: VecDeque<(usize, bool, Message)>,
    streams: u64,
    faulty: bool,
    /// When somebody last asked to try again what failed.
    asked: u64,
    applied_twice: u64,
}

fn empty() -> Bundle {
    Bundle::from_parts(Vec::new(), BTreeMap::new()).unwrap()
}

impl Run {
    fn new(seed: u64) -> Run {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let instances = 1 + dice.below(4);
        let servers = 1 + dice.below(3);
        let mut run = Run {
            dice,
            truth: vec![vec![empty(); instances]],
            servers: (0..servers).map(|_| Server { seen: 0, sessions: HashMap::new() }).collect(),
            instances: (0..instances)
                .map(|n| {
                    let name = format!("i{n}");
                    Instance {
                        holder: Holder::new(&name, State::default(), State::default()),
                        disk: Disk { held: State::default(), tried: State::default(), bundle: empty() },
                        stream: None,
                        highest: 0,
                        name,
                    }
                })
                .collect(),
            network: VecDeque::new(),
            streams: 0,
            faulty: true,
            asked: 0,
            applied_twice: 0,
        };
        run.commit();
        run
    }

    /// Somebody changes what is desired: all machines, one, or back to what was.
    fn commit(&mut self) {
        let mut next = self.truth.last().unwrap().clone();
        let n = self.truth.len();
        match self.dice.below(4) {
            0 => next.iter_mut().enumerate().for_each(|(i, b)| *b = self::bundle(i, n, 0)),
            1 => {
                let i = self.dice.below(next.len());
                next[i] = bundle(i, n, self.dice.below(3));
            }
            2 => next = self.truth[self.dice.below(n)].clone(),
            _ => {
                // One member joins a set that all share.
                let set = Set::new(vec![format!("10.0.{}.{}", n / 250, n % 250).parse().unwrap()]);
                for b in &mut next {
                    let mut sets = b.sets().clone();
                    sets.insert("group:all".into(), set.clone());
                    *b = Bundle::from_parts(b.rules().to_vec(), sets).unwrap();
                }
            }
        }
        self.truth.push(next);
    }

    fn desired(&self, server: usize, instance: usize) -> (State, &Bundle) {
        let seen = self.servers[server].seen;
        let bundle = &self.truth[seen as usize][instance];
        (State { generation: seen, digest: bundle.digest() }, bundle)
    }

    fn send(&mut self, to: usize, to_server: bool, message: Message) {
        if self.faulty && self.dice.chance(15) {
            return;
        }
        if self.faulty && self.dice.chance(10) {
            self.network.push_back((to, to_server, message.clone()));
        }
        self.network.push_back((to, to_server, message));
    }

    fn push(&mut self, server: usize, instance: usize) {
        let (desired, bundle) = self.desired(server, instance);
        let bundle = bundle.clone();
        let Some((stream, session)) = self.servers[server].sessions.get_mut(&instance) else { return };
        session.forgive(self.asked);
        let (stream, next) = (*stream, session.next(&desired));
        match next {
            Next::Nothing => {}
            Next::Behind => {
                // A server that is up to date and still behind asks for a new number.
                if desired.generation + 1 == self.truth.len() as u64 {
                    self.truth.push(self.truth.last().unwrap().clone());
                }
            }
            Next::Offer { state, base } => {
                let known =
                    base.and_then(|base| self.truth.iter().map(|all| &all[instance]).find(|b| b.digest() == base));
                let (base, body) = match known {
                    Some(before) => (base, Body::Change(before.change_to(&bundle))),
                    None => (None, Body::Whole(bundle)),
                };
                let offer = Offer { instance: self.instances[instance].name.clone(), state, base };
                self.servers[server].sessions.get_mut(&instance).unwrap().1.offered(state);
                self.send(instance, false, Message::Offer { stream, offer, body });
            }
        }
    }

    fn deliver(&mut self) {
        if self.network.is_empty() {
            return;
        }
        let at = if self.faulty { self.dice.below(self.network.len()) } else { 0 };
        let (to, to_server, message) = self.network.remove(at).unwrap();
        match message {
            Message::Hello { stream, hello } if to_server => {
                let n: usize = hello.instance[1..].parse().unwrap();
                // Streams do not repeat themselves: TLS drops a second hello. Only the newest stream counts.
                let newest = self.servers[to].sessions.get(&n).is_none_or(|(s, _)| *s < stream);
                if newest {
                    self.servers[to].sessions.insert(n, (stream, Session::new(&hello)));
                    self.push(to, n);
                }
            }
            Message::Outcome { stream, outcome } if to_server => {
                let found = self.servers[to].sessions.iter().find(|(_, (s, _))| *s == stream).map(|(n, _)| *n);
                if let Some(n) = found {
                    self.servers[to].sessions.get_mut(&n).unwrap().1.answered(&outcome);
                    self.push(to, n);
                }
            }
            Message::Offer { stream, mut offer, body } => {
                // Now and then a server, or somebody in between, mixes machines up.
                let target =
                    if self.faulty && self.dice.chance(3) { self.dice.below(self.instances.len()) } else { to };
                if self.faulty && self.dice.chance(3) {
                    offer.state.generation = offer.state.generation.saturating_sub(1);
                }
                self.receive(target, stream, &offer, &body);
            }
            Message::Hello { .. } | Message::Outcome { .. } => unreachable!("servers get these"),
        }
    }

    fn receive(&mut self, n: usize, stream: u64, offer: &Offer, body: &Body) {
        let faulty = self.faulty;
        let crash = faulty && self.dice.chance(5);
        let fails = faulty && self.dice.chance(10);
        let i = &mut self.instances[n];
        let Some((mine, server)) = i.stream else { return };
        let outcome = match i.holder.decide(offer) {
            Decision::Refuse(outcome) | Decision::Again(outcome) => outcome,
            Decision::Apply => {
                let next = match body {
                    Body::Whole(bundle) => Ok(bundle.clone()),
                    Body::Change(change) => i.disk.bundle.changed(change),
                };
                match next.ok().filter(|bundle| bundle.digest() == offer.state.digest) {
                    None => Outcome { state: offer.state, result: Applied::Refused(Refusal::BadBody) },
                    Some(bundle) => {
                        i.holder.begin(offer.state);
                        i.disk.tried = offer.state;
                        if crash {
                            i.holder = Holder::new(&i.name, i.disk.held, i.disk.tried);
                            i.stream = None;
                            return;
                        }
                        if fails {
                            i.holder.failed(offer.state)
                        } else {
                            assert_eq!(offer.instance, i.name, "what was meant for another");
                            assert!(offer.state.generation >= i.highest, "backwards");
                            self.applied_twice += u64::from(offer.state.generation == i.highest);
                            i.highest = offer.state.generation;
                            i.disk.held = offer.state;
                            i.disk.bundle = bundle;
                            i.holder.applied(offer.state)
                        }
                    }
                }
            }
        };
        let _ = stream;
        self.send(server, true, Message::Outcome { stream: mine, outcome });
    }

    fn dial(&mut self, n: usize) {
        let server = self.dice.below(self.servers.len());
        self.streams += 1;
        self.instances[n].stream = Some((self.streams, server));
        let hello = self.instances[n].holder.hello();
        let stream = self.streams;
        self.send(server, true, Message::Hello { stream, hello });
    }

    fn step(&mut self) {
        match self.dice.below(20) {
            0 => self.commit(),
            1..=3 => {
                let s = self.dice.below(self.servers.len());
                let newest = self.truth.len() as u64 - 1;
                if self.servers[s].seen < newest {
                    self.servers[s].seen += 1;
                    (0..self.instances.len()).for_each(|n| self.push(s, n));
                }
            }
            4 => {
                let n = self.dice.below(self.instances.len());
                self.dial(n);
            }
            5 => {
                // An instance restarts from its disk.
                let n = self.dice.below(self.instances.len());
                let i = &mut self.instances[n];
                i.holder = Holder::new(&i.name, i.disk.held, i.disk.tried);
                i.stream = None;
            }
            6 if self.dice.chance(30) => {
                // A server restarts: it knows the store and nothing else.
                let s = self.dice.below(self.servers.len());
                self.servers[s].sessions.clear();
            }
            _ => self.deliver(),
        }
    }

    fn settle(&mut self) {
        self.faulty = false;
        self.network.clear();
        // Somebody has mended what failed and asks to try again.
        self.truth.push(self.truth.last().unwrap().clone());
        self.asked = self.truth.len() as u64 - 1;
        for _ in 0..8 {
            for n in 0..self.instances.len() {
                self.dial(n);
            }
            while !self.network.is_empty() {
                self.deliver();
                let newest = self.truth.len() as u64 - 1;
                for s in 0..self.servers.len() {
                    self.servers[s].seen = newest;
                    (0..self.instances.len()).for_each(|n| self.push(s, n));
                }
            }
        }
        for (n, i) in self.instances.iter().enumerate() {
            let wanted: Digest = self.truth.last().unwrap()[n].digest();
            assert_eq!(i.disk.held.digest, wanted, "{} does not hold what is desired", i.name);
            assert_eq!(i.disk.bundle.digest(), wanted);
        }
    }
}

fn bundle(instance: usize, commit: usize, members: usize) -> Bundle {
    let members = (0..members).map(|m| format!("10.1.{instance}.{m}").parse().unwrap()).collect();
    let sets = [("group:own".into(), Set::new(members))].into();
    Bundle::from_parts(format!("{{\"instance\":\"i{instance}\",\"commit\":{commit}}}").into_bytes(), sets).unwrap()
}

#[allow(clippy::disallowed_methods, reason = "a test is told how long to go on")]
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
#[allow(clippy::print_stderr, reason = "a seed is what one needs to look again")]
fn whatever_happens_nobody_goes_back_and_everybody_arrives() {
    let (first, runs) = (number("KEEPWALL_SIMULATION_SEED", 1), number("KEEPWALL_SIMULATION_RUNS", 2_000));
    let mut applied_twice = 0;
    for seed in first..first + runs {
        let done = std::panic::catch_unwind(|| {
            let mut run = Run::new(seed);
            (0..300).for_each(|_| run.step());
            run.settle();
            run.applied_twice
        });
        match done {
            Ok(times) => applied_twice += times,
            Err(why) => {
                eprintln!("seed {seed}: again with KEEPWALL_SIMULATION_SEED={seed} KEEPWALL_SIMULATION_RUNS=1");
                std::panic::resume_unwind(why);
            }
        }
    }
    assert_eq!(applied_twice, 0, "an offer that was in force was applied again");
}
