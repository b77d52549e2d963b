//! The configuration file, watched: read again whenever it changes, handed on good or bad.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use crate::config::{Config, ConfigError, FILE_BYTES_MAX, read_at_most};

/// Quiet after which a changed file counts as written.
const DEBOUNCE: Duration = Duration::from_millis(200);

/// Puts flags and environment over what the file says, and checks the result.
type Adjust = Arc<dyn Fn(&mut Config) -> Result<(), ConfigError> + Send + Sync>;

/// Where the configuration comes from.
#[derive(Clone)]
pub struct ConfigSource {
    /// The file.
    pub file: PathBuf,
    /// Whether the file was named: then it must be there. Otherwise its absence is the default.
    pub required: bool,
    /// Flags and environment.
    pub adjust: Adjust,
}

impl ConfigSource {
    /// Reads and checks the file, then applies flags and environment.
    ///
    /// # Errors
    /// Every mistake found.
    pub fn read(&self) -> Result<Config, ConfigError> {
        let mut config = if self.required || self.file.exists() {
            Config::load(&self.file)?
        } else {
            Config::default()
        };
        (self.adjust)(&mut config)?;
        Ok(config)
    }

    fn text(&self) -> Option<Vec<u8>> {
        read_at_most(&self.file, FILE_BYTES_MAX).ok()
    }
}

enum Wake {
    Look,
    Stop,
}

/// Calls back with every new content of the file. Dropping it ends its thread.
pub struct ConfigWatcher {
    wake: Sender<Wake>,
    plugins_changed: Arc<AtomicBool>,
    _watcher: Option<RecommendedWatcher>,
}

impl ConfigWatcher {
    /// Watches the folder of the file (editors and `mv` replace the file itself) and looks every
    /// `poll` besides; zero trusts the events. `apply` runs on the watcher's thread, first with the
    /// content of now, so that nothing between reading and watching is missed. It says whether it refused what other plugins
    /// could make fit: that is handed on again when they change.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        source: ConfigSource,
        poll: Duration,
        apply: impl Fn(Result<Config, ConfigError>) -> bool + Send + 'static,
    ) -> std::io::Result<Self> {
        let (wake, woken) = channel();
        let watcher = watch_folder(&source.file, wake.clone());
        let plugins_changed = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&plugins_changed);
        std::thread::Builder::new()
            .name("visor-config".to_owned())
            .spawn(move || run(&source, poll, (&woken, &told), &apply))?;
        Ok(Self {
            wake,
            plugins_changed,
            _watcher: watcher,
        })
    }

    /// Other plugins are there, or soon.
    pub fn plugins_changed(&self) {
        self.plugins_changed.store(true, SeqCst);
        // The thread is gone already when nobody listens.
        let _ = self.wake.send(Wake::Look);
    }
}

impl Drop for ConfigWatcher {
    fn drop(&mut self) {
        // The thread is gone already when nobody listens.
        let _ = self.wake.send(Wake::Stop);
    }
}

fn watch_folder(file: &Path, wake: Sender<Wake>) -> Option<RecommendedWatcher> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let look = move |event: notify::Result<notify::Event>| {
        // Reading the file is an event as well, and must not wake the reader.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _ = wake.send(Wake::Look);
        }
    };
    let watched = notify::recommended_watcher(look).and_then(|mut watcher| {
        watcher.watch(folder, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    match watched {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(folder = %folder.display(), %error, "no events for the configuration file: polling only");
            None
        }
    }
}

fn run(
    source: &ConfigSource,
    poll: Duration,
    (woken, plugins_changed): (&Receiver<Wake>, &AtomicBool),
    apply: &dyn Fn(Result<Config, ConfigError>) -> bool,
) {
    let mut known = source.text();
    let mut may_fit_later = apply(source.read());
    loop {
        let wake = if poll.is_zero() {
            woken.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            woken.recv_timeout(poll)
        };
        match wake {
            Ok(Wake::Look) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
        }
        let text = source.text();
        let is_due = |text: &Option<Vec<u8>>| {
            *text != known || may_fit_later && plugins_changed.load(SeqCst)
        };
        if !is_due(&text) {
            continue;
        }
        let Some(text) = settle(source, text, woken) else {
            return;
        };
        if is_due(&text) {
            plugins_changed.store(false, SeqCst);
            known = text;
            may_fit_later = apply(source.read());
        }
    }
}

/// The content once it stays the same for a while, whatever else happens in its folder; none when told to stop.
fn settle(
    source: &ConfigSource,
    mut text: Option<Vec<u8>>,
    woken: &Receiver<Wake>,
) -> Option<Option<Vec<u8>>> {
    let mut since = Instant::now();
    loop {
        match woken.recv_timeout(DEBOUNCE.saturating_sub(since.elapsed())) {
            Ok(Wake::Look) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return None,
        }
        let now = source.text();
        if now != text {
            (text, since) = (now, Instant::now());
        } else if since.elapsed() >= DEBOUNCE {
            return Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn source(file: PathBuf, required: bool) -> ConfigSource {
        let adjust = |config: &mut Config| {
            config.server.listen = "127.0.0.1:7".to_owned();
            Ok(())
        };
        ConfigSource {
            file,
            required,
            adjust: Arc::new(adjust),
        }
    }

    fn watch(
        source: ConfigSource,
        poll: Duration,
    ) -> (ConfigWatcher, Receiver<Result<Config, ConfigError>>) {
        let (send, seen) = channel();
        let watcher = ConfigWatcher::start(source, poll, move |read| {
            // As if every mistake were that a plugin is missing.
            let may_fit_later = read.is_err();
            _ = send.send(read);
            may_fit_later
        });
        (watcher.unwrap(), seen)
    }

    #[test]
    fn a_changed_file_is_read_again_with_flags_applied() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("visor.toml");
        std::fs::write(&file, "[images]\ncount_max = 1\n").unwrap();
        let (_watcher, seen) = watch(source(file.clone(), true), Duration::ZERO);
        assert_eq!(
            seen.recv_timeout(PATIENCE)
                .unwrap()
                .unwrap()
                .images
                .count_max,
            1
        );
        std::fs::write(&file, "[images]\ncount_max = 2\n").unwrap();
        let config = seen.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(config.images.count_max, 2);
        assert_eq!(config.server.listen, "127.0.0.1:7");
    }

    #[test]
    fn a_change_is_read_while_something_else_in_the_folder_never_rests() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("visor.toml");
        let (_watcher, seen) = watch(source(file.clone(), false), Duration::ZERO);
        assert!(seen.recv_timeout(PATIENCE).unwrap().is_ok());
        let log = folder.path().join("noise.log");
        let (stop, stopped) = channel::<()>();
        let noise = std::thread::spawn(move || {
            while stopped.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout)
            {
                std::fs::write(&log, "noise").unwrap();
            }
        });
        std::fs::write(&file, "[images]\ncount_max = 3\n").unwrap();
        let config = seen.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(config.images.count_max, 3);
        drop(stop);
        noise.join().unwrap();
    }

    #[test]
    fn a_mistake_is_reported_and_its_repair_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("visor.toml");
        let (_watcher, seen) = watch(source(file.clone(), false), Duration::ZERO);
        assert!(
            seen.recv_timeout(PATIENCE).unwrap().is_ok(),
            "no file is the default"
        );
        std::fs::write(&file, "[images]\ncount = 1\n").unwrap();
        let error = seen.recv_timeout(PATIENCE).unwrap().unwrap_err();
        assert_eq!(error.issues[0].line, Some(2));
        std::fs::remove_file(&file).unwrap();
        assert!(seen.recv_timeout(PATIENCE).unwrap().is_ok());
    }

    #[test]
    fn what_was_refused_is_read_again_when_plugins_change_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("visor.toml");
        std::fs::write(&file, "[images]\ncount = 1\n").unwrap();
        let (watcher, seen) = watch(source(file.clone(), true), Duration::ZERO);
        assert!(seen.recv_timeout(PATIENCE).unwrap().is_err());
        for _ in 0..2 {
            watcher.plugins_changed();
            assert!(seen.recv_timeout(PATIENCE).unwrap().is_err());
        }
        std::fs::write(&file, "[images]\ncount_max = 1\n").unwrap();
        assert!(seen.recv_timeout(PATIENCE).unwrap().is_ok());
        watcher.plugins_changed();
        let again = seen.recv_timeout(3 * DEBOUNCE);
        assert!(again.is_err(), "it is in force: {again:?}");
    }

    #[test]
    fn a_renamed_file_and_a_swapped_symlink_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("visor.toml");
        std::fs::write(folder.path().join("one"), "[images]\ncount_max = 1\n").unwrap();
        std::fs::write(folder.path().join("two"), "[images]\ncount_max = 2\n").unwrap();
        std::fs::rename(folder.path().join("one"), &file).unwrap();
        let (_watcher, seen) = watch(source(file.clone(), true), Duration::from_millis(50));
        assert_eq!(
            seen.recv_timeout(PATIENCE)
                .unwrap()
                .unwrap()
                .images
                .count_max,
            1
        );
        std::fs::rename(folder.path().join("two"), &file).unwrap();
        assert_eq!(
            seen.recv_timeout(PATIENCE)
                .unwrap()
                .unwrap()
                .images
                .count_max,
            2
        );
        #[cfg(unix)]
        {
            std::fs::write(folder.path().join("three"), "[images]\ncount_max = 3\n").unwrap();
            std::os::unix::fs::symlink("three", folder.path().join("link")).unwrap();
            std::fs::rename(folder.path().join("link"), &file).unwrap();
            assert_eq!(
                seen.recv_timeout(PATIENCE)
                    .unwrap()
                    .unwrap()
                    .images
                    .count_max,
                3
            );
        }
    }

    #[test]
    fn a_named_file_that_is_not_there_is_an_error() {
        assert!(
            source(PathBuf::from("no-such-folder/visor.toml"), true)
                .read()
                .is_err()
        );
    }
}
