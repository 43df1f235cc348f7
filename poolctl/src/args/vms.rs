//! Commands of VMs and their consoles.

use crate::reference;
use clap::{Args, Subcommand, ValueEnum};
use proto::{ByteCount, CpuProfile};
use std::time::Duration;

/// What becomes of a VM whose host is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum HaPolicy {
    /// It is started on another host
    #[default]
    Restart,
    /// It waits for its host or for an operator
    None,
}

/// How hard a migration tries to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Gives up rather than slow the guest
    Gentle,
    /// Slows a guest that writes faster than the network
    Default,
    /// Runs the guest at the target before all of its memory is there
    PostCopy,
    /// Ends, whatever the blackout
    MustFinish,
}

/// `poolctl vm …`
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Makes a VM; it does not run yet
    Create(CreateArguments),
    /// Starts a VM and waits until it runs
    Start {
        /// The VM
        vm: String,
        /// Where to run it [default: the pool chooses]
        #[arg(long)]
        host: Option<String>,
        /// Print the task and do not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Presses a VM's power button and waits until it has stopped; one that does not listen is switched off
    Stop {
        /// The VM
        vm: String,
        /// At once, without asking the guest
        #[arg(long)]
        force: bool,
        /// Print the task and do not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Stops a VM as `stop` does, and starts it again at the same host
    Reboot {
        /// The VM
        vm: String,
        /// At once, without asking the guest
        #[arg(long)]
        force: bool,
        /// Print the task and do not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Halts the vCPUs
    Pause {
        /// The VM
        vm: String,
    },
    /// Lets a paused VM run on
    Resume {
        /// The VM
        vm: String,
    },
    /// Moves a running VM to another host
    Migrate(MigrateArguments),
    /// All VMs
    List,
    /// One VM
    Show {
        /// The VM
        vm: String,
    },
    /// Where a VM runs, as the majority of the pool knows it
    Where {
        /// The VM
        vm: String,
    },
    /// Why a VM is where it is, or why it doesn't run
    Explain {
        /// The VM
        vm: String,
    },
    /// What a VM does: vCPUs, memory, disks, and its move if it makes one
    Stats {
        /// The VM
        vm: String,
        /// Time over which rates are taken, such as 5s
        #[arg(long, value_parser = reference::duration_ms, value_name = "DURATION", default_value = "1s")]
        interval: Duration,
    },
    /// Makes a stopped VM like another one, on clones of its disks as they are now; both share what neither changes
    Clone {
        /// The VM
        vm: String,
        /// Name of the new one
        name: String,
        /// Copies the disks: nothing is shared
        #[arg(long)]
        full: bool,
        /// Print the task and do not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Deletes a stopped VM; its volumes stay
    Delete {
        /// The VM
        vm: String,
    },
}

/// A VM to be.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// Its name
    pub name: String,
    /// Number of vCPUs
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub vcpus: u32,
    /// Its memory, such as 2GiB
    #[arg(long, value_parser = reference::size)]
    pub memory: ByteCount,
    /// A volume, as vda, vdb, …; may be repeated
    #[arg(long = "disk", value_name = "VOLUME")]
    pub disks: Vec<String>,
    /// A network, as the next card; may be repeated
    #[arg(long = "net", value_name = "NETWORK")]
    pub nets: Vec<String>,
    /// Image of the kernel [default: what the first disk has in its own /boot]
    #[arg(long, value_name = "IMAGE")]
    pub kernel: Option<String>,
    /// Image of the initial ramdisk
    #[arg(long, value_name = "IMAGE", requires = "kernel")]
    pub initrd: Option<String>,
    /// Command line of the kernel; added to the disk's own when it boots from its disk
    #[arg(long, allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// What becomes of it when its host is lost
    #[arg(long, value_enum, default_value_t)]
    pub ha: HaPolicy,
    /// Order of recovery, highest first [default: 100]
    #[arg(long, value_name = "1-255", value_parser = clap::value_parser!(u8).range(1..))]
    pub ha_priority: Option<u8>,
    /// Which features of the processor the guest sees: host-common, x86-64-v2, x86-64-v3 or host [default: its cluster's]
    #[arg(long, value_parser = reference::cpu_profile, value_name = "PROFILE")]
    pub cpu_profile: Option<CpuProfile>,
    /// The cluster whose hosts it runs on [default: default]
    #[arg(long, value_name = "CLUSTER")]
    pub cluster: Option<String>,
    /// Memory in huge pages of 2 MiB, which its hosts must keep free: see vm.nr_hugepages
    #[arg(long)]
    pub hugepages: bool,
}

/// A move.
#[derive(Debug, Args)]
pub struct MigrateArguments {
    /// The VM
    pub vm: String,
    /// The host to move to [default: the pool chooses]
    #[arg(long, value_name = "HOST")]
    pub to: Option<String>,
    /// How hard to try [default: default]
    #[arg(long, value_enum)]
    pub policy: Option<Policy>,
    /// Most bytes a second, such as 500MiB
    #[arg(long, value_parser = reference::size, value_name = "SIZE")]
    pub bandwidth: Option<ByteCount>,
    /// Connections for page data, 1 to 4 [default: by the source's processors]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=4))]
    pub connections: Option<u8>,
    /// Longest blackout to aim for, such as 30ms
    #[arg(long, value_parser = reference::duration_ms, value_name = "DURATION")]
    pub downtime: Option<Duration>,
    /// Print the task and do not wait
    #[arg(long = "async", conflicts_with = "dry_run")]
    pub detach: bool,
    /// Print the plan and all blockers; move nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `poolctl console …`
#[derive(Debug, Subcommand)]
pub enum ConsoleCommand {
    /// The last MiB of a VM's serial output
    Log {
        /// The VM
        vm: String,
        /// Go on with live output until interrupted
        #[arg(long, short)]
        follow: bool,
    },
    /// Types into a VM's serial console and shows what it answers; Ctrl-] ends it
    Serial {
        /// The VM
        vm: String,
    },
}
