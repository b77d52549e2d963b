//! `visor plugin`: the server's own checks, without the server.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use visor_sandbox::{
    CheckReport, FolderOptions, Origin, Plugin, PluginFolder, PluginSet, Registry, SampleModel,
    Sandbox, check_file,
};

use super::start::load_config;
use super::{EXIT_DONE, EXIT_NO, Failure, Overrides};
use crate::config::{Config, Issue, RouteConfig};
use crate::wiring::{self, shipped};

/// Runs every check the server would, the trial run included, and whether the routes could use it under its name.
pub(super) fn check(file: &Path, json: bool, overrides: &Overrides) -> Result<u8, Failure> {
    let (config, _) = load_config(overrides, None)?;
    let sandbox = sandbox(&config)?;
    let id = file.file_stem().unwrap_or_default().to_string_lossy();
    let settings = wiring::plugin_settings(&config, &id);
    let checked = check_file(&sandbox, file, &settings)
        .map_err(|error| error.to_string())
        .and_then(|report| {
            wiring::check_roles(&config, &report.id, &report.roles).map(|()| report)
        });
    let mut out = std::io::stdout().lock();
    match &checked {
        Ok(report) if json => writeln!(out, "{}", report_json(file, report))?,
        Ok(report) => tell_report(&mut out, file, report)?,
        Err(error) if json => {
            let path = file.display().to_string();
            let value = serde_json::json!({ "file": path, "good": false, "error": error });
            writeln!(out, "{value}")?;
        }
        Err(error) => writeln!(out, "{}: bad\n  {error}", file.display())?,
    }
    Ok(checked.map_or(EXIT_NO, |_| EXIT_DONE))
}

fn roles(report: &CheckReport) -> Vec<String> {
    let roles = report.roles.iter();
    roles
        .map(|served| format!("{}@{}", served.role, served.version))
        .collect()
}

fn report_json(file: &Path, report: &CheckReport) -> serde_json::Value {
    serde_json::json!({
        "file": file.display().to_string(), "good": true, "id": report.id,
        "revision": report.revision, "roles": roles(report), "imports": report.imports,
        "routes": report.routes, "bytes": report.bytes, "compile_ms": report.compile_ms,
        "wrapped_core_module": report.wrapped, "name": report.info.name,
        "version": report.info.version, "description": report.info.description,
    })
}

fn tell_report(out: &mut impl Write, file: &Path, report: &CheckReport) -> std::io::Result<()> {
    let info = &report.info;
    writeln!(out, "{}: good", file.display())?;
    writeln!(
        out,
        "  {} {}: {}",
        info.name, info.version, info.description
    )?;
    writeln!(out, "  roles     {}", roles(report).join(", "))?;
    writeln!(out, "  imports   {}", report.imports.join(", "))?;
    if !report.routes.is_empty() {
        writeln!(out, "  routes    {}", report.routes.join(", "))?;
    }
    writeln!(out, "  revision  {}", report.revision)?;
    let wrapped = match report.wrapped {
        true => ", wrapped from a core module",
        false => "",
    };
    writeln!(
        out,
        "  size      {} bytes, compiled in {} ms{wrapped}",
        report.bytes, report.compile_ms
    )?;
    writeln!(out, "  would be  plugin `{}`", report.id)
}

/// What a server started here would load.
pub(super) struct Loaded {
    registry: Arc<Registry>,
    folder: PluginFolder,
    /// Why the routes do not like it.
    problem: Option<String>,
}

impl Loaded {
    /// Everything that is wrong with it.
    pub(super) fn problems(self) -> Vec<String> {
        let files = self.folder.status().last_errors.into_iter();
        let files = files.map(|error| format!("{}: {}", error.path.display(), error.message));
        self.problem.into_iter().chain(files).collect()
    }
}

/// Tables of the configuration that are about no plugin there is, whether it loads or not: nobody reads them, so a name is mistaken or
/// a file missing.
pub(super) fn strangers(config: &Config) -> Vec<Issue> {
    let folder = &config.plugins.folder;
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = files.map(|entry| entry.path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "wasm"));
    let files = files.filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()));
    let shipped = shipped::plugins().into_iter();
    let shipped = shipped.map(|shipped| shipped.id.to_owned());
    let ids: BTreeSet<String> = shipped.chain(files).collect();
    let list = ids.iter().map(String::as_str).collect::<Vec<_>>();
    let allowed = format!("the id of a plugin there is: {}", list.join(", "));
    let strange = config.plugins.by_id.keys().filter(|id| !ids.contains(*id));
    let issue = |id| {
        let message = format!(
            "no plugin `{id}` is in {} or in the binary",
            folder.display()
        );
        Issue::at_key(format!("plugins.{id}"), message, &allowed)
    };
    strange.map(issue).collect()
}

/// Loads what a server with this configuration would load.
///
/// # Errors
/// What keeps the server from starting: a shipped plugin that refuses its settings.
pub(super) fn load(config: &Arc<Config>) -> Result<Loaded, Failure> {
    let refused = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&refused);
    let routes = Arc::clone(config);
    let options = FolderOptions {
        folder: config.plugins.folder.clone(),
        poll: Duration::ZERO,
        shipped: shipped::plugins(),
        settings: wiring::settings_for(Arc::clone(config)),
        // The set is told of even when the routes do not like it; why they do not is told too.
        on_change: Box::new(move |set| {
            let problem = wiring::check_routes(&routes, set).err();
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = problem;
            Ok(())
        }),
    };
    let registry = Arc::new(Registry::new());
    let folder = PluginFolder::watch(sandbox(config)?, Arc::clone(&registry), options)
        .map_err(Failure::start)?;
    // A second look: a file counts as written once two looks agree.
    folder.scan();
    let problem = refused
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    Ok(Loaded {
        registry,
        folder,
        problem,
    })
}

/// Says what came of every file that a server started here would load.
pub(super) fn list(json: bool, overrides: &Overrides) -> Result<u8, Failure> {
    let config = Arc::new(load_config(overrides, None)?.0);
    let Loaded {
        registry,
        folder,
        problem,
    } = load(&config)?;
    let rows = rows(&config, &registry.current(), &folder);
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(
            out,
            "{}",
            serde_json::json!({ "plugins": rows, "routes_problem": problem })
        )?;
    } else {
        for row in &rows {
            writeln!(out, "{}", row.line())?;
        }
        if let Some(problem) = &problem {
            writeln!(out, "routes: {problem}")?;
        }
    }
    let good = problem.is_none() && rows.iter().all(|row| row.state != "bad");
    Ok(if good { EXIT_DONE } else { EXIT_NO })
}

#[derive(serde::Serialize)]
struct Row {
    id: String,
    /// `shipped`, `file`, `overrides shipped` or `bad`.
    state: &'static str,
    roles: Vec<String>,
    revision: String,
    path: Option<String>,
    /// Prefixes of the routes that use it.
    routes: Vec<String>,
    error: Option<String>,
}

fn rows(config: &Config, set: &PluginSet, folder: &PluginFolder) -> Vec<Row> {
    let mut rows: Vec<Row> = set
        .plugins
        .values()
        .map(|plugin| good_row(config, plugin))
        .collect();
    rows.extend(folder.status().last_errors.into_iter().map(|error| Row {
        id: error.id,
        state: "bad",
        roles: Vec::new(),
        revision: String::new(),
        path: Some(error.path.display().to_string()),
        routes: Vec::new(),
        error: Some(error.message),
    }));
    rows
}

fn good_row(config: &Config, plugin: &Plugin) -> Row {
    let id = plugin.id();
    let is_shipped = shipped::plugins().iter().any(|shipped| shipped.id == id);
    let (state, path) = match plugin.origin() {
        Origin::Shipped => ("shipped", None),
        Origin::File(path) if is_shipped => ("overrides shipped", Some(path)),
        Origin::File(path) => ("file", Some(path)),
    };
    let names = |route: &&RouteConfig| wiring::named(route).any(|(named, _)| named == id);
    let uses = config.routes.iter().filter(names);
    Row {
        id: id.to_owned(),
        state,
        roles: plugin
            .roles()
            .iter()
            .map(|served| served.role.to_string())
            .collect(),
        revision: plugin.revision_short().to_owned(),
        path: path.map(|path| path.display().to_string()),
        routes: uses.map(|route| route.prefix.clone()).collect(),
        error: None,
    }
}

impl Row {
    fn line(&self) -> String {
        let path = self.path.as_deref().unwrap_or("(inside the binary)");
        if let Some(error) = &self.error {
            return format!("{:<16} BAD: {error}\n{:<16} {path}", self.id, "");
        }
        let used = if self.routes.is_empty() {
            "unused".to_owned()
        } else {
            self.routes.join(", ")
        };
        let (id, state, revision, roles) =
            (&self.id, self.state, &self.revision, self.roles.join("+"));
        format!("{id:<16} {roles:<16} {state:<18} {revision:<13} {used:<10} {path}")
    }
}

/// A sandbox of its own, with a sample model for trial runs: no weights are needed to check a file.
fn sandbox(config: &Config) -> Result<Sandbox, Failure> {
    Sandbox::new(wiring::sandbox_options(config), Arc::new(SampleModel)).map_err(Failure::start)
}
