//! What was promised to other versions: `promised/level-N.state` is a state as a pool at level N writes it, and
//! `promised/level-N.json` the names and types of everything in states and entries. Neither file is ever changed; a new level adds
//! its own two, which these tests write to the folder of temporary files when they are missing.

use super::*;
use crate::{
    Command, Entry, PoolState,
    command::{
        ClusterCommand, Govern, LoanEnd, RemoveMode, RestartCause, ScrubEnd, ServiceEnd, StopReason,
        VolumeCommand,
    },
    features::{NEWEST, OLDEST},
    fixture::Pool,
    outcome::Outcome,
    state::{
        ClonedDisk, Copies, Desired, DiskCloning, EventKind, FIRST_HOST, GroupRule, GroupStrength, HaPolicy,
        Holder, HostDuty, HostState, LoanPurpose, MigrationOutcome, MigrationPhase, MigrationPolicy,
        MoveCause, NetworkLink, RewriteKind, Role, ServiceWanted, SnapshotState, StartCause, StopMode,
        TargetChoice, TaskKind, TaskState, TokenState, VolumeWork,
    },
};
use proto::{CpuProfile, HostId, ListenAddress, MemoryPages};
use serde::{Deserialize, Serialize};
use serde_reflection::{ContainerFormat, Registry, Samples, Tracer, TracerConfig};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

const WRITER: &str = "0.1.0";

/// The first level whose names were written down.
const FIRST_NAMED: u32 = 3;

/// The file of a promise; one that is missing is written where whoever adds a level takes it from.
fn kept(name: &str, now: &[u8]) -> Vec<u8> {
    let promised = std::fs::read(format!("{}/src/form/promised/{name}", env!("CARGO_MANIFEST_DIR")));
    promised.unwrap_or_else(|_| {
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, now).expect("it can be written");
        panic!("{name} is missing in poold/state/src/form/promised: what it is now is in {}", path.display())
    })
}

/// A pool at a level in which something of most kinds exists.
fn sample(level: u32) -> PoolState {
    let mut pool = Pool::at_level(3, level);
    pool.running_vm("web", FIRST_HOST, HaPolicy::Restart);
    let vm = pool.running_vm("batch", FIRST_HOST, HaPolicy::None);
    pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
    pool.accept(Command::CordonHost { host: FIRST_HOST });
    let ttl_ms = 1_000;
    pool.accept(Command::CreateToken { secret_hash: [5; 32], ttl_ms });
    pool.accept(Command::CreateUser { name: "ann".into(), role: Role::Viewer, key_hash: [6; 32] });
    let (user, role) = ("ann".to_owned(), Role::Viewer);
    pool.accept(Command::Govern(Govern::CreateAccessToken { user, role, secret_hash: [7; 32], ttl_ms }));
    let volume = pool.volume("data");
    if level >= 3 {
        pool.accept(VolumeCommand::TakeSnapshot { volume, name: "monday".into() }.into());
        let cpu_profile = proto::CpuProfile::default();
        pool.accept(ClusterCommand::CreateCluster { name: "new".into(), cpu_profile }.into());
    }
    // Remembered since level 4.
    let request_id = Some("r-1".to_owned());
    let refused = Entry { request_id, ..pool.entry(Command::CordonHost { host: HostId(9_999) }) };
    pool.apply_entry(&refused).expect_err("there is no such host");
    pool.state
}

#[test]
fn every_level_is_read_and_written_as_was_promised() {
    for level in OLDEST..=NEWEST {
        let now = write(&sample(level), level, WRITER).unwrap();
        let promised = kept(&format!("level-{level}.state"), &now);
        let state: PoolState = read(&promised, NEWEST).unwrap();
        assert_eq!(state.settings.feature_level, level);
        assert_eq!((state.vms.len(), state.hosts.len()), (2, 3));
        // Byte for byte: an old daemon gets from a new one what it would have written itself.
        assert_eq!(write(&state, level, WRITER).unwrap(), promised, "level {level}");
    }
}

#[test]
fn what_a_pool_has_at_a_level_is_all_in_what_is_written_at_that_level() {
    for level in OLDEST..=NEWEST {
        let state = sample(level);
        let bytes = write(&state, level, WRITER).unwrap();
        assert!(read::<PoolState>(&bytes, level).unwrap() == state, "level {level}");
    }
    let of_3 = ["clonings", "clusters", "cluster", "rekeys", "rewriting", "last_scrub", "snapshots"];
    for (level, brought_later) in [(3, &of_3[..]), (4, &["refused"])] {
        let holds = |level: u32, name: &str| {
            let text = [&[0xa0 | name.len() as u8], name.as_bytes()].concat();
            let bytes = write(&sample(level), level, WRITER).unwrap();
            bytes.windows(text.len()).any(|part| part == text)
        };
        for name in brought_later {
            assert!(!holds(level - 1, name), "{name} in a state of level {}", level - 1);
        }
        assert!(holds(level, brought_later.last().unwrap()), "it would be in there if it was");
    }
}

/// The state as a version after this one may have it.
#[derive(Serialize, Deserialize)]
struct NextState {
    #[serde(flatten)]
    now: PoolState,
    #[serde(default, skip_serializing_if = "is_default")]
    colours: BTreeMap<u64, String>,
}

#[test]
fn this_version_and_the_next_one_read_each_other_at_this_level_and_not_at_the_next() {
    let colours = BTreeMap::from([(7, "red".to_owned())]);
    let now = sample(NEWEST);
    let next = NextState { now: now.clone(), colours: BTreeMap::new() };
    let from_next = write(&next, NEWEST, "0.2.0").unwrap();
    assert!(read::<PoolState>(&from_next, NEWEST).unwrap() == now);
    let from_now = write(&now, NEWEST, WRITER).unwrap();
    let read_by_next: NextState = read(&from_now, NEWEST + 1).unwrap();
    assert!(read_by_next.now == now && read_by_next.colours.is_empty());

    let next = NextState { now, colours };
    let risen = write(&next, NEWEST + 1, "0.2.0").unwrap();
    assert_eq!(read::<NextState>(&risen, NEWEST + 1).unwrap().colours, next.colours);
    let refused = read::<PoolState>(&risen, NEWEST).unwrap_err();
    assert!(matches!(refused, FormError::TooNew { .. }), "{refused}");
    let (told, above) = (refused.to_string(), format!("feature level {}", NEWEST + 1));
    for word in [above.as_str(), "0.2.0", "install a newer poold"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    // A version that breaks the rule, and writes at this level what this one does not know.
    let refused = read::<PoolState>(&write(&next, NEWEST, "0.2.0").unwrap(), NEWEST).unwrap_err();
    assert!(refused.is_too_new() && refused.to_string().contains("unknown field colours"), "{refused}");
}

#[test]
fn what_is_no_state_or_was_damaged_is_told_from_what_is_too_new() {
    let bytes = write(&sample(NEWEST), NEWEST, WRITER).unwrap();
    let failure = |bytes: &[u8]| read::<PoolState>(bytes, NEWEST).unwrap_err();
    for at in (0..bytes.len()).filter(|at| *at < 64 || at % 97 == 0) {
        let mut turned = bytes.clone();
        turned[at] ^= 0x10;
        let expected = match failure(&turned) {
            FormError::NotAState => at < MAGIC.len(),
            FormError::UnknownFrame { .. } => at == MAGIC.len(),
            FormError::Damaged { .. } => at > MAGIC.len(),
            _ => false,
        };
        assert!(expected, "byte {at}");
    }
    for length in 0..64 {
        assert!(!failure(&bytes[..length]).is_too_new(), "{length} bytes");
    }
}

/// A tracer meets one variant of an enum at a time, so each is named; the registry says which is missing.
macro_rules! trace {
    ($tracer:expr, $($name:ty),* $(,)?) => {
        {
            $($tracer.trace_type::<$name>(&Samples::new()).unwrap_or_else(|error| panic!("{error}"));)*
        }
    };
}

/// Names and types of everything that is written; `also` traces more enums.
fn names(also: impl FnOnce(&mut Tracer)) -> Registry {
    let mut tracer = Tracer::new(TracerConfig::default().is_human_readable(false));
    trace!(
        tracer,
        ClonedDisk,
        CpuProfile,
        Desired,
        DiskCloning,
        EventKind,
        GroupRule,
        GroupStrength,
        HaPolicy,
        Holder,
        HostDuty,
        HostState,
        ListenAddress,
        LoanPurpose,
        MigrationOutcome,
        MigrationPhase,
        MigrationPolicy,
        MoveCause,
        NetworkLink,
        Outcome,
        Role,
        ServiceWanted,
        SnapshotState,
        StartCause,
        StopMode,
        TargetChoice,
        TaskKind,
        TaskState,
        TokenState,
        VolumeWork,
        RewriteKind,
        Copies,
        SocketAddr,
        IpAddr,
        MemoryPages,
    );
    also(&mut tracer);
    tracer.registry().unwrap_or_else(|error| panic!("{error}"))
}

/// What is promised of states and of entries.
#[derive(Serialize, Deserialize)]
struct Promise {
    state: Registry,
    entry: Registry,
}

/// Whether everything promised is still there under its name with its type; fields and variants may be added.
fn keeps_names(promised: &ContainerFormat, now: &ContainerFormat) -> bool {
    match (promised, now) {
        (ContainerFormat::Struct(promised), ContainerFormat::Struct(now)) => {
            promised.iter().all(|field| now.contains(field))
        }
        (ContainerFormat::Enum(promised), ContainerFormat::Enum(now)) => {
            promised.values().all(|variant| now.values().any(|it| it == variant))
        }
        _ => promised == now,
    }
}

/// Whether what is counted by position has the same positions; variants may be added behind.
fn keeps_positions(promised: &ContainerFormat, now: &ContainerFormat) -> bool {
    match (promised, now) {
        (ContainerFormat::Enum(promised), ContainerFormat::Enum(now)) => {
            promised.iter().all(|(position, variant)| now.get(position) == Some(variant))
        }
        _ => promised == now,
    }
}

#[test]
fn no_name_and_no_position_that_was_promised_has_changed() {
    let state = names(|tracer| {
        trace!(tracer, PoolState);
    });
    let entry = names(|tracer| {
        trace!(
            tracer,
            Entry,
            Command,
            Govern,
            VolumeCommand,
            ClusterCommand,
            RemoveMode,
            StopReason,
            RestartCause,
            LoanEnd,
            ServiceEnd,
            ScrubEnd,
        );
    });
    let now = Promise { state, entry };
    let text = serde_json::to_string_pretty(&now).unwrap();
    for level in FIRST_NAMED..=NEWEST {
        let promised = kept(&format!("level-{level}.json"), text.as_bytes());
        let promised: Promise = serde_json::from_slice(&promised).unwrap();
        for (name, format) in &promised.state {
            let kept = now.state.get(name).is_some_and(|now| keeps_names(format, now));
            assert!(kept, "{name} in states was promised otherwise: add a field with a default, change none");
        }
        for (name, format) in &promised.entry {
            let kept = now.entry.get(name).is_some_and(|now| keeps_positions(format, now));
            assert!(
                kept,
                "{name} in entries was promised otherwise: add a command behind the others, change none"
            );
        }
    }
}
