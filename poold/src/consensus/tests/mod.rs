//! Consensus as a whole: openraft's own suite on the stores, restarts, and pools over real TLS.

mod pool;
mod recover;
mod snapshots;
mod stores;
