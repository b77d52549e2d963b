//! The long-lived instance of a cache strategy, on its own thread.
//!
//! Callers wait no longer than their budget. An instance that faults is rebuilt, three times in
//! five minutes; after that calls fail at once until the oldest fault is that old.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{CallError, Fault, FaultKind};
use crate::faults::Outcome;
use crate::options::{Function, Role};
use crate::plugin::Core;
use crate::strategy::instance::StrategyInstance;
use crate::strategy::{CacheEntry, CacheEvent, Lookup, Scoping, StrategyPlan, Tier};

/// Calls that may wait; a strategy that is further behind is late anyway.
const QUEUE_CALLS_MAX: usize = 64;
const FAULTS_MAX: usize = 3;
const FAULTS_WINDOW: Duration = Duration::from_secs(300);

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// Handle of the thread; calls wait at most their budget. Dropping it ends the thread.
pub struct StrategyActor {
    core: Arc<Core>,
    jobs: Option<SyncSender<Job>>,
    restarts: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl StrategyActor {
    pub(crate) fn start(core: &Arc<Core>) -> Result<Self, Fault> {
        let restarts = Arc::new(AtomicU64::new(0));
        let (jobs, inbox) = sync_channel(QUEUE_CALLS_MAX);
        let instance =
            StrategyInstance::open(core).map_err(|e| to_fault(core, Function::Create, e))?;
        let worker = Worker {
            core: Arc::clone(core),
            instance: Some(instance),
            capacities: BTreeMap::new(),
            faults: VecDeque::new(),
            restarts: Arc::clone(&restarts),
        };
        let thread = thread::Builder::new()
            .name(format!("strategy-{}", core.id))
            .spawn(move || work(worker, &inbox))
            .map_err(|error| {
                let message = format!("no thread for the strategy: {error}");
                fault(core, Function::Create, FaultKind::Limit, message)
            })?;
        Ok(Self {
            core: Arc::clone(core),
            jobs: Some(jobs),
            restarts,
            thread: Some(thread),
        })
    }

    /// Creates the strategy of a tier. Asking again starts that tier afresh.
    ///
    /// # Errors
    /// The fault of the strategy.
    pub fn plan(&self, tier: Tier, capacity_bytes: u64) -> Result<StrategyPlan, Fault> {
        self.ask(Function::Create, move |worker| {
            worker.capacities.insert(tier, capacity_bytes);
            worker.run(move |instance| instance.create(tier, capacity_bytes))
        })
    }

    /// Chooses who shares with this request.
    ///
    /// # Errors
    /// The fault of the strategy.
    pub fn scope(&self, lookup: Lookup) -> Result<Scoping, Fault> {
        self.ask(Function::Scope, move |worker| {
            worker.run(move |i| i.scope(lookup))
        })
    }

    /// Tells what happened in a planned tier.
    ///
    /// # Errors
    /// The fault of the strategy.
    pub fn observe(
        &self,
        tier: Tier,
        events: Vec<CacheEvent>,
        used_bytes: u64,
    ) -> Result<(), Fault> {
        self.ask(Function::Observe, move |worker| {
            worker.run(move |instance| instance.observe(tier, events, used_bytes))
        })
    }

    /// Entries to remove next, best first, none twice, at most `at_most`.
    ///
    /// # Errors
    /// The fault of the strategy.
    pub fn victims(&self, tier: Tier, bytes: u64, at_most: u32) -> Result<Vec<u64>, Fault> {
        self.ask(Function::Victims, move |worker| {
            worker.run(move |instance| instance.victims(tier, bytes, at_most))
        })
    }

    /// One answer per candidate: whether to keep it.
    ///
    /// # Errors
    /// The fault of the strategy.
    pub fn admit(&self, tier: Tier, candidates: Vec<CacheEntry>) -> Result<Vec<bool>, Fault> {
        self.ask(Function::Admit, move |worker| {
            worker.run(move |instance| instance.admit(tier, candidates))
        })
    }

    /// How often the instance was rebuilt after a fault. When this grows, replay `Inserted` for
    /// what is in the caches: the new instance knows nothing.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    fn ask<T: Send + 'static>(
        &self,
        function: Function,
        call: impl FnOnce(&mut Worker) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, Fault> {
        let budget = self.core.budget(function);
        let deadline = Instant::now() + budget;
        let (reply, answer) = sync_channel(1);
        let job: Job = Box::new(move |worker| {
            if Instant::now() >= deadline {
                worker
                    .core
                    .kept
                    .counters
                    .record_late((Role::CacheStrategy, function));
                return;
            }
            let result = call(worker);
            if Instant::now() >= deadline || reply.send(result).is_err() {
                worker
                    .core
                    .kept
                    .counters
                    .record_late((Role::CacheStrategy, function));
            }
        });
        let failed = |kind, message: String| fault(&self.core, function, kind, message);
        let stopped = || failed(FaultKind::Limit, "its thread has ended".to_owned());
        match self.jobs.as_ref().ok_or_else(stopped)?.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Disconnected(_)) => return Err(stopped()),
            Err(TrySendError::Full(_)) => {
                let fault = failed(FaultKind::Limit, format!("{QUEUE_CALLS_MAX} calls wait"));
                self.count(function, &fault);
                return Err(fault);
            }
        }
        match answer.recv_timeout(budget) {
            Ok(result) => result.map_err(|error| to_fault(&self.core, function, error)),
            Err(_) => {
                let message = format!("no answer within {} ms", budget.as_millis());
                Err(failed(FaultKind::Deadline, message))
            }
        }
    }

    fn count(&self, function: Function, fault: &Fault) {
        let key = (Role::CacheStrategy, function);
        self.core
            .kept
            .counters
            .record(key, Outcome::Fault(fault.kind), Duration::ZERO);
    }
}

impl Drop for StrategyActor {
    fn drop(&mut self) {
        self.jobs = None; // Ends the thread's loop.
        if let Some(thread) = self.thread.take() {
            // At most one call is running, and that has a deadline. A panic was logged.
            let _ = thread.join();
        }
    }
}

struct Worker {
    core: Arc<Core>,
    instance: Option<StrategyInstance>,
    capacities: BTreeMap<Tier, u64>,
    faults: VecDeque<Instant>,
    restarts: Arc<AtomicU64>,
}

fn work(mut worker: Worker, inbox: &Receiver<Job>) {
    while let Ok(job) = inbox.recv() {
        job(&mut worker);
    }
}

impl Worker {
    fn run<T>(
        &mut self,
        call: impl FnOnce(&mut StrategyInstance) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        if self.instance.is_none() {
            self.rebuild()?;
        }
        let Some(instance) = self.instance.as_mut() else {
            unreachable!("rebuild makes an instance or fails");
        };
        let result = call(instance);
        if instance.is_dead() {
            self.instance = None;
            self.faults.push_back(Instant::now());
        }
        result
    }

    fn rebuild(&mut self) -> Result<(), CallError> {
        let now = Instant::now();
        self.faults
            .retain(|&at| now.duration_since(at) < FAULTS_WINDOW);
        if self.faults.len() >= FAULTS_MAX {
            let message = format!(
                "rests after {FAULTS_MAX} faults in {} s; the native algorithm serves",
                FAULTS_WINDOW.as_secs()
            );
            let function = Function::Create;
            return Err(CallError::Fault(fault(
                &self.core,
                function,
                FaultKind::Limit,
                message,
            )));
        }
        match self.build() {
            Ok(instance) => {
                self.instance = Some(instance);
                self.restarts.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                self.faults.push_back(now);
                Err(error)
            }
        }
    }

    fn build(&self) -> Result<StrategyInstance, CallError> {
        let mut instance = StrategyInstance::open(&self.core)?;
        for (&tier, &capacity_bytes) in &self.capacities {
            instance.create(tier, capacity_bytes)?;
        }
        Ok(instance)
    }
}

fn fault(core: &Core, function: Function, kind: FaultKind, message: String) -> Fault {
    Fault {
        plugin: core.id.clone(),
        role: Role::CacheStrategy,
        function,
        kind,
        message,
    }
}

/// Strategies have no way to refuse; only the host can, when all instances are busy.
fn to_fault(core: &Core, function: Function, error: CallError) -> Fault {
    match error {
        CallError::Fault(fault) => fault,
        CallError::Refused(refusal) => fault(core, function, FaultKind::Limit, refusal.message),
    }
}
