//! Why an entry or a reference was refused. A rejection changes nothing and is safe to repeat.
//!
//! Every variant names its objects as operators know them; [`guidance`] adds the stable code, the class for exit codes, and
//! what to do next.

mod cluster;
mod govern;
mod guidance;
mod memory;
mod network;
mod volumes;
mod words;

pub use cluster::ClusterRejection;
pub use govern::GovernRejection;
pub use guidance::RejectionClass;
pub use memory::MemoryRejection;
pub use network::NetworkRejection;
pub use volumes::VolumeRejection;
pub use words::{Field, ObjectKind};

use crate::{
    state::{HostState, MigrationPhase, MoveDirection},
    timing::TimingError,
};
use proto::{ByteCount, Epoch, IsrVersion, MigrationId, TaskId, VolumeId};
use serde::{Deserialize, Serialize};

/// Why an entry or a reference was refused. Fields named after a kind (`vm`, `host`, …) hold the object's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Rejection {
    /// About what governs the pool.
    #[error(transparent)]
    Govern(#[from] GovernRejection),
    /// About networks or cards.
    #[error(transparent)]
    Network(#[from] NetworkRejection),
    /// About clusters.
    #[error(transparent)]
    Cluster(#[from] ClusterRejection),
    /// What memory is made of.
    #[error(transparent)]
    Memory(#[from] MemoryRejection),
    /// There is no pool yet.
    #[error("the pool is not initialised")]
    PoolNotInitialised,
    /// The pool was founded before.
    #[error("the pool is already initialised")]
    PoolAlreadyInitialised,
    /// The timings contradict each other.
    #[error(transparent)]
    BadTiming(TimingError),
    /// The request id was used for another change.
    #[error("request id `{request_id}` was already used for another change")]
    RequestIdReused {
        /// The id.
        request_id: String,
    },
    /// No object matches a reference or id.
    #[error("there is no {kind} `{text}`")]
    NotFound {
        /// Its kind.
        kind: ObjectKind,
        /// What was looked for.
        text: String,
    },
    /// Several objects match a reference.
    #[error("`{text}` could be {kind} {}", matches.join(" or "))]
    Ambiguous {
        /// Their kind.
        kind: ObjectKind,
        /// What was looked for.
        text: String,
        /// Names of the first few matches.
        matches: Vec<String>,
    },
    /// The name is no valid one.
    #[error("`{name}` is not a valid name")]
    BadName {
        /// The name.
        name: String,
    },
    /// Another object has the name.
    #[error("the name is taken: {kind} `{name}` exists")]
    NameTaken {
        /// Their kind.
        kind: ObjectKind,
        /// The name.
        name: String,
    },
    /// Another host has the address.
    #[error("address {address} belongs to host {host}")]
    AddressTaken {
        /// The address.
        address: String,
        /// The other host.
        host: String,
    },
    /// A number is out of range.
    #[error("{field} {} is out of range ({} to {})", field.show(*value), field.show(*min), field.show(*max))]
    OutOfRange {
        /// The number's meaning.
        field: Field,
        /// The number.
        value: u64,
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// A size is no multiple of the block size.
    #[error("{field} of {value} bytes is not a multiple of 4 KiB")]
    NotAligned {
        /// The number's meaning.
        field: Field,
        /// The number.
        value: u64,
    },
    /// The pool can't hold more objects of the kind.
    #[error("the pool already has {max} objects of kind {kind}, the most it can hold")]
    TooMany {
        /// The kind.
        kind: ObjectKind,
        /// The limit.
        max: u64,
    },
    /// The secret belongs to no token.
    #[error("the join token is unknown")]
    TokenUnknown,
    /// The token's time is over.
    #[error("the join token has expired")]
    TokenExpired,
    /// The token admitted another host.
    #[error("the join token was already used by host {host}")]
    TokenUsed {
        /// The other host.
        host: String,
    },
    /// The token was withdrawn.
    #[error("the join token was revoked")]
    TokenRevoked,
    /// The daemon is older than the pool.
    #[error("the host has feature level {host_level}, the pool needs {pool_level}")]
    FeatureLevelTooLow {
        /// Level of the host.
        host_level: u32,
        /// Level of the pool.
        pool_level: u32,
    },
    /// The host is no member any more.
    #[error("host {host} was removed from the pool")]
    HostRemoved {
        /// The host.
        host: String,
    },
    /// The host is in the wrong state for it.
    #[error("host {host} is {state}")]
    HostNotUp {
        /// The host.
        host: String,
        /// Its state.
        state: HostState,
    },
    /// The host is not lost.
    #[error("host {host} is {state}, not lost")]
    HostNotLost {
        /// The host.
        host: String,
        /// Its state.
        state: HostState,
    },
    /// VMs are placed on the host.
    #[error("host {host} still has {count} VMs, among them {example}")]
    HostHasVms {
        /// The host.
        host: String,
        /// How many.
        count: u64,
        /// One of them.
        example: String,
    },
    /// The host has the only up-to-date copy of a volume.
    #[error("host {host} has the last in-sync replica of volume {volume}")]
    LastInSyncReplica {
        /// The host.
        host: String,
        /// The volume.
        volume: String,
    },
    /// The host has the only copy of an image.
    #[error("host {host} is the only one that holds image {image}")]
    LastImageHolder {
        /// The host.
        host: String,
        /// The image.
        image: String,
    },
    /// The pool can't be left without a host.
    #[error("host {host} is the last host of the pool")]
    LastHost {
        /// The host.
        host: String,
    },
    /// A VM boots from the image.
    #[error("image {image} is used by vm {vm}")]
    ImageInUse {
        /// The image.
        image: String,
        /// The VM.
        vm: String,
    },
    /// An image needs somebody who has it.
    #[error("image {image} has no holder")]
    ImageWithoutHolder {
        /// The image.
        image: String,
    },
    /// There are fewer hosts than replicas.
    #[error("{wanted} replicas need {wanted} hosts that are up, there are {up}")]
    NotEnoughHosts {
        /// Wanted replicas.
        wanted: u64,
        /// Hosts that can take one.
        up: u64,
    },
    /// A VM has the volume among its disks.
    #[error("volume {volume} is a disk of vm {vm}")]
    VolumeInUse {
        /// The volume.
        volume: String,
        /// The VM.
        vm: String,
    },
    /// A disk is named twice.
    #[error("volume {volume} is given twice")]
    DuplicateDisk {
        /// The volume.
        volume: String,
    },
    /// The proposer saw an older epoch or version of the volume.
    #[error("volume {volume} is at epoch {epoch} version {isr_version}, the change was made for another")]
    StaleVolume {
        /// The volume.
        volume: String,
        /// Its epoch.
        epoch: Epoch,
        /// Its version.
        isr_version: IsrVersion,
    },
    /// An epoch starts at one sequence only.
    #[error("epoch {epoch} of volume {volume} already starts at another sequence")]
    StartAlreadyRecorded {
        /// The volume.
        volume: String,
        /// The epoch.
        epoch: Epoch,
    },
    /// The change would leave no in-sync replica.
    #[error("volume {volume} would have no in-sync replica")]
    IsrWouldBeEmpty {
        /// The volume.
        volume: String,
    },
    /// The host is not in the in-sync set in this life.
    #[error("host {host} is not an in-sync replica of volume {volume} in that incarnation")]
    NotInIsr {
        /// The volume.
        volume: String,
        /// The host.
        host: String,
    },
    /// The host holds no replica.
    #[error("host {host} has no replica of volume {volume}")]
    NotAReplica {
        /// The volume.
        volume: String,
        /// The host.
        host: String,
    },
    /// The host's store lives another life by now.
    #[error("host {host} has another incarnation by now")]
    StaleIncarnation {
        /// The host.
        host: String,
    },
    /// The VM has a placement.
    #[error("vm {vm} already runs or is starting")]
    VmAlreadyPlaced {
        /// The VM.
        vm: String,
    },
    /// Only a stopped VM can be deleted.
    #[error("vm {vm} is not stopped")]
    VmNotStopped {
        /// The VM.
        vm: String,
    },
    /// The VM has no placement.
    #[error("vm {vm} is stopped")]
    VmIsStopped {
        /// The VM.
        vm: String,
    },
    /// The VM is being stopped.
    #[error("vm {vm} is stopping")]
    VmIsStopping {
        /// The VM.
        vm: String,
    },
    /// The VM does not run now.
    #[error("vm {vm} is not running")]
    VmNotRunning {
        /// The VM.
        vm: String,
    },
    /// The VM is not paused.
    #[error("vm {vm} is not paused")]
    VmNotPaused {
        /// The VM.
        vm: String,
    },
    /// The VM is locked by a migration.
    #[error("vm {vm} is being moved by {migration}")]
    VmIsMigrating {
        /// The VM.
        vm: String,
        /// The migration.
        migration: MigrationId,
    },
    /// The VM has nothing to boot.
    #[error("vm {vm} has neither a kernel nor a disk to boot from")]
    VmWithoutKernel {
        /// The VM.
        vm: String,
    },
    /// The reporter is about an older life of the VM.
    #[error("vm {vm} is at epoch {actual}, not {expected}")]
    StaleEpoch {
        /// The VM.
        vm: String,
        /// Epoch of the report.
        expected: Epoch,
        /// Epoch of the VM.
        actual: Epoch,
    },
    /// The VM may still run at its lost host, as it needs no lease.
    #[error("vm {vm} has no lease (ha none) and may still run on the lost host {host}")]
    MayStillRun {
        /// The VM.
        vm: String,
        /// The host.
        host: String,
    },
    /// The VM is not to be started by the pool.
    #[error("vm {vm} has ha none")]
    NotHighlyAvailable {
        /// The VM.
        vm: String,
    },
    /// Recovery is halted.
    #[error("recovery is halted: more than half of the hosts vanished at once")]
    Braked,
    /// Recovery is switched off.
    #[error("recovery is disarmed")]
    Disarmed,
    /// An operator keeps VMs away from the host.
    #[error("host {host} is {duty}: no VM comes to it")]
    HostOutOfService {
        /// The host.
        host: String,
        /// Its duty.
        duty: String,
    },
    /// A rule of a group forbids it.
    #[error("group {group} forbids vm {vm} to be on host {host}")]
    GroupForbids {
        /// The VM.
        vm: String,
        /// The host.
        host: String,
        /// The group.
        group: String,
    },
    /// The host sends or takes in as many VMs as it may.
    #[error("host {host} already {direction} {max} VMs")]
    TooManyMoves {
        /// The host.
        host: String,
        /// Which way they move.
        direction: MoveDirection,
        /// The limit.
        max: u64,
    },
    /// The pool moves as many VMs as it may.
    #[error("{max} VMs of the pool are moving already")]
    PoolMovesTooMany {
        /// The limit.
        max: u64,
    },
    /// As many moves wait as may.
    #[error("{max} migrations wait for others to end already")]
    MoveQueueFull {
        /// The limit.
        max: u64,
    },
    /// The task for which the VM was to move is over.
    #[error("nothing wants vm {vm} to move there any more")]
    MoveNotWanted {
        /// The VM.
        vm: String,
    },
    /// The task has not reached its aim.
    #[error("{task} has not reached its aim yet")]
    TaskNotFinished {
        /// The task.
        task: TaskId,
    },
    /// Nobody would be left who can change the pool.
    #[error("user {user} is the last admin")]
    LastAdmin {
        /// The user.
        user: String,
    },
    /// Memory of the host is reserved already.
    #[error("host {host} has {free} of memory free, {needed} are needed")]
    NotEnoughMemory {
        /// The host.
        host: String,
        /// Needed.
        needed: ByteCount,
        /// Free.
        free: ByteCount,
    },
    /// No host has room.
    #[error("no host that is up and fits has {needed} of memory free")]
    NoHostFits {
        /// The VM.
        vm: String,
        /// Needed.
        needed: ByteCount,
    },
    /// The VM is there already.
    #[error("vm {vm} is already on host {host}")]
    TargetIsSource {
        /// The VM.
        vm: String,
        /// The host.
        host: String,
    },
    /// The target's CPU can't go on where the source's stopped.
    #[error("host {target} has another CPU ({target_cpu}) than host {source_host} ({source_cpu})")]
    CpuMismatch {
        /// The source.
        source_host: String,
        /// The target.
        target: String,
        /// CPU of the source.
        source_cpu: String,
        /// CPU of the target.
        target_cpu: String,
    },
    /// A host's processor lacks what the VM's guest sees, or is to see.
    #[error("host {host} lacks {missing}, which the CPU profile of vm {vm} shows")]
    CpuLacks {
        /// The VM.
        vm: String,
        /// The host.
        host: String,
        /// Names of features.
        missing: String,
    },
    /// A guest would find its TSC at another rate.
    #[error(
        "the TSC of host {target} runs at {target_khz} kHz and can't be scaled to the {source_khz} kHz of host {source_host}"
    )]
    TscMismatch {
        /// The source.
        source_host: String,
        /// The target.
        target: String,
        /// Its rate.
        source_khz: u32,
        /// The other's.
        target_khz: u32,
    },
    /// The daemons of the two hosts have other devices.
    #[error(
        "the machine of host {source_host} is of version {source_version}, that of host {target} of version {target_version}"
    )]
    MachineMismatch {
        /// The source.
        source_host: String,
        /// The target.
        target: String,
        /// Version of its devices and state.
        source_version: u32,
        /// The other's.
        target_version: u32,
    },
    /// The migration is in another phase.
    #[error("{migration} is in phase {phase}")]
    WrongPhase {
        /// The migration.
        migration: MigrationId,
        /// Its phase.
        phase: MigrationPhase,
    },
    /// The migration has ended.
    #[error("{migration} has already ended")]
    MigrationEnded {
        /// The migration.
        migration: MigrationId,
    },
    /// The VM may have run at the target.
    #[error("vm {vm} may have arrived by {migration}")]
    MayHaveArrived {
        /// The migration.
        migration: MigrationId,
        /// The VM.
        vm: String,
    },
    /// The VM belongs to the target.
    #[error("{migration} is already committed")]
    AlreadyCommitted {
        /// The migration.
        migration: MigrationId,
    },
    /// The sequences are not those of the VM's disks.
    #[error("{migration} gives no single last sequence for {volume}")]
    LastSequenceMismatch {
        /// The migration.
        migration: MigrationId,
        /// A volume that is missing, given twice or too much.
        volume: VolumeId,
    },
    /// The task has ended.
    #[error("{task} has already ended")]
    TaskEnded {
        /// The task.
        task: TaskId,
    },
    /// A stop can't be taken back.
    #[error("{task} can't be cancelled: a VM that has begun to stop does not come back")]
    TaskNotCancellable {
        /// The task.
        task: TaskId,
    },
    /// The task still has time.
    #[error("{task} is not past its deadline")]
    TaskNotExpired {
        /// The task.
        task: TaskId,
    },
    /// About volumes.
    #[error(transparent)]
    Volume(#[from] VolumeRejection),
}
