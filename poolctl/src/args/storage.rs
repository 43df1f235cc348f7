//! Commands of volumes and images.

use crate::reference;
use clap::{Subcommand, ValueEnum, ValueHint};
use proto::{ByteCount, ListenAddress};
use std::path::PathBuf;

/// `poolctl volume …`
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Makes an empty volume
    Create {
        /// Its name
        name: String,
        /// Its size, such as 10GiB
        #[arg(long, value_parser = reference::size)]
        size: ByteCount,
        /// On how many hosts it is kept [default: of the pool]
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        replicas: Option<u32>,
    },
    /// All volumes
    List,
    /// One volume and the state of its replicas
    Show {
        /// The volume
        volume: String,
    },
    /// Volumes that lack a copy; ends with 4 if there are any
    Health {
        /// The volume [default: all]
        volume: Option<String>,
    },
    /// Takes a snapshot, while a VM runs, too
    Snapshot {
        /// The volume
        volume: String,
        /// Name of the snapshot
        name: String,
        /// Prints the task and does not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Makes a volume of a snapshot; both share what neither changes
    Clone {
        /// The snapshot: VOLUME@NAME
        snapshot: String,
        /// Name of the new volume
        name: String,
        /// Copies everything: nothing is shared
        #[arg(long)]
        full: bool,
        /// Number of copies of a full clone [default: 3, or as many as there are hosts]
        #[arg(long, requires = "full", value_parser = clap::value_parser!(u32).range(1..))]
        replicas: Option<u32>,
        /// Prints the task and does not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Takes a volume that nobody has open back to a snapshot; what was written since is lost
    Revert {
        /// The snapshot: VOLUME@NAME
        snapshot: String,
        /// Prints the task and does not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Makes a volume of a disk image
    Import {
        /// Its name
        name: String,
        /// The image
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Form of the image [default: what its first bytes say]
        #[arg(long, value_enum)]
        format: Option<DiskFormat>,
        /// On how many hosts it is kept [default: of the pool]
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        replicas: Option<u32>,
    },
    /// Writes a volume that nobody has open, or a snapshot, into a new file
    Export {
        /// The volume
        volume: String,
        /// A snapshot of it, while a VM runs, too
        #[arg(long)]
        snapshot: Option<String>,
        /// Only what has changed since this snapshot: a qcow2 file on top of --backing
        #[arg(long, requires_all = ["snapshot", "backing"])]
        since: Option<String>,
        /// The file that holds the older snapshot
        #[arg(long, requires = "since", value_hint = ValueHint::FilePath)]
        backing: Option<PathBuf>,
        /// The file
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Form of the file [default: raw, and qcow2 with --since]
        #[arg(long, value_enum)]
        format: Option<DiskFormat>,
    },
    /// Grows a volume; a guest sees it at once, an NBD client when it connects anew
    Resize {
        /// The volume
        volume: String,
        /// Its new size, such as 20GiB
        #[arg(value_parser = reference::size)]
        size: ByteCount,
    },
    /// Limits what a volume may do, from now on
    #[command(group = clap::ArgGroup::new("limit").required(true).multiple(true))]
    Set {
        /// The volume
        volume: String,
        /// Operations per second; 0: no limit
        #[arg(long, group = "limit")]
        iops: Option<u64>,
        /// Bytes per second, such as 100MiB; 0: no limit
        #[arg(long, group = "limit")]
        bandwidth: Option<ByteCount>,
    },
    /// Serves a volume over NBD until --stop, and prints its URI; whoever can connect may read and write all of it
    Nbd {
        /// The volume
        volume: String,
        /// unix:PATH at the host (only its root may connect), or IP:PORT (NBD itself asks nobody for a password)
        #[arg(long, value_name = "ADDRESS", required_unless_present = "stop")]
        listen: Option<ListenAddress>,
        /// By which host [default: the one that answers]
        #[arg(long, conflicts_with = "stop")]
        host: Option<String>,
        /// Ends it
        #[arg(long, conflicts_with = "listen")]
        stop: bool,
        /// Prints the task and does not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Reads all replicas, compares them with their checksums, and repairs what is damaged from the others, while a VM runs, too; fails
    /// if something is damaged everywhere
    Scrub {
        /// The volume
        volume: String,
        /// Only the replica of this host [default: all that are in sync]
        #[arg(long, value_name = "HOST")]
        replica: Option<String>,
        /// Bytes per second that are read of each replica, such as 100MiB [default: as fast as it goes]
        #[arg(long, value_parser = reference::size)]
        rate: Option<ByteCount>,
        /// Prints the task and does not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Deletes a volume and all its data
    Delete {
        /// The volume
        volume: String,
    },
}

/// `poolctl snapshot …`
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// All snapshots
    List {
        /// Of this volume only
        #[arg(long)]
        volume: Option<String>,
    },
    /// One snapshot
    Show {
        /// The snapshot: VOLUME@NAME
        snapshot: String,
    },
    /// Deletes a snapshot; clones of it stay
    Delete {
        /// The snapshot: VOLUME@NAME
        snapshot: String,
        /// Prints the task and does not wait
        #[arg(long = "async")]
        detach: bool,
    },
}

/// Forms of disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiskFormat {
    /// Byte for byte
    Raw,
    /// The format of qemu
    Qcow2,
}

/// `poolctl image …`
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Brings a file into the pool
    Import {
        /// Its name in the pool
        name: String,
        /// The file
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// All images
    List,
    /// Deletes an image
    Delete {
        /// The image
        image: String,
    },
}
