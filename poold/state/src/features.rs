//! Feature levels: what a daemon of an older version could not read, or would do otherwise.
//!
//! ```text
//!  daemons at 2,2,2 ─▶ upgraded one by one: 3,2,2 ─▶ 3,3,2 ─▶ 3,3,3 ──one entry──▶ the pool is at 3
//! ```
//! A pool works at one level, which all of its daemons support. New versions run side by side with old ones at the old level; the
//! leader raises it by one entry as soon as every member has reported the new one. It never goes back.
//!
//! A feature is asked for before an entry is proposed, so that none comes into the log that a member can't read, and in `apply`,
//! where it is committed, so that no host acts on it below its level. How states are written at a level: [`form`](crate::form).
//! [`of`] names every command: one that is added does not compile before somebody has said which level it needs.

use crate::{
    GovernRejection, PoolState, Rejection,
    command::{ClusterCommand, Command, Govern, PoolChange, VolumeCommand},
};

/// The newest level that this version supports.
pub const NEWEST: u32 = 4;

/// The oldest one.
pub const OLDEST: u32 = 2;

/// How far a daemon may be ahead of its pool: versions are upgraded one after the other, and one brings two levels at most.
pub const SKEW_MAX: u32 = 2;

/// What a level has brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// What every pool can do that this version works in.
    Base,
    /// Settings that can be changed while the pool runs.
    PoolSettings,
    /// Another certificate authority in place of the pool's first one.
    CaRotation,
    /// Access by tokens.
    AccessTokens,
    /// Snapshots, reverts and clones of volumes, and copies of VMs.
    Snapshots,
    /// Scrubs.
    Scrubs,
    /// Replicas that are chosen by free space, and hosts that leave with their copies.
    Retirement,
    /// Clusters.
    Clusters,
    /// Another key of a host.
    HostKeys,
    /// Moves that wait for their turn.
    QueuedMoves,
    /// Memory in huge pages.
    HugePages,
    /// Refusals that are remembered.
    Refusals,
}

impl Feature {
    /// The level that it came with.
    #[must_use]
    pub fn level(self) -> u32 {
        match self {
            Self::Base => 1,
            Self::PoolSettings | Self::CaRotation | Self::AccessTokens => 2,
            Self::Snapshots
            | Self::Scrubs
            | Self::Retirement
            | Self::Clusters
            | Self::HostKeys
            | Self::QueuedMoves
            | Self::HugePages => 3,
            Self::Refusals => 4,
        }
    }
}

impl PoolState {
    /// Whether a feature is in force.
    #[must_use]
    pub fn has_feature(&self, feature: Feature) -> bool {
        self.settings.feature_level >= feature.level()
    }

    /// Checks that every daemon of the pool knows a command. Asked before it is proposed, since a daemon that can't read an entry
    /// can't follow the log any more, and once more in `apply`.
    ///
    /// # Errors
    /// The pool's level is too low.
    pub fn check_level(&self, command: &Command) -> Result<(), Rejection> {
        // A pool that is being founded has no level yet.
        if self.settings.is_initialised() { self.check_feature(of(command)) } else { Ok(()) }
    }

    /// Checks that every daemon of the pool knows a feature.
    pub(crate) fn check_feature(&self, feature: Feature) -> Result<(), Rejection> {
        if self.has_feature(feature) {
            return Ok(());
        }
        let (needed, present) = (feature.level(), self.settings.feature_level);
        Err(GovernRejection::LevelTooLow { needed, present }.into())
    }
}

/// The feature that a command belongs to. No wildcard, so that a new one is thought of.
#[must_use]
pub fn of(command: &Command) -> Feature {
    match command {
        Command::Volume(command) => of_volume(command),
        Command::Govern(change) => of_governance(change),
        Command::RetireHost { .. } | Command::SetHostStore { .. } => Feature::Retirement,
        Command::CloneVm { .. } | Command::StepVmClone { .. } => Feature::Snapshots,
        Command::BeginMigration { .. } => Feature::QueuedMoves,
        Command::SetHostHugeMemory { .. } => Feature::HugePages,
        Command::CreateVm(create) if create.pages.is_huge() => Feature::HugePages,
        Command::CreateVm(create) if create.cluster.is_some() => Feature::Clusters,
        Command::Cluster(
            ClusterCommand::CreateCluster { .. }
            | ClusterCommand::DeleteCluster { .. }
            | ClusterCommand::SetHostCluster { .. }
            | ClusterCommand::SetVmCluster { .. },
        ) => Feature::Clusters,
        Command::InitPool(_)
        | Command::CreateToken { .. }
        | Command::RevokeToken { .. }
        | Command::JoinHost(_)
        | Command::UpdateHost(_)
        | Command::HostLost { .. }
        | Command::HostReturned { .. }
        | Command::RemoveHost { .. }
        | Command::CreateImage { .. }
        | Command::AddImageHolder { .. }
        | Command::DeleteImage { .. }
        | Command::CreateVolume { .. }
        | Command::DeleteVolume { .. }
        | Command::RecordVolumeStart { .. }
        | Command::RemoveFromIsr(_)
        | Command::AddToIsr(_)
        | Command::CreateVm(_)
        | Command::DeleteVm { .. }
        | Command::StartVm { .. }
        | Command::StopVm { .. }
        | Command::RebootVm { .. }
        | Command::PauseVm { .. }
        | Command::ResumeVm { .. }
        | Command::VmRunning { .. }
        | Command::VmStopped { .. }
        | Command::VmFailed { .. }
        | Command::RestartVm { .. }
        | Command::RecoverVm { .. }
        | Command::StartMigration { .. }
        | Command::MigrationSourceReady { .. }
        | Command::MigrationPrepared { .. }
        | Command::MigrationCopying { .. }
        | Command::MigrationPaused { .. }
        | Command::MigrationCommit { .. }
        | Command::MigrationReclaim { .. }
        | Command::MigrationAbort { .. }
        | Command::MigrationDone { .. }
        | Command::CancelMigration { .. }
        | Command::CancelTask { .. }
        | Command::ExpireTask { .. }
        | Command::SetBrake
        | Command::HaResume
        | Command::HaDisarm
        | Command::HaArm
        | Command::SetHostCpu { .. }
        | Command::SetHostCpus { .. }
        | Command::SetHostLabels { .. }
        | Command::CordonHost { .. }
        | Command::UncordonHost { .. }
        | Command::DrainHost { .. }
        | Command::RestoreHost { .. }
        | Command::ConfirmDead { .. }
        | Command::StartBalance
        | Command::MoveVm { .. }
        | Command::FinishTask { .. }
        | Command::CreateGroup(_)
        | Command::ChangeGroup(_)
        | Command::DeleteGroup { .. }
        | Command::CreateNetwork(_)
        | Command::DeleteNetwork { .. }
        | Command::CreateUser { .. }
        | Command::SetUserRole { .. }
        | Command::RotateUser { .. }
        | Command::DeleteUser { .. } => Feature::Base,
    }
}

fn of_volume(command: &VolumeCommand) -> Feature {
    match command {
        VolumeCommand::ResizeVolume { .. }
        | VolumeCommand::LimitVolume { .. }
        | VolumeCommand::ServeVolume { .. }
        | VolumeCommand::StopServingVolume { .. }
        | VolumeCommand::VolumeServing { .. }
        | VolumeCommand::VolumeServiceEnded { .. }
        | VolumeCommand::ImportVolume { .. }
        | VolumeCommand::ExportVolume { .. }
        | VolumeCommand::EndLoan { .. }
        | VolumeCommand::PlaceReplica { .. }
        | VolumeCommand::DropReplica { .. }
        | VolumeCommand::WorkOnVolume { .. }
        | VolumeCommand::FinishVolumeWork { .. } => Feature::Base,
        VolumeCommand::TakeSnapshot { .. }
        | VolumeCommand::DeleteSnapshot { .. }
        | VolumeCommand::RevertVolume { .. }
        | VolumeCommand::CloneVolume { .. }
        | VolumeCommand::CopySnapshot { .. }
        | VolumeCommand::VolumeWorkDone { .. }
        | VolumeCommand::VolumeWorkFailed { .. } => Feature::Snapshots,
        VolumeCommand::ScrubVolume { .. } | VolumeCommand::VolumeScrubbed { .. } => Feature::Scrubs,
    }
}

fn of_governance(change: &Govern) -> Feature {
    match change {
        Govern::SetHostVersion { .. } | Govern::RaiseFeatureLevel { .. } | Govern::HostTrusts { .. } => {
            Feature::Base
        }
        Govern::SetPool(PoolChange { scrub_interval_ms, scrub_bytes_per_s, .. })
            if scrub_interval_ms.is_some() || scrub_bytes_per_s.is_some() =>
        {
            Feature::Scrubs
        }
        Govern::SetPool(_) => Feature::PoolSettings,
        Govern::RotateCa(_) | Govern::FinishCaRotation => Feature::CaRotation,
        Govern::CreateAccessToken { .. } | Govern::DeleteAccessToken { .. } => Feature::AccessTokens,
        Govern::CreateKeyToken { .. } | Govern::ReplaceHostKey { .. } => Feature::HostKeys,
        Govern::RefuseRequest => Feature::Refusals,
    }
}

const _: () = assert!(OLDEST <= NEWEST && NEWEST - OLDEST <= SKEW_MAX);
