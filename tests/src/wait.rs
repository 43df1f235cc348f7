//! Waiting for a condition: the one place of the tests that polls.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Pause between two looks at a condition: short against every bound that tests check. It grows with the time that was waited: a look
/// is often a `poolctl`, and what is awaited for long wants the processor itself.
const LOOK_AGAIN: Duration = Duration::from_millis(15);
const LOOK_AGAIN_MAX: Duration = Duration::from_millis(75);
/// Looks in the time that was waited.
const LOOKS: u32 = 20;

fn pause(waited: Duration) -> Duration {
    (waited / LOOKS).clamp(LOOK_AGAIN, LOOK_AGAIN_MAX)
}

/// Calls `look` until it yields a value, and returns that.
///
/// `Ok(None)` means "not yet". An error also means "not yet", because a host that is being killed gives errors; the last
/// one is part of the message.
///
/// # Errors
/// When `deadline` has passed: says `what` was awaited and the last error seen.
pub fn wait_until<T>(
    deadline: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        let last = match look() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= deadline {
            match last {
                Some(error) => return Err(error.context(format!("waited {deadline:?} in vain: {what}"))),
                None => bail!("waited {deadline:?} in vain: {what}"),
            }
        }
        std::thread::sleep(pause(start.elapsed()));
    }
}

/// [`wait_until`] for a plain condition.
///
/// # Errors
/// As [`wait_until`].
pub fn wait_for(deadline: Duration, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_until(deadline, what, || Ok(holds()?.then_some(())))
}

/// [`wait_until`] in async code: `look` yields a value when there is one.
///
/// # Panics
/// At the deadline: says `what` was awaited.
#[cfg(feature = "machine")]
pub async fn until<T, F: Future<Output = Option<T>>>(
    deadline: Duration,
    what: &str,
    mut look: impl FnMut() -> F,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < deadline, "waited {deadline:?} in vain: {what}");
        tokio::time::sleep(pause(start.elapsed())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_the_value_or_names_what_was_missing() {
        let mut looks = 0;
        let third = wait_until(Duration::from_secs(5), "third look", || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(third.unwrap(), 3);
        let error =
            wait_until::<()>(Duration::from_millis(1), "the moon", || bail!("no rocket")).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("the moon") && text.contains("no rocket"), "{text}");
    }
}
