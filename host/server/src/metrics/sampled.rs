//! The metrics that other rooms count themselves: engine, caches, plugins, process. Their totals are
//! copied in at each scrape.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use visor_engine::STEP_SIZES;
use visor_sandbox::{FunctionStats, MetricsSnapshot, PluginStats};

use super::families::add;
use super::seconds;

/// A gauge of fractions and seconds.
type FloatGauge = Gauge<f64, AtomicU64>;
/// A counter of seconds.
type FloatCounter = Counter<f64, AtomicU64>;

/// What other rooms count, as of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// The engine's figures.
    pub engine: EngineSample,
    /// One per cache tier.
    pub caches: Vec<CacheSample>,
    /// One per plugin in service.
    pub plugins: Vec<PluginSample>,
    /// Calls of every plugin id that was ever in service.
    pub calls: Vec<PluginStats>,
    /// Plugin instances alive.
    pub instances: u64,
    /// Changed files.
    pub reloads: Vec<ReloadSample>,
    /// Resident memory of this process, in bytes; 0 when the system does not say.
    pub resident_bytes: u64,
    /// Seconds since the start.
    pub uptime_s: f64,
    /// What plugins keep themselves.
    pub guest: MetricsSnapshot,
}

/// The engine's figures.
#[derive(Clone, Debug, Default)]
pub struct EngineSample {
    /// Whether the model is loaded and warm.
    pub ready: bool,
    /// Sequences being computed.
    pub running: u64,
    /// Requests waiting for the model.
    pub waiting: u64,
    /// Share of the KV blocks that is in use, 0 to 1.
    pub kv_usage: f64,
    /// Steps of the model.
    pub steps: u64,
    /// Sequences in a step, summed over the steps.
    pub step_sequences: u64,
    /// Positions of a step, summed over the steps.
    pub step_positions: u64,
    /// Tokens that were drafted and run.
    pub drafted_tokens: u64,
    /// Those of them that came.
    pub accepted_tokens: u64,
    /// Steps by their sequences, as the engine counts them.
    pub step_sizes: [u64; STEP_SIZES.len()],
    /// KV blocks alive, those of cached prefixes included.
    pub kv_blocks: u64,
    /// KV blocks that can be.
    pub kv_blocks_max: u64,
    /// Requests the engine refused because its queue was full.
    pub rejected: u64,
    /// Sequences that gave up their KV blocks for others.
    pub preempted: u64,
    /// Times work was redone on the next device.
    pub device_fallbacks: u64,
    /// Sequences ended by cancellation.
    pub aborted: u64,
    /// Sequences that failed.
    pub failed: u64,
}

/// One cache tier.
#[derive(Clone, Debug, Default)]
pub struct CacheSample {
    /// `pixels`, `features`, `responses` or `prefixes`.
    pub tier: &'static str,
    /// Lookups that found something.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Entries stored.
    pub inserted: u64,
    /// Entries removed to make room.
    pub evicted: u64,
    /// Entries held.
    pub entries: u64,
    /// Bytes held.
    pub bytes: u64,
    /// Most bytes held.
    pub capacity_bytes: u64,
    /// Microseconds of work that hits saved.
    pub saved_us: u64,
    /// Answers of the strategy that could not be used.
    pub strategy_faults: u64,
}

/// Changed files, since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReloadSample {
    /// `config` or `plugins`.
    pub what: &'static str,
    /// Put in force.
    pub applied: u64,
    /// Refused.
    pub refused: u64,
}

/// One plugin in service.
#[derive(Clone, Debug, Default)]
pub struct PluginSample {
    /// Id: the file name without `.wasm`.
    pub id: String,
    /// `adapter`, `template`, `image-policy`, `cache-strategy`; several joined by `+`.
    pub role: String,
    /// First digits of the file's SHA-256.
    pub revision: String,
    /// `shipped` or `file`.
    pub origin: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReloadLabels {
    what: String,
    outcome: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CallLabels {
    plugin: String,
    role: String,
    function: String,
    outcome: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FunctionLabels {
    plugin: String,
    function: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PluginLabels {
    plugin: String,
    role: String,
    revision: String,
    origin: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct IdLabels {
    plugin: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TierLabels {
    tier: String,
}

/// Handles to the series below.
pub(super) struct Sampled {
    engine: EngineSeries,
    caches: CacheSeries,
    plugins: PluginSeries,
    reloads: Family<ReloadLabels, Counter>,
    resident: Gauge,
    uptime: FloatGauge,
}

struct EngineSeries {
    running: Gauge,
    waiting: Gauge,
    kv_usage: FloatGauge,
    steps: Counter,
    step_sequences: Counter,
    step_positions: Counter,
    drafted: Counter,
    accepted: Counter,
    kv_blocks: Gauge,
    kv_blocks_max: Gauge,
    rejected: Counter,
    preempted: Counter,
    ready: Gauge,
    fallbacks: Counter,
    aborted: Counter,
    failed: Counter,
}

struct CacheSeries {
    mm_queries: Counter,
    mm_hits: Counter,
    hits: Family<TierLabels, Counter>,
    misses: Family<TierLabels, Counter>,
    inserted: Family<TierLabels, Counter>,
    evicted: Family<TierLabels, Counter>,
    strategy_faults: Family<TierLabels, Counter>,
    saved: Family<TierLabels, FloatCounter>,
    entries: Family<TierLabels, Gauge>,
    bytes: Family<TierLabels, Gauge>,
    capacity: Family<TierLabels, Gauge>,
}

struct PluginSeries {
    calls: Family<CallLabels, Counter>,
    seconds: Family<FunctionLabels, FloatCounter>,
    log_dropped: Family<IdLabels, Counter>,
    instances: Gauge,
    info: Family<PluginLabels, Gauge>,
}

impl Sampled {
    pub(super) fn register(to: &mut Registry) -> Self {
        Self {
            engine: EngineSeries::register(to),
            caches: CacheSeries::register(to),
            plugins: PluginSeries::register(to),
            reloads: add(to, "visor_reloads", "Changed files applied or refused"),
            resident: add(to, "process_resident_memory_bytes", "Resident memory"),
            uptime: add(to, "visor_uptime_seconds", "Seconds since the start"),
        }
    }

    pub(super) fn take(&self, sample: &Sample) {
        self.engine.take(&sample.engine);
        for cache in &sample.caches {
            self.caches.take(cache);
        }
        self.plugins.take(sample);
        for reload in &sample.reloads {
            for (outcome, count) in [("applied", reload.applied), ("refused", reload.refused)] {
                let labels = ReloadLabels {
                    what: reload.what.to_owned(),
                    outcome: outcome.to_owned(),
                };
                mirror(&self.reloads.get_or_create(&labels), count);
            }
        }
        self.resident.set(signed(sample.resident_bytes));
        self.uptime.set(sample.uptime_s);
    }
}

impl EngineSeries {
    fn register(to: &mut Registry) -> Self {
        let kv_usage = "Share of the KV blocks in use, 0 to 1";
        Self {
            running: add(to, "vllm:num_requests_running", "Sequences being computed"),
            waiting: add(to, "vllm:num_requests_waiting", "Waiting for the model"),
            kv_usage: add(to, "vllm:kv_cache_usage_perc", kv_usage),
            steps: add(to, "visor_steps", "Steps of the model"),
            step_sequences: add(to, "visor_step_sequences", "Sequences in steps"),
            step_positions: add(to, "visor_step_positions", "Positions in steps"),
            drafted: add(
                to,
                "vllm:spec_decode_num_draft_tokens",
                "Tokens drafted and run",
            ),
            accepted: add(
                to,
                "vllm:spec_decode_num_accepted_tokens",
                "Drafted tokens that came",
            ),
            kv_blocks: add(to, "visor_kv_blocks", "KV blocks in use"),
            kv_blocks_max: add(to, "visor_kv_blocks_max", "KV blocks there can be"),
            rejected: add(to, "visor_sequences_rejected", "Refused, queue full"),
            preempted: add(
                to,
                "vllm:num_preemptions",
                "Sequences that gave up KV blocks",
            ),
            ready: add(to, "visor_ready", "1 once the model is loaded and warm"),
            fallbacks: add(to, "visor_device_fallbacks", "Work redone on a next device"),
            aborted: add(to, "visor_sequences_aborted", "Sequences cancelled"),
            failed: add(to, "visor_sequences_failed", "Sequences that failed"),
        }
    }

    fn take(&self, engine: &EngineSample) {
        self.running.set(signed(engine.running));
        self.waiting.set(signed(engine.waiting));
        self.kv_usage.set(engine.kv_usage);
        mirror(&self.steps, engine.steps);
        mirror(&self.step_sequences, engine.step_sequences);
        mirror(&self.step_positions, engine.step_positions);
        mirror(&self.drafted, engine.drafted_tokens);
        mirror(&self.accepted, engine.accepted_tokens);
        self.kv_blocks.set(signed(engine.kv_blocks));
        self.kv_blocks_max.set(signed(engine.kv_blocks_max));
        mirror(&self.rejected, engine.rejected);
        mirror(&self.preempted, engine.preempted);
        self.ready.set(i64::from(engine.ready));
        mirror(&self.fallbacks, engine.device_fallbacks);
        mirror(&self.aborted, engine.aborted);
        mirror(&self.failed, engine.failed);
    }
}

impl CacheSeries {
    fn register(to: &mut Registry) -> Self {
        Self {
            mm_queries: add(to, "vllm:mm_cache_queries", "Lookups of image features"),
            mm_hits: add(to, "vllm:mm_cache_hits", "Image features found"),
            hits: add(to, "visor_cache_hits", "Lookups that found an entry"),
            misses: add(to, "visor_cache_misses", "Lookups that found none"),
            inserted: add(to, "visor_cache_insertions", "Entries stored"),
            evicted: add(to, "visor_cache_evictions", "Entries removed for room"),
            strategy_faults: add(to, "visor_cache_strategy_faults", "Answers not usable"),
            saved: add(to, "visor_cache_saved_seconds", "Work that hits saved"),
            entries: add(to, "visor_cache_entries", "Entries held"),
            bytes: add(to, "visor_cache_bytes", "Bytes held"),
            capacity: add(to, "visor_cache_capacity_bytes", "Most bytes held"),
        }
    }

    fn take(&self, cache: &CacheSample) {
        let tier = TierLabels {
            tier: cache.tier.to_owned(),
        };
        let counts = [
            (&self.hits, cache.hits),
            (&self.misses, cache.misses),
            (&self.inserted, cache.inserted),
            (&self.evicted, cache.evicted),
            (&self.strategy_faults, cache.strategy_faults),
        ];
        for (family, count) in counts {
            mirror(&family.get_or_create(&tier), count);
        }
        let sizes = [
            (&self.entries, cache.entries),
            (&self.bytes, cache.bytes),
            (&self.capacity, cache.capacity_bytes),
        ];
        for (family, size) in sizes {
            family.get_or_create(&tier).set(signed(size));
        }
        mirror_us(&self.saved.get_or_create(&tier), cache.saved_us);
        if cache.tier == "features" {
            mirror(&self.mm_queries, cache.hits + cache.misses);
            mirror(&self.mm_hits, cache.hits);
        }
    }
}

impl PluginSeries {
    fn register(to: &mut Registry) -> Self {
        Self {
            calls: add(to, "visor_plugin_calls", "Calls into plugins"),
            seconds: add(to, "visor_plugin_seconds", "Time in plugins and for them"),
            log_dropped: add(to, "visor_plugin_log_dropped", "Log lines over the rate"),
            instances: add(to, "visor_plugin_instances", "Plugin instances alive"),
            info: add(to, "visor_plugin_info", "Plugins in service"),
        }
    }

    fn take(&self, sample: &Sample) {
        self.instances.set(signed(sample.instances));
        // Revisions come and go: the list is made anew each time.
        self.info.clear();
        for plugin in &sample.plugins {
            let labels = PluginLabels {
                plugin: plugin.id.clone(),
                role: plugin.role.clone(),
                revision: plugin.revision.clone(),
                origin: plugin.origin.to_owned(),
            };
            self.info.get_or_create(&labels).set(1);
        }
        for plugin in &sample.calls {
            let labels = IdLabels {
                plugin: plugin.id.clone(),
            };
            mirror(&self.log_dropped.get_or_create(&labels), plugin.log.dropped);
            for function in &plugin.functions {
                self.take_calls(&plugin.id, function);
            }
        }
    }

    fn take_calls(&self, id: &str, function: &FunctionStats) {
        let rows = [
            ("ok", function.ok),
            ("refused", function.refused),
            ("trap", function.trap),
            ("deadline", function.deadline),
            ("memory", function.memory),
            ("limit", function.limit),
            ("contract", function.contract),
            ("late", function.late),
        ];
        let name = function.function.as_str();
        for (outcome, count) in rows {
            // Faults that never happened make no series, but an answer's does at once.
            if count > 0 || outcome == "ok" {
                let labels = CallLabels {
                    plugin: id.to_owned(),
                    role: function.role.interface().to_owned(),
                    function: name.to_owned(),
                    outcome: outcome.to_owned(),
                };
                mirror(&self.calls.get_or_create(&labels), count);
            }
        }
        let labels = FunctionLabels {
            plugin: id.to_owned(),
            function: name.to_owned(),
        };
        mirror_us(&self.seconds.get_or_create(&labels), function.time_us);
    }
}

/// Stores a total that another room counts.
fn mirror(counter: &Counter, total: u64) {
    counter.inner().store(total, Relaxed);
}

/// As [`mirror`], for microseconds; the counter is in seconds.
fn mirror_us(counter: &FloatCounter, total_us: u64) {
    counter.inner().store(seconds(total_us).to_bits(), Relaxed);
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
