//! Image features by picture: the tower runs once per picture, whatever the prompt.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use visor_model::DeviceKind;
use visor_model::image::PixelValues;

use crate::cache::{Cache, CacheKey, NewEntry};
use crate::guard::{Trouble, guarded};
use crate::model::Model;
use crate::request::CacheAccess;

pub(crate) struct FeatureStore<F> {
    cache: Arc<Cache<F>>,
    model_digest: String,
}

/// One picture's features, and what they cost now.
pub(crate) struct Encoded<F> {
    pub(crate) features: Arc<F>,
    /// Zero when they were there.
    pub(crate) time: Duration,
}

impl<F: Send + Sync + 'static> FeatureStore<F> {
    pub(crate) fn new(cache: Arc<Cache<F>>, model_digest: &str) -> Self {
        Self {
            cache,
            model_digest: model_digest.to_string(),
        }
    }

    /// The features of a picture: from the cache, else from the tower and then into the cache.
    pub(crate) fn find_or_encode<M: Model<Features = F>>(
        &self,
        model: &M,
        pixels: &PixelValues,
        access: &CacheAccess,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Encoded<F>, Trouble> {
        let key = self.key(model.device(), pixels, access);
        let found = access.features.read.then(|| self.cache.get(&key)).flatten();
        if let Some(features) = found {
            return Ok(Encoded {
                features,
                time: Duration::ZERO,
            });
        }
        let began = std::time::Instant::now();
        let features = Arc::new(guarded(|| model.encode_image(pixels, keep_going))?);
        let time = began.elapsed();
        if access.features.write {
            let entry = NewEntry {
                bytes: M::features_bytes(&features),
                cost_us: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
                tokens: pixels.image_tokens(),
                ttl: access.ttl,
                weight: access.weight,
            };
            self.cache.insert(key, Arc::clone(&features), &entry);
        }
        Ok(Encoded { features, time })
    }

    /// The device is part of the key: features live in its memory.
    fn key(&self, device: DeviceKind, pixels: &PixelValues, access: &CacheAccess) -> CacheKey {
        let mut sha = Sha256::new();
        sha.update(b"visor features 1\0");
        sha.update((self.model_digest.len() as u64).to_le_bytes());
        sha.update(self.model_digest.as_bytes());
        sha.update(device.to_string().as_bytes());
        sha.update([0]);
        sha.update(pixels.key);
        CacheKey {
            scope: access.scope,
            digest: sha.finalize().into(),
        }
    }

    /// Forgets everything, such as when the device that holds it broke.
    pub(crate) fn invalidate_all(&self) {
        self.cache.invalidate_all();
    }
}
