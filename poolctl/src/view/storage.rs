//! Volumes and images.

use super::{bytes, words};
use crate::output::Object;
use proto::{ImageId, SnapshotId, VolumeId, v1};
use serde::Serialize;

/// A volume.
#[derive(Debug, Serialize)]
pub struct VolumeView {
    id: String,
    name: String,
    size_bytes: u64,
    epoch: u64,
    owner: String,
    health: String,
    origin: String,
    snapshots: Vec<String>,
    replicas: Vec<ReplicaView>,
    replicas_wanted: u32,
    isr_version: u64,
    nbd: Option<NbdView>,
    /// 0: no limit.
    iops_max: u64,
    /// 0: no limit.
    bytes_per_s_max: u64,
    revision: u64,
}

#[derive(Debug, Serialize)]
struct NbdView {
    host: String,
    listen: String,
    uri: String,
    state: String,
    problem: String,
}

impl VolumeView {
    /// Whether every replica that it is to have is there and up to date.
    pub fn is_healthy(&self) -> bool {
        self.health == "healthy"
    }

    /// One sentence about its limits.
    pub fn limits(&self) -> String {
        let operations = match self.iops_max {
            0 => "any number of operations".to_owned(),
            limit => format!("{limit} operations"),
        };
        let amount = match self.bytes_per_s_max {
            0 => "any amount".to_owned(),
            limit => bytes(limit),
        };
        format!("volume {}: {operations} and {amount} per second", self.name)
    }

    /// Where it is served over NBD; empty: nowhere.
    pub fn nbd_uri(&self) -> &str {
        self.nbd.as_ref().map_or("", |nbd| nbd.uri.as_str())
    }
}

#[derive(Debug, Serialize)]
struct ReplicaView {
    host: String,
    state: String,
}

impl From<v1::Volume> for VolumeView {
    fn from(volume: v1::Volume) -> Self {
        let replica = |replica: v1::Replica| ReplicaView { host: replica.host, state: replica.state };
        Self {
            id: VolumeId(volume.id).to_string(),
            name: volume.name,
            size_bytes: volume.size_bytes,
            epoch: volume.epoch,
            owner: volume.owner,
            health: volume.health,
            origin: volume.origin,
            snapshots: volume.snapshots,
            replicas: volume.replicas.into_iter().map(replica).collect(),
            replicas_wanted: volume.replicas_wanted,
            isr_version: volume.isr_version,
            nbd: volume.nbd.map(|nbd| NbdView {
                host: nbd.host,
                listen: nbd.listen,
                uri: nbd.uri,
                state: nbd.state,
                problem: nbd.problem,
            }),
            iops_max: volume.operations_per_s_max,
            bytes_per_s_max: volume.bytes_per_s_max,
            revision: volume.revision,
        }
    }
}

impl Object for VolumeView {
    const KIND: &'static str = "Volume";
    const COLUMNS: &'static [&'static str] = &["NAME", "SIZE", "HEALTH", "OWNER", "REPLICAS"];
    const WIDE: &'static [&'static str] = &["ID", "EPOCH", "ISR VERSION", "NBD"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        let replicas: Vec<String> =
            self.replicas.iter().map(|replica| format!("{}:{}", replica.host, replica.state)).collect();
        vec![
            self.name.clone(),
            bytes(self.size_bytes),
            self.health.clone(),
            self.owner.clone(),
            words(&replicas),
            self.id.clone(),
            self.epoch.to_string(),
            self.isr_version.to_string(),
            self.nbd_uri().to_owned(),
        ]
    }
}

/// A snapshot.
#[derive(Debug, Serialize)]
pub struct SnapshotView {
    id: String,
    name: String,
    volume: String,
    size_bytes: u64,
    created_ms: u64,
    state: String,
}

impl From<v1::Snapshot> for SnapshotView {
    fn from(snapshot: v1::Snapshot) -> Self {
        Self {
            id: SnapshotId(snapshot.id).to_string(),
            name: snapshot.name,
            volume: snapshot.volume,
            size_bytes: snapshot.size_bytes,
            created_ms: snapshot.created_ms,
            state: snapshot.state,
        }
    }
}

impl Object for SnapshotView {
    const KIND: &'static str = "Snapshot";
    const COLUMNS: &'static [&'static str] = &["VOLUME", "NAME", "SIZE", "STATE"];
    const WIDE: &'static [&'static str] = &["ID"];

    fn name(&self) -> String {
        format!("{}@{}", self.volume, self.name)
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.volume.clone(),
            self.name.clone(),
            bytes(self.size_bytes),
            self.state.clone(),
            self.id.clone(),
        ]
    }
}

/// An image.
#[derive(Debug, Serialize)]
pub struct ImageView {
    id: String,
    name: String,
    blake3: String,
    size_bytes: u64,
    hosts: Vec<String>,
}

impl From<v1::Image> for ImageView {
    fn from(image: v1::Image) -> Self {
        Self {
            id: ImageId(image.id).to_string(),
            name: image.name,
            blake3: image.blake3,
            size_bytes: image.size_bytes,
            hosts: image.hosts,
        }
    }
}

impl Object for ImageView {
    const KIND: &'static str = "Image";
    const COLUMNS: &'static [&'static str] = &["NAME", "SIZE", "HOSTS"];
    const WIDE: &'static [&'static str] = &["ID", "BLAKE3"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            bytes(self.size_bytes),
            words(&self.hosts),
            self.id.clone(),
            self.blake3.clone(),
        ]
    }
}
