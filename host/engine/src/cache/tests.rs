//! What holds for a cache whatever its strategy does.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::index::ENTRY_OVERHEAD_BYTES;
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// Capacity for `count` entries of `bytes`.
fn room(count: u64, bytes: u64) -> u64 {
    count * (bytes + ENTRY_OVERHEAD_BYTES)
}

fn key(scope: &str, number: u8) -> CacheKey {
    CacheKey::new(scope, [number; 32])
}

fn entry(bytes: u64) -> NewEntry {
    NewEntry {
        bytes,
        cost_us: 1000,
        tokens: 1,
        ttl: None,
        weight: 100,
    }
}

fn put(cache: &Cache<u8>, number: u8) {
    cache.insert(key("", number), Arc::new(number), &entry(100));
}

fn held(cache: &Cache<u8>) -> Vec<u8> {
    let index = &cache.core.lock().index;
    index.values().collect()
}

type Victims = dyn Fn(&[u64], u64, u32) -> Vec<u64> + Send + Sync;

/// A strategy that writes down what it is told and names victims as a test says.
struct Told {
    plan: Plan,
    events: Mutex<Vec<CacheEvent>>,
    victims: Box<Victims>,
    admit: fn(&[CacheEntry]) -> Vec<bool>,
    restarts: AtomicU64,
}

impl Told {
    fn new(base: Algorithm) -> Self {
        let interests = Interests {
            scope: true,
            inserts: true,
            hits: true,
            misses: true,
            removals: true,
            victims: true,
            admission: true,
        };
        Self {
            plan: Plan {
                base,
                interests,
                ..Plan::default()
            },
            events: Mutex::default(),
            victims: Box::new(|_, _, _| Vec::new()),
            admit: |candidates| vec![true; candidates.len()],
            restarts: AtomicU64::new(0),
        }
    }

    fn choosing(victims: impl Fn(&[u64], u64, u32) -> Vec<u64> + Send + Sync + 'static) -> Self {
        Self {
            victims: Box::new(victims),
            ..Self::new(Algorithm::Fifo)
        }
    }

    /// Ids of the entries it has been told of, oldest first.
    fn ids(&self) -> Vec<u64> {
        let mut ids = Vec::new();
        for event in self.events.lock().unwrap().iter() {
            match event {
                CacheEvent::Inserted(entry) => ids.push(entry.id),
                CacheEvent::Removed { id, .. } => ids.retain(|known| known != id),
                _ => (),
            }
        }
        ids
    }
}

impl CacheStrategy for Told {
    fn plan(&self, _tier: Tier, _capacity_bytes: u64) -> Plan {
        self.plan
    }

    fn observe(&self, _tier: Tier, events: &[CacheEvent], _used_bytes: u64) {
        assert!(events.len() <= 256);
        self.events.lock().unwrap().extend(events);
    }

    fn victims(&self, _tier: Tier, bytes: u64, at_most: u32) -> Vec<u64> {
        (self.victims)(&self.ids(), bytes, at_most)
    }

    fn admit(&self, _tier: Tier, candidates: &[CacheEntry]) -> Vec<bool> {
        (self.admit)(candidates)
    }

    fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }
}

fn with_strategy(capacity_bytes: u64, strategy: Arc<dyn CacheStrategy>) -> Cache<u8> {
    let cache = Cache::new(Tier::Pixels, capacity_bytes);
    cache.set_strategy(Some(strategy));
    assert!(cache.settle(PATIENCE));
    cache
}

#[test]
fn a_value_is_found_again_until_it_has_to_go() {
    let cache = Cache::new(Tier::Pixels, room(2, 100));
    put(&cache, 1);
    put(&cache, 2);
    assert_eq!(cache.get(&key("", 1)).as_deref(), Some(&1));
    put(&cache, 3);
    assert_eq!(cache.get(&key("", 2)), None, "least recently used");
    assert_eq!(cache.get(&key("", 1)).as_deref(), Some(&1));
    let stats = cache.stats();
    assert_eq!(
        (stats.hits, stats.misses, stats.inserted, stats.evicted),
        (2, 1, 3, 1)
    );
    assert_eq!((stats.saved_us, stats.entries), (2000, 2));
    assert_eq!(stats.used_bytes, room(2, 100));
}

#[test]
fn scopes_do_not_see_each_other() {
    let cache = Cache::new(Tier::Pixels, room(9, 100));
    cache.insert(key("alice", 1), Arc::new(1), &entry(100));
    assert!(cache.get(&key("alice", 1)).is_some());
    for other in ["", "bob", "alice ", "Alice"] {
        assert!(cache.get(&key(other, 1)).is_none(), "{other:?}");
    }
}

#[test]
fn what_is_too_large_is_not_stored() {
    let cache = Cache::new(Tier::Pixels, room(2, 100));
    assert!(!cache.insert(key("", 1), Arc::new(1), &entry(1000)));
    assert!(!cache.insert(key("", 1), Arc::new(1), &entry(u64::MAX)));
    let mut strategy = Told::new(Algorithm::Lru);
    strategy.plan.entry_permille_max = 499;
    let cache = with_strategy(room(2, 100), Arc::new(strategy));
    assert!(!cache.insert(key("", 1), Arc::new(1), &entry(100)));
    assert_eq!(cache.stats().refused, 1);
}

#[test]
fn a_cache_of_no_bytes_keeps_nothing() {
    let cache = Cache::new(Tier::Pixels, 0);
    put(&cache, 1);
    assert_eq!(cache.get(&key("", 1)), None);
    assert_eq!(cache.stats(), CacheStats::new(Tier::Pixels, 0));
}

#[test]
fn storing_a_key_again_replaces_its_value() {
    let cache = Cache::new(Tier::Pixels, room(2, 100));
    put(&cache, 1);
    cache.insert(key("", 1), Arc::new(42), &entry(100));
    assert_eq!(cache.get(&key("", 1)).as_deref(), Some(&42));
    assert_eq!((cache.stats().entries, cache.stats().replaced), (1, 1));
}

#[test]
fn a_smaller_capacity_holds_at_once() {
    let cache = Cache::new(Tier::Pixels, room(4, 100));
    (1..=4).for_each(|number| put(&cache, number));
    cache.resize(room(2, 100));
    assert_eq!(held(&cache).len(), 2);
    assert!(cache.stats().used_bytes <= room(2, 100));
}

#[test]
fn entries_end_with_their_time() {
    let now = Arc::new(Mutex::new(Instant::now()));
    let clock = Arc::clone(&now);
    let clock = Box::new(move || *clock.lock().unwrap());
    let cache = Cache::with_clock(Tier::Pixels, room(9, 100), clock);
    let pass = |seconds| *now.lock().unwrap() += Duration::from_secs(seconds);
    let ttl = |seconds| NewEntry {
        ttl: Some(Duration::from_secs(seconds)),
        ..entry(100)
    };
    cache.insert(key("", 1), Arc::new(1), &ttl(10));
    cache.insert(key("", 2), Arc::new(2), &ttl(30));
    put(&cache, 3);
    pass(9);
    assert!(cache.get(&key("", 1)).is_some());
    pass(1);
    assert!(cache.get(&key("", 1)).is_none());
    assert!(cache.get(&key("", 2)).is_some());
    assert_eq!(cache.stats().expired, 1);

    // The plan's time holds for what comes under it, and the shorter of both.
    let mut strategy = Told::new(Algorithm::Lru);
    strategy.plan.ttl_s = Some(20);
    cache.set_strategy(Some(Arc::new(strategy)));
    assert!(cache.settle(PATIENCE));
    cache.insert(key("", 4), Arc::new(4), &ttl(5));
    cache.insert(key("", 5), Arc::new(5), &ttl(500));
    pass(20);
    // Nobody asks for them: the thread removes them when it looks.
    assert!(cache.settle(PATIENCE));
    assert_eq!(held(&cache), [3]);
}

#[test]
fn the_strategy_is_told_what_happens() {
    let strategy = Arc::new(Told::new(Algorithm::Lru));
    let cache = with_strategy(room(1, 100), Arc::clone(&strategy) as _);
    let weighty = NewEntry {
        weight: 250,
        tokens: 7,
        ..entry(100)
    };
    cache.insert(key("alice", 1), Arc::new(1), &weighty);
    cache.get(&key("alice", 1));
    cache.get(&key("", 9));
    put(&cache, 2);
    assert!(cache.settle(PATIENCE));
    let events = strategy.events.lock().unwrap().clone();
    let [inserted, hit, missed, removed, second] = events.as_slice() else {
        panic!("{events:?}");
    };
    let CacheEvent::Inserted(facts) = *inserted else {
        panic!("{inserted:?}");
    };
    assert_eq!(facts.scope, Scope::named("alice").label());
    assert_eq!((facts.bytes, facts.tokens), (room(1, 100), 7));
    assert_eq!(facts.cost_us, 2500, "the cost is weighed");
    assert_eq!(
        *hit,
        CacheEvent::Hit {
            id: facts.id,
            count: 1
        }
    );
    assert!(matches!(
        missed,
        CacheEvent::Missed {
            tier: Tier::Pixels,
            ..
        }
    ));
    let cause = RemovalCause::Evicted;
    assert_eq!(
        *removed,
        CacheEvent::Removed {
            id: facts.id,
            cause
        }
    );
    assert!(matches!(second, CacheEvent::Inserted(entry) if entry.id != facts.id));
}

#[test]
fn hits_are_sampled() {
    let mut strategy = Told::new(Algorithm::Lru);
    strategy.plan.hit_sampling = 3;
    let strategy = Arc::new(strategy);
    let cache = with_strategy(room(1, 100), Arc::clone(&strategy) as _);
    put(&cache, 1);
    (0..7).for_each(|_| drop(cache.get(&key("", 1))));
    assert!(cache.settle(PATIENCE));
    let events = strategy.events.lock().unwrap();
    let hits = events.iter().filter_map(|event| match event {
        CacheEvent::Hit { count, .. } => Some(*count),
        _ => None,
    });
    assert_eq!(hits.collect::<Vec<_>>(), [3, 3]);
    assert_eq!(cache.stats().hits, 7);
}

#[test]
fn the_strategys_victims_go_first() {
    // It would rather lose the newest; the base algorithm the oldest.
    let newest = |ids: &[u64], _, _| ids.iter().rev().copied().collect();
    let cache = with_strategy(room(3, 100), Arc::new(Told::choosing(newest)));
    for number in 1..=3 {
        put(&cache, number);
    }
    assert!(cache.settle(PATIENCE));
    put(&cache, 4);
    assert_eq!(held(&cache), [1, 2, 4]);
    assert_eq!(cache.stats().evicted_by_strategy, 1);
}

#[test]
fn a_victim_that_is_hit_again_stays() {
    let newest = |ids: &[u64], _, _| ids.iter().rev().copied().collect();
    let cache = with_strategy(room(3, 100), Arc::new(Told::choosing(newest)));
    for number in 1..=3 {
        put(&cache, number);
    }
    assert!(cache.settle(PATIENCE));
    cache.get(&key("", 3));
    put(&cache, 4);
    assert_eq!(held(&cache), [1, 3, 4]);
}

#[test]
fn a_wrong_answer_is_replaced_by_the_native_algorithm() {
    let wrong: [Box<Victims>; 4] = [
        Box::new(|_, _, _| vec![9999, 77]),
        Box::new(|_, _, _| panic!("scripted panic of a strategy")),
        Box::new(|_, _, _| (1000..9000).collect()),
        Box::new(|_, _, _| Vec::new()),
    ];
    for (number, victims) in wrong.into_iter().enumerate() {
        let strategy = Told {
            victims,
            ..Told::new(Algorithm::Fifo)
        };
        let cache = with_strategy(room(3, 100), Arc::new(strategy));
        for number in 1..=3 {
            put(&cache, number);
        }
        assert!(cache.settle(PATIENCE));
        put(&cache, 4);
        assert_eq!(held(&cache), [2, 3, 4], "answer {number}");
        // Declining is no fault.
        assert_eq!(
            cache.stats().strategy_faults > 0,
            number < 3,
            "answer {number}"
        );
    }
}

#[test]
fn repeated_victims_count_once() {
    let twice = |ids: &[u64], _, _| vec![ids[2], ids[2], ids[1]];
    let cache = with_strategy(room(3, 100), Arc::new(Told::choosing(twice)));
    for number in 1..=3 {
        put(&cache, number);
    }
    assert!(cache.settle(PATIENCE));
    put(&cache, 4);
    put(&cache, 5);
    let held = held(&cache);
    assert!(held.contains(&1) && held.len() == 3, "{held:?}");
    assert!(cache.stats().strategy_faults > 0);
}

#[test]
fn a_plan_that_panics_leaves_the_native_algorithm() {
    struct Panicking;
    impl CacheStrategy for Panicking {
        fn plan(&self, _tier: Tier, _capacity_bytes: u64) -> Plan {
            panic!("scripted panic of a plan")
        }
    }
    let cache = with_strategy(room(2, 100), Arc::new(Panicking));
    for number in 1..=3 {
        put(&cache, number);
    }
    assert_eq!(held(&cache), [2, 3]);
    assert_eq!(cache.stats().strategy_faults, 1);
}

#[test]
fn what_is_not_admitted_goes() {
    let mut strategy = Told::new(Algorithm::Lru);
    strategy.admit = |candidates| {
        candidates
            .iter()
            .map(|entry| entry.bytes < room(1, 200))
            .collect()
    };
    let cache = with_strategy(room(9, 100), Arc::new(strategy));
    put(&cache, 1);
    cache.insert(key("", 2), Arc::new(2), &entry(200));
    assert!(cache.settle(PATIENCE));
    assert_eq!(held(&cache), [1]);

    let mut strategy = Told::new(Algorithm::Lru);
    strategy.admit = |_| vec![false];
    let cache = with_strategy(room(9, 100), Arc::new(strategy));
    let both = [1, 2];
    cache.core.with(|state| {
        for number in both {
            let value = Arc::new(number);
            state
                .index
                .insert(key("", number), value, &entry(100), Instant::now());
        }
    });
    assert!(cache.settle(PATIENCE));
    assert_eq!(held(&cache), both, "one answer for two candidates is none");
    assert_eq!(cache.stats().strategy_faults, 1);
}

/// A strategy that is stuck in a call until the test lets it go.
struct Stuck {
    entered: Mutex<Sender<()>>,
    released: Mutex<Receiver<()>>,
}

impl CacheStrategy for Stuck {
    fn plan(&self, _tier: Tier, _capacity_bytes: u64) -> Plan {
        Told::new(Algorithm::Fifo).plan
    }

    fn victims(&self, _tier: Tier, _bytes: u64, _at_most: u32) -> Vec<u64> {
        // Either end may be gone at the end of the test.
        let _seen = self.entered.lock().unwrap().send(());
        let _ended = self.released.lock().unwrap().recv();
        Vec::new()
    }
}

#[test]
fn nobody_waits_for_a_late_strategy() {
    let (entered, is_stuck) = channel();
    let (release, released) = channel();
    let stuck = Stuck {
        entered: Mutex::new(entered),
        released: Mutex::new(released),
    };
    let cache = with_strategy(room(2, 100), Arc::new(stuck));
    put(&cache, 1);
    put(&cache, 2);
    is_stuck.recv().unwrap();
    for number in 3..=200 {
        put(&cache, number);
        assert_eq!(cache.get(&key("", number)).as_deref(), Some(&number));
    }
    assert_eq!(held(&cache), [199, 200]);
    // Events gather up to a bound, and are dropped beyond it.
    (0..10_000).for_each(|_| drop(cache.get(&key("", 200))));
    assert!(cache.stats().events_dropped > 0);
    drop(release);
    assert!(cache.settle(PATIENCE));
}

#[test]
fn a_new_strategy_is_told_what_is_there() {
    let cache = with_strategy(room(3, 100), Arc::new(Told::new(Algorithm::Lru)));
    for number in 1..=3 {
        put(&cache, number);
    }
    cache.get(&key("", 1));
    let second = Arc::new(Told::choosing(|ids, _, _| vec![ids[1]]));
    cache.set_strategy(Some(Arc::clone(&second) as _));
    assert!(cache.settle(PATIENCE));
    assert_eq!(second.ids().len(), 3);
    put(&cache, 4);
    assert_eq!(held(&cache).len(), 3);
    assert_eq!(cache.stats().evicted_by_strategy, 1);

    cache.set_strategy(None);
    assert!(cache.settle(PATIENCE));
    put(&cache, 5);
    assert_eq!(
        cache.stats().evicted_by_strategy,
        1,
        "the native order again"
    );
}

#[test]
fn a_strategy_that_forgot_is_told_again() {
    let strategy = Arc::new(Told::new(Algorithm::Lru));
    let cache = with_strategy(room(3, 100), Arc::clone(&strategy) as _);
    put(&cache, 1);
    assert!(cache.settle(PATIENCE));
    strategy.events.lock().unwrap().clear();
    strategy.restarts.store(1, Ordering::Relaxed);
    put(&cache, 2);
    assert!(cache.settle(PATIENCE));
    let ids: HashSet<u64> = strategy.ids().into_iter().collect();
    assert_eq!(ids.len(), 2, "the old entry and the new one");
}

#[test]
fn nothing_found_in_a_cache_is_ever_wrong_or_too_much() {
    let algorithms = [
        Algorithm::Lru,
        Algorithm::Lfu,
        Algorithm::Fifo,
        Algorithm::Sieve,
        Algorithm::Gdsf,
    ];
    for (seed, base) in (1_u64..).zip(algorithms) {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut below = |bound: u64| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
        };
        let random_ids = |ids: &[u64], bytes: u64, _: u32| {
            let some = ids
                .iter()
                .filter(|id| (*id ^ bytes).is_multiple_of(3))
                .copied();
            some.chain([5, 5, 1 << 40]).collect()
        };
        let mut strategy = Told::choosing(random_ids);
        strategy.plan.base = base;
        strategy.admit = |candidates| {
            candidates
                .iter()
                .map(|entry| !entry.id.is_multiple_of(7))
                .collect()
        };
        let mut capacity = room(8, 100);
        let cache = with_strategy(capacity, Arc::new(strategy));
        for round in 0..3000 {
            let (scope, number) = (["", "a"][below(2) as usize], below(30) as u8);
            match below(10) {
                0..5 => {
                    let found = cache.get(&key(scope, number));
                    assert!(found.is_none_or(|value| *value == number), "{base:?}");
                }
                5..9 => {
                    cache.insert(key(scope, number), Arc::new(number), &entry(below(300)));
                }
                _ if round % 50 == 0 => {
                    capacity = room(below(12), 100);
                    cache.resize(capacity);
                }
                _ => (),
            }
            let stats = cache.stats();
            assert!(stats.used_bytes <= capacity, "{base:?}: {stats:?}");
            let gone = stats.evicted + stats.expired + stats.replaced + stats.invalidated;
            assert_eq!(stats.entries, stats.inserted - gone, "{base:?}");
        }
        assert!(cache.settle(PATIENCE));
        cache.core.lock().index.check();
        cache.invalidate_all();
        assert_eq!((cache.stats().entries, cache.stats().used_bytes), (0, 0));
    }
}
