//! The language model: embeddings in, hidden states out, logits from those.
//!
//! Source: HF Phi-3.5 `modeling_phi3_v.py`, `Phi3DecoderLayer` and `Phi3Attention` (eager path).

mod eight_bit;

use candle_core::{DType, Tensor};
use candle_nn::ops::{rms_norm, softmax_last_dim, swiglu};
use candle_nn::rotary_emb::rope;
use visor_kernels::Kernel;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::kv_cache::{KvCache, KvPool};
use crate::linear::{Linear, Loader, WeightMatrix};
use crate::rope::{Regime, Rope};
use crate::rows::Rows;
use crate::table;

/// Attention scores held at once, over all heads: 32 MiB of f32. Longer prompts run in blocks of query rows.
const SCORES_MAX: usize = 8 << 20;

/// Decoder stack, token embedding and output layer.
pub(crate) struct Decoder {
    embedding: WeightMatrix,
    layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Linear,
    pub(crate) rope: Rope,
    shape: AttentionShape,
    eps: f32,
    dtype: DType,
    pub(crate) device: candle_core::Device,
    /// With one, rows are plain memory and products of INT4 and INT8 weights are the kernel's.
    kernel: Option<Kernel>,
}

/// Consecutive positions of one sequence that run in a step.
pub(crate) struct Run<'a> {
    /// What they see and are added to.
    pub(crate) cache: &'a mut KvCache,
    /// Positions.
    pub(crate) count: usize,
    /// Those of them, the first ones, that belong to the prompt.
    pub(crate) prompt_rows: usize,
    /// What they are rotated with.
    pub(crate) regime: Regime,
}

struct Layer {
    input_norm: Tensor,
    qkv: Linear,
    output: Linear,
    post_norm: Tensor,
    gate_up: Linear,
    down: Linear,
}

/// Head counts and width of one attention.
#[derive(Clone, Copy)]
struct AttentionShape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scores_max: usize,
}

impl Decoder {
    pub(crate) fn load(loader: &Loader<'_>, config: &ModelConfig) -> Result<Self, ModelError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let qkv_rows = (config.heads + 2 * config.kv_heads) * config.head_dim;
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            let name = format!("model.layers.{index}");
            layers.push(Layer {
                input_norm: loader.floats(&format!("{name}.input_layernorm.weight"), &[hidden])?,
                qkv: loader.linear(&format!("{name}.self_attn.qkv_proj"), qkv_rows, hidden)?,
                output: loader.linear(&format!("{name}.self_attn.o_proj"), hidden, hidden)?,
                post_norm: loader.floats(
                    &format!("{name}.post_attention_layernorm.weight"),
                    &[hidden],
                )?,
                gate_up: loader.linear(&format!("{name}.mlp.gate_up_proj"), 2 * inner, hidden)?,
                down: loader.linear(&format!("{name}.mlp.down_proj"), hidden, inner)?,
            });
        }
        let head = if config.tie_word_embeddings {
            table::EMBEDDING
        } else {
            "lm_head"
        };
        Ok(Self {
            embedding: loader.matrix(table::EMBEDDING, config.vocab_size, hidden)?,
            layers,
            norm: loader.floats("model.norm.weight", &[hidden])?,
            lm_head: loader.linear(head, config.vocab_size, hidden)?,
            rope: Rope::new(config),
            shape: AttentionShape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                scores_max: SCORES_MAX,
            },
            eps: config.rms_norm_eps as f32,
            dtype: loader.dtype,
            device: loader.device.clone(),
            kernel: loader
                .kernel
                .filter(|_| loader.stored && loader.dtype == DType::F32),
        })
    }

    /// Embeddings of token ids below the vocabulary size, (ids, hidden).
    pub(crate) fn embed(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        let rows = self.embedding.gather(ids);
        Tensor::from_vec(
            rows,
            (ids.len(), self.embedding.columns()),
            &candle_core::Device::Cpu,
        )?
        .to_dtype(self.dtype)?
        .to_device(&self.device)
    }

    /// Where KV blocks for this decoder come from.
    pub(crate) fn kv_pool(&self, config: &ModelConfig) -> KvPool {
        match self.kernel {
            Some(_) => KvPool::new(config, true, 2),
            None => KvPool::new(config, false, self.dtype.size_in_bytes() as u64),
        }
    }

    /// Whether rows of several sequences run together and give what each gives alone.
    pub(crate) fn is_joint(&self) -> bool {
        let is_integer = |layer: &Layer| {
            [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]
                .into_iter()
                .all(Linear::is_integer)
        };
        self.kernel.is_some() && self.lm_head.is_integer() && self.layers.iter().all(is_integer)
    }

    /// Runs `x` (n, hidden), the rows of each run at the positions behind its cache, and adds them to it; hidden states before
    /// the last norm, (n, hidden). The caches have room.
    pub(crate) fn forward(
        &self,
        x: Tensor,
        runs: &mut [Run<'_>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Tensor, ModelError> {
        if let Some(kernel) = self.kernel {
            let hidden = self.forward_rows(kernel, Rows::of(&x)?, runs, keep_going)?;
            return Ok(hidden.to_tensor()?);
        }
        let (mut start, mut hidden) = (0, Vec::with_capacity(runs.len()));
        for run in runs {
            let part = x.narrow(0, start, run.count)?;
            hidden.push(self.forward_one(part, run, keep_going)?);
            start += run.count;
        }
        Ok(Tensor::cat(&hidden, 0)?)
    }

    fn forward_one(
        &self,
        x: Tensor,
        run: &mut Run<'_>,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Tensor, ModelError> {
        let Run {
            cache,
            count,
            regime,
            ..
        } = run;
        cache.reserve_tensors(cache.len() + *count, &self.device, self.dtype)?;
        let place = (&self.device, self.dtype);
        let (cosines, sines) = self.rope.tables(*regime, cache.len(), *count, place)?;
        let mut hidden = x;
        for (index, layer) in self.layers.iter().enumerate() {
            if !keep_going() {
                return Err(ModelError::Cancelled);
            }
            hidden = self.run_layer((index, layer), hidden, cache, (&cosines, &sines))?;
        }
        cache.commit(*count, *regime);
        Ok(hidden)
    }

    /// One layer on the positions behind those of the cache, which has room; they are not committed.
    fn run_layer(
        &self,
        (index, layer): (usize, &Layer),
        hidden: Tensor,
        cache: &KvCache,
        (cosines, sines): (&Tensor, &Tensor),
    ) -> candle_core::Result<Tensor> {
        let normed = rms_norm(&hidden.contiguous()?, &layer.input_norm, self.eps)?;
        let (q, k, v) = self.shape.split(&layer.qkv.forward(&normed)?)?;
        let rotate = |x: &Tensor| rope(&x.unsqueeze(0)?, cosines, sines)?.squeeze(0);
        let (keys, values) = cache.append_tensors(index, &rotate(&k)?, &v)?;
        let mixed = self.shape.attend(&rotate(&q)?, &keys, &values)?;
        let hidden = (hidden + layer.output.forward(&mixed)?)?;
        let normed = rms_norm(&hidden, &layer.post_norm, self.eps)?;
        let inner = swiglu(&layer.gate_up.forward(&normed)?)?;
        hidden + layer.down.forward(&inner)?
    }

    /// As [`Self::forward`] of a new sequence as floats, with what `x` is behind every layer given to `seen`.
    pub(crate) fn forward_layers(
        &self,
        x: Tensor,
        mut cache: KvCache,
        seen: &mut dyn FnMut(usize, &Tensor) -> Result<(), ModelError>,
    ) -> Result<Tensor, ModelError> {
        let (count, place) = (x.dim(0)?, (&self.device, self.dtype));
        cache.reserve_tensors(count, &self.device, self.dtype)?;
        let (cosines, sines) = self.rope.tables(self.rope.regime(count), 0, count, place)?;
        let mut hidden = x;
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = self.run_layer((index, layer), hidden, &cache, (&cosines, &sines))?;
            seen(index, &hidden)?;
        }
        Ok(hidden)
    }

    /// The last norm, on rows.
    pub(crate) fn normalize(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        rms_norm(&hidden.contiguous()?, &self.norm, self.eps)
    }

    /// Logits of normalized rows, (n, vocabulary) f32.
    pub(crate) fn logits(&self, normalized: &Tensor) -> candle_core::Result<Tensor> {
        self.lm_head.forward(normalized)?.to_dtype(DType::F32)
    }
}

impl AttentionShape {
    /// Rows of q, k and v side by side to (heads, n, head_dim) each.
    fn split(self, qkv: &Tensor) -> candle_core::Result<(Tensor, Tensor, Tensor)> {
        let n = qkv.dim(0)?;
        let (query, key) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let part = |start, width: usize| {
            qkv.narrow(1, start, width)?
                .reshape((n, width / self.head_dim, self.head_dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        Ok((part(0, query)?, part(query, key)?, part(query + key, key)?))
    }

    /// Causal attention of the last n positions over all of them: q (heads, n, head_dim), keys and values (kv_heads,
    /// total, head_dim), answer (n, heads * head_dim). Query rows run in blocks, so that scores stay within
    /// `scores_max` however long the prompt is; a block sees the keys up to its own last row.
    fn attend(self, q: &Tensor, keys: &Tensor, values: &Tensor) -> candle_core::Result<Tensor> {
        let (n, total) = (q.dim(1)?, keys.dim(1)?);
        let block_rows = (self.scores_max / (self.heads * total)).clamp(1, n);
        let mut blocks = Vec::new();
        for start in (0..n).step_by(block_rows) {
            let rows = block_rows.min(n - start);
            let visible = total - n + start + rows;
            let block = self.attend_block(
                &q.narrow(1, start, rows)?,
                &keys.narrow(1, 0, visible)?,
                &values.narrow(1, 0, visible)?,
            )?;
            blocks.push(block);
        }
        let mixed = if blocks.len() == 1 {
            blocks.remove(0)
        } else {
            Tensor::cat(&blocks, 1)?
        };
        mixed
            .transpose(0, 1)?
            .reshape((n, self.heads * self.head_dim))
    }

    /// One block whose last row is the last visible position: (heads, rows, head_dim). The query heads of a group share
    /// a key head, so they are rows of one product and no key is repeated.
    fn attend_block(
        self,
        q: &Tensor,
        keys: &Tensor,
        values: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (rows, visible) = (q.dim(1)?, keys.dim(1)?);
        let group = self.heads / self.kv_heads;
        let q = q
            .contiguous()?
            .reshape((self.kv_heads, group * rows, self.head_dim))?;
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let scores = (q.matmul(&keys.t()?)?.to_dtype(DType::F32)? * scale)?;
        let scores = if rows == 1 {
            scores
        } else {
            let mask = causal_mask(rows, visible, q.device())?;
            let masked = scores
                .reshape((self.heads, rows, visible))?
                .broadcast_add(&mask)?;
            masked.reshape((self.kv_heads, group * rows, visible))?
        };
        let weights = softmax_last_dim(&scores)?.to_dtype(values.dtype())?;
        weights
            .matmul(values)?
            .reshape((self.heads, rows, self.head_dim))
    }
}

/// 0 where a row may look and minus infinity behind it, (rows, visible); the last row sees everything.
fn causal_mask(
    rows: usize,
    visible: usize,
    device: &candle_core::Device,
) -> candle_core::Result<Tensor> {
    let seen = |row: usize| visible - rows + row + 1;
    let mask: Vec<f32> = (0..rows)
        .flat_map(|row| {
            (0..visible).map(move |key| {
                if key < seen(row) {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            })
        })
        .collect();
    Tensor::from_vec(mask, (rows, visible), device)
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};

    use super::*;

    /// Attention by definition: one query, one head, one key at a time, in f64.
    fn naive(shape: AttentionShape, q: &Tensor, keys: &Tensor, values: &Tensor) -> Vec<f64> {
        let three = |tensor: &Tensor| tensor.to_vec3::<f32>().unwrap();
        let (q, keys, values) = (three(q), three(keys), three(values));
        let (n, total) = (q[0].len(), keys[0].len());
        let mut out = Vec::new();
        for row in 0..n {
            for (head, rows) in q.iter().enumerate() {
                let kv = head * shape.kv_heads / shape.heads;
                let score = |key: usize| -> f64 {
                    let products = rows[row]
                        .iter()
                        .zip(&keys[kv][key])
                        .map(|(a, b)| f64::from(*a) * f64::from(*b));
                    (products.sum::<f64>() / (shape.head_dim as f64).sqrt()).exp()
                };
                let weights: Vec<f64> = (0..=total - n + row).map(score).collect();
                let sum: f64 = weights.iter().sum();
                let mut mixed = vec![0.0; shape.head_dim];
                for (weight, value) in weights.iter().zip(&values[kv]) {
                    for (mixed, value) in mixed.iter_mut().zip(value) {
                        *mixed += weight * f64::from(*value) / sum;
                    }
                }
                out.extend(mixed);
            }
        }
        out
    }

    #[test]
    fn blocks_of_any_size_give_causal_attention() {
        let (n, total) = (9, 14);
        for (heads, kv_heads) in [(4, 4), (6, 2), (3, 1)] {
            let random = |heads: usize, rows: usize| {
                Tensor::randn(0f32, 1.0, (heads, rows, 8), &Device::Cpu).unwrap()
            };
            let (q, keys, values) = (
                random(heads, n),
                random(kv_heads, total),
                random(kv_heads, total),
            );
            for rows in [1, 2, 4, 9] {
                let shape = AttentionShape {
                    heads,
                    kv_heads,
                    head_dim: 8,
                    scores_max: rows * heads * total,
                };
                let got = shape
                    .attend(&q, &keys, &values)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap();
                for (got, want) in got.iter().zip(naive(shape, &q, &keys, &values)) {
                    assert!(
                        (f64::from(*got) - want).abs() < 1e-5,
                        "{heads}/{kv_heads} heads, {rows} rows: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_last_dimension_is_what_softmax_and_swiglu_work_on() {
        let x = Tensor::new(&[[0f32, 1.0, 2.0, 3.0]], &Device::Cpu).unwrap();
        let out = swiglu(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(out[0].len(), 2);
        assert!(
            (out[0][1] - 3.0 / (1.0 + (-1f32).exp())).abs() < 1e-6,
            "silu of the first half times the second"
        );
        let sums = softmax_last_dim(&x)
            .unwrap()
            .sum(D::Minus1)
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        assert!((sums[0] - 1.0).abs() < 1e-6);
    }
}
