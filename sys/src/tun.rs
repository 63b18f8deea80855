//! TUN and TAP devices: a network interface whose wire is this process.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

/// What travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// IP packets.
    Tun,
    /// Ethernet frames.
    Tap,
}

/// An open device; it is deleted when this value is dropped. It belongs to the network namespace of the thread that
/// opened it, whoever reads and writes.
#[derive(Debug)]
pub struct Device {
    file: File,
    name: String,
}

/// `IFNAMSIZ` without the NUL.
const NAME_MAX: usize = 15;

impl Device {
    /// Creates a device of this name, 1 to 15 bytes; it is down and has no addresses.
    ///
    /// # Errors
    /// The name does not fit or is taken, or the process may not (`CAP_NET_ADMIN`).
    pub fn open(name: &str, kind: Kind) -> io::Result<Device> {
        if name.is_empty() || name.len() > NAME_MAX || name.contains(['\0', '/', '%']) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface name has 1 to 15 bytes"));
        }
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        let kind = match kind {
            Kind::Tun => libc::IFF_TUN,
            Kind::Tap => libc::IFF_TAP,
        };
        let mut request = Request { name: [0; 16], flags: 0, _rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.flags = libc::c_short::try_from(kind | libc::IFF_NO_PI).map_err(io::Error::other)?;
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`; `Request` has its layout and its size (asserted
        // below), lives on this stack frame and is borrowed by nobody else meanwhile.
        #[expect(unsafe_code, reason = "ioctl(2) takes a pointer and rustix has no door for TUNSETIFF")]
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Device { file, name: name.to_owned() })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes what the machine sent out by this device; longer packets are cut to the buffer.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Lets a packet come in by this device.
    ///
    /// # Errors
    /// The device is down, or this is no packet.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        let sent = (&self.file).write(packet)?;
        if sent == packet.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Waits until there is something to take; `false` if the time is over.
    ///
    /// # Errors
    /// The device is gone.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        crate::netlink::wait_readable(&self.file, timeout)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `struct ifreq` as far as TUNSETIFF uses it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: libc::c_short,
    _rest: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());
