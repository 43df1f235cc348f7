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
use tonic::transport::Identity;
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
