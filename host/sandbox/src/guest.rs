//! What the host keeps for one instance while it lives.

use std::sync::Arc;
use std::time::Instant;

use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use crate::adapter::lifted::Lifted;
use crate::error::{FaultKind, GuestError};
use crate::limiter::Limiter;
use crate::options::{Function, Role, RoleLimits};
use crate::plugin::Core;

/// An error of the host that ends the guest's call and says of which kind it is.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct HostFault {
    pub(crate) kind: FaultKind,
    pub(crate) message: String,
}

impl HostFault {
    pub(crate) fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }
}

/// What a client asked for cannot be had: it ends the guest's call, and is not the guest's fault.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", .0.message)]
pub(crate) struct HostRefusal(pub(crate) GuestError);

/// The `T` of the store: handles, limits, and who is calling.
pub(crate) struct GuestState {
    pub(crate) table: ResourceTable,
    pub(crate) limiter: Limiter,
    pub(crate) limits: RoleLimits,
    pub(crate) core: Arc<Core>,
    pub(crate) role: Role,
    pub(crate) function: Function,
    pub(crate) request_id: String,
    pub(crate) deadline: Instant,
    /// Pixels read by the image operations it had run.
    pub(crate) image_work_px: u64,
    /// Of the request that an exchange is about.
    pub(crate) lifted: Arc<Lifted>,
    /// Bytes of it that a tokenizer was given.
    pub(crate) tokenized_bytes: usize,
    wasi: Option<WasiCtx>,
}

impl GuestState {
    pub(crate) fn new(core: &Arc<Core>, role: Role, request_id: String) -> Self {
        let limits = core.limits(role);
        let mut table = ResourceTable::new();
        table.set_max_capacity(limits.handles_max);
        Self {
            table,
            limiter: Limiter::new(&limits),
            limits,
            core: Arc::clone(core),
            role,
            function: Function::Instantiate,
            request_id,
            deadline: Instant::now(),
            image_work_px: 0,
            lifted: Arc::default(),
            tokenized_bytes: 0,
            wasi: None,
        }
    }

    /// Every import calls this first: epochs do not see the time that host functions take.
    pub(crate) fn on_time(&self) -> wasmtime::Result<()> {
        if Instant::now() < self.deadline {
            Ok(())
        } else {
            Err(late().into())
        }
    }
}

/// The fault of a guest whose time is over.
pub(crate) fn late() -> HostFault {
    HostFault::new(FaultKind::Deadline, "not done in time")
}

impl WasiView for GuestState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        // Nothing is granted: no files, no network, no environment, closed standard streams.
        let ctx = self.wasi.get_or_insert_with(|| WasiCtx::builder().build());
        WasiCtxView {
            ctx,
            table: &mut self.table,
        }
    }
}
