//! Backups of the pool's state: a sealed snapshot without a place in any log.

use super::snapshot_file::{self, SnapshotContent};
use pool_state::PoolState;
use std::io;

/// The bytes of a backup.
///
/// # Errors
/// The state can't be serialised.
pub fn encode(state: &PoolState) -> io::Result<Vec<u8>> {
    let state = state.clone();
    snapshot_file::encode(&SnapshotContent { state, ..SnapshotContent::default() })
}

/// The state of a backup.
///
/// # Errors
/// It is none, of another version, or damaged.
pub fn decode(bytes: &[u8]) -> io::Result<PoolState> {
    snapshot_file::decode(bytes).map(|content| content.state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_whole_or_refused() {
        let state = PoolState { revision: 17, ..PoolState::default() };
        let bytes = encode(&state).unwrap();
        assert_eq!(decode(&bytes).unwrap(), state);
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(decode(&damaged).is_err(), "byte {at}");
        }
        assert!(decode(&bytes[..bytes.len() - 1]).is_err());
    }
}
