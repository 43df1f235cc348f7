//! Appending batches.

use super::disk::Disk;
use super::format::{BatchHeader, Record};
use super::{Location, LogError, SegmentId};
use crate::safety::Rule;
use proto::limits::BLOCK_BYTES;
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

/// The end of the log.
pub struct LogWriter {
    disk: Arc<dyn Disk>,
    segment: Option<SegmentId>,
    next_segment: u64,
    offset: u64,
    lsn: u64,
    durable_lsn: u64,
    previous: [u8; 32],
    unsynced: BTreeSet<SegmentId>,
    /// Nothing was written in this run.
    is_fresh: bool,
    failed: bool,
}

/// Where a batch was put.
pub struct Written {
    /// Its number.
    pub lsn: u64,
    /// Where its first data block lies; the others follow.
    pub data: Location,
}

/// What a batch survives when it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survives {
    /// The death of the process.
    Process,
    /// The loss of power.
    Power,
}

/// What a batch may take of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// All but a reserve: data of guests.
    Data,
    /// Everything: what cleaning, trimming, deleting and checkpoints write, all of which gives space back.
    All,
}

/// Segments that guests' data leaves free: one to copy into, one for a checkpoint's pages, and one for trims meanwhile.
const RESERVE_SEGMENTS: u64 = 3;

/// Where replay found the log's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEnd {
    /// The last segment, if there is any.
    pub segment: Option<SegmentId>,
    /// The first free byte in it.
    pub offset: u64,
    /// Number of the last batch.
    pub lsn: u64,
    /// Hash of its header.
    pub previous: [u8; 32],
}

impl LogEnd {
    /// Nothing was ever written.
    pub const BEGIN: Self = Self { segment: None, offset: 0, lsn: 0, previous: [0; 32] };
}

impl LogWriter {
    /// Goes on where replay ended. Everything before counts as durable only after the next sync.
    pub fn new(disk: Arc<dyn Disk>, end: LogEnd, next_segment: u64) -> Self {
        Self {
            disk,
            segment: end.segment,
            next_segment,
            offset: end.offset,
            lsn: end.lsn,
            durable_lsn: 0,
            previous: end.previous,
            unsynced: end.segment.into_iter().collect(),
            is_fresh: true,
            failed: false,
        }
    }

    /// The segment that is being written.
    #[must_use]
    pub fn segment(&self) -> Option<SegmentId> {
        self.segment
    }

    /// Where the next batch follows.
    #[must_use]
    pub fn end(&self) -> LogEnd {
        LogEnd { segment: self.segment, offset: self.offset, lsn: self.lsn, previous: self.previous }
    }

    /// The number for the next new segment.
    #[must_use]
    pub fn next_segment(&self) -> u64 {
        self.next_segment
    }

    /// Writes one batch. One that is to survive the loss of power is made durable together with all before it.
    ///
    /// # Errors
    /// `NoSpace` changes nothing and may be tried again. After any other error the log must not be used any more.
    pub fn append(
        &mut self,
        records: Vec<Record>,
        data: &[&[u8]],
        room: Room,
        survives: Survives,
    ) -> Result<Written, LogError> {
        if self.is_fresh && Rule::LostBatchesStayLost.holds() {
            // Batches of the run before may lie beyond the end, where a loss of power has left them without those before them.
            // Were the same batch written again, as it is when an owner brings the same writes again, they would follow it.
            // No batch that was ever lost is empty.
            self.write_batch(Vec::new(), &[], Room::All, Survives::Process)?;
            self.sync()?;
            self.is_fresh = false;
        }
        let written = self.write_batch(records, data, room, survives)?;
        if survives == Survives::Power {
            self.sync()?;
        }
        Ok(written)
    }

    fn write_batch(
        &mut self,
        records: Vec<Record>,
        data: &[&[u8]],
        room: Room,
        survives: Survives,
    ) -> Result<Written, LogError> {
        let data_bytes: usize = data.iter().map(|part| part.len()).sum();
        debug_assert_eq!(data_bytes % BLOCK_BYTES, 0);
        let header = |segment: SegmentId, log: &Self, records: Vec<Record>| BatchHeader {
            segment: segment.0,
            lsn: log.lsn + 1,
            previous: log.previous,
            durable_lsn: log.durable_lsn,
            records,
        };
        // The segment's number is part of the header, but not of its length in blocks that matter here: a second encoding
        // for the rare change of segment is simpler than a guess.
        let mut encoded = header(self.segment.unwrap_or(SegmentId(0)), self, records.clone()).encode();
        let needed = (encoded.bytes.len() + data_bytes) as u64;
        if self.segment.is_none() || self.offset + needed > self.disk.segment_bytes() {
            // The old segment is durable before the new one exists: only the last one can have a torn tail.
            self.sync()?;
            let segment = self.open_segment(room)?;
            encoded = header(segment, self, records).encode();
        }
        let segment = self.segment.expect("one was opened above");
        let header_bytes = encoded.bytes.len() as u64;
        let batch_bytes = header_bytes + data_bytes as u64;
        assert!(batch_bytes <= self.disk.segment_bytes(), "a batch fits into a segment");
        let parts: Vec<&[u8]> = std::iter::once(&encoded.bytes[..]).chain(data.iter().copied()).collect();
        // Alone it takes one call; with others that are not durable yet, one sync for all of them.
        if survives == Survives::Power && self.unsynced.is_empty() {
            let written = self.io("write", segment, |disk| disk.write_through(segment, self.offset, &parts));
            if let Err(error) = written {
                self.failed = true;
                return Err(error);
            }
        } else {
            self.io("write", segment, |disk| disk.write_parts(segment, self.offset, &parts))?;
            self.unsynced.insert(segment);
        }
        let offset = u32::try_from(self.offset + header_bytes).expect("a segment is smaller than 4 GiB");
        self.offset += batch_bytes;
        self.lsn += 1;
        self.previous = encoded.hash;
        Ok(Written { lsn: self.lsn, data: Location { segment, offset } })
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// A failed sync must never be repeated: the log is over.
    pub fn sync(&mut self) -> Result<(), LogError> {
        for segment in std::mem::take(&mut self.unsynced) {
            if let Err(error) = self.io("sync", segment, |disk| disk.sync(segment)) {
                self.failed = true;
                return Err(error);
            }
        }
        self.durable_lsn = self.lsn;
        Ok(())
    }

    fn open_segment(&mut self, room: Room) -> Result<SegmentId, LogError> {
        if room == Room::Data {
            let usage = self.disk.usage().map_err(LogError::List)?;
            let free = usage.capacity.saturating_sub(usage.used);
            if free < (1 + RESERVE_SEGMENTS) * self.disk.segment_bytes() {
                return Err(LogError::NoSpace);
            }
        }
        let segment = SegmentId(self.next_segment);
        self.io("create", segment, |disk| disk.create(segment))?;
        self.next_segment += 1;
        self.segment = Some(segment);
        self.offset = 0;
        Ok(segment)
    }

    fn io(
        &self,
        action: &'static str,
        segment: SegmentId,
        act: impl FnOnce(&dyn Disk) -> io::Result<()>,
    ) -> Result<(), LogError> {
        assert!(!self.failed, "the log is not used after a failed sync");
        act(&*self.disk).map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded if action == "create" => {
                LogError::NoSpace
            }
            _ => LogError::Io { action, segment, source },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{FileDisk, RecordKind, Replayed, replay};
    use crate::map::TreeId;
    use proto::{BlockIndex, Epoch, Sequence, VolumeId};

    fn zero(sequence: u64) -> Vec<Record> {
        vec![Record {
            volume: VolumeId(1),
            layer: TreeId(0),
            epoch: Epoch(1),
            sequence: Sequence(sequence),
            first: BlockIndex(0),
            count: 1,
            kind: RecordKind::Zero,
        }]
    }

    /// Opens the log; the sequences that it holds.
    fn open(disk: &Arc<dyn Disk>) -> (LogWriter, Vec<u64>) {
        let mut found = Vec::new();
        let replayed = replay(&**disk, LogEnd::BEGIN, |replayed| match replayed {
            Replayed::Record(replayed) => found.push(replayed.record.sequence.0),
            Replayed::Gap => unreachable!("nothing durable is lost"),
        })
        .unwrap();
        assert!(replayed.damage.is_empty(), "{:?}", replayed.damage);
        (LogWriter::new(disk.clone(), replayed.end, replayed.next_segment), found)
    }

    #[test]
    fn what_a_loss_of_power_has_cut_off_does_not_come_back_with_what_was_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(dir.path(), None).unwrap());
        let (mut log, _) = open(&disk);
        log.append(zero(1), &[], Room::All, Survives::Process).unwrap();
        log.sync().unwrap();
        let lost = log.append(zero(2), &[], Room::All, Survives::Process).unwrap().data;
        log.append(zero(3), &[], Room::All, Survives::Process).unwrap();
        // The last batch has reached the disk, the one before it has not.
        let header = u64::from(lost.offset) - BLOCK_BYTES as u64;
        disk.write(lost.segment, header, &[0; BLOCK_BYTES]).unwrap();
        let (mut log, found) = open(&disk);
        assert_eq!(found, [1]);
        // As the first run had: the batch that follows is the same, byte for byte.
        log.sync().unwrap();
        log.append(zero(2), &[], Room::All, Survives::Process).unwrap();
        assert_eq!(open(&disk).1, [1, 2]);
    }
}
