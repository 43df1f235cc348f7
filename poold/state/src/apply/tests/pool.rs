//! Founding, requests, tokens, images, references.

use crate::{
    Command, Entry, EntryError, Outcome, PoolState, RejectionClass, Timing,
    command::{Govern, HostFacts, InitPool, JoinHost, LastSequence},
    fixture::{Pool, facts, init_pool},
    limits::{EVENTS_MAX, REFUSALS_MAX, REQUESTS_MAX, TOKENS_MAX},
    state::{ContentHash, HaPolicy},
};
use proto::{ByteCount, Epoch, HostId, MigrationId, Sequence, TokenId, VmId, VolumeId};

#[test]
fn nothing_happens_before_the_pool_is_founded() {
    let pool = Pool::new(1);
    let mut empty = PoolState::default();
    let entry = pool.entry(Command::SetBrake);
    assert_eq!(empty.apply(1, &entry).map_err(|r| r.reason_code()), Err("POOL_NOT_INITIALISED"));
}

#[test]
fn a_pool_is_founded_once_and_with_sound_timings() {
    let mut pool = Pool::new(1);
    assert_eq!(pool.reject(init_pool()), "POOL_ALREADY_INITIALISED");
    let Command::InitPool(init) = init_pool() else { panic!("it founds a pool") };
    let timing = Timing { host_lost_ms: 1, ..Timing::default() };
    let unsound = Command::InitPool(Box::new(InitPool { timing, ..*init }));
    let result = PoolState::default().apply(2, &pool.entry(unsound));
    assert_eq!(result.map_err(|r| r.reason_code()), Err("BAD_TIMING"));
}

#[test]
#[should_panic(expected = "the log is applied in order")]
fn an_entry_is_applied_once() {
    let mut pool = Pool::new(1);
    let entry = pool.entry(Command::SetBrake);
    let index = pool.state.revision;
    let _ = pool.state.apply(index, &entry);
}

#[test]
fn a_retry_gets_the_first_answer_and_has_no_effect() {
    let mut pool = Pool::new(1);
    let create = Command::CreateVolume { name: "a".into(), size: ByteCount(1 << 20), replicas: None };
    let request = |pool: &Pool, command| Entry { request_id: Some("r1".into()), ..pool.entry(command) };
    let first = request(&pool, create.clone());
    let answer = pool.apply_entry(&first).expect("the first is accepted");
    pool.now_ms += 5_000;
    let retry = request(&pool, create);
    assert_ne!(first, retry, "a retry has another time and seed");
    assert_eq!(pool.apply_entry(&retry), Ok(answer));
    assert_eq!(pool.state.volumes.len(), 1);

    let other = request(&pool, Command::SetBrake);
    let rejection = pool.apply_entry(&other).expect_err("the id belongs to another change");
    assert_eq!(rejection.class(), RejectionClass::Conflict);
    assert_eq!(rejection.reason_code(), "REQUEST_ID_REUSED");
}

#[test]
fn what_was_refused_stays_refused_however_late_it_comes_again() {
    let mut pool = Pool::new(1);
    let delete = Command::DeleteImage { image: pool.kernel };
    let entry = Entry { request_id: Some("r1".into()), ..pool.entry(delete.clone()) };
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    assert_eq!(pool.apply_entry(&entry).map_err(|it| it.reason_code()), Err("IMAGE_IN_USE"));
    assert_eq!(
        pool.apply_entry(&entry).map_err(|it| it.reason_code()),
        Err("IMAGE_IN_USE"),
        "the reason is still there"
    );
    pool.accept(Command::DeleteVm { vm });
    // Its client was told no, and may have gone on.
    let refused = pool.apply_entry(&entry).expect_err("it was refused");
    assert_eq!(
        (refused.reason_code(), refused.class()),
        ("REQUEST_REFUSED_BEFORE", RejectionClass::Conflict)
    );
    assert!(pool.state.images.contains(&pool.kernel));
    let again = Entry { request_id: Some("r2".into()), ..pool.entry(delete) };
    assert!(pool.apply_entry(&again).is_ok(), "whoever asks anew is answered anew");
}

#[test]
fn what_was_refused_without_an_entry_of_its_own_stays_refused() {
    let mut pool = Pool::new(1);
    let by = |pool: &Pool, id: &str, command| Entry { request_id: Some(id.into()), ..pool.entry(command) };
    let refuse = || Command::Govern(Govern::RefuseRequest);
    // The name meant nothing where it was asked for; now there is such a volume.
    assert_eq!(pool.apply_entry(&by(&pool, "r1", refuse())), Ok(Outcome::Done));
    let volume = pool.volume("data");
    let delete = Command::DeleteVolume { volume };
    let late = by(&pool, "r1", delete.clone());
    assert_eq!(pool.apply_entry(&late).map_err(|it| it.reason_code()), Err("REQUEST_REFUSED_BEFORE"));
    assert_eq!(pool.apply_entry(&by(&pool, "r1", refuse())), Ok(Outcome::Done), "a refusal comes again, too");
    // It was done where it came in first: the second place must not say no.
    let done = by(&pool, "r2", delete);
    assert!(pool.apply_entry(&done).is_ok());
    let audited = pool.state.audit.len();
    assert_eq!(
        pool.apply_entry(&by(&pool, "r2", refuse())).map_err(|it| it.reason_code()),
        Err("REQUEST_ID_REUSED")
    );
    assert_eq!(pool.apply_entry(&by(&pool, "r3", refuse())), Ok(Outcome::Done));
    assert_eq!(pool.state.audit.len(), audited, "it is no change");
}

#[test]
fn reports_of_hosts_and_joins_leave_no_refusal_and_old_daemons_keep_none() {
    let mut pool = Pool::new(2);
    let (host, vm) = (pool.hosts()[1], VmId(9_999));
    let epoch = Epoch(1);
    let entry = |pool: &Pool, command| Entry { request_id: Some("r1".into()), ..pool.entry(command) };
    let report = Entry { principal: host.to_string(), ..entry(&pool, Command::VmRunning { vm, epoch }) };
    assert!(pool.apply_entry(&report).is_err());
    let join = Command::JoinHost(JoinHost { secret_hash: [77; 32], facts: facts(3) });
    assert!(pool.apply_entry(&entry(&pool, join)).is_err());
    assert_eq!(pool.state.requests.refused_len(), 0);
    let mut old = Pool::at_level(2, 3);
    assert!(old.apply_entry(&entry(&old, Command::DeleteVm { vm })).is_err());
    assert_eq!(old.reject(Command::Govern(Govern::RefuseRequest)), "LEVEL_TOO_LOW");
    assert_eq!(old.state.requests.refused_len(), 0);
    assert!(pool.apply_entry(&entry(&pool, Command::DeleteVm { vm })).is_err());
    assert_eq!(pool.state.requests.refused_len(), 1);
}

#[test]
fn refusals_are_bounded_and_push_no_answer_out() {
    let mut pool = Pool::new(1);
    let by = |pool: &Pool, id: String, command| Entry { request_id: Some(id), ..pool.entry(command) };
    let done = by(&pool, "done".into(), Command::SetBrake);
    let answer = pool.apply_entry(&done);
    for number in 0..REFUSALS_MAX + 10 {
        let refused = by(&pool, format!("r{number}"), Command::DeleteVm { vm: VmId(9_999) });
        pool.state.apply(pool.state.revision + 1, &refused).expect_err("there is no such VM");
    }
    assert_eq!(pool.state.requests.refused_len(), REFUSALS_MAX);
    assert!(!pool.state.requests.is_refused("r9") && pool.state.requests.is_refused("r10"));
    assert_eq!(pool.apply_entry(&done), answer);
}

#[test]
fn memory_of_requests_and_events_is_bounded_and_says_from_where_it_is_complete() {
    let mut pool = Pool::new(1);
    for number in 0..REQUESTS_MAX + 10 {
        let command = if number % 2 == 0 { Command::SetBrake } else { Command::HaResume };
        let entry = Entry { request_id: Some(format!("r{number}")), ..pool.entry(command) };
        pool.state.apply(pool.state.revision + 1, &entry).expect("a brake is always accepted");
    }
    assert_eq!(pool.state.requests.len(), REQUESTS_MAX);
    assert!(pool.state.requests.get("r9").is_none() && pool.state.requests.get("r10").is_some());

    let events = &pool.state.events;
    assert!(events.iter().count() <= EVENTS_MAX);
    let oldest = events.oldest_revision();
    assert!(oldest > 0 && events.since(oldest - 1).is_none());
    let all = events.since(oldest).expect("the log reaches back so far").count();
    assert_eq!(all, events.iter().count());
    let last = events.since(pool.state.revision).expect("it is newer").count();
    assert_eq!(last, 1);
}

#[test]
fn a_token_admits_one_host_and_repeats_for_it() {
    let mut pool = Pool::new(1);
    let secret_hash = [1; 32];
    pool.accept(Command::CreateToken { secret_hash, ttl_ms: 1_000 });
    let join = |number| Command::JoinHost(JoinHost { secret_hash, facts: facts(number) });
    let host = pool.accept(join(2));
    pool.now_ms += 10_000;
    assert_eq!(pool.accept(join(2)), host, "an interrupted join repeats, also when the token has expired");
    assert_eq!(pool.reject(join(3)), "TOKEN_USED");
    assert_eq!(host, Outcome::Host(HostId(pool.state.revision - 2)), "the id is the index of the entry");
}

#[test]
fn a_token_must_be_known_unexpired_and_not_revoked() {
    let mut pool = Pool::new(1);
    let join = |secret: u8| Command::JoinHost(JoinHost { secret_hash: [secret; 32], facts: facts(2) });
    assert_eq!(pool.reject(join(1)), "TOKEN_UNKNOWN");
    pool.accept(Command::CreateToken { secret_hash: [1; 32], ttl_ms: 1_000 });
    let Outcome::Token(revoked) = pool.accept(Command::CreateToken { secret_hash: [2; 32], ttl_ms: 9_000 })
    else {
        panic!("a creation answers with its token")
    };
    pool.accept(Command::RevokeToken { token: revoked });
    pool.now_ms += 1_000;
    assert_eq!(pool.reject(join(1)), "TOKEN_EXPIRED");
    assert_eq!(pool.reject(join(2)), "TOKEN_REVOKED");
    assert_eq!(pool.reject(Command::RevokeToken { token: TokenId(999) }), "TOKEN_NOT_FOUND");
    assert_eq!(pool.reject(Command::CreateToken { secret_hash: [3; 32], ttl_ms: u64::MAX }), "OUT_OF_RANGE");
}

#[test]
fn a_preflight_names_all_problems_at_once() {
    let pool = Pool::new(2);
    let wrong =
        HostFacts { name: "h1".into(), address: "10.0.0.2:7400".into(), feature_level: 0, ..facts(3) };
    let join = JoinHost { secret_hash: [99; 32], facts: wrong };
    let codes: Vec<_> =
        pool.state.join_problems(0, &join).iter().map(crate::Rejection::reason_code).collect();
    assert_eq!(codes, ["TOKEN_UNKNOWN", "NAME_TAKEN", "ADDRESS_TAKEN", "FEATURE_LEVEL_TOO_LOW"]);
}

#[test]
fn expired_tokens_make_room_for_new_ones() {
    let mut pool = Pool::new(1);
    let token = |number: usize| {
        let mut secret_hash = [0; 32];
        secret_hash[..8].copy_from_slice(&(number as u64).to_le_bytes());
        Command::CreateToken { secret_hash, ttl_ms: 1_000 }
    };
    for number in 0..TOKENS_MAX {
        pool.accept(token(number));
    }
    assert_eq!(pool.reject(token(TOKENS_MAX)), "TOO_MANY_OBJECTS");
    pool.now_ms += 1_000;
    pool.accept(token(TOKENS_MAX));
    assert_eq!(pool.state.tokens.len(), 1);
}

#[test]
fn an_image_needs_a_holder_and_stays_while_a_vm_boots_from_it() {
    let mut pool = Pool::new(2);
    let kernel = pool.kernel;
    let import = |holders| Command::CreateImage {
        name: "initrd".into(),
        blake3: ContentHash([8; 32]),
        size: ByteCount(1),
        holders,
    };
    assert_eq!(pool.reject(import(vec![])), "IMAGE_WITHOUT_HOLDER");
    assert_eq!(pool.reject(import(vec![HostId(999)])), "HOST_NOT_FOUND");
    let second = pool.hosts()[1];
    pool.accept(Command::AddImageHolder { image: kernel, host: second });
    pool.accept(Command::AddImageHolder { image: kernel, host: second });
    assert_eq!(pool.state.image(kernel).expect("it exists").holders, pool.hosts());
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    assert_eq!(pool.reject(Command::DeleteImage { image: kernel }), "IMAGE_IN_USE");
    pool.accept(Command::DeleteVm { vm });
    pool.accept(Command::DeleteImage { image: kernel });
    assert_eq!(pool.reject(Command::DeleteImage { image: kernel }), "IMAGE_NOT_FOUND");
}

#[test]
fn references_are_names_ids_or_unique_prefixes() {
    let mut pool = Pool::new(1);
    let web = pool.stopped_vm("web", HaPolicy::Restart);
    let web1 = pool.stopped_vm("web1", HaPolicy::Restart);
    pool.stopped_vm("web2", HaPolicy::Restart);
    let found = |text: &str| pool.state.resolve_vm(text).map(|vm| vm.id);
    assert_eq!(found("web"), Ok(web), "an exact name wins over prefixes");
    assert_eq!(found(&web1.to_string()), Ok(web1));
    assert_eq!(found("web1"), Ok(web1));
    assert_eq!(found("we").map_err(|r| r.reason_code()), Err("AMBIGUOUS_REFERENCE"));
    for missing in ["", "db", "vm-0"] {
        assert_eq!(found(missing).map_err(|r| r.class()), Err(RejectionClass::NotFound), "{missing}");
    }
    assert!(pool.state.resolve_host("h").is_ok() && pool.state.resolve_image("lin").is_ok());
}

#[test]
fn an_entry_survives_its_encoding_and_is_bounded() {
    let pool = Pool::new(1);
    let entry = pool.entry(init_pool());
    let bytes = entry.encode().expect("it is small");
    assert_eq!(Entry::decode(&bytes), Ok(entry.clone()));
    assert!(matches!(Entry::decode(&bytes[..9]), Err(EntryError::Codec(_))));

    let cmdline = "x".repeat(proto::limits::RAFT_ENTRY_BYTES_MAX);
    let Command::CreateVm(create) = pool.create_vm("web", vec![], HaPolicy::None) else {
        panic!("it creates")
    };
    let large = pool.entry(Command::CreateVm(crate::command::CreateVm { cmdline, ..create }));
    assert!(matches!(large.check(), Err(EntryError::TooLarge { .. })));
    let unnamed = Entry { request_id: Some(String::new()), ..entry.clone() };
    assert!(matches!(unnamed.check(), Err(EntryError::RequestIdLength { bytes: 0 })));
    let nobody = Entry { principal: "x".repeat(200), ..entry };
    assert!(matches!(nobody.check(), Err(EntryError::PrincipalLength { .. })));
    // Every host would stop where it counts on from it.
    let last_sequences = vec![LastSequence { volume: VolumeId(3), sequence: Sequence(u64::MAX - 1) }];
    let endless = pool.entry(Command::MigrationCommit { migration: MigrationId(4), last_sequences });
    assert!(matches!(endless.check(), Err(EntryError::Codec(_))));
}

#[test]
fn neither_the_key_of_the_pool_nor_a_seed_is_printed() {
    let pool = Pool::new(1);
    let settings = format!("{:?}", pool.state.settings);
    assert!(!settings.contains("ca_key"), "{settings}");
    assert!(format!("{:?}", pool.entry(Command::SetBrake)).contains("Seed(…)"));
}
