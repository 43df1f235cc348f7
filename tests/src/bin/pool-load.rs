//! `pool-load`: many calls of the API from one process, for `cargo xtask bench control`. Prints one JSON object.
//!
//! `pool-load CONFIG commits COUNT`: changes one after the other. `storm VMS CLIENTS`: creates VMs from several clients at a time, at
//! all hosts. `list ROUNDS`: lists all VMs.

#![expect(clippy::print_stdout, reason = "the result goes to whoever runs the bench")]

use anyhow::{Context, Result, bail};
use proto::v1::{
    CreateVmRequest, ListHostsRequest, ListVmsRequest, RequestMeta, SetHostLabelsRequest,
    host_service_client::HostServiceClient, vm_service_client::VmServiceClient,
};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// Memory of each VM of a storm: small, so that the pool's hosts need not be large. None of them is started.
const VM_MEMORY_BYTES: u64 = 16 << 20;

#[tokio::main]
async fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<usize>().with_context(|| format!("`{text}` is no number"));
    let result = match words[..] {
        [config, "commits", count] => commits(connect(config).await?, number(count)?).await?,
        [config, "storm", vms, clients] => {
            storm(connect(config).await?, number(vms)?, number(clients)?).await?
        }
        [config, "list", rounds] => list(connect(config).await?, number(rounds)?).await?,
        _ => bail!("usage: pool-load CONFIG commits COUNT | storm VMS CLIENTS | list ROUNDS"),
    };
    println!("{result}");
    Ok(())
}

/// Channels to all hosts, the leader's first.
async fn connect(config: &str) -> Result<Vec<Channel>> {
    let config: toml::Table = std::fs::read_to_string(config)?.parse()?;
    let text = |key: &str| {
        let value = config.get(key).and_then(toml::Value::as_str);
        value.with_context(|| format!("the configuration has no {key}"))
    };
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(text("ca_pem")?))
        .identity(Identity::from_pem(text("cert_pem")?, text("key_pem")?))
        .domain_name("poold.pool");
    let open = async |address: &str| -> Result<Channel> {
        let endpoint = Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls.clone())?;
        Ok(endpoint.tcp_nodelay(true).connect().await?)
    };
    let addresses = config.get("addresses").and_then(toml::Value::as_array);
    let first =
        addresses.and_then(|all| all.first()?.as_str()).context("the configuration has no address")?;
    let answer = HostServiceClient::new(open(first).await?).list(ListHostsRequest {}).await?.into_inner();
    let mut hosts = answer.hosts;
    hosts.sort_by_key(|host| host.role != "leader");
    let mut channels = Vec::new();
    for host in hosts {
        channels.push(open(&host.address).await?);
    }
    Ok(channels)
}

fn meta() -> Option<RequestMeta> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Some(RequestMeta { request_id: format!("load-{}-{number}", std::process::id()) })
}

fn quantiles(mut taken: Vec<Duration>) -> Value {
    taken.sort_unstable();
    let at = |part: f64| {
        let index = (taken.len().saturating_sub(1) as f64 * part).round() as usize;
        taken.get(index).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
    };
    json!({ "count": taken.len(), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1.0) })
}

/// Changes of a label, one after the other, at the leader and at another host.
async fn commits(hosts: Vec<Channel>, count: usize) -> Result<Value> {
    let mut result = serde_json::Map::new();
    for (name, channel) in ["leader", "follower"].into_iter().zip(hosts) {
        let mut client = HostServiceClient::new(channel);
        let host = client.list(ListHostsRequest {}).await?.into_inner().hosts.swap_remove(0).name;
        let mut taken = Vec::new();
        for number in 0..count {
            let set = [("round".to_owned(), number.to_string())].into();
            let request = SetHostLabelsRequest { meta: meta(), host: host.clone(), set, remove: Vec::new() };
            let start = Instant::now();
            client.set_labels(request).await?;
            taken.push(start.elapsed());
        }
        result.insert(name.to_owned(), quantiles(taken));
    }
    Ok(Value::Object(result))
}

/// Creates VMs as fast as the pool takes them.
async fn storm(hosts: Vec<Channel>, vms: usize, clients: usize) -> Result<Value> {
    let next = Arc::new(AtomicUsize::new(0));
    let start = Instant::now();
    let mut tasks = Vec::new();
    for client in 0..clients {
        let (mut api, next) = (VmServiceClient::new(hosts[client % hosts.len()].clone()), next.clone());
        tasks.push(tokio::spawn(async move {
            let mut taken = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= vms {
                    return anyhow::Ok(taken);
                }
                let request = CreateVmRequest {
                    meta: meta(),
                    name: format!("machine-{number:05}"),
                    vcpus: 1,
                    memory_bytes: VM_MEMORY_BYTES,
                    cmdline: "console=ttyS0 root=/dev/vda".to_owned(),
                    ha: "restart".to_owned(),
                    ..CreateVmRequest::default()
                };
                let start = Instant::now();
                api.create(request).await?;
                taken.push(start.elapsed());
            }
        }));
    }
    let mut taken = Vec::new();
    for task in tasks {
        taken.extend(task.await??);
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(json!({ "seconds": seconds, "per_s": vms as f64 / seconds, "each": quantiles(taken) }))
}

async fn list(hosts: Vec<Channel>, rounds: usize) -> Result<Value> {
    let mut client = VmServiceClient::new(hosts.into_iter().next().context("a pool has a host")?)
        .max_decoding_message_size(64 << 20);
    let (mut taken, mut vms) = (Vec::new(), 0);
    for _ in 0..rounds {
        let start = Instant::now();
        vms = client.list(ListVmsRequest {}).await?.into_inner().vms.len();
        taken.push(start.elapsed());
    }
    Ok(json!({ "vms": vms, "each": quantiles(taken) }))
}
