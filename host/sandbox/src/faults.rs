//! Counters of calls and faults, per plugin id and function. They survive reloads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::{CallError, FaultKind};
use crate::options::{Function, Role};

/// Counts of one function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionStats {
    /// Role it belongs to.
    pub role: Role,
    /// Which function.
    pub function: Function,
    /// Calls that ended; the sum of the outcomes below.
    pub calls: u64,
    /// With an answer.
    pub ok: u64,
    /// With a refusal: no fault of the plugin.
    pub refused: u64,
    /// Traps.
    pub trap: u64,
    /// Deadlines missed.
    pub deadline: u64,
    /// Memory or table limits hit.
    pub memory: u64,
    /// Other limits hit.
    pub limit: u64,
    /// Contract broken.
    pub contract: u64,
    /// Microseconds of all calls together, host time included.
    pub time_us: u64,
    /// Answers that came after the caller had gone on (cache strategies).
    pub late: u64,
}

/// Log lines of one plugin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Written.
    pub lines: u64,
    /// Dropped over the rate.
    pub dropped: u64,
    /// Cut to the length limit.
    pub cut: u64,
}

/// Counts of one plugin id, all its revisions together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginStats {
    /// Plugin id.
    pub id: String,
    /// Functions that were called at least once.
    pub functions: Vec<FunctionStats>,
    /// Its log lines.
    pub log: LogStats,
}

#[derive(Default)]
struct Cells {
    ok: AtomicU64,
    refused: AtomicU64,
    faults: [AtomicU64; 5],
    time_us: AtomicU64,
    late: AtomicU64,
}

/// How a call ended, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    Refused,
    Fault(FaultKind),
}

impl Outcome {
    pub(crate) fn of<T>(result: &Result<T, CallError>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(CallError::Refused(_)) => Self::Refused,
            Err(CallError::Fault(fault)) => Self::Fault(fault.kind),
        }
    }
}

/// The counters of one plugin id.
#[derive(Default)]
pub(crate) struct Counters {
    functions: Mutex<BTreeMap<(Role, Function), Arc<Cells>>>,
}

impl Counters {
    pub(crate) fn record(&self, key: (Role, Function), outcome: Outcome, time: Duration) {
        let cells = self.cells(key);
        let cell = match outcome {
            Outcome::Ok => &cells.ok,
            Outcome::Refused => &cells.refused,
            Outcome::Fault(kind) => &cells.faults[fault_index(kind)],
        };
        cell.fetch_add(1, Ordering::Relaxed);
        let time_us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        cells.time_us.fetch_add(time_us, Ordering::Relaxed);
    }

    pub(crate) fn record_late(&self, key: (Role, Function)) {
        self.cells(key).late.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn functions(&self) -> Vec<FunctionStats> {
        let functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        functions
            .iter()
            .map(|(&(role, function), cells)| cells.read(role, function))
            .collect()
    }

    fn cells(&self, key: (Role, Function)) -> Arc<Cells> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Arc::clone(functions.entry(key).or_default())
    }
}

impl Cells {
    fn read(&self, role: Role, function: Function) -> FunctionStats {
        let fault = |kind| self.faults[fault_index(kind)].load(Ordering::Relaxed);
        let mut stats = FunctionStats {
            role,
            function,
            calls: 0,
            ok: self.ok.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            trap: fault(FaultKind::Trap),
            deadline: fault(FaultKind::Deadline),
            memory: fault(FaultKind::Memory),
            limit: fault(FaultKind::Limit),
            contract: fault(FaultKind::Contract),
            time_us: self.time_us.load(Ordering::Relaxed),
            late: self.late.load(Ordering::Relaxed),
        };
        stats.calls = stats.ok
            + stats.refused
            + stats.trap
            + stats.deadline
            + stats.memory
            + stats.limit
            + stats.contract;
        stats
    }
}

fn fault_index(kind: FaultKind) -> usize {
    match kind {
        FaultKind::Trap => 0,
        FaultKind::Deadline => 1,
        FaultKind::Memory => 2,
        FaultKind::Limit => 3,
        FaultKind::Contract => 4,
    }
}
