//! Parameters on the command line; unknown words are skipped.

/// What the guest shall do.
pub struct Params {
    /// Working set in bytes.
    pub working_set: u64,
    /// Write one word of each page instead of two stamps.
    pub light: bool,
    /// Visit the pages all over the place.
    pub scattered: bool,
    /// Walk in the initrd, whose pages are of whatever it is of.
    pub in_initrd: bool,
    /// Bytes of the working set per second; 0: no limit.
    pub rate: u64,
    /// Wait in a loop.
    pub busy: bool,
    /// Whether to use the disk.
    pub disk: bool,
    /// Whether to use the network card.
    pub net: bool,
    /// Who is sent datagrams; zero: nobody.
    pub peer: [u8; 4],
    /// Turns until it powers itself off; 0: never.
    pub turns: u64,
    /// Crash instead.
    pub crash: bool,
    /// Load the disk and do nothing else: 1 with random reads, 2 with random writes; 0: no.
    pub load: u64,
}

impl Params {
    /// Reads them.
    pub fn parse(cmdline: &[u8]) -> Self {
        let mut params = Self {
            working_set: 16 << 20,
            light: false,
            scattered: false,
            in_initrd: false,
            rate: 0,
            busy: false,
            disk: false,
            net: false,
            peer: [0; 4],
            turns: 0,
            crash: false,
            load: 0,
        };
        for word in cmdline.split(|&byte| byte == b' ') {
            let Some(at) = word.iter().position(|&byte| byte == b'=') else { continue };
            let (key, value) = word.split_at(at);
            if key == b"peer" {
                params.peer = address(&value[1..]).unwrap_or_default();
                continue;
            }
            let Some(value) = size(&value[1..]) else { continue };
            match key {
                b"wss" => params.working_set = value,
                b"light" => params.light = value != 0,
                b"scatter" => params.scattered = value != 0,
                b"initrd" => params.in_initrd = value != 0,
                b"rate" => params.rate = value,
                b"busy" => params.busy = value != 0,
                b"disk" => params.disk = value != 0,
                b"net" => params.net = value != 0,
                b"turns" => params.turns = value,
                b"crash" => params.crash = value != 0,
                b"load" => params.load = value,
                _ => {}
            }
        }
        params
    }
}

/// An IPv4 address.
fn address(text: &[u8]) -> Option<[u8; 4]> {
    let mut address = [0; 4];
    let mut parts = text.split(|&byte| byte == b'.');
    for byte in &mut address {
        *byte = u8::try_from(size(parts.next()?)?).ok()?;
    }
    Some(address)
}

/// A number with an optional K, M or G.
fn size(text: &[u8]) -> Option<u64> {
    let (&last, rest) = text.split_last()?;
    let (digits, scale) = match last {
        b'K' => (rest, 10),
        b'M' => (rest, 20),
        b'G' => (rest, 30),
        _ => (text, 0),
    };
    let mut number = 0_u64;
    for digit in digits {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit <= 9)?;
        number = number.checked_mul(10)?.checked_add(u64::from(digit))?;
    }
    (!digits.is_empty()).then_some(number << scale)
}
