//! Volumes and images.

use super::{bytes, words};
use crate::output::Object;
use proto::{ImageId, VolumeId, v1};
use serde::Serialize;

/// A volume.
#[derive(Debug, Serialize)]
pub struct VolumeView {
    id: String,
    name: String,
    size_bytes: u64,
    epoch: u64,
    owner: String,
    replicas: Vec<ReplicaView>,
    isr_version: u64,
    revision: u64,
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
            replicas: volume.replicas.into_iter().map(replica).collect(),
            isr_version: volume.isr_version,
            revision: volume.revision,
        }
    }
}

impl Object for VolumeView {
    const KIND: &'static str = "Volume";
    const COLUMNS: &'static [&'static str] = &["NAME", "SIZE", "OWNER", "REPLICAS"];
    const WIDE: &'static [&'static str] = &["ID", "EPOCH", "ISR VERSION"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        let replicas: Vec<String> =
            self.replicas.iter().map(|replica| format!("{}:{}", replica.host, replica.state)).collect();
        vec![
            self.name.clone(),
            bytes(self.size_bytes),
            self.owner.clone(),
            words(&replicas),
            self.id.clone(),
            self.epoch.to_string(),
            self.isr_version.to_string(),
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
