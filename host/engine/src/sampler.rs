//! Logits to a token.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Kind};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};

use crate::request::Sampling;

/// Below this, dividing by the temperature would only overflow: it is 0.
const TEMPERATURE_MIN: f64 = 1e-6;

/// Logits that no token can be drawn from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SamplerError {
    #[error("the model gave no logits")]
    Empty,
    #[error("logit {index} is {value}")]
    NotFinite { index: usize, value: f32 },
    #[error("cannot draw from the logits")]
    Draw(#[source] candle_core::Error),
}

/// Draws the tokens of one sequence.
pub(crate) struct Sampler {
    /// `None` takes the likeliest.
    drawing: Option<LogitsProcessor>,
}

impl Sampler {
    pub(crate) fn new(sampling: &Sampling) -> Self {
        let temperature = sampling.temperature;
        if temperature < TEMPERATURE_MIN {
            return Self { drawing: None };
        }
        let (k, p) = (sampling.top_k as usize, sampling.top_p);
        let kind = match (k > 0, p < 1.0) {
            (false, false) => Kind::All { temperature },
            (false, true) => Kind::TopP { p, temperature },
            (true, false) => Kind::TopK { k, temperature },
            (true, true) => Kind::TopKThenTopP { k, p, temperature },
        };
        let seed = sampling.seed.unwrap_or_else(random_seed);
        Self {
            drawing: Some(LogitsProcessor::from_sampling(seed, kind)),
        }
    }

    /// The next token from (vocab_size) logits. A refusal draws nothing: the seed's sequence goes
    /// on where it was.
    pub(crate) fn sample(&mut self, logits: Vec<f32>) -> Result<u32, SamplerError> {
        check(&logits)?;
        match &mut self.drawing {
            None => Ok(likeliest(&logits)),
            Some(drawing) => {
                let count = logits.len();
                let logits = Tensor::from_vec(logits, count, &Device::Cpu);
                let drawn = logits.and_then(|logits| drawing.sample(&logits));
                drawn.map_err(SamplerError::Draw)
            }
        }
    }
}

/// That a token can be drawn: at least one logit, all of them finite.
pub(crate) fn check(logits: &[f32]) -> Result<(), SamplerError> {
    if logits.is_empty() {
        return Err(SamplerError::Empty);
    }
    match logits.iter().position(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(index) => Err(SamplerError::NotFinite {
            index,
            value: logits[index],
        }),
    }
}

/// The largest logit, the lowest id of equals. Not candle's argmax, which promises no order.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    // A vocabulary is counted in u32.
    best as u32
}

/// The standard library's per-process randomness, hashed; a seed needs to differ, not to be secret.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(sampling: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(&sampling);
        let next = || sampler.sample(logits.to_vec()).unwrap();
        std::iter::repeat_with(next).take(count).collect()
    }

    fn warm(seed: u64) -> Sampling {
        Sampling {
            temperature: 1.0,
            seed: Some(seed),
            ..Sampling::default()
        }
    }

    #[test]
    fn temperature_zero_takes_the_lowest_id_of_equals() {
        let logits = [0.5, 2.0, 2.0, -1.0];
        assert_eq!(draw(Sampling::default(), &logits, 3), [1, 1, 1]);
        let tiny = Sampling {
            temperature: 1e-30,
            ..warm(1)
        };
        assert_eq!(draw(tiny, &logits, 3), [1, 1, 1]);
    }

    #[test]
    fn equal_seeds_draw_equal_tokens() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 / 3.0).collect();
        for sampling in [
            warm(7),
            Sampling {
                top_p: 0.9,
                ..warm(7)
            },
            Sampling {
                top_k: 20,
                ..warm(7)
            },
            Sampling {
                top_k: 20,
                top_p: 0.5,
                ..warm(7)
            },
        ] {
            let first = draw(sampling, &logits, 64);
            assert_eq!(first, draw(sampling, &logits, 64), "{sampling:?}");
            let seed = Some(8);
            let other = Sampling { seed, ..sampling };
            assert_ne!(first, draw(other, &logits, 64), "{sampling:?}");
        }
    }

    #[test]
    fn a_missing_seed_draws_one() {
        let logits = vec![0.0; 1000];
        let unseeded = Sampling {
            seed: None,
            ..warm(0)
        };
        assert_ne!(draw(unseeded, &logits, 16), draw(unseeded, &logits, 16));
    }

    #[test]
    fn top_k_and_top_p_leave_out_the_unlikely() {
        // Probabilities 0.64, 0.24, 0.09, 0.03.
        let logits = [3.0, 2.0, 1.0, 0.0];
        let largest = |sampling| draw(sampling, &logits, 500).into_iter().max().unwrap();
        assert_eq!(largest(warm(1)), 3);
        assert_eq!(
            largest(Sampling {
                top_k: 1,
                ..warm(1)
            }),
            0
        );
        assert_eq!(
            largest(Sampling {
                top_k: 3,
                ..warm(1)
            }),
            2
        );
        assert_eq!(
            largest(Sampling {
                top_p: 0.7,
                ..warm(1)
            }),
            1
        );
        assert_eq!(
            largest(Sampling {
                top_k: 3,
                top_p: 0.5,
                ..warm(1)
            }),
            0
        );
        assert_eq!(
            largest(Sampling {
                top_k: 9000,
                ..warm(1)
            }),
            3
        );
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, (3.0_f32).ln()];
        let ones = draw(warm(3), &logits, 4000).iter().sum::<u32>();
        assert!((2850..3150).contains(&ones), "{ones} of 4000 at 0.75");
    }

    #[test]
    fn unusable_logits_are_errors() {
        for sampling in [Sampling::default(), warm(1)] {
            let mut sampler = Sampler::new(&sampling);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let error = sampler.sample(vec![0.0, bad]).unwrap_err();
                assert!(error.to_string().contains("logit 1"), "{error}");
            }
            assert!(sampler.sample(Vec::new()).is_err());
        }
    }
}
