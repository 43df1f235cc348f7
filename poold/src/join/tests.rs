//! Joining over real TLS: what a token is good for, and that a join can be interrupted anywhere.

use super::{JoinError, Joined, join};
use crate::config::HostConfig;
use crate::consensus::Consensus;
use crate::identity::{ANY_HOST, CertificateAuthority};
use crate::test_pool::{TestPool, eventually};
use proto::HostId;
use proto::v1::host_service_client::HostServiceClient;
use proto::v1::{JoinRequest, ListJoinTokensRequest, RevokeJoinTokenRequest};
use tonic::Code;

/// The problems of a refused join, which must be about the token.
fn token_refusal(result: Result<crate::test_pool::TestHost, JoinError>) -> String {
    match result.map(|host| host.id) {
        Err(JoinError::Problems { problems, token_refused: true }) => problems.join("; "),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_lets_one_host_in() {
    let pool = TestPool::new(1).await;
    let token = pool.token(3600).await.encode();
    let joined = pool.join("h2", &token).await.unwrap();
    let problem = token_refusal(pool.join("h3", &token).await);
    assert!(problem.contains("h2"), "{problem}");
    assert_eq!(pool.hosts[0].consensus().local().members().count(), 2);
    assert_ne!(joined.id, pool.hosts[0].id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_revoked_forged_and_foreign_tokens_are_refused() {
    let pool = TestPool::new(1).await;
    let mut admin = HostServiceClient::new(pool.admin_channel(0).await);
    let short = pool.token(1).await;
    eventually("the token expires", async || {
        let tokens =
            admin.clone().list_join_tokens(ListJoinTokensRequest {}).await.unwrap().into_inner().tokens;
        tokens.iter().any(|token| token.state == "expired")
    })
    .await;
    token_refusal(pool.join("h2", &short.encode()).await);

    let revoked = pool.token(3600).await;
    let tokens = admin.list_join_tokens(ListJoinTokensRequest {}).await.unwrap().into_inner().tokens;
    let id = tokens.iter().find(|token| token.state == "unused").unwrap().id;
    admin.revoke_join_token(RevokeJoinTokenRequest { meta: None, id }).await.unwrap();
    token_refusal(pool.join("h2", &revoked.encode()).await);

    let mut forged = pool.token(3600).await;
    forged.secret[0] ^= 1;
    token_refusal(pool.join("h2", &forged.encode()).await);

    let mut foreign = pool.token(3600).await;
    foreign.pool_id = "another".to_owned();
    let problem = token_refusal(pool.join("h2", &foreign.encode()).await);
    assert!(problem.contains("another pool"), "{problem}");

    // The right address, but not the pool whose CA the token names: nothing is sent there.
    let mut elsewhere = pool.token(3600).await;
    elsewhere.ca_fingerprint = "00".repeat(32);
    let result = pool.join("h2", &elsewhere.encode()).await.map(|host| host.id);
    assert!(matches!(result, Err(JoinError::WrongPool { .. })), "{result:?}");
    assert_eq!(pool.hosts[0].consensus().local().members().count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_problems_are_told_at_once() {
    let pool = TestPool::new(1).await;
    let token = pool.token(3600).await;
    let mut client = HostServiceClient::new(pool.channel(0, None).await);
    let request = JoinRequest {
        secret: token.secret_hex(),
        pool_id: token.pool_id.clone(),
        host_name: "h1".to_owned(),
        address: pool.hosts[0].address.to_string(),
        public_key: vec![1; 64],
        feature_level: 0,
        clock_ms: 1,
        cpu_vendor: "AnotherVendor".to_owned(),
        local_problems: vec!["/dev/kvm is missing".to_owned()],
        ..JoinRequest::default()
    };
    let answer = client.preflight_join(request.clone()).await.unwrap().into_inner();
    let all = answer.problems.join("\n");
    for part in ["h1", &request.address, "clock", "feature level", "AnotherVendor", "key", "/dev/kvm"] {
        assert!(all.contains(part), "`{part}` lacks in:\n{all}");
    }
    assert!(answer.problems.len() >= 7, "{all}");
    assert!(!answer.token_refused);
    // Whoever skips the preflight is refused just so, and the token stays good.
    let only_its_key_is_bad = JoinRequest {
        host_name: "h2".to_owned(),
        address: "127.0.0.1:1".to_owned(),
        feature_level: pool_state::features::NEWEST,
        clock_ms: crate::clock::unix_ms(),
        cpu_vendor: super::local_facts().cpu_vendor,
        local_problems: Vec::new(),
        ..request.clone()
    };
    for request in [request, only_its_key_is_bad] {
        let refused = client.join(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    }
    assert_eq!(pool.hosts[0].consensus().local().members().count(), 1);
    pool.join("h2", &token.encode()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_waits_for_a_leader() {
    let mut pool = TestPool::new(3).await;
    let token = pool.token(3600).await.encode();
    let leader = pool.leader().await;
    pool.hosts[leader].kill().await;
    // Right after the leader's death; the token names the other two as well.
    pool.join("h4", &token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_join_is_completed_by_running_it_again() {
    let pool = TestPool::new(1).await;
    let token = pool.token(3600).await.encode();
    let options = || crate::join::JoinOptions {
        listen: "127.0.0.1:7999".parse().unwrap(),
        ..pool.join_options("h2", &token)
    };
    let (first, joined) = join(options()).await.unwrap();
    assert_eq!(joined, Joined::Now);
    let data_dir = pool.data_dir("h2");
    // As if it had died before the last step, and before the one before that.
    for lost in ["poold.toml", "identity/cert.pem", "raft"] {
        std::fs::remove_file(data_dir.join("poold.toml")).unwrap();
        let path = data_dir.join(lost);
        match path.is_dir() {
            true => std::fs::remove_dir_all(path).unwrap(),
            false => std::fs::remove_file(path).unwrap_or_default(),
        }
        let (again, joined) = join(options()).await.unwrap();
        assert_eq!((again, joined), (first.clone(), Joined::Now), "without {lost}");
    }
    let (before, joined) = join(options()).await.unwrap();
    assert_eq!((before, joined), (first.clone(), Joined::Before));
    assert_eq!(pool.hosts[0].consensus().local().members().count(), 2);

    let other = TestPool::new(1).await;
    let mut token = other.token(3600).await;
    token.pool_id = "other".to_owned();
    let result = join(crate::join::JoinOptions { token: token.encode(), ..options() }).await;
    assert!(matches!(result, Err(JoinError::OtherPool { .. })), "{:?}", result.map(|(config, _)| config));
    assert_eq!(HostConfig::load(&data_dir).unwrap(), Some(first));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_interrupted_founding_left_is_not_taken_along() {
    let mut pool = TestPool::new(1).await;
    // A log in which this folder was host 1 of a pool of its own, as `poold init` leaves it when it dies before its last step.
    let data_dir = pool.data_dir("h2");
    std::fs::create_dir_all(&data_dir).unwrap();
    Consensus::create_stores(&data_dir, "never-founded", HostId(1)).await.unwrap();
    pool.grow().await;
    let state = pool.hosts[1].consensus().read_linearizable().await.unwrap();
    assert_eq!(state.members().count(), 2);
}

#[tokio::test]
async fn a_host_that_only_pretends_to_be_the_pool_learns_nothing() {
    use rustls::pki_types::pem::PemObject;
    // It shows the pool's CA certificate, which is public, but its own was signed by another CA.
    let (pool, liar) =
        (CertificateAuthority::create("p").unwrap(), CertificateAuthority::create("p").unwrap());
    let (key, public_key) = crate::identity::generate_key().unwrap();
    let cert = liar.sign_host(HostId(1), &public_key).unwrap();
    let der = |pem: &str| rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![der(&cert), der(pool.cert_pem())],
            rustls::pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        )
        .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let server =
        tokio::spawn(async move { acceptor.accept(listener.accept().await.unwrap().0).await.map(drop) });
    let fingerprint = crate::identity::fingerprint_of_pem(pool.cert_pem()).unwrap();
    let fetched = super::pin::fetch_ca(&address, &fingerprint).await;
    assert!(fetched.is_err(), "{ANY_HOST} was believed");
    assert!(server.await.unwrap().is_err(), "the handshake was completed");
}
