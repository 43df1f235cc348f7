//! `poolctl image`.

use super::Session;
use crate::{
    args::ImageCommand,
    client::{Client, call, new_meta},
    failure::{Exit, Failure},
    progress::Upload,
    view::ImageView,
};
use futures::{Stream, StreamExt as _, stream};
use proto::{
    ByteCount,
    limits::CHUNK_BYTES,
    v1::{
        DeleteImageRequest, Image, ImageChunk, ImageHeader, ListImagesRequest, image_chunk::Part,
        image_service_client::ImageServiceClient,
    },
};
use std::{
    fs::File,
    io::{Read as _, Seek as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

/// Longest wait for one host to take a whole image: 64 GiB over a gigabit link.
const IMPORT_LIMIT: Duration = Duration::from_secs(600);

/// Runs a command of images.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: ImageCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        ImageCommand::Import { name, file } => {
            let image = import(&session.client, &name, &file).await?;
            let sentence = format!("image {} of {} imported", image.name, ByteCount(image.size_bytes));
            session.output.changed(&ImageView::from(image), &sentence)
        }
        ImageCommand::List => {
            let images = call!(session.client, ImageServiceClient, list, ListImagesRequest {}).await?;
            let views: Vec<ImageView> = images.images.into_iter().map(ImageView::from).collect();
            session.output.list(images.revision, &views)
        }
        ImageCommand::Delete { image } => {
            let request = DeleteImageRequest { meta: new_meta(), image };
            let image = call!(session.client, ImageServiceClient, delete, request).await?;
            let sentence = format!("image {} deleted", image.name);
            session.output.changed(&ImageView::from(image), &sentence)
        }
    }
}

async fn import(client: &Client, name: &str, path: &Path) -> Result<Image, Failure> {
    let refuse = |error: std::io::Error| {
        Failure::new(Exit::Usage, "BAD_FILE", format!("file {}", path.display()), error.to_string())
    };
    let file = File::open(path).map_err(refuse)?;
    let metadata = file.metadata().map_err(refuse)?;
    if !metadata.is_file() {
        return Err(refuse(std::io::Error::other("it is not a regular file")));
    }
    let header = ImageHeader { meta: new_meta(), name: name.to_owned(), size_bytes: metadata.len() };
    let upload = Arc::new(Upload::new(metadata.len()));
    let opened = client.call_within(IMPORT_LIMIT, |channel| {
        // Each attempt reads the file from its beginning, through a descriptor of its own position.
        let chunks = chunks(header.clone(), file.try_clone(), Arc::clone(&upload));
        async move { ImageServiceClient::new(channel).import(chunks).await }
    });
    opened.await
}

/// The messages of an import. A file that can't be read any more ends them early, which the pool refuses by its size.
fn chunks(
    header: ImageHeader,
    file: std::io::Result<File>,
    upload: Arc<Upload>,
) -> impl Stream<Item = ImageChunk> + Send + 'static {
    let rewound = file.and_then(|mut file| file.rewind().map(|()| file));
    let first = ImageChunk { part: Some(Part::Header(header)) };
    let data = stream::unfold((rewound, 0u64), move |(file, sent)| {
        let upload = Arc::clone(&upload);
        async move {
            let mut file = file.ok()?;
            let mut data = Vec::new();
            file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut data).ok().filter(|read| *read > 0)?;
            let sent = sent + data.len() as u64;
            upload.sent(sent);
            Some((ImageChunk { part: Some(Part::Data(data)) }, (Ok(file), sent)))
        }
    });
    stream::iter([first]).chain(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[tokio::test]
    async fn an_import_is_a_header_and_the_whole_file_each_time() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..CHUNK_BYTES + 5).map(|i| (i % 251) as u8).collect();
        file.write_all(&content).unwrap();
        for _attempt in 0..2 {
            let header = ImageHeader { name: "a".to_owned(), ..Default::default() };
            let upload = Arc::new(Upload::new(content.len() as u64));
            let parts: Vec<ImageChunk> = chunks(header, file.try_clone(), upload).collect().await;
            assert!(matches!(&parts[0].part, Some(Part::Header(header)) if header.name == "a"));
            let mut sent = Vec::new();
            for part in &parts[1..] {
                let Some(Part::Data(data)) = &part.part else { panic!("a header in the middle") };
                assert!(data.len() <= CHUNK_BYTES);
                sent.extend_from_slice(data);
            }
            assert_eq!(sent, content);
        }
    }
}
