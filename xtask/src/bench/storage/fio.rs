//! One job of fio, and what it reports.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// 4 KiB at random places, 32 at once.
    RandomWrite,
    /// The same, reading.
    RandomRead,
    /// 4 KiB at random places, each followed by a flush, one at a time.
    WriteFlush,
    /// 1 MiB in order, 8 at once.
    Sequential,
}

/// Where.
#[derive(Debug, Clone)]
pub enum Target {
    /// Files of a folder by io_uring without the page cache; so many writers at once, each with a file of its own.
    Files { dir: PathBuf, writers: u32 },
    /// An NBD server.
    Nbd { socket: PathBuf, export: String },
}

/// What one job came to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Requests a second; a write with its flush counts once.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// Requests in all.
    pub requests: f64,
    /// Latency in microseconds that 99 % stay below.
    pub p99_us: f64,
    /// The same for 99.9 %.
    pub p999_us: f64,
}

impl Pattern {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::RandomWrite => &["--rw=randwrite", "--bs=4k", "--iodepth=32"],
            Self::RandomRead => &["--rw=randread", "--bs=4k", "--iodepth=32"],
            Self::WriteFlush => &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"],
            Self::Sequential => &["--rw=write", "--bs=1M", "--iodepth=8"],
        }
    }

    fn is_read(self) -> bool {
        self == Self::RandomRead
    }
}

fn command(target: &Target, pattern: Pattern, bytes: u64) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=job", "--output-format=json", "--randrepeat=0", "--group_reporting"]);
    fio.args(pattern.arguments());
    match target {
        Target::Files { dir, writers } => {
            fio.args(["--ioengine=io_uring", "--direct=1"]);
            fio.arg(format!("--directory={}", dir.display()));
            fio.arg(format!("--numjobs={writers}")).arg(format!("--size={bytes}"));
        }
        Target::Nbd { socket, export } => {
            fio.arg("--ioengine=nbd").arg(format!("--uri=nbd+unix:///{export}?socket={}", socket.display()));
            fio.arg(format!("--size={bytes}"));
        }
    }
    fio
}

/// Runs a job for a time.
pub fn run(target: &Target, pattern: Pattern, bytes: u64, time: Duration) -> Result<Figures> {
    let mut fio = command(target, pattern, bytes);
    fio.args(["--norandommap", "--time_based"]).arg(format!("--runtime={}", time.as_secs()));
    report(&mut fio, pattern)
}

/// Writes every byte once, so that later jobs meet what a disk in use has.
pub fn fill(target: &Target, bytes: u64) -> Result<Figures> {
    report(&mut command(target, Pattern::Sequential, bytes), Pattern::Sequential)
}

/// Writes so many bytes, 4 KiB at random places, none of them twice.
pub fn write_once(target: &Target, bytes: u64, written: u64) -> Result<Figures> {
    let mut fio = command(target, Pattern::RandomWrite, bytes);
    fio.arg(format!("--io_size={written}"));
    report(&mut fio, Pattern::RandomWrite)
}

fn report(fio: &mut Command, pattern: Pattern) -> Result<Figures> {
    let output = fio.output().context("start fio")?;
    if !output.status.success() {
        bail!("fio failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    // Notes may stand before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |at| &text[at..]);
    figures(&serde_json::from_str(json).context("fio's report")?, pattern)
}

fn figures(report: &Value, pattern: Pattern) -> Result<Figures> {
    let job = &report["jobs"][0];
    let of = &job[if pattern.is_read() { "read" } else { "write" }];
    let number = |value: &Value| value.as_f64().with_context(|| format!("a number is missing in {job}"));
    // The time that counts includes the flush, which fio reports by itself.
    let flush_us = |percentile: &str| {
        let found = job["sync"]["lat_ns"]["percentile"][percentile].as_f64();
        if pattern == Pattern::WriteFlush { found.unwrap_or_default() / 1e3 } else { 0.0 }
    };
    let latency_us = |percentile: &str| {
        Ok::<_, anyhow::Error>(number(&of["clat_ns"]["percentile"][percentile])? / 1e3 + flush_us(percentile))
    };
    Ok(Figures {
        iops: number(&of["iops"])?,
        bytes_per_s: number(&of["bw_bytes"])?,
        requests: number(&of["total_ios"])?,
        p99_us: latency_us("99.000000")?,
        p999_us: latency_us("99.900000")?,
    })
}

/// Removes the files of a target.
pub fn remove_files(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    Ok(std::fs::create_dir_all(dir)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_flush_counts_in_a_flushed_write_only() {
        let part = |us: u64| json!({"percentile": {"99.000000": us * 1000, "99.900000": us * 2000}});
        let job = json!({"iops": 10.0, "bw_bytes": 40960, "total_ios": 100, "clat_ns": part(50)});
        let report = json!({"jobs": [{"write": job, "sync": {"lat_ns": part(200)}}]});
        let of = |pattern| figures(&report, pattern).unwrap();
        assert_eq!((of(Pattern::WriteFlush).p99_us, of(Pattern::WriteFlush).p999_us), (250.0, 500.0));
        assert_eq!((of(Pattern::RandomWrite).p99_us, of(Pattern::RandomWrite).iops), (50.0, 10.0));
        assert!(figures(&report, Pattern::RandomRead).is_err(), "a missing number is no zero");
    }
}
