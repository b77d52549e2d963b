//! `cargo xtask plugins [--check]`: builds the shipped plugins, and the guests that tests load, from
//! source, and stamps them.
//!
//! Each is compiled to a core module, wrapped into a component, checked, and written where it is
//! checked in. `--check` builds nothing: it fails when a component and its sources do not match.

mod build;
mod stamp;
mod toolchain;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: cargo xtask plugins [--check]

  plugins           build plugins/built/*.wasm and tests/guests/built/*.wasm and stamp them
  plugins --check   build nothing; fail when a component does not match its sources";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["plugins"] => build::all(&root()),
        ["plugins", "--check"] => check(&root()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository, from wherever inside it this was run.
fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_owned()
}

fn check(root: &Path) -> Result<()> {
    let stale = stamp::stale(root)?;
    if !stale.is_empty() {
        bail!("run `cargo xtask plugins`:\n  {}", stale.join("\n  "));
    }
    eprintln!("every component matches its sources");
    Ok(())
}
