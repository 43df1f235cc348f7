//! A polled driver for the first virtio-mmio network card (virtio 1.2, 5.1), and what the guest does with it: it asks for its
//! address (DHCP), answers ARP, UDP and TCP echo requests, and sends its peer numbered datagrams, of which it counts the echoes.
//!
//! ```text
//! PROBE net ip=10.7.0.2                                  the address that it was given
//! PROBE net sent=12 echoed=11 answered=9 stream=2048     after every turn
//! ```

use crate::serial::say;
use crate::tcp::{Segment, Tcp};
use core::ptr;
use core::sync::atomic::{Ordering, fence};

const BASE: u64 = 0xd000_0000;
const WINDOW: u64 = 0x1000;
const WINDOWS: u64 = 19;
const MAGIC: u32 = 0x7472_6976;
const DEVICE_NET: u32 = 1;
const ENTRIES: usize = 8;
const WRITE: u16 = 2;
const SETUP: [u32; 4] = [1, 3, 11, 15];
const FEATURE_MAC: u32 = 1 << 5;
const FEATURE_VERSION_1: u32 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The device's header before each frame.
const HEADER: usize = 12;
/// A frame of an Ethernet without jumbo frames, and its header.
const BUFFER: usize = 2048;
/// Datagrams to the peer in a turn.
const BURST: u64 = 4;
/// Frames taken in a turn: a flood must not keep the guest from its other work.
const FRAMES_PER_TURN: usize = 64;
/// Turns between two requests for an address or a neighbour.
const PATIENCE_TURNS: u64 = 2;

const PORT_ECHO: u16 = 7;
const PORT_OWN: u16 = 4007;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
/// Bytes of a TCP header without options, and of one with the largest segment size.
const TCP: usize = 20;
const TCP_WITH_SIZE: usize = 24;
const PAYLOAD: usize = 16;
/// Where things are in a frame: after Ethernet, IPv4 without options, UDP.
const IP: usize = 14;
const UDP: usize = IP + 20;
const DATA: usize = UDP + 8;

#[repr(C, align(16))]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[repr(C, align(4096))]
struct Ring {
    descriptors: [Descriptor; ENTRIES],
    available: [u16; 4 + ENTRIES],
    padding: [u8; 64],
    used: [u32; 2 + 2 * ENTRIES],
}

impl Ring {
    const EMPTY: Self = Self {
        descriptors: [const { Descriptor { address: 0, len: 0, flags: 0, next: 0 } }; ENTRIES],
        available: [0; 4 + ENTRIES],
        padding: [0; 64],
        used: [0; 2 + 2 * ENTRIES],
    };
}

#[repr(C, align(4096))]
struct Buffers([[u8; BUFFER]; ENTRIES]);

static mut RINGS: [Ring; 2] = [Ring::EMPTY, Ring::EMPTY];
static mut BUFFERS: [Buffers; 2] = [const { Buffers([[0; BUFFER]; ENTRIES]) }; 2];

/// The card and what is known of the network.
pub struct Net {
    base: u64,
    mac: [u8; 6],
    ip: [u8; 4],
    peer: [u8; 4],
    peer_mac: [u8; 6],
    knows_peer: bool,
    /// Entries made available and taken back, by queue.
    issued: [u16; 2],
    taken: [u16; 2],
    turns: u64,
    sent: u64,
    echoed: u64,
    answered: u64,
    tcp: Tcp,
    /// The other end of the connection: hardware address, address, port.
    caller: ([u8; 6], [u8; 4], u16),
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from(bytes[at]) << 8 | u16::from(bytes[at + 1])
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (index, byte) in value.iter().enumerate() {
        bytes[at + index] = *byte;
    }
}

fn is_at(bytes: &[u8], at: usize, value: &[u8]) -> bool {
    value.iter().enumerate().all(|(index, byte)| bytes[at + index] == *byte)
}

fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    put(bytes, at, &value.to_be_bytes());
}

impl Net {
    /// Sets the card up; `None` if there is none.
    pub fn open(peer: [u8; 4]) -> Option<Self> {
        let base = (0..WINDOWS).map(|window| BASE + window * WINDOW).find(|base| {
            // SAFETY: windows without a device read as ones.
            unsafe {
                ptr::read_volatile(*base as *const u32) == MAGIC
                    && ptr::read_volatile((*base + 8) as *const u32) == DEVICE_NET
            }
        })?;
        let mut net = Self {
            base,
            mac: [0; 6],
            ip: [0; 4],
            peer,
            peer_mac: [0; 6],
            knows_peer: false,
            issued: [0; 2],
            taken: [0; 2],
            turns: 0,
            sent: 0,
            echoed: 0,
            answered: 0,
            tcp: Tcp::new(),
            caller: ([0; 6], [0; 4], 0),
        };
        net.write(0x70, 0);
        net.write(0x70, SETUP[0]);
        net.write(0x70, SETUP[1]);
        for (select, features) in [(0, FEATURE_MAC), (1, FEATURE_VERSION_1)] {
            net.write(0x24, select);
            net.write(0x20, features);
        }
        net.write(0x70, SETUP[2]);
        for queue in [RECEIVE, TRANSMIT] {
            net.write(0x30, queue as u32);
            net.write(0x38, ENTRIES as u32);
            // SAFETY: only addresses are taken; the device is not running yet.
            unsafe {
                let ring = &raw mut RINGS[queue];
                net.write_address(0x80, &raw const (*ring).descriptors as u64);
                net.write_address(0x90, &raw const (*ring).available as u64);
                net.write_address(0xa0, &raw const (*ring).used as u64);
                // No interrupts: this driver polls.
                ptr::write_volatile(&raw mut (*ring).available[0], 1);
            }
            net.write(0x44, 1);
        }
        net.write(0x70, SETUP[3]);
        for index in 0..6 {
            // SAFETY: the configuration space of the card.
            net.mac[index] = unsafe { ptr::read_volatile((base + 0x100 + index as u64) as *const u8) };
        }
        for entry in 0..ENTRIES {
            net.give(RECEIVE, entry, BUFFER);
        }
        net.write(0x50, RECEIVE as u32);
        Some(net)
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: a register of the card's window.
        unsafe { ptr::write_volatile((self.base + register) as *mut u32, value) };
    }

    fn write_address(&self, register: u64, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    /// Makes a buffer available to the device.
    fn give(&mut self, queue: usize, entry: usize, len: usize) {
        let flags = if queue == RECEIVE { WRITE } else { 0 };
        // SAFETY: the entry is not the device's at this moment.
        unsafe {
            let ring = &raw mut RINGS[queue];
            let address = &raw const BUFFERS[queue].0[entry] as u64;
            let descriptor = Descriptor { address, len: len as u32, flags, next: 0 };
            ptr::write_volatile(&raw mut (*ring).descriptors[entry], descriptor);
            let slot = 2 + usize::from(self.issued[queue]) % ENTRIES;
            ptr::write_volatile(&raw mut (*ring).available[slot], entry as u16);
            fence(Ordering::SeqCst);
            self.issued[queue] = self.issued[queue].wrapping_add(1);
            ptr::write_volatile(&raw mut (*ring).available[1], self.issued[queue]);
            fence(Ordering::SeqCst);
        }
    }

    /// The next entry that the device has given back, and its bytes.
    fn take(&mut self, queue: usize) -> Option<(usize, usize)> {
        // SAFETY: the used ring is the device's to write and ours to read.
        unsafe {
            let ring = &raw const RINGS[queue];
            if (ptr::read_volatile(&raw const (*ring).used[0]) >> 16) as u16 == self.taken[queue] {
                return None;
            }
            fence(Ordering::SeqCst);
            let slot = 1 + 2 * (usize::from(self.taken[queue]) % ENTRIES);
            let entry = ptr::read_volatile(&raw const (*ring).used[slot]) as usize;
            let len = ptr::read_volatile(&raw const (*ring).used[slot + 1]) as usize;
            self.taken[queue] = self.taken[queue].wrapping_add(1);
            Some((entry % ENTRIES, len.min(BUFFER)))
        }
    }

    /// Sends a frame of `len` bytes that `fill` writes; waits until the device has it.
    fn send(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) {
        let len = len.max(60);
        // SAFETY: one frame is in flight at a time, so the first buffer is ours here.
        let buffer = unsafe { &mut (*(&raw mut BUFFERS[TRANSMIT])).0[0] };
        buffer[..HEADER + len].fill(0);
        fill(&mut buffer[HEADER..HEADER + len]);
        self.give(TRANSMIT, 0, HEADER + len);
        self.write(0x50, TRANSMIT as u32);
        while self.take(TRANSMIT).is_none() {
            core::hint::spin_loop();
        }
    }

    /// One turn: what has come, then what is to be sent.
    pub fn turn(&mut self, errors: &mut u64) {
        for _ in 0..FRAMES_PER_TURN {
            let Some((entry, len)) = self.take(RECEIVE) else { break };
            let mut frame = [0; BUFFER];
            // SAFETY: the device has given the entry back.
            frame.copy_from_slice(unsafe { &(*(&raw const BUFFERS[RECEIVE])).0[entry] });
            self.give(RECEIVE, entry, BUFFER);
            if len > HEADER + IP {
                self.receive(&frame[HEADER..], len - HEADER, errors);
            }
        }
        self.write(0x50, RECEIVE as u32);
        let patient = self.turns % PATIENCE_TURNS != 0;
        self.turns += 1;
        if self.ip == [0; 4] {
            if !patient {
                self.ask_for_address(1, [0; 4]);
            }
        } else if self.peer != [0; 4] && !self.knows_peer {
            if !patient {
                self.arp(1, [0xff; 6], self.peer);
            }
        } else if self.knows_peer {
            for _ in 0..BURST {
                self.sent += 1;
                let mut payload = [0; PAYLOAD];
                put(&mut payload, 0, &self.sent.to_be_bytes());
                put(&mut payload, 8, &(!self.sent).to_be_bytes());
                self.udp((self.peer_mac, self.peer), (PORT_OWN, PORT_ECHO), &payload);
            }
        }
        if !patient && self.tcp.pending().is_some() {
            self.tcp_again();
        }
        let (sent, echoed, answered) = (self.sent, self.echoed, self.answered);
        say!(
            "PROBE net sent=",
            sent,
            " echoed=",
            echoed,
            " answered=",
            answered,
            " stream=",
            self.tcp.echoed
        );
    }

    fn receive(&mut self, frame: &[u8], len: usize, errors: &mut u64) {
        match u16_at(frame, 12) {
            0x0806 => self.receive_arp(frame),
            0x0800 if len >= DATA && frame[IP + 9] == PROTOCOL_UDP => self.receive_udp(frame, len, errors),
            0x0800 if len >= UDP + TCP && frame[IP + 9] == PROTOCOL_TCP => {
                self.receive_tcp(frame, len, errors)
            }
            _ => {}
        }
    }

    fn receive_arp(&mut self, frame: &[u8]) {
        let operation = u16_at(frame, IP + 6);
        if self.ip == [0; 4] || !is_at(frame, IP + 24, &self.ip) {
            return;
        }
        let (mut mac, mut ip) = ([0; 6], [0; 4]);
        mac.copy_from_slice(&frame[IP + 8..IP + 14]);
        ip.copy_from_slice(&frame[IP + 14..IP + 18]);
        if ip == self.peer {
            self.peer_mac = mac;
            self.knows_peer = true;
        }
        if operation == 1 {
            self.arp(2, mac, ip);
        }
    }

    fn receive_udp(&mut self, frame: &[u8], len: usize, errors: &mut u64) {
        let ports = (u16_at(frame, UDP), u16_at(frame, UDP + 2));
        if ports == (67, 68) {
            return self.receive_dhcp(frame, len);
        }
        if !is_at(frame, IP + 16, &self.ip) || len < DATA + PAYLOAD {
            return;
        }
        let mut payload = [0; PAYLOAD];
        payload.copy_from_slice(&frame[DATA..DATA + PAYLOAD]);
        if ports.1 == PORT_ECHO {
            let (mut mac, mut ip) = ([0; 6], [0; 4]);
            mac.copy_from_slice(&frame[6..12]);
            ip.copy_from_slice(&frame[IP + 12..IP + 16]);
            self.answered += 1;
            self.udp((mac, ip), (PORT_ECHO, ports.0), &payload);
        } else if ports == (PORT_ECHO, PORT_OWN) {
            let intact = (0..8).all(|at| payload[at] == !payload[at + 8]);
            if intact {
                self.echoed += 1;
            } else {
                *errors += 1;
                say!("PROBE ERROR net an echo is damaged");
            }
        }
    }

    fn receive_tcp(&mut self, frame: &[u8], len: usize, errors: &mut u64) {
        // An Ethernet frame may be longer than the packet in it.
        let end = (IP + usize::from(u16_at(frame, IP + 2))).min(len);
        let data = UDP + usize::from(frame[UDP + 12] >> 4) * 4;
        if !is_at(frame, IP + 16, &self.ip)
            || u16_at(frame, UDP + 2) != PORT_ECHO
            || data < UDP + TCP
            || data > end
        {
            return;
        }
        if tcp_checksum(&frame[IP..end]) != 0 {
            *errors += 1;
            say!("PROBE ERROR net a segment is damaged");
            return;
        }
        let number = |at: usize| u32::from(u16_at(frame, at)) << 16 | u32::from(u16_at(frame, at + 2));
        let segment = Segment {
            sequence: number(UDP + 4),
            acknowledged: number(UDP + 8),
            flags: frame[UDP + 13],
            window: u16_at(frame, UDP + 14),
            data: &frame[data..end],
        };
        let (mut mac, mut ip) = ([0; 6], [0; 4]);
        mac.copy_from_slice(&frame[6..12]);
        ip.copy_from_slice(&frame[IP + 12..IP + 16]);
        self.caller = (mac, ip, u16_at(frame, UDP));
        let waited = self.tcp.waiting();
        let mut out = [0; BUFFER];
        let len = match self.tcp.receive(&segment) {
            Some(answer) => tcp_segment(&mut out, &answer),
            None => match self.tcp.reopens(waited) {
                Some(answer) => tcp_segment(&mut out, &answer),
                None => return,
            },
        };
        self.send_tcp(&out[..len]);
    }

    /// Sends again what was not acknowledged.
    fn tcp_again(&mut self) {
        let mut out = [0; BUFFER];
        let len = match self.tcp.pending() {
            Some(segment) => tcp_segment(&mut out, &segment),
            None => return,
        };
        self.send_tcp(&out[..len]);
    }

    fn send_tcp(&mut self, segment: &[u8]) {
        let (own_mac, own_ip, (mac, ip, port)) = (self.mac, self.ip, self.caller);
        self.send(UDP + segment.len(), |frame| {
            put(frame, 0, &mac);
            put(frame, 6, &own_mac);
            put(frame, 12, &[8, 0, 0x45, 0]);
            put_u16(frame, IP + 2, (20 + segment.len()) as u16);
            put(frame, IP + 8, &[64, PROTOCOL_TCP]);
            put(frame, IP + 12, &own_ip);
            put(frame, IP + 16, &ip);
            let sum = checksum(&frame[IP..UDP]);
            put_u16(frame, IP + 10, sum);
            put(frame, UDP, segment);
            put_u16(frame, UDP, PORT_ECHO);
            put_u16(frame, UDP + 2, port);
            let sum = tcp_checksum(&frame[IP..UDP + segment.len()]);
            put_u16(frame, UDP + 16, sum);
        });
    }

    fn receive_dhcp(&mut self, frame: &[u8], len: usize) {
        const OPTIONS: usize = DATA + 240;
        let mut given = [0; 4];
        given.copy_from_slice(&frame[DATA + 16..DATA + 20]);
        let (mut kind, mut at) = (0, OPTIONS);
        while at + 2 < len && frame[at] != 255 {
            if frame[at] == 53 {
                kind = frame[at + 2];
            }
            at += 2 + usize::from(frame[at + 1]);
        }
        match kind {
            2 => self.ask_for_address(3, given),
            5 => {
                self.ip = given;
                let [a, b, c, d] = given.map(u64::from);
                say!("PROBE net ip=", a, ".", b, ".", c, ".", d);
            }
            _ => {}
        }
    }

    fn ask_for_address(&mut self, kind: u8, wanted: [u8; 4]) {
        let mac = self.mac;
        let mut message = [0; 256];
        put(&mut message, 0, &[1, 1, 6, 0, 0x70, 0x72, 0x6f, 0x62]);
        put(&mut message, 28, &mac);
        put(&mut message, 236, &[99, 130, 83, 99, 53, 1, kind, 50, 4]);
        put(&mut message, 245, &wanted);
        message[249] = 255;
        if kind == 1 {
            // Without the option of a wanted address.
            message[243] = 255;
        }
        let ip = self.ip;
        self.ip = [0; 4];
        self.udp(([0xff; 6], [0xff; 4]), (68, 67), &message);
        self.ip = ip;
    }

    fn arp(&mut self, operation: u16, to: [u8; 6], ip: [u8; 4]) {
        let (own_mac, own_ip) = (self.mac, self.ip);
        self.send(IP + 28, |frame| {
            put(frame, 0, &to);
            put(frame, 6, &own_mac);
            put(frame, 12, &[8, 6, 0, 1, 8, 0, 6, 4]);
            put_u16(frame, IP + 6, operation);
            put(frame, IP + 8, &own_mac);
            put(frame, IP + 14, &own_ip);
            put(frame, IP + 18, if operation == 1 { &[0; 6] } else { &to });
            put(frame, IP + 24, &ip);
        });
    }

    fn udp(&mut self, (mac, ip): ([u8; 6], [u8; 4]), ports: (u16, u16), payload: &[u8]) {
        let (own_mac, own_ip) = (self.mac, self.ip);
        self.send(DATA + payload.len(), |frame| {
            put(frame, 0, &mac);
            put(frame, 6, &own_mac);
            put(frame, 12, &[8, 0, 0x45, 0]);
            put_u16(frame, IP + 2, (28 + payload.len()) as u16);
            put(frame, IP + 8, &[64, 17]);
            put(frame, IP + 12, &own_ip);
            put(frame, IP + 16, &ip);
            let sum = checksum(&frame[IP..UDP]);
            put_u16(frame, IP + 10, sum);
            put_u16(frame, UDP, ports.0);
            put_u16(frame, UDP + 2, ports.1);
            put_u16(frame, UDP + 4, (8 + payload.len()) as u16);
            put(frame, DATA, payload);
        });
    }
}

/// A segment with its header, but for ports and sum; its length.
fn tcp_segment(out: &mut [u8], segment: &Segment<'_>) -> usize {
    const SYN: u8 = 2;
    let header = if segment.flags & SYN != 0 { TCP_WITH_SIZE } else { TCP };
    put(out, 4, &segment.sequence.to_be_bytes());
    put(out, 8, &segment.acknowledged.to_be_bytes());
    put(out, 12, &[(header as u8 / 4) << 4, segment.flags]);
    put_u16(out, 14, segment.window);
    if header > TCP {
        put(out, TCP, &[2, 4]);
        put_u16(out, TCP + 2, crate::tcp::PIECE as u16);
    }
    put(out, header, segment.data);
    header + segment.data.len()
}

fn checksum(header: &[u8]) -> u16 {
    folded(sum_of(header))
}

/// The sum of a TCP segment in an IPv4 packet without options: zero when it is right.
fn tcp_checksum(packet: &[u8]) -> u16 {
    let pseudo = u32::from(PROTOCOL_TCP) + (packet.len() - 20) as u32;
    folded(pseudo + sum_of(&packet[12..]))
}

fn sum_of(bytes: &[u8]) -> u32 {
    let mut sum = 0_u32;
    for pair in 0..bytes.len() / 2 {
        sum += u32::from(u16_at(bytes, pair * 2));
    }
    if bytes.len() % 2 == 1 {
        sum += u32::from(bytes[bytes.len() - 1]) << 8;
    }
    sum
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
