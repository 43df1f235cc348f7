//! A volume's attachment, checked, and its translation for the store's owner side.

use crate::limit::Limits;
use crate::request::Refusal;
use crate::spec::check;
use proto::{
    AttachmentSecret, ByteCount, CertificateFingerprint, Epoch, HostId, Incarnation, IsrVersion, Sequence,
    VolumeId, v1,
};
use std::net::SocketAddr;
use std::path::Path;
use storage::owner::{ReplicaEndpoint, ReplicaRoute, VolumeConfig};

/// Most replicas of a volume: the pool's limit, and one more while a host with one of them leaves.
const REPLICAS_MAX: usize = 6;

/// Epoch starts of one volume; the pool keeps fewer.
const EPOCH_HISTORY_MAX: usize = 256;

/// Longest name or incarnation in bytes.
const TEXT_BYTES_MAX: usize = 256;

/// A checked attachment.
#[derive(Debug, Clone)]
pub struct Attachment {
    pub volume: VolumeId,
    pub name: String,
    size: ByteCount,
    pub epoch: Epoch,
    isr_version: IsrVersion,
    secret: AttachmentSecret,
    replicas: Vec<Replica>,
    epoch_history: Vec<storage::EpochStart>,
    min_isr: u32,
    pub limits: Limits,
}

#[derive(Debug, Clone)]
struct Replica {
    host: HostId,
    /// None: the local one.
    remote: Option<(SocketAddr, CertificateFingerprint)>,
    isr: Option<Incarnation>,
}

impl Attachment {
    /// Checks an attachment.
    ///
    /// # Errors
    /// The first field that is unusable.
    pub fn from_message(message: &v1::VolumeAttachment) -> Result<Self, Refusal> {
        let volume = VolumeId(message.volume_id);
        check(message.volume_id != 0, "volumes.volume_id", || "is missing".to_owned())?;
        check(message.epoch != 0, "volumes.epoch", || format!("{volume} has none"))?;
        let size = message.size_bytes;
        check(
            size != 0 && size.is_multiple_of(proto::limits::BLOCK_BYTES as u64),
            "volumes.size_bytes",
            || format!("{volume} has {size} bytes, not a positive number of whole blocks"),
        )?;
        check(message.name.len() <= TEXT_BYTES_MAX, "volumes.name", || format!("{volume}'s is too long"))?;
        check((1..=REPLICAS_MAX).contains(&message.replicas.len()), "volumes.replicas", || {
            format!("{volume} has {}, not 1 to {REPLICAS_MAX}", message.replicas.len())
        })?;
        check(message.min_isr != 0, "volumes.min_isr", || format!("{volume} has none"))?;
        check(message.epoch_history.len() <= EPOCH_HISTORY_MAX, "volumes.epoch_history", || {
            format!("{volume} has {} entries, more than {EPOCH_HISTORY_MAX}", message.epoch_history.len())
        })?;
        let secret = message.secret.as_slice().try_into().map_err(|_| Refusal::Invalid {
            field: "volumes.secret",
            problem: format!("{volume} has {} bytes instead of 32", message.secret.len()),
        })?;
        let start = |start: &v1::EpochStart| storage::EpochStart {
            epoch: Epoch(start.epoch),
            start: (start.start_seq != 0).then_some(Sequence(start.start_seq)),
        };
        Ok(Self {
            volume,
            name: message.name.clone(),
            size: ByteCount(size),
            epoch: Epoch(message.epoch),
            isr_version: IsrVersion(message.isr_version),
            secret: AttachmentSecret(secret),
            replicas: message.replicas.iter().map(Replica::from_message).collect::<Result<_, _>>()?,
            epoch_history: message.epoch_history.iter().map(start).collect(),
            min_isr: message.min_isr,
            limits: Limits {
                operations_per_s: (message.operations_per_s_max != 0).then_some(message.operations_per_s_max),
                bytes_per_s: (message.bytes_per_s_max != 0).then_some(message.bytes_per_s_max),
            },
        })
    }

    /// For the store; the local replica is reached at `replica_socket`.
    pub fn volume_config(&self, replica_socket: &Path) -> VolumeConfig {
        let endpoint = |replica: &Replica| ReplicaEndpoint {
            host: replica.host,
            route: match replica.remote {
                None => ReplicaRoute::Unix(replica_socket.to_owned()),
                Some((address, fingerprint)) => ReplicaRoute::Quic { address, fingerprint },
            },
            isr: replica.isr.clone(),
        };
        VolumeConfig {
            volume: self.volume,
            size: self.size,
            epoch: self.epoch,
            isr_version: self.isr_version,
            secret: self.secret.clone(),
            replicas: self.replicas.iter().map(endpoint).collect(),
            epoch_history: self.epoch_history.clone(),
            min_isr: self.min_isr,
        }
    }
}

impl Replica {
    fn from_message(message: &v1::ReplicaEndpoint) -> Result<Self, Refusal> {
        let host = HostId(message.host_id);
        let incarnation = &message.isr_incarnation;
        check(incarnation.len() <= TEXT_BYTES_MAX, "volumes.replicas.isr_incarnation", || {
            format!("{host}'s is too long")
        })?;
        let remote = if message.address.is_empty() {
            None
        } else {
            let address = message.address.parse().map_err(|_| Refusal::Invalid {
                field: "volumes.replicas.address",
                problem: format!("`{}` of {host} is not of the form IP:PORT", message.address),
            })?;
            Some((address, fingerprint("volumes.replicas.certificate_sha256", &message.certificate_sha256)?))
        };
        let isr = (!incarnation.is_empty()).then(|| Incarnation(incarnation.clone()));
        Ok(Self { host, remote, isr })
    }
}

/// A SHA-256 of 32 bytes.
pub fn fingerprint(field: &'static str, bytes: &[u8]) -> Result<CertificateFingerprint, Refusal> {
    let fingerprint = bytes.try_into().map_err(|_| Refusal::Invalid {
        field,
        problem: format!("has {} bytes instead of 32", bytes.len()),
    })?;
    Ok(CertificateFingerprint(fingerprint))
}

/// A usable attachment of one volume with a local and a remote replica.
#[cfg(test)]
pub fn fixture(volume: u64) -> v1::VolumeAttachment {
    let replica = |host_id, address: &str, incarnation: &str| v1::ReplicaEndpoint {
        host_id,
        address: address.to_owned(),
        isr_incarnation: incarnation.to_owned(),
        certificate_sha256: vec![9; 32],
    };
    v1::VolumeAttachment {
        volume_id: volume,
        name: "data".to_owned(),
        size_bytes: 8 << 20,
        epoch: 4,
        isr_version: 5,
        secret: vec![7; 32],
        replicas: vec![replica(1, "", "life-1"), replica(2, "10.0.0.2:7100", "")],
        epoch_history: vec![
            v1::EpochStart { epoch: 3, start_seq: 8 },
            v1::EpochStart { epoch: 4, start_seq: 0 },
        ],
        min_isr: 1,
        ..v1::VolumeAttachment::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_reaches_the_store_with_routes_and_in_sync_members() {
        let config =
            Attachment::from_message(&fixture(3)).unwrap().volume_config(Path::new("/run/replica.sock"));
        assert_eq!((config.volume, config.epoch, config.isr_version), (VolumeId(3), Epoch(4), IsrVersion(5)));
        assert!(
            matches!(&config.replicas[0].route, ReplicaRoute::Unix(path) if path.ends_with("replica.sock"))
        );
        assert_eq!(config.replicas[0].isr, Some(Incarnation("life-1".to_owned())));
        let ReplicaRoute::Quic { address, fingerprint } = &config.replicas[1].route else {
            panic!("the remote replica has a local route");
        };
        assert_eq!((address.to_string().as_str(), fingerprint.0), ("10.0.0.2:7100", [9; 32]));
        assert_eq!(config.replicas[1].isr, None);
        let starts: Vec<_> = config.epoch_history.iter().map(|start| start.start).collect();
        assert_eq!(starts, [Some(Sequence(8)), None]);
    }

    #[test]
    fn each_unusable_field_is_named() {
        type Spoil = fn(&mut v1::VolumeAttachment);
        let cases: [(&str, Spoil); 8] = [
            ("volumes.volume_id", |volume| volume.volume_id = 0),
            ("volumes.epoch", |volume| volume.epoch = 0),
            ("volumes.size_bytes", |volume| volume.size_bytes = 4097),
            ("volumes.secret", |volume| volume.secret.truncate(31)),
            ("volumes.replicas", |volume| volume.replicas.clear()),
            ("volumes.min_isr", |volume| volume.min_isr = 0),
            ("volumes.replicas.address", |volume| volume.replicas[1].address = "10.0.0.2".to_owned()),
            ("volumes.replicas.certificate_sha256", |volume| {
                volume.replicas[1].certificate_sha256.clear();
            }),
        ];
        for (expected, spoil) in cases {
            let mut message = fixture(3);
            spoil(&mut message);
            match Attachment::from_message(&message) {
                Err(Refusal::Invalid { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
