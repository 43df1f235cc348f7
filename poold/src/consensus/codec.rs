//! How values are stored in sled: postcard, followed by 8 bytes of blake3 over it.
//!
//! sled checks its own pages, but not what a half-finished recovery may hand out; a value that fails its checksum is an error,
//! never a guess.

use serde::{Serialize, de::DeserializeOwned};
use std::io;

/// Bytes of truncated blake3 after each value: 64 bits catch corruption, which is no adversary.
const CHECKSUM_BYTES: usize = 8;

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut short = [0; CHECKSUM_BYTES];
    short.copy_from_slice(&blake3::hash(bytes).as_bytes()[..CHECKSUM_BYTES]);
    short
}

/// Serialises and seals a value.
///
/// # Errors
/// The type can't be serialised.
pub fn seal<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut bytes = postcard::to_stdvec(value).map_err(|error| invalid(&error))?;
    bytes.extend(checksum(&bytes));
    Ok(bytes)
}

/// Checks and reads a sealed value.
///
/// # Errors
/// The checksum or the encoding is wrong.
pub fn open<T: DeserializeOwned>(sealed: &[u8]) -> io::Result<T> {
    let split = sealed.len().checked_sub(CHECKSUM_BYTES).ok_or_else(|| invalid(&"too short"))?;
    let (bytes, sum) = sealed.split_at(split);
    if checksum(bytes) != sum {
        return Err(invalid(&"the checksum does not match"));
    }
    // Whole, and yet not understood: another version wrote it.
    let foreign = |cause: &dyn std::fmt::Display| {
        invalid(&format!("written by another version of poold, install that one or a newer one ({cause})"))
    };
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(foreign(&format!("{} bytes too many", rest.len()))),
        Err(error) => Err(foreign(&error)),
    }
}

fn invalid(error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("stored value: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_is_an_error() {
        let sealed = seal(&(7_u64, "text")).unwrap();
        assert_eq!(open::<(u64, String)>(&sealed).unwrap(), (7, "text".to_owned()));
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(open::<(u64, String)>(&bad).is_err(), "byte {at}");
        }
        assert!(open::<u64>(&[1, 2]).is_err());
        let longer = open::<u64>(&sealed).unwrap_err().to_string();
        assert!(longer.contains("another version of poold"), "{longer}");
    }
}
