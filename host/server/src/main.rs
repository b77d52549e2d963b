//! Arguments in, exit code out; everything else is the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    visor_model::return_large_blocks();
    visor::cli::run(visor::cli::Args::typed())
}
