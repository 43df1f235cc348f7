//! What happens to single messages on their way.
//!
//! QUIC keeps the order of a stream, loses nothing and doubles nothing as long as the link lives. The machines do not rest on
//! that: whatever a peer says in whatever order, the guest runs at one place.

use crate::{
    plan::{Mishap, MishapKind},
    world::{Happening, Stream, World},
};
use migrate::moment::Moment;
use std::time::Duration;

/// A link that brings nothing is given up after that.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Longer than any message takes.
const LATE: Duration = Duration::from_millis(20);

/// A second copy of what travels between the two sides.
fn copy(happening: &Happening) -> Option<Happening> {
    match happening {
        Happening::ToTarget(bytes) => Some(Happening::ToTarget(bytes.clone())),
        Happening::ToSource(bytes) => Some(Happening::ToSource(bytes.clone())),
        Happening::Batch { stream, bytes } => {
            Some(Happening::Batch { stream: *stream, bytes: bytes.clone() })
        }
        Happening::StateArrives(bytes) => Some(Happening::StateArrives(bytes.clone())),
        _ => None,
    }
}

impl World {
    /// When the message arrives, if it does; later ones of its stream come after that, unless it is overtaken.
    pub fn mishap(
        &mut self,
        stream: Stream,
        at: Moment,
        happening: Happening,
    ) -> Option<(Moment, Happening)> {
        self.messages += 1;
        let kind = match self.plan.mishap {
            Some(Mishap { kind, message }) if message == self.messages => Some(kind),
            _ => None,
        };
        match kind {
            Some(MishapKind::Lost) => {
                self.later(IDLE_TIMEOUT, Happening::IdleTimeout(self.link));
                return None;
            }
            Some(MishapKind::Overtaken) => return Some((at.after(LATE), happening)),
            Some(MishapKind::Doubled) => {
                if let Some(copy) = copy(&happening) {
                    self.transmit_at(at.since(self.now) + LATE, copy);
                }
            }
            None => {}
        }
        self.last_on_stream.insert(stream, at);
        Some((at, happening))
    }
}
