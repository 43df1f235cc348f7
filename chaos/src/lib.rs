//! Chaos: faults on a pool of real processes under load, and checkers that judge what was seen.
//!
//! ```text
//!  seed ─▶ plan ──▶ nemesis ──faults──▶ pool of poold in namespaces ◀──migrations, volumes── workload
//!                      │                        │                                               │
//!                      │            collector: /proc scan, consoles, VM status                  │
//!                      ▼                        ▼                                               ▼
//!                    recorder ◀────────── observations (timeline.jsonl) ────────────────────────┘
//!                      │
//!                      ▼
//!                   checkers (pure, one file per invariant) ─▶ report, exit code
//! ```
//!
//! Always holds: a checker is a pure function over [`observation::Observation`]s and knows nothing of processes, so a
//! simulator can feed it too; each has a test in which it fails.
//! Deliberately absent: knowledge of the daemons' insides; everything is seen from outside.

pub mod attach;
pub mod campaign;
pub mod case;
pub mod checkers;
pub mod collector;
pub mod fault;
pub mod finale;
pub mod injure;
pub mod lanes;
pub mod nbd;
pub mod nemesis;
pub mod observation;
pub mod pace;
pub mod page;
pub mod plan;
pub mod pressure;
pub mod report;
pub mod scenario;
pub mod stamps;
pub mod teeth;
pub mod workload;
