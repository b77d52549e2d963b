//! Linear layers on plain rows with activations of eight bits: which form of its input a layer takes, and two layers as one.

use visor_kernels::{Activation, AffineRows, Kernel, QuantizedRows};

use super::{Linear, LinearWeight};
use crate::rows::Rows;

/// The eight-bit forms of rows that the layers take which they are for.
#[derive(Default)]
pub(crate) struct Quantized {
    /// In front, those that hold these rows; behind them memory to use again.
    forms: Vec<QuantizedRows>,
    count: usize,
}

impl Quantized {
    /// What each of the layers takes: one form, more where their weights have different bits, none where these are floats.
    pub(crate) fn set(&mut self, rows: &Rows, layers: &[&Linear]) {
        self.count = 0;
        for layer in layers {
            let Some((weights, kernel)) = layer.integer() else {
                continue;
            };
            if self.of(&weights).is_none() {
                self.next().fill(
                    kernel,
                    &rows.values,
                    rows.columns,
                    weights.activation_steps(),
                );
            }
        }
    }

    /// Memory for one more form.
    fn next(&mut self) -> &mut QuantizedRows {
        if self.count == self.forms.len() {
            self.forms.push(QuantizedRows::default());
        }
        self.count += 1;
        &mut self.forms[self.count - 1]
    }

    /// The form that these weights take.
    fn of(&self, weights: &AffineRows<'_>) -> Option<&QuantizedRows> {
        let mut forms = self.forms[..self.count].iter();
        forms.find(|form| form.steps() == weights.activation_steps())
    }
}

impl Linear {
    /// As [`Linear::forward`] on plain rows: INT4 and INT8 by the integer kernel with their eight-bit form, anything else with them.
    pub(crate) fn forward_rows(
        &self,
        x: &Rows,
        quantized: &Quantized,
        out: &mut Rows,
    ) -> candle_core::Result<()> {
        match (self.integer(), &self.weight) {
            (Some((weights, kernel)), _) => {
                let quantized = quantized.of(&weights).expect("set for this layer");
                assert_eq!(x.count(), quantized.rows(), "two forms of one thing");
                self.forward_quantized((weights, kernel), quantized, out)?;
            }
            (_, LinearWeight::Stored(matrix, _)) => {
                *out = Rows::of(&matrix.multiply(&x.to_tensor()?)?)?;
                if let Some(bias) = self.bias()? {
                    out.add_to_each(&bias);
                }
            }
            _ => *out = Rows::of(&self.forward(&x.to_tensor()?)?)?,
        }
        Ok(())
    }

    fn forward_quantized(
        &self,
        (weights, kernel): (AffineRows<'_>, Kernel),
        x: &QuantizedRows,
        out: &mut Rows,
    ) -> candle_core::Result<()> {
        let bias = self.bias()?;
        out.reshape(x.rows(), weights.rows());
        visor_kernels::multiply(kernel, &weights, x, bias.as_deref(), &mut out.values);
        Ok(())
    }
}

/// What lies between the two layers of a feed-forward: memory that is used again.
#[derive(Default)]
pub(crate) struct Between {
    wide: Rows,
    activated: Rows,
    forms: Quantized,
    /// What the kernel makes of both.
    quantized: QuantizedRows,
}

/// Two layers and the activation between them, on plain rows. Where both are the kernel's, what is between them becomes eight bits as
/// soon as it is made.
pub(crate) fn feed_forward(
    (first, activation, second): (&Linear, Activation, &Linear),
    (kernel, x, quantized): (Kernel, &Rows, &Quantized),
    s: &mut Between,
    out: &mut Rows,
) -> candle_core::Result<()> {
    match (first.integer(), second.integer()) {
        (Some((weights, kernel)), Some(next)) => {
            let bias = first.bias()?;
            let x = quantized.of(&weights).expect("set for this layer");
            let activation = (activation, next.0.activation_steps());
            let weights = (&weights, bias.as_deref());
            let between = &mut s.quantized;
            visor_kernels::multiply_activated(kernel, weights, x, activation, between);
            second.forward_quantized(next, between, out)
        }
        _ => {
            first.forward_rows(x, quantized, &mut s.wide)?;
            s.activated.set_activated(&s.wide, activation, kernel);
            s.forms.set(&s.activated, &[second]);
            second.forward_rows(&s.activated, &s.forms, out)
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;
    use crate::linear::WeightMatrix;
    use crate::linear::tests::embedded;
    use crate::weights::Weights;

    /// Matrices `four`, `eight` and `floats`, 64 x 64.
    fn of_each_kind() -> Weights {
        const SIDE: usize = 64;
        let codes = |bytes: usize| (0..bytes).map(|index| (index * 37 % 251) as u8).collect();
        let halves = |value: f32| half::f16::from_f32(value).to_le_bytes().repeat(SIDE);
        let floats = (0..SIDE * SIDE).flat_map(|index| (index as f32 % 7.0 - 3.0).to_le_bytes());
        let matrix = |name, dtype, columns, bytes| (name, dtype, [SIDE, columns], bytes);
        embedded(&[
            matrix("four.weight", Dtype::U32, SIDE / 8, codes(SIDE * SIDE / 2)),
            matrix("four.scales", Dtype::F16, 1, halves(0.01)),
            matrix("four.biases", Dtype::F16, 1, halves(-0.08)),
            matrix("eight.weight", Dtype::U32, SIDE / 4, codes(SIDE * SIDE)),
            matrix("eight.scales", Dtype::F16, 1, halves(0.001)),
            matrix("eight.biases", Dtype::F16, 1, halves(-0.1)),
            matrix("floats.weight", Dtype::F32, SIDE, floats.collect()),
        ])
    }

    /// Layers that share an input may be stored in different ways: each takes the form it needs, also where it was made before for others.
    #[test]
    fn layers_of_any_kind_take_the_same_rows() {
        let weights = of_each_kind();
        let kernel = Kernel::detect().unwrap_or(Kernel::Scalar);
        let layer = |name: &str| {
            let matrix = WeightMatrix::find(&weights, &format!("{name}.weight"), 64, 64).unwrap();
            let weight = LinearWeight::Stored(Box::new(matrix), Some(kernel));
            Linear { weight, bias: None }
        };
        let (four, eight, floats) = (layer("four"), layer("eight"), layer("floats"));
        let mut quantized = Quantized::default();
        let (mut out, mut between) = (Rows::default(), Between::default());
        for (seed, layers) in [
            (1, &[&four, &eight, &floats][..]),
            (2, &[&eight]),
            (3, &[&floats]),
            (4, &[&floats, &eight, &four]),
        ] {
            let values = (0..9 * 64).map(|index| (index * seed % 23) as f32 - 11.0);
            let x = Rows {
                values: values.collect(),
                columns: 64,
            };
            quantized.set(&x, layers);
            for first in layers {
                first.forward_rows(&x, &quantized, &mut out).unwrap();
                let alone = first.forward(&x.to_tensor().unwrap()).unwrap();
                assert_eq!(out, Rows::of(&alone).unwrap(), "{seed}");
                for second in [&four, &eight, &floats] {
                    let mut wide = Rows::default();
                    wide.set_activated(&Rows::of(&alone).unwrap(), Activation::QuickGelu, kernel);
                    let want = second.forward(&wide.to_tensor().unwrap()).unwrap();
                    let layers = (*first, Activation::QuickGelu, second);
                    feed_forward(layers, (kernel, &x, &quantized), &mut between, &mut out).unwrap();
                    assert_eq!(out, Rows::of(&want).unwrap(), "{seed}");
                }
            }
        }
    }
}
