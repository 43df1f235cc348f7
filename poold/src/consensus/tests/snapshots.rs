//! Transfers of snapshots that are cut, damaged, or made while the pool works.

use crate::consensus::service::SnapshotHeader;
use crate::consensus::snapshot_file::{SnapshotContent, encode};
use crate::test_pool::{TestPool, by_admin, eventually};
use openraft::{CommittedLeaderId, LogId, SnapshotMeta, StoredMembership, Vote};
use pool_state::Command;
use proto::v1::RaftMessage;
use proto::v1::raft_service_client::RaftServiceClient;
use std::sync::atomic::{AtomicBool, Ordering};
use tonic::Code;
use tonic::transport::Identity;

/// The messages of a transfer to a host: a state that is far ahead of all others.
fn transfer(target: u64, vote: Vote<u64>) -> Vec<RaftMessage> {
    let last = LogId::new(CommittedLeaderId::new(vote.leader_id().term, 1), 1_000_000);
    let content = SnapshotContent { last_applied: Some(last), ..SnapshotContent::default() };
    let meta = SnapshotMeta {
        last_log_id: Some(last),
        last_membership: StoredMembership::default(),
        snapshot_id: "far-ahead".to_owned(),
    };
    let header = postcard::to_stdvec(&SnapshotHeader { vote, meta }).unwrap();
    let bytes = encode(&content).unwrap();
    let pieces = bytes.chunks(16).map(<[u8]>::to_vec);
    std::iter::once(header).chain(pieces).map(|payload| RaftMessage { target, payload }).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_is_cut_or_damaged_changes_nothing_and_ends_nobody() {
    let pool = TestPool::new(2).await;
    let host = pool.hosts[0].identity();
    let channel = pool.channel(1, Some(Identity::from_pem(&host.cert_pem, &host.key_pem))).await;
    let mut raft = RaftServiceClient::new(channel);
    let target = pool.hosts[1].id.0;
    let vote = pool.hosts[1].consensus().metrics().borrow().vote;
    let whole = transfer(target, vote);
    let before = pool.hosts[1].consensus().local().revision;

    let mut damaged = whole.clone();
    let last = damaged.len() - 1;
    damaged[last].payload[0] ^= 1;
    let mut version = whole.clone();
    version[1].payload[0] ^= 0xff;
    let mut another = transfer(target, Vote::new(vote.leader_id().term + 1, 1));
    another[0] = whole[0].clone();
    for (what, messages) in [
        ("cut", whole[..last].to_vec()),
        ("the header alone", whole[..1].to_vec()),
        ("damaged", damaged),
        ("of another version", version),
        ("another one than announced", another),
        ("nothing", Vec::new()),
    ] {
        let refused = raft.install_snapshot(tokio_stream::iter(messages)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{what}: {refused:?}");
    }
    // The sender dies in the middle of it.
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    let call = tokio::spawn({
        let mut raft = raft.clone();
        async move { raft.install_snapshot(tokio_stream::wrappers::ReceiverStream::new(receiver)).await }
    });
    for message in whole.iter().take(4).cloned() {
        sender.send(message).await.unwrap();
    }
    call.abort();
    let _ = call.await;

    let index = pool.change(1, 1).await.unwrap();
    let state = pool.hosts[1].consensus().read_linearizable().await.unwrap();
    assert!(state.revision >= index && state.revision >= before && state.revision < 1_000_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_joins_by_snapshot_while_the_log_is_written_and_compacted() {
    let mut pool = TestPool::new(1).await;
    let consensus = pool.hosts[0].consensus().clone();
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let load = tokio::spawn({
        let (consensus, stop) = (consensus.clone(), stop.clone());
        async move {
            let mut last = 0;
            for number in 0_u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let labels = [("round".to_owned(), Some(number.to_string()))].into();
                let command = Command::SetHostLabels { host: consensus.host_id(), labels };
                last = consensus.propose(command, by_admin()).await.unwrap().0;
            }
            last
        }
    });
    let compact = async || {
        let applied = consensus.local().revision;
        let mut metrics = consensus.metrics();
        consensus.raft().trigger().snapshot().await.unwrap();
        metrics.wait_for(|now| now.snapshot.is_some_and(|id| id.index >= applied)).await.unwrap();
        consensus.raft().trigger().purge_log(applied).await.unwrap();
    };
    compact().await;
    for _ in 0..2 {
        pool.grow().await;
        compact().await;
    }
    stop.store(true, Ordering::Relaxed);
    let last = load.await.unwrap();
    for host in &pool.hosts {
        eventually("every host has everything", async || host.consensus().local().revision >= last).await;
    }
    let labels =
        |at: usize| pool.hosts[at].consensus().local().host(consensus.host_id()).unwrap().labels.clone();
    assert!(labels(1) == labels(0) && labels(2) == labels(0));
}
