//! What a cache strategy is: the trait and its plain data, word for word `wit/cache-strategy.wit`.

/// Key and value strings; unknown keys are ignored.
pub type Extensions = Vec<(String, String)>;

/// A cache of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// KV blocks of prompt prefixes.
    Prefix,
    /// Image features.
    Embedding,
    /// Preprocessed pixels.
    Pixels,
    /// Whole answers to identical requests.
    Response,
}

impl Tier {
    /// The word used in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefix => "prefix",
            Self::Embedding => "embedding",
            Self::Pixels => "pixels",
            Self::Response => "response",
        }
    }
}

/// Native eviction algorithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Algorithm {
    /// Least recently used.
    #[default]
    Lru,
    /// Least frequently used, the least recent of equals.
    Lfu,
    /// First in, first out.
    Fifo,
    /// First in, first out, but what was hit is passed over once.
    Sieve,
    /// GreedyDual-Size-Frequency: keeps what is dear to make and small to hold.
    Gdsf,
}

/// What a strategy wants to be asked or told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Used where the strategy declines, is late, or fails.
    pub base: Algorithm,
    /// What it wants.
    pub interests: Interests,
    /// One of so many hits is reported; 1 (and 0) reports all.
    pub hit_sampling: u32,
    /// Seconds an entry lives; `None` until it is evicted.
    pub ttl_s: Option<u32>,
    /// Largest entry in thousandths of the capacity.
    pub entry_permille_max: u32,
}

impl Default for Plan {
    /// The native algorithm alone.
    fn default() -> Self {
        Self {
            base: Algorithm::default(),
            interests: Interests::default(),
            hit_sampling: 1,
            ttl_s: None,
            entry_permille_max: 1000,
        }
    }
}

/// A cache entry, seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheEntry {
    /// Its id, never used twice.
    pub id: u64,
    /// Its cache.
    pub tier: Tier,
    /// First 64 bits of the scope's hash: a label, never compared by the host.
    pub scope: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Microseconds that making it took, scaled by the weight of the request that stored it.
    pub cost_us: u64,
    /// Tokens it stands for.
    pub tokens: u32,
}

/// Why an entry is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RemovalCause {
    /// For room, or because the strategy did not admit it.
    Evicted,
    /// Its time was over.
    Expired,
    /// A newer one took its key.
    Replaced,
    /// It became wrong.
    Invalidated,
}

/// What happened in a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        /// First 64 bits of the key.
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
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Lookup {
    /// Who is calling; `None` for anonymous.
    pub principal: Option<String>,
    /// Model id.
    pub model: String,
    /// Route path.
    pub route: String,
    /// Positions of the prompt.
    pub prompt_tokens: u32,
    /// Pictures of the request.
    pub image_count: u32,
    /// Temperature asked for.
    pub temperature: f32,
    /// Hints of the adapter.
    pub extensions: Extensions,
}

/// What a request may do with one tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    /// Look up.
    pub read: bool,
    /// Store.
    pub write: bool,
}

impl Access {
    /// Look up and store.
    pub const FULL: Self = Self {
        read: true,
        write: true,
    };
    /// Neither.
    pub const NONE: Self = Self {
        read: false,
        write: false,
    };
}

/// Who shares with whom, for one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scoping {
    /// Entries are shared between equal scopes only; empty is the public scope.
    pub scope: String,
    /// KV blocks.
    pub prefix: Access,
    /// Image features.
    pub embedding: Access,
    /// Pixels.
    pub pixels: Access,
    /// Whole answers.
    pub response: Access,
    /// Seconds, for what this request stores.
    pub ttl_s: Option<u32>,
    /// Weight of what this request stores; 100 is neutral.
    pub weight: u32,
}

impl Default for Scoping {
    /// The public scope, everything allowed.
    fn default() -> Self {
        Self {
            scope: String::new(),
            prefix: Access::FULL,
            embedding: Access::FULL,
            pixels: Access::FULL,
            response: Access::FULL,
            ttl_s: None,
            weight: 100,
        }
    }
}

/// Steers caches whose index and values stay with the host.
///
/// Everything but `scope` is called from a cache's own maintenance thread, in batches and off the
/// request path; calls of different tiers may overlap. Nothing waits for an answer: what is late,
/// empty or wrong (unknown ids, duplicates, a wrong number of answers, a panic) is replaced by the
/// native algorithm of the plan.
pub trait CacheStrategy: Send + Sync {
    /// How to run a tier of that many bytes; asked again when the capacity changes.
    fn plan(&self, tier: Tier, capacity_bytes: u64) -> Plan;

    /// Who shares with this request; asked once per request, before any lookup.
    fn scope(&self, _lookup: &Lookup) -> Scoping {
        Scoping::default()
    }

    /// What happened since the last call. Hits and misses may be dropped under load.
    fn observe(&self, _tier: Tier, _events: &[CacheEvent], _used_bytes: u64) {}

    /// Entries to remove next, best first, worth at least `bytes` if possible.
    fn victims(&self, _tier: Tier, _bytes: u64, _at_most: u32) -> Vec<u64> {
        Vec::new()
    }

    /// For each candidate, whether to keep it at all; asked after it was stored.
    fn admit(&self, _tier: Tier, candidates: &[CacheEntry]) -> Vec<bool> {
        vec![true; candidates.len()]
    }

    /// Grows when the strategy has forgotten what it was told, such as after a fault; the caches
    /// then ask for the plan and replay `Inserted` for what is there.
    fn restarts(&self) -> u64 {
        0
    }
}

/// One of the native algorithms, everything in the public scope.
#[derive(Debug, Clone, Copy, Default)]
pub struct Native(pub Algorithm);

impl CacheStrategy for Native {
    fn plan(&self, _tier: Tier, _capacity_bytes: u64) -> Plan {
        Plan {
            base: self.0,
            ..Plan::default()
        }
    }
}
