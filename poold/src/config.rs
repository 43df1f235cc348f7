//! `poold.toml`: the few things that a host must know before it has read the pool's state.

use crate::identity::write_private;
use proto::HostId;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Feature level of this daemon; raised with each incompatible change of the replicated state or the wire.
pub const FEATURE_LEVEL: u32 = 1;

/// The host's configuration, written by `init` and `join`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Id of the pool.
    pub pool_id: String,
    /// Id of this host, which is its Raft node id.
    pub host_id: u64,
    /// Name of this host.
    pub host_name: String,
    /// Address to listen on: TCP for gRPC, UDP for the block store.
    pub listen: SocketAddr,
    /// Memory that VMs may use, in bytes.
    pub vm_memory_bytes: u64,
    /// Intervals of elections and heartbeats, as in the pool's timing profile.
    pub timing: TimingName,
}

/// A named timing profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TimingName {
    /// For production.
    Default,
    /// A fifth of it, for tests on one machine.
    Fast,
}

impl TimingName {
    /// Its values.
    #[must_use]
    pub fn timing(self) -> pool_state::Timing {
        match self {
            Self::Default => pool_state::Timing::default(),
            Self::Fast => pool_state::Timing::fast(),
        }
    }
}

/// The configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("{} is no valid configuration: {cause}", path.display())]
    Invalid { path: PathBuf, cause: String },
}

impl HostConfig {
    /// Reads the configuration of a data folder; `None` if the host belongs to no pool yet.
    ///
    /// # Errors
    /// It can't be read or is invalid.
    pub fn load(data_dir: &Path) -> Result<Option<Self>, ConfigError> {
        let path = data_dir.join("poold.toml");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ConfigError::Io { path, source }),
        };
        toml::from_str(&text)
            .map(Some)
            .map_err(|error| ConfigError::Invalid { path, cause: error.to_string() })
    }

    /// Writes it; this is the step that makes a host a member of its pool.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn save(&self, data_dir: &Path) -> Result<(), ConfigError> {
        let path = data_dir.join("poold.toml");
        let text = toml::to_string(self)
            .map_err(|error| ConfigError::Invalid { path: path.clone(), cause: error.to_string() })?;
        write_private(&path, text.as_bytes()).map_err(|source| ConfigError::Io { path, source })
    }

    /// This host.
    #[must_use]
    pub fn host(&self) -> HostId {
        HostId(self.host_id)
    }
}
