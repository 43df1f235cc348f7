//! Random 4 KiB requests, 32 in flight: from a guest, and from fio through NBD, on one volume with three replicas.

use super::vmm::{Line, median};
use ::tests::vms::PROBE_IMAGE;
use ::tests::{Pool, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const VOLUME: &str = "load";
const SIZE: &str = "256MiB";

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
    /// The probe's parameter, and fio's.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Write => ("load=2", "randwrite"),
            Self::Read => ("load=1", "randread"),
        }
    }
}

/// Writes first, so that reads find something.
pub fn lines(pool: &Pool) -> Result<Vec<Line>> {
    pool.create_volume(VOLUME, SIZE, 3)?;
    let mut lines = Vec::new();
    for job in [Job::Write, Job::Read] {
        let (mut guest, mut nbd) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            guest.push(from_guest(pool, job)?);
            nbd.push(through_nbd(pool, job)?);
            println!("{job:?}: guest {:.0}/s, NBD {:.0}/s", guest[guest.len() - 1], nbd[nbd.len() - 1]);
        }
        let (guest, nbd) = (median(guest), median(nbd));
        lines.push(Line {
            what: format!("random 4 KiB {}, 32 in flight", job.words().1.trim_start_matches("rand")),
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
    let boots = ["--kernel", PROBE_IMAGE, "--cmdline", job.words().0, "--ha", "none"];
    pool.json(&[&create[..], &boots[..]].concat())?;
    pool.start_vm(name, Some("h1"))?;
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

/// The server of one volume; ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Requests a second of fio.
fn through_nbd(pool: &Pool, job: Job) -> Result<f64> {
    let socket = pool.dir().join("load.nbd");
    let listen = format!("unix:{}", socket.display());
    let mut serve = pool.poolctl_command(&["volume", "nbd", VOLUME, "--listen", &listen]);
    let server = Server(serve.stdout(Stdio::null()).spawn().context("start poolctl")?);
    wait_until(PATIENCE, "the volume is served", || Ok(socket.exists().then_some(())))?;
    let mut fio = Command::new("fio");
    fio.args([
        "--name=load",
        "--ioengine=nbd",
        "--bs=4k",
        "--iodepth=32",
        "--time_based",
        "--output-format=json",
    ]);
    fio.arg(format!("--uri=nbd+unix:///?socket={}", socket.display())).arg(format!("--rw={}", job.words().1));
    fio.arg(format!("--runtime={}", MEASURE.as_secs())).arg(format!("--ramp_time={}", WARM_UP.as_secs()));
    let output = fio.arg(format!("--size={}", SIZE.trim_end_matches("iB"))).output().context("start fio")?;
    drop(server);
    ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).context("read fio's result")?;
    let kind = job.words().1.trim_start_matches("rand");
    found["jobs"][0][kind]["iops"].as_f64().with_context(|| format!("no rate in {found}"))
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
