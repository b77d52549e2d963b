//! A folder that is being written: `NAME.partial` until it is whole, then `NAME`.
//!
//! A marker file inside is locked by the process that writes. The system lets go of the lock when that process ends, however it
//! ends, so that what is left of an interrupted run can be told from what another one is writing.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::cannot_write;
use crate::checkpoint::MARKER;
use crate::error::ModelError;

/// What came of asking for a folder to write.
pub(crate) enum Claim {
    /// It is ours.
    Ours(Partial),
    /// Another process is writing it.
    Busy,
    /// There is something of that name, and it is not what an interrupted run leaves.
    InTheWay,
}

/// A folder that is being written; it is gone when it is not finished.
pub(crate) struct Partial {
    pub(crate) path: PathBuf,
    /// Held as long as the folder is written.
    lock: Option<File>,
    finished: bool,
}

/// What a folder is called until it is whole.
pub(crate) fn partial_path(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}

impl Partial {
    /// The folder that becomes `target`; what an interrupted run left of it is taken away.
    pub(crate) fn create(target: &Path) -> Result<Self, ModelError> {
        if target.exists() {
            return Err(cannot_write(
                target,
                "it exists; name a folder that does not",
            ));
        }
        let refused = |hint| Err(cannot_write(&partial_path(target), hint));
        match Self::claim(target)? {
            Claim::Ours(partial) => Ok(partial),
            Claim::Busy => refused("another process is writing it"),
            Claim::InTheWay => refused("it is in the way and not of an earlier run; move it"),
        }
    }

    /// Tries to be the one who writes what becomes `target`.
    ///
    /// # Errors
    /// [`ModelError::Write`] when the system refuses.
    pub(crate) fn claim(target: &Path) -> Result<Claim, ModelError> {
        let path = partial_path(target);
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent {
            fs::create_dir_all(parent).map_err(|source| cannot_write(parent, source))?;
        }
        let marker = path.join(MARKER);
        let made = match fs::create_dir(&path) {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(cannot_write(&path, error)),
        };
        if !made && !marker.is_file() {
            return Ok(Claim::InTheWay);
        }
        let lock = File::options()
            .create(made)
            .write(true)
            .truncate(false)
            .open(&marker);
        let lock = match lock {
            Ok(lock) => lock,
            // Its owner finished, or gave up, between two of our looks.
            Err(error) if !made && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Claim::Busy);
            }
            Err(error) => return Err(cannot_write(&marker, error)),
        };
        match lock.try_lock() {
            Ok(()) if is_same_file(&lock, &marker) => {}
            Ok(()) | Err(TryLockError::WouldBlock) => return Ok(Claim::Busy),
            Err(TryLockError::Error(error)) => {
                let hint = format!("{error}; the folder has to be where files can be locked");
                return Err(cannot_write(&marker, hint));
            }
        }
        let partial = Self {
            path,
            lock: Some(lock),
            finished: false,
        };
        partial.clear()?;
        Ok(Claim::Ours(partial))
    }

    /// Takes away what an interrupted run left, the marker aside: whoever else looks finds it locked all the time.
    fn clear(&self) -> Result<(), ModelError> {
        let failed = |source| cannot_write(&self.path, source);
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name() != MARKER {
                let remove = match entry.file_type().map_err(failed)?.is_dir() {
                    true => fs::remove_dir_all(entry.path()),
                    false => fs::remove_file(entry.path()),
                };
                remove.map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Gives the folder its name.
    pub(crate) fn finish(mut self, target: &Path) -> Result<(), ModelError> {
        let failed = |source| cannot_write(target, source);
        fs::remove_file(self.path.join(MARKER)).map_err(failed)?;
        if cfg!(windows) {
            self.lock = None; // a folder with an open file in it cannot be renamed there
        }
        fs::rename(&self.path, target).map_err(failed)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.finished {
            // A folder that cannot be removed keeps its marker or lacks its weights: it does not load as whole.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Whether a path still leads to an open file; its owner may have removed it before we had the lock.
fn is_same_file(file: &File, path: &Path) -> bool {
    let (Ok(file), Ok(path)) = (file.metadata(), fs::metadata(path)) else {
        return false;
    };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        (file.dev(), file.ino()) == (path.dev(), path.ino())
    }
    #[cfg(not(unix))]
    {
        file.created().ok() == path.created().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(target: &Path) -> Option<Partial> {
        match Partial::claim(target).unwrap() {
            Claim::Ours(partial) => Some(partial),
            Claim::Busy | Claim::InTheWay => None,
        }
    }

    #[test]
    fn one_writes_at_a_time_and_what_is_left_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a").join("int4");
        let first = ours(&target).unwrap();
        fs::write(first.path.join("model.safetensors"), "half").unwrap();
        assert!(matches!(Partial::claim(&target).unwrap(), Claim::Busy));
        let refused = Partial::create(&target).err().unwrap().to_string();
        assert!(refused.contains("another process"), "{refused}");
        // As when the process ends: the lock goes, the folder stays.
        let path = first.path.clone();
        let mut first = std::mem::ManuallyDrop::new(first);
        first.lock = None;
        let second = ours(&target).unwrap();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
        drop(second);
        assert!(!path.exists());
        ours(&target).unwrap().finish(&target).unwrap();
        assert!(target.is_dir() && !path.exists());
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("int4");
        let other = partial_path(&target);
        fs::create_dir(&other).unwrap();
        fs::write(other.join("thesis.txt"), "years").unwrap();
        assert!(matches!(Partial::claim(&target).unwrap(), Claim::InTheWay));
        assert!(Partial::create(&target).is_err());
        assert!(other.join("thesis.txt").is_file());
    }
}
