//! What governs the pool: settings, feature level, certificate authority, access tokens.
//!
//! ```text
//!            RotateCa                      every member HostTrusts            FinishCaRotation
//!  one CA ─────────────▶ new signs, old trusted ───────────────────▶ (ready) ─────────────────▶ one CA
//! ```

use super::{Applied, Change, check_length, check_name, check_range, check_room, find_mut};
use crate::{
    command::{Govern, NewCa, PoolChange},
    limits::{
        ACCESS_TOKEN_TTL_MS_MAX, ACCESS_TOKENS_MAX, BANDWIDTH_MAX, CPU_OVERCOMMIT_MAX, PEM_BYTES_MAX,
        REPLICAS_MAX, SCRUB_BYTES_PER_S_MIN, SCRUB_INTERVAL_MS_MAX, VERSION_BYTES_MAX,
    },
    outcome::Outcome,
    rejection::{Field, GovernRejection, ObjectKind, Rejection},
    state::{AccessToken, EventKind, OldCa, PoolState, Role},
};
use proto::{ByteCount, HostId, TokenId};

impl PoolState {
    /// The access token with this secret (its blake3), and what it may do now; none: it is void.
    #[must_use]
    pub fn access_token(&self, secret_hash: &[u8; 32], now_ms: u64) -> Option<(&AccessToken, Role)> {
        let known = self.access_tokens.values().find(|token| token.secret_hash == *secret_hash)?;
        let role = self.user(&known.user).ok()?.role?;
        (now_ms < known.expires_ms).then_some((known, known.role.min(role)))
    }

    /// The highest feature level that every member supports; none: there is no member.
    #[must_use]
    pub fn level_supported(&self) -> Option<u32> {
        self.members().map(|host| host.feature_level).min()
    }
}

impl Change<'_> {
    pub(super) fn govern(&mut self, change: &Govern) -> Applied {
        match change {
            Govern::SetHostVersion { host, version, feature_level } => {
                self.set_host_version(*host, version, *feature_level)
            }
            Govern::RaiseFeatureLevel { level } => self.raise_feature_level(*level),
            Govern::SetPool(change) => self.set_pool(change),
            Govern::RotateCa(ca) => self.rotate_ca(ca),
            Govern::HostTrusts { host, ca } => self.host_trusts(*host, *ca),
            Govern::FinishCaRotation => self.finish_ca_rotation(),
            Govern::CreateAccessToken { user, role, secret_hash, ttl_ms } => {
                self.create_access_token(user, *role, *secret_hash, *ttl_ms)
            }
            Govern::DeleteAccessToken { token } => self.delete_access_token(*token),
            Govern::CreateKeyToken { host, secret_hash, ttl_ms } => {
                self.create_key_token(*host, *secret_hash, *ttl_ms)
            }
            Govern::ReplaceHostKey { host, secret_hash, public_key } => {
                self.replace_host_key(*host, *secret_hash, public_key)
            }
            Govern::RefuseRequest => {
                self.state.requests.refuse(self.request_id);
                Ok(Outcome::Done)
            }
        }
    }

    fn pool_event(&mut self, message: String) {
        let object = format!("pool {}", self.state.settings.name);
        self.event(EventKind::PoolChanged, object, message);
    }

    fn set_host_version(&mut self, id: HostId, version: &str, level: u32) -> Applied {
        self.check_member(id)?;
        check_length(Field::ShortText, version.as_bytes(), VERSION_BYTES_MAX)?;
        let pool_level = self.state.settings.feature_level;
        if level < pool_level {
            return Err(Rejection::FeatureLevelTooLow { host_level: level, pool_level });
        }
        let host = self.host_mut(id)?;
        if (host.version.as_str(), host.feature_level) != (version, level) {
            version.clone_into(&mut host.version);
            host.feature_level = level;
            let object = format!("host {}", host.name);
            let message = format!("runs version {version}, which supports feature level {level}");
            self.event(EventKind::HostUp, object, message);
        }
        Ok(Outcome::Host(id))
    }

    fn raise_feature_level(&mut self, level: u32) -> Applied {
        let present = self.state.settings.feature_level;
        if level <= present {
            return Err(GovernRejection::LevelReached { present }.into());
        }
        if let Some(host) = self.state.members().find(|host| host.feature_level < level) {
            let (host, supported) = (host.name.clone(), host.feature_level);
            return Err(GovernRejection::LevelUnsupported { host, supported, level }.into());
        }
        self.state.settings.feature_level = level;
        self.pool_event(format!("every host supports feature level {level}: it is in force"));
        Ok(Outcome::Done)
    }

    fn set_pool(&mut self, change: &PoolChange) -> Applied {
        let mut told = Vec::new();
        if let Some(name) = &change.name {
            check_name(ObjectKind::Pool, name, std::iter::empty())?;
            self.state.settings.name.clone_from(name);
            told.push(format!("name is {name}"));
        }
        if let Some(replicas) = change.replicas_default {
            check_range(Field::Replicas, replicas.into(), 1, REPLICAS_MAX.into())?;
            self.state.settings.replicas_default = replicas;
            told.push(format!("replicas-default is {replicas}"));
        }
        if let Some(factor) = change.cpu_overcommit {
            check_range(Field::CpuOvercommit, factor.into(), 1, CPU_OVERCOMMIT_MAX.into())?;
            self.state.settings.cpu_overcommit = factor;
            told.push(format!("cpu-overcommit is {factor}"));
        }
        if let Some(profile) = change.cpu_profile {
            self.state.settings.cpu_profile = profile;
            told.push(format!("cpu-profile is {profile}"));
        }
        if let Some(ms) = change.scrub_interval_ms {
            check_range(Field::ScrubInterval, ms, 0, SCRUB_INTERVAL_MS_MAX)?;
            self.state.settings.scrub_interval_ms = ms;
            told.push(format!("scrub-interval is {} s", ms / 1000));
        }
        if let Some(rate) = change.scrub_bytes_per_s {
            check_range(Field::Bandwidth, rate, SCRUB_BYTES_PER_S_MIN, BANDWIDTH_MAX)?;
            self.state.settings.scrub_bytes_per_s = rate;
            told.push(format!("scrub-rate is {} per second", ByteCount(rate)));
        }
        self.pool_event(format!("{}, by {}", told.join(", "), self.principal));
        Ok(Outcome::Done)
    }

    fn rotate_ca(&mut self, ca: &NewCa) -> Applied {
        if self.state.settings.old_ca.is_some() {
            return Err(GovernRejection::CaRotationRuns.into());
        }
        for pem in [&ca.cert_pem, &ca.key_pem, &ca.cross_pem] {
            check_length(Field::Pem, pem.as_bytes(), PEM_BYTES_MAX)?;
        }
        let settings = &mut self.state.settings;
        let cert_pem = std::mem::replace(&mut settings.ca_cert_pem, ca.cert_pem.clone());
        settings.ca_key_pem.clone_from(&ca.key_pem);
        settings.old_ca = Some(OldCa { cert_pem, cross_pem: ca.cross_pem.clone() });
        let message = format!("another certificate authority signs from now on, by {}", self.principal);
        self.pool_event(message);
        Ok(Outcome::Done)
    }

    fn host_trusts(&mut self, id: HostId, ca: [u8; 32]) -> Applied {
        self.check_member(id)?;
        self.host_mut(id)?.shows_ca = Some(ca);
        Ok(Outcome::Host(id))
    }

    fn finish_ca_rotation(&mut self) -> Applied {
        if self.state.settings.old_ca.is_none() {
            return Err(GovernRejection::NoCaRotation.into());
        }
        let present = Some(self.state.settings.ca_hash());
        if let Some(host) = self.state.members().find(|host| host.shows_ca != present) {
            return Err(GovernRejection::OldCertificate { host: host.name.clone() }.into());
        }
        self.state.settings.old_ca = None;
        let message = format!("the old certificate authority is trusted no more, by {}", self.principal);
        self.pool_event(message);
        Ok(Outcome::Done)
    }

    fn create_access_token(&mut self, name: &str, role: Role, secret_hash: [u8; 32], ttl_ms: u64) -> Applied {
        let user = self.state.user(name)?;
        check_range(Field::TokenTtl, ttl_ms, 1, ACCESS_TOKEN_TTL_MS_MAX)?;
        if let Some(most) = user.role.filter(|most| role > *most) {
            let (user, role) = (user.name, most.as_str().to_owned());
            return Err(GovernRejection::RoleTooHigh { user, role }.into());
        }
        let now_ms = self.time_ms;
        self.forget_access_tokens(|token| token.expires_ms <= now_ms);
        check_room(ObjectKind::Token, self.state.access_tokens.len(), ACCESS_TOKENS_MAX)?;
        let id = TokenId(self.index);
        let expires_ms = now_ms.saturating_add(ttl_ms);
        let token = AccessToken { id, user: user.name, role, secret_hash, created_ms: now_ms, expires_ms };
        self.state.access_tokens.insert(id, token);
        let message = format!("made for user {name} as {}, by {}", role.as_str(), self.principal);
        self.event(EventKind::Token, format!("access token {id}"), message);
        Ok(Outcome::Token(id))
    }

    fn delete_access_token(&mut self, id: TokenId) -> Applied {
        find_mut(&mut self.state.access_tokens, &id, ObjectKind::Token)?;
        self.state.access_tokens.remove(&id);
        self.event(EventKind::Token, format!("access token {id}"), format!("revoked by {}", self.principal));
        Ok(Outcome::Token(id))
    }

    pub(super) fn forget_access_tokens_of(&mut self, user: &str) {
        self.forget_access_tokens(|token| token.user == user);
    }

    fn forget_access_tokens(&mut self, goes: impl Fn(&AccessToken) -> bool) {
        let gone: Vec<TokenId> =
            self.state.access_tokens.values().filter(|token| goes(token)).map(|token| token.id).collect();
        for id in gone {
            self.state.access_tokens.remove(&id);
        }
    }
}
