//! What a house tells about itself: `/metrics` and `/stats`.

use std::sync::PoisonError;

use serde_json::{Map, Value, json};
use visor_engine::CacheStats;
use visor_sandbox::{Origin, Plugin};

use super::House;
use crate::metrics::{CacheSample, EngineSample, PluginSample, ReloadSample, Sample};
use crate::stats::{self, Memory, ReloadState};

impl House {
    /// What `/metrics` answers.
    #[must_use]
    pub fn metrics_text(&self, openmetrics: bool) -> String {
        self.metrics.encode(self.sample(), openmetrics)
    }

    /// What `/stats` answers.
    #[must_use]
    pub fn stats_json(&self) -> Value {
        let wiring = self.wiring();
        let memory = Memory::now();
        let mut all = stats::requests_json(&self.metrics.totals());
        let rest = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_s": self.started.elapsed().as_secs_f64(),
            "ready": self.ready().is_ok(),
            "not_ready_because": self.ready().err(),
            "model": self.model_json(),
            "engine": self.engine_json(),
            "caches": self.caches_json(),
            "formats": self.formats_json(),
            "memory": { "resident_bytes": memory.resident_bytes, "peak_bytes": memory.peak_bytes },
            "wiring": { "revision": wiring.revision, "routes": stats::routes_json(&wiring) },
            "plugins": self.plugins_json(),
            "plugin_folder": stats::folder_json(&self.folder.status()),
            "plugin_instances": self.sandbox.instances(),
            "config": self.reload_state().to_json(),
        });
        if let (Some(all), Value::Object(rest)) = (all.as_object_mut(), rest) {
            all.extend(rest);
        }
        all
    }

    /// What the admin listener tells: what is in service, and what is not and why.
    #[must_use]
    pub fn admin_json(&self) -> Value {
        let wiring = self.wiring();
        json!({
            "wiring": { "revision": wiring.revision, "routes": stats::routes_json(&wiring) },
            "plugins": self.plugins_json(),
            "plugin_folder": stats::folder_json(&self.folder.status()),
            "config": self.reload_state().to_json(),
            "caches": self.caches_json(),
        })
    }

    fn sample(&self) -> Sample {
        let folder = self.folder.status();
        let config = self.reload_state();
        let reload = |what, applied, refused| ReloadSample {
            what,
            applied,
            refused,
        };
        let plugins = &self.wiring().plugins.plugins;
        Sample {
            engine: self.engine_sample(),
            caches: self.cache_samples(),
            plugins: plugins
                .values()
                .map(|plugin| plugin_sample(plugin))
                .collect(),
            calls: self.sandbox.stats(),
            instances: self.sandbox.instances().into(),
            reloads: vec![
                reload("config", config.applied, config.refused),
                reload("plugins", folder.reloads, folder.failures),
            ],
            resident_bytes: Memory::now().resident_bytes.unwrap_or(0),
            uptime_s: self.started.elapsed().as_secs_f64(),
            guest: self.sandbox.metrics(),
        }
    }

    fn engine_sample(&self) -> EngineSample {
        let engine = self.engine.stats();
        EngineSample {
            ready: self.ready().is_ok(),
            running: engine.running,
            waiting: engine.waiting,
            kv_usage: stats::ratio(engine.kv_blocks_used, engine.kv_blocks_max),
            steps: engine.steps,
            step_sequences: engine.step_sequences,
            step_positions: engine.step_positions,
            drafted_tokens: engine.drafted_tokens,
            accepted_tokens: engine.accepted_tokens,
            step_sizes: engine.step_sizes,
            kv_blocks: engine.kv_blocks_used,
            kv_blocks_max: engine.kv_blocks_max,
            rejected: engine.rejected,
            preempted: engine.preempted,
            device_fallbacks: engine.device_fallbacks,
            aborted: engine.aborted,
            failed: engine.failed,
        }
    }

    fn cache_samples(&self) -> Vec<CacheSample> {
        let names = ["pixels", "features", "responses", "prefixes"];
        names
            .into_iter()
            .zip(self.current.caches.stats())
            .map(cache_sample)
            .collect()
    }

    fn reload_state(&self) -> ReloadState {
        self.reloads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn model_json(&self) -> Value {
        let model = &self.model;
        json!({
            "id": model.id,
            "aliases": model.aliases,
            "device": self.device_name(),
            "context_tokens": model.context_tokens,
            "bytes": model.facts.bytes,
            "quantization": model.facts.quantization,
            "digest": model.facts.digest,
            "demo": self.model_is_demo(),
        })
    }

    fn engine_json(&self) -> Value {
        let engine = self.engine.stats();
        json!({
            "waiting": engine.waiting,
            "waiting_tokens": engine.waiting_tokens,
            "running": engine.running,
            "running_tokens": engine.running_tokens,
            "kv_blocks": engine.kv_blocks_used,
            "kv_blocks_max": engine.kv_blocks_max,
            "kv_block_bytes": engine.kv_block_bytes,
            "cached_tokens": engine.cached_tokens,
            "steps": engine.steps,
            "step_sequences": engine.step_sequences,
            "step_positions": engine.step_positions,
            "drafted_tokens": engine.drafted_tokens,
            "accepted_tokens": engine.accepted_tokens,
            "step_sizes": stats::step_sizes_json(&engine.step_sizes),
            "preempted": engine.preempted,
            "submitted": engine.submitted,
            "finished": engine.finished,
            "aborted": engine.aborted,
            "failed": engine.failed,
            "rejected": engine.rejected,
            "device_fallbacks": engine.device_fallbacks,
            "model_panics": engine.model_panics,
        })
    }

    fn formats_json(&self) -> Value {
        let kept = self.formats.kept();
        json!({
            "compiled": self.formats.compiled(),
            "reused": kept.reused,
            "kept": kept.entries,
            "kept_bytes": kept.bytes,
        })
    }

    fn caches_json(&self) -> Map<String, Value> {
        let samples = self.cache_samples();
        samples
            .iter()
            .map(|cache| (cache.tier.to_owned(), stats::cache_json(cache)))
            .collect()
    }

    fn plugins_json(&self) -> Vec<Value> {
        let calls = self.sandbox.stats();
        let json = |plugin: &Plugin| {
            stats::plugin_json(plugin, calls.iter().find(|stats| stats.id == plugin.id()))
        };
        self.wiring()
            .plugins
            .plugins
            .values()
            .map(|plugin| json(plugin))
            .collect()
    }
}

fn plugin_sample(plugin: &Plugin) -> PluginSample {
    let roles: Vec<&str> = plugin
        .roles()
        .iter()
        .map(|served| served.role.interface())
        .collect();
    PluginSample {
        id: plugin.id().to_owned(),
        role: roles.join("+"),
        revision: plugin.revision_short().to_owned(),
        origin: if *plugin.origin() == Origin::Shipped {
            "shipped"
        } else {
            "file"
        },
    }
}

fn cache_sample((tier, stats): (&'static str, CacheStats)) -> CacheSample {
    CacheSample {
        tier,
        hits: stats.hits,
        misses: stats.misses,
        inserted: stats.inserted,
        evicted: stats.evicted,
        entries: stats.entries,
        bytes: stats.used_bytes,
        capacity_bytes: stats.capacity_bytes,
        saved_us: stats.saved_us,
        strategy_faults: stats.strategy_faults,
    }
}
