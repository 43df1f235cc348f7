//! Random commands: whatever comes, the invariants hold, a rejection changes nothing, and replicas agree.

use crate::command::VolumeCommand;
use crate::{
    Command, Entry, PoolState,
    command::{
        CreateGroup, IsrChange, LastSequence, LoanEnd, RemoveMode, RestartCause, ScrubEnd, ServiceEnd,
        StopReason, VolumeStart,
    },
    features,
    fixture::{Pool, endpoint, incarnation},
    form,
    planner::{LeaderView, plan},
    state::{
        CertificateFingerprint, Copies, DiskCloning, GroupRule, GroupStrength, HaPolicy, LoanKey,
        MigrationOptions, MoveCause, Position, ScrubCounts, StopMode, StoreSpace,
    },
};
use proptest::prelude::*;
use proto::{
    ByteCount, Epoch, HostId, IsrVersion, MigrationId, Sequence, SnapshotId, TaskId, VmId, VolumeId,
};

/// Numbers from which a command is made: the kind, and choices among what exists. Choices beyond it name nothing.
type Roll = (u8, u8, u8, u8);

fn pick<T: Copy>(items: &[T], choice: u8, missing: T) -> T {
    // One in sixteen names something that does not exist.
    if choice % 16 == 15 || items.is_empty() { missing } else { items[choice as usize % items.len()] }
}

fn last_of<T: Copy>(items: &[T], choice: u8, missing: T) -> T {
    // Mostly the newest: old ones have ended and only give rejections.
    if choice % 4 == 3 { pick(items, choice / 4, missing) } else { items.last().copied().unwrap_or(missing) }
}

fn command(pool: &Pool, (kind, a, b, c): Roll) -> Command {
    let state = &pool.state;
    let host = pick(&state.hosts.keys().copied().collect::<Vec<_>>(), a, HostId(9_999));
    let other = pick(&state.hosts.keys().copied().collect::<Vec<_>>(), b, HostId(9_999));
    let vm = pick(&state.vms.keys().copied().collect::<Vec<_>>(), c, VmId(9_999));
    let volume = pick(&state.volumes.keys().copied().collect::<Vec<_>>(), c, VolumeId(9_999));
    let migration = last_of(&state.migrations.keys().copied().collect::<Vec<_>>(), c, MigrationId(9_999));
    let task = last_of(&state.tasks.keys().copied().collect::<Vec<_>>(), c, TaskId(9_999));
    let stale = u64::from(b.is_multiple_of(8));
    let epoch = state.vms.get(&vm).map_or(Epoch(0), |vm| Epoch(vm.epoch.0.saturating_sub(stale)));
    let ha = if a.is_multiple_of(4) { HaPolicy::None } else { HaPolicy::Restart };
    let mode = if a.is_multiple_of(2) { StopMode::Clean } else { StopMode::Force };
    match kind % 47 {
        0 => Command::CreateVolume {
            name: format!("v{c}"),
            size: ByteCount(1 << 30),
            replicas: (a < 128).then(|| u32::from(b % 4)),
        },
        1 => pool.create_vm(&format!("m{c}"), if b < 200 { vec![volume] } else { vec![] }, ha),
        2 => Command::DeleteVm { vm },
        3 => Command::DeleteVolume { volume },
        4 | 5 => Command::StartVm { vm, host: (a < 128).then_some(host) },
        6 if b < 64 => Command::RebootVm { vm, mode },
        6 => Command::StopVm { vm, mode },
        7 => Command::PauseVm { vm },
        8 => Command::ResumeVm { vm },
        9 | 10 => Command::VmRunning { vm, epoch },
        11 => Command::VmStopped {
            vm,
            epoch,
            reason: if a < 128 { StopReason::Poweroff } else { StopReason::Crash },
        },
        12 => Command::VmFailed { vm, epoch, problem: "it broke".into() },
        13 => Command::RestartVm { vm, expect_epoch: epoch, cause: RestartCause::ProcessDied },
        14 => Command::RecoverVm { vm, expect_epoch: epoch, host },
        15 => Command::StartMigration {
            vm,
            target: (a < 128).then_some(host),
            options: MigrationOptions::default(),
        },
        16 => Command::MigrationSourceReady { migration, fingerprint: CertificateFingerprint([a; 32]) },
        17 => Command::MigrationPrepared { migration, endpoint: endpoint() },
        18 => Command::MigrationCopying { migration },
        19 => last_sequences(pool, migration, b),
        20 => Command::MigrationDone { migration, record: None },
        21 if a < 64 => Command::MigrationAbort { migration, reason: "broken".into() },
        21 if a < 160 => Command::MigrationReclaim { migration },
        21 => Command::CancelMigration { migration },
        22 if a < 128 => Command::CancelTask { task },
        22 => Command::ExpireTask { task },
        23 => Command::HostLost { host },
        24 | 25 => Command::HostReturned { host },
        26 => isr_change(pool, volume, host, a, b),
        27 if a < 40 => Command::RemoveHost {
            host: other,
            mode: if b < 128 { RemoveMode::Drained } else { RemoveMode::ConfirmDead },
        },
        27 => Command::RecordVolumeStart {
            volume,
            start: VolumeStart {
                epoch: state.volumes.get(&volume).map(|volume| volume.epoch).unwrap_or_default(),
                start_seq: Sequence(u64::from(b)),
            },
        },
        28..47 if kind % 47 != 34 || a < 100 => of_service(pool, (kind, a, b, c)),
        _ if a < 120 => Command::SetBrake,
        _ => Command::HaResume,
    }
}

/// Commands about hosts in service, moves of the pool, and groups.
fn of_service(pool: &Pool, (kind, a, b, c): Roll) -> Command {
    let state = &pool.state;
    let host = pick(&state.hosts.keys().copied().collect::<Vec<_>>(), a, HostId(9_999));
    let other = pick(&state.hosts.keys().copied().collect::<Vec<_>>(), b, HostId(9_999));
    let vm = pick(&state.vms.keys().copied().collect::<Vec<_>>(), c, VmId(9_999));
    let task = last_of(&state.tasks.keys().copied().collect::<Vec<_>>(), c, TaskId(9_999));
    match kind % 47 {
        28 => Command::CordonHost { host },
        29 => Command::UncordonHost { host },
        30 if a < 40 => {
            Command::RetireHost { host, copies: if b < 128 { Copies::AsMany } else { Copies::MayBeFewer } }
        }
        30 if a < 80 => {
            let (used, capacity) = (ByteCount(u64::from(b)), ByteCount(255));
            Command::SetHostStore { host, store: StoreSpace { used, capacity } }
        }
        30 => Command::DrainHost { host },
        31 => Command::RestoreHost { host },
        32 if a < 32 => Command::ConfirmDead { host },
        32 if a < 128 => Command::StartBalance,
        32 => Command::FinishTask { task },
        33 => Command::MoveVm {
            vm,
            target: host,
            cause: [MoveCause::Drain, MoveCause::Restore, MoveCause::Balance][usize::from(b % 3)],
        },
        34 => group(pool, vm, other, b),
        _ => of_volume_service(pool, host, (kind, a, b, c)),
    }
}

/// Commands about processes of volumes without a VM.
fn of_volume_service(pool: &Pool, host: HostId, (kind, a, b, c): Roll) -> Command {
    let volumes = &pool.state.volumes;
    let volume = pick(&volumes.keys().copied().collect::<Vec<_>>(), c, VolumeId(9_999));
    let stale = u64::from(b.is_multiple_of(8));
    let epoch = volumes.get(&volume).map_or(0, |volume| volume.epoch.0);
    let epoch = Epoch(epoch.saturating_sub(stale));
    match kind % 47 {
        35 => Command::Volume(VolumeCommand::ServeVolume {
            volume,
            host,
            listen: "127.0.0.1:1".parse().expect("an address"),
        }),
        36 => Command::Volume(VolumeCommand::StopServingVolume { volume }),
        37 => Command::Volume(VolumeCommand::VolumeServing { volume, epoch, uri: String::new() }),
        39 => {
            let replaces = volumes.get(&volume).and_then(|volume| volume.replicas.first().copied());
            Command::Volume(VolumeCommand::PlaceReplica {
                volume,
                host,
                replaces: replaces.filter(|_| a < 128),
            })
        }
        41..=43 => of_snapshot(pool, volume, (kind, a, b, c)),
        44..=46 => of_copy(pool, (kind, a, b, c)),
        38 if b < 60 => Command::Volume(VolumeCommand::ImportVolume {
            name: format!("i{c}"),
            size: ByteCount(1 << 20),
            replicas: None,
            host,
            key: LoanKey(1),
        }),
        38 if b < 90 => Command::Volume(VolumeCommand::ExportVolume { volume, host, key: LoanKey(1) }),
        38 if b < 120 => {
            let loan = volumes.get(&volume).and_then(|volume| volume.service.as_ref()?.loan);
            let key = loan.map_or(LoanKey(1), |loan| loan.key);
            let failed = LoanEnd::Failed { problem: "it broke".into() };
            Command::Volume(VolumeCommand::EndLoan {
                volume,
                key,
                end: if a < 128 { LoanEnd::Done } else { failed },
            })
        }
        40 if a < 100 => Command::Volume(VolumeCommand::WorkOnVolume { volume, host }),
        40 if a < 180 => Command::Volume(VolumeCommand::FinishVolumeWork { volume }),
        40 if a < 200 => Command::Volume(VolumeCommand::DropReplica { volume, host }),
        40 if b < 60 => {
            Command::Volume(VolumeCommand::ScrubVolume { volume, replica: None, bytes_per_s: None })
        }
        40 if b < 120 => {
            let scrub = pool.state.volumes.get(&volume).and_then(|volume| volume.scrub);
            let task = scrub.map_or(TaskId(9_999), |scrub| scrub.task);
            let counts = ScrubCounts { checked: 9, damaged: u64::from(b % 3), repaired: 1 };
            let failed = ScrubEnd::Failed { problem: "it broke".into() };
            let end = if b % 2 == 0 { ScrubEnd::Done(counts) } else { failed };
            Command::Volume(VolumeCommand::VolumeScrubbed { volume, epoch, task, end })
        }
        40 => Command::Volume(VolumeCommand::ResizeVolume { volume, size: ByteCount(u64::from(b) << 24) }),
        _ => {
            let problem = "it broke".to_owned();
            let ends = [
                ServiceEnd::Closed,
                ServiceEnd::Died { problem: problem.clone() },
                ServiceEnd::Failed { problem },
            ];
            Command::Volume(VolumeCommand::VolumeServiceEnded {
                volume,
                epoch,
                end: ends[usize::from(a % 3)].clone(),
            })
        }
    }
}

/// Commands about snapshots.
fn of_snapshot(pool: &Pool, volume: VolumeId, (kind, a, b, c): Roll) -> Command {
    let state = &pool.state;
    let snapshot = pick(&state.snapshots.keys().copied().collect::<Vec<_>>(), c, SnapshotId(9_999));
    let with_work = state.volumes.values().filter_map(|volume| Some((volume, state.work_for(volume)?)));
    let pending = with_work.map(|(volume, work)| (volume.id, volume.epoch, work)).next_back();
    match (kind % 47, pending) {
        (41, _) if a < 200 => Command::Volume(VolumeCommand::TakeSnapshot { volume, name: format!("s{b}") }),
        (41, _) => Command::Volume(VolumeCommand::RevertVolume { snapshot }),
        (42, _) if a < 128 => Command::Volume(VolumeCommand::DeleteSnapshot { snapshot }),
        (42, _) => Command::Volume(VolumeCommand::CloneVolume { snapshot, name: format!("c{b}") }),
        (_, Some((volume, epoch, work))) if a < 200 => {
            Command::Volume(VolumeCommand::VolumeWorkDone { volume, epoch, work, at: Position::default() })
        }
        (_, Some((volume, epoch, work))) => Command::Volume(VolumeCommand::VolumeWorkFailed {
            volume,
            epoch,
            work,
            problem: "it broke".into(),
        }),
        (_, None) => Command::Volume(VolumeCommand::DeleteSnapshot { snapshot }),
    }
}

/// Commands about copies of VMs and of snapshots.
fn of_copy(pool: &Pool, (kind, a, b, c): Roll) -> Command {
    let state = &pool.state;
    let vm = pick(&state.vms.keys().copied().collect::<Vec<_>>(), c, VmId(9_999));
    let task = pick(&state.clonings.keys().copied().collect::<Vec<_>>(), a, TaskId(9_999));
    let snapshot = pick(&state.snapshots.keys().copied().collect::<Vec<_>>(), c, SnapshotId(9_999));
    match kind % 47 {
        44 => {
            let disks = if a < 128 { DiskCloning::Linked } else { DiskCloning::Full };
            Command::CloneVm { vm, name: format!("m{b}"), disks }
        }
        45 if a < 240 => Command::StepVmClone { task },
        45 => Command::CancelTask { task },
        _ => Command::Volume(VolumeCommand::CopySnapshot { snapshot, name: format!("f{b}"), replicas: None }),
    }
}

fn group(pool: &Pool, vm: VmId, host: HostId, choice: u8) -> Command {
    let rule = [GroupRule::Together, GroupRule::Apart, GroupRule::OnHosts, GroupRule::NotOnHosts]
        [usize::from(choice % 4)];
    let strength = if choice < 128 { GroupStrength::Must } else { GroupStrength::Should };
    match pool.state.groups.keys().next_back() {
        Some(group) if choice.is_multiple_of(5) => Command::DeleteGroup { group: *group },
        _ => Command::CreateGroup(CreateGroup {
            name: format!("g{choice}"),
            rule,
            strength,
            vms: pool.state.vms.keys().copied().take(2).chain([vm]).collect(),
            hosts: if choice % 4 < 2 { vec![] } else { vec![host] },
        }),
    }
}

fn last_sequences(pool: &Pool, migration: MigrationId, choice: u8) -> Command {
    let vm = pool.state.migrations.get(&migration).and_then(|migration| pool.state.vms.get(&migration.vm));
    let disks = vm.map(|vm| vm.spec.disks.clone()).unwrap_or_default();
    let wrong = usize::from(choice.is_multiple_of(16));
    let last_sequences = disks
        .into_iter()
        .skip(wrong)
        .map(|volume| LastSequence { volume, sequence: Sequence(choice.into()) })
        .collect();
    Command::MigrationCommit { migration, last_sequences }
}

fn isr_change(pool: &Pool, volume: VolumeId, host: HostId, a: u8, b: u8) -> Command {
    let data = pool.state.volumes.get(&volume);
    let change = IsrChange {
        volume,
        epoch: data.map(|data| data.epoch).unwrap_or_default(),
        isr_version: data.map_or(IsrVersion(0), |data| data.isr_version),
        host,
        incarnation: incarnation(host, u32::from(a.is_multiple_of(8))),
    };
    if b < 128 { Command::RemoveFromIsr(change) } else { Command::AddToIsr(change) }
}

/// Everything that still runs comes to an end when the leader plans and time passes (I5).
fn run_out(pool: &mut Pool) {
    const ROUNDS_MAX: usize = 64;
    pool.accept(Command::HaResume);
    for _ in 0..ROUNDS_MAX {
        pool.now_ms += pool.state.settings.timing.migration_copy_ms;
        let view = LeaderView::at(pool.now_ms);
        let commands = plan(&pool.state, &view);
        // A task that waits for something is ended by its deadline, some rounds from now.
        let idle = pool.state.tasks.values().all(|task| !task.is_running());
        if commands.is_empty() && idle {
            break;
        }
        for command in commands {
            pool.accept(command);
        }
    }
    let running: Vec<_> = pool.state.tasks.values().filter(|task| task.is_running()).collect();
    assert!(running.is_empty(), "a task did not end: {running:?}");
    assert_eq!(pool.state.running_migrations().count(), 0, "a migration did not end");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_the_invariants_hold_and_replicas_agree(
        rolls in prop::collection::vec(any::<Roll>(), 1..250),
    ) {
        let mut pool = Pool::new(4);
        for number in 0..3 {
            pool.stopped_vm(&format!("first{number}"), HaPolicy::Restart);
        }
        let base = pool.state.clone();
        let mut log: Vec<Entry> = Vec::new();
        let mut boots = 0;
        for roll in rolls {
            pool.now_ms += u64::from(roll.3) * 100;
            if roll.0 == 255 {
                // A host that lost power comes back.
                boots += 1;
                let host = pick(&pool.hosts(), roll.1 & 7, pool.hosts()[0]);
                let before = pool.state.revision;
                let address = pool.state.host(host).expect("a member").address.clone();
                let update = Command::UpdateHost(crate::command::UpdateHost {
                    host,
                    incarnation: incarnation(host, boots),
                    replica_fingerprint: CertificateFingerprint([1; 32]),
                    boot_id: String::new(),
                    address,
                    vm_memory: ByteCount(1 << 30),
                });
                let entry = pool.entry(update);
                let _ = pool.apply_entry(&entry);
                prop_assert_eq!(pool.state.revision, before + 1);
                log.push(entry);
                continue;
            }
            let mut entry = pool.entry(command(&pool, roll));
            entry.request_id = (roll.1 < 64).then(|| format!("r{}", roll.2 % 32));
            let _ = pool.apply_entry(&entry);
            log.push(entry);
        }

        // A replica that restarted from a snapshot and replays the log from its encoded form.
        let write = |state: &PoolState| form::write(state, features::NEWEST, "test").expect("it is plain data");
        let read = |bytes: &[u8]| form::read::<PoolState>(bytes, features::NEWEST).expect("it was just written");
        let mut replica = read(&write(&base));
        for entry in &log {
            let entry = Entry::decode(&entry.encode().expect("it is small")).expect("it was just written");
            let _ = replica.apply(replica.revision + 1, &entry);
        }
        prop_assert_eq!(&replica, &pool.state);
        let snapshot = write(&pool.state);
        prop_assert_eq!(&snapshot, &write(&replica));
        prop_assert_eq!(&read(&snapshot), &pool.state);
        run_out(&mut pool);
    }
}
