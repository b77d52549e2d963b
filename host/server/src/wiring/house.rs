//! The house: everything one server shares between requests, and how it changes while it runs.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use visor_engine::{
    Cache, CacheBytes, CacheStrategy, Caches, CheckpointLoader, Engine, EngineOptions, EngineState,
    Model, ModelLoader, Native, PrefixBlock,
};
use visor_model::image::PixelValues;
use visor_model::{Checkpoint, ImageFeatures, KvBlock, LoadProgress};
use visor_sandbox::{FileError, FolderOptions, PluginFolder, PluginSet, Registry, Sandbox};

use super::load::Load;
use super::reload::{ConfigSource, ConfigWatcher};
use super::{
    Pinned, WiredRoute, Wiring, open_checkpoint, quantized_cache, sandbox_options, served_facts,
    settings_for, shipped, wire,
};
use crate::config::change::{Change, keep_restart_keys, opens_to_all};
use crate::config::check::check;
use crate::config::{CacheConfig, Config, ConfigError};
use crate::formats::Formats;
use crate::images::budget::Budget;
use crate::images::fetch::Fetcher;
use crate::metrics::Metrics;
use crate::pipeline::Answer;
use crate::services::{ServedModel, Services};
use crate::stats::ReloadState;
use crate::telemetry::Telemetry;

/// Between two looks at a model that loads.
const READY_LOOK: Duration = Duration::from_millis(200);

/// What a house needs besides its configuration.
pub struct HouseOptions {
    /// Watched for changes; none watches nothing, as a command that asks once needs.
    pub source: Option<ConfigSource>,
    /// Where this program may keep what can be made again; needed by `model.quantization` without a folder of its own.
    pub cache_folder: Option<PathBuf>,
    /// Told how far the model is loaded, on the engine's thread.
    pub progress: Box<dyn Fn(LoadProgress) + Send>,
}

/// Everything one server shares between requests.
pub struct House {
    /// Where generations go.
    pub engine: Engine,
    /// Compiles what answers are held to.
    pub formats: Formats,
    /// The model's names, facts and tokenizer.
    pub model: Arc<ServedModel>,
    /// Preprocessed pixels.
    pub pixels: Arc<Cache<PixelValues>>,
    /// Whole answers.
    pub responses: Arc<Cache<Answer>>,
    /// Memory for decoded pictures.
    pub decoding: Budget,
    /// Memory for crops, from when they are made until nobody answers about them any more.
    pub crops: Budget,
    /// Memory for what image operations hold while they run.
    pub canvases: Budget,
    /// The way to pictures that only have an address.
    pub fetcher: Fetcher,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Who else is told of requests.
    pub telemetry: Option<Telemetry>,
    pub(super) current: Arc<Current>,
    pub(super) sandbox: Sandbox,
    pub(super) folder: PluginFolder,
    draining: AtomicBool,
    /// Asked not to be given new work, by whoever runs the server.
    aside: AtomicBool,
    pub(super) started: Instant,
    pub(super) reloads: Mutex<ReloadState>,
    load: Arc<Load>,
    source: Option<ConfigSource>,
}

/// The wiring in force and what a swap touches. Shared with the plugin folder's thread.
pub(super) struct Current {
    wiring: ArcSwapOption<Wiring>,
    pub(super) caches: Caches<ImageFeatures, PrefixBlock<KvBlock>, Answer>,
    /// The configuration whose plugin settings were asked for last: a plugin set that arrives was
    /// loaded with those, so it is wired with that configuration.
    asked: Mutex<Arc<Config>>,
    /// Held while a wiring is built and stored.
    swapping: Mutex<()>,
    /// Reads the configuration file, and again what was refused when plugins change.
    watcher: Mutex<Option<ConfigWatcher>>,
}

impl House {
    /// Opens everything; the model goes on loading on the engine's thread.
    ///
    /// # Errors
    /// A device this build has nothing for, a checkpoint that cannot be read, a sandbox that does not start, routes without plugins.
    pub fn open(config: Config, options: HouseOptions) -> anyhow::Result<Arc<Self>> {
        config.model.device.check_built()?;
        let checkpoint = Arc::new(open_checkpoint(&config)?);
        let load = Arc::new(Load::default());
        let loader = CheckpointLoader::new(Arc::clone(&checkpoint), config.model.activations, {
            let (load, shown) = (Arc::clone(&load), options.progress);
            move |progress| {
                shown(progress);
                load.note(progress)
            }
        })
        .quantized(quantized_cache(&config, options.cache_folder.as_deref())?);
        let house = Self::assemble(config, &checkpoint, (loader, load), options.source.clone())?;
        if let Some(source) = options.source {
            house.watch(source)?;
        }
        Ok(house)
    }

    /// As [`Self::open`], where another model has the checkpoint's names and tokenizer: what
    /// everything but the model takes can be measured so.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with<L: ModelLoader>(
        config: Config,
        loader: impl FnOnce(&Checkpoint) -> L,
    ) -> anyhow::Result<Arc<Self>>
    where
        L::Model: Model<Features = ImageFeatures, Block = KvBlock>,
    {
        let checkpoint = open_checkpoint(&config)?;
        let loader = loader(&checkpoint);
        Self::assemble(config, &checkpoint, (loader, Arc::default()), None)
    }

    fn assemble<L: ModelLoader>(
        config: Config,
        checkpoint: &Checkpoint,
        (loader, load): (L, Arc<Load>),
        source: Option<ConfigSource>,
    ) -> anyhow::Result<Arc<Self>>
    where
        L::Model: Model<Features = ImageFeatures, Block = KvBlock>,
    {
        let started = Instant::now();
        let config = Arc::new(config);
        let facts = served_facts(&config, checkpoint)?;
        let model = Arc::new(ServedModel::new(checkpoint, facts, &config.model)?);
        let caches = Caches::new(cache_bytes(&config.cache));
        let current = Arc::new(Current {
            wiring: ArcSwapOption::empty(),
            caches: caches.clone(),
            asked: Mutex::new(Arc::clone(&config)),
            swapping: Mutex::new(()),
            watcher: Mutex::default(),
        });
        let sandbox = Sandbox::new(
            sandbox_options(&config),
            Arc::new(Services(Arc::clone(&model))),
        )?;
        let folder = open_folder(&config, &sandbox, &current)?;
        let tokenizer = Arc::clone(&model.tokenizer);
        let engine = Engine::start(loader, tokenizer, &caches, engine_options(&config, &model));
        Ok(Arc::new(Self {
            engine,
            metrics: Metrics::new(&model.id),
            telemetry: Telemetry::start(&config.telemetry)?,
            formats: Formats::new(Arc::clone(&model.tokenizer), model.stop_ids.clone()),
            model,
            pixels: caches.pixels,
            responses: caches.responses,
            decoding: Budget::new(config.images.decoded_mib_max << 20),
            crops: Budget::new(config.images.crops_mib_max << 20),
            canvases: Budget::new(config.images.canvases_mib_max << 20),
            fetcher: Fetcher::system(&config.images.fetch),
            current,
            sandbox,
            folder,
            draining: AtomicBool::new(false),
            aside: AtomicBool::new(false),
            source,
            started,
            reloads: Mutex::default(),
            load,
        }))
    }

    /// The wiring in force.
    #[must_use]
    pub fn wiring(&self) -> Arc<Wiring> {
        self.current.wiring()
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.wiring().config)
    }

    /// The route of a path, pinned to one revision of everything; none when no prefix covers it.
    #[must_use]
    pub fn pin(&self, path: &str) -> Option<Pinned> {
        let wiring = self.wiring();
        let route = wiring.routes.iter().find(|route| route.covers(path))?;
        let strategy = route.strategy.clone();
        Some(Pinned {
            config: Arc::clone(&wiring.config),
            keys: Arc::clone(&wiring.keys),
            prefix: route.prefix.clone(),
            adapter: Arc::clone(&route.adapter),
            template: Arc::clone(&route.template),
            image_policy: Arc::clone(&route.image_policy),
            cache_plugin: strategy
                .as_ref()
                .map(|strategy| Arc::clone(strategy.plugin())),
            cache: strategy.map_or_else(
                || Arc::new(Native::default()) as _,
                |strategy| strategy as _,
            ),
            strangers: Arc::clone(&route.strangers),
            wiring_revision: wiring.revision,
        })
    }

    /// The full path at which some adapter serves `method` and `below` (a path below its prefix).
    #[must_use]
    pub fn find_path(&self, method: &str, below: &str) -> Option<String> {
        let serves = |route: &&WiredRoute| {
            route
                .adapter
                .routes()
                .iter()
                .any(|served| served.method == method && served.path == below)
        };
        let wiring = self.wiring();
        let route = wiring.routes.iter().find(serves)?;
        Some(format!("{}{below}", route.prefix.trim_end_matches('/')))
    }

    /// Whether requests can be served now.
    ///
    /// # Errors
    /// Why not.
    pub fn ready(&self) -> Result<(), String> {
        if self.draining.load(Relaxed) {
            return Err("the server is stopping".to_owned());
        }
        if self.aside.load(Relaxed) {
            return Err("the server was asked to step aside".to_owned());
        }
        match self.engine.state() {
            EngineState::Ready { .. } => Ok(()),
            EngineState::Loading => Err(self.load.told()),
            EngineState::Failed(reason) => Err(format!("the model cannot be used: {reason}")),
            EngineState::Stopped => Err("the engine has stopped".to_owned()),
        }
    }

    /// Waits until the model is loaded and warm.
    ///
    /// # Errors
    /// Why it will not be.
    pub fn wait_ready(&self) -> Result<(), String> {
        while matches!(self.engine.state(), EngineState::Loading) {
            self.engine.wait_ready(READY_LOOK);
        }
        self.ready()
    }

    /// Whether `/ready` says no although the server goes on serving, so that a balancer turns away
    /// before anything ends.
    pub fn step_aside(&self, aside: bool) {
        tracing::info!(aside, "asked to step aside, or back");
        self.aside.store(aside, Relaxed);
    }

    /// Empties every cache.
    pub fn forget(&self) {
        self.current.caches.invalidate_all();
        tracing::info!("the caches were emptied");
    }

    /// Reads the configuration and the plugin folder now; returns when what is there is in force or
    /// refused, which the reports tell.
    pub fn look_again(&self) {
        let take = || {
            let source = self.source.as_ref();
            source.is_some_and(|source| self.take_config(source.read()))
        };
        let may_fit_later = take();
        let revision = self.wiring().revision;
        self.folder.scan();
        if may_fit_later && self.wiring().revision != revision {
            take();
        }
    }

    /// From here on `/ready` says no; what is in flight goes on.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
    }

    /// Stops watching and computing. Sequences still running are given up.
    pub fn stop(&self) {
        self.drain();
        drop(self.current.watcher().take());
        self.load.stop();
        self.engine.stop(Duration::ZERO);
        if let Some(telemetry) = &self.telemetry {
            telemetry.stop();
        }
    }

    /// Whether the small model inside the binary is served.
    #[must_use]
    pub fn model_is_demo(&self) -> bool {
        self.model.facts.embedded
    }

    /// The device that computes, or where loading stands.
    #[must_use]
    pub fn device_name(&self) -> String {
        match self.engine.state() {
            EngineState::Ready { device } => device.to_string(),
            EngineState::Loading => "loading".to_owned(),
            EngineState::Failed(_) => "failed".to_owned(),
            EngineState::Stopped => "stopped".to_owned(),
        }
    }

    /// Files of the plugin folder that are not in use, and why.
    #[must_use]
    pub fn plugin_errors(&self) -> Vec<FileError> {
        self.folder.status().last_errors
    }

    fn watch(self: &Arc<Self>, source: ConfigSource) -> std::io::Result<()> {
        let poll = Duration::from_secs(self.config().plugins.poll_s);
        let house: Weak<Self> = Arc::downgrade(self);
        // Held from before it runs: plugins that change meanwhile wait for somebody to tell it to.
        let mut watcher = self.current.watcher();
        *watcher = Some(ConfigWatcher::start(source, poll, move |read| {
            house.upgrade().is_some_and(|house| house.take_config(read))
        })?);
        Ok(())
    }

    /// Applies what a changed file says, or says why not. True when it was refused and could fit other plugins.
    fn take_config(&self, read: Result<Config, ConfigError>) -> bool {
        let running = self.config();
        let mut may_fit_later = false;
        let outcome = read.map_err(|error| error.one_line()).and_then(|new| {
            let change = Change::between(&running, &new);
            if !change.live.is_empty() {
                let config = fitting(&running, keep_restart_keys(&running, &new))?;
                let applied = self.apply(Arc::new(config));
                may_fit_later = applied.is_err();
                applied?;
            }
            Ok(change)
        });
        let mut reloads = self.reloads.lock().unwrap_or_else(PoisonError::into_inner);
        reloads.note(outcome);
        may_fit_later
    }

    /// Puts a configuration in force: plugins that have other settings are loaded with them, then
    /// everything is swapped at once.
    ///
    /// # Errors
    /// Which plugin or route refused; then nothing has changed.
    pub fn apply(&self, config: Arc<Config>) -> Result<(), String> {
        let running = self.config();
        // Through the folder although no plugin may have other settings: the next file that changes there is wired with this
        // configuration then, and not with an older one.
        let applied = self.folder.apply(self.current.settings(config));
        if applied.is_err() {
            *self
                .current
                .asked
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = running;
        }
        applied.map_err(|error| error.to_string())
    }
}

/// What makes sense in a file need not do so together with values that stay until the next start.
fn fitting(running: &Config, applied: Config) -> Result<Config, String> {
    let issues = check(&applied).into_iter();
    let told = issues
        .chain(opens_to_all(running, &applied))
        .map(|issue| format!("{}: {}", issue.key, issue.message));
    match told.reduce(|all, one| format!("{all}; {one}")) {
        None => Ok(applied),
        Some(told) => Err(format!("until the next start, {told}")),
    }
}

fn engine_options(config: &Config, model: &ServedModel) -> EngineOptions {
    EngineOptions {
        devices: config.model.device.kinds(),
        queue_requests_max: config.server.queue_requests_max,
        queue_tokens_max: config.server.queue_tokens_max,
        context_tokens_max: model.context_tokens,
        sequences_max: config.model.sequences_max,
        kv_bytes: config.model.kv_cache_mib << 20,
        prefill_chunk_tokens: config.model.prefill_chunk_tokens,
        slice: Duration::from_millis(config.model.slice_ms),
        draft_tokens_max: config.model.draft_tokens_max,
        model_digest: model.facts.digest.clone(),
        ..EngineOptions::default()
    }
}

impl Current {
    fn wiring(&self) -> Arc<Wiring> {
        self.wiring
            .load_full()
            .expect("the first wiring is stored before a house exists")
    }

    fn watcher(&self) -> MutexGuard<'_, Option<ConfigWatcher>> {
        self.watcher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_watcher(&self) {
        if let Some(watcher) = &*self.watcher() {
            watcher.plugins_changed();
        }
    }

    /// Plugin settings of a configuration, noting that they were asked for.
    fn settings(self: &Arc<Self>, config: Arc<Config>) -> visor_sandbox::SettingsFor {
        let current = Arc::downgrade(self);
        let settings = settings_for(Arc::clone(&config));
        Arc::new(move |id| {
            if let Some(current) = current.upgrade() {
                *current.asked.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&config);
                let wiring = current.wiring.load_full();
                // A file is read, and no configuration tried. It may only load with settings that were refused without it.
                if wiring.is_some_and(|wiring| Arc::ptr_eq(&wiring.config, &config)) {
                    current.tell_watcher();
                }
            }
            settings(id)
        })
    }

    /// A new plugin set: wired with the configuration its settings came from.
    fn take_plugins(&self, plugins: &Arc<PluginSet>) -> Result<(), String> {
        let config = Arc::clone(&self.asked.lock().unwrap_or_else(PoisonError::into_inner));
        self.swap(&config, plugins)?;
        self.tell_watcher();
        Ok(())
    }

    /// Builds a wiring and puts it in force; on an error the old one stays.
    fn swap(&self, config: &Arc<Config>, plugins: &Arc<PluginSet>) -> Result<(), String> {
        let _one_at_a_time = self.swapping.lock().unwrap_or_else(PoisonError::into_inner);
        let previous = self.wiring.load_full();
        let wiring = Arc::new(wire(config, plugins, previous.as_deref())?);
        self.wiring.store(Some(Arc::clone(&wiring)));
        let steering = wiring.steering.clone();
        let same = |old: &Wiring| match (&old.steering, &steering) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (None, None) => true,
            _ => false,
        };
        if !previous.as_deref().is_some_and(same) {
            self.caches
                .set_strategy(steering.map(|steering| steering as Arc<dyn CacheStrategy>));
        }
        if previous.is_some_and(|previous| previous.config.cache != config.cache) {
            self.caches.resize(cache_bytes(&config.cache));
        }
        Ok(())
    }
}

fn open_folder(
    config: &Arc<Config>,
    sandbox: &Sandbox,
    current: &Arc<Current>,
) -> anyhow::Result<PluginFolder> {
    let taker = Arc::clone(current);
    let options = FolderOptions {
        folder: config.plugins.folder.clone(),
        poll: Duration::from_secs(config.plugins.poll_s),
        shipped: shipped::plugins(),
        settings: current.settings(Arc::clone(config)),
        on_change: Box::new(move |plugins| taker.take_plugins(plugins)),
    };
    Ok(PluginFolder::watch(
        sandbox.clone(),
        Arc::new(Registry::new()),
        options,
    )?)
}

fn cache_bytes(cache: &CacheConfig) -> CacheBytes {
    CacheBytes {
        pixels: cache.pixels_mib << 20,
        features: cache.features_mib << 20,
        responses: cache.responses_mib << 20,
        prefixes: cache.prefixes_mib << 20,
    }
}
