//! A process's status as `pool_state::reconcile` sees it.

use crate::{
    api::views,
    supervisor::{ProcessEnd, ProcessView},
};
use pool_state::{
    command::LastSequence,
    reconcile::{
        GuestExit, ObservedMigration, ObservedScrub, ObservedScrubState, ObservedService, ObservedVm,
        ProcessState, SourcePhase, TargetPhase, VolumesDigest,
    },
    state::ScrubCounts,
};
use proto::{
    CertificateFingerprint, Epoch, MigrationId, Sequence, TaskId, VmId, VolumeId,
    v1::{MachineStatus, MigrationState, VolumeStatus},
};

/// A present process. One that has not answered yet counts as starting: it must not be started again.
pub fn present(vm: VmId, process: &ProcessView, volumes: Option<VolumesDigest>) -> ObservedVm {
    let epoch = process.key.epoch;
    let Some(status) = &process.status else {
        return observed(vm, epoch, ProcessState::Starting, volumes);
    };
    ObservedVm {
        guest_exit: guest_exit(&status.guest_exit),
        error: status.error.clone(),
        certificate: fingerprint(&status.certificate_sha256),
        migration: status.migration.as_ref().and_then(migration),
        ..observed(vm, epoch, process_state(status), volumes)
    }
}

/// A process that has ended.
pub fn gone(vm: VmId, epoch: Epoch, end: &ProcessEnd) -> ObservedVm {
    ObservedVm {
        guest_exit: guest_exit(&end.guest_exit),
        error: end.describe(),
        ..observed(vm, epoch, ProcessState::Gone, None)
    }
}

/// The present process of a volume.
pub fn service(volume: VolumeId, process: &ProcessView, volumes: Option<VolumesDigest>) -> ObservedService {
    let status = process.status.as_ref();
    ObservedService {
        volume,
        epoch: process.key.epoch,
        state: status.map_or(ProcessState::Starting, process_state),
        error: status.map(|status| status.error.clone()).unwrap_or_default(),
        uri: status.and_then(|status| Some(status.nbd.as_ref()?.uri.clone())).unwrap_or_default(),
        volumes,
    }
}

/// What the owner of a volume says of its scrub.
pub fn scrub(volume: &VolumeStatus) -> Option<ObservedScrub> {
    let scrub = volume.scrub.as_ref()?;
    let counts = ScrubCounts { checked: scrub.checked, damaged: scrub.damaged, repaired: scrub.repaired };
    let state = match scrub.state.as_str() {
        "running" => ObservedScrubState::Running,
        "done" => ObservedScrubState::Done(counts),
        _ => ObservedScrubState::Failed { problem: scrub.error.clone() },
    };
    let (volume, epoch) = (VolumeId(volume.volume_id), Epoch(volume.epoch));
    Some(ObservedScrub { volume, epoch, task: TaskId(scrub.task_id), state })
}

/// The process of a volume that has ended.
pub fn gone_service(volume: VolumeId, epoch: Epoch, end: &ProcessEnd) -> ObservedService {
    ObservedService {
        volume,
        epoch,
        state: ProcessState::Gone,
        error: end.describe(),
        uri: String::new(),
        volumes: None,
    }
}

fn observed(vm: VmId, epoch: Epoch, state: ProcessState, volumes: Option<VolumesDigest>) -> ObservedVm {
    ObservedVm {
        vm,
        epoch,
        state,
        guest_exit: GuestExit::None,
        error: String::new(),
        certificate: None,
        migration: None,
        volumes,
    }
}

fn process_state(status: &MachineStatus) -> ProcessState {
    match status.state.as_str() {
        "starting" => ProcessState::Starting,
        "running" => ProcessState::Running,
        "paused" => ProcessState::Paused,
        "fenced" => ProcessState::Fenced,
        "incoming" => ProcessState::Incoming,
        "stopped" => ProcessState::Stopped,
        "failed" => ProcessState::Failed,
        // Before its configuration it is as good as just configured: both are carried on by a start.
        _ => ProcessState::Configured,
    }
}

fn guest_exit(word: &str) -> GuestExit {
    match word {
        "poweroff" => GuestExit::Poweroff,
        "reboot" => GuestExit::Reboot,
        "crash" => GuestExit::Crash,
        _ => GuestExit::None,
    }
}

/// 32 bytes, or none.
pub fn fingerprint(bytes: &[u8]) -> Option<CertificateFingerprint> {
    bytes.try_into().ok().map(CertificateFingerprint)
}

fn migration(state: &MigrationState) -> Option<ObservedMigration> {
    let migration = MigrationId(state.migration_id);
    let error = state.error.clone();
    match state.role.as_str() {
        "source" => Some(ObservedMigration::Source {
            migration,
            phase: source_phase(&state.phase),
            error,
            last_sequences: state.last_sequences.iter().map(last_sequence).collect(),
            record: state.record.as_ref().map(|record| Box::new(views::record_of_message(record))),
        }),
        "target" => Some(ObservedMigration::Target { migration, phase: target_phase(&state.phase), error }),
        _ => None,
    }
}

fn last_sequence(last: &proto::v1::VolumeSequence) -> LastSequence {
    LastSequence { volume: VolumeId(last.volume_id), sequence: Sequence(last.sequence) }
}

fn source_phase(word: &str) -> SourcePhase {
    match word {
        "paused" => SourcePhase::Paused,
        "commit-proposed" => SourcePhase::CommitProposed,
        "committed" => SourcePhase::Committed,
        "done" => SourcePhase::Done,
        // A source that could not resume has given up as well; its run state says that it failed.
        "aborted" | "lost" => SourcePhase::Aborted,
        _ => SourcePhase::Copying,
    }
}

fn target_phase(word: &str) -> TargetPhase {
    match word {
        "receiving" => TargetPhase::Receiving,
        "ready" => TargetPhase::Ready,
        "activating" => TargetPhase::Activating,
        "filling" => TargetPhase::Filling,
        "starved" => TargetPhase::Starved,
        "resumed" => TargetPhase::Resumed,
        "failed" => TargetPhase::Failed,
        _ => TargetPhase::Listening,
    }
}

/// Whether the process's part in its migration is over.
pub fn is_final(state: &MigrationState) -> bool {
    matches!(state.phase.as_str(), "" | "done" | "aborted" | "lost" | "resumed" | "failed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::ProcessKey;
    use proto::v1::VolumeSequence;

    const KEY: ProcessKey = ProcessKey::vm(VmId(7), Epoch(2));

    fn view(status: Option<MachineStatus>) -> ProcessView {
        ProcessView { key: KEY, pid: 1, status, responsive: true, ending: false }
    }

    #[test]
    fn a_process_that_never_answered_counts_as_starting() {
        assert_eq!(present(VmId(7), &view(None), None).state, ProcessState::Starting);
    }

    #[test]
    fn a_paused_source_carries_its_last_sequences() {
        let status = MachineStatus {
            state: "paused".to_owned(),
            migration: Some(MigrationState {
                migration_id: 9,
                phase: "paused".to_owned(),
                role: "source".to_owned(),
                last_sequences: vec![VolumeSequence { volume_id: 3, sequence: 44 }],
                ..MigrationState::default()
            }),
            ..MachineStatus::default()
        };
        let observed = present(VmId(7), &view(Some(status)), None);
        assert_eq!(observed.state, ProcessState::Paused);
        let Some(ObservedMigration::Source { migration, phase, last_sequences, .. }) = observed.migration
        else {
            panic!("no source: {:?}", observed.migration);
        };
        assert_eq!((migration, phase), (MigrationId(9), SourcePhase::Paused));
        assert_eq!(last_sequences, vec![LastSequence { volume: VolumeId(3), sequence: Sequence(44) }]);
    }

    #[test]
    fn a_fingerprint_of_another_length_is_none() {
        assert_eq!(fingerprint(&[1; 32]), Some(CertificateFingerprint([1; 32])));
        assert_eq!(fingerprint(&[1; 31]), None);
    }
}
