//! Founding the pool, and the brake against false alarms.

use super::{Applied, Change, check_length, check_name};
use crate::{
    command::InitPool,
    limits::{CPU_OVERCOMMIT, PEM_BYTES_MAX, REPLICAS_DEFAULT, SCRUB_BYTES_PER_S, SCRUB_INTERVAL_MS},
    outcome::Outcome,
    rejection::{Field, ObjectKind, Rejection},
    state::{EventKind, FIRST_HOST, Settings},
};

use proto::CpuProfile;

/// Longest pool id in bytes: a UUID with room.
const POOL_ID_BYTES_MAX: usize = 64;

impl Change<'_> {
    pub(super) fn init_pool(&mut self, init: &InitPool) -> Applied {
        if self.state.settings.is_initialised() {
            return Err(Rejection::PoolAlreadyInitialised);
        }
        check_name(ObjectKind::Host, &init.name, std::iter::empty())?;
        check_length(Field::ShortText, init.pool_id.as_bytes(), POOL_ID_BYTES_MAX)?;
        check_length(Field::Pem, init.ca_cert_pem.as_bytes(), PEM_BYTES_MAX)?;
        check_length(Field::Pem, init.ca_key_pem.as_bytes(), PEM_BYTES_MAX)?;
        init.timing.validate().map_err(Rejection::BadTiming)?;
        self.state.settings = Settings {
            pool_id: init.pool_id.clone(),
            name: init.name.clone(),
            timing: init.timing,
            ca_cert_pem: init.ca_cert_pem.clone(),
            ca_key_pem: init.ca_key_pem.clone(),
            feature_level: init.feature_level,
            ha_braked: false,
            ha_disarmed: false,
            old_ca: None,
            replicas_default: REPLICAS_DEFAULT,
            cpu_overcommit: CPU_OVERCOMMIT,
            cpu_profile: CpuProfile::default(),
            scrub_interval_ms: SCRUB_INTERVAL_MS,
            scrub_bytes_per_s: SCRUB_BYTES_PER_S,
        };
        self.event(EventKind::PoolCreated, format!("pool {}", init.name), "the pool was founded".into());
        self.add_host(FIRST_HOST, &init.first_host)?;
        Ok(Outcome::Host(FIRST_HOST))
    }

    pub(super) fn set_brake(&mut self) -> Applied {
        self.change_brake(true, "recovery is halted: more than half of the hosts vanished at once")
    }

    pub(super) fn ha_resume(&mut self) -> Applied {
        self.change_brake(false, "recovery is permitted again")
    }

    pub(super) fn ha_disarm(&mut self) -> Applied {
        self.change_arming(true, "disarmed")
    }

    pub(super) fn ha_arm(&mut self) -> Applied {
        self.change_arming(false, "armed")
    }

    fn change_arming(&mut self, disarmed: bool, word: &str) -> Applied {
        if self.state.settings.ha_disarmed != disarmed {
            self.state.settings.ha_disarmed = disarmed;
            let object = format!("pool {}", self.state.settings.name);
            self.event(EventKind::PoolBrake, object, format!("recovery is {word} by {}", self.principal));
        }
        Ok(Outcome::Done)
    }

    fn change_brake(&mut self, braked: bool, message: &str) -> Applied {
        if self.state.settings.ha_braked != braked {
            self.state.settings.ha_braked = braked;
            let object = format!("pool {}", self.state.settings.name);
            self.event(EventKind::PoolBrake, object, message.into());
        }
        Ok(Outcome::Done)
    }
}
