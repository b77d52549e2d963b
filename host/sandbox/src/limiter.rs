//! Memory and table limits of one instance. Growing past them traps with the numbers.

use wasmtime::ResourceLimiter;

use crate::error::FaultKind;
use crate::guest::HostFault;
use crate::options::RoleLimits;

/// Instances, tables and memories inside one store. Interpreters bring some; nobody needs more.
const INSTANCES_MAX: usize = 64;
const TABLES_MAX: usize = 16;
const MEMORIES_MAX: usize = 8;

/// Counts what all memories and tables of a store take together.
pub(crate) struct Limiter {
    memory_bytes_max: usize,
    memory_bytes: usize,
    table_elements_max: usize,
    table_elements: usize,
}

impl Limiter {
    pub(crate) fn new(limits: &RoleLimits) -> Self {
        Self {
            memory_bytes_max: limits.memory_bytes_max,
            memory_bytes: 0,
            table_elements_max: limits.table_elements_max,
            table_elements: 0,
        }
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = self
            .memory_bytes
            .saturating_sub(current)
            .saturating_add(desired);
        if total > self.memory_bytes_max {
            return Err(over("bytes of memory", total, self.memory_bytes_max));
        }
        self.memory_bytes = total;
        Ok(true)
    }

    fn memory_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        Err(HostFault::new(FaultKind::Memory, format!("memory cannot grow: {error:#}")).into())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = self
            .table_elements
            .saturating_sub(current)
            .saturating_add(desired);
        if total > self.table_elements_max {
            return Err(over("table elements", total, self.table_elements_max));
        }
        self.table_elements = total;
        Ok(true)
    }

    fn table_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        Err(HostFault::new(FaultKind::Memory, format!("a table cannot grow: {error:#}")).into())
    }

    fn instances(&self) -> usize {
        INSTANCES_MAX
    }

    fn tables(&self) -> usize {
        TABLES_MAX
    }

    fn memories(&self) -> usize {
        MEMORIES_MAX
    }
}

fn over(what: &str, wanted: usize, max: usize) -> wasmtime::Error {
    HostFault::new(
        FaultKind::Memory,
        format!("wants {wanted} {what}; {max} are allowed"),
    )
    .into()
}
