//! What can happen to a pool, as a value.

use ::tests::Traffic;
use serde::{Deserialize, Serialize};

/// A host, chosen when the fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Victim {
    /// By position.
    Host(usize),
    /// The host that runs this VM (by position) then.
    HostOfVm(usize),
    /// The leader then.
    Leader,
}

/// What of a disk fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskPart {
    /// Reading segments.
    Reads,
    /// Writing segments.
    Writes,
    /// Making segments or the Raft log durable.
    Syncs,
}

/// What keeps a host's knowledge of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kept {
    /// The Raft log.
    Log,
    /// The newest snapshot of the state.
    Snapshot,
}

/// What happens to a pool. Durations in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Fault {
    /// kill -9 of the daemon; started again after the time.
    KillDaemon { victim: Victim, away_ms: u64 },
    /// kill -9 of the process of a VM.
    KillVm { vm: usize },
    /// kill -9 of the daemon and all VM processes; the daemon is started again after the time.
    KillHost { victim: Victim, away_ms: u64 },
    /// SIGSTOP of the daemon and all VM processes; SIGCONT after the time.
    StopHost { victim: Victim, away_ms: u64 },
    /// SIGSTOP of the daemon alone; SIGCONT after the time.
    StopDaemon { victim: Victim, away_ms: u64 },
    /// Nobody reaches the host for the time.
    CutHost { victim: Victim, away_ms: u64 },
    /// kill -9 of everything at once; the daemons are started again after the time, in an order drawn from `order`.
    ColdBoot { order: u64, away_ms: u64 },
    /// The power of the host is cut: all its processes are gone, and what was not synced to its disk; back after the time.
    CutPower { victim: Victim, away_ms: u64 },
    /// The power of all hosts is cut at once; they are back after the time, in an order drawn from `order`.
    CutAllPower { order: u64, away_ms: u64 },
    /// SIGSTOP of the process of a VM alone; SIGCONT after the time.
    StopVm { vm: usize, away_ms: u64 },
    /// The pool falls apart for the time: hosts (by position) whose bit is set in `side` on one side, the rest on the other.
    CutHalves { side: u64, away_ms: u64 },
    /// What the host sends to another one is lost for the time; the other direction works.
    CutOneWay { victim: Victim, to: usize, away_ms: u64 },
    /// The host and another one don't reach each other for the time; everybody else reaches both.
    CutPair { victim: Victim, other: usize, away_ms: u64 },
    /// One kind of traffic between the host and all others is lost for the time.
    CutTraffic { victim: Victim, traffic: Traffic, away_ms: u64 },
    /// So many of a hundred packets from and to the host are lost for the time.
    LosePackets { victim: Victim, percent: u32, away_ms: u64 },
    /// The disk of the host is full for the time.
    FillDisk { victim: Victim, away_ms: u64 },
    /// The disk of the host answers with EIO for the time.
    FailDisk { victim: Victim, part: DiskPart, away_ms: u64 },
    /// Making something durable takes the host this much longer for the time.
    SlowSyncs { victim: Victim, delay_ms: u64, away_ms: u64 },
    /// The network of the host carries only so much for the time.
    SlowLink { victim: Victim, kbit_per_s: u64, away_ms: u64 },
    /// The clock of the host's daemon jumps by so many seconds, and back after the time.
    ShiftClock { victim: Victim, seconds: i64, away_ms: u64 },
    /// So many of a hundred calls to the host's daemon are served up to `delay_ms` later, for the time.
    DelayCalls { victim: Victim, delay_ms: u64, percent: u32, away_ms: u64 },
    /// So many of a hundred calls to the host's daemon are served once more, up to `later_ms` later, for the time.
    RepeatCalls { victim: Victim, later_ms: u64, percent: u32, away_ms: u64 },
    /// What the host's processes take from now on must fit into so much memory, for the time.
    Squeeze { victim: Victim, mebibytes: u64, away_ms: u64 },
    /// Bits are turned in segment files of a host of which every replica has others in sync.
    FlipBits { victim: Victim, bits: u64 },
    /// The daemon dies, and bits are turned in what it knows of the pool before it is started again.
    FlipKept { victim: Victim, kept: Kept, bits: u64, away_ms: u64 },
}

impl Fault {
    /// Name of its kind, for the summary.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::KillDaemon { victim: Victim::Leader, .. } => "kill daemon of leader",
            Self::KillDaemon { .. } => "kill daemon",
            Self::KillVm { .. } => "kill vm process",
            Self::KillHost { victim: Victim::Leader, .. } => "kill host of leader",
            Self::KillHost { .. } => "kill host",
            Self::StopHost { .. } => "stop host",
            Self::StopDaemon { .. } => "stop daemon",
            Self::CutHost { .. } => "cut host",
            Self::ColdBoot { .. } => "cold boot",
            Self::CutPower { .. } => "cut power",
            Self::CutAllPower { .. } => "cut all power",
            Self::StopVm { .. } => "stop vm process",
            Self::CutHalves { .. } => "cut halves",
            Self::CutOneWay { .. } => "cut one way",
            Self::CutPair { .. } => "cut pair",
            Self::CutTraffic { traffic: Traffic::Control, .. } => "cut control",
            Self::CutTraffic { traffic: Traffic::Storage, .. } => "cut storage",
            Self::CutTraffic { traffic: Traffic::Migration, .. } => "cut migration",
            Self::LosePackets { .. } => "lose packets",
            Self::FillDisk { .. } => "fill disk",
            Self::FailDisk { part: DiskPart::Reads, .. } => "EIO on reads",
            Self::FailDisk { part: DiskPart::Writes, .. } => "EIO on writes",
            Self::FailDisk { part: DiskPart::Syncs, .. } => "EIO on syncs",
            Self::SlowSyncs { .. } => "slow syncs",
            Self::SlowLink { .. } => "slow link",
            Self::ShiftClock { .. } => "shift clock",
            Self::DelayCalls { .. } => "delay calls",
            Self::RepeatCalls { .. } => "repeat calls",
            Self::Squeeze { .. } => "squeeze memory",
            Self::FlipBits { .. } => "flip bits",
            Self::FlipKept { kept: Kept::Log, .. } => "flip bits of log",
            Self::FlipKept { kept: Kept::Snapshot, .. } => "flip bits of snapshot",
        }
    }

    /// How long it lasts; 0 for one that is not undone.
    #[must_use]
    pub fn away_ms(self) -> u64 {
        match self {
            Self::KillVm { .. } | Self::FlipBits { .. } => 0,
            Self::KillDaemon { away_ms, .. }
            | Self::KillHost { away_ms, .. }
            | Self::StopHost { away_ms, .. }
            | Self::StopDaemon { away_ms, .. }
            | Self::CutHost { away_ms, .. }
            | Self::ColdBoot { away_ms, .. }
            | Self::CutPower { away_ms, .. }
            | Self::CutAllPower { away_ms, .. }
            | Self::StopVm { away_ms, .. }
            | Self::CutHalves { away_ms, .. }
            | Self::CutOneWay { away_ms, .. }
            | Self::CutPair { away_ms, .. }
            | Self::CutTraffic { away_ms, .. }
            | Self::LosePackets { away_ms, .. }
            | Self::FillDisk { away_ms, .. }
            | Self::FailDisk { away_ms, .. }
            | Self::SlowSyncs { away_ms, .. }
            | Self::SlowLink { away_ms, .. }
            | Self::ShiftClock { away_ms, .. }
            | Self::DelayCalls { away_ms, .. }
            | Self::RepeatCalls { away_ms, .. }
            | Self::Squeeze { away_ms, .. }
            | Self::FlipKept { away_ms, .. } => away_ms,
        }
    }
}
