//! `visor config`: a file checked, or the configuration in force.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::start::load_config;
use super::{EXIT_DONE, Failure, Overrides, plugin};
use crate::config::{Config, ConfigError, Issue};
use crate::http::tls;

/// Explains every mistake; exit code 2 when there is one. What a server would find at its start is looked for too: the device, the
/// certificate, the plugins of the folder that the file names, and what they have to say to what it tells each.
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
    device.into_iter().chain(tls).collect()
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
