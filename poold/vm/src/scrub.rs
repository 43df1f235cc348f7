//! Scrubs: one for each volume of the process at a time, each for a task of the pool.
//!
//! Whoever asks for one asks again until its end was seen; so a daemon that was restarted finds it under way. It ends with the
//! process, and the next owner begins anew.

use proto::{HostId, v1};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use storage::owner::{ScrubOptions, ScrubProgress, VolumeHandle};
use tokio_util::task::AbortOnDropHandle;

/// Bytes between two pauses of a scrub.
const PART_BYTES: u64 = 256 * proto::limits::BLOCK_BYTES as u64;

/// The scrubs of a process.
#[derive(Default)]
pub struct Scrubs {
    jobs: Mutex<BTreeMap<u64, Job>>,
}

struct Job {
    status: Arc<Mutex<v1::ScrubStatus>>,
    begun: Instant,
    _work: AbortOnDropHandle<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Changed by single assignments, so it is whole even after a panic elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    fn begin(volume: VolumeHandle, request: &v1::VolumeScrubRequest) -> Self {
        let started = v1::ScrubStatus {
            task_id: request.task_id,
            state: "running".to_owned(),
            ..v1::ScrubStatus::default()
        };
        let status = Arc::new(Mutex::new(started));
        let (seen, begun) = (status.clone(), Instant::now());
        let options = ScrubOptions {
            host: (request.host_id != 0).then_some(HostId(request.host_id)),
            pace: pace(request.bytes_per_s_max),
        };
        let work = async move {
            let note = |now: ScrubProgress| put(&mut lock(&seen), now, begun);
            let ended = volume.scrub(options, note).await;
            let mut status = lock(&seen);
            match ended {
                Ok(now) => {
                    put(&mut status, now, begun);
                    "done".clone_into(&mut status.state);
                }
                Err(error) => {
                    status.error = error.to_string();
                    "failed".clone_into(&mut status.state);
                }
            }
            tracing::info!(?status, "a scrub has ended");
        };
        Self { status, begun, _work: AbortOnDropHandle::new(tokio::spawn(work)) }
    }

    fn status(&self) -> v1::ScrubStatus {
        let mut status = lock(&self.status).clone();
        if status.state == "running" {
            status.running_ms = millis(self.begun.elapsed());
        }
        status
    }
}

fn put(status: &mut v1::ScrubStatus, now: ScrubProgress, begun: Instant) {
    let ScrubProgress { checked, damaged, repaired, permille } = now;
    (status.checked, status.damaged, status.repaired, status.permille) =
        (checked, damaged, repaired, permille);
    status.running_ms = millis(begun.elapsed());
}

/// As messages have it.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The pause after each part that keeps to a rate; 0: none.
fn pace(bytes_per_s_max: u64) -> Duration {
    if bytes_per_s_max == 0 {
        return Duration::ZERO;
    }
    Duration::from_nanos(PART_BYTES.saturating_mul(1_000_000_000) / bytes_per_s_max)
}

impl Scrubs {
    /// Begins one, unless it is under way or over for the same task.
    pub fn begin(&self, volume: VolumeHandle, request: &v1::VolumeScrubRequest) -> v1::ScrubStatus {
        let mut jobs = lock(&self.jobs);
        match jobs.get(&request.volume_id).map(Job::status) {
            Some(status) if status.task_id == request.task_id => status,
            _ => {
                let job = Job::begin(volume, request);
                let status = job.status();
                jobs.insert(request.volume_id, job);
                status
            }
        }
    }

    /// Ends the one of a volume, if there is one.
    pub fn end(&self, volume: u64) -> v1::ScrubStatus {
        let job = lock(&self.jobs).remove(&volume);
        job.map(|job| job.status()).unwrap_or_default()
    }

    /// Adds how far they are.
    pub fn add_to(&self, volumes: &mut [v1::VolumeStatus]) {
        let jobs = lock(&self.jobs);
        for volume in volumes {
            volume.scrub = jobs.get(&volume.volume_id).map(Job::status);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_keeps_to_the_rate() {
        assert_eq!(pace(0), Duration::ZERO);
        assert_eq!(pace(1 << 20), Duration::from_secs(1));
        assert_eq!(pace(32 << 20), Duration::from_nanos(31_250_000));
    }
}
