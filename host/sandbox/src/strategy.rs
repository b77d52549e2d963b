//! Role cache strategy: plans, scopes and victims, as plain data.

use crate::chat::Extensions;

pub(crate) mod actor;
pub(crate) mod convert;
pub(crate) mod instance;

/// A cache of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// KV blocks of prompt prefixes.
    Prefix,
    /// Vision features.
    Embedding,
    /// Preprocessed pixels.
    Pixels,
    /// Whole answers.
    Response,
}

/// Native eviction algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Least recently used.
    Lru,
    /// Least frequently used.
    Lfu,
    /// First in, first out.
    Fifo,
    /// SIEVE.
    Sieve,
    /// GreedyDual-Size-Frequency.
    Gdsf,
}

/// What a strategy wants to be asked or told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interests {
    /// Asked for a scope.
    pub scope: bool,
    /// Told of insertions.
    pub inserts: bool,
    /// Told of hits.
    pub hits: bool,
    /// Told of misses.
    pub misses: bool,
    /// Told of removals.
    pub removals: bool,
    /// Asked for victims.
    pub victims: bool,
    /// Asked for admission.
    pub admission: bool,
}

/// How a strategy runs one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StrategyPlan {
    /// Used where it declines, is late, or fails.
    pub base: Algorithm,
    /// What it wants.
    pub interests: Interests,
    /// One of so many hits is reported; at least 1.
    pub hit_sampling: u32,
    /// Seconds an entry lives; none until evicted.
    pub ttl_s: Option<u32>,
    /// Largest entry in thousandths of the capacity; at most 1000.
    pub entry_permille_max: u32,
}

/// A cache entry, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheEntry {
    /// Its id.
    pub id: u64,
    /// Its cache.
    pub tier: Tier,
    /// Hash of the sharing scope.
    pub scope: u64,
    /// Size.
    pub bytes: u64,
    /// Microseconds that making it took.
    pub cost_us: u64,
    /// Tokens it stands for.
    pub tokens: u32,
}

/// Why an entry is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovalCause {
    /// For room.
    Evicted,
    /// Its time was over.
    Expired,
    /// A newer one took its key.
    Replaced,
    /// It became wrong.
    Invalidated,
}

/// What happened in a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// A new entry.
    Inserted(CacheEntry),
    /// Hits since the last report.
    Hit {
        /// Which entry.
        id: u64,
        /// How many.
        count: u32,
    },
    /// A key was not there.
    Missed {
        /// Where.
        tier: Tier,
        /// Hash of the key.
        key: u64,
    },
    /// An entry is gone.
    Removed {
        /// Which.
        id: u64,
        /// Why.
        cause: RemovalCause,
    },
}

/// The request a scope is chosen for.
#[derive(Clone, Debug, PartialEq)]
pub struct Lookup {
    /// Who is calling.
    pub principal: Option<String>,
    /// Model id.
    pub model: String,
    /// Route path.
    pub route: String,
    /// Prompt size.
    pub prompt_tokens: u32,
    /// Images.
    pub image_count: u32,
    /// Temperature.
    pub temperature: f32,
    /// Hints of the adapter.
    pub extensions: Extensions,
}

/// What a request may do with one tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Look up.
    pub read: bool,
    /// Store.
    pub write: bool,
}

/// Who shares with whom, for one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scoping {
    /// Entries are shared between equal scopes; empty is public.
    pub scope: String,
    /// Prefix tier.
    pub prefix: Access,
    /// Embedding tier.
    pub embedding: Access,
    /// Pixels tier.
    pub pixels: Access,
    /// Response tier.
    pub response: Access,
    /// Seconds, for what this request stores.
    pub ttl_s: Option<u32>,
    /// Weight of what it stores; 100 is neutral.
    pub weight: u32,
}
