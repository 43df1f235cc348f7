//! Join tokens.

use super::{Applied, Change, check_range, check_room, find_mut};
use crate::{
    limits::{TOKEN_TTL_MS_MAX, TOKENS_MAX},
    outcome::Outcome,
    rejection::{Field, ObjectKind, Rejection},
    state::{EventKind, Token, TokenState},
};
use proto::TokenId;

impl Change<'_> {
    pub(super) fn create_token(&mut self, secret_hash: [u8; 32], ttl_ms: u64) -> Applied {
        check_range(Field::TokenTtl, ttl_ms, 1, TOKEN_TTL_MS_MAX)?;
        self.forget_dead_tokens();
        check_room(ObjectKind::Token, self.state.tokens.len(), TOKENS_MAX)?;
        let id = TokenId(self.index);
        let expires_ms = self.time_ms.saturating_add(ttl_ms);
        self.state.tokens.insert(id, Token { id, secret_hash, expires_ms, state: TokenState::Unused });
        self.event(EventKind::Token, format!("token {id}"), format!("created by {}", self.principal));
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
