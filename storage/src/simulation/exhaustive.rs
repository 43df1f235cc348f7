//! All sequences of up to three operations, with a loss of power at every step of the disk.
//!
//! What must be true of one replica afterwards: it holds a prefix of what was issued; everything that was told to be durable is in
//! it; so are the snapshots, each as it was when it was taken; and it goes on from there.

use super::disk::SimDisk;
use crate::hashed::HashedBlocks;
use crate::replica::{Checkpoints, Engine, Op, OpKind, Promises, Session, Told};
use crate::types::{Tail, View, VolumeOp};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, SnapshotId, VolumeId};
use std::sync::Arc;

const VOLUME: VolumeId = VolumeId(7);
const EPOCH: Epoch = Epoch(1);

/// Blocks that are looked at: each operation touches two of them.
const BLOCKS: usize = 4;

/// Longest sequence.
const LENGTH: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    /// A write that is durable when it is acknowledged.
    Fua,
    Trim,
    Flush,
    Snapshot,
    /// No operation of a guest: the store makes one whenever it likes.
    Checkpoint,
}

const KINDS: [Kind; 6] = [Kind::Write, Kind::Fua, Kind::Trim, Kind::Flush, Kind::Snapshot, Kind::Checkpoint];

type Blocks = [u8; BLOCKS];

/// What a replica should hold after each operation in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct State {
    blocks: Blocks,
    snapshots: Vec<(SnapshotId, Blocks)>,
}

struct Run {
    engine: Engine<()>,
    session: Session,
    /// After each sequence, from 0.
    states: Vec<State>,
    durable: Sequence,
}

fn open(disk: &SimDisk) -> Result<Engine<()>, String> {
    let (promises, checkpoints) = (Promises::new(disk.clone()), Checkpoints::new(disk.clone()));
    Engine::open(Arc::new(disk.clone()), promises, checkpoints).map_err(|error| error.to_string())
}

impl Run {
    fn new(disk: &SimDisk) -> Self {
        let mut engine = open(disk).unwrap();
        let session = engine.attach(VOLUME, EPOCH, &mut |(), _| {}).unwrap().unwrap().session;
        Self { engine, session, states: vec![State::default()], durable: Sequence(0) }
    }

    /// Does one operation; `false`: the power has gone.
    fn step(&mut self, kind: Kind) -> bool {
        let mut state = self.states.last().cloned().unwrap_or_default();
        let number = self.states.len() as u64;
        let tail = Tail { epoch: EPOCH, sequence: Sequence(number) };
        // Neighbours overlap.
        let first = (number as usize - 1) % (BLOCKS - 1);
        let mut ops = Vec::new();
        match kind {
            Kind::Write | Kind::Fua => {
                let block = BlockIndex(first as u64);
                let content = HashedBlocks::new(VOLUME, block, vec![number as u8; 2 * BLOCK_BYTES].into());
                ops.push(OpKind::Write { tail, first: block, count: 2, content: Some(content) });
                state.blocks[first..first + 2].fill(number as u8);
            }
            Kind::Trim => {
                ops.push(OpKind::Write { tail, first: BlockIndex(first as u64), count: 2, content: None });
                state.blocks[first..first + 2].fill(0);
            }
            Kind::Snapshot => {
                let snapshot = SnapshotId(number);
                ops.push(OpKind::Op { tail, op: VolumeOp::Snapshot { snapshot } });
                state.snapshots.push((snapshot, state.blocks));
            }
            Kind::Flush => {}
            Kind::Checkpoint => return self.engine.checkpoint().is_ok(),
        }
        if !ops.is_empty() {
            self.states.push(state);
        }
        if matches!(kind, Kind::Flush | Kind::Fua) {
            ops.push(OpKind::Flush);
        }
        for kind in ops {
            let op = Op { volume: VOLUME, session: self.session, kind, asker: () };
            let mut durable = self.durable;
            let mut tell = |(), told| durable = durable.max(durable_of(&told));
            let gathered = self.engine.gather(op, &mut tell);
            self.durable = durable;
            if gathered.is_err() {
                return false;
            }
        }
        // A write with its flush is one batch.
        let mut durable = self.durable;
        let done = self.engine.commit(&mut |(), told| durable = durable.max(durable_of(&told)));
        self.durable = durable;
        done.is_ok()
    }
}

fn durable_of(told: &Told) -> Sequence {
    match told {
        Told::Mark(mark) => {
            assert_eq!(mark.refused, None);
            mark.durable
        }
        Told::Done(_) => Sequence(0),
    }
}

fn read(engine: &Engine<()>, view: View) -> Result<Blocks, String> {
    let blocks = BlockIndex(0)..BlockIndex(BLOCKS as u64);
    let read = engine.reader().read(VOLUME, EPOCH, view, blocks).map_err(|error| error.to_string())?;
    let mut held = Blocks::default();
    for (held, block) in held.iter_mut().zip(read) {
        *held = block.map_err(|error| error.to_string())?.data.map_or(0, |data| data[0]);
    }
    Ok(held)
}

/// What must be true after the power is back.
fn check(disk: &SimDisk, states: &[State], durable: Sequence) -> Result<(), String> {
    let mut engine = open(disk)?;
    for again in [false, true] {
        let position = engine.reader().position(VOLUME).0;
        let held = position.tail().sequence;
        if held < durable || position.is_incomplete() {
            return Err(format!("it holds {held}, and {durable} was durable"));
        }
        let expected = states.get(held.0 as usize).ok_or("it holds what was never issued")?;
        let snapshots = engine.reader().lineage(VOLUME).snapshots;
        let snapshots: Result<Vec<_>, String> = snapshots
            .iter()
            .map(|info| Ok((info.snapshot, read(&engine, View::Snapshot(info.snapshot))?)))
            .collect();
        let found = State { blocks: read(&engine, View::Live)?, snapshots: snapshots? };
        if found != *expected {
            return Err(format!("it holds {found:?} at {held}, not {expected:?}"));
        }
        if !again {
            // It goes on, and what it writes then is found too.
            engine.checkpoint().map_err(|error| error.to_string())?;
            engine = open(disk)?;
        }
    }
    Ok(())
}

/// Runs a sequence with a loss of power after each step of the disk; how many there were.
fn run_all_crashes(kinds: &[Kind]) -> u64 {
    let mut steps = 0;
    loop {
        let disk = SimDisk::default();
        let mut run = Run::new(&disk);
        disk.set_fuse(Some(steps));
        let is_done = kinds.iter().all(|kind| run.step(*kind));
        let Run { states, durable, .. } = run;
        // None, all, and all but each one of those that count: devices keep no order between syncs.
        let masks: [&dyn Fn(usize) -> bool; 6] =
            [&|_| false, &|_| true, &|n| n != 0, &|n| n != 1, &|n| n == 1, &|n| n % 2 == 0];
        for (number, is_kept) in masks.iter().enumerate() {
            let disk = disk.fork();
            disk.restore_power(is_kept);
            if let Err(what) = check(&disk, &states, durable) {
                panic!("{kinds:?}, power lost after {steps} steps, mask {number}: {what}");
            }
        }
        if is_done && !disk.has_no_power() {
            return steps;
        }
        steps += 1;
    }
}

#[test]
fn every_short_sequence_survives_a_loss_of_power_at_every_step() {
    let mut sequences = vec![Vec::new()];
    let mut crashes = 0;
    for _ in 0..LENGTH {
        let longer = sequences.iter().flat_map(|sequence: &Vec<Kind>| {
            KINDS.iter().map(move |kind| sequence.iter().copied().chain([*kind]).collect())
        });
        sequences = longer.collect();
        crashes += sequences.iter().map(|sequence| run_all_crashes(sequence)).sum::<u64>();
    }
    assert!(crashes > 1_000, "{crashes} losses of power are hardly all");
}
