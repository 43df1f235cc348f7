//! Who is who: the pool's CA, the certificates of hosts and users, and their files.
//!
//! Every certificate carries DNS names under `.pool`: hosts `poold.pool` (any host) and `host-<id>.pool` (this one), users
//! `user-<name>.pool`. Hosts renew their certificates themselves ([`IdentityTask`]). A client that wants one particular host demands the second name, so a moved address can't mislead it.

mod authority;
mod files;
mod keep;
mod names;
mod shared;

#[cfg(test)]
mod rotation_tests;

pub use authority::{CaError, CertificateAuthority, generate_key, is_public_key};
pub use files::{HostIdentity, IdentityDir, IdentityError, write_private};
pub use keep::{IdentityTask, KeepError, is_of_ca, shown_chain};
pub use names::{
    ANY_HOST, CertificateName, NameError, fingerprint_of_der, fingerprint_of_pem, host_domain, key_hash_of,
    name_of,
};
pub use shared::SharedIdentity;
