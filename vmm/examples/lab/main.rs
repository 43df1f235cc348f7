//! Scenarios of the nested lab that need the machine itself and an unmodified Linux in it; `cargo xtask lab` runs them.
//!
//! A scenario types commands into the guest's serial console and reads what they print; nothing of ours runs inside.

#![expect(clippy::print_stdout, reason = "a program that talks to a person")]

mod bench;
mod debian;
mod guest;
mod hops;
mod linux;
mod overlay;

use anyhow::{Context as _, Result, bail};
use std::time::Instant;

/// An argument that is a number.
fn number(at: usize) -> Result<u32> {
    let text = std::env::args().nth(at).with_context(|| format!("argument {at} is missing"))?;
    text.parse().with_context(|| format!("`{text}` is no number"))
}

fn main() -> Result<()> {
    let name = std::env::args().nth(1).unwrap_or_default();
    let began = Instant::now();
    let details = match name.as_str() {
        "linux" => linux::run()?,
        "boots" => linux::boots(number(2)?)?,
        "debian" => debian::run()?,
        "bench" => bench::run()?,
        "hops" => hops::run(number(2)?)?,
        _ => bail!("there is no scenario `{name}`"),
    };
    println!("{name}: {details} in {:.1} s", began.elapsed().as_secs_f64());
    if let Some(path) = std::env::var_os("LAB_DETAILS") {
        std::fs::write(path, details.to_string())?;
    }
    Ok(())
}
