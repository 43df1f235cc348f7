//! A pool of this project with the bench's guest in it.

use super::super::report::Figures;
use super::GuestSpec;
use ::tests::vms::PROBE_IMAGE;
use ::tests::{Binaries, GuestMemory, Pool, Proof, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest wait for the guest.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long the guest's own speed is measured.
const SPEED_TIME: Duration = Duration::from_secs(1);

/// How long a guest has its memory to itself between two migrations that are compared.
const PAGES_BETWEEN: u64 = 4096;

/// A pool with the guest running in it.
pub struct Stage {
    pub pool: Pool,
    hosts: usize,
    at: usize,
    working_set_pages: u64,
}

/// Pages that the guest had walked at an instant.
#[derive(Clone, Copy)]
pub struct Walked {
    pages: u64,
    at: Instant,
}

impl Walked {
    /// Reads it in the memory of a process.
    pub fn of(pid: i32) -> Result<Self> {
        Ok(Self { pages: GuestMemory::of(pid)?.pages_walked()?, at: Instant::now() })
    }

    /// Waits until the guest has walked some pages on.
    pub fn wait(pid: i32, more: u64) -> Result<()> {
        let memory = wait_until(PATIENCE, "the guest walks", || GuestMemory::of(pid).map(Some))?;
        let first = memory.pages_walked()?;
        wait_until(PATIENCE, "the guest has walked on", || {
            Ok((memory.pages_walked()? >= first + more).then_some(()))
        })
    }

    /// Pages a second of a guest that nothing moves.
    pub fn speed(pid: i32) -> Result<f64> {
        let first = Self::of(pid)?;
        // The time is what is measured; there is nothing to wait for.
        std::thread::sleep(SPEED_TIME);
        let last = Self::of(pid)?;
        Ok((last.pages - first.pages) as f64 / (last.at - first.at).as_secs_f64())
    }

    /// The part of a migration's time that a guest of this speed was kept from its work since then.
    pub fn lost_share(self, now: Self, speed: f64, total_ms: f64) -> f64 {
        let worked_s = now.pages.saturating_sub(self.pages) as f64 / speed.max(f64::MIN_POSITIVE);
        ((now.at - self.at).as_secs_f64() - worked_s) / (total_ms / 1e3)
    }
}

impl Stage {
    /// Starts the guest at the first of so many hosts.
    pub fn start(binaries: &Path, guest: &GuestSpec<'_>, hosts: usize) -> Result<Self> {
        let pool = Pool::builder()
            .name("bench")
            .hosts(hosts)
            .proof(Proof::Default)
            .binaries(Binaries::in_dir(binaries)?)
            .start()?;
        let path = |path: &Path| path.to_str().map(ToOwned::to_owned).context("a path is text");
        pool.json(&["image", "import", PROBE_IMAGE, &path(guest.kernel)?])?;
        pool.json(&["image", "import", "random", &path(guest.initrd)?])?;
        let memory = format!("{}MiB", guest.memory_mib);
        // Nothing is written to it, as under qemu, but it is handed over in each blackout.
        pool.create_volume("data", "64MiB", u32::try_from(hosts.min(3))?)?;
        let create = ["vm", "create", "web", "--vcpus", "1", "--memory", &memory, "--disk", "data"];
        let boots = ["--kernel", PROBE_IMAGE, "--initrd", "random", "--cmdline", guest.cmdline];
        pool.json(&[&create[..], &boots[..]].concat())?;
        pool.json(&["vm", "start", "web", "--host", "h1"])?;
        let stage = Self { pool, hosts, at: 0, working_set_pages: guest.working_set_pages };
        Walked::wait(stage.pid()?, 2 * guest.working_set_pages)?;
        Ok(stage)
    }

    /// The process that runs the guest.
    pub fn pid(&self) -> Result<i32> {
        let processes = self.pool.host(self.at).vm_processes();
        Ok(processes.into_iter().max_by_key(|it| it.epoch).context("the guest has no process")?.process.pid)
    }

    /// Moves the guest to the host at this place; its record.
    pub fn migrate(&mut self, to: usize, more: &[&str]) -> Result<Value> {
        let name = self.pool.host(to).name().to_owned();
        let record = self.pool.json(&[&["vm", "migrate", "web", "--to", &name][..], more].concat())?;
        ensure!(record["outcome"] == "done", "not done: {record}");
        self.at = to;
        Ok(record)
    }

    /// To the next host, which is one that has nothing of the guest until all have had it.
    pub fn next_host(&self) -> usize {
        (self.at + 1) % self.hosts
    }

    /// To and fro between this host and the one before.
    pub fn last_host(&self) -> usize {
        (self.at + self.hosts - 1) % self.hosts
    }

    /// Moves once, with everything that is compared measured.
    pub fn measure(&mut self, to: usize, speed: f64) -> Result<Figures> {
        Walked::wait(self.pid()?, PAGES_BETWEEN.min(self.working_set_pages))?;
        let before = Walked::of(self.pid()?)?;
        let record = self.migrate(to, &[])?;
        let after = Walked::of(self.pid()?)?;
        ensure!(record["memory_proved"] == true, "not proved: {record}");
        let total_ms = number(&record, "total_ms")?;
        let figures = Figures {
            total_ms,
            blackout_ms: number(&record, "blackout_ms")?,
            bytes: number(&record, "bytes_sent")?,
            cpu_s: (number(&record, "source_cpu_ms")? + number(&record, "target_cpu_ms")?) / 1e3,
            lost_share: before.lost_share(after, speed, total_ms),
        };
        let Figures { blackout_ms, bytes, .. } = figures;
        println!(
            "ours: {total_ms:.0} ms, {:.0} MiB over {} connections, {} rounds, {blackout_ms:.1} ms {}",
            bytes / super::MIB,
            record["connections"],
            record["rounds"],
            record["blackout_parts"]
        );
        Ok(figures)
    }

    /// Fails when the guest has found its memory wrong.
    pub fn no_errors(&self) -> Result<()> {
        let errors = self.pool.probe("web")?.errors;
        ensure!(errors.is_empty(), "the guest has found errors in its memory: {errors:?}");
        Ok(())
    }
}

/// A number of a record.
pub fn number(record: &Value, key: &str) -> Result<f64> {
    record[key].as_f64().with_context(|| format!("no {key} in {record}"))
}
