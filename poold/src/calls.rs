//! What whoever stands in front of all services needs: which calls there are, and a call that may be served more than once.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use prost::Message as _;
use proto::limits::GRPC_MESSAGE_BYTES_MAX;
use tonic::body::Body;
use tonic::codegen::http::Request;
use tonic::codegen::http::request::Parts;

/// A call of the API.
pub struct Method {
    /// As a request names it: `/package.Service/Method`.
    pub path: String,
    /// The type of its request: `.package.Message`.
    pub input: String,
    /// One request and one answer.
    pub is_unary: bool,
}

/// The API as its descriptors tell of it, which reflection serves, too.
pub fn descriptors() -> prost_types::FileDescriptorSet {
    prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).expect("the descriptors are our own")
}

/// All calls in it.
pub fn methods(set: &prost_types::FileDescriptorSet) -> impl Iterator<Item = Method> + '_ {
    let services =
        set.file.iter().flat_map(|file| file.service.iter().map(move |service| (file.package(), service)));
    services.flat_map(|(package, service)| {
        service.method.iter().map(move |method| Method {
            path: format!("/{package}.{}/{}", service.name(), method.name()),
            input: method.input_type().to_owned(),
            is_unary: !method.client_streaming() && !method.server_streaming(),
        })
    })
}

/// The service that was asked whether it is ready, for a call that goes on beside: the clone that stays was not asked.
pub fn take_ready<S: Clone>(service: &mut S) -> S {
    let waiting = service.clone();
    std::mem::replace(service, waiting)
}

/// A request whose content is here.
pub struct Whole {
    parts: Parts,
    content: Bytes,
}

impl Whole {
    /// Reads a request.
    ///
    /// # Errors
    /// It breaks off, or is larger than requests are: then there is only its head.
    pub async fn read(request: Request<Body>) -> Result<Self, Self> {
        let (parts, body) = request.into_parts();
        match Limited::new(body, GRPC_MESSAGE_BYTES_MAX).collect().await {
            Ok(content) => Ok(Self { parts, content: content.to_bytes() }),
            Err(_) => Err(Self { parts, content: Bytes::new() }),
        }
    }

    /// Its content.
    pub fn content(&self) -> &[u8] {
        &self.content
    }

    /// It, once more.
    pub fn request(&self) -> Request<Body> {
        Request::from_parts(self.parts.clone(), Body::new(Full::new(self.content.clone())))
    }
}
