//! What a guest does all the time while it moves, and how it is seen that none of it notices.

use crate::guest::{Guest, PATIENCE};
use anyhow::{Context as _, Result, ensure};
use std::time::Instant;

/// Each counts its rounds in a file of its name; what goes wrong stands in /run/wrong. All of them rest between two rounds: where
/// one processor interprets everything, guests that never do leave nothing for the copy of their memory.
const LOADS: [(&str, &str); 4] = [
    // Sleeps are timer interrupts of each vCPU.
    ("timer0", "exec taskset 1 sh -c 'while :; do sleep 0.01; i=$((i+1)); echo $i > /run/timer0; done'"),
    ("timer1", "exec taskset 2 sh -c 'while :; do sleep 0.01; i=$((i+1)); echo $i > /run/timer1; done'"),
    // The clock that all programs see, and that of the wall.
    (
        "clock",
        "while :; do read a b < /proc/uptime; n=${a%.*}${a#*.}; [ $n -ge ${last:-0} ] || \
         echo clock $last $n >> /run/wrong; last=$n; w=$(date +%s); [ $w -ge ${wall:-0} ] || \
         echo wall $wall $w >> /run/wrong; wall=$w; i=$((i+1)); echo $i > /run/clock; sleep 0.02; done",
    ),
    (
        "disk",
        "while :; do seq $i $((i+20000)) > /root/block; sync /root/block; sum=$(md5sum < /root/block); \
         echo 1 > /proc/sys/vm/drop_caches; [ \"$sum\" = \"$(md5sum < /root/block)\" ] || echo disk >> /run/wrong; \
         i=$((i+1)); echo $i > /run/disk; sleep 0.2; done",
    ),
];

/// Starts all of them.
pub fn start(guest: &mut Guest<'_>) -> Result<()> {
    guest.run("dmesg -n 1; : > /run/wrong")?;
    for (name, script) in LOADS {
        guest.run(&format!("cat > /run/{name}.sh <<'EOF'\n{script}\nEOF\ntrue"))?;
        guest.leave_running(&format!("sh /run/{name}.sh"))?;
    }
    Ok(())
}

/// Every load gets on, and none has found anything wrong.
pub fn check(guest: &mut Guest<'_>) -> Result<()> {
    let before = counts(guest)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = counts(guest)?;
        if before.iter().zip(&now).all(|(before, now)| now > before) {
            break;
        }
        ensure!(Instant::now() < deadline, "a load stands still: {before:?}, {now:?}\n{}", guest.tail());
    }
    let wrong = guest.run("cat /run/wrong")?;
    ensure!(wrong.is_empty(), "the guest has found:\n{wrong}");
    Ok(())
}

/// Rounds of each load.
fn counts(guest: &mut Guest<'_>) -> Result<Vec<u64>> {
    let names: Vec<_> = LOADS.iter().map(|(name, _)| format!("/run/{name}")).collect();
    // A file is empty in the moment between its truncation and the write.
    let text = guest.run(&format!("for f in {}; do read n < $f || n=0; echo $n; done", names.join(" ")))?;
    text.lines().map(|line| line.trim().parse().with_context(|| format!("{line:?} in {text:?}"))).collect()
}
