//! The image tower: crops in, patch features out.
//!
//! CLIP ViT-L/14-336 up to the hidden state the projector was trained on: `hidden_states[-2]`, so the last layer and
//! `post_layernorm` never run.
//! Source: transformers `modeling_clip.py`, `CLIPVisionTransformer`; HF Phi-3.5 `get_img_features`.

mod eight_bit;

use candle_core::{DType, Tensor};
use candle_nn::ops::{layer_norm, sigmoid, softmax_last_dim};
use visor_kernels::Kernel;

use crate::config::{CROP_SIDE_PATCHES, CROP_SIDE_PX, LAYER_NORM_EPS, ModelConfig, PATCH_SIDE_PX};
use crate::error::ModelError;
use crate::linear::{Linear, Loader};
use crate::table::TOWER;

/// Crops that run together as floats: enough to fill the cores, few enough that activations stay around 100 MiB. With eight bits
/// one fills them, and its activations stay in memory that is used again.
const CROPS_AT_ONCE: usize = 4;
const PATCHES: usize = CROP_SIDE_PATCHES * CROP_SIDE_PATCHES;

/// The tower up to the layer that is used.
pub(crate) struct Tower {
    class: Tensor, // (1, 1, width)
    patches: Linear,
    patches_channels_last: bool,
    positions: Tensor, // (577, width); row 0 is the class token's
    pre_norm: LayerNorm,
    layers: Vec<Layer>,
    heads: usize,
    width: usize,
    dtype: DType,
    device: candle_core::Device,
    /// With one, rows are plain memory and products of INT4 and INT8 weights are the kernel's.
    kernel: Option<Kernel>,
}

/// Crops on their way through the tower: batches that are done, and the one under way.
#[derive(Default)]
pub(crate) struct TowerPass {
    done: Vec<Tensor>,
    half: Option<HalfDone>,
    /// Memory that every crop uses again.
    scratch: eight_bit::Scratch,
}

struct HalfDone {
    hidden: Tensor, // (crops * 577, width)
    /// Layers that have run.
    layers: usize,
}

struct Layer {
    norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    fn load(loader: &Loader<'_>, module: &str, width: usize) -> Result<Self, ModelError> {
        Ok(Self {
            weight: loader.floats(&format!("{module}.weight"), &[width])?,
            bias: loader.floats(&format!("{module}.bias"), &[width])?,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        layer_norm(x, &self.weight, &self.bias, LAYER_NORM_EPS)
    }
}

impl Tower {
    pub(crate) fn load(loader: &Loader<'_>, config: &ModelConfig) -> Result<Self, ModelError> {
        let (width, inner) = (config.vision.hidden_size, config.vision.intermediate_size);
        let (patches, patches_channels_last) =
            loader.patches(&format!("{TOWER}.embeddings.patch_embedding"), width)?;
        let mut layers = Vec::with_capacity(config.vision.layers_run);
        for index in 0..config.vision.layers_run {
            let name = format!("{TOWER}.encoder.layers.{index}");
            let square = |part: &str| {
                loader.linear_with_bias(&format!("{name}.self_attn.{part}"), width, width)
            };
            layers.push(Layer {
                norm1: LayerNorm::load(loader, &format!("{name}.layer_norm1"), width)?,
                query: square("q_proj")?,
                key: square("k_proj")?,
                value: square("v_proj")?,
                output: square("out_proj")?,
                norm2: LayerNorm::load(loader, &format!("{name}.layer_norm2"), width)?,
                fc1: loader.linear_with_bias(&format!("{name}.mlp.fc1"), inner, width)?,
                fc2: loader.linear_with_bias(&format!("{name}.mlp.fc2"), width, inner)?,
            });
        }
        Ok(Self {
            class: loader.floats(
                &format!("{TOWER}.embeddings.class_embedding"),
                &[1, 1, width],
            )?,
            patches,
            patches_channels_last,
            positions: loader.matrix_tensor(
                &format!("{TOWER}.embeddings.position_embedding"),
                1 + PATCHES,
                width,
            )?,
            pre_norm: LayerNorm::load(loader, &format!("{TOWER}.pre_layrnorm"), width)?,
            layers,
            heads: config.vision.heads,
            width,
            dtype: loader.dtype,
            device: loader.device.clone(),
            kernel: loader
                .kernel
                .filter(|_| loader.stored && loader.dtype == DType::F32),
        })
    }

    /// Patch features of `crops` normalized (3, 336, 336) crops, one after the other: (crops, 576, width), patches in
    /// row-major order, the class token dropped. `keep_going` is asked behind every layer; once it says no, the pass keeps what
    /// there is and the answer is `None`.
    pub(crate) fn advance(
        &self,
        pass: &mut TowerPass,
        crops: &[f32],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Tensor>, ModelError> {
        const CROP_VALUES: usize = 3 * CROP_SIDE_PX * CROP_SIDE_PX;
        if crops.is_empty() || !crops.len().is_multiple_of(CROP_VALUES) {
            return Err(ModelError::Pixels(format!(
                "{} values are not crops of 3 x 336 x 336",
                crops.len()
            )));
        }
        let crops_at_once = self.kernel.map_or(CROPS_AT_ONCE, |_| 1);
        let batches = crops.chunks(crops_at_once * CROP_VALUES);
        let batch_count = batches.len();
        for batch in batches.skip(pass.done.len()) {
            let count = batch.len() / CROP_VALUES;
            let mut half = match pass.half.take() {
                Some(half) => half,
                None => HalfDone {
                    hidden: self.embed(batch, count)?, // (crops * 577, width)
                    layers: 0,
                },
            };
            match self.kernel {
                Some(kernel) => {
                    self.run_rows(kernel, (&mut half, &mut pass.scratch), keep_going)?;
                }
                None => self.run(&mut half, count, keep_going)?,
            }
            if half.layers < self.layers.len() {
                pass.half = Some(half);
                return Ok(None);
            }
            let hidden = half.hidden.reshape((count, 1 + PATCHES, self.width))?;
            pass.done.push(hidden.narrow(1, 1, PATCHES)?.contiguous()?);
            if pass.done.len() < batch_count && !keep_going() {
                return Ok(None);
            }
        }
        pass.scratch = eight_bit::Scratch::default();
        Tensor::cat(&std::mem::take(&mut pass.done), 0)
            .map(Some)
            .map_err(ModelError::from)
    }

    /// Patches, class token and positions, normalized: `hidden_states[0]`, (crops * 577, width).
    fn embed(&self, crops: &[f32], count: usize) -> candle_core::Result<Tensor> {
        let (side, patch) = (CROP_SIDE_PATCHES, PATCH_SIDE_PX);
        let pixels = Tensor::from_slice(
            crops,
            (count, 3, side, patch, side, patch),
            &candle_core::Device::Cpu,
        )?;
        // The convolution's stride is its size, so it is a linear layer on unfolded patches.
        let order = if self.patches_channels_last {
            [0, 2, 4, 3, 5, 1]
        } else {
            [0, 2, 4, 1, 3, 5]
        };
        let unfolded = pixels
            .permute(order)?
            .reshape((count * PATCHES, 3 * patch * patch))?;
        let unfolded = unfolded.to_dtype(self.dtype)?.to_device(&self.device)?;
        let patches = self
            .patches
            .forward(&unfolded)?
            .reshape((count, PATCHES, self.width))?;
        let class = self
            .class
            .broadcast_as((count, 1, self.width))?
            .contiguous()?;
        let tokens = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.positions)?;
        self.pre_norm
            .forward(&tokens.reshape((count * (1 + PATCHES), self.width))?)
    }

    /// Layers until the last, or until `keep_going` says no.
    fn run(
        &self,
        half: &mut HalfDone,
        count: usize,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), ModelError> {
        for layer in &self.layers[half.layers..] {
            half.hidden = self.run_layer(layer, &half.hidden, count)?;
            half.layers += 1;
            if half.layers < self.layers.len() && !keep_going() {
                break;
            }
        }
        Ok(())
    }

    /// As [`Self::advance`] of one crop as floats, with what its rows are behind every layer given to `seen`.
    pub(crate) fn forward_layers(
        &self,
        crop: &[f32],
        seen: &mut dyn FnMut(usize, &Tensor) -> Result<(), ModelError>,
    ) -> Result<Tensor, ModelError> {
        let mut hidden = self.embed(crop, 1)?;
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = self.run_layer(layer, &hidden, 1)?;
            seen(index, &hidden)?;
        }
        let hidden = hidden.reshape((1, 1 + PATCHES, self.width))?;
        Ok(hidden.narrow(1, 1, PATCHES)?.contiguous()?)
    }

    fn run_layer(
        &self,
        layer: &Layer,
        hidden: &Tensor,
        count: usize,
    ) -> candle_core::Result<Tensor> {
        let normed = layer.norm1.forward(hidden)?;
        let mixed = self.attend(layer, &normed, count)?;
        let hidden = (hidden + layer.output.forward(&mixed)?)?;
        let inner = layer.fc1.forward(&layer.norm2.forward(&hidden)?)?;
        hidden + layer.fc2.forward(&quick_gelu(&inner)?)?
    }

    /// Full attention within each crop: (crops * 577, width) in and out.
    fn attend(&self, layer: &Layer, x: &Tensor, count: usize) -> candle_core::Result<Tensor> {
        let (tokens, head_dim) = (1 + PATCHES, self.width / self.heads);
        let by_head = |x: Tensor| {
            x.reshape((count, tokens, self.heads, head_dim))?
                .transpose(1, 2)?
                .contiguous()?
                .reshape((count * self.heads, tokens, head_dim))
        };
        let query = by_head(layer.query.forward(x)?)?;
        let key = by_head(layer.key.forward(x)?)?;
        let value = by_head(layer.value.forward(x)?)?;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let scores = (query.matmul(&key.t()?)?.to_dtype(DType::F32)? * scale)?;
        let mixed = softmax_last_dim(&scores)?
            .to_dtype(self.dtype)?
            .matmul(&value)?;
        mixed
            .reshape((count, self.heads, tokens, head_dim))?
            .transpose(1, 2)?
            .reshape((count * tokens, self.width))
    }
}

/// `x * sigmoid(1.702 x)`: CLIP's activation, not GELU.
fn quick_gelu(x: &Tensor) -> candle_core::Result<Tensor> {
    x * sigmoid(&(x * 1.702)?)?
}
