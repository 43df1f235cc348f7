//! The identity that the whole daemon shows, which is replaced while it runs.

use super::HostIdentity;
use std::sync::Arc;
use tokio::sync::watch;

/// Handle of the identity; clones share it.
#[derive(Clone)]
pub struct SharedIdentity {
    present: Arc<watch::Sender<Arc<HostIdentity>>>,
}

impl SharedIdentity {
    /// A handle that begins with this identity.
    #[must_use]
    pub fn new(identity: HostIdentity) -> Self {
        Self { present: Arc::new(watch::Sender::new(Arc::new(identity))) }
    }

    /// The present identity; the same pointer as long as it is not replaced.
    #[must_use]
    pub fn present(&self) -> Arc<HostIdentity> {
        self.present.borrow().clone()
    }

    /// Follows it.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<HostIdentity>> {
        self.present.subscribe()
    }

    /// Shows another one from now on, in new connections.
    pub fn replace(&self, identity: HostIdentity) {
        self.present.send_replace(Arc::new(identity));
    }
}
