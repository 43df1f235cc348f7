//! The directory of the process: made for it by the daemon, used once.
//!
//! `pid` is created here, locked for the process's life, and never removed: its presence says that this epoch has run.

use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use tokio::net::UnixListener;

/// The directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// A process has been here before.
    #[error("a process has run in {path} before: each epoch is run once, in a directory of its own")]
    Used { path: PathBuf },
    /// The file system refuses.
    #[error("{path}: {source}; check the disk and the permissions")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A directory that belongs to this process.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Locked as long as the process lives.
    _pid: File,
}

impl Directory {
    /// Takes the directory for this process.
    ///
    /// # Errors
    /// It was used before, or can't be written.
    pub fn claim(path: &Path) -> Result<Self, DirectoryError> {
        let pid_path = path.join("pid");
        let at = |source| DirectoryError::Io { path: pid_path.clone(), source };
        let mut pid = File::create_new(&pid_path).map_err(|source| {
            if source.kind() == io::ErrorKind::AlreadyExists {
                DirectoryError::Used { path: path.to_owned() }
            } else {
                at(source)
            }
        })?;
        pid.lock().map_err(at)?;
        writeln!(pid, "{}", std::process::id()).map_err(at)?;
        Ok(Self { path: path.to_owned(), _pid: pid })
    }

    /// Listens on the control socket, which only this user can reach. Must be called within the runtime.
    ///
    /// # Errors
    /// The socket can't be made.
    pub fn listen(&self) -> Result<UnixListener, DirectoryError> {
        let path = self.path.join("machine.sock");
        let at = |source| DirectoryError::Io { path: path.clone(), source };
        // Bound under another name: the daemon takes the socket's appearance for readiness, so its mode comes first.
        let unready = self.path.join("machine.sock.new");
        let socket = UnixListener::bind(&unready).map_err(at)?;
        std::fs::set_permissions(&unready, Permissions::from_mode(0o600)).map_err(at)?;
        std::fs::rename(&unready, &path).map_err(at)?;
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_is_used_once_and_its_socket_is_private() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::claim(root.path()).unwrap();
        assert!(matches!(Directory::claim(root.path()), Err(DirectoryError::Used { .. })));
        let _socket = directory.listen().unwrap();
        let mode = std::fs::metadata(root.path().join("machine.sock")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let pid = std::fs::read_to_string(root.path().join("pid")).unwrap();
        assert_eq!(pid, format!("{}\n", std::process::id()));
    }
}
