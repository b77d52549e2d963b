//! How likely a token was to the model itself, among those that might come, and which others were.

use std::cmp::Ordering;

/// Natural logarithms of probabilities at temperature 1, before bias and penalties.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chances {
    /// Of the token that was drawn.
    pub(crate) logprob: f32,
    /// The likeliest tokens, the likeliest first, the lower id of equals first; only such as might come.
    pub(crate) alternatives: Vec<(u32, f32)>,
}

impl Chances {
    /// Of `token`, and of the `count` likeliest, from the model's (vocab_size) logits: finite, but for what may not be said.
    pub(crate) fn of(token: u32, logits: &[f32], count: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let exponentials = logits.iter().map(|logit| f64::from(logit - largest).exp());
        let log_sum = exponentials.sum::<f64>().ln() + f64::from(largest);
        #[expect(clippy::cast_possible_truncation, reason = "it is told as an f32")]
        let logprob = |id: u32| (f64::from(logits[id as usize]) - log_sum) as f32;
        let alternatives = likeliest(logits, count);
        Self {
            logprob: logprob(token),
            alternatives: alternatives
                .into_iter()
                .map(|id| (id, logprob(id)))
                .filter(|(_, logprob)| logprob.is_finite())
                .collect(),
        }
    }
}

fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    if count == 0 {
        return Vec::new();
    }
    let order = |a: &u32, b: &u32| -> Ordering {
        let by_logit = logits[*b as usize].total_cmp(&logits[*a as usize]);
        by_logit.then(a.cmp(b))
    };
    // A vocabulary is counted in u32.
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count < ids.len() {
        ids.select_nth_unstable_by(count, order);
        ids.truncate(count);
    }
    ids.sort_unstable_by(order);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances_are_those_of_the_softmax() {
        let logits: Vec<f32> = [0.5_f32, 0.125, 0.25, 0.125]
            .iter()
            .map(|share| share.ln() + 30.0)
            .collect();
        let chances = Chances::of(2, &logits, 3);
        let shares: Vec<(u32, f32)> = chances
            .alternatives
            .iter()
            .map(|(id, logprob)| (*id, (logprob.exp() * 1e4).round() / 1e4))
            .collect();
        assert_eq!(shares, [(0, 0.5), (2, 0.25), (1, 0.125)]);
        assert!((chances.logprob.exp() - 0.25).abs() < 1e-5);
    }

    #[test]
    fn what_may_not_be_said_is_no_alternative_and_has_no_share() {
        let chances = Chances::of(1, &[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0], 3);
        assert!((chances.logprob.exp() - 0.5).abs() < 1e-5);
        let ids: Vec<u32> = chances.alternatives.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [1, 3]);
    }

    #[test]
    fn more_alternatives_than_tokens_are_all_tokens() {
        let chances = Chances::of(0, &[-1e30, 1e30], 20);
        assert_eq!(chances.alternatives.len(), 2);
        assert_eq!(chances.alternatives[0], (1, 0.0));
        assert!(chances.logprob.is_finite());
        assert!(Chances::of(0, &[0.0, 1.0], 0).alternatives.is_empty());
    }
}
