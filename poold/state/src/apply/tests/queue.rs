//! Moves beyond the limits wait, in a fair order, and always end.

use crate::{
    Command,
    fixture::{HOST_MEMORY, Pool, incarnation},
    limits::{MOVE_QUEUED_MS, MOVES_IN_MAX, MOVES_OF_POOL_MAX, MOVES_OUT_MAX, MOVES_QUEUED_MAX},
    rejection::Rejection,
    state::{CertificateFingerprint, HaPolicy, Migration, MigrationOptions, MigrationPhase},
};
use proto::{ByteCount, HostId, MigrationId, VmId};

fn start(vm: VmId, target: Option<HostId>) -> Command {
    Command::StartMigration { vm, target, options: MigrationOptions::default() }
}

/// Hosts with room for every VM of a test.
fn roomy(hosts: usize) -> (Pool, Vec<HostId>) {
    let mut pool = Pool::new(hosts);
    let hosts = pool.hosts();
    for host in hosts.iter().copied() {
        pool.accept(Command::UpdateHost(crate::command::UpdateHost {
            host,
            incarnation: incarnation(host, 0),
            replica_fingerprint: CertificateFingerprint([1; 32]),
            boot_id: String::new(),
            address: format!("10.9.0.{}:1", host.0),
            vm_memory: ByteCount(HOST_MEMORY.0 * 10),
        }));
    }
    (pool, hosts)
}

fn vms(pool: &mut Pool, count: usize, host: HostId) -> Vec<VmId> {
    let first = pool.state.vms.len();
    (first..first + count)
        .map(|number| pool.running_vm(&format!("vm{number}"), host, HaPolicy::Restart))
        .collect()
}

/// As many moves from a host to another as it may send, and so many more.
fn crowd(pool: &mut Pool, (from, to): (HostId, HostId), more: usize) -> (Vec<MigrationId>, Vec<MigrationId>) {
    let vms = vms(pool, MOVES_OUT_MAX + more, from);
    let mut moves: Vec<_> = vms.iter().map(|vm| pool.start_migration(*vm, Some(to)).0).collect();
    let queued = moves.split_off(MOVES_OUT_MAX);
    (moves, queued)
}

fn phase(pool: &Pool, id: MigrationId) -> &'static str {
    pool.migration(id).phase.as_str()
}

fn waits_for(pool: &Pool, id: MigrationId) -> Option<&'static str> {
    pool.state.waits_for(pool.migration(id)).map(|limit| limit.reason_code())
}

#[test]
fn moves_beyond_the_limit_of_a_host_wait_and_begin_in_their_order() {
    let (mut pool, hosts) = roomy(3);
    let (moving, queued) = crowd(&mut pool, (hosts[0], hosts[1]), 3);
    assert!(moving.iter().all(|id| phase(&pool, *id) == "intent"));
    assert!(queued.iter().all(|id| phase(&pool, *id) == "queued"));
    assert_eq!(waits_for(&pool, queued[0]), Some("TOO_MANY_MOVES"));
    // It waits without being in anyone's way.
    let waiting = pool.migration(queued[0]).clone();
    assert_eq!((pool.vm_state(waiting.vm), waiting.reserves()), ("running", None));
    assert_eq!(pool.reject(start(waiting.vm, None)), "VM_IS_MIGRATING");
    let free = pool.state.free_memory(pool.state.host(hosts[1]).unwrap());
    assert_eq!(free, ByteCount(HOST_MEMORY.0 * 10 - 2 * 2 * crate::fixture::GIB));
    assert_eq!(pool.reject(Command::BeginMigration { migration: queued[0] }), "TOO_MANY_MOVES");
    assert!(pool.plan().is_empty(), "nothing has ended yet");
    pool.finish(moving[0]);
    assert_eq!(pool.reject(Command::BeginMigration { migration: queued[1] }), "TOO_MANY_MOVES");
    pool.plan();
    assert_eq!((phase(&pool, queued[0]), phase(&pool, queued[1])), ("intent", "queued"));
    assert_eq!(pool.reject(Command::BeginMigration { migration: queued[0] }), "WRONG_PHASE");
    pool.run_moves();
    for id in queued {
        assert_eq!((phase(&pool, id), pool.task_state(pool.migration(id).task)), ("done", "done"));
    }
}

#[test]
fn what_waits_holds_its_place_and_others_pass() {
    let (mut pool, hosts) = roomy(4);
    let (moving, queued) = crowd(&mut pool, (hosts[0], hosts[1]), 1);
    let [from_first, from_third, elsewhere] =
        [hosts[0], hosts[2], hosts[2]].map(|host| vms(&mut pool, 1, host)[0]);
    // The one that waits needs a place at both hosts. Were it passed at one of them whenever the other is full, it could wait for ever.
    let (young, _) = pool.start_migration(from_first, Some(hosts[3]));
    let (into, _) = pool.start_migration(from_third, Some(hosts[1]));
    assert_eq!((phase(&pool, young), phase(&pool, into)), ("queued", "queued"));
    assert_eq!(MOVES_IN_MAX, MOVES_OUT_MAX);
    let (other, _) = pool.start_migration(elsewhere, Some(hosts[3]));
    assert_eq!(phase(&pool, other), "intent", "it has nothing to do with these hosts");
    pool.accept(Command::CancelMigration { migration: moving[0] });
    pool.plan();
    assert_eq!(
        (phase(&pool, queued[0]), phase(&pool, young), phase(&pool, into)),
        ("intent", "queued", "queued")
    );
    pool.finish(moving[1]);
    pool.plan();
    assert_eq!((phase(&pool, young), phase(&pool, into)), ("intent", "intent"));
}

/// It waits for its target only, and keeps a place at its source meanwhile: younger ones get the rest.
#[test]
fn what_waits_at_one_host_keeps_its_place_at_the_other() {
    let (mut pool, hosts) = roomy(4);
    let (crowding, _) = crowd(&mut pool, (hosts[1], hosts[2]), 0);
    let waiting = vms(&mut pool, MOVES_OUT_MAX + 1, hosts[0]);
    let (old, _) = pool.start_migration(waiting[0], Some(hosts[2]));
    let young: Vec<_> = waiting[1..].iter().map(|vm| pool.start_migration(*vm, Some(hosts[3])).0).collect();
    let phases = |pool: &Pool| [old, young[0], young[1]].map(|id| phase(pool, id));
    assert_eq!(phases(&pool), ["queued", "intent", "queued"]);
    assert_eq!(pool.reject(Command::BeginMigration { migration: young[1] }), "TOO_MANY_MOVES");
    pool.finish(crowding[0]);
    pool.plan();
    assert_eq!(phases(&pool), ["intent", "intent", "queued"]);
}

#[test]
fn a_move_that_waits_can_be_cancelled_and_ends_with_its_vm_or_its_time() {
    let (mut pool, hosts) = roomy(3);
    let (_, queued) = crowd(&mut pool, (hosts[0], hosts[1]), 4);
    let [cancelled, stopped, failed, late] = queued[..] else { panic!("four wait") };
    let outcome = |pool: &Pool, id: MigrationId| {
        let migration = pool.migration(id);
        (migration.phase.as_str(), migration.outcome.as_str(), pool.task_state(migration.task))
    };
    pool.accept(Command::CancelMigration { migration: cancelled });
    assert_eq!(outcome(&pool, cancelled), ("aborted", "cancelled", "cancelled"));
    let vm = pool.migration(stopped).vm;
    pool.accept(Command::StopVm { vm, mode: crate::state::StopMode::Force });
    assert_eq!(outcome(&pool, stopped), ("aborted", "cancelled", "cancelled"));
    let (vm, epoch) = (pool.migration(failed).vm, pool.migration(failed).from_epoch);
    pool.accept(Command::VmFailed { vm, epoch, problem: "its process died".into() });
    assert_eq!(outcome(&pool, failed), ("aborted", "failed", "failed"));
    assert_eq!(outcome(&pool, late), ("queued", "running", "running"));
    pool.now_ms += MOVE_QUEUED_MS;
    pool.plan();
    assert_eq!(outcome(&pool, late), ("aborted", "failed", "failed"));
}

#[test]
fn a_move_that_waits_ends_with_the_host_that_was_named_and_finds_another_one_else() {
    let (mut pool, hosts) = roomy(3);
    let (moving, queued) = crowd(&mut pool, (hosts[0], hosts[1]), 1);
    let vm = vms(&mut pool, 1, hosts[0])[0];
    let (chosen, _) = pool.start_migration(vm, None);
    let first_choice = pool.migration(chosen).target;
    let other = *hosts[1..].iter().find(|host| **host != first_choice).unwrap();
    if first_choice == hosts[1] {
        pool.accept(Command::HostLost { host: hosts[1] });
        assert_eq!(pool.migration(queued[0]).outcome.as_str(), "failed", "its operator named that host");
    } else {
        pool.accept(Command::HostLost { host: first_choice });
        moving.iter().for_each(|id| _ = pool.accept(Command::CancelMigration { migration: *id }));
        pool.plan();
    }
    pool.plan();
    assert_eq!((phase(&pool, chosen), pool.migration(chosen).target), ("intent", other));
    // The host that they come from takes all of them along.
    let vm = vms(&mut pool, 1, hosts[0])[0];
    let _ = pool.apply(start(vm, Some(other)));
    pool.accept(Command::HostLost { host: hosts[0] });
    assert!(pool.state.running_migrations().all(|migration| migration.source != hosts[0]));
}

#[test]
fn a_move_that_its_vm_has_left_behind_is_refused_and_ended() {
    let (mut pool, hosts) = roomy(3);
    let (moving, queued) = crowd(&mut pool, (hosts[0], hosts[1]), 1);
    pool.accept(Command::CancelMigration { migration: moving[0] });
    // No entry does this: whatever gives a VM another epoch ends its moves. A daemon must not end on it all the same.
    let vm = pool.migration(queued[0]).vm;
    let mut state = pool.state.clone();
    let left = state.vms.get_mut(&vm).unwrap();
    left.epoch = left.epoch.next();
    left.running_epoch = Some(left.epoch);
    let begin = pool.entry(Command::BeginMigration { migration: queued[0] });
    let refused = state.apply(state.revision + 1, &begin).unwrap_err();
    assert_eq!(refused.reason_code(), "STALE_EPOCH");
    let plan = crate::planner::plan(&state, &crate::planner::LeaderView::at(pool.now_ms));
    assert!(
        matches!(plan[..], [Command::MigrationAbort { migration, .. }] if migration == queued[0]),
        "{plan:?}"
    );
}

#[test]
fn a_move_whose_turn_comes_too_late_says_what_is_in_its_way() {
    let (mut pool, hosts) = roomy(2);
    let (moving, queued) = crowd(&mut pool, (hosts[0], hosts[1]), 1);
    pool.accept(Command::CordonHost { host: hosts[1] });
    pool.accept(Command::CancelMigration { migration: moving[0] });
    pool.plan();
    let ended = pool.migration(queued[0]);
    let error = ended.error.clone().unwrap_or_default();
    assert_eq!((ended.phase, ended.outcome.as_str()), (MigrationPhase::Aborted, "failed"));
    assert!(error.contains("when its turn came") && error.contains("cordoned"), "{error}");
}

#[test]
fn a_pool_moves_a_bounded_number_of_vms_at_a_time_and_lets_a_bounded_number_wait() {
    let (mut pool, hosts) = roomy(3);
    let vm = vms(&mut pool, 1, hosts[0])[0];
    let (migration, _) = pool.start_migration(vm, Some(hosts[1]));
    let running = pool.migration(migration).clone();
    let last = vms(&mut pool, 1, hosts[2])[0];
    let insert = |pool: &mut Pool, number: u64, phase: MigrationPhase| {
        // Of hosts that have nothing to do with it.
        let (source, target) = (HostId(9_000 + number), HostId(9_500 + number));
        let id = MigrationId(5_000 + number);
        pool.state.migrations.insert(id, Migration { id, source, target, phase, ..running.clone() });
    };
    (0..MOVES_OF_POOL_MAX as u64).for_each(|number| insert(&mut pool, number, MigrationPhase::Copying));
    let exceeded = pool.state.check_moves(hosts[2], hosts[0]);
    assert_eq!(exceeded.iter().map(Rejection::reason_code).collect::<Vec<_>>(), ["POOL_TOO_MANY_MOVES"]);
    assert!(pool.state.migration_blockers(last, Some(hosts[0])).is_empty());
    (0..MOVES_QUEUED_MAX as u64).for_each(|number| insert(&mut pool, 100 + number, MigrationPhase::Queued));
    let entry = pool.entry(start(last, Some(hosts[0])));
    let refused = pool.state.apply(pool.state.revision + 1, &entry).unwrap_err();
    assert_eq!(refused.reason_code(), "MIGRATION_QUEUE_FULL");
}

/// Whatever is asked for in whatever order, each move gets its turn, and no host ever has more than it may.
#[test]
fn every_move_of_a_crowd_gets_its_turn() {
    let (mut pool, hosts) = roomy(4);
    let mut asked = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        for (number, vm) in vms(&mut pool, 5, *host).into_iter().enumerate() {
            let target = (number % 4 != 3).then(|| hosts[(index + 1 + number % 3) % 4]);
            asked.push(pool.start_migration(vm, target).0);
        }
    }
    for _ in 0..asked.len() {
        for host in &hosts {
            let at = |of: fn(&Migration) -> HostId| {
                let moving = pool.state.running_migrations().filter(|migration| migration.is_under_way());
                moving.filter(|migration| of(migration) == *host).count()
            };
            assert!(
                at(|migration| migration.source) <= MOVES_OUT_MAX
                    && at(|migration| migration.target) <= MOVES_IN_MAX
            );
        }
        let moving = pool.state.running_migrations().find(|migration| migration.is_under_way());
        let Some(moving) = moving.map(|migration| migration.id) else { break };
        pool.finish(moving);
        pool.plan();
    }
    assert!(
        asked.iter().all(|id| pool.migration(*id).outcome.as_str() == "done"),
        "{:?}",
        pool.state.migrations
    );
}
