//! Which write a guest is about to flush.
//!
//! A database that commits writes, waits, flushes, waits, and does the same again. Once it has shown that, replicas are asked to
//! make a write durable together with the write itself: the guest's flush finds it done, and each commit takes one
//! round trip in place of two. It is a guess about time alone: what a flush promises is not touched by it, and a wrong guess costs one
//! sync that nobody asked for.

/// Flushes that came after equally many writes, before the next one is foreseen.
const ALIKE_MIN: u32 = 4;

/// Writes between two flushes beyond which the flush is a small part of the work.
const WRITES_MAX: u32 = 8;

/// How a guest has flushed until now.
#[derive(Debug, Default)]
pub struct FlushHabit {
    /// Writes since the last flush.
    writes: u32,
    /// Writes between the two before.
    writes_before: u32,
    /// Flushes in a row that came after as many.
    alike: u32,
}

impl FlushHabit {
    /// A write is issued; whether it is the last one before a flush, as far as can be told.
    pub fn wrote(&mut self) -> bool {
        self.writes = self.writes.saturating_add(1);
        if self.writes > self.writes_before {
            self.alike = 0;
        }
        self.alike >= ALIKE_MIN && self.writes == self.writes_before
    }

    /// A flush has come.
    pub fn flushed(&mut self) {
        let writes = std::mem::take(&mut self.writes);
        if writes == 0 || writes > WRITES_MAX {
            // A flush of nothing says nothing: clients send one when they go.
            self.alike = if writes == 0 { self.alike } else { 0 };
            return;
        }
        self.alike = if writes == self.writes_before { self.alike.saturating_add(1) } else { 0 };
        self.writes_before = writes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes, then flushes; which of the writes was taken for the last one.
    fn round(habit: &mut FlushHabit, writes: u32) -> Vec<u32> {
        let foreseen = (1..=writes).filter(|_| habit.wrote()).collect();
        habit.flushed();
        foreseen
    }

    #[test]
    fn a_flush_is_foreseen_once_it_has_come_as_often_in_the_same_way() {
        for writes in [1, 3, WRITES_MAX] {
            let mut habit = FlushHabit::default();
            let rounds: Vec<_> = (0..8).map(|_| round(&mut habit, writes)).collect();
            let known = ALIKE_MIN as usize + 1;
            assert!(rounds[..known].iter().all(Vec::is_empty), "{rounds:?}");
            assert!(rounds[known..].iter().all(|foreseen| *foreseen == [writes]), "{rounds:?}");
            habit.flushed();
            assert_eq!(round(&mut habit, writes), [writes], "a flush of nothing changes nothing");
        }
    }

    #[test]
    fn whoever_changes_has_no_habit() {
        let mut habit = FlushHabit::default();
        (0..10).for_each(|_| drop(round(&mut habit, 1)));
        assert_eq!(round(&mut habit, 5), [1], "the wrong guess");
        assert_eq!(round(&mut habit, 1), [0; 0]);
        (0..10).for_each(|_| drop(round(&mut habit, WRITES_MAX + 1)));
        assert!(round(&mut habit, WRITES_MAX + 1).is_empty());
    }
}
