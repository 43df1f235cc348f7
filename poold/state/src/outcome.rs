//! What an accepted entry answers.

use proto::{
    ClusterId, GroupId, HostId, ImageId, IsrVersion, MigrationId, NetworkId, TaskId, TokenId, VmId, VolumeId,
};
use serde::{Deserialize, Serialize};

/// The answer to an accepted entry: which object it created or changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Nothing to name, or nothing to change any more.
    Done,
    /// A join token.
    Token(TokenId),
    /// A host.
    Host(HostId),
    /// An image.
    Image(ImageId),
    /// A volume.
    Volume(VolumeId),
    /// The new version of a volume's in-sync set.
    Isr(IsrVersion),
    /// A VM.
    Vm(VmId),
    /// A group.
    Group(GroupId),
    /// A network.
    Network(NetworkId),
    /// A task that goes on, or has ended.
    Task(TaskId),
    /// A migration and its task.
    Migration {
        /// The migration.
        migration: MigrationId,
        /// Its task.
        task: TaskId,
    },
    /// A cluster.
    Cluster(ClusterId),
}
