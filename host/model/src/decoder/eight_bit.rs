//! The decoder on the CPU with activations of eight bits: plain rows between integer products, keys and values as f16.
//! The float path above says what this computes.

use rayon::prelude::*;
use visor_kernels::{AttentionInput, Kernel, attend};

use super::{Decoder, Layer};
use crate::kv_cache::KvCache;
use crate::linear::Quantized;
use crate::rope::Regime;
use crate::rows::Rows;

impl Decoder {
    /// Runs `hidden` at the positions behind the cache and adds them to it; hidden states before the last norm.
    pub(super) fn forward_rows(
        &self,
        kernel: Kernel,
        mut hidden: Rows,
        cache: &mut KvCache,
        regime: Regime,
    ) -> candle_core::Result<Rows> {
        let count = hidden.count();
        cache.reserve_half(cache.len() + count);
        let (cosines, sines) = self.rope.angles(regime, cache.len(), count);
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = hidden.rms_norm(&layer.input_norm.to_vec1()?, self.eps);
            let mut qkv = layer
                .qkv
                .forward_rows(&normed, &Quantized::new(kernel, &normed))?;
            self.rotate(&mut qkv, &cosines, &sines);
            cache.append_half(index, &qkv.values, qkv.columns);
            let mixed = self.attend_rows(kernel, &qkv, (index, cache));
            hidden.add(
                &layer
                    .output
                    .forward_rows(&mixed, &Quantized::new(kernel, &mixed))?,
            );
            hidden.add(&self.feed_forward(kernel, layer, &hidden)?);
        }
        cache.commit(count, regime);
        Ok(hidden)
    }

    fn feed_forward(
        &self,
        kernel: Kernel,
        layer: &Layer,
        hidden: &Rows,
    ) -> candle_core::Result<Rows> {
        let normed = hidden.rms_norm(&layer.post_norm.to_vec1()?, self.eps);
        let gate_up = layer
            .gate_up
            .forward_rows(&normed, &Quantized::new(kernel, &normed))?;
        let inner = gate_up.swiglu(kernel);
        layer
            .down
            .forward_rows(&inner, &Quantized::new(kernel, &inner))
    }

    /// Rotates the query and key heads of every row: halves of a head are the two coordinates.
    fn rotate(&self, qkv: &mut Rows, cosines: &[f32], sines: &[f32]) {
        let (columns, half) = (qkv.columns, self.shape.head_dim / 2);
        let rotated = (self.shape.heads + self.shape.kv_heads) * self.shape.head_dim;
        let work = |(row, values): (usize, &mut [f32])| {
            let angles = row * half..(row + 1) * half;
            for head in values[..rotated].chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                let angles = cosines[angles.clone()].iter().zip(&sines[angles.clone()]);
                for ((x, y), (cosine, sine)) in first.iter_mut().zip(second).zip(angles) {
                    (*x, *y) = (*x * cosine - *y * sine, *x * sine + *y * cosine);
                }
            }
        };
        qkv.values
            .par_chunks_exact_mut(columns)
            .enumerate()
            .for_each(work);
    }

    fn attend_rows(&self, kernel: Kernel, qkv: &Rows, (layer, cache): (usize, &KvCache)) -> Rows {
        let shape = visor_kernels::AttentionShape {
            heads: self.shape.heads,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            causal: true,
        };
        let input = AttentionInput {
            queries: &qkv.values,
            query_stride: qkv.columns,
            rows: qkv.count(),
            keys: cache.len() + qkv.count(),
            key_values: &|head| cache.half_rows(layer, head),
        };
        let mut out = Rows::zeros(qkv.count(), shape.heads * shape.head_dim);
        attend(kernel, shape, &input, &mut out.values);
        out
    }
}
