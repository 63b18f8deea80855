//! Real packets through a real kernel, in a network namespace of their own.
//!
//! ```text
//!             ┌──────────── a namespace ────────────┐
//!  outside ── kw0   host 10.1.0.1 10.1.0.2 fd00:1::1  kw1 ── guest 1  10.2.0.2 fd00:2::2
//!             │     raw sockets send and receive    kw2 ── guest 2  10.3.0.2 fd00:3::2
//!             └─────────────────────────────────────┘
//! ```
//!
//! All three are TUN devices whose wire is this process. A packet that is written into one has taken its whole way
//! when the write returns, so nothing here waits or guesses: what did not arrive was dropped. Queues that overflow
//! would look like a denial; so batches are smaller than queues, and a device that dropped something is an error.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use keepwall_ir::nft::Table;
use keepwall_nft::{Conntrack, Nft};
use keepwall_sys::tun::{Device, Kind};
use keepwall_sys::{link, namespace, raw};

use crate::draw::{GUEST_DEVICES, HOST_DEVICE, OTHER_PROTOCOLS, Path, Trip};
use crate::model;

/// Packets that are on their way at once: a TUN device queues 500, and the kernel may answer each.
const BATCH: usize = 200;

/// What can go wrong here is told, never handled.
pub type Failure = Box<dyn Error + Send + Sync>;

/// The namespace's inside: devices, sockets, and the table in force.
#[derive(Debug)]
pub struct Harness {
    devices: [Device; 3],
    senders: [raw::Socket; 2],
    receivers: Vec<(u8, raw::Socket)>,
    nft: Nft,
    conntrack: Conntrack,
    loaded: Option<Table>,
    number: u32,
    dropped: u64,
}

/// Runs `work` on a thread of its own with a [`Harness`] in a new network namespace, which is gone afterwards.
///
/// # Errors
/// No root (see [`no_root`]), or whatever `work` fails with.
pub fn in_kernel<T: Send>(work: impl FnOnce(&mut Harness) -> Result<T, Failure> + Send) -> Result<T, Failure> {
    namespace::in_a_new_one(|| work(&mut Harness::open()?))?
}

/// True if the failure is that the process may not make namespaces.
#[must_use]
pub fn no_root(failure: &Failure) -> bool {
    failure.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

/// Settings of the calling thread's namespace: it forwards, takes packets from anywhere, and says nothing of itself.
///
/// # Errors
/// No root, or no such setting.
pub fn be_a_router() -> io::Result<()> {
    let set = |name: &str, value: &str| fs::write(format!("/proc/sys/net/{name}"), value);
    for which in ["all", "default"] {
        set(&format!("ipv4/conf/{which}/rp_filter"), "0")?;
        set(&format!("ipv6/conf/{which}/accept_dad"), "0")?;
        set(&format!("ipv6/conf/{which}/accept_ra"), "0")?;
        set(&format!("ipv6/conf/{which}/router_solicitations"), "0")?;
        set(&format!("ipv6/conf/{which}/addr_gen_mode"), "1")?;
    }
    set("ipv4/ip_forward", "1")?;
    set("ipv6/conf/all/forwarding", "1")
}

/// Makes the host's own device, with its addresses and the default routes.
///
/// # Errors
/// No root.
pub fn host_device() -> io::Result<Device> {
    let device = Device::open(HOST_DEVICE, Kind::Tun)?;
    link::set_up(HOST_DEVICE)?;
    for address in [Ipv4Addr::new(10, 1, 0, 1), Ipv4Addr::new(10, 1, 0, 2)] {
        link::add_address(HOST_DEVICE, address.into(), 32)?;
    }
    link::add_address(HOST_DEVICE, Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1).into(), 128)?;
    link::add_route(Ipv4Addr::UNSPECIFIED.into(), 0, HOST_DEVICE, None)?;
    link::add_route(Ipv6Addr::UNSPECIFIED.into(), 0, HOST_DEVICE, None)?;
    wait_until_reachable(&device)?;
    Ok(device)
}

/// The kernel makes the route to an IPv6 address of its own a little later than it says: until then packets to it are
/// lost. There must be no rules yet.
fn wait_until_reachable(device: &Device) -> io::Result<()> {
    const TRIES_MAX: usize = 5_000;
    const PROTOCOL: u8 = 253;
    let trip = Trip {
        path: Path::Input,
        guest: 1,
        source: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        destination: Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1).into(),
        protocol: PROTOCOL,
        source_port: 0,
        destination_port: 0,
        icmp: None,
    };
    let (mut packet, transport) = model::bytes(&trip, 0);
    packet.extend(transport);
    let receiver = raw::Socket::receiver(true, PROTOCOL)?;
    for _ in 0..TRIES_MAX {
        device.send(&packet)?;
        if receiver.wait(Some(Duration::from_millis(1)))? {
            return Ok(());
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel does not take packets to its own IPv6 address"))
}

fn guest_device(number: u8) -> io::Result<Device> {
    let name = GUEST_DEVICES[usize::from(number) - 1];
    let device = Device::open(name, Kind::Tun)?;
    link::set_up(name)?;
    link::add_route(Ipv4Addr::new(10, 1 + number, 0, 2).into(), 32, name, None)?;
    link::add_route(Ipv6Addr::new(0xfd00, 1 + u16::from(number), 0, 0, 0, 0, 0, 2).into(), 128, name, None)?;
    Ok(device)
}

impl Harness {
    /// Builds all of it in the namespace of the calling thread, which must be a new one.
    ///
    /// # Errors
    /// No root, or the namespace is not empty.
    pub fn open() -> Result<Harness, Failure> {
        be_a_router()?;
        link::set_up("lo")?;
        let devices = [host_device()?, guest_device(1)?, guest_device(2)?];
        let mut receivers = Vec::new();
        for ipv6 in [false, true] {
            let icmp = if ipv6 { 58 } else { 1 };
            for protocol in [6, 17, icmp].into_iter().chain(OTHER_PROTOCOLS) {
                receivers.push((protocol, raw::Socket::receiver(ipv6, protocol)?));
            }
        }
        let mut harness = Harness {
            devices,
            senders: [raw::Socket::sender(false)?, raw::Socket::sender(true)?],
            receivers,
            nft: Nft::open()?,
            conntrack: Conntrack::open()?,
            loaded: None,
            number: 1,
            dropped: 0,
        };
        harness.dropped = dropped_by_devices()?;
        Ok(harness)
    }

    /// Puts a table in force; its tag must be fresh.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn load(&mut self, table: &Table) -> Result<(), Failure> {
        let applied = match &self.loaded {
            Some(previous) => self.nft.replace_from(previous, table)?,
            None => self.nft.replace(table)?,
        };
        self.loaded = Some(table.clone());
        applied.left_behind.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Sends each packet on its trip as the first of a session; true where it arrived. No two trips may be the same,
    /// as the second would be a repetition.
    ///
    /// # Errors
    /// A device or socket failed, or lost something.
    pub fn arrived(&mut self, trips: &[Trip]) -> Result<Vec<bool>, Failure> {
        let mut out = vec![false; trips.len()];
        for (path, guest) in Path::ALL.into_iter().flat_map(|path| [(path, 1), (path, 2)]) {
            let mine: Vec<usize> =
                (0..trips.len()).filter(|n| (trips[*n].path, trips[*n].guest) == (path, guest)).collect();
            // What goes one way could be the answer to what went the other, and between guests to what came back.
            self.conntrack.danger_flush()?;
            for batch in mine.chunks(BATCH) {
                self.batch(path, trips, batch, &mut out)?;
            }
        }
        let dropped = dropped_by_devices()?;
        if dropped != self.dropped {
            return Err(format!("the harness lost {} packets itself", dropped - self.dropped).into());
        }
        Ok(out)
    }

    fn batch(&mut self, path: Path, trips: &[Trip], batch: &[usize], out: &mut [bool]) -> Result<(), Failure> {
        let mut on_the_way = HashMap::new();
        for n in batch {
            let trip = &trips[*n];
            let number = self.number;
            self.number = self.number.wrapping_add(1).max(1);
            on_the_way.insert(number, *n);
            let (mut packet, transport) = model::bytes(trip, number);
            packet.extend(transport);
            match path {
                Path::Input | Path::ToGuest => self.devices[0].send(&packet)?,
                Path::FromGuest | Path::Between | Path::GuestToHost => self.devices[trip.guest].send(&packet)?,
                Path::Output => {
                    let sender = &self.senders[usize::from(trip.destination.is_ipv6())];
                    match sender.send(&packet, trip.destination) {
                        // The output hook dropped it. What counts is what arrives.
                        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                        result => result?,
                    }
                }
            }
        }
        let mut buffer = [0; 2048];
        for device in 0..self.devices.len() {
            while let Some(len) = next(self.devices[device].recv(&mut buffer))? {
                let Some((number, trip)) = found(&buffer[..len], &on_the_way, trips) else { continue };
                let expected_at = match path {
                    Path::Output | Path::FromGuest => 0,
                    Path::ToGuest => trips[trip].guest,
                    Path::Between => 3 - trips[trip].guest,
                    Path::Input | Path::GuestToHost => continue,
                };
                if expected_at != device {
                    return Err(format!("packet {number} left by the wrong device: {:?}", trips[trip]).into());
                }
                out[trip] = true;
            }
        }
        for (protocol, socket) in &self.receivers {
            while let Some(len) = next(socket.recv(&mut buffer))? {
                let transport = match socket.is_ipv6() {
                    true => &buffer[..len],
                    false => buffer.get(20..len).unwrap_or_default(),
                };
                let trip = number(*protocol, transport).and_then(|number| on_the_way.get(&number));
                if let Some(trip) = trip
                    && trips[*trip].protocol == *protocol
                    && matches!(path, Path::Input | Path::GuestToHost)
                {
                    out[*trip] = true;
                }
            }
        }
        Ok(())
    }
}

/// What is there, or nothing more.
fn next(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(len) => Ok(Some(len)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Which trip a packet from a device is on; `None` for what the kernel says itself.
fn found(packet: &[u8], on_the_way: &HashMap<u32, usize>, trips: &[Trip]) -> Option<(u32, usize)> {
    let (source, destination, protocol, transport): (IpAddr, IpAddr, u8, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let header = packet.get(..20)?;
            let address = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
            (address(12).into(), address(16).into(), header[9], packet.get(20..)?)
        }
        _ => {
            let header = packet.get(..40)?;
            let address =
                |at: usize| -> Option<Ipv6Addr> { Some(<[u8; 16]>::try_from(header.get(at..at + 16)?).ok()?.into()) };
            (address(8)?.into(), address(24)?.into(), header[6], packet.get(40..)?)
        }
    };
    let number = number(protocol, transport)?;
    let trip = *on_the_way.get(&number)?;
    let expected = &trips[trip];
    let same = (expected.source, expected.destination, expected.protocol) == (source, destination, protocol);
    same.then_some((number, trip))
}

/// Where [`model::bytes`] put the packet's number.
fn number(protocol: u8, transport: &[u8]) -> Option<u32> {
    let at = if protocol == 17 { 8 } else { 4 };
    Some(u32::from_be_bytes(transport.get(at..at + 4)?.try_into().ok()?))
}

/// Packets that the devices of this namespace have dropped so far, either way.
fn dropped_by_devices() -> Result<u64, Failure> {
    // Columns behind the name: received bytes packets errs drop fifo frame compressed multicast, then sent likewise.
    const DROPS: [usize; 4] = [2, 3, 10, 11];
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    let mut sum = 0;
    for line in text.lines().filter_map(|line| line.trim().strip_prefix("kw")) {
        let columns: Vec<&str> = line.split_whitespace().skip(1).collect();
        for at in DROPS {
            sum += columns.get(at).ok_or("/proc/net/dev has too few columns")?.parse::<u64>()?;
        }
    }
    Ok(sum)
}
