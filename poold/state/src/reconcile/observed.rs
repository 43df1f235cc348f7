//! What a host sees of its VM processes: the status of the `Machine` service as plain data.

use crate::{
    command::LastSequence,
    state::{CertificateFingerprint, MigrationRecord, PoolState, Vm},
};
use proto::{Epoch, MigrationId, VmId, VolumeId};

/// One VM process, or the directory that one left.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedVm {
    /// The VM.
    pub vm: VmId,
    /// The epoch of the process.
    pub epoch: Epoch,
    /// What it does.
    pub state: ProcessState,
    /// How the guest ended.
    pub guest_exit: GuestExit,
    /// Why it failed; empty otherwise.
    pub error: String,
    /// Certificate that it shows to a migration peer.
    pub certificate: Option<CertificateFingerprint>,
    /// The last migration that it took part in.
    pub migration: Option<ObservedMigration>,
    /// What was last handed over by `UpdateVolumes`; none: unknown, for example after a restart of the daemon.
    pub volumes: Option<VolumesDigest>,
}

/// State of a VM process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// Has its machine and has not started.
    Configured,
    /// Opens its volumes and boots.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are stopped on demand or for a migration.
    Paused,
    /// Its lease ended; its vCPUs are stopped.
    Fenced,
    /// The target of a migration.
    Incoming,
    /// The guest has ended.
    Stopped,
    /// It can't go on.
    Failed,
    /// Only its directory is left.
    Gone,
}

/// How a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GuestExit {
    /// It has not, or it did not say.
    #[default]
    None,
    /// Power off.
    Poweroff,
    /// Reboot.
    Reboot,
    /// Crash.
    Crash,
}

/// The part that a process plays in a migration.
#[derive(Debug, Clone, PartialEq)]
pub enum ObservedMigration {
    /// Sends.
    Source {
        /// The migration.
        migration: MigrationId,
        /// How far it is.
        phase: SourcePhase,
        /// Why it gave up; empty otherwise.
        error: String,
        /// For each disk the last sequence; set from the pause on.
        last_sequences: Vec<LastSequence>,
        /// What it did; final when `phase` is `Done`.
        record: Option<Box<MigrationRecord>>,
    },
    /// Receives.
    Target {
        /// The migration.
        migration: MigrationId,
        /// How far it is.
        phase: TargetPhase,
        /// Why it failed; empty otherwise.
        error: String,
    },
}

/// How far a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourcePhase {
    /// Copies memory while the guest runs.
    Copying,
    /// Has stopped the guest and sent the rest.
    Paused,
    /// Does not resume by itself any more.
    CommitProposed,
    /// Knows of the commit.
    Committed,
    /// Knows that the target has resumed; its record is final.
    Done,
    /// Gave up and resumed.
    Aborted,
}

/// How far a target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetPhase {
    /// Waits for the source.
    Listening,
    /// Receives memory.
    Receiving,
    /// Has everything.
    Ready,
    /// Activates the volumes.
    Activating,
    /// The guest runs, and some of its memory is still at the source.
    Filling,
    /// The same, and there is no link to the source: the guest waits.
    Starved,
    /// The guest runs, with all of its memory.
    Resumed,
    /// Can't go on.
    Failed,
}

/// Digest of all that `UpdateVolumes` hands over for one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VolumesDigest(pub u64);

impl VolumesDigest {
    /// The digest of a VM's volumes as the state has them now.
    #[must_use]
    pub fn of(state: &PoolState, vm: &Vm) -> Self {
        Self::of_volumes(state, &vm.spec.disks)
    }

    /// The digest of these volumes.
    #[must_use]
    pub fn of_volumes(state: &PoolState, volumes: &[VolumeId]) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for volume in volumes.iter().filter_map(|id| state.volumes.get(id)) {
            part(&volume.id.0.to_le_bytes());
            part(&volume.size.0.to_le_bytes());
            part(&volume.limits.operations_per_s.unwrap_or_default().to_le_bytes());
            part(&volume.limits.bytes_per_s.unwrap_or_default().to_le_bytes());
            part(&volume.epoch.0.to_le_bytes());
            part(&volume.isr_version.0.to_le_bytes());
            for start in &volume.epoch_history {
                part(&start.epoch.0.to_le_bytes());
                part(&start.start_seq.unwrap_or_default().0.to_le_bytes());
            }
            for host in volume.replicas.iter().filter_map(|id| state.hosts.get(id)) {
                part(&host.id.0.to_le_bytes());
                part(host.address.as_bytes());
                part(host.incarnation.as_ref().map_or("", |incarnation| &incarnation.0).as_bytes());
                part(&host.replica_fingerprint.map_or([0; 32], |fingerprint| fingerprint.0));
            }
        }
        let digest = hasher.finalize();
        let first = digest.as_bytes().first_chunk().expect("a digest has 32 bytes");
        Self(u64::from_le_bytes(*first))
    }
}

impl ObservedMigration {
    /// The migration.
    #[must_use]
    pub fn id(&self) -> MigrationId {
        match self {
            Self::Source { migration, .. } | Self::Target { migration, .. } => *migration,
        }
    }
}

impl ObservedVm {
    /// Whether there is a process that could be told something.
    pub(super) fn is_live(&self) -> bool {
        match self.state {
            ProcessState::Configured
            | ProcessState::Starting
            | ProcessState::Running
            | ProcessState::Paused
            | ProcessState::Fenced
            | ProcessState::Incoming => true,
            ProcessState::Stopped | ProcessState::Failed | ProcessState::Gone => false,
        }
    }
}
