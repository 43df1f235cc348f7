//! Input that nobody honest makes: whatever a guest, a peer or an image holds, the process goes on.

use crate::support::{self, RamDisk, Rig};
use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use proto::{ByteCount, MacAddress};
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::virtio::net::Tap;
use vmm::virtio::{
    Addressing, BlockDevice, EntropyDevice, Interrupt, LinkState, MmioTransport, NetConfig, NetDevice,
    VirtioDevice,
};
use vmm::{BootConfig, MachineState, Memory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MIB: u64 = 1 << 20;

/// Where the queue lies in these tests.
pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;
pub const ENTRIES: u16 = 16;

/// How far the rings of a card's second queue are from those of its first.
const CARD_QUEUE: u64 = 0x4000;

/// Both sides say from which index on they want to be told.
pub const EVENT_IDX: u32 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// Makes an interface of a descriptor of /dev/net/tun.
const TUNSETIFF: u64 = 0x4004_54ca;

/// Longest that a device may take over a queue full of nonsense.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// As it lies in memory.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.address.to_le_bytes().to_vec();
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.next.to_le_bytes());
        bytes
    }
}

/// Addresses and lengths at every border, and some that are right.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        4 => (0x10_u64..0x300).prop_map(|page| page << 12),
        1 => Just(DESCRIPTORS),
        1 => Just(4 * MIB - 8),
        1 => Just(u64::MAX - 7),
        1 => any::<u64>(),
    ];
    let lengths = [0, 1, 15, 16, 17, 512, 4096, 1 << 20, (1 << 20) + 512, u32::MAX];
    let len = prop_oneof![3 => proptest::sample::select(lengths.to_vec()), 1 => any::<u32>()];
    (address, len, 0_u16..8, 0..2 * ENTRIES).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

pub fn write_register(device: &MmioTransport, offset: u64, value: u64) {
    device.write(offset, &u32::try_from(value).unwrap().to_le_bytes());
}

/// What a driver does before its first request, with these features of the lower half.
pub fn set_up(device: &MmioTransport, features: u32) {
    set_up_queues(device, features, 1);
}

/// The same with several queues, each of them [`CARD_QUEUE`] behind the one before.
fn set_up_queues(device: &MmioTransport, features: u32, queues: u64) {
    write_register(device, 0x70, 3);
    write_register(device, 0x24, 1);
    write_register(device, 0x20, 1);
    write_register(device, 0x24, 0);
    write_register(device, 0x20, features.into());
    write_register(device, 0x70, 11);
    for queue in 0..queues {
        write_register(device, 0x30, queue);
        write_register(device, 0x38, ENTRIES.into());
        for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            write_register(device, register, address + queue * CARD_QUEUE);
            write_register(device, register + 4, 0);
        }
        write_register(device, 0x44, 1);
    }
    write_register(device, 0x70, 15);
}

pub fn devices(memory: &Memory) -> Vec<MmioTransport> {
    let ram = Arc::new(memory.ram().clone());
    let interrupt = || Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let (first, second) = (interrupt(), interrupt());
    let disk = BlockDevice::new(ram.clone(), RamDisk::new(1 << 20), first.clone(), "disk");
    let entropy = EntropyDevice::new(ram, second.clone());
    let both: [(Arc<dyn VirtioDevice>, Interrupt); 2] =
        [(Arc::new(disk), first), (Arc::new(entropy), second)];
    both.into_iter().map(|(device, interrupt)| MmioTransport::new(device, interrupt)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_queue_harms_a_device(
        descriptors in proptest::collection::vec(descriptor(), usize::from(ENTRIES)),
        heads in proptest::collection::vec(0..2 * ENTRIES, usize::from(ENTRIES)),
        index in prop_oneof![4 => 0..=ENTRIES, 1 => any::<u16>()],
        sector in prop_oneof![4 => Just(0_u64), 1 => 2040_u64..2050, 1 => any::<u64>()],
        kind in proptest::sample::select(vec![0_u32, 1, 4, 8, 11, 13, 99]),
        features in proptest::sample::select(vec![0, EVENT_IDX]),
    ) {
        let memory = Memory::new(ByteCount(4 * MIB)).unwrap();
        for device in devices(&memory) {
            let ram = memory.ram();
            for (at, descriptor) in (0_u64..).zip(&descriptors) {
                ram.write_slice(&descriptor.bytes(), GuestAddress(DESCRIPTORS + at * 16)).unwrap();
            }
            // Wherever a chain begins there is a request of this kind.
            for page in 0x10..0x300 {
                ram.write_obj(kind, GuestAddress(page << 12)).unwrap();
                ram.write_obj(sector, GuestAddress((page << 12) + 8)).unwrap();
            }
            // Each chain alone: the first wrong one is the last that a device looks at.
            for head in 0..ENTRIES {
                ram.write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
                ram.write_obj(head, GuestAddress(AVAILABLE + 4)).unwrap();
                set_up(&device, features);
                write_register(&device, 0x50, 0);
                prop_assert!(device.device().drain(Instant::now() + PATIENCE), "a request stays in flight");
                write_register(&device, 0x70, 0);
            }
            ram.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
            for (at, head) in (0_u64..).zip(&heads) {
                ram.write_obj(*head, GuestAddress(AVAILABLE + 4 + at * 2)).unwrap();
            }
            set_up(&device, features);
            let began = Instant::now();
            write_register(&device, 0x50, 0);
            prop_assert!(device.device().drain(began + PATIENCE), "requests stay in flight");
            prop_assert!(began.elapsed() < PATIENCE, "one kick keeps the device for {:?}", began.elapsed());
            // After a reset it works again.
            write_register(&device, 0x70, 0);
            prop_assert!(!device.device().is_broken());
        }
    }

    #[test]
    fn no_register_harms_a_device(
        writes in proptest::collection::vec((0_u64..0x140, any::<u32>(), any::<bool>()), 0..60),
    ) {
        let memory = Memory::new(ByteCount(4 * MIB)).unwrap();
        for device in devices(&memory) {
            for (offset, value, small) in &writes {
                let value = if *small { value % 16 } else { *value };
                device.write(*offset & !3, &value.to_le_bytes());
                let mut out = [0; 4];
                device.read(*offset, &mut out);
            }
            device.restore(&device.save()).ok();
        }
    }
}

/// A card on a tap of a namespace that goes with this thread; none without root.
fn card(memory: &Memory) -> Option<MmioTransport> {
    if !nix::unistd::Uid::effective().is_root() {
        return None;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0_u8; 40];
    request[..2].copy_from_slice(b"t0");
    // IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    request[16..18].copy_from_slice(&0x5002_u16.to_le_bytes());
    // SAFETY: the request is as long as the kernel's, and outlives the call.
    let made = unsafe { nix::libc::ioctl(tap.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    assert!(Command::new("ip").args(["link", "set", "t0", "up"]).status().unwrap().success());
    let fd = || EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupt = Interrupt::new(fd());
    let addressing = Addressing {
        ip: [10, 0, 0, 2].into(),
        subnet: "10.0.0.0/24".parse().unwrap(),
        gateway: None,
        dns: Vec::new(),
        host_name: "card".to_owned(),
    };
    let config = NetConfig { mac: MacAddress([2, 0, 0, 0, 0, 1]), addressing: Some(addressing) };
    let tap = Tap::new(tap.into()).unwrap();
    let device = NetDevice::new(Arc::new(memory.ram().clone()), interrupt.clone(), config, tap, fd());
    device.set_link(LinkState::Up);
    Some(MmioTransport::new(Arc::new(device), interrupt))
}

#[test]
fn no_queue_and_no_register_harms_a_card() {
    let memory = Memory::new(ByteCount(4 * MIB)).unwrap();
    let Some(device) = card(&memory) else { return };
    let ring = || proptest::collection::vec((descriptor(), 0..2 * ENTRIES), usize::from(ENTRIES));
    let index = prop_oneof![4 => 0..=ENTRIES, 1 => any::<u16>()];
    let writes = proptest::collection::vec((0_u64..0x140, 0_u32..32), 0..20);
    let case = ([ring(), ring()], index, any::<u32>(), writes, any::<u8>());
    let mut runner = TestRunner::new(ProptestConfig::with_cases(400));
    let offered = u32::try_from(device.device().features() & u64::from(u32::MAX)).unwrap();
    let looked_at = AtomicU32::new(0);
    let outcome = runner.run(&case, |(rings, index, features, writes, filling)| {
        let ram = memory.ram();
        ram.write_slice(&vec![filling; 0x10_0000], GuestAddress(0x1_0000)).unwrap();
        for (queue, ring) in (0_u64..).zip(&rings) {
            for (at, (descriptor, head)) in (0_u64..).zip(ring) {
                let place = GuestAddress(DESCRIPTORS + queue * CARD_QUEUE + at * 16);
                ram.write_slice(&descriptor.bytes(), place).unwrap();
                ram.write_obj(*head, GuestAddress(AVAILABLE + queue * CARD_QUEUE + 4 + at * 2)).unwrap();
            }
            ram.write_obj(index, GuestAddress(AVAILABLE + queue * CARD_QUEUE + 2)).unwrap();
        }
        // What was not offered is not taken, and the card would never begin.
        set_up_queues(&device, features & offered, 2);
        let began = Instant::now();
        for queue in [1, 0] {
            write_register(&device, 0x50, queue);
        }
        let took = device.device().queue_states().iter().any(|state| state.next_avail > 0);
        looked_at.fetch_add(took.into(), Ordering::Relaxed);
        for (offset, value) in writes {
            device.write(offset & !3, &value.to_le_bytes());
            device.read(offset, &mut [0; 4]);
        }
        prop_assert!(began.elapsed() < PATIENCE, "one kick keeps the card for {:?}", began.elapsed());
        device.restore(&device.save()).ok();
        write_register(&device, 0x70, 0);
        prop_assert!(!device.device().is_broken());
        Ok(())
    });
    outcome.unwrap();
    let looked_at = looked_at.into_inner();
    assert!(looked_at > 20, "the card took something off {looked_at} rings only: the test looks at nothing");
}

/// Bytes of a state or image with some of them changed, or cut.
fn spoilt(bytes: &[u8], seed: u64) -> Vec<u8> {
    let mut draw = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    let mut next = || {
        let mut word = [0; 8];
        draw.fill(&mut word);
        usize::try_from(u64::from_le_bytes(word)).unwrap()
    };
    let mut bytes = bytes.to_vec();
    // Headers matter most: half of the changes are near the start.
    for _ in 0..next() % 4 + 1 {
        let range = if next().is_multiple_of(2) { bytes.len() } else { bytes.len().min(1024) };
        let at = next() % range;
        bytes[at] = [0, 1, 0x7f, 0x80, 0xff, next().to_le_bytes()[0]][next() % 6];
    }
    if next().is_multiple_of(8) {
        bytes.truncate(next() % bytes.len());
    }
    bytes
}

#[test]
fn no_state_harms_the_machine_that_loads_it() {
    let rig = Rig::with_probe(16 * MIB, "wss=4K disk=1", vec![RamDisk::new(8 << 20)]);
    rig.machine.resume();
    rig.wait_beats(1);
    rig.machine.pause().unwrap();
    let good = rig.machine.save().unwrap().encode().unwrap();
    let target = Rig::new(16 * MIB, vec![RamDisk::new(8 << 20)]);
    let mut loaded = 0;
    for seed in 0..3_000 {
        let Ok(state) = MachineState::decode(&spoilt(&good, seed)) else { continue };
        loaded += u32::from(target.machine.load(&state).is_ok());
        assert!(state.encode().is_ok(), "seed {seed}");
    }
    assert!(loaded > 100, "only {loaded} states were still readable: the test looks at nothing");
}

#[test]
fn no_kernel_harms_the_loader() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Memory::new(ByteCount(16 * MIB)).unwrap();
    let mut linux = vec![0x90; 0x8000];
    // A boot protocol header: setup sectors, magic, version, loaded high, and sizes.
    linux[0x1f1] = 4;
    linux[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    linux[0x202..0x206].copy_from_slice(b"HdrS");
    linux[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    linux[0x211] = 1;
    linux[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    let probe = std::fs::read(support::probe()).unwrap();
    for (name, good) in [("linux", &linux), ("probe", &probe)] {
        let kernel = dir.path().join(name);
        let config = BootConfig { kernel: kernel.clone(), initrd: None, cmdline: String::new() };
        std::fs::write(&kernel, good).unwrap();
        vmm::boot::load(&memory, &config).unwrap_or_else(|error| panic!("{name}: {error}"));
        for seed in 0..1_500 {
            std::fs::write(&kernel, spoilt(good, seed)).unwrap();
            drop(vmm::boot::load(&memory, &config));
        }
    }
}
