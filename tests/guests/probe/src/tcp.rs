//! A TCP server that echoes one connection (RFC 9293, as little of it as a stream needs): bytes in order, one piece in flight,
//! sent again every few turns until it is acknowledged.

/// Bytes in flight, which is also the window: the next piece is taken when the echo of the last one has arrived.
pub const PIECE: usize = 1024;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A segment, without ports and sums.
pub struct Segment<'a> {
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
    pub data: &'a [u8],
}

/// The connection, if there is one.
pub struct Tcp {
    is_open: bool,
    /// Whether the other end has seen our first number.
    is_known: bool,
    next_in: u32,
    /// First number that is not acknowledged.
    first_out: u32,
    piece: [u8; PIECE],
    len: usize,
    starts: u32,
    /// Bytes echoed and acknowledged.
    pub echoed: u64,
}

impl Tcp {
    pub const fn new() -> Self {
        Self {
            is_open: false,
            is_known: false,
            next_in: 0,
            first_out: 0,
            piece: [0; PIECE],
            len: 0,
            starts: 0,
            echoed: 0,
        }
    }

    fn window(&self) -> u16 {
        if self.len == 0 { PIECE as u16 } else { 0 }
    }

    /// What is to be sent, once more or for the first time; none when nothing waits.
    pub fn pending(&self) -> Option<Segment<'_>> {
        if !self.is_open || self.is_known && self.len == 0 {
            return None;
        }
        let flags = if self.is_known { ACK } else { SYN | ACK };
        let data = if self.is_known { &self.piece[..self.len] } else { &[] };
        Some(self.segment(flags, data))
    }

    fn segment<'a>(&self, flags: u8, data: &'a [u8]) -> Segment<'a> {
        Segment { sequence: self.first_out, acknowledged: self.next_in, flags, window: self.window(), data }
    }

    /// Takes a segment; what it calls for at once.
    pub fn receive(&mut self, segment: &Segment<'_>) -> Option<Segment<'_>> {
        if segment.flags & RST != 0 {
            self.is_open = false;
            return None;
        }
        if segment.flags & SYN != 0 {
            if !self.is_open || self.is_known {
                self.starts += 1;
                self.first_out = self.starts << 24;
                self.len = 0;
                (self.is_open, self.is_known) = (true, false);
            }
            self.next_in = segment.sequence.wrapping_add(1);
            return self.pending();
        }
        if !self.is_open {
            return None;
        }
        if segment.flags & ACK != 0 {
            self.acknowledge(segment.acknowledged);
        }
        let is_next = segment.sequence == self.next_in;
        if is_next && self.is_known && self.len == 0 && !segment.data.is_empty() {
            let len = segment.data.len().min(PIECE);
            for at in 0..len {
                self.piece[at] = segment.data[at];
            }
            self.len = len;
            self.next_in = self.next_in.wrapping_add(len as u32);
            return self.pending();
        }
        if is_next && segment.data.is_empty() && segment.flags & FIN != 0 {
            self.next_in = self.next_in.wrapping_add(1);
            self.is_open = false;
            return Some(self.segment(FIN | ACK, &[]));
        }
        // Old or early data, or a question whether the window is still shut: say what is wanted.
        if is_next && segment.data.is_empty() { None } else { Some(self.segment(ACK, &[])) }
    }

    fn acknowledge(&mut self, number: u32) {
        let out = if self.is_known { self.len as u32 } else { 1 };
        let new = number.wrapping_sub(self.first_out);
        if new == 0 || new > out {
            return;
        }
        self.first_out = number;
        if !self.is_known {
            self.is_known = true;
            return;
        }
        let new = new as usize;
        self.echoed += new as u64;
        self.piece.copy_within(new..self.len, 0);
        self.len -= new;
    }

    /// Whether the window was shut until just now.
    pub fn reopens(&self, len_before: usize) -> Option<Segment<'_>> {
        (self.is_open && len_before > 0 && self.len == 0).then(|| self.segment(ACK, &[]))
    }

    /// Bytes that wait for their acknowledgement.
    pub fn waiting(&self) -> usize {
        self.len
    }
}
