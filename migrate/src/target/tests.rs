use super::*;
use crate::{ResumedParts, wire::Kept};
use proto::{MigrationId, PageIndex, VmId};

fn handle(target: &mut Target, event: TargetEvent) -> Vec<TargetCommand> {
    target.handle(Moment::default(), event)
}

fn hello() -> ToTarget {
    ToTarget::Hello {
        version: WIRE_VERSION,
        migration: MigrationId(1),
        vm: VmId(2),
        page_count: 1024,
        streams: 2,
        connections: 1,
        proof: Some(crate::proof::Sample::ALL),
    }
}

fn new() -> Target {
    Target::new(TargetSettings {
        migration: MigrationId(1),
        vm: VmId(2),
        page_count: 1024,
        kept: Kept::Nothing,
    })
}

fn proof(byte: u8) -> MemoryProof {
    MemoryProof { root: [byte; 32], groups: vec![(1, [byte; 32])] }
}

/// The five things that make a target ready.
fn last_events(theirs: u8) -> Vec<TargetEvent> {
    let stopped = ToTarget::Stopped { last_round: Round(2), last_sequences: Vec::new(), rest: Rest::Now };
    vec![
        TargetEvent::Message(stopped),
        TargetEvent::StateReceived(vec![1]),
        TargetEvent::StateLoaded,
        TargetEvent::Message(ToTarget::Proof(proof(theirs))),
        TargetEvent::RoundApplied { round: Round(2) },
        TargetEvent::MemoryHashed(proof(5)),
    ]
}

fn receiving() -> Target {
    let mut target = new();
    handle(&mut target, TargetEvent::Message(hello()));
    handle(&mut target, TargetEvent::RoundApplied { round: Round(1) });
    target
}

#[test]
fn ready_needs_everything() {
    for missing in 1..6 {
        let mut target = receiving();
        for (index, event) in last_events(5).into_iter().enumerate() {
            // What is never received is never loaded, and what is incomplete is never hashed.
            if index != missing && !(missing == 1 && index == 2) && !(missing == 4 && index == 5) {
                handle(&mut target, event);
            }
        }
        assert_eq!(target.phase(), TargetPhase::Receiving, "without event {missing}");
    }
    let mut target = receiving();
    let sent: Vec<_> = last_events(5).into_iter().flat_map(|event| handle(&mut target, event)).collect();
    assert_eq!(sent.last(), Some(&TargetCommand::Send(ToSource::Ready)));
    assert!(matches!(target.phase(), TargetPhase::Ready { memory_hash: Some(hash), .. } if hash == [5; 32]));
}

#[test]
fn without_a_proof_pages_and_state_make_it_ready() {
    let start = || {
        let mut target = new();
        let mut hello = hello();
        if let ToTarget::Hello { proof, .. } = &mut hello {
            *proof = None;
        }
        handle(&mut target, TargetEvent::Message(hello));
        let stopped = ToTarget::Stopped { last_round: Round(2), last_sequences: Vec::new(), rest: Rest::Now };
        handle(&mut target, TargetEvent::Message(stopped));
        target
    };
    let state = |target: &mut Target| {
        handle(target, TargetEvent::StateReceived(vec![1]));
        handle(target, TargetEvent::StateLoaded);
    };
    let mut state_first = start();
    state(&mut state_first);
    assert_eq!(state_first.phase(), TargetPhase::Receiving);
    handle(&mut state_first, TargetEvent::RoundApplied { round: Round(2) });
    let ready = TargetPhase::Ready { memory_hash: None, last_sequences: Vec::new() };
    assert_eq!(state_first.phase(), ready);
    let mut pages_first = start();
    handle(&mut pages_first, TargetEvent::RoundApplied { round: Round(2) });
    assert_eq!(pages_first.phase(), TargetPhase::Receiving);
    state(&mut pages_first);
    assert_eq!(pages_first.phase(), ready);
}

#[test]
fn state_and_pages_may_overtake_the_word_that_the_source_stopped() {
    let mut target = receiving();
    assert!(handle(&mut target, TargetEvent::StateReceived(vec![1])).is_empty());
    handle(&mut target, TargetEvent::RoundApplied { round: Round(2) });
    let commands = handle(&mut target, last_events(5).remove(0));
    assert_eq!(commands, [TargetCommand::LoadState(vec![1]), TargetCommand::HashMemory]);
}

#[test]
fn a_difference_is_named_and_fails() {
    let mut target = receiving();
    for event in last_events(6) {
        handle(&mut target, event);
    }
    let failure = TargetFailure::MemoryDiffers { first: PageIndex(512), end: PageIndex(1024) };
    assert_eq!(target.phase(), TargetPhase::Failed { failure });
}

#[test]
fn a_ready_target_outlives_its_link_and_everything_else_does_not() {
    let lost = || TargetEvent::LinkLost { error: "gone".to_owned() };
    let mut target = receiving();
    for event in last_events(5) {
        handle(&mut target, event);
    }
    assert!(handle(&mut target, lost()).is_empty());
    assert!(matches!(target.phase(), TargetPhase::Ready { .. }));
    handle(&mut target, TargetEvent::Resumed(ResumedParts::default()));
    assert_eq!(target.phase(), TargetPhase::Resumed);
    for mut target in [new(), receiving()] {
        handle(&mut target, lost());
        assert!(matches!(target.phase(), TargetPhase::Failed { .. }));
        assert!(handle(&mut target, TargetEvent::StateLoaded).is_empty());
        handle(&mut target, TargetEvent::Discard);
        assert_eq!(target.phase(), TargetPhase::Discarded);
    }
}

#[test]
fn a_target_says_why_its_source_gave_up() {
    let mut target = receiving();
    handle(&mut target, TargetEvent::LinkClosed { why: "cancelled".to_owned() });
    let TargetPhase::Failed { failure } = target.phase() else { panic!("{:?}", target.phase()) };
    assert_eq!(failure.to_string(), "the source gave up: cancelled");
}

#[test]
fn a_source_that_does_not_fit_is_refused_with_the_reason() {
    let refusal = |change: fn(&mut ToTarget)| {
        let (mut target, mut hello) = (new(), hello());
        change(&mut hello);
        let mut commands = handle(&mut target, TargetEvent::Message(hello));
        assert!(matches!(target.phase(), TargetPhase::Failed { failure: TargetFailure::Refused { .. } }));
        match commands.pop() {
            Some(TargetCommand::Send(ToSource::Refused(refusal))) => refusal,
            other => panic!("{other:?}"),
        }
    };
    let changed = refusal(|hello| {
        if let ToTarget::Hello { version, .. } = hello {
            *version += 1;
        }
    });
    assert!(matches!(changed, Refusal::Version { .. }));
    let changed = refusal(|hello| {
        if let ToTarget::Hello { vm, .. } = hello {
            *vm = VmId(3);
        }
    });
    assert!(matches!(changed, Refusal::OtherMigration { .. }));
    let changed = refusal(|hello| {
        if let ToTarget::Hello { page_count, .. } = hello {
            *page_count += 1;
        }
    });
    assert!(matches!(changed, Refusal::PageCount { .. }));
    let changed = refusal(|hello| {
        if let ToTarget::Hello { streams, .. } = hello {
            *streams = BULK_STREAMS_MAX + 1;
        }
    });
    assert!(matches!(changed, Refusal::Streams { .. }));
}

#[test]
fn messages_out_of_turn_fail_the_target() {
    for event in [
        TargetEvent::Message(ToTarget::Proof(proof(1))),
        TargetEvent::StateReceived(Vec::new()),
        TargetEvent::Message(ToTarget::Stopped {
            last_round: Round(1),
            last_sequences: Vec::new(),
            rest: Rest::Now,
        }),
    ] {
        let mut target = new();
        handle(&mut target, event);
        let phase = target.phase();
        assert!(
            matches!(phase, TargetPhase::Failed { failure: TargetFailure::Protocol { .. } }),
            "{phase:?}"
        );
    }
    let mut target = receiving();
    handle(&mut target, TargetEvent::Message(hello()));
    assert!(matches!(target.phase(), TargetPhase::Failed { .. }));
}

/// A target with a machine that may run before its pages are there.
fn ready_on_demand() -> Target {
    let mut target = receiving();
    let stopped =
        ToTarget::Stopped { last_round: Round(2), last_sequences: Vec::new(), rest: Rest::OnDemand };
    let mut missing = PageBitmap::new(1024);
    missing.fill();
    handle(&mut target, TargetEvent::Message(stopped));
    for words in crate::wire::PageWords::of(&missing) {
        handle(&mut target, TargetEvent::Message(ToTarget::Missing(words)));
    }
    handle(&mut target, TargetEvent::StateReceived(vec![1]));
    handle(&mut target, TargetEvent::OnDemandBegun);
    handle(&mut target, TargetEvent::StateLoaded);
    assert!(matches!(target.phase(), TargetPhase::Ready { .. }));
    target
}

/// The vCPUs run for a moment before their owner says so; whoever waits for a page then must not wait for the background.
#[test]
fn a_page_that_is_touched_before_the_machine_is_said_to_run_is_asked_for() {
    let need = |page| TargetCommand::Send(ToSource::Need { page });
    let mut target = ready_on_demand();
    assert_eq!(handle(&mut target, TargetEvent::Fault { page: PageIndex(9) }), [need(PageIndex(9))]);
    // Asked for once more on the next link.
    let mut target = ready_on_demand();
    handle(&mut target, TargetEvent::LinkLost { error: "gone".to_owned() });
    assert!(handle(&mut target, TargetEvent::Fault { page: PageIndex(9) }).is_empty());
    let rejoin = ToTarget::Rejoin { migration: MigrationId(1), vm: VmId(2) };
    assert_eq!(handle(&mut target, TargetEvent::Message(rejoin)), [TargetCommand::ListMissing]);
    let mut missing = PageBitmap::new(1024);
    missing.fill();
    let listed = handle(&mut target, TargetEvent::MissingListed(missing));
    assert_eq!(listed.last(), Some(&need(PageIndex(9))));
}
