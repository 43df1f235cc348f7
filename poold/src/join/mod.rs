//! Joining a pool: the token, what a new host finds out about itself, and the client side of the join.

mod client;
mod connect;
mod local;
mod pin;
mod rekey;
mod token;

#[cfg(test)]
mod tests;

pub use client::{JoinError, JoinOptions, Joined, join};
pub use local::{LocalFacts, boot_id, local_facts, local_problems};
pub use rekey::rekey;
pub use token::{JoinToken, TokenError, from_hex};
