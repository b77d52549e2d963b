//! `visor config`: a file checked, or the configuration in force.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::start::load_config;
use super::{EXIT_DONE, Failure, Overrides, plugin};
use crate::config::{Config, ConfigError, Issue};
use crate::http::tls;
use crate::wiring::{open_checkpoint, served_facts};

/// Explains every mistake; exit code 2 when there is one. What a server would find at its start is looked for too: the device, the
/// certificate, the model, the plugins of the folder that the file names, and what they have to say to what it tells each.
pub(super) fn check(file: &Path) -> Result<u8, Failure> {
    let text = Config::read(file).map_err(Failure::usage)?;
    let config = Arc::new(Config::parse(&text, file).map_err(Failure::usage)?);
    let issues = [surroundings(&config), plugin::strangers(&config)].concat();
    let problems = match plugin::load(&config) {
        Ok(loaded) => loaded.problems(),
        Err(failure) => vec![format!("{:#}", failure.error)],
    };
    let issues = (!issues.is_empty()).then(|| ConfigError::semantic(&text, file, issues));
    let told: Vec<String> = issues.iter().map(ToString::to_string).collect();
    if !told.is_empty() || !problems.is_empty() {
        let all = [told, problems].concat().join("\n");
        return Err(Failure::usage(anyhow::anyhow!(all)));
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: good", file.display())?;
    for route in &config.routes {
        writeln!(
            out,
            "  {} -> adapter {}, template {}, image policy {}, cache strategy {}",
            route.prefix,
            route.adapter,
            route.template,
            route.image_policy,
            if route.cache_strategy.is_empty() {
                "(the host's LRU)"
            } else {
                &route.cache_strategy
            }
        )?;
    }
    Ok(EXIT_DONE)
}

/// What is wrong with what the configuration names outside itself.
fn surroundings(config: &Config) -> Vec<Issue> {
    let device = config.model.device.check_built().err();
    let device = device.map(|error| Issue::at_key("model.device", error.to_string(), ""));
    let tls = tls::acceptor(&config.server).err();
    let tls = tls.map(|error| {
        let allowed = "PEM files of a certificate chain and its private key";
        Issue::at_key(error.key(), error.to_string(), allowed)
    });
    device.into_iter().chain(tls).chain(model(config)).collect()
}

/// What is wrong with the checkpoint, as far as that shows without its weights.
fn model(config: &Config) -> Option<Issue> {
    let opened = open_checkpoint(config);
    let facts = opened.and_then(|checkpoint| served_facts(config, &checkpoint));
    let error = facts.err()?;
    let allowed = "the folder of a Hugging Face phi3_v checkpoint; empty is the demo";
    Some(Issue::at_key("model.path", error.to_string(), allowed))
}

/// Prints what a server started here and now would use; the documented file when nothing differs.
pub(super) fn show(overrides: &Overrides, listen: Option<&str>) -> Result<u8, Failure> {
    let (config, file) = load_config(overrides, listen)?;
    let mut out = std::io::stdout().lock();
    // A shell has made the file already that this is written to: it is there, and empty.
    if config == Config::default() {
        write!(out, "{}", crate::config::DOCUMENTED)?;
    } else {
        let from = file.map_or("the built-in defaults".to_owned(), |file| {
            file.display().to_string()
        });
        writeln!(
            out,
            "# {from}, environment and flags applied\n\n{}",
            config.to_toml()
        )?;
    }
    Ok(EXIT_DONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_not_there_is_a_mistake_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("my.toml");
        let checked = |path: &Path| {
            let text = format!("[model]\npath = '{}'\n", path.display());
            std::fs::write(&file, text).unwrap();
            check(&file).map_err(|failure| (failure.code, format!("{:#}", failure.error)))
        };
        let nowhere = folder.path().join("nowhere");
        let empty = folder.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        for wrong in [nowhere, empty] {
            let (code, said) = checked(&wrong).expect_err("there is no model");
            assert_eq!(code, crate::cli::EXIT_USAGE, "{said}");
            assert!(said.contains("my.toml:2:8 (model.path)"), "{said}");
            assert!(said.contains(&wrong.display().to_string()), "{said}");
        }
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/ckpt_mha_int4");
        assert_eq!(checked(&golden).unwrap(), EXIT_DONE);
        assert_eq!(checked(Path::new("")).unwrap(), EXIT_DONE);
    }
}
