//! The stores, and what a host does when they are gone.

use crate::consensus::log_store::{LogOpenError, LogOwner, LogStore};
use crate::consensus::state_store::StateStore;
use crate::consensus::{Consensus, StartError, StartOptions, TypeConfig};
use crate::test_pool::TestPool;
use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};
use pool_state::{Timing, features::NEWEST};
use proto::HostId;
use tempfile::TempDir;

struct Builder;

fn owner(host: u64) -> LogOwner {
    LogOwner { pool_id: "p".to_owned(), host: HostId(host) }
}

impl StoreBuilder<TypeConfig, LogStore, StateStore, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateStore), StorageError<u64>> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let raft = dir.path().join("raft");
        LogStore::create(&raft, &owner(1)).await.expect("a fresh folder can be written");
        let log = LogStore::open(&raft, &owner(1)).await.expect("a fresh log opens");
        let (state, _) =
            StateStore::open(&dir.path().join("snapshots"), NEWEST).expect("a fresh store opens");
        Ok((dir, log, state))
    }
}

#[test]
fn the_stores_pass_the_suite_of_openraft() {
    Suite::test_all(Builder).unwrap();
}

#[tokio::test]
async fn a_log_opens_for_its_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let raft = dir.path().join("raft");
    assert!(matches!(LogStore::open(&raft, &owner(1)).await, Err(LogOpenError::Lost { .. })));
    assert!(!raft.exists(), "a lost log was replaced by an empty one");
    LogStore::create(&raft, &owner(1)).await.unwrap();
    assert!(matches!(LogStore::open(&raft, &owner(2)).await, Err(LogOpenError::Foreign { .. })));
    LogStore::open(&raft, &owner(1)).await.unwrap();
}

async fn start_again(pool: &TestPool) -> Result<Consensus, StartError> {
    let host = &pool.hosts[0];
    let options = StartOptions {
        data_dir: &host.data_dir,
        pool_id: "pool-of-a-test",
        host: host.id,
        timing: Timing::fast(),
        feature_level: NEWEST,
        identity: crate::identity::SharedIdentity::new(host.identity()),
    };
    Consensus::start(options).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_whose_log_is_gone_does_not_vote_again() {
    let mut pool = TestPool::new(1).await;
    pool.hosts[0].kill().await;
    std::fs::remove_dir_all(pool.hosts[0].data_dir.join("raft")).unwrap();
    let error = start_again(&pool).await.err();
    assert!(matches!(error, Some(StartError::Log { source: LogOpenError::Lost { .. }, .. })), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_whose_snapshot_is_gone_does_not_start_from_nothing() {
    let mut pool = TestPool::new(1).await;
    for secret in 0..20 {
        pool.change(0, secret).await.unwrap();
    }
    let consensus = pool.hosts[0].consensus().clone();
    let applied = consensus.local().revision;
    consensus.raft().trigger().snapshot().await.unwrap();
    let mut metrics = consensus.metrics();
    metrics.wait_for(|now| now.snapshot.is_some_and(|id| id.index >= applied)).await.unwrap();
    consensus.raft().trigger().purge_log(applied).await.unwrap();
    metrics.wait_for(|now| now.purged.is_some_and(|id| id.index >= applied)).await.unwrap();
    drop(metrics);
    drop(consensus);
    pool.hosts[0].kill().await;

    // With its snapshot it comes back, although the log no longer has the beginning.
    pool.hosts[0].start().await;
    let state = pool.hosts[0].consensus().read_linearizable().await.unwrap();
    assert_eq!(state.tokens.len(), 20);
    drop(state);
    pool.hosts[0].kill().await;

    std::fs::remove_dir_all(pool.hosts[0].data_dir.join("snapshots")).unwrap();
    let error = start_again(&pool).await.err();
    assert!(matches!(error, Some(StartError::SnapshotLost { .. })), "{error:?}");
}
