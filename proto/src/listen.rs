//! Where an NBD server listens, as operators write it: `unix:PATH` or `IP:PORT`.

use serde::{Deserialize, Serialize};
use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

/// Longest path of a unix socket in bytes: what the kernel's address has room for.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ListenAddress {
    /// A unix socket at this absolute path.
    Unix(PathBuf),
    /// TCP; port 0 lets the system choose one.
    Tcp(SocketAddr),
}

/// The text is no address to listen on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseListenError {
    /// Neither form.
    #[error("`{text}` is neither unix:PATH nor IP:PORT")]
    Form {
        /// What was given.
        text: String,
    },
    /// A path that a socket can't have.
    #[error(
        "the path of a unix socket must be absolute, printable and of at most {UNIX_PATH_BYTES_MAX} bytes, not `{path}`"
    )]
    Path {
        /// What was given.
        path: String,
    },
}

impl FromStr for ListenAddress {
    type Err = ParseListenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:") {
            let fits = path.len() <= UNIX_PATH_BYTES_MAX && !path.chars().any(char::is_control);
            return if fits && path.starts_with('/') && !path.ends_with('/') {
                Ok(Self::Unix(PathBuf::from(path)))
            } else {
                Err(ParseListenError::Path { path: path.to_owned() })
            };
        }
        text.parse().map(Self::Tcp).map_err(|_| ParseListenError::Form { text: text.to_owned() })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

impl ListenAddress {
    /// The NBD URI of an export of this name at this address.
    #[must_use]
    pub fn nbd_uri(&self, export: &str) -> String {
        match self {
            Self::Unix(path) => {
                let mut query = String::new();
                for byte in path.display().to_string().bytes() {
                    // What a query may hold unescaped and that no client gives a meaning.
                    if byte.is_ascii_alphanumeric() || b"/._-~:".contains(&byte) {
                        query.push(char::from(byte));
                    } else {
                        query.push_str(&format!("%{byte:02X}"));
                    }
                }
                format!("nbd+unix:///{export}?socket={query}")
            }
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_printed() {
        for text in ["unix:/run/nbd.sock", "127.0.0.1:10809", "[::1]:0"] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        let long = format!("unix:/{}", "x".repeat(UNIX_PATH_BYTES_MAX));
        for bad in ["", "unix:", "unix:nbd.sock", "unix:/run/", "unix:/a\n", "localhost:1", "1.2.3.4", &long]
        {
            assert!(bad.parse::<ListenAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn uris_name_the_export_and_escape_the_path() {
        let unix: ListenAddress = "unix:/run/a b&c.sock".parse().unwrap();
        assert_eq!(unix.nbd_uri("data"), "nbd+unix:///data?socket=/run/a%20b%26c.sock");
        let tcp: ListenAddress = "[::1]:10809".parse().unwrap();
        assert_eq!(tcp.nbd_uri("data"), "nbd://[::1]:10809/data");
    }
}
