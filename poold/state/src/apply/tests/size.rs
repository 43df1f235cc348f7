//! What an entry and an object cost; the numbers are printed with `--nocapture`.
#![expect(clippy::print_stdout, reason = "measured numbers are for whoever reads the output")]

use crate::{Command, PoolState, features, fixture::Pool, form, state::HaPolicy};
use std::time::Instant;

const VMS: usize = 2_000;

#[test]
fn a_pool_of_two_thousand_vms_stays_small() {
    let mut pool = Pool::new(4);
    let empty = form::write(&pool.state, features::NEWEST, "test").expect("it is plain data").len();
    let started = Instant::now();
    for number in 0..VMS {
        let name = format!("machine-{number:04}");
        let entry = pool.entry(Command::CreateVolume {
            name: format!("{name}-disk"),
            size: proto::ByteCount(1 << 30),
            replicas: None,
        });
        let index = pool.state.revision + 1;
        pool.state.apply(index, &entry).expect("there is room");
        let entry = pool.entry(pool.create_vm(&name, vec![proto::VolumeId(index)], HaPolicy::Restart));
        pool.state.apply(index + 1, &entry).expect("there is room");
    }
    let create_us = started.elapsed().as_secs_f64() * 1e6 / (2 * VMS) as f64;
    let bytes = form::write(&pool.state, features::NEWEST, "test").expect("it is plain data");

    let vm = pool.state.vms.values().last().expect("there are many").id;
    let started = Instant::now();
    const ROUNDS: usize = 200;
    for _ in 0..ROUNDS {
        for command in
            [Command::StartVm { vm, host: None }, Command::StopVm { vm, mode: crate::state::StopMode::Force }]
        {
            let entry = pool.entry(command);
            pool.state.apply(pool.state.revision + 1, &entry).expect("it fits");
        }
        let reason = crate::command::StopReason::Requested;
        let entry = pool.entry(Command::VmStopped { vm, epoch: pool.epoch(vm), reason });
        pool.state.apply(pool.state.revision + 1, &entry).expect("it fits");
    }
    let run_us = started.elapsed().as_secs_f64() * 1e6 / (3 * ROUNDS) as f64;
    let started = Instant::now();
    let clones: Vec<PoolState> = (0..1_000).map(|_| pool.state.clone()).collect();
    let clone_ns = started.elapsed().as_nanos() / clones.len() as u128;
    let per_vm = (bytes.len() - empty) / VMS;
    println!(
        "{VMS} VMs: {per_vm} bytes each with volume and events, {} in all; create {create_us:.0} µs, start/stop {run_us:.0} µs, clone {clone_ns} ns",
        bytes.len()
    );
    assert!(per_vm < 2_048, "a VM takes {per_vm} bytes");
    let again: PoolState = form::read(&bytes, features::NEWEST).expect("it was just written");
    assert_eq!(again.vms.len(), VMS);
}
