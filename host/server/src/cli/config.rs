//! `visor config`: a file checked, or the configuration in force.

use std::io::Write;
use std::path::Path;

use super::start::load_config;
use super::{EXIT_DONE, Failure, Overrides};
use crate::config::Config;

/// Explains every mistake; exit code 2 when there is one.
pub(super) fn check(file: &Path) -> Result<u8, Failure> {
    let config = Config::load(file).map_err(Failure::usage)?;
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

/// Prints what a server started here and now would use; the documented file when nothing differs.
pub(super) fn show(overrides: &Overrides) -> Result<u8, Failure> {
    let (config, file) = load_config(overrides, None)?;
    let mut out = std::io::stdout().lock();
    if file.is_none() && config == Config::default() {
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
