//! What a host finds out about itself before it joins or founds a pool.

use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

/// Free space below which a host is of no use to a pool, in bytes: the Raft log, and some segments of the block store.
const STORE_FREE_BYTES_MIN: u64 = 1 << 30;

/// Share of the machine's memory that VMs may use when the operator says nothing; the rest is the host's own.
const VM_MEMORY_PERCENT: u64 = 80;

/// Facts that the pool wants to know.
#[derive(Debug, Clone)]
pub struct LocalFacts {
    /// Vendor of the CPU.
    pub cpu_vendor: String,
    /// Memory that VMs may use by default, in bytes.
    pub vm_memory_bytes: u64,
    /// Memory of the machine in bytes.
    pub memory_total_bytes: u64,
}

/// Reads the facts.
#[must_use]
pub fn local_facts() -> LocalFacts {
    let memory_total_bytes = memory_total_bytes();
    LocalFacts {
        cpu_vendor: cpu_vendor(),
        vm_memory_bytes: memory_total_bytes / 100 * VM_MEMORY_PERCENT,
        memory_total_bytes,
    }
}

/// Everything that would keep this host from serving, one sentence each.
#[must_use]
pub fn local_problems(data_dir: &Path, listen: SocketAddr) -> Vec<String> {
    let mut problems = Vec::new();
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        problems
            .push(format!("/dev/kvm can't be opened ({error}): load kvm_intel or kvm_amd, and run as root"));
    }
    if let Err(error) = TcpListener::bind(listen) {
        problems.push(format!("TCP {listen} can't be bound ({error}): choose another --listen address"));
    }
    if let Err(error) = UdpSocket::bind(listen) {
        problems.push(format!("UDP {listen} can't be bound ({error}): choose another --listen address"));
    }
    if listen.ip().is_unspecified() || listen.port() == 0 {
        problems.push(format!(
            "{listen} is no address that other hosts can reach: give this host's IP and a port"
        ));
    }
    match nix::sys::statvfs::statvfs(data_dir) {
        Ok(stat) => {
            let free = stat.blocks_available().saturating_mul(stat.fragment_size());
            if free < STORE_FREE_BYTES_MIN {
                let (free_mib, need_mib) = (free >> 20, STORE_FREE_BYTES_MIN >> 20);
                problems.push(format!(
                    "{} has {free_mib} MiB free, {need_mib} MiB are needed",
                    data_dir.display()
                ));
            }
        }
        Err(error) => problems.push(format!("{} can't be examined: {error}", data_dir.display())),
    }
    problems
}

/// The boot id of the running kernel.
///
/// # Errors
/// /proc is not there.
pub fn boot_id() -> std::io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn memory_total_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn cpu_vendor() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = cpuinfo.lines().find(|line| line.starts_with("vendor_id"));
    line.and_then(|line| line.split(':').nth(1)).unwrap_or("unknown").trim().to_owned()
}
