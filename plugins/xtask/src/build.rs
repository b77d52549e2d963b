//! Compile, wrap, write, stamp.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use wit_component::ComponentEncoder;

use crate::stamp::{self, Guest, SETS, Set};
use crate::toolchain::{TARGET, Toolchain};

/// A component over this size is worth a word: it is embedded, and compiled at every start.
const COMPONENT_BYTES_AIM: usize = 200 << 10;

/// Builds every component and writes the stamps.
///
/// # Errors
/// No toolchain; a guest that does not compile, or is not a component of our contract.
pub(crate) fn all(root: &Path) -> Result<()> {
    let toolchain = Toolchain::find()?;
    eprintln!("using {}", toolchain.describe());
    let mut built = BTreeMap::new();
    for guest in SETS.iter().flat_map(|set| set.guests) {
        let began = Instant::now();
        let component = component(&toolchain, root, guest)?;
        eprintln!(
            "  {:<18} {:>7} bytes  {:>5.1} s",
            guest.name,
            component.len(),
            began.elapsed().as_secs_f32()
        );
        if component.len() > COMPONENT_BYTES_AIM {
            eprintln!(
                "  {:<18} is over the {COMPONENT_BYTES_AIM} bytes we aim at",
                ""
            );
        }
        built.insert(guest.name, component);
    }
    // Nothing is written before everything is built, so a failure leaves the tree as it was.
    SETS.iter().try_for_each(|set| write(root, set, &built))
}

fn write(root: &Path, set: &Set, built: &BTreeMap<&str, Vec<u8>>) -> Result<()> {
    let folder = root.join(set.built);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for guest in set.guests {
        let path = folder.join(format!("{}.wasm", guest.name));
        replace(
            &path,
            built.get(guest.name).context("every guest was built")?,
        )?;
    }
    let stamp = stamp::text(root, set).context("cannot read the sources for the stamp")?;
    replace(&folder.join("stamp.toml"), stamp.as_bytes())?;
    eprintln!("wrote {}", folder.display());
    Ok(())
}

/// Written beside and renamed, so that nobody reads half a file.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let half = path.with_extension("new");
    fs::write(&half, bytes)
        .and_then(|()| fs::rename(&half, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Compiles a guest to a core module, which carries its contract in a custom section, and wraps it.
fn component(toolchain: &Toolchain, root: &Path, guest: &Guest) -> Result<Vec<u8>> {
    let path = core_module(toolchain, root, guest)?;
    let module = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    ComponentEncoder::default()
        .module(&module)
        .map(|encoder| encoder.validate(true))
        .and_then(|mut encoder| encoder.encode())
        .with_context(|| format!("{} does not make a component", guest.name))
}

fn core_module(toolchain: &Toolchain, root: &Path, guest: &Guest) -> Result<PathBuf> {
    let is_example = guest.package == stamp::TEST_GUESTS;
    let mut command = toolchain.cargo_rustc(root);
    command.args(["--quiet", "--package", guest.package]);
    if is_example {
        command.args(["--example", guest.name]);
    } else {
        command.arg("--lib");
    }
    let status = command
        .status()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{} did not compile", guest.name);
    }
    let folder = root.join("target/guests").join(TARGET).join("guest");
    Ok(if is_example {
        folder
            .join("examples")
            .join(format!("{}.wasm", guest.name.replace('-', "_")))
    } else {
        folder.join(format!("{}.wasm", guest.package.replace('-', "_")))
    })
}
