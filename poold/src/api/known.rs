//! Views of volumes and tasks with what only single hosts know: space that is used, how far copies and scrubs are.

use super::views;
use crate::agent::Facts;
use pool_state::{
    PoolState,
    state::{Host, Task, TaskKind, Volume},
};
use proto::{
    HostId,
    limits::BLOCK_BYTES,
    v1::{self, ReplicaSync, ResyncStatus, ScrubStatus, TaskProgress, VolumeIo, VolumeScrub, VolumeStatus},
};

const MS_PER_S: u64 = 1000;

/// A volume with what its hosts know of it.
pub fn volume(state: &PoolState, volume: &Volume, facts: &Facts) -> v1::Volume {
    let mut view = views::volume(state, volume);
    let open = volume.owner.and_then(|owner| facts.open(owner.host, volume.id));
    for (replica, host) in view.replicas.iter_mut().zip(&volume.replicas) {
        replica.used_bytes = facts.used_bytes(*host, volume.id);
        let resyncs = open.map(|open| open.resyncs.as_slice()).unwrap_or_default();
        replica.sync = resyncs.iter().find(|resync| resync.host_id == host.0).map(sync);
    }
    let used = |host: &HostId| facts.used_bytes(*host, volume.id);
    // Copies that are whole keep the same; one that cleans up behind a deleted snapshot may be behind the others.
    let whole = state.serving_members(volume).filter_map(|member| used(&member.host));
    view.used_bytes = whole.min();
    let known: Vec<u64> = volume.replicas.iter().filter_map(used).collect();
    view.physical_bytes = (!known.is_empty()).then(|| known.iter().sum());
    view.scrub = volume.scrub.map(|scrub| {
        let seen = open.and_then(|open| open.scrub.as_ref()).filter(|seen| seen.task_id == scrub.task.0);
        running_scrub(scrub.task.0, seen)
    });
    view.io = open.and_then(io);
    view
}

fn sync(resync: &ResyncStatus) -> ReplicaSync {
    let ResyncStatus { copied_bytes, left_bytes, counted, running_ms, .. } = *resync;
    let rate = rate(copied_bytes, running_ms);
    ReplicaSync {
        copied_bytes,
        left_bytes,
        permille: counted.then(|| permille(copied_bytes, copied_bytes.saturating_add(left_bytes))),
        bytes_per_s: rate,
        remaining_ms: if counted { remaining_ms(left_bytes, rate) } else { None },
    }
}

fn running_scrub(task: u64, seen: Option<&ScrubStatus>) -> VolumeScrub {
    let seen = seen.cloned().unwrap_or_default();
    let ScrubStatus { checked, damaged, repaired, permille, .. } = seen;
    VolumeScrub { task, checked, damaged, repaired, permille, ended_ms: 0 }
}

fn io(open: &VolumeStatus) -> Option<VolumeIo> {
    let io = open.io.as_ref()?;
    let (reads, writes) = (io.reads.clone().unwrap_or_default(), io.writes.clone().unwrap_or_default());
    Some(VolumeIo {
        reads: reads.operations,
        read_bytes: reads.bytes,
        writes: writes.operations,
        written_bytes: writes.bytes,
    })
}

/// The hosts that know how far a task is.
pub fn hosts_of(state: &PoolState, task: &Task) -> Option<HostId> {
    if !task.is_running() {
        return None;
    }
    let host = match task.kind {
        TaskKind::VolumeImport { .. } | TaskKind::VolumeExport { .. } => task.executor?,
        TaskKind::VolumeCopy { volume } => state.volumes.get(&volume)?.service.as_ref()?.host,
        TaskKind::VolumeScrub { volume } => state.volumes.get(&volume)?.owner?.host,
        _ => return None,
    };
    state.hosts.get(&host).filter(|host| Host::is_up(host)).map(|host| host.id)
}

/// A task with what is known of its progress.
pub fn task(state: &PoolState, task: &Task, facts: &Facts) -> v1::Task {
    let progress = hosts_of(state, task).and_then(|host| progress(task, host, facts));
    v1::Task { progress, ..views::task(state, task) }
}

fn progress(task: &Task, host: HostId, facts: &Facts) -> Option<TaskProgress> {
    if let TaskKind::VolumeScrub { volume } = task.kind {
        let scrub = facts.open(host, volume)?.scrub.as_ref().filter(|scrub| scrub.task_id == task.id.0)?;
        let done_bytes = scrub.checked.saturating_mul(BLOCK_BYTES as u64);
        let left_ms = scrub.running_ms.saturating_mul(1000 - u64::from(scrub.permille.min(1000)));
        return Some(TaskProgress {
            permille: scrub.permille,
            done_bytes,
            total_bytes: 0,
            bytes_per_s: rate(done_bytes, scrub.running_ms),
            remaining_ms: left_ms.checked_div(u64::from(scrub.permille)),
        });
    }
    let work = facts.0.get(&host)?.progress.iter().find(|work| work.task_id == task.id.0)?;
    let rate = rate(work.done_bytes, work.running_ms);
    Some(TaskProgress {
        permille: permille(work.done_bytes, work.total_bytes),
        done_bytes: work.done_bytes,
        total_bytes: work.total_bytes,
        bytes_per_s: rate,
        remaining_ms: remaining_ms(work.total_bytes.saturating_sub(work.done_bytes), rate),
    })
}

fn rate(bytes: u64, ms: u64) -> u64 {
    bytes.saturating_mul(MS_PER_S) / ms.max(1)
}

fn remaining_ms(bytes: u64, bytes_per_s: u64) -> Option<u64> {
    bytes.saturating_mul(MS_PER_S).checked_div(bytes_per_s)
}

/// Of nothing all is done.
fn permille(part: u64, whole: u64) -> u32 {
    let scaled = (u128::from(part) * 1000).checked_div(u128::from(whole)).unwrap_or(1000);
    u32::try_from(scaled).unwrap_or(1000).min(1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_tells_its_share_only_when_all_of_it_is_known() {
        let resync = |counted| ResyncStatus {
            host_id: 2,
            copied_bytes: 3 << 20,
            left_bytes: 1 << 20,
            counted,
            running_ms: 1500,
        };
        let known = sync(&resync(true));
        assert_eq!((known.permille, known.bytes_per_s, known.remaining_ms), (Some(750), 2 << 20, Some(500)));
        let unknown = sync(&resync(false));
        assert_eq!((unknown.permille, unknown.remaining_ms, unknown.left_bytes), (None, None, 1 << 20));
    }

    #[test]
    fn nothing_is_done_at_once_and_an_idle_copy_has_no_end() {
        assert_eq!((permille(0, 0), permille(1, 3), permille(9, 3)), (1000, 333, 1000));
        assert_eq!((remaining_ms(10, 0), rate(5, 0)), (None, 5000));
    }
}
