//! The INT4 form of a float checkpoint, made once and kept.
//!
//! A form is found by all that its bytes depend on: config, every weight, the options, the quantizer's revision. It is made by
//! one process at a time while others wait, appears under its name when it is whole, and is made again when it does not open.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::partial::{Claim, partial_path};
use super::plan::plan;
use super::{GROUP, Partial, QuantizeOptions, cannot_write, content, write_checkpoint, writer};
use crate::checkpoint::{Checkpoint, CheckpointFacts, hex};
use crate::error::ModelError;
use crate::progress::{LoadProgress, LoadStage};

/// Goes up when the same weights and options give other bytes.
const REVISION: u32 = 4;
/// Between two looks at what another process is writing.
const LOOK: Duration = Duration::from_millis(200);
/// A folder without its marker is about to get its name, within an instant; after this its process ended in that instant.
const RENAMING: Duration = Duration::from_secs(5);

/// Where INT4 forms are kept, and how they are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizedCache {
    /// Made when it is not there.
    pub folder: PathBuf,
    /// What becomes of what.
    pub options: QuantizeOptions,
}

/// What the INT4 form of a checkpoint will be, without making it; what the checkpoint is when that is quantized already.
///
/// # Errors
/// A [`ModelError`] when it cannot be quantized.
pub fn quantized_facts(
    source: &Checkpoint,
    options: &QuantizeOptions,
) -> Result<CheckpointFacts, ModelError> {
    let facts = source.facts();
    if source.is_quantized() {
        return Ok(facts);
    }
    Ok(CheckpointFacts {
        bytes: planned_bytes(source, options)?,
        quantization: format!("int4 group {GROUP}, from {}", facts.quantization),
        digest: hex(&hasher(&facts, options).finalize()),
        ..facts
    })
}

impl QuantizedCache {
    /// The INT4 form of a checkpoint, made now unless it is kept; nothing when the checkpoint is quantized already.
    ///
    /// `progress` hears of the source's bytes that are done and answers whether to go on.
    ///
    /// # Errors
    /// A [`ModelError`]: a weight does not fit, the folder cannot be written, or [`ModelError::Cancelled`]. Nothing that opens
    /// is left of a form that is not whole.
    pub fn open(
        &self,
        source: &Checkpoint,
        progress: &mut dyn FnMut(LoadProgress) -> bool,
    ) -> Result<Option<Checkpoint>, ModelError> {
        if source.is_quantized() {
            return Ok(None);
        }
        let started = Instant::now();
        let content = content::digest(source.weights(), &self.folder.join("known"), progress)?;
        let facts = source.facts();
        let mut hasher = hasher(&facts, &self.options);
        hasher.update(&content);
        let key = hex(&hasher.finalize()[..8]);
        let target = self.folder.join(format!("{}-{key}", facts.id));
        if let Some(kept) = opened(&target) {
            self.tell(&target, &kept, None);
            return Ok(Some(kept));
        }
        let made = self.made(source, &target, progress);
        let kept = made.map_err(|error| self.explained(error, source))?;
        self.tell(&target, &kept, Some(started.elapsed()));
        Ok(Some(kept))
    }

    fn made(
        &self,
        source: &Checkpoint,
        target: &Path,
        progress: &mut dyn FnMut(LoadProgress) -> bool,
    ) -> Result<Checkpoint, ModelError> {
        let partial = claim(target, source.weights().bytes(), progress)?;
        // Whoever was waited for may have made it.
        if let Some(kept) = opened(target) {
            return Ok(kept);
        }
        remove(target)?;
        write_checkpoint(source, &partial.path, &self.options, progress)?;
        partial.finish(target)?;
        Checkpoint::open(target)
    }

    /// A failure to write, with what helps.
    fn explained(&self, error: ModelError, source: &Checkpoint) -> ModelError {
        let ModelError::Write { path, reason } = error else {
            return error;
        };
        let mib = planned_bytes(source, &self.options).unwrap_or(0) >> 20;
        let folder = self.folder.display();
        ModelError::Write {
            path,
            reason: format!(
                "{reason}; quantized weights are kept in {folder} and take {mib} MiB: make room, or name another folder with model.quantized_folder"
            ),
        }
    }

    /// Where it is, how large it is, and what else is kept beside it: nothing here removes old ones.
    fn tell(&self, target: &Path, kept: &Checkpoint, took: Option<Duration>) {
        let beside = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let beside = beside.filter(|entry| {
            entry.path() != target && entry.path().join("model.safetensors").is_file()
        });
        let (others, others_bytes) = beside.fold((0, 0), |(count, bytes), entry| {
            let file = fs::metadata(entry.path().join("model.safetensors"));
            (count + 1, bytes + file.map_or(0, |file| file.len()))
        });
        tracing::info!(
            folder = %target.display(),
            mib = kept.facts().bytes >> 20,
            others,
            others_mib = others_bytes >> 20,
            took_s = took.map(|took| took.as_secs_f64()),
            "quantized weights are kept"
        );
    }
}

/// What a form depends on, its weights aside.
fn hasher(source: &CheckpointFacts, options: &QuantizeOptions) -> Sha256 {
    let mut hasher = Sha256::new();
    hasher.update(format!("{REVISION} {options:?} {}\n", source.digest));
    hasher
}

fn planned_bytes(source: &Checkpoint, options: &QuantizeOptions) -> Result<u64, ModelError> {
    let steps = plan(source, options)?;
    let planned: Vec<_> = steps.iter().map(super::Step::planned).collect();
    Ok(writer::tensor_bytes(&planned, options.float_type.into()))
}

/// A form that is whole. One that is damaged is as good as none.
fn opened(target: &Path) -> Option<Checkpoint> {
    if !target.exists() {
        return None;
    }
    Checkpoint::open(target)
        .inspect_err(|error| tracing::warn!(%error, "kept weights are made again"))
        .ok()
}

/// Waits for the right to write.
fn claim(
    target: &Path,
    bytes_total: u64,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<Partial, ModelError> {
    let (mut told, mut unmarked_since) = (false, None);
    loop {
        match Partial::claim(target)? {
            Claim::Ours(partial) => return Ok(partial),
            Claim::Busy => unmarked_since = None,
            Claim::InTheWay => {
                let since = *unmarked_since.get_or_insert_with(Instant::now);
                if since.elapsed() > RENAMING {
                    remove(&partial_path(target))?;
                }
            }
        }
        if !std::mem::replace(&mut told, true) {
            tracing::info!(folder = %target.display(), "{}", LoadStage::Waiting);
        }
        let go_on = progress(LoadProgress {
            stage: LoadStage::Waiting,
            bytes_done: 0,
            bytes_total,
        });
        if !go_on {
            return Err(ModelError::Cancelled);
        }
        thread::sleep(LOOK);
    }
}

fn remove(folder: &Path) -> Result<(), ModelError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(cannot_write(folder, error))
        }
        _ => Ok(()),
    }
}
