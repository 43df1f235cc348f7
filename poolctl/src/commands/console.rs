//! `poolctl console`.

mod keyboard;

use super::Session;
use crate::{
    args::ConsoleCommand,
    client::{Client, call},
    failure::{Exit, Failure},
    output::{Format, Output},
    view::ConsoleView,
};
use futures::future::Either;
use keyboard::Keyboard;
use proto::v1::{ConsoleLogResponse, VmRef, console_service_client::ConsoleServiceClient};
use std::{io, ops::ControlFlow, pin::pin};

/// Runs a command of consoles.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: ConsoleCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        ConsoleCommand::Log { vm, follow: false } => show_log(vm, session).await,
        ConsoleCommand::Log { vm, follow: true } => follow_log(vm, session, Cursor::default()).await,
        ConsoleCommand::Serial { vm } => serial(vm, session).await,
    }
}

/// A sitting at the console: what is typed goes to the guest, what it answers comes from now on.
async fn serial(vm: String, session: &mut Session) -> Result<(), Failure> {
    let request = VmRef { r#ref: vm.clone() };
    let log = call!(session.client, ConsoleServiceClient, log, request).await?;
    let seen = Cursor { end: log.offset + log.data.len() as u64, ..Cursor::default() };
    let keyboard = Keyboard::open(&vm)?;
    // The client serves both at once; only the output needs the session to itself.
    let Session { client, output, .. } = session;
    let typing = pin!(keyboard.type_into(&vm, client));
    let following = pin!(follow(vm.clone(), client, output, seen));
    match futures::future::select(typing, following).await {
        Either::Left((typed, _)) => typed,
        Either::Right((followed, _)) => followed,
    }
}

async fn show_log(vm: String, session: &mut Session) -> Result<(), Failure> {
    let log = call!(session.client, ConsoleServiceClient, log, VmRef { r#ref: vm.clone() }).await?;
    match session.output.format() {
        Format::Table | Format::Wide | Format::Name => session.output.raw(&log.data),
        Format::Json | Format::Yaml => session.output.show(&ConsoleView::new(&vm, &log)),
    }
}

/// What of the log is not seen yet, and then what comes.
async fn follow_log(vm: String, session: &mut Session, seen: Cursor) -> Result<(), Failure> {
    let Session { client, output, .. } = session;
    follow(vm, client, output, seen).await
}

/// When the stream breaks, the log fills the gap.
async fn follow(
    vm: String,
    client: &Client,
    output: &mut Output<io::Stdout>,
    mut cursor: Cursor,
) -> Result<(), Failure> {
    let mut print = |piece: ConsoleLogResponse| match output.format() {
        _ if piece.data.is_empty() => Ok(()),
        Format::Table | Format::Wide | Format::Name => output.raw(&piece.data),
        Format::Json | Format::Yaml => output.stream(&ConsoleView::new(&vm, &piece)),
    };
    let mut seen = false;
    // It was there and has stopped: the end, not an error.
    let is_end = |failure: &Failure, seen: bool| seen && failure.exit == Exit::Blocked;
    loop {
        let request = VmRef { r#ref: vm.clone() };
        // Opened before the log is read: together they leave no gap.
        let mut stream = match call!(client, ConsoleServiceClient, follow, request.clone()).await {
            Err(failure) if is_end(&failure, seen) => return Ok(()),
            other => other?,
        };
        seen = true;
        let log = match call!(client, ConsoleServiceClient, log, request).await {
            Err(failure) if is_end(&failure, seen) => return Ok(()),
            other => other?,
        };
        print(cursor.unseen_of_log(log))?;
        let each = |piece| match cursor.unseen_of_stream(piece) {
            Some(piece) => print(piece).map(ControlFlow::Continue),
            None => Ok(ControlFlow::Break(())),
        };
        // What ended or has a gap is opened again.
        let _ended = client.read(&mut stream, each).await?;
    }
}

/// How much of a console has been printed.
#[derive(Default)]
struct Cursor {
    /// Offset after the last byte printed.
    end: u64,
    /// The live output may still repeat the end of the log.
    overlaps: bool,
    /// The beginning of the live output is not seen yet.
    begins: bool,
}

impl Cursor {
    /// The part of a log that is new. A log that ends before what was printed is that of a new process.
    fn unseen_of_log(&mut self, log: ConsoleLogResponse) -> ConsoleLogResponse {
        let log_end = log.offset + log.data.len() as u64;
        if log_end < self.end {
            self.end = 0;
        }
        (self.overlaps, self.begins) = (true, true);
        self.cut(log)
    }

    /// The part of a live piece that is new; none when something is missing before it, which the log has. An empty piece says where
    /// the output of a process begins: of the first one while the log is read, and of others when the VM has moved or started again.
    fn unseen_of_stream(&mut self, piece: ConsoleLogResponse) -> Option<ConsoleLogResponse> {
        let is_mark = piece.data.is_empty();
        if is_mark && std::mem::take(&mut self.begins) {
            return Some(piece);
        }
        self.overlaps &= !is_mark && piece.offset < self.end;
        (self.overlaps || piece.offset == self.end).then(|| self.cut(piece))
    }

    fn cut(&mut self, mut piece: ConsoleLogResponse) -> ConsoleLogResponse {
        let seen = self.end.saturating_sub(piece.offset).min(piece.data.len() as u64);
        piece.offset += seen;
        // `seen` is at most the length, which is a usize.
        piece.data.drain(..seen as usize);
        self.end = self.end.max(piece.offset + piece.data.len() as u64);
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: u64, text: &str) -> ConsoleLogResponse {
        ConsoleLogResponse { data: text.as_bytes().to_vec(), offset }
    }

    #[test]
    fn live_output_that_repeats_the_log_is_cut() {
        let mut cursor = Cursor::default();
        assert_eq!(cursor.unseen_of_log(piece(0, "abcd")), piece(0, "abcd"));
        assert_eq!(cursor.unseen_of_stream(piece(1, "")).unwrap().data, b"");
        assert_eq!(cursor.unseen_of_stream(piece(1, "bc")).unwrap().data, b"");
        assert_eq!(cursor.unseen_of_stream(piece(3, "def")), Some(piece(4, "ef")));
        assert_eq!(cursor.unseen_of_stream(piece(6, "g")), Some(piece(6, "g")));
    }

    #[test]
    fn after_a_break_only_the_gap_is_printed() {
        let mut cursor = Cursor::default();
        cursor.unseen_of_log(piece(0, "abcd"));
        assert_eq!(cursor.unseen_of_log(piece(2, "cdef")), piece(4, "ef"));
    }

    #[test]
    fn what_a_vm_said_while_nobody_followed_its_move_is_missed() {
        let mut cursor = Cursor::default();
        cursor.unseen_of_log(piece(0, "abcd"));
        assert_eq!(cursor.unseen_of_stream(piece(3, "")), Some(piece(3, "")));
        // It has moved and said nothing, and moved again.
        assert_eq!(cursor.unseen_of_stream(piece(4, "")), Some(piece(4, "")));
        assert_eq!(cursor.unseen_of_stream(piece(6, "")), None, "nothing else may ever come");
        assert_eq!(cursor.unseen_of_log(piece(0, "abcdef")), piece(4, "ef"));
        assert_eq!(cursor.unseen_of_stream(piece(6, "g")), Some(piece(6, "g")));
        assert_eq!(cursor.unseen_of_stream(piece(8, "i")), None);
    }

    #[test]
    fn a_new_process_is_printed_from_its_beginning() {
        let mut cursor = Cursor::default();
        cursor.unseen_of_log(piece(0, "abcd"));
        // Its log is shorter than what was printed of the old one.
        assert_eq!(cursor.unseen_of_log(piece(0, "x")), piece(0, "x"));
        assert_eq!(cursor.unseen_of_stream(piece(1, "y")), Some(piece(1, "y")));
        // Live output that begins anew without a look at the log.
        assert_eq!(cursor.unseen_of_stream(piece(1, "")), Some(piece(1, "")));
        assert_eq!(cursor.unseen_of_stream(piece(0, "")), None);
    }
}
