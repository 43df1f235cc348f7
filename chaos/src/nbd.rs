//! A client of NBD that knows what it was answered: fixed newstyle, simple replies, one request at a time.
//!
//! Absent on purpose: everything that the stamps don't need (structured replies, TLS, several requests in flight).

use anyhow::{Context, Result, bail, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Fixed newstyle, without the zeros after the export's data.
const CLIENT_FLAGS: u32 = 0b11;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const READ: u16 = 0;
const WRITE: u16 = 1;
/// The data is durable before the answer.
const FUA: u16 = 1;
/// Longest part of a handshake that is read.
const REPLY_BYTES_MAX: u32 = 1 << 16;
/// A server that says nothing for longer hangs or is gone; what was asked is then unknown.
const TIMEOUT: Duration = Duration::from_secs(4);

/// An open export.
#[derive(Debug)]
pub struct Export {
    stream: UnixStream,
    handle: u64,
}

impl Export {
    /// Opens an export behind a unix socket.
    ///
    /// # Errors
    /// Nobody listens, or there is no such export.
    pub fn open(socket: &Path, name: &str) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connect {}", socket.display()))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let mut export = Self { stream, handle: 0 };
        ensure!(export.u64()? == NBDMAGIC && export.u64()? == IHAVEOPT, "the server speaks no NBD");
        let _flags = export.u16()?;
        let name_len = u32::try_from(name.len())?;
        let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPTION_GO.to_be_bytes());
        hello.extend((4 + name_len + 2).to_be_bytes());
        hello.extend(name_len.to_be_bytes());
        hello.extend(name.as_bytes());
        // No further information is asked for.
        hello.extend(0_u16.to_be_bytes());
        export.stream.write_all(&hello)?;
        loop {
            ensure!(export.u64()? == OPTION_REPLY, "an answer is none");
            let (_option, reply, len) = (export.u32()?, export.u32()?, export.u32()?);
            ensure!(len <= REPLY_BYTES_MAX, "an answer of {len} bytes");
            let mut data = vec![0; len as usize];
            export.stream.read_exact(&mut data)?;
            match reply {
                REPLY_INFO => {}
                REPLY_ACK => return Ok(export),
                _ => bail!("export `{name}` was refused: {}", String::from_utf8_lossy(&data)),
            }
        }
    }

    /// Writes; on return it is durable.
    ///
    /// # Errors
    /// It failed, or there was no answer: it may have happened, or happen yet.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.ask(WRITE, FUA, offset, u32::try_from(data.len())?, data)
    }

    /// Reads.
    ///
    /// # Errors
    /// It failed, or there was no answer.
    pub fn read(&mut self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.ask(READ, 0, offset, u32::try_from(out.len())?, &[])?;
        Ok(self.stream.read_exact(out)?)
    }

    fn ask(&mut self, kind: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> Result<()> {
        self.handle += 1;
        let mut request = REQUEST.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(self.handle.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)?;
        let (magic, error, handle) = (self.u32()?, self.u32()?, self.u64()?);
        ensure!(magic == SIMPLE_REPLY && handle == self.handle, "an answer to something else");
        ensure!(error == 0, "the server answers with error {error}");
        Ok(())
    }

    fn u16(&mut self) -> Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}
