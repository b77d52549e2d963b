//! Checkpoints of a given shape with weights drawn at random: what a model of that shape costs can be measured without its
//! weights.
//!
//! Every matrix is in INT4, those of the tower and the projector as asked for, position embeddings among them: in INT4, too, the files are
//! those of MLX's converters of 2024. Groups are of 64, scales, biases and everything else in f16. Only tensors that the model reads are written. A matrix keeps the variance of
//! what it is multiplied with and norms are near one, so that activations stay finite through any number of layers; what
//! comes out means nothing. The same config and form give the same bytes.

use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use visor_kernels::ScaleType;

use crate::checkpoint::{Checkpoint, PHI3_TOKENIZER, PREPROCESSOR_CONFIG, hex};
use crate::config::{ModelConfig, PATCH_SIDE_PX, parse_json};
use crate::error::ModelError;
use crate::progress::{LoadProgress, LoadStage};
use crate::quantize::{
    Action, GROUP, Partial, Planned, Precision, QuantizeOptions, Writer, planned_bits, stored_bits,
    write_file, write_quantized_config,
};
use crate::table::{self, Entry, Form};

/// The config of Phi-3.5-vision-instruct as published.
pub const PHI35_VISION_CONFIG: &[u8] =
    include_bytes!("../../../tests/golden/real/config.reconstructed.json");

/// Goes up when the same config gives other bytes.
const REVISION: u32 = 2;
const FLOAT: ScaleType = ScaleType::F16;
/// Bytes drawn and written at a time.
const BLOCK_BYTES: usize = 16 << 20;
/// Bytes of a block that one thread draws.
const TASK_BYTES: usize = 1 << 20;
/// Of biases, separators and the class token.
const VECTOR_DEVIATION: f32 = 0.02;
/// Of norm weights around one.
const NORM_DEVIATION: f32 = 0.05;

/// Writes `target`, a folder that does not exist: a checkpoint of the shape that `config`, a `config.json`, describes, with `vision` for
/// the tower and the projector. It opens and serves as any other. `name` is the config's, for messages.
///
/// `progress` hears of the bytes that are written and answers whether to go on.
///
/// # Errors
/// A [`ModelError`]: the config is none, the target exists or cannot be written, or [`ModelError::Cancelled`]. Nothing of the
/// target is left then.
pub fn write_random(
    (name, config): (&str, &[u8]),
    vision: Precision,
    target: &Path,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<(), ModelError> {
    let entries = table::tensors(&ModelConfig::parse(config, name)?);
    let partial = Partial::create(target)?;
    let options = QuantizeOptions {
        vision,
        ..QuantizeOptions::default()
    };
    let forms: Vec<_> = entries
        .iter()
        .map(|entry| stored(entry, &options))
        .collect();
    let tensors = entries.iter().zip(&forms);
    let planned: Vec<Planned<'_>> = tensors
        .map(|(entry, (shape, action))| Planned {
            name: &entry.name,
            shape,
            action: *action,
        })
        .collect();
    write_weights(&planned, &partial.path.join("model.safetensors"), progress)?;
    let eight_bits: Vec<_> = planned
        .iter()
        .filter_map(Planned::eight_bit_module)
        .collect();
    write_quantized_config(parse_json(config, name)?, &partial.path, &eight_bits)?;
    for (name, bytes) in [
        ("preprocessor_config.json", PREPROCESSOR_CONFIG),
        ("tokenizer.json", PHI3_TOKENIZER),
    ] {
        write_file(&partial.path.join(name), bytes)?;
    }
    Checkpoint::open_written(&partial.path)?; // what was written is a checkpoint
    partial.finish(target)
}

/// What a config's checkpoint may be kept under: 16 hex digits, other ones when the same would give other bytes.
pub fn digest(config: &[u8], vision: Precision) -> String {
    let mut hasher = Sha256::new();
    hasher.update(REVISION.to_le_bytes());
    hasher.update(format!("{vision:?}"));
    hasher.update(config);
    hex(&hasher.finalize()[..8])
}

fn write_weights(
    planned: &[Planned<'_>],
    path: &Path,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<(), ModelError> {
    let writer = Writer::create(path, planned, FLOAT)?;
    let mut drawing = Drawing {
        bytes_total: writer.tensor_bytes,
        writer,
        random: Random { words: 0 },
        bytes_done: 0,
        progress,
    };
    for tensor in planned {
        match tensor.action {
            Action::Affine {
                rows,
                columns,
                bits,
            } => drawing.affine(rows, columns, bits)?,
            Action::Float | Action::ChannelsLast => drawing.floats(tensor)?,
        }
    }
    drawing.writer.finish().map(|_| ())
}

/// How the file has a tensor: codes wherever the groups fit, as a converter decides.
fn stored(entry: &Entry, options: &QuantizeOptions) -> (Vec<usize>, Action) {
    match &entry.form {
        &Form::Matrix { rows, columns } => {
            let action = match planned_bits(&entry.name, options) {
                Some(bits) if columns.is_multiple_of(GROUP) => Action::Affine {
                    rows,
                    columns,
                    bits,
                },
                _ => Action::Float,
            };
            (vec![rows, columns], action)
        }
        Form::Floats(shape) => (shape.clone(), Action::Float),
        &Form::Patches { out } => (
            vec![out, 3, PATCH_SIDE_PX, PATCH_SIDE_PX],
            Action::ChannelsLast,
        ),
    }
}

/// A weight file being drawn.
struct Drawing<'a> {
    writer: Writer,
    random: Random,
    bytes_done: u64,
    bytes_total: u64,
    progress: &'a mut dyn FnMut(LoadProgress) -> bool,
}

impl Drawing<'_> {
    /// Codes, scales and biases of a matrix whose weights have mean 0 and deviation `1 / sqrt(columns)`.
    fn affine(&mut self, rows: usize, columns: usize, bits: usize) -> Result<(), ModelError> {
        let code_bytes = rows * columns / 8 * stored_bits(bits);
        // Codes of seven bits are bytes without their highest.
        let mask = 0xFF >> (stored_bits(bits) - bits);
        let mut block = vec![0; BLOCK_BYTES.min(code_bytes)];
        for start in (0..code_bytes).step_by(BLOCK_BYTES) {
            let block = &mut block[..BLOCK_BYTES.min(code_bytes - start)];
            self.random.fill(block);
            block.iter_mut().for_each(|byte| *byte &= mask);
            self.put(block)?;
        }
        // Of codes from 0 up, all equally likely.
        let count = (1 << bits) as f32;
        let (mean, deviation) = ((count - 1.0) / 2.0, ((count * count - 1.0) / 12.0).sqrt());
        let scale = 1.0 / (deviation * (columns as f32).sqrt());
        let groups = rows * columns / GROUP;
        let (mut scales, mut biases) = (Vec::new(), Vec::new());
        for _ in 0..groups {
            // Every group has its own scale, within a quarter.
            let scale = FLOAT.rounded(scale * (1.0 + 0.5 * self.random.centred()));
            FLOAT.put(scale, &mut scales);
            FLOAT.put(-mean * scale, &mut biases);
        }
        self.put(&scales)?;
        self.put(&biases)
    }

    fn floats(&mut self, tensor: &Planned<'_>) -> Result<(), ModelError> {
        let (mean, deviation) = distribution(tensor);
        let values: usize = tensor.shape.iter().product();
        let mut bytes = Vec::with_capacity(values * FLOAT.bytes());
        for _ in 0..values {
            // A uniform distribution one wide has the deviation 1 / sqrt(12).
            let value = mean + deviation * 12f32.sqrt() * self.random.centred();
            FLOAT.put(value, &mut bytes);
        }
        self.put(&bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.writer.put(bytes)?;
        self.bytes_done += bytes.len() as u64;
        let go_on = (self.progress)(LoadProgress {
            stage: LoadStage::Drawing,
            bytes_done: self.bytes_done,
            bytes_total: self.bytes_total,
        });
        if go_on {
            Ok(())
        } else {
            Err(ModelError::Cancelled)
        }
    }
}

/// Mean and deviation of a float tensor's values.
fn distribution(tensor: &Planned<'_>) -> (f32, f32) {
    let mut path = tensor.name.rsplit('.');
    let (part, module) = (path.next(), path.next().unwrap_or_default());
    // `pre_layrnorm` is how the checkpoint spells it.
    if module.contains("norm") && part == Some("weight") {
        return (1.0, NORM_DEVIATION);
    }
    match tensor.shape {
        // A matrix, or the convolution.
        [_, inputs @ ..] if part == Some("weight") && !inputs.is_empty() => {
            let inputs: usize = inputs.iter().product();
            (0.0, 1.0 / (inputs as f32).sqrt())
        }
        _ => (0.0, VECTOR_DEVIATION),
    }
}

/// `SplitMix64`: a word depends on its number alone, so that threads draw side by side.
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
struct Random {
    words: u64,
}

impl Random {
    fn word(number: u64) -> u64 {
        let mut z = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform, from -0.5 to 0.5.
    fn centred(&mut self) -> f32 {
        self.words += 1;
        (Self::word(self.words) >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        let first = self.words + 1;
        self.words += bytes.len().div_ceil(8) as u64;
        bytes
            .par_chunks_mut(TASK_BYTES)
            .enumerate()
            .for_each(|(task, bytes)| {
                let first = first + (task * TASK_BYTES / 8) as u64;
                for (number, part) in (first..).zip(bytes.chunks_mut(8)) {
                    part.copy_from_slice(&Self::word(number).to_le_bytes()[..part.len()]);
                }
            });
    }
}
