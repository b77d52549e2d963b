//! What every command that needs the server's rooms does first: configuration, log, house.

use std::backtrace::Backtrace;
use std::env;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::progress::{self, Beside, Loading};
use super::{Failure, Overrides};
use crate::config::{Config, ConfigError, LogFormat, check, read_at_most};
use crate::wiring::{ConfigSource, House, HouseOptions};

/// Read when no file is named.
const DEFAULT_FILE: &str = "visor.toml";

/// Lines of the log that may wait to be written.
const LINES_WAITING_MAX: usize = 8192;

/// The configuration in force, and the file it came from, if any.
pub(super) fn load_config(
    overrides: &Overrides,
    listen: Option<&str>,
) -> Result<(Config, Option<PathBuf>), Failure> {
    let source = config_source(overrides, listen);
    let config = source.read().map_err(Failure::usage)?;
    let file = source.file.exists().then_some(source.file);
    Ok((config, file))
}

/// Where the configuration comes from, now and after every change of the file.
pub(super) fn config_source(overrides: &Overrides, listen: Option<&str>) -> ConfigSource {
    let file = overrides.config.clone();
    let (overrides, listen) = (overrides.clone(), listen.map(str::to_owned));
    ConfigSource {
        required: file.is_some(),
        file: file.unwrap_or_else(|| PathBuf::from(DEFAULT_FILE)),
        adjust: Arc::new(move |config| adjust(config, &overrides, listen.as_deref())),
    }
}

/// Puts flags and environment over what the file says.
fn adjust(
    config: &mut Config,
    overrides: &Overrides,
    listen: Option<&str>,
) -> Result<(), ConfigError> {
    if let Some(listen) = listen {
        listen.clone_into(&mut config.server.listen);
    }
    if let Some(model) = &overrides.model {
        config.model.path.clone_from(model);
    }
    if let Some(device) = overrides.device {
        config.model.device = device;
    }
    if let Some(quantization) = overrides.quantization {
        config.model.quantization = quantization;
    }
    if let Some(folder) = &overrides.plugins {
        config.plugins.folder.clone_from(folder);
    }
    if let Some(log) = &overrides.log {
        config.server.log_filter.clone_from(log);
    }
    let issues = check::check(config);
    if issues.is_empty() {
        return Ok(());
    }
    // The file alone was good, so the mistake is in a flag or a variable: its key says which.
    Err(ConfigError {
        file: PathBuf::from("flags and environment"),
        issues,
    })
}

/// Starts writing the log to standard error.
pub(super) fn start_log(config: &Config) -> Result<(), Failure> {
    start_log_to(config, std::io::stderr)
}

/// The same by a thread of its own, which takes over lines for a person and panics, too, so that nobody waits where nobody reads
/// standard error: what is too much is left out.
pub(super) fn start_log_beside(config: &Config) -> Result<LogBeside, Failure> {
    let (writer, written) = NonBlockingBuilder::default()
        .buffered_lines_limit(LINES_WAITING_MAX)
        .finish(std::io::stderr());
    let left_out = writer.error_counter();
    start_log_to(config, writer.clone())?;
    progress::write_beside(Some(match config.server.log_format {
        LogFormat::Text => Beside::Between(writer),
        LogFormat::Json => Beside::Inside,
    }));
    std::panic::set_hook(Box::new(|panic| {
        let trace = Backtrace::capture();
        tracing::error!(%trace, "{panic}");
    }));
    Ok(LogBeside {
        left_out,
        _written: written,
    })
}

/// A log that is written by a thread of its own; dropped, it waits a moment for the lines that are not written yet.
pub(super) struct LogBeside {
    left_out: ErrorCounter,
    _written: WorkerGuard,
}

impl Drop for LogBeside {
    fn drop(&mut self) {
        progress::write_beside(None);
        let lines = self.left_out.dropped_lines();
        if lines > 0 {
            tracing::warn!(
                lines,
                "lines of this log were left out: standard error was not read in time"
            );
        }
    }
}

fn start_log_to<W>(config: &Config, writer: W) -> Result<(), Failure>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(&config.server.log_filter).map_err(Failure::usage)?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(writer);
    let started = match config.server.log_format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().try_init(),
    };
    started.map_err(|error| Failure::start(anyhow::anyhow!("the log cannot start: {error}")))
}

/// The configuration of a house that answers this process only, and the file it came from, if any: the log says warnings unless asked.
pub(super) fn private_config(overrides: &Overrides) -> Result<(Config, Option<PathBuf>), Failure> {
    let mut quiet = overrides.clone();
    quiet.log.get_or_insert_with(|| "warn".to_owned());
    let (mut config, file) = load_config(&quiet, None)?;
    // Whoever runs this process is asking; nobody else can.
    config.access.keys.clear();
    Ok((config, file))
}

/// A picture that is named on the command line, of which the server would take no more than this either.
pub(super) fn read_picture(file: &Path, config: &Config) -> Result<Vec<u8>, Failure> {
    read_at_most(file, config.images.bytes_max).map_err(|error| {
        let file = file.display();
        Failure::usage(anyhow::anyhow!("{file} cannot be read: {error}"))
    })
}

/// A house that watches no configuration, with its model loaded and warm.
pub(super) fn ready_house(config: Config) -> Result<Arc<House>, Failure> {
    let house = open_house(config, None)?;
    wait_ready(&house)?;
    Ok(house)
}

/// Opens a house with progress shown; the model loads on.
pub(super) fn open_house(
    config: Config,
    source: Option<ConfigSource>,
) -> Result<Arc<House>, Failure> {
    let loading = Loading::new();
    let options = HouseOptions {
        source,
        cache_folder: cache_folder(),
        progress: Box::new(move |progress| loading.step(progress)),
    };
    House::open(config, options).map_err(Failure::start)
}

/// Waits until the model is loaded and warm.
pub(super) fn wait_ready(house: &House) -> Result<(), Failure> {
    house
        .wait_ready()
        .map_err(|reason| Failure::start(anyhow::anyhow!("{reason}")))
}

/// Where programs of this user keep what can be made again; nothing when the environment does not say.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let from = |variable: &str| {
        env::var_os(variable)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let home = |inside: &str| from("HOME").map(|home| home.join(inside));
    let found = if cfg!(windows) {
        from("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        home("Library/Caches")
    } else {
        from("XDG_CACHE_HOME").or_else(|| home(".cache"))
    };
    found.map(|folder| folder.join("visor"))
}
