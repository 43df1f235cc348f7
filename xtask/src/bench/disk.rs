//! Random 4 KiB requests, 32 in flight: from a guest, and from fio through NBD, on one volume with three replicas.

use super::storage::fio::{self, Pattern, Target};
use super::vmm::{Line, median};
use ::tests::vms::PROBE_IMAGE;
use ::tests::{Pool, wait_until};
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};

const VOLUME: &str = "load";
const HOST: &str = "h1";
const BYTES: u64 = 256 << 20;

/// Measured time of a job; what comes before is warming up.
const MEASURE: Duration = Duration::from_secs(6);
const WARM_UP: Duration = Duration::from_secs(2);

/// Jobs of each kind and side; alternating.
const RUNS: usize = 3;

const PATIENCE: Duration = Duration::from_secs(60);

/// What is done to the disk.
#[derive(Debug, Clone, Copy)]
enum Job {
    Write,
    Read,
}

impl Job {
    /// The probe's parameter.
    fn parameter(self) -> &'static str {
        match self {
            Self::Write => "load=2",
            Self::Read => "load=1",
        }
    }

    fn pattern(self) -> Pattern {
        match self {
            Self::Write => Pattern::RandomWrite,
            Self::Read => Pattern::RandomRead,
        }
    }
}

/// Each block is written once before, so that every request meets a block that is there.
pub fn lines(pool: &Pool) -> Result<Vec<Line>> {
    pool.create_volume(VOLUME, &BYTES.to_string(), 3)?;
    through_nbd(pool, |target| fio::fill(target, BYTES))?;
    let mut lines = Vec::new();
    for job in [Job::Write, Job::Read] {
        let (mut guest, mut nbd) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            guest.push(from_guest(pool, job)?);
            let found = through_nbd(pool, |target| fio::run(target, job.pattern(), BYTES, MEASURE))?;
            nbd.push(found.iops);
            println!("{job:?}: guest {:.0}/s, NBD {:.0}/s", guest[guest.len() - 1], nbd[nbd.len() - 1]);
        }
        let (guest, nbd) = (median(guest), median(nbd));
        lines.push(Line {
            what: format!("random 4 KiB {job:?}s, 32 in flight"),
            ours: format!("{guest:.0}/s (guest)"),
            theirs: format!("{nbd:.0}/s (fio, NBD)"),
            ratio: format!("{:.2} ×", guest / nbd),
        });
    }
    Ok(lines)
}

/// Requests a second of the probe guest.
fn from_guest(pool: &Pool, job: Job) -> Result<f64> {
    let name = "loader";
    let create = ["vm", "create", name, "--vcpus", "1", "--memory", "64MiB", "--disk", VOLUME];
    let boots = ["--kernel", PROBE_IMAGE, "--cmdline", job.parameter(), "--ha", "none"];
    pool.json(&[&create[..], &boots[..]].concat())?;
    pool.start_vm(name, Some(HOST))?;
    let done = || -> Result<Option<u64>> { Ok(requests(&pool.console(name)?)) };
    wait_until(PATIENCE, "the guest loads its disk", || Ok(done()?.filter(|done| *done > 0)))?;
    std::thread::sleep(WARM_UP);
    let (from, began) = (done()?.context("it counts")?, Instant::now());
    std::thread::sleep(MEASURE);
    let (to, took) = (done()?.context("it counts")?, began.elapsed());
    let errors =
        pool.console(name)?.lines().any(|line| line.starts_with("PROBE io") && !line.contains("errors=0"));
    ensure!(!errors, "the guest's disk has failed");
    pool.json(&["vm", "stop", name, "--force"])?;
    pool.json(&["vm", "delete", name])?;
    Ok((to - from) as f64 / took.as_secs_f64())
}

/// The last count that the probe has printed.
fn requests(console: &str) -> Option<u64> {
    let complete = &console[..=console.rfind('\n')?];
    complete
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("PROBE io done=")?.split(' ').next()?.parse().ok())
}

/// What fio does with the volume, at the host that the guest runs on, too.
fn through_nbd<T>(pool: &Pool, work: impl FnOnce(&Target) -> Result<T>) -> Result<T> {
    let uri = pool.serve_nbd(VOLUME, HOST)?;
    let (export, socket) = uri
        .strip_prefix("nbd+unix:///")
        .and_then(|rest| rest.split_once("?socket="))
        .with_context(|| format!("{uri} is not what fio's target is made of"))?;
    let done = work(&Target::Nbd { socket: socket.into(), export: export.to_owned() })?;
    pool.json(&["volume", "nbd", VOLUME, "--stop"])?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::requests;

    #[test]
    fn the_last_complete_count_is_taken() {
        assert_eq!(
            requests("PROBE io done=1000 errors=0\nPROBE io done=2000 errors=0\nPROBE io done=30"),
            Some(2000)
        );
        assert_eq!(requests("PROBE io done=10"), None);
    }
}
