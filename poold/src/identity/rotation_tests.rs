//! The certificate authority of a pool of three hosts is replaced while they work.

use super::{CertificateAuthority, name_of};
use crate::test_pool::{TestPool, eventually};
use pool_state::Command;
use pool_state::command::{Govern, NewCa};
use proto::v1::ListHostsRequest;
use proto::v1::host_service_client::HostServiceClient;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

async fn govern(pool: &TestPool, change: Govern) -> Result<(), crate::consensus::ProposeError> {
    let consensus = pool.hosts[0].consensus();
    consensus.propose(Command::Govern(change), crate::test_pool::by_admin()).await.map(drop)
}

/// A client that trusts one authority and shows a certificate of another.
fn client(pool: &TestPool, host: usize, trusts: &str, shows: &CertificateAuthority) -> Channel {
    let (key, cert) = shows.issue_user("admin").unwrap();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(trusts))
        .identity(Identity::from_pem(cert, key))
        .domain_name(super::ANY_HOST);
    let endpoint = Endpoint::from_shared(format!("https://{}", pool.hosts[host].address)).unwrap();
    endpoint.tls_config(tls).unwrap().connect_lazy()
}

async fn answers(channel: Channel) -> bool {
    HostServiceClient::new(channel).list(ListHostsRequest {}).await.is_ok()
}

/// Changes that are made at all hosts all the time: how many, and how many failed.
struct Load {
    done: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Load {
    fn start(pool: &TestPool) -> Self {
        let hosts: Vec<_> = pool.hosts.iter().map(|host| host.consensus().clone()).collect();
        let (done, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let seen = (done.clone(), failed.clone(), stop.clone());
        let task = tokio::spawn(async move {
            let mut number = 0_u64;
            while !seen.2.load(Ordering::Relaxed) {
                number += 1;
                let host = &hosts[number as usize % hosts.len()];
                let labels = [("round".to_owned(), Some(number.to_string()))].into();
                let command = Command::SetHostLabels { host: host.host_id(), labels };
                match host.propose(command, crate::test_pool::by_admin()).await {
                    Ok(_) => seen.0.fetch_add(1, Ordering::Relaxed),
                    Err(_) => seen.1.fetch_add(1, Ordering::Relaxed),
                };
            }
        });
        Self { done, failed, stop, task }
    }

    async fn some_more(&self) {
        let before = self.done.load(Ordering::Relaxed);
        eventually("changes are made", async || self.done.load(Ordering::Relaxed) >= before + 10).await;
    }

    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        self.failed.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authority_is_replaced_while_the_pool_works() {
    let mut pool = TestPool::new(3).await;
    let load = Load::start(&pool);
    let old_pem = pool.ca.cert_pem().to_owned();
    let stays = client(&pool, 1, &old_pem, &pool.ca);
    assert!(answers(stays.clone()).await);
    let (new, cross_pem) = pool.ca.succeed("test").unwrap();
    let (cert_pem, key_pem) = (new.cert_pem().to_owned(), new.key_pem().to_owned());
    assert!(!answers(client(&pool, 0, &old_pem, &new)).await, "nobody trusts it yet");
    govern(&pool, Govern::RotateCa(Box::new(NewCa { cert_pem, key_pem, cross_pem }))).await.unwrap();
    let ca = pool.hosts[0].consensus().local().settings.ca_hash();
    eventually("every host shows the new authority", async || {
        pool.hosts[0].consensus().local().members().all(|host| host.shows_ca == Some(ca))
    })
    .await;
    load.some_more().await;
    // Whoever knows only one of the two gets in, whichever it is.
    for (host, (trusts, shows)) in
        [(&old_pem, &pool.ca), (&old_pem, &new), (&new.cert_pem().to_owned(), &pool.ca)]
            .into_iter()
            .enumerate()
    {
        assert!(answers(client(&pool, host, trusts, shows)).await, "at host {host}");
    }
    assert!(answers(stays.clone()).await, "an open connection goes on");
    govern(&pool, Govern::FinishCaRotation).await.unwrap();
    for host in 0..3 {
        eventually("the old authority counts no more", async || {
            !answers(client(&pool, host, new.cert_pem(), &pool.ca)).await
        })
        .await;
        assert!(!answers(client(&pool, host, &old_pem, &new)).await, "it proves nothing by the old one");
    }
    let first = |pem: &str| pem::parse_many(pem).unwrap().remove(0).into_contents();
    assert_eq!(
        name_of(&first(&pool.hosts[2].identity().cert_pem)),
        Ok(super::CertificateName::Host(pool.hosts[2].id))
    );
    load.some_more().await;
    assert_eq!(load.end().await, 0, "a change failed");
    // Who came in by the old authority is out, also on a connection that is open.
    eventually("old connections are closed", async || !answers(stays.clone()).await).await;

    // From disk, and with new connections to everybody, they find together again; and so does a new host.
    pool.ca = new;
    for host in &mut pool.hosts {
        host.kill().await;
    }
    for host in &mut pool.hosts {
        host.start().await;
    }
    eventually("the pool decides", async || pool.change(0, 1).await.is_ok()).await;
    pool.grow().await;
}
