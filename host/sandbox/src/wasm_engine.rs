//! The one wasmtime engine: its settings, its clock, and the count of living instances.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use wasmtime::{Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

use crate::error::SandboxError;
use crate::options::{Role, SandboxOptions};

/// One tick of the deadline clock.
const TICK: Duration = Duration::from_millis(1);
/// Where no call runs, the clock looks for one this often, and a deadline may fire that much late; it falls asleep when it has seen none
/// so many times. To wake it for each call takes a third of a token's way to the client, and tokens follow each other.
const GLANCE: Duration = Duration::from_millis(10);
const GLANCES_MAX: u32 = 100;
/// Core instances, tables and memories of one component: a Rust guest has three, two and one, what
/// is composed of two of them twice that. The pool has as many for every instance that may live, so
/// that no plugin takes what others need; tables and memories reserve address space.
pub(crate) const CORE_INSTANCES_PER_COMPONENT: u32 = 64;
pub(crate) const TABLES_PER_COMPONENT: u32 = 4;
pub(crate) const MEMORIES_PER_COMPONENT: u32 = 2;
/// Tables and memories of one module, above what a component may have: `load` says it better.
const PARTS_PER_MODULE: u32 = 64;
/// Bookkeeping of one component or core instance.
const INSTANCE_BYTES_MAX: usize = 4 << 20;
/// Memory and tables kept resident between two uses of a slot. A Rust guest touches less;
/// keeping more makes every instantiation clear more.
const MEMORY_KEEP_RESIDENT: usize = 256 << 10;
const TABLE_KEEP_RESIDENT: usize = 64 << 10;
/// Unmapped bytes behind a memory where address space is short.
const GUARD_BYTES: u64 = 64 << 10;

/// Builds the engine: with a pool where the address space allows it, else on demand.
pub(crate) fn build_engine(options: &SandboxOptions) -> Result<Engine, SandboxError> {
    let mut config = Config::new();
    config.epoch_interruption(true);
    config.concurrency_support(false);
    config.wasm_component_model(true);
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool(options)));
    let pooled = match Engine::new(&config) {
        Ok(engine) => return Ok(engine),
        Err(error) => error,
    };
    tracing::warn!(
        error = %format_args!("{pooled:#}"),
        "no address space for the plugin instance pool; instances are allocated on demand, \
         which costs some 20 us per call"
    );
    // Else every memory would reserve 4 GiB, to save bounds checks.
    config.memory_reservation(largest_memory_bytes(options) as u64);
    config.memory_reservation_for_growth(0);
    config.memory_guard_size(GUARD_BYTES);
    config.allocation_strategy(InstanceAllocationStrategy::OnDemand);
    Engine::new(&config).map_err(|error| SandboxError::Start(format!("{error:#}")))
}

fn largest_memory_bytes(options: &SandboxOptions) -> usize {
    let limits = Role::ALL.map(|role| options.role(role).memory_bytes_max);
    limits.into_iter().max().unwrap_or(0)
}

fn pool(options: &SandboxOptions) -> PoolingAllocationConfig {
    let limits = Role::ALL.map(|role| options.role(role));
    let memory_bytes = largest_memory_bytes(options);
    let table_elements = limits
        .iter()
        .map(|l| l.table_elements_max)
        .max()
        .unwrap_or(0);
    // A tenth more than may live, for instances whose slot is not yet cleared.
    let instances = options
        .instances_max
        .saturating_add(options.instances_max / 10)
        .max(8);
    let mut pool = PoolingAllocationConfig::default();
    pool.total_component_instances(instances)
        .total_core_instances(instances.saturating_mul(CORE_INSTANCES_PER_COMPONENT))
        .total_memories(instances.saturating_mul(MEMORIES_PER_COMPONENT))
        .total_tables(instances.saturating_mul(TABLES_PER_COMPONENT))
        .max_core_instances_per_component(CORE_INSTANCES_PER_COMPONENT)
        .max_tables_per_module(PARTS_PER_MODULE)
        .max_memories_per_module(PARTS_PER_MODULE)
        .max_component_instance_size(INSTANCE_BYTES_MAX)
        .max_core_instance_size(INSTANCE_BYTES_MAX)
        .max_memory_size(memory_bytes)
        .table_elements(table_elements)
        .linear_memory_keep_resident(MEMORY_KEEP_RESIDENT)
        .table_keep_resident(TABLE_KEEP_RESIDENT);
    pool
}

/// The thread that ticks the engine's epoch while calls run, looks for calls a while longer, and then sleeps until there is one.
pub(crate) struct Ticker {
    state: Arc<TickerState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct TickerState {
    running_calls: AtomicUsize,
    /// Calls ran since it was last looked at.
    any_ran: AtomicBool,
    /// The next call has to wake it.
    sleeps: AtomicBool,
    stop: AtomicBool,
}

/// While it lives, the epoch advances, from [`GLANCE`] on at the latest.
pub(crate) struct Ticking<'a>(&'a Ticker);

impl Ticker {
    pub(crate) fn start(engine: Engine) -> Result<Self, SandboxError> {
        let name = "plugin-clock";
        let state = Arc::new(TickerState::default());
        let seen = Arc::clone(&state);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || tick(&engine, &seen))
            .map_err(|source| SandboxError::Thread { name, source })?;
        Ok(Self {
            state,
            thread: Some(thread),
        })
    }

    pub(crate) fn run(&self) -> Ticking<'_> {
        self.state.running_calls.fetch_add(1, Ordering::SeqCst);
        // Either it is seen to sleep here, or the call is seen before it does.
        if self.state.sleeps.load(Ordering::SeqCst) {
            self.unpark();
        }
        Ticking(self)
    }

    fn unpark(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

fn tick(engine: &Engine, state: &TickerState) {
    let mut glances = 0;
    while !state.stop.load(Ordering::SeqCst) {
        if state.running_calls.load(Ordering::SeqCst) > 0 {
            glances = 0;
            thread::sleep(TICK);
            engine.increment_epoch();
            continue;
        }
        if state.any_ran.swap(false, Ordering::Relaxed) {
            glances = 0;
        }
        if glances < GLANCES_MAX {
            glances += 1;
            thread::sleep(GLANCE);
            continue;
        }
        state.sleeps.store(true, Ordering::SeqCst);
        if state.running_calls.load(Ordering::SeqCst) == 0 {
            thread::park(); // An unpark between the look and this line makes it return at once.
        }
        state.sleeps.store(false, Ordering::SeqCst);
    }
}

impl Drop for Ticking<'_> {
    fn drop(&mut self) {
        self.0.state.any_ran.store(true, Ordering::Relaxed);
        self.0.state.running_calls.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.unpark();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say; a panic in it would have been a bug of ours.
            let _ = thread.join();
        }
    }
}

/// Instances that may live at once.
pub(crate) struct Slots {
    max: u32,
    used: Mutex<u32>,
    freed: Condvar,
}

/// The right to one living instance.
pub(crate) struct Slot(Arc<Slots>);

impl Slots {
    pub(crate) fn new(max: u32) -> Arc<Self> {
        Arc::new(Self {
            max,
            used: Mutex::new(0),
            freed: Condvar::new(),
        })
    }

    pub(crate) fn max(&self) -> u32 {
        self.max
    }

    pub(crate) fn used(&self) -> u32 {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits at most `wait` for a slot.
    pub(crate) fn take(self: &Arc<Self>, wait: Duration) -> Option<Slot> {
        let deadline = Instant::now() + wait;
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        while *used >= self.max {
            let left = deadline.checked_duration_since(Instant::now())?;
            used = self
                .freed
                .wait_timeout(used, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *used += 1;
        Some(Slot(Arc::clone(self)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.used.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_house_makes_the_next_wait_and_then_give_up() {
        let slots = Slots::new(1);
        let first = slots.take(Duration::ZERO).expect("one is free");
        assert!(slots.take(Duration::from_millis(5)).is_none());
        let waiting = {
            let slots = Arc::clone(&slots);
            thread::spawn(move || slots.take(Duration::from_secs(30)).is_some())
        };
        drop(first);
        assert!(waiting.join().unwrap());
        assert_eq!(slots.used(), 0);
    }

    #[test]
    fn a_call_wakes_the_clock_that_sleeps() {
        let engine = build_engine(&SandboxOptions::default()).unwrap();
        let ticker = Ticker::start(engine).unwrap();
        let becomes = |sleeps: bool| {
            let give_up = Instant::now() + Duration::from_secs(30);
            while ticker.state.sleeps.load(Ordering::SeqCst) != sleeps {
                assert!(Instant::now() < give_up, "it never sleeps: {sleeps}");
                thread::sleep(TICK);
            }
        };
        becomes(true);
        let running = ticker.run();
        becomes(false);
        drop(running);
        becomes(true);
    }

    #[test]
    fn the_epoch_advances_only_while_a_call_runs() {
        let engine = build_engine(&SandboxOptions::default()).unwrap();
        let ticker = Ticker::start(engine).unwrap();
        let running = ticker.run();
        assert_eq!(ticker.state.running_calls.load(Ordering::SeqCst), 1);
        drop(running);
        assert_eq!(ticker.state.running_calls.load(Ordering::SeqCst), 0);
    }
}
