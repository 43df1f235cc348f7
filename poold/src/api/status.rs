//! Errors as callers see them: a gRPC status whose details hold the machine-readable cause (`pool.v1.ErrorDetail`).

use crate::consensus::{ProposeError, ReadError};
use pool_state::{Rejection, RejectionClass};
use prost::Message as _;
use proto::v1::ErrorDetail;
use tonic::{Code, Status};

/// A status with its cause, object and remedy.
pub fn detailed(code: Code, reason: &str, object: &str, remedy: &str, message: &str) -> Status {
    let detail =
        ErrorDetail { reason: reason.to_owned(), object: object.to_owned(), remedy: remedy.to_owned() };
    Status::with_details(code, message, detail.encode_to_vec().into())
}

/// A command that the state does not allow.
pub fn rejected(rejection: &Rejection) -> Status {
    let code = match rejection.class() {
        RejectionClass::NotFound => Code::NotFound,
        RejectionClass::Precondition | RejectionClass::Conflict => Code::FailedPrecondition,
        RejectionClass::Invalid => Code::InvalidArgument,
        RejectionClass::Denied => Code::PermissionDenied,
    };
    detailed(code, rejection.reason_code(), &rejection.object(), &rejection.remedy(), &rejection.to_string())
}

/// A proposal that failed or has no answer.
pub fn proposed(error: ProposeError) -> Status {
    let message = error.to_string();
    match error {
        ProposeError::Rejected(rejection) => rejected(&rejection),
        ProposeError::Invalid { .. } => {
            detailed(Code::InvalidArgument, "INVALID_REQUEST", "the request", "correct the request", &message)
        }
        ProposeError::NoQuorum => no_quorum(&message),
        ProposeError::Unknown => detailed(
            Code::DeadlineExceeded,
            "OUTCOME_UNKNOWN",
            "the request",
            "repeat the command with the same request id, or look at the object",
            &message,
        ),
        ProposeError::Stopped { .. } => no_quorum(&message),
    }
}

/// A read that no majority confirmed.
pub fn read(error: ReadError) -> Status {
    no_quorum(&error.to_string())
}

fn no_quorum(message: &str) -> Status {
    detailed(
        Code::Unavailable,
        "NO_QUORUM",
        "the pool",
        "bring enough hosts back, or look with `poolctl host list`",
        message,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(status: &Status) -> String {
        ErrorDetail::decode(status.details()).unwrap().reason
    }

    #[test]
    fn each_failure_has_its_code_and_says_what_to_do() {
        let no_token = proposed(ProposeError::Rejected(Rejection::TokenUnknown));
        assert_eq!(no_token.code(), Code::PermissionDenied);
        let taken = Rejection::AddressTaken { address: "a".to_owned(), host: "h".to_owned() };
        assert_eq!(proposed(taken.into()).code(), Code::FailedPrecondition);
        for (status, code, word) in [
            (proposed(ProposeError::NoQuorum), Code::Unavailable, "NO_QUORUM"),
            (read(ReadError::NoQuorum), Code::Unavailable, "NO_QUORUM"),
            (proposed(ProposeError::Unknown), Code::DeadlineExceeded, "OUTCOME_UNKNOWN"),
            (
                proposed(ProposeError::Invalid { cause: "x".to_owned() }),
                Code::InvalidArgument,
                "INVALID_REQUEST",
            ),
        ] {
            assert_eq!((status.code(), reason(&status).as_str()), (code, word));
            assert!(!ErrorDetail::decode(status.details()).unwrap().remedy.is_empty());
        }
    }
}
