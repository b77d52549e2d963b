//! Caches weighed in bytes. Index and values stay here; lookups and insertions call nobody.
//!
//! A [`CacheStrategy`] is told what happens in batches, from a thread of the cache's own, and names
//! victims ahead of need. Whatever it does not say, says late or says wrong, the native algorithm
//! of its plan decides. **Invariant:** the bytes held never exceed the capacity.

mod index;
mod maintenance;
mod order;
mod strategy;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use maintenance::{Clock, Core};
use sha2::{Digest as _, Sha256};
pub use strategy::{
    Access, Algorithm, CacheEntry, CacheEvent, CacheStrategy, Extensions, Interests, Lookup,
    Native, Plan, RemovalCause, Scoping, Tier,
};

/// Who shares with whom: the SHA-256 of a scope's name. Kept whole, because a shorter hash could
/// be made to collide with somebody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scope([u8; 32]);

impl Scope {
    /// The scope of that name; the empty name is the public one.
    pub fn named(name: &str) -> Self {
        Self(Sha256::digest(name.as_bytes()).into())
    }

    /// First 64 bits, for strategies and logs.
    pub fn label(&self) -> u64 {
        label(&self.0)
    }
}

/// What a value is found by: the scope, and 256 bits over everything the value depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheKey {
    /// Who may find it.
    pub scope: Scope,
    /// SHA-256 over what it was made from.
    pub digest: [u8; 32],
}

impl CacheKey {
    /// A key in the scope of that name.
    pub fn new(scope: &str, digest: [u8; 32]) -> Self {
        Self {
            scope: Scope::named(scope),
            digest,
        }
    }

    fn label(&self) -> u64 {
        label(&self.digest) ^ self.scope.label()
    }
}

fn label(bytes: &[u8; 32]) -> u64 {
    let (first, _) = bytes.split_first_chunk().expect("32 bytes have 8");
    u64::from_le_bytes(*first)
}

/// What is known of a value that is to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewEntry {
    /// Memory it takes, in bytes.
    pub bytes: u64,
    /// Microseconds that making it took.
    pub cost_us: u64,
    /// Tokens it stands for.
    pub tokens: u32,
    /// How long it lives; `None` leaves that to the plan.
    pub ttl: Option<Duration>,
    /// Weight in percent; 100 is neutral.
    pub weight: u32,
}

/// Figures of one cache, since it was made and of this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStats {
    /// Which cache.
    pub tier: Tier,
    /// Most bytes held.
    pub capacity_bytes: u64,
    /// Bytes held now.
    pub used_bytes: u64,
    /// Entries held now.
    pub entries: u64,
    /// Lookups that found something.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Entries stored.
    pub inserted: u64,
    /// Entries removed to make room or because the strategy did not want them.
    pub evicted: u64,
    /// Those of the evicted that the strategy named.
    pub evicted_by_strategy: u64,
    /// Entries whose time was over.
    pub expired: u64,
    /// Entries whose key was stored again.
    pub replaced: u64,
    /// Entries that became wrong.
    pub invalidated: u64,
    /// Values too large to be stored.
    pub refused: u64,
    /// Microseconds of work that hits saved.
    pub saved_us: u64,
    /// Events the strategy was not told of, because it was slow.
    pub events_dropped: u64,
    /// Answers of the strategy that could not be used.
    pub strategy_faults: u64,
}

impl CacheStats {
    fn new(tier: Tier, capacity_bytes: u64) -> Self {
        Self {
            tier,
            capacity_bytes,
            used_bytes: 0,
            entries: 0,
            hits: 0,
            misses: 0,
            inserted: 0,
            evicted: 0,
            evicted_by_strategy: 0,
            expired: 0,
            replaced: 0,
            invalidated: 0,
            refused: 0,
            saved_us: 0,
            events_dropped: 0,
            strategy_faults: 0,
        }
    }
}

/// A cache of values of one kind, at most so many bytes of them. Least recently used goes first
/// until a strategy says otherwise. Shared by reference; every call takes one short lock.
pub struct Cache<V> {
    core: Arc<Core<V>>,
}

impl<V: Send + Sync + 'static> Cache<V> {
    /// An empty cache; a capacity of 0 bytes keeps nothing.
    pub fn new(tier: Tier, capacity_bytes: u64) -> Self {
        Self::with_clock(tier, capacity_bytes, Box::new(Instant::now))
    }

    fn with_clock(tier: Tier, capacity_bytes: u64, clock: Clock) -> Self {
        let core = Arc::new(Core::new(tier, capacity_bytes, clock));
        let thread = std::thread::Builder::new().name(format!("cache-{}", tier.as_str()));
        let shared = Arc::clone(&core);
        if let Err(error) = thread.spawn(move || shared.run()) {
            // The cache works without: native order, expiry at lookup.
            tracing::warn!(tier = tier.as_str(), %error, "no maintenance thread for a cache");
        }
        Self { core }
    }

    /// The value of a key, if it is there and its time is not over.
    pub fn get(&self, key: &CacheKey) -> Option<Arc<V>> {
        let now = (self.core.clock)();
        self.core
            .with(|state| match state.index.stats.capacity_bytes {
                0 => None,
                _ => state.index.get(key, now),
            })
    }

    /// The value of a key, as if nobody had asked.
    pub fn peek(&self, key: &CacheKey) -> Option<Arc<V>> {
        let now = (self.core.clock)();
        self.core.with(|state| state.index.peek(key, now))
    }

    /// Makes a value one that was just used, without counting a hit.
    pub fn touch(&self, key: &CacheKey) {
        self.core.with(|state| state.index.touch(key));
    }

    /// Removes the value of a key that a newer one stands for.
    pub fn remove(&self, key: &CacheKey) {
        self.core.with(|state| state.index.replace(key));
    }

    /// Removes the first value in the order of eviction that is `wanted` elsewhere. Where other threads still drop removed ones,
    /// it waits for these instead. False when there is neither.
    pub fn evict(&self, wanted: impl Fn(&V) -> bool) -> bool {
        let evicted = self.core.with(|state| match state.freeing {
            0 => Some(state.index.evict_one(wanted)),
            _ => None,
        });
        evicted.unwrap_or_else(|| {
            drop(self.core.lock_freed());
            true
        })
    }

    /// How many values are `wanted`, at a moment when nobody drops removed ones.
    pub fn count(&self, wanted: impl Fn(&V) -> bool) -> usize {
        self.core.lock_freed().index.count(wanted)
    }

    /// Stores a value, in place of an older one of that key, and makes room for it. False when it
    /// is too large for the cache or for the strategy's plan.
    pub fn insert(&self, key: CacheKey, value: Arc<V>, entry: &NewEntry) -> bool {
        let now = (self.core.clock)();
        let stored = self
            .core
            .with(|state| match state.index.stats.capacity_bytes {
                0 => false,
                _ => {
                    state.starved = false;
                    state.index.insert(key, value, entry, now)
                }
            });
        self.core.nudge();
        stored
    }

    /// Removes everything, as wrong.
    pub fn invalidate_all(&self) {
        self.core.with(|state| state.index.remove_all());
    }

    /// Another capacity in bytes; what no longer fits goes at once.
    pub fn resize(&self, capacity_bytes: u64) {
        self.core.with(|state| {
            state.index.resize(capacity_bytes);
            state.replan = state.strategy.is_some();
        });
    }

    /// Another strategy, or the native LRU. It is asked for its plan and told what is there by the
    /// maintenance thread, soon.
    pub fn set_strategy(&self, strategy: Option<Arc<dyn CacheStrategy>>) {
        let old = self.core.with(|state| {
            state.replan = true;
            std::mem::replace(&mut state.strategy, strategy)
        });
        // Ending a strategy may take a while; not under the lock.
        drop(old);
    }

    /// Figures of this moment.
    pub fn stats(&self) -> CacheStats {
        self.core.lock().index.stats
    }

    /// Waits until the strategy has been told everything and its answers are in use. False when
    /// that took longer than `timeout`.
    pub fn settle(&self, timeout: Duration) -> bool {
        self.core.settle(timeout)
    }
}

impl<V> Drop for Cache<V> {
    fn drop(&mut self) {
        self.core.with(|state| state.closed = true);
    }
}
