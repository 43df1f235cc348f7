//! Service `ImageService`.

use super::views;
use crate::{
    agent::{image_status, spread_status},
    api::require_user,
    images::{self, ImageStore},
    node::NodeContext,
};
use pool_state::{Command, Outcome};
use proto::{
    ByteCount, ImageId,
    v1::{
        DeleteImageRequest, Image, ImageChunk, ImageHeader, ListImagesRequest, ListImagesResponse,
        image_chunk::Part, image_service_server::ImageService,
    },
};
use tonic::{Request, Response, Status, Streaming};

/// gRPC service `ImageService`.
pub struct ImageApi {
    context: NodeContext,
    store: ImageStore,
}

impl ImageApi {
    /// The service of this host.
    pub fn new(context: NodeContext, store: ImageStore) -> Self {
        Self { context, store }
    }
}

/// Takes the content off the stream into the local store.
async fn receive(
    store: &ImageStore,
    header: &ImageHeader,
    stream: &mut Streaming<ImageChunk>,
) -> Result<pool_state::state::ContentHash, Status> {
    let mut writer = store.begin(header.size_bytes).await.map_err(|error| image_status(&error))?;
    while let Some(chunk) = stream.message().await? {
        let Some(Part::Data(data)) = chunk.part else {
            return Err(Status::invalid_argument("only the first message of an import carries a header"));
        };
        writer.write(&data).await.map_err(|error| image_status(&error))?;
    }
    writer.finish(None).await.map_err(|error| image_status(&error))
}

#[tonic::async_trait]
impl ImageService for ImageApi {
    async fn import(&self, request: Request<Streaming<ImageChunk>>) -> Result<Response<Image>, Status> {
        let principal = require_user(&request)?;
        let mut stream = request.into_inner();
        let first = stream.message().await?.and_then(|chunk| chunk.part);
        let Some(Part::Header(header)) = first else {
            return Err(Status::invalid_argument("the first message of an import must carry the header"));
        };
        if !proto::limits::is_valid_name(&header.name) {
            return Err(Status::invalid_argument(format!("`{}` is no valid name for an image", header.name)));
        }
        let digest = receive(&self.store, &header, &mut stream).await?;
        let state = self.context.read().await?;
        // A retry may find other holders; the command would differ, so it isn't proposed again.
        if let Some(Outcome::Image(image)) = views::answered(&state, header.meta.as_ref()) {
            return Ok(Response::new(views::image(&state, views::found(state.image(image))?)));
        }
        let (me, clients) = (self.context.host, &self.context.clients);
        let holders = images::push(&self.store, clients, &state, me, digest)
            .await
            .map_err(|error| spread_status(&error))?;
        let size = ByteCount(header.size_bytes);
        let command = Command::CreateImage { name: header.name, blake3: digest, size, holders };
        let (outcome, state) = self.context.change(&principal, header.meta, command).await?;
        let Outcome::Image(image) = outcome else { return Err(views::unexpected(outcome)) };
        Ok(Response::new(views::image(&state, views::found(state.image(image))?)))
    }

    async fn list(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let images = state.images.values().map(|image| views::image(&state, image)).collect();
        Ok(Response::new(ListImagesResponse { revision: state.revision, images }))
    }

    async fn delete(&self, request: Request<DeleteImageRequest>) -> Result<Response<Image>, Status> {
        let principal = require_user(&request)?;
        let DeleteImageRequest { meta, image } = request.into_inner();
        let before = self.context.read().await?;
        let Some(found) = views::to_delete(&before, meta.as_ref(), before.resolve_image(&image))? else {
            return Ok(Response::new(Image { name: image, ..Image::default() }));
        };
        // The answer shows what was deleted.
        let image = views::image(&before, found);
        self.context.change(&principal, meta, Command::DeleteImage { image: ImageId(image.id) }).await?;
        Ok(Response::new(image))
    }
}
