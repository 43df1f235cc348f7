//! Rings that a driver would make, and rings that nobody honest makes.

use super::*;
use crate::memory::Memory;
use proptest::prelude::*;
use proto::ByteCount;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const ENTRIES: u16 = 16;
const BUFFERS: u64 = 0x1_0000;
const WRITE: u16 = 2;

struct Rig {
    ram: Arc<GuestRam>,
    queue: Queue,
    available: u16,
}

impl Rig {
    fn new() -> Self {
        let memory = Memory::new(ByteCount(4 << 20)).unwrap();
        let mut queue = Queue::new(ENTRIES).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        Self { ram: Arc::new(memory.ram().clone()), queue, available: 0 }
    }

    fn describe(&self, entry: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(DESCRIPTORS + u64::from(entry) * 16);
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.ram.write_slice(&bytes, at).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % ENTRIES);
        self.ram.write_obj(head, GuestAddress(AVAILABLE + 4 + slot * 2)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.ram.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    /// Gives the device buffers for frames.
    fn buffers(&mut self, lens: &[u32]) {
        for (entry, len) in (0..).zip(lens) {
            self.describe(entry, BUFFERS + u64::from(entry) * 0x1000, *len, WRITE, 0);
            self.offer(entry);
        }
    }

    /// The used ring: index, and elements up to it.
    fn used(&self) -> Vec<(u32, u32)> {
        let index: u16 = self.ram.read_obj(GuestAddress(USED + 2)).unwrap();
        let element =
            |at: u16| self.ram.read_obj::<[u32; 2]>(GuestAddress(USED + 4 + u64::from(at) * 8)).unwrap();
        (0..index).map(|at| element(at).into()).collect()
    }

    fn deliver(&mut self, frame: &mut [u8], merge: bool) -> Result<Delivered, QueueError> {
        deliver(&mut self.queue, &self.ram, frame, merge, &mut Signal::default())
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs_and_says_how_many() {
    let mut rig = Rig::new();
    rig.buffers(&[100, 100, 100, 100]);
    let mut sent = frame(250);
    assert_eq!(rig.deliver(&mut sent, true).unwrap(), Delivered::Whole);
    assert_eq!(rig.used(), [(0, 100), (1, 100), (2, 50)]);
    let mut got = Vec::new();
    for (entry, len) in rig.used() {
        let mut part = vec![0; len as usize];
        rig.ram.read_slice(&mut part, GuestAddress(BUFFERS + u64::from(entry) * 0x1000)).unwrap();
        got.extend(part);
    }
    assert_eq!(got[BUFFERS_OFFSET..HEADER_BYTES], 3_u16.to_le_bytes());
    assert_eq!(got[HEADER_BYTES..], frame(250)[HEADER_BYTES..]);
}

#[test]
fn without_room_nothing_is_taken_and_later_all_arrives() {
    let mut rig = Rig::new();
    rig.buffers(&[100, 100]);
    assert_eq!(rig.deliver(&mut frame(250), true).unwrap(), Delivered::NoRoom);
    assert_eq!((rig.queue.next_avail(), rig.used().len()), (0, 0));
    rig.describe(2, BUFFERS + 0x2000, 100, WRITE, 0);
    rig.offer(2);
    assert_eq!(rig.deliver(&mut frame(250), true).unwrap(), Delivered::Whole);
    assert_eq!(rig.used().len(), 3);
}

#[test]
fn what_never_fits_is_lost_and_stops_nothing() {
    let mut rig = Rig::new();
    rig.buffers(&[100, 100]);
    assert_eq!(rig.deliver(&mut frame(250), false).unwrap(), Delivered::TooLarge);
    assert_eq!(rig.deliver(&mut frame(90), false).unwrap(), Delivered::Whole);
    let mut rig = Rig::new();
    rig.buffers(&[1; ENTRIES as usize]);
    assert_eq!(rig.deliver(&mut frame(250), true).unwrap(), Delivered::TooLarge);
    let mut rig = Rig::new();
    rig.buffers(&[0]);
    assert!(matches!(rig.deliver(&mut frame(250), true), Err(QueueError::EmptyBuffer)));
}

#[test]
fn frames_to_send_are_taken_whole_and_torn_ones_given_back() {
    let mut rig = Rig::new();
    rig.ram.write_slice(&frame(300), GuestAddress(BUFFERS)).unwrap();
    // In two pieces, then one that holds no more than a header, then one that is too long.
    rig.describe(0, BUFFERS, 200, 1, 1);
    rig.describe(1, BUFFERS + 200, 100, 0, 0);
    rig.describe(2, BUFFERS, 12, 0, 0);
    rig.describe(3, BUFFERS, 1 << 20, 0, 0);
    [0, 2, 3].into_iter().for_each(|head| rig.offer(head));
    let (mut taken, mut signal) = (Vec::new(), Signal::default());
    let mut next =
        |rig: &mut Rig, taken: &mut Vec<u8>| take(&mut rig.queue, &rig.ram, taken, &mut signal).unwrap();
    assert_eq!(next(&mut rig, &mut taken), Taken::Frame);
    assert_eq!(taken, frame(300));
    assert_eq!([next(&mut rig, &mut taken), next(&mut rig, &mut taken)], [Taken::Unusable; 2]);
    assert_eq!(next(&mut rig, &mut taken), Taken::Nothing);
    assert_eq!(rig.used(), [(0, 0), (2, 0), (3, 0)]);
}

fn border() -> impl Strategy<Value = (u64, u32)> {
    let address = prop_oneof![
        4 => (0x10_u64..0x300).prop_map(|page| page << 12),
        1 => Just(DESCRIPTORS),
        1 => Just((4 << 20) - 8),
        1 => any::<u64>(),
    ];
    let lengths = vec![0, 1, 11, 12, 13, 1514, 65_563, 65_565, 65_566, 1 << 20, u32::MAX];
    (address, proptest::sample::select(lengths))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_ring_harms_the_device(
        descriptors in proptest::collection::vec((border(), 0_u16..8, 0..2 * ENTRIES), usize::from(ENTRIES)),
        heads in proptest::collection::vec(0..2 * ENTRIES, usize::from(ENTRIES)),
        index in prop_oneof![4 => 0..=ENTRIES, 1 => any::<u16>()],
        event_idx: bool,
        merge: bool,
        len in 13_usize..FRAME_BYTES_MAX,
    ) {
        for sends in [false, true] {
            let mut rig = Rig::new();
            rig.queue.set_event_idx(event_idx);
            for (entry, ((address, len), flags, next)) in (0..).zip(&descriptors) {
                rig.describe(entry, *address, *len, *flags, *next);
            }
            heads.iter().for_each(|head| rig.offer(*head));
            rig.ram.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
            let mut signal = Signal::default();
            let mut buffer = frame(len);
            // As the device does: until it is broken or nothing is left.
            for _ in 0..2 * ENTRIES {
                let goes_on = if sends {
                    take(&mut rig.queue, &rig.ram, &mut buffer, &mut signal).map(|taken| taken != Taken::Nothing)
                } else {
                    deliver(&mut rig.queue, &rig.ram, &mut buffer, merge, &mut signal)
                        .map(|delivered| delivered != Delivered::NoRoom)
                };
                if !goes_on.unwrap_or(false) {
                    break;
                }
            }
            let _ = signal.is_wanted(&mut rig.queue, &rig.ram);
        }
    }
}
