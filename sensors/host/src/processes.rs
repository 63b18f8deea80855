//! Processes by id, and the sockets that they hold.

use std::collections::HashMap;
use std::fs;
use std::io::Read;

/// Command lines and environments are read to this length at most.
const READ_MAX: u64 = 256 * 1024;
/// A machine has fewer processes than this; beyond it the rest go unnamed.
const PROCESSES_MAX: usize = 100_000;

/// Reads a file of `/proc/PID`, bounded; empty if the process is gone or not ours to look at.
#[must_use]
pub fn read(pid: u32, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(format!("/proc/{pid}/{name}")) {
        // Half a file is better than none: what is missing is only not shown.
        let _ = file.take(READ_MAX).read_to_end(&mut bytes);
    }
    bytes
}

/// The process's short name, safe to print.
#[must_use]
pub fn name(pid: u32) -> String {
    clean(&read(pid, "comm"))
}

/// Arguments, safe to print.
#[must_use]
pub fn arguments(pid: u32) -> Vec<String> {
    read(pid, "cmdline").split(|byte| *byte == 0).filter(|part| !part.is_empty()).map(clean).collect()
}

/// One variable of the process's environment as it was when it started.
#[must_use]
pub fn variable(pid: u32, name: &str) -> Option<String> {
    let environment = read(pid, "environ");
    environment.split(|byte| *byte == 0).find_map(|entry| {
        let value = entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(clean(value))
    })
}

/// The parent's id; `None` for init and for what is gone.
#[must_use]
pub fn parent(pid: u32) -> Option<u32> {
    // pid (comm) state ppid …: comm may hold anything, so count from its closing parenthesis.
    let stat = String::from_utf8_lossy(&read(pid, "stat")).into_owned();
    let rest = stat.rsplit_once(')')?.1;
    rest.split_whitespace().nth(1)?.parse().ok().filter(|parent| *parent != 0)
}

/// When the process was started, in clock ticks since boot: with its id, this names one process and no later one.
#[must_use]
pub fn started(pid: u32) -> Option<u64> {
    let stat = String::from_utf8_lossy(&read(pid, "stat")).into_owned();
    // The twenty-second field; the two before the closing parenthesis are split off.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Control characters and broken UTF-8 become `?`: names are shown in terminals.
#[must_use]
pub fn clean(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end_matches('\n')
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .take(256)
        .collect()
}

/// Which process holds each socket: inode to process id. Needs root to see other users' processes.
#[must_use]
pub fn by_socket() -> HashMap<u64, u32> {
    let mut out = HashMap::new();
    let Ok(entries) = fs::read_dir("/proc") else { return out };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.take(PROCESSES_MAX) {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Ok(target) = fs::read_link(descriptor.path()) else { continue };
            let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            if let Some(inode) = inode {
                // Forked servers share a listener; the parent, with the lower id, is the better name.
                out.entry(inode).and_modify(|known: &mut u32| *known = pid.min(*known)).or_insert(pid);
            }
        }
    }
    out
}
