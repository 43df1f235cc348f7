//! Settings, levels, the certificate authority, access tokens.

use crate::{
    Command,
    command::{Govern, NewCa, PoolChange},
    fixture::Pool,
    planner::{LeaderView, plan},
    state::{Role, StopMode},
};
use proto::HostId;

fn version(host: HostId, feature_level: u32) -> Command {
    Command::Govern(Govern::SetHostVersion { host, version: format!("0.{feature_level}.0"), feature_level })
}

fn raise(level: u32) -> Command {
    Command::Govern(Govern::RaiseFeatureLevel { level })
}

/// A pool of daemons that all support level 2.
fn pool(hosts: usize) -> Pool {
    let mut pool = Pool::new(hosts);
    for host in pool.hosts() {
        pool.accept(version(host, 2));
    }
    pool.plan();
    pool
}

fn set(change: PoolChange) -> Command {
    Command::Govern(Govern::SetPool(change))
}

#[test]
fn the_level_rises_by_one_entry_when_the_last_host_supports_it_and_never_goes_back() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let named = PoolChange { name: Some("other".into()), ..PoolChange::default() };
    for host in &hosts[..2] {
        pool.accept(version(*host, 2));
        assert_eq!(plan(&pool.state, &LeaderView { now_ms: pool.now_ms }), [], "one is behind");
        assert_eq!(pool.reject(raise(2)), "LEVEL_UNSUPPORTED");
        assert_eq!(pool.reject(set(named.clone())), "LEVEL_TOO_LOW", "an old daemon would not know it");
    }
    // The last one is lost: it may return with its old version.
    pool.accept(Command::HostLost { host: hosts[2] });
    assert!(!pool.plan().contains(&raise(2)));
    pool.accept(Command::HostReturned { host: hosts[2] });
    pool.accept(version(hosts[2], 2));
    assert_eq!(pool.plan(), [raise(2)]);
    assert_eq!(pool.plan(), [], "once");
    pool.accept(set(named));
    assert_eq!(pool.reject(raise(1)), "LEVEL_REACHED");
    assert_eq!(pool.reject(version(hosts[0], 1)), "FEATURE_LEVEL_TOO_LOW", "the way back is closed");
}

#[test]
fn settings_change_what_is_created_from_then_on() {
    let mut pool = pool(3);
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
    let mut pool = pool(2);
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
    let mut pool = pool(1);
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
