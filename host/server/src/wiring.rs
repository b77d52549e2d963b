//! Which plugins serve which prefix: configuration and plugin set made into one value, swapped at
//! once. A request takes the value when it is accepted and keeps it to its end.
//!
//! [`House`] holds the value and everything else a request needs; [`ConfigSource`] is where the
//! configuration comes from, now and after every change.

mod house;
mod load;
mod reload;
mod report;
pub mod shipped;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use visor_engine::CacheStrategy;
use visor_model::{
    Checkpoint, CheckpointFacts, ModelError, Quantization, QuantizeOptions, QuantizedCache,
    quantized_facts,
};
use visor_sandbox::{
    CallBudgets, LimitOverrides, Plugin, PluginSet, PluginSettings, Role, RoleLimits,
    SandboxOptions, ServedRole, SettingsFor,
};

use crate::config::check::GENERATIONS_PER_REQUEST_MAX;
use crate::config::sandbox::RoleView;
use crate::config::{Config, RouteConfig};
use crate::http::keys::KeyRing;
use crate::http::strangers::Strangers;
use crate::strategy::SandboxStrategy;

pub use house::{House, HouseOptions};
pub use reload::{ConfigSource, ConfigWatcher};

/// One consistent state of the server: a configuration, a plugin set, and the routes they make.
pub struct Wiring {
    /// Counts the swaps, from 1.
    pub revision: u64,
    /// The configuration in force.
    pub config: Arc<Config>,
    /// The plugins in service.
    pub plugins: Arc<PluginSet>,
    /// Longest prefix first.
    pub routes: Vec<WiredRoute>,
    /// Who may ask.
    pub keys: Arc<KeyRing>,
    /// The strategy that steers the caches: that of the first route in the configuration.
    pub steering: Option<Arc<SandboxStrategy>>,
    /// What `/openapi.json` answers; made for the first that asks, for it changes with the wiring only.
    pub described: OnceLock<Bytes>,
}

/// A prefix and the plugins that serve the paths below it.
pub struct WiredRoute {
    /// Path prefix.
    pub prefix: String,
    /// Speaks the dialect.
    pub adapter: Arc<Plugin>,
    /// Writes the prompt.
    pub template: Arc<Plugin>,
    /// Cuts the pictures.
    pub image_policy: Arc<Plugin>,
    /// Chooses scopes; none leaves it to the host.
    pub strategy: Option<Arc<SandboxStrategy>>,
    /// What the adapter tells those without a key.
    pub strangers: Arc<Strangers>,
}

impl WiredRoute {
    /// The plugins, in the order a request meets them.
    pub fn plugins(&self) -> impl Iterator<Item = &Arc<Plugin>> {
        let strategy = self.strategy.as_ref().map(|strategy| strategy.plugin());
        [&self.adapter, &self.image_policy, &self.template]
            .into_iter()
            .chain(strategy)
    }

    /// Whether `path` is the prefix or below it.
    #[must_use]
    pub fn covers(&self, path: &str) -> bool {
        let below = path.strip_prefix(self.prefix.trim_end_matches('/'));
        below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// What one request holds on to: one revision of everything.
#[derive(Clone)]
pub struct Pinned {
    /// The configuration in force when the request came.
    pub config: Arc<Config>,
    /// Who may ask.
    pub keys: Arc<KeyRing>,
    /// Prefix of the route that serves it.
    pub prefix: String,
    /// Speaks the dialect.
    pub adapter: Arc<Plugin>,
    /// Writes the prompt.
    pub template: Arc<Plugin>,
    /// Cuts the pictures.
    pub image_policy: Arc<Plugin>,
    /// Chooses the scope.
    pub cache: Arc<dyn CacheStrategy>,
    /// The plugin behind `cache`; none is the host itself.
    pub cache_plugin: Option<Arc<Plugin>>,
    /// What the adapter tells those without a key.
    pub strangers: Arc<Strangers>,
    /// Revision of the wiring.
    pub wiring_revision: u64,
}

/// Builds the routes of `config` from `plugins`. Strategies of `previous` go on living where their
/// plugin is the same, so that they keep what they learned.
///
/// # Errors
/// Which route names a plugin that is not there, does not serve the role, or does not start.
pub fn wire(
    config: &Arc<Config>,
    plugins: &Arc<PluginSet>,
    previous: Option<&Wiring>,
) -> Result<Wiring, String> {
    check_routes(config, plugins)?;
    let mut strategies: Vec<Arc<SandboxStrategy>> = Vec::new();
    let mut routes = Vec::new();
    for route in &config.routes {
        let strategy = match &route.cache_strategy {
            id if id.is_empty() => None,
            id => Some(strategy_of(
                &find(route, plugins, id, Role::CacheStrategy)?,
                &mut strategies,
                previous,
            )?),
        };
        routes.push(WiredRoute {
            prefix: route.prefix.clone(),
            adapter: find(route, plugins, &route.adapter, Role::Adapter)?,
            template: find(route, plugins, &route.template, Role::Template)?,
            image_policy: find(route, plugins, &route.image_policy, Role::ImagePolicy)?,
            strategy,
            strangers: Arc::default(),
        });
    }
    let steering = routes.first().and_then(|route| route.strategy.clone());
    routes.sort_by_key(|route| std::cmp::Reverse(route.prefix.len()));
    Ok(Wiring {
        revision: previous.map_or(0, |wiring| wiring.revision) + 1,
        config: Arc::clone(config),
        plugins: Arc::clone(plugins),
        routes,
        keys: Arc::new(KeyRing::new(
            &config.access,
            previous.map(|wiring| &*wiring.keys),
        )),
        steering,
        described: OnceLock::new(),
    })
}

/// Whether every route finds its plugins, without starting anything.
///
/// # Errors
/// The first route that does not, and what there is instead.
pub fn check_routes(config: &Config, plugins: &PluginSet) -> Result<(), String> {
    for route in &config.routes {
        for (id, role) in named(route) {
            find(route, plugins, id, role)?;
        }
    }
    Ok(())
}

/// The plugins that a route names, and for what; the host's own cache strategy has no name.
pub fn named(route: &RouteConfig) -> impl Iterator<Item = (&str, Role)> {
    let named = [
        (&route.adapter, Role::Adapter),
        (&route.template, Role::Template),
        (&route.image_policy, Role::ImagePolicy),
        (&route.cache_strategy, Role::CacheStrategy),
    ];
    let named = named.map(|(id, role)| (id.as_str(), role)).into_iter();
    named.filter(|(id, role)| !id.is_empty() || *role != Role::CacheStrategy)
}

/// Whether the routes could use a plugin under this id that serves these roles.
///
/// # Errors
/// The first route that names it for another.
pub fn check_roles(config: &Config, id: &str, roles: &[ServedRole]) -> Result<(), String> {
    for route in &config.routes {
        let wanted = named(route).filter(|(named, _)| *named == id);
        for (_, role) in wanted {
            if !roles.iter().any(|served| served.role == role) {
                let prefix = &route.prefix;
                return Err(format!(
                    "route {prefix} names `{id}` for its {role}, which this is not: under this name the server would not take it"
                ));
            }
        }
    }
    Ok(())
}

fn find(
    route: &RouteConfig,
    plugins: &PluginSet,
    id: &str,
    role: Role,
) -> Result<Arc<Plugin>, String> {
    let prefix = &route.prefix;
    let able = || {
        let able = plugins
            .plugins
            .values()
            .filter(|plugin| plugin.serves(role));
        let able: Vec<_> = able.map(|plugin| format!("`{}`", plugin.id())).collect();
        match able.is_empty() {
            true => "none".to_owned(),
            false => able.join(", "),
        }
    };
    match plugins.get(id) {
        Some(plugin) if plugin.serves(role) => Ok(Arc::clone(plugin)),
        Some(_) => Err(format!(
            "route {prefix}: plugin `{id}` is no {role}; these are: {}",
            able()
        )),
        None => Err(format!(
            "route {prefix}: no plugin `{id}`; for {role} there are: {}",
            able()
        )),
    }
}

fn strategy_of(
    plugin: &Arc<Plugin>,
    started: &mut Vec<Arc<SandboxStrategy>>,
    previous: Option<&Wiring>,
) -> Result<Arc<SandboxStrategy>, String> {
    let running = previous.into_iter().flat_map(|wiring| &wiring.routes);
    let running = running.filter_map(|route| route.strategy.as_ref());
    let same = |strategy: &&Arc<SandboxStrategy>| Arc::ptr_eq(strategy.plugin(), plugin);
    if let Some(strategy) = started.iter().chain(running).find(same) {
        return Ok(Arc::clone(strategy));
    }
    let strategy = SandboxStrategy::start(plugin).map_err(|fault| fault.to_string())?;
    let strategy = Arc::new(strategy);
    started.push(Arc::clone(&strategy));
    Ok(strategy)
}

/// The configured checkpoint, or the demo inside the binary.
///
/// # Errors
/// What is wrong with the folder.
pub fn open_checkpoint(config: &Config) -> Result<Checkpoint, ModelError> {
    let path = &config.model.path;
    if path.as_os_str().is_empty() {
        Checkpoint::embedded()
    } else {
        Checkpoint::open(path)
    }
}

/// What a client may be told of the weights: those that compute, which may have to be made first.
///
/// # Errors
/// Why they cannot be made.
pub fn served_facts(
    config: &Config,
    checkpoint: &Checkpoint,
) -> Result<CheckpointFacts, ModelError> {
    match config.model.quantization {
        Quantization::None => Ok(checkpoint.facts()),
        Quantization::Int4 => quantized_facts(checkpoint, &QuantizeOptions::default()),
    }
}

/// Where the INT4 form of a checkpoint is kept, when one is to be served. `cache_folder` is this program's in the user's.
///
/// # Errors
/// When there is no such folder and the configuration names none.
fn quantized_cache(
    config: &Config,
    cache_folder: Option<&Path>,
) -> anyhow::Result<Option<QuantizedCache>> {
    if config.model.quantization == Quantization::None {
        return Ok(None);
    }
    let named = Some(&config.model.quantized_folder).filter(|named| !named.as_os_str().is_empty());
    let folder = match (named, cache_folder) {
        (Some(named), _) => named.clone(),
        (None, Some(folder)) => folder.join("quantized"),
        (None, None) => anyhow::bail!(
            "no cache folder is known, HOME is not set; name a folder for quantized weights with model.quantized_folder"
        ),
    };
    Ok(Some(QuantizedCache {
        folder,
        options: QuantizeOptions::default(),
    }))
}

/// What the operator says about one plugin, in the sandbox's terms.
#[must_use]
pub fn plugin_settings(config: &Config, id: &str) -> PluginSettings {
    let limits = config.plugins.limits(id);
    let mib = |mib: u64| usize::try_from(mib << 20).unwrap_or(usize::MAX);
    let kib = |kib: u64| usize::try_from(kib << 10).unwrap_or(usize::MAX);
    PluginSettings {
        config_json: config.plugins.config_json(id),
        limits: LimitOverrides {
            call_ms: limits.call_ms,
            memory_bytes_max: limits.memory_mib_max.map(mib),
            hostcall_bytes_max: limits.hostcall_kib_max.map(kib),
            handles_max: limits.handles_max.map(|count| count as usize),
            log_lines_per_s: limits.log_lines_per_s,
        },
        store_buckets: config.plugins.stores(id),
    }
}

/// [`plugin_settings`] for the sandbox to ask.
#[must_use]
pub fn settings_for(config: Arc<Config>) -> SettingsFor {
    Arc::new(move |id| plugin_settings(&config, id))
}

/// `[sandbox]` in the sandbox's terms.
#[must_use]
pub fn sandbox_options(config: &Config) -> SandboxOptions {
    let sandbox = &config.sandbox;
    let [adapter, template, image_policy, cache_strategy] =
        sandbox.roles().map(|(_, limits)| role_limits(&limits));
    let calls = &sandbox.adapter.call_ms;
    let defaults = SandboxOptions::default();
    SandboxOptions {
        adapter,
        template,
        image_policy,
        cache_strategy,
        budgets: CallBudgets {
            start_ms: calls.start,
            advance_ms: calls.advance,
            keep_alive_ms: calls.keep_alive,
            render_error_ms: calls.render_error,
            render_ms: sandbox.template.call_ms.render,
            prepare_ms: sandbox.image_policy.call_ms.prepare,
            scope_ms: sandbox.cache_strategy.call_ms.scope,
            strategy_ms: sandbox.cache_strategy.call_ms.other,
            setup_ms: sandbox.setup_ms,
        },
        instances_max: sandbox.instances_max,
        instance_wait_ms: sandbox.instance_wait_ms,
        component_bytes_max: sandbox.component_mib_max << 20,
        // The pipeline holds the operator's own, live limits; these only have to be no lower.
        image_pixels_max: config.images.pixels_max.max(defaults.image_pixels_max),
        image_work_px_max: sandbox.image_work_mpx_max.saturating_mul(1_000_000),
        generations_max: GENERATIONS_PER_REQUEST_MAX,
        metric_series_max: sandbox.metric_series_max as usize,
        store_bytes_max: bytes(sandbox.store_mib_max << 20),
        store_entries_max: sandbox.store_entries_max as usize,
        ..defaults
    }
}

fn bytes(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn role_limits(limits: &RoleView) -> RoleLimits {
    RoleLimits {
        memory_bytes_max: bytes(limits.memory_mib_max << 20),
        table_elements_max: limits.table_elements_max as usize,
        hostcall_bytes_max: bytes(limits.hostcall_kib_max << 10),
        handles_max: limits.handles_max as usize,
        log_lines_per_s: limits.log_lines_per_s,
        log_line_bytes_max: limits.log_line_bytes_max as usize,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_limits_are_the_sandboxs_own() {
        let mut ours = sandbox_options(&Config::default());
        let theirs = SandboxOptions::default();
        // Bounded by a live key of another section.
        ours.generations_max = theirs.generations_max;
        assert_eq!(ours, theirs);
        let text = "[sandbox]\ninstance_wait_ms = 1\nmetric_series_max = 2\nstore_mib_max = 3\nstore_entries_max = 4\n";
        let config = Config::parse(text, Path::new("visor.toml")).unwrap();
        let ours = sandbox_options(&config);
        let theirs = SandboxOptions {
            instance_wait_ms: 1,
            metric_series_max: 2,
            store_bytes_max: 3 << 20,
            store_entries_max: 4,
            generations_max: ours.generations_max,
            ..theirs
        };
        assert_eq!(ours, theirs);
    }

    #[test]
    fn a_plugins_table_becomes_its_settings() {
        let text = "[plugins.hd]\nstores = [\"shared\"]\n[plugins.hd.config]\ndetail = \"low\"\n\
                    [plugins.hd.limits]\ncall_ms = 9\nmemory_mib_max = 2\n";
        let config = Config::parse(text, std::path::Path::new("visor.toml")).unwrap();
        let settings = plugin_settings(&config, "hd");
        assert_eq!(settings.config_json, "{\"detail\":\"low\"}");
        assert_eq!(settings.limits.call_ms, Some(9));
        assert_eq!(settings.limits.memory_bytes_max, Some(2 << 20));
        assert_eq!(settings.store_buckets, ["shared"]);
        assert_eq!(plugin_settings(&config, "other"), PluginSettings::default());
    }
}
