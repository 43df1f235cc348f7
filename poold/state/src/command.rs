//! Everything that changes the pool. One command is one entry of the log.
//!
//! Commands carry ids, not names: whoever proposes resolves references first. Reports (`VmRunning`, `VmStopped`, the steps
//! of a migration) name the epoch or migration that they are about, so that a late one is rejected.

mod govern;
mod guests;
mod volumes;

pub use govern::{Govern, NewCa, PoolChange};
pub use guests::{ChangeGroup, ClusterCommand, CreateGroup, CreateNetwork, CreateVm};
pub use volumes::{LoanEnd, ScrubEnd, ServiceEnd, VolumeCommand};

use crate::{
    state::{
        CertificateFingerprint, ContentHash, Copies, DiskCloning, EpochStart, MigrationOptions,
        MigrationRecord, MoveCause, Role, StopMode, StoreSpace, TargetEndpoint,
    },
    timing::Timing,
};
use proto::{
    ByteCount, Epoch, GroupId, HostCpu, HostId, ImageId, Incarnation, IsrVersion, MigrationId, NetworkId,
    Sequence, TaskId, TokenId, VmId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A change of the pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Founds the pool; once.
    InitPool(Box<InitPool>),
    /// Creates a join token. → `Outcome::Token`. A proposer that must be able to repeat its answer derives the secret from
    /// the request id.
    CreateToken {
        /// blake3 of the secret.
        secret_hash: [u8; 32],
        /// Lifetime in milliseconds from the entry's time.
        ttl_ms: u64,
    },
    /// Withdraws an unused token.
    RevokeToken {
        /// The token.
        token: TokenId,
    },
    /// Redeems a token; again with the same key gives the same host. → `Outcome::Host`
    JoinHost(JoinHost),
    /// A host begins to serve, or serves with other facts: `Joining → Up`.
    UpdateHost(UpdateHost),
    /// The leader declares a host lost.
    HostLost {
        /// The host.
        host: HostId,
    },
    /// A lost host renews its lease again.
    HostReturned {
        /// The host.
        host: HostId,
    },
    /// Takes a host out of the pool.
    RemoveHost {
        /// The host.
        host: HostId,
        /// Whether its VMs may be given up, which needs the host to be lost.
        mode: RemoveMode,
    },
    /// Moves a host's VMs and replicas away and takes it out of the pool then. → `Outcome::Task`
    RetireHost {
        /// The host.
        host: HostId,
        /// How many copies volumes keep.
        copies: Copies,
    },
    /// Report: how full the disk of a host's block store is.
    SetHostStore {
        /// The host.
        host: HostId,
        /// Its disk.
        store: StoreSpace,
    },
    /// Registers an imported file. → `Outcome::Image`
    CreateImage {
        /// Name.
        name: String,
        /// Hash of the content.
        blake3: ContentHash,
        /// Size of the content.
        size: ByteCount,
        /// Hosts that hold it durably.
        holders: Vec<HostId>,
    },
    /// One more host holds an image durably.
    AddImageHolder {
        /// The image.
        image: ImageId,
        /// The host.
        host: HostId,
    },
    /// Deletes an image that no VM uses.
    DeleteImage {
        /// The image.
        image: ImageId,
    },
    /// Creates a volume and chooses its replicas. → `Outcome::Volume`
    CreateVolume {
        /// Name.
        name: String,
        /// Size.
        size: ByteCount,
        /// Number of replicas; none: the default, or the number of hosts if fewer.
        replicas: Option<u32>,
    },
    /// Deletes a volume that no VM has.
    DeleteVolume {
        /// The volume.
        volume: VolumeId,
    },
    /// The owner has activated an epoch that starts at this sequence.
    RecordVolumeStart {
        /// The volume.
        volume: VolumeId,
        /// Its epoch and the first sequence of it.
        start: VolumeStart,
    },
    /// Takes a replica out of the in-sync set; compare-and-swap. → `Outcome::Isr`
    RemoveFromIsr(IsrChange),
    /// Puts a resynced replica into the in-sync set; compare-and-swap. → `Outcome::Isr`
    AddToIsr(IsrChange),
    /// Creates a stopped VM. → `Outcome::Vm`
    CreateVm(CreateVm),
    /// Makes a VM like another one, with clones of its disks, linked or full. → `Outcome::Task`
    CloneVm {
        /// The other one.
        vm: VmId,
        /// Name of the new one.
        name: String,
        /// How its disks are made.
        disks: DiskCloning,
    },
    /// The leader has the next step of a VM's copy done. → `Outcome::Task`
    StepVmClone {
        /// The task of the copy.
        task: TaskId,
    },
    /// Deletes a stopped VM; its volumes stay.
    DeleteVm {
        /// The VM.
        vm: VmId,
    },
    /// Starts a stopped or failed VM. → `Outcome::Task`
    StartVm {
        /// The VM.
        vm: VmId,
        /// Where; none: the pool chooses.
        host: Option<HostId>,
    },
    /// Stops a VM; aborts a migration that has not committed. → `Outcome::Task`
    StopVm {
        /// The VM.
        vm: VmId,
        /// How.
        mode: StopMode,
    },
    /// Stops a VM and starts it again at the same host. → `Outcome::Task`
    RebootVm {
        /// The VM.
        vm: VmId,
        /// How it is stopped.
        mode: StopMode,
    },
    /// Stops the vCPUs of a running VM.
    PauseVm {
        /// The VM.
        vm: VmId,
    },
    /// Lets the vCPUs of a paused VM run again.
    ResumeVm {
        /// The VM.
        vm: VmId,
    },
    /// Report: its process runs.
    VmRunning {
        /// The VM.
        vm: VmId,
        /// The epoch of the process.
        epoch: Epoch,
    },
    /// Report: its process has ended and it should not be started again by itself.
    VmStopped {
        /// The VM.
        vm: VmId,
        /// The epoch of the process.
        epoch: Epoch,
        /// Why.
        reason: StopReason,
    },
    /// Report: it can't be started.
    VmFailed {
        /// The VM.
        vm: VmId,
        /// The epoch of the process.
        epoch: Epoch,
        /// Why, for the operator.
        problem: String,
    },
    /// Report: its process has ended and it is to start again where it was, at the next epoch.
    RestartVm {
        /// The VM.
        vm: VmId,
        /// The epoch of the ended process.
        expect_epoch: Epoch,
        /// Why it ended.
        cause: RestartCause,
    },
    /// Starts a VM of a lost host elsewhere, at the next epoch.
    RecoverVm {
        /// The VM.
        vm: VmId,
        /// Its epoch at the lost host.
        expect_epoch: Epoch,
        /// Where.
        host: HostId,
    },
    /// Begins to move a running VM. → `Outcome::Migration`
    StartMigration {
        /// The VM.
        vm: VmId,
        /// Where to; none: the pool chooses.
        target: Option<HostId>,
        /// How.
        options: MigrationOptions,
    },
    /// The certificate that the source's process will show.
    MigrationSourceReady {
        /// The migration.
        migration: MigrationId,
        /// SHA-256 of the certificate.
        fingerprint: CertificateFingerprint,
    },
    /// The target's process listens.
    MigrationPrepared {
        /// The migration.
        migration: MigrationId,
        /// Where, and as whom.
        endpoint: TargetEndpoint,
    },
    /// The source has begun to copy.
    MigrationCopying {
        /// The migration.
        migration: MigrationId,
    },
    /// The source has stopped its vCPUs. Optional: only for display.
    MigrationPaused {
        /// The migration.
        migration: MigrationId,
    },
    /// Placement and epochs move to the target: the point of no return.
    MigrationCommit {
        /// The migration.
        migration: MigrationId,
        /// For each disk of the VM the last sequence that the source wrote.
        last_sequences: Vec<LastSequence>,
    },
    /// Gives a VM back to the source of a committed migration whose target died before the VM ran there.
    MigrationReclaim {
        /// The migration.
        migration: MigrationId,
    },
    /// Gives up a migration that has not committed.
    MigrationAbort {
        /// The migration.
        migration: MigrationId,
        /// Why, for the operator.
        reason: String,
    },
    /// The VM runs at the target.
    MigrationDone {
        /// The migration.
        migration: MigrationId,
        /// What it did, if the reporter knows.
        record: Option<Box<MigrationRecord>>,
    },
    /// The turn of a move that has waited has come. → `Outcome::Migration`
    BeginMigration {
        /// The migration.
        migration: MigrationId,
    },
    /// An operator takes back a migration that has not committed.
    CancelMigration {
        /// The migration.
        migration: MigrationId,
    },
    /// An operator takes back a task.
    CancelTask {
        /// The task.
        task: TaskId,
    },
    /// The leader ends a task that is past its deadline.
    ExpireTask {
        /// The task.
        task: TaskId,
    },
    /// Halts recovery: too many hosts vanished at once.
    SetBrake,
    /// Permits recovery again.
    HaResume,
    /// Switches recovery off.
    HaDisarm,
    /// Switches recovery on.
    HaArm,
    /// What a host's processor can be to guests.
    SetHostCpu {
        /// The host.
        host: HostId,
        /// What it says of itself.
        cpu: HostCpu,
    },
    /// Report: memory that a host's kernel keeps in huge pages.
    SetHostHugeMemory {
        /// The host.
        host: HostId,
        /// All of it.
        memory: ByteCount,
    },
    /// Report: logical CPUs of a host.
    SetHostCpus {
        /// The host.
        host: HostId,
        /// How many.
        cpus: u32,
    },
    /// Changes labels of a host; none takes one away.
    SetHostLabels {
        /// The host.
        host: HostId,
        /// New values by label.
        labels: BTreeMap<String, Option<String>>,
    },
    /// No VM comes to a host any more.
    CordonHost {
        /// The host.
        host: HostId,
    },
    /// VMs may come to a host again.
    UncordonHost {
        /// The host.
        host: HostId,
    },
    /// Moves every VM away from a host. → `Outcome::Task`
    DrainHost {
        /// The host.
        host: HostId,
    },
    /// Puts a host back into service and its VMs back on it. → `Outcome::Task`
    RestoreHost {
        /// The host.
        host: HostId,
    },
    /// An operator vouches that a lost host is off.
    ConfirmDead {
        /// The host.
        host: HostId,
    },
    /// Begins to even the load out. → `Outcome::Task`
    StartBalance,
    /// The leader moves a VM for a task of the pool. → `Outcome::Migration`
    MoveVm {
        /// The VM.
        vm: VmId,
        /// Where to.
        target: HostId,
        /// Why.
        cause: MoveCause,
    },
    /// The leader ends a task of the pool that has reached its aim.
    FinishTask {
        /// The task.
        task: TaskId,
    },
    /// Creates a group. → `Outcome::Group`
    CreateGroup(CreateGroup),
    /// Adds and removes members of a group. → `Outcome::Group`
    ChangeGroup(ChangeGroup),
    /// Deletes a group.
    DeleteGroup {
        /// The group.
        group: GroupId,
    },
    /// Creates a network. → `Outcome::Network`
    CreateNetwork(CreateNetwork),
    /// Deletes a network that no VM is on.
    DeleteNetwork {
        /// The network.
        network: NetworkId,
    },
    /// Creates a user, or a deleted one again; again with the same key changes nothing.
    CreateUser {
        /// Name.
        name: String,
        /// What it may do.
        role: Role,
        /// blake3 of its key.
        key_hash: [u8; 32],
    },
    /// Changes what a user may do.
    SetUserRole {
        /// Name.
        name: String,
        /// What it may do.
        role: Role,
    },
    /// Replaces a user's key.
    RotateUser {
        /// Name.
        name: String,
        /// blake3 of its new key.
        key_hash: [u8; 32],
    },
    /// Deletes a user.
    DeleteUser {
        /// Name.
        name: String,
    },
    /// About volumes.
    Volume(VolumeCommand),
    /// Changes what governs the pool.
    Govern(Govern),
    /// About clusters.
    Cluster(ClusterCommand),
}

/// Content of [`Command::InitPool`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitPool {
    /// Random id of the pool.
    pub pool_id: String,
    /// Name of the pool.
    pub name: String,
    /// Timings.
    pub timing: Timing,
    /// Certificate of the pool's CA.
    pub ca_cert_pem: String,
    /// Key of the pool's CA.
    pub ca_key_pem: String,
    /// Feature level of all daemons.
    pub feature_level: u32,
    /// The first host, which becomes [`FIRST_HOST`](crate::state::FIRST_HOST).
    pub first_host: HostFacts,
}

/// What a host says of itself when it joins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Name.
    pub name: String,
    /// `IP:PORT`.
    pub address: String,
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    /// CPU vendor and feature summary.
    pub cpu_vendor: String,
    /// Memory that VMs may use.
    pub vm_memory: ByteCount,
    /// Feature level of its daemon.
    pub feature_level: u32,
}

/// Content of [`Command::JoinHost`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinHost {
    /// blake3 of the token's secret.
    pub secret_hash: [u8; 32],
    /// The host.
    pub facts: HostFacts,
}

/// Content of [`Command::UpdateHost`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateHost {
    /// The host.
    pub host: HostId,
    /// Life of its replica store.
    pub incarnation: Incarnation,
    /// Certificate of its replica server.
    pub replica_fingerprint: CertificateFingerprint,
    /// Boot id of its kernel.
    pub boot_id: String,
    /// `IP:PORT`.
    pub address: String,
    /// Memory that VMs may use. Less than what is reserved already counts as that much.
    pub vm_memory: ByteCount,
}

/// Whether removing a host may give up its VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RemoveMode {
    /// Refused while it has VMs.
    Drained,
    /// The operator confirms that the lost host is dead: its VMs become failed and may be started elsewhere.
    ConfirmDead,
}

/// A change of an in-sync set, made against the epoch and version that the proposer saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IsrChange {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch that the proposer saw.
    pub epoch: Epoch,
    /// The version of the in-sync set that the proposer saw.
    pub isr_version: IsrVersion,
    /// The host that leaves or enters.
    pub host: HostId,
    /// The life of its store that leaves or enters.
    pub incarnation: Incarnation,
}

/// An epoch and its first sequence, both known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStart {
    /// The epoch.
    pub epoch: Epoch,
    /// Its first sequence, at least 1.
    pub start_seq: Sequence,
}

impl From<VolumeStart> for EpochStart {
    fn from(start: VolumeStart) -> Self {
        Self { epoch: start.epoch, start_seq: Some(start.start_seq) }
    }
}

/// The last sequence that a migration's source wrote to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastSequence {
    /// The volume.
    pub volume: VolumeId,
    /// The sequence; 0: nothing was ever written.
    pub sequence: Sequence,
}

/// Why a VM's process ended for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StopReason {
    /// It was to stop.
    Requested,
    /// The guest powered off.
    Poweroff,
    /// The guest crashed.
    Crash,
    /// The process died.
    ProcessDied,
}

/// Why a VM's process ended and is to start again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RestartCause {
    /// The guest asked for it.
    GuestReboot,
    /// An operator asked for it.
    Requested,
    /// The guest crashed.
    GuestCrash,
    /// The process died.
    ProcessDied,
    /// The process gave up.
    Failed {
        /// Why, for the operator.
        problem: String,
    },
}

impl RestartCause {
    /// Whether somebody wanted it, so that nothing has failed.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        matches!(self, Self::GuestReboot | Self::Requested)
    }
}
