//! What the store promises about content, leftovers and limits.

use super::{ImageError, ImageStore};
use pool_state::state::ContentHash;

fn hash(content: &[u8]) -> ContentHash {
    ContentHash(*blake3::hash(content).as_bytes())
}

async fn put(store: &ImageStore, content: &[u8]) -> ContentHash {
    let mut writer = store.begin(content.len() as u64).await.unwrap();
    for chunk in content.chunks(3) {
        writer.write(chunk).await.unwrap();
    }
    writer.finish(None).await.unwrap()
}

fn files(dir: &tempfile::TempDir) -> Vec<String> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn an_image_is_found_under_the_hash_of_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().to_owned()).unwrap();
    let digest = put(&store, b"kernel").await;
    assert_eq!(digest, hash(b"kernel"));
    assert_eq!(store.list().unwrap(), vec![digest]);
    assert_eq!(std::fs::read(store.verify(digest).await.unwrap()).unwrap(), b"kernel");
}

#[tokio::test]
async fn an_import_that_ends_early_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().to_owned()).unwrap();
    let mut writer = store.begin(6).await.unwrap();
    writer.write(b"ker").await.unwrap();
    assert_eq!(files(&dir).len(), 1);
    assert!(matches!(writer.finish(None).await, Err(ImageError::WrongSize { received_bytes: 3, .. })));
    assert_eq!(files(&dir), Vec::<String>::new());
    drop(store.begin(6).await.unwrap());
    assert_eq!(files(&dir), Vec::<String>::new());
}

#[tokio::test]
async fn more_content_than_announced_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().to_owned()).unwrap();
    let mut writer = store.begin(2).await.unwrap();
    assert!(matches!(writer.write(b"abc").await, Err(ImageError::WrongSize { announced_bytes: 2, .. })));
}

#[tokio::test]
async fn content_other_than_expected_gets_no_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().to_owned()).unwrap();
    let mut writer = store.begin(3).await.unwrap();
    writer.write(b"bad").await.unwrap();
    let result = writer.finish(Some(hash(b"good"))).await;
    assert!(matches!(result, Err(ImageError::WrongContent { .. })));
    assert_eq!(files(&dir), Vec::<String>::new());
}

#[tokio::test]
async fn leftovers_of_a_killed_daemon_are_removed_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tmp-3"), b"half").unwrap();
    ImageStore::open(dir.path().to_owned()).unwrap();
    assert_eq!(files(&dir), Vec::<String>::new());
}

#[tokio::test]
async fn a_damaged_image_is_removed_so_that_it_is_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().to_owned()).unwrap();
    let digest = put(&store, b"kernel").await;
    std::fs::write(store.path(digest), b"kernek").unwrap();
    assert!(matches!(store.verify(digest).await, Err(ImageError::WrongContent { .. })));
    assert!(matches!(store.verify(digest).await, Err(ImageError::Missing { .. })));
}

#[tokio::test]
async fn what_can_not_fit_is_refused_before_a_byte_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().to_owned()).unwrap();
    assert!(matches!(store.begin(u64::MAX).await, Err(ImageError::TooLarge { .. })));
    assert!(matches!(store.begin(0).await, Err(ImageError::Empty)));
    assert_eq!(files(&dir), Vec::<String>::new());
}

#[tokio::test]
async fn a_fresh_image_that_nobody_names_yet_is_no_garbage() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().to_owned()).unwrap();
    let digest = put(&store, b"kernel").await;
    assert!(!store.is_garbage(digest));
    let hours_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(7200);
    std::fs::File::options().write(true).open(store.path(digest)).unwrap().set_modified(hours_ago).unwrap();
    assert!(store.is_garbage(digest));
}

#[tokio::test]
async fn a_deleted_image_is_garbage_at_once_unless_it_is_imported_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().to_owned()).unwrap();
    let digest = put(&store, b"kernel").await;
    store.drop_name(digest);
    assert!(store.is_garbage(digest));
    assert_eq!(put(&store, b"kernel").await, digest);
    assert!(!store.is_garbage(digest));
}
