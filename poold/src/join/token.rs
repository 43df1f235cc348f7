//! The join token: one string with all that a new host needs to find a pool, to recognise it, and to be let in.
//!
//! `pool1-` + hex of (postcard of the fields + 4 bytes of blake3 over it). The checksum tells a typing error from a wrong pool.

use serde::{Deserialize, Serialize};

/// Prefix; the digit is the version of the format.
const PREFIX: &str = "pool1-";
/// Bytes of checksum: enough to notice a slip of the hand.
const CHECKSUM_BYTES: usize = 4;
/// Longest token in characters: 64 addresses with everything else fit in.
const TOKEN_CHARS_MAX: usize = 16 << 10;

/// What is in a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// `IP:PORT` of hosts of the pool.
    pub addresses: Vec<String>,
    /// blake3 of the CA's certificate in DER, hex: by it the new host recognises the pool.
    pub ca_fingerprint: String,
    /// The pool's id.
    pub pool_id: String,
    /// By it the pool recognises the new host; good for one host.
    pub secret: [u8; 32],
}

/// The text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin like one.
    #[error(
        "this is no join token: it must begin with `{PREFIX}`; create one with `poolctl host token create`"
    )]
    NotAToken,
    /// It was cut or changed on its way.
    #[error(
        "the join token is incomplete or mistyped; copy the whole line that `poolctl host token create` printed"
    )]
    Damaged,
}

impl JoinToken {
    /// The string that the operator copies.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut bytes = postcard::to_stdvec(self).expect("strings and bytes can always be written");
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(&sum.as_bytes()[..CHECKSUM_BYTES]);
        let mut text = PREFIX.to_owned();
        text.extend(bytes.iter().map(|byte| format!("{byte:02x}")));
        text
    }

    /// Reads what an operator pasted.
    ///
    /// # Errors
    /// It is no token, or not a whole one.
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        if digits.len() > TOKEN_CHARS_MAX {
            return Err(TokenError::Damaged);
        }
        let bytes = from_hex(digits).ok_or(TokenError::Damaged)?;
        let split = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(TokenError::Damaged)?;
        let (content, sum) = bytes.split_at(split);
        if blake3::hash(content).as_bytes()[..CHECKSUM_BYTES] != *sum {
            return Err(TokenError::Damaged);
        }
        postcard::from_bytes(content).map_err(|_| TokenError::Damaged)
    }

    /// The secret as the API carries it.
    #[must_use]
    pub fn secret_hex(&self) -> String {
        self.secret.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Bytes of a hex text; `None` if it is none.
pub fn from_hex(digits: &str) -> Option<Vec<u8>> {
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let nibble = |digit: u8| char::from(digit).to_digit(16);
    let pairs = digits.as_bytes().chunks_exact(2);
    pairs.map(|pair| u8::try_from(nibble(pair[0])? << 4 | nibble(pair[1])?).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            addresses: vec!["10.0.0.1:7000".to_owned()],
            ca_fingerprint: "ab".repeat(32),
            pool_id: "p".to_owned(),
            secret: [9; 32],
        }
    }

    #[test]
    fn a_token_survives_its_way_through_a_terminal() {
        let text = format!(" {}\n", token().encode());
        assert_eq!(JoinToken::decode(&text), Ok(token()));
    }

    #[test]
    fn damage_is_told_from_garbage() {
        let text = token().encode();
        assert_eq!(JoinToken::decode("hello"), Err(TokenError::NotAToken));
        assert_eq!(JoinToken::decode(""), Err(TokenError::NotAToken));
        for cut in PREFIX.len()..text.len() {
            assert_eq!(JoinToken::decode(&text[..cut]), Err(TokenError::Damaged), "{cut}");
        }
        assert_eq!(JoinToken::decode("pool1-äö"), Err(TokenError::Damaged));
    }
}
