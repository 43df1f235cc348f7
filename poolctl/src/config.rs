//! The operator's configuration: where the pool is and who asks.
//!
//! Found as `--config FILE`, else `$POOLCTL_CONFIG`, else `~/.config/poolctl/config.toml`. It is written to by `poolctl user renew`
//! only. Addresses
//! learned from the pool are kept beside it in a file of their own ([`HostsFile`]): any of its hosts may be dead the next time.

use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    fs::File,
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use crate::failure::{Exit, Failure};

/// Largest configuration in bytes: three PEM texts and a list of addresses are far smaller.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Most addresses kept: a pool has fewer hosts, and a longer file is not ours.
const ADDRESSES_MAX: usize = 256;

/// Contents of the configuration file.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Hosts of the pool.
    pub addresses: Vec<SocketAddr>,
    /// Certificate of the pool's CA.
    pub ca_pem: String,
    /// The operator's certificate; empty when a token takes its place.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cert_pem: String,
    /// Its key.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key_pem: String,
    /// An access token instead of a certificate.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
}

impl std::fmt::Debug for Config {
    /// Prints no key, so that none can reach a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

/// The file to read, from `--config` or `$POOLCTL_CONFIG` (`given`) or below the home folder.
///
/// # Errors
/// When nothing was given and there is no home folder.
pub fn path(given: Option<PathBuf>) -> Result<PathBuf, Failure> {
    if let Some(path) = given {
        return Ok(path);
    }
    let home = std::env::home_dir().ok_or_else(|| {
        Failure::new(Exit::Usage, "NO_CONFIG", "configuration", "there is no home folder to look in")
            .with_remedy("pass --config FILE")
    })?;
    Ok(home.join(".config/poolctl/config.toml"))
}

/// Makes a file that only its owner can read.
///
/// # Errors
/// It exists already, or can't be made.
pub fn create_private(path: &Path) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

impl Config {
    /// Writes a new file, for its owner's eyes only.
    ///
    /// # Errors
    /// It exists already, or can't be written.
    pub fn write_new(&self, path: &Path) -> io::Result<()> {
        let text = toml::to_string(self).map_err(io::Error::other)?;
        let mut file = create_private(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    }

    /// Takes the place of the file, whole or not at all.
    ///
    /// # Errors
    /// It can't be written.
    pub fn replace(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension(format!("new.{}", std::process::id()));
        let written = self.write_new(&new).and_then(|()| std::fs::rename(&new, path));
        if written.is_err() {
            std::fs::remove_file(&new).ok();
        }
        written
    }

    /// Reads the file.
    ///
    /// # Errors
    /// When it can't be read or is no configuration; both are usage errors.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let object = format!("configuration {}", path.display());
        let refuse = |cause: String| Failure::new(Exit::Usage, "BAD_CONFIG", object.as_str(), cause);
        let remedy = "pass --config FILE; `poold init` writes one to DIR/admin.toml";
        let bytes = std::fs::metadata(path).map_err(|e| refuse(e.to_string()).with_remedy(remedy))?.len();
        if bytes > CONFIG_BYTES_MAX {
            return Err(refuse(format!("{bytes} bytes is more than a configuration has")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| refuse(e.to_string()).with_remedy(remedy))?;
        let config: Self = toml::from_str(&text).map_err(|e| refuse(e.message().to_owned()))?;
        if config.addresses.is_empty() {
            return Err(refuse("`addresses` is empty".to_owned()));
        }
        if config.token.is_empty() && (config.cert_pem.is_empty() || config.key_pem.is_empty()) {
            return Err(refuse("it has neither `cert_pem` and `key_pem` nor `token`".to_owned()));
        }
        Ok(config)
    }
}

/// Addresses that the pool itself has told, the one that answered last first.
///
/// Wrong contents do no harm: whoever answers must show a certificate of the pool's CA.
#[derive(Debug, Clone)]
pub struct HostsFile {
    path: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct HostsContents {
    addresses: Vec<SocketAddr>,
}

impl HostsFile {
    /// The file that belongs to a configuration: `admin.toml` → `admin.hosts`.
    #[must_use]
    pub fn beside(config: &Path) -> Self {
        Self { path: config.with_extension("hosts") }
    }

    /// What is known; nothing when there is no file or it is damaged.
    #[must_use]
    pub fn read(&self) -> Vec<SocketAddr> {
        let size = std::fs::metadata(&self.path).map(|meta| meta.len());
        if size.is_ok_and(|bytes| bytes > CONFIG_BYTES_MAX) {
            return Vec::new();
        }
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        let contents = toml::from_str::<HostsContents>(&text);
        contents.map(|contents| contents.addresses).unwrap_or_default()
    }

    /// Keeps addresses, if they are news. A folder that can't be written to costs only the next fail-over its short cut.
    pub fn write(&self, addresses: &[SocketAddr]) {
        if addresses.is_empty() || addresses == self.read() {
            return;
        }
        let kept = addresses.iter().copied().take(ADDRESSES_MAX).collect();
        let Ok(text) = toml::to_string(&HostsContents { addresses: kept }) else { return };
        // A name of its own for each process: concurrent commands must not write into one file.
        let new = self.path.with_extension(format!("hosts.{}", std::process::id()));
        let written = std::fs::File::create(&new).and_then(|mut file| file.write_all(text.as_bytes()));
        if written.and_then(|()| std::fs::rename(&new, &self.path)).is_err() {
            std::fs::remove_file(&new).ok();
        }
    }
}

/// Both lists as one, learned addresses first, none twice.
#[must_use]
pub fn merge(learned: Vec<SocketAddr>, configured: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut seen = HashSet::new();
    let mut all: Vec<SocketAddr> = learned
        .into_iter()
        .chain(configured.iter().copied())
        .filter(|address| seen.insert(*address))
        .collect();
    all.truncate(ADDRESSES_MAX);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "addresses = [\"127.0.0.1:7443\"]\nca_pem = \"ca\"\ncert_pem = \"cert\"\nkey_pem = \"secret\"\n";

    fn read(text: &str) -> Result<Config, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.toml");
        std::fs::write(&path, text).unwrap();
        Config::read(&path)
    }

    #[test]
    fn a_good_file_is_read_and_its_key_is_never_printed() {
        let config = read(GOOD).unwrap();
        assert_eq!(config.addresses, ["127.0.0.1:7443".parse().unwrap()]);
        assert!(!format!("{config:?}").contains("secret"));
    }

    #[test]
    fn a_bad_file_is_a_usage_error_that_names_the_file() {
        for bad in [
            "",
            "addresses = []",
            &GOOD.replace("127.0.0.1:7443", "nowhere"),
            &format!("{GOOD}x = 1\n"),
            &GOOD.replace("key_pem", "token")[..60],
        ] {
            let failure = read(bad).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{bad}");
            assert!(failure.object.contains("admin.toml"), "{failure}");
        }
        assert_eq!(Config::read(Path::new("/nonexistent/x.toml")).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn learned_addresses_survive_and_damage_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = HostsFile::beside(&dir.path().join("admin.toml"));
        assert!(hosts.read().is_empty());
        let addresses = ["10.0.0.1:1".parse().unwrap(), "10.0.0.2:1".parse().unwrap()];
        hosts.write(&addresses);
        assert_eq!(hosts.read(), addresses);
        assert!(dir.path().join("admin.hosts").exists());
        std::fs::write(dir.path().join("admin.hosts"), "}{").unwrap();
        assert!(hosts.read().is_empty());
        HostsFile::beside(Path::new("/nonexistent/admin.toml")).write(&addresses);
    }

    #[test]
    fn merged_addresses_keep_the_learned_order_and_hold_none_twice() {
        let [a, b, c]: [SocketAddr; 3] =
            [1, 2, 3].map(|port| SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, port)));
        assert_eq!(merge(vec![b, a], &[a, c]), [b, a, c]);
    }
}
