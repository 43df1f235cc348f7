//! `poolctl support`: one file with all that the pool and its hosts say of themselves. No keys, tokens or console output are in it.
//! Its size is bounded by what the pool has: its lists, and less than 1 MiB for each host.

use super::Session;
use crate::{
    args::SupportCommand,
    client::call,
    config::create_private,
    failure::Failure,
    output::{Object, hint, warning},
    view::{
        AuditView, ClusterView, EventView, GroupView, HostView, ImageView, MigrationView, PoolView, TaskView,
        UserView, VmView, VolumeView,
    },
};
use proto::v1::{
    AuditRequest, Event, HostReport, ListClustersRequest, ListGroupsRequest, ListHostsRequest,
    ListImagesRequest, ListMigrationsRequest, ListTasksRequest, ListUsersRequest, ListVmsRequest,
    ListVolumesRequest, PoolShowRequest, ReportsRequest, WatchEventsRequest,
    cluster_service_client::ClusterServiceClient, event_service_client::EventServiceClient,
    group_service_client::GroupServiceClient, host_service_client::HostServiceClient,
    image_service_client::ImageServiceClient, migration_service_client::MigrationServiceClient,
    pool_service_client::PoolServiceClient, support_service_client::SupportServiceClient,
    task_service_client::TaskServiceClient, user_service_client::UserServiceClient,
    vm_service_client::VmServiceClient, volume_service_client::VolumeServiceClient,
};
use serde_json::{Map, Value, json};
use std::{io::Write as _, ops::ControlFlow};

/// Events of the bundle: those of this many revisions before now.
const EVENT_REVISIONS: u64 = 2_000;

/// Runs a command of support.
///
/// # Errors
/// When the file can't be written. What the pool does not answer is noted in the bundle.
pub async fn run(command: SupportCommand, session: &mut Session) -> Result<(), Failure> {
    let SupportCommand::Bundle { file } = command;
    let object = file.display().to_string();
    // Before the work: a file that can't be made is known at once.
    let mut out = create_private(&file).map_err(|error| Failure::local(&object, error))?;
    let mut bundle = Map::new();
    bundle.insert("poolctl".into(), json!(env!("CARGO_PKG_VERSION")));
    collect(session, &mut bundle).await;
    let missing = reports(session, &mut bundle).await;
    let text = serde_json::to_string_pretty(&bundle).map_err(|error| Failure::local(&object, error))?;
    out.write_all(text.as_bytes()).map_err(|error| Failure::local(&object, error))?;
    hint(&format!("{object} written; it holds names and addresses, but no key"));
    for (host, why) in missing {
        warning(&format!("not in it: the report of host {host}: {why}"));
    }
    Ok(())
}

/// A list, or why there is none.
fn put<T, V: Object + From<T>>(bundle: &mut Map<String, Value>, name: &str, answer: Result<Vec<T>, Failure>) {
    let value = match answer {
        Ok(items) => {
            let views: Vec<V> = items.into_iter().map(V::from).collect();
            serde_json::to_value(views).unwrap_or_else(|error| json!({ "error": error.to_string() }))
        }
        Err(failure) => json!({ "error": failure.to_string() }),
    };
    bundle.insert(name.to_owned(), value);
}

async fn collect(session: &Session, bundle: &mut Map<String, Value>) {
    let client = &session.client;
    let pool = call!(client, PoolServiceClient, show, PoolShowRequest {}).await;
    let revision = pool.as_ref().map_or(0, |pool| pool.revision);
    put::<_, PoolView>(bundle, "pool", pool.map(|pool| vec![pool]));
    let hosts = call!(client, HostServiceClient, list, ListHostsRequest {}).await;
    put::<_, HostView>(bundle, "hosts", hosts.map(|list| list.hosts));
    let vms = call!(client, VmServiceClient, list, ListVmsRequest {}).await;
    put::<_, VmView>(bundle, "vms", vms.map(|list| list.vms));
    let volumes = call!(client, VolumeServiceClient, list, ListVolumesRequest {}).await;
    put::<_, VolumeView>(bundle, "volumes", volumes.map(|list| list.volumes));
    let images = call!(client, ImageServiceClient, list, ListImagesRequest {}).await;
    put::<_, ImageView>(bundle, "images", images.map(|list| list.images));
    let groups = call!(client, GroupServiceClient, list, ListGroupsRequest {}).await;
    put::<_, GroupView>(bundle, "groups", groups.map(|list| list.groups));
    let clusters = call!(client, ClusterServiceClient, list, ListClustersRequest {}).await;
    put::<_, ClusterView>(bundle, "clusters", clusters.map(|list| list.clusters));
    let users = call!(client, UserServiceClient, list, ListUsersRequest {}).await;
    put::<_, UserView>(bundle, "users", users.map(|list| list.users));
    let tasks = call!(client, TaskServiceClient, list, ListTasksRequest {}).await;
    put::<_, TaskView>(bundle, "tasks", tasks.map(|list| list.tasks));
    let migrations = call!(client, MigrationServiceClient, list, ListMigrationsRequest {}).await;
    put::<_, MigrationView>(bundle, "migrations", migrations.map(|list| list.migrations));
    let audit = call!(client, EventServiceClient, audit, AuditRequest { from_revision: 0 }).await;
    put::<_, AuditView>(bundle, "audit", audit.map(|list| list.records));
    put::<_, EventView>(bundle, "events", events(session, revision).await);
}

/// What the hosts say of themselves goes into the bundle; those that said nothing are returned with the reason.
async fn reports(session: &Session, bundle: &mut Map<String, Value>) -> Vec<(String, String)> {
    let client = &session.client;
    let (mut reports, mut missing) = (Map::new(), Vec::new());
    let opened = call!(client, SupportServiceClient, reports, ReportsRequest {}).await;
    let read = match opened {
        Ok(mut stream) => {
            let put = |report: HostReport| {
                if !report.missing.is_empty() {
                    missing.push((report.host.clone(), report.missing.clone()));
                }
                reports.insert(report.host.clone(), report_value(report));
                Ok(ControlFlow::Continue(()))
            };
            client.read(&mut stream, put).await.map(drop)
        }
        Err(failure) => Err(failure),
    };
    if let Err(failure) = read {
        bundle.insert("reports_error".into(), json!(failure.to_string()));
    }
    bundle.insert("reports".into(), Value::Object(reports));
    missing
}

fn report_value(report: HostReport) -> Value {
    let HostReport {
        missing,
        version,
        feature_level,
        time_ms,
        kernel,
        uptime_s,
        log,
        processes,
        metrics,
        config,
        ..
    } = report;
    if !missing.is_empty() {
        return json!({ "missing": missing });
    }
    let processes: Map<String, Value> =
        processes.into_iter().map(|process| (process.process, json!(process.log))).collect();
    json!({
        "version": version, "feature_level": feature_level, "time_ms": time_ms, "kernel": kernel,
        "uptime_s": uptime_s, "log": log, "processes": processes, "metrics": metrics, "config": config,
    })
}

/// The events up to this revision, as far back as the pool remembers.
async fn events(session: &Session, revision: u64) -> Result<Vec<Event>, Failure> {
    let client = &session.client;
    let mut events: Vec<Event> = Vec::new();
    // A busy pool may have forgotten the older ones; then fewer are asked for.
    let mut span = EVENT_REVISIONS;
    loop {
        let request = WatchEventsRequest { from_revision: revision.saturating_sub(span) };
        let opened = call!(client, EventServiceClient, watch, request).await;
        let mut stream = opened?;
        let read = client.read(&mut stream, |event: Event| {
            let last = event.revision >= revision;
            events.push(event);
            Ok(if last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        // The last revisions may have caused no event: what has come within a moment is all.
        match tokio::time::timeout(std::time::Duration::from_secs(1), read).await {
            Ok(Err(failure)) if span > 0 && events.is_empty() => {
                span /= 2;
                if span == 0 {
                    return Err(failure);
                }
            }
            Ok(Err(failure)) => return Err(failure),
            Ok(Ok(_)) | Err(_) => return Ok(events),
        }
    }
}
