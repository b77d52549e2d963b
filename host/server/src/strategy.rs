//! The engine's cache strategy, played by a plugin: plain data across, and a safe answer when the
//! plugin fails.
//!
//! A failing strategy costs quality, never correctness: without a plan the host's own LRU runs the
//! tier, and without a scope the request shares with nobody. Public would be the kinder guess, and
//! the wrong one where a strategy keeps tenants apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use visor_engine as engine;
use visor_engine::CacheStrategy;
use visor_sandbox as sandbox;
use visor_sandbox::{Fault, Plugin, StrategyActor};

/// Between two log lines about faults of one strategy, in seconds.
const LOG_INTERVAL_S: u64 = 10;

/// A plan was given.
const PLANNED: u8 = 1;
/// A plan wants to be asked for scopes.
const WANTS_SCOPE: u8 = 2;

/// A cache strategy that lives in a plugin.
pub struct SandboxStrategy {
    plugin: Arc<Plugin>,
    actor: StrategyActor,
    /// [`PLANNED`] and [`WANTS_SCOPE`].
    plans: AtomicU8,
    started: Instant,
    /// Seconds after `started` before which no further fault is logged.
    quiet_until_s: AtomicU64,
}

impl SandboxStrategy {
    /// Starts the plugin's long-lived instance.
    ///
    /// # Errors
    /// The fault of the plugin, or of the system that gives no thread.
    pub fn start(plugin: &Arc<Plugin>) -> Result<Self, Fault> {
        Ok(Self {
            plugin: Arc::clone(plugin),
            actor: plugin.strategy()?,
            plans: AtomicU8::new(0),
            started: Instant::now(),
            quiet_until_s: AtomicU64::new(0),
        })
    }

    /// The plugin it lives in.
    #[must_use]
    pub fn plugin(&self) -> &Arc<Plugin> {
        &self.plugin
    }

    /// The answer, or what stands in for it; faults are logged now and then and counted always.
    fn or<T>(&self, answer: Result<T, Fault>, instead: impl FnOnce() -> T) -> T {
        answer.unwrap_or_else(|fault| {
            let now_s = self.started.elapsed().as_secs();
            let quiet_until_s = self.quiet_until_s.load(Relaxed);
            if now_s >= quiet_until_s {
                self.quiet_until_s.store(now_s + LOG_INTERVAL_S, Relaxed);
                tracing::warn!(%fault, "the cache strategy failed; the host decides instead");
            }
            instead()
        })
    }
}

impl CacheStrategy for SandboxStrategy {
    fn plan(&self, tier: engine::Tier, capacity_bytes: u64) -> engine::Plan {
        let plan = self.actor.plan(tier_out(tier), capacity_bytes).map(plan_in);
        let plan = self.or(plan, engine::Plan::default);
        let wants = if plan.interests.scope {
            PLANNED | WANTS_SCOPE
        } else {
            PLANNED
        };
        self.plans.fetch_or(wants, Relaxed);
        plan
    }

    fn scope(&self, lookup: &engine::Lookup) -> engine::Scoping {
        // Until a plan says otherwise it is asked.
        if self.plans.load(Relaxed) == PLANNED {
            return engine::Scoping::default();
        }
        self.or(
            self.actor.scope(lookup_out(lookup)).map(scoping_in),
            unshared,
        )
    }

    fn observe(&self, tier: engine::Tier, events: &[engine::CacheEvent], used_bytes: u64) {
        let events = events.iter().map(event_out).collect();
        self.or(
            self.actor.observe(tier_out(tier), events, used_bytes),
            || (),
        );
    }

    fn victims(&self, tier: engine::Tier, bytes: u64, at_most: u32) -> Vec<u64> {
        self.or(self.actor.victims(tier_out(tier), bytes, at_most), Vec::new)
    }

    fn admit(&self, tier: engine::Tier, candidates: &[engine::CacheEntry]) -> Vec<bool> {
        let entries = candidates.iter().map(entry_out).collect();
        self.or(self.actor.admit(tier_out(tier), entries), || {
            vec![true; candidates.len()]
        })
    }

    fn restarts(&self) -> u64 {
        self.actor.restarts()
    }
}

/// Shares with nobody: nothing is read, nothing is stored.
fn unshared() -> engine::Scoping {
    engine::Scoping {
        prefix: engine::Access::NONE,
        embedding: engine::Access::NONE,
        pixels: engine::Access::NONE,
        response: engine::Access::NONE,
        ..engine::Scoping::default()
    }
}

fn tier_out(tier: engine::Tier) -> sandbox::Tier {
    match tier {
        engine::Tier::Prefix => sandbox::Tier::Prefix,
        engine::Tier::Embedding => sandbox::Tier::Embedding,
        engine::Tier::Pixels => sandbox::Tier::Pixels,
        engine::Tier::Response => sandbox::Tier::Response,
    }
}

fn plan_in(plan: sandbox::StrategyPlan) -> engine::Plan {
    let interests = plan.interests;
    engine::Plan {
        base: match plan.base {
            sandbox::Algorithm::Lru => engine::Algorithm::Lru,
            sandbox::Algorithm::Lfu => engine::Algorithm::Lfu,
            sandbox::Algorithm::Fifo => engine::Algorithm::Fifo,
            sandbox::Algorithm::Sieve => engine::Algorithm::Sieve,
            sandbox::Algorithm::Gdsf => engine::Algorithm::Gdsf,
        },
        interests: engine::Interests {
            scope: interests.scope,
            inserts: interests.inserts,
            hits: interests.hits,
            misses: interests.misses,
            removals: interests.removals,
            victims: interests.victims,
            admission: interests.admission,
        },
        hit_sampling: plan.hit_sampling,
        ttl_s: plan.ttl_s,
        entry_permille_max: plan.entry_permille_max,
    }
}

fn lookup_out(lookup: &engine::Lookup) -> sandbox::Lookup {
    sandbox::Lookup {
        principal: lookup.principal.clone(),
        model: lookup.model.clone(),
        route: lookup.route.clone(),
        prompt_tokens: lookup.prompt_tokens,
        image_count: lookup.image_count,
        temperature: lookup.temperature,
        extensions: lookup.extensions.clone(),
    }
}

fn scoping_in(scoping: sandbox::Scoping) -> engine::Scoping {
    let access = |access: sandbox::Access| engine::Access {
        read: access.read,
        write: access.write,
    };
    engine::Scoping {
        scope: scoping.scope,
        prefix: access(scoping.prefix),
        embedding: access(scoping.embedding),
        pixels: access(scoping.pixels),
        response: access(scoping.response),
        ttl_s: scoping.ttl_s,
        weight: scoping.weight,
    }
}

fn entry_out(entry: &engine::CacheEntry) -> sandbox::CacheEntry {
    sandbox::CacheEntry {
        id: entry.id,
        tier: tier_out(entry.tier),
        scope: entry.scope,
        bytes: entry.bytes,
        cost_us: entry.cost_us,
        tokens: entry.tokens,
    }
}

fn event_out(event: &engine::CacheEvent) -> sandbox::CacheEvent {
    match *event {
        engine::CacheEvent::Inserted(entry) => sandbox::CacheEvent::Inserted(entry_out(&entry)),
        engine::CacheEvent::Hit { id, count } => sandbox::CacheEvent::Hit { id, count },
        engine::CacheEvent::Missed { tier, key } => sandbox::CacheEvent::Missed {
            tier: tier_out(tier),
            key,
        },
        engine::CacheEvent::Removed { id, cause } => sandbox::CacheEvent::Removed {
            id,
            cause: match cause {
                engine::RemovalCause::Evicted => sandbox::RemovalCause::Evicted,
                engine::RemovalCause::Expired => sandbox::RemovalCause::Expired,
                engine::RemovalCause::Replaced => sandbox::RemovalCause::Replaced,
                engine::RemovalCause::Invalidated => sandbox::RemovalCause::Invalidated,
            },
        },
    }
}
