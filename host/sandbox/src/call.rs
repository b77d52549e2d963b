//! One call: a fresh store, a deadline, limits, and an answer or a fault.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmtime::component::{Instance, ResourceTableError};
use wasmtime::{Store, Trap, UpdateDeadline};

use crate::chat::{cut, one_line};
use crate::error::{CallError, ErrorCode, Fault, FaultKind, GuestError};
use crate::faults::Outcome;
use crate::guest::{GuestState, HostFault, HostRefusal, late};
use crate::options::{Function, Role};
use crate::plugin::Core;
use crate::wasm_engine::Slot;

/// Why the body of a call stopped early.
pub(crate) enum Halt {
    /// The guest trapped, or a host function ended it.
    Wasm(wasmtime::Error),
    /// The guest answered with an error of its own.
    Refused(GuestError),
    /// The answer fails a check.
    Broken(String),
}

impl From<wasmtime::Error> for Halt {
    fn from(error: wasmtime::Error) -> Self {
        Self::Wasm(error)
    }
}

impl From<ResourceTableError> for Halt {
    fn from(error: ResourceTableError) -> Self {
        Self::Wasm(error.into())
    }
}

/// A living instance. After a fault it is dead and says so.
pub(crate) struct Guest {
    store: Store<GuestState>,
    instance: Instance,
    dead: Option<Fault>,
    _slot: Slot,
}

impl Guest {
    /// An instance that is built and configured.
    pub(crate) fn open(
        core: &Arc<Core>,
        role: Role,
        request_id: String,
    ) -> Result<Self, CallError> {
        let mut guest = Self::build(core, role, request_id)?;
        let config = core.settings.config_json.clone();
        guest.call(Function::Configure, |store, instance| {
            let common = core.exports.common.load(&mut *store, instance)?;
            common
                .visor_plugin_lifecycle()
                .call_configure(store, &config)?
                .map_err(|issues| {
                    let first = issues
                        .first()
                        .map(|issue| issue.message.as_str())
                        .unwrap_or_default();
                    Halt::Broken(format!(
                        "refuses the configuration it took at load: {first}"
                    ))
                })
        })?;
        Ok(guest)
    }

    /// An instance that is built, not configured.
    pub(crate) fn build(
        core: &Arc<Core>,
        role: Role,
        request_id: String,
    ) -> Result<Self, CallError> {
        let shared = &core.shared;
        let wait = Duration::from_millis(shared.options.instance_wait_ms);
        let slot = shared
            .slots
            .take(wait)
            .ok_or_else(|| busy(shared.slots.max()))?;
        let mut store = Store::new(&shared.wasm_engine, GuestState::new(core, role, request_id));
        let limits = &store.data().limits;
        let (hostcall_bytes_max, handles_max) = (limits.hostcall_bytes_max, limits.handles_max);
        store.set_hostcall_fuel(hostcall_bytes_max);
        store.set_max_component_handles(handles_max);
        store.limiter(|state| &mut state.limiter);
        store.epoch_deadline_callback(|context| {
            if Instant::now() < context.data().deadline {
                Ok(UpdateDeadline::Continue(1))
            } else {
                Err(late().into())
            }
        });
        let made = timed(&mut store, Function::Instantiate, |store| {
            Ok(core.exports.pre.instantiate(store)?)
        });
        let instance = made?;
        Ok(Self {
            store,
            instance,
            dead: None,
            _slot: slot,
        })
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.is_some()
    }

    /// Calls into the guest within the budget of `function`; counts and logs how it ends.
    pub(crate) fn call<T>(
        &mut self,
        function: Function,
        body: impl FnOnce(&mut Store<GuestState>, &Instance) -> Result<T, Halt>,
    ) -> Result<T, CallError> {
        if let Some(fault) = &self.dead {
            return Err(CallError::Fault(fault.clone()));
        }
        let instance = &self.instance;
        let result = timed(&mut self.store, function, |store| body(store, instance));
        if let Err(CallError::Fault(fault)) = &result {
            self.dead = Some(fault.clone());
        }
        result
    }
}

fn timed<T>(
    store: &mut Store<GuestState>,
    function: Function,
    body: impl FnOnce(&mut Store<GuestState>) -> Result<T, Halt>,
) -> Result<T, CallError> {
    let core = Arc::clone(&store.data().core);
    let role = store.data().role;
    let started = Instant::now();
    let budget = core.budget(function);
    let state = store.data_mut();
    state.function = function;
    state.deadline = started + budget;
    store.set_epoch_deadline(1);
    let ticking = core.shared.ticker.run();
    let result = body(store);
    drop(ticking);
    let time = started.elapsed();
    let result = result.map_err(|halt| halt_to_error(halt, store.data(), budget));
    core.kept
        .counters
        .record((role, function), Outcome::of(&result), time);
    result
}

fn halt_to_error(halt: Halt, state: &GuestState, budget: Duration) -> CallError {
    let (kind, message, detail) = match halt {
        Halt::Refused(refusal) => return CallError::Refused(bounded(refusal)),
        Halt::Broken(message) => (FaultKind::Contract, message, String::new()),
        Halt::Wasm(error) => {
            if let Some(HostRefusal(refusal)) = error.downcast_ref() {
                return CallError::Refused(bounded(refusal.clone()));
            }
            let (kind, message) = classify(&error, budget);
            // What fails here otherwise is the host: no pool slot, no address space.
            let is_building = state.function == Function::Instantiate;
            let kind = match kind {
                FaultKind::Contract if is_building => FaultKind::Limit,
                kind => kind,
            };
            (kind, message, format!("{error:?}"))
        }
    };
    let fault = Fault {
        plugin: state.core.id.clone(),
        role: state.role,
        function: state.function,
        kind,
        message: one_line(&message, MESSAGE_BYTES_MAX),
    };
    tracing::warn!(
        target: "visor::plugin",
        plugin = %state.core.id,
        revision = %state.core.revision_short(),
        request = %state.request_id,
        detail = cut(&detail, DETAIL_BYTES_MAX),
        "{fault}"
    );
    CallError::Fault(fault)
}

/// What a client may see of a plugin's words, and what the log may take of a backtrace.
const MESSAGE_BYTES_MAX: usize = 1024;
const DETAIL_BYTES_MAX: usize = 4096;

fn bounded(mut refusal: GuestError) -> GuestError {
    refusal.message = cut(&refusal.message, MESSAGE_BYTES_MAX).to_owned();
    refusal.param = refusal
        .param
        .map(|param| cut(&param, MESSAGE_BYTES_MAX).to_owned());
    refusal
}

fn busy(instances_max: u32) -> CallError {
    CallError::Refused(GuestError {
        code: ErrorCode::Overloaded,
        message: format!("all {instances_max} plugin instances are busy"),
        param: None,
        retry_after_s: Some(1),
    })
}

/// Refuses text that no instance of the role could hand back.
pub(crate) fn check_text(core: &Core, role: Role, bytes: usize) -> Result<(), CallError> {
    let bytes_max = core.limits(role).text_bytes_max();
    if bytes <= bytes_max {
        return Ok(());
    }
    let message = format!("the text is {bytes} bytes long; {bytes_max} are allowed");
    Err(CallError::Refused(GuestError::new(
        ErrorCode::TooLarge,
        message,
    )))
}

fn classify(error: &wasmtime::Error, budget: Duration) -> (FaultKind, String) {
    let root = error.root_cause().to_string();
    if let Some(fault) = error.downcast_ref::<HostFault>() {
        let message = match fault.kind {
            FaultKind::Deadline => format!("not done within {} ms", budget.as_millis()),
            _ => fault.message.clone(),
        };
        return (fault.kind, message);
    }
    if let Some(trap) = error.downcast_ref::<Trap>() {
        return (FaultKind::Trap, trap.to_string());
    }
    if let Some(error) = error.downcast_ref::<ResourceTableError>() {
        return match error {
            ResourceTableError::Full => {
                (FaultKind::Limit, "holds too many host objects".to_owned())
            }
            _ => (
                FaultKind::Contract,
                format!("uses a handle it must not: {error}"),
            ),
        };
    }
    if error.is::<wasmtime::PoolConcurrencyLimitError>() {
        return (FaultKind::Limit, root);
    }
    // wasmtime keeps the types of these two to itself.
    if root.starts_with("too much data is being copied") || root.contains("handle limit exceeded") {
        return (FaultKind::Limit, root);
    }
    (FaultKind::Contract, root)
}
