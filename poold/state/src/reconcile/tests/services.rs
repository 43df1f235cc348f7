//! Processes of volumes without a VM.

use super::*;
use crate::command::ServiceEnd;
use crate::command::VolumeCommand;
use crate::{command::LoanEnd, state::LoanKey};
use proto::{ByteCount, VolumeId};
use std::collections::BTreeSet;

/// The loan that the daemon works on.
const KEY: LoanKey = LoanKey(7);

fn observed(pool: &Pool, volume: VolumeId, state: ProcessState) -> ObservedService {
    ObservedService {
        volume,
        epoch: pool.state.volume(volume).unwrap().epoch,
        state,
        error: "why".into(),
        uri: "nbd://x/data".into(),
        volumes: Some(VolumesDigest::of_volumes(&pool.state, &[volume])),
    }
}

fn acts(pool: &Pool, me: HostId, observed: &[ObservedService]) -> Vec<HostAction> {
    reconcile_services(&pool.state, me, pool.now_ms, observed, &BTreeSet::from([KEY]))
}

#[test]
fn a_service_is_opened_reported_updated_closed_and_cleaned_up() {
    let mut pool = Pool::new(2);
    let (volume, me) = (pool.volume("data"), pool.hosts()[0]);
    let listen = "127.0.0.1:10809".parse().unwrap();
    pool.accept(Command::Volume(VolumeCommand::ServeVolume { volume, host: me, listen }));
    let epoch = pool.state.volume(volume).unwrap().epoch;
    let open = HostAction::OpenService { volume, epoch };
    assert_eq!(acts(&pool, me, &[]), std::slice::from_ref(&open));
    assert_eq!(acts(&pool, pool.hosts()[1], &[]), []);
    assert_eq!(acts(&pool, me, &[observed(&pool, volume, ProcessState::Configured)]), [open]);
    assert_eq!(acts(&pool, me, &[observed(&pool, volume, ProcessState::Starting)]), []);
    let running = observed(&pool, volume, ProcessState::Running);
    let serving = Command::Volume(VolumeCommand::VolumeServing { volume, epoch, uri: "nbd://x/data".into() });
    assert_eq!(acts(&pool, me, std::slice::from_ref(&running)), [HostAction::Report(serving.clone())]);
    pool.accept(serving);
    assert_eq!(acts(&pool, me, std::slice::from_ref(&running)), []);
    let unknown = ObservedService { volumes: None, ..running.clone() };
    let digest = VolumesDigest::of_volumes(&pool.state, &[volume]);
    assert_eq!(acts(&pool, me, &[unknown]), [HostAction::UpdateService { volume, digest }]);

    let ended =
        |end| HostAction::Report(Command::Volume(VolumeCommand::VolumeServiceEnded { volume, epoch, end }));
    let gone = observed(&pool, volume, ProcessState::Gone);
    let died = ended(ServiceEnd::Died { problem: "why".into() });
    assert_eq!(acts(&pool, me, std::slice::from_ref(&gone)), [died]);
    let vanished = ended(ServiceEnd::Died { problem: "its process is gone".into() });
    assert_eq!(acts(&pool, me, &[]), [vanished], "an epoch is never started twice");
    pool.accept(Command::Volume(VolumeCommand::StopServingVolume { volume }));
    assert_eq!(acts(&pool, me, &[running]), [HostAction::CloseService { volume, epoch }]);
    let closed = ended(ServiceEnd::Closed);
    assert_eq!(acts(&pool, me, std::slice::from_ref(&gone)), std::slice::from_ref(&closed));
    let HostAction::Report(report) = closed else { panic!("it is a report") };
    pool.accept(report);
    assert_eq!(acts(&pool, me, &[gone]), [HostAction::DestroyService { volume, epoch }]);
}

#[test]
fn a_loan_that_the_daemon_does_not_know_is_ended() {
    let mut pool = Pool::new(1);
    let me = pool.hosts()[0];
    let import = |name: &str, key| {
        Command::Volume(VolumeCommand::ImportVolume {
            name: name.into(),
            size: ByteCount(1 << 20),
            replicas: None,
            host: me,
            key,
        })
    };
    pool.accept(import("known", KEY));
    let reports = |pool: &Pool| {
        let is_report = |action: &HostAction| matches!(action, HostAction::Report(_));
        acts(pool, me, &[]).into_iter().filter(is_report).collect::<Vec<_>>()
    };
    assert_eq!(reports(&pool), []);
    let key = LoanKey(8);
    let crate::Outcome::Volume(volume) = pool.accept(import("forgotten", key)) else { panic!("a volume") };
    let end = LoanEnd::Failed { problem: "the daemon that worked on it was restarted".into() };
    let report = Command::Volume(VolumeCommand::EndLoan { volume, key, end });
    assert_eq!(reports(&pool), [HostAction::Report(report.clone())]);
    pool.accept(report);
    assert!(pool.state.volume(volume).is_err(), "an import that did not succeed leaves nothing");
}
