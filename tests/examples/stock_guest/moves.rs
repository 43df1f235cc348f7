//! Moves by an operator, who tries once more where the lab's machine stood in the way.

use anyhow::{Context as _, Result, ensure};
use std::time::Duration;
use tests::{Pool, output};

/// Longest move of a guest that does not stop working for it, all of it interpreted on one processor.
const DEADLINE: Duration = Duration::from_secs(300);

/// How a move fails when one of its processes got no processor for as long as a peer may be silent (5 s). Three daemons, their guests and
/// the move share one that is interpreted, so that it happens here; the guest must have gone on at its source.
const STARVED: &str = "timed out";

/// What moves have come to.
#[derive(Debug, Default)]
pub struct Moves {
    pub slowest_blackout_ms: f64,
    /// Moves that were tried once more.
    pub tried_again: u32,
}

impl Moves {
    /// Moves a VM to another host.
    pub fn move_on(&mut self, pool: &Pool, name: &str) -> Result<()> {
        let from = pool.vm_host(name)?;
        let to = pool.host_besides(&[&from])?.name();
        if self.try_move(pool, name, [&from, to])? {
            return Ok(());
        }
        self.tried_again += 1;
        ensure!(
            self.try_move(pool, name, [&from, to])?,
            "{name} did not get from {from} to {to} in two moves"
        );
        Ok(())
    }

    /// Whether it has moved.
    fn try_move(&mut self, pool: &Pool, name: &str, [from, to]: [&str; 2]) -> Result<bool> {
        // The blackout that policies aim at is one of machines that are not interpreted.
        let how = ["--policy", "must-finish", "-o", "json"];
        let mut migrate = pool.poolctl_command(&[&["vm", "migrate", name, "--to", to][..], &how].concat());
        let output = output::run(&mut migrate, DEADLINE)?;
        let record = output.json().with_context(|| output.stderr.clone())?;
        if record["outcome"] == "failed" && record["error"].as_str().is_some_and(|why| why.contains(STARVED))
        {
            let vm = pool.vm(name)?;
            ensure!(
                vm["host"] == from && vm["state"] == "running",
                "after a move that failed it is not where it was: {vm}"
            );
            println!("{name} stays at {from}: {}", record["error"]);
            return Ok(false);
        }
        ensure!(
            output.code == 0 && record["outcome"] == "done" && record["memory_proved"] == true,
            "{name}'s move from {from} to {to} failed: {record}\n{}",
            output.stderr
        );
        let blackout = record["blackout_ms"].as_f64().context("the record has a blackout")?;
        println!("{name} from {from} to {to}: {} ms, blackout {blackout} ms", record["total_ms"]);
        self.slowest_blackout_ms = self.slowest_blackout_ms.max(blackout);
        Ok(true)
    }
}
