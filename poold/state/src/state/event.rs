//! The bounded log of what happened, for watchers.

use crate::limits::EVENTS_MAX;
use imbl::Vector;
use serde::{Deserialize, Serialize};

/// Something that an entry caused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Index of the entry.
    pub revision: u64,
    /// Number of the event among those of its entry, from 0.
    pub ordinal: u32,
    /// Time that the proposer stamped on the entry, Unix milliseconds.
    pub time_ms: u64,
    /// What happened.
    pub kind: EventKind,
    /// The object, e.g. `vm web1`.
    pub object: String,
    /// One sentence for an operator.
    pub message: String,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EventKind {
    /// The pool was founded.
    PoolCreated,
    /// The brake against false alarms was set or released.
    PoolBrake,
    /// A join token was created or revoked.
    Token,
    /// A host joined.
    HostJoined,
    /// A host serves, or serves with new facts.
    HostUp,
    /// A host was declared lost.
    HostLost,
    /// A lost host came back.
    HostReturned,
    /// A host was removed.
    HostRemoved,
    /// An image was created or deleted, or has one more holder.
    Image,
    /// A volume was created.
    VolumeCreated,
    /// A volume has another size or other limits.
    VolumeChanged,
    /// A snapshot was asked for, is there, or is gone.
    Snapshot,
    /// A volume was deleted.
    VolumeDeleted,
    /// A volume's in-sync set or replica set changed.
    VolumeIsr,
    /// A volume's own process was asked for, serves, or has ended.
    VolumeService,
    /// A volume's replicas were compared with their checksums.
    VolumeScrubbed,
    /// A VM was created.
    VmCreated,
    /// A VM was deleted.
    VmDeleted,
    /// A VM got a placement.
    VmPlaced,
    /// A VM runs.
    VmRunning,
    /// A VM is to stop, pause or resume.
    VmDesired,
    /// A VM has ended.
    VmStopped,
    /// The pool gave up on a VM, or its host is lost.
    VmFailed,
    /// A migration reached a step.
    Migration,
    /// A task has ended.
    Task,
    /// An operator changed a host's duty or labels.
    HostDuty,
    /// A group was created, changed or deleted.
    Group,
    /// A cluster, or who is in it, changed.
    Cluster,
    /// A network was created or deleted.
    Network,
    /// A user was created, changed or deleted.
    User,
    /// The pool's settings, feature level or certificate authority changed.
    PoolChanged,
}

impl EventKind {
    /// The stable word that watchers filter by.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PoolCreated => "pool.created",
            Self::PoolBrake => "pool.brake",
            Self::Token => "token.changed",
            Self::HostJoined => "host.joined",
            Self::HostUp => "host.up",
            Self::HostLost => "host.lost",
            Self::HostReturned => "host.returned",
            Self::HostRemoved => "host.removed",
            Self::Image => "image.changed",
            Self::VolumeCreated => "volume.created",
            Self::VolumeChanged => "volume.changed",
            Self::Snapshot => "snapshot.changed",
            Self::VolumeDeleted => "volume.deleted",
            Self::VolumeIsr => "volume.isr",
            Self::VolumeService => "volume.service",
            Self::VolumeScrubbed => "volume.scrubbed",
            Self::VmCreated => "vm.created",
            Self::VmDeleted => "vm.deleted",
            Self::VmPlaced => "vm.placed",
            Self::VmRunning => "vm.running",
            Self::VmDesired => "vm.desired",
            Self::VmStopped => "vm.stopped",
            Self::VmFailed => "vm.failed",
            Self::Migration => "migration.phase",
            Self::Task => "task.ended",
            Self::HostDuty => "host.duty",
            Self::Group => "group.changed",
            Self::Cluster => "cluster.changed",
            Self::Network => "network.changed",
            Self::User => "user.changed",
            Self::PoolChanged => "pool.changed",
        }
    }
}

/// The newest events.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct EventLog {
    events: Vector<Event>,
    oldest_revision: u64,
}

impl EventLog {
    /// The events of this revision and all later ones are complete.
    #[must_use]
    pub fn oldest_revision(&self) -> u64 {
        self.oldest_revision
    }

    /// All events kept, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.events.iter()
    }

    /// Events of `revision` and later, oldest first; none when the log no longer reaches back so far.
    #[must_use]
    pub fn since(&self, revision: u64) -> Option<impl Iterator<Item = &Event>> {
        if revision < self.oldest_revision {
            return None;
        }
        let mut low = 0;
        let mut high = self.events.len();
        while low < high {
            let middle = low.midpoint(high);
            if self.events[middle].revision < revision { low = middle + 1 } else { high = middle }
        }
        Some(self.events.iter().skip(low))
    }

    /// Appends an event; the oldest revision goes as a whole when there are too many.
    pub(crate) fn push(&mut self, event: Event) {
        self.events.push_back(event);
        while self.events.len() > EVENTS_MAX {
            let oldest = self.events[0].revision;
            while self.events.front().is_some_and(|event| event.revision == oldest) {
                self.events.pop_front();
            }
            self.oldest_revision = oldest + 1;
        }
    }
}
