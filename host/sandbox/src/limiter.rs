//! Memory and table limits of one instance. Growing past them traps with the numbers.

use wasmtime::ResourceLimiter;

use crate::error::FaultKind;
use crate::guest::HostFault;
use crate::options::RoleLimits;
use crate::wasm_engine::{
    CORE_INSTANCES_PER_COMPONENT, MEMORIES_PER_COMPONENT, TABLES_PER_COMPONENT,
};

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
        CORE_INSTANCES_PER_COMPONENT as usize
    }

    fn tables(&self) -> usize {
        TABLES_PER_COMPONENT as usize
    }

    fn memories(&self) -> usize {
        MEMORIES_PER_COMPONENT as usize
    }
}

fn over(what: &str, wanted: usize, max: usize) -> wasmtime::Error {
    HostFault::new(
        FaultKind::Memory,
        format!("wants {wanted} {what}; {max} are allowed"),
    )
    .into()
}
