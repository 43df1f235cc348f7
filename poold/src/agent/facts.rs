//! What only one host knows of volumes: its replicas, those that its processes have open, copies under way.

use crate::{progress::ProgressBook, supervisor::Supervisor};
use proto::{
    HostId, VolumeId,
    v1::{AgentFacts, AgentReplica, VolumeStatus},
};
use std::collections::BTreeMap;
use storage::ReplicaServer;

/// Where this host's own facts come from.
#[derive(Clone)]
pub struct LocalFacts {
    server: ReplicaServer,
    supervisor: Supervisor,
    progress: ProgressBook,
}

/// What hosts have answered; one that is missing did not.
#[derive(Debug, Default)]
pub struct Facts(pub BTreeMap<HostId, AgentFacts>);

impl LocalFacts {
    /// The facts of this host.
    pub fn new(server: ReplicaServer, supervisor: Supervisor, progress: ProgressBook) -> Self {
        Self { server, supervisor, progress }
    }

    /// What is known now.
    #[must_use]
    pub fn now(&self) -> AgentFacts {
        let usage = self.server.usage().ok();
        let repairs = self.server.repairs();
        let replicas = self.server.used_bytes().into_iter();
        let statuses = self.supervisor.processes().into_iter().filter_map(|process| process.status);
        let open = statuses.flat_map(|status| status.volumes);
        AgentFacts {
            store_used_bytes: usage.map_or(0, |usage| usage.used),
            store_capacity_bytes: usage.map_or(0, |usage| usage.capacity),
            damaged: repairs.damaged,
            repaired: repairs.repaired,
            refused: self.server.refused_peers(),
            replicas: replicas
                .map(|(volume, used_bytes)| AgentReplica { volume_id: volume.0, used_bytes })
                .collect(),
            open: open.filter(|volume| is_open(&volume.state)).collect(),
            progress: self.progress.now(),
        }
    }
}

fn is_open(state: &str) -> bool {
    matches!(state, "active" | "stalled")
}

impl Facts {
    /// What the replica of a volume takes at a host.
    #[must_use]
    pub fn used_bytes(&self, host: HostId, volume: VolumeId) -> Option<u64> {
        let facts = self.0.get(&host)?;
        let of = facts.replicas.iter().find(|replica| replica.volume_id == volume.0);
        // A replica that was never written has nothing.
        Some(of.map_or(0, |replica| replica.used_bytes))
    }

    /// What the owner of a volume says at a host.
    #[must_use]
    pub fn open(&self, host: HostId, volume: VolumeId) -> Option<&VolumeStatus> {
        self.0.get(&host)?.open.iter().find(|open| open.volume_id == volume.0)
    }
}
