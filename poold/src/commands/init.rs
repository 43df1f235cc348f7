//! `poold init`: founds a pool.

use super::{Failure, chain};
use crate::cli::HostArgs;
use crate::config::{HostConfig, TimingName};
use crate::consensus::{Consensus, ProposeMeta, StartOptions};
use crate::identity::{CertificateAuthority, HostIdentity, IdentityDir, SharedIdentity, write_private};
use crate::join::{local_facts, local_problems};
use pool_state::Command;
use pool_state::command::{HostFacts, InitPool};
use pool_state::state::FIRST_HOST;
use proto::ByteCount;
use rcgen::{KeyPair, PublicKeyData};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// Runs the command.
pub async fn run(args: HostArgs, name: String, timing: TimingName) -> Result<(), Failure> {
    check(&args, &name)?;
    let data = args.data.as_path();
    let identity_dir = IdentityDir::open(data).map_err(|error| Failure::failed(chain(&error)))?;
    let key_pem = identity_dir.key_pem().map_err(|error| Failure::failed(chain(&error)))?;
    let failed = |error: &dyn std::error::Error| Failure::failed(chain(error));
    let key = KeyPair::from_pem(&key_pem).map_err(|error| failed(&error))?;
    let public_key = key.subject_public_key_info();
    let ca = CertificateAuthority::create(&name).map_err(|error| failed(&error))?;
    let leaf = ca.sign_host(FIRST_HOST, &public_key).map_err(|error| failed(&error))?;
    // The CA goes along, so that a joining host can compare it with its token.
    let cert_pem = format!("{}\n{}", leaf.trim(), ca.cert_pem());
    identity_dir.save_certificates(ca.cert_pem(), &cert_pem).map_err(|error| failed(&error))?;
    let identity = HostIdentity { ca_pem: ca.cert_pem().to_owned(), cert_pem, key_pem };
    let facts = local_facts();
    let config = HostConfig {
        pool_id: uuid::Uuid::new_v4().to_string(),
        host_id: FIRST_HOST.0,
        host_name: args.host_name.clone(),
        listen: args.listen,
        vm_memory_bytes: args.vm_memory.map_or(facts.vm_memory_bytes, |size| size.0),
        timing,
        feature_level_max: args.feature_level,
        metrics: None,
        log_format: None,
        log_filter: None,
        prove_memory: None,
    };
    let command = Command::InitPool(Box::new(InitPool {
        pool_id: config.pool_id.clone(),
        name: name.clone(),
        timing: timing.timing(),
        ca_cert_pem: ca.cert_pem().to_owned(),
        ca_key_pem: ca.key_pem().to_owned(),
        feature_level: config.feature_level(),
        first_host: HostFacts {
            name: args.host_name.clone(),
            address: args.listen.to_string(),
            public_key,
            cpu_vendor: facts.cpu_vendor,
            vm_memory: ByteCount(config.vm_memory_bytes),
            feature_level: config.feature_level(),
        },
    }));
    found(data, identity, &config, command).await?;
    write_admin(data, &ca, &args)?;
    // Last, since it is what `serve` and another `init` look for.
    config.save(data).map_err(|error| failed(&error))?;
    print_next(&name, &args);
    Ok(())
}

fn check(args: &HostArgs, name: &str) -> Result<(), Failure> {
    for (what, name) in [("pool name", name), ("host name", args.host_name.as_str())] {
        if !proto::limits::is_valid_name(name) {
            return Err(Failure::usage(format!(
                "`{name}` is no valid {what}: 1 to 63 letters, digits, dots, dashes, beginning and ending with a letter or digit"
            )));
        }
    }
    let exists = HostConfig::load(&args.data).map_err(|error| Failure::failed(chain(&error)))?;
    if let Some(config) = exists {
        let (data, host) = (args.data.display(), config.host_name);
        return Err(Failure::blocked(format!(
            "{data} already belongs to host {host} of a pool; run `poold serve --data {data}` or choose an empty folder"
        )));
    }
    let created = DirBuilder::new().recursive(true).mode(0o700).create(&args.data);
    created.map_err(|error| Failure::failed(format!("{} can't be created: {error}", args.data.display())))?;
    let problems = local_problems(&args.data, args.listen);
    if !problems.is_empty() {
        return Err(Failure::blocked(format!(
            "this host can't found a pool yet:\n  - {}",
            problems.join("\n  - ")
        )));
    }
    Ok(())
}

/// Runs a Raft of this host alone until the pool's founding entry is applied.
async fn found(
    data: &Path,
    identity: HostIdentity,
    config: &HostConfig,
    command: Command,
) -> Result<(), Failure> {
    let failed = |error: &dyn std::error::Error| Failure::failed(chain(error));
    let (pool_id, host) = (config.pool_id.as_str(), config.host());
    Consensus::create_stores(data, pool_id, host).await.map_err(|error| failed(&error))?;
    let options = StartOptions {
        data_dir: data,
        pool_id,
        host,
        timing: config.timing.timing(),
        feature_level: config.feature_level(),
        identity: SharedIdentity::new(identity),
    };
    let consensus = Consensus::start(options).await.map_err(|error| failed(&error))?;
    consensus.found(&config.listen.to_string()).await.map_err(|error| failed(&error))?;
    let meta = ProposeMeta { request_id: None, principal: "user-admin".to_owned() };
    let founded = consensus.propose(command, meta).await;
    consensus.shutdown().await;
    founded.map(drop).map_err(|error| failed(&error))
}

fn write_admin(data: &Path, ca: &CertificateAuthority, args: &HostArgs) -> Result<(), Failure> {
    let (key_pem, cert_pem) = ca.issue_user("admin").map_err(|error| Failure::failed(chain(&error)))?;
    let mut table = toml::Table::new();
    let addresses = vec![toml::Value::from(args.listen.to_string())];
    table.insert("addresses".to_owned(), toml::Value::Array(addresses));
    for (key, value) in [("ca_pem", ca.cert_pem()), ("cert_pem", &cert_pem), ("key_pem", &key_pem)] {
        table.insert(key.to_owned(), toml::Value::from(value));
    }
    let path = data.join("admin.toml");
    let written = write_private(&path, table.to_string().as_bytes());
    written.map_err(|error| Failure::failed(format!("{} can't be written: {error}", path.display())))
}

fn print_next(name: &str, args: &HostArgs) {
    let data = args.data.display();
    eprintln!("Pool {name} is founded; host {} is its first.", args.host_name);
    eprintln!("Next:");
    eprintln!("  poold serve --data {data}");
    eprintln!(
        "  poolctl --config {data}/admin.toml host token create    (then `poold join` on the next host)"
    );
}
