//! Identifiers and positions as newtypes.
//!
//! An object's id is the index of the Raft entry that created it: never used twice, ordered by creation.
//! It prints with its kind (`vm-17`), and that form is what operators see and type.

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use std::{fmt, str::FromStr};

/// The text is no id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an id of the form `{prefix}NUMBER`")]
pub struct ParseIdError {
    /// What was given.
    pub text: String,
    /// The prefix of the kind, with its dash.
    pub prefix: &'static str,
}

macro_rules! object_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let error = || ParseIdError { text: text.to_owned(), prefix: $prefix };
                let digits = text.strip_prefix($prefix).ok_or_else(error)?;
                if !digits.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(error());
                }
                digits.parse().map($name).map_err(|_| error())
            }
        }
    };
}

object_id!(
    /// A host; also its Raft node id.
    HostId, "host-"
);
object_id!(
    /// A virtual machine.
    VmId, "vm-"
);
object_id!(
    /// A replicated volume.
    VolumeId, "vol-"
);
object_id!(
    /// A snapshot of a volume.
    SnapshotId, "snap-"
);
object_id!(
    /// An imported kernel, initrd or disk image.
    ImageId, "img-"
);
object_id!(
    /// A long operation.
    TaskId, "task-"
);
object_id!(
    /// One attempt to move a VM.
    MigrationId, "mig-"
);
object_id!(
    /// A rule about where VMs run.
    GroupId, "group-"
);
object_id!(
    /// Hosts with one CPU profile.
    ClusterId, "cluster-"
);
object_id!(
    /// A network.
    NetworkId, "net-"
);
object_id!(
    /// A join token.
    TokenId, "token-"
);

/// Largest position that is taken from outside. It is far from 2^64, so that whoever counts on from it does not overflow.
const POSITION_MAX: u64 = 1 << 63;

/// Takes a position from outside.
fn bounded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let value = u64::deserialize(deserializer)?;
    if value > POSITION_MAX {
        let problem = format!("position {value} is beyond {POSITION_MAX}, which no counter reaches");
        return Err(D::Error::custom(problem));
    }
    Ok(value)
}

macro_rules! position {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        pub struct $name(#[serde(deserialize_with = "bounded")] pub u64);

        impl $name {
            /// The largest one that is taken from outside: as a bound, all of them.
            pub const MAX: Self = Self(POSITION_MAX);

            /// The position after this one.
            ///
            /// # Panics
            /// At 2^64, which no counter of the pool reaches; what is decoded is at most [`Self::MAX`].
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("a 64-bit counter does not overflow"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

position!(
    /// Generation of a VM's placement or of a volume's ownership; raised by every change of owner. 0: never owned.
    Epoch
);
position!(
    /// Position of a write in its volume, counted from 1 over all epochs. 0: before the first write.
    Sequence
);
position!(
    /// Generation of a volume's in-sync set.
    IsrVersion
);
position!(
    /// Index of a 4 KiB block in a volume.
    BlockIndex
);
position!(
    /// Index of a 4 KiB page of guest memory, in guest-physical order.
    PageIndex
);

/// One life of a host's replica store: the kernel's boot id and the store's log id.
///
/// A host that lost power comes back as another incarnation, because it may have lost acknowledged writes that were
/// never flushed. A restart of the daemon alone keeps the incarnation: the page cache survived.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation(pub String);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A secret of 32 bytes that lets one owner attach to the replicas of one volume at one epoch.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentSecret(pub [u8; 32]);

impl fmt::Debug for AttachmentSecret {
    /// Prints no byte of the secret, so that it can't reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AttachmentSecret(…)")
    }
}

/// SHA-256 of a certificate in DER.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CertificateFingerprint(pub [u8; 32]);

impl fmt::Display for CertificateFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse_with_their_kind() {
        assert_eq!(VmId(17).to_string(), "vm-17");
        assert_eq!("vm-17".parse(), Ok(VmId(17)));
        for bad in ["vm-", "vm-+1", "17", "vol-17", "vm-99999999999999999999999"] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_position_that_none_reaches_is_refused_where_it_is_decoded() {
        let decode = |value: u64| {
            let bytes = postcard::to_stdvec(&value).unwrap();
            postcard::from_bytes::<Sequence>(&bytes).ok()
        };
        assert_eq!(decode(44), Some(Sequence(44)));
        assert_eq!(decode(Sequence::MAX.0), Some(Sequence::MAX));
        for beyond in [Sequence::MAX.next().0, u64::MAX - 1, u64::MAX] {
            assert_eq!(decode(beyond), None, "{beyond}");
        }
    }

    #[test]
    fn a_secret_does_not_print_its_bytes() {
        assert_eq!(format!("{:?}", AttachmentSecret([7; 32])), "AttachmentSecret(…)");
    }
}
