//! Where clients come in: a unix socket or a TCP port, exactly the one that was asked for.

use proto::ListenAddress;
use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use storage::nbd::{Export, SessionError, serve};
use storage::quiet::QuietStream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

/// Connections at a time: each may hold two of the largest requests (64 MiB), and no client opens more than its threads.
const CONNECTIONS_MAX: usize = 64;

/// Pause after a failed accept: out of descriptors, most likely, and others must end first.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The file in the process's directory that lists the sockets that it makes elsewhere, for whoever cleans up after it.
const SOCKETS_FILE: &str = "sockets";

/// A socket that nobody accepts from yet.
pub enum Bound {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener, SocketAddr),
}

/// The file of a unix socket; gone when dropped.
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "the socket stays");
        }
    }
}

/// Binds an address. A unix socket can be reached by this user only, and is listed in `directory` before it exists.
///
/// # Errors
/// The address can't be had; in words for an operator.
pub async fn bind(listen: &ListenAddress, directory: &Path) -> Result<Bound, String> {
    let refused = |error: io::Error| format!("can't listen on {listen}: {error}; choose another address");
    match listen {
        ListenAddress::Tcp(address) => {
            let listener = TcpListener::bind(address).await.map_err(refused)?;
            let bound = listener.local_addr().map_err(refused)?;
            Ok(Bound::Tcp(listener, bound))
        }
        ListenAddress::Unix(path) => {
            remove_dead(path).map_err(refused)?;
            let line = format!("{}\n", path.display());
            fs::write(directory.join(SOCKETS_FILE), line).map_err(refused)?;
            let listener = UnixListener::bind(path).map_err(refused)?;
            let file = SocketFile(path.clone());
            fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(refused)?;
            Ok(Bound::Unix(listener, file))
        }
    }
}

/// Removes a socket that nobody listens on: a process that was killed leaves one. Anything else stays.
fn remove_dead(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket());
    let answer = std::os::unix::net::UnixStream::connect(path);
    let is_dead = answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket && is_dead { fs::remove_file(path) } else { Ok(()) }
}

/// A socket that is being served; closed with all its connections when dropped.
pub struct Listener {
    uri: String,
    places: Arc<Semaphore>,
    refused: Arc<AtomicU64>,
    _accepting: AbortOnDropHandle<()>,
    _file: Option<SocketFile>,
}

impl Bound {
    /// Serves `export` under `name` to whoever connects.
    pub fn serve(self, name: String, export: Arc<dyn Export>) -> Listener {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let refused = Arc::new(AtomicU64::new(0));
        let door = Door { name: name.into(), export, places: places.clone(), refused: refused.clone() };
        let (uri, accepting, file) = match self {
            Self::Unix(listener, file) => {
                let uri = ListenAddress::Unix(file.0.clone()).nbd_uri(&door.name);
                (uri, tokio::spawn(door.accept_unix(listener)), Some(file))
            }
            Self::Tcp(listener, address) => {
                let uri = ListenAddress::Tcp(address).nbd_uri(&door.name);
                (uri, tokio::spawn(door.accept_tcp(listener)), None)
            }
        };
        Listener { uri, places, refused, _accepting: AbortOnDropHandle::new(accepting), _file: file }
    }
}

impl Listener {
    /// Where clients find it.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Clients that are connected.
    pub fn connections(&self) -> u32 {
        u32::try_from(CONNECTIONS_MAX - self.places.available_permits()).unwrap_or(u32::MAX)
    }

    /// Connections that were ended since the client did not keep to the protocol.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

struct Door {
    name: Arc<str>,
    export: Arc<dyn Export>,
    places: Arc<Semaphore>,
    refused: Arc<AtomicU64>,
}

impl Door {
    async fn accept_unix(self, listener: UnixListener) {
        let mut sessions = tokio::task::JoinSet::new();
        while let Ok(place) = self.places.clone().acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => self.admit(&mut sessions, QuietStream::try_from(stream), place),
                Err(error) => pause(&error).await,
            }
        }
    }

    async fn accept_tcp(self, listener: TcpListener) {
        let mut sessions = tokio::task::JoinSet::new();
        while let Ok(place) = self.places.clone().acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Small replies go out at once; without it they only wait.
                    let _ = stream.set_nodelay(true);
                    self.admit(&mut sessions, QuietStream::try_from(stream), place);
                }
                Err(error) => pause(&error).await,
            }
        }
    }

    /// Serves a client beside the others; the set ends it with the door.
    fn admit(
        &self,
        sessions: &mut tokio::task::JoinSet<()>,
        stream: io::Result<impl AsyncRead + AsyncWrite + Unpin + Send + 'static>,
        place: OwnedSemaphorePermit,
    ) {
        while sessions.try_join_next().is_some() {}
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => return tracing::warn!(%error, "a client of the volume is turned away"),
        };
        let (name, export, refused) = (self.name.clone(), self.export.clone(), self.refused.clone());
        sessions.spawn(async move {
            if let Err(error) = serve(stream, &name, export).await {
                if let SessionError::Protocol(_) | SessionError::Timeout = error {
                    refused.fetch_add(1, Ordering::Relaxed);
                }
                tracing::warn!(%error, "a client of the volume");
            }
            drop(place);
        });
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "accepting a client of the volume");
    tokio::time::sleep(ACCEPT_RETRY).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_socket_makes_room_and_a_living_one_or_a_file_does_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("nbd.sock");
        let listen = ListenAddress::Unix(path.clone());
        // As a killed process leaves it.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let bound = bind(&listen, root.path()).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            fs::read_to_string(root.path().join(SOCKETS_FILE)).unwrap().trim(),
            path.to_str().unwrap()
        );
        let refused = bind(&listen, root.path()).await.err().unwrap();
        assert!(refused.contains("choose another address"), "{refused}");
        drop(bound);
        assert!(!path.exists(), "the socket goes with its listener");
        fs::write(&path, "precious").unwrap();
        assert!(bind(&listen, root.path()).await.is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
