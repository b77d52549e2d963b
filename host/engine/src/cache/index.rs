//! The inside of a cache: keys, entries, the order they go in, and the events not yet reported.
//! Everything here runs under the cache's lock, is short, and calls nobody.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::order::Order;
use super::strategy::{CacheEntry, CacheEvent, Plan, RemovalCause, Tier};
use super::{CacheKey, CacheStats, NewEntry};

/// Events kept for the strategy; hits and misses are dropped when it is half full, the rest when
/// it is full.
const EVENTS_MAX: usize = 4096;

/// Bookkeeping of one entry, so that many small ones do not outgrow the capacity unseen.
pub(super) const ENTRY_OVERHEAD_BYTES: u64 = 768;

struct Entry<V> {
    key: CacheKey,
    value: Arc<V>,
    facts: CacheEntry,
    /// As measured, not weighed.
    cost_us: u64,
    expires: Option<Instant>,
    hits_unreported: u32,
}

pub(super) struct Index<V> {
    pub(super) plan: Plan,
    pub(super) stats: CacheStats,
    entries: HashMap<u64, Entry<V>>,
    ids: HashMap<CacheKey, u64>,
    order: Order,
    /// Victims the strategy chose ahead of need, the next first.
    reserve: VecDeque<u64>,
    events: Vec<CacheEvent>,
    /// Stored, and not yet shown to the strategy's admission.
    candidates: Vec<u64>,
    next_id: u64,
    /// Values taken out under the lock, dropped after it.
    dropped: Vec<Arc<V>>,
}

impl<V> Index<V> {
    pub(super) fn new(tier: Tier, capacity_bytes: u64) -> Self {
        Self {
            plan: Plan::default(),
            stats: CacheStats::new(tier, capacity_bytes),
            entries: HashMap::new(),
            ids: HashMap::new(),
            order: Order::default(),
            reserve: VecDeque::new(),
            events: Vec::new(),
            candidates: Vec::new(),
            next_id: 1,
            dropped: Vec::new(),
        }
    }

    pub(super) fn get(&mut self, key: &CacheKey, now: Instant) -> Option<Arc<V>> {
        let id = self.ids.get(key).copied();
        let expired = |entry: &Entry<V>| entry.expires.is_some_and(|expires| expires <= now);
        let id = match id {
            Some(id) if expired(&self.entries[&id]) => {
                self.remove(id, RemovalCause::Expired);
                None
            }
            id => id,
        };
        let Some(id) = id else {
            self.stats.misses += 1;
            let missed = CacheEvent::Missed {
                tier: self.stats.tier,
                key: key.label(),
            };
            self.report(missed);
            return None;
        };
        self.order.hit(id);
        // A victim that was hit since it was chosen is wanted again.
        self.reserve.retain(|victim| *victim != id);
        let entry = self.entries.get_mut(&id)?;
        self.stats.hits += 1;
        self.stats.saved_us = self.stats.saved_us.saturating_add(entry.cost_us);
        entry.hits_unreported += 1;
        let value = Arc::clone(&entry.value);
        if entry.hits_unreported >= self.plan.hit_sampling.max(1) {
            let count = std::mem::take(&mut entry.hits_unreported);
            self.report(CacheEvent::Hit { id, count });
        }
        Some(value)
    }

    /// The value of a key, without a trace.
    pub(super) fn peek(&self, key: &CacheKey, now: Instant) -> Option<Arc<V>> {
        let entry = &self.entries[self.ids.get(key)?];
        let is_over = entry.expires.is_some_and(|expires| expires <= now);
        (!is_over).then(|| Arc::clone(&entry.value))
    }

    pub(super) fn touch(&mut self, key: &CacheKey) {
        if let Some(id) = self.ids.get(key) {
            self.order.hit(*id);
        }
    }

    pub(super) fn replace(&mut self, key: &CacheKey) {
        if let Some(id) = self.ids.get(key).copied() {
            self.remove(id, RemovalCause::Replaced);
        }
    }

    /// Removes the first of the strategy's victims, else of the native order, whose value is wanted.
    pub(super) fn evict_one(&mut self, wanted: impl Fn(&V) -> bool) -> bool {
        let is_wanted = |id: &u64| {
            let entry = self.entries.get(id);
            entry.is_some_and(|entry| wanted(&entry.value))
        };
        let chosen = self.reserve.iter().copied().find(is_wanted);
        let victim = chosen.or_else(|| self.order.ids().find(is_wanted));
        let Some(id) = victim else { return false };
        if chosen.is_some() {
            self.reserve.retain(|victim| *victim != id);
            self.stats.evicted_by_strategy += 1;
        }
        self.remove(id, RemovalCause::Evicted);
        true
    }

    pub(super) fn count(&self, wanted: impl Fn(&V) -> bool) -> usize {
        let values = self.entries.values();
        values.filter(|entry| wanted(&entry.value)).count()
    }

    /// Stores a value and makes room for it first. False when it may not be stored.
    pub(super) fn insert(
        &mut self,
        key: CacheKey,
        value: Arc<V>,
        new: &NewEntry,
        now: Instant,
    ) -> bool {
        let bytes = new.bytes.saturating_add(ENTRY_OVERHEAD_BYTES);
        let permille = u64::from(self.plan.entry_permille_max.min(1000));
        let capacity = self.stats.capacity_bytes;
        let entry_bytes_max = (u128::from(capacity) * u128::from(permille) / 1000) as u64;
        if bytes > entry_bytes_max {
            self.stats.refused += 1;
            return false;
        }
        if let Some(old) = self.ids.get(&key).copied() {
            self.remove(old, RemovalCause::Replaced);
        }
        self.make_room(bytes);
        let facts = CacheEntry {
            id: self.next_id,
            tier: self.stats.tier,
            scope: key.scope.label(),
            bytes,
            cost_us: weighed(new.cost_us, new.weight),
            tokens: new.tokens,
        };
        self.next_id += 1;
        self.stats.used_bytes += bytes;
        self.stats.inserted += 1;
        self.order.insert(facts.id, bytes, facts.cost_us);
        self.ids.insert(key, facts.id);
        self.report(CacheEvent::Inserted(facts));
        if self.plan.interests.admission {
            self.candidates.push(facts.id);
        }
        let entry = Entry {
            key,
            value,
            facts,
            cost_us: new.cost_us,
            expires: self.expiry(new.ttl, now),
            hits_unreported: 0,
        };
        self.entries.insert(facts.id, entry);
        self.stats.entries = self.entries.len() as u64;
        true
    }

    /// The earlier of what the request and what the plan allow.
    fn expiry(&self, ttl: Option<Duration>, now: Instant) -> Option<Instant> {
        let planned = self.plan.ttl_s.map(|s| Duration::from_secs(u64::from(s)));
        let ttl = [ttl, planned].into_iter().flatten().min()?;
        now.checked_add(ttl)
    }

    fn make_room(&mut self, bytes: u64) {
        let capacity = self.stats.capacity_bytes;
        while self.stats.used_bytes.saturating_add(bytes) > capacity {
            let Some(id) = self.next_victim() else {
                return;
            };
            self.remove(id, RemovalCause::Evicted);
        }
    }

    /// The strategy's choice while there is one, else the native algorithm's.
    fn next_victim(&mut self) -> Option<u64> {
        while let Some(id) = self.reserve.pop_front() {
            if self.entries.contains_key(&id) {
                self.stats.evicted_by_strategy += 1;
                return Some(id);
            }
        }
        self.order.victim()
    }

    pub(super) fn remove(&mut self, id: u64, cause: RemovalCause) {
        let Some(entry) = self.entries.remove(&id) else {
            return;
        };
        self.ids.remove(&entry.key);
        self.order.remove(id);
        self.dropped.push(entry.value);
        self.stats.used_bytes -= entry.facts.bytes;
        self.stats.entries = self.entries.len() as u64;
        let counter = match cause {
            RemovalCause::Evicted => &mut self.stats.evicted,
            RemovalCause::Expired => &mut self.stats.expired,
            RemovalCause::Replaced => &mut self.stats.replaced,
            RemovalCause::Invalidated => &mut self.stats.invalidated,
        };
        *counter += 1;
        self.report(CacheEvent::Removed { id, cause });
    }

    pub(super) fn remove_all(&mut self) {
        let ids: Vec<u64> = self.entries.keys().copied().collect();
        for id in ids {
            self.remove(id, RemovalCause::Invalidated);
        }
    }

    pub(super) fn resize(&mut self, capacity_bytes: u64) {
        self.stats.capacity_bytes = capacity_bytes;
        self.make_room(0);
    }

    /// Removes what has expired and says when the next entry will.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        let is_over = |entry: &&Entry<V>| entry.expires.is_some_and(|expires| expires <= now);
        let over: Vec<u64> = self
            .entries
            .values()
            .filter(is_over)
            .map(|entry| entry.facts.id)
            .collect();
        for id in over {
            self.remove(id, RemovalCause::Expired);
        }
        self.entries.values().filter_map(|e| e.expires).min()
    }

    fn report(&mut self, event: CacheEvent) {
        let interests = self.plan.interests;
        let (wanted, room) = match event {
            CacheEvent::Inserted(_) => (interests.inserts, EVENTS_MAX),
            CacheEvent::Removed { .. } => (interests.removals, EVENTS_MAX),
            CacheEvent::Hit { .. } => (interests.hits, EVENTS_MAX / 2),
            CacheEvent::Missed { .. } => (interests.misses, EVENTS_MAX / 2),
        };
        if !wanted {
            return;
        }
        if self.events.len() < room {
            self.events.push(event);
        } else {
            self.stats.events_dropped += 1;
        }
    }

    /// Another plan: the native order is the plan's, what was chosen or pending is forgotten, and
    /// the result is what a strategy that knows nothing has to be told.
    pub(super) fn adopt(&mut self, plan: Plan) {
        self.order.switch(plan.base);
        self.plan = plan;
        self.reserve.clear();
        self.candidates.clear();
        self.events.clear();
        let ids: Vec<u64> = self.order.ids().collect();
        for id in ids {
            let facts = self.entries[&id].facts;
            if plan.interests.inserts {
                // Not through `report`: everything that is there has to be told.
                self.events.push(CacheEvent::Inserted(facts));
            }
        }
    }

    pub(super) fn pending_events(&self) -> usize {
        self.events.len() + self.candidates.len()
    }

    pub(super) fn take_events(&mut self) -> Vec<CacheEvent> {
        std::mem::take(&mut self.events)
    }

    pub(super) fn take_candidates(&mut self) -> Vec<CacheEntry> {
        let ids = std::mem::take(&mut self.candidates);
        let facts = |id: &u64| Some(self.entries.get(id)?.facts);
        ids.iter().filter_map(facts).collect()
    }

    pub(super) fn has_dropped(&self) -> bool {
        !self.dropped.is_empty()
    }

    /// Values that were removed, for the caller to drop without the lock.
    pub(super) fn take_dropped(&mut self) -> Vec<Arc<V>> {
        std::mem::take(&mut self.dropped)
    }

    /// Bytes of victims to ask the strategy for: a reserve of an eighth of the capacity, once the
    /// cache is within that of being full. 0 when the reserve will do.
    pub(super) fn victims_wanted_bytes(&self) -> u64 {
        let target = self.stats.capacity_bytes / 8;
        let free = self.stats.capacity_bytes - self.stats.used_bytes;
        let held = self.reserve.iter().filter_map(|id| self.entries.get(id));
        let reserved: u64 = held.map(|entry| entry.facts.bytes).sum();
        let wanted = self.plan.interests.victims && !self.entries.is_empty() && free < target;
        if wanted && reserved < target / 2 {
            target
        } else {
            0
        }
    }

    /// Takes a strategy's victims as the reserve. Unknown and repeated ids are left out; how many
    /// there were is the result.
    pub(super) fn reserve(&mut self, victims: &[u64]) -> usize {
        self.reserve.clear();
        for id in victims {
            if self.entries.contains_key(id) && !self.reserve.contains(id) {
                self.reserve.push_back(*id);
            }
        }
        victims.len() - self.reserve.len()
    }
}

fn weighed(cost_us: u64, weight: u32) -> u64 {
    u64::try_from(u128::from(cost_us) * u128::from(weight) / 100).unwrap_or(u64::MAX)
}

#[cfg(test)]
impl<V: Copy> Index<V> {
    /// Every value, the oldest entry first.
    pub(super) fn values(&self) -> impl Iterator<Item = V> {
        let mut entries: Vec<_> = self.entries.values().collect();
        entries.sort_by_key(|entry| entry.facts.id);
        entries.into_iter().map(|entry| *entry.value)
    }
}

#[cfg(test)]
impl<V> Index<V> {
    /// What has to hold between the parts.
    pub(super) fn check(&self) {
        let mut ordered: Vec<u64> = self.order.ids().collect();
        let mut present: Vec<u64> = self.entries.keys().copied().collect();
        ordered.sort_unstable();
        present.sort_unstable();
        assert_eq!(ordered, present);
        assert_eq!(self.ids.len(), present.len());
        let bytes: u64 = self.entries.values().map(|entry| entry.facts.bytes).sum();
        assert_eq!(bytes, self.stats.used_bytes);
        for (key, id) in &self.ids {
            assert_eq!(self.entries[id].key, *key);
        }
    }
}
