//! Tells owners that a newer one has come.
//!
//! A replica refuses what an old owner sends after the promise to a newer one; but an owner that sends nothing would not hear of it, and
//! goes on believing that it has the volume. Its machine stops when it hears: so it is told at once, at every replica that the new
//! owner reaches. Nothing depends on it: an owner that is not told is refused.

use crate::replica::{Refused, Watermark};
use crate::safety::Rule;
use proto::{Epoch, VolumeId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::watch;

/// What an owner is told of its volume, by its connection.
type Marks = watch::Sender<Watermark>;

/// The owners of a volume.
type Owners = Vec<(Epoch, Weak<Marks>)>;

/// The owners that are connected, by volume.
#[derive(Debug, Default)]
pub(super) struct Attachments {
    owners: Mutex<BTreeMap<VolumeId, Owners>>,
}

impl Attachments {
    /// An owner was let in.
    pub(super) fn add(&self, volume: VolumeId, epoch: Epoch, marks: &Arc<Marks>) {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        // As many as there are connections: what has ended is let go here.
        owners.retain(|_, of_volume| {
            of_volume.retain(|(_, marks)| marks.strong_count() > 0);
            !of_volume.is_empty()
        });
        let of_volume = owners.entry(volume).or_default();
        if Rule::EpochIsChecked.holds() {
            let older = of_volume.iter().filter(|(older, _)| *older < epoch);
            for marks in older.filter_map(|(_, marks)| marks.upgrade()) {
                marks.send_modify(|mark| mark.refused = Some(Refused::Fenced { promised: epoch }));
            }
        }
        of_volume.push((epoch, Arc::downgrade(marks)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_owners_of_the_volume_are_told_and_nobody_else() {
        let attachments = Attachments::default();
        let owner = || Arc::new(watch::channel(Watermark::default()).0);
        let (old, new, other, gone) = (owner(), owner(), owner(), owner());
        attachments.add(VolumeId(1), Epoch(2), &gone);
        drop(gone);
        attachments.add(VolumeId(1), Epoch(3), &old);
        attachments.add(VolumeId(2), Epoch(1), &other);
        attachments.add(VolumeId(1), Epoch(4), &new);
        assert_eq!(old.borrow().refused, Some(Refused::Fenced { promised: Epoch(4) }));
        assert!(new.borrow().refused.is_none() && other.borrow().refused.is_none());
        assert_eq!(attachments.owners.lock().unwrap()[&VolumeId(1)].len(), 2, "who has gone is forgotten");
    }
}
