//! The decoder on the CPU with activations of eight bits: plain rows between integer products, keys and values as f16.
//! The float path above says what this computes.

use rayon::prelude::*;
use visor_kernels::{AttentionInput, Kernel, attend};

use super::{Decoder, Layer};
use crate::kv_cache::KvCache;
use crate::linear::Quantized;
use crate::rope::Regime;
use crate::rows::Rows;

/// Memory that every layer uses again.
#[derive(Default)]
struct Scratch {
    normed: Rows,
    quantized: Quantized,
    wide: Rows, // queries, keys and values; gate and up
    mixed: Rows,
    out: Rows,
}

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
        let angles = self.rope.angles(regime, cache.len(), count);
        let mut scratch = Scratch::default();
        for index in 0..self.layers.len() {
            self.attention(kernel, (index, cache), &angles, (&mut hidden, &mut scratch))?;
            self.feed_forward(kernel, &self.layers[index], &mut hidden, &mut scratch)?;
        }
        cache.commit(count, regime);
        Ok(hidden)
    }

    fn attention(
        &self,
        kernel: Kernel,
        (index, cache): (usize, &mut KvCache),
        angles: &(Vec<f32>, Vec<f32>),
        (hidden, scratch): (&mut Rows, &mut Scratch),
    ) -> candle_core::Result<()> {
        let (layer, s) = (&self.layers[index], scratch);
        s.normed
            .set_rms_norm(hidden, &layer.input_norm.to_vec1()?, self.eps);
        s.quantized.set(kernel, &s.normed);
        layer
            .qkv
            .forward_rows(&s.normed, &s.quantized, &mut s.wide)?;
        self.rotate(&mut s.wide, &angles.0, &angles.1);
        cache.append_half(index, &s.wide.values, s.wide.columns);
        self.attend_rows(kernel, &s.wide, (index, cache), &mut s.mixed);
        s.quantized.set(kernel, &s.mixed);
        layer
            .output
            .forward_rows(&s.mixed, &s.quantized, &mut s.out)?;
        hidden.add(&s.out);
        Ok(())
    }

    fn feed_forward(
        &self,
        kernel: Kernel,
        layer: &Layer,
        hidden: &mut Rows,
        s: &mut Scratch,
    ) -> candle_core::Result<()> {
        s.normed
            .set_rms_norm(hidden, &layer.post_norm.to_vec1()?, self.eps);
        s.quantized.set(kernel, &s.normed);
        layer
            .gate_up
            .forward_rows(&s.normed, &s.quantized, &mut s.wide)?;
        s.mixed.set_swiglu(&s.wide, kernel);
        s.quantized.set(kernel, &s.mixed);
        layer
            .down
            .forward_rows(&s.mixed, &s.quantized, &mut s.out)?;
        hidden.add(&s.out);
        Ok(())
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

    fn attend_rows(
        &self,
        kernel: Kernel,
        qkv: &Rows,
        (layer, cache): (usize, &KvCache),
        out: &mut Rows,
    ) {
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
        out.reshape(qkv.count(), shape.heads * shape.head_dim);
        attend(kernel, shape, &input, &mut out.values);
    }
}
