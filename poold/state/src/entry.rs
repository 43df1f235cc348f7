//! An entry of the log: a command with what its proposer stamped on it.
//!
//! `apply` has no clock and no randomness. Both come with the entry, outside the command, so that a retry of a request is
//! the same command although time has passed.

use crate::{
    command::Command,
    limits::{PRINCIPAL_BYTES_MAX, REQUEST_ID_BYTES_MAX},
};
use proto::limits::RAFT_ENTRY_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A command with its proposer's stamps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The client's id of the intended change; a retry with it gets the first answer.
    pub request_id: Option<String>,
    /// Who asked, e.g. `user-ann` or `host-3`.
    pub principal: String,
    /// Unix time at the proposer.
    pub time_ms: u64,
    /// Random bytes of the proposer.
    pub seed: Seed,
    /// The change.
    pub command: Command,
}

/// 32 random bytes from which an entry derives attachment secrets. Prints nothing of itself.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed(pub [u8; 32]);

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(…)")
    }
}

/// An entry that must not be proposed, or bytes that are none.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EntryError {
    /// Bulk data does not go through the log.
    #[error("the entry has {bytes} bytes, at most {max} are allowed", max = RAFT_ENTRY_BYTES_MAX)]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The request id is longer than the API promises to take.
    #[error("the request id has {bytes} bytes, 1 to {max} are allowed", max = REQUEST_ID_BYTES_MAX)]
    RequestIdLength {
        /// Its size.
        bytes: usize,
    },
    /// The principal is no certificate's name.
    #[error("the principal has {bytes} bytes, at most {max} are allowed", max = PRINCIPAL_BYTES_MAX)]
    PrincipalLength {
        /// Its size.
        bytes: usize,
    },
    /// Bytes are left behind the entry: a newer version says more than this one understands.
    #[error("{bytes} bytes follow the entry, which this version does not know")]
    TooLong {
        /// How many.
        bytes: usize,
    },
    /// The bytes are no entry of this version.
    #[error("the entry can't be read or written")]
    Codec(#[source] postcard::Error),
}

impl Entry {
    /// The bytes of a valid entry.
    ///
    /// # Errors
    /// When a field or the whole is too long.
    pub fn encode(&self) -> Result<Vec<u8>, EntryError> {
        if let Some(id) = &self.request_id
            && !(1..=REQUEST_ID_BYTES_MAX).contains(&id.len())
        {
            return Err(EntryError::RequestIdLength { bytes: id.len() });
        }
        if self.principal.len() > PRINCIPAL_BYTES_MAX {
            return Err(EntryError::PrincipalLength { bytes: self.principal.len() });
        }
        let bytes = postcard::to_stdvec(self).map_err(EntryError::Codec)?;
        if bytes.len() > RAFT_ENTRY_BYTES_MAX {
            return Err(EntryError::TooLarge { bytes: bytes.len() });
        }
        Ok(bytes)
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// When the bytes are too many or no entry.
    pub fn decode(bytes: &[u8]) -> Result<Self, EntryError> {
        if bytes.len() > RAFT_ENTRY_BYTES_MAX {
            return Err(EntryError::TooLarge { bytes: bytes.len() });
        }
        match postcard::take_from_bytes(bytes).map_err(EntryError::Codec)? {
            (entry, []) => Ok(entry),
            (_, rest) => Err(EntryError::TooLong { bytes: rest.len() }),
        }
    }

    /// Checks the entry's size and fields, and that a host that gets it can read it: what is in the log stays there.
    ///
    /// # Errors
    /// As [`encode`](Self::encode) and [`decode`](Self::decode).
    pub fn check(&self) -> Result<(), EntryError> {
        Self::decode(&self.encode()?).map(drop)
    }
}

impl Command {
    /// blake3 of the command, by which a retry is told from another change under the same request id.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        let bytes = postcard::to_stdvec(self).expect("a command has only types that postcard can write");
        *blake3::hash(&bytes).as_bytes()
    }
}
