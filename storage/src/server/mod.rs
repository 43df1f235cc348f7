//! The replica server of a host: local owners by unix socket, others by QUIC; the same frames on both.
//!
//! A connection is nobody's until it has attached with the epoch's secret; until then it can make the server allocate a
//! kilobyte and ask the pool once at a time.

mod connection;
mod overtaken;
mod quic;
mod thread;
pub(crate) mod work;

#[cfg(test)]
pub(crate) use quic::fingerprint_of_pem;
pub use quic::{ClientEndpoint, QuicError};

use crate::log::{Disk, DiskFaults, FaultyDisk, FileDisk};
use crate::quiet::QuietStream;
use crate::replica::{RepairCounts, Store, StoreError, Usage};
use crate::types::Authority;
use connection::Connection;
use proto::{ByteCount, CertificateFingerprint, HostId, Incarnation, VolumeId};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use thread::ServerThread;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Where and as whom.
#[derive(Debug, Clone)]
pub struct ReplicaOptions {
    /// Folder of the store.
    pub dir: PathBuf,
    /// This host.
    pub host: HostId,
    /// Boot id of its kernel.
    pub boot_id: String,
    /// Bytes that segments may take; none: the file system's.
    pub capacity: Option<ByteCount>,
    /// Faults of its disk; none but in campaigns.
    pub faults: Option<Arc<DiskFaults>>,
}

/// The server; clones are handles of the same one.
#[derive(Clone)]
pub struct ReplicaServer {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) authority: Arc<dyn Authority>,
    pub(crate) incarnation: Incarnation,
    identity: quic::ServerIdentity,
    pub(crate) shutdown: CancellationToken,
    tasks: TaskTracker,
    thread: ServerThread,
    refused: AtomicU64,
    attachments: overtaken::Attachments,
}

impl Shared {
    /// A peer did not keep to the protocol, or has no right to what it asked for.
    pub(crate) fn count_refusal(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// A task that ends at `end`, which is the server's shutdown or a part of it, and that the shutdown waits for.
    pub(crate) fn spawn(&self, end: CancellationToken, task: impl Future<Output = ()> + Send + 'static) {
        let task = async move {
            tokio::select! {
                () = end.cancelled() => {}
                () = task => {}
            }
        };
        self.tasks.spawn_on(task, self.thread.handle());
    }
}

impl ReplicaServer {
    /// Opens the store; blocking.
    ///
    /// # Errors
    /// The folder can't be used.
    pub fn open(options: ReplicaOptions, authority: Arc<dyn Authority>) -> Result<Self, StoreError> {
        let dir = options.dir.clone();
        let open = |error: io::Error| StoreError::Open { dir: dir.clone(), cause: error.to_string() };
        let limit = options.capacity.map(|capacity| capacity.0);
        let disk = FileDisk::open(&options.dir.join("segments"), limit).map_err(open)?;
        let incarnation =
            Incarnation(format!("{}:{}", options.boot_id, log_uuid(&options.dir).map_err(open)?));
        let identity = quic::ServerIdentity::load(&options.dir).map_err(open)?;
        let disk: Arc<dyn Disk> = match options.faults {
            Some(faults) => Arc::new(FaultyDisk::new(disk, faults)),
            None => Arc::new(disk),
        };
        let store = Store::open(&options.dir, disk)?;
        let shutdown = CancellationToken::new();
        let tasks = TaskTracker::new();
        let thread = ServerThread::start(shutdown.clone(), tasks.clone()).map_err(open)?;
        tracing::info!(host = %options.host, %incarnation, "block store opened");
        let refused = AtomicU64::new(0);
        let attachments = overtaken::Attachments::default();
        let shared =
            Shared { store, authority, incarnation, identity, shutdown, tasks, thread, refused, attachments };
        Ok(Self { shared: Arc::new(shared) })
    }

    #[cfg(test)]
    pub(crate) fn store(&self) -> Store {
        self.shared.store.clone()
    }

    /// This life of the store.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.shared.incarnation.clone()
    }

    /// The certificate that QUIC clients must see.
    #[must_use]
    pub fn certificate_fingerprint(&self) -> CertificateFingerprint {
        self.shared.identity.fingerprint
    }

    /// Serves on a unix socket and on UDP, until `shutdown`.
    ///
    /// # Errors
    /// An address can't be bound.
    pub async fn serve(&self, unix: &Path, udp: SocketAddr) -> Result<(), StoreError> {
        let failed =
            |address: String, error: io::Error| StoreError::Serve { address, cause: error.to_string() };
        match fs::remove_file(unix) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(unix.display().to_string(), error));
            }
            _ => {}
        }
        // Sockets belong to the runtime in which they are made.
        let _on_the_thread = self.shared.thread.handle().enter();
        let listener = UnixListener::bind(unix)
            .and_then(|listener| {
                // Owners are processes of other users, which prove themselves by their secrets.
                fs::set_permissions(unix, fs::Permissions::from_mode(0o666))?;
                Ok(listener)
            })
            .map_err(|error| failed(unix.display().to_string(), error))?;
        let endpoint = self.shared.identity.listen(udp, &self.shared.tasks);
        let endpoint = endpoint.map_err(|error| failed(udp.to_string(), error))?;
        self.shared.tasks.spawn(self.clone().accept_unix(listener));
        self.shared.tasks.spawn(self.clone().accept_quic(endpoint));
        Ok(())
    }

    async fn accept_unix(self, listener: UnixListener) {
        loop {
            let accepted = tokio::select! {
                () = self.shared.shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => match QuietStream::try_from(stream) {
                    Ok(stream) => {
                        let (read, write) = tokio::io::split(stream);
                        self.spawn(Connection::new(self.shared.clone()).run(read, write));
                    }
                    Err(error) => tracing::warn!(%error, "taking an owner in"),
                },
                Err(error) => {
                    // Out of descriptors, most likely: others must end first.
                    tracing::warn!(%error, "accepting an owner");
                    tokio::time::sleep(quic::ACCEPT_RETRY).await;
                }
            }
        }
    }

    async fn accept_quic(self, endpoint: quinn::Endpoint) {
        loop {
            let incoming = tokio::select! {
                () = self.shared.shutdown.cancelled() => break,
                incoming = endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            let server = self.clone();
            self.spawn(async move {
                let Ok(connection) = incoming.await else { return server.shared.count_refusal() };
                while let Ok((write, read)) = connection.accept_bi().await {
                    server.spawn(Connection::new(server.shared.clone()).run(read, write));
                }
            });
        }
        endpoint.close(0_u32.into(), b"shutdown");
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.shared.spawn(self.shared.shutdown.clone(), task);
    }

    /// The volumes that have data or a promise here.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.shared.store.volumes()
    }

    /// Forgets a volume that the pool has deleted or moved away.
    ///
    /// # Errors
    /// The store has failed.
    pub async fn delete_volume(&self, volume: VolumeId) -> Result<(), StoreError> {
        let deleted = self.shared.store.delete(volume).await;
        deleted.map_err(|error| StoreError::Failed { cause: error.to_string() })
    }

    /// Bytes of data that are kept for each volume and its snapshots, without what a clone shares with its origin.
    #[must_use]
    pub fn used_bytes(&self) -> BTreeMap<VolumeId, u64> {
        self.shared.store.used_bytes()
    }

    /// What was found damaged here, and what became of it.
    #[must_use]
    pub fn repairs(&self) -> RepairCounts {
        self.shared.store.repairs()
    }

    /// Connections that ended since their peers did not keep to the protocol, or had no right to a volume.
    #[must_use]
    pub fn refused_peers(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// How full the disk is.
    ///
    /// # Errors
    /// The file system can't be asked.
    pub fn usage(&self) -> io::Result<Usage> {
        self.shared.store.usage()
    }

    /// Resolves when the store has failed: the daemon must end.
    pub async fn failed(&self) -> StoreError {
        self.shared.store.failed().await
    }

    /// Ends all connections and closes the store; on return its folder and its addresses are free.
    pub async fn shutdown(&self) {
        self.shared.shutdown.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        let shared = self.shared.clone();
        if tokio::task::spawn_blocking(move || shared.thread.join()).await.is_err() {
            tracing::error!("waiting for the thread of the replica server");
        }
        self.shared.store.close().await;
    }
}

/// The log's own id, made with the store.
fn log_uuid(dir: &Path) -> io::Result<String> {
    fs::create_dir_all(dir)?;
    let path = dir.join("superblock");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let id = text.trim().strip_prefix("poolstore 1 ").map(str::to_owned);
            id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the superblock is damaged"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = uuid::Uuid::new_v4().to_string();
            quic::write_whole(&path, format!("poolstore 1 {id}\n").as_bytes())?;
            Ok(id)
        }
        Err(error) => Err(error),
    }
}
