//! How a state is written outside memory: in snapshots and backups, between hosts of different versions, too.
//!
//! ```text
//!  magic  form  level  writer  content (MessagePack, fields by name)  blake3 of all before, cut to 8 bytes
//! ```
//! Old and new versions read each other's states as long as the pool works at the old one's [feature level](crate::features):
//!
//! - Fields are named, not counted. One that a level brings is left out at its default, which is what it has below that level,
//!   since `apply` refuses whatever would set it. So a new version writes an old level exactly as an old version does, and reads
//!   what that wrote: a missing field is its default.
//! - A field is never renamed, removed, or given another type; a variant is never renamed or removed. A new meaning is a new field.
//! - The level stands before the content, where every version finds it: who does not support it says so instead of guessing.
//! - An unknown field is an error, never passed over: who forgets a part of the state would apply the next entry to another state.
//!
//! Entries of the log are written by position (see [`Entry`](crate::Entry)), many and small as they are: there a command is never
//! changed, only others added behind it. `form/tests.rs` holds what was promised so far, by bytes and by names, in `form/promised/`.

#[cfg(test)]
mod tests;

use serde::{Serialize, de::DeserializeOwned};

/// What every written state begins with.
const MAGIC: &[u8; 8] = b"poolstat";

/// Version of the frame around the content. 1: as above.
const FRAME: u8 = 1;

/// Longest name of a version that is written: it is only shown.
const WRITER_BYTES_MAX: usize = 32;

/// Bytes of truncated blake3: 64 bits catch corruption, which is no adversary.
const CHECKSUM_BYTES: usize = 8;

/// Unknown fields that an error names.
const UNKNOWN_NAMED_MAX: usize = 3;

/// A state can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// Something else lies there.
    #[error("this is no state of a pool")]
    NotAState,
    /// It was written for newer daemons.
    #[error(
        "the state is of feature level {level}, written by poold {writer}, and this poold supports {supported} at most: \
         install a newer poold on this host"
    )]
    TooNew {
        /// Its level.
        level: u32,
        /// The highest that is supported here.
        supported: u32,
        /// Version of the daemon that wrote it.
        writer: String,
    },
    /// The frame itself is another one.
    #[error(
        "the state is written in frame {frame}, and this poold knows {FRAME}: install a newer poold on this host"
    )]
    UnknownFrame {
        /// Its version.
        frame: u8,
    },
    /// It is whole, but has parts that this version does not know, although its level is supported.
    #[error(
        "the state of feature level {level} can't be read by this poold ({cause}): install poold {writer}, which wrote it"
    )]
    Unknown {
        /// Its level.
        level: u32,
        /// Which, e.g. `unknown field state.vms.7.spec.colour`.
        cause: String,
        /// Version of the daemon that wrote it.
        writer: String,
    },
    /// It was cut off, or bits of it have turned.
    #[error("the state is damaged: {cause}")]
    Damaged {
        /// How.
        cause: String,
    },
    /// It can't be written.
    #[error("the state can't be written")]
    Write(#[source] rmp_serde::encode::Error),
}

impl FormError {
    /// Whether a newer daemon would read it.
    #[must_use]
    pub fn is_too_new(&self) -> bool {
        matches!(self, Self::TooNew { .. } | Self::UnknownFrame { .. } | Self::Unknown { .. })
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut short = [0; CHECKSUM_BYTES];
    short.copy_from_slice(&blake3::hash(bytes).as_bytes()[..CHECKSUM_BYTES]);
    short
}

/// The bytes of a state, or of something around one, of a pool at this level.
///
/// # Errors
/// It can't be written.
///
/// # Panics
/// When `writer` is longer than any version is.
pub fn write<T: Serialize>(content: &T, level: u32, writer: &str) -> Result<Vec<u8>, FormError> {
    assert!(writer.len() <= WRITER_BYTES_MAX, "no version of poold is {writer:?}");
    let mut bytes = MAGIC.to_vec();
    bytes.push(FRAME);
    bytes.extend(level.to_le_bytes());
    bytes.push(writer.len() as u8);
    bytes.extend(writer.as_bytes());
    let mut named = rmp_serde::Serializer::new(&mut bytes).with_struct_map();
    content.serialize(&mut named).map_err(FormError::Write)?;
    bytes.extend(checksum(&bytes));
    Ok(bytes)
}

/// Reads what [`write`] wrote for a pool at a level that is supported here.
///
/// # Errors
/// It is none, damaged, or too new.
pub fn read<T: DeserializeOwned>(bytes: &[u8], supported: u32) -> Result<T, FormError> {
    let framed = bytes.strip_prefix(MAGIC).ok_or(FormError::NotAState)?;
    let short = || FormError::Damaged { cause: "it is cut off".to_owned() };
    let (&frame, rest) = framed.split_first().ok_or_else(short)?;
    // Before the checksum, which another frame may have elsewhere.
    if frame != FRAME {
        return Err(FormError::UnknownFrame { frame });
    }
    let split = bytes.len().checked_sub(CHECKSUM_BYTES).filter(|at| *at > MAGIC.len()).ok_or_else(short)?;
    if checksum(&bytes[..split]) != bytes[split..] {
        return Err(FormError::Damaged { cause: "the checksum does not match".to_owned() });
    }
    let rest = rest.get(..rest.len().saturating_sub(CHECKSUM_BYTES)).ok_or_else(short)?;
    let (level, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let level = u32::from_le_bytes(*level);
    let (&length, rest) = rest.split_first().ok_or_else(short)?;
    let (writer, content) = rest.split_at_checked(usize::from(length)).ok_or_else(short)?;
    let writer = String::from_utf8_lossy(writer).into_owned();
    if level > supported {
        return Err(FormError::TooNew { level, supported, writer });
    }
    read_content(content, level, writer)
}

/// The checksum has matched: what can't be read here is no damage.
fn read_content<T: DeserializeOwned>(content: &[u8], level: u32, writer: String) -> Result<T, FormError> {
    let mut reader = rmp_serde::Deserializer::from_read_ref(content);
    let mut unknown = Vec::new();
    let read = serde_ignored::deserialize(&mut reader, |path| unknown.push(path.to_string()));
    let cause = match read {
        Ok(content) if unknown.is_empty() => return Ok(content),
        Ok(_) => {
            unknown.truncate(UNKNOWN_NAMED_MAX);
            format!("unknown field {}", unknown.join(", "))
        }
        Err(error) => error.to_string(),
    };
    Err(FormError::Unknown { level, cause, writer })
}

/// Whether a field has the value that it has below its level, so that it is not written.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
