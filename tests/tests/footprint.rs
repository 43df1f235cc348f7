//! What the programs cost a host.

use anyhow::Result;
use std::time::Duration;
use tests::vms::PROBE_LIGHT;
use tests::{Pool, alone, pool::Timing};

/// Bounds of the design, in bytes.
const DAEMON_BYTES_MAX: u64 = 60 << 20;
const VM_EXTRA_BYTES_MAX: u64 = 40 << 20;

#[test]
fn daemon_and_vm_process_stay_small() -> Result<()> {
    let _turn = alone();
    let pool = Pool::builder().timing(Timing::Default).start()?;
    for host in pool.hosts() {
        let daemon = host.daemon().expect("the daemon runs");
        let bytes = daemon.rss_bytes()?;
        assert!(bytes < DAEMON_BYTES_MAX, "the idle daemon of {} uses {} KiB", host.name(), bytes >> 10);
    }
    pool.start_probe("web", "128MiB", PROBE_LIGHT, Some("h1"))?;
    pool.wait_beats("web", 10, Duration::from_secs(30))?;
    let process = pool.vm_process("web")?;
    let guest = process.guest_resident_bytes()?;
    assert!(guest > 0, "guest memory is not found among the mappings");
    let extra = process.process.rss_bytes()?.saturating_sub(guest);
    assert!(
        extra < VM_EXTRA_BYTES_MAX,
        "poold-vm uses {} KiB beyond the guest's {} KiB",
        extra >> 10,
        guest >> 10
    );
    Ok(())
}
