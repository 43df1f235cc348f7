//! The keyboard of a sitting at a serial console.
//!
//! A terminal is put into raw mode, so that every key goes to the guest, Ctrl-C too; Ctrl-] ends the sitting. Input that is no
//! terminal is typed to its end. What the guest's line has no room for is typed again later; nothing is skipped.

use crate::{
    client::{Client, call},
    failure::Failure,
};
use proto::v1::{ConsoleTypeRequest, console_service_client::ConsoleServiceClient};
use std::{
    io::{self, IsTerminal as _, Read as _},
    time::Duration,
};
use tokio::sync::mpsc;

/// Ctrl-], which ends a sitting as it does with telnet and virsh.
const ESCAPE: u8 = 0x1d;

/// Bytes read at once: what the pool takes in one request.
const PIECE_BYTES: usize = 4 << 10;

/// Pieces read ahead; whoever pastes more waits for the guest.
const PIECES_AHEAD: usize = 4;

/// Pause before bytes are typed again that the guest's line had no room for.
const FULL_LINE_PAUSE: Duration = Duration::from_millis(50);

/// How long the guest's answer to the last line of input from a file or a pipe is waited for.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// What is typed, piece by piece.
pub struct Keyboard {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    terminal: Option<RawTerminal>,
}

impl Keyboard {
    /// Begins to read standard input.
    ///
    /// # Errors
    /// The terminal can't be put into raw mode.
    pub fn open(vm: &str) -> Result<Self, Failure> {
        let terminal = io::stdin().is_terminal().then(|| RawTerminal::enter(vm)).transpose()?;
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
        // A thread of its own: a read of a terminal can't be cancelled, and must not keep the program from ending.
        std::thread::spawn(move || {
            let mut buffer = vec![0; PIECE_BYTES];
            loop {
                let piece = io::stdin().read(&mut buffer).map(|count| buffer[..count].to_vec());
                let is_last = !matches!(&piece, Ok(piece) if !piece.is_empty());
                if sender.blocking_send(piece).is_err() || is_last {
                    return;
                }
            }
        });
        Ok(Self { pieces, terminal })
    }

    /// Types until the input or the sitting ends.
    ///
    /// # Errors
    /// The pool's refusal, or why standard input can't be read.
    pub async fn type_into(mut self, vm: &str, client: &Client) -> Result<(), Failure> {
        let session = uuid::Uuid::new_v4().to_string();
        let mut offset = 0;
        while let Some(piece) = self.pieces.recv().await {
            let piece = piece.map_err(|error| Failure::local("standard input", error))?;
            if piece.is_empty() {
                tokio::time::sleep(LAST_ANSWER).await;
                break;
            }
            let end = piece.iter().position(|&byte| byte == ESCAPE).filter(|_| self.terminal.is_some());
            let mut rest = &piece[..end.unwrap_or(piece.len())];
            while !rest.is_empty() {
                let request = ConsoleTypeRequest {
                    r#ref: vm.to_owned(),
                    session: session.clone(),
                    offset,
                    data: rest.to_vec(),
                };
                let typed = call!(client, ConsoleServiceClient, r#type, request).await?;
                let taken = typed.next_offset.saturating_sub(offset);
                let taken = usize::try_from(taken).unwrap_or(usize::MAX).min(rest.len());
                offset += taken as u64;
                rest = &rest[taken..];
                if !rest.is_empty() {
                    tokio::time::sleep(FULL_LINE_PAUSE).await;
                }
            }
            if end.is_some() {
                break;
            }
        }
        Ok(())
    }
}

/// A terminal in raw mode, until it is dropped.
struct RawTerminal;

impl RawTerminal {
    #[expect(clippy::print_stderr, reason = "for the person at the terminal, beside the guest's own output")]
    fn enter(vm: &str) -> Result<Self, Failure> {
        eprintln!("Serial console of {vm}; Ctrl-] ends it.");
        crossterm::terminal::enable_raw_mode().map_err(|error| Failure::local("terminal", error))?;
        Ok(Self)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The shell's next prompt sets what it needs anyhow.
        let _ = crossterm::terminal::disable_raw_mode();
    }
}
