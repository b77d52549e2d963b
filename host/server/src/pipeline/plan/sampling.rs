//! How tokens are to be drawn, against what the sampler takes.

use std::ops::RangeInclusive;

use visor_engine::Sampling;
use visor_sandbox::Sampling as Wishes;

use crate::config::GenerationConfig;
use crate::pipeline::failure::Failure;
use crate::services::ServedModel;

/// Highest temperature; beyond, every token is as likely as any other.
const TEMPERATURE_MAX: f32 = 2.0;
/// Penalties subtracted from logits, as OpenAI bounds them.
const PENALTIES: RangeInclusive<f32> = -2.0..=2.0;
/// Penalties that divide logits; beyond, nothing of the model is left.
const REPETITION_PENALTIES: RangeInclusive<f32> = 0.01..=100.0;
/// Biases, as OpenAI bounds them: either end is as good as a ban or a must.
const BIASES: RangeInclusive<f32> = -100.0..=100.0;
/// Most tokens of one bias.
const BIAS_TOKENS_MAX: usize = 1024;
/// Most alternatives told per token, as OpenAI bounds them.
const TOP_LOGPROBS_MAX: u8 = 20;

/// Wishes as the engine takes them: temperature and top_p clamped, everything else in its range.
///
/// # Errors
/// What is out of range, by the name clients know it by.
pub(super) fn check(
    wishes: &Wishes,
    defaults: &GenerationConfig,
    model: &ServedModel,
) -> Result<Sampling, Failure> {
    let temperature = wishes.temperature.unwrap_or(defaults.temperature);
    let top_p = wishes.top_p.unwrap_or(defaults.top_p);
    check_bias(&wishes.logit_bias, model.tokenizer.vocab_size())?;
    if let Some(count) = wishes.logprobs.filter(|count| *count > TOP_LOGPROBS_MAX) {
        let message =
            format!("{count} alternatives per token were asked for; {TOP_LOGPROBS_MAX} are told");
        return Err(Failure::invalid(message).at("top_logprobs"));
    }
    Ok(Sampling {
        temperature: temperature.clamp(0.0, TEMPERATURE_MAX).into(),
        top_p: top_p.clamp(f32::MIN_POSITIVE, 1.0).into(),
        top_k: wishes.top_k.unwrap_or(defaults.top_k),
        min_p: within("min_p", wishes.min_p, 0.0, 0.0..=1.0)?.into(),
        repetition_penalty: within(
            "repetition_penalty",
            wishes.repetition_penalty,
            1.0,
            REPETITION_PENALTIES,
        )?,
        presence_penalty: within("presence_penalty", wishes.presence_penalty, 0.0, PENALTIES)?,
        frequency_penalty: within(
            "frequency_penalty",
            wishes.frequency_penalty,
            0.0,
            PENALTIES,
        )?,
        logit_bias: wishes.logit_bias.clone(),
        seed: wishes.seed,
        logprobs: wishes.logprobs,
    })
}

/// A wish in its range, or what changes nothing.
fn within(
    param: &str,
    wish: Option<f32>,
    neutral: f32,
    range: RangeInclusive<f32>,
) -> Result<f32, Failure> {
    let value = wish.unwrap_or(neutral);
    if range.contains(&value) {
        return Ok(value);
    }
    let (low, high) = range.into_inner();
    let message = format!("{param} is {value}; {low} to {high} are possible");
    Err(Failure::invalid(message).at(param))
}

fn check_bias(biases: &[(u32, f32)], vocab_size: u32) -> Result<(), Failure> {
    let invalid = |message: String| Err(Failure::invalid(message).at("logit_bias"));
    if biases.len() > BIAS_TOKENS_MAX {
        return invalid(format!(
            "{} tokens are biased; {BIAS_TOKENS_MAX} are allowed",
            biases.len()
        ));
    }
    for (token, bias) in biases {
        if *token >= vocab_size {
            return invalid(format!(
                "there is no token {token}; the model has {vocab_size}"
            ));
        }
        if !BIASES.contains(bias) {
            let (low, high) = BIASES.into_inner();
            return invalid(format!(
                "the bias of token {token} is {bias}; {low} to {high} are possible"
            ));
        }
    }
    Ok(())
}

/// The seed of one of several alternatives: the first has the client's, so that it is the answer
/// to the same request for one; the others' follow from it (the mixing of SplitMix64).
pub(in crate::pipeline) fn seed_of(seed: Option<u64>, choice: u32) -> Option<u64> {
    if choice == 0 {
        return seed;
    }
    let mixed = seed?.wrapping_add(u64::from(choice).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    Some(mixed ^ (mixed >> 31))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternatives_have_seeds_of_their_own_that_follow_from_the_clients() {
        let seeds: Vec<u64> = (0..64).filter_map(|n| seed_of(Some(7), n)).collect();
        let mut different = seeds.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!((seeds[0], different.len()), (7, 64));
        assert_eq!(seed_of(Some(7), 3), Some(seeds[3]));
        assert_ne!(seed_of(Some(8), 3), Some(seeds[3]));
        assert_eq!((seed_of(None, 0), seed_of(None, 3)), (None, None));
    }
}
