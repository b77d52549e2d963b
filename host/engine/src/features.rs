//! Image features by picture: the tower runs once per picture, whatever the prompt.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use visor_model::DeviceKind;
use visor_model::image::PixelValues;

use crate::cache::{Cache, CacheKey, NewEntry};
use crate::job::micros;
use crate::model::Model;
use crate::request::CacheAccess;

pub(crate) struct FeatureStore<F> {
    cache: Arc<Cache<F>>,
    model_digest: String,
}

impl<F: Send + Sync + 'static> FeatureStore<F> {
    pub(crate) fn new(cache: Arc<Cache<F>>, model_digest: &str) -> Self {
        Self {
            cache,
            model_digest: model_digest.to_string(),
        }
    }

    /// The features of a picture, if they are there.
    pub(crate) fn find(
        &self,
        device: DeviceKind,
        pixels: &PixelValues,
        access: &CacheAccess,
    ) -> Option<Arc<F>> {
        let key = self.key(device, pixels, access);
        access.features.read.then(|| self.cache.get(&key)).flatten()
    }

    /// Keeps what the tower made of a picture, in so much time.
    pub(crate) fn keep<M: Model<Features = F>>(
        &self,
        model: &M,
        pixels: &PixelValues,
        (access, features, time): (&CacheAccess, &Arc<F>, Duration),
    ) {
        if !access.features.write {
            return;
        }
        let entry = NewEntry {
            bytes: M::features_bytes(features),
            cost_us: micros(time),
            tokens: pixels.image_tokens(),
            ttl: access.ttl,
            weight: access.weight,
        };
        let key = self.key(model.device(), pixels, access);
        self.cache.insert(key, Arc::clone(features), &entry);
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
