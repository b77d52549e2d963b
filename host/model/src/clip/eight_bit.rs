//! The tower on the CPU with activations of eight bits: plain rows between integer products, attention in f32 or whole numbers.
//! The float path above says what this computes.

use visor_kernels::{
    Activation, AttentionInput, AttentionShape, HeadRows, Kernel, Way, attend, on_pool,
};

use super::{HalfDone, Layer, LayerNorm, PATCHES, Tower};
use crate::config::LAYER_NORM_EPS;
use crate::error::ModelError;
use crate::linear::{Between, Quantized, feed_forward};
use crate::rows::Rows;

/// Memory that every layer uses again.
#[derive(Default)]
pub(super) struct Scratch {
    normed: Rows,
    quantized: Quantized,
    query: Rows,
    key: Rows,
    value: Rows,
    between: Between,
    out: Rows,
}

impl LayerNorm {
    fn set(&self, out: &mut Rows, x: &Rows) -> candle_core::Result<()> {
        let (weight, bias) = (self.weight.to_vec1()?, self.bias.to_vec1()?);
        out.set_layer_norm(x, [&weight, &bias], LAYER_NORM_EPS);
        Ok(())
    }
}

impl Tower {
    /// As `run`, on threads of the pool.
    pub(super) fn run_rows(
        &self,
        kernel: Kernel,
        (half, scratch): (&mut HalfDone, &mut Scratch),
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), ModelError> {
        let mut hidden = Rows::of(&half.hidden)?;
        on_pool(|| {
            for layer in &self.layers[half.layers..] {
                self.run_layer_rows(kernel, layer, &mut hidden, scratch)?;
                half.layers += 1;
                if half.layers < self.layers.len() && !keep_going() {
                    break;
                }
            }
            half.hidden = hidden.to_tensor()?;
            Ok(())
        })
    }

    fn run_layer_rows(
        &self,
        kernel: Kernel,
        layer: &Layer,
        hidden: &mut Rows,
        s: &mut Scratch,
    ) -> candle_core::Result<()> {
        layer.norm1.set(&mut s.normed, hidden)?;
        let layers = [&layer.query, &layer.key, &layer.value];
        s.quantized.set(&s.normed, &layers);
        let (x, quantized) = (&s.normed, &s.quantized);
        layer.query.forward_rows(x, quantized, &mut s.query)?;
        layer.key.forward_rows(x, quantized, &mut s.key)?;
        layer.value.forward_rows(x, quantized, &mut s.value)?;
        self.attend_rows(kernel, [&s.query, &s.key, &s.value], &mut s.normed);
        s.quantized.set(&s.normed, &[&layer.output]);
        layer
            .output
            .forward_rows(&s.normed, &s.quantized, &mut s.out)?;
        hidden.add(&s.out);
        layer.norm2.set(&mut s.normed, hidden)?;
        s.quantized.set(&s.normed, &[&layer.fc1]);
        let layers = (&layer.fc1, Activation::QuickGelu, &layer.fc2);
        let x = (kernel, &s.normed, &s.quantized);
        feed_forward(layers, x, &mut s.between, &mut s.out)?;
        hidden.add(&s.out);
        Ok(())
    }

    /// Full attention within each crop.
    fn attend_rows(&self, kernel: Kernel, [query, key, value]: [&Rows; 3], out: &mut Rows) {
        let shape = AttentionShape {
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.width / self.heads,
            causal: false,
        };
        out.reshape(query.count(), self.width);
        let crop = (1 + PATCHES) * self.width;
        for (index, out) in out.values.chunks_exact_mut(crop).enumerate() {
            let span = index * crop..(index + 1) * crop;
            let input = AttentionInput {
                queries: &query.values[span.clone()],
                query_stride: self.width,
                rows: 1 + PATCHES,
                keys: 1 + PATCHES,
                way: Way::Rounded,
                key_values: &|head| {
                    [key, value].map(|rows| {
                        HeadRows::F32(
                            &rows.values[span.clone()][head * shape.head_dim..],
                            self.width,
                        )
                    })
                },
            };
            attend(kernel, shape, &input, out);
        }
    }
}
