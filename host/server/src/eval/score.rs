//! From verdicts to figures: what one configuration reached, and what changed under another.
//!
//! What is serialized here is the document of `visor eval --json`; its shape is told in
//! `tests/suite/README.md`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::ALL_CATEGORIES;
use super::suite::Suite;
use crate::stats::ratio;

/// What became of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Accepted.
    Right,
    /// Answered, and not accepted.
    Wrong,
    /// The server refused, or the answer broke off. Counts as wrong.
    Error,
}

impl Verdict {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Wrong => "wrong",
            Self::Error => "error",
        }
    }
}

/// One case under one configuration.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Of the case.
    pub id: String,
    /// Of the case.
    pub category: String,
    /// What it came to.
    pub verdict: Verdict,
    /// What was answered, as far as it came.
    pub answer: String,
    /// What the server said instead of answering.
    pub error: Option<String>,
    /// From the request to the last byte.
    pub seconds: f64,
    /// Whether the answer was cut at the token limit.
    pub cut: bool,
    /// Positions of the prompt, pictures included.
    pub prompt_tokens: u64,
    /// Positions that came from pictures: how finely they were looked at.
    pub image_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
}

/// Under what a suite was run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Setup {
    /// The configuration file as it was named, or that there was none.
    pub configuration: String,
    /// Name of the model.
    pub model: String,
    /// What computed.
    pub device: String,
    /// Names and revisions of the plugins.
    pub plugins: String,
    /// Seconds until the model was ready.
    pub load_s: f64,
    /// Largest resident memory while it ran, in MiB; none where the system does not say.
    pub peak_resident_mib: Option<u64>,
}

/// Right answers of a category, or of all.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tally {
    /// Name of the category; `all` for the total.
    pub category: String,
    /// Accepted answers.
    pub right: usize,
    /// Questions that were asked.
    pub cases: usize,
    /// `right` of `cases`, 0 to 100.
    pub percent: f64,
}

/// How long it took, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Times {
    /// All questions together.
    pub total_s: f64,
    /// Half of the questions took no longer.
    pub median_s: f64,
    /// 95 of 100 took no longer.
    pub p95_s: f64,
}

/// A suite under one configuration.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Under what.
    #[serde(flatten)]
    pub setup: Setup,
    /// Every category that was asked about, in alphabetical order, then `all`.
    pub categories: Vec<Tally>,
    /// How long it took.
    pub times: Times,
    /// Image tokens of a question that had a picture, on average; none when no picture was shown.
    pub image_tokens_mean: Option<f64>,
    /// Questions that were not answered.
    pub errors: usize,
    /// Every question that was asked, in the order of the suite.
    pub cases: Vec<Outcome>,
}

/// Cases that came out differently under the second configuration, by id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// Right under the first only.
    pub lost: Vec<String>,
    /// Right under the second only.
    pub won: Vec<String>,
}

/// Accuracy that is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Floor {
    /// A category, or `all`.
    pub category: String,
    /// Least percent.
    pub percent_min: f64,
}

impl std::str::FromStr for Floor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not CATEGORY=PERCENT, such as all=80");
        let (category, percent) = text.split_once('=').ok_or_else(wrong)?;
        let percent_min: f64 = percent.parse().map_err(|_| wrong())?;
        if category.is_empty() || !(0.0..=100.0).contains(&percent_min) {
            return Err(wrong());
        }
        Ok(Self {
            category: category.to_owned(),
            percent_min,
        })
    }
}

/// A floor, and what one run reached.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FloorCheck {
    /// The run's configuration.
    pub configuration: String,
    /// A category, or `all`.
    pub category: String,
    /// What was asked for.
    pub percent_min: f64,
    /// What was reached.
    pub percent: f64,
    /// Whether that is enough.
    pub met: bool,
}

/// Everything that is to be told of a suite under one configuration or two.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// The suite's folder as it was named.
    pub suite: String,
    /// Cases it has.
    pub cases: usize,
    /// Most tokens of an answer.
    pub max_tokens: u32,
    /// Whether it was stopped before every case was asked.
    pub interrupted: bool,
    /// One per configuration.
    pub runs: Vec<Run>,
    /// What the second configuration changed; none without one.
    pub changes: Option<Changes>,
    /// The floors that were asked for; none are judged when it was stopped.
    pub floors: Vec<FloorCheck>,
}

impl Run {
    /// Counts what came of the questions.
    #[must_use]
    pub fn new(setup: Setup, cases: Vec<Outcome>) -> Self {
        let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for case in &cases {
            let (right, asked) = counts.entry(&case.category).or_default();
            *right += usize::from(case.verdict == Verdict::Right);
            *asked += 1;
        }
        let rights = counts.values().map(|(right, _)| right).sum();
        let all = (ALL_CATEGORIES, (rights, cases.len()));
        let categories = counts.into_iter().chain([all]);
        let seen: Vec<u64> = cases
            .iter()
            .map(|case| case.image_tokens)
            .filter(|tokens| *tokens > 0)
            .collect();
        Self {
            categories: categories
                .map(|(category, (right, cases))| Tally::new(category, right, cases))
                .collect(),
            times: Times::of(cases.iter().map(|case| case.seconds).collect()),
            image_tokens_mean: (!seen.is_empty())
                .then(|| ratio(seen.iter().sum(), seen.len() as u64)),
            errors: cases
                .iter()
                .filter(|case| case.verdict == Verdict::Error)
                .count(),
            setup,
            cases,
        }
    }

    /// The figures of a category, if any of it was asked.
    #[must_use]
    pub fn tally(&self, category: &str) -> Option<&Tally> {
        self.categories
            .iter()
            .find(|tally| tally.category == category)
    }
}

impl Tally {
    fn new(category: &str, right: usize, cases: usize) -> Self {
        Self {
            category: category.to_owned(),
            right,
            cases,
            percent: 100.0 * ratio(right as u64, cases as u64),
        }
    }
}

impl Times {
    fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        // The nearest rank: a time that was measured, not one between two.
        let rank = |percent: usize| {
            let above = (seconds.len() * percent).div_ceil(100);
            seconds.get(above.max(1) - 1).copied().unwrap_or_default()
        };
        Self {
            total_s: seconds.iter().sum(),
            median_s: rank(50),
            p95_s: rank(95),
        }
    }
}

impl Evaluation {
    /// Puts one run or two beside each other.
    #[must_use]
    pub fn new(suite: &Suite, max_tokens: u32, interrupted: bool, runs: Vec<Run>) -> Self {
        let changes = match runs.as_slice() {
            [first, second] => Some(Changes::between(first, second)),
            _ => None,
        };
        Self {
            suite: suite.folder.display().to_string(),
            cases: suite.cases.len(),
            max_tokens,
            interrupted,
            runs,
            changes,
            floors: Vec::new(),
        }
    }

    /// Holds every run to the floors, unless it was stopped: half a run proves nothing.
    #[must_use]
    pub fn judged(mut self, floors: &[Floor]) -> Self {
        if self.interrupted {
            return self;
        }
        for run in &self.runs {
            for floor in floors {
                let percent = run
                    .tally(&floor.category)
                    .map_or(0.0, |tally| tally.percent);
                self.floors.push(FloorCheck {
                    configuration: run.setup.configuration.clone(),
                    category: floor.category.clone(),
                    percent_min: floor.percent_min,
                    percent,
                    met: percent >= floor.percent_min,
                });
            }
        }
        self
    }

    /// Whether every question was answered and every floor is met.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let answered = self.runs.iter().all(|run| run.errors == 0);
        answered && self.floors.iter().all(|floor| floor.met)
    }
}

impl Changes {
    /// Of the cases that both were asked.
    fn between(first: &Run, second: &Run) -> Self {
        let mut changes = Self::default();
        for (before, after) in first.cases.iter().zip(&second.cases) {
            debug_assert_eq!(before.id, after.id, "both runs ask in the suite's order");
            let right = |outcome: &Outcome| outcome.verdict == Verdict::Right;
            match (right(before), right(after)) {
                (true, false) => changes.lost.push(before.id.clone()),
                (false, true) => changes.won.push(before.id.clone()),
                _ => {}
            }
        }
        changes
    }
}

#[cfg(test)]
pub(super) mod tests;
