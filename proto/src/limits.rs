//! Bounds that both ends of a connection, or several crates, rely on. A bound of one crate alone lives there.

/// Size of a volume block and of a guest page in bytes: the smallest unit that x86 and virtio-blk share.
pub const BLOCK_BYTES: usize = 4096;

/// Size of a huge page of guest memory in bytes: the next one up that every x86-64 has.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Largest gRPC message in bytes: an image chunk or a console log of 1 MiB with room for its frame.
pub const GRPC_MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Largest Raft entry in bytes: consensus stays a control plane, bulk data never goes through it.
pub const RAFT_ENTRY_BYTES_MAX: usize = 256 << 10;

/// Bytes of a serial console that a VM process keeps.
pub const CONSOLE_RING_BYTES: usize = 1 << 20;

/// Longest name of an object in bytes: a DNS label, so that a VM's name can be its host name.
pub const NAME_BYTES_MAX: usize = 63;

/// Piece of an image or snapshot in one message, in bytes.
pub const CHUNK_BYTES: usize = 1 << 20;

const _: () = assert!(CHUNK_BYTES + 4096 <= GRPC_MESSAGE_BYTES_MAX);
const _: () = assert!(CONSOLE_RING_BYTES + 4096 <= GRPC_MESSAGE_BYTES_MAX);

/// A valid object name: 1–63 of `a-z A-Z 0-9 . _ -`, first and last alphanumeric, and not of the form of an id.
#[must_use]
pub fn is_valid_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    let id_prefixes =
        ["host-", "vm-", "vol-", "snap-", "img-", "task-", "mig-", "token-", "group-", "net-", "cluster-"];
    let is_id_form = id_prefixes.iter().any(|prefix| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
    });
    bytes.len() <= NAME_BYTES_MAX
        && ends.iter().all(|end| end.is_some_and(|b| b.is_ascii_alphanumeric()))
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b))
        && !is_id_form
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels_and_never_look_like_ids() {
        for good in ["web1", "a", "db.prod_2", "vm-web", "host-a1"] {
            assert!(is_valid_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "a/b", "a b", "vm-17", "cluster-3", "ü", &"x".repeat(64)] {
            assert!(!is_valid_name(bad), "{bad}");
        }
    }
}
