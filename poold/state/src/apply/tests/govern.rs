//! Settings, levels, the certificate authority, access tokens.

use crate::{
    Command,
    command::{ClusterCommand, Govern, JoinHost, NewCa, PoolChange, VolumeCommand},
    features::{NEWEST, OLDEST},
    fixture::Pool,
    limits::SCRUB_INTERVAL_MS,
    planner::{LeaderView, plan},
    state::{Copies, DiskCloning, HaPolicy, Role, StopMode, StoreSpace},
};
use proto::{ByteCount, CpuProfile, HostId, MigrationId};

fn version(host: HostId, feature_level: u32) -> Command {
    Command::Govern(Govern::SetHostVersion { host, version: format!("0.{feature_level}.0"), feature_level })
}

fn raise(level: u32) -> Command {
    Command::Govern(Govern::RaiseFeatureLevel { level })
}

fn set(change: PoolChange) -> Command {
    Command::Govern(Govern::SetPool(change))
}

/// Something that only daemons of the newest level know.
fn newest() -> Command {
    ClusterCommand::CreateCluster { name: "other".into(), cpu_profile: CpuProfile::Host }.into()
}

#[test]
fn the_level_rises_by_one_entry_when_the_last_host_supports_it_and_never_goes_back() {
    let mut pool = Pool::at_level(3, OLDEST);
    let hosts = pool.hosts();
    for host in &hosts[..2] {
        pool.accept(version(*host, NEWEST));
        assert_eq!(plan(&pool.state, &LeaderView::at(pool.now_ms)), [], "one is behind");
        assert_eq!(pool.reject(raise(NEWEST)), "LEVEL_UNSUPPORTED");
        assert_eq!(pool.reject(newest()), "LEVEL_TOO_LOW", "an old daemon would not know it");
    }
    // The last one is lost: it may return with its old version.
    pool.accept(Command::HostLost { host: hosts[2] });
    assert!(!pool.plan().contains(&raise(NEWEST)));
    pool.accept(Command::HostReturned { host: hosts[2] });
    pool.accept(version(hosts[2], NEWEST));
    assert_eq!(pool.plan(), [raise(NEWEST)]);
    assert_eq!(pool.plan(), [], "once");
    pool.accept(newest());
    assert_eq!(pool.reject(raise(OLDEST)), "LEVEL_REACHED");
    assert_eq!(pool.reject(version(hosts[0], OLDEST)), "FEATURE_LEVEL_TOO_LOW", "the way back is closed");
}

#[test]
fn what_a_level_has_brought_is_refused_below_it_with_the_way_out() {
    let mut pool = Pool::at_level(3, OLDEST);
    let volume = pool.volume("data");
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let host = pool.hosts()[0];
    let scrubs = PoolChange { scrub_interval_ms: Some(0), ..PoolChange::default() };
    let migration = MigrationId(9);
    let new: [Command; 8] = [
        Command::BeginMigration { migration },
        newest(),
        VolumeCommand::TakeSnapshot { volume, name: "s".into() }.into(),
        VolumeCommand::ScrubVolume { volume, replica: None, bytes_per_s: None }.into(),
        Command::CloneVm { vm, name: "web2".into(), disks: DiskCloning::Linked },
        Command::RetireHost { host, copies: Copies::AsMany },
        Command::SetHostStore { host, store: StoreSpace { used: ByteCount(1), capacity: ByteCount(2) } },
        set(scrubs),
    ];
    for command in new {
        let refused = pool.apply(command.clone()).expect_err("daemons of the older version are in the pool");
        assert_eq!(refused.reason_code(), "LEVEL_TOO_LOW", "{command:?}");
        assert!(refused.remedy().contains("poolctl upgrade status"), "{}", refused.remedy());
    }
    // The leader does not propose what would be refused, and what older versions know works on.
    pool.now_ms += SCRUB_INTERVAL_MS + 1;
    assert_eq!(pool.plan(), []);
    pool.accept(set(PoolChange { replicas_default: Some(2), ..PoolChange::default() }));
    pool.start(vm, None);
}

#[test]
fn a_member_comes_with_another_key_once_and_only_with_its_own_token() {
    let mut pool = Pool::new(2);
    let host = pool.hosts()[1];
    let token = |secret: u8, ttl_ms| {
        Command::Govern(Govern::CreateKeyToken { host, secret_hash: [secret; 32], ttl_ms })
    };
    let replace = |secret: u8, key: u8| {
        Command::Govern(Govern::ReplaceHostKey { host, secret_hash: [secret; 32], public_key: vec![key; 44] })
    };
    pool.accept(Command::CreateToken { secret_hash: [70; 32], ttl_ms: 1_000 });
    assert_eq!(pool.reject(replace(70, 9)), "TOKEN_FOR_NEW_HOST");
    assert_eq!(pool.reject(replace(71, 9)), "TOKEN_UNKNOWN");
    pool.accept(token(71, 1_000));
    let join = JoinHost { secret_hash: [71; 32], facts: crate::fixture::facts(3) };
    assert_eq!(pool.reject(Command::JoinHost(join)), "TOKEN_FOR_KEY");
    assert_eq!(pool.reject(replace(71, 1)), "KEY_IN_USE", "the first host's");
    let other =
        Govern::ReplaceHostKey { host: pool.hosts()[0], secret_hash: [71; 32], public_key: vec![9; 44] };
    assert_eq!(pool.reject(Command::Govern(other)), "TOKEN_FOR_KEY", "of another host");
    pool.accept(replace(71, 9));
    assert_eq!(pool.state.host(host).expect("a member").public_key, vec![9; 44]);
    pool.accept(replace(71, 9));
    assert_eq!(pool.reject(replace(71, 8)), "TOKEN_USED");
    pool.accept(token(72, 1_000));
    pool.now_ms += 1_000;
    assert_eq!(pool.reject(replace(72, 8)), "TOKEN_EXPIRED");
}

#[test]
fn settings_change_what_is_created_from_then_on() {
    let mut pool = Pool::new(3);
    let before = pool.volume("before");
    pool.accept(set(PoolChange { replicas_default: Some(2), ..PoolChange::default() }));
    let after = pool.volume("after");
    let replicas = |volume| pool.state.volume(volume).expect("it was created").replicas.len();
    assert_eq!((replicas(before), replicas(after)), (3, 2));
    for bad in [
        PoolChange { replicas_default: Some(0), ..PoolChange::default() },
        PoolChange { replicas_default: Some(6), ..PoolChange::default() },
        PoolChange { cpu_overcommit: Some(0), ..PoolChange::default() },
        PoolChange { cpu_overcommit: Some(65), ..PoolChange::default() },
    ] {
        assert_eq!(pool.reject(set(bad)), "OUT_OF_RANGE");
    }
    assert_eq!(
        pool.reject(set(PoolChange { name: Some("a b".into()), ..PoolChange::default() })),
        "BAD_NAME"
    );
}

#[test]
fn the_old_authority_goes_when_the_last_host_shows_the_new_one() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let finish = || Command::Govern(Govern::FinishCaRotation);
    let new = |number: u32| {
        let cert_pem = format!("certificate {number}");
        Command::Govern(Govern::RotateCa(Box::new(NewCa {
            cert_pem,
            key_pem: "key".into(),
            cross_pem: "cross".into(),
        })))
    };
    assert_eq!(pool.reject(finish()), "NO_CA_ROTATION");
    let old = pool.state.settings.ca_cert_pem.clone();
    pool.accept(new(2));
    assert_eq!(pool.reject(new(3)), "CA_ROTATION_RUNS");
    let trusted = pool.state.settings.trusted_pem();
    assert!(trusted.contains("certificate 2") && trusted.contains(&old), "{trusted}");
    let trusts = |host, ca| Command::Govern(Govern::HostTrusts { host, ca });
    let ca = pool.state.settings.ca_hash();
    assert_eq!(pool.reject(finish()), "OLD_CERTIFICATE");
    pool.accept(trusts(hosts[0], ca));
    pool.accept(trusts(hosts[1], [9; 32]));
    assert_eq!(pool.reject(finish()), "OLD_CERTIFICATE");
    pool.accept(trusts(hosts[1], ca));
    pool.accept(finish());
    assert_eq!(pool.state.settings.trusted_pem().trim_end(), "certificate 2");
}

#[test]
fn an_access_token_can_do_no_more_than_its_user_and_not_for_ever() {
    let mut pool = Pool::new(1);
    let token = |role, secret: u8, ttl_ms| {
        let user = "ann".to_owned();
        Command::Govern(Govern::CreateAccessToken { user, role, secret_hash: [secret; 32], ttl_ms })
    };
    assert_eq!(pool.reject(token(Role::Viewer, 1, 1_000)), "USER_NOT_FOUND");
    pool.accept(Command::CreateUser { name: "ann".into(), role: Role::Operator, key_hash: [1; 32] });
    assert_eq!(pool.reject(token(Role::Admin, 1, 1_000)), "ROLE_TOO_HIGH");
    assert_eq!(pool.reject(token(Role::Viewer, 1, 0)), "OUT_OF_RANGE");
    pool.accept(token(Role::Operator, 1, 1_000));
    pool.accept(token(Role::Viewer, 2, 5_000));
    let may = |pool: &Pool, secret: u8, now_ms| {
        pool.state.access_token(&[secret; 32], now_ms).map(|(_, role)| role)
    };
    let now_ms = pool.now_ms;
    assert_eq!(may(&pool, 1, now_ms), Some(Role::Operator));
    assert_eq!(may(&pool, 2, now_ms), Some(Role::Viewer));
    assert_eq!(may(&pool, 3, now_ms), None);
    assert_eq!(may(&pool, 1, now_ms + 1_000), None, "expired");
    pool.accept(Command::SetUserRole { name: "ann".into(), role: Role::Viewer });
    assert_eq!(may(&pool, 1, now_ms), Some(Role::Viewer), "its user has less now");
    let first = *pool.state.access_tokens.keys().next().expect("there are two");
    pool.accept(Command::Govern(Govern::DeleteAccessToken { token: first }));
    assert_eq!(may(&pool, 1, now_ms), None, "revoked");
    assert_eq!(pool.reject(Command::Govern(Govern::DeleteAccessToken { token: first })), "TOKEN_NOT_FOUND");
    pool.accept(Command::DeleteUser { name: "ann".into() });
    assert_eq!(may(&pool, 2, now_ms), None);
    assert!(pool.state.access_tokens.is_empty(), "nobody's tokens are kept");
}

#[test]
fn a_vm_that_runs_is_not_deleted_and_the_operator_learns_how() {
    let mut pool = Pool::new(1);
    let vm = pool.running_vm("web", pool.hosts()[0], crate::state::HaPolicy::Restart);
    let refused = pool.apply(Command::DeleteVm { vm }).expect_err("it runs");
    assert!(refused.remedy().contains("poolctl vm stop web"), "{}", refused.remedy());
    pool.accept(Command::StopVm { vm, mode: StopMode::Force });
    assert_eq!(pool.reject(Command::DeleteVm { vm }), "VM_NOT_STOPPED");
}
