//! Import `store`: small state in memory that outlives instances and reloads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use wasmtime::component::Resource;

use crate::bindings::adapter::visor::plugin::store as wit;
use crate::bindings::adapter::visor::plugin::store::StoreError;
use crate::guest::GuestState;

// Promised in `wit/host.wit`, so no keys: what they may add up to is one.
const KEY_BYTES_MAX: usize = 256;
const VALUE_BYTES_MAX: usize = 64 << 10;
const KEYS_MAX: usize = 1000;

/// Size limits of one bucket.
#[derive(Clone, Copy)]
pub(crate) struct BucketLimits {
    pub(crate) bytes_max: usize,
    pub(crate) entries_max: usize,
}

/// One bucket; shared by all instances that opened it.
pub(crate) struct Bucket {
    limits: BucketLimits,
    content: Mutex<Content>,
}

#[derive(Default)]
struct Content {
    entries: BTreeMap<String, Entry>,
    bytes: usize,
}

struct Entry {
    value: Vec<u8>,
    expires: Option<Instant>,
}

impl Entry {
    fn is_alive(&self, now: Instant) -> bool {
        self.expires.is_none_or(|expires| now < expires)
    }
}

impl Content {
    fn get(&self, key: &str, now: Instant) -> Option<&[u8]> {
        self.entries
            .get(key)
            .filter(|entry| entry.is_alive(now))
            .map(|entry| &*entry.value)
    }

    fn remove(&mut self, key: &str) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= key.len() + entry.value.len();
        }
    }

    fn remove_expired(&mut self, now: Instant) {
        let mut freed = 0;
        self.entries.retain(|key, entry| {
            let alive = entry.is_alive(now);
            if !alive {
                freed += key.len() + entry.value.len();
            }
            alive
        });
        self.bytes -= freed;
    }
}

impl Bucket {
    pub(crate) fn new(limits: BucketLimits) -> Self {
        Self {
            limits,
            content: Mutex::new(Content::default()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.lock().get(key, Instant::now()).map(<[u8]>::to_vec)
    }

    fn set(&self, key: String, value: Vec<u8>, ttl: Option<u32>) -> Result<(), StoreError> {
        let expires =
            ttl.and_then(|ttl_s| Instant::now().checked_add(Duration::from_secs(u64::from(ttl_s))));
        self.put(&mut self.lock(), key, Entry { value, expires })
    }

    fn put(&self, content: &mut Content, key: String, entry: Entry) -> Result<(), StoreError> {
        if key.len() > KEY_BYTES_MAX || entry.value.len() > VALUE_BYTES_MAX {
            return Err(StoreError::TooLarge);
        }
        if !self.has_room(content, &key, &entry) {
            content.remove_expired(Instant::now());
            if !self.has_room(content, &key, &entry) {
                return Err(StoreError::Full);
            }
        }
        content.remove(&key);
        content.bytes += key.len() + entry.value.len();
        content.entries.insert(key, entry);
        Ok(())
    }

    fn has_room(&self, content: &Content, key: &str, entry: &Entry) -> bool {
        let old = content.entries.get(key);
        let old_bytes = old.map_or(0, |old| key.len() + old.value.len());
        let count = content.entries.len() + usize::from(old.is_none());
        let bytes = content.bytes - old_bytes + key.len() + entry.value.len();
        count <= self.limits.entries_max && bytes <= self.limits.bytes_max
    }

    /// Counters are stored as eight bytes, little end first.
    fn add(&self, key: String, delta: i64) -> Result<i64, StoreError> {
        let mut content = self.lock();
        let old = match content.get(&key, Instant::now()) {
            None => 0,
            Some(bytes) => i64::from_le_bytes(bytes.try_into().map_err(|_| StoreError::Conflict)?),
        };
        let new = old.checked_add(delta).ok_or(StoreError::TooLarge)?;
        let expires = content
            .entries
            .get(&key)
            .filter(|e| e.is_alive(Instant::now()));
        let expires = expires.and_then(|entry| entry.expires);
        let entry = Entry {
            value: new.to_le_bytes().to_vec(),
            expires,
        };
        self.put(&mut content, key, entry)?;
        Ok(new)
    }

    fn swap(
        &self,
        key: String,
        old: Option<&[u8]>,
        new: Option<Vec<u8>>,
    ) -> Result<(), StoreError> {
        let mut content = self.lock();
        if content.get(&key, Instant::now()) != old {
            return Err(StoreError::Conflict);
        }
        match new {
            Some(value) => self.put(
                &mut content,
                key,
                Entry {
                    value,
                    expires: None,
                },
            ),
            None => {
                content.remove(&key);
                Ok(())
            }
        }
    }

    fn keys(&self, prefix: &str, limit: usize) -> Vec<String> {
        let content = self.lock();
        let now = Instant::now();
        let from = content.entries.range(prefix.to_owned()..);
        from.take_while(|(key, _)| key.starts_with(prefix))
            .filter(|(_, entry)| entry.is_alive(now))
            .take(limit.min(KEYS_MAX))
            .map(|(key, _)| key.clone())
            .collect()
    }
}

/// `store.bucket`
#[expect(unreachable_pub, reason = "bindgen re-exports it")]
pub struct BucketHandle(Arc<Bucket>);

impl GuestState {
    fn bucket(&self, handle: &Resource<BucketHandle>) -> wasmtime::Result<Arc<Bucket>> {
        self.on_time()?;
        Ok(Arc::clone(&self.table.get(handle)?.0))
    }
}

impl wit::Host for GuestState {}

impl wit::HostBucket for GuestState {
    fn open(
        &mut self,
        name: String,
    ) -> wasmtime::Result<Result<Resource<BucketHandle>, StoreError>> {
        self.on_time()?;
        let bucket = match name.as_str() {
            "" => Arc::clone(&self.core.kept.bucket),
            shared if self.core.settings.store_buckets.iter().any(|b| b == shared) => {
                self.core.shared.shared_bucket(shared)
            }
            _ => return Ok(Err(StoreError::Denied)),
        };
        Ok(Ok(self.table.push(BucketHandle(bucket))?))
    }

    fn get(
        &mut self,
        handle: Resource<BucketHandle>,
        key: String,
    ) -> wasmtime::Result<Result<Option<Vec<u8>>, StoreError>> {
        Ok(Ok(self.bucket(&handle)?.get(&key)))
    }

    fn set(
        &mut self,
        handle: Resource<BucketHandle>,
        key: String,
        value: Vec<u8>,
        ttl: Option<u32>,
    ) -> wasmtime::Result<Result<(), StoreError>> {
        Ok(self.bucket(&handle)?.set(key, value, ttl))
    }

    fn delete(
        &mut self,
        handle: Resource<BucketHandle>,
        key: String,
    ) -> wasmtime::Result<Result<(), StoreError>> {
        self.bucket(&handle)?.lock().remove(&key);
        Ok(Ok(()))
    }

    fn add(
        &mut self,
        handle: Resource<BucketHandle>,
        key: String,
        delta: i64,
    ) -> wasmtime::Result<Result<i64, StoreError>> {
        Ok(self.bucket(&handle)?.add(key, delta))
    }

    fn swap(
        &mut self,
        handle: Resource<BucketHandle>,
        key: String,
        old: Option<Vec<u8>>,
        new: Option<Vec<u8>>,
    ) -> wasmtime::Result<Result<(), StoreError>> {
        Ok(self.bucket(&handle)?.swap(key, old.as_deref(), new))
    }

    fn keys(
        &mut self,
        handle: Resource<BucketHandle>,
        prefix: String,
        limit: u32,
    ) -> wasmtime::Result<Result<Vec<String>, StoreError>> {
        Ok(Ok(self.bucket(&handle)?.keys(&prefix, limit as usize)))
    }

    fn drop(&mut self, handle: Resource<BucketHandle>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(bytes_max: usize, entries_max: usize) -> Bucket {
        Bucket::new(BucketLimits {
            bytes_max,
            entries_max,
        })
    }

    #[test]
    fn a_full_bucket_refuses_and_makes_room_by_dropping_what_expired() {
        let bucket = bucket(8, 10);
        bucket.set("a".to_owned(), vec![0; 7], Some(0)).unwrap();
        assert_eq!(bucket.get("a"), None);
        bucket.set("b".to_owned(), vec![0; 5], None).unwrap();
        assert!(matches!(
            bucket.set("c".to_owned(), vec![0; 5], None),
            Err(StoreError::Full)
        ));
        bucket.set("b".to_owned(), vec![0; 7], None).unwrap();
        assert_eq!(bucket.keys("", 10), ["b"]);
        assert_eq!(bucket.lock().bytes, 8);
    }

    #[test]
    fn counters_add_and_refuse_what_is_no_counter() {
        let bucket = bucket(1000, 10);
        assert_eq!(bucket.add("n".to_owned(), 5).unwrap(), 5);
        assert_eq!(bucket.add("n".to_owned(), -7).unwrap(), -2);
        assert!(matches!(
            bucket.add("n".to_owned(), i64::MIN),
            Err(StoreError::TooLarge)
        ));
        bucket.set("s".to_owned(), b"text".to_vec(), None).unwrap();
        assert!(matches!(
            bucket.add("s".to_owned(), 1),
            Err(StoreError::Conflict)
        ));
    }

    #[test]
    fn swap_changes_only_what_is_still_there() {
        let bucket = bucket(1000, 10);
        bucket
            .swap("k".to_owned(), None, Some(b"1".to_vec()))
            .unwrap();
        let stale = bucket.swap("k".to_owned(), Some(b"0"), Some(b"2".to_vec()));
        assert!(matches!(stale, Err(StoreError::Conflict)));
        bucket.swap("k".to_owned(), Some(b"1"), None).unwrap();
        assert_eq!(bucket.get("k"), None);
        assert_eq!(bucket.lock().bytes, 0);
    }

    #[test]
    fn keys_are_listed_by_prefix() {
        let bucket = bucket(1000, 10);
        for key in ["a/1", "a/2", "b/1"] {
            bucket.set(key.to_owned(), Vec::new(), None).unwrap();
        }
        assert_eq!(bucket.keys("a/", 10), ["a/1", "a/2"]);
        assert_eq!(bucket.keys("", 1), ["a/1"]);
    }
}
