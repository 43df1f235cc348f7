//! The configuration of a volume's process, checked.

use crate::attachment::Attachment;
use crate::request::Refusal;
use crate::spec::{FENCE_EXIT_MS_MAX, check};
use proto::{ListenAddress, v1};
use std::path::PathBuf;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct VolumeSpec {
    pub volume: Attachment,
    pub nbd_listen: Option<ListenAddress>,
    pub fence_exit_ns: u64,
    pub replica_socket: PathBuf,
}

impl VolumeSpec {
    /// Checks a configuration.
    ///
    /// # Errors
    /// The first field that is unusable.
    pub fn from_message(config: &v1::MachineConfig) -> Result<Self, Refusal> {
        let service = config.service.as_ref();
        check(service.is_some(), "service", || "is missing: this is the process of a volume".to_owned())?;
        check(config.vm_id == 0, "vm_id", || "is set: this is the process of a volume".to_owned())?;
        check(config.volumes.len() == 1, "volumes", || format!("has {}, not 1", config.volumes.len()))?;
        check(config.fence_exit_ms <= FENCE_EXIT_MS_MAX, "fence_exit_ms", || {
            format!("{} is more than {FENCE_EXIT_MS_MAX}", config.fence_exit_ms)
        })?;
        let volume = Attachment::from_message(&config.volumes[0])?;
        check(config.epoch == volume.epoch.0, "epoch", || {
            format!("{} is not the volume's {}", config.epoch, volume.epoch)
        })?;
        let listen = service.map(|service| service.nbd_listen.as_str()).filter(|text| !text.is_empty());
        let nbd_listen = listen.map(str::parse).transpose();
        let nbd_listen = nbd_listen.map_err(|error: proto::listen::ParseListenError| Refusal::Invalid {
            field: "service.nbd_listen",
            problem: error.to_string(),
        })?;
        Ok(Self {
            volume,
            nbd_listen,
            fence_exit_ns: config.fence_exit_ms * 1_000_000,
            replica_socket: PathBuf::from(&config.replica_socket),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> v1::MachineConfig {
        v1::MachineConfig {
            volumes: vec![crate::attachment::fixture(3)],
            epoch: 4,
            fence_exit_ms: 500,
            replica_socket: "/run/replica.sock".to_owned(),
            service: Some(v1::VolumeServiceConfig { nbd_listen: "127.0.0.1:0".to_owned() }),
            ..v1::MachineConfig::default()
        }
    }

    #[test]
    fn a_complete_configuration_passes() {
        let spec = VolumeSpec::from_message(&config()).unwrap();
        assert_eq!((spec.volume.volume.0, spec.fence_exit_ns), (3, 500_000_000));
        assert!(spec.nbd_listen.is_some());
    }

    #[test]
    fn each_unusable_field_is_named() {
        type Spoil = fn(&mut v1::MachineConfig);
        let cases: [(&str, Spoil); 6] = [
            ("service", |config| config.service = None),
            ("vm_id", |config| config.vm_id = 7),
            ("volumes", |config| config.volumes.clear()),
            ("fence_exit_ms", |config| config.fence_exit_ms = u64::MAX),
            ("epoch", |config| config.epoch = 3),
            ("service.nbd_listen", |config| {
                config.service = Some(v1::VolumeServiceConfig { nbd_listen: "here".to_owned() });
            }),
        ];
        for (expected, spoil) in cases {
            let mut config = config();
            spoil(&mut config);
            match VolumeSpec::from_message(&config) {
                Err(Refusal::Invalid { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
