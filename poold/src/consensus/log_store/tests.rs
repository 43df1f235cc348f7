//! The log against interrupted purges, damage, and a disk that fails.

use super::*;
use openraft::{CommittedLeaderId, EntryPayload};

fn log_id(index: u64) -> LogId<u64> {
    LogId::new(CommittedLeaderId::new(1, 1), index)
}

/// A log with these entries, marked as purged up to `purged`.
async fn log(dir: &Path, indices: impl Iterator<Item = u64>, purged: Option<u64>) -> LogStore {
    let owner = LogOwner { pool_id: "p".to_owned(), host: HostId(1) };
    LogStore::create(dir, &owner).await.unwrap();
    let store = LogStore::open(dir, &owner).await.unwrap();
    for index in indices {
        let entry = Entry::<TypeConfig> { log_id: log_id(index), payload: EntryPayload::Blank };
        store.shared.log.insert(key(index), seal(&entry).unwrap()).unwrap();
    }
    if let Some(purged) = purged {
        store.put(PURGED, &log_id(purged)).unwrap();
    }
    store.sync().await.unwrap();
    drop(store);
    LogStore::open(dir, &owner).await.unwrap()
}

#[tokio::test]
async fn a_disk_that_can_not_sync_ends_raft() {
    use crate::consensus::clients::HostClients;
    use crate::consensus::flusher::failing_file;
    use crate::consensus::network::Network;
    use crate::consensus::{PoolRaft, state_store::StateStore};
    use crate::identity::{HostIdentity, SharedIdentity};
    let dir = tempfile::tempdir().unwrap();
    let db = sled::Config::new().path(dir.path().join("raft")).flush_every_ms(None).open().unwrap();
    let (log, meta) = (db.open_tree("log").unwrap(), db.open_tree("meta").unwrap());
    let flusher = Flusher::spawn(db, failing_file(), dir.path()).unwrap();
    let reached = Arc::new(Reached::open(dir.path()).unwrap());
    let log = LogStore { shared: Arc::new(Shared { log, meta, flusher, reached }) };
    let (store, state) =
        StateStore::open(&dir.path().join("snapshots"), pool_state::features::NEWEST).unwrap();
    let [ca_pem, cert_pem, key_pem] = [const { String::new() }; 3];
    let network = Network::new(HostClients::new(
        SharedIdentity::new(HostIdentity { ca_pem, cert_pem, key_pem }),
        state,
    ));
    let config = Arc::new(openraft::Config::default());
    let raft = PoolRaft::new(1, config, network, log, store).await.unwrap();
    let node = std::collections::BTreeMap::from([(1, openraft::BasicNode::new("here"))]);
    assert!(raft.initialize(node).await.is_err());
    let mut metrics = raft.metrics();
    let ended = metrics.wait_for(|now| now.running_state.is_err());
    tokio::time::timeout(std::time::Duration::from_secs(10), ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_interrupted_purge_is_finished_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    // A snapshot up to 100 was installed over a log that ended at 50; the power went before its entries were deleted.
    let mut store = log(dir.path(), 1..=50, Some(100)).await;
    let state = store.get_log_state().await.unwrap();
    assert_eq!(state.last_log_id, Some(log_id(100)));
    assert!(store.try_get_log_entries(0..200).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_start_that_the_power_or_the_space_ended_does_not_damage_the_log() {
    let dir = tempfile::tempdir().unwrap();
    drop(log(dir.path(), 1..=50, None).await);
    let unfinished = dir.path().join("snap.00000000000FFFFF.generating");
    fs::write(&unfinished, b"").unwrap();
    let owner = LogOwner { pool_id: "p".to_owned(), host: HostId(1) };
    let mut store = LogStore::open(dir.path(), &owner).await.unwrap();
    assert_eq!(store.try_get_log_entries(0..200).await.unwrap().len(), 50);
    assert!(!unfinished.exists());
}

#[tokio::test]
async fn a_peer_gets_no_more_than_one_message_holds() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = log(dir.path(), 1..=10, None).await;
    assert_eq!(store.limited_get_log_entries(1, 11).await.unwrap().len(), 10);
    assert_eq!(store.limited_get_log_entries(3, 5).await.unwrap().len(), 2);
    let large = pool_state::Command::UpdateHost(pool_state::command::UpdateHost {
        host: HostId(1),
        incarnation: proto::Incarnation("i".repeat(200 << 10)),
        replica_fingerprint: proto::CertificateFingerprint([0; 32]),
        boot_id: String::new(),
        address: String::new(),
        vm_memory: proto::ByteCount(0),
    });
    let entry = |index| Entry::<TypeConfig> {
        log_id: log_id(index),
        payload: EntryPayload::Normal(pool_state::Entry {
            request_id: None,
            principal: String::new(),
            time_ms: 0,
            seed: pool_state::Seed([0; 32]),
            command: large.clone(),
        }),
    };
    for index in 1..=10 {
        store.shared.log.insert(key(index), seal(&entry(index)).unwrap()).unwrap();
    }
    assert_eq!(store.limited_get_log_entries(1, 11).await.unwrap().len(), 6);
    assert_eq!(store.limited_get_log_entries(10, 11).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_log_with_a_hole_or_a_flipped_bit_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = log(dir.path(), (1..=10).filter(|index| *index != 5), None).await;
    assert_eq!(store.try_get_log_entries(1..5).await.unwrap().len(), 4);
    assert!(store.try_get_log_entries(1..11).await.is_err());
    let mut sealed = store.shared.log.get(key(3)).unwrap().unwrap().to_vec();
    sealed[0] ^= 1;
    store.shared.log.insert(key(3), sealed).unwrap();
    assert!(store.try_get_log_entries(1..5).await.is_err());
}

#[tokio::test]
async fn a_log_that_is_just_being_closed_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    drop(log(dir.path(), 1..=3, None).await);
    let file = File::open(dir.path().join(DB_FILE)).unwrap();
    let held = Flock::lock(file, FlockArg::LockExclusive).unwrap();
    let owner = LogOwner { pool_id: "p".to_owned(), host: HostId(1) };
    // Polled first, so that it finds the lock taken.
    let (opened, ()) = tokio::join!(LogStore::open(dir.path(), &owner), async { drop(held) });
    assert_eq!(opened.unwrap().try_get_log_entries(..).await.unwrap().len(), 3);
}

#[tokio::test]
async fn a_log_that_ends_before_what_was_acknowledged_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let owner = LogOwner { pool_id: "p".to_owned(), host: HostId(1) };
    let mut store = log(dir.path(), 1..=10, None).await;
    store.shared.reached.appended(10).unwrap();
    store.save_vote(&Vote::new(3, 1)).await.unwrap();
    // Cut off on purpose, as a new leader asks for.
    store.truncate(log_id(8)).await.unwrap();
    drop(store);
    let store = LogStore::open(dir.path(), &owner).await.unwrap();
    // What sled does with a record whose bits have turned: it and everything behind it is gone.
    store.remove(key(7)..).unwrap();
    store.sync().await.unwrap();
    drop(store);
    let refused = LogStore::open(dir.path(), &owner).await.err().unwrap();
    assert!(
        matches!(refused, LogOpenError::Reverted { last: 6, acknowledged: 7, voted: 3, .. }),
        "{refused}"
    );
    assert!(refused.to_string().contains("poolctl host forget"), "{refused}");
    // A snapshot that was installed over it has everything.
    let store = LogStore::open_files(dir.path()).await.unwrap();
    store.put(PURGED, &log_id(100)).unwrap();
    store.sync().await.unwrap();
    drop(store);
    let store = LogStore::open(dir.path(), &owner).await.unwrap();
    store.put(VOTE, &Vote::<u64>::new(2, 1)).unwrap();
    store.sync().await.unwrap();
    drop(store);
    let refused = LogStore::open(dir.path(), &owner).await.err().unwrap();
    assert!(
        matches!(refused, LogOpenError::Reverted { term: 2, voted: 3, .. }),
        "a vote was lost: {refused}"
    );
}
