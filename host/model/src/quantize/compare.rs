//! An INT4 checkpoint run beside the floats it was made from: how far what comes out of every layer is from what came out before.
//!
//! Both are mapped; one runs after the other, pages go back to the system behind every layer, and only what comes out of the layers
//! is kept, so that memory does not grow with the model. Errors add up: each layer has those of the layers before it.

use std::path::Path;

use candle_core::{DType, Tensor};

use crate::checkpoint::Checkpoint;
use crate::config::CROP_SIDE_PX;
use crate::device::DeviceKind;
use crate::error::ModelError;
use crate::kv_cache::KvCache;
use crate::model::Phi3V;
use crate::progress::{LoadProgress, LoadStage};
use crate::table::TOWER;

/// What is asked about the picture.
const TEXT: &str =
    "Which colours are in this picture, and what is in its middle? Answer in one sentence.";
/// Rows of the picture that the language model reads: enough to be a picture, few enough to take seconds.
const PICTURE_ROWS: usize = 48;

/// What quantizing changed behind one stage.
#[derive(Debug, Clone, PartialEq)]
pub struct StageError {
    /// `vision layer 3`, `image features`, `layer 3`, `logits`.
    pub stage: String,
    /// The root of the mean squared difference, relative to that of what the floats give.
    pub relative: f64,
}

/// What quantizing changed in what a model computes, of one fixed picture and text.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// In the order they run.
    pub stages: Vec<StageError>,
    /// Positions whose most likely next token is the same.
    pub same_tokens: usize,
    /// Positions in all.
    pub tokens: usize,
}

/// Runs `target`, a checkpoint, beside `source`, the floats it was made from.
///
/// `progress` hears of the bytes that are through and answers whether to go on.
///
/// # Errors
/// A [`ModelError`]: one does not open or run, they are of different models, or [`ModelError::Cancelled`].
pub fn compare(
    source: &Path,
    target: &Path,
    progress: &mut dyn FnMut(LoadProgress) -> bool,
) -> Result<Comparison, ModelError> {
    let (source, target) = (Checkpoint::open(source)?, Checkpoint::open(target)?);
    let mut meter = Meter {
        total: source.weights().bytes() + target.weights().bytes(),
        done: 0,
        progress,
    };
    let mut want = Vec::new();
    run(&source, &mut meter, &mut |stage, out| {
        want.push((stage, values(out)?));
        Ok(())
    })?;
    let (mut stages, mut have_last) = (Vec::with_capacity(want.len()), Vec::new());
    run(&target, &mut meter, &mut |stage, out| {
        let have = values(out)?;
        let (name, want) = want.get(stages.len()).ok_or_else(|| other_model(&stage))?;
        if *name != stage || want.len() != have.len() {
            return Err(other_model(&stage));
        }
        let relative = relative(want, &have);
        stages.push(StageError { stage, relative });
        have_last = have;
        Ok(())
    })?;
    let logits = want.last().map_or(&[][..], |(_, logits)| logits);
    let vocabulary = source.config().vocab_size;
    let pairs = logits.chunks(vocabulary).zip(have_last.chunks(vocabulary));
    Ok(Comparison {
        stages,
        same_tokens: pairs
            .filter(|(want, have)| largest(want) == largest(have))
            .count(),
        tokens: logits.len() / vocabulary,
    })
}

/// How far both are.
struct Meter<'a> {
    total: u64,
    done: u64,
    progress: &'a mut dyn FnMut(LoadProgress) -> bool,
}

impl Meter<'_> {
    /// These tensors are through: their pages may go.
    fn pass(&mut self, checkpoint: &Checkpoint, prefix: &str) -> Result<(), ModelError> {
        self.done += checkpoint.weights().release(prefix);
        let go_on = (self.progress)(LoadProgress {
            stage: LoadStage::Comparing,
            bytes_done: self.done.min(self.total),
            bytes_total: self.total,
        });
        if go_on {
            Ok(())
        } else {
            Err(ModelError::Cancelled)
        }
    }
}

/// Runs one checkpoint, as floats, and gives what comes out of every stage to `seen`.
fn run(
    checkpoint: &Checkpoint,
    meter: &mut Meter<'_>,
    seen: &mut dyn FnMut(String, &Tensor) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let model = Phi3V::load(checkpoint, DeviceKind::Cpu, &|_| ())?;
    let patches = model.tower.forward_layers(&picture(), &mut |index, out| {
        seen(format!("vision layer {index}"), out)?;
        meter.pass(checkpoint, &format!("{TOWER}.encoder.layers.{index}."))
    })?;
    // The overview of a square picture and its only tile are the same crop.
    let mut pass = model
        .projector
        .begin(&Tensor::cat(&[&patches, &patches], 0)?, 1, 1)?;
    let features = model.projector.advance(&mut pass, &|| true)?;
    let features = features.ok_or(ModelError::Cancelled)?;
    seen("image features".to_owned(), &features)?;
    let text = model
        .decoder
        .embed(&checkpoint.tokenizer()?.encode_text(TEXT))?;
    let picture_rows = PICTURE_ROWS.min(features.dim(0)?);
    let prompt = Tensor::cat(&[&features.narrow(0, 0, picture_rows)?, &text], 0)?;
    let cache = KvCache::new(model.kv_pool.clone());
    let hidden = model
        .decoder
        .forward_layers(prompt, cache, &mut |index, out| {
            seen(format!("layer {index}"), out)?;
            meter.pass(checkpoint, &format!("model.layers.{index}."))
        })?;
    let logits = model.decoder.logits(&model.decoder.normalize(&hidden)?)?;
    seen("logits".to_owned(), &logits)?;
    meter.pass(checkpoint, "lm_head")
}

/// A crop of smooth colours around a dark square, about as bright as normalized pictures are: (3, 336, 336).
fn picture() -> Vec<f32> {
    let side = CROP_SIDE_PX;
    let value = |index: usize| {
        let (channel, y, x) = (index / (side * side), index / side % side, index % side);
        let (across, down) = (x as f32 / side as f32, y as f32 / side as f32);
        let inside = |at: usize| (side / 3..2 * side / 3).contains(&at);
        if inside(x) && inside(y) {
            return -1.5;
        }
        match channel {
            0 => 2.0 * across - 0.5,
            1 => 2.0 * down - 0.5,
            _ => 1.5 - across - down,
        }
    };
    (0..3 * side * side).map(value).collect()
}

fn values(tensor: &Tensor) -> Result<Vec<f32>, ModelError> {
    let flat = tensor.to_dtype(DType::F32)?.flatten_all()?;
    Ok(flat.to_vec1()?)
}

fn relative(want: &[f32], have: &[f32]) -> f64 {
    let squares = |value: f32| f64::from(value).powi(2);
    let total: f64 = want.iter().map(|&want| squares(want)).sum();
    let changed: f64 = want.iter().zip(have).map(|(a, b)| squares(a - b)).sum();
    if changed == 0.0 {
        0.0
    } else {
        (changed / total).sqrt()
    }
}

fn largest(logits: &[f32]) -> Option<usize> {
    let indexes = 0..logits.len();
    indexes.max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}

fn other_model(stage: &str) -> ModelError {
    ModelError::Config {
        file: "config.json".into(),
        message: format!("the two checkpoints are of different models: {stage}"),
    }
}
