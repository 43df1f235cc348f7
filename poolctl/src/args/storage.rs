//! Commands of volumes and images.

use crate::reference;
use clap::{Subcommand, ValueHint};
use proto::ByteCount;
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
    /// Deletes a volume and all its data
    Delete {
        /// The volume
        volume: String,
    },
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
