//! Who changed what: the newest changes that a user asked for.

use crate::limits::AUDIT_MAX;
use imbl::Vector;
use serde::{Deserialize, Serialize};

/// One accepted change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Index of the entry.
    pub revision: u64,
    /// Time that the proposer stamped on it, Unix milliseconds.
    pub time_ms: u64,
    /// Who asked, e.g. `user-ann`.
    pub principal: String,
    /// The client's id of the change; empty: it gave none.
    pub request_id: String,
    /// What was done, e.g. `vm.start`.
    pub action: String,
    /// To what, e.g. `vm web1`.
    pub object: String,
}

/// The newest records, oldest first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct AuditLog(Vector<AuditRecord>);

impl AuditLog {
    /// The records of `revision` and later, oldest first.
    pub fn since(&self, revision: u64) -> impl Iterator<Item = &AuditRecord> {
        self.0.iter().filter(move |record| record.revision >= revision)
    }

    /// How many records are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn push(&mut self, record: AuditRecord) {
        self.0.push_back(record);
        while self.0.len() > AUDIT_MAX {
            self.0.pop_front();
        }
    }
}
