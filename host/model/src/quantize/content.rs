//! Which weights these are: a digest of every byte, and how not to read them all again at the next start.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::checkpoint::hex;
use crate::error::ModelError;
use crate::progress::{LoadProgress, LoadStage};
use crate::weights::Weights;

/// Bytes one core hashes at a time; the digest is that of the pieces' digests, so this is part of its meaning.
const PIECE_BYTES: usize = 4 << 20;
/// Bytes between two reports, and in memory at once.
const SPAN_BYTES: usize = 128 << 20;
/// A file changed this shortly ago might be changed again without its time telling: coarse file systems count in two seconds.
const SETTLED: Duration = Duration::from_secs(3);

/// The digest of every weight, 64 hex digits.
///
/// Files that are as they were when a digest was written to `known` (length, times, inode) have that one: reading eight
/// gigabytes at every start would take longer than starting, and push what is served out of the page cache.
///
/// # Errors
/// [`ModelError::Cancelled`].
pub(super) fn digest(
    weights: &Weights,
    known: &Path,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<String, ModelError> {
    let note = identity(weights).map(|identity| known.join(hex(&Sha256::digest(identity))));
    let remembered = note.as_ref().and_then(|note| fs::read_to_string(note).ok());
    if let Some(digest) = remembered.filter(|digest| is_digest(digest)) {
        return Ok(digest);
    }
    let digest = read(weights, progress)?;
    if let Some(note) = note {
        // Without the note the next start reads the weights again, nothing else.
        let _ = remember(&note, &digest);
    }
    Ok(digest)
}

/// Reads every byte, on all cores.
fn read(
    weights: &Weights,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<String, ModelError> {
    let mut hasher = Sha256::new();
    let mut done = 0;
    for file in weights.files() {
        let bytes = file.bytes();
        hasher.update((bytes.len() as u64).to_le_bytes());
        for start in (0..bytes.len()).step_by(SPAN_BYTES) {
            let span = start..bytes.len().min(start + SPAN_BYTES);
            let pieces: Vec<_> = bytes[span.clone()]
                .par_chunks(PIECE_BYTES)
                .map(Sha256::digest)
                .collect();
            pieces.iter().for_each(|piece| hasher.update(piece));
            done += span.len() as u64;
            file.release(span);
            let go_on = progress(LoadProgress {
                stage: LoadStage::Hashing,
                bytes_done: done,
                bytes_total: weights.bytes(),
            });
            if !go_on {
                return Err(ModelError::Cancelled);
            }
        }
    }
    Ok(hex(&hasher.finalize()))
}

/// What tells a file from a changed one without reading it; nothing for files that changed just now or have no times.
fn identity(weights: &Weights) -> Option<String> {
    let mut text = String::new();
    for file in weights.files() {
        let metadata = file.metadata.as_ref()?;
        let modified = metadata.modified().ok()?;
        if SystemTime::now().duration_since(modified).ok()? < SETTLED {
            return None;
        }
        let since = modified.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let _ = write!(text, "{} {} {since:?}", file.name, metadata.len());
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            // The change time cannot be set: it tells of a copy that kept the old modification time.
            let _ = write!(
                text,
                " {} {} {}.{}",
                metadata.dev(),
                metadata.ino(),
                metadata.ctime(),
                metadata.ctime_nsec()
            );
        }
        text.push('\n');
    }
    Some(text)
}

/// Under its name when it is whole, so that two processes may do so at once.
fn remember(note: &Path, digest: &str) -> std::io::Result<()> {
    if let Some(folder) = note.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = note.with_extension(std::process::id().to_string());
    fs::write(&new, digest)?;
    fs::rename(&new, note)
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
