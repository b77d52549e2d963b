//! Looking at a folder: which files are there, which have settled, and where events come from.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecursiveMode, Watcher};

use crate::reload::Command;

/// Two looks this far apart must find the same file before it is read: a copy in progress grows.
pub(crate) const SETTLE: Duration = Duration::from_millis(120);

/// Longest anybody waits for files to settle: one that is written without end holds up nobody else.
pub(crate) const SETTLE_WAIT_MAX: Duration = Duration::from_secs(3);

/// Time between two looks where no event can be waited for.
pub(crate) const RETRY: Duration = Duration::from_secs(2);

/// What tells one state of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    inode: u64,
}

impl Stamp {
    /// What is no plain file is not read, so it matters only that it is there: a folder changes with what is put into it.
    fn of(metadata: &Metadata) -> Self {
        let plain = Some(metadata).filter(|metadata| metadata.is_file());
        Self {
            bytes: plain.map_or(0, Metadata::len),
            modified: plain.and_then(|metadata| metadata.modified().ok()),
            inode: inode(metadata),
        }
    }
}

#[cfg(unix)]
fn inode(metadata: &Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    metadata.ino()
}

#[cfg(not(unix))]
fn inode(_: &Metadata) -> u64 {
    0
}

/// What a folder has under the names of plugins; links are followed. What is no file under such a name is listed, too: whoever
/// put it there is told that it cannot be read. A folder that is not there has none.
///
/// # Errors
/// Why it cannot be told what is there; a server that is out of file descriptors, for one, has lost no plugin by that.
pub(crate) fn list(folder: &Path) -> io::Result<BTreeMap<PathBuf, Stamp>> {
    let mut listed = BTreeMap::new();
    let Some(entries) = unless_gone(fs::read_dir(folder))? else {
        return Ok(listed);
    };
    for entry in entries {
        let path = entry?.path();
        if !is_plugin_name(&path) {
            continue;
        }
        if let Some(stamp) = stamp(&path)? {
            listed.insert(path, stamp);
        }
    }
    Ok(listed)
}

/// None when nothing has the name any more.
fn stamp(path: &Path) -> io::Result<Option<Stamp>> {
    let found = fs::metadata(path).or_else(|_| fs::symlink_metadata(path));
    let named = |error: io::Error| {
        let name = path.file_name().unwrap_or_default().display();
        io::Error::new(error.kind(), format!("{name}: {error}"))
    };
    let metadata = unless_gone(found).map_err(named)?;
    Ok(metadata.as_ref().map(Stamp::of))
}

/// Only what is not found is gone.
fn unless_gone<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// `*.wasm`, but not the hidden names of editors and copy tools.
fn is_plugin_name(path: &Path) -> bool {
    let is_hidden = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    path.extension()
        .is_some_and(|extension| extension == "wasm")
        && !is_hidden
}

/// Remembers since when a file looks as it does; `None` is a file that is gone.
#[derive(Default)]
pub(crate) struct Settling(BTreeMap<PathBuf, (Option<Stamp>, Instant)>);

impl Settling {
    /// Whether `path` has looked like this for [`SETTLE`].
    pub(crate) fn has_settled(&mut self, path: &Path, stamp: Option<Stamp>, now: Instant) -> bool {
        match self.0.get(path) {
            Some((seen, since)) if *seen == stamp => {
                let has_settled = now.duration_since(*since) >= SETTLE;
                if has_settled {
                    self.0.remove(path);
                }
                has_settled
            }
            _ => {
                self.0.insert(path.to_owned(), (stamp, now));
                false
            }
        }
    }

    /// Files that have not.
    pub(crate) fn restless(&self) -> impl Iterator<Item = &Path> {
        self.0.keys().map(PathBuf::as_path)
    }

    /// Forgets files that are as they were before.
    pub(crate) fn keep_only(&mut self, changing: impl Fn(&Path) -> bool) {
        self.0.retain(|path, _| changing(path));
    }
}

/// The system's events of the folder, or of its nearest ancestor while it is not there.
pub(crate) struct Events {
    watcher: Option<Box<dyn Watcher + Send>>,
    watched: Option<(PathBuf, u64)>,
    /// Why there are none, as it was said.
    missing: Option<String>,
}

impl Events {
    pub(crate) fn new(commands: Sender<Command>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.map_or(true, |event| changes_something(&event)) {
                // The receiver is gone only when the watcher is about to be.
                let _ = commands.send(Command::Look);
            }
        });
        let mut events = Self {
            watcher: None,
            watched: None,
            missing: None,
        };
        match watcher {
            Ok(watcher) => events.watcher = Some(Box::new(watcher)),
            Err(error) => events.miss(error.to_string()),
        }
        events
    }

    /// Whether only looking tells of changes.
    pub(crate) fn are_missing(&self) -> bool {
        self.missing.is_some()
    }

    /// Watches `folder` as it is now: it may have come, gone, or been replaced by another.
    pub(crate) fn follow(&mut self, folder: &Path) {
        let Some(watcher) = &mut self.watcher else {
            return;
        };
        let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        let found = absolute.ancestors().find_map(|path| {
            let metadata = fs::metadata(path).ok().filter(Metadata::is_dir)?;
            Some((path.to_owned(), inode(&metadata)))
        });
        if found == self.watched {
            return;
        }
        if let Some((old, _)) = self.watched.take() {
            // It fails when the folder is gone, and then there is nothing to undo.
            let _ = watcher.unwatch(&old);
        }
        let Some((path, _)) = &found else { return };
        match watcher.watch(path, RecursiveMode::NonRecursive) {
            Err(error) => self.miss(format!("{}: {error}", path.display())),
            Ok(()) => {
                self.missing = None;
                self.watched = found;
            }
        }
    }

    /// Every look tries again, so the same reason is said once.
    fn miss(&mut self, reason: String) {
        if self.missing.as_ref() != Some(&reason) {
            tracing::warn!(%reason, "no file events; the folder is polled");
        }
        self.missing = Some(reason);
    }
}

/// Our own reading must not make us look again.
fn changes_something(event: &Event) -> bool {
    match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::reload::heard::heard;

    #[test]
    fn a_file_settles_when_two_looks_a_while_apart_agree() {
        let (path, start) = (Path::new("a.wasm"), Instant::now());
        let stamp = |bytes| {
            Some(Stamp {
                bytes,
                modified: None,
                inode: 1,
            })
        };
        let mut settling = Settling::default();
        assert!(!settling.has_settled(path, stamp(1), start));
        assert!(!settling.has_settled(path, stamp(1), start + SETTLE / 2));
        assert!(!settling.has_settled(path, stamp(2), start + SETTLE));
        assert!(settling.has_settled(path, stamp(2), start + SETTLE * 2));
        assert!(!settling.has_settled(path, None, start + SETTLE * 3));
        assert!(settling.has_settled(path, None, start + SETTLE * 4));
    }

    #[test]
    fn whatever_has_a_visible_name_of_a_plugin_is_listed() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.wasm", ".b.wasm", "c.wasm.tmp", "d.txt"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        let inside = folder.path().join("e.wasm");
        fs::create_dir(&inside).unwrap();
        let listed = list(folder.path()).unwrap();
        let names: Vec<_> = listed.keys().cloned().collect();
        assert_eq!(names, [folder.path().join("a.wasm"), inside.clone()]);
        fs::write(inside.join("more"), "more").unwrap();
        let again = list(folder.path()).unwrap();
        assert_eq!(again, listed, "it is what it was");
    }

    #[test]
    fn only_what_is_not_found_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let (missing, file) = (folder.path().join("missing"), folder.path().join("file"));
        fs::write(&file, "no folder").unwrap();
        assert_eq!(list(&missing).unwrap(), BTreeMap::new());
        assert_eq!(list(&file).unwrap_err().kind(), ErrorKind::NotADirectory);
        assert_eq!(stamp(&missing.join("a.wasm")).unwrap(), None);
        let error = stamp(&file.join("a.wasm")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotADirectory);
        assert!(error.to_string().starts_with("a.wasm: "), "{error}");
        // EMFILE, ESTALE, EIO: a folder whose server is out of reach has lost nothing.
        for code in [24, 116, 5] {
            let found: io::Result<()> = Err(io::Error::from_raw_os_error(code));
            assert!(unless_gone(found).is_err(), "{code}");
        }
    }

    /// Watches once it may; until then it says what it is told to.
    #[derive(Debug, Default)]
    struct Moody(Arc<Mutex<Option<&'static str>>>);

    impl Watcher for Moody {
        fn new<F: notify::EventHandler>(_: F, _: notify::Config) -> notify::Result<Self> {
            Ok(Self::default())
        }

        fn watch(&mut self, _: &Path, _: RecursiveMode) -> notify::Result<()> {
            self.0
                .lock()
                .unwrap()
                .map_or(Ok(()), |reason| Err(notify::Error::generic(reason)))
        }

        fn unwatch(&mut self, _: &Path) -> notify::Result<()> {
            Ok(())
        }

        fn kind() -> notify::WatcherKind {
            notify::WatcherKind::NullWatcher
        }
    }

    #[test]
    fn why_there_are_no_events_is_said_once() {
        let folder = tempfile::tempdir().unwrap();
        let mood = Arc::new(Mutex::new(None));
        let mut events = Events {
            watcher: Some(Box::new(Moody(Arc::clone(&mood)))),
            watched: None,
            missing: None,
        };
        let mut said = |reason: Option<&'static str>| {
            *mood.lock().unwrap() = reason;
            let looks = || (0..3).for_each(|_| events.follow(folder.path()));
            let lines = heard(looks);
            assert_eq!(events.are_missing(), reason.is_some());
            lines.len()
        };
        assert_eq!(said(Some("denied")), 1);
        assert_eq!(said(Some("denied")), 0);
        assert_eq!(said(Some("too many")), 1, "another reason is news");
        assert_eq!(said(None), 0);
        events.watched = None;
        let lines = heard(|| events.follow(folder.path()));
        assert_eq!(lines, [""; 0]);
    }
}
