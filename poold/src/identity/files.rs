//! The identity of a host on its disk: `identity/{key,cert,ca}.pem`, readable by root alone.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// An identity file can't be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct IdentityError {
    /// The file.
    pub path: PathBuf,
    /// The cause.
    #[source]
    pub source: io::Error,
}

/// What a host shows of itself and trusts.
#[derive(Clone)]
pub struct HostIdentity {
    /// Certificates of the CAs that it trusts.
    pub ca_pem: String,
    /// The host's certificate, followed by those that prove it.
    pub cert_pem: String,
    /// The host's private key.
    pub key_pem: String,
}

/// File of a key that is not shown yet.
const NEXT_KEY: &str = "key-next.pem";

/// The folder with the files.
#[derive(Debug, Clone)]
pub struct IdentityDir {
    dir: PathBuf,
}

impl IdentityDir {
    /// The identity folder of a data folder; created when it lacks.
    ///
    /// # Errors
    /// It can't be created.
    pub fn open(data_dir: &Path) -> Result<Self, IdentityError> {
        let dir = data_dir.join("identity");
        let created = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        created.map_err(|source| IdentityError { path: dir.clone(), source })?;
        Ok(Self { dir })
    }

    /// The host's key, made and saved first if there is none: an interrupted join goes on with the same key.
    ///
    /// # Errors
    /// The file can't be read or written.
    pub fn key_pem(&self) -> Result<String, IdentityError> {
        self.key_at("key.pem")
    }

    fn key_at(&self, name: &str) -> Result<String, IdentityError> {
        let path = self.dir.join(name);
        match fs::read_to_string(&path) {
            Ok(pem) => Ok(pem),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = super::generate_key();
                let (pem, _) = key
                    .map_err(|error| IdentityError { path: path.clone(), source: io::Error::other(error) })?;
                write_private(&path, pem.as_bytes()).map_err(|source| IdentityError { path, source })?;
                Ok(pem)
            }
            Err(source) => Err(IdentityError { path, source }),
        }
    }

    /// The key that is to take the present one's place, made and saved first: an interrupted replacement goes on with it.
    ///
    /// # Errors
    /// The file can't be read or written.
    pub fn next_key_pem(&self) -> Result<String, IdentityError> {
        self.key_at(NEXT_KEY)
    }

    /// Shows the next key from now on, with these certificates. Interrupted anywhere, the replacement is run again.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn adopt_next_key(&self, ca_pem: &str, cert_pem: &str) -> Result<(), IdentityError> {
        self.save_certificates(ca_pem, cert_pem)?;
        let (from, path) = (self.dir.join(NEXT_KEY), self.dir.join("key.pem"));
        let adopted = fs::rename(from, &path).and_then(|()| File::open(&self.dir)?.sync_all());
        adopted.map_err(|source| IdentityError { path, source })
    }

    /// Saves the certificates that the pool gave.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn save_certificates(&self, ca_pem: &str, cert_pem: &str) -> Result<(), IdentityError> {
        for (name, pem) in [("ca.pem", ca_pem), ("cert.pem", cert_pem)] {
            let path = self.dir.join(name);
            write_private(&path, pem.as_bytes()).map_err(|source| IdentityError { path, source })?;
        }
        Ok(())
    }

    /// The whole identity.
    ///
    /// # Errors
    /// A file lacks or can't be read: the host has not joined.
    pub fn load(&self) -> Result<HostIdentity, IdentityError> {
        let read = |name: &str| {
            let path = self.dir.join(name);
            fs::read_to_string(&path).map_err(|source| IdentityError { path, source })
        };
        Ok(HostIdentity { ca_pem: read("ca.pem")?, cert_pem: read("cert.pem")?, key_pem: read("key.pem")? })
    }
}

/// Writes a file that only its owner may read, whole or not at all, durably.
///
/// # Errors
/// The disk refuses.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
