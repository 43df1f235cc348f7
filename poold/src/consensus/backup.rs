//! Backups of the pool's state: a sealed snapshot without a place in any log.

use super::snapshot_file::{self, SnapshotContent};
use pool_state::PoolState;
use pool_state::form::FormError;

/// The bytes of a backup.
///
/// # Errors
/// The state can't be serialised.
pub fn encode(state: &PoolState) -> Result<Vec<u8>, FormError> {
    let state = state.clone();
    snapshot_file::encode(&SnapshotContent { state, ..SnapshotContent::default() })
}

/// The state of a backup; `supported` is the highest feature level that this host supports.
///
/// # Errors
/// It is none, of a newer daemon, or damaged.
pub fn decode(bytes: &[u8], supported: u32) -> Result<PoolState, FormError> {
    snapshot_file::decode(bytes, supported).map(|content| content.state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_state::features::NEWEST;

    #[test]
    fn a_backup_is_whole_or_refused() {
        let state = PoolState { revision: 17, ..PoolState::default() };
        let bytes = encode(&state).unwrap();
        assert_eq!(decode(&bytes, NEWEST).unwrap(), state);
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(decode(&damaged, NEWEST).is_err(), "byte {at}");
        }
        assert!(decode(&bytes[..bytes.len() - 1], NEWEST).is_err());
    }
}
