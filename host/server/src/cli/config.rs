//! `visor config`: a file checked, or the configuration in force.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::start::load_config;
use super::{EXIT_DONE, Failure, Overrides, plugin};
use crate::config::Config;

/// Explains every mistake; exit code 2 when there is one. What the plugins have to say is heard too: those of the folder that
/// the file names, and what it tells each.
pub(super) fn check(file: &Path) -> Result<u8, Failure> {
    let config = Arc::new(Config::load(file).map_err(Failure::usage)?);
    let loaded = plugin::load(&config).map_err(|failure| Failure::usage(failure.error))?;
    let problems = loaded.problems();
    if !problems.is_empty() {
        return Err(Failure::usage(anyhow::anyhow!(problems.join("\n"))));
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
