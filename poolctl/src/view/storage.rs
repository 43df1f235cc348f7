//! Volumes and images.

use super::{bytes, percent, utc, words};
use crate::output::Object;
use proto::{ImageId, SnapshotId, TaskId, VolumeId, v1};
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
    /// What one copy takes, snapshots included and without what a clone shares; absent: no host has answered.
    used_bytes: Option<u64>,
    /// What all copies take.
    physical_bytes: Option<u64>,
    /// Under way.
    scrub: Option<ScrubView>,
    last_scrub: Option<ScrubView>,
    io: Option<IoView>,
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

    /// One sentence about its last scrub.
    pub fn scrubbed(&self) -> String {
        match &self.last_scrub {
            Some(ScrubView { checked, damaged: 0, .. }) => {
                format!("volume {}: {checked} blocks compared, none is damaged", self.name)
            }
            Some(ScrubView { checked, damaged, repaired, .. }) => format!(
                "volume {}: {checked} blocks compared, {damaged} damaged, {repaired} repaired",
                self.name
            ),
            None => format!("volume {} was never scrubbed", self.name),
        }
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
    used_bytes: Option<u64>,
    sync: Option<SyncView>,
}

/// How far the copy is that makes a replica equal.
#[derive(Debug, Serialize)]
struct SyncView {
    copied_bytes: u64,
    left_bytes: u64,
    /// Absent while what is left is not counted yet.
    percent: Option<f64>,
    bytes_per_s: u64,
    remaining_ms: Option<u64>,
}

/// A scrub, in blocks.
#[derive(Debug, Serialize)]
struct ScrubView {
    task: String,
    checked: u64,
    damaged: u64,
    repaired: u64,
    percent: f64,
    ended_ms: u64,
}

/// What the present owner did.
#[derive(Debug, Serialize)]
struct IoView {
    reads: u64,
    read_bytes: u64,
    writes: u64,
    written_bytes: u64,
}

impl From<v1::Replica> for ReplicaView {
    fn from(replica: v1::Replica) -> Self {
        let sync = replica.sync.map(|sync| SyncView {
            copied_bytes: sync.copied_bytes,
            left_bytes: sync.left_bytes,
            percent: sync.permille.map(percent),
            bytes_per_s: sync.bytes_per_s,
            remaining_ms: sync.remaining_ms,
        });
        Self { host: replica.host, state: replica.state, used_bytes: replica.used_bytes, sync }
    }
}

impl ReplicaView {
    /// `h1:in-sync`, or how far its copy is.
    fn text(&self) -> String {
        let share = self.sync.as_ref().map(|sync| match sync.percent {
            Some(percent) => format!("({percent}%)"),
            None => format!("({})", bytes(sync.copied_bytes)),
        });
        format!("{}:{}{}", self.host, self.state, share.unwrap_or_default())
    }
}

impl From<v1::VolumeScrub> for ScrubView {
    fn from(scrub: v1::VolumeScrub) -> Self {
        let v1::VolumeScrub { task, checked, damaged, repaired, ended_ms, permille } = scrub;
        let task = TaskId(task).to_string();
        Self { task, checked, damaged, repaired, percent: percent(permille), ended_ms }
    }
}

impl From<v1::Volume> for VolumeView {
    fn from(volume: v1::Volume) -> Self {
        Self {
            id: VolumeId(volume.id).to_string(),
            name: volume.name,
            size_bytes: volume.size_bytes,
            epoch: volume.epoch,
            owner: volume.owner,
            health: volume.health,
            origin: volume.origin,
            snapshots: volume.snapshots,
            replicas: volume.replicas.into_iter().map(ReplicaView::from).collect(),
            replicas_wanted: volume.replicas_wanted,
            isr_version: volume.isr_version,
            nbd: volume.nbd.map(|nbd| NbdView {
                host: nbd.host,
                listen: nbd.listen,
                uri: nbd.uri,
                state: nbd.state,
                problem: nbd.problem,
            }),
            used_bytes: volume.used_bytes,
            physical_bytes: volume.physical_bytes,
            scrub: volume.scrub.map(ScrubView::from),
            last_scrub: volume.last_scrub.map(ScrubView::from),
            io: volume.io.map(|io| IoView {
                reads: io.reads,
                read_bytes: io.read_bytes,
                writes: io.writes,
                written_bytes: io.written_bytes,
            }),
            iops_max: volume.operations_per_s_max,
            bytes_per_s_max: volume.bytes_per_s_max,
            revision: volume.revision,
        }
    }
}

impl Object for VolumeView {
    const KIND: &'static str = "Volume";
    const COLUMNS: &'static [&'static str] = &["NAME", "SIZE", "USED", "HEALTH", "OWNER", "REPLICAS"];
    const WIDE: &'static [&'static str] = &["ID", "EPOCH", "ISR VERSION", "NBD", "ON DISK", "SCRUBBED"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        let replicas: Vec<String> = self.replicas.iter().map(ReplicaView::text).collect();
        vec![
            self.name.clone(),
            bytes(self.size_bytes),
            self.used_bytes.map(bytes).unwrap_or_default(),
            self.health.clone(),
            self.owner.clone(),
            words(&replicas),
            self.id.clone(),
            self.epoch.to_string(),
            self.isr_version.to_string(),
            self.nbd_uri().to_owned(),
            self.physical_bytes.map(bytes).unwrap_or_default(),
            self.last_scrub.as_ref().map(|scrub| utc(scrub.ended_ms)).unwrap_or_default(),
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
