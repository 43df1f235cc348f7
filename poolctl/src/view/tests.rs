//! The JSON of each kind, field by field: what scripts rely on.

use super::*;
use crate::output::Object;
use proto::v1;
use serde_json::{Value, json};

/// The JSON of an object, after checks that hold for every kind.
fn shape<T: Object>(object: &T) -> Value {
    assert_eq!(object.cells().len(), T::COLUMNS.len() + T::WIDE.len(), "{}", T::KIND);
    assert!(!object.name().is_empty(), "{}", T::KIND);
    serde_json::to_value(object).unwrap()
}

#[test]
fn pool() {
    let pool = v1::Pool {
        id: "p1".into(),
        name: "lab".into(),
        leader: "h1".into(),
        hosts: 3,
        voters: vec!["h1".into(), "h2".into()],
        revision: 9,
        ha_braked: false,
        ca_fingerprint: "ab".into(),
        ha_disarmed: false,
        feature_level: 1,
        feature_level_supported: 2,
        replicas_default: 3,
        cpu_overcommit: 4,
        ca_rotating: true,
        ca_pending: vec!["h2".into()],
        cpu_profile: "host-common".into(),
        scrub_interval_ms: 1000,
        scrub_bytes_per_s: 64,
    };
    let upgrade = UpgradeView::new(&pool, Vec::new());
    assert_eq!(
        shape(&upgrade),
        json!({"pool": "lab", "feature_level": 1, "feature_level_supported": 2, "hosts": []})
    );
    assert_eq!(
        shape(&PoolView::from(pool)),
        json!({"id": "p1", "name": "lab", "leader": "h1", "hosts": 3, "voters": ["h1", "h2"], "revision": 9,
            "ha_braked": false, "ca_fingerprint": "ab", "ha_disarmed": false, "feature_level": 1,
            "replicas_default": 3, "cpu_overcommit": 4, "ca_rotating": true, "ca_pending": ["h2"],
            "cpu_profile": "host-common", "scrub_interval_ms": 1000, "scrub_bytes_per_s": 64})
    );
}

#[test]
fn host_and_token() {
    let host = v1::Host {
        id: 7,
        name: "h2".into(),
        state: "up".into(),
        role: "voter".into(),
        address: "10.0.0.2:7443".into(),
        vm_memory_bytes: 4096,
        vm_memory_reserved_bytes: 1024,
        lease_age_ms: 12,
        vms: vec!["a".into()],
        labels: [("zone".to_owned(), "b".to_owned())].into(),
        duty: "active".into(),
        cpus: 8,
        vcpus_reserved: 2,
        version: "0.2.0".into(),
        feature_level: 2,
        store_used_bytes: 5,
        store_capacity_bytes: 9,
        cluster: "fast".into(),
        huge_memory_bytes: 10,
        huge_memory_reserved_bytes: 4,
    };
    assert_eq!(
        shape(&VersionView::from(host.clone())),
        json!({"host": "h2", "version": "0.2.0", "feature_level": 2, "state": "up"})
    );
    assert_eq!(
        shape(&HostView::from(host)),
        json!({"id": "host-7", "name": "h2", "state": "up", "role": "voter", "address": "10.0.0.2:7443",
            "vm_memory_bytes": 4096, "vm_memory_reserved_bytes": 1024, "lease_age_ms": 12, "vms": ["a"],
            "labels": {"zone": "b"}, "duty": "active", "cpus": 8, "vcpus_reserved": 2, "version": "0.2.0",
            "feature_level": 2, "store_used_bytes": 5, "store_capacity_bytes": 9, "cluster": "fast",
            "huge_memory_bytes": 10, "huge_memory_reserved_bytes": 4})
    );
    let token = v1::JoinToken { id: 9, token: "t".into(), expires_ms: 1, state: "valid".into() };
    assert_eq!(
        shape(&TokenView::from(token)),
        json!({"id": "token-9", "token": "t", "expires_ms": 1, "state": "valid"})
    );
}

#[test]
fn volume_and_image() {
    let volume = v1::Volume {
        id: 5,
        name: "data".into(),
        size_bytes: 1 << 30,
        epoch: 2,
        owner: "vm a".into(),
        replicas: vec![v1::Replica {
            host: "h1".into(),
            state: "syncing".into(),
            used_bytes: Some(4096),
            sync: Some(v1::ReplicaSync {
                copied_bytes: 4096,
                left_bytes: 12_288,
                permille: Some(250),
                bytes_per_s: 64,
                remaining_ms: Some(9),
            }),
        }],
        used_bytes: Some(8192),
        physical_bytes: Some(12_288),
        scrub: Some(v1::VolumeScrub { task: 30, checked: 5, permille: 101, ..Default::default() }),
        last_scrub: Some(v1::VolumeScrub {
            task: 29,
            checked: 9,
            damaged: 2,
            repaired: 1,
            ended_ms: 7,
            permille: 1000,
        }),
        io: Some(v1::VolumeIo { reads: 1, read_bytes: 2, writes: 3, written_bytes: 4 }),
        isr_version: 3,
        revision: 8,
        nbd: Some(v1::VolumeNbd {
            host: "h1".into(),
            listen: "127.0.0.1:0".into(),
            uri: "nbd://127.0.0.1:9/data".into(),
            state: "serving".into(),
            problem: String::new(),
        }),
        operations_per_s_max: 50,
        health: "healthy".into(),
        replicas_wanted: 1,
        origin: "base@gold".into(),
        snapshots: vec!["before".into()],
        ..Default::default()
    };
    let nbd = json!({"host": "h1", "listen": "127.0.0.1:0", "uri": "nbd://127.0.0.1:9/data",
        "state": "serving", "problem": ""});
    assert_eq!(
        VolumeView::from(volume.clone()).scrubbed(),
        "volume data: 9 blocks compared, 2 damaged, 1 repaired"
    );
    let sync = json!({"copied_bytes": 4096, "left_bytes": 12288, "percent": 25.0, "bytes_per_s": 64,
        "remaining_ms": 9});
    let scrub = |task: &str, checked, damaged, repaired, percent, ended_ms| {
        json!({"task": task, "checked": checked, "damaged": damaged, "repaired": repaired,
            "percent": percent, "ended_ms": ended_ms})
    };
    assert_eq!(
        shape(&VolumeView::from(volume)),
        json!({"id": "vol-5", "name": "data", "size_bytes": 1 << 30, "epoch": 2, "owner": "vm a",
            "health": "healthy", "origin": "base@gold", "snapshots": ["before"],
            "replicas": [{"host": "h1", "state": "syncing", "used_bytes": 4096, "sync": sync}],
            "replicas_wanted": 1, "used_bytes": 8192, "physical_bytes": 12288,
            "scrub": scrub("task-30", 5, 0, 0, 10.1, 0), "last_scrub": scrub("task-29", 9, 2, 1, 100.0, 7),
            "io": {"reads": 1, "read_bytes": 2, "writes": 3, "written_bytes": 4},
            "isr_version": 3, "nbd": nbd, "iops_max": 50, "bytes_per_s_max": 0, "revision": 8})
    );
    let image = v1::Image {
        id: 4,
        name: "probe".into(),
        blake3: "cd".into(),
        size_bytes: 10,
        hosts: vec!["h1".into()],
    };
    assert_eq!(
        shape(&ImageView::from(image)),
        json!({"id": "img-4", "name": "probe", "blake3": "cd", "size_bytes": 10, "hosts": ["h1"]})
    );
}

#[test]
fn vm_and_console() {
    let vm = v1::Vm {
        id: 17,
        name: "a".into(),
        state: "running".into(),
        host: "h2".into(),
        epoch: 3,
        vcpus: 1,
        memory_bytes: 512 << 20,
        disks: vec!["data".into()],
        kernel: "probe".into(),
        initrd: String::new(),
        cmdline: "disk=1".into(),
        ha: "restart".into(),
        problem: String::new(),
        revision: 11,
        ha_priority: 100,
        home: "h1".into(),
        nics: vec![v1::Nic { network: "lan".into(), mac: "0a:00:00:00:00:01".into(), ip: "10.7.0.2".into() }],
        cpu_profile: "host".into(),
        cluster: "default".into(),
        huge_pages: true,
    };
    let view = VmView::from(vm);
    assert_eq!(view.whereabouts(), "running at h2");
    assert_eq!(
        shape(&view),
        json!({"id": "vm-17", "name": "a", "state": "running", "host": "h2", "epoch": 3, "vcpus": 1,
            "memory_bytes": 512 << 20, "disks": ["data"], "kernel": "probe", "initrd": "", "cmdline": "disk=1",
            "ha": "restart", "problem": "", "revision": 11, "ha_priority": 100, "home": "h1",
            "nics": [{"network": "lan", "mac": "0a:00:00:00:00:01", "ip": "10.7.0.2"}], "cpu_profile": "host",
            "cluster": "default", "huge_pages": true})
    );
    let piece = v1::ConsoleLogResponse { data: b"hi\xff".to_vec(), offset: 4 };
    assert_eq!(shape(&ConsoleView::new("a", &piece)), json!({"vm": "a", "offset": 4, "text": "hi\u{fffd}"}));
}

fn migration() -> v1::Migration {
    let pages = v1::PageCounts { zero: 1, raw: 2, compressed: 3, delta: 4, reference: 5, faulted: 6 };
    v1::Migration {
        id: 21,
        vm: "a".into(),
        source: "h1".into(),
        target: "h2".into(),
        outcome: "done".into(),
        phase: "done".into(),
        error: String::new(),
        policy: "default".into(),
        memory_bytes: 512 << 20,
        task: 20,
        record: Some(v1::MigrationRecord {
            total_ms: 900.5,
            blackout_ms: 12.5,
            blackout_parts: Some(v1::BlackoutParts {
                pause: 1.0,
                drain: 2.0,
                last_pages: 3.0,
                state: 0.5,
                proof: 1.5,
                commit: 2.5,
                activate: 1.25,
                resume: 0.75,
            }),
            rounds: 2,
            bytes_sent: 1 << 20,
            pages: Some(pages),
            per_round: vec![v1::RoundRecord {
                round: 0,
                bytes: 10,
                pages: Some(pages),
                ms: 1.5,
                dirty_pages_after: 7,
            }],
            memory_proved: true,
            memory_hash: "ef".into(),
            pages_remaining: 0,
            bytes_per_s: 5,
            dirty_bytes_per_s: 6,
            source_cpu_ms: 7.5,
            target_cpu_ms: 8.5,
            blackout_expected_ms: 11.5,
            throttle_percent: 20,
            eta_ms: Some(250.0),
            eta_error_percent: 15,
            fault_mean_ms: 0.25,
            connections: 2,
            huge_pages: true,
        }),
        revision: 30,
        waits_for: String::new(),
    }
}

#[test]
fn a_migration_that_waits_says_for_what() {
    let waits_for = "host h1 already sends 2 VMs".to_owned();
    let queued =
        v1::Migration { outcome: "running".into(), phase: "queued".into(), waits_for, ..migration() };
    let view = MigrationView::from(queued);
    assert_eq!(view.sentence(), "a waits to move from h1 to h2: host h1 already sends 2 VMs (mig-21)");
    assert_eq!(shape(&view)["waits_for"], "host h1 already sends 2 VMs");
}

#[test]
fn a_migration_is_one_flat_record() {
    let pages = json!({"zero": 1, "raw": 2, "compressed": 3, "delta": 4, "reference": 5, "faulted": 6});
    let view = MigrationView::from(migration());
    assert!(view.sentence().contains("from h1 to h2"), "{}", view.sentence());
    assert_eq!(
        shape(&view),
        json!({"id": "mig-21", "vm": "a", "source": "h1", "target": "h2", "outcome": "done", "phase": "done",
            "waits_for": "", "error": "", "policy": "default", "task": "task-20", "total_ms": 900.5, "blackout_ms": 12.5,
            "blackout_parts": {"pause": 1.0, "drain": 2.0, "last_pages": 3.0, "state": 0.5, "proof": 1.5,
                "commit": 2.5, "activate": 1.25, "resume": 0.75},
            "rounds": 2, "bytes_sent": 1 << 20, "pages": pages, "memory_bytes": 512 << 20, "memory_proved": true,
            "memory_hash": "ef",
            "per_round": [{"round": 0, "bytes": 10, "pages": pages, "ms": 1.5, "dirty_pages_after": 7}],
            "pages_remaining": 0, "bytes_per_s": 5, "dirty_bytes_per_s": 6, "source_cpu_ms": 7.5, "target_cpu_ms": 8.5,
            "blackout_expected_ms": 11.5, "throttle_percent": 20, "eta_ms": 250.0, "eta_error_percent": 15,
            "fault_mean_ms": 0.25, "connections": 2, "huge_pages": true})
    );
}

#[test]
fn a_migration_without_a_record_has_all_fields_all_the_same() {
    let with = shape(&MigrationView::from(migration()));
    let without = shape(&MigrationView::from(v1::Migration { record: None, ..migration() }));
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&with), keys(&without));
    assert_eq!(without["blackout_parts"]["commit"], 0.0);
}

#[test]
fn plan_task_and_event() {
    let plan = v1::MigrationPlan {
        vm: "a".into(),
        source: "h1".into(),
        target: "h1".into(),
        blockers: vec!["target is source".into()],
        memory_bytes: 4096,
        predicted_ms: 10.0,
        predicted_blackout_ms: 1.5,
        predicted_bytes: 2048,
        waits_for: "host h1 already sends 2 VMs".into(),
    };
    assert_eq!(
        shape(&PlanView::from(plan)),
        json!({"vm": "a", "source": "h1", "target": "h1", "blockers": ["target is source"],
            "waits_for": "host h1 already sends 2 VMs",
            "memory_bytes": 4096, "predicted_ms": 10.0, "predicted_blackout_ms": 1.5, "predicted_bytes": 2048})
    );
    let task = v1::Task {
        id: 20,
        kind: "vm.start".into(),
        state: "done".into(),
        phase: "".into(),
        objects: vec!["vm a".into()],
        error: String::new(),
        created_ms: 1,
        ended_ms: 2,
        principal: "user-ann".into(),
        deadline_ms: 3,
        executor: "h1".into(),
        request_id: "r-1".into(),
        progress: Some(v1::TaskProgress {
            permille: 500,
            done_bytes: 1,
            total_bytes: 2,
            bytes_per_s: 3,
            remaining_ms: None,
        }),
    };
    assert_eq!(
        shape(&TaskView::from(task)),
        json!({"id": "task-20", "operation": "vm.start", "state": "done", "phase": "", "objects": ["vm a"],
            "error": "", "created_ms": 1, "ended_ms": 2, "principal": "user-ann", "deadline_ms": 3,
            "executor": "h1", "request_id": "r-1", "progress": {"percent": 50.0, "done_bytes": 1,
            "total_bytes": 2, "bytes_per_s": 3, "remaining_ms": null}})
    );
    let event = v1::Event {
        revision: 3,
        ordinal: 1,
        time_ms: 5,
        kind: "host.lost".into(),
        object: "host h1".into(),
        message: "gone".into(),
    };
    assert_eq!(
        shape(&EventView::from(event)),
        json!({"revision": 3, "ordinal": 1, "time_ms": 5, "event": "host.lost", "object": "host h1",
            "message": "gone"})
    );
}

#[test]
fn groups_users_audit_and_plans() {
    let group = v1::Group {
        id: 5,
        name: "web".into(),
        rule: "apart".into(),
        strength: "must".into(),
        vms: vec!["a".into()],
        hosts: vec![],
        revision: 7,
    };
    assert_eq!(
        shape(&GroupView::from(group)),
        json!({"id": "group-5", "name": "web", "rule": "apart", "strength": "must", "vms": ["a"], "hosts": [],
            "revision": 7})
    );
    let cluster = v1::Cluster {
        id: 6,
        name: "fast".into(),
        cpu_profile: "x86-64-v3".into(),
        hosts: vec!["h1".into()],
        vms: vec!["a".into()],
        revision: 7,
    };
    assert_eq!(
        shape(&ClusterView::from(cluster)),
        json!({"id": "cluster-6", "name": "fast", "cpu_profile": "x86-64-v3", "hosts": ["h1"], "vms": ["a"],
            "revision": 7})
    );
    let default = v1::Cluster { name: "default".into(), ..v1::Cluster::default() };
    assert_eq!(shape(&ClusterView::from(default))["id"], "", "it has no id");
    let user = v1::User { name: "ann".into(), role: "viewer".into(), created_ms: 3, tokens: 1 };
    assert_eq!(
        shape(&UserView::from(user)),
        json!({"name": "ann", "role": "viewer", "created_ms": 3, "tokens": 1})
    );
    let token = v1::AccessToken {
        id: 7,
        user: "ann".into(),
        role: "viewer".into(),
        created_ms: 1,
        expires_ms: 2,
        state: "valid".into(),
        ..v1::AccessToken::default()
    };
    let shown = json!({"id": "token-7", "user": "ann", "role": "viewer", "created_ms": 1, "expires_ms": 2,
        "state": "valid"});
    assert_eq!(shape(&AccessTokenView::from(token)), shown);
    let record = v1::AuditRecord {
        revision: 9,
        time_ms: 4,
        principal: "user-ann".into(),
        request_id: "r".into(),
        action: "vm.stop".into(),
        object: "vm a".into(),
    };
    assert_eq!(
        shape(&AuditView::from(record)),
        json!({"revision": 9, "time_ms": 4, "principal": "user-ann", "request_id": "r", "action": "vm.stop",
            "object": "vm a"})
    );
    let next =
        v1::PlannedMove { vm: "a".into(), source: "h1".into(), target: "h2".into(), reason: "load".into() };
    assert_eq!(
        shape(&PlannedMoveView::from(next)),
        json!({"vm": "a", "source": "h1", "target": "h2", "reason": "load"})
    );
    let plan =
        v1::HaPlanResponse { vms: 3, unplaced: vec!["a".into()], worst: vec!["h1".into()], revision: 2 };
    assert_eq!(
        shape(&HaPlanView::new(1, plan)),
        json!({"fail": 1, "worst": ["h1"], "vms": 3, "unplaced": ["a"], "revision": 2})
    );
    let answer = v1::VmExplanation {
        vm: "a".into(),
        state: "running".into(),
        host: "h1".into(),
        reasons: vec!["it moved to h1".into()],
        hosts: vec![v1::HostVerdict { host: "h2".into(), fits: true, reasons: vec!["room".into()], rank: 1 }],
        revision: 2,
    };
    let view = ExplanationView::from(answer);
    assert_eq!(view.text(), "vm a is running at h1\n  it moved to h1\nhost h2: choice 1: room\n");
    assert_eq!(
        shape(&view),
        json!({"vm": "a", "state": "running", "host": "h1", "reasons": ["it moved to h1"], "revision": 2,
            "hosts": [{"host": "h2", "fits": true, "rank": 1, "reasons": ["room"]}]})
    );
}

#[test]
fn points_in_time_are_dates() {
    assert_eq!(utc(0), "");
    assert_eq!(utc(951_782_400_000), "2000-02-29T00:00:00Z");
    assert_eq!(utc(1_795_512_600_000), "2026-11-24T09:30:00Z");
    assert_eq!(utc(4_107_542_399_000), "2100-02-28T23:59:59Z");
    // The largest number still ends at once.
    assert!(utc(u64::MAX).ends_with('Z'));
}
