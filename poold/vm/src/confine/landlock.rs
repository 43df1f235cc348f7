//! Landlock: the kernel's own list of what this process may reach. It needs no privilege and nests inside of the jail, so
//! that neither depends on the other. Older kernels know less of it, some none: then the jail and the filter stand alone.

use super::ConfineError;
use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope,
};
use std::path::Path;

/// What is asked for; a kernel that knows less gives what it knows.
const WANTED: ABI = ABI::V6;

/// Leaves this process its own directory, without a right to execute, and nothing of the network's TCP.
pub(super) fn restrict(own: &Path) -> Result<(), ConfineError> {
    let Ok(own) = PathFd::new(own) else {
        // The claim of the directory says what is wrong with it.
        return Ok(());
    };
    let inside = AccessFs::from_all(WANTED) & !AccessFs::Execute;
    let restricted = (|| -> Result<_, RulesetError> {
        Ruleset::default()
            .handle_access(AccessFs::from_all(WANTED))?
            .handle_access(AccessNet::from_all(WANTED))?
            .scope(Scope::from_all(WANTED))?
            .create()?
            .add_rule(PathBeneath::new(own, inside))?
            .restrict_self()
    })()?;
    match restricted.ruleset {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => tracing::info!("this kernel knows a part of Landlock only"),
        RulesetStatus::NotEnforced => tracing::warn!("this kernel has no Landlock"),
    }
    Ok(())
}
