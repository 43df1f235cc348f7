//! A client of the whole pool: it talks to any host and goes on with another when one fails.
//!
//! ```text
//!           ┌─────────── nobody answers: pause ───────────┐
//!           ▼                                             │
//!  call ─▶ connect (staggered, first to answer) ─▶ attempt ──▶ answer ─▶ done
//!           ▲                                        │  └────▶ refusal ─▶ failure
//!           └── lost, UNAVAILABLE, or no answer: next host ┘    all of it bounded by PATIENCE and --timeout
//! ```
//!
//! Always holds: an attempt is repeated with the same request, so with the same request id; the pool applies it once.
//! Deliberately absent: a choice of the leader. Any host forwards.

mod connect;

#[cfg(test)]
mod tests;

use crate::{
    config::{Config, HostsFile, merge},
    failure::{Exit, Failure},
};
pub use connect::Channel;
use connect::Connector;
use futures::future::Either;
use proto::v1::{ListHostsRequest, RequestMeta, host_service_client::HostServiceClient};
use std::{
    net::SocketAddr,
    ops::ControlFlow,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{task::JoinHandle, time::Instant};
use tonic::{Response, Status, Streaming};

/// How long a call is repeated while no host can serve it: an election of the pool and the restart of a daemon fit in.
const PATIENCE: Duration = Duration::from_secs(8);

/// Longest wait for one host's answer to one call. A host that hangs without closing its connection costs this once.
pub const ATTEMPT_LIMIT: Duration = Duration::from_secs(5);

/// Pause between attempts: hosts that all refuse at once are not stormed.
const RETRY_PAUSE: Duration = Duration::from_millis(150);

/// Longest wait at the end for the list of hosts, which is a courtesy to the next command.
const LEARN_LIMIT: Duration = Duration::from_millis(500);

/// Calls a method of a service, failing over between hosts: `call!(client, VmServiceClient, show, request)`.
macro_rules! call {
    ($client:expr, $service:ident, $method:ident, $request:expr) => {{
        let request = $request;
        $client.call(move |channel| {
            let request = request.clone();
            async move { $service::new(channel).$method(request).await }
        })
    }};
}
pub(crate) use call;

/// The pool, as seen by one operator.
pub struct Client {
    connector: Connector,
    hosts_file: HostsFile,
    deadline: Option<(Instant, Duration)>,
    state: Mutex<State>,
}

/// What changes while commands run.
struct State {
    /// Where to try, most promising first.
    addresses: Vec<SocketAddr>,
    connection: Option<(SocketAddr, Channel)>,
    learner: Option<JoinHandle<Vec<SocketAddr>>>,
}

/// Meta data of one intended change. Made once, outside of any retry.
#[must_use]
pub fn new_meta() -> Option<RequestMeta> {
    Some(RequestMeta { request_id: uuid::Uuid::new_v4().to_string() })
}

impl Client {
    /// A client that has not connected yet. `timeout` bounds all of its calls together.
    ///
    /// # Errors
    /// When the configuration can't be read or its certificates are none.
    pub fn new(config_path: &Path, timeout: Option<Duration>) -> Result<Self, Failure> {
        let config = Config::read(config_path)?;
        let hosts_file = HostsFile::beside(config_path);
        let addresses = merge(hosts_file.read(), &config.addresses);
        Ok(Self {
            connector: Connector::new(&config)?,
            hosts_file,
            deadline: timeout.map(|limit| (Instant::now() + limit, limit)),
            state: Mutex::new(State { addresses, connection: None, learner: None }),
        })
    }

    /// One call, repeated at other hosts while none can serve it.
    ///
    /// # Errors
    /// The pool's refusal, or why no host could be asked.
    pub async fn call<T, F, Fut>(&self, operation: F) -> Result<T, Failure>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(ATTEMPT_LIMIT, operation).await
    }

    /// As [`Client::call`], for calls that may take a host longer.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn call_within<T, F, Fut>(&self, limit: Duration, operation: F) -> Result<T, Failure>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let start = Instant::now();
        let repeated = async {
            loop {
                let failure = match self.attempt(limit, &operation).await {
                    Ok(answer) => return Ok(answer),
                    Err(Attempt::Refused(failure)) => return Err(failure),
                    Err(Attempt::Unserved(failure)) => failure,
                };
                if start.elapsed() >= PATIENCE {
                    return Err(failure);
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        };
        self.before_deadline(repeated).await
    }

    /// Reads a stream and opens it again whenever it breaks or ends, until `each` says so.
    ///
    /// # Errors
    /// As [`Client::call`], and those of `each`.
    pub async fn follow<T, F, Fut>(
        &self,
        open: F,
        mut each: impl FnMut(T) -> Result<ControlFlow<()>, Failure>,
    ) -> Result<(), Failure>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<Streaming<T>>, Status>>,
    {
        loop {
            let mut stream = self.call(&open).await?;
            if self.read(&mut stream, &mut each).await?.is_break() {
                return Ok(());
            }
        }
    }

    /// Reads a stream until it breaks or ends (`Continue`: it may be opened again), or until `each` says so (`Break`).
    ///
    /// # Errors
    /// The pool's refusal, and those of `each`.
    pub async fn read<T>(
        &self,
        stream: &mut Streaming<T>,
        mut each: impl FnMut(T) -> Result<ControlFlow<()>, Failure>,
    ) -> Result<ControlFlow<()>, Failure> {
        loop {
            match self.before_deadline(async { Ok(stream.message().await) }).await? {
                Ok(Some(item)) => {
                    if each(item)?.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                Ok(None) => break,
                Err(status) if is_unserved(&status) => {
                    self.abandon_current();
                    break;
                }
                Err(status) => return Err(status.into()),
            }
        }
        // Whoever opens it again at once must not storm a host that ends it at once.
        let pause = async {
            tokio::time::sleep(RETRY_PAUSE).await;
            Ok(())
        };
        self.before_deadline(pause).await.map(|()| ControlFlow::Continue(()))
    }

    /// Keeps what was learned of the pool's hosts for the next command.
    pub async fn finish(&self) {
        let (learner, current) = {
            let mut state = self.state();
            (state.learner.take(), state.connection.as_ref().map(|(address, _)| *address))
        };
        let Some(learner) = learner else { return };
        let Ok(Ok(learned)) = tokio::time::timeout(LEARN_LIMIT, learner).await else { return };
        if !learned.is_empty() {
            self.hosts_file.write(&merge(current.into_iter().collect(), &learned));
        }
    }

    async fn attempt<T, F, Fut>(&self, limit: Duration, operation: &F) -> Result<T, Attempt>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let (address, channel) = self.connection().await?;
        match tokio::time::timeout(limit, operation(channel)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) if is_unserved(&status) => {
                self.abandon(address);
                Err(connect::failure_of_lost_call(address, status))
            }
            Ok(Err(status)) => Err(Attempt::Refused(status.into())),
            Err(_) => {
                self.abandon(address);
                let cause = format!("no answer within {limit:?}; a change may have been made all the same");
                let failure = Failure::new(Exit::TimedOut, "NO_ANSWER", format!("host at {address}"), cause);
                Err(Attempt::Unserved(failure.with_remedy("poolctl host list")))
            }
        }
    }

    /// The present connection, or a new one.
    async fn connection(&self) -> Result<(SocketAddr, Channel), Attempt> {
        let addresses = {
            let state = self.state();
            if let Some(connection) = &state.connection {
                return Ok(connection.clone());
            }
            state.addresses.clone()
        };
        let (address, channel) = self.connector.connect_any(&addresses).await?;
        let mut state = self.state();
        state.connection = Some((address, channel.clone()));
        state.learner = Some(tokio::spawn(learn(channel.clone())));
        Ok((address, channel))
    }

    /// Gives up a host for now: it is tried last from here on.
    fn abandon(&self, address: SocketAddr) {
        let mut state = self.state();
        state.connection = None;
        let told = match state.learner.take() {
            // Already finished: what the pool has told is at hand without waiting.
            Some(learner) if learner.is_finished() => {
                futures::FutureExt::now_or_never(learner).and_then(Result::ok).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let mut addresses = merge(std::mem::take(&mut state.addresses), &told);
        addresses.retain(|other| *other != address);
        addresses.push(address);
        state.addresses = addresses;
    }

    fn abandon_current(&self) {
        let current = self.state().connection.as_ref().map(|(address, _)| *address);
        if let Some(address) = current {
            self.abandon(address);
        }
    }

    /// Bounds a step by `--timeout`.
    async fn before_deadline<T>(&self, step: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let Some((deadline, limit)) = self.deadline else { return step.await };
        let expiry = std::pin::pin!(tokio::time::sleep_until(deadline));
        match futures::future::select(std::pin::pin!(step), expiry).await {
            Either::Left((result, _)) => result,
            Either::Right(_) => Err(Failure::timed_out("command", limit)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No step under the lock can be interrupted half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why an attempt got no answer.
pub enum Attempt {
    /// The pool has answered with a refusal; another host would say the same.
    Refused(Failure),
    /// This host could not serve the call; another one may.
    Unserved(Failure),
}

/// Whether another host may do better: the host says so, or the connection broke (then the error has a local source).
fn is_unserved(status: &Status) -> bool {
    status.code() == tonic::Code::Unavailable || std::error::Error::source(status).is_some()
}

/// Asks for all hosts; the answer is only a convenience, so that errors count as "none".
async fn learn(channel: Channel) -> Vec<SocketAddr> {
    let Ok(response) = HostServiceClient::new(channel).list(ListHostsRequest {}).await else {
        return Vec::new();
    };
    let members = response.into_inner().hosts.into_iter().filter(|host| host.state != "removed");
    members.filter_map(|host| host.address.parse().ok()).collect()
}
