//! What strangers and garbage can do at the port: nothing.

use crate::test_pool::{TestPool, eventually};
use proto::v1::host_service_client::HostServiceClient;
use proto::v1::pool_service_client::PoolServiceClient;
use proto::v1::{CreateJoinTokenRequest, ListHostsRequest, PoolShowRequest};
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;
use tonic::transport::{Channel, Identity};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_silence_at_the_port_hurt_nobody() {
    let pool = TestPool::new(1).await;
    let address = pool.hosts[0].address;
    let mut silent = Vec::new();
    for round in 0_u8..100 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Plain text, half a TLS record, a record that claims more than it may, and plain HTTP/2.
        let garbage: &[u8] = match round % 4 {
            0 => b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
            1 => &[0x16, 3, 1, 0x40, 0, 1, 0, 0, 9, 9],
            2 => &[0xff; 4096],
            _ => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        };
        // The other end may have closed already, which is as good.
        let _ = stream.write_all(garbage).await;
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    pool.change(0, 1).await.unwrap();
    let mut client = PoolServiceClient::new(pool.admin_channel(0).await);
    assert_eq!(client.show(PoolShowRequest {}).await.unwrap().into_inner().name, "test");
    // A connection that never says anything is closed, so that it can't be held for ever.
    let mut first = silent.swap_remove(0);
    let mut byte = [0];
    assert_eq!(first.read(&mut byte).await.unwrap_or(0), 0);
}

/// A TLS connection to the first host, with the user's certificate, on which anything can be sent.
async fn raw_tls(pool: &TestPool) -> tokio_rustls::client::TlsStream<TcpStream> {
    let (key, cert) = pool.ca.issue_user("admin").unwrap();
    let certificate = |pem: &str| rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate(pool.ca.cert_pem())).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate(&cert)], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(pool.hosts[0].address).await.unwrap();
    let name = ServerName::try_from(crate::identity::ANY_HOST).unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_inside_tls_ends_its_connection_only() {
    let pool = TestPool::new(1).await;
    for garbage in [
        &b"no preface at all"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let mut stream = raw_tls(&pool).await;
        stream.write_all(garbage).await.unwrap();
        stream.flush().await.unwrap();
        let mut rest = Vec::new();
        // Closed with or without a farewell.
        let _ = stream.read_to_end(&mut rest).await;
    }
    pool.change(0, 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_certificate_only_health_and_joining_answer() {
    let pool = TestPool::new(1).await;
    let channel = pool.channel(0, None).await;
    let shown = PoolServiceClient::new(channel.clone()).show(PoolShowRequest {}).await.unwrap_err();
    assert_eq!(shown.code(), Code::Unauthenticated, "{shown:?}");
    let mut hosts = HostServiceClient::new(channel.clone());
    let request = CreateJoinTokenRequest { meta: None, ttl_seconds: 0 };
    assert_eq!(hosts.create_join_token(request).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(hosts.list(ListHostsRequest {}).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(hosts.watch(ListHostsRequest {}).await.unwrap_err().code(), Code::Unauthenticated);
    let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.status, tonic_health::ServingStatus::Serving as i32);
    assert!(pool.hosts[0].consensus().local().tokens.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_another_pool_is_none() {
    let pool = TestPool::new(1).await;
    let other = crate::identity::CertificateAuthority::create("test").unwrap();
    let (key, cert) = other.issue_user("admin").unwrap();
    let tls = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(pool.ca.cert_pem()))
        .identity(Identity::from_pem(cert, key))
        .domain_name(crate::identity::ANY_HOST);
    let endpoint = tonic::transport::Endpoint::from_shared(format!("https://{}", pool.hosts[0].address));
    let channel = endpoint.unwrap().tls_config(tls).unwrap().connect_lazy();
    let refused = PoolServiceClient::new(channel).show(PoolShowRequest {}).await.unwrap_err();
    // Refused by TLS: the connection breaks, and no answer of the service ever comes.
    assert!(std::error::Error::source(&refused).is_some(), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_services_can_be_discovered() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
    let pool = TestPool::new(1).await;
    let mut client = ServerReflectionClient::new(pool.admin_channel(0).await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer: ServerReflectionResponse = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["pool.v1.HostService", "pool.v1.VmService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|found| found == name), "{name} lacks in {names:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_sends_the_list_again_when_a_host_joins() {
    let mut pool = TestPool::new(1).await;
    let mut client = HostServiceClient::new(pool.admin_channel(0).await);
    let mut lists = client.watch(ListHostsRequest {}).await.unwrap().into_inner();
    assert_eq!(lists.message().await.unwrap().unwrap().hosts.len(), 1);
    pool.grow().await;
    let mut last = Vec::new();
    while last.len() < 2 || last.iter().any(|host: &proto::v1::Host| host.state != "up") {
        last = lists.message().await.unwrap().unwrap().hosts;
    }
    assert_eq!(last.iter().map(|host| host.name.as_str()).collect::<Vec<_>>(), ["h1", "h2"]);
    eventually("the second is a learner", async || {
        let list =
            HostServiceClient::new(pool.admin_channel(1).await).list(ListHostsRequest {}).await.unwrap();
        list.into_inner().hosts.iter().any(|host| host.role == "learner")
    })
    .await;
}

/// What a call answers to somebody, when the guard in front of the services refuses it: the reason.
async fn refusal(channel: Channel, token: Option<&str>, path: &str) -> Option<String> {
    use prost::Message as _;
    const REFUSALS: [&str; 4] = ["NO_CERTIFICATE", "CERTIFICATE_VOID", "ROLE_TOO_LOW", "HOSTS_ONLY"];
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let mut request = tonic::Request::new(());
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    // Longer than any answer about access; what is allowed may wait for something else.
    request.set_timeout(std::time::Duration::from_millis(500));
    let path = tonic::codegen::http::uri::PathAndQuery::try_from(path).unwrap();
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let status = client.server_streaming(request, path, codec).await.err()?;
    let detail = proto::v1::ErrorDetail::decode(status.details()).unwrap_or_default();
    REFUSALS.contains(&detail.reason.as_str()).then_some(detail.reason)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_is_guarded_at_the_port_for_every_kind_of_caller() {
    use crate::api::access::{Caller, access_of, permits};
    use crate::identity::key_hash_of;
    use pool_state::command::Govern;
    use pool_state::state::Role;
    use rustls::pki_types::CertificateDer;
    let pool = TestPool::new(1).await;
    let consensus = pool.hosts[0].consensus();
    let propose = async |command| consensus.propose(command, crate::test_pool::by_admin()).await.unwrap();
    let host = pool.hosts[0].identity();
    let as_host = Identity::from_pem(&host.cert_pem, &host.key_pem);
    let (key, cert) = pool.ca.issue_user("nobody-knows").unwrap();
    // With the name of the host but another key.
    let (other_key, public) = crate::identity::generate_key().unwrap();
    let imposter = pool.ca.sign_host(pool.hosts[0].id, &public).unwrap();
    let mut callers = vec![
        (Caller::Nobody, pool.channel(0, None).await, None),
        (Caller::Void, pool.channel(0, Some(Identity::from_pem(cert, key))).await, None),
        (Caller::Void, pool.channel(0, Some(Identity::from_pem(imposter, other_key))).await, None),
        (Caller::Void, pool.channel(0, None).await, Some("pooltoken-00ff".to_owned())),
        (Caller::Host, pool.channel(0, Some(as_host)).await, None),
    ];
    for role in Role::ALL {
        let name = format!("a-{}", role.as_str());
        let (key, cert) = pool.ca.issue_user(&name).unwrap();
        let key_hash = key_hash_of(&CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()).unwrap();
        propose(pool_state::Command::CreateUser { name: name.clone(), role, key_hash }).await;
        callers.push((Caller::User(role), pool.channel(0, Some(Identity::from_pem(cert, key))).await, None));
        let secret_hash = *blake3::hash(&[role as u8; 32]).as_bytes();
        let token = Govern::CreateAccessToken { user: name, role, secret_hash, ttl_ms: 3_600_000 };
        propose(pool_state::Command::Govern(token)).await;
        let hex: String = [role as u8; 32].iter().map(|byte| format!("{byte:02x}")).collect();
        callers.push((Caller::User(role), pool.channel(0, None).await, Some(format!("pooltoken-{hex}"))));
    }
    for path in crate::api::access::paths() {
        let access = access_of(&path).unwrap();
        for (caller, channel, token) in &callers {
            // It would change what everybody is known by in the middle of this.
            if path.ends_with("/RotateCa") && permits(access, *caller) {
                continue;
            }
            let refused = refusal(channel.clone(), token.as_deref(), &path).await;
            assert_eq!(refused.is_none(), permits(access, *caller), "{path} by {caller:?}: {refused:?}");
        }
    }
}
