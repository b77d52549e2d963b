//! Phi-3.5-vision: pixels and token ids in, logits out.
//!
//! [`Phi3V`] is immutable once loaded; everything that changes is in the caller's [`SequenceState`].

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use visor_kernels::Kernel;

use crate::checkpoint::Checkpoint;
use crate::clip::Tower;
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::device::{Activations, DeviceKind};
use crate::error::ModelError;
use crate::image::PixelValues;
use crate::kv_cache::KvCache;
use crate::linear::Loader;
use crate::projector::Projector;
use crate::tokenizer::Prompt;

/// How far loading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Weight bytes ready.
    pub bytes_done: u64,
    /// Weight bytes in all.
    pub bytes_total: u64,
}

/// The model: image tower, projector and decoder on one device.
pub struct Phi3V {
    config: ModelConfig,
    kind: DeviceKind,
    dtype: DType,
    tower: Tower,
    projector: Projector,
    decoder: Decoder,
}

/// Where weights go and what computes.
struct Placement {
    device: Device,
    dtype: DType,
    /// Matrices stay as their files have them.
    stored: bool,
    activations: Activations,
}

/// Projected features of one image, what its slots are filled with.
pub struct ImageFeatures {
    rows: Tensor, // (tokens, hidden), on the model's device
}

impl ImageFeatures {
    /// Slots the image takes in a prompt.
    pub fn tokens(&self) -> u32 {
        u32::try_from(self.rows.dims()[0]).unwrap_or(u32::MAX)
    }

    /// Bytes the features hold.
    pub fn bytes(&self) -> u64 {
        (self.rows.elem_count() * self.rows.dtype().size_in_bytes()) as u64
    }

    /// The features as f32, one row per image token.
    ///
    /// # Errors
    /// [`ModelError::Forward`] when the device cannot be read.
    pub fn to_rows(&self) -> Result<Vec<Vec<f32>>, ModelError> {
        Ok(self.rows.to_dtype(DType::F32)?.to_vec2()?)
    }
}

/// What one position of a sequence is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Token(u32),
    Image { index: u32, row: u32 },
}

/// One sequence: its tokens and image slots, its KV cache, and how far it has run.
///
/// The slots stay for the sequence's life, because crossing `original_positions_max` runs everything again.
pub struct SequenceState {
    slots: Vec<Slot>,
    features: Vec<Arc<ImageFeatures>>,
    cache: KvCache,
    last_hidden: Vec<f32>,
    pub(crate) rebuilds: bool,
}

impl SequenceState {
    /// Positions in all, run and pending.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a sequence has at least one position"
    )]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Positions that have not run yet.
    pub fn pending(&self) -> usize {
        self.slots.len() - self.cache.len()
    }

    /// Bytes the KV cache holds.
    pub fn kv_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Normalized hidden state of the last position that gave logits; empty before.
    pub fn last_hidden(&self) -> &[f32] {
        &self.last_hidden
    }
}

impl Phi3V {
    /// Loads the model to a device, to compute in floats. On the CPU weights stay mapped and little is read.
    ///
    /// # Errors
    /// [`ModelError::Device`] when the device does not start, [`ModelError::Forward`] when it has no room.
    pub fn load(
        checkpoint: &Checkpoint,
        device: DeviceKind,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, ModelError> {
        Self::load_with(checkpoint, device, Activations::Float, progress)
    }

    /// As [`Self::load`], with the activations that INT4 weights are multiplied with.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with(
        checkpoint: &Checkpoint,
        device: DeviceKind,
        activations: Activations,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, ModelError> {
        let placement = Placement {
            device: device.open()?,
            dtype: device.compute_dtype(checkpoint.parameters(), checkpoint.stored_dtype()),
            stored: device == DeviceKind::Cpu,
            activations,
        };
        Self::load_at(checkpoint, device, placement, progress)
    }

    fn load_at(
        checkpoint: &Checkpoint,
        kind: DeviceKind,
        Placement {
            device,
            dtype,
            stored,
            activations,
        }: Placement,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let loader = Loader {
            weights: checkpoint.weights(),
            device: &device,
            dtype,
            stored,
            kernel: (activations == Activations::Int8)
                .then(Kernel::detect)
                .flatten(),
            progress,
            bytes_done: Cell::new(0),
        };
        let model = Self {
            tower: Tower::load(&loader, &config)?,
            projector: Projector::load(&loader, &config)?,
            decoder: Decoder::load(&loader, &config)?,
            config,
            kind,
            dtype,
        };
        let bytes_total = checkpoint.weights().bytes();
        progress(LoadProgress {
            bytes_done: bytes_total,
            bytes_total,
        });
        Ok(model)
    }

    /// The checkpoint's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device the model runs on.
    pub fn device(&self) -> DeviceKind {
        self.kind
    }

    /// Bytes of a number in a KV cache.
    pub(crate) fn kv_value_bytes(&self) -> u64 {
        self.decoder.kv_value_bytes()
    }

    /// The type activations are computed in.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Tower, merge and projection of one image. `keep_going` is asked before every layer of every few crops.
    ///
    /// # Errors
    /// [`ModelError::Cancelled`] once `keep_going` says no, [`ModelError::Pixels`] when the crops do not fit the grid,
    /// [`ModelError::Forward`] when the device fails.
    pub fn encode_image(
        &self,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<ImageFeatures, ModelError> {
        let patches = self.tower_features(pixels, keep_going)?;
        self.project(&patches, pixels)
    }

    /// The tower's output, (crops, 576, width).
    pub(crate) fn tower_features(
        &self,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Tensor, ModelError> {
        let grid = u64::from(pixels.columns) * u64::from(pixels.rows);
        if u64::from(pixels.crop_count) != grid + 1 {
            return Err(ModelError::Pixels(format!(
                "{} crops; a grid of {} x {} and an overview are {}",
                pixels.crop_count,
                pixels.columns,
                pixels.rows,
                grid + 1
            )));
        }
        let patches = self.tower.forward(&pixels.crops, keep_going)?;
        if patches.dim(0)? as u64 != grid + 1 {
            return Err(ModelError::Pixels(format!(
                "{} values for {} crops",
                pixels.crops.len(),
                grid + 1
            )));
        }
        if !keep_going() {
            return Err(ModelError::Cancelled);
        }
        Ok(patches)
    }

    /// Merge and projection of the tower's output.
    pub(crate) fn project(
        &self,
        patches: &Tensor,
        pixels: &PixelValues,
    ) -> Result<ImageFeatures, ModelError> {
        let rows =
            self.projector
                .forward(patches, pixels.rows as usize, pixels.columns as usize)?;
        Ok(ImageFeatures { rows })
    }

    /// Starts a sequence: nothing runs yet. Slot `-(k + 1)` is filled from `features[k]`, whatever the order of the
    /// slots; an image that appears again starts again.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] for an empty prompt, an unknown id, an image without features, or slots that are not a
    /// whole number of images; [`ModelError::TooLong`].
    pub fn begin(
        &self,
        prompt: &Prompt,
        features: &[Arc<ImageFeatures>],
    ) -> Result<SequenceState, ModelError> {
        if prompt.ids.is_empty() {
            return Err(ModelError::Prompt("it is empty".into()));
        }
        self.check_length(prompt.ids.len())?;
        let mut used = vec![0u32; features.len()];
        let mut slots = Vec::with_capacity(prompt.ids.len());
        for &id in &prompt.ids {
            slots.push(match u32::try_from(id) {
                Ok(token) => self.check_token(token)?,
                Err(_) => next_image_slot(id, features, &mut used)?,
            });
        }
        for (index, (used, image)) in used.iter().zip(features).enumerate() {
            if used % image.tokens().max(1) != 0 {
                let message = format!(
                    "image {index} has {used} slots and {} features",
                    image.tokens()
                );
                return Err(ModelError::Prompt(message));
            }
        }
        Ok(SequenceState {
            slots,
            features: features.to_vec(),
            cache: KvCache::new(&self.config),
            last_hidden: Vec::new(),
            rebuilds: true,
        })
    }

    /// Appends one token, pending until the next [`Self::advance`]. Crossing `original_positions_max` drops the cache:
    /// its keys were rotated with the short factors, and everything is pending again. HF does the same.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] for an unknown id, [`ModelError::TooLong`].
    pub fn push(&self, state: &mut SequenceState, token: u32) -> Result<(), ModelError> {
        self.check_length(state.len() + 1)?;
        let slot = self.check_token(token)?;
        state.slots.push(slot);
        let regime = self.decoder.rope.regime(state.len());
        if state.rebuilds && state.cache.len() > 0 && state.cache.regime != regime {
            state.cache.clear();
        }
        Ok(())
    }

    /// Runs at most `positions_max` pending positions (at least one) and gives the logits of the last position once
    /// nothing is pending. The rotary regime is that of the whole sequence, pending positions included.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] when nothing is pending, [`ModelError::Forward`] when the device fails; the sequence is
    /// then as it was.
    pub fn advance(
        &self,
        state: &mut SequenceState,
        positions_max: usize,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        if self.kind == DeviceKind::Cpu {
            // On a thread of the pool: from outside, each of the hundreds of parallel steps would wait to be woken.
            return rayon::scope(|_| self.advance_here(state, positions_max));
        }
        self.advance_here(state, positions_max)
    }

    fn advance_here(
        &self,
        state: &mut SequenceState,
        positions_max: usize,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let hidden = self.run(state, positions_max)?;
        if state.pending() > 0 {
            return Ok(None);
        }
        self.finish(state, &hidden).map(Some)
    }

    /// Logits of the last row of [`Self::run`]'s answer; its normalized hidden state stays in the sequence.
    pub(crate) fn finish(
        &self,
        state: &mut SequenceState,
        hidden: &Tensor,
    ) -> Result<Vec<f32>, ModelError> {
        let last = self
            .decoder
            .normalize(&hidden.narrow(0, hidden.dim(0)? - 1, 1)?)?;
        state.last_hidden = last.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(self.decoder.logits(&last)?.flatten_all()?.to_vec1()?)
    }

    /// Runs pending positions and gives their hidden states before the last norm, (positions, hidden).
    pub(crate) fn run(
        &self,
        state: &mut SequenceState,
        positions_max: usize,
    ) -> Result<Tensor, ModelError> {
        let count = state.pending().min(positions_max.max(1));
        if count == 0 {
            return Err(ModelError::Prompt("no position is pending".into()));
        }
        let start = state.cache.len();
        let embeddings = self.embed(state, start, count)?;
        self.decoder.reserve(&mut state.cache, state.slots.len())?;
        let regime = self.decoder.rope.regime(state.slots.len());
        Ok(self.decoder.forward(embeddings, &mut state.cache, regime)?)
    }

    /// Logits of some rows of [`Self::run`]'s answer.
    pub(crate) fn logits_of(
        &self,
        hidden: &Tensor,
        rows: &[u32],
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let index = Tensor::from_slice(rows, rows.len(), hidden.device())?;
        let normalized = self.decoder.normalize(&hidden.index_select(&index, 0)?)?;
        Ok(self.decoder.logits(&normalized)?.to_vec2()?)
    }

    /// Embeddings of `count` positions from `start`: runs of tokens are looked up, runs of slots are copied.
    fn embed(
        &self,
        state: &SequenceState,
        start: usize,
        count: usize,
    ) -> Result<Tensor, ModelError> {
        let slots = &state.slots[start..start + count];
        let mut parts = Vec::new();
        for run in slots.chunk_by(|a, b| continues(*a, *b)) {
            parts.push(match run[0] {
                Slot::Image { index, row } => {
                    state.features[index as usize]
                        .rows
                        .narrow(0, row as usize, run.len())?
                }
                Slot::Token(_) => {
                    let ids = run.iter().filter_map(|slot| match slot {
                        Slot::Token(token) => Some(*token),
                        Slot::Image { .. } => None,
                    });
                    self.decoder.embed(&ids.collect::<Vec<u32>>())?
                }
            });
        }
        Ok(if parts.len() == 1 {
            parts.remove(0).contiguous()?
        } else {
            Tensor::cat(&parts, 0)?
        })
    }

    fn check_length(&self, positions: usize) -> Result<(), ModelError> {
        let positions_max = self.config.positions_max;
        if positions > positions_max {
            return Err(ModelError::TooLong {
                positions,
                positions_max,
            });
        }
        Ok(())
    }

    fn check_token(&self, token: u32) -> Result<Slot, ModelError> {
        if token as usize >= self.config.vocab_size {
            let message = format!(
                "token {token} is not below the vocabulary size {}",
                self.config.vocab_size
            );
            return Err(ModelError::Prompt(message));
        }
        Ok(Slot::Token(token))
    }
}

/// Whether two neighbours are copied or looked up together.
fn continues(a: Slot, b: Slot) -> bool {
    match (a, b) {
        (Slot::Token(_), Slot::Token(_)) => true,
        (
            Slot::Image { index: a, row },
            Slot::Image {
                index: b,
                row: next,
            },
        ) => a == b && next == row + 1,
        _ => false,
    }
}

/// The next row of the image that the negative id stands for.
fn next_image_slot(
    id: i64,
    features: &[Arc<ImageFeatures>],
    used: &mut [u32],
) -> Result<Slot, ModelError> {
    // Not negative: an id above u32, which no vocabulary has.
    let index = id
        .checked_neg()
        .and_then(|number| usize::try_from(number - 1).ok());
    let Some((index, image)) = index.and_then(|index| Some((index, features.get(index)?))) else {
        let message = format!(
            "id {id} is neither a token nor a slot of one of {} images",
            features.len()
        );
        return Err(ModelError::Prompt(message));
    };
    let tokens = image.tokens().max(1);
    let row = used[index] % tokens;
    used[index] = used[index].saturating_add(1);
    Ok(Slot::Image {
        index: index as u32,
        row,
    })
}

#[cfg(test)]
mod tests;
