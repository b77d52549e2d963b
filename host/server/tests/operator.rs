//! What an operator does: the command line, configuration changes, stopping.

#[path = "operator/commands.rs"]
mod commands;
#[path = "operator/house.rs"]
mod house;
#[path = "operator/quantized.rs"]
mod quantized;
#[path = "operator/serving.rs"]
mod serving;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What the binary reads of its environment, behind `VISOR_`.
const VARIABLES: [&str; 7] = [
    "LISTEN",
    "MODEL",
    "DEVICE",
    "QUANTIZATION",
    "CONFIG",
    "PLUGINS",
    "LOG",
];

/// The binary under test in an empty folder, with nothing of this machine's environment.
fn visor(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_visor"));
    command.args(args).current_dir(folder);
    for name in VARIABLES {
        command.env_remove(format!("VISOR_{name}"));
    }
    command
}

fn run(folder: &Path, args: &[&str]) -> Output {
    visor(folder, args).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}
