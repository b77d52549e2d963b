//! `visor bench`: what this machine does with the configured model, end to end; with `--shape`, stage by stage.

mod shape;

use std::io::Write;
use std::time::{Duration, Instant};

use super::client::{Client, Question};
use super::start::{private_config, read_picture, ready_house, start_log};
use super::{BenchArgs, EXIT_DONE, Failure};
use crate::stats::Memory;

/// The picture asked about when none is named: 512 x 512, so that several crops are encoded.
const PICTURE: &[u8] = include_bytes!("bench.png");

struct Measured {
    first: Duration,
    total: Duration,
    prompt_tokens: u64,
    completion_tokens: u64,
}

pub(super) fn run(args: &BenchArgs) -> Result<u8, Failure> {
    if let Some(shape) = &args.shape {
        return shape::run(shape, args);
    }
    let (config, _) = private_config(&args.overrides)?;
    let picture = match &args.image {
        Some(file) => read_picture(file, &config)?,
        None => PICTURE.to_vec(),
    };
    start_log(&config)?;
    let loading = Instant::now();
    let house = ready_house(config)?;
    let load = loading.elapsed();
    let client = Client::new(&house).map_err(Failure::start)?;
    let mut runs = Vec::new();
    for run in 0..args.requests {
        // A different question each time: the picture may be cached, the answer may not.
        let question = Question {
            text: format!("Describe this picture, attempt {}.", run + 1),
            images: vec![picture.clone()],
            max_tokens: Some(args.max_tokens),
            ..Question::default()
        };
        runs.push(measure(&client, &question)?);
    }
    let device = house.device_name();
    house.stop();
    let report = report(&house.model.id, &device, load, &runs);
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{report}")?;
    } else {
        print(&mut out, &report)?;
    }
    Ok(EXIT_DONE)
}

fn measure(client: &Client, question: &Question) -> Result<Measured, Failure> {
    let start = Instant::now();
    let mut first = None;
    let ending = client.ask(question, &mut |_| {
        first.get_or_insert_with(|| start.elapsed());
    });
    let ending = ending.map_err(Failure::no)?;
    let total = start.elapsed();
    Ok(Measured {
        first: first.unwrap_or(total),
        total,
        prompt_tokens: ending.prompt_tokens,
        completion_tokens: ending.completion_tokens,
    })
}

fn report(model: &str, device: &str, load: Duration, runs: &[Measured]) -> serde_json::Value {
    let requests: Vec<_> = runs
        .iter()
        .map(|run| {
            let decode_s = (run.total - run.first).as_secs_f64();
            // The first token is the prompt's; the others are what decoding took.
            let decoded = f64::from(
                u32::try_from(run.completion_tokens.saturating_sub(1)).unwrap_or(u32::MAX),
            );
            serde_json::json!({
                "prompt_tokens": run.prompt_tokens,
                "completion_tokens": run.completion_tokens,
                "first_token_ms": run.first.as_secs_f64() * 1e3,
                "total_s": run.total.as_secs_f64(),
                "tokens_per_s": if decode_s > 0.0 { decoded / decode_s } else { 0.0 },
            })
        })
        .collect();
    let memory = Memory::now();
    serde_json::json!({
        "model": model,
        "device": device,
        "load_s": load.as_secs_f64(),
        "requests": requests,
        "peak_resident_mib": memory.peak_bytes.map(|bytes| bytes >> 20),
    })
}

fn print(out: &mut impl Write, report: &serde_json::Value) -> std::io::Result<()> {
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or(0.0);
    let word = |key: &str| report[key].as_str().unwrap_or("?").to_owned();
    writeln!(out, "model        {} on {}", word("model"), word("device"))?;
    writeln!(out, "load         {:.2} s", number(&report["load_s"]))?;
    for (index, run) in report["requests"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        writeln!(
            out,
            "request {:<4} {} prompt tokens, first token {:.0} ms, {} tokens in {:.2} s, {:.1} tokens/s",
            index + 1,
            run["prompt_tokens"],
            number(&run["first_token_ms"]),
            run["completion_tokens"],
            number(&run["total_s"]),
            number(&run["tokens_per_s"]),
        )?;
    }
    print_peak(out, report["peak_resident_mib"].as_u64())
}

fn print_peak(out: &mut impl Write, mib: Option<u64>) -> std::io::Result<()> {
    match mib {
        Some(mib) => writeln!(out, "peak memory  {mib} MiB resident"),
        None => writeln!(out, "peak memory  unknown: this system does not say"),
    }
}
