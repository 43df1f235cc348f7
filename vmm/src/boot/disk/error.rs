//! Why a disk can't be booted from.

use crate::virtio::BlockError;
use std::time::Duration;

/// A disk that names no kernel of its own.
#[derive(Debug, thiserror::Error)]
pub enum DiskBootError {
    /// The VM has neither kernel nor disk.
    #[error(
        "the VM has neither a kernel nor a disk to boot from; attach one with --disk or name an image with --kernel"
    )]
    NoDisk,
    /// The disk's store fails.
    #[error("{len} bytes at byte {offset} of the disk can't be read")]
    Read {
        offset: u64,
        len: usize,
        #[source]
        source: BlockError,
    },
    /// The disk's store does not answer.
    #[error(
        "{len} bytes at byte {offset} of the disk were not read within {limit:?}; see `poolctl volume health`"
    )]
    Silent { offset: u64, len: usize, limit: Duration },
    /// Something on the disk leads to a place outside of it.
    #[error("{what} leads to bytes {offset}+{len}, outside of its {size} bytes")]
    Outside { what: &'static str, offset: u64, len: u64, size: u64 },
    /// More was read than any kernel, initrd and menu need.
    #[error(
        "more than {max} bytes were read in search of a kernel: the disk's structures are damaged or hostile"
    )]
    Endless { max: u64 },
    /// A partition table that contradicts itself.
    #[error("the disk's {kind} partition table is unusable: {cause}; name a kernel with --kernel")]
    Partitions { kind: &'static str, cause: String },
    /// There is no kernel anywhere.
    #[error("the disk has no kernel in a /boot on ext4 ({}); name one with `poolctl vm create --kernel`", .looked.join(", "))]
    NoKernel { looked: Vec<String> },
    /// A file that the menu names is not there or damaged.
    #[error("{path} of {place} can't be read: {cause}")]
    File { place: String, path: String, cause: String },
    /// A file is larger than any of its kind.
    #[error("{path} of {place} has {bytes} bytes, more than {max}")]
    TooLarge { place: String, path: String, bytes: u64, max: u64 },
    /// Nothing says which file system is the root.
    #[error(
        "{kernel} of {place} is a kernel, but nothing says where its root file system is; name it with `poolctl vm create --cmdline root=…`"
    )]
    NoRoot { place: String, kernel: String },
    /// The kernel can't be kept for the loader.
    #[error("there is no memory for {path}")]
    Memory {
        path: String,
        #[source]
        source: std::io::Error,
    },
}
