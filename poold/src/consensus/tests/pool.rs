//! Pools of several hosts in one process, over real TLS.

use crate::consensus::{ProposeError, ProposeMeta, ReadError};
use crate::join::JoinError;
use crate::test_pool::{SOON, TestPool, by_admin, eventually, has_change};
use pool_state::{Command, Rejection};
use proto::HostId;
use proto::v1::host_service_client::HostServiceClient;
use proto::v1::raft_service_client::RaftServiceClient;
use proto::v1::{LeaveRequest, ListHostsRequest, RaftMessage, RequestMeta};
use std::time::{Duration, Instant};
use tonic::Code;
use tonic::transport::Identity;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_the_leader() {
    let mut pool = TestPool::new(3).await;
    pool.change(0, 1).await.unwrap();
    let dead = pool.leader().await;
    pool.hosts[dead].kill().await;
    let alive = (dead + 1) % 3;
    eventually("the others accept a change", async || pool.change(alive, 2).await.is_ok()).await;
    let state = pool.hosts[(dead + 2) % 3].consensus().read_linearizable().await.unwrap();
    assert!(has_change(&state, 1) && has_change(&state, 2), "{:?}", state.tokens);

    // It returns, catches up and counts again: now another one may die.
    pool.hosts[dead].start().await;
    let state = pool.hosts[dead].consensus().read_linearizable().await;
    assert!(state.is_ok_and(|state| has_change(&state, 2)));
    pool.hosts[alive].kill().await;
    eventually("the returned host helps to decide", async || pool.change(dead, 3).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_host_takes_a_change_and_every_host_reads_it() {
    let pool = TestPool::new(3).await;
    for (at, secret) in [(0, 1), (1, 2), (2, 3)] {
        let index = pool.change(at, secret).await.unwrap();
        for host in &pool.hosts {
            let state = host.consensus().read_linearizable().await.unwrap();
            assert!(state.revision >= index, "{}: {} < {index}", host.id, state.revision);
            assert!(has_change(&state, secret));
        }
    }
    // Rejections come back as such, also when forwarded.
    for host in &pool.hosts {
        let command = Command::RevokeToken { token: proto::TokenId(1) };
        let error = host.consensus().propose(command, by_admin()).await.err();
        assert!(matches!(error, Some(ProposeError::Rejected(Rejection::NotFound { .. }))), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_leader_decided_is_proposed_by_it_in_its_term_or_not_at_all() {
    let pool = TestPool::new(3).await;
    let leader = pool.leader().await;
    let term = pool.hosts[leader].consensus().term();
    let token = |secret: u8| Command::CreateToken { secret_hash: [secret; 32], ttl_ms: 3_600_000 };
    pool.hosts[leader].consensus().propose_as_leader(term, token(1), by_admin()).await.unwrap();
    let earlier = pool.hosts[leader].consensus().propose_as_leader(term - 1, token(2), by_admin()).await;
    assert!(matches!(earlier, Err(ProposeError::NoQuorum)), "{earlier:?}");
    let follower = (leader + 1) % 3;
    let elsewhere = pool.hosts[follower].consensus().propose_as_leader(term, token(3), by_admin()).await;
    assert!(
        matches!(elsewhere, Err(ProposeError::NoQuorum)),
        "handed on to a leader that did not decide it: {elsewhere:?}"
    );
    let state = pool.hosts[leader].consensus().read_linearizable().await.unwrap();
    let changes = [1, 2, 3].map(|secret| has_change(&state, secret));
    assert_eq!(changes, [true, false, false], "{:?}", state.tokens);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_is_applied_once() {
    let pool = TestPool::new(3).await;
    let meta = || ProposeMeta { request_id: Some("one".to_owned()), ..by_admin() };
    let command = || Command::CreateToken { secret_hash: [9; 32], ttl_ms: 3_600_000 };
    let mut outcomes = Vec::new();
    for host in &pool.hosts {
        outcomes.push(host.consensus().propose(command(), meta()).await.unwrap().1);
    }
    assert!(outcomes.windows(2).all(|pair| pair[0] == pair[1]), "{outcomes:?}");
    let state = pool.hosts[0].consensus().read_linearizable().await.unwrap();
    assert_eq!(state.tokens.values().filter(|token| token.secret_hash == [9; 32]).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_a_majority_promises_nothing() {
    let mut pool = TestPool::new(3).await;
    let leader = pool.leader().await;
    for other in (0..3).filter(|index| *index != leader) {
        pool.hosts[other].kill().await;
    }
    let alone = pool.hosts[leader].consensus().clone();
    // The age of the last proof grows with the time that has passed, however old openraft's metrics are.
    let silent_since = Instant::now();
    eventually("two seconds without a majority", async || silent_since.elapsed() > Duration::from_secs(2))
        .await;
    let age = alone.quorum_ack_age();
    assert!(age.is_none_or(|age| age > Duration::from_millis(1_800)), "{age:?}");

    let start = Instant::now();
    let changed = pool.change(leader, 1).await;
    assert!(matches!(changed, Err(ProposeError::NoQuorum)), "{changed:?}");
    let read = alone.read_linearizable().await.err();
    assert!(matches!(read, Some(ReadError::NoQuorum)), "{read:?}");
    assert!(start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());

    for other in (0..3).filter(|index| *index != leader) {
        pool.hosts[other].start().await;
    }
    eventually("the pool decides again", async || pool.change(leader, 2).await.is_ok()).await;
    let state = alone.read_linearizable().await.unwrap();
    assert!(!has_change(&state, 1), "a refused change was made");
    eventually("the proof is young again", async || {
        let leader = pool.leader().await;
        pool.hosts[leader].consensus().quorum_ack_age().is_some_and(|age| age < Duration::from_secs(1))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_voters_that_its_leader_did_not_finish_is_finished() {
    let pool = TestPool::new(3).await;
    let leader = pool.leader().await;
    let consensus = pool.hosts[leader].consensus().clone();
    let configs = |consensus: &crate::consensus::Consensus| {
        consensus.metrics().borrow().membership_config.membership().get_joint_config().clone()
    };
    let before = consensus.metrics().borrow().membership_config.log_id().map(|id| id.index);
    let fewer: std::collections::BTreeSet<u64> = pool
        .hosts
        .iter()
        .map(|host| host.id.0)
        .filter(|id| *id != pool.hosts[(leader + 1) % 3].id.0)
        .collect();
    let mut metrics = consensus.metrics();
    // As if the leader had died after the first of the two entries.
    tokio::select! {
        biased;
        seen = metrics.wait_for(|now| now.membership_config.membership().get_joint_config().len() == 2) => {
            drop(seen.unwrap());
        }
        changed = consensus.raft().change_membership(fewer, true) => panic!("not cut short: {changed:?}"),
    }
    for host in &pool.hosts {
        eventually("every host has the voters that are due, and no half-way change", async || {
            let configs = configs(host.consensus());
            let log_id = host.consensus().metrics().borrow().membership_config.log_id().map(|id| id.index);
            log_id > before && configs.len() == 1 && configs[0].len() == 3
        })
        .await;
    }
}

/// Takes a host out over the API of another one, as an operator does.
async fn remove(pool: &TestPool, at: usize, host: HostId) {
    let mut client = HostServiceClient::new(pool.admin_channel(at).await);
    let request = LeaveRequest {
        meta: Some(RequestMeta { request_id: format!("remove {host}") }),
        host: pool.hosts[at].consensus().local().host_name(host),
        force: false,
    };
    let removed = client.leave(request.clone()).await.unwrap().into_inner();
    assert_eq!((removed.id, removed.state.as_str()), (host.0, "removed"));
    // A client that missed the answer asks again, although the name is free now.
    assert_eq!(client.leave(request).await.unwrap().into_inner().id, host.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_host_is_refused_and_comes_back_as_another_one() {
    let mut pool = TestPool::new(3).await;
    let removed = pool.hosts.remove((pool.leader().await + 1) % 3);
    let identity = removed.identity();
    remove(&pool, 0, removed.id).await;
    for host in &pool.hosts {
        eventually("every host has put it out", async || host.consensus().is_out(removed.id)).await;
    }
    // The host still runs, and its certificate is still signed by the CA; but nobody listens to it.
    let channel = pool.channel(0, Some(Identity::from_pem(&identity.cert_pem, &identity.key_pem))).await;
    let message = RaftMessage { target: pool.hosts[0].id.0, payload: Vec::new() };
    let refused = RaftServiceClient::new(channel.clone()).vote(message).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    let refused = HostServiceClient::new(channel).list(ListHostsRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    // Its operator is told so when joining with the old folder again.
    let token = pool.token(3600).await.encode();
    let name = removed.data_dir.file_name().unwrap().to_string_lossy();
    let joined = pool.join(&name, &token).await.map(|host| host.id);
    assert!(matches!(joined, Err(JoinError::WasRemoved { .. })), "{joined:?}");
    let voters = || pool.hosts[0].consensus().voters().len();
    eventually("two hosts have one voter", async || voters() == 1).await;
    let term = pool.hosts[0].consensus().term();
    pool.change(0, 1).await.unwrap();

    pool.grow().await;
    let again = pool.hosts.last().unwrap();
    assert_ne!(again.id, removed.id);
    assert_eq!(pool.hosts[0].consensus().term(), term, "the removed host forced an election");
    drop(removed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_can_be_removed() {
    let mut pool = TestPool::new(4).await;
    let leader = pool.leader().await;
    let removed = pool.hosts.remove(leader);
    remove(&pool, 0, removed.id).await;
    eventually("the others go on", async || pool.change(0, 1).await.is_ok()).await;
    for host in &pool.hosts {
        eventually("every host has put it out", async || host.consensus().is_out(removed.id)).await;
    }
    eventually("three hosts vote", async || pool.hosts[0].consensus().voters().len() == 3).await;
    assert!(!pool.hosts[0].consensus().voters().contains(&removed.id));
    // It still runs, with the state of the day it left; clients must not take that for the pool's.
    pool.hosts.push(removed);
    let mut client = HostServiceClient::new(pool.admin_channel(3).await);
    let refused = client.list(ListHostsRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_host_gets_the_state_by_snapshot_when_the_log_is_gone() {
    let mut pool = TestPool::new(1).await;
    for secret in 0..50 {
        pool.change(0, secret).await.unwrap();
    }
    let consensus = pool.hosts[0].consensus().clone();
    let applied = consensus.local().revision;
    consensus.raft().trigger().snapshot().await.unwrap();
    let mut metrics = consensus.metrics();
    metrics.wait_for(|now| now.snapshot.is_some_and(|id| id.index >= applied)).await.unwrap();
    consensus.raft().trigger().purge_log(applied).await.unwrap();
    metrics.wait_for(|now| now.purged.is_some_and(|id| id.index >= applied)).await.unwrap();

    pool.grow().await;
    let state = pool.hosts[1].consensus().read_linearizable().await.unwrap();
    assert!(state.tokens.len() >= 50, "{}", state.tokens.len());
    let files = std::fs::read_dir(pool.hosts[1].data_dir.join("snapshots")).unwrap().count();
    assert_eq!(files, 1, "the state did not come as a snapshot");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_for_another_host_or_from_no_host_are_not_obeyed() {
    let pool = TestPool::new(2).await;
    let host = pool.hosts[1].identity();
    let as_host = pool.channel(0, Some(Identity::from_pem(&host.cert_pem, &host.key_pem))).await;
    let mut raft = RaftServiceClient::new(as_host);
    let message = |target| RaftMessage { target, payload: vec![0xff; 64] };
    assert_eq!(raft.append(message(2)).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(raft.append(message(1)).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(raft.propose(message(1)).await.unwrap_err().code(), Code::InvalidArgument);
    let mut as_user = RaftServiceClient::new(pool.admin_channel(0).await);
    assert_eq!(as_user.append(message(1)).await.unwrap_err().code(), Code::PermissionDenied);
    let mut as_nobody = RaftServiceClient::new(pool.channel(0, None).await);
    assert_eq!(as_nobody.append(message(1)).await.unwrap_err().code(), Code::Unauthenticated);
    pool.change(0, 1).await.unwrap();
}

/// Prints what a commit costs with three voters: `cargo test -p poold --lib commit_latency -- --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commit_latency_with_three_voters_is_bounded() {
    const COMMITS: u16 = 300;
    let pool = TestPool::new(3).await;
    let leader = pool.leader().await;
    for (what, at) in [("at the leader", leader), ("forwarded", (leader + 1) % 3)] {
        let consensus = pool.hosts[at].consensus();
        let mut taken = Vec::new();
        for round in 0..COMMITS {
            let mut secret_hash = [at as u8 + 1; 32];
            secret_hash[..2].copy_from_slice(&round.to_be_bytes());
            let created = Command::CreateToken { secret_hash, ttl_ms: 3_600_000 };
            let start = Instant::now();
            let (_, outcome) = consensus.propose(created, by_admin()).await.unwrap();
            taken.push(start.elapsed());
            let pool_state::Outcome::Token(token) = outcome else { panic!("{outcome:?}") };
            consensus.propose(Command::RevokeToken { token }, by_admin()).await.unwrap();
        }
        taken.sort_unstable();
        let at = |share: f64| taken[(taken.len() as f64 * share) as usize];
        let (p50, p99, max) = (at(0.50), at(0.99), taken[taken.len() - 1]);
        eprintln!("commit {what}: p50 {p50:?}, p99 {p99:?}, max {max:?}");
        assert!(p50 < SOON / 100, "{p50:?}");
    }
}
