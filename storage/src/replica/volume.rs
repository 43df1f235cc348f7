//! What one volume's records in the log add up to.

use super::live::LiveSegments;
use super::map::{BlockMap, BlockVersion, Content, Entry};
use super::recent::{RecentWrite, RecentWrites};
use super::state::Replica;
use crate::log::{Location, Record, RecordKind, ReplayedRecord, SegmentId};
use crate::types::Tail;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Sequence, VolumeId};
use std::collections::HashMap;

/// One volume's replica.
#[derive(Debug, Default)]
pub struct Volume {
    /// Its position.
    pub replica: Replica,
    /// Its blocks.
    pub map: BlockMap,
    /// Its latest writes.
    pub recent: RecentWrites,
    /// The last write that is known to be synced.
    pub durable: Sequence,
    /// Where the latest record about the position itself lies: without it a restart would not know that a resync is unfinished.
    position_in: Option<SegmentId>,
}

impl Volume {
    /// Applies one record of the log, at replay and when it was just written.
    fn apply(&mut self, record: Record, data: Location, live: &mut LiveSegments) {
        let tail = Tail { epoch: record.epoch, sequence: record.sequence };
        match &record.kind {
            RecordKind::Write { .. } | RecordKind::Zero => {
                self.put(&record, data, live);
                if tail > self.replica.last_write() {
                    self.replica.wrote(tail);
                    let Record { first, count, kind, .. } = record;
                    let content = match kind {
                        RecordKind::Write { checksums } => Some((data, checksums)),
                        _ => None,
                    };
                    let segment = data.segment;
                    self.recent.push(RecentWrite { tail, first, count, content, segment }, live);
                } else {
                    self.recent.moved(tail, data, live);
                }
            }
            // A block that another replica has is no write in order: the position stays.
            RecordKind::Copy { .. } | RecordKind::CopyZero => self.put(&record, data, live),
            RecordKind::Truncate => {
                self.recent.clear(live);
                self.map.truncate(tail.sequence, live);
                self.replica.truncate(tail);
                self.place_position(data.segment, live);
            }
            RecordKind::Complete => {
                self.map.forget_voids(live);
                self.replica.complete(tail);
                self.place_position(data.segment, live);
            }
            RecordKind::Delete => {
                self.recent.clear(live);
                self.map.clear(live);
                self.position_in.take().into_iter().for_each(|segment| live.release(segment));
            }
        }
    }

    fn put(&mut self, record: &Record, data: Location, live: &mut LiveSegments) {
        let version = BlockVersion { epoch: record.epoch, sequence: record.sequence };
        let checksums = record.kind.checksums();
        for index in 0..record.count {
            let content = match checksums.get(index as usize) {
                Some(&checksum) => Content::Data { location: data.after_blocks(index), checksum },
                None => Content::Zero,
            };
            let block = BlockIndex(record.first.0 + u64::from(index));
            self.map.put_newer(block, Entry { version, content, segment: data.segment }, live);
        }
    }

    /// Whether the record must be written again as it is, before its segment may go: it says more than what its blocks hold.
    pub(super) fn keeps_whole(&self, record: &Record, segment: SegmentId) -> bool {
        let tail = Tail { epoch: record.epoch, sequence: record.sequence };
        match record.kind {
            RecordKind::Write { .. } | RecordKind::Zero => self.recent.is_in(tail, segment),
            // An unfinished resync will end with a record of its own.
            RecordKind::Complete => self.position_in == Some(segment) && !self.replica.is_incomplete(),
            RecordKind::Truncate | RecordKind::Delete | RecordKind::Copy { .. } | RecordKind::CopyZero => {
                false
            }
        }
    }

    fn place_position(&mut self, segment: SegmentId, live: &mut LiveSegments) {
        live.retain(segment);
        if let Some(old) = self.position_in.replace(segment) {
            live.release(old);
        }
    }
}

/// All volumes of a store.
pub type Volumes = HashMap<VolumeId, Volume>;

/// Applies one record of the log.
pub fn apply(volumes: &mut Volumes, live: &mut LiveSegments, replayed: ReplayedRecord) {
    let ReplayedRecord { record, data } = replayed;
    let (id, is_delete) = (record.volume, record.kind == RecordKind::Delete);
    volumes.entry(id).or_default().apply(record, data, live);
    if is_delete {
        volumes.remove(&id);
    }
}

impl Location {
    /// The place so many blocks further.
    pub(super) fn after_blocks(mut self, blocks: u32) -> Self {
        self.offset += blocks * BLOCK_BYTES as u32;
        self
    }
}
