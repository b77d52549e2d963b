//! LongRoPE: rotary angles in two regimes.

use candle_core::{DType, Device, Tensor};

use crate::config::ModelConfig;

/// Which factors a whole sequence is rotated with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Regime {
    /// The whole sequence fits `original_positions_max`.
    Short,
    /// It does not.
    Long,
}

/// Inverse frequencies of both regimes.
///
/// `inv_freq[i] = 1 / (factor[i] * theta^(2i / head_dim))`, in f32. Cosines and sines are scaled by
/// `sqrt(1 + ln(max / original) / ln(original))` in *both* regimes, 1.19 for Phi-3.5 (131072 / 4096). The regime is one
/// choice for all positions of a sequence, by its total length; crossing over invalidates every cached key.
/// Source: HF Phi-3.5 `modeling_phi3_v.py`, `Phi3SuScaledRotaryEmbedding` (eager path).
pub(crate) struct Rope {
    short: Vec<f32>,
    long: Vec<f32>,
    magnitude: f32,
    original_positions_max: usize,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let inverse = |factors: &[f32]| -> Vec<f32> {
            let exponents =
                (0..config.head_dim / 2).map(|i| (2 * i) as f32 / config.head_dim as f32);
            factors
                .iter()
                .zip(exponents)
                .map(|(factor, exponent)| {
                    1.0 / (factor * config.rope.theta.powf(f64::from(exponent)) as f32)
                })
                .collect()
        };
        Self {
            short: inverse(&config.rope.short_factor),
            long: inverse(&config.rope.long_factor),
            magnitude: config.rope.magnitude as f32,
            original_positions_max: config.original_positions_max,
        }
    }

    /// The regime of a sequence of that many positions, cached and new together: 4096 is short, 4097 long.
    pub(crate) fn regime(&self, positions: usize) -> Regime {
        if positions > self.original_positions_max {
            Regime::Long
        } else {
            Regime::Short
        }
    }

    /// Cosines and sines of `count` positions from `start`, each (count, head_dim / 2). Angles are f32 whatever the
    /// compute type: bf16 angles break long contexts.
    pub(crate) fn tables(
        &self,
        regime: Regime,
        start: usize,
        count: usize,
        (device, dtype): (&Device, DType),
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let (cosines, sines) = self.angles(regime, start, count);
        let place = |values| {
            Tensor::from_vec(values, (count, self.short.len()), &Device::Cpu)?
                .to_dtype(dtype)?
                .to_device(device)
        };
        Ok((place(cosines)?, place(sines)?))
    }

    /// The same as plain f32, one position after the other.
    pub(crate) fn angles(
        &self,
        regime: Regime,
        start: usize,
        count: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let inv_freq = match regime {
            Regime::Short => &self.short,
            Regime::Long => &self.long,
        };
        let mut cosines = Vec::with_capacity(count * inv_freq.len());
        let mut sines = Vec::with_capacity(count * inv_freq.len());
        for position in start..start + count {
            for frequency in inv_freq {
                let (sine, cosine) = (position as f32 * frequency).sin_cos();
                cosines.push(cosine * self.magnitude);
                sines.push(sine * self.magnitude);
            }
        }
        (cosines, sines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> ModelConfig {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/real/config.reconstructed.json"
        );
        ModelConfig::parse(&std::fs::read(path).unwrap(), "config.reconstructed.json").unwrap()
    }

    #[test]
    fn the_regime_changes_one_past_the_original_positions() {
        let rope = Rope::new(&published());
        assert_eq!(rope.regime(4096), Regime::Short);
        assert_eq!(rope.regime(4097), Regime::Long);
    }

    #[test]
    fn factors_divide_and_the_magnitude_multiplies_in_both_regimes() {
        let config = published();
        let rope = Rope::new(&config);
        for (regime, factors) in [
            (Regime::Short, &config.rope.short_factor),
            (Regime::Long, &config.rope.long_factor),
        ] {
            let (cosines, sines) = rope
                .tables(regime, 5, 1, (&Device::Cpu, DType::F32))
                .unwrap();
            let (cosines, sines) = (
                cosines.to_vec2::<f32>().unwrap(),
                sines.to_vec2::<f32>().unwrap(),
            );
            for i in 0..48 {
                let angle = 5.0 / (f64::from(factors[i]) * 10000f64.powf(2.0 * i as f64 / 96.0));
                let a = (1.0 + 32f64.ln() / 4096f64.ln()).sqrt();
                assert!(
                    (f64::from(cosines[0][i]) - a * angle.cos()).abs() < 1e-6,
                    "{regime:?} {i}"
                );
                assert!(
                    (f64::from(sines[0][i]) - a * angle.sin()).abs() < 1e-6,
                    "{regime:?} {i}"
                );
            }
        }
    }
}
