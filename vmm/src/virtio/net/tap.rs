//! The host's end of the cable: a tap, which the daemon has made and put on a bridge. It exists as long as this process
//! has it open.
//!
//! Every frame has a virtio header before it, so that sums and segmentation are left to whoever can do them best. With its
//! carrier off the bridge takes the port for unplugged: it forwards nothing and forgets what it learned there.

use nix::errno::Errno;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

/// Bytes of the header before a frame: `virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;

/// Requests of linux/if_tun.h.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETCARRIER: libc::c_ulong = 0x4004_54e2;

/// What the tap may leave to the guest, by the feature with which the guest agrees.
const OFFLOADS: [(u32, libc::c_ulong); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, 1),
    (VIRTIO_NET_F_GUEST_TSO4, 2),
    (VIRTIO_NET_F_GUEST_TSO6, 4),
    (VIRTIO_NET_F_GUEST_ECN, 8),
];

/// Whether the cable is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// Frames go both ways.
    Up,
    /// Nothing goes anywhere.
    Down,
}

/// The cable's end in this process.
pub struct Tap {
    file: File,
}

/// What came of reading.
pub enum Received {
    /// A frame of this many bytes, its header included.
    Frame(usize),
    /// None is there.
    Nothing,
    /// The device is gone: somebody has deleted it.
    Gone,
}

impl Tap {
    /// Takes over an open tap, unplugged.
    ///
    /// # Errors
    /// It is none, or refuses.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let tap = Self { file: File::from(fd) };
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&tap.file, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        let header = i32::try_from(HEADER_BYTES).expect("twelve");
        // SAFETY: an open descriptor; the request reads one number.
        let set = unsafe { libc::ioctl(tap.file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header) };
        Errno::result(set)?;
        tap.set_link(LinkState::Down)?;
        Ok(tap)
    }

    /// Plugs the cable in or out.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_link(&self, state: LinkState) -> io::Result<()> {
        let carrier = libc::c_int::from(state == LinkState::Up);
        // SAFETY: as above.
        let set = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETCARRIER, &raw const carrier) };
        Ok(Errno::result(set).map(drop)?)
    }

    /// Leaves to the guest what it has agreed to do.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let agreed = OFFLOADS.iter().filter(|(feature, _)| features & 1 << feature != 0);
        let flags = agreed.fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: an open descriptor and a plain number.
        let set = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) };
        Ok(Errno::result(set).map(drop)?)
    }

    /// The next frame for the guest, after its header.
    pub fn receive(&self, buffer: &mut [u8]) -> Received {
        loop {
            match (&self.file).read(buffer) {
                Ok(len) if len > HEADER_BYTES => return Received::Frame(len),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Received::Nothing,
                Err(error) => {
                    tracing::error!(%error, "the tap is gone: this card hears nothing more");
                    return Received::Gone;
                }
            }
        }
    }

    /// Sends a frame with its header.
    ///
    /// # Errors
    /// It was not sent: there is no room, its header makes no sense, or the tap is down.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            match (&self.file).write(frame) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
