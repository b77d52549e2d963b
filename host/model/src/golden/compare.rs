//! Differences, verdicts and their sum.

use crate::error::ModelError;

/// How a stage ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Within tolerance.
    Pass,
    /// Out of tolerance, or something that should be comparable is not; the note says why.
    Miss,
    /// Not compared, with the reason.
    Skipped(String),
}

/// One comparison.
#[derive(Debug, Clone, serde::Serialize)]
pub struct StageResult {
    /// `<checkpoint>.<case>`, `preprocess.<image>` or `tokenizer`.
    pub case: String,
    /// What was compared.
    pub stage: String,
    /// Largest absolute difference, or the number of unequal items where they have to be equal. NaN where nothing could
    /// be subtracted, infinite where the computed values are not numbers.
    pub difference: f64,
    /// Largest difference that passes.
    pub tolerance: f64,
    /// The verdict.
    pub outcome: Outcome,
    /// One line for a reader: what was counted, where it differs, why not.
    pub note: String,
}

/// What all stages come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Totals {
    /// Stages within tolerance.
    pub passed: u64,
    /// Stages out of it.
    pub missed: u64,
    /// Stages not compared.
    pub skipped: u64,
    /// Largest difference of any stage that compares floats.
    pub difference_max: f64,
}

/// What a stage found, before it has a name.
pub(super) enum Finding {
    /// Floats: the largest difference and the largest that passes.
    Floats {
        difference: f64,
        tolerance: f64,
        note: String,
    },
    /// Things that are equal or not: how many are not.
    Items { unequal: usize, note: String },
    /// Not comparable, and it should be.
    Miss(String),
    /// Not comparable, for a good reason.
    Skipped(String),
}

impl From<ModelError> for Finding {
    fn from(error: ModelError) -> Self {
        Self::Miss(error.to_string())
    }
}

impl Finding {
    /// Floats against floats, which have to be as many.
    pub(super) fn floats(have: &[f32], want: &[f32], tolerance: f64) -> Self {
        match largest_difference(have, want) {
            Ok(difference) => Self::Floats {
                difference,
                tolerance,
                note: format!("{} values", want.len()),
            },
            Err(message) => Self::Miss(message),
        }
    }

    /// Something that has to be equal.
    pub(super) fn equal<T: PartialEq + std::fmt::Debug>(have: &T, want: &T) -> Self {
        if have == want {
            Self::Items {
                unequal: 0,
                note: short(format!("{want:?}")),
            }
        } else {
            Self::Items {
                unequal: 1,
                note: short(format!("have {have:?}, want {want:?}")),
            }
        }
    }

    /// Lists that have to be equal, with the first place where they are not.
    pub(super) fn lists<T: PartialEq + std::fmt::Debug>(have: &[T], want: &[T]) -> Self {
        let paired = have
            .iter()
            .zip(want)
            .filter(|(have, want)| have != want)
            .count();
        let unequal = paired + have.len().abs_diff(want.len());
        let note = match have.iter().zip(want).position(|(have, want)| have != want) {
            Some(at) => format!("first at {at}: have {:?}, want {:?}", have[at], want[at]),
            None if unequal > 0 => format!("have {} items, want {}", have.len(), want.len()),
            None => format!("{} items", want.len()),
        };
        Self::Items { unequal, note }
    }

    /// The same finding with something more to say.
    pub(super) fn with_note(mut self, more: &str) -> Self {
        if let Self::Floats { note, .. } | Self::Items { note, .. } | Self::Miss(note) = &mut self {
            note.push_str("; ");
            note.push_str(more);
        }
        self
    }
}

/// Long values shortened for a line.
fn short(text: String) -> String {
    match text.char_indices().nth(160) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Largest absolute difference; infinite as soon as a value is not a number.
pub(super) fn largest_difference(have: &[f32], want: &[f32]) -> Result<f64, String> {
    if have.len() != want.len() {
        return Err(format!("have {} values, want {}", have.len(), want.len()));
    }
    let difference = |(have, want): (&f32, &f32)| {
        let difference = (f64::from(*have) - f64::from(*want)).abs();
        if difference.is_nan() {
            f64::INFINITY
        } else {
            difference
        }
    };
    Ok(have.iter().zip(want).map(difference).fold(0.0, f64::max))
}

/// Names findings, passes them on and adds them up.
pub(super) struct Reporter<'a> {
    sink: &'a mut dyn FnMut(&StageResult),
    totals: Totals,
}

impl<'a> Reporter<'a> {
    pub(super) fn new(sink: &'a mut dyn FnMut(&StageResult)) -> Self {
        Self {
            sink,
            totals: Totals::default(),
        }
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    pub(super) fn stage(&mut self, case: &str, stage: &str, finding: impl Into<Finding>) {
        let (difference, tolerance, outcome, note) = match finding.into() {
            Finding::Floats {
                difference,
                tolerance,
                note,
            } => {
                self.totals.difference_max = self.totals.difference_max.max(difference);
                let outcome = if difference <= tolerance {
                    Outcome::Pass
                } else {
                    Outcome::Miss
                };
                (difference, tolerance, outcome, note)
            }
            Finding::Items { unequal, note } => {
                let outcome = if unequal == 0 {
                    Outcome::Pass
                } else {
                    Outcome::Miss
                };
                (unequal as f64, 0.0, outcome, note)
            }
            Finding::Miss(note) => (f64::NAN, 0.0, Outcome::Miss, note),
            Finding::Skipped(reason) => (f64::NAN, 0.0, Outcome::Skipped(reason.clone()), reason),
        };
        match outcome {
            Outcome::Pass => self.totals.passed += 1,
            Outcome::Miss => self.totals.missed += 1,
            Outcome::Skipped(_) => self.totals.skipped += 1,
        }
        let (case, stage) = (case.to_owned(), stage.to_owned());
        (self.sink)(&StageResult {
            case,
            stage,
            difference,
            tolerance,
            outcome,
            note,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_number_never_passes() {
        assert_eq!(largest_difference(&[1.0, 2.5], &[1.0, 2.0]), Ok(0.5));
        assert_eq!(largest_difference(&[f32::NAN], &[0.0]), Ok(f64::INFINITY));
        assert_eq!(
            largest_difference(&[f32::INFINITY], &[f32::INFINITY]),
            Ok(f64::INFINITY)
        );
        assert!(largest_difference(&[1.0], &[]).is_err());
    }

    #[test]
    fn findings_add_up() {
        let mut seen = Vec::new();
        let mut sink = |result: &StageResult| seen.push(result.outcome.clone());
        let mut reporter = Reporter::new(&mut sink);
        reporter.stage("a", "close", Finding::floats(&[1.0], &[1.0001], 2e-4));
        reporter.stage("a", "far", Finding::floats(&[1.0], &[1.001], 2e-4));
        reporter.stage("a", "ids", Finding::lists(&[1, 2, 3], &[1, 2]));
        reporter.stage("a", "none", Finding::Skipped("no images".into()));
        let totals = reporter.totals();
        assert_eq!((totals.passed, totals.missed, totals.skipped), (1, 2, 1));
        assert!((totals.difference_max - 1e-3).abs() < 1e-6);
        assert_eq!(
            seen,
            [
                Outcome::Pass,
                Outcome::Miss,
                Outcome::Miss,
                Outcome::Skipped("no images".into())
            ]
        );
    }
}
