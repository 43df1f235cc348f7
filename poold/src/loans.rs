//! The volumes that this daemon fills or reads for clients now.
//!
//! A loan is a fact of the pool's state, and this is the other half: what the daemon still works on. The reconciler ends every
//! loan of this host that is not here, whether a client broke off, a handler panicked, or the daemon was restarted.

use pool_state::state::LoanKey;
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The loans; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Loans {
    keys: Arc<Mutex<BTreeSet<LoanKey>>>,
}

/// A loan that is being worked on, until it is dropped.
#[derive(Debug)]
pub struct LoanGuard {
    loans: Loans,
    key: LoanKey,
}

impl Loans {
    /// Begins a loan under a key that nobody has. It must exist before the pool is asked for the volume.
    #[must_use]
    pub fn begin(&self) -> LoanGuard {
        let key = LoanKey(rand::random());
        self.lock().insert(key);
        LoanGuard { loans: self.clone(), key }
    }

    /// What is being worked on.
    #[must_use]
    pub fn keys(&self) -> BTreeSet<LoanKey> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<LoanKey>> {
        // Changed by single calls, so it is whole even after a panic elsewhere.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LoanGuard {
    /// The key of the loan.
    #[must_use]
    pub fn key(&self) -> LoanKey {
        self.key
    }
}

impl Drop for LoanGuard {
    fn drop(&mut self) {
        self.loans.lock().remove(&self.key);
    }
}
