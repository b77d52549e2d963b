//! `visor plugin check FILE`: the load pipeline, offline.

use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;

use crate::error::LoadError;
use crate::options::PluginSettings;
use crate::plugin::{Origin, Plugin, PluginInfo, ServedRole};
use crate::sandbox::Sandbox;

/// What a usable plugin file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckReport {
    /// Id it would get: the file stem.
    pub id: String,
    /// SHA-256 of the file, hex.
    pub revision: String,
    /// Roles and interface versions.
    pub roles: Vec<ServedRole>,
    /// Interfaces it imports.
    pub imports: Vec<String>,
    /// What it says about itself, the schema of its configuration included.
    pub info: PluginInfo,
    /// Routes of an adapter as `METHOD path`.
    pub routes: Vec<String>,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Milliseconds that compiling took.
    pub compile_ms: u64,
    /// Whether it had to be wrapped from a core module.
    pub wrapped: bool,
}

impl From<&Plugin> for CheckReport {
    fn from(plugin: &Plugin) -> Self {
        let routes = plugin.routes().iter();
        Self {
            id: plugin.id().to_owned(),
            revision: plugin.revision().to_owned(),
            roles: plugin.roles().to_vec(),
            imports: plugin.imports().to_vec(),
            info: plugin.info().clone(),
            routes: routes
                .map(|route| format!("{} {}", route.method, route.path))
                .collect(),
            bytes: plugin.bytes(),
            compile_ms: plugin.compile_ms(),
            wrapped: plugin.compiled().wrapped,
        }
    }
}

/// Loads `path` exactly as the server would, trial run included.
///
/// # Errors
/// What the server would say.
pub fn check_file(
    sandbox: &Sandbox,
    path: &Path,
    settings: &PluginSettings,
) -> Result<CheckReport, LoadError> {
    let plugin = load_file(sandbox, path, settings)?;
    Ok(CheckReport::from(&*plugin))
}

/// Reads a file under the size cap and loads it under its stem.
pub(crate) fn load_file(
    sandbox: &Sandbox,
    path: &Path,
    settings: &PluginSettings,
) -> Result<Arc<Plugin>, LoadError> {
    let id = plugin_id(path)?;
    let bytes = read_capped(path, sandbox.options().component_bytes_max)?;
    sandbox.load(&id, &bytes, settings, Origin::File(path.to_owned()))
}

/// Reads a plain file, whatever it becomes meanwhile: a pipe is not waited for, and one that grows ends.
fn read_capped(path: &Path, bytes_max: u64) -> Result<Vec<u8>, LoadError> {
    let read = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound if path.is_symlink() => {
            LoadError::Read("it is a link that leads nowhere".to_owned())
        }
        _ => LoadError::Read(error.to_string()),
    };
    let plain = |metadata: Metadata| match metadata.is_file() {
        true => Ok(metadata),
        false => Err(LoadError::Read("it is not a plain file".to_owned())),
    };
    plain(fs::metadata(path).map_err(read)?)?; // before it is opened, which is an event to who writes a pipe
    let file = open(path).map_err(read)?;
    let metadata = plain(file.metadata().map_err(read)?)?;
    let mut bytes = Vec::new();
    if metadata.len() <= bytes_max {
        let most = bytes_max.saturating_add(1);
        file.take(most).read_to_end(&mut bytes).map_err(read)?;
    }
    let size = metadata.len().max(bytes.len() as u64);
    if size > bytes_max {
        return Err(LoadError::TooLarge {
            bytes: size,
            bytes_max,
        });
    }
    Ok(bytes)
}

#[cfg(unix)]
fn open(path: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

#[cfg(not(unix))]
fn open(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// The id of a file: its stem, which is a name for configuration tables and metrics.
pub(crate) fn plugin_id(path: &Path) -> Result<String, LoadError> {
    let stem = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or_default();
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if !stem.is_empty() && stem.len() <= 64 && stem.bytes().all(legal) {
        return Ok(stem.to_owned());
    }
    Err(LoadError::Read(format!(
        "`{stem}` cannot be a plugin id: 1 to 64 of a-z, A-Z, 0-9, `-` and `_`"
    )))
}
