//! `visor models`: the configured model, without loading its weights.

use std::io::Write;

use serde_json::{Map, Value, json};

use super::start::load_config;
use super::{EXIT_DONE, Failure, ModelsArgs};
use crate::wiring::{open_checkpoint, served_facts};

pub(super) fn run(args: &ModelsArgs) -> Result<u8, Failure> {
    let (config, _) = load_config(&args.overrides, None)?;
    let checkpoint = open_checkpoint(&config).map_err(Failure::start)?;
    let facts = served_facts(&config, &checkpoint).map_err(Failure::start)?;
    let model = checkpoint.config();
    let embedded = config.model.path.as_os_str().is_empty();
    let id = if config.model.served_name.is_empty() {
        &facts.id
    } else {
        &config.model.served_name
    };
    let described = [
        ("id", json!(id)),
        ("aliases", json!(config.model.aliases)),
        (
            "path",
            json!(if embedded {
                "(inside the binary)".into()
            } else {
                config.model.path.to_string_lossy()
            }),
        ),
        ("demo", json!(facts.embedded)),
        ("quantization", json!(facts.quantization)),
        ("bytes", json!(facts.bytes)),
        ("digest", json!(facts.digest)),
        ("layers", json!(model.layers)),
        ("hidden_size", json!(model.hidden_size)),
        ("heads", json!(model.heads)),
        ("kv_heads", json!(model.kv_heads)),
        ("vocabulary", json!(model.vocab_size)),
        ("context_tokens", json!(config.model.context_tokens)),
        ("positions_max", json!(model.positions_max)),
        (
            "original_positions_max",
            json!(model.original_positions_max),
        ),
        ("crops_max", json!(checkpoint.num_crops())),
    ];
    let mut out = std::io::stdout().lock();
    if args.json {
        let pairs = described
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value));
        writeln!(out, "{}", Value::Object(pairs.collect::<Map<_, _>>()))?;
        return Ok(EXIT_DONE);
    }
    for (key, value) in &described {
        let key = key.replace('_', " ");
        match value.as_str() {
            Some(text) => writeln!(out, "{key:<24}{text}")?,
            None => writeln!(out, "{key:<24}{value}")?,
        }
    }
    Ok(EXIT_DONE)
}
