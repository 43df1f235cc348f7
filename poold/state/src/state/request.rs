//! The answers that were given to requests, so that a retry has no further effect.

use crate::{limits::REQUESTS_MAX, outcome::Outcome};
use imbl::{OrdMap, Vector};
use serde::{Deserialize, Serialize};

/// The newest accepted requests by their id. A rejected one changed nothing, so it needs no memory.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RequestTable {
    answers: OrdMap<String, Answer>,
    order: Vector<String>,
}

/// What a request was and what it got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// blake3 of the command.
    pub command_hash: [u8; 32],
    /// The first answer.
    pub outcome: Outcome,
}

impl RequestTable {
    /// The answer given to a request.
    #[must_use]
    pub fn get(&self, request_id: &str) -> Option<&Answer> {
        self.answers.get(request_id)
    }

    /// How many answers are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether there is none.
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
}
