//! A pool that has lost its majority.

use crate::consensus::backup;
use crate::consensus::recover::{KEPT_DIR, Place, RecoverError, follow, lead};
use crate::test_pool::{TestHost, TestPool, eventually, has_change};
use pool_state::features::NEWEST;
use pool_state::recovery::{JUMP, RecoveryError};
use proto::HostId;

fn place(host: &TestHost) -> Place<'_> {
    Place { data_dir: &host.data_dir, pool_id: "pool-of-a-test", host: host.id, feature_level: NEWEST }
}

fn knows(host: &TestHost, secret: u8) -> bool {
    has_change(&host.consensus().local(), secret)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn survivors_go_on_and_the_others_are_strangers() {
    let mut pool = TestPool::new(5).await;
    pool.change(0, 1).await.unwrap();
    eventually("all know it", async || pool.hosts.iter().all(|host| knows(host, 1))).await;
    let before = pool.hosts[0].consensus().local().revision;
    for host in &mut pool.hosts {
        host.kill().await;
    }
    let survivors = [pool.hosts[0].id, pool.hosts[1].id];
    lead(place(&pool.hosts[0]), &survivors, None).await.unwrap();
    assert!(pool.hosts[0].data_dir.join(KEPT_DIR).join("raft").exists(), "the old log is kept");
    follow(place(&pool.hosts[1])).await.unwrap();
    pool.hosts[0].start().await;
    eventually("it decides alone", async || pool.change(0, 2).await.is_ok()).await;
    pool.hosts[1].start().await;
    eventually("the other survivor follows", async || knows(&pool.hosts[1], 2)).await;
    assert!(knows(&pool.hosts[1], 1), "what was acknowledged before is still there");
    let state = pool.hosts[0].consensus().local();
    assert!(state.revision > before + JUMP);
    assert_eq!(state.members().map(|host| host.id).collect::<Vec<_>>(), survivors);

    // One of the old majority comes back with all that it knows: nobody listens.
    pool.hosts[2].start().await;
    let index = pool.change(0, 3).await.unwrap();
    assert!(index > before + JUMP);
    assert!(!knows(&pool.hosts[2], 3), "a removed host learns nothing");
    assert_eq!(pool.leader_of(0), Some(pool.hosts[0].id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_is_refused_or_completed_but_never_half_done() {
    let mut pool = TestPool::new(3).await;
    pool.change(0, 1).await.unwrap();
    let state = pool.hosts[0].consensus().read_linearizable().await.unwrap();
    let saved = backup::encode(&state).unwrap();
    pool.change(0, 2).await.unwrap();
    for host in &mut pool.hosts {
        host.kill().await;
    }
    let host = place(&pool.hosts[0]);
    let stranger = lead(host, &[host.host, HostId(9_999)], None).await.unwrap_err();
    assert!(matches!(stranger, RecoverError::State(RecoveryError::NoMember { .. })), "{stranger}");
    // Again, and now from the backup: what came after it is gone.
    lead(host, &[host.host], Some(&saved)).await.unwrap();
    pool.hosts[0].start().await;
    eventually("it decides alone", async || pool.change(0, 3).await.is_ok()).await;
    assert!(knows(&pool.hosts[0], 1) && !knows(&pool.hosts[0], 2));
}
