//! What runs in the lab's machines: listeners that answer, so that a probe knows that it got through.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::Error;
use crate::machine::{directory, inside, present};

/// TCP ports with a listener on every machine.
pub const TCP_PORTS: [u16; 5] = [22, 80, 443, 3306, 8080];
/// UDP ports with an echo on every machine.
pub const UDP_PORTS: [u16; 2] = [53, 5353];
/// Connections served at once; the lab is small.
const CONNECTIONS_MAX: usize = 256;
/// Asks a listener to go on talking by itself.
pub const PUSH: &[u8] = b"push";
/// What a listener says first.
pub const GREETING: &[u8] = b"keepwall lab\n";

/// Serves until it is killed: one process for all machines.
///
/// # Errors
/// A port cannot be listened on.
pub fn run() -> Result<(), Error> {
    let connections = Arc::new(AtomicUsize::new(0));
    for machine in present() {
        let (tcp, udp) = inside(machine.name, || {
            let tcp: Result<Vec<TcpListener>, Error> = (TCP_PORTS.iter())
                .map(|port| TcpListener::bind(("::", *port)).map_err(|e| format!("{} tcp {port}: {e}", machine.name)))
                .collect();
            let udp: Result<Vec<UdpSocket>, Error> = (UDP_PORTS.iter())
                .map(|port| UdpSocket::bind(("::", *port)).map_err(|e| format!("{} udp {port}: {e}", machine.name)))
                .collect();
            Ok((tcp?, udp?))
        })?;
        // Sockets stay in the namespace in which they were made, wherever their threads are.
        for listener in tcp {
            let connections = Arc::clone(&connections);
            thread::spawn(move || accept(&listener, &connections));
        }
        for socket in udp {
            thread::spawn(move || echo(&socket));
        }
    }
    let directory = directory("serve");
    std::fs::create_dir_all(&directory).map_err(|e| e.to_string())?;
    std::fs::write(directory.join("pid"), std::process::id().to_string()).map_err(|e| e.to_string())?;
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn accept(listener: &TcpListener, connections: &Arc<AtomicUsize>) {
    for stream in listener.incoming().flatten() {
        if connections.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            connections.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let connections = Arc::clone(connections);
        thread::spawn(move || {
            serve(stream);
            connections.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

/// Greets, then sends back what comes, until the other side is silent for a minute.
fn serve(mut stream: TcpStream) {
    let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
    if stream.write_all(GREETING).is_err() {
        return;
    }
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if &buffer[..count] == PUSH {
            return push(&mut stream);
        }
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// Talks by itself for a while, as a server that streams: packets from the inside, without being asked.
fn push(stream: &mut TcpStream) {
    for _ in 0..100 {
        if stream.write_all(b"more").is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn echo(socket: &UdpSocket) {
    let mut buffer = [0; 256];
    loop {
        if let Ok((count, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..count], from);
        }
    }
}
