//! A volume as something that an NBD server can serve.

use super::config::VolumeError;
use super::handle::VolumeHandle;
use crate::nbd::{Export, ExportError, Extent, ExtentKind, Zeroing};
use crate::types::{BoxFuture, View};
use crate::wire::DATA_BYTES_MAX;
use bytes::Bytes;

impl From<VolumeError> for ExportError {
    fn from(error: VolumeError) -> Self {
        match error {
            VolumeError::NoSpace => Self::NoSpace,
            VolumeError::OutOfRange { .. } => Self::Invalid,
            VolumeError::Fenced { .. }
            | VolumeError::Closed
            | VolumeError::NotActive
            | VolumeError::Draining => Self::Shutdown,
            VolumeError::UnknownSnapshot { .. }
            | VolumeError::TooManySnapshots { .. }
            | VolumeError::NotEmpty => Self::Invalid,
            VolumeError::Damaged { .. } | VolumeError::NoReplica { .. } => Self::Io,
        }
    }
}

impl Export for VolumeHandle {
    fn size_bytes(&self) -> u64 {
        Self::size_bytes(self)
    }

    fn read(&self, offset: u64, len: u32) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        Box::pin(async move { Ok(Self::read(self, offset, len as usize).await?) })
    }

    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), ExportError>> {
        Box::pin(async move { Ok(Self::write(self, offset, data).await?) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), ExportError>> {
        Box::pin(async move { Ok(Self::flush(self).await?) })
    }

    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), ExportError>> {
        Box::pin(async move { Ok(self.discard(offset, len).await?) })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        zeroing: Zeroing,
    ) -> BoxFuture<'_, Result<(), ExportError>> {
        Box::pin(async move {
            if zeroing == Zeroing::MayFree {
                return Ok(Self::write_zeroes(self, offset, len).await?);
            }
            let zeros = Bytes::from_static(&[0; DATA_BYTES_MAX]);
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let part = usize::try_from(end - at).map_or(DATA_BYTES_MAX, |left| left.min(DATA_BYTES_MAX));
                Self::write(self, at, zeros.slice(..part)).await?;
                at += part as u64;
            }
            Ok(())
        })
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
        Box::pin(async move {
            let runs = self.allocated(View::Live, offset, len).await?;
            let mut extents = Vec::new();
            let mut at = offset;
            for run in runs {
                if run.start > at {
                    extents.push(Extent { len: run.start - at, kind: ExtentKind::Hole });
                }
                extents.push(Extent { len: run.end - run.start, kind: ExtentKind::Data });
                at = run.end;
            }
            if offset + len > at {
                extents.push(Extent { len: offset + len - at, kind: ExtentKind::Hole });
            }
            Ok(extents)
        })
    }
}
