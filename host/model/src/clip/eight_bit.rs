//! The tower on the CPU with activations of eight bits: plain rows between integer products, attention in f32.
//! The float path above says what this computes.

use candle_core::Tensor;
use visor_kernels::{AttentionInput, AttentionShape, HeadRows, Kernel, attend};

use super::{LayerNorm, PATCHES, Tower};
use crate::config::LAYER_NORM_EPS;
use crate::linear::Quantized;
use crate::rows::Rows;

impl LayerNorm {
    fn rows(&self, x: &Rows) -> candle_core::Result<Rows> {
        Ok(x.layer_norm(
            &self.weight.to_vec1()?,
            &self.bias.to_vec1()?,
            LAYER_NORM_EPS,
        ))
    }
}

impl Tower {
    /// As `run_layer`: (crops * 577, width) in and out.
    pub(super) fn run_layer_rows(
        &self,
        kernel: Kernel,
        layer: &super::Layer,
        hidden: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let mut hidden = Rows::of(hidden)?;
        let normed = layer.norm1.rows(&hidden)?;
        let quantized = Quantized::new(kernel, &normed);
        let [query, key, value] = [&layer.query, &layer.key, &layer.value]
            .map(|linear| linear.forward_rows(&normed, &quantized));
        let mixed = self.attend_rows(kernel, [&query?, &key?, &value?]);
        hidden.add(
            &layer
                .output
                .forward_rows(&mixed, &Quantized::new(kernel, &mixed))?,
        );
        let normed = layer.norm2.rows(&hidden)?;
        let mut inner = layer
            .fc1
            .forward_rows(&normed, &Quantized::new(kernel, &normed))?;
        inner.quick_gelu(kernel);
        hidden.add(
            &layer
                .fc2
                .forward_rows(&inner, &Quantized::new(kernel, &inner))?,
        );
        hidden.to_tensor()
    }

    /// Full attention within each crop.
    fn attend_rows(&self, kernel: Kernel, [query, key, value]: [&Rows; 3]) -> Rows {
        let shape = AttentionShape {
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.width / self.heads,
            causal: false,
        };
        let mut out = Rows::zeros(query.count(), self.width);
        let crop = (1 + PATCHES) * self.width;
        for (index, out) in out.values.chunks_exact_mut(crop).enumerate() {
            let span = index * crop..(index + 1) * crop;
            let input = AttentionInput {
                queries: &query.values[span.clone()],
                query_stride: self.width,
                rows: 1 + PATCHES,
                keys: 1 + PATCHES,
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
        out
    }
}
