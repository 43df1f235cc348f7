//! The decisions on which the data depends, as functions of values.

use crate::safety::Rule;
use crate::types::{EpochStart, IsrMember, Tail};
use proto::{Epoch, HostId, Incarnation, Sequence};

/// The position up to which a replica surely has what everybody has: its own tail, or what is before the start of every later
/// epoch, whichever is earlier. What it holds beyond that is divergent.
///
/// `None`: nothing is sure, copy everything.
#[must_use]
pub fn common_prefix(tail: Tail, history: &[EpochStart]) -> Option<Tail> {
    let known_from = history.first()?.epoch;
    if tail.epoch < known_from {
        return None;
    }
    // Epochs without a start never wrote. Not the next epoch alone decides: after a loss of power of all members a later one may
    // have started before it.
    let starts = history.iter().filter(|entry| entry.epoch > tail.epoch).filter_map(|entry| entry.start);
    let end = starts.min().map_or(tail.sequence, |start| Sequence(start.0.saturating_sub(1)));
    Some(Tail { epoch: tail.epoch, sequence: tail.sequence.min(end) })
}

/// A replica that has attached, as a recovery sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its host.
    pub host: HostId,
    /// The life of its store.
    pub incarnation: Incarnation,
    /// What it holds.
    pub tail: Tail,
}

/// What to do to make the in-sync set equal under a new owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// The longest tail.
    pub longest: Tail,
    /// The member that holds it.
    pub source: HostId,
    /// Members that lack something, with what they hold.
    pub behind: Vec<(HostId, Tail)>,
    /// Members that are not there.
    pub missing: Vec<IsrMember>,
}

/// Plans a recovery. Only members with the incarnation of the set count: every one of them has every acknowledged write.
///
/// `None`: no member is there.
#[must_use]
pub fn plan_recovery(isr: &[IsrMember], attached: &[Candidate]) -> Option<Recovery> {
    let is_member = |candidate: &&Candidate| {
        isr.iter().any(|m| m.host == candidate.host && m.incarnation == candidate.incarnation)
    };
    let members: Vec<&Candidate> = attached.iter().filter(is_member).collect();
    let source = members.iter().max_by_key(|member| member.tail)?;
    let behind = members.iter().filter(|member| member.tail < source.tail);
    let missing = isr.iter().filter(|m| !members.iter().any(|member| member.host == m.host));
    Some(Recovery {
        longest: source.tail,
        source: source.host,
        behind: behind.map(|member| (member.host, member.tail)).collect(),
        missing: missing.cloned().collect(),
    })
}

/// How far each replica has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Written.
    pub written: Sequence,
    /// Durable.
    pub durable: Sequence,
}

/// What may be acknowledged: the least of all that are required. Nobody required: nothing.
#[must_use]
pub fn acknowledged(required: impl Iterator<Item = Progress>) -> Progress {
    let least = |a: Progress, b: Progress| {
        if !Rule::AllMembersAcknowledge.holds() {
            return Progress { written: a.written.max(b.written), durable: a.durable.max(b.durable) };
        }
        Progress { written: a.written.min(b.written), durable: a.durable.min(b.durable) }
    };
    required.reduce(least).unwrap_or_default()
}

/// Where a replica stands that has attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Up to here nothing is missing.
    pub tail: Tail,
    /// A resync is unfinished.
    pub incomplete: bool,
}

/// Whether an in-sync member that connects anew can go on where it stopped: nothing that it lacks has been let go.
#[must_use]
pub fn can_resume(standing: Standing, epoch: Epoch, acknowledged: Sequence, issued: Sequence) -> bool {
    let Standing { tail, incomplete } = standing;
    !incomplete && tail.epoch <= epoch && tail.sequence >= acknowledged && tail.sequence <= issued
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(epoch: u64, sequence: u64) -> Tail {
        Tail { epoch: Epoch(epoch), sequence: Sequence(sequence) }
    }

    fn start(epoch: u64, start: Option<u64>) -> EpochStart {
        EpochStart { epoch: Epoch(epoch), start: start.map(Sequence) }
    }

    fn member(host: u64, incarnation: &str) -> IsrMember {
        IsrMember { host: HostId(host), incarnation: Incarnation(incarnation.to_owned()) }
    }

    fn candidate(host: u64, incarnation: &str, tail: Tail) -> Candidate {
        Candidate { host: HostId(host), incarnation: Incarnation(incarnation.to_owned()), tail }
    }

    #[test]
    fn a_divergent_tail_is_cut_at_the_start_of_the_next_epoch() {
        let history = [start(1, Some(1)), start(2, Some(101)), start(3, None), start(4, Some(151))];
        assert_eq!(common_prefix(tail(1, 120), &history), Some(tail(1, 100)));
        assert_eq!(common_prefix(tail(1, 80), &history), Some(tail(1, 80)));
        assert_eq!(
            common_prefix(tail(2, 160), &history),
            Some(tail(2, 150)),
            "an epoch that never wrote is passed over"
        );
        assert_eq!(common_prefix(tail(4, 170), &history), Some(tail(4, 170)));
    }

    #[test]
    fn a_later_epoch_that_started_before_the_next_one_decides() {
        // All members lost power in epoch 2, and with it what epoch 1 had written last.
        let history = [start(1, Some(1)), start(2, Some(101)), start(3, Some(91))];
        assert_eq!(common_prefix(tail(1, 100), &history), Some(tail(1, 90)));
    }

    #[test]
    fn below_the_horizon_everything_is_copied() {
        assert_eq!(common_prefix(tail(1, 120), &[start(2, Some(101))]), None);
        assert_eq!(common_prefix(tail(0, 0), &[]), None);
    }

    #[test]
    fn the_longest_tail_of_the_in_sync_members_wins() {
        let isr = [member(1, "a"), member(2, "b"), member(3, "c")];
        let attached = [
            candidate(1, "a", tail(1, 10)),
            candidate(2, "b", tail(1, 12)),
            // Out of sync, or of another life: longer, and worth nothing.
            candidate(3, "other", tail(1, 99)),
            candidate(4, "d", tail(2, 50)),
        ];
        let recovery = plan_recovery(&isr, &attached).unwrap();
        assert_eq!((recovery.longest, recovery.source), (tail(1, 12), HostId(2)));
        assert_eq!(recovery.behind, [(HostId(1), tail(1, 10))]);
        assert_eq!(recovery.missing, [member(3, "c")]);
        assert_eq!(plan_recovery(&isr, &attached[2..]), None);
    }

    #[test]
    fn the_slowest_required_replica_decides() {
        let of = |written, durable| Progress { written: Sequence(written), durable: Sequence(durable) };
        let least = |of: &[Progress]| acknowledged(of.iter().copied());
        assert_eq!(least(&[of(9, 5), of(7, 7)]), of(7, 5));
        assert_eq!(least(&[of(9, 5), Progress::default()]), of(0, 0), "an absent member holds everything up");
        assert_eq!(least(&[]), of(0, 0));
    }

    #[test]
    fn a_member_resumes_only_where_nothing_was_let_go() {
        let resumes = |standing| can_resume(standing, Epoch(2), Sequence(10), Sequence(12));
        let complete = |tail| Standing { tail, incomplete: false };
        assert!(resumes(complete(tail(2, 10))));
        assert!(!resumes(complete(tail(2, 9))), "lacks an acknowledged write");
        assert!(!resumes(complete(tail(2, 13))), "holds what was never issued");
        assert!(!resumes(Standing { tail: tail(2, 10), incomplete: true }), "has holes");
    }
}
