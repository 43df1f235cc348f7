//! The KVM machine: memory, vCPUs, boot, devices, dirty tracking, saving and restoring. A library; the process around it
//! is `poold-vm`.
//!
//! ```text
//!  Machine ─┬─ memory   one memfd; pages by dense index; bitmap of device writes
//!           ├─ vcpu     threads in KVM_RUN; stop, lease check
//!           ├─ bus      serial console, reset ports, virtio-mmio windows ── virtio  disks on a `BlockBackend`, cards on a tap
//!           ├─ boot     PVH ELF, bzImage; or what the disk has in its own /boot
//!           ├─ dirty    KVM's log, cleared range by range
//!           ├─ activity what each vCPU has done
//!           ├─ demand   missing pages, brought when they are touched
//!           ├─ host     /dev/kvm and userfaultfd, opened before a process gives up its rights
//!           └─ state    everything but memory, as bytes
//! ```
//! Invariants: no input of a guest, an operator or a peer panics; every write to guest memory leaves a dirty bit while
//! logging is on, a device's too; a stopped and drained machine stands still.
//!
//! Absent on purpose: networks of hosts, volumes, leases (only the deadline is looked at), migration.

pub mod activity;
pub mod boot;
pub mod bus;
mod cmos;
pub mod console;
mod cpu;
pub mod demand;
mod devices;
mod dirty;
pub mod host;
mod huge;
pub mod machine;
pub mod memory;
mod memory_file;
mod msrs;
pub mod state;
mod vcpu;
pub mod virtio;

pub use activity::VcpuActivity;
pub use boot::{BootConfig, BootError, DiskBootError};
pub use console::ConsoleRing;
pub use cpu::{HostCpuError, host_cpu};
pub use demand::Demand;
pub use huge::{HugeMemory, huge_memory};
pub use machine::{Machine, MachineConfig, MachineError};
pub use memory::{Memory, MemoryError};
pub use state::{MachineState, StateError};
pub use vcpu::GuestExit;
pub use virtio::{BlockBackend, BlockCompletion, BlockError};
