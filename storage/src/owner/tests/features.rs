//! Snapshots, repairs and scrubbing through the owner.

use super::*;
use proto::SnapshotId;
use std::os::unix::fs::FileExt;

impl Cluster {
    /// What a replica keeps.
    fn used_bytes(&self, index: usize) -> u64 {
        self.servers[index].as_ref().unwrap().used_bytes().values().sum()
    }

    /// Turns a bit in every copy that a replica's log has of a block.
    fn damage(&self, index: usize, content: &[u8]) -> usize {
        let mut damaged = 0;
        let folder = self.dir.path().join(index.to_string()).join("segments");
        for entry in std::fs::read_dir(folder).unwrap() {
            let file =
                std::fs::OpenOptions::new().read(true).write(true).open(entry.unwrap().path()).unwrap();
            let mut block = vec![0; BLOCK_BYTES];
            // What these tests write is at the beginning.
            for offset in (0..64 * BLOCK_BYTES as u64).step_by(BLOCK_BYTES) {
                if file.read_exact_at(&mut block, offset).is_ok() && block == content {
                    file.write_all_at(&[content[9] ^ 1], offset + 9).unwrap();
                    damaged += 1;
                }
            }
        }
        damaged
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_are_kept_by_all_replicas_and_by_those_that_were_away() {
    let mut cluster = Cluster::start().await;
    let volume = cluster.own().await;
    let (first, second) = (SnapshotId(11), SnapshotId(12));
    volume.write(at(1), block(1)).await.unwrap();
    let taken = volume.snapshot(first).await.unwrap();
    assert_eq!(volume.snapshot(first).await.unwrap(), taken, "asked for again it is the same");
    cluster.down(2).await;
    volume.write(at(1), block(2)).await.unwrap();
    cluster.wait_isr(2).await;
    volume.write(at(2), block(3)).await.unwrap();
    volume.snapshot(second).await.unwrap();
    volume.delete_snapshot(first).await.unwrap();
    volume.write(at(1), block(4)).await.unwrap();
    cluster.up(2).await;
    cluster.wait_isr(3).await;
    // The one that was away is the only one left.
    cluster.down(0).await;
    cluster.down(1).await;
    cluster.wait_isr(1).await;
    let read = |block: u64| volume.read_view(View::Snapshot(second), at(block), BLOCK_BYTES);
    assert_eq!((read(1).await.unwrap(), read(2).await.unwrap()), (block(2), block(3)));
    let (lineage, members) = volume.lineage().await.unwrap();
    assert_eq!(lineage.snapshots.iter().map(|info| info.snapshot).collect::<Vec<_>>(), [second]);
    assert_eq!(members, [host(2)]);
    let unknown = volume.read_view(View::Snapshot(first), at(1), BLOCK_BYTES).await;
    assert_eq!(unknown, Err(VolumeError::UnknownSnapshot { snapshot: first }));
    let changed = volume.changed(View::Live, second, 0).await.unwrap();
    let only = |ranges: &[std::ops::Range<u64>]| ranges.first().filter(|_| ranges.len() == 1).cloned();
    assert_eq!((only(&changed.ranges), changed.next), (Some(at(1)..at(2)), None));
    volume.revert(second).await.unwrap();
    assert_eq!(volume.read(at(1), BLOCK_BYTES).await.unwrap(), block(2));
    assert_eq!(only(&volume.allocated(View::Live, 0, SIZE).await.unwrap()), Some(at(1)..at(3)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_block_is_read_elsewhere_and_put_back() {
    let cluster = Cluster::start().await;
    let volume = cluster.own().await;
    volume.write(at(1), block(0xa1)).await.unwrap();
    volume.write(at(2), block(0xb2)).await.unwrap();
    assert_eq!(cluster.damage(0, &block(0xa1)), 1, "at the replica that is read first");
    assert_eq!(volume.read(at(1), BLOCK_BYTES).await.unwrap(), block(0xa1));
    let is_repaired = || async { (volume.status().repairs == 1).then_some(()) };
    ::tests::wait::until(PATIENCE, "a repair", is_repaired).await;
    assert_eq!(volume.status().damaged_reads, 1);
    assert_eq!(cluster.content(0)[1], Some(block(0xa1)));
    // Of what nobody reads a scrub takes care, wherever it is.
    assert_eq!(cluster.damage(2, &block(0xb2)), 1);
    let found = volume.scrub(ScrubOptions::default(), |_| {}).await.unwrap();
    assert_eq!((found.checked, found.damaged, found.repaired, found.permille), (6, 1, 1, 1000));
    let found = volume.scrub(ScrubOptions::default(), |_| {}).await.unwrap();
    assert_eq!((found.checked, found.damaged), (6, 0));
    let one = ScrubOptions { host: Some(host(1)), ..ScrubOptions::default() };
    assert_eq!(volume.scrub(one, |_| {}).await.unwrap().checked, 2);
    let nobody = ScrubOptions { host: Some(HostId(9)), ..ScrubOptions::default() };
    assert_eq!(volume.scrub(nobody, |_| {}).await, Err(VolumeError::NoReplica { host: HostId(9) }));
    // Each copy keeps two blocks; what was done is known.
    assert_eq!(cluster.used_bytes(0), 2 * BLOCK_BYTES as u64);
    let io = volume.io();
    assert_eq!((io.writes.operations, io.writes.bytes), (2, 2 * BLOCK_BYTES as u64));
    assert!(volume.resyncs().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_is_damaged_everywhere_is_an_error() {
    let cluster = Cluster::start().await;
    let volume = cluster.own().await;
    volume.write(at(1), block(0xa1)).await.unwrap();
    (0..3).for_each(|index| assert_eq!(cluster.damage(index, &block(0xa1)), 1));
    assert_eq!(volume.read(at(1), BLOCK_BYTES).await, Err(VolumeError::Damaged { block: 1 }));
    volume.write(at(1), block(3)).await.unwrap();
    assert_eq!(volume.read(at(1), BLOCK_BYTES).await.unwrap(), block(3));
}
