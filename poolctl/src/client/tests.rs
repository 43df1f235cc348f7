//! The client against servers in this process, with real TLS.

use super::*;
use proto::v1::{
    self, HaResumeRequest, Pool, PoolShowRequest,
    pool_service_client::PoolServiceClient,
    pool_service_server::{PoolService, PoolServiceServer},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::{path::PathBuf, sync::Arc};
use tokio::net::TcpListener;
use tonic::{
    Request,
    transport::{Certificate, Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

/// A CA as a pool has one.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Certificate and key for a name.
    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

/// What a host of these tests does with each call.
#[derive(Clone)]
struct Host {
    /// Refuses with this; else answers.
    refusal: Option<fn() -> Status>,
    /// Request ids that it got, of all hosts of the test.
    seen: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl PoolService for Host {
    async fn show(&self, _: Request<PoolShowRequest>) -> Result<Response<Pool>, Status> {
        self.answer()
    }

    async fn ha_resume(&self, request: Request<HaResumeRequest>) -> Result<Response<Pool>, Status> {
        let id = request.into_inner().meta.unwrap_or_default().request_id;
        self.seen.lock().unwrap().push(id);
        self.answer()
    }

    // What no test of the client calls.

    type BackupStream = tokio_stream::Empty<Result<v1::BackupChunk, Status>>;

    async fn ha_arm(&self, _: Request<v1::HaArmRequest>) -> Result<Response<Pool>, Status> {
        Err(unused())
    }

    async fn ha_plan(&self, _: Request<v1::HaPlanRequest>) -> Result<Response<v1::HaPlanResponse>, Status> {
        Err(unused())
    }

    async fn balance_plan(
        &self,
        _: Request<v1::BalancePlanRequest>,
    ) -> Result<Response<v1::BalancePlanResponse>, Status> {
        Err(unused())
    }

    async fn balance_run(&self, _: Request<v1::BalanceRunRequest>) -> Result<Response<v1::Task>, Status> {
        Err(unused())
    }

    async fn set(&self, _: Request<v1::PoolSetRequest>) -> Result<Response<Pool>, Status> {
        Err(unused())
    }

    async fn rotate_ca(&self, _: Request<v1::RotateCaRequest>) -> Result<Response<Pool>, Status> {
        Err(unused())
    }

    async fn finish_ca(&self, _: Request<v1::FinishCaRequest>) -> Result<Response<Pool>, Status> {
        Err(unused())
    }

    async fn backup(&self, _: Request<v1::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        Err(unused())
    }
}

fn unused() -> Status {
    Status::unimplemented("not in this test")
}

impl Host {
    fn answer(&self) -> Result<Response<Pool>, Status> {
        match self.refusal {
            Some(refusal) => Err(refusal()),
            None => Ok(Response::new(Pool { name: "lab".into(), ..Default::default() })),
        }
    }
}

struct Lab {
    dir: tempfile::TempDir,
    authority: Authority,
    seen: Arc<Mutex<Vec<String>>>,
    addresses: Vec<SocketAddr>,
}

impl Lab {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            authority: Authority::new(),
            seen: Arc::default(),
            addresses: Vec::new(),
        }
    }

    async fn add_host(&mut self, refusal: Option<fn() -> Status>) {
        let (certificate, key) = self.authority.issue("poold.pool");
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(certificate, key))
            .client_ca_root(Certificate::from_pem(self.authority.0.pem()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.addresses.push(listener.local_addr().unwrap());
        let service = PoolServiceServer::new(Host { refusal, seen: Arc::clone(&self.seen) });
        let server = Server::builder().tls_config(tls).unwrap().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    }

    /// A port at which nothing listens.
    fn add_dead(&mut self) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        self.addresses.push(listener.local_addr().unwrap());
    }

    /// A host that takes connections and then says nothing, as one does that is stopped.
    async fn add_hung(&mut self) -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.addresses.push(listener.local_addr().unwrap());
        listener
    }

    fn config(&self) -> PathBuf {
        self.config_of(&self.authority)
    }

    fn config_of(&self, authority: &Authority) -> PathBuf {
        let (certificate, key) = authority.issue("user-admin.pool");
        let path = self.dir.path().join("admin.toml");
        let addresses: Vec<String> = self.addresses.iter().map(|address| format!("\"{address}\"")).collect();
        let text = format!(
            "addresses = [{}]\nca_pem = '''{}'''\ncert_pem = '''{certificate}'''\nkey_pem = '''{key}'''\n",
            addresses.join(", "),
            authority.0.pem(),
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    fn client(&self) -> Client {
        Client::new(&self.config(), None).unwrap()
    }
}

#[tokio::test]
async fn dead_and_hung_hosts_are_passed_over() {
    let mut lab = Lab::new();
    lab.add_dead();
    let _hung = lab.add_hung().await;
    lab.add_host(None).await;
    let client = lab.client();
    let start = Instant::now();
    let pool = call!(client, PoolServiceClient, show, PoolShowRequest {}).await.unwrap();
    assert_eq!(pool.name, "lab");
    // Not even the limit of one connection was waited for.
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_change_is_repeated_elsewhere_under_the_same_request_id() {
    let mut lab = Lab::new();
    lab.add_host(Some(|| Status::unavailable("no quorum"))).await;
    lab.add_host(None).await;
    let client = lab.client();
    let request = HaResumeRequest { meta: new_meta() };
    let pool = call!(client, PoolServiceClient, ha_resume, request).await.unwrap();
    assert_eq!(pool.name, "lab");
    let seen = lab.seen.lock().unwrap().clone();
    assert_eq!(seen.len(), 2);
    assert!(!seen[0].is_empty());
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test]
async fn a_refusal_is_not_repeated() {
    let mut lab = Lab::new();
    lab.add_host(Some(|| Status::failed_precondition("the brake is off"))).await;
    lab.add_host(None).await;
    let client = lab.client();
    let request = HaResumeRequest { meta: new_meta() };
    let failure = call!(client, PoolServiceClient, ha_resume, request).await.unwrap_err();
    assert_eq!(failure.exit, Exit::Blocked);
    assert_eq!(lab.seen.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_pool_of_another_authority_is_a_denial_and_not_an_outage() {
    let mut lab = Lab::new();
    lab.add_host(None).await;
    let stranger = Client::new(&lab.config_of(&Authority::new()), None).unwrap();
    let failure = call!(stranger, PoolServiceClient, show, PoolShowRequest {}).await.unwrap_err();
    assert_eq!(failure.exit, Exit::Denied, "{failure:?}");
}

#[tokio::test]
async fn the_operators_time_limit_ends_the_search_for_a_host() {
    let mut lab = Lab::new();
    lab.add_dead();
    let client = Client::new(&lab.config(), Some(Duration::from_millis(300))).unwrap();
    let failure = call!(client, PoolServiceClient, show, PoolShowRequest {}).await.unwrap_err();
    assert_eq!(failure.exit, Exit::TimedOut);
}

#[tokio::test]
async fn when_nobody_answers_patience_ends_with_no_quorum() {
    let mut lab = Lab::new();
    lab.add_dead();
    let client = lab.client();
    let start = Instant::now();
    let failure = call!(client, PoolServiceClient, show, PoolShowRequest {}).await.unwrap_err();
    assert_eq!((failure.exit, failure.reason.as_str()), (Exit::NoQuorum, "UNREACHABLE"));
    assert!(start.elapsed() >= PATIENCE);
    assert!(failure.cause.contains(&lab.addresses[0].to_string()), "{failure}");
}

#[test]
fn certificates_that_are_none_are_a_usage_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.toml");
    std::fs::write(&path, "addresses = ['127.0.0.1:1']\nca_pem = 'x'\ncert_pem = 'y'\nkey_pem = 'z'\n")
        .unwrap();
    let failure = Client::new(&path, None).map(|_| ()).unwrap_err();
    assert_eq!(failure.exit, Exit::Usage);
}
