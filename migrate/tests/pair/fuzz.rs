//! Whatever a peer sends is read or refused: valid input, spoilt in thousands of ways from a seed, through every decoder and
//! through the two machines.
//!
//! `FUZZ_SEED=7` begins elsewhere, `FUZZ_ROUNDS=1000000` goes on for longer.

use crate::support::ModelGuest;
use bytes::Bytes;
use migrate::{
    Policy, Proof, SourcePhase, VcpuActivity,
    apply::{KeepHashes, PageApplier},
    index,
    machine::PAGE_BYTES,
    moment::Moment,
    proof::{MemoryProof, PageHashes, Sample},
    source::{Outcome, Source, SourceCommand, SourceEvent, SourceSettings},
    target::{Target, TargetEvent, TargetSettings},
    wire::{
        BatchReader, BatchWriter, Kept, PageFrame, PageWords, Refusal, Rest, ToSource, ToTarget,
        batch::{BATCH_PREFIX_BYTES, Round},
        control,
    },
};
use proto::{MigrationId, PageIndex, Sequence, VmId, VolumeId};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::time::Duration;

const PAGES: u64 = 96;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Generators for `count` rounds, each with its seed.
fn rounds(count: u64) -> impl Iterator<Item = (u64, StdRng)> {
    let first = number("FUZZ_SEED", 0);
    (first..first + number("FUZZ_ROUNDS", count)).map(|seed| (seed, StdRng::seed_from_u64(seed)))
}

/// Changes a few bytes, cuts, lengthens, repeats a part, or writes an extreme number somewhere.
fn spoil(rng: &mut StdRng, bytes: &mut Vec<u8>) {
    for _ in 0..rng.random_range(1..4) {
        if bytes.is_empty() {
            bytes.push(rng.random());
        }
        let at = rng.random_range(0..bytes.len());
        match rng.random_range(0..6) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][rng.random_range(0..5)],
            2 => bytes.truncate(at),
            3 => bytes.extend((0..rng.random_range(1..40)).map(|_| rng.random::<u8>())),
            4 => {
                let end = rng.random_range(at..=bytes.len()).min(at + 64);
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => {
                let value: u64 =
                    [0, 1, u64::MAX, u64::from(u32::MAX), 1 << 63, PAGES][rng.random_range(0..6)];
                let width = [4, 8][rng.random_range(0..2)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
        }
    }
}

fn batch(rng: &mut StdRng) -> Vec<u8> {
    let data: Vec<u8> = (0..2 * PAGE_BYTES).map(|_| rng.random::<u8>() & 3).collect();
    let block = lz4_flex::block::compress(&data);
    let change = lz4_flex::block::compress(&data[..PAGE_BYTES]);
    let hash = *blake3::hash(&data[..PAGE_BYTES]).as_bytes();
    let round = Round(1);
    let frames = [
        PageFrame::Zero { round, first: PageIndex(0), count: 40 },
        PageFrame::Raw { round, first: PageIndex(40), data: &data },
        PageFrame::Kept { round, first: PageIndex(42), count: 2 },
        PageFrame::Lz4 { round, first: PageIndex(44), count: 2, block: &block },
        PageFrame::Reference { round, page: PageIndex(46), source: PageIndex(40), hash },
        PageFrame::Delta { round, page: PageIndex(40), base: Round(1), block: &change },
        PageFrame::Zero { round, first: PageIndex(47), count: 49 },
        PageFrame::RoundEnd { round, pages: 98 },
    ];
    let mut writer = BatchWriter::default();
    for frame in frames.iter().take(rng.random_range(1..=frames.len())) {
        assert!(writer.push(frame).is_none());
    }
    writer.take().unwrap()[BATCH_PREFIX_BYTES..].to_vec()
}

/// A guest would tell of a page outside of its memory by a panic.
#[test]
fn spoilt_batches_are_applied_or_refused() {
    let (mut applied, mut refused) = (0, 0);
    for (seed, mut rng) in rounds(4_000) {
        let guest = ModelGuest::new(PAGES as usize);
        let mut applier = PageApplier::new(PAGES, 2, KeepHashes::ALL);
        if rng.random() {
            let mut kept = PageHashes::new(PAGES);
            for page in 40..47 {
                guest.fill(page as usize, page);
                kept.set_hash(PageIndex(page), [7; 32]);
            }
            applier.begin_with(kept);
        }
        let is_on_demand = rng.random_bool(0.3);
        if is_on_demand {
            let mut missing = migrate::PageBitmap::new(PAGES);
            (30..60).for_each(|page| missing.insert(PageIndex(page)));
            migrate::TargetVm::begin_on_demand(&guest, &missing, Box::new(|_| {})).unwrap();
            applier.begin_on_demand(Round(1), missing);
        }
        for _ in 0..rng.random_range(1..4) {
            let mut bytes = batch(&mut rng);
            if rng.random_bool(0.8) {
                spoil(&mut rng, &mut bytes);
            }
            for frame in BatchReader::new(&bytes).flatten() {
                if let PageFrame::Raw { data, .. } = frame {
                    assert_eq!(data.len() % PAGE_BYTES, 0, "FUZZ_SEED={seed}");
                }
            }
            let pieces: Vec<_> =
                bytes.chunks(rng.random_range(1..9000)).map(Bytes::copy_from_slice).collect();
            match applier.apply(&guest, rng.random_range(0..3), pieces) {
                Ok(_) => applied += 1,
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    refused += 1;
                    break;
                }
            }
        }
        let _ = (applier.proof(), applier.has_filled());
    }
    assert!(applied > 300 && refused > 300, "{applied} applied, {refused} refused");
}

fn to_target(rng: &mut StdRng) -> ToTarget {
    let words =
        PageWords { first_word: rng.random_range(0..3), words: vec![rng.random(); 2], is_last: rng.random() };
    let groups = (0..rng.random_range(0..4)).map(|index| (index, [index as u8; 32])).collect();
    match rng.random_range(0..5) {
        0 => ToTarget::Hello {
            version: migrate::wire::WIRE_VERSION,
            migration: MigrationId(1),
            vm: VmId(2),
            page_count: PAGES,
            streams: rng.random_range(0..4),
            connections: rng.random_range(0..3),
            proof: rng.random::<bool>().then(|| Sample::pick(PAGES, rng.random())),
        },
        1 => ToTarget::Stopped {
            last_round: Round(rng.random_range(0..4)),
            last_sequences: vec![(VolumeId(3), Sequence(rng.random()))],
            rest: if rng.random() { Rest::Now } else { Rest::OnDemand },
        },
        2 => ToTarget::Proof(MemoryProof { root: [rng.random_range(0..2); 32], groups }),
        3 => ToTarget::Missing(words),
        _ => ToTarget::Rejoin { migration: MigrationId(1), vm: VmId(2) },
    }
}

fn to_source(rng: &mut StdRng) -> ToSource {
    let words = PageWords { first_word: 0, words: vec![rng.random()], is_last: rng.random() };
    match rng.random_range(0..11) {
        0 => ToSource::Welcome { ports: vec![9; rng.random_range(0..2)], kept: Kept::Image },
        1 => ToSource::Refused(Refusal::PageCount { page_count: 7 }),
        2 | 3 => ToSource::RoundReceived { round: Round(rng.random_range(0..4)) },
        4 => ToSource::StateLoaded,
        5 => ToSource::Ready,
        6 => ToSource::Failed { reason: "no".to_owned() },
        7 => ToSource::Need { page: PageIndex(rng.random_range(0..2 * PAGES)) },
        8 => ToSource::Missing(words),
        9 => ToSource::Complete,
        _ => ToSource::Resumed { activate_us: rng.random(), resume_us: rng.random() },
    }
}

#[test]
fn spoilt_messages_are_read_or_refused_and_come_back_as_they_were() {
    let mut read = 0;
    for (seed, mut rng) in rounds(20_000) {
        let encoded = [control::encode(&to_target(&mut rng)), control::encode(&to_source(&mut rng))];
        for message in encoded {
            let mut bytes = message[4..].to_vec();
            spoil(&mut rng, &mut bytes);
            if let Ok(message) = control::decode::<ToTarget>(&bytes) {
                assert_eq!(control::decode(&control::encode(&message)[4..]), Ok(message), "FUZZ_SEED={seed}");
                read += 1;
            }
            if let Ok(message) = control::decode::<ToSource>(&bytes) {
                assert_eq!(control::decode(&control::encode(&message)[4..]), Ok(message), "FUZZ_SEED={seed}");
                read += 1;
            }
        }
    }
    assert!(read > 500, "{read} messages were read");
}

#[test]
fn spoilt_indexes_are_read_or_refused() {
    let mut read = 0;
    for (seed, mut rng) in rounds(5_000) {
        let mut hashes = PageHashes::new(PAGES);
        (0..rng.random_range(0..20)).for_each(|_| {
            hashes.set_hash(PageIndex(rng.random_range(0..PAGES)), [rng.random::<u8>() | 1; 32]);
        });
        let mut bytes = index::encode(&hashes).unwrap();
        spoil(&mut rng, &mut bytes);
        if let Ok(hashes) = index::decode(&bytes, PAGES) {
            assert_eq!(hashes.page_count(), PAGES, "FUZZ_SEED={seed}");
            read += 1;
        }
    }
    assert!(read > 100, "{read} indexes were read");
}

/// The machines hear a peer that keeps no order at all. An illegal transition would panic.
#[test]
fn a_peer_without_manners_breaks_neither_machine() {
    let mut ends = [0; 2];
    for (seed, mut rng) in rounds(4_000) {
        let settings =
            TargetSettings { migration: MigrationId(1), vm: VmId(2), page_count: PAGES, kept: Kept::Nothing };
        let mut target = Target::new(settings);
        for _ in 0..30 {
            let event = match rng.random_range(0..10) {
                0 => TargetEvent::StateReceived(vec![1]),
                1 => TargetEvent::LinkLost { error: "gone".to_owned() },
                _ => TargetEvent::Message(to_target(&mut rng)),
            };
            for command in target.handle(Moment::default(), event) {
                obey_target(&mut target, command);
            }
        }
        ends[0] += usize::from(target.phase().is_final());
        let source = play_source(&mut rng);
        let runs_again = matches!(source.phase(), SourcePhase::Aborted { .. });
        ends[1] += usize::from(runs_again);
        assert!(!matches!(source.phase(), SourcePhase::Lost { .. }), "FUZZ_SEED={seed}");
    }
    assert!(ends.iter().all(|count| *count > 100), "{ends:?}");
}

/// What a shell does at once.
fn obey_target(target: &mut Target, command: migrate::target::TargetCommand) {
    use migrate::target::TargetCommand as Command;
    let event = match command {
        Command::Receive { .. } => TargetEvent::Listening { ports: Vec::new() },
        Command::LoadState(_) => TargetEvent::StateLoaded,
        Command::HashMemory => TargetEvent::MemoryHashed(MemoryProof { root: [0; 32], groups: Vec::new() }),
        Command::BeginOnDemand { .. } => TargetEvent::OnDemandBegun,
        Command::ListMissing => TargetEvent::MissingListed(migrate::PageBitmap::new(PAGES)),
        Command::Send(_) | Command::Starve(_) | Command::CloseLink => return,
    };
    for command in target.handle(Moment::default(), event) {
        obey_target(target, command);
    }
}

fn play_source(rng: &mut StdRng) -> Source {
    let settings = SourceSettings {
        migration: MigrationId(1),
        vm: VmId(2),
        page_count: PAGES,
        streams: 1,
        connections: 1,
        policy: [Policy::Default, Policy::PostCopy][rng.random_range(0..2)],
        downtime_limit: Duration::from_millis(30),
        proof: [Proof::Full, Proof::Skip][rng.random_range(0..2)],
        hash_bytes_per_s: [0, 3_000_000_000, u64::MAX][rng.random_range(0..3)],
        memory_pages: proto::MemoryPages::Small,
    };
    let (mut source, commands) = Source::start(settings, Moment::default());
    obey_source(&mut source, commands, rng);
    for step in 1..40 {
        let now = Moment(Duration::from_millis(step * rng.random_range(1..400)));
        let event = match rng.random_range(0..12) {
            0 => SourceEvent::Tick,
            1 => SourceEvent::CommitProposed,
            2 => SourceEvent::LinkLost { error: "gone".to_owned() },
            3 if matches!(source.phase(), SourcePhase::CommitProposed { .. }) => {
                SourceEvent::Outcome([Outcome::Committed, Outcome::Aborted][rng.random_range(0..2)])
            }
            _ => SourceEvent::Message(to_source(rng)),
        };
        let commands = source.handle(now, event);
        obey_source(&mut source, commands, rng);
    }
    source
}

fn obey_source(source: &mut Source, commands: Vec<SourceCommand>, rng: &mut StdRng) {
    for command in commands {
        let event = match command {
            SourceCommand::Connect => SourceEvent::Connected,
            SourceCommand::OpenBulk { .. } => SourceEvent::BulkOpened,
            SourceCommand::StartTracking => SourceEvent::TrackingStarted,
            SourceCommand::SendRound { .. } => SourceEvent::RoundSent(Default::default()),
            SourceCommand::FetchDirty => SourceEvent::DirtyFetched {
                pages: rng.random_range(0..PAGES),
                vcpus: vec![
                    VcpuActivity { faults: rng.random(), ..VcpuActivity::default() };
                    rng.random_range(0..3)
                ],
            },
            SourceCommand::ListMissing => SourceEvent::MissingListed(migrate::PageBitmap::new(PAGES)),
            SourceCommand::Pause => SourceEvent::Paused(Default::default()),
            SourceCommand::SaveState => SourceEvent::StateSaved { bytes: 1 },
            SourceCommand::HashMemory(_) => {
                SourceEvent::MemoryHashed(MemoryProof { root: [0; 32], groups: Vec::new() })
            }
            SourceCommand::Resume => SourceEvent::VmResumed,
            SourceCommand::StopTracking => SourceEvent::TrackingStopped,
            _ => continue,
        };
        let more = source.handle(Moment::default(), event);
        obey_source(source, more, rng);
    }
}
