//! Taps: opened by the daemon, held by the VM process.

use crate::supervisor::ProcessKey;
use nix::errno::Errno;
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

/// `_IOW('T', 202, int)` of linux/if_tun.h, and the flags of a tap whose frames have a virtio header and nothing else.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Bytes of an interface's name with its zero, and of the request that it begins.
const NAME_BYTES: usize = 16;
const REQUEST_BYTES: usize = 40;

/// A tap can't be made.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no taps, or the daemon no right to them.
    #[error("/dev/net/tun: {0}; load the module (`modprobe tun`)")]
    Device(io::Error),
    /// The kernel refuses this one.
    #[error("tap {name} can't be made: {source}")]
    Refused {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Numbers that no pool reaches.
    #[error("a tap of {key} has no name of at most 15 bytes")]
    NoName {
        /// Whose.
        key: ProcessKey,
    },
}

/// The name of the tap of a process's card: the same for every daemon that looks for it.
///
/// # Errors
/// It would be too long.
pub fn name(key: ProcessKey, card: usize) -> Result<String, TapError> {
    let name = format!("pv{}-{}-{card}", base36(key.vm.0), base36(key.epoch.0));
    if name.len() < NAME_BYTES { Ok(name) } else { Err(TapError::NoName { key }) }
}

fn base36(mut number: u64) -> String {
    let mut digits = Vec::new();
    loop {
        let digit = u32::try_from(number % 36).expect("below 36");
        digits.push(char::from_digit(digit, 36).expect("a digit of base 36"));
        number /= 36;
        if number == 0 {
            return digits.iter().rev().collect();
        }
    }
}

/// Makes a tap. It is gone when the last one closes the descriptor.
///
/// # Errors
/// The kernel refuses.
pub fn open(name: &str) -> Result<OwnedFd, TapError> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun").map_err(TapError::Device)?;
    let mut request = [0_u8; REQUEST_BYTES];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    request[NAME_BYTES..NAME_BYTES + 2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: an open descriptor, and a buffer as long as the kernel's `struct ifreq`.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    let refused = |errno: Errno| TapError::Refused { name: name.to_owned(), source: errno.into() };
    Errno::result(made).map_err(refused)?;
    Ok(tun.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Epoch, VmId};

    #[test]
    fn names_fit_and_differ() {
        let key = |vm, epoch| ProcessKey { vm: VmId(vm), epoch: Epoch(epoch) };
        assert_eq!(name(key(35, 36), 1).unwrap(), "pvz-10-1");
        assert_ne!(name(key(1, 11), 0).unwrap(), name(key(11, 1), 0).unwrap());
        assert!(name(key(2_000_000_000, 1_000_000), 7).unwrap().len() < NAME_BYTES);
        assert!(name(key(u64::MAX, 1), 0).is_err());
    }
}
