//! `visor bench --shape`: what this machine does with a model of a shape, whose weights are drawn at random and kept.

use std::io::Write;
use std::path::Path;

use serde_json::json;
use visor_model::bench::{self, BenchOptions, BenchReport, Ceilings};
use visor_model::shape::{self, PHI35_VISION_CONFIG};
use visor_model::{Activations, Checkpoint, DeviceKind, ModelError, Precision};

use super::print_peak;
use crate::cli::progress::{self, Loading};
use crate::cli::signals::stop_signal;
use crate::cli::start::{cache_folder, private_config, start_log};
use crate::cli::{BenchArgs, EXIT_DONE, EXIT_STOPPED, Failure};
use crate::config::read_at_most;
use crate::stats::Memory;

/// The shape that needs no file.
const PUBLISHED: &str = "phi-3.5-vision";

/// Longest config.json of a shape; that of Phi-3.5-vision has 4 KiB.
const SHAPE_BYTES_MAX: u64 = 1 << 20;

/// A config, and what it is called.
struct Shape {
    name: String,
    file: String,
    config: Vec<u8>,
}

/// Everything that is told.
struct Told {
    shape: String,
    vision: Precision,
    activations: Activations,
    prefill_chunk_tokens: usize,
    ceilings: Ceilings,
    report: BenchReport,
    peak_mib: Option<u64>,
}

pub(super) fn run(shape: &str, args: &BenchArgs) -> Result<u8, Failure> {
    let (config, _) = private_config(&args.overrides)?;
    start_log(&config)?;
    let device = config.model.device;
    if !device.kinds().contains(&DeviceKind::Cpu) {
        let error =
            "--shape measures the CPU, beside what the CPU could do at best; say --device cpu";
        return Err(Failure::usage(anyhow::anyhow!("device {device}: {error}")));
    }
    let shape = Shape::find(shape)?;
    let folder = match &args.shape_folder {
        Some(folder) => folder.clone(),
        None => match cache_folder() {
            Some(folder) => folder.join("bench"),
            None => {
                let error =
                    "no cache folder is known, HOME is not set; name a folder with --shape-folder";
                return Err(Failure::usage(anyhow::anyhow!(error)));
            }
        },
    };
    let vision = args.vision.into();
    let digest = shape::digest(&shape.config, vision);
    let folder = folder.join(format!("{}-{digest}", shape.name));
    let stop = stop_signal()?;
    let keep_going = || !stop.is_cancelled();
    let options = BenchOptions {
        activations: config.model.activations,
        vision,
        prefill_chunk_tokens: config.model.prefill_chunk_tokens,
        long: args.long,
        say: &|stage| progress::line(&format!("measuring {stage}")),
        keep_going: &keep_going,
    };
    let told = made((&shape, vision), &folder, &keep_going)
        .and_then(|()| measured(shape, &folder, &options));
    match told {
        Ok(told) => tell(&told, args.json),
        Err(ModelError::Cancelled) => {
            progress::line("stopped");
            Ok(EXIT_STOPPED)
        }
        Err(error @ ModelError::Write { .. }) => Err(Failure::start(anyhow::anyhow!(
            "{error}; weights of a shape are kept there: make room for them (2.5 GB for {PUBLISHED}), or name another folder with --shape-folder"
        ))),
        Err(error) => Err(Failure::start(error)),
    }
}

impl Shape {
    fn find(shape: &str) -> Result<Self, Failure> {
        if shape == PUBLISHED {
            return Ok(Self {
                name: PUBLISHED.to_owned(),
                file: format!("{PUBLISHED}/config.json"),
                config: PHI35_VISION_CONFIG.to_vec(),
            });
        }
        let config = read_at_most(Path::new(shape), SHAPE_BYTES_MAX).map_err(|error| {
            Failure::usage(anyhow::anyhow!(
                "shape {shape}: {error}; give {PUBLISHED}, or the config.json of a phi3_v model"
            ))
        })?;
        let name = Path::new(shape).file_stem().unwrap_or_default();
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            file: shape.to_owned(),
            config,
        })
    }
}

/// Makes the checkpoint unless an earlier run did.
fn made(
    (shape, vision): (&Shape, Precision),
    folder: &Path,
    keep_going: &dyn Fn() -> bool,
) -> Result<(), ModelError> {
    if folder.exists() {
        return Checkpoint::open(folder)
            .map(|_| ())
            .map_err(|error| ModelError::Config {
                file: folder.display().to_string(),
                message: format!("{error}; remove this folder and it is made again"),
            });
    }
    progress::line(&format!("making random weights in {}", folder.display()));
    let bar = Loading::by_command();
    let config = (shape.file.as_str(), &shape.config[..]);
    shape::write_random(config, vision, folder, &mut |done| {
        bar.step(done);
        keep_going()
    })
}

fn measured(shape: Shape, folder: &Path, options: &BenchOptions<'_>) -> Result<Told, ModelError> {
    (options.say)("what this machine can do at best");
    let ceilings = Ceilings::measure(options.activations)?;
    Memory::forget_peak();
    let report = bench::measure(folder, &ceilings, options)?;
    Ok(Told {
        shape: shape.name,
        vision: options.vision,
        activations: options.activations,
        prefill_chunk_tokens: options.prefill_chunk_tokens,
        ceilings,
        report,
        peak_mib: Memory::now().peak_bytes.map(|bytes| bytes >> 20),
    })
}

fn tell(told: &Told, as_json: bool) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    if as_json {
        let document = json!({
            "shape": told.shape,
            "vision": told.vision.to_string(),
            "activations": told.activations.to_string(),
            "prefill_chunk_tokens": told.prefill_chunk_tokens,
            "ceilings": told.ceilings,
            "measured": told.report,
            "peak_resident_mib": told.peak_mib,
        });
        writeln!(out, "{document}")?;
    } else {
        print(&mut out, told)?;
    }
    Ok(EXIT_DONE)
}

fn print(out: &mut impl Write, told: &Told) -> std::io::Result<()> {
    let (ceilings, report) = (&told.ceilings, &told.report);
    writeln!(
        out,
        "shape        {}, random weights, {}, vision {}, {:.2} GB, {} activations",
        told.shape,
        report.quantization,
        told.vision,
        gb(report.weight_bytes),
        told.activations
    )?;
    let floats = ceilings.products.f32_gop_per_s;
    let products = match &ceilings.products.integer {
        Some(integer) => format!(
            "{:.0} Gop/s in INT4, {:.0} in INT8 ({}), {floats:.0} in f32",
            integer.int4_gop_per_s, integer.int8_gop_per_s, integer.kernel
        ),
        None => format!("{floats:.0} Gop/s in f32"),
    };
    writeln!(
        out,
        "ceilings     {} threads read {:.1} GB/s and multiply {products}",
        ceilings.threads, ceilings.read_gb_per_s
    )?;
    writeln!(
        out,
        "load         {:.2} s, once more {:.2} s",
        report.load_s, report.warm_load_s
    )?;
    print_products(out, report)?;
    print_decode(out, report)?;
    for first in &report.first_tokens {
        writeln!(
            out,
            "first token  {:.2} s: {} crops in {:.2} s, {} prompt tokens in {:.2} s",
            first.seconds, first.crops, first.vision_s, first.prompt_tokens, first.prefill_s
        )?;
    }
    print_peak(out, told.peak_mib)
}

fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// The stages that multiply: many rows for each weight that is read.
fn print_products(out: &mut impl Write, report: &BenchReport) -> std::io::Result<()> {
    for vision in &report.vision {
        writeln!(
            out,
            "vision       {} crops in {:.2} s, {:.2} s a crop ({:.2} s the tower), {:.0} % of the products",
            vision.crops,
            vision.seconds,
            vision.seconds_per_crop,
            vision.tower_seconds_per_crop,
            100.0 * vision.product_share
        )?;
    }
    for prefill in &report.prefill {
        writeln!(
            out,
            "prefill      {} tokens in {:.2} s, {:.1} tokens/s, {:.0} % of the products",
            prefill.tokens,
            prefill.seconds,
            prefill.tokens_per_s,
            100.0 * prefill.product_share
        )?;
    }
    Ok(())
}

/// The stage that reads: few rows for each weight.
fn print_decode(out: &mut impl Write, report: &BenchReport) -> std::io::Result<()> {
    let decode = &report.decode;
    writeln!(
        out,
        "decode       {:.1} ms a token after {}, {:.1} tokens/s, {:.0} % of plain reading beside each step, whose median is {:.1} GB/s ({:.2} GB of weights, {:.2} GB of keys and values)",
        decode.step_ms,
        decode.after_tokens,
        decode.tokens_per_s,
        100.0 * decode.read_share,
        decode.read_gb_per_s,
        gb(decode.weight_bytes),
        gb(decode.kv_bytes)
    )?;
    for batch in &report.batches {
        writeln!(
            out,
            "decode       {} at once, {:.1} ms a step after {}, {:.1} tokens/s together",
            batch.sequences, batch.step_ms, batch.after_tokens, batch.tokens_per_s
        )?;
    }
    for drafts in &report.drafts {
        writeln!(
            out,
            "decode       with {} drafts, {:.1} ms a step",
            drafts.drafts, drafts.step_ms
        )?;
    }
    Ok(())
}
