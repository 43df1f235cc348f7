//! What the leader must look at, so that its look costs what is going on and not what there is.
//!
//! ```text
//!  tables as last seen ──diff (shared parts are passed over)──▶ changed objects ──▶ entries of the index
//! ```
//! `apply` brings it up to date after each entry. It remembers the tables that it was made from, so whatever changed a table and
//! however, it catches up by itself, also with a state that was just read. It is never written, and two states that differ only in
//! it are equal; [`invariants::check`](crate::invariants::check) compares it with one that is made anew.

use super::{
    Host, HostState, Migration, PoolState, Snapshot, SnapshotState, Table, Task, TaskKind, Vm, Volume,
};
use imbl::{OrdMap, OrdSet};
use proto::{HostId, MigrationId, SnapshotId, TaskId, VmId, VolumeId};
use std::collections::BTreeSet;

/// See the [module](self).
#[derive(Debug, Clone, Default)]
pub struct Index {
    seen: Seen,
    running_tasks: OrdSet<TaskId>,
    running_migrations: OrdSet<MigrationId>,
    vms_at: OrdMap<HostId, OrdSet<VmId>>,
    replicas_at: OrdMap<HostId, OrdSet<VolumeId>>,
    unsettled: OrdSet<VolumeId>,
    by_scrub: OrdSet<(u64, VolumeId)>,
}

/// The tables as they were when the index was made.
#[derive(Debug, Clone, Default)]
struct Seen {
    hosts: Table<HostId, Host>,
    vms: Table<VmId, Vm>,
    volumes: Table<VolumeId, Volume>,
    snapshots: Table<SnapshotId, Snapshot>,
    tasks: Table<TaskId, Task>,
    migrations: Table<MigrationId, Migration>,
}

/// An index follows from the rest of the state.
impl PartialEq for Index {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Index {
    /// Whether it says the same as another one.
    pub(crate) fn agrees_with(&self, other: &Self) -> bool {
        self.running_tasks == other.running_tasks
            && self.running_migrations == other.running_migrations
            && self.vms_at == other.vms_at
            && self.replicas_at == other.replicas_at
            && self.unsettled == other.unsettled
            && self.by_scrub == other.by_scrub
    }

    /// Tasks that have not ended.
    pub(crate) fn running_tasks(&self) -> impl Iterator<Item = TaskId> {
        self.running_tasks.iter().copied()
    }

    /// Migrations that have not ended.
    pub(crate) fn running_migrations(&self) -> impl Iterator<Item = MigrationId> {
        self.running_migrations.iter().copied()
    }

    /// VMs placed on a host.
    pub(crate) fn vms_at(&self, host: HostId) -> impl Iterator<Item = VmId> {
        self.vms_at.get(&host).into_iter().flatten().copied()
    }

    /// Volumes of which something is to be done, or may become due while time passes: all others have as many replicas as they are to
    /// have, all in sync on hosts that are up and stay, and no process of their own, no work and no scrub.
    pub(crate) fn unsettled(&self) -> impl Iterator<Item = VolumeId> {
        self.unsettled.iter().copied()
    }

    /// Volumes from the one whose last scrub is longest ago, with the time from which that counts.
    pub(crate) fn by_scrub(&self) -> impl Iterator<Item = (u64, VolumeId)> {
        self.by_scrub.iter().copied()
    }
}

/// Puts an entry into a set of an index, or takes it out.
fn place<K: Ord + Clone, V: Ord + Clone>(index: &mut OrdMap<K, OrdSet<V>>, key: K, value: V, wanted: Wanted) {
    match wanted {
        Wanted::In => _ = index.entry(key).or_default().insert(value),
        Wanted::Out => {
            let emptied = index.get_mut(&key).is_some_and(|set| {
                set.remove(&value);
                set.is_empty()
            });
            if emptied {
                index.remove(&key);
            }
        }
    }
}

fn set<V: Ord + Clone>(index: &mut OrdSet<V>, value: V, wanted: Wanted) {
    match wanted {
        Wanted::In => _ = index.insert(value),
        Wanted::Out => _ = index.remove(&value),
    }
}

/// Whether an object is in a set of the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    In,
    Out,
}

impl From<bool> for Wanted {
    fn from(is_in: bool) -> Self {
        if is_in { Self::In } else { Self::Out }
    }
}

impl PoolState {
    /// An index that is made from nothing.
    pub(crate) fn index_anew(&self) -> Index {
        let mut state = Self { index: Index::default(), ..self.clone() };
        state.update_index();
        state.index
    }

    /// Brings the index up to date with the tables.
    pub(crate) fn update_index(&mut self) {
        let mut index = std::mem::take(&mut self.index);
        let (mut hosts, mut volumes) = (BTreeSet::new(), BTreeSet::new());
        index.follow_work(self, &mut hosts);
        index.follow_hosts(self, &mut hosts);
        for host in hosts {
            volumes.extend(index.replicas_at.get(&host).into_iter().flatten());
        }
        index.follow_volumes(self, &mut volumes);
        for id in volumes {
            let unsettled = self.volumes.get(&id).is_some_and(|volume| !self.is_settled(volume));
            set(&mut index.unsettled, id, unsettled.into());
        }
        self.index = index;
    }

    /// Whether nothing is to be done about a volume; see [`Index::unsettled`].
    fn is_settled(&self, volume: &Volume) -> bool {
        let serves = |host: &HostId| {
            let up = self.hosts.get(host).is_some_and(|host| host.state == HostState::Up);
            up && !self.is_behind(volume, *host) && self.leaves_with(*host).is_none()
        };
        volume.replicas.len() == volume.replicas_wanted as usize
            && volume.isr.len() == volume.replicas.len()
            && volume.replicas.iter().all(serves)
            && volume.service.is_none()
            && volume.scrub.is_none()
            && self.work_for(volume).is_none()
    }
}

impl Index {
    /// Also finds the hosts that a task makes leave, or lets stay.
    fn follow_work(&mut self, state: &PoolState, concerned: &mut BTreeSet<HostId>) {
        let tasks = std::mem::replace(&mut self.seen.tasks, state.tasks.clone());
        tasks.changes(&state.tasks, |id, old, new| {
            set(&mut self.running_tasks, *id, new.is_some_and(Task::is_running).into());
            if let Some(TaskKind::HostRemove { host, .. }) = old.or(new).map(|task| task.kind) {
                concerned.insert(host);
            }
        });
        let migrations = std::mem::replace(&mut self.seen.migrations, state.migrations.clone());
        migrations.changes(&state.migrations, |id, _, new| {
            set(&mut self.running_migrations, *id, new.is_some_and(Migration::is_running).into());
        });
        let vms = std::mem::replace(&mut self.seen.vms, state.vms.clone());
        vms.changes(&state.vms, |id, old, new| {
            let (from, to) = (old.and_then(|vm| vm.placement), new.and_then(|vm| vm.placement));
            if from != to {
                from.into_iter().for_each(|host| place(&mut self.vms_at, host, *id, Wanted::Out));
                to.into_iter().for_each(|host| place(&mut self.vms_at, host, *id, Wanted::In));
            }
        });
    }

    /// Finds the hosts whose replicas count for more or less than before.
    fn follow_hosts(&mut self, state: &PoolState, concerned: &mut BTreeSet<HostId>) {
        let hosts = std::mem::replace(&mut self.seen.hosts, state.hosts.clone());
        let facts = |host: &Host| (host.state, host.duty, host.incarnation.clone());
        hosts.changes(&state.hosts, |id, old, new| {
            if old.map(facts) != new.map(facts) {
                concerned.insert(*id);
            }
        });
    }

    /// Also finds the volumes that have changed, or whose snapshots have.
    fn follow_volumes(&mut self, state: &PoolState, changed: &mut BTreeSet<VolumeId>) {
        let volumes = std::mem::replace(&mut self.seen.volumes, state.volumes.clone());
        volumes.changes(&state.volumes, |id, old, new| {
            changed.insert(*id);
            let replicas = |volume: Option<&Volume>| volume.map(|it| it.replicas.clone()).unwrap_or_default();
            let (from, to) = (replicas(old), replicas(new));
            if from != to {
                from.into_iter().for_each(|host| place(&mut self.replicas_at, host, *id, Wanted::Out));
                to.into_iter().for_each(|host| place(&mut self.replicas_at, host, *id, Wanted::In));
            }
            let (from, to) = (old.map(|it| it.scrub_from_ms), new.map(|it| it.scrub_from_ms));
            if from != to {
                from.into_iter().for_each(|ms| set(&mut self.by_scrub, (ms, *id), Wanted::Out));
                to.into_iter().for_each(|ms| set(&mut self.by_scrub, (ms, *id), Wanted::In));
            }
        });
        let snapshots = std::mem::replace(&mut self.seen.snapshots, state.snapshots.clone());
        let waits = |it: &Snapshot| !matches!(it.state, SnapshotState::Ready { .. });
        snapshots.changes(&state.snapshots, |_, old, new| {
            if old.map(waits) != new.map(waits) {
                changed.extend([old, new].into_iter().flatten().map(|it| it.volume));
            }
        });
    }
}
