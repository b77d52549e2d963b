//! `visor quantize`: a float checkpoint into MLX INT4 and INT8, told module by module.

use std::io::Write;

use clap::ValueEnum;
use serde_json::json;
use visor_model::quantize::{Comparison, StageError, compare};
use visor_model::{FloatType, ModelError, ModuleError, Precision, QuantizeOptions, QuantizeReport};

use super::progress::{self, Loading};
use super::signals::stop_signal;
use super::{EXIT_DONE, EXIT_STOPPED, Failure, QuantizeArgs};

/// Shown by `visor quantize --help`.
pub(super) const HELP: &str = "\
TARGET is MLX's affine format, groups of 64 weights with a scale and a bias: the language model in four bits, the vision
tower and the projector in eight, which config.json says module by module, as mlx-vlm reads it. Of these eight bits
codes use seven, with which pictures take less time on processors with AVX2.
The scale and bias of a group are searched for the least squared error; the table tells the relative error of every
module, and what it had been with MLX's own choice. Then a picture and a text run through both checkpoints, and the
relative error behind every layer is told; its memory does not grow with the model.

TARGET appears when it is whole. Until then it is TARGET.partial, which Ctrl-C removes and the next run replaces.

bf16 reaches further than f16 and is coarser: take it when a weight does not fit f16.";

/// How a part of the model is stored.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Form {
    /// Four bits a weight.
    Int4,
    /// Eight bits a weight, of which the tower's and the projector's codes use seven.
    Int8,
    /// In the type of what is not quantized.
    Float,
}

impl From<Form> for Precision {
    fn from(form: Form) -> Self {
        match form {
            Form::Int4 => Self::Int4,
            Form::Int8 => Self::Int8,
            Form::Float => Self::Float,
        }
    }
}

/// Of scales, biases and what is not quantized.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Floats {
    /// Eleven significant bits, up to 65504.
    F16,
    /// Eight significant bits, as far as f32.
    Bf16,
}

impl From<Floats> for FloatType {
    fn from(floats: Floats) -> Self {
        match floats {
            Floats::F16 => Self::F16,
            Floats::Bf16 => Self::Bf16,
        }
    }
}

pub(super) fn run(args: &QuantizeArgs) -> Result<u8, Failure> {
    let stop = stop_signal()?;
    let options = QuantizeOptions {
        vision: args.vision.into(),
        embeddings: args.embeddings.into(),
        float_type: args.float_type.into(),
    };
    let bar = Loading::by_command();
    let mut on_progress = |done| {
        bar.step(done);
        !stop.is_cancelled()
    };
    let report = match visor_model::quantize(&args.source, &args.target, &options, &mut on_progress)
    {
        Ok(report) => report,
        Err(ModelError::Cancelled) => {
            progress::line("stopped: nothing was written");
            return Ok(EXIT_STOPPED);
        }
        Err(error) => return Err(Failure::start(error)),
    };
    let compared = match args.no_compare {
        true => None,
        false => match compare(&args.source, &args.target, &mut on_progress) {
            Ok(compared) => Some(compared),
            Err(ModelError::Cancelled) => {
                progress::line("stopped: the checkpoint is written, and not compared");
                return Ok(EXIT_STOPPED);
            }
            Err(error) => return Err(Failure::start(error)),
        },
    };
    if args.json {
        tell_json(&report, compared.as_ref())?;
    } else {
        tell(&report, args)?;
        compared.iter().try_for_each(tell_compared)?;
    }
    Ok(EXIT_DONE)
}

fn tell_json(report: &QuantizeReport, compared: Option<&Comparison>) -> Result<(), Failure> {
    let module = |module: &ModuleError| {
        json!({
            "module": module.module,
            "bits": module.bits,
            "shape": [module.rows, module.columns],
            "relative_error": module.relative,
            "relative_error_by_ends": module.relative_by_ends,
        })
    };
    let modules: Vec<_> = report.modules.iter().map(module).collect();
    let compared = compared.map(|compared| {
        let stage =
            |stage: &StageError| json!({ "stage": stage.stage, "relative_error": stage.relative });
        json!({
            "stages": compared.stages.iter().map(stage).collect::<Vec<_>>(),
            "same_tokens": compared.same_tokens,
            "tokens": compared.tokens,
        })
    });
    let document = json!({
        "source_bytes": report.source_bytes,
        "bytes": report.bytes,
        "modules": modules,
        "compared": compared,
    });
    writeln!(std::io::stdout().lock(), "{document}")?;
    Ok(())
}

/// What comes out of every stage, beside what the floats give.
fn tell_compared(compared: &Comparison) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "a picture and a text through both, errors added up:")?;
    let width = compared.stages.iter().map(|stage| stage.stage.len());
    let width = width.max().unwrap_or(0);
    for stage in &compared.stages {
        writeln!(
            out,
            "{:<width$} {:>7.2} %",
            stage.stage,
            100.0 * stage.relative
        )?;
    }
    let (same, tokens) = (compared.same_tokens, compared.tokens);
    writeln!(
        out,
        "{same} of {tokens} most likely next tokens are the same"
    )?;
    Ok(())
}

/// The modules, as they are stored.
fn tell(report: &QuantizeReport, args: &QuantizeArgs) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let width = report.modules.iter().map(|module| module.module.len());
    let width = width.max().unwrap_or(0);
    writeln!(
        out,
        "{:<width$} {:>4} {:>14} {:>9} {:>9}",
        "module", "bits", "shape", "error", "by ends"
    )?;
    for module in &report.modules {
        let shape = format!("{} x {}", module.rows, module.columns);
        let (error, by_ends) = (100.0 * module.relative, 100.0 * module.relative_by_ends);
        writeln!(
            out,
            "{:<width$} {:>4} {shape:>14} {error:>7.2} % {by_ends:>7.2} %",
            module.module, module.bits
        )?;
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    writeln!(
        out,
        "{}: {:.1} MiB of weights, from {:.1} MiB",
        args.target.display(),
        mib(report.bytes),
        mib(report.source_bytes)
    )?;
    Ok(())
}
