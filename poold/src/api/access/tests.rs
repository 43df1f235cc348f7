//! The table: every call × every caller.

use super::{Access, Caller, PUBLIC, WHOLE, access_of, caller_of, permits};
use crate::identity::CertificateName;
use pool_state::state::Role;
use pool_state::{Command, Entry, PoolState, Seed, command::InitPool};
use std::collections::BTreeSet;

/// Service and method of every call.
fn calls() -> Vec<(String, String)> {
    let split = |path: String| {
        let (service, method) = path[1..].split_once('/').unwrap();
        (service.to_owned(), method.to_owned())
    };
    super::paths().into_iter().map(split).collect()
}

#[test]
fn every_call_is_in_the_table_and_nothing_else_is() {
    let all: BTreeSet<(String, String)> = calls().into_iter().collect();
    for (service, method) in &all {
        assert!(access_of(&format!("/{service}/{method}")).is_some(), "{service}/{method} is in no table");
    }
    for (service, methods) in PUBLIC {
        for (method, _) in *methods {
            assert!(all.contains(&((*service).to_owned(), (*method).to_owned())), "{service}/{method}");
        }
    }
    for path in ["/pool.v1.VmService/Fly", "/pool.v2.VmService/List", "pool.v1.VmService/List", "/", ""] {
        assert_eq!(access_of(path), None, "{path}");
    }
}

#[test]
fn each_role_may_do_what_its_name_says_and_no_more() {
    use Caller::{Host, Nobody, User, Void};
    for (service, method) in calls() {
        let access = access_of(&format!("/{service}/{method}")).unwrap();
        let may = |caller| permits(access, caller);
        let internal = WHOLE.iter().any(|(name, _)| *name == service);
        let joins = ["PreflightJoin", "Join", "ReplaceKey"].contains(&method.as_str());
        let name = format!("{service}/{method}");
        assert!(may(Host), "{name}");
        assert_eq!((may(Nobody), may(Void)), (joins, joins), "{name}");
        if internal {
            assert!(Role::ALL.iter().all(|role| !may(User(*role))), "{name}");
            continue;
        }
        assert!(may(User(Role::Admin)), "{name}");
        let of_admins = service.ends_with("UserService") && !["WhoAmI", "Renew"].contains(&method.as_str());
        let of_members = ["CreateJoinToken", "ListJoinTokens", "RevokeJoinToken", "Rekey", "Leave", "Retire"];
        let admin = of_admins
            || of_members.contains(&method.as_str())
            || ["Backup", "Audit", "RotateCa", "FinishCa"].contains(&method.as_str())
            || [
                "pool.v1.PoolService/Set",
                "pool.v1.SupportService/Reports",
                "pool.v1.ClusterService/Create",
                "pool.v1.ClusterService/Delete",
            ]
            .contains(&name.as_str());
        assert_eq!(may(User(Role::Operator)), !admin, "{name}");
        let looks = [
            "List",
            "Show",
            "Watch",
            "Where",
            "Explain",
            "Stats",
            "Plan",
            "HaPlan",
            "BalancePlan",
            "WhoAmI",
            "Renew",
        ];
        let viewer = !admin && looks.contains(&method.as_str()) || joins;
        assert_eq!(may(User(Role::Viewer)), viewer, "{name}");
    }
}

#[test]
fn a_deleted_user_and_a_replaced_key_are_void_at_once() {
    let mut state = PoolState::default();
    let mut accept = |command| {
        let index = state.revision + 1;
        let principal = "user-admin".to_owned();
        let entry = Entry { request_id: None, principal, time_ms: 1, seed: Seed([0; 32]), command };
        state.apply(index, &entry).unwrap();
        state.clone()
    };
    accept(Command::InitPool(Box::new(InitPool {
        pool_id: "p".to_owned(),
        name: "p".to_owned(),
        timing: pool_state::Timing::default(),
        ca_cert_pem: "c".to_owned(),
        ca_key_pem: "k".to_owned(),
        feature_level: pool_state::features::NEWEST,
        first_host: pool_state::command::HostFacts {
            name: "h1".to_owned(),
            address: "10.0.0.1:1".to_owned(),
            public_key: vec![1],
            cpu_vendor: String::new(),
            vm_memory: proto::ByteCount(1),
            feature_level: pool_state::features::NEWEST,
        },
    })));
    let ann = CertificateName::User("ann".to_owned());
    let name = || "ann".to_owned();
    let made = accept(Command::CreateUser { name: name(), role: Role::Operator, key_hash: [1; 32] });
    assert_eq!(caller_of(&made, &ann, &[1; 32]), Caller::User(Role::Operator));
    assert_eq!(caller_of(&made, &ann, &[2; 32]), Caller::Void);
    let rotated = accept(Command::RotateUser { name: name(), key_hash: [2; 32] });
    assert_eq!(caller_of(&rotated, &ann, &[1; 32]), Caller::Void);
    let deleted = accept(Command::DeleteUser { name: name() });
    assert_eq!(caller_of(&deleted, &ann, &[2; 32]), Caller::Void);
    assert!(!permits(Access::User(Role::Viewer), Caller::Void));
}
