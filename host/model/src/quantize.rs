//! A checkpoint of floats -> MLX INT4, tensor by tensor, so that the memory in use does not grow with the model.
//!
//! The folder appears under its name when it is whole: until then it is written beside it as `NAME.partial`, and an
//! interrupted run leaves at most that, which the next run takes away. What is written is what mlx-vlm writes: the names
//! of the source, `weight` (u32), `scales` and `biases` for a quantized module, the patch convolution channels-last, and
//! `quantization` in `config.json`.

mod plan;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use visor_kernels::ScaleType;

use crate::checkpoint::Checkpoint;
use crate::config::parse_json;
use crate::error::ModelError;
use crate::model::LoadProgress;
use crate::weights::read_file;
use plan::{Step, plan};
use writer::write_tensor;

pub(crate) use plan::{Action, Planned};
pub(crate) use writer::Writer;

/// Weights that share a scale and a bias.
pub const GROUP: usize = 64;
/// Longest small file that goes along; tokenizers are under 10 MiB.
const COMPANION_BYTES_MAX: u64 = 64 << 20;
/// In a folder that is being written.
const MARKER: &str = ".visor-partial";

/// How a part of the model is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Four bits, a scale and a bias for 64 weights.
    Int4,
    /// The float type of what is not quantized.
    Float,
}

/// What to make of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizeOptions {
    /// Linears of the vision tower and the projector.
    pub vision: Precision,
    /// Token embeddings and `lm_head`.
    pub embeddings: Precision,
    /// Of scales, biases and everything that is not quantized: f16 or bf16.
    pub float_type: FloatType,
}

/// How floats are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE binary16: eleven significant bits, up to 65504.
    F16,
    /// bfloat16: eight significant bits, as far as f32.
    Bf16,
}

impl From<FloatType> for ScaleType {
    fn from(float_type: FloatType) -> Self {
        match float_type {
            FloatType::F16 => Self::F16,
            FloatType::Bf16 => Self::Bf16,
        }
    }
}

/// What quantizing changed in one module.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleError {
    /// As the checkpoint names it, without `.weight`.
    pub module: String,
    /// Output values.
    pub rows: usize,
    /// Input values.
    pub columns: usize,
    /// The root of the mean squared error, relative to that of the weights.
    pub relative: f64,
    /// The same, had every group been quantized by its ends as MLX does.
    pub relative_by_ends: f64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeReport {
    /// Every quantized module, in the order of the file.
    pub modules: Vec<ModuleError>,
    /// Bytes of the source's weight files.
    pub source_bytes: u64,
    /// Bytes of the weight file written.
    pub bytes: u64,
}

/// Writes `target`, a folder that does not exist, from the float checkpoint in `source`.
///
/// `progress` hears of the source's bytes that are done and answers whether to go on.
///
/// # Errors
/// A [`ModelError`]: the source is unreadable or quantized already, a weight is not finite or does not fit, the target
/// exists or cannot be written, or [`ModelError::Cancelled`]. Nothing of the target is left then.
pub fn quantize(
    source: &Path,
    target: &Path,
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<QuantizeReport, ModelError> {
    let checkpoint = Checkpoint::open(source)?;
    let partial = Partial::create(target)?;
    let report = write_weights(&checkpoint, &partial.path, options, progress)?;
    write_config(source, &partial.path)?;
    copy_companions(source, &partial.path)?;
    Checkpoint::open(&partial.path)?; // what was written is a checkpoint
    partial.finish(target)?;
    Ok(report)
}

fn write_weights(
    checkpoint: &Checkpoint,
    folder: &Path,
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<QuantizeReport, ModelError> {
    let weights = checkpoint.weights();
    let steps = plan(checkpoint, options)?;
    let path = folder.join("model.safetensors");
    let planned: Vec<Planned<'_>> = steps.iter().map(Step::planned).collect();
    let mut writer = Writer::create(&path, &planned, options.float_type.into())?;
    let (mut modules, mut done) = (Vec::new(), 0);
    for step in &steps {
        let mut on_bytes = |bytes: u64| {
            done += bytes;
            progress(LoadProgress {
                bytes_done: done,
                bytes_total: weights.bytes(),
            })
        };
        modules.extend(write_tensor(
            &mut writer,
            step,
            options.float_type.into(),
            &mut on_bytes,
        )?);
        step.tensor.release();
    }
    Ok(QuantizeReport {
        modules,
        source_bytes: weights.bytes(),
        bytes: writer.finish()?,
    })
}

/// The source's config, with what MLX adds to it.
fn write_config(source: &Path, folder: &Path) -> Result<(), ModelError> {
    let path = source.join("config.json");
    let config = parse_json(&read_file(&path, "")?, &path.display().to_string())?;
    write_quantized_config(config, folder)
}

/// `config.json` of a folder whose matrices are INT4.
pub(crate) fn write_quantized_config(mut config: Value, folder: &Path) -> Result<(), ModelError> {
    if let Value::Object(keys) = &mut config {
        let quantization = json!({ "group_size": GROUP, "bits": 4, "mode": "affine" });
        keys.insert("quantization".to_owned(), quantization.clone());
        keys.insert("quantization_config".to_owned(), quantization);
    }
    let path = folder.join("config.json");
    let text = serde_json::to_string_pretty(&config).expect("a JSON value can be written");
    write_file(&path, text.as_bytes())
}

/// Writes a small file.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    fs::write(path, bytes).map_err(|source| cannot_write(path, source))
}

/// Copies the small files that belong to a checkpoint: tokenizer, processor, licence, and the code that other servers run.
fn copy_companions(source: &Path, folder: &Path) -> Result<(), ModelError> {
    let unreadable = |error| ModelError::Io {
        path: source.display().to_string(),
        source: error,
    };
    for entry in fs::read_dir(source).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name();
        let path = entry.path();
        let known = name.to_str().is_some_and(|name| {
            let kept = [".json", ".jinja", ".py", ".txt", ".md", ".model"];
            let ours = ["config.json", "model.safetensors.index.json"];
            !ours.contains(&name)
                && (kept.iter().any(|end| name.ends_with(end)) || name.starts_with("LICENSE"))
        });
        let small = fs::metadata(&path)
            .is_ok_and(|facts| facts.is_file() && facts.len() <= COMPANION_BYTES_MAX);
        if known && small {
            fs::copy(&path, folder.join(&name)).map_err(|source| cannot_write(&path, source))?;
        }
    }
    Ok(())
}

/// A folder that is being written; it is gone when it is not finished.
pub(crate) struct Partial {
    pub(crate) path: PathBuf,
    finished: bool,
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
        let mut name = target.as_os_str().to_owned();
        name.push(".partial");
        let path = PathBuf::from(name);
        if path.join(MARKER).is_file() {
            fs::remove_dir_all(&path).map_err(|source| cannot_write(&path, source))?;
        } else if path.exists() {
            let hint = "it is in the way and not of an earlier run; move it";
            return Err(cannot_write(&path, hint));
        }
        fs::create_dir_all(&path).map_err(|source| cannot_write(&path, source))?;
        let partial = Self {
            path,
            finished: false,
        };
        let marker = partial.path.join(MARKER);
        fs::write(&marker, "").map_err(|source| cannot_write(&marker, source))?;
        Ok(partial)
    }

    /// Gives the folder its name.
    pub(crate) fn finish(mut self, target: &Path) -> Result<(), ModelError> {
        let done =
            fs::remove_file(self.path.join(MARKER)).and_then(|()| fs::rename(&self.path, target));
        done.map_err(|source| cannot_write(target, source))?;
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

fn cannot_write(path: &Path, reason: impl std::fmt::Display) -> ModelError {
    ModelError::Write {
        path: path.display().to_string(),
        reason: reason.to_string(),
    }
}
