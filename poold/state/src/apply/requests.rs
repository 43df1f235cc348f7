//! Requests that come again after they were refused (docs/adr/0074).

use super::Applied;
use crate::{
    GovernRejection,
    command::{Command, Govern},
    entry::Entry,
    features::Feature,
    outcome::Outcome,
    state::PoolState,
};

/// Whether the refusal of an entry is remembered: somebody was told no.
///
/// Reports of hosts are not: they carry the epoch that they are about, and are made anew while they are true. Who comes with a token
/// to join is nobody yet, and must not push out what was answered to others; the token itself says whether it is used.
pub(super) fn is_kept(state: &PoolState, entry: &Entry) -> bool {
    let joins = matches!(
        entry.command,
        Command::JoinHost(_) | Command::InitPool(_) | Command::Govern(Govern::ReplaceHostKey { .. })
    );
    state.has_feature(Feature::Refusals) && super::audit::is_of_user(entry) && !joins
}

impl PoolState {
    /// Refuses once more: for the reason that there is now, as most often it is still the first one, or else because it was refused.
    pub(super) fn refuse_again(&self, index: u64, entry: &Entry) -> Applied {
        if entry.command == Command::Govern(Govern::RefuseRequest) {
            return Ok(Outcome::Done);
        }
        self.clone().change(index, entry)?;
        let request_id = entry.request_id.clone().unwrap_or_default();
        Err(GovernRejection::RefusedBefore { request_id }.into())
    }
}
