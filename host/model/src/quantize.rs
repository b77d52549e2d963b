//! A checkpoint of floats -> MLX INT4, and INT8 for the vision tower, tensor by tensor, so that the memory in use does not grow with the model.
//!
//! The folder appears under its name when it is whole: until then it is written beside it as `NAME.partial`, and an
//! interrupted run leaves at most that, which the next run takes away. What is written is what mlx-vlm writes: the names
//! of the source, `weight` (u32), `scales` and `biases` for a quantized module, the patch convolution channels-last, and
//! `quantization` in `config.json`.

mod compare;
mod content;
mod kept;
mod partial;
mod plan;
mod writer;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use visor_kernels::ScaleType;

use crate::checkpoint::Checkpoint;
use crate::config::parse_json;
use crate::error::ModelError;
use crate::progress::{LoadProgress, LoadStage};
use crate::weights::{SMALL_BYTES_MAX, read_file};
use plan::{Step, plan};
use writer::write_tensor;

pub use compare::{Comparison, StageError, compare};
pub use kept::{QuantizedCache, quantized_facts};
pub(crate) use partial::Partial;
pub(crate) use plan::{Action, Planned, planned_bits, stored_bits};
pub(crate) use writer::Writer;

/// Weights that share a scale and a bias.
pub const GROUP: usize = 64;

/// How a part of the model is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Four bits, a scale and a bias for 64 weights.
    Int4,
    /// Eight bits, the same; codes of the tower and the projector use seven of them.
    Int8,
    /// The float type of what is not quantized.
    Float,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Int4 => "int4",
            Self::Int8 => "int8",
            Self::Float => "float",
        })
    }
}

impl Precision {
    /// Of a code; a float is none.
    fn bits(self) -> Option<usize> {
        match self {
            Self::Int4 => Some(4),
            Self::Int8 => Some(8),
            Self::Float => None,
        }
    }
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

/// The language model in four bits; the vision tower, which published INT4 conversions leave in floats, in eight, of which codes use
/// seven: half the memory, the integer kernels, and an error of a hundredth of its weights.
impl Default for QuantizeOptions {
    fn default() -> Self {
        Self {
            vision: Precision::Int8,
            embeddings: Precision::Int4,
            float_type: FloatType::F16,
        }
    }
}

/// What becomes of weights when they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantization {
    /// They are used as they are stored.
    #[default]
    None,
    /// Floats become INT4, once.
    Int4,
}

impl std::fmt::Display for Quantization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Int4 => "int4",
        })
    }
}

impl std::str::FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "int4" => Ok(Self::Int4),
            _ => Err(format!(
                "quantization {text:?} is unknown; use none or int4"
            )),
        }
    }
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
    /// Of a code: four, seven (stored in eight) or eight.
    pub bits: usize,
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
/// exists, is inside the source or cannot be written, or [`ModelError::Cancelled`]. Nothing of the target is left then.
pub fn quantize(
    source: &Path,
    target: &Path,
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<QuantizeReport, ModelError> {
    let checkpoint = Checkpoint::open(source)?;
    if is_inside(target, source) {
        let hint = "it is inside the checkpoint that is read; name a folder beside it";
        return Err(cannot_write(target, hint));
    }
    let partial = Partial::create(target)?;
    let report = write_checkpoint(&checkpoint, &partial.path, options, progress)?;
    partial.finish(target)?;
    Ok(report)
}

/// Whether a folder that may not be there yet would be in `folder`, by whatever names.
fn is_inside(target: &Path, folder: &Path) -> bool {
    let (Ok(target), Ok(folder)) = (std::path::absolute(target), folder.canonicalize()) else {
        return false;
    };
    let there = target.ancestors().find_map(|path| path.canonicalize().ok());
    there.is_some_and(|there| there.starts_with(folder))
}

/// Everything that belongs into the folder of the INT4 form.
fn write_checkpoint(
    checkpoint: &Checkpoint,
    folder: &Path,
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<QuantizeReport, ModelError> {
    let steps = plan(checkpoint, options)?;
    let report = write_weights(checkpoint, (&steps, folder), options, progress)?;
    if let Some(source) = checkpoint.dir() {
        let eight_bits = steps
            .iter()
            .filter_map(|step| step.planned().eight_bit_module());
        write_config(source, folder, &eight_bits.collect::<Vec<_>>())?;
        copy_companions(source, folder)?;
    }
    Checkpoint::open_written(folder)?; // what was written is a checkpoint
    Ok(report)
}

fn write_weights(
    checkpoint: &Checkpoint,
    (steps, folder): (&[Step<'_>], &Path),
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<QuantizeReport, ModelError> {
    let weights = checkpoint.weights();
    let path = folder.join("model.safetensors");
    let planned: Vec<Planned<'_>> = steps.iter().map(Step::planned).collect();
    let mut writer = Writer::create(&path, &planned, options.float_type.into())?;
    let (mut modules, mut done) = (Vec::new(), 0);
    for step in steps {
        let mut on_bytes = |bytes: u64| {
            done += bytes;
            progress(LoadProgress {
                stage: LoadStage::Quantizing,
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
fn write_config(source: &Path, folder: &Path, eight_bits: &[&str]) -> Result<(), ModelError> {
    let path = source.join("config.json");
    let config = parse_json(&read_file(&path, "")?, &path.display().to_string())?;
    write_quantized_config(config, folder, eight_bits)
}

/// `config.json` of a folder whose matrices are INT4, but for some modules of eight bits.
pub(crate) fn write_quantized_config(
    mut config: Value,
    folder: &Path,
    eight_bits: &[&str],
) -> Result<(), ModelError> {
    if let Value::Object(keys) = &mut config {
        let form = |bits| json!({ "group_size": GROUP, "bits": bits, "mode": "affine" });
        let mut quantization = form(4);
        for module in eight_bits {
            quantization[*module] = form(8);
        }
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
            .is_ok_and(|facts| facts.is_file() && facts.len() <= SMALL_BYTES_MAX);
        if known && small {
            fs::copy(&path, folder.join(&name)).map_err(|source| cannot_write(&path, source))?;
        }
    }
    Ok(())
}

fn cannot_write(path: &Path, reason: impl std::fmt::Display) -> ModelError {
    ModelError::Write {
        path: path.display().to_string(),
        reason: reason.to_string(),
    }
}
