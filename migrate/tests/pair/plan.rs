//! What goes wrong in one run, and how the pool decides.

use migrate::Proof;
use std::time::Duration;

/// A fault at one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The link breaks; both sides notice at once.
    LinkCut,
    /// The source process dies; the target notices.
    SourceDies,
    /// The target process dies; the source notices.
    TargetDies,
    /// The operator cancels.
    Cancel,
    /// The pool has no leader for a while.
    LeaderDies,
}

/// What happens to a message on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MishapKind {
    /// It never arrives; the link ends later.
    Lost,
    /// It arrives twice.
    Doubled,
    /// What was sent after it arrives before it.
    Overtaken,
}

/// One message that fares badly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mishap {
    pub kind: MishapKind,
    /// The how manieth, counted from 1.
    pub message: usize,
}

/// What the pool makes of a proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Commit,
    Abort,
    /// No answer, until the run is otherwise over; then this one.
    Unknown {
        at_last_committed: bool,
    },
}

/// Who hears of the decision first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstToHear {
    Source,
    Target,
}

/// One run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub fault: Fault,
    /// Events handled before the fault.
    pub fault_step: usize,
    /// With [`Fault::LinkCut`]: events from the first cut to a second one.
    pub second_cut_after: Option<usize>,
    /// What happens to one message.
    pub mishap: Option<Mishap>,
    /// How long a cut link can't be made again.
    pub outage: Duration,
    pub decision: Decision,
    pub first_to_hear: FirstToHear,
    /// From `Paused` to the proposal.
    pub proposal_delay: Duration,
    /// Longest time of a message on its way.
    pub message_delay_max: Duration,
    /// Pages that the guest writes at each step.
    pub writes_per_step: usize,
    pub pages: usize,
    pub streams: u8,
    pub downtime_limit: Duration,
    pub policy: migrate::Policy,
    pub proof: Proof,
}

impl Plan {
    pub fn calm() -> Self {
        Self {
            seed: 1,
            fault: Fault::None,
            fault_step: usize::MAX,
            second_cut_after: None,
            mishap: None,
            outage: Duration::from_millis(700),
            decision: Decision::Commit,
            first_to_hear: FirstToHear::Source,
            proposal_delay: Duration::from_millis(5),
            message_delay_max: Duration::from_millis(2),
            writes_per_step: 8,
            pages: 200,
            streams: 2,
            downtime_limit: Duration::from_millis(10),
            policy: migrate::Policy::Default,
            proof: Proof::Sampled,
        }
    }

    /// A guest that writes too fast and goes over with its pages on demand.
    pub fn on_demand() -> Self {
        Self {
            policy: migrate::Policy::PostCopy,
            downtime_limit: Duration::from_micros(100),
            writes_per_step: 20,
            // So that it runs while most pages are missing.
            first_to_hear: FirstToHear::Target,
            ..Self::calm()
        }
    }
}
