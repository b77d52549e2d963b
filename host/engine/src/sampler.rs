//! Logits to a token: adjusted as the request asks (`adjust`), drawn, and with the model's own
//! probabilities where they are wanted (`chances`).

mod adjust;
mod chances;

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Kind};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};

pub(crate) use chances::Chances;

use crate::constraint::{Constraint, ConstraintError};
use crate::guard::constrained;
use crate::request::{GenerateRequest, Sampling};
use adjust::Adjust;

/// Below this, dividing by the temperature would only overflow: it is 0.
const TEMPERATURE_MIN: f64 = 1e-6;

/// Logits that no token can be drawn from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SamplerError {
    #[error("the model gave no logits")]
    Empty,
    #[error("logit {index} is {value}")]
    NotFinite { index: usize, value: f32 },
    /// The request's own doing, whatever the model said.
    #[error("the constraint leaves no token")]
    Constraint(#[source] ConstraintError),
    #[error("cannot draw from the logits")]
    Draw(#[source] candle_core::Error),
}

/// A token, and how likely it was if that is to be told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) token: u32,
    pub(crate) chances: Option<Chances>,
    /// The answer is complete with it: the constraint lets nothing follow.
    pub(crate) is_last: bool,
}

/// Draws the tokens of one sequence.
pub(crate) struct Sampler {
    adjust: Adjust,
    /// What may be said.
    constraint: Option<Box<dyn Constraint>>,
    /// `None` takes the likeliest.
    drawing: Option<Drawing>,
    /// Likeliest tokens to tell of beside each one drawn, if its chances are told at all.
    alternatives: Option<u8>,
}

impl Sampler {
    pub(crate) fn new(request: &GenerateRequest) -> Self {
        let sampling = &request.sampling;
        Self {
            adjust: Adjust::new(sampling, &request.prompt.ids),
            constraint: request.grammar.as_ref().map(|grammar| grammar.follow()),
            drawing: Drawing::new(sampling),
            alternatives: sampling.logprobs,
        }
    }

    /// The next token from (vocab_size) logits. A refusal draws nothing: the seed's sequence goes
    /// on where it was.
    pub(crate) fn sample(&mut self, mut logits: Vec<f32>) -> Result<Sampled, SamplerError> {
        check(&logits)?;
        self.constrain(&mut logits)?;
        let raw = self.alternatives.map(|count| (logits.clone(), count));
        self.adjust.apply(&mut logits);
        let token = match &mut self.drawing {
            None => likeliest(&logits),
            Some(drawing) => drawing.draw(logits)?,
        };
        self.adjust.note(token);
        let is_last = match &mut self.constraint {
            None => false,
            Some(constraint) => {
                constrained(|| constraint.accept(token)).map_err(SamplerError::Constraint)?
            }
        };
        let chances = raw.map(|(logits, count)| Chances::of(token, &logits, count.into()));
        Ok(Sampled {
            token,
            chances,
            is_last,
        })
    }

    /// Leaves the tokens that may be said. Probabilities are told of these alone, as vLLM does: what cannot be said has none.
    fn constrain(&mut self, logits: &mut [f32]) -> Result<(), SamplerError> {
        let Some(constraint) = &mut self.constraint else {
            return Ok(());
        };
        constrained(|| constraint.mask(logits)).map_err(SamplerError::Constraint)?;
        if logits.iter().any(|logit| logit.is_finite()) {
            return Ok(());
        }
        let nothing = ConstraintError("the model has no token that may come next".into());
        Err(SamplerError::Constraint(nothing))
    }
}

/// How a token is drawn that is not just the likeliest.
struct Drawing {
    processor: LogitsProcessor,
    /// How far below the largest a logit may be; `None` where that does not matter.
    reach: Option<f32>,
}

impl Drawing {
    fn new(sampling: &Sampling) -> Option<Self> {
        let temperature = sampling.temperature;
        if temperature < TEMPERATURE_MIN {
            return None;
        }
        let (k, p) = (sampling.top_k as usize, sampling.top_p);
        let kind = match (k > 0, p < 1.0) {
            (false, false) => Kind::All { temperature },
            (false, true) => Kind::TopP { p, temperature },
            (true, false) => Kind::TopK { k, temperature },
            (true, true) => Kind::TopKThenTopP { k, p, temperature },
        };
        let seed = sampling.seed.unwrap_or_else(random_seed);
        // p >= min_p * p_max after the temperature, said of logits.
        #[expect(clippy::cast_possible_truncation, reason = "logits are f32")]
        let reach = |min_p: f64| (-min_p.ln() * temperature) as f32;
        Some(Self {
            processor: LogitsProcessor::from_sampling(seed, kind),
            reach: (sampling.min_p > 0.0).then(|| reach(sampling.min_p)),
        })
    }

    fn draw(&mut self, mut logits: Vec<f32>) -> Result<u32, SamplerError> {
        if let Some(reach) = self.reach {
            let least = logits.iter().copied().fold(f32::MIN, f32::max) - reach;
            let unlikely = logits.iter_mut().filter(|logit| **logit < least);
            unlikely.for_each(|logit| *logit = f32::NEG_INFINITY);
        }
        let count = logits.len();
        let logits = Tensor::from_vec(logits, count, &Device::Cpu);
        let drawn = logits.and_then(|logits| self.processor.sample(&logits));
        drawn.map_err(SamplerError::Draw)
    }
}

/// That the model gave logits: at least one logit, all of them finite.
pub(crate) fn check(logits: &[f32]) -> Result<(), SamplerError> {
    if logits.is_empty() {
        return Err(SamplerError::Empty);
    }
    // Without a branch for each, many are looked at together.
    let is_finite = |lanes: &[f32]| {
        lanes
            .iter()
            .fold(true, |all, logit| all & logit.is_finite())
    };
    if logits.chunks(LANES).all(is_finite) {
        return Ok(());
    }
    let mut all = logits.iter().copied().enumerate();
    match all.find(|(_, logit)| !logit.is_finite()) {
        None => Ok(()),
        Some((index, value)) => Err(SamplerError::NotFinite { index, value }),
    }
}

/// Logits that are compared side by side.
const LANES: usize = 64;

/// The largest logit, the lowest id of equals. Not candle's argmax, which promises no order.
fn likeliest(logits: &[f32]) -> u32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for some in logits.chunks(LANES) {
        for (lane, logit) in lanes.iter_mut().zip(some) {
            *lane = if *logit > *lane { *logit } else { *lane };
        }
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let id = logits.iter().position(|logit| *logit == largest);
    // A vocabulary is counted in u32; there is none only where there are no numbers.
    id.unwrap_or(0) as u32
}

/// The standard library's per-process randomness, hashed; a seed needs to differ, not to be secret.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(sampling: &Sampling) -> Sampler {
        let prompt = visor_model::Prompt {
            ids: Vec::new(),
            image_tokens: 0,
        };
        let mut request = GenerateRequest::new(prompt, 1);
        request.sampling = sampling.clone();
        Sampler::new(&request)
    }

    fn draw(sampling: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = sampler(&sampling);
        let next = || sampler.sample(logits.to_vec()).unwrap().token;
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
    fn the_likeliest_is_found_wherever_it_is() {
        for count in [1, 63, 64, 65, 200, 1000] {
            for at in 0..count {
                let mut logits = vec![-1.5; count];
                logits[at] = -0.5;
                logits[count - 1] = -0.5;
                assert_eq!(likeliest(&logits) as usize, at, "of {count}");
                assert!(check(&logits).is_ok());
                logits[at] = f32::NAN;
                let error = check(&logits).unwrap_err().to_string();
                assert!(error.contains(&format!("logit {at} ")), "{error}");
            }
            let impossible = vec![f32::NEG_INFINITY; count];
            assert_eq!(likeliest(&impossible), 0);
        }
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
            let first = draw(sampling.clone(), &logits, 64);
            assert_eq!(first, draw(sampling.clone(), &logits, 64), "{sampling:?}");
            let seed = Some(8);
            let other = Sampling { seed, ..sampling };
            assert_ne!(first, draw(other.clone(), &logits, 64), "{other:?}");
        }
    }

    #[test]
    fn a_missing_seed_draws_one() {
        let logits = vec![0.0; 1000];
        let unseeded = Sampling {
            seed: None,
            ..warm(0)
        };
        let first = draw(unseeded.clone(), &logits, 16);
        assert_ne!(first, draw(unseeded, &logits, 16));
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
    fn min_p_leaves_out_what_is_unlikely_beside_the_likeliest() {
        // Shares of the likeliest: 1, 0.37, 0.14, 0.05; at temperature 2: 1, 0.61, 0.37, 0.22.
        let logits = [3.0, 2.0, 1.0, 0.0];
        let largest = |min_p, temperature| {
            let sampling = Sampling {
                min_p,
                temperature,
                ..warm(1)
            };
            draw(sampling, &logits, 500).into_iter().max().unwrap()
        };
        assert_eq!(largest(0.0, 1.0), 3);
        assert_eq!(largest(0.2, 1.0), 1);
        assert_eq!(largest(0.3, 2.0), 2);
        assert_eq!(largest(1.0, 1.0), 0);
    }

    #[test]
    fn penalties_follow_the_answer_and_chances_are_the_models_own() {
        let sampling = Sampling {
            frequency_penalty: 1.5,
            logprobs: Some(1),
            ..Sampling::default()
        };
        let mut sampler = sampler(&sampling);
        let logits = vec![1.0, 0.0];
        let drawn: Vec<Sampled> = (0..3)
            .map(|_| sampler.sample(logits.clone()).unwrap())
            .collect();
        let tokens: Vec<u32> = drawn.iter().map(|sampled| sampled.token).collect();
        assert_eq!(tokens, [0, 1, 0]);
        let logprob = |sampled: &Sampled| sampled.chances.clone().unwrap().logprob;
        assert!((logprob(&drawn[0]).exp() - 0.731).abs() < 1e-3);
        assert!((logprob(&drawn[1]).exp() - 0.269).abs() < 1e-3);
        for sampled in &drawn {
            assert_eq!(sampled.chances.clone().unwrap().alternatives[0].0, 0);
        }
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
            let mut sampler = sampler(&sampling);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let error = sampler.sample(vec![0.0, bad]).unwrap_err();
                assert!(error.to_string().contains("logit 1"), "{error}");
            }
            assert!(sampler.sample(Vec::new()).is_err());
        }
    }
}
