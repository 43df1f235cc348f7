//! The pace of load and faults. Nothing is waited for here: how fast clients call and faults strike is a choice.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// Lets so much time pass.
pub fn pause(time: Duration) {
    // Nothing is ever sent on the channel.
    let (_pace, ticks) = mpsc::channel::<()>();
    ticks.recv_timeout(time).ok();
}

/// Does a step again and again, with a pause after each, until `stop` is set.
pub fn every(time: Duration, stop: &AtomicBool, mut step: impl FnMut()) {
    while !stop.load(Ordering::Relaxed) {
        step();
        pause(time);
    }
}
