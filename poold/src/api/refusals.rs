//! A change that is refused is refused in the log before its client is told, so that the same request is not done when it comes
//! again: by another way, late, or from a client that tried another host.
//!
//! ```text
//!  change ─▶ service ─▶ done, or nobody knows ──────────────────────────────────────▶ client
//!                  └──▶ refused ─┬─ by its entry: the state remembers it ───────────▶ client
//!                                └─ before one (no such name): an entry that says so ▶ client
//!                                                            └─ it was done meanwhile, elsewhere: serve it once more
//! ```
//! In front of all services, so that no handler can forget it. Concerned are calls that change something, have one request, carry a
//! request id, and come from somebody who may make changes; the others need no memory, or may leave none. Below the feature level
//! that brought it nothing happens here.

use super::access::{Access, access_of};
use super::principal::{Principal, principal_among};
use super::status;
use crate::calls::{Whole, descriptors, methods, take_ready};
use crate::consensus::{Consensus, ProposeError, ProposeMeta};
use pool_state::command::Govern;
use pool_state::features::Feature;
use pool_state::state::Role;
use pool_state::{Command, Rejection};
use prost::Message as _;
use proto::limits::GRPC_MESSAGE_BYTES_MAX;
use proto::v1::RequestMeta;
use std::collections::BTreeSet;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

#[cfg(test)]
mod tests;

/// Bytes before a message: whether it is compressed, and its length.
const FRAME_BYTES: usize = 5;

/// What every request of a change begins with.
#[derive(Clone, PartialEq, prost::Message)]
struct Begin {
    #[prost(message, optional, tag = "1")]
    meta: Option<RequestMeta>,
}

/// Paths of the changes with one request and one answer.
static CHANGES: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
    let set = descriptors();
    let meta = |field: &prost_types::FieldDescriptorProto| {
        field.number() == 1 && field.type_name() == ".pool.v1.RequestMeta"
    };
    let messages =
        set.file.iter().flat_map(|file| file.message_type.iter().map(move |it| (file.package(), it)));
    let changes: BTreeSet<String> = messages
        .filter(|(_, message)| message.field.iter().any(meta))
        .map(|(package, message)| format!(".{package}.{}", message.name()))
        .collect();
    let concerned = methods(&set).filter(|method| method.is_unary && changes.contains(&method.input));
    concerned.map(|method| method.path).collect()
});

/// Who asks for a change; none: it is no change, or its refusal leaves nothing.
fn asker(request: &Request<Body>) -> Option<Principal> {
    let path = request.uri().path();
    match access_of(path)? {
        Access::User(role) if role >= Role::Operator && CHANGES.contains(path) => {
            principal_among(request.extensions()).ok()
        }
        _ => None,
    }
}

/// The id that a client gave its request.
fn request_id(content: &[u8]) -> Option<String> {
    let (frame, message) = content.split_at_checked(FRAME_BYTES)?;
    // This server takes no compressed messages.
    if frame[0] != 0 {
        return None;
    }
    let begin = Begin::decode(message).ok()?;
    begin.meta.map(|meta| meta.request_id).filter(|id| !id.is_empty())
}

/// Whether an answer says no for good. Where it says that nobody knows, a client asks again, and must find the change possible.
fn is_refusal(code: Code) -> bool {
    match code {
        Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::OutOfRange
        | Code::PermissionDenied => true,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

fn refused<B>(response: &Response<B>) -> bool {
    Status::from_header_map(response.headers()).is_some_and(|status| is_refusal(status.code()))
}

/// Remembers refusals in front of the services.
#[derive(Clone)]
pub struct RefusalLayer {
    consensus: Consensus,
}

impl RefusalLayer {
    /// A layer that proposes here.
    #[must_use]
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }
}

impl<S> Layer<S> for RefusalLayer {
    type Service = Remembering<S>;

    fn layer(&self, inner: S) -> Remembering<S> {
        Remembering { inner, consensus: self.consensus.clone() }
    }
}

/// A service whose refusals are remembered.
#[derive(Clone)]
pub struct Remembering<S> {
    inner: S,
    consensus: Consensus,
}

type BoxFuture<T> = std::pin::Pin<Box<dyn Future<Output = T> + Send>>;

impl<S, B> Service<Request<Body>> for Remembering<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send,
    B: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = futures::future::Either<S::Future, BoxFuture<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        use futures::future::Either;
        let asker = asker(&request).filter(|_| self.consensus.local().has_feature(Feature::Refusals));
        let Some(asker) = asker else { return Either::Left(self.inner.call(request)) };
        let ready = take_ready(&mut self.inner);
        Either::Right(Box::pin(serve(ready, request, self.consensus.clone(), asker)))
    }
}

async fn serve<S, B>(
    mut service: S,
    request: Request<Body>,
    consensus: Consensus,
    asker: Principal,
) -> Result<S::Response, S::Error>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone,
    B: Default,
{
    let Ok(whole) = Whole::read(request).await else {
        let text = format!("the request broke off, or has more than {GRPC_MESSAGE_BYTES_MAX} bytes");
        return Ok(Status::invalid_argument(text).into_http());
    };
    let response = service.call(whole.request()).await?;
    let id = request_id(whole.content()).filter(|_| refused(&response));
    let Some(id) = id else { return Ok(response) };
    match remember(&consensus, &id, asker).await {
        Ok(Remembered::Refused) => Ok(response),
        Ok(Remembered::Done) => {
            std::future::poll_fn(|context| service.poll_ready(context)).await?;
            let again = service.call(whole.request()).await?;
            Ok(if refused(&again) { done_before(&id).into_http() } else { again })
        }
        Err(status) => Ok(status.into_http()),
    }
}

/// What the log says of a request that a service has refused.
enum Remembered {
    /// It is refused from now on.
    Refused,
    /// It was done before: it has come more than once.
    Done,
}

async fn remember(consensus: &Consensus, id: &str, asker: Principal) -> Result<Remembered, Status> {
    let state = consensus.read_linearizable().await.map_err(status::read)?;
    if state.requests.is_refused(id) {
        return Ok(Remembered::Refused);
    }
    let meta = ProposeMeta { request_id: Some(id.to_owned()), principal: asker.to_string() };
    match consensus.propose(Command::Govern(Govern::RefuseRequest), meta).await {
        Ok(_) => Ok(Remembered::Refused),
        Err(ProposeError::Rejected(Rejection::RequestIdReused { .. })) => Ok(Remembered::Done),
        Err(error) => Err(status::proposed(error)),
    }
}

/// A request whose change is in the state, and whose names mean nothing any more, or which was another change.
fn done_before(id: &str) -> Status {
    status::detailed(
        Code::DeadlineExceeded,
        "OUTCOME_UNKNOWN",
        &format!("request {id}"),
        "look at the object; use a new request id for a new change",
        "a request with this id was done before, and what it was about is no longer there",
    )
}
