//! I4 for clients of a served volume: its blocks are linearizable registers.
//!
//! Every stamp is written once. A stamp with its write and all reads that saw it is a cluster; in any order that explains the
//! answers, a cluster stands together. With `f` the earliest end and `s` the latest begin of a call in a cluster, cluster A comes
//! before B if `f(A) < s(B)`: some call of A was over before some call of B began. So (Gibbons and Korach, for unique writes):
//!
//! ```text
//!  linearizable  ⇔  no two clusters must come before each other, and no read is over before the write that it saw began
//! ```
//! A write without an answer has no end, and counts only if somebody saw it.

use std::collections::BTreeMap;

use super::Violation;
use crate::observation::{BlockCall, Observation, Seen};

/// A call on one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// When it was asked.
    pub from_ms: u64,
    /// When it was answered.
    pub to_ms: u64,
    /// What it came to.
    pub call: BlockCall,
}

/// A stamp's write and the reads that saw it.
#[derive(Debug, Clone, Copy)]
struct Cluster {
    /// Begin of the write; 0 for what nobody has written.
    written_from_ms: u64,
    earliest_end_ms: u64,
    latest_begin_ms: u64,
    /// Last answer, for the report.
    seen_ms: u64,
}

/// Every block with answers that no order explains, and every torn one.
#[must_use]
pub fn check(observations: &[Observation]) -> Vec<Violation> {
    let mut blocks: BTreeMap<(&str, u64), Vec<Call>> = BTreeMap::new();
    for observation in observations {
        if let Seen::Block { volume, block, from_ms, call, .. } = &observation.seen {
            let call = Call { from_ms: *from_ms, to_ms: observation.at_ms, call: *call };
            blocks.entry((volume, *block)).or_default().push(call);
        }
    }
    let wrong = blocks.into_iter().filter_map(|(block, calls)| Some((block, unexplained(&calls)?)));
    wrong
        .map(|((volume, block), (at_ms, text))| {
            Violation::new("I4", at_ms, format!("{volume}, block {block}: {text}"))
        })
        .collect()
}

/// Why no order explains the answers about one block; none when some order does. At first it holds stamp 0.
#[must_use]
pub fn unexplained(calls: &[Call]) -> Option<(u64, String)> {
    let clusters = match clusters(calls) {
        Ok(clusters) => clusters,
        Err(wrong) => return Some(wrong),
    };
    for (stamp, a) in &clusters {
        for (other, b) in clusters.range(stamp + 1..) {
            if a.earliest_end_ms < b.latest_begin_ms && b.earliest_end_ms < a.latest_begin_ms {
                let text = format!(
                    "stamp {stamp:#x} was seen after {other:#x} and before it: one of them was lost, or came back"
                );
                return Some((a.seen_ms.max(b.seen_ms), text));
            }
        }
    }
    None
}

fn clusters(calls: &[Call]) -> Result<BTreeMap<u64, Cluster>, (u64, String)> {
    let nothing = Cluster { written_from_ms: 0, earliest_end_ms: 0, latest_begin_ms: 0, seen_ms: 0 };
    let mut clusters = BTreeMap::from([(0, nothing)]);
    let mut unanswered = BTreeMap::new();
    for call in calls {
        match call.call {
            BlockCall::Wrote { stamp } => {
                let (written_from_ms, end) = (call.from_ms, call.to_ms);
                let cluster = Cluster {
                    written_from_ms,
                    earliest_end_ms: end,
                    latest_begin_ms: written_from_ms,
                    seen_ms: end,
                };
                clusters.insert(stamp, cluster);
            }
            BlockCall::MayHaveWritten { stamp } => drop(unanswered.insert(stamp, call.from_ms)),
            BlockCall::Read { .. } => {}
            BlockCall::ReadTorn => {
                return Err((call.to_ms, "half of it is of another write than the rest".to_owned()));
            }
        }
    }
    for call in calls {
        let BlockCall::Read { stamp } = call.call else { continue };
        if let (None, Some(&from_ms)) = (clusters.get(&stamp), unanswered.get(&stamp)) {
            let cluster = Cluster {
                written_from_ms: from_ms,
                earliest_end_ms: u64::MAX,
                latest_begin_ms: from_ms,
                seen_ms: 0,
            };
            clusters.insert(stamp, cluster);
        }
        let Some(cluster) = clusters.get_mut(&stamp).filter(|cluster| cluster.written_from_ms <= call.to_ms)
        else {
            return Err((call.to_ms, format!("stamp {stamp:#x} was read before anybody wrote it")));
        };
        cluster.earliest_end_ms = cluster.earliest_end_ms.min(call.to_ms);
        cluster.latest_begin_ms = cluster.latest_begin_ms.max(call.from_ms);
        cluster.seen_ms = cluster.seen_ms.max(call.to_ms);
    }
    Ok(clusters)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn call(from_ms: u64, to_ms: u64, call: BlockCall) -> Call {
        Call { from_ms, to_ms, call }
    }

    fn wrote(from_ms: u64, to_ms: u64, stamp: u64) -> Call {
        call(from_ms, to_ms, BlockCall::Wrote { stamp })
    }

    fn read(from_ms: u64, to_ms: u64, stamp: u64) -> Call {
        call(from_ms, to_ms, BlockCall::Read { stamp })
    }

    #[test]
    fn a_lost_write_an_old_one_and_a_torn_one_are_found() {
        assert_eq!(unexplained(&[read(1, 2, 0), wrote(3, 4, 7), read(5, 6, 7)]), None);
        assert!(unexplained(&[wrote(3, 4, 7), read(5, 6, 0)]).is_some(), "lost");
        assert!(unexplained(&[wrote(1, 2, 7), wrote(3, 4, 8), read(5, 6, 7)]).is_some(), "an older one");
        let to_and_fro = [wrote(1, 9, 7), wrote(1, 9, 8), read(10, 11, 7), read(12, 13, 8)];
        assert!(unexplained(&to_and_fro).is_some());
        assert!(unexplained(&[read(1, 2, 7), wrote(3, 4, 7)]).is_some(), "before it was written");
        assert!(unexplained(&[wrote(1, 2, 7), call(3, 4, BlockCall::ReadTorn)]).is_some());
        assert!(unexplained(&[read(1, 2, 99)]).is_some(), "nobody's");
    }

    #[test]
    fn an_unanswered_write_may_happen_late_or_never_and_once() {
        let unanswered = call(1, 2, BlockCall::MayHaveWritten { stamp: 7 });
        assert_eq!(unexplained(&[unanswered, read(5, 6, 0), read(7, 8, 7)]), None);
        assert_eq!(unexplained(&[unanswered, read(5, 6, 0), read(7, 8, 0)]), None);
        assert!(unexplained(&[unanswered, read(5, 6, 7), read(7, 8, 0)]).is_some());
    }

    /// Whether some order of the calls explains them: all orders are tried.
    fn some_order_explains(calls: &[Call], placed: &mut Vec<usize>, stamp: u64) -> bool {
        if placed.len() == calls.len() {
            return true;
        }
        (0..calls.len()).any(|next| {
            let is_due = !placed.contains(&next)
                && (0..calls.len())
                    .all(|other| placed.contains(&other) || calls[other].to_ms >= calls[next].from_ms);
            let after = match calls[next].call {
                BlockCall::Wrote { stamp } => Some(stamp),
                BlockCall::Read { stamp: seen } => (seen == stamp).then_some(stamp),
                _ => None,
            };
            let Some(after) = after.filter(|_| is_due) else { return false };
            placed.push(next);
            let explains = some_order_explains(calls, placed, after);
            placed.pop();
            explains
        })
    }

    #[test]
    fn it_agrees_with_a_search_through_all_orders() {
        let mut random = StdRng::seed_from_u64(7);
        let mut counts = [0, 0];
        for _ in 0..20_000 {
            let count = random.random_range(2..7);
            let calls: Vec<Call> = (0..count)
                .map(|number| {
                    let from_ms = random.random_range(1..14);
                    let to_ms = from_ms + random.random_range(0..6);
                    if number < count / 2 {
                        wrote(from_ms, to_ms, number + 1)
                    } else {
                        read(from_ms, to_ms, random.random_range(0..=count / 2))
                    }
                })
                .collect();
            let explains = some_order_explains(&calls, &mut Vec::new(), 0);
            assert_eq!(unexplained(&calls).is_none(), explains, "{calls:?}");
            counts[usize::from(explains)] += 1;
        }
        assert!(counts.iter().all(|&count| count > 2_000), "{counts:?}");
    }
}
