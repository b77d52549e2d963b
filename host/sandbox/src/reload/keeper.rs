//! What the watcher thread knows and decides: which file stands for which plugin id.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::check::{load_file, plugin_id};
use crate::plugin::{Origin, Plugin};
use crate::registry::{PluginSet, Registry};
use crate::reload::look::{Events, RETRY, SETTLE, SETTLE_WAIT_MAX, Settling, Stamp, list};
use crate::reload::{Command, FileError, FolderOptions, FolderStatus, ReloadError, SettingsFor};
use crate::sandbox::Sandbox;

/// One file of the folder.
#[derive(Clone, Default)]
struct File {
    /// As it was when it was read; none once it is gone, which matters only while its plugin
    /// could not be taken out of service.
    stamp: Option<Stamp>,
    /// In service.
    plugin: Option<Arc<Plugin>>,
    /// Why the file as it is now is not.
    error: Option<FileError>,
}

/// A shipped plugin, or why it does not load with its settings. That is no matter while a file
/// shadows it, because the settings are then meant for the file.
type ShippedPlugin = Result<Arc<Plugin>, String>;

pub(crate) struct Keeper {
    sandbox: Sandbox,
    registry: Arc<Registry>,
    options: FolderOptions,
    shipped: BTreeMap<String, ShippedPlugin>,
    files: BTreeMap<PathBuf, File>,
    /// Why nobody knows what is in the folder; until that is known, everything stays as it is.
    unread: Option<FileError>,
    settling: Settling,
    events: Option<Events>,
    status: Arc<Mutex<FolderStatus>>,
}

impl Keeper {
    pub(crate) fn new(
        sandbox: Sandbox,
        registry: Arc<Registry>,
        options: FolderOptions,
        status: Arc<Mutex<FolderStatus>>,
    ) -> Self {
        Self {
            sandbox,
            registry,
            options,
            shipped: BTreeMap::new(),
            files: BTreeMap::new(),
            unread: None,
            settling: Settling::default(),
            events: None,
            status,
        }
    }

    pub(crate) fn watch_with(&mut self, commands: Sender<Command>) {
        self.events = Some(Events::new(commands));
    }

    /// How long to wait for events; none is for ever. No event tells when an unreadable folder can be read.
    pub(crate) fn poll(&self) -> Option<Duration> {
        let is_blind = self.events.as_ref().is_none_or(Events::are_missing);
        let retry = (is_blind || self.unread.is_some()).then_some(RETRY);
        let poll = Some(self.options.poll).filter(|poll| !poll.is_zero());
        poll.or(retry)
    }

    /// Loads the first set.
    pub(crate) fn start(&mut self) -> Result<(), ReloadError> {
        for shipped in self.options.shipped.clone() {
            let settings = (self.options.settings)(shipped.id);
            let loaded = self
                .sandbox
                .load(shipped.id, shipped.bytes, &settings, Origin::Shipped);
            self.shipped
                .insert(shipped.id.to_owned(), loaded.map_err(|e| e.to_string()));
        }
        self.follow_folder();
        self.until_settled(|keeper| {
            let changes = keeper.changes();
            for (path, stamp) in changes.found {
                keeper.read(&path, stamp);
            }
            changes.is_settled
        });
        let Err(error) = self.swap(&self.files.clone()) else {
            self.report();
            return Ok(());
        };
        // Perhaps a file is to blame: without files it is as it was shipped.
        let mut files = self.files.clone();
        for (path, file) in &mut files {
            if file.plugin.take().is_some() {
                file.error = Some(file_error(path, &error.to_string()));
            }
        }
        self.swap(&files).map_err(|_| error)?;
        self.files = files;
        self.report();
        Ok(())
    }

    /// Looks until everything has settled, or for as long as anybody waits for it.
    pub(crate) fn settle(&mut self) {
        self.until_settled(Self::look);
    }

    /// What is restless stays what it was, and is taken by a later look.
    fn until_settled(&mut self, mut look: impl FnMut(&mut Self) -> bool) {
        let started = Instant::now();
        while !look(self) {
            if started.elapsed() >= SETTLE_WAIT_MAX {
                for path in self.settling.restless() {
                    let path = path.display();
                    tracing::warn!(%path, "plugin file keeps changing; it is read when it has settled");
                }
                return;
            }
            std::thread::sleep(SETTLE);
        }
    }

    /// Looks once. False when something is changing and wants another look soon.
    pub(crate) fn look(&mut self) -> bool {
        self.follow_folder();
        let changes = self.changes();
        if !changes.found.is_empty() {
            self.take_in(changes.found);
        }
        changes.is_settled
    }

    fn follow_folder(&mut self) {
        if let Some(events) = &mut self.events {
            events.follow(&self.options.folder);
        }
    }

    fn changes(&mut self) -> Changes {
        let now = Instant::now();
        let listed = match list(&self.options.folder) {
            Ok(listed) => listed,
            Err(error) => {
                self.note_unread(&error);
                return Changes::none();
            }
        };
        self.note_read();
        let known = |path: &Path| self.files.get(path).and_then(|file| file.stamp);
        let gone = self
            .files
            .iter()
            .filter(|(path, file)| file.stamp.is_some() && !listed.contains_key(*path));
        let gone: Vec<(PathBuf, Option<Stamp>)> =
            gone.map(|(path, _)| (path.clone(), None)).collect();
        let come = listed
            .into_iter()
            .filter(|(path, stamp)| known(path) != Some(*stamp));
        let mut different: Vec<_> = come.map(|(path, stamp)| (path, Some(stamp))).collect();
        different.extend(gone);
        self.settling
            .keep_only(|path| different.iter().any(|(other, _)| other == path));
        let count = different.len();
        different.retain(|(path, stamp)| self.settling.has_settled(path, *stamp, now));
        Changes {
            is_settled: different.len() == count,
            found: different,
        }
    }

    /// Every look tries again, so the same reason is said once.
    fn note_unread(&mut self, error: &io::Error) {
        let folder = &self.options.folder;
        let message = format!("the folder cannot be read: {error}");
        if matches!(&self.unread, Some(unread) if unread.message == message) {
            return;
        }
        tracing::warn!(path = %folder.display(), reason = %error, "plugin folder not read; everything stays as it is");
        self.unread = Some(FileError {
            id: String::new(),
            ..file_error(folder, &message)
        });
        self.count_failure();
        self.report();
    }

    fn note_read(&mut self) {
        if self.unread.take().is_some() {
            tracing::info!(path = %self.options.folder.display(), "plugin folder read again");
            self.report();
        }
    }

    /// Loads what changed; swaps when that makes a difference and the server agrees.
    fn take_in(&mut self, found: Vec<(PathBuf, Option<Stamp>)>) {
        let before = self.files.clone();
        let started = Instant::now();
        for (path, stamp) in &found {
            self.read(path, *stamp);
        }
        let changed = |path: &&PathBuf| service(&before, path) != service(&self.files, path);
        let changed: Vec<PathBuf> = found
            .iter()
            .map(|(path, _)| path)
            .filter(changed)
            .cloned()
            .collect();
        if changed.is_empty() {
            self.report();
            return;
        }
        if let Err(error) = self.swap(&self.files.clone()) {
            for path in changed {
                let reason = error.to_string();
                tracing::warn!(path = %path.display(), %reason, "plugin change refused");
                let file = self.files.entry(path.clone()).or_default();
                file.plugin = before.get(&path).and_then(|file| file.plugin.clone());
                file.error = Some(file_error(&path, &reason));
                self.count_failure();
            }
            self.report();
            return;
        }
        self.files.retain(|_, file| file.stamp.is_some());
        self.report();
        let took_ms = started.elapsed().as_millis();
        for path in changed {
            self.log_change(&path, took_ms);
        }
    }

    /// Reads one file, or notes that it is gone.
    fn read(&mut self, path: &Path, stamp: Option<Stamp>) {
        let mut file = self.files.remove(path).unwrap_or_default();
        file.stamp = stamp;
        file.error = None;
        match stamp.map(|_| self.load(path)) {
            None => file.plugin = None,
            Some(Ok(plugin)) => {
                let is_same = |old: &Arc<Plugin>| {
                    old.revision() == plugin.revision() && old.settings() == plugin.settings()
                };
                if !file.plugin.as_ref().is_some_and(is_same) {
                    file.plugin = Some(plugin);
                }
            }
            Some(Err(reason)) => {
                tracing::warn!(path = %path.display(), %reason, "plugin not loaded");
                file.error = Some(file_error(path, &reason));
                self.count_failure();
            }
        }
        self.files.insert(path.to_owned(), file);
    }

    fn load(&self, path: &Path) -> Result<Arc<Plugin>, String> {
        let id = plugin_id(path).map_err(|error| error.to_string())?;
        let settings = (self.options.settings)(&id);
        load_file(&self.sandbox, path, &settings).map_err(|error| error.to_string())
    }

    /// Other settings for everything; all or nothing.
    pub(crate) fn apply(&mut self, settings: SettingsFor) -> Result<(), ReloadError> {
        let old_settings = std::mem::replace(&mut self.options.settings, settings);
        let old_shipped = self.shipped.clone();
        let old_files = self.files.clone();
        let applied = self
            .reconfigure()
            .and_then(|()| self.swap(&self.files.clone()));
        if applied.is_err() {
            self.options.settings = old_settings;
            self.shipped = old_shipped;
            self.files = old_files;
            self.count_failure();
        }
        self.report();
        applied
    }

    fn reconfigure(&mut self) -> Result<(), ReloadError> {
        for shipped in self.options.shipped.clone() {
            let settings = (self.options.settings)(shipped.id);
            let old = self.shipped.get(shipped.id);
            if let Some(Ok(old)) = old
                && *old.settings() == settings
            {
                continue;
            }
            let loaded = self
                .sandbox
                .load(shipped.id, shipped.bytes, &settings, Origin::Shipped);
            self.shipped
                .insert(shipped.id.to_owned(), loaded.map_err(|e| e.to_string()));
        }
        let failed = self.files.iter().filter(|(_, file)| file.error.is_some());
        let failed: Vec<(PathBuf, Option<Stamp>)> = failed
            .map(|(path, file)| (path.clone(), file.stamp))
            .collect();
        for file in self.files.values_mut() {
            let Some(plugin) = &file.plugin else { continue };
            let settings = (self.options.settings)(plugin.id());
            if *plugin.settings() == settings {
                continue;
            }
            let id = plugin.id().to_owned();
            let changed = self.sandbox.reconfigure(plugin, &settings);
            file.plugin = Some(changed.map_err(|error| ReloadError::Settings {
                id,
                message: error.to_string(),
            })?);
        }
        for (path, stamp) in failed {
            self.read(&path, stamp);
        }
        Ok(())
    }

    /// Offers a complete set to the server; on its word makes it current.
    fn swap(&self, files: &BTreeMap<PathBuf, File>) -> Result<(), ReloadError> {
        let mut plugins = BTreeMap::new();
        for plugin in files.values().filter_map(|file| file.plugin.as_ref()) {
            plugins.insert(plugin.id().to_owned(), Arc::clone(plugin));
        }
        for (id, shipped) in &self.shipped {
            if plugins.contains_key(id) {
                continue;
            }
            let shipped = shipped.clone();
            let shipped = shipped.map_err(|message| ReloadError::Shipped {
                id: id.clone(),
                message,
            })?;
            plugins.insert(id.clone(), shipped);
        }
        let number = self.registry.current().number + 1;
        let set = Arc::new(PluginSet { number, plugins });
        let answer = (self.options.on_change)(&set);
        self.status().refused = answer.as_ref().err().cloned();
        answer.map_err(ReloadError::Refused)?;
        self.registry.swap(set);
        self.status().reloads += 1;
        Ok(())
    }

    fn log_change(&self, path: &Path, took_ms: u128) {
        let plugin = self.files.get(path).and_then(|file| file.plugin.as_ref());
        match plugin {
            Some(plugin) => tracing::info!(
                plugin = plugin.id(),
                revision = plugin.revision_short(),
                path = %path.display(),
                took_ms,
                "plugin loaded"
            ),
            None => tracing::info!(path = %path.display(), "plugin file gone"),
        }
    }

    fn count_failure(&self) {
        self.status().failures += 1;
    }

    fn report(&self) {
        let files = self.files.values();
        let errors = files.filter_map(|file| file.error.clone());
        let errors = self.unread.clone().into_iter().chain(errors).collect();
        self.status().last_errors = errors;
    }

    fn status(&self) -> std::sync::MutexGuard<'_, FolderStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Changes {
    found: Vec<(PathBuf, Option<Stamp>)>,
    is_settled: bool,
}

impl Changes {
    fn none() -> Self {
        Self {
            found: Vec::new(),
            is_settled: true,
        }
    }
}

/// What a file contributes: the address of its plugin tells one from another.
fn service(files: &BTreeMap<PathBuf, File>, path: &Path) -> Option<*const Plugin> {
    files
        .get(path)
        .and_then(|file| file.plugin.as_ref())
        .map(Arc::as_ptr)
}

fn file_error(path: &Path, message: &str) -> FileError {
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned());
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    FileError {
        path: path.to_owned(),
        id: stem.unwrap_or_default(),
        message: message.to_owned(),
        at_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::options::{PluginSettings, SandboxOptions};
    use crate::reload::heard::heard;
    use crate::services::SampleModel;

    fn keeper(folder: PathBuf) -> Keeper {
        let options = FolderOptions {
            folder,
            poll: Duration::ZERO,
            shipped: Vec::new(),
            settings: Arc::new(|_| PluginSettings::default()),
            on_change: Box::new(|_| Ok(())),
        };
        let sandbox = Sandbox::new(SandboxOptions::default(), Arc::new(SampleModel)).unwrap();
        let mut keeper = Keeper::new(sandbox, Arc::default(), options, Arc::default());
        keeper.watch_with(channel().0);
        keeper.start().unwrap();
        keeper
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_cannot_be_read_is_told_once_and_tried_again() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("plugins");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("bad.wasm"), "no plugin").unwrap();
        let mut keeper = keeper(folder.clone());
        assert_eq!(keeper.poll(), None);
        fs::rename(&folder, temporary.path().join("away")).unwrap();

        let said = |keeper: &mut Keeper| heard(|| (0..3).for_each(|_| assert!(keeper.look())));
        let told = |keeper: &Keeper| -> Vec<String> {
            let errors = keeper.status().last_errors.clone().into_iter();
            errors
                .map(|error| error.id + ": " + &error.message)
                .collect()
        };
        let warning = ["WARN plugin folder not read; everything stays as it is"];
        fs::write(&folder, "a file").unwrap();
        assert_eq!(said(&mut keeper), warning);
        assert_eq!(said(&mut keeper), [""; 0]);
        let all = told(&keeper);
        assert!(all[0].starts_with(": the folder cannot be read: Not a dir"));
        assert!(all[1].starts_with("bad: "), "{all:?}");
        assert_eq!(keeper.status().failures, 2);
        assert_eq!(keeper.poll(), Some(RETRY));

        fs::remove_file(&folder).unwrap();
        std::os::unix::fs::symlink("plugins", &folder).unwrap();
        assert_eq!(said(&mut keeper), warning, "another reason is news");

        fs::remove_file(&folder).unwrap();
        fs::rename(temporary.path().join("away"), &folder).unwrap();
        assert_eq!(said(&mut keeper), ["INFO plugin folder read again"]);
        assert_eq!(told(&keeper), all[1..]);
        assert_eq!(keeper.poll(), None);
    }
}
