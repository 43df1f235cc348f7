//! What went wrong, as an operator needs it: the object, the cause, and the command to run next.

use prost::Message as _;
use proto::v1::ErrorDetail;
use tonic::{Code, Status};

/// Exit codes. Scripts rely on them: a code never changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Anything without a code of its own.
    Failed = 1,
    /// The command line or a value on it is wrong.
    Usage = 2,
    /// An object does not exist.
    NotFound = 3,
    /// The pool's present state forbids it.
    Blocked = 4,
    /// No host could be reached, or those that could have no majority.
    NoQuorum = 5,
    /// It took longer than was allowed; a task that was begun goes on.
    TimedOut = 6,
    /// The certificate does not permit it.
    Denied = 7,
}

impl Exit {
    /// The class of a gRPC code.
    #[must_use]
    pub fn of_code(code: Code) -> Self {
        match code {
            Code::NotFound => Self::NotFound,
            Code::FailedPrecondition | Code::AlreadyExists | Code::ResourceExhausted | Code::Aborted => {
                Self::Blocked
            }
            Code::InvalidArgument => Self::Usage,
            Code::Unavailable => Self::NoQuorum,
            Code::DeadlineExceeded => Self::TimedOut,
            Code::Unauthenticated | Code::PermissionDenied => Self::Denied,
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Internal
            | Code::DataLoss => Self::Failed,
        }
    }
}

/// Why a command did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {cause}")]
pub struct Failure {
    /// Class, and exit code of the process.
    pub exit: Exit,
    /// Stable upper-case code, such as `VM_NOT_FOUND`.
    pub reason: String,
    /// What it is about, such as `vm web1`; empty when the cause says so itself.
    pub object: String,
    /// What happened, one line.
    pub cause: String,
    /// What to do next; empty when there is nothing to say.
    pub remedy: String,
}

impl Failure {
    /// A failure with a reason of our own.
    #[must_use]
    pub fn new(exit: Exit, reason: &str, object: impl Into<String>, cause: impl Into<String>) -> Self {
        let (object, cause) = (object.into(), cause.into());
        Self { exit, reason: reason.to_owned(), object, cause, remedy: String::new() }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// Something on this machine refused, such as a file.
    #[must_use]
    pub fn local(object: impl Into<String>, error: impl std::fmt::Display) -> Self {
        Self::new(Exit::Failed, "LOCAL_ERROR", object, error.to_string())
    }

    /// A call ran into the caller's own deadline.
    #[must_use]
    pub fn timed_out(object: impl Into<String>, limit: std::time::Duration) -> Self {
        Self::new(Exit::TimedOut, "TIMED_OUT", object, format!("not finished within {limit:?}; it goes on"))
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let detail = ErrorDetail::decode(status.details()).unwrap_or_default();
        let exit = Exit::of_code(status.code());
        let reason = if detail.reason.is_empty() { code_name(status.code()) } else { detail.reason };
        let cause = match status.message() {
            "" => status.code().description().to_owned(),
            message => one_line(message),
        };
        Self { exit, reason, object: one_line(&detail.object), cause, remedy: one_line(&detail.remedy) }
    }
}

/// `NotFound` as `NOT_FOUND`.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(letter.to_uppercase());
    }
    name
}

/// Text of a peer for a terminal: one line, no control characters.
fn one_line(text: &str) -> String {
    let visible: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    visible.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_its_exit_code() {
        let table = [
            (Code::NotFound, 3),
            (Code::FailedPrecondition, 4),
            (Code::AlreadyExists, 4),
            (Code::ResourceExhausted, 4),
            (Code::Aborted, 4),
            (Code::InvalidArgument, 2),
            (Code::Unavailable, 5),
            (Code::DeadlineExceeded, 6),
            (Code::Unauthenticated, 7),
            (Code::PermissionDenied, 7),
            (Code::Internal, 1),
            (Code::Unknown, 1),
            (Code::OutOfRange, 1),
        ];
        for (code, exit) in table {
            assert_eq!(Exit::of_code(code) as u8, exit, "{code:?}");
        }
    }

    #[test]
    fn a_status_with_details_becomes_object_cause_and_remedy() {
        let detail = ErrorDetail {
            reason: "VM_NOT_FOUND".to_owned(),
            object: "vm web1".to_owned(),
            remedy: "poolctl vm list".to_owned(),
        };
        let status =
            Status::with_details(Code::NotFound, "there is no\nvm `web1`", detail.encode_to_vec().into());
        let failure = Failure::from(status);
        assert_eq!(failure.exit, Exit::NotFound);
        assert_eq!(failure.reason, "VM_NOT_FOUND");
        assert_eq!(failure.object, "vm web1");
        assert_eq!(failure.cause, "there is no vm `web1`");
        assert_eq!(failure.remedy, "poolctl vm list");
    }

    #[test]
    fn a_status_with_garbage_for_details_still_tells_code_and_cause() {
        let status =
            Status::with_details(Code::FailedPrecondition, "the brake is on", vec![0xff, 0xff, 0x01].into());
        let failure = Failure::from(status);
        assert_eq!((failure.exit, failure.reason.as_str()), (Exit::Blocked, "FAILED_PRECONDITION"));
        assert_eq!(failure.cause, "the brake is on");
    }
}
