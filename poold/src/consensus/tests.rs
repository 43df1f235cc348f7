//! openraft's own storage suite, and restarts.

use super::log_store::LogStore;
use super::state_store::StateStore;
use super::{Consensus, ProposeMeta, StartOptions, TypeConfig};
use crate::identity::{CertificateAuthority, HostIdentity, generate_key};
use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};
use pool_state::command::{HostFacts, InitPool};
use pool_state::state::FIRST_HOST;
use pool_state::{Command, Timing};
use proto::ByteCount;
use std::path::Path;
use tempfile::TempDir;

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateStore, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateStore), StorageError<u64>> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let log = LogStore::open(&dir.path().join("raft")).expect("a fresh log opens");
        let (state, _) = StateStore::open(&dir.path().join("snapshots")).expect("a fresh store opens");
        Ok((dir, log, state))
    }
}

#[test]
fn the_stores_pass_the_suite_of_openraft() {
    Suite::test_all(Builder).unwrap();
}

fn identity(ca: &CertificateAuthority) -> (HostIdentity, Vec<u8>) {
    let (key_pem, public_key) = generate_key().unwrap();
    let cert_pem = ca.sign_host(FIRST_HOST, &public_key).unwrap();
    (HostIdentity { ca_pem: ca.cert_pem().to_owned(), cert_pem, key_pem }, public_key)
}

async fn start(dir: &Path, identity: HostIdentity) -> Consensus {
    let options = StartOptions { data_dir: dir, host: FIRST_HOST, timing: Timing::fast(), identity };
    Consensus::start(options).await.unwrap()
}

fn founding(ca: &CertificateAuthority, public_key: Vec<u8>) -> Command {
    Command::InitPool(Box::new(InitPool {
        pool_id: "pool".to_owned(),
        name: "p".to_owned(),
        timing: Timing::fast(),
        ca_cert_pem: ca.cert_pem().to_owned(),
        ca_key_pem: ca.key_pem().to_owned(),
        feature_level: 1,
        first_host: HostFacts {
            name: "h1".to_owned(),
            address: "127.0.0.1:1".to_owned(),
            public_key,
            cpu_vendor: "v".to_owned(),
            vm_memory: ByteCount(1 << 30),
            feature_level: 1,
        },
    }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::create("p").unwrap();
    let (identity, public_key) = identity(&ca);
    let consensus = start(dir.path(), identity.clone()).await;
    consensus.found("127.0.0.1:1").await.unwrap();
    let meta = || ProposeMeta { request_id: None, principal: "user-admin".to_owned() };
    consensus.propose(founding(&ca, public_key), meta()).await.unwrap();
    let token = Command::CreateToken { secret_hash: [3; 32], ttl_ms: 60_000 };
    let (index, _) = consensus.propose(token, meta()).await.unwrap();
    consensus.shutdown().await;
    drop(consensus);

    let consensus = start(dir.path(), identity).await;
    let state = consensus.read_linearizable().await.unwrap();
    assert!(state.revision >= index);
    assert_eq!(state.tokens.values().next().map(|token| token.secret_hash), Some([3; 32]));
    consensus.shutdown().await;
}
