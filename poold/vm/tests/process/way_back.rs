//! A guest comes back to a host that has kept its memory: only what has changed is sent.

use crate::migration::{LONG, MIGRATION, Pair, wait_phase};
use crate::support::VmProcess;
use proto::v1;

/// The second migration.
const BACK: u64 = 10;

/// Moves a guest from a process that runs it to one that waits for it; the record.
async fn carry_on(
    source: &VmProcess,
    target: &VmProcess,
    outgoing: v1::StartOutgoingRequest,
    outcome: impl FnOnce() -> v1::MigrationOutcomeRequest,
) -> v1::MigrationRecord {
    let (mut of_source, mut of_target) = (source.client.clone(), target.client.clone());
    let migration_id = outgoing.migration_id;
    of_source.start_outgoing(outgoing).await.unwrap();
    wait_phase(source, "paused").await;
    of_source.commit_proposed(v1::MigrationStepRequest { migration_id }).await.unwrap();
    let outcome = outcome();
    of_source.migration_outcome(outcome.clone()).await.unwrap();
    of_target.migration_outcome(outcome).await.unwrap();
    let done = wait_phase(source, "done").await;
    done.migration.unwrap().record.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_comes_back_brings_only_what_has_changed() {
    // 32 MiB that nothing compresses and the guest leaves alone, and a few pages that it writes to.
    let mut content = vec![0; 32 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    let (pair, outgoing) = Pair::with_initrd("wss=1M rate=1M disk=1", Some(&content)).await;
    let there = carry_on(&pair.source, &pair.target, outgoing.clone(), || {
        pair.host.next_epoch();
        pair.outcome(true)
    })
    .await;
    let request = v1::KeepMemoryRequest { migration_id: MIGRATION };
    let kept = pair.source.client.clone().keep_memory(request).await.unwrap().into_inner();
    assert_eq!(pair.source.client.clone().keep_memory(request).await.unwrap().into_inner(), kept);
    let files = [pair.source.file(kept.memory_fd), pair.source.file(kept.index_fd)];
    drop(pair.source);

    let back = pair.host.spawn_with("vm-7-e3", Some(files)).await;
    let config = v1::MachineConfig { kernel_path: String::new(), ..pair.host.config(3, "") };
    back.client.clone().configure(config).await.unwrap();
    back.extend_lease(LONG, false).await;
    let request = v1::PrepareIncomingRequest {
        migration_id: BACK,
        source_certificate_sha256: pair.target.status().await.certificate_sha256,
        prove_memory: true,
    };
    let endpoint = back.client.clone().prepare_incoming(request).await.unwrap().into_inner();
    let outgoing = v1::StartOutgoingRequest {
        migration_id: BACK,
        address: endpoint.address,
        target_certificate_sha256: endpoint.certificate_sha256,
        ..outgoing
    };
    let record = carry_on(&pair.target, &back, outgoing, || {
        pair.host.next_epoch();
        v1::MigrationOutcomeRequest {
            migration_id: BACK,
            committed: true,
            volumes: vec![pair.host.attachment()],
            epoch: 3,
            paused: false,
        }
    })
    .await;
    assert!(record.memory_proved, "{record:?}");
    assert!(record.pages.as_ref().is_some_and(|pages| pages.reference > 7_000), "{record:?}");
    assert!(record.bytes_sent * 10 < there.bytes_sent, "{} of {}", record.bytes_sent, there.bytes_sent);
    back.wait_beats(3).await;
    let console = back.console().await;
    assert!(!console.contains("PROBE ERROR") && console.contains(" errors=0"), "{console}");
}
