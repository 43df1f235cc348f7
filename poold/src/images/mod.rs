//! Images of this host: kernels, initrds and disk images, named by the blake3 of their content.
//!
//! ```text
//!  import stream ─▶ tmp-N ─fsync─▶ images/<blake3> ─push─▶ the other hosts ─▶ entry in the pool's state
//!  pool's state names an image that is not here ─fetch─▶ tmp-N ─▶ images/<blake3>
//!  nobody names it any more, and it is old enough not to be one just arriving ─▶ removed
//! ```
//!
//! - [`store`]: the files.
//! - [`spread`]: to and from other hosts; the task that keeps this host complete.
//!
//! Invariants: a file under its digest's name is complete and was durable before it got the name; a failed import leaves
//! nothing; content is checked against the digest whenever it arrives and whenever a VM starts from it.

mod spread;
mod store;
#[cfg(test)]
mod tests;

pub use spread::{SpreadError, chunks, push, receive, sync_task};
pub use store::{ImageError, ImageStore};
