//! What client and server agree on before the first request.

use super::SessionError;
use super::wire::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, FIXED_NEWSTYLE, FLAG_SEND_DF, INFO_BLOCK_SIZE, INFO_EXPORT, MAGIC,
    NO_ZEROES, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_ERR_INVALID,
    REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT, REP_SERVER,
    REQUEST_BYTES_MAX, ReplyStyle, TRANSMISSION_FLAGS,
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest option in bytes: names have at most 4096.
const OPTION_BYTES_MAX: u32 = 16 << 10;

/// Options of one handshake: a client needs four or five.
const OPTIONS_MAX: usize = 64;

/// Block sizes that are announced: sectors; whole blocks are best.
const BLOCK_BYTES_MIN: u32 = 512;
const BLOCK_BYTES_BEST: u32 = 4096;

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Agreed {
    /// How replies are put.
    pub style: ReplyStyle,
    /// The client may ask for block status.
    pub block_status: bool,
}

/// What follows an option.
enum Next {
    Option,
    Transmission,
    End,
}

/// Negotiates; `None`: the client only wanted to look.
///
/// # Errors
/// The connection breaks, or the client is no NBD client.
pub async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    name: &str,
    size: u64,
) -> Result<Option<Agreed>, SessionError> {
    stream.write_u64(MAGIC).await?;
    stream.write_u64(OPTION_MAGIC).await?;
    stream.write_u16(FIXED_NEWSTYLE | NO_ZEROES).await?;
    let client_flags = stream.read_u32().await?;
    if client_flags & u32::from(FIXED_NEWSTYLE) == 0 {
        return Err(SessionError::Protocol("only fixed newstyle is spoken"));
    }
    let mut handshake = Handshake {
        name,
        size,
        no_zeroes: client_flags & u32::from(NO_ZEROES) != 0,
        agreed: Agreed::default(),
    };
    for _ in 0..OPTIONS_MAX {
        if stream.read_u64().await? != OPTION_MAGIC {
            return Err(SessionError::Protocol("no option where one must be"));
        }
        let option = stream.read_u32().await?;
        let len = stream.read_u32().await?;
        if len > OPTION_BYTES_MAX {
            return Err(SessionError::Protocol("an option is too long"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data).await?;
        let mut answer = BytesMut::new();
        let next = handshake.option(option, &mut Bytes::from(data), &mut answer);
        stream.write_all(&answer).await?;
        stream.flush().await?;
        match next {
            Next::Option => {}
            Next::Transmission => return Ok(Some(handshake.agreed)),
            Next::End => return Ok(None),
        }
    }
    Err(SessionError::Protocol("too many options"))
}

struct Handshake<'a> {
    name: &'a str,
    size: u64,
    no_zeroes: bool,
    agreed: Agreed,
}

impl Handshake<'_> {
    fn option(&mut self, option: u32, data: &mut Bytes, answer: &mut BytesMut) -> Next {
        let mut reply = |kind: u32, body: &[u8]| put_reply(answer, option, kind, body);
        match option {
            OPT_EXPORT_NAME if self.is_name(data) => {
                answer.put_u64(self.size);
                answer.put_u16(self.flags());
                answer.put_bytes(0, if self.no_zeroes { 0 } else { 124 });
                return Next::Transmission;
            }
            // This option has no error reply.
            OPT_EXPORT_NAME => return Next::End,
            OPT_ABORT => {
                reply(REP_ACK, &[]);
                return Next::End;
            }
            OPT_LIST => {
                let mut body = BytesMut::new();
                put_text(&mut body, self.name);
                reply(REP_SERVER, &body);
                reply(REP_ACK, &[]);
            }
            OPT_INFO | OPT_GO => return self.info(option, data, answer),
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.agreed.style = ReplyStyle::Structured;
                reply(REP_ACK, &[]);
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.contexts(option, data, answer),
            OPT_STRUCTURED_REPLY => reply(REP_ERR_INVALID, &[]),
            _ => reply(REP_ERR_UNSUP, &[]),
        }
        Next::Option
    }

    fn info(&self, option: u32, data: &mut Bytes, answer: &mut BytesMut) -> Next {
        let name = take_text(data);
        let wanted =
            take_u16(data).and_then(|count| (0..count).map(|_| take_u16(data)).collect::<Option<Vec<u16>>>());
        let (Some(name), Some(_)) = (name, wanted) else {
            put_reply(answer, option, REP_ERR_INVALID, &[]);
            return Next::Option;
        };
        if !self.is_name(&name) {
            put_reply(answer, option, REP_ERR_UNKNOWN, b"there is no such export");
            return Next::Option;
        }
        let mut body = BytesMut::new();
        body.put_u16(INFO_EXPORT);
        body.put_u64(self.size);
        body.put_u16(self.flags());
        put_reply(answer, option, REP_INFO, &body);
        body.clear();
        body.put_u16(INFO_BLOCK_SIZE);
        body.put_u32(BLOCK_BYTES_MIN);
        body.put_u32(BLOCK_BYTES_BEST);
        body.put_u32(REQUEST_BYTES_MAX);
        put_reply(answer, option, REP_INFO, &body);
        put_reply(answer, option, REP_ACK, &[]);
        if option == OPT_GO { Next::Transmission } else { Next::Option }
    }

    fn contexts(&mut self, option: u32, data: &mut Bytes, answer: &mut BytesMut) {
        let name = take_text(data);
        let queries = take_u32(data).and_then(|count| {
            // Each takes four bytes at least.
            if count as usize > data.len() / 4 {
                None
            } else {
                (0..count).map(|_| take_text(data)).collect::<Option<Vec<_>>>()
            }
        });
        let (Some(name), Some(queries)) = (name, queries) else {
            return put_reply(answer, option, REP_ERR_INVALID, &[]);
        };
        if !self.is_name(&name) {
            return put_reply(answer, option, REP_ERR_UNKNOWN, b"there is no such export");
        }
        if option == OPT_SET_META_CONTEXT && self.agreed.style == ReplyStyle::Simple {
            return put_reply(answer, option, REP_ERR_INVALID, b"ask for structured replies first");
        }
        let is_list = option == OPT_LIST_META_CONTEXT;
        let asked = queries.iter().any(|query| query == BASE_ALLOCATION.as_bytes());
        let all = is_list && (queries.is_empty() || queries.iter().any(|query| query == "base:"));
        if !is_list {
            self.agreed.block_status = asked;
        }
        if asked || all {
            let mut body = BytesMut::new();
            body.put_u32(if is_list { 0 } else { BASE_ALLOCATION_ID });
            body.put_slice(BASE_ALLOCATION.as_bytes());
            put_reply(answer, option, REP_META_CONTEXT, &body);
        }
        put_reply(answer, option, REP_ACK, &[]);
    }

    /// The empty name is the default export.
    fn is_name(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    fn flags(&self) -> u16 {
        match self.agreed.style {
            ReplyStyle::Simple => TRANSMISSION_FLAGS,
            ReplyStyle::Structured => TRANSMISSION_FLAGS | FLAG_SEND_DF,
        }
    }
}

fn put_reply(answer: &mut BytesMut, option: u32, kind: u32, body: &[u8]) {
    let (kind, body) =
        if body.len() > OPTION_BYTES_MAX as usize { (REP_ERR_TOO_BIG, &[][..]) } else { (kind, body) };
    answer.put_u64(OPTION_REPLY_MAGIC);
    answer.put_u32(option);
    answer.put_u32(kind);
    answer.put_u32(u32::try_from(body.len()).expect("bounded above"));
    answer.put_slice(body);
}

fn put_text(body: &mut BytesMut, text: &str) {
    body.put_u32(u32::try_from(text.len()).expect("a volume's name is short"));
    body.put_slice(text.as_bytes());
}

fn take_u16(data: &mut Bytes) -> Option<u16> {
    data.try_get_u16().ok()
}

fn take_u32(data: &mut Bytes) -> Option<u32> {
    data.try_get_u32().ok()
}

fn take_text(data: &mut Bytes) -> Option<Bytes> {
    let len = take_u32(data)? as usize;
    (len <= data.len()).then(|| data.split_to(len))
}
