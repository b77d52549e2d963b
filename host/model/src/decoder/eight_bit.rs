//! The decoder on the CPU with activations of eight bits: plain rows between integer products, keys and values as f16.
//! The float path above says what this computes.

use rayon::prelude::*;
use visor_kernels::{Activation, AttentionInput, Kernel, Way, attend};

use super::{Decoder, Layer, Run};
use crate::error::ModelError;
use crate::linear::{Between, Quantized, feed_forward};
use crate::rows::Rows;

/// Memory that every layer uses again.
#[derive(Default)]
struct Scratch {
    normed: Rows,
    quantized: Quantized,
    wide: Rows, // queries, keys and values
    mixed: Rows,
    between: Between,
    out: Rows,
}

impl Decoder {
    /// Runs the rows of `runs` together; hidden states before the last norm.
    pub(super) fn forward_rows(
        &self,
        kernel: Kernel,
        mut hidden: Rows,
        runs: &mut [Run<'_>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Rows, ModelError> {
        let mut angles = (Vec::new(), Vec::new());
        for run in &*runs {
            let (cosines, sines) = self.rope.angles(run.regime, run.cache.len(), run.count);
            angles.0.extend(cosines);
            angles.1.extend(sines);
        }
        let mut scratch = Scratch::default();
        for index in 0..self.layers.len() {
            if !keep_going() {
                return Err(ModelError::Cancelled);
            }
            self.attention(kernel, (index, runs), &angles, (&mut hidden, &mut scratch))?;
            self.feed_forward(kernel, &self.layers[index], &mut hidden, &mut scratch)?;
        }
        for run in runs {
            run.cache.commit(run.count, run.regime);
        }
        Ok(hidden)
    }

    fn attention(
        &self,
        kernel: Kernel,
        (index, runs): (usize, &mut [Run<'_>]),
        angles: &(Vec<f32>, Vec<f32>),
        (hidden, scratch): (&mut Rows, &mut Scratch),
    ) -> candle_core::Result<()> {
        let (layer, s) = (&self.layers[index], scratch);
        s.normed
            .set_rms_norm(hidden, &layer.input_norm.to_vec1()?, self.eps);
        s.quantized.set(&s.normed, &[&layer.qkv]);
        layer
            .qkv
            .forward_rows(&s.normed, &s.quantized, &mut s.wide)?;
        self.rotate(&mut s.wide, &angles.0, &angles.1);
        s.mixed
            .reshape(s.wide.count(), self.shape.heads * self.shape.head_dim);
        let mut first = 0;
        for run in runs {
            let rows = first..first + run.count;
            let qkv = &s.wide.values[rows.start * s.wide.columns..rows.end * s.wide.columns];
            run.cache.append(index, qkv, s.wide.columns);
            let mixed =
                &mut s.mixed.values[rows.start * s.mixed.columns..rows.end * s.mixed.columns];
            self.attend_run(kernel, (index, run), (qkv, s.wide.columns), mixed);
            first = rows.end;
        }
        s.quantized.set(&s.mixed, &[&layer.output]);
        layer
            .output
            .forward_rows(&s.mixed, &s.quantized, &mut s.out)?;
        hidden.add(&s.out);
        Ok(())
    }

    /// Positions of the prompt share tiles of keys. Those behind it are attended one by one, however many run: as they were when
    /// they were generated.
    fn attend_run(
        &self,
        kernel: Kernel,
        (layer, run): (usize, &Run<'_>),
        (qkv, columns): (&[f32], usize),
        out: &mut [f32],
    ) {
        let shape = visor_kernels::AttentionShape {
            heads: self.shape.heads,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            causal: true,
        };
        let pages = run.cache.pages();
        let width = shape.heads * shape.head_dim;
        let parts = [
            (0..run.prompt_rows, Way::Tiled),
            (run.prompt_rows..run.count, Way::Alone),
        ];
        for (rows, way) in parts.into_iter().filter(|(rows, _)| !rows.is_empty()) {
            let input = AttentionInput {
                queries: &qkv[rows.start * columns..rows.end * columns],
                query_stride: columns,
                rows: rows.len(),
                keys: run.cache.len() + rows.end,
                way,
                key_values: &|head| run.cache.head_rows(&pages, layer, head),
            };
            let out = &mut out[rows.start * width..rows.end * width];
            attend(kernel, shape, &input, out);
        }
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
        s.quantized.set(&s.normed, &[&layer.gate_up]);
        let layers = (&layer.gate_up, Activation::SwiGlu, &layer.down);
        let x = (kernel, &s.normed, &s.quantized);
        feed_forward(layers, x, &mut s.between, &mut s.out)?;
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
}
