//! Network cards as they are configured, and the taps that this process has inherited for them.

use crate::request::Refusal;
use crate::spec::check;
use proto::{MacAddress, v1};
use std::net::Ipv4Addr;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use vmm::Machine;
use vmm::virtio::{Addressing, NetConfig};

/// When a network is told where a card is now, counted from the moment that its cable was put in: at once, and again in case
/// that a bridge was not ready or a frame was lost.
const ANNOUNCE_AFTER_MS: [u64; 5] = [0, 50, 150, 400, 1000];

/// A descriptor on the command line is none.
#[derive(Debug, thiserror::Error)]
#[error("--tap {fd}: {source}; this program is started by poold")]
pub struct TapArgumentError {
    fd: RawFd,
    #[source]
    source: nix::Error,
}

/// Takes over the descriptors that the daemon has left open.
///
/// # Errors
/// One is not open.
pub fn inherited(fds: &[RawFd]) -> Result<Vec<OwnedFd>, TapArgumentError> {
    let take = |fd: &RawFd| {
        // SAFETY: plain numbers.
        let open = unsafe { libc::fcntl(*fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        nix::errno::Errno::result(open).map_err(|source| TapArgumentError { fd: *fd, source })?;
        // SAFETY: open, and named once by the daemon for this process alone.
        Ok(unsafe { OwnedFd::from_raw_fd(*fd) })
    };
    fds.iter().map(take).collect()
}

/// Checks the configuration of a card.
///
/// # Errors
/// A field is unusable.
pub fn from_message(nic: &v1::NicConfig) -> Result<NetConfig, Refusal> {
    let mac = nic.mac.as_slice().try_into().map(MacAddress).map_err(|_| Refusal::Invalid {
        field: "nics.mac",
        problem: format!("{} bytes are no hardware address", nic.mac.len()),
    })?;
    check(mac.0[0] & 1 == 0, "nics.mac", || format!("{mac} is the address of a group"))?;
    if nic.ip.is_empty() {
        return Ok(NetConfig { mac, addressing: None });
    }
    let subnet = nic.subnet.parse().map_err(|_| Refusal::Invalid {
        field: "nics.subnet",
        problem: format!("`{}` is no subnet", nic.subnet),
    })?;
    let gateway = if nic.gateway.is_empty() { None } else { Some(address("nics.gateway", &nic.gateway)?) };
    let dns = nic.dns.iter().map(|server| address("nics.dns", server)).collect::<Result<_, _>>()?;
    let ip = address("nics.ip", &nic.ip)?;
    let host_name = nic.host_name.clone();
    Ok(NetConfig { mac, addressing: Some(Addressing { ip, subnet, gateway, dns, host_name }) })
}

fn address(field: &'static str, text: &str) -> Result<Ipv4Addr, Refusal> {
    let no_address = |_| Refusal::Invalid { field, problem: format!("`{text}` is no IPv4 address") };
    text.parse().map_err(no_address)
}

/// Tells the networks where the machine's cards are now. Must be called within the runtime.
pub fn announce(machine: Arc<Machine>) {
    tokio::spawn(async move {
        let begun = tokio::time::Instant::now();
        for after in ANNOUNCE_AFTER_MS {
            tokio::time::sleep_until(begun + Duration::from_millis(after)).await;
            machine.announce();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic() -> v1::NicConfig {
        v1::NicConfig {
            mac: vec![0x0a, 0, 0, 0, 0, 1],
            ip: "10.7.0.2".to_owned(),
            subnet: "10.7.0.0/24".to_owned(),
            gateway: String::new(),
            dns: vec!["10.7.0.1".to_owned()],
            host_name: "web1".to_owned(),
        }
    }

    #[test]
    fn a_card_is_read_with_and_without_addresses() {
        let addressing = from_message(&nic()).unwrap().addressing.unwrap();
        assert_eq!((addressing.ip, addressing.gateway), (Ipv4Addr::new(10, 7, 0, 2), None));
        let bare = v1::NicConfig { mac: nic().mac, ..v1::NicConfig::default() };
        assert_eq!(from_message(&bare).unwrap().addressing, None);
    }

    #[test]
    fn each_unusable_field_is_named() {
        type Spoil = fn(&mut v1::NicConfig);
        let cases: [(&str, Spoil); 6] = [
            ("nics.mac", |nic| nic.mac = vec![1]),
            ("nics.mac", |nic| nic.mac = vec![0xff; 6]),
            ("nics.ip", |nic| nic.ip = "fd00::1".to_owned()),
            ("nics.subnet", |nic| nic.subnet = "10.7.0.0".to_owned()),
            ("nics.gateway", |nic| nic.gateway = "x".to_owned()),
            ("nics.dns", |nic| nic.dns = vec![String::new()]),
        ];
        for (expected, spoil) in cases {
            let mut nic = nic();
            spoil(&mut nic);
            match from_message(&nic) {
                Err(Refusal::Invalid { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        assert!(inherited(&[1_000_000]).is_err());
    }
}
