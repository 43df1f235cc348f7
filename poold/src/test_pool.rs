//! A pool in one process for tests: real stores, real TLS on loopback, real joins; only the node part (VMs, volumes) is
//! left out.

use crate::consensus::{Consensus, MembershipTask, ProposeMeta, StartOptions};
use crate::identity::{
    CertificateAuthority, HostIdentity, IdentityDir, IdentityTask, SharedIdentity, generate_key,
};
use crate::join::{JoinError, JoinOptions, JoinToken, join};
use crate::lease::LeaderHandle;
use crate::server::{self, RunningServer, ServerOptions};
use pool_state::command::{HostFacts, InitPool, UpdateHost};
use pool_state::state::FIRST_HOST;
use pool_state::{Command, Outcome, PoolState, Timing, features};
use proto::v1::CreateJoinTokenRequest;
use proto::v1::host_service_client::HostServiceClient;
use proto::{ByteCount, CertificateFingerprint, HostId, Incarnation};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

const POOL_ID: &str = "pool-of-a-test";

/// Everything in a test pool happens within this time, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(30);

/// Waits until `condition` is true.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < SOON, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One host of the pool.
pub struct TestHost {
    /// Its id.
    pub id: HostId,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its data folder.
    pub data_dir: PathBuf,
    /// None while it is down.
    running: Option<Running>,
}

struct Running {
    consensus: Consensus,
    server: RunningServer,
    tasks: Vec<JoinHandle<()>>,
    shutdown: CancellationToken,
}

impl TestHost {
    /// Its consensus; it must run.
    pub fn consensus(&self) -> &Consensus {
        &self.running.as_ref().expect("the test has started this host").consensus
    }

    /// Its identity.
    pub fn identity(&self) -> HostIdentity {
        IdentityDir::open(&self.data_dir).unwrap().load().unwrap()
    }

    /// Starts it.
    pub async fn start(&mut self) {
        let identity = SharedIdentity::new(self.identity());
        let options = StartOptions {
            data_dir: &self.data_dir,
            pool_id: POOL_ID,
            host: self.id,
            timing: Timing::fast(),
            feature_level: features::NEWEST,
            identity: identity.clone(),
        };
        let consensus = Consensus::start(options).await.unwrap();
        let shutdown = CancellationToken::new();
        let options = ServerOptions {
            listener: TcpListener::bind(self.address).await.unwrap(),
            identity: identity.clone(),
            consensus: consensus.clone(),
            leader: LeaderHandle::new().0,
            routes: Routes::default(),
        };
        let server = server::spawn(options, shutdown.clone()).unwrap();
        let membership = MembershipTask::new(consensus.clone()).run(shutdown.clone());
        let announce = announce(consensus.clone(), self.id, self.address);
        let dir = IdentityDir::open(&self.data_dir).unwrap();
        let keeper = IdentityTask { consensus: consensus.clone(), dir, identity }.run(shutdown.clone());
        let tasks = vec![tokio::spawn(membership), tokio::spawn(announce), tokio::spawn(keeper)];
        self.running = Some(Running { consensus, server, tasks, shutdown });
    }

    /// Ends it as if its process had died: nobody is told.
    pub async fn kill(&mut self) {
        let running = self.running.take().expect("the test has started this host");
        running.shutdown.cancel();
        running.server.stopped().await;
        for task in running.tasks {
            task.abort();
            let _ = task.await;
        }
        running.consensus.shutdown().await;
    }
}

/// What the block store does in a whole daemon: tells the pool that the host serves.
async fn announce(consensus: Consensus, host: HostId, address: SocketAddr) {
    let update = Command::UpdateHost(UpdateHost {
        host,
        incarnation: Incarnation("test".to_owned()),
        replica_fingerprint: CertificateFingerprint([7; 32]),
        boot_id: "boot".to_owned(),
        address: address.to_string(),
        vm_memory: ByteCount(1 << 30),
    });
    let meta = || ProposeMeta { request_id: None, principal: host.to_string() };
    while consensus.propose(update.clone(), meta()).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A pool on loopback.
pub struct TestPool {
    /// Its hosts by age.
    pub hosts: Vec<TestHost>,
    /// Its CA, to make certificates with.
    pub ca: CertificateAuthority,
    /// Hosts ever made; a name is not used twice.
    made: usize,
    dir: TempDir,
}

/// An address that is free now.
pub fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// What a test's proposal is stamped with.
pub fn by_admin() -> ProposeMeta {
    ProposeMeta { request_id: None, principal: "user-admin".to_owned() }
}

impl TestPool {
    /// A pool of `count` hosts that are all up, with the voters that are due.
    pub async fn new(count: usize) -> Self {
        let mut pool = Self::found().await;
        for _ in 1..count {
            pool.grow().await;
        }
        let voters = match count {
            1 | 2 => 1,
            3 | 4 => 3,
            _ => 5,
        };
        eventually("the voters vote", async || pool.hosts[0].consensus().voters().len() == voters).await;
        pool
    }

    async fn found() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = CertificateAuthority::create("test").unwrap();
        let data_dir = dir.path().join("h1");
        let (key_pem, public_key) = generate_key().unwrap();
        let leaf = ca.sign_host(FIRST_HOST, &public_key).unwrap();
        let cert_pem = format!("{}\n{}", leaf.trim(), ca.cert_pem());
        let identity = IdentityDir::open(&data_dir).unwrap();
        crate::identity::write_private(&data_dir.join("identity/key.pem"), key_pem.as_bytes()).unwrap();
        identity.save_certificates(ca.cert_pem(), &cert_pem).unwrap();
        Consensus::create_stores(&data_dir, POOL_ID, FIRST_HOST).await.unwrap();
        let mut host = TestHost { id: FIRST_HOST, address: free_address(), data_dir, running: None };
        host.start().await;
        host.consensus().found(&host.address.to_string()).await.unwrap();
        let founding = Command::InitPool(Box::new(InitPool {
            pool_id: POOL_ID.to_owned(),
            name: "test".to_owned(),
            timing: Timing::fast(),
            feature_level: features::NEWEST,
            ca_cert_pem: ca.cert_pem().to_owned(),
            ca_key_pem: ca.key_pem().to_owned(),
            first_host: HostFacts {
                name: "h1".to_owned(),
                address: host.address.to_string(),
                public_key,
                cpu_vendor: crate::join::local_facts().cpu_vendor,
                vm_memory: ByteCount(1 << 30),
                feature_level: features::NEWEST,
            },
        }));
        host.consensus().propose(founding, by_admin()).await.unwrap();
        Self { hosts: vec![host], ca, made: 1, dir }
    }

    /// Adds a host by token, starts it and waits until it is up.
    pub async fn grow(&mut self) {
        let token = self.token(3600).await;
        self.made += 1;
        let name = format!("h{}", self.made);
        let mut host = self.join(&name, &token.encode()).await.unwrap();
        host.start().await;
        self.hosts.push(host);
        let (first, last) = (&self.hosts[0], self.hosts.last().unwrap());
        eventually("the new host is up", async || {
            first.consensus().local().hosts.get(&last.id).is_some_and(pool_state::state::Host::is_up)
        })
        .await;
    }

    /// Joins a host of that name, and does not start it.
    pub async fn join(&self, name: &str, token: &str) -> Result<TestHost, JoinError> {
        let (config, _) = join(self.join_options(name, token)).await?;
        Ok(TestHost {
            id: config.host(),
            address: config.listen,
            data_dir: self.data_dir(name),
            running: None,
        })
    }

    /// What `poold join` would be told for a host of that name.
    pub fn join_options(&self, name: &str, token: &str) -> JoinOptions {
        let data_dir = self.data_dir(name);
        std::fs::create_dir_all(&data_dir).unwrap();
        JoinOptions {
            data_dir,
            host_name: name.to_owned(),
            listen: free_address(),
            vm_memory_bytes: Some(1 << 30),
            feature_level_max: None,
            token: token.to_owned(),
        }
    }

    /// The data folder of the host of that name.
    pub fn data_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A join token made over the API.
    pub async fn token(&self, ttl_seconds: u64) -> JoinToken {
        let mut client = HostServiceClient::new(self.admin_channel(0).await);
        let request = CreateJoinTokenRequest { meta: None, ttl_seconds };
        let token = client.create_join_token(request).await.unwrap().into_inner().token;
        JoinToken::decode(&token).unwrap()
    }

    /// A channel to a host with the certificate of a user.
    pub async fn admin_channel(&self, index: usize) -> Channel {
        let (key, cert) = self.ca.issue_user("admin").unwrap();
        self.channel(index, Some(Identity::from_pem(cert, key))).await
    }

    /// A channel to a host with any certificate, or with none.
    pub async fn channel(&self, index: usize, identity: Option<Identity>) -> Channel {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.ca.cert_pem()))
            .domain_name(crate::identity::ANY_HOST);
        let tls = match identity {
            Some(identity) => tls.identity(identity),
            None => tls,
        };
        let endpoint = Endpoint::from_shared(format!("https://{}", self.hosts[index].address)).unwrap();
        endpoint.tls_config(tls).unwrap().connect().await.unwrap()
    }

    /// Who leads, as far as a host knows.
    pub fn leader_of(&self, index: usize) -> Option<HostId> {
        self.hosts[index].consensus().leader()
    }

    /// The index of the host that leads, as soon as one does.
    pub async fn leader(&self) -> usize {
        let found =
            || self.hosts.iter().position(|host| host.running.is_some() && host.consensus().is_leader());
        eventually("somebody leads", async || found().is_some()).await;
        found().expect("leadership lasts longer than this line in a pool without faults")
    }

    /// Proposes a new token at a host; any small change would do.
    pub async fn change(&self, index: usize, secret: u8) -> Result<u64, crate::consensus::ProposeError> {
        let command = Command::CreateToken { secret_hash: [secret; 32], ttl_ms: 3_600_000 };
        let (index, outcome) = self.hosts[index].consensus().propose(command, by_admin()).await?;
        assert!(matches!(outcome, Outcome::Token(_)), "{outcome:?}");
        Ok(index)
    }
}

/// Whether a change of [`TestPool::change`] is in a state. All bytes are compared: hashes of real tokens begin with any byte.
pub fn has_change(state: &PoolState, secret: u8) -> bool {
    state.tokens.values().any(|token| token.secret_hash == [secret; 32])
}
