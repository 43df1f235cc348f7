use super::*;
use crate::test_pool::TestPool;
use bytes::Bytes;
use http_body_util::Full;
use proto::v1::host_service_client::HostServiceClient;
use proto::v1::{CreateJoinTokenRequest, HostChangeRequest, ListHostsRequest, RevokeJoinTokenRequest};
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use tonic::transport::Channel;

fn meta(id: &str) -> Option<RequestMeta> {
    Some(RequestMeta { request_id: id.to_owned() })
}

async fn cordon(client: &mut HostServiceClient<Channel>, id: &str, host: &str) -> Result<(), Status> {
    let request = HostChangeRequest { meta: meta(id), host: host.to_owned() };
    client.cordon(request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_refused_for_its_name_is_not_done_when_the_name_means_something() {
    let mut pool = TestPool::new(1).await;
    let mut first = HostServiceClient::new(pool.admin_channel(0).await);
    let refused = cordon(&mut first, "r1", "h2").await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(pool.hosts[0].consensus().local().requests.is_refused("r1"));
    pool.grow().await;
    // The same request, late, at either host; its client has heard long ago that there is no such host.
    for index in 0..2 {
        let mut client = HostServiceClient::new(pool.admin_channel(index).await);
        let refused = cordon(&mut client, "r1", "h2").await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
        assert!(refused.message().contains("was refused before"), "{refused:?}");
    }
    let shown = first.list(ListHostsRequest {}).await.unwrap().into_inner().hosts;
    assert!(shown.iter().all(|host| host.duty != "cordoned"), "{shown:?}");
    cordon(&mut first, "r2", "h2").await.unwrap();
    assert_eq!(pool.hosts[0].consensus().local().requests.refused_len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_in_the_log_leaves_no_second_entry_and_one_without_an_id_none() {
    let pool = TestPool::new(1).await;
    let consensus = pool.hosts[0].consensus().clone();
    let mut client = HostServiceClient::new(pool.admin_channel(0).await);
    let before = consensus.read_linearizable().await.unwrap();
    let revoke = |id| RevokeJoinTokenRequest { meta: meta(id), id: 9_999 };
    client.revoke_join_token(revoke("r1")).await.unwrap_err();
    let after = consensus.read_linearizable().await.unwrap();
    assert!(after.requests.is_refused("r1"));
    assert_eq!(after.revision, before.revision + 1);
    cordon(&mut client, "", "h9").await.unwrap_err();
    let last = consensus.read_linearizable().await.unwrap();
    assert_eq!((last.revision, last.requests.refused_len()), (after.revision, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_done_elsewhere_meanwhile_is_not_refused() {
    let pool = TestPool::new(1).await;
    let mut client = HostServiceClient::new(pool.admin_channel(0).await);
    let request = CreateJoinTokenRequest { meta: meta("r1"), ttl_seconds: 60 };
    client.create_join_token(request.clone()).await.unwrap();
    let served = &AtomicUsize::new(0);
    for (refusals, code) in [(1, Code::Ok), (2, Code::DeadlineExceeded)] {
        served.store(0, Ordering::SeqCst);
        let service = tower::service_fn(move |_: Request<Body>| {
            let refuses = served.fetch_add(1, Ordering::SeqCst) < refusals;
            let status = if refuses { Status::not_found("no such thing") } else { Status::ok("") };
            std::future::ready(Ok::<_, Infallible>(status.into_http::<Body>()))
        });
        let message = request.encode_to_vec();
        let mut content = vec![0];
        content.extend((message.len() as u32).to_be_bytes());
        content.extend(message);
        let asked = Request::new(Body::new(Full::new(Bytes::from(content))));
        let consensus = pool.hosts[0].consensus().clone();
        let answer = serve(service, asked, consensus, Principal::User("ann".to_owned())).await.unwrap();
        let status = Status::from_header_map(answer.headers()).unwrap();
        assert_eq!(status.code(), code, "{status:?}");
        assert_eq!(served.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn every_change_with_one_request_is_concerned_and_what_only_looks_is_not() {
    for path in ["/pool.v1.VmService/Start", "/pool.v1.VolumeService/Delete", "/pool.v1.HostService/Cordon"] {
        assert!(CHANGES.contains(path), "{path}");
    }
    for path in ["/pool.v1.VmService/List", "/pool.v1.VolumeService/Import", "/pool.v1.HostService/Join"] {
        assert!(!CHANGES.contains(path), "{path}");
    }
    // A client gives its id in the same place of every request.
    let set = descriptors();
    for message in set.file.iter().flat_map(|file| &file.message_type) {
        let metas = message.field.iter().filter(|field| field.type_name() == ".pool.v1.RequestMeta");
        assert!(metas.map(prost_types::FieldDescriptorProto::number).all(|it| it == 1), "{}", message.name());
    }
}

#[test]
fn the_id_is_found_in_any_request_and_garbage_has_none() {
    let request = HostChangeRequest { meta: meta("r1"), host: "h2".to_owned() };
    let framed = |flag: u8| [&[flag, 0, 0, 0, 0], request.encode_to_vec().as_slice()].concat();
    assert_eq!(request_id(&framed(0)).as_deref(), Some("r1"));
    for garbage in [&[][..], &[0; 4], &framed(1), &[0, 0, 0, 0, 0, 255, 255, 255]] {
        assert_eq!(request_id(garbage), None, "{garbage:?}");
    }
}
