//! What the engine's handle and its thread both see. Nothing here is held across a forward pass.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use visor_model::DeviceKind;

use crate::error::EngineError;
use crate::stats::EngineStats;

/// Whether the engine can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineState {
    /// The model is being loaded and warmed up.
    Loading,
    /// Loaded and warm.
    Ready {
        /// Where the model computes.
        device: DeviceKind,
    },
    /// No device could load the model; says why.
    Failed(String),
    /// Stopped.
    Stopped,
}

#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<EngineState>,
    changed: Condvar,
    stats: Mutex<EngineStats>,
    /// Set once stopping: when what still runs is cancelled.
    stop_at: Mutex<Option<Instant>>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(EngineState::Loading),
            changed: Condvar::new(),
            stats: Mutex::new(EngineStats::default()),
            stop_at: Mutex::new(None),
        }
    }

    pub(crate) fn state(&self) -> EngineState {
        lock(&self.state).clone()
    }

    pub(crate) fn set_state(&self, state: EngineState) {
        *lock(&self.state) = state;
        self.changed.notify_all();
    }

    /// Waits while `waiting` holds, at most `timeout`; the state then.
    pub(crate) fn wait_while(
        &self,
        timeout: Duration,
        waiting: impl Fn(&EngineState) -> bool,
    ) -> EngineState {
        let state = lock(&self.state);
        let waited = self
            .changed
            .wait_timeout_while(state, timeout, |state| waiting(state));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.clone()
    }

    pub(crate) fn stats(&self) -> MutexGuard<'_, EngineStats> {
        lock(&self.stats)
    }

    /// Begins to stop, or brings the end forward.
    pub(crate) fn stop_at(&self, at: Instant) {
        let mut stop_at = lock(&self.stop_at);
        *stop_at = Some(stop_at.map_or(at, |earlier| earlier.min(at)));
    }

    pub(crate) fn is_stopping(&self) -> bool {
        lock(&self.stop_at).is_some()
    }

    /// Whether the time to finish what runs is over.
    pub(crate) fn is_stop_due(&self) -> bool {
        lock(&self.stop_at).is_some_and(|at| at <= Instant::now())
    }

    /// Why a request cannot be taken in now, if it cannot.
    pub(crate) fn refusal(&self) -> Option<EngineError> {
        if self.is_stopping() {
            return Some(EngineError::Stopped);
        }
        match self.state() {
            EngineState::Ready { .. } => None,
            EngineState::Loading => Some(EngineError::NotReady),
            EngineState::Failed(why) => Some(EngineError::NoModel(why)),
            EngineState::Stopped => Some(EngineError::Stopped),
        }
    }
}

/// None of these values can be left half changed by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
