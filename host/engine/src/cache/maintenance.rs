//! The thread beside a cache that talks to its strategy, so that lookups and insertions never do.
//!
//! It wakes for a new strategy, for 256 events, 50 ms after the first event, for a used-up reserve
//! and for the next expiry, and otherwise sleeps.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::index::Index;
use super::strategy::{CacheEntry, CacheStrategy, Plan, RemovalCause, Tier};

const BATCH_EVENTS: usize = 256;
const BATCH_WAIT: Duration = Duration::from_millis(50);
const VICTIMS_MAX: u32 = 64;

pub(super) type Clock = Box<dyn Fn() -> Instant + Send + Sync>;

/// What a cache's handle and its thread share.
pub(super) struct Core<V> {
    pub(super) tier: Tier,
    pub(super) clock: Clock,
    state: Mutex<State<V>>,
    /// There may be work for the thread.
    work: Condvar,
    /// The thread has done all there was.
    quiet: Condvar,
    /// Removed values are gone.
    freed: Condvar,
}

pub(super) struct State<V> {
    pub(super) index: Index<V>,
    pub(super) strategy: Option<Arc<dyn CacheStrategy>>,
    /// The strategy has to be asked for its plan and told what is there.
    pub(super) replan: bool,
    /// Somebody waits: do not let events gather.
    pub(super) hurry: bool,
    pub(super) closed: bool,
    busy: bool,
    /// Threads that are dropping removed values.
    pub(super) freeing: usize,
    first_event: Option<Instant>,
    /// The reserve was asked for and not filled; asking again waits for the next insertion.
    pub(super) starved: bool,
}

impl<V> State<V> {
    fn is_quiet(&self) -> bool {
        !self.busy && !self.replan && self.index.pending_events() == 0 && !self.wants_victims()
    }

    fn wants_victims(&self) -> bool {
        !self.starved && self.strategy.is_some() && self.index.victims_wanted_bytes() > 0
    }

    /// Whether the thread has something to do now, and if not, until when it may sleep.
    fn due(&mut self, now: Instant) -> Result<(), Option<Instant>> {
        let expiry = self.index.expire(now);
        let pending = self.index.pending_events();
        let full = pending >= BATCH_EVENTS || (self.hurry && pending > 0);
        if self.closed || self.replan || full || self.wants_victims() {
            return Ok(());
        }
        if pending == 0 {
            return Err(expiry);
        }
        let first = *self.first_event.get_or_insert(now);
        let batch = first + BATCH_WAIT;
        if batch <= now {
            return Ok(());
        }
        Err(Some(expiry.map_or(batch, |expiry| expiry.min(batch))))
    }
}

impl<V> Core<V> {
    pub(super) fn new(tier: Tier, capacity_bytes: u64, clock: Clock) -> Self {
        Self {
            tier,
            clock,
            state: Mutex::new(State {
                index: Index::new(tier, capacity_bytes),
                strategy: None,
                replan: false,
                hurry: false,
                closed: false,
                busy: false,
                freeing: 0,
                first_event: None,
                starved: false,
            }),
            work: Condvar::new(),
            quiet: Condvar::new(),
            freed: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State<V>> {
        // No code under this lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::lock`], once all that was removed is gone, whoever drops it: until then its memory is nobody's.
    pub(super) fn lock_freed(&self) -> MutexGuard<'_, State<V>> {
        self.freed
            .wait_while(self.lock(), |state| state.freeing > 0)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `change` under the lock, wakes the thread if that made work, and drops the values
    /// that were removed without the lock.
    pub(super) fn with<T>(&self, change: impl FnOnce(&mut State<V>) -> T) -> T {
        let mut state = self.lock();
        let pending_before = state.index.pending_events();
        let result = change(&mut state);
        let pending = state.index.pending_events();
        let wake = state.closed
            || state.replan
            || (pending > 0 && (pending_before == 0 || state.hurry))
            || pending >= BATCH_EVENTS
            || state.wants_victims();
        if wake {
            self.work.notify_one();
        }
        self.free(state);
        result
    }

    /// Gives up the lock and drops what was removed.
    fn free(&self, mut state: MutexGuard<'_, State<V>>) {
        if !state.index.has_dropped() {
            return;
        }
        let dropped = state.index.take_dropped();
        state.freeing += 1;
        drop(state);
        let _bell = FreedBell(self);
        drop(dropped);
    }

    /// Tells the thread to look again, such as for an earlier expiry.
    pub(super) fn nudge(&self) {
        self.work.notify_one();
    }

    /// Waits until the strategy has seen everything; false when that took longer than `timeout`.
    pub(super) fn settle(&self, timeout: Duration) -> bool {
        self.with(|state| state.hurry = true);
        self.nudge();
        let waited = self
            .quiet
            .wait_timeout_while(self.lock(), timeout, |state| !state.is_quiet());
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.hurry = false;
        state.is_quiet()
    }

    /// The thread.
    pub(super) fn run(&self) {
        let mut restarts = 0;
        loop {
            let mut state = self.lock();
            loop {
                let now = (self.clock)();
                let due = state.due(now);
                if state.index.has_dropped() {
                    // What is due may be another by then.
                    self.free(state);
                    state = self.lock();
                    continue;
                }
                match due {
                    Ok(()) => break,
                    Err(until) => state = self.sleep(state, until.map(|until| until - now)),
                }
            }
            if state.closed {
                return;
            }
            state.busy = true;
            state.first_event = None;
            let strategy = state.strategy.clone();
            drop(state);
            let bell = QuietBell(self);
            match &strategy {
                Some(strategy) => self.round(strategy.as_ref(), &mut restarts),
                None => self.with(|state| {
                    state.replan = false;
                    state.index.adopt(Plan::default());
                }),
            }
            drop(bell);
        }
    }

    fn sleep<'a>(
        &'a self,
        state: MutexGuard<'a, State<V>>,
        time: Option<Duration>,
    ) -> MutexGuard<'a, State<V>> {
        if state.is_quiet() {
            self.quiet.notify_all();
        }
        match time {
            None => self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
            Some(time) => {
                let woken = self.work.wait_timeout(state, time);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Everything the strategy is to be asked and told now.
    fn round(&self, strategy: &dyn CacheStrategy, restarts: &mut u64) {
        if self.with(|state| std::mem::take(&mut state.replan)) {
            self.replan(strategy);
            *restarts = strategy.restarts();
        }
        let (events, used_bytes) = self.with(|state| {
            let used_bytes = state.index.stats.used_bytes;
            (state.index.take_events(), used_bytes)
        });
        for batch in events.chunks(BATCH_EVENTS) {
            self.ask(|| strategy.observe(self.tier, batch, used_bytes));
        }
        self.admit(strategy);
        self.refill(strategy);
        // Looked at last: a call above may have brought it about.
        let now = strategy.restarts();
        if *restarts != now {
            *restarts = now;
            self.with(|state| state.replan = true);
        }
    }

    fn replan(&self, strategy: &dyn CacheStrategy) {
        let capacity_bytes = self.lock().index.stats.capacity_bytes;
        let plan = self.ask(|| strategy.plan(self.tier, capacity_bytes));
        self.with(|state| {
            state.index.adopt(plan.unwrap_or_default());
            state.starved = false;
        });
    }

    fn admit(&self, strategy: &dyn CacheStrategy) {
        let candidates: Vec<CacheEntry> = self.with(|state| state.index.take_candidates());
        for batch in candidates.chunks(BATCH_EVENTS) {
            let answers = self.ask(|| strategy.admit(self.tier, batch));
            let answers = answers.unwrap_or_else(|| vec![true; batch.len()]);
            if answers.len() != batch.len() {
                self.fault("answered for another number of candidates");
                continue;
            }
            self.with(|state| {
                for (entry, _) in batch.iter().zip(answers).filter(|(_, keep)| !keep) {
                    state.index.remove(entry.id, RemovalCause::Evicted);
                }
            });
        }
    }

    fn refill(&self, strategy: &dyn CacheStrategy) {
        let bytes = self.lock().index.victims_wanted_bytes();
        if bytes == 0 {
            return;
        }
        let mut victims = self
            .ask(|| strategy.victims(self.tier, bytes, VICTIMS_MAX))
            .unwrap_or_default();
        let too_many = victims.len().saturating_sub(VICTIMS_MAX as usize);
        victims.truncate(VICTIMS_MAX as usize);
        let wrong = self.with(|state| {
            let wrong = state.index.reserve(&victims) + too_many;
            state.starved = state.index.victims_wanted_bytes() > 0;
            wrong
        });
        if wrong > 0 {
            self.fault("named victims that are unknown, repeated or too many");
        }
    }

    /// A panic of the strategy is a fault, not ours.
    fn ask<T>(&self, call: impl FnOnce() -> T) -> Option<T> {
        let answer = catch_unwind(AssertUnwindSafe(call));
        if answer.is_err() {
            self.fault("panicked");
        }
        answer.ok()
    }

    fn fault(&self, what: &str) {
        let faults = self.with(|state| {
            state.index.stats.strategy_faults += 1;
            state.index.stats.strategy_faults
        });
        // Every power of two: a strategy that is always wrong must not fill the log.
        if faults.is_power_of_two() {
            tracing::warn!(tier = self.tier.as_str(), faults, "cache strategy {what}");
        }
    }
}

/// Ends a round however it ends, so that nobody waits for ever.
struct QuietBell<'a, V>(&'a Core<V>);

impl<V> Drop for QuietBell<'_, V> {
    fn drop(&mut self) {
        self.0.lock().busy = false;
    }
}

/// Ends the dropping of values however it ends: these may panic going.
struct FreedBell<'a, V>(&'a Core<V>);

impl<V> Drop for FreedBell<'_, V> {
    fn drop(&mut self) {
        self.0.lock().freeing -= 1;
        self.0.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::super::{Cache, CacheKey, NewEntry};
    use super::*;

    /// A value that takes its time to go.
    struct Slow {
        goes: Sender<()>,
        is_watched: Mutex<Receiver<()>>,
        is_gone: Arc<AtomicBool>,
    }

    impl Drop for Slow {
        fn drop(&mut self) {
            self.goes.send(()).unwrap();
            self.is_watched.lock().unwrap().recv().unwrap();
            (0..1000).for_each(|_| std::thread::yield_now());
            self.is_gone.store(true, Ordering::Release);
        }
    }

    #[test]
    fn who_needs_room_waits_for_what_is_being_dropped() {
        let evict = |cache: &Cache<Slow>| cache.evict(|_| true);
        let count = |cache: &Cache<Slow>| cache.count(|_| true) > 0;
        for ask in [evict as fn(&Cache<Slow>) -> bool, count] {
            let (goes, hear_goes) = channel();
            let (watched, is_watched) = channel();
            let is_gone = Arc::new(AtomicBool::new(false));
            let value = Slow {
                goes,
                is_watched: Mutex::new(is_watched),
                is_gone: Arc::clone(&is_gone),
            };
            let entry = NewEntry {
                bytes: 1,
                cost_us: 1,
                tokens: 1,
                ttl: None,
                weight: 100,
            };
            let cache = Cache::new(Tier::Prefix, 1 << 20);
            cache.insert(CacheKey::new("", [1; 32]), Arc::new(value), &entry);
            std::thread::scope(|scope| {
                scope.spawn(|| cache.invalidate_all());
                hear_goes.recv().unwrap();
                watched.send(()).unwrap();
                let _either = ask(&cache);
                assert!(is_gone.load(Ordering::Acquire));
            });
            assert!(!ask(&cache), "nothing is left");
        }
    }
}
