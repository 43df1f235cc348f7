//! Every decoder against what its input can be made to be: valid inputs, mutated from a seed.
//!
//! ```text
//!  corpus ─▶ some mutations ─▶ mend checksums, so that more than the first check is reached ─▶ decoder: must return
//! ```
//! A decoder that panics prints the seed and the input. `FUZZ_SEED` chooses another seed, `FUZZ_RUNS` how many inputs:
//!
//! ```text
//!  FUZZ_SEED=7 FUZZ_RUNS=10000000 cargo test --release -p storage --lib fuzz
//! ```
//! Deliberately absent: coverage. It takes a compiler that this project does not use.

mod targets;

use crate::simulation::random::Random;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Mutations of one input at most: more make rubbish of it.
const MUTATIONS_MAX: u64 = 6;

/// Bytes of an input at most.
const INPUT_BYTES_MAX: usize = 64 << 10;

/// Bytes that are inserted or repeated at once.
const RUN_BYTES_MAX: u64 = 64;

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x1000,
    0xffff,
    1 << 20,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];

/// Returns, whatever the input.
type Decode = Box<dyn Fn(&[u8])>;

/// A decoder.
struct Target {
    name: &'static str,
    /// Valid inputs.
    corpus: Vec<Vec<u8>>,
    /// Makes checksums right again.
    mend: fn(&mut [u8]),
    decode: Decode,
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

impl Target {
    fn run(&self, runs: u64) {
        let seed = number("FUZZ_SEED", 20_261_128);
        let mut random = Random::new(seed);
        self.corpus.iter().for_each(|input| (self.decode)(input));
        for run in 0..number("FUZZ_RUNS", runs) {
            let mut input = random.pick(&self.corpus).clone();
            for _ in 0..=random.below(MUTATIONS_MAX) {
                self.mutate(&mut input, &mut random);
            }
            if random.percent(70) {
                (self.mend)(&mut input);
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.decode)(&input))) {
                let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
                eprintln!("{}: FUZZ_SEED={seed}, input {run}: {hex}", self.name);
                resume_unwind(panic);
            }
        }
    }

    fn mutate(&self, input: &mut Vec<u8>, random: &mut Random) {
        let at = random.below(input.len() as u64 + 1) as usize;
        let run = random.below(RUN_BYTES_MAX) as usize;
        match random.below(8) {
            0 | 1 if at < input.len() => input[at] ^= 1 << random.below(8),
            2 if at < input.len() => input[at] = *random.pick(&EDGES) as u8,
            3 | 4 => put_number(input, at, random),
            5 => {
                let end = (at + run).min(input.len());
                input.drain(at..end);
            }
            6 => {
                let end = (at + run).min(input.len());
                let copy = input[at..end].to_vec();
                input.splice(at..at, copy);
            }
            7 if random.percent(50) => input.truncate(at),
            _ => {
                let other = random.pick(&self.corpus);
                let from = random.below(other.len() as u64 + 1) as usize;
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
        input.truncate(INPUT_BYTES_MAX);
    }
}

/// Puts a number of some width, in either order of bytes, at a place.
fn put_number(input: &mut [u8], at: usize, random: &mut Random) {
    let number = *random.pick(&EDGES);
    let width = *random.pick(&[2, 4, 8]);
    let bytes = if random.percent(50) { number.to_le_bytes() } else { number.to_be_bytes() };
    let bytes = if bytes[0] == 0 { &bytes[8 - width..] } else { &bytes[..width] };
    for (byte, new) in input.iter_mut().skip(at).zip(bytes) {
        *byte = *new;
    }
}

#[test]
fn a_decoder_that_panics_is_found() {
    let reaches = |bytes: &[u8]| assert!(bytes.first() != Some(&0xff) || bytes.len() < 4, "found");
    let target = Target { name: "test", corpus: vec![vec![1; 8]], mend: |_| {}, decode: Box::new(reaches) };
    assert!(catch_unwind(AssertUnwindSafe(|| target.run(10_000))).is_err());
}
