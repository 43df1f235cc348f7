//! Tokens with which hosts join, or come with another key.

use super::{Applied, Change, check_length, check_range, check_room, find_mut};
use crate::{
    limits::{PUBLIC_KEY_BYTES_MAX, TOKEN_TTL_MS_MAX, TOKENS_MAX},
    outcome::Outcome,
    rejection::{Field, GovernRejection, ObjectKind, Rejection},
    state::{EventKind, PoolState, Token, TokenState},
};
use proto::{HostId, TokenId};

/// What a token does for whoever shows it with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenUse {
    /// It is good for one use.
    Fresh,
    /// This key redeemed it for the host: the answer was lost.
    Repeated(HostId),
}

impl PoolState {
    /// The token of a secret, whatever it is worth.
    pub(super) fn token_of(&self, secret_hash: &[u8; 32]) -> Result<&Token, Rejection> {
        self.tokens.values().find(|token| token.secret_hash == *secret_hash).ok_or(Rejection::TokenUnknown)
    }

    /// What a token is worth now to whoever shows this key.
    pub(super) fn judge_token(
        &self,
        token: &Token,
        public_key: &[u8],
        now_ms: u64,
    ) -> Result<TokenUse, Rejection> {
        match token.state {
            TokenState::Revoked => Err(Rejection::TokenRevoked),
            TokenState::Used { host }
                if self.hosts.get(&host).is_some_and(|it| it.public_key == public_key) =>
            {
                Ok(TokenUse::Repeated(host))
            }
            TokenState::Used { host } => Err(Rejection::TokenUsed { host: self.host_name(host) }),
            TokenState::Unused if now_ms >= token.expires_ms => Err(Rejection::TokenExpired),
            TokenState::Unused => Ok(TokenUse::Fresh),
        }
    }
}

impl Change<'_> {
    pub(super) fn create_token(&mut self, secret_hash: [u8; 32], ttl_ms: u64) -> Applied {
        self.add_token(secret_hash, ttl_ms, None)
    }

    pub(super) fn create_key_token(&mut self, host: HostId, secret_hash: [u8; 32], ttl_ms: u64) -> Applied {
        self.check_member(host)?;
        self.add_token(secret_hash, ttl_ms, Some(host))
    }

    /// The member shows another key from now on, and whoever shows the old one is nobody.
    pub(super) fn replace_host_key(
        &mut self,
        host: HostId,
        secret_hash: [u8; 32],
        public_key: &[u8],
    ) -> Applied {
        check_length(Field::PublicKey, public_key, PUBLIC_KEY_BYTES_MAX)?;
        let token = self.state.token_of(&secret_hash)?;
        match token.rekeys {
            None => return Err(GovernRejection::TokenAdmits.into()),
            Some(other) if other != host => {
                return Err(GovernRejection::TokenRekeys { host: self.state.host_name(other) }.into());
            }
            Some(_) => self.check_member(host)?,
        }
        if let TokenUse::Repeated(host) = self.state.judge_token(token, public_key, self.time_ms)? {
            return Ok(Outcome::Host(host));
        }
        if let Some(owner) = self.state.hosts.values().find(|host| host.public_key == public_key) {
            return Err(GovernRejection::KeyInUse { host: owner.name.clone() }.into());
        }
        let id = token.id;
        find_mut(&mut self.state.tokens, &id, ObjectKind::Token)?.state = TokenState::Used { host };
        let member = self.host_mut(host)?;
        member.public_key = public_key.to_vec();
        // It has no certificate for this key yet that anybody knows of.
        member.shows_ca = None;
        let object = format!("host {}", member.name);
        self.event(EventKind::HostUp, object, "shows another key from now on; the old one is void".into());
        Ok(Outcome::Host(host))
    }

    fn add_token(&mut self, secret_hash: [u8; 32], ttl_ms: u64, rekeys: Option<HostId>) -> Applied {
        check_range(Field::TokenTtl, ttl_ms, 1, TOKEN_TTL_MS_MAX)?;
        self.forget_dead_tokens();
        check_room(ObjectKind::Token, self.state.tokens.len(), TOKENS_MAX)?;
        let id = TokenId(self.index);
        let expires_ms = self.time_ms.saturating_add(ttl_ms);
        self.state
            .tokens
            .insert(id, Token { id, secret_hash, expires_ms, state: TokenState::Unused, rekeys });
        let purpose = rekeys.map(|host| format!(" for another key of host {}", self.state.host_name(host)));
        let message = format!("created{} by {}", purpose.unwrap_or_default(), self.principal);
        self.event(EventKind::Token, format!("token {id}"), message);
        Ok(Outcome::Token(id))
    }

    pub(super) fn revoke_token(&mut self, id: TokenId) -> Applied {
        let token = find_mut(&mut self.state.tokens, &id, ObjectKind::Token)?;
        match token.state {
            TokenState::Revoked => return Ok(Outcome::Token(id)),
            TokenState::Used { host } => {
                return Err(Rejection::TokenUsed { host: self.state.host_name(host) });
            }
            TokenState::Unused => token.state = TokenState::Revoked,
        }
        self.event(EventKind::Token, format!("token {id}"), format!("revoked by {}", self.principal));
        Ok(Outcome::Token(id))
    }

    /// Makes room when the table is full: tokens that admit nobody any more go.
    fn forget_dead_tokens(&mut self) {
        if self.state.tokens.len() < TOKENS_MAX {
            return;
        }
        let dead: Vec<TokenId> = self
            .state
            .tokens
            .values()
            .filter(|token| match token.state {
                TokenState::Unused => token.expires_ms <= self.time_ms,
                TokenState::Revoked => true,
                TokenState::Used { host } => self.state.hosts.get(&host).is_none_or(|host| !host.is_member()),
            })
            .map(|token| token.id)
            .collect();
        for id in dead {
            self.state.tokens.remove(&id);
        }
    }
}
