//! Greedy decoding, step by step, with and without the cache rebuild at the rope limit.
//!
//! The reference's tokens are fed whatever ours are, so that every step is compared on the same history.

use super::case::Case;
use super::compare::{Finding, Reporter, largest_difference};
use super::folder::{floats, integers};
use crate::error::ModelError;
use crate::sequence::SequenceState;

/// What the reference did at every step.
struct Steps {
    tokens: Vec<u32>,
    hidden: Vec<f32>,
    top_ids: Vec<i64>,
    top_logits: Vec<f32>,
    /// Entries of `top_ids` per step.
    top: usize,
}

/// What we did.
#[derive(Default)]
struct Found {
    hidden: f64,
    top: f64,
    unequal: usize,
    ties: usize,
    note: String,
}

/// Compares the greedy steps from a prefilled sequence, then once more without the cache rebuild if the case has that.
pub(super) fn compare_greedy(
    case: &Case<'_>,
    state: SequenceState,
    last: Vec<f32>,
    reporter: &mut Reporter<'_>,
) {
    match Steps::read(case, "", &case.file.generated) {
        Ok(steps) => compare_steps(case, (state, last), &steps, "", reporter),
        Err(message) => reporter.stage(case.name, "greedy", Finding::Miss(message)),
    }
    let Some(tokens) = &case.file.generated_no_cache_rebuild else {
        return;
    };
    let suffix = "_no_cache_rebuild";
    let steps = match Steps::read(case, suffix, tokens) {
        Ok(steps) => steps,
        Err(message) => {
            return reporter.stage(
                case.name,
                &format!("greedy{suffix}"),
                Finding::Miss(message),
            );
        }
    };
    let model = &case.loaded.model;
    let again = || -> Result<(SequenceState, Vec<f32>), ModelError> {
        let mut state = model.begin(&case.prompt, &case.features)?;
        state.rebuilds = false;
        let hidden = model.run(&mut state, usize::MAX)?;
        let last = model.finish_one(&mut state, &hidden)?;
        Ok((state, last))
    };
    match again() {
        Ok(start) => compare_steps(case, start, &steps, suffix, reporter),
        Err(error) => reporter.stage(case.name, &format!("greedy{suffix}"), error),
    }
}

impl Steps {
    fn read(case: &Case<'_>, suffix: &str, tokens: &[u32]) -> Result<Self, String> {
        let hidden = floats(&case.tensors, &format!("final_hidden_steps{suffix}"))?;
        let top_ids = integers(&case.tensors, &format!("step_top8_ids{suffix}"))?;
        let top_logits = floats(&case.tensors, &format!("step_top8_logits{suffix}"))?;
        let top = top_ids
            .as_ref()
            .and_then(|(shape, _)| shape.last().copied())
            .unwrap_or(0);
        let steps = Self {
            tokens: tokens.to_vec(),
            hidden: hidden.map(|(_, values)| values).unwrap_or_default(),
            top_ids: top_ids.map(|(_, ids)| ids).unwrap_or_default(),
            top_logits: top_logits.map(|(_, values)| values).unwrap_or_default(),
            top,
        };
        let width = case.loaded.model.config().hidden_size;
        let counts = [steps.hidden.len() / width, steps.top_ids.len() / top.max(1)];
        if counts
            .iter()
            .any(|count| *count != 0 && *count != tokens.len())
            || steps.top_ids.len() != steps.top_logits.len()
        {
            return Err(format!(
                "{} greedy tokens, but hidden states and top logits of {counts:?} steps",
                tokens.len()
            ));
        }
        Ok(steps)
    }

    /// How far the reference's best logit is above its second, where it is known.
    fn gap(&self, step: usize) -> Option<f64> {
        let logits = self
            .top_logits
            .get(step * self.top..(step + 1) * self.top)?;
        (logits.len() > 1).then(|| top_gap(logits))
    }
}

fn compare_steps(
    case: &Case<'_>,
    (state, last): (SequenceState, Vec<f32>),
    steps: &Steps,
    suffix: &str,
    reporter: &mut Reporter<'_>,
) {
    if steps.tokens.is_empty() {
        return;
    }
    let tolerance = case.loaded.tolerance();
    let found = match run_steps(case, (state, last), steps) {
        Ok(found) => found,
        Err(finding) => return reporter.stage(case.name, &format!("greedy{suffix}"), finding),
    };
    let count = format!("{} steps", steps.tokens.len());
    let float = |difference| Finding::Floats {
        difference,
        tolerance,
        note: count.clone(),
    };
    if !steps.hidden.is_empty() {
        reporter.stage(
            case.name,
            &format!("hidden_steps{suffix}"),
            float(found.hidden),
        );
    }
    if !steps.top_ids.is_empty() {
        reporter.stage(
            case.name,
            &format!("top{}{suffix}", steps.top),
            float(found.top),
        );
    }
    let mut note = count.clone();
    if found.ties > 0 {
        note = format!("{note}, {} of them ties within tolerance", found.ties);
    }
    let note = if found.note.is_empty() {
        note
    } else {
        format!("{note}; {}", found.note)
    };
    reporter.stage(
        case.name,
        &format!("generated{suffix}"),
        Finding::Items {
            unequal: found.unequal,
            note,
        },
    );
}

/// Decodes along the reference's tokens.
fn run_steps(
    case: &Case<'_>,
    (mut state, mut logits): (SequenceState, Vec<f32>),
    steps: &Steps,
) -> Result<Found, Finding> {
    let model = &case.loaded.model;
    let width = model.config().hidden_size;
    let mut found = Found::default();
    for (step, &want) in steps.tokens.iter().enumerate() {
        if let Some(hidden) = steps.hidden.get(step * width..(step + 1) * width) {
            let difference =
                largest_difference(state.last_hidden(), hidden).map_err(Finding::Miss)?;
            found.hidden = found.hidden.max(difference);
        }
        for at in step * steps.top..(step + 1) * steps.top {
            let Some((id, logit)) = steps.top_ids.get(at).zip(steps.top_logits.get(at)) else {
                break;
            };
            let ours = usize::try_from(*id)
                .ok()
                .and_then(|id| logits.get(id))
                .copied();
            let ours = ours.ok_or_else(|| {
                Finding::Miss(format!("step {step}: id {id} is not in the vocabulary"))
            })?;
            let difference = largest_difference(&[ours], &[*logit]).map_err(Finding::Miss)?;
            found.top = found.top.max(difference);
        }
        let have = argmax(&logits);
        if have != Some(want) {
            // Each side may be off by the tolerance, so two logits this close may come in either order.
            let gap = steps.gap(step).unwrap_or_else(|| top_gap(&logits));
            if gap <= 2.0 * case.loaded.tolerance() {
                found.ties += 1;
            } else {
                found.unequal += 1;
                if found.note.is_empty() {
                    found.note = format!("first at step {step}: have {have:?}, want {want}");
                }
            }
        }
        if step + 1 < steps.tokens.len() {
            model.push(&mut state, want)?;
            logits = match model.advance(&mut state, usize::MAX)? {
                Some(logits) => logits,
                None => return Err(Finding::Miss("a step left positions pending".into())),
            };
        }
    }
    Ok(found)
}

/// The first of the largest logits.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if !logit.is_nan() && best.is_none_or(|(_, most)| logit > most) {
            best = Some((id, logit));
        }
    }
    best.and_then(|(id, _)| u32::try_from(id).ok())
}

/// The best logit less the second best.
fn top_gap(logits: &[f32]) -> f64 {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in logits {
        if logit > best {
            (best, second) = (logit, best);
        } else if logit > second {
            second = logit;
        }
    }
    f64::from(best) - f64::from(second)
}
