//! The machine's configuration, checked: what comes out of here fits the VMM and the store.

use crate::attachment::Attachment;
use crate::confine::Views;
use crate::lease::LeaseGuard;
use crate::nics;
use crate::request::Refusal;
use proto::cpu::CPU_WORDS;
use proto::{ByteCount, CpuFeatures, Epoch, MemoryPages, Sabotage, VmId, v1};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use vmm::virtio::NetConfig;

/// vCPUs of one machine; what its interrupt controller addresses in the simplest mode.
const VCPUS_MAX: u32 = 64;

/// Smallest guest memory in bytes: below it no kernel can be placed.
const MEMORY_BYTES_MIN: u64 = 4 << 20;

/// Largest guest memory in bytes.
const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// Disks of one machine: one window and one interrupt each.
const DISKS_MAX: usize = 8;

/// Network cards of one machine: a window and an interrupt each, beside those of disks.
const NICS_MAX: usize = 8;

/// Longest kernel command line in bytes: what x86 kernels accept.
const CMDLINE_BYTES_MAX: usize = 2047;

/// Longest time that a vCPU may be given to stop at the lease's end, in milliseconds: the pool's patience is not longer.
pub const FENCE_EXIT_MS_MAX: u64 = 60_000;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    pub vm: VmId,
    pub epoch: Epoch,
    pub vcpus: u32,
    pub memory: ByteCount,
    pub pages: MemoryPages,
    /// What the guest is shown of its processor; unknown: all that the host has.
    pub cpu: CpuFeatures,
    /// None: what the first disk has in its own `/boot`, or a machine that only takes in a migration.
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    pub disks: Vec<Attachment>,
    pub nics: Vec<NetConfig>,
    pub lease: LeaseNeed,
    pub replica_socket: PathBuf,
    pub migration_ip: IpAddr,
}

/// Whether the machine may run without a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseNeed {
    /// Nobody starts it elsewhere by himself.
    Exempt,
    /// A vCPU has this long to stop at the lease's end.
    Required { fence_exit_ns: u64 },
}

impl LeaseNeed {
    /// The guard for it.
    pub fn guard(self) -> LeaseGuard {
        match self {
            Self::Exempt => LeaseGuard::exempt(),
            Self::Required { fence_exit_ns } => LeaseGuard::new(fence_exit_ns),
        }
    }
}

impl MachineSpec {
    /// Checks a configuration.
    ///
    /// # Errors
    /// The first field that is unusable.
    pub fn from_message(config: &v1::MachineConfig, views: &Views) -> Result<Self, Refusal> {
        check(config.vm_id != 0, "vm_id", || "is missing".to_owned())?;
        check(config.epoch != 0, "epoch", || "is missing".to_owned())?;
        check((1..=VCPUS_MAX).contains(&config.vcpus), "vcpus", || {
            format!("{} is not within 1 to {VCPUS_MAX}", config.vcpus)
        })?;
        let memory = config.memory_bytes;
        let fits = (MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&memory);
        check(fits && memory.is_multiple_of(proto::limits::BLOCK_BYTES as u64), "memory_bytes", || {
            format!("{memory} is not a number of whole pages from {MEMORY_BYTES_MIN} to {MEMORY_BYTES_MAX}")
        })?;
        let pages = MemoryPages::of_flag(config.huge_pages);
        check(memory.is_multiple_of(pages.bytes().0), "memory_bytes", || {
            format!("{memory} is not a number of whole pages of {}", pages.bytes())
        })?;
        check(config.cmdline.len() <= CMDLINE_BYTES_MAX, "cmdline", || {
            format!("{} bytes are more than {CMDLINE_BYTES_MAX}", config.cmdline.len())
        })?;
        check(config.fence_exit_ms <= FENCE_EXIT_MS_MAX, "fence_exit_ms", || {
            format!("{} is more than {FENCE_EXIT_MS_MAX}", config.fence_exit_ms)
        })?;
        check(config.nics.len() <= NICS_MAX, "nics", || {
            format!("{} network cards are more than {NICS_MAX}", config.nics.len())
        })?;
        check(config.volumes.len() <= DISKS_MAX, "volumes", || {
            format!("{} disks are more than {DISKS_MAX}", config.volumes.len())
        })?;
        let migration_ip = config.migration_ip.parse().map_err(|_| Refusal::Invalid {
            field: "migration_ip",
            problem: format!("`{}` is no IP address", config.migration_ip),
        })?;
        let cpu = match config.cpu_words.as_slice() {
            [] => CpuFeatures::default(),
            words => {
                CpuFeatures::from_words(words, config.cpu_address_bits).ok_or_else(|| Refusal::Invalid {
                    field: "cpu_words",
                    problem: format!("{} words are not {CPU_WORDS}", words.len()),
                })?
            }
        };
        let disks: Vec<_> = config.volumes.iter().map(Attachment::from_message).collect::<Result<_, _>>()?;
        check_distinct(&disks)?;
        let lease = if config.lease_exempt || Sabotage::LeaseIgnored.is_on() {
            LeaseNeed::Exempt
        } else {
            LeaseNeed::Required { fence_exit_ns: config.fence_exit_ms * 1_000_000 }
        };
        Ok(Self {
            vm: VmId(config.vm_id),
            epoch: Epoch(config.epoch),
            vcpus: config.vcpus,
            memory: ByteCount(memory),
            pages,
            cpu,
            kernel: optional_path("kernel_path", &config.kernel_path, views)?,
            initrd: optional_path("initrd_path", &config.initrd_path, views)?,
            cmdline: config.cmdline.clone(),
            disks,
            nics: config.nics.iter().map(nics::from_message).collect::<Result<_, _>>()?,
            lease,
            replica_socket: path("replica_socket", &config.replica_socket, views)?,
            migration_ip,
        })
    }
}

/// Refuses a field unless it is fine.
pub fn check(is_fine: bool, field: &'static str, problem: impl FnOnce() -> String) -> Result<(), Refusal> {
    if is_fine { Ok(()) } else { Err(Refusal::Invalid { field, problem: problem() }) }
}

fn check_distinct(disks: &[Attachment]) -> Result<(), Refusal> {
    for (index, disk) in disks.iter().enumerate() {
        let again = disks[..index].iter().any(|other| other.volume == disk.volume);
        check(!again, "volumes", || format!("{} is attached twice", disk.volume))?;
    }
    Ok(())
}

fn optional_path(field: &'static str, text: &str, views: &Views) -> Result<Option<PathBuf>, Refusal> {
    if text.is_empty() { Ok(None) } else { path(field, text, views).map(Some) }
}

/// A path of the host as this process sees it.
fn path(field: &'static str, text: &str, views: &Views) -> Result<PathBuf, Refusal> {
    views.inside(Path::new(text)).ok_or_else(|| Refusal::Invalid {
        field,
        problem: format!("`{text}` is not in a directory that this process can see"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views() -> Views {
        Views::jailed(Path::new("/vms/vm-7-e2"), Some(Path::new("/data/run")))
    }

    fn config() -> v1::MachineConfig {
        v1::MachineConfig {
            vm_id: 7,
            epoch: 2,
            vcpus: 1,
            memory_bytes: 64 << 20,
            kernel_path: "/vms/vm-7-e2/kernel".to_owned(),
            volumes: vec![crate::attachment::fixture(3)],
            fence_exit_ms: 500,
            replica_socket: "/data/run/replica.sock".to_owned(),
            migration_ip: "127.0.0.1".to_owned(),
            ..v1::MachineConfig::default()
        }
    }

    #[test]
    fn a_complete_configuration_passes() {
        let spec = MachineSpec::from_message(&config(), &views()).unwrap();
        assert_eq!((spec.vm, spec.epoch, spec.disks.len()), (VmId(7), Epoch(2), 1));
        assert_eq!(spec.lease, LeaseNeed::Required { fence_exit_ns: 500_000_000 });
        assert_eq!(spec.initrd, None);
        assert_eq!(spec.kernel.as_deref(), Some(Path::new("/kernel")));
        assert_eq!(spec.replica_socket, Path::new("/run/replica.sock"));
    }

    #[test]
    fn each_unusable_field_is_named() {
        type Spoil = fn(&mut v1::MachineConfig);
        let cases: [(&str, Spoil); 13] = [
            ("cpu_words", |config| config.cpu_words = vec![1, 2]),
            ("vm_id", |config| config.vm_id = 0),
            ("epoch", |config| config.epoch = 0),
            ("vcpus", |config| config.vcpus = 65),
            ("memory_bytes", |config| config.memory_bytes += 1),
            ("cmdline", |config| config.cmdline = "x".repeat(2048)),
            ("fence_exit_ms", |config| config.fence_exit_ms = u64::MAX),
            ("migration_ip", |config| config.migration_ip = "here".to_owned()),
            ("kernel_path", |config| config.kernel_path = "images/kernel".to_owned()),
            ("initrd_path", |config| config.initrd_path = "/etc/shadow".to_owned()),
            ("replica_socket", |config| config.replica_socket = "/run/other.sock".to_owned()),
            ("volumes", |config| config.volumes = vec![crate::attachment::fixture(3); 9]),
            ("volumes", |config| config.volumes = vec![crate::attachment::fixture(3); 2]),
        ];
        for (expected, spoil) in cases {
            let mut config = config();
            spoil(&mut config);
            match MachineSpec::from_message(&config, &views()) {
                Err(Refusal::Invalid { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
