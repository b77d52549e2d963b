//! What a request asks to be done to logits before a token is drawn: a bias, and penalties on
//! tokens that were seen.

use std::collections::{HashMap, HashSet};

use crate::request::Sampling;

/// The bias and the penalties of one sequence, and the tokens it has seen.
pub(crate) struct Adjust {
    bias: Vec<(u32, f32)>,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    /// Tokens of the prompt; empty where nothing depends on them.
    prompt: HashSet<u32>,
    /// How often each token was generated; empty where nothing depends on it.
    generated: HashMap<u32, u32>,
}

impl Adjust {
    /// `prompt_ids` as the engine has them: slots of pictures are negative and no tokens.
    pub(crate) fn new(sampling: &Sampling, prompt_ids: &[i64]) -> Self {
        let repeats = sampling.repetition_penalty != 1.0;
        let prompt = prompt_ids.iter().filter(|_| repeats);
        Self {
            bias: sampling.logit_bias.clone(),
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            prompt: prompt.filter_map(|id| u32::try_from(*id).ok()).collect(),
            generated: HashMap::new(),
        }
    }

    /// Notes a token that was generated.
    pub(crate) fn note(&mut self, token: u32) {
        let penalizes = self.presence_penalty != 0.0 || self.frequency_penalty != 0.0;
        if penalizes || self.repetition_penalty != 1.0 {
            *self.generated.entry(token).or_default() += 1;
        }
    }

    /// Changes the (vocab_size) logits: the bias first, then the penalties, as vLLM orders them.
    /// Finite ones stay finite, and what cannot be said stays so.
    pub(crate) fn apply(&self, logits: &mut [f32]) {
        for (token, bias) in &self.bias {
            change(logits, *token, |logit| logit + bias);
        }
        self.penalize_repetition(logits);
        for (token, count) in &self.generated {
            let penalty = self.frequency_penalty * *count as f32 + self.presence_penalty;
            change(logits, *token, |logit| logit - penalty);
        }
    }

    /// Once per token of the prompt and the answer, towards unlikely whichever sign a logit has.
    /// Source: transformers `RepetitionPenaltyLogitsProcessor`.
    fn penalize_repetition(&self, logits: &mut [f32]) {
        let penalty = self.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let new = |token: &&u32| !self.prompt.contains(token);
        let generated = self.generated.keys().filter(new);
        for token in self.prompt.iter().chain(generated) {
            change(logits, *token, |logit| {
                if logit < 0.0 {
                    logit * penalty
                } else {
                    logit / penalty
                }
            });
        }
    }
}

/// A token the model has no logit for, or may not say, changes nothing.
fn change(logits: &mut [f32], token: u32, new: impl Fn(f32) -> f32) {
    let logit = logits.get_mut(token as usize);
    if let Some(logit) = logit.filter(|logit| logit.is_finite()) {
        *logit = new(*logit).clamp(f32::MIN, f32::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adjusted(sampling: &Sampling, prompt: &[i64], generated: &[u32]) -> Vec<f32> {
        let mut adjust = Adjust::new(sampling, prompt);
        generated.iter().for_each(|token| adjust.note(*token));
        let mut logits = vec![2.0, -2.0, 0.0, 4.0];
        adjust.apply(&mut logits);
        logits
    }

    #[test]
    fn nothing_asked_changes_nothing() {
        let same = adjusted(&Sampling::default(), &[0, 1], &[2, 3, 3]);
        assert_eq!(same, [2.0, -2.0, 0.0, 4.0]);
    }

    #[test]
    fn repetition_is_penalized_once_in_prompt_and_answer_and_pictures_are_no_tokens() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::default()
        };
        let logits = adjusted(&sampling, &[0, 0, -1, -2], &[1, 0, 1]);
        assert_eq!(logits, [1.0, -4.0, 0.0, 4.0]);
    }

    #[test]
    fn presence_counts_once_and_frequency_each_time_in_the_answer_alone() {
        let sampling = Sampling {
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..Sampling::default()
        };
        let logits = adjusted(&sampling, &[0, 1], &[3, 2, 3]);
        assert_eq!(logits, [2.0, -2.0, -0.75, 3.0]);
    }

    #[test]
    fn a_bias_is_added_before_penalties_and_unknown_tokens_are_nothing() {
        let sampling = Sampling {
            logit_bias: vec![(1, 6.0), (99, 100.0)],
            repetition_penalty: 2.0,
            ..Sampling::default()
        };
        assert_eq!(adjusted(&sampling, &[1], &[]), [2.0, 2.0, 0.0, 4.0]);
    }

    #[test]
    fn no_bias_brings_back_what_may_not_be_said() {
        let sampling = Sampling {
            logit_bias: vec![(0, 100.0)],
            repetition_penalty: 0.5,
            ..Sampling::default()
        };
        let mut logits = vec![f32::NEG_INFINITY, 1.0];
        Adjust::new(&sampling, &[0, 1]).apply(&mut logits);
        assert_eq!(logits, [f32::NEG_INFINITY, 2.0]);
    }

    #[test]
    fn logits_stay_finite() {
        let sampling = Sampling {
            repetition_penalty: 1e-30,
            ..Sampling::default()
        };
        let mut logits = vec![1e30, -1e30];
        Adjust::new(&sampling, &[0, 1]).apply(&mut logits);
        assert!(logits.iter().all(|logit| logit.is_finite()), "{logits:?}");
    }
}
