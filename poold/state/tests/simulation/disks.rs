//! Replicas of the VMs' disks, and the owners in the VM processes that write to them.
//!
//! ```text
//!  owner, epoch e ──write──▶ each in-sync replica: promised ≤ e? ──all have it──▶ acknowledged
//!        │ one does not answer                       │ no: fenced
//!        └─ RemoveFromIsr ─▶ log ─▶ the rest acknowledges
//! ```
//! As the block store does it, without its bytes: a replica is a list of the epochs under which each write came. A loss of power
//! takes what was not flushed, and begins another life; the promise stays.
//!
//! Checked: no replica takes a write of an epoch below one that it has promised (I2); whoever takes a volume over has every
//! write that was acknowledged, or, when a replica that had it has lost power, every flushed one (I4): what was not flushed is
//! safe from everything but that.

use super::host::{Key, Process};
use super::world::World;
use pool_state::{
    Command,
    command::IsrChange,
    reconcile::ProcessState,
    state::{Holder, IsrMember, Volume},
};
use proto::{Epoch, HostId, Incarnation, IsrVersion, VmId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// A member that is away this long is put out.
const EVICT_AFTER_MS: u64 = 400;
/// Between two proposals of the same change.
const PROPOSE_AGAIN_MS: u64 = 500;
/// Writes of a disk at most: a history tells enough with these.
const WRITES_MAX: usize = 400;

/// The store of one volume at one host.
#[derive(Default)]
struct Replica {
    promised: Epoch,
    /// The epoch of each write.
    writes: Vec<Epoch>,
    flushed: usize,
}

/// A write that a client was told of.
struct Acknowledged {
    epoch: Epoch,
    flushed: bool,
    /// Who had it, in which life.
    holders: Vec<IsrMember>,
}

/// All disks of a history, and what the checks remember of them.
#[derive(Default)]
pub struct Disks {
    replicas: BTreeMap<(VolumeId, HostId), Replica>,
    acknowledged: BTreeMap<VolumeId, Vec<Acknowledged>>,
    /// The highest promise that a replica ever made, whatever it remembers itself.
    promises: BTreeMap<(VolumeId, HostId), Epoch>,
    pub writes: usize,
    pub fenced: usize,
}

/// The owner of a disk in a VM process.
pub struct Owner {
    volume: VolumeId,
    epoch: Epoch,
    isr: Vec<IsrMember>,
    isr_version: IsrVersion,
    writes: Vec<Epoch>,
    /// Writes that were acknowledged, counted from the first.
    acknowledged: usize,
    /// Resynced, and proposed as a member: what it lacks is not acknowledged any more.
    joining: Option<IsrMember>,
    away_since_ms: BTreeMap<HostId, u64>,
    proposed_ms: u64,
}

/// Whether a write is the replica's next one, and what becomes of it.
enum Taken {
    Yes,
    /// Not reached, or not in step.
    No,
    Fenced,
}

impl World {
    /// Life of a host's store.
    fn life(&self, host: HostId) -> Incarnation {
        Incarnation(format!("{host}/{}", self.hosts[self.index_of(host)].boot))
    }

    /// Whether a process at a host reaches the replica server of another one, which lives in its daemon.
    fn reaches(&self, from: usize, to: HostId) -> bool {
        let there = self.index_of(to);
        let serves = self.hosts[there].works(self.now_ms);
        serves && (from == there || !(self.hosts[from].cut || self.hosts[there].cut))
    }

    /// What a loss of power takes from the stores of a host.
    pub fn lose_unflushed(&mut self, host: usize) {
        let id = self.hosts[host].id;
        for ((_, at), replica) in &mut self.disks.replicas {
            if *at == id && replica.writes.len() > replica.flushed {
                let lost = self.rng.below((replica.writes.len() - replica.flushed) as u64 + 1) as usize;
                let kept = replica.writes.len() - lost;
                replica.writes.truncate(kept);
            }
        }
    }

    /// The volumes of a VM are taken over at its present epoch; none: not yet, false: by somebody else.
    pub fn volumes_accept(&mut self, host: usize, key: Key, epoch: Epoch) -> Option<bool> {
        let vm = key.0;
        if self.hosts[host].cut {
            return None;
        }
        let state = self.hosts[host].state.clone();
        let known = state.vms.get(&vm)?;
        if known.epoch != epoch {
            return (known.epoch > epoch).then_some(false);
        }
        let Some(volume) = known.spec.disks.first().and_then(|disk| state.volumes.get(disk)) else {
            return Some(false);
        };
        if volume.owner.is_none_or(|owner| owner.holder != Holder::Vm(vm)) {
            return Some(false);
        }
        let attached = match self.attach(host, volume) {
            Ok(attached) => attached,
            Err(()) => return Some(false),
        };
        let members: Vec<IsrMember> = volume
            .isr
            .iter()
            .filter(|member| attached.contains(&member.host) && self.life(member.host) == member.incarnation)
            .cloned()
            .collect();
        let content = |host: HostId| &self.disks.replicas[&(volume.id, host)].writes;
        let longest =
            members.iter().max_by_key(|it| (content(it.host).last().copied(), content(it.host).len()))?;
        let writes = content(longest.host).clone();
        for member in &members {
            self.copy(volume.id, member.host, &writes);
        }
        self.check_acknowledged(volume.id, &writes);
        let owner = Owner {
            volume: volume.id,
            epoch: volume.epoch,
            isr: volume.isr.clone(),
            isr_version: volume.isr_version,
            // What it finds beyond that is acknowledged when every member has it.
            acknowledged: self.disks.acknowledged.get(&volume.id).map_or(0, Vec::len),
            writes,
            joining: None,
            away_since_ms: BTreeMap::new(),
            proposed_ms: 0,
        };
        self.active.insert(vm, epoch);
        self.owners.insert((host, key), owner);
        Some(true)
    }

    /// Promises of the replicas that can be reached and know the owner; an error: one has promised more.
    fn attach(&mut self, host: usize, volume: &Volume) -> Result<BTreeSet<HostId>, ()> {
        let mut attached = BTreeSet::new();
        for replica in &volume.replicas {
            if !self.reaches(host, *replica) {
                continue;
            }
            let there = &self.hosts[self.index_of(*replica)].state;
            let known = there.volumes.get(&volume.id).map(|volume| volume.epoch);
            let at = (volume.id, *replica);
            let store = self.disks.replicas.entry(at).or_default();
            if store.promised > volume.epoch || known.is_some_and(|known| known > volume.epoch) {
                return Err(());
            }
            if known == Some(volume.epoch) {
                store.promised = volume.epoch;
                let promise = self.disks.promises.entry(at).or_default();
                *promise = (*promise).max(volume.epoch);
                attached.insert(*replica);
            }
        }
        Ok(attached)
    }

    fn copy(&mut self, volume: VolumeId, host: HostId, writes: &[Epoch]) {
        let replica = self.disks.replicas.entry((volume, host)).or_default();
        if replica.writes != writes {
            replica.writes = writes.to_vec();
            // A resync ends with a flush.
            replica.flushed = writes.len();
        }
    }

    /// I4: whoever takes a volume over has what was acknowledged.
    fn check_acknowledged(&mut self, volume: VolumeId, writes: &[Epoch]) {
        let lost = self.disks.acknowledged.get(&volume).and_then(|acknowledged| {
            acknowledged.iter().enumerate().find(|(at, write)| {
                let lost_power = || write.holders.iter().any(|it| self.life(it.host) != it.incarnation);
                writes.get(*at) != Some(&write.epoch) && (write.flushed || !lost_power())
            })
        });
        if let Some((at, write)) = lost {
            let text = format!("I4: write {at} of {volume}, acknowledged at epoch {}, is lost", write.epoch);
            self.violate(text);
        }
        if let Some(acknowledged) = self.disks.acknowledged.get_mut(&volume) {
            acknowledged.truncate(writes.len());
        }
    }

    /// What all owners do in a tick.
    pub fn write_disks(&mut self) {
        let keys: Vec<(usize, Key)> = self.owners.keys().copied().collect();
        for (host, key) in keys {
            let process = self.hosts[host].processes.get(&key);
            let alive = |it: &&Process| !matches!(it.state, ProcessState::Gone | ProcessState::Failed);
            let Some(executes) = process.filter(alive).map(|it| it.executes(self.now_ms)) else {
                self.owners.remove(&(host, key));
                continue;
            };
            let Some(mut owner) = self.owners.remove(&(host, key)) else { continue };
            if self.work(host, &mut owner, executes) {
                self.owners.insert((host, key), owner);
            }
        }
    }

    /// A step of one owner; false: it was fenced.
    fn work(&mut self, host: usize, owner: &mut Owner, executes: bool) -> bool {
        self.learn(host, owner);
        if executes && owner.is_quiet() && owner.writes.len() < WRITES_MAX && self.rng.chance(60) {
            owner.writes.push(owner.epoch);
        }
        let required: Vec<IsrMember> = owner.isr.iter().chain(&owner.joining).cloned().collect();
        let flush = self.rng.chance(30);
        let mut complete = true;
        for member in &required {
            match self.send(host, owner, member, flush) {
                Taken::Yes => drop(owner.away_since_ms.remove(&member.host)),
                Taken::No => {
                    owner.away_since_ms.entry(member.host).or_insert(self.now_ms);
                    complete = false;
                }
                Taken::Fenced => {
                    self.disks.fenced += 1;
                    return false;
                }
            }
        }
        let min_isr = self.committed.volumes.get(&owner.volume).map_or(1, Volume::min_isr);
        if complete && owner.isr.len() >= min_isr && !owner.is_quiet() {
            owner.acknowledged = owner.writes.len();
            self.disks.writes += 1;
            self.disks.acknowledge(owner, &required, flush);
        }
        if self.now_ms >= owner.proposed_ms + PROPOSE_AGAIN_MS {
            self.change_isr(host, owner);
        }
        true
    }

    /// Brings a member in step with the owner, if that is only the last write away.
    fn send(&mut self, host: usize, owner: &Owner, member: &IsrMember, flush: bool) -> Taken {
        if !self.reaches(host, member.host) || self.life(member.host) != member.incarnation {
            return Taken::No;
        }
        let at = (owner.volume, member.host);
        let replica = self.disks.replicas.entry(at).or_default();
        if replica.promised > owner.epoch {
            return Taken::Fenced;
        }
        if replica.writes.len() + 1 == owner.writes.len() && owner.writes.starts_with(&replica.writes) {
            replica.writes.push(owner.epoch);
            if let Some(promise) = self.disks.promises.get(&at).filter(|promise| **promise > owner.epoch) {
                let text = format!("I2: {} at {} promised {promise} and took {}", at.0, at.1, owner.epoch);
                self.violate(text);
            }
        }
        let replica = self.disks.replicas.entry(at).or_default();
        if replica.writes != owner.writes {
            return Taken::No;
        }
        if flush {
            replica.flushed = replica.writes.len();
        }
        Taken::Yes
    }

    /// The owner hears of a newer in-sync set from its own daemon or through a replica.
    fn learn(&mut self, host: usize, owner: &mut Owner) {
        let sources = (0..self.hosts.len()).filter(|at| self.reaches(host, self.hosts[*at].id));
        let newest = sources.map(|at| &self.hosts[at].state).max_by_key(|state| state.revision);
        let Some(state) = newest else { return };
        let Some(volume) = state.volumes.get(&owner.volume).filter(|it| it.epoch == owner.epoch) else {
            return;
        };
        if volume.isr_version > owner.isr_version {
            owner.isr_version = volume.isr_version;
            owner.isr = volume.isr.clone();
        }
        // One that is a member now, or that can't become one any more: it lost power, or another host has its place.
        let may_join = |joining: &IsrMember| {
            let is_replica = volume.replicas.contains(&joining.host);
            !volume.isr.contains(joining) && is_replica && state.is_current(joining)
        };
        owner.joining = owner.joining.take().filter(may_join);
    }

    /// Puts a member out that is away, or proposes one that has everything.
    fn change_isr(&mut self, host: usize, owner: &mut Owner) {
        let away = |member: &&IsrMember| {
            let since = owner.away_since_ms.get(&member.host);
            since.is_some_and(|since| self.now_ms >= since + EVICT_AFTER_MS)
        };
        // Only while another one stays that has everything.
        let stays = |member: &IsrMember| !owner.away_since_ms.contains_key(&member.host);
        let leaves = owner.isr.iter().find(away).filter(|_| owner.isr.iter().any(stays)).cloned();
        let joins = owner.joining.clone();
        let change = |member: &IsrMember| IsrChange {
            volume: owner.volume,
            epoch: owner.epoch,
            isr_version: owner.isr_version,
            host: member.host,
            incarnation: member.incarnation.clone(),
        };
        let command = match (&leaves, &joins) {
            (Some(member), _) => Command::RemoveFromIsr(change(member)),
            (None, Some(member)) => Command::AddToIsr(change(member)),
            (None, None) => return self.resync(host, owner),
        };
        owner.proposed_ms = self.now_ms;
        // Through any replica that answers.
        let known = self.hosts[host].state.volumes.get(&owner.volume);
        let replicas = known.map(|volume| volume.replicas.clone()).unwrap_or_default();
        let through: Vec<HostId> = replicas.into_iter().filter(|it| self.reaches(host, *it)).collect();
        if let Some(through) = self.rng.pick(&through) {
            self.propose(self.index_of(through), command);
        }
    }

    /// Copies everything to a replica that is no member; from then on what it lacks is not acknowledged.
    fn resync(&mut self, host: usize, owner: &mut Owner) {
        let state = self.hosts[host].state.clone();
        let Some(volume) = state.volumes.get(&owner.volume).filter(|it| it.epoch == owner.epoch) else {
            return;
        };
        let is_member = |host: &HostId| owner.isr.iter().any(|member| member.host == *host);
        let outside: Vec<HostId> = volume.replicas.iter().filter(|it| !is_member(it)).copied().collect();
        let Some(next) = self.rng.pick(&outside).filter(|next| self.reaches(host, *next)) else { return };
        let known = self.hosts[self.index_of(next)].state.volumes.get(&owner.volume).map(|it| it.epoch);
        let store = self.disks.replicas.entry((owner.volume, next)).or_default();
        if known != Some(owner.epoch) || store.promised > owner.epoch {
            return;
        }
        store.promised = owner.epoch;
        let promise = self.disks.promises.entry((owner.volume, next)).or_default();
        *promise = (*promise).max(owner.epoch);
        self.copy(owner.volume, next, &owner.writes);
        owner.joining = Some(IsrMember { host: next, incarnation: self.life(next) });
    }
}

impl Owner {
    /// Whether it waits for nobody's answer.
    pub fn is_quiet(&self) -> bool {
        self.acknowledged == self.writes.len()
    }
}

impl Disks {
    fn acknowledge(&mut self, owner: &Owner, holders: &[IsrMember], flushed: bool) {
        let acknowledged = self.acknowledged.entry(owner.volume).or_default();
        for epoch in &owner.writes[acknowledged.len()..] {
            acknowledged.push(Acknowledged { epoch: *epoch, flushed: false, holders: holders.to_vec() });
        }
        if flushed {
            // A flush is for everything before it, too.
            acknowledged.iter_mut().for_each(|write| write.flushed = true);
        }
    }

    /// Volumes that lack a replica that is in sync, for the checks at rest.
    pub fn behind(state: &pool_state::PoolState, vm: VmId) -> Option<&Volume> {
        let disks = state.vms.get(&vm)?.spec.disks.iter();
        disks
            .filter_map(|disk| state.volumes.get(disk))
            .find(|volume| volume.isr.len() < volume.replicas.len())
    }
}
