//! A target dies after the commit: before the guest ran there it goes on at its source, and otherwise it never does.

use crate::migration::{MIGRATION, Pair, wait_phase};
use proto::v1;

/// Everything is at the target, and the commit is about to be proposed.
async fn ready_to_commit() -> Pair {
    let (pair, outgoing) = Pair::new().await;
    let mut source = pair.source.client.clone();
    source.start_outgoing(outgoing).await.unwrap();
    wait_phase(&pair.source, "paused").await;
    source.commit_proposed(v1::MigrationStepRequest { migration_id: MIGRATION }).await.unwrap();
    // The pool commits.
    pair.host.next_epoch();
    pair
}

/// The pool gives the machine back: the next epoch.
fn given_back(pair: &Pair) -> v1::TakeBackRequest {
    pair.host.next_epoch();
    v1::TakeBackRequest { migration_id: MIGRATION, volumes: vec![pair.host.attachment()], epoch: 3 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_target_died_before_it_ran_goes_on_with_its_memory_and_its_disk() {
    let mut pair = ready_to_commit().await;
    let mut source = pair.source.client.clone();
    source.migration_outcome(pair.outcome(true)).await.unwrap();
    let said = pair.source.console().await;
    pair.target.kill();
    let request = given_back(&pair);
    let answer = source.take_back(request.clone()).await.unwrap().into_inner();
    assert_eq!((answer.epoch, answer.volumes[0].state.as_str()), (3, "active"));
    source.take_back(request).await.unwrap();
    wait_phase(&pair.source, "aborted").await;
    pair.source.wait_state("running").await;
    pair.source.wait_beats(5).await;
    let console = pair.source.console().await;
    let since = console.strip_prefix(&said).expect("the console goes on where it was");
    assert!(!since.contains("PROBE boot") && !since.contains("PROBE ERROR"), "{console}");
    assert!(since.contains("PROBE disk acked=") && since.contains(" errors=0"), "{console}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_may_have_run_at_the_target_does_not_go_on_at_its_source() {
    let mut pair = ready_to_commit().await;
    let mut source = pair.source.client.clone();
    pair.target.client.clone().migration_outcome(pair.outcome(true)).await.unwrap();
    pair.target.wait_beats(1).await;
    pair.target.kill();
    let beats = pair.source.beats().await;
    let refused = source.take_back(given_back(&pair)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Internal, "{refused}");
    let failed = pair.source.wait_state("failed").await;
    assert!(
        failed.error.contains("may have been active") || failed.error.contains("runs there"),
        "{failed:?}"
    );
    assert_eq!(pair.source.beats().await, beats, "it ran again");
}
