//! A Linux guest with two vCPUs goes from machine to machine under load of CPU, timers and disk, and must not notice.

use crate::guest::{FileDisk, Guest, Shape};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Longest wait for a load to get on after a hop: longer means that an interrupt was lost. Some seconds on a machine that has
/// nothing else to do.
const PROGRESS_PATIENCE: Duration = Duration::from_secs(60);

/// Each counts its rounds in a file of its name; what goes wrong stands in /tmp/wrong.
const LOADS: [(&str, &str); 4] = [
    // Sleeps are timer interrupts of each vCPU.
    ("timer0", "taskset 1 sh -c 'while :; do usleep 1000; i=$((i+1)); echo $i > /tmp/timer0; done'"),
    ("timer1", "taskset 2 sh -c 'while :; do usleep 1000; i=$((i+1)); echo $i > /tmp/timer1; done'"),
    // The clock that all programs see.
    (
        "clock",
        "while :; do read a b < /proc/uptime; n=${a%.*}${a#*.}; [ $n -ge ${last:-0} ] || \
         echo clock $last $n >> /tmp/wrong; last=$n; i=$((i+1)); echo $i > /tmp/clock; done",
    ),
    (
        "disk",
        "while :; do echo $i | cat - /tmp/pattern | head -c 262144 > /tmp/block; \
         dd if=/tmp/block of=/dev/vda bs=64k conv=fsync 2> /tmp/dd || echo write >> /tmp/wrong; \
         echo 1 > /proc/sys/vm/drop_caches; \
         head -c 262144 /dev/vda | cmp - /tmp/block || echo read >> /tmp/wrong; \
         i=$((i+1)); echo $i > /tmp/disk; done",
    ),
];

/// Memory of the guest: little, since all of it is copied and compared in each hop.
const MEMORY_MIB: u64 = 128;

/// Makes this many hops.
pub fn run(hops: u32) -> Result<Value> {
    let shape =
        Shape { vcpus: 2, memory_mib: MEMORY_MIB, disks: vec![("disk".to_owned(), FileDisk::scratch(8)?)] };
    let mut guest = Guest::small(&shape)?;
    guest.command("dmesg -n 1; seq 1 200000 > /tmp/pattern; touch /tmp/wrong")?;
    for (name, script) in LOADS {
        guest.command(&format!("cat > /tmp/{name}.sh <<'EOF'\n{script}\nEOF\ntrue"))?;
        guest.command(&format!("(sh /tmp/{name}.sh < /dev/null > /dev/null 2>&1 &)"))?;
    }
    let (mut slowest, mut longest, mut pages, mut last_pages) = (Duration::ZERO, Duration::ZERO, 0, 0);
    for number in 1..=hops {
        let began = Instant::now();
        let hop = guest.hop(&shape).with_context(|| format!("hop {number}"))?;
        (slowest, longest) = (slowest.max(hop.blackout), longest.max(hop.moved));
        (pages, last_pages) = (pages + hop.pages, last_pages + hop.last_pages);
        let (proved, checking) = (began.elapsed(), Instant::now());
        check(&mut guest).with_context(|| format!("after hop {number}"))?;
        println!("hop {number}: {hop:?}, proved after {proved:.1?}, checked in {:.1?}", checking.elapsed());
    }
    let complaints = guest.complaints()?;
    ensure!(complaints.is_empty(), "the kernel complains:\n{complaints}");
    Ok(json!({
        "hops": hops,
        "memory": "proved equal",
        "slowest_blackout_ms": slowest.as_millis() as u64,
        "longest_move_ms": longest.as_millis() as u64,
        "pages": pages,
        "pages_at_rest": last_pages,
        "rounds": counts(&mut guest)?,
    }))
}

/// Every load gets on, and none has found anything wrong.
fn check(guest: &mut Guest) -> Result<()> {
    let before = counts(guest)?;
    let deadline = Instant::now() + PROGRESS_PATIENCE;
    loop {
        let now = counts(guest)?;
        if before.iter().zip(&now).all(|(before, now)| now > before) {
            break;
        }
        ensure!(Instant::now() < deadline, "a load stands still: {before:?}, {now:?}\n{}", guest.text());
    }
    let wrong = guest.command("cat /tmp/wrong")?;
    ensure!(wrong.is_empty(), "the guest has found:\n{wrong}");
    Ok(())
}

/// Rounds of each load.
fn counts(guest: &mut Guest) -> Result<Vec<u64>> {
    let mut counts = Vec::new();
    for (name, _) in LOADS {
        // Empty in the moment between its truncation and the write.
        let text = guest.command(&format!("cat /tmp/{name} 2>/dev/null || true"))?;
        counts.push(if text.is_empty() {
            0
        } else {
            text.parse().with_context(|| format!("{name}: {text:?}"))?
        });
    }
    Ok(counts)
}
