//! What users of a volume hold.

use super::config::{ActivateError, ActivationStart, ResyncStatus, VolumeConfig, VolumeError, VolumeStatus};
use super::core::Owner;
use super::meter::{IoKind, IoMeter, IoStats, Traffic};
use super::task::{Message, VolumeTask};
use crate::hashed::HashedBlocks;
use crate::limits::{WINDOW_BYTES, write_cost};
use crate::types::View;
use crate::wire::DATA_BYTES_MAX;
use bytes::{Bytes, BytesMut};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, HostId, Sequence, VolumeId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{OwnedSemaphorePermit, RwLock, Semaphore, mpsc, oneshot, watch};

/// Bytes of reads that may be on their way: bounds what their answers take.
const READ_WINDOW_BYTES: usize = 16 << 20;

/// Messages that wait for the task.
const MESSAGES_MAX: usize = 256;

/// Blocks of one zeroing write: a frame without data, but an entry in the replica's map for each block.
const ZERO_BLOCKS_MAX: u64 = 4096;

pub(super) const BLOCK: u64 = BLOCK_BYTES as u64;
const SECTOR: u64 = 512;

/// Blocks of the largest frame.
const FRAME_BLOCKS: u64 = (DATA_BYTES_MAX / BLOCK_BYTES) as u64;

/// A volume; clones are handles of the same one. When the last is dropped the volume is closed.
#[derive(Clone)]
pub struct VolumeHandle {
    volume: VolumeId,
    messages: mpsc::Sender<Message>,
    published: watch::Receiver<VolumeStatus>,
    window: Arc<Semaphore>,
    read_window: Arc<Semaphore>,
    /// Whole-block writes share it; a write that must first read its blocks has it alone.
    blocks: Arc<RwLock<()>>,
    size: Arc<AtomicU64>,
    meter: Arc<IoMeter>,
    resyncs: watch::Receiver<Vec<ResyncStatus>>,
    traffic: Arc<Traffic>,
}

impl VolumeHandle {
    /// Opens a volume, inactive: its replicas are connected, nothing is promised. Must be called inside a tokio runtime.
    #[must_use]
    pub fn open(config: VolumeConfig) -> Self {
        let size = Arc::new(AtomicU64::new(config.size.0));
        let (volume, owner) = (config.volume, Owner::new(config.clone()));
        let (messages, queue) = mpsc::channel(MESSAGES_MAX);
        let (publish, published) = watch::channel(owner.status());
        let (publish_resyncs, resyncs) = watch::channel(Vec::new());
        let traffic = Arc::<Traffic>::default();
        let task = VolumeTask::new(owner, queue, (publish, publish_resyncs), traffic.clone());
        tokio::spawn(task.run(config));
        let window = Arc::new(Semaphore::new(WINDOW_BYTES));
        let read_window = Arc::new(Semaphore::new(READ_WINDOW_BYTES));
        let (blocks, meter) = (Arc::default(), Arc::default());
        Self { volume, messages, published, window, read_window, blocks, size, meter, resyncs, traffic }
    }

    /// Sends what `message` makes of the other end of an answer; waits for the answer.
    pub(super) async fn ask<T, E>(
        &self,
        closed: E,
        message: impl FnOnce(oneshot::Sender<Result<T, E>>) -> Message,
    ) -> Result<T, E> {
        let (sender, answer) = oneshot::channel();
        if self.messages.send(message(sender)).await.is_err() {
            return Err(closed);
        }
        answer.await.unwrap_or(Err(closed))
    }

    /// Becomes the owner at the epoch of `config`. Returns the last write before it.
    ///
    /// # Errors
    /// See [`ActivateError`].
    pub async fn activate(
        &self,
        config: VolumeConfig,
        start: ActivationStart,
    ) -> Result<Sequence, ActivateError> {
        self.ask(ActivateError::Closed, |answer| Message::Activate { config, start, answer }).await
    }

    /// New replicas or addresses at the same epoch, or a larger size.
    pub async fn update(&self, config: VolumeConfig) {
        self.size.fetch_max(config.size.0, Ordering::Relaxed);
        // A closed volume needs no update.
        let _ = self.messages.send(Message::Update { config }).await;
    }

    /// Size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        *self.published.borrow()
    }

    /// Follows where it stands; ends when it is closed.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<VolumeStatus> {
        self.published.clone()
    }

    /// What was done with it by all its handles, and how long that took.
    #[must_use]
    pub fn io(&self) -> IoStats {
        self.meter.stats()
    }

    /// The replicas that are being made equal, some moments ago.
    #[must_use]
    pub fn resyncs(&self) -> Vec<ResyncStatus> {
        self.resyncs.borrow().clone()
    }

    /// Bytes that went to each host's replica since the volume was opened: writes, copies and requests.
    #[must_use]
    pub fn sent_bytes(&self) -> BTreeMap<HostId, u64> {
        self.traffic.sent()
    }

    /// Reads; waits while no in-sync replica can be reached.
    ///
    /// # Errors
    /// Out of range, fenced, closed, or damaged everywhere.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, VolumeError> {
        self.meter.count(IoKind::Read, len as u64, self.read_view(View::Live, offset, len)).await
    }

    /// Reads what the volume or one of its snapshots holds.
    ///
    /// # Errors
    /// As `read`, and an unknown snapshot.
    pub async fn read_view(&self, view: View, offset: u64, len: usize) -> Result<Bytes, VolumeError> {
        self.check(offset, len as u64)?;
        let first = offset / BLOCK;
        let end = (offset + len as u64).div_ceil(BLOCK);
        let skip = usize::try_from(offset % BLOCK).expect("less than a block");
        if len == 0 {
            return Ok(Bytes::new());
        }
        if end - first <= FRAME_BLOCKS {
            // Nothing to put together.
            let blocks = self.read_blocks(view, BlockIndex(first), end - first).await?;
            return Ok(blocks.slice(skip..skip + len));
        }
        let mut data = BytesMut::with_capacity(usize::try_from((end - first) * BLOCK).unwrap_or(len));
        let mut at = first;
        while at < end {
            let count = (end - at).min(FRAME_BLOCKS);
            data.extend_from_slice(&self.read_blocks(view, BlockIndex(at), count).await?);
            at += count;
        }
        Ok(data.freeze().slice(skip..skip + len))
    }

    async fn read_blocks(&self, view: View, first: BlockIndex, count: u64) -> Result<Bytes, VolumeError> {
        let count = u32::try_from(count).expect("bounded by a frame");
        let permit = share(&self.read_window, count as usize * BLOCK_BYTES).await?;
        self.ask(VolumeError::Closed, |answer| Message::Read { view, first, count, answer, permit }).await
    }

    /// Writes; acknowledged when every in-sync replica has it.
    ///
    /// # Errors
    /// Out of range, no space, fenced, draining, closed.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), VolumeError> {
        self.meter.count(IoKind::Write, data.len() as u64, self.write_bytes(offset, data)).await
    }

    async fn write_bytes(&self, offset: u64, data: Bytes) -> Result<(), VolumeError> {
        self.check(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        let whole = offset.is_multiple_of(BLOCK) && data.len().is_multiple_of(BLOCK_BYTES);
        if whole {
            let _shared = self.blocks.read().await;
            return self.write_blocks(BlockIndex(offset / BLOCK), data).await;
        }
        let _alone = self.blocks.write().await;
        let start = offset / BLOCK * BLOCK;
        let size = self.size_bytes();
        let end = (offset + data.len() as u64).next_multiple_of(BLOCK).min(size.next_multiple_of(BLOCK));
        let len = usize::try_from(end - start).expect("a request fits in memory");
        let mut blocks = BytesMut::from(
            &self.read_view(View::Live, start, len.min(usize::try_from(size - start).unwrap_or(len))).await?
                [..],
        );
        blocks.resize(len, 0);
        let at = usize::try_from(offset - start).expect("less than a block");
        blocks[at..at + data.len()].copy_from_slice(&data);
        self.write_blocks(BlockIndex(start / BLOCK), blocks.freeze()).await
    }

    async fn write_blocks(&self, first: BlockIndex, data: Bytes) -> Result<(), VolumeError> {
        let mut parts = Vec::new();
        let mut at = first.0;
        let mut rest = data;
        while !rest.is_empty() {
            let part = rest.split_to(rest.len().min(DATA_BYTES_MAX));
            let count = u32::try_from(part.len() / BLOCK_BYTES).expect("bounded by a frame");
            let first = BlockIndex(at);
            let content = HashedBlocks::new(self.volume, first, part);
            parts.push(self.submit(first, count, Some(content)).await?);
            at += u64::from(count);
        }
        for part in parts {
            part.await.map_err(|_| VolumeError::Closed)??;
        }
        Ok(())
    }

    async fn submit(
        &self,
        first: BlockIndex,
        count: u32,
        content: Option<HashedBlocks>,
    ) -> Result<oneshot::Receiver<Result<(), VolumeError>>, VolumeError> {
        let permit =
            share(&self.window, write_cost(content.as_ref().map_or(0, |content| content.data().len())))
                .await?;
        let (answer, written) = oneshot::channel();
        let message = Message::Write { first, count, content, answer, permit };
        self.messages.send(message).await.map_err(|_| VolumeError::Closed)?;
        Ok(written)
    }

    /// Makes every acknowledged write durable on every in-sync replica.
    ///
    /// # Errors
    /// Fenced or closed.
    pub async fn flush(&self) -> Result<(), VolumeError> {
        let flush = self.ask(VolumeError::Closed, |answer| Message::Flush { answer });
        self.meter.count(IoKind::Flush, 0, flush).await
    }

    /// These bytes may be forgotten: whole blocks read as zero from now on, the rest stays.
    ///
    /// # Errors
    /// As `write`.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.meter.count(IoKind::Discard, len, self.discard_bytes(offset, len)).await
    }

    async fn discard_bytes(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.check(offset, len)?;
        let first = offset.div_ceil(BLOCK);
        let end = (offset + len) / BLOCK;
        let _shared = self.blocks.read().await;
        self.zero_blocks(first, end).await
    }

    /// These bytes become zero.
    ///
    /// # Errors
    /// As `write`.
    pub async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.meter.count(IoKind::Discard, len, self.zero_bytes(offset, len)).await
    }

    async fn zero_bytes(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.check(offset, len)?;
        let first = offset.div_ceil(BLOCK) * BLOCK;
        let end = (offset + len) / BLOCK * BLOCK;
        if first >= end {
            return self.write_bytes(offset, zeroes(len)).await;
        }
        self.write_bytes(offset, zeroes(first - offset)).await?;
        self.write_bytes(end, zeroes(offset + len - end)).await?;
        let _shared = self.blocks.read().await;
        self.zero_blocks(first / BLOCK, end / BLOCK).await
    }

    async fn zero_blocks(&self, first: u64, end: u64) -> Result<(), VolumeError> {
        let mut at = first;
        while at < end {
            let count = (end - at).min(ZERO_BLOCKS_MAX);
            let blocks = u32::try_from(count).expect("bounded above");
            let answer = self.submit(BlockIndex(at), blocks, None).await?;
            answer.await.map_err(|_| VolumeError::Closed)??;
            at += count;
        }
        Ok(())
    }

    /// Waits for everything in flight, flushes, and refuses I/O from then on until [`resume`](Self::resume). Returns the
    /// last sequence.
    ///
    /// # Errors
    /// Fenced, closed or not active.
    pub async fn drain(&self) -> Result<Sequence, VolumeError> {
        self.ask(VolumeError::Closed, |answer| Message::Drain { answer }).await
    }

    /// Undoes `drain`.
    pub async fn resume(&self) {
        // A closed volume can't go on.
        let _ = self.messages.send(Message::Resume).await;
    }

    /// Closes the volume: nothing is sent to its replicas any more.
    pub async fn close(&self) {
        let (closed, is_closed) = oneshot::channel();
        if self.messages.send(Message::Close { closed }).await.is_ok() {
            // An error says that it is closed already.
            let _ = is_closed.await;
        }
    }

    pub(super) fn check(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        let size = self.size_bytes();
        let sectors = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        match offset.checked_add(len) {
            Some(end) if sectors && end <= size => Ok(()),
            _ => Err(VolumeError::OutOfRange { offset, len, size }),
        }
    }
}

fn zeroes(len: u64) -> Bytes {
    Bytes::from(vec![0; usize::try_from(len).expect("less than two blocks")])
}

/// A share of a window, once there is room for it.
async fn share(window: &Arc<Semaphore>, bytes: usize) -> Result<OwnedSemaphorePermit, VolumeError> {
    let bytes = u32::try_from(bytes).expect("bounded by a frame");
    window.clone().acquire_many_owned(bytes).await.map_err(|_| VolumeError::Closed)
}
