//! A running probe guest moves between two real processes, both ends as two daemons would drive them.

use crate::support::{Host, VmProcess, until};
use proto::v1;
use std::path::Path;
use std::time::Duration;

pub const LONG: Duration = Duration::from_secs(600);
pub const MIGRATION: u64 = 9;
const CMDLINE: &str = "wss=16M rate=0 disk=1";

pub struct Pair {
    pub host: Host,
    pub source: VmProcess,
    pub target: VmProcess,
}

impl Pair {
    /// A running source, and a target that listens.
    pub async fn new() -> (Self, v1::StartOutgoingRequest) {
        Self::with_guest(CMDLINE).await
    }

    /// With a guest that does this.
    pub async fn with_guest(cmdline: &str) -> (Self, v1::StartOutgoingRequest) {
        Self::with_initrd(cmdline, None).await
    }

    /// With this content in its memory, too.
    pub async fn with_initrd(cmdline: &str, initrd: Option<&[u8]>) -> (Self, v1::StartOutgoingRequest) {
        let host = Host::new().await;
        let source = host.spawn("vm-7-e1").await;
        let mut config = host.config(1, cmdline);
        if let Some(content) = initrd {
            // Beside its kernel: it sees nothing else.
            let path = Path::new(&config.kernel_path).with_file_name("initrd");
            std::fs::write(&path, content).unwrap();
            config.initrd_path = path.display().to_string();
        }
        source.boot(config, LONG).await;
        source.wait_beats(3).await;
        let target = host.spawn("vm-7-e2").await;
        let config = v1::MachineConfig { kernel_path: String::new(), ..host.config(2, "") };
        target.client.clone().configure(config).await.unwrap();
        target.extend_lease(LONG, false).await;
        let request = v1::PrepareIncomingRequest {
            migration_id: MIGRATION,
            source_certificate_sha256: source.status().await.certificate_sha256,
            prove_memory: true,
        };
        let endpoint = target.client.clone().prepare_incoming(request.clone()).await.unwrap().into_inner();
        let again = target.client.clone().prepare_incoming(request).await.unwrap().into_inner();
        assert_eq!(endpoint, again, "a daemon that asks again gets the same answer");
        target.wait_state("incoming").await;
        let outgoing = v1::StartOutgoingRequest {
            migration_id: MIGRATION,
            address: endpoint.address,
            target_certificate_sha256: endpoint.certificate_sha256,
            policy: "must-finish".to_owned(),
            bandwidth_bytes_per_s: 0,
            downtime_ms: 300,
            prove_memory: true,
            prove_all_memory: true,
            connections: 1,
        };
        (Self { host, source, target }, outgoing)
    }

    pub fn outcome(&self, committed: bool) -> v1::MigrationOutcomeRequest {
        v1::MigrationOutcomeRequest {
            migration_id: MIGRATION,
            committed,
            volumes: vec![self.host.attachment()],
            epoch: 2,
            paused: false,
        }
    }
}

/// Follows the migration to its end, as a daemon does; all phases that it was told.
async fn watch(process: &VmProcess) -> tokio::task::JoinHandle<Vec<String>> {
    let request = v1::WatchMigrationRequest { migration_id: MIGRATION };
    let mut stream = process.client.clone().watch_migration(request).await.unwrap().into_inner();
    tokio::spawn(async move {
        let mut phases = Vec::new();
        while let Some(status) = stream.message().await.unwrap() {
            phases.extend(status.migration.map(|migration| migration.phase));
        }
        phases
    })
}

pub async fn wait_phase(process: &VmProcess, word: &str) -> v1::MachineStatus {
    until(word, || async {
        let status = process.status().await;
        let phase = status.migration.as_ref().map(|migration| migration.phase.clone());
        assert!(phase.as_deref() == Some(word) || phase.as_deref() != Some("failed"), "{status:?}");
        (phase.as_deref() == Some(word)).then_some(status)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guest_moves_with_its_memory_and_its_disk() {
    let (mut pair, outgoing) = Pair::new().await;
    let (mut source, mut target) = (pair.source.client.clone(), pair.target.client.clone());
    source.start_outgoing(outgoing.clone()).await.unwrap();
    source.start_outgoing(outgoing).await.unwrap();
    let watched = watch(&pair.source).await;
    let paused = wait_phase(&pair.source, "paused").await;
    assert_eq!(paused.state, "paused");
    let last = &paused.migration.unwrap().last_sequences;
    assert_eq!(last.len(), 1);
    assert!(last[0].sequence > 0, "the guest has written to its disk");
    let step = v1::MigrationStepRequest { migration_id: MIGRATION };
    source.commit_proposed(step).await.unwrap();
    source.commit_proposed(step).await.unwrap();
    // The console comes with the state; a guest that ran there would have said more.
    let said = pair.source.console().await;
    assert_eq!(pair.target.console().await, said, "nothing ran at the target before the commit");
    // The pool commits: new epoch, new secret.
    pair.host.next_epoch();
    source.migration_outcome(pair.outcome(true)).await.unwrap();
    let answer = target.migration_outcome(pair.outcome(true)).await.unwrap().into_inner();
    assert_eq!((answer.state.as_str(), answer.epoch), ("running", 2));
    target.migration_outcome(pair.outcome(true)).await.unwrap();
    pair.target.wait_beats(5).await;
    assert_eq!(wait_phase(&pair.target, "resumed").await.volumes[0].state, "active");
    let console = pair.target.console().await;
    // The guest goes on: it does not boot again, and finds every page and block as it left them.
    let here = console.strip_prefix(&said).expect("the console goes on where it was");
    assert!(!here.contains("PROBE boot") && !here.contains("PROBE ERROR"), "{console}");
    assert!(here.contains("PROBE disk acked=") && here.contains(" errors=0"), "{console}");

    let done = wait_phase(&pair.source, "done").await;
    assert_eq!(done.state, "paused", "the source never runs again");
    let record = done.migration.unwrap().record.unwrap();
    assert!(record.memory_proved && record.memory_hash.len() == 64, "{record:?}");
    assert!(record.blackout_ms > 0.0 && record.rounds >= 1, "{record:?}");
    eprintln!(
        "moved in {:.0} ms, blackout {:.1} ms: {:?}",
        record.total_ms, record.blackout_ms, record.blackout_parts
    );
    let phases = watched.await.unwrap();
    assert_eq!(phases.last().map(String::as_str), Some("done"), "{phases:?}");
    source.stop(v1::MachineStopRequest { force: true, power_button: false }).await.unwrap();
    assert!(pair.source.wait_exit().await.success());
    target.stop(v1::MachineStopRequest { force: false, power_button: true }).await.unwrap();
    assert!(pair.target.wait_exit().await.success());
}

/// The link carries a fraction of what the guest writes: it goes over without most of its working set, runs at once,
/// and finds every page as it left it.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_outruns_the_link_runs_before_its_pages_are_there() {
    // Without a disk it does nothing but write to its memory, all of it within the seconds that one copy takes.
    let (mut pair, outgoing) = Pair::with_guest("wss=1M rate=0 disk=0").await;
    let (mut source, mut target) = (pair.source.client.clone(), pair.target.client.clone());
    let outgoing = v1::StartOutgoingRequest {
        policy: "post-copy".to_owned(),
        bandwidth_bytes_per_s: 96 << 10,
        downtime_ms: 1,
        ..outgoing
    };
    source.start_outgoing(outgoing).await.unwrap();
    wait_phase(&pair.source, "paused").await;
    source.commit_proposed(v1::MigrationStepRequest { migration_id: MIGRATION }).await.unwrap();
    pair.host.next_epoch();
    source.migration_outcome(pair.outcome(true)).await.unwrap();
    let answer = target.migration_outcome(pair.outcome(true)).await.unwrap().into_inner();
    assert_eq!(answer.state, "running");
    pair.target.wait_beats(5).await;
    let done = wait_phase(&pair.source, "done").await;
    // Over its whole working set again, now that all of it is here.
    pair.target.wait_beats(5).await;
    let console = pair.target.console().await;
    assert!(!console.contains("PROBE ERROR") && console.contains(" errors=0"), "{console}");
    let record = done.migration.unwrap().record.unwrap();
    let faulted = record.pages.as_ref().map_or(0, |pages| pages.faulted);
    assert!(!record.memory_proved, "it did not go over on demand: {record:?}");
    // Who waits for a page waits for that page, and not for what the background sends before it: half of the last round, in the mean.
    let last_round_ms = record.per_round.last().map_or(0.0, |round| round.ms);
    assert!(faulted >= 10 && record.fault_mean_ms < last_round_ms / 4.0, "{record:?}");
    eprintln!(
        "on demand: moved in {:.0} ms, blackout {:.1} ms, {faulted} pages were waited for, {:.2} ms in the mean",
        record.total_ms, record.blackout_ms, record.fault_mean_ms
    );
    source.stop(v1::MachineStopRequest { force: true, power_button: false }).await.unwrap();
    assert!(pair.source.wait_exit().await.success());
    target.stop(v1::MachineStopRequest { force: false, power_button: true }).await.unwrap();
    assert!(pair.target.wait_exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_migration_leaves_the_guest_running_at_the_source() {
    let (mut pair, outgoing) = Pair::new().await;
    let (mut source, mut target) = (pair.source.client.clone(), pair.target.client.clone());
    source.start_outgoing(outgoing).await.unwrap();
    wait_phase(&pair.source, "paused").await;
    source.commit_proposed(v1::MigrationStepRequest { migration_id: MIGRATION }).await.unwrap();
    source.migration_outcome(pair.outcome(false)).await.unwrap();
    target.migration_outcome(pair.outcome(false)).await.unwrap();
    assert!(pair.target.wait_exit().await.success());
    wait_phase(&pair.source, "aborted").await;
    pair.source.wait_state("running").await;
    pair.source.wait_beats(3).await;
    let console = pair.source.console().await;
    assert!(!console.contains("PROBE ERROR"), "{console}");
    let late =
        source.commit_proposed(v1::MigrationStepRequest { migration_id: MIGRATION }).await.unwrap_err();
    assert_eq!(late.code(), tonic::Code::FailedPrecondition, "{late}");
}
