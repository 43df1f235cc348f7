//! The real process with the probe guest under KVM, on a store of one replica.

use crate::support::{Host, UID, VM, VmProcess, until};
use proto::v1;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(600);

/// What the process may need beside the guest's memory, in KiB: a host runs hundreds.
const OVERHEAD_KIB_MAX: u64 = 40 << 10;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_boots_pauses_resumes_and_stops() {
    let host = Host::new().await;
    let mut process = host.spawn("vm-7-e1").await;
    let config = host.config(1, "wss=4M rate=0 disk=1");
    process.boot(config.clone(), LONG).await;
    process.wait_beats(3).await;
    let status = process.wait_state("running").await;
    assert_eq!((status.vm_id, status.epoch, status.pid), (VM, 1, u64::from(process.pid())));
    assert_eq!(status.certificate_sha256.len(), 32);
    assert_eq!(status.volumes[0].state, "active");
    let console = process.console().await;
    assert!(console.contains("PROBE disk acked=") && !console.contains("PROBE ERROR"), "{console}");

    let mut client = process.client.clone();
    // A daemon that did not hear the answers asks again.
    client.configure(config.clone()).await.unwrap();
    client.start(v1::MachineStartRequest {}).await.unwrap();
    let other = v1::MachineConfig { epoch: 2, ..config };
    assert_eq!(client.configure(other).await.unwrap_err().code(), tonic::Code::FailedPrecondition);

    client.pause(v1::MachineChangeRequest {}).await.unwrap();
    assert_stands(&process, "paused").await;
    client.resume(v1::MachineChangeRequest {}).await.unwrap();
    process.wait_beats(2).await;
    assert_confined(process.pid());
    assert_overhead(process.pid());

    let answer =
        client.stop(v1::MachineStopRequest { force: false, power_button: true }).await.unwrap().into_inner();
    assert_eq!(answer.state, "stopped");
    assert!(process.wait_exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_lease_the_guest_stands_still_until_the_placement_is_confirmed() {
    let host = Host::new().await;
    let process = host.spawn("vm-7-e1").await;
    process.boot(host.config(1, "wss=4M rate=0 disk=1"), Duration::from_secs(2)).await;
    process.wait_state("fenced").await;
    assert_stands(&process, "fenced").await;
    process.extend_lease(LONG, false).await;
    assert_stands(&process, "fenced").await;
    process.extend_lease(LONG, true).await;
    process.wait_beats(2).await;
    process.wait_state("running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_guest_was_told_is_on_its_disk_after_a_power_cut() {
    let host = Host::new().await;
    let mut process = host.spawn("vm-7-e1").await;
    process.boot(host.config(1, "wss=4M rate=0 disk=1"), LONG).await;
    process.wait_beats(3).await;
    let acked = number_after(&process.console().await, "PROBE disk acked=");
    process.client.clone().stop(v1::MachineStopRequest { force: true, power_button: false }).await.unwrap();
    assert!(process.wait_exit().await.success());

    host.next_epoch();
    let mut process = host.spawn("vm-7-e2").await;
    process.boot(host.config(2, "wss=4M rate=0 disk=1 turns=3"), LONG).await;
    let status = process.wait_state("stopped").await;
    assert_eq!(status.guest_exit, "poweroff");
    let console = process.console().await;
    let found = number_after(&console, "PROBE boot disk_counter=");
    assert!(found >= acked && acked > 0, "the guest was told {acked}, and found:\n{console}");
    assert!(console.contains(" errors=0") && !console.contains("PROBE ERROR"), "{console}");
    // The process waits with the answer to how its guest ended, until it is told to go.
    process.client.clone().stop(v1::MachineStopRequest { force: false, power_button: true }).await.unwrap();
    assert!(process.wait_exit().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_says_why() {
    let host = Host::new().await;
    let process = host.spawn("vm-7-e1").await;
    let mut client = process.client.clone();
    let refused = client.start(v1::MachineStartRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    let good = host.config(1, "");
    let outside = v1::MachineConfig { kernel_path: "/etc/passwd".to_owned(), ..good.clone() };
    assert_eq!(client.configure(outside).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    let no_kernel = v1::MachineConfig { kernel_path: format!("{}-absent", good.kernel_path), ..good };
    client.configure(no_kernel).await.unwrap();
    let refused = client.start(v1::MachineStartRequest {}).await.unwrap_err();
    assert!(refused.message().contains("/kernel-absent"), "{refused}");
    let status = process.status().await;
    assert_eq!(status.state, "failed");
    assert!(status.error.contains("/kernel-absent"), "{}", status.error);
}

/// The guest says nothing more, and the process says why.
async fn assert_stands(process: &VmProcess, word: &str) {
    process.wait_state(word).await;
    let before = process.beats().await;
    let looks_until = Instant::now() + Duration::from_millis(500);
    until("the time in which a running guest would have spoken", || async {
        assert_eq!(process.beats().await, before, "the guest runs although it is {word}");
        (Instant::now() >= looks_until).then_some(())
    })
    .await;
}

fn assert_overhead(pid: u32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kib = |field: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(field)).expect(field);
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    // Guest memory is a memfd and counts as shared memory.
    let (anonymous, file) = (kib("RssAnon"), kib("RssFile"));
    eprintln!("poold-vm needs {anonymous} KiB of its own and {file} KiB of program beside the guest");
    assert!(anonymous < OVERHEAD_KIB_MAX, "{anonymous} KiB");
}

fn number_after(text: &str, label: &str) -> u64 {
    let rest = text.split(label).last().unwrap_or_default();
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exempt_guest_needs_no_lease_and_outlives_updates_for_other_owners() {
    let host = Host::new().await;
    let process = host.spawn("vm-7-e1").await;
    let mut client = process.client.clone();
    let config = v1::MachineConfig { lease_exempt: true, ..host.config(1, "wss=4M rate=0 disk=1") };
    client.configure(config).await.unwrap();
    client.start(v1::MachineStartRequest {}).await.unwrap();
    process.wait_beats(1).await;
    let mine = host.attachment();
    let other = v1::VolumeAttachment { epoch: 2, secret: vec![2; 32], ..mine.clone() };
    client.update_volumes(v1::UpdateVolumesRequest { volumes: vec![other, mine] }).await.unwrap();
    process.wait_beats(2).await;
    let status = process.wait_state("running").await;
    assert_eq!((status.volumes[0].epoch, status.volumes[0].state.as_str()), (1, "active"));
    let bad = v1::VolumeAttachment { secret: Vec::new(), ..host.attachment() };
    let refused = client.update_volumes(v1::UpdateVolumesRequest { volumes: vec![bad] }).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exempt_guest_stands_as_soon_as_its_disk_has_a_newer_owner() {
    let host = Host::new().await;
    let exempt =
        |epoch| v1::MachineConfig { lease_exempt: true, ..host.config(epoch, "wss=4M rate=0 disk=1") };
    let old = host.spawn("vm-7-e1").await;
    old.client.clone().configure(exempt(1)).await.unwrap();
    old.client.clone().start(v1::MachineStartRequest {}).await.unwrap();
    old.wait_beats(2).await;
    host.next_epoch();
    let new = host.spawn("vm-7-e2").await;
    new.client.clone().configure(exempt(2)).await.unwrap();
    new.client.clone().start(v1::MachineStartRequest {}).await.unwrap();
    assert_stands(&old, "fenced").await;
    new.wait_beats(2).await;
    new.wait_state("running").await;
    assert_stands(&old, "fenced").await;
}

/// What the kernel says of the rights of a process that runs a guest.
fn assert_confined(pid: u32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {status}"))
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".to_owned(), "2".to_owned()));
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    for (name, soft, most) in [("core file size", 0, 0), ("open files", 1, 4096), ("processes", 1, 2048)] {
        let line = limits.lines().find_map(|line| line.strip_prefix("Max ")?.strip_prefix(name));
        let values: Vec<u64> = line
            .unwrap_or_default()
            .split_whitespace()
            .take(2)
            .filter_map(|value| value.parse().ok())
            .collect();
        let is_within = |value: &u64| (soft..=most).contains(value);
        assert!(values.len() == 2 && values.iter().all(is_within), "{name}: {limits}");
    }
    if nix::unistd::Uid::effective().is_root() {
        assert_eq!(field("Uid:"), format!("{UID} {UID} {UID} {UID}"));
        assert_eq!(field("Groups:"), "");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{set}");
        }
        let root = std::fs::read_dir(format!("/proc/{pid}/root")).unwrap();
        let mut seen: Vec<_> = root.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        seen.sort();
        assert_eq!(seen, ["kernel", "machine.sock", "pid", "run"]);
    }
}
