//! The sandbox: one engine, its limits, and what all plugins share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use wasmtime::Engine;
use wasmtime::component::Linker;

use crate::error::{LoadError, SandboxError};
use crate::faults::PluginStats;
use crate::guest::GuestState;
use crate::host::metrics::MetricsSnapshot;
use crate::host::store::{Bucket, BucketLimits};
use crate::linker;
use crate::load::{self, Compiler};
use crate::options::{PluginSettings, SandboxOptions};
use crate::plugin::{Kept, Origin, Plugin};
use crate::services::HostServices;
use crate::wasm_engine::{Slots, Ticker, build_engine};

/// Loads plugins. One per process; cheap to clone.
#[derive(Clone)]
pub struct Sandbox {
    shared: Arc<Shared>,
}

/// What all plugins share.
pub(crate) struct Shared {
    pub(crate) options: SandboxOptions,
    pub(crate) services: Arc<dyn HostServices>,
    pub(crate) wasm_engine: Engine,
    pub(crate) ticker: Ticker,
    pub(crate) slots: Arc<Slots>,
    pub(crate) own_linker: Linker<GuestState>,
    pub(crate) wasi_linker: Linker<GuestState>,
    pub(crate) compiler: Compiler,
    kept: Mutex<BTreeMap<String, Arc<Kept>>>,
    shared_buckets: Mutex<BTreeMap<String, Arc<Bucket>>>,
}

impl Sandbox {
    /// Starts the engine and its clock thread.
    ///
    /// # Errors
    /// When the engine or the thread cannot be started.
    pub fn new(
        options: SandboxOptions,
        services: Arc<dyn HostServices>,
    ) -> Result<Self, SandboxError> {
        let wasm_engine = build_engine(&options)?;
        let link = |error: wasmtime::Error| SandboxError::Start(format!("{error:#}"));
        let own_linker = linker::own_interfaces(&wasm_engine).map_err(link)?;
        let wasi_linker = linker::with_empty_wasi(&own_linker).map_err(link)?;
        let shared = Shared {
            ticker: Ticker::start(wasm_engine.clone())?,
            slots: Slots::new(options.instances_max),
            compiler: Compiler::default(),
            kept: Mutex::default(),
            shared_buckets: Mutex::default(),
            own_linker,
            wasi_linker,
            wasm_engine,
            services,
            options,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Checks, compiles, links and tries a plugin. Takes as long as compiling takes (0.2 s for
    /// 100 KB); one at a time; the same bytes are compiled once.
    ///
    /// # Errors
    /// Why the file cannot be used.
    pub fn load(
        &self,
        id: &str,
        bytes: &[u8],
        settings: &PluginSettings,
        origin: Origin,
    ) -> Result<Arc<Plugin>, LoadError> {
        let compiled = load::compile(&self.shared, bytes)?;
        load::admit(&self.shared, id, compiled, settings, origin)
    }

    /// The same file with other settings: only the trial is run again.
    ///
    /// # Errors
    /// Why the plugin does not take the settings.
    pub fn reconfigure(
        &self,
        plugin: &Plugin,
        settings: &PluginSettings,
    ) -> Result<Arc<Plugin>, LoadError> {
        let compiled = Arc::clone(plugin.compiled());
        load::admit(
            &self.shared,
            plugin.id(),
            compiled,
            settings,
            plugin.origin().clone(),
        )
    }

    /// The limits it runs under.
    #[must_use]
    pub fn options(&self) -> &SandboxOptions {
        &self.shared.options
    }

    /// Calls, faults and log lines of every plugin id that was ever loaded.
    #[must_use]
    pub fn stats(&self) -> Vec<PluginStats> {
        let kept = self
            .shared
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        kept.iter()
            .map(|(id, kept)| PluginStats {
                id: id.clone(),
                functions: kept.counters.functions(),
                log: kept.log.stats(),
            })
            .collect()
    }

    /// What plugins counted through the `metrics` import.
    #[must_use]
    pub fn metrics(&self) -> MetricsSnapshot {
        let mut snapshot = MetricsSnapshot::default();
        let kept = self
            .shared
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (id, kept) in kept.iter() {
            kept.series.read_into(id, &mut snapshot);
        }
        snapshot
    }

    /// Plugin instances alive now.
    #[must_use]
    pub fn instances(&self) -> u32 {
        self.shared.slots.used()
    }
}

impl Shared {
    /// What is kept for a plugin id, made when first asked for.
    pub(crate) fn kept(&self, id: &str) -> Arc<Kept> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let made = || Arc::new(Kept::new(self.bucket_limits()));
        Arc::clone(kept.entry(id.to_owned()).or_insert_with(made))
    }

    pub(crate) fn shared_bucket(&self, name: &str) -> Arc<Bucket> {
        let mut buckets = self
            .shared_buckets
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let made = || Arc::new(Bucket::new(self.bucket_limits()));
        Arc::clone(buckets.entry(name.to_owned()).or_insert_with(made))
    }

    pub(crate) fn bucket_limits(&self) -> BucketLimits {
        BucketLimits {
            bytes_max: self.options.store_bytes_max,
            entries_max: self.options.store_entries_max,
        }
    }
}
