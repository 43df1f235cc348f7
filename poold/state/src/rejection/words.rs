//! The words for kinds of objects and for the numbers of a request.

use serde::{Deserialize, Serialize};

/// Kinds of objects that can be referred to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ObjectKind {
    /// A host.
    Host,
    /// A VM.
    Vm,
    /// A volume.
    Volume,
    /// A snapshot.
    Snapshot,
    /// An image.
    Image,
    /// A task.
    Task,
    /// A migration.
    Migration,
    /// A join token.
    Token,
    /// A group.
    Group,
    /// A user.
    User,
    /// The pool itself.
    Pool,
    /// A network.
    Network,
    /// A cluster.
    Cluster,
}

impl ObjectKind {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Vm => "vm",
            Self::Volume => "volume",
            Self::Snapshot => "snapshot",
            Self::Image => "image",
            Self::Task => "task",
            Self::Migration => "migration",
            Self::Token => "token",
            Self::Group => "group",
            Self::User => "user",
            Self::Pool => "pool",
            Self::Network => "network",
            Self::Cluster => "cluster",
        }
    }
}

impl std::fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A number of a request that is out of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Field {
    /// Number of vCPUs.
    Vcpus,
    /// Bytes of guest memory.
    Memory,
    /// Bytes of a volume.
    VolumeSize,
    /// Bytes of a kernel command line.
    Cmdline,
    /// Number of disks.
    Disks,
    /// Number of replicas.
    Replicas,
    /// Operations per second.
    Operations,
    /// Bytes per second.
    Bandwidth,
    /// Connections of a migration.
    Connections,
    /// Bytes of a host's address.
    Address,
    /// Bytes of a public key.
    PublicKey,
    /// Bytes of a PEM text.
    Pem,
    /// Milliseconds of a token's lifetime.
    TokenTtl,
    /// First sequence of an epoch.
    StartSequence,
    /// Bytes of a short text: CPU vendor, boot id, pool id, incarnation.
    ShortText,
    /// Bytes of a label's value.
    Label,
    /// Number of labels.
    Labels,
    /// Number of VMs of a group.
    GroupVms,
    /// Number of hosts of a group.
    GroupHosts,
    /// vCPUs that a logical CPU is counted for.
    CpuOvercommit,
    /// Milliseconds between two scrubs.
    ScrubInterval,
}

impl Field {
    /// A value of the field with its unit.
    #[must_use]
    pub fn show(self, value: u64) -> String {
        match self {
            Self::Memory | Self::VolumeSize | Self::Bandwidth => proto::ByteCount(value).to_string(),
            _ => value.to_string(),
        }
    }

    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
            Self::VolumeSize => "size",
            Self::Cmdline => "cmdline",
            Self::Disks => "disks",
            Self::Replicas => "replicas",
            Self::Operations => "operations per second",
            Self::Bandwidth => "bytes per second",
            Self::Connections => "connections",
            Self::Address => "address",
            Self::PublicKey => "public key",
            Self::Pem => "PEM text",
            Self::TokenTtl => "ttl",
            Self::StartSequence => "start sequence",
            Self::ShortText => "text",
            Self::Label => "label",
            Self::Labels => "number of labels",
            Self::GroupVms => "number of VMs",
            Self::GroupHosts => "number of hosts",
            Self::CpuOvercommit => "cpu-overcommit",
            Self::ScrubInterval => "scrub-interval",
        }
    }
}

impl std::fmt::Display for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
