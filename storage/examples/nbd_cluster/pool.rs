//! A pool of which nothing fails: it commits what it is asked to. It lives in the owner's process; replicas ask by socket.

use crate::{EPOCH, SECRET};
use anyhow::{Result, ensure};
use proto::{ByteCount, VolumeId};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use storage::{
    AttachRefused, Attachment, Authority, BoxFuture, EpochStart, IsrMember, ProposalError, VolumeProposal,
    VolumeView,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// Longest message in bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// What the pool has committed.
pub struct Pool {
    view: Mutex<VolumeView>,
}

impl Pool {
    pub fn new(view: VolumeView) -> Arc<Self> {
        Arc::new(Self { view: Mutex::new(view) })
    }

    /// The volume as it is.
    pub fn view(&self) -> VolumeView {
        self.view.lock().expect("nobody panics with the lock").clone()
    }

    fn commit(&self, proposal: VolumeProposal) -> Result<VolumeView, ProposalError> {
        let mut view = self.view.lock().expect("nobody panics with the lock");
        match proposal {
            VolumeProposal::RecordStart { epoch, start, .. } => {
                view.epoch_history = vec![EpochStart { epoch, start: Some(start) }];
            }
            VolumeProposal::RemoveFromIsr { isr_version, host, .. } if isr_version == view.isr_version => {
                view.isr.retain(|member| member.host != host);
                view.isr_version = view.isr_version.next();
            }
            VolumeProposal::AddToIsr { isr_version, host, incarnation, .. }
                if isr_version == view.isr_version =>
            {
                view.isr.push(IsrMember { host, incarnation });
                view.isr_version = view.isr_version.next();
            }
            VolumeProposal::RemoveFromIsr { .. } | VolumeProposal::AddToIsr { .. } => {
                return Err(ProposalError::Conflict { view: view.clone() });
            }
        }
        Ok(view.clone())
    }

    /// Answers replicas until the process ends.
    pub async fn serve(self: Arc<Self>, listener: UnixListener) {
        while let Ok((mut stream, _)) = listener.accept().await {
            let pool = self.clone();
            tokio::spawn(async move {
                let answered = async {
                    let proposal = postcard::from_bytes(&read(&mut stream).await?)?;
                    write(&mut stream, &postcard::to_stdvec(&pool.commit(proposal))?).await
                };
                if let Err(error) = answered.await {
                    eprintln!("a proposal was not answered: {error}");
                }
            });
        }
    }
}

/// The pool as a replica reaches it.
pub struct RemotePool {
    pub socket: PathBuf,
    pub size: ByteCount,
}

impl Authority for RemotePool {
    fn attachment(&self, _: VolumeId, _: proto::Epoch) -> BoxFuture<'_, Result<Attachment, AttachRefused>> {
        let attachment = Attachment { epoch: EPOCH, secret: SECRET, size: self.size };
        Box::pin(async move { Ok(attachment) })
    }

    fn propose(&self, proposal: VolumeProposal) -> BoxFuture<'_, Result<VolumeView, ProposalError>> {
        Box::pin(async move {
            ask(&self.socket, &proposal)
                .await
                .unwrap_or_else(|error| Err(ProposalError::Unavailable { cause: error.to_string() }))
        })
    }
}

async fn ask(socket: &Path, proposal: &VolumeProposal) -> Result<Result<VolumeView, ProposalError>> {
    let mut stream = UnixStream::connect(socket).await?;
    write(&mut stream, &postcard::to_stdvec(proposal)?).await?;
    Ok(postcard::from_bytes(&read(&mut stream).await?)?)
}

async fn write(stream: &mut UnixStream, message: &[u8]) -> Result<()> {
    stream.write_u32_le(u32::try_from(message.len())?).await?;
    Ok(stream.write_all(message).await?)
}

async fn read(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let len = stream.read_u32_le().await? as usize;
    ensure!(len <= MESSAGE_BYTES_MAX, "a message of {len} bytes");
    let mut message = vec![0; len];
    stream.read_exact(&mut message).await?;
    Ok(message)
}
