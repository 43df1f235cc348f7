//! What users see of an owner.

use super::peer::Part;
use super::{Owner, State};
use crate::owner::config::{ResyncStatus, VolumeState, VolumeStatus};
use crate::owner::rules::Progress;

impl Owner {
    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        let state = match &self.state {
            State::Inactive => VolumeState::Inactive,
            State::Activating(_) => VolumeState::Activating,
            State::Active(active) if active.view.isr.len() < self.config.min_isr as usize => {
                VolumeState::Stalled
            }
            State::Active(_) => VolumeState::Active,
            State::Fenced(_) => VolumeState::Fenced,
            State::Closed => VolumeState::Closed,
        };
        let epoch = if let State::Fenced(epoch) = self.state { epoch } else { self.config.epoch };
        let (issued, acknowledged) = self.reached;
        let isr_version = self.view().map_or(self.config.isr_version, |view| view.isr_version);
        let Progress { written, durable } = acknowledged;
        let (damaged_reads, repairs) = (self.repairs.damaged, self.repairs.repaired);
        VolumeStatus {
            state,
            epoch,
            isr_version,
            issued,
            acknowledged: written,
            durable,
            damaged_reads,
            repairs,
        }
    }
}

impl Owner {
    /// The replicas that are being made equal.
    #[must_use]
    pub fn resyncs(&self) -> Vec<ResyncStatus> {
        let resync = |(host, peer): (&proto::HostId, &super::peer::Peer)| match &peer.part {
            Part::Syncing(resync) => Some(resync.status(*host, self.now)),
            Part::Idle | Part::Attaching | Part::Attached(_) | Part::Streaming => None,
        };
        self.peers.iter().filter_map(resync).collect()
    }
}

/// What a simulation looks at.
#[cfg(test)]
impl Owner {
    /// Writes that were issued and are not acknowledged.
    pub fn in_flight(&self) -> impl Iterator<Item = (proto::Sequence, &super::writes::Write)> {
        let active = if let State::Active(active) = &self.state { Some(active) } else { None };
        active
            .into_iter()
            .flat_map(|active| active.in_flight.iter().map(|(sequence, write)| (*sequence, write)))
    }

    /// Cost in bytes of the writes that it keeps.
    pub fn held_bytes(&self) -> usize {
        let State::Active(active) = &self.state else { return 0 };
        let in_flight = active.in_flight.iter().map(|(_, write)| write);
        in_flight.chain(&active.waiting).map(super::writes::Write::cost).sum()
    }

    /// Requests that wait for their answers.
    pub fn pending_requests(&self) -> usize {
        let connections = self.peers.values().filter_map(|peer| peer.connection.as_ref());
        connections.map(|connection| connection.asks.len()).sum()
    }

    /// Its state in a few words.
    pub fn describe(&self) -> String {
        let mut text = format!("{:?}", self.status());
        for (host, peer) in &self.peers {
            let part = match &peer.part {
                super::peer::Part::Syncing(_) => "Syncing".to_owned(),
                part => format!("{part:?}"),
            };
            let (progress, full, joining) = (peer.progress, peer.full, &peer.joining);
            text += &format!("; {host}: {part}, {progress:?}, full {full}, {joining:?}");
        }
        text
    }

    /// Members of the in-sync set, as it knows it.
    pub fn members(&self) -> usize {
        self.view().map_or(0, |view| view.isr.len())
    }
}
