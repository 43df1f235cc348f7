//! The machine under a real KVM with the probe guest.
#![expect(clippy::print_stdout, reason = "measured times are for whoever reads the output")]

mod events;
mod growth;
mod malice;
mod support;

use proto::PageIndex;
use proto::limits::BLOCK_BYTES;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::{BrokenDisk, PATIENCE, RamDisk, Rig, wait};
use vmm::{BlockBackend, BootConfig, BootError, GuestExit, MachineError, MachineState};

const MIB: u64 = 1 << 20;

fn drain(rig: &Rig) {
    assert!(rig.machine.drain(Instant::now() + Duration::from_secs(5)), "requests in flight");
}

fn hashes(rig: &Rig) -> Vec<blake3::Hash> {
    let memory = rig.machine.memory();
    let mut page = [0; BLOCK_BYTES];
    (0..memory.page_count())
        .map(|index| {
            memory.read_pages(PageIndex(index), &mut page).unwrap();
            blake3::hash(&page)
        })
        .collect()
}

#[test]
fn the_probe_boots_works_and_switches_itself_off() {
    let disk = RamDisk::new(8 << 20);
    let rig = Rig::with_probe(64 * MIB, "wss=4M disk=1 turns=5", vec![disk.clone()]);
    let started = Instant::now();
    rig.machine.resume();
    rig.wait_beats(1);
    println!("first beat after {:?}", started.elapsed());
    let exit = rig.exits.recv_timeout(PATIENCE).unwrap();
    assert_eq!(exit, GuestExit::Poweroff, "{}", rig.text());
    assert!(rig.text().contains("PROBE boot disk_counter=0 verified=0 errors=0"), "{}", rig.text());
    assert!(rig.text().contains("beat=5"), "{}", rig.text());
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 5);

    // The next boot finds what the first one wrote.
    let rig = Rig::with_probe(64 * MIB, "wss=4M disk=1 turns=1", vec![disk]);
    rig.machine.resume();
    assert_eq!(rig.exits.recv_timeout(PATIENCE).unwrap(), GuestExit::Poweroff);
    assert!(rig.text().contains("PROBE boot disk_counter=40 verified=40 errors=0"), "{}", rig.text());
}

#[test]
fn the_probe_finds_a_disk_that_lost_a_write() {
    let disk = RamDisk::new(8 << 20);
    let rig = Rig::with_probe(64 * MIB, "wss=1M disk=1 turns=3", vec![disk.clone()]);
    rig.machine.resume();
    rig.exits.recv_timeout(PATIENCE).unwrap();
    let zeroes = bytes::Bytes::from(vec![0; BLOCK_BYTES]);
    disk.write(7 * BLOCK_BYTES as u64, zeroes, Box::new(|result| result.unwrap()));
    let rig = Rig::with_probe(64 * MIB, "wss=1M disk=1 turns=1", vec![disk]);
    rig.machine.resume();
    let exit = rig.exits.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(exit, GuestExit::Crash { .. }), "{}", rig.text());
    assert!(rig.text().contains("PROBE ERROR disk block=7"), "{}", rig.text());
}

#[test]
fn a_failing_disk_reaches_the_guest_as_an_error() {
    let rig = Rig::with_probe(64 * MIB, "wss=1M disk=1 turns=1", vec![Arc::new(BrokenDisk)]);
    rig.machine.resume();
    rig.exits.recv_timeout(PATIENCE).unwrap();
    assert!(rig.text().contains("PROBE ERROR disk recover status=1"), "{}", rig.text());
}

#[test]
fn a_paused_machine_stands_still() {
    let rig = Rig::with_probe(64 * MIB, "wss=8M disk=1", vec![RamDisk::new(8 << 20)]);
    rig.machine.resume();
    rig.wait_beats(2);
    let asked = Instant::now();
    rig.machine.pause().unwrap();
    println!("paused after {:?}", asked.elapsed());
    drain(&rig);
    let (before, console) = (hashes(&rig), rig.console.end());
    assert!(before == hashes(&rig), "memory changed while paused");
    assert_eq!(console, rig.console.end());
    rig.machine.resume();
    rig.wait_beats(1);
    assert!(!rig.text().contains("ERROR"), "{}", rig.text());
}

#[test]
fn a_vcpu_that_rests_uses_little_time_and_stops_at_once() {
    let rig = Rig::with_probe(64 << 20, "wss=1M rate=0 disk=0", vec![]);
    rig.machine.resume();
    rig.wait_beats(1);
    let cpu = || rig.machine.activity()[0].cpu;
    let long = Duration::from_secs(3600);
    rig.machine.rest(0, Instant::now() + long);
    rig.machine.rest(7, Instant::now() + long);
    // The last instructions before the rest.
    wait("the rest", || cpu() == cpu(), || "it runs on".to_owned());
    let (used, begun) = (cpu(), Instant::now());
    wait("a tenth of a second", || begun.elapsed() > Duration::from_millis(100), String::new);
    assert!(cpu() - used < Duration::from_millis(20), "{:?} of 100 ms", cpu() - used);
    // A pause does not wait for its end, and ends it.
    rig.machine.pause().unwrap();
    rig.machine.resume();
    rig.wait_beats(1);
    assert!(cpu() > used);
}

#[test]
fn no_vcpu_runs_past_the_lease() {
    let rig = Rig::with_probe(64 * MIB, "wss=1M", vec![]);
    rig.lease.store(0, Ordering::SeqCst);
    rig.machine.resume();
    // Any instruction of the guest would make its first page resident; the boot code writes its page tables at once.
    let before = hashes(&rig);
    std::thread::park_timeout(Duration::from_millis(200));
    assert!(before == hashes(&rig), "the guest ran without a lease");
    rig.lease.store(u64::MAX, Ordering::SeqCst);
    rig.wait_beats(1);
}

/// Moves a stopped machine with everything it has into a new one.
fn hop(rig: &Rig, memory: u64, disks: Vec<Arc<dyn BlockBackend>>) -> Rig {
    let saving = Instant::now();
    let bytes = rig.machine.save().unwrap().encode().unwrap();
    let saved = saving.elapsed();
    let next = Rig::new(memory, disks);
    let (from, to) = (rig.machine.memory(), next.machine.memory());
    let mut page = [0; BLOCK_BYTES];
    for range in from.resident(PageIndex(0)..PageIndex(from.page_count())).unwrap() {
        for index in range.start.0..range.end.0 {
            from.read_pages(PageIndex(index), &mut page).unwrap();
            to.write_pages(PageIndex(index), &page).unwrap();
        }
    }
    let loading = Instant::now();
    next.machine.load(&MachineState::decode(&bytes).unwrap()).unwrap();
    println!("{} bytes, saved in {saved:?}, loaded in {:?}", bytes.len(), loading.elapsed());
    next
}

#[test]
fn a_machine_goes_on_in_another_one_with_its_memory_and_state() {
    let disk = RamDisk::new(8 << 20);
    let mut rig = Rig::with_probe(96 * MIB, "wss=8M disk=1", vec![disk.clone()]);
    rig.machine.resume();
    for _ in 0..3 {
        rig.wait_beats(2);
        rig.machine.pause().unwrap();
        drain(&rig);
        rig = hop(&rig, 96 * MIB, vec![disk.clone()]);
        rig.machine.resume();
    }
    rig.wait_beats(2);
    let boots = rig.text().matches("PROBE boot").count();
    assert!(!rig.text().contains("ERROR") && boots == 1, "{}", rig.text());
}

#[test]
fn a_hop_does_no_access_to_a_device_twice() {
    // Almost all of its time this guest leaves the machine, once for every byte of its console.
    let mut rig = Rig::with_probe(8 * MIB, "wss=4K disk=0", vec![]);
    rig.machine.resume();
    for _ in 0..30 {
        rig.wait_beats(1);
        rig.machine.pause().unwrap();
        rig = hop(&rig, 8 * MIB, vec![]);
        rig.machine.resume();
    }
    rig.wait_beats(1);
    rig.machine.pause().unwrap();
    let text = rig.text();
    let (_, beats) = text.split_once("verified=0 errors=0\n").expect("it has booted");
    // The last line may not be complete.
    let beats: Vec<_> = beats.lines().take(30).collect();
    for (number, line) in (1..).zip(&beats) {
        let start = format!("PROBE beat={number} pass=");
        assert!(line.starts_with(&start) && line.ends_with(" acked=0 errors=0"), "{line} is not {start}…");
    }
    assert_eq!(beats.len(), 30, "{text}");
}

#[test]
fn a_dirty_bit_stays_until_it_is_cleared_whoever_wrote() {
    let rig = Rig::with_probe(64 * MIB, "wss=4K disk=0", vec![]);
    rig.machine.start_dirty_log().unwrap();
    let fetch = |page: u64| {
        let mut is_dirty = false;
        let merge = |first: PageIndex, words: &[u64]| {
            let at = (page - first.0) as usize;
            is_dirty |= words[at / 64] >> (at % 64) & 1 == 1;
        };
        rig.machine.fetch_dirty(merge).unwrap();
        is_dirty
    };
    let page = 777;
    let word = [1 << (page % 64)];
    let word_start = PageIndex(page / 64 * 64);
    rig.machine.clear_dirty(word_start, &[u64::MAX]).unwrap();
    assert!(!fetch(page));
    // As a device writes: through the mapping, unseen by the kernel.
    let write = || {
        let address = vm_memory::GuestAddress(page * BLOCK_BYTES as u64 + 100);
        vm_memory::Bytes::write_obj(rig.machine.memory().ram(), 1_u64, address).unwrap();
    };
    write();
    assert!(
        fetch(page) && fetch(page),
        "looking has cleared the bit: who looks twice before copying loses the write"
    );
    rig.machine.clear_dirty(PageIndex(page / 64 * 64 + 64), &[u64::MAX]).unwrap();
    rig.machine.clear_dirty(word_start, &[!word[0]]).unwrap();
    assert!(fetch(page), "the bits of other pages were cleared");
    rig.machine.clear_dirty(word_start, &word).unwrap();
    assert!(!fetch(page));
    write();
    assert!(fetch(page));
}

#[test]
fn the_dirty_log_misses_no_write_of_guest_or_device() {
    let rig = Rig::with_probe(64 * MIB, "wss=8M disk=1", vec![RamDisk::new(8 << 20)]);
    rig.machine.resume();
    rig.wait_beats(2);
    rig.machine.pause().unwrap();
    drain(&rig);
    rig.machine.start_dirty_log().unwrap();
    for round in 0..3 {
        let mut all = Vec::new();
        rig.machine.fetch_dirty(|first, words| all.push((first, words.to_vec()))).unwrap();
        for (first, words) in &all {
            rig.machine.clear_dirty(*first, words).unwrap();
        }
        let before = hashes(&rig);
        rig.machine.resume();
        rig.wait_beats(2);
        rig.machine.pause().unwrap();
        drain(&rig);
        let after = hashes(&rig);
        let mut dirty = BTreeSet::new();
        rig.machine
            .fetch_dirty(|first, words| {
                for (at, word) in words.iter().enumerate() {
                    dirty.extend(
                        (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first.0 + at as u64 * 64 + bit),
                    );
                }
            })
            .unwrap();
        let changed: BTreeSet<u64> = (0..)
            .zip(before.iter().zip(&after))
            .filter(|(_, (b, a))| b != a)
            .map(|(index, _)| index)
            .collect();
        assert!(!changed.is_empty());
        let lost: Vec<_> = changed.difference(&dirty).collect();
        assert!(lost.is_empty(), "round {round}: pages {lost:?} changed without a bit");
        let idle = dirty.difference(&changed).count();
        println!(
            "round {round}: {} changed, {} dirty, {idle} written with the same content",
            changed.len(),
            dirty.len()
        );
        assert!(dirty.len() < before.len() / 2, "the log says that everything is dirty");
        // The bits found here are fetched again in the next round: nothing was cleared.
    }
    rig.machine.stop_dirty_log().unwrap();
}

#[test]
fn bad_kernels_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::new(64 * MIB, vec![]);
    let boot = |bytes: &[u8], cmdline: &str| {
        let kernel = dir.path().join("kernel");
        std::fs::write(&kernel, bytes).unwrap();
        rig.machine.boot(&BootConfig { kernel, initrd: None, cmdline: cmdline.to_owned() })
    };
    let not_a_kernel = |result| matches!(result, Err(MachineError::Boot(BootError::NotAKernel { .. })));
    assert!(not_a_kernel(boot(b"", "")));
    assert!(not_a_kernel(boot(&[0; 4096], "")));
    let probe = std::fs::read(support::probe()).unwrap();
    for len in [4, 64, 200, 0x1100] {
        let result = boot(&probe[..len], "");
        assert!(result.is_err(), "{len} bytes of a kernel were accepted");
    }
    let mut linux = vec![0; 0x300];
    linux[0x202..0x206].copy_from_slice(b"HdrS");
    assert!(boot(&linux, "").is_err());
    assert!(matches!(boot(&probe, &"x".repeat(2048)), Err(MachineError::Boot(BootError::Cmdline { .. }))));
    let missing = BootConfig { kernel: "/nonexistent".into(), initrd: None, cmdline: String::new() };
    assert!(matches!(rig.machine.boot(&missing), Err(MachineError::Boot(BootError::Read { .. }))));
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let initrd = dir.path().join("initrd");
    std::fs::File::create(&initrd).unwrap().set_len(80 * MIB).unwrap();
    let rig = Rig::new(64 * MIB, vec![]);
    let config =
        BootConfig { kernel: support::probe().to_owned(), initrd: Some(initrd), cmdline: String::new() };
    let error = rig.machine.boot(&config).unwrap_err();
    assert!(matches!(error, MachineError::Boot(BootError::TooLarge { .. })), "{error}");
}

#[test]
fn dropping_a_running_machine_ends_its_threads() {
    let rig = Rig::with_probe(64 * MIB, "wss=1M disk=1", vec![RamDisk::new(8 << 20)]);
    rig.machine.resume();
    rig.wait_beats(1);
    drop(rig);
    let vcpus = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.starts_with("vcpu")).count()
    };
    // Other tests of this process have vCPUs of their own, but none for ever.
    wait("the vCPU threads to end", || vcpus() == 0, || format!("{} left", vcpus()));
}
