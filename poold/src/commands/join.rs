//! `poold join` and `poold rekey`: a host becomes a member, or comes with another key.

use super::{Failure, chain};
use crate::cli::HostArgs;
use crate::join::{JoinError, JoinOptions, Joined, join};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use tonic::Code;

/// Runs the command.
pub async fn run(args: HostArgs, token: String) -> Result<(), Failure> {
    if !proto::limits::is_valid_name(&args.host_name) {
        return Err(Failure::usage(format!("`{}` is no valid host name", args.host_name)));
    }
    let created = DirBuilder::new().recursive(true).mode(0o700).create(&args.data);
    created.map_err(|error| Failure::failed(format!("{} can't be created: {error}", args.data.display())))?;
    let data = args.data.display().to_string();
    let options = JoinOptions {
        data_dir: args.data,
        host_name: args.host_name,
        listen: args.listen,
        vm_memory_bytes: args.vm_memory.map(|size| size.0),
        feature_level_max: args.feature_level,
        token,
    };
    let (config, joined) =
        join(options).await.map_err(|error| Failure { code: code(&error), message: chain(&error) })?;
    match joined {
        Joined::Now => eprintln!("Host {} has joined as {}.", config.host_name, config.host()),
        Joined::Before => eprintln!("Host {} had already joined as {}.", config.host_name, config.host()),
    }
    eprintln!("Next:\n  poold serve --data {data}");
    Ok(())
}

/// Gives a member another key.
pub async fn rekey(data: &Path, token: &str) -> Result<(), Failure> {
    let config = crate::join::rekey(data, token)
        .await
        .map_err(|error| Failure { code: code(&error), message: chain(&error) })?;
    eprintln!(
        "Host {} has another key; the old one is void. A running daemon takes it by itself.",
        config.host_name
    );
    Ok(())
}

fn code(error: &JoinError) -> u8 {
    match error {
        JoinError::Token(_) => 2,
        JoinError::Problems { token_refused: true, .. } => 7,
        JoinError::Problems { .. } | JoinError::OtherPool { .. } | JoinError::WasRemoved { .. } => 4,
        JoinError::NoMember { .. } => 4,
        JoinError::Unreachable { .. } => 5,
        JoinError::WrongPool { .. } | JoinError::Denied { .. } => 7,
        JoinError::Refused { code, .. } => match code {
            Code::FailedPrecondition => 4,
            Code::Unavailable => 5,
            Code::DeadlineExceeded => 6,
            _ => 1,
        },
        JoinError::Identity(_) | JoinError::Key { .. } | JoinError::Stores { .. } | JoinError::Config(_) => 1,
    }
}
