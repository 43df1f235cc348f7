//! Users, and the record of who changed what.

use crate::{
    Command,
    fixture::Pool,
    limits::AUDIT_MAX,
    state::{HaPolicy, Role, StopMode},
};

const KEY: [u8; 32] = [1; 32];
const OTHER: [u8; 32] = [2; 32];

fn create(name: &str, role: Role, key_hash: [u8; 32]) -> Command {
    Command::CreateUser { name: name.into(), role, key_hash }
}

#[test]
fn a_user_is_known_by_its_key_until_it_is_replaced_or_deleted() {
    let mut pool = Pool::new(1);
    assert_eq!(pool.state.role_of("ann", &KEY), None);
    pool.accept(create("ann", Role::Operator, KEY));
    pool.accept(create("ann", Role::Operator, KEY));
    assert_eq!(pool.reject(create("ann", Role::Viewer, KEY)), "NAME_TAKEN");
    assert_eq!(pool.state.role_of("ann", &KEY), Some(Role::Operator));
    assert_eq!(pool.state.role_of("ann", &OTHER), None);
    pool.accept(Command::SetUserRole { name: "ann".into(), role: Role::Viewer });
    assert_eq!(pool.state.role_of("ann", &KEY), Some(Role::Viewer));
    pool.accept(Command::RotateUser { name: "ann".into(), key_hash: OTHER });
    assert_eq!(pool.state.role_of("ann", &KEY), None);
    assert_eq!(pool.state.role_of("ann", &OTHER), Some(Role::Viewer));
    pool.accept(Command::DeleteUser { name: "ann".into() });
    assert_eq!(pool.state.role_of("ann", &OTHER), None);
    assert_eq!(pool.reject(Command::DeleteUser { name: "ann".into() }), "USER_NOT_FOUND");
    pool.accept(create("ann", Role::Viewer, KEY));
    assert_eq!(pool.state.role_of("ann", &KEY), Some(Role::Viewer));
}

#[test]
fn the_founder_is_an_admin_until_another_takes_over() {
    let mut pool = Pool::new(1);
    assert_eq!(pool.state.role_of("admin", &KEY), Some(Role::Admin));
    assert_eq!(pool.reject(Command::DeleteUser { name: "admin".into() }), "LAST_ADMIN");
    let demote = Command::SetUserRole { name: "admin".into(), role: Role::Viewer };
    assert_eq!(pool.reject(demote), "LAST_ADMIN");
    pool.accept(create("ann", Role::Admin, OTHER));
    pool.accept(Command::DeleteUser { name: "admin".into() });
    assert_eq!(pool.state.role_of("admin", &KEY), None);
    assert_eq!(pool.reject(Command::DeleteUser { name: "ann".into() }), "LAST_ADMIN");
    let names: Vec<String> = pool.state.present_users().into_iter().map(|user| user.name).collect();
    assert_eq!(names, ["ann"]);
}

#[test]
fn every_change_of_a_user_is_recorded_and_no_report_of_a_host() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let from = pool.state.revision + 1;
    pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
    pool.reject(Command::PauseVm { vm });
    let (epoch, reason) = (pool.epoch(vm), crate::command::StopReason::Requested);
    let mut report = pool.entry(Command::VmStopped { vm, epoch, reason });
    report.principal = host.to_string();
    pool.apply_entry(&report).unwrap();
    let mut delete = pool.entry(Command::DeleteVm { vm });
    delete.request_id = Some("r1".into());
    pool.apply_entry(&delete).unwrap();
    pool.apply_entry(&delete).unwrap();
    let seen: Vec<_> = pool
        .state
        .audit
        .since(from)
        .map(|it| (it.principal.as_str(), it.action.as_str(), it.object.as_str(), it.request_id.as_str()))
        .collect();
    assert_eq!(
        seen,
        [("user-ann", "vm.stop", "vm web", ""), ("user-ann", "vm.delete", "vm web", "r1")],
        "one record for each change, also when it is asked for twice"
    );
    for _ in 0..=AUDIT_MAX {
        pool.state.apply(pool.state.revision + 1, &pool.entry(Command::HaArm)).unwrap();
    }
    assert_eq!(pool.state.audit.len(), AUDIT_MAX);
}
