//! Images on their way between hosts, and the task that keeps this host complete.

use super::{ImageError, ImageStore};
use crate::{consensus::HostClients, node::NodeContext};
use futures::{StreamExt as _, stream::FuturesUnordered};
use pool_state::{
    Command, PoolState,
    state::{ContentHash, HostState, Image},
};
use proto::{
    HostId,
    limits::CHUNK_BYTES,
    v1::{AgentImageChunk, AgentImageRequest, agent_service_client::AgentServiceClient},
};
use std::{collections::BTreeSet, io, time::Duration};
use tokio::{io::AsyncReadExt as _, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

/// Hosts that must hold an image durably before it is committed, if that many are up: one may die at any time.
pub const DURABLE_COPIES: usize = 2;

/// How long an import waits for more hosts than it needs; those that miss it fetch the image themselves.
const EXTRA_COPIES_TIMEOUT: Duration = Duration::from_secs(2);

/// How long one copy to or from a host may take: 64 GiB at 20 MiB/s.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(3600);

/// Chunks read ahead of the network.
const CHUNKS_AHEAD: usize = 4;

/// Between two passes without a change of the state; also the pause after a failed fetch.
const SYNC_INTERVAL: Duration = Duration::from_secs(5);

/// An image could not be brought from host to host.
#[derive(Debug, thiserror::Error)]
pub enum SpreadError {
    /// The local store failed.
    #[error(transparent)]
    Store(#[from] ImageError),
    /// The other host can't be reached or refused.
    #[error("{host}: {source}")]
    Host {
        /// Which.
        host: HostId,
        /// What it said.
        source: tonic::Status,
    },
    /// The other host sent something that is no image.
    #[error("{host} sent an image stream without a header")]
    NoHeader {
        /// Which.
        host: HostId,
    },
    /// Not enough hosts took it.
    #[error(
        "image {digest} is at {copies} of {needed} hosts; last error: {last}; try again when the others answer"
    )]
    TooFewCopies {
        /// Which.
        digest: ContentHash,
        /// Hosts that hold it.
        copies: usize,
        /// Hosts that must.
        needed: usize,
        /// Why the last other host did not take it.
        last: String,
    },
}

/// Copies a local image to the other hosts that are up. Returns all holders, this host first.
///
/// # Errors
/// Fewer than min([`DURABLE_COPIES`], hosts up) hold it.
pub async fn push(
    store: &ImageStore,
    clients: &HostClients,
    state: &PoolState,
    me: HostId,
    digest: ContentHash,
) -> Result<Vec<HostId>, SpreadError> {
    let others: Vec<HostId> =
        state.hosts.values().filter(|host| host.is_up() && host.id != me).map(|host| host.id).collect();
    let needed = DURABLE_COPIES.min(others.len() + 1);
    let mut copies: FuturesUnordered<_> = others
        .into_iter()
        .map(|host| async move { push_to(store, clients, host, digest).await.map(|()| host) })
        .collect();
    let mut holders = vec![me];
    let mut last = "no other host is up".to_owned();
    loop {
        let enough = holders.len() >= needed;
        let limit = if enough { EXTRA_COPIES_TIMEOUT } else { TRANSFER_TIMEOUT };
        match tokio::time::timeout(limit, copies.next()).await {
            Ok(Some(Ok(host))) => holders.push(host),
            Ok(Some(Err(error))) => {
                tracing::warn!(%digest, %error, "a host did not take an image");
                last = error.to_string();
            }
            Ok(None) | Err(_) if enough => return Ok(holders),
            Ok(None) | Err(_) => {
                return Err(SpreadError::TooFewCopies { digest, copies: holders.len(), needed, last });
            }
        }
    }
}

async fn push_to(
    store: &ImageStore,
    clients: &HostClients,
    host: HostId,
    digest: ContentHash,
) -> Result<(), SpreadError> {
    let at = |source| SpreadError::Host { host, source };
    let mut client = agent(clients, host).map_err(at)?;
    let chunks = chunks(store, digest).await?;
    // A failure to read ends the stream early, which the receiver sees as a wrong size.
    let chunks = chunks.filter_map(|chunk| async move { chunk.ok() });
    client.store_image(chunks).await.map_err(at)?;
    Ok(())
}

/// The image as messages: the first carries digest and size, the others data.
///
/// # Errors
/// Not here or unreadable.
pub async fn chunks(
    store: &ImageStore,
    digest: ContentHash,
) -> Result<ReceiverStream<Result<AgentImageChunk, io::Error>>, ImageError> {
    let (mut file, size_bytes) = store.read(digest).await?;
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
    tokio::spawn(async move {
        let header = AgentImageChunk { blake3: digest.to_string(), size_bytes, data: Vec::new() };
        let mut next = Ok(header);
        // A closed channel means that the other side has gone away.
        while sender.send(next).await.is_ok() {
            let mut data = Vec::with_capacity(CHUNK_BYTES);
            next = match (&mut file).take(CHUNK_BYTES as u64).read_to_end(&mut data).await {
                Ok(0) => return,
                Ok(_) => Ok(AgentImageChunk { data, ..AgentImageChunk::default() }),
                Err(error) => Err(error),
            };
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// Takes an image off a stream of messages and makes it durable.
///
/// # Errors
/// The stream breaks or is no image, or the store fails; then nothing is left.
pub async fn receive(
    store: &ImageStore,
    host: HostId,
    mut stream: Streaming<AgentImageChunk>,
) -> Result<u64, SpreadError> {
    let at = |source| SpreadError::Host { host, source };
    let header = stream.message().await.map_err(at)?.ok_or(SpreadError::NoHeader { host })?;
    let digest: ContentHash = header.blake3.parse().map_err(|_| SpreadError::NoHeader { host })?;
    store.expect_name(digest);
    if store.contains(digest) {
        return Ok(header.size_bytes);
    }
    let mut writer = store.begin(header.size_bytes).await?;
    while let Some(chunk) = stream.message().await.map_err(at)? {
        writer.write(&chunk.data).await?;
    }
    writer.finish(Some(digest)).await?;
    Ok(header.size_bytes)
}

/// Keeps this host complete until the node stops: fetches what the pool's state names and this host lacks, reports
/// what it holds, removes what nobody names.
pub async fn sync_task(context: NodeContext, store: ImageStore) {
    if !context.caught_up().await {
        return;
    }
    let mut changes = context.consensus.watch();
    let mut named = BTreeSet::new();
    loop {
        let state = changes.borrow_and_update().clone();
        let named_before = std::mem::replace(&mut named, names(&state));
        named_before.difference(&named).for_each(|&digest| store.drop_name(digest));
        for image in state.images.values() {
            if let Err(error) = sync_image(&context, &store, &state, image).await {
                tracing::warn!(image = image.name, %error, "image not fetched yet");
            }
        }
        remove_garbage(&store, &context.consensus.local()).await;
        let known = images_seen(&state);
        let changed = async {
            // Most entries concern no image.
            while changes.changed().await.is_ok() {
                if images_seen(&changes.borrow()) != known {
                    return;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep(SYNC_INTERVAL) => {}
            () = context.shutdown.cancelled() => return,
        }
    }
}

fn names(state: &PoolState) -> BTreeSet<ContentHash> {
    state.images.values().map(|image| image.blake3).collect()
}

fn images_seen(state: &PoolState) -> Vec<(proto::ImageId, usize)> {
    state.images.values().map(|image| (image.id, image.holders.len())).collect()
}

async fn sync_image(
    context: &NodeContext,
    store: &ImageStore,
    state: &PoolState,
    image: &Image,
) -> Result<(), SpreadError> {
    let here = store.contains(image.blake3);
    if !here {
        fetch(context, store, state, image).await?;
    }
    if !image.holders.contains(&context.host) {
        store.verify(image.blake3).await?;
        let command = Command::AddImageHolder { image: image.id, host: context.host };
        context.report(command).await;
    }
    Ok(())
}

async fn fetch(
    context: &NodeContext,
    store: &ImageStore,
    state: &PoolState,
    image: &Image,
) -> Result<(), SpreadError> {
    let is_up = |host: &HostId| state.hosts.get(host).is_some_and(|host| host.state == HostState::Up);
    let holders = image.holders.iter().filter(|host| **host != context.host && is_up(host));
    let mut last = SpreadError::Store(ImageError::Missing { digest: image.blake3 });
    for &host in holders {
        let fetched = tokio::time::timeout(TRANSFER_TIMEOUT, fetch_from(context, store, host, image.blake3));
        match fetched.await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => last = error,
            Err(_) => tracing::warn!(%host, image = image.name, "fetching an image took too long"),
        }
    }
    Err(last)
}

async fn fetch_from(
    context: &NodeContext,
    store: &ImageStore,
    host: HostId,
    digest: ContentHash,
) -> Result<(), SpreadError> {
    let at = |source| SpreadError::Host { host, source };
    let mut client = agent(&context.clients, host).map_err(at)?;
    let request = AgentImageRequest { blake3: digest.to_string() };
    let stream = client.fetch_image(request).await.map_err(at)?.into_inner();
    receive(store, host, stream).await?;
    Ok(())
}

async fn remove_garbage(store: &ImageStore, state: &PoolState) {
    let Ok(here) = store.list() else { return };
    for digest in here {
        let named = state.images.values().any(|image| image.blake3 == digest);
        if named || !store.is_garbage(digest) {
            continue;
        }
        match store.remove(digest).await {
            Ok(()) => tracing::info!(%digest, "removed an image that nobody names"),
            Err(error) => tracing::warn!(%digest, %error, "an image that nobody names stays"),
        }
    }
}

fn agent(clients: &HostClients, host: HostId) -> Result<AgentServiceClient<Channel>, tonic::Status> {
    clients.agent(host).map_err(|error| tonic::Status::unavailable(error.to_string()))
}
