//! Imported kernels, initrds and disk images.

use proto::{ByteCount, HostId, ImageId};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// An imported file, stored at its holders under its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Index of the entry that created it.
    pub id: ImageId,
    /// Unique among images.
    pub name: String,
    /// Hash of the content.
    pub blake3: ContentHash,
    /// Size of the content.
    pub size: ByteCount,
    /// Hosts that hold it durably, distinct.
    pub holders: Vec<HostId>,
}

/// blake3 of a file. Prints as 64 hex digits, which is also the file's name in a host's store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContentHash(pub [u8; 32]);

/// The text is no content hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a blake3 hash of 64 hex digits")]
pub struct ParseContentHashError {
    /// What was given.
    pub text: String,
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for ContentHash {
    type Err = ParseContentHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        blake3::Hash::from_hex(text)
            .map(|hash| Self(*hash.as_bytes()))
            .map_err(|_| ParseContentHashError { text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_survives_printing() {
        let hash = ContentHash(*blake3::hash(b"kernel").as_bytes());
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert!("ab".parse::<ContentHash>().is_err());
    }
}
