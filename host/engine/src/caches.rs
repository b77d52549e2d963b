//! The caches of one server: pixels, features, prefixes, whole answers.

use std::sync::Arc;

use visor_model::image::PixelValues;

use crate::cache::{Cache, CacheStats, CacheStrategy, Tier};
use crate::request::Answer;

/// Capacities in bytes; 0 turns a cache off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheBytes {
    /// Preprocessed pixels.
    pub pixels: u64,
    /// Image features.
    pub features: u64,
    /// Whole answers.
    pub responses: u64,
    /// KV blocks of prompt prefixes.
    pub prefixes: u64,
}

/// The caches of one server. `F` is the model's features, `P` a block of a prefix, `R` what a whole answer is.
pub struct Caches<F, P, R = Answer> {
    /// Crops by source, recorded operations and normalisation.
    pub pixels: Arc<Cache<PixelValues>>,
    /// What the vision tower made of crops.
    pub features: Arc<Cache<F>>,
    /// Whole answers to identical requests.
    pub responses: Arc<Cache<R>>,
    /// KV blocks of prompt prefixes.
    pub prefixes: Arc<Cache<P>>,
}

impl<F, P, R> Clone for Caches<F, P, R> {
    fn clone(&self) -> Self {
        Self {
            pixels: Arc::clone(&self.pixels),
            features: Arc::clone(&self.features),
            responses: Arc::clone(&self.responses),
            prefixes: Arc::clone(&self.prefixes),
        }
    }
}

impl<F, P, R> Caches<F, P, R>
where
    F: Send + Sync + 'static,
    P: Send + Sync + 'static,
    R: Send + Sync + 'static,
{
    /// Empty caches.
    pub fn new(bytes: CacheBytes) -> Self {
        Self {
            pixels: Arc::new(Cache::new(Tier::Pixels, bytes.pixels)),
            features: Arc::new(Cache::new(Tier::Embedding, bytes.features)),
            responses: Arc::new(Cache::new(Tier::Response, bytes.responses)),
            prefixes: Arc::new(Cache::new(Tier::Prefix, bytes.prefixes)),
        }
    }

    /// Other capacities; what no longer fits goes at once.
    pub fn resize(&self, bytes: CacheBytes) {
        self.pixels.resize(bytes.pixels);
        self.features.resize(bytes.features);
        self.responses.resize(bytes.responses);
        self.prefixes.resize(bytes.prefixes);
    }

    /// One strategy for all of them, or the native LRU.
    pub fn set_strategy(&self, strategy: Option<Arc<dyn CacheStrategy>>) {
        self.pixels.set_strategy(strategy.clone());
        self.features.set_strategy(strategy.clone());
        self.responses.set_strategy(strategy.clone());
        self.prefixes.set_strategy(strategy);
    }

    /// Empties all of them.
    pub fn invalidate_all(&self) {
        self.pixels.invalidate_all();
        self.features.invalidate_all();
        self.responses.invalidate_all();
        self.prefixes.invalidate_all();
    }

    /// Figures of this moment: pixels, features, responses, prefixes.
    pub fn stats(&self) -> [CacheStats; 4] {
        [
            self.pixels.stats(),
            self.features.stats(),
            self.responses.stats(),
            self.prefixes.stats(),
        ]
    }
}
