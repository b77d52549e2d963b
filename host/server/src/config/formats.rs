//! `[formats]`: what a schema or a regular expression of a client may cost.

use serde::{Deserialize, Serialize};

/// Limits on formats. Work is counted by the library that follows them: some 14 000 units, or 20 000 items, take a millisecond.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FormatsConfig {
    /// Largest schema or regular expression, in bytes.
    pub bytes_max: u64,
    /// Most work to compile one, in units.
    pub compile_work_max: u64,
    /// Milliseconds that compiling one may take, and waiting for a place to.
    pub compile_ms_max: u64,
    /// Those compiled at once.
    pub compiles_max: usize,
    /// Memory for those compiled last, which are not compiled again, in MiB; 0 keeps none.
    pub kept_mib: u64,
    /// Most symbols of a compiled one.
    pub symbols_max: usize,
    /// Most work to find what may come next, in units; the engine waits for it.
    pub step_work_max: u64,
    /// Most ways to read an answer so far, in items, for each token; the engine waits for it.
    pub step_items_max: usize,
    /// Most states that following one answer may come by; each takes 1 to 2 KiB.
    pub states_max: usize,
    /// Most tools of a request.
    pub tools_max: u32,
    /// Most bytes of all its tools: names, descriptions and schemas.
    pub tools_bytes_max: u64,
    /// Most calls in one answer.
    pub calls_max: u32,
}

impl Default for FormatsConfig {
    fn default() -> Self {
        Self {
            bytes_max: 32 << 10,
            compile_work_max: 1_000_000,
            compile_ms_max: 5000,
            compiles_max: 4,
            kept_mib: 32,
            symbols_max: 100_000,
            step_work_max: 30_000,
            step_items_max: 10_000,
            states_max: 20_000,
            tools_max: 128,
            tools_bytes_max: 128 << 10,
            calls_max: 16,
        }
    }
}
