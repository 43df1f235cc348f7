//! The files of the image store.

use pool_state::state::ContentHash;
use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{fs, io::AsyncWriteExt as _};

/// Largest image in bytes; a disk image beyond that is imported into a volume instead.
pub const IMAGE_BYTES_MAX: u64 = 64 << 30;

/// Bytes of the file system that an import leaves free, for the log of consensus and of the VMs.
const FREE_BYTES_MIN: u64 = 256 << 20;

/// Age from which a file that the pool's state does not name, and never did as far as this daemon saw, is garbage: longer
/// than any import takes to be committed.
const GARBAGE_AGE: Duration = Duration::from_secs(3600);

/// Prefix of files that are not complete.
const TEMPORARY: &str = "tmp-";

/// An image could not be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Larger than allowed.
    #[error(
        "an image of {size_bytes} bytes is larger than the limit of {IMAGE_BYTES_MAX}; import it into a volume"
    )]
    TooLarge {
        /// Its size.
        size_bytes: u64,
    },
    /// No content.
    #[error("the image is empty")]
    Empty,
    /// The disk is full.
    #[error(
        "no room for an image of {size_bytes} bytes in {directory}: {free_bytes} are free; delete images or add space"
    )]
    NoSpace {
        /// The image store.
        directory: PathBuf,
        /// What is needed.
        size_bytes: u64,
        /// What is there.
        free_bytes: u64,
    },
    /// More or fewer bytes came than were announced.
    #[error("{announced_bytes} bytes were announced, {received_bytes} came; import it again")]
    WrongSize {
        /// Said at first.
        announced_bytes: u64,
        /// What came.
        received_bytes: u64,
    },
    /// The content is not what its name says.
    #[error("image {expected} has the content of {found}; it was damaged and will be fetched again")]
    WrongContent {
        /// Its name.
        expected: ContentHash,
        /// Its content.
        found: ContentHash,
    },
    /// Not at this host.
    #[error("image {digest} is not at this host yet; it is being fetched")]
    Missing {
        /// Which.
        digest: ContentHash,
    },
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Handle of the store; clones share it.
#[derive(Debug, Clone)]
pub struct ImageStore {
    directory: Arc<PathBuf>,
    next_temporary: Arc<AtomicU64>,
    /// Images that the pool's state named and names no more.
    dropped: Arc<Mutex<BTreeSet<ContentHash>>>,
}

impl ImageStore {
    /// Opens the store and removes what unfinished imports of an earlier daemon left.
    ///
    /// # Errors
    /// The directory can't be made or read.
    pub fn open(directory: PathBuf) -> Result<Self, ImageError> {
        let at = |source| ImageError::Io { path: directory.clone(), source };
        std::fs::create_dir_all(&directory).map_err(at)?;
        for entry in std::fs::read_dir(&directory).map_err(at)? {
            let entry = entry.map_err(at)?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                std::fs::remove_file(entry.path()).map_err(at)?;
            }
        }
        Ok(Self { directory: Arc::new(directory), next_temporary: Arc::default(), dropped: Arc::default() })
    }

    /// Where the image is, or would be.
    pub fn path(&self, digest: ContentHash) -> PathBuf {
        self.directory.join(digest.to_string())
    }

    /// Whether the image is here.
    pub fn contains(&self, digest: ContentHash) -> bool {
        self.path(digest).is_file()
    }

    /// Digests of all images here.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn list(&self) -> Result<Vec<ContentHash>, ImageError> {
        let at = |source| ImageError::Io { path: self.directory.to_path_buf(), source };
        let mut digests = Vec::new();
        for entry in std::fs::read_dir(self.directory.as_path()).map_err(at)? {
            let name = entry.map_err(at)?.file_name();
            let Some(digest) = name.to_str().and_then(|name| name.parse::<ContentHash>().ok()) else {
                continue;
            };
            // Only the form that the store itself writes names an image.
            if name.to_str() == Some(digest.to_string().as_str()) {
                digests.push(digest);
            }
        }
        Ok(digests)
    }

    /// Begins to store an image of the given size.
    ///
    /// # Errors
    /// Too large, empty, no room, or the file can't be made.
    pub async fn begin(&self, size_bytes: u64) -> Result<ImageWriter, ImageError> {
        if size_bytes > IMAGE_BYTES_MAX {
            return Err(ImageError::TooLarge { size_bytes });
        }
        if size_bytes == 0 {
            return Err(ImageError::Empty);
        }
        let free_bytes = self.free_bytes()?;
        if free_bytes < size_bytes.saturating_add(FREE_BYTES_MIN) {
            let directory = self.directory.to_path_buf();
            return Err(ImageError::NoSpace { directory, size_bytes, free_bytes });
        }
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.join(format!("{TEMPORARY}{number}"));
        let file = fs::File::create_new(&path)
            .await
            .map_err(|source| ImageError::Io { path: path.clone(), source })?;
        Ok(ImageWriter {
            store: self.clone(),
            file,
            temporary: Temporary { path },
            hasher: blake3::Hasher::new(),
            announced_bytes: size_bytes,
            received_bytes: 0,
        })
    }

    /// Reads the whole image and compares it with its name; a damaged one is removed, so that it is fetched again.
    ///
    /// # Errors
    /// Missing, damaged or unreadable.
    pub async fn verify(&self, digest: ContentHash) -> Result<PathBuf, ImageError> {
        let path = self.path(digest);
        let reading = path.clone();
        let found = tokio::task::spawn_blocking(move || -> io::Result<ContentHash> {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(std::fs::File::open(reading)?)?;
            Ok(ContentHash(*hasher.finalize().as_bytes()))
        })
        .await
        .map_err(|error| ImageError::Io { path: path.clone(), source: io::Error::other(error) })?;
        match found {
            Ok(found) if found == digest => Ok(path),
            Ok(found) => {
                self.remove(digest).await?;
                Err(ImageError::WrongContent { expected: digest, found })
            }
            Err(source) if source.kind() == io::ErrorKind::NotFound => Err(ImageError::Missing { digest }),
            Err(source) => Err(ImageError::Io { path, source }),
        }
    }

    /// Removes an image; one that is not here is no error.
    ///
    /// # Errors
    /// The file system fails.
    pub async fn remove(&self, digest: ContentHash) -> Result<(), ImageError> {
        let path = self.path(digest);
        match fs::remove_file(&path).await {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ImageError::Io { path, source }),
            _ => {
                self.dropped().remove(&digest);
                Ok(())
            }
        }
    }

    /// Opens an image for reading and tells its size in bytes.
    ///
    /// # Errors
    /// Missing or unreadable.
    pub async fn read(&self, digest: ContentHash) -> Result<(fs::File, u64), ImageError> {
        let path = self.path(digest);
        let at = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing { digest },
            _ => ImageError::Io { path: path.clone(), source },
        };
        let file = fs::File::open(&path).await.map_err(at)?;
        let size = file.metadata().await.map_err(at)?.len();
        Ok((file, size))
    }

    /// The pool's state names the image no more.
    pub fn drop_name(&self, digest: ContentHash) {
        if self.contains(digest) {
            self.dropped().insert(digest);
        }
    }

    /// Somebody is about to name the image (again).
    pub fn expect_name(&self, digest: ContentHash) {
        self.dropped().remove(&digest);
    }

    fn dropped(&self) -> MutexGuard<'_, BTreeSet<ContentHash>> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a file that nobody names is garbage: its image was deleted, or it is too old to be about to get a name.
    pub fn is_garbage(&self, digest: ContentHash) -> bool {
        if self.dropped().contains(&digest) {
            return true;
        }
        let modified = std::fs::metadata(self.path(digest)).and_then(|metadata| metadata.modified());
        // The age only spares an import that is not committed yet; a clock that jumps costs a fetch at most.
        modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > GARBAGE_AGE))
    }

    fn free_bytes(&self) -> Result<u64, ImageError> {
        let path = || self.directory.to_path_buf();
        let statistics = nix::sys::statvfs::statvfs(self.directory.as_path())
            .map_err(|errno| ImageError::Io { path: path(), source: errno.into() })?;
        Ok(statistics.blocks_available().saturating_mul(statistics.fragment_size()))
    }
}

/// An incomplete file; removed unless it got its name.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After the rename it is not there any more.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An image that is being stored; dropped before [`ImageWriter::finish`] it leaves nothing.
#[derive(Debug)]
pub struct ImageWriter {
    store: ImageStore,
    file: fs::File,
    temporary: Temporary,
    hasher: blake3::Hasher,
    announced_bytes: u64,
    received_bytes: u64,
}

impl ImageWriter {
    /// Appends content.
    ///
    /// # Errors
    /// More than was announced, a full disk, or the file system fails.
    pub async fn write(&mut self, data: &[u8]) -> Result<(), ImageError> {
        self.received_bytes += data.len() as u64;
        if self.received_bytes > self.announced_bytes {
            return Err(self.wrong_size());
        }
        self.hasher.update(data);
        let written = self.file.write_all(data).await;
        written.map_err(|source| self.failed(source))
    }

    /// Makes the image durable under its digest; it is complete from then on.
    ///
    /// # Errors
    /// Fewer bytes than announced, another content than `expected`, a full disk, or the file system fails.
    pub async fn finish(mut self, expected: Option<ContentHash>) -> Result<ContentHash, ImageError> {
        if self.received_bytes != self.announced_bytes {
            return Err(self.wrong_size());
        }
        let digest = ContentHash(*self.hasher.finalize().as_bytes());
        if let Some(expected) = expected.filter(|expected| *expected != digest) {
            return Err(ImageError::WrongContent { expected, found: digest });
        }
        let flushed = self.file.flush().await;
        flushed.map_err(|source| self.failed(source))?;
        let synced = self.file.sync_all().await;
        synced.map_err(|source| self.failed(source))?;
        self.store.expect_name(digest);
        let path = self.store.path(digest);
        let renamed = fs::rename(&self.temporary.path, &path).await;
        renamed.map_err(|source| self.failed(source))?;
        sync_directory(&self.store.directory).await?;
        Ok(digest)
    }

    fn wrong_size(&self) -> ImageError {
        let (announced_bytes, received_bytes) = (self.announced_bytes, self.received_bytes);
        ImageError::WrongSize { announced_bytes, received_bytes }
    }

    fn failed(&self, source: io::Error) -> ImageError {
        if source.kind() == io::ErrorKind::StorageFull {
            let free_bytes = self.store.free_bytes().unwrap_or(0);
            let directory = self.store.directory.to_path_buf();
            return ImageError::NoSpace { directory, size_bytes: self.announced_bytes, free_bytes };
        }
        ImageError::Io { path: self.temporary.path.clone(), source }
    }
}

async fn sync_directory(path: &Path) -> Result<(), ImageError> {
    let at = |source| ImageError::Io { path: path.to_owned(), source };
    fs::File::open(path).await.map_err(at)?.sync_all().await.map_err(at)
}
