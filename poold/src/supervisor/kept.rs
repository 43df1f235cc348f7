//! Memory of machines that have moved away, kept for their way back: a machine that returns brings only what has changed.
//!
//! An image is the memory file of the process that has ended, held open here and passed to the next process of the same VM.
//! It takes memory of the host for as long as it is kept, so it goes when the host needs that for its own machines, the
//! oldest first. It is a cache and no more: a restart of the daemon loses it.

use super::{Machine, MachineError};
use proto::{ByteCount, MigrationId, VmId};
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Part of a host's memory for machines that images may take at most: as much as leaves room for what arrives.
const SHARE: u64 = 4;

/// Part of what machines leave of it that images may take: the rest is for the next machine.
const FREE_SHARE: u64 = 2;

/// Bytes of a block in `stat`.
const STAT_BLOCK_BYTES: u64 = 512;

/// Memory for images.
#[must_use]
pub fn budget(total: ByteCount, free: ByteCount) -> ByteCount {
    ByteCount((total.0 / SHARE).min(free.0 / FREE_SHARE))
}

/// One image.
#[derive(Debug)]
pub struct KeptImage {
    /// The memory.
    pub memory: File,
    /// Hashes of the pages in it.
    pub index: File,
}

impl KeptImage {
    /// What it takes.
    fn bytes(&self) -> u64 {
        let of = |file: &File| file.metadata().map_or(0, |data| data.blocks() * STAT_BLOCK_BYTES);
        of(&self.memory) + of(&self.index)
    }

    /// Takes over what the process of a finished source has to give; `None` when that is nothing.
    async fn of(machine: &Machine, pid: i32, migration: MigrationId) -> Result<Option<Self>, KeepError> {
        let files = machine.keep_memory(migration).await?;
        if files.memory_fd == 0 || files.index_fd == 0 {
            return Ok(None);
        }
        // The process has just answered and nobody but this daemon ends it: the number is its own.
        let open = |fd: u32| File::options().read(true).write(true).open(format!("/proc/{pid}/fd/{fd}"));
        Ok(Some(Self { memory: open(files.memory_fd)?, index: open(files.index_fd)? }))
    }
}

/// Nothing can be kept.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The process does not tell.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its files can't be opened.
    #[error("files of the process can't be opened: {0}")]
    Open(#[from] io::Error),
}

/// The images of this host.
#[derive(Debug, Default)]
pub struct KeptImages {
    /// The oldest first.
    images: Mutex<Vec<(VmId, KeptImage)>>,
    /// Of each VM whose image is being made or asked for.
    making: Mutex<BTreeMap<VmId, Making>>,
}

/// Held while an image is made, which takes a second for each 2 GiB: a machine that comes back at once waits for it, and no other does.
type Making = Arc<tokio::sync::Mutex<()>>;

impl KeptImages {
    /// Keeps the memory of a machine that has moved away.
    ///
    /// # Errors
    /// [`KeepError`]; nothing is kept then.
    pub async fn keep(
        &self,
        vm: VmId,
        machine: &Machine,
        pid: i32,
        migration: MigrationId,
    ) -> Result<(), KeepError> {
        let making = self.making(vm);
        let _making = making.lock().await;
        if let Some(image) = KeptImage::of(machine, pid, migration).await? {
            self.put(vm, image);
        }
        Ok(())
    }

    fn put(&self, vm: VmId, image: KeptImage) {
        let mut images = self.images();
        images.retain(|(of, _)| *of != vm);
        tracing::debug!(%vm, bytes = image.bytes(), "its memory is kept for the way back");
        images.push((vm, image));
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.images().is_empty()
    }

    /// The image of a VM, also if it is being made; its memory is about to change.
    pub async fn take(&self, vm: VmId) -> Option<KeptImage> {
        drop(self.making(vm).lock().await);
        self.take_made(vm)
    }

    fn making(&self, vm: VmId) -> Making {
        // A set of handles is right after a panic, too.
        let mut making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        making.retain(|_, used| Arc::strong_count(used) > 1);
        making.entry(vm).or_default().clone()
    }

    fn take_made(&self, vm: VmId) -> Option<KeptImage> {
        let mut images = self.images();
        let at = images.iter().position(|(of, _)| *of == vm)?;
        Some(images.remove(at).1)
    }

    /// Lets go of the oldest images beyond the budget, and of those that nobody can want.
    pub fn trim(&self, budget: ByteCount, exists: impl Fn(VmId) -> bool) {
        let mut images = self.images();
        images.retain(|(vm, _)| exists(*vm));
        let mut bytes: u64 = images.iter().map(|(_, image)| image.bytes()).sum();
        while bytes > budget.0 && !images.is_empty() {
            let (vm, image) = images.remove(0);
            bytes -= image.bytes().min(bytes);
            tracing::debug!(%vm, "its kept memory makes room");
        }
    }

    fn images(&self) -> MutexGuard<'_, Vec<(VmId, KeptImage)>> {
        // Changed by single insertions and removals, so it is whole even after a panic elsewhere.
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn image(bytes: usize) -> KeptImage {
        let mut memory = tempfile::tempfile().unwrap();
        memory.write_all(&vec![1; bytes]).unwrap();
        memory.sync_all().unwrap();
        KeptImage { memory, index: tempfile::tempfile().unwrap() }
    }

    #[tokio::test]
    async fn a_machine_that_comes_back_at_once_waits_for_its_image_and_for_no_other() {
        let images = KeptImages::default();
        images.put(VmId(5), image(1 << 20));
        let of_vm = images.making(VmId(4));
        let making = of_vm.lock().await;
        let mut taking = std::pin::pin!(images.take(VmId(4)));
        assert!(futures::poll!(taking.as_mut()).is_pending());
        let other = std::pin::pin!(images.take(VmId(5)));
        assert!(
            matches!(futures::poll!(other), std::task::Poll::Ready(Some(_))),
            "it has nothing to wait for"
        );
        images.put(VmId(4), image(1 << 20));
        drop(making);
        assert!(taking.await.is_some());
        drop(of_vm);
        drop(images.making(VmId(6)));
        assert_eq!(images.making.lock().unwrap().len(), 1, "what nobody uses is forgotten");
    }

    #[test]
    fn the_oldest_images_go_first_and_a_new_one_replaces_that_of_its_vm() {
        let images = KeptImages::default();
        for vm in [1, 2, 3, 2] {
            images.put(VmId(vm), image(1 << 20));
        }
        let kept = |images: &KeptImages| images.images().iter().map(|(vm, _)| vm.0).collect::<Vec<_>>();
        assert_eq!(kept(&images), [1, 3, 2]);
        images.trim(ByteCount(5 << 19), |_| true);
        assert_eq!(kept(&images), [3, 2]);
        images.trim(ByteCount(u64::MAX), |vm| vm != VmId(3));
        assert_eq!(kept(&images), [2]);
        assert!(images.take_made(VmId(2)).is_some() && images.take_made(VmId(2)).is_none());
    }

    #[test]
    fn images_never_take_what_machines_need() {
        let gib = |number: u64| ByteCount(number << 30);
        assert_eq!(budget(gib(64), gib(60)), gib(16));
        assert_eq!(budget(gib(64), gib(2)), gib(1));
        assert_eq!(budget(gib(64), gib(0)), gib(0));
    }
}
