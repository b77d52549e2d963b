//! Looking at a folder: which files are there, which have settled, and where events come from.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use crate::reload::Command;

/// Two looks this far apart must find the same file before it is read: a copy in progress grows.
pub(crate) const SETTLE: Duration = Duration::from_millis(120);

/// Longest anybody waits for files to settle: one that is written without end holds up nobody else.
pub(crate) const SETTLE_WAIT_MAX: Duration = Duration::from_secs(3);

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
pub(crate) fn list(folder: &Path) -> BTreeMap<PathBuf, Stamp> {
    let Ok(entries) = fs::read_dir(folder) else {
        return BTreeMap::new();
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .filter(|path| is_plugin_name(path))
        .filter_map(|path| {
            let metadata = fs::metadata(&path).or_else(|_| fs::symlink_metadata(&path));
            let metadata = metadata.ok()?;
            Some((path, Stamp::of(&metadata)))
        })
        .collect()
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
    watcher: Option<RecommendedWatcher>,
    watched: Option<(PathBuf, u64)>,
}

impl Events {
    pub(crate) fn new(commands: Sender<Command>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.map_or(true, |event| changes_something(&event)) {
                // The receiver is gone only when the watcher is about to be.
                let _ = commands.send(Command::Look);
            }
        });
        let watcher = watcher
            .inspect_err(|error| tracing::warn!(%error, "no file events; the folder is polled"))
            .ok();
        Self {
            watcher,
            watched: None,
        }
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
        if let Some((path, _)) = &found
            && let Err(error) = watcher.watch(path, RecursiveMode::NonRecursive)
        {
            tracing::warn!(path = %path.display(), %error, "no file events; the folder is polled");
            return;
        }
        self.watched = found;
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
    use super::*;

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
        let listed = list(folder.path());
        let names: Vec<_> = listed.keys().cloned().collect();
        assert_eq!(names, [folder.path().join("a.wasm"), inside.clone()]);
        fs::write(inside.join("more"), "more").unwrap();
        assert_eq!(list(folder.path()), listed, "it is what it was");
        assert_eq!(list(&folder.path().join("missing")), BTreeMap::new());
    }
}
