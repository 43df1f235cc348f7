//! All volumes of the machine together, in the order of its disks.

use crate::attachment::Attachment;
use crate::disk::VolumeDisk;
use crate::limit::SharedLimiter;
use crate::request::Refusal;
use crate::scrub::millis;
use futures::future::{join_all, try_join_all};
use proto::limits::BLOCK_BYTES;
use proto::{Epoch, Sequence, VolumeId, v1};
use std::path::PathBuf;
use std::sync::Arc;
use storage::owner::{
    ActivateError, ActivationStart, IoCounts, IoStats, ResyncStatus, VolumeError, VolumeHandle, VolumeStatus,
};
use tokio::runtime::Handle;
use tokio::sync::watch;
use vmm::BlockBackend;

/// A volume failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It can't be activated.
    #[error("{volume} can't be activated: {source}")]
    Activate {
        volume: VolumeId,
        #[source]
        source: ActivateError,
    },
    /// It can't be brought to rest.
    #[error("{volume} can't be drained: {source}")]
    Drain {
        volume: VolumeId,
        #[source]
        source: VolumeError,
    },
    /// Only a replica could tell whether the machine has run elsewhere.
    #[error("without a volume nobody knows whether the machine has run elsewhere")]
    NoEvidence,
    /// The source named no last sequence.
    #[error("the source gave no last sequence of {volume}")]
    NoSequence { volume: VolumeId },
}

#[derive(Clone)]
struct Disk {
    attachment: Attachment,
    handle: VolumeHandle,
    limiter: Arc<SharedLimiter>,
}

/// The volumes; clones share the handles, not the attachments.
#[derive(Clone)]
pub struct VolumeSet {
    disks: Vec<Disk>,
    replica_socket: PathBuf,
}

/// Last sequence of each volume.
pub type LastSequences = Vec<(VolumeId, Sequence)>;

impl VolumeSet {
    /// Opens all volumes, inactive.
    pub fn open(attachments: &[Attachment], replica_socket: PathBuf) -> Self {
        let open = |attachment: &Attachment| Disk {
            attachment: attachment.clone(),
            handle: VolumeHandle::open(attachment.volume_config(&replica_socket)),
            limiter: Arc::new(SharedLimiter::new(attachment.limits)),
        };
        Self { disks: attachments.iter().map(open).collect(), replica_socket }
    }

    /// Follows where each of the volumes stands.
    pub fn watch(&self) -> Vec<watch::Receiver<VolumeStatus>> {
        self.disks.iter().map(|disk| disk.handle.watch()).collect()
    }

    /// The disks of the machine.
    pub fn backends(&self) -> Vec<(String, Arc<dyn BlockBackend>)> {
        let backend = |disk: &Disk| {
            let backend: Arc<dyn BlockBackend> =
                Arc::new(VolumeDisk::new(disk.handle.clone(), disk.limiter.clone(), Handle::current()));
            (disk.attachment.name.clone(), backend)
        };
        self.disks.iter().map(backend).collect()
    }

    /// The handle of a volume; 0: of the only one.
    ///
    /// # Errors
    /// It is not one of these.
    pub fn find(&self, volume: u64) -> Result<VolumeHandle, Refusal> {
        let mut found = self.disks.iter().filter(|disk| volume == 0 || disk.attachment.volume.0 == volume);
        match (found.next(), found.next()) {
            (Some(disk), None) => Ok(disk.handle.clone()),
            _ => {
                let problem = format!("{volume} is no volume of this process");
                Err(Refusal::Invalid { field: "volume_id", problem })
            }
        }
    }

    /// The first volume and its limiter.
    ///
    /// # Panics
    /// When there is none.
    pub fn first(&self) -> (VolumeHandle, Arc<SharedLimiter>) {
        let disk = self.disks.first().expect("a volume's process has one volume");
        (disk.handle.clone(), disk.limiter.clone())
    }

    /// Takes over all volumes after a boot or a crash: whatever any owner before was told is found.
    ///
    /// # Errors
    /// The first volume that can't be activated.
    pub async fn recover(&self) -> Result<(), DiskError> {
        self.activate(|_| Ok(ActivationStart::Recover)).await
    }

    /// Takes over all volumes from the source of a migration, which ended at these sequences.
    ///
    /// # Errors
    /// The first volume that can't be activated.
    pub async fn take_over(&self, last: &LastSequences) -> Result<(), DiskError> {
        self.activate(|volume| {
            let found = last.iter().find(|(id, _)| *id == volume);
            let (_, last) = found.ok_or(DiskError::NoSequence { volume })?;
            Ok(ActivationStart::Handover { last: *last })
        })
        .await
    }

    /// Takes back all volumes that were handed over with these sequences, if nobody has had them since. The set has the
    /// attachments of the epoch after the one to which they were handed over.
    ///
    /// # Errors
    /// The first volume that can't be activated, or that may have been active elsewhere. Without a volume nothing can be known.
    pub async fn take_back(&self, last: &LastSequences) -> Result<(), DiskError> {
        if self.disks.is_empty() {
            return Err(DiskError::NoEvidence);
        }
        let epochs = self.disks.iter().map(|disk| (disk.attachment.volume, disk.attachment.epoch));
        let epochs: Vec<_> = epochs.collect();
        self.activate(|volume| {
            let found = last.iter().find(|(id, _)| *id == volume);
            let (_, last) = found.ok_or(DiskError::NoSequence { volume })?;
            let epoch = epochs.iter().find(|(id, _)| *id == volume).map_or(0, |(_, epoch)| epoch.0);
            Ok(ActivationStart::Reclaim { last: *last, never: Epoch(epoch.saturating_sub(1)) })
        })
        .await
    }

    async fn activate(
        &self,
        start: impl Fn(VolumeId) -> Result<ActivationStart, DiskError>,
    ) -> Result<(), DiskError> {
        let activations = self.disks.iter().map(|disk| {
            let (volume, start) = (disk.attachment.volume, start(disk.attachment.volume));
            let config = disk.attachment.volume_config(&self.replica_socket);
            async move {
                let activated = disk.handle.activate(config, start?).await;
                activated.map_err(|source| DiskError::Activate { volume, source })
            }
        });
        try_join_all(activations).await.map(drop)
    }

    /// The same volumes at their new owner's epoch.
    ///
    /// # Errors
    /// They are not the same volumes, or an epoch goes back.
    pub fn with_attachments(&self, attachments: Vec<Attachment>) -> Result<Self, Refusal> {
        let is_same = |disk: &Disk, new: &Attachment| {
            disk.attachment.volume == new.volume && disk.attachment.epoch <= new.epoch
        };
        let all_same = self.disks.len() == attachments.len()
            && self.disks.iter().zip(&attachments).all(|(disk, new)| is_same(disk, new));
        if !all_same {
            let problem = "these are not the machine's volumes at a later epoch".to_owned();
            return Err(Refusal::Invalid { field: "volumes", problem });
        }
        let disks = self.disks.iter().zip(attachments);
        let disks = disks.map(|(disk, attachment)| {
            disk.limiter.set(attachment.limits);
            Disk { attachment, ..disk.clone() }
        });
        Ok(Self { disks: disks.collect(), replica_socket: self.replica_socket.clone() })
    }

    /// Takes new replica sets; the volumes have them when the future is done. What belongs to another epoch is not for this
    /// owner, and is left.
    pub fn update(&mut self, attachments: Vec<Attachment>) -> impl Future<Output = ()> + Send + use<> {
        let mut updates = Vec::new();
        for attachment in attachments {
            let mine = self.disks.iter_mut().find(|disk| disk.attachment.volume == attachment.volume);
            match mine {
                Some(disk) if disk.attachment.epoch == attachment.epoch => {
                    disk.limiter.set(attachment.limits);
                    updates.push((disk.handle.clone(), attachment.volume_config(&self.replica_socket)));
                    disk.attachment = attachment;
                }
                _ => tracing::debug!(
                    volume = %attachment.volume, epoch = %attachment.epoch,
                    "an update for a volume or epoch that is not this owner's is left"
                ),
            }
        }
        async move {
            for (volume, config) in updates {
                volume.update(config).await;
            }
        }
    }

    /// Makes everything durable that was written so far; requests go on.
    ///
    /// # Errors
    /// The first volume that can't be flushed.
    pub async fn flush(&self) -> Result<(), DiskError> {
        let flushes = self.disks.iter().map(|disk| async move {
            let volume = disk.attachment.volume;
            disk.handle.flush().await.map_err(|source| DiskError::Drain { volume, source })
        });
        try_join_all(flushes).await.map(drop)
    }

    /// Waits until nothing is in flight and everything is durable; no request is taken until `resume`.
    ///
    /// # Errors
    /// The first volume that can't be brought to rest.
    pub async fn drain(&self) -> Result<LastSequences, DiskError> {
        let drains = self.disks.iter().map(|disk| async move {
            let volume = disk.attachment.volume;
            let last = disk.handle.drain().await;
            last.map(|last| (volume, last)).map_err(|source| DiskError::Drain { volume, source })
        });
        try_join_all(drains).await
    }

    /// Undoes `drain`.
    pub async fn resume(&self) {
        join_all(self.disks.iter().map(|disk| disk.handle.resume())).await;
    }

    /// Lets all volumes go.
    pub async fn close(&self) {
        join_all(self.disks.iter().map(|disk| disk.handle.close())).await;
    }

    /// For the daemon.
    pub fn status(&self) -> Vec<v1::VolumeStatus> {
        let status = |disk: &Disk| {
            let status = disk.handle.status();
            let resyncs = disk.handle.resyncs();
            v1::VolumeStatus {
                volume_id: disk.attachment.volume.0,
                epoch: status.epoch.0,
                isr_version: status.isr_version.0,
                state: status.state.as_str().to_owned(),
                issued_seq: status.issued.0,
                acknowledged_seq: status.acknowledged.0,
                durable_seq: status.durable.0,
                io: Some(io_message(&disk.handle.io())),
                resyncs: resyncs.iter().map(resync_message).collect(),
                damaged: status.damaged_reads,
                repaired: status.repairs,
                scrub: None,
            }
        };
        self.disks.iter().map(status).collect()
    }
}

fn io_message(stats: &IoStats) -> v1::IoStats {
    let counts = |counts: &IoCounts| v1::IoCounts {
        operations: counts.operations,
        bytes: counts.bytes,
        errors: counts.errors,
        total_us: counts.total_us,
        classes: counts.classes.to_vec(),
    };
    v1::IoStats {
        reads: Some(counts(&stats.reads)),
        writes: Some(counts(&stats.writes)),
        discards: Some(counts(&stats.discards)),
        flushes: Some(counts(&stats.flushes)),
    }
}

fn resync_message(resync: &ResyncStatus) -> v1::ResyncStatus {
    let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_BYTES as u64);
    v1::ResyncStatus {
        host_id: resync.host.0,
        copied_bytes: bytes(resync.copied),
        left_bytes: bytes(resync.left),
        counted: resync.counted,
        running_ms: millis(resync.running),
    }
}
