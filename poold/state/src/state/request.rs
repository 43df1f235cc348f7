//! The answers that were given to requests: a retry has no further effect, and what was refused is not done later.
//!
//! ```text
//!  asked once ─┬─▶ done ─────▶ answers ─ comes again ─▶ the first answer
//!              └─▶ refused ──▶ refused ─ comes again ─▶ refused, whatever would be possible by now
//! ```
//! Both are bounded, each by itself: many refusals don't push answers out. Of a refusal the id is kept alone. Why it was refused is
//! found out anew: reasons are words of a version, and have no place in a state that all versions share.

use crate::{
    form::is_default,
    limits::{REFUSALS_MAX, REQUESTS_MAX},
    outcome::Outcome,
};
use imbl::{OrdMap, OrdSet, Vector};
use serde::{Deserialize, Serialize};

/// The newest requests by their id.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RequestTable {
    answers: OrdMap<String, Answer>,
    order: Vector<String>,
    /// Since level 4.
    #[serde(default, skip_serializing_if = "is_default")]
    refused: Refused,
}

/// What a request was and what it got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// blake3 of the command.
    pub command_hash: [u8; 32],
    /// The first answer.
    pub outcome: Outcome,
}

/// Ids of refused requests, the oldest first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(from = "Vector<String>", into = "Vector<String>")]
struct Refused {
    order: Vector<String>,
    ids: OrdSet<String>,
}

impl From<Vector<String>> for Refused {
    fn from(order: Vector<String>) -> Self {
        Self { ids: order.iter().cloned().collect(), order }
    }
}

impl From<Refused> for Vector<String> {
    fn from(refused: Refused) -> Self {
        refused.order
    }
}

impl RequestTable {
    /// The answer given to a request that was done.
    #[must_use]
    pub fn get(&self, request_id: &str) -> Option<&Answer> {
        self.answers.get(request_id)
    }

    /// Whether a request was refused.
    #[must_use]
    pub fn is_refused(&self, request_id: &str) -> bool {
        self.refused.ids.contains(request_id)
    }

    /// How many answers are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// How many refusals are kept.
    #[must_use]
    pub fn refused_len(&self) -> usize {
        self.refused.order.len()
    }

    /// Whether there is no answer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    pub(crate) fn insert(&mut self, request_id: &str, answer: Answer) {
        if self.answers.insert(request_id.to_owned(), answer).is_none() {
            self.order.push_back(request_id.to_owned());
        }
        while self.order.len() > REQUESTS_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.answers.remove(&oldest);
            }
        }
    }

    /// Remembers a refusal; one without an id can't come again.
    pub(crate) fn refuse(&mut self, request_id: &str) {
        let refused = &mut self.refused;
        if request_id.is_empty() || refused.ids.insert(request_id.to_owned()).is_some() {
            return;
        }
        refused.order.push_back(request_id.to_owned());
        while refused.order.len() > REFUSALS_MAX {
            if let Some(oldest) = refused.order.pop_front() {
                refused.ids.remove(&oldest);
            }
        }
    }
}
