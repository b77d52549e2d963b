//! The comparison with the reference behind `visor verify` and the parity tests.
//!
//! Runs on any folder laid out like `tests/golden`, each part optional: `cases/<checkpoint>.<case>.{json,safetensors}`
//! with the `ckpt_*/` folders they name, `images/`, `preprocess.{json,safetensors}` and `tokenizer_cases.json`. A part
//! that is not there is skipped with the reason, a part that is malformed is a miss; neither stops the others.

mod case;
mod compare;
mod folder;
mod greedy;
mod preprocess;
mod templates;

use std::path::PathBuf;

pub use compare::{Outcome, StageResult, Totals};

use crate::checkpoint::phi3_tokenizer;
use crate::device::DeviceChoice;
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;
use compare::Reporter;
use folder::{Folder, Models};

/// What to compare with what.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// The golden folder.
    pub golden: PathBuf,
    /// A tokenizer file for whatever has no tokenizer of its own; absent, `tokenizer.json` of the golden folder, else
    /// the embedded Phi-3 one.
    pub tokenizer: Option<PathBuf>,
    /// A checkpoint to run instead of the golden folder's own, in every case whose checkpoint it can be: the `ckpt_*`
    /// of its name, else those of its sizes and final norm (stored alike, if some are). When it can be none of them it
    /// runs in every case.
    pub checkpoint: Option<PathBuf>,
    /// The device to compute on.
    pub device: DeviceChoice,
}

/// Compares everything the folder has, telling `report` about each stage as it ends.
///
/// Floats may differ by 2e-4 in absolute value when computed in f32 (preprocessing: 1e-6), by 0.05 in f16, which
/// accelerators make of INT4 weights too, and by 0.5 in bf16: enough to find wrong wiring, not rounding. Greedy tokens have
/// to be equal unless the reference's two best logits are within twice that tolerance.
///
/// # Errors
/// [`ModelError::MissingFile`] without the folder, [`ModelError::Golden`] when nothing at all was compared, and
/// whatever is wrong with an explicitly given tokenizer or checkpoint.
pub fn verify(
    options: &VerifyOptions,
    report: &mut dyn FnMut(&StageResult),
) -> Result<Totals, ModelError> {
    verify_some(options, &|_| true, report)
}

/// As [`verify`] for the parts that `wanted` agrees to: the names of cases, `preprocess` and `tokenizer`.
///
/// # Errors
/// As [`verify`].
pub fn verify_some(
    options: &VerifyOptions,
    wanted: &dyn Fn(&str) -> bool,
    report: &mut dyn FnMut(&StageResult),
) -> Result<Totals, ModelError> {
    let folder = Folder::open(&options.golden)?;
    let tokenizer = default_tokenizer(options, &folder)?;
    let mut reporter = Reporter::new(report);
    if wanted("tokenizer") {
        templates::compare_all(&folder, &tokenizer, &mut reporter);
    }
    if wanted("preprocess") {
        preprocess::compare_all(&folder, &mut reporter);
    }
    let mut models = Models::new(&folder, options.checkpoint.as_deref(), options.device)?;
    for name in folder.case_names().iter().filter(|name| wanted(name)) {
        case::compare_case(name, &tokenizer, &mut models, &mut reporter);
    }
    let totals = reporter.totals();
    if totals.passed + totals.missed == 0 {
        return Err(ModelError::Golden {
            path: options.golden.display().to_string(),
            message: format!(
                "nothing was compared ({} stages skipped); a golden folder has cases/*.json with ckpt_*/ folders, \
                 preprocess.json with images/, or tokenizer_cases.json",
                totals.skipped
            ),
        });
    }
    Ok(totals)
}

fn default_tokenizer(options: &VerifyOptions, folder: &Folder) -> Result<Tokenizer, ModelError> {
    let own = folder.root.join("tokenizer.json");
    match &options.tokenizer {
        Some(path) => Tokenizer::from_file(path),
        None if own.is_file() => Tokenizer::from_file(&own),
        None => phi3_tokenizer(),
    }
}
