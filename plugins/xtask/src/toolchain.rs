//! A compiler for `wasm32-unknown-unknown`: rustup's when its target is installed, else the
//! distribution's, which builds the standard library along the way.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

/// What guests are compiled to.
pub(crate) const TARGET: &str = "wasm32-unknown-unknown";

/// Stack of a guest in bytes. Rust's default of 1 MiB would be most of the memory that the host
/// has to reset for every instance.
const STACK_BYTES: u32 = 128 << 10;

const HOW_TO_GET_ONE: &str = "\
no compiler for wasm32-unknown-unknown was found. Either of these brings one:
  rustup target add wasm32-unknown-unknown
  apt-get install --no-install-recommends rustc-web cargo-web rust-web-src lld-19   (Debian)";

/// A compiler that makes guests.
pub(crate) enum Toolchain {
    /// The cargo that runs this, whose sysroot has the target.
    Rustup,
    /// Debian's, with the standard library's sources and a linker.
    Distribution {
        /// The linker's name.
        linker: String,
    },
}

impl Toolchain {
    /// Looks for one.
    ///
    /// # Errors
    /// There is none; the message says how to get one.
    pub(crate) fn find() -> Result<Self> {
        if sysroot().is_some_and(|sysroot| {
            sysroot
                .join("lib/rustlib")
                .join(TARGET)
                .join("lib")
                .is_dir()
        }) {
            return Ok(Self::Rustup);
        }
        let parts = [
            "/usr/bin/rustc",
            "/usr/bin/cargo",
            "/usr/lib/rustlib/src/rust/library",
        ];
        if let (true, Some(linker)) = (
            parts.iter().all(|part| Path::new(part).exists()),
            wasm_linker(),
        ) {
            return Ok(Self::Distribution { linker });
        }
        bail!(HOW_TO_GET_ONE)
    }

    /// In words, for the progress output.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Rustup => format!("rustup's toolchain with its {TARGET} target"),
            Self::Distribution { linker } => {
                format!(
                    "the distribution's rustc and {linker}; the standard library is built too, which takes a minute the first time"
                )
            }
        }
    }

    /// `cargo rustc` for a guest, everything but what to build. It has a target folder of its own,
    /// so that it neither waits for the host's build nor throws it away.
    pub(crate) fn cargo_rustc(&self, root: &Path) -> Command {
        let mut command = match self {
            Self::Rustup => {
                Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            }
            Self::Distribution { .. } => Command::new("/usr/bin/cargo"),
        };
        command.current_dir(root).arg("rustc").args([
            "--profile",
            "guest",
            "--target",
            TARGET,
            "--target-dir",
        ]);
        command.arg(root.join("target/guests"));
        if let Self::Distribution { linker } = self {
            command.arg("-Zbuild-std=std,panic_abort");
            command
                .env("RUSTC", "/usr/bin/rustc")
                .env("RUSTC_BOOTSTRAP", "1");
            command.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker);
        }
        // Flags for the host's code are not for guests, and cargo looks at these before its own.
        command.env_remove("RUSTFLAGS").env_remove("RUSTC_WRAPPER");
        command.env("CARGO_ENCODED_RUSTFLAGS", flags(root).join("\x1f"));
        command
    }
}

/// Small stack; no path of this machine in panic messages; and the one thing lints forbid that a
/// guest needs: `export!` expands to exported symbols, which Rust calls unsafe.
fn flags(root: &Path) -> Vec<String> {
    let mut flags = vec![
        format!("-Clink-arg=-zstack-size={STACK_BYTES}"),
        "-Aunsafe_code".to_owned(),
    ];
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home =
        cargo_home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    for (path, name) in [(Some(root.to_owned()), "visor"), (cargo_home, "cargo")] {
        flags.extend(path.map(|path| format!("--remap-path-prefix={}={name}", path.display())));
    }
    flags
}

fn sysroot() -> Option<PathBuf> {
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(text.trim()))
}

/// The newest `wasm-ld` of the search path: `wasm-ld`, or `wasm-ld-<version>` as Debian names it.
fn wasm_linker() -> Option<String> {
    let plain = ["wasm-ld".to_owned()];
    let versioned = (14..=30).rev().map(|version| format!("wasm-ld-{version}"));
    let folders: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH")?).collect();
    plain
        .into_iter()
        .chain(versioned)
        .find(|name| folders.iter().any(|folder| folder.join(name).is_file()))
}
