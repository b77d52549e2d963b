//! One exchange: an adapter instance that lives as long as its HTTP request.

use std::sync::Arc;

use wasmtime::Store;
use wasmtime::component::{Instance, ResourceAny};

use crate::adapter::types::{Event, HttpRequest, Next, Progress, Response, Route, Step};
use crate::adapter::{checks, convert};
use crate::bindings::adapter::AdapterPlugin;
use crate::bindings::adapter::exports::visor::plugin::adapter as wit;
use crate::call::{Guest, Halt, check_text};
use crate::error::{CallError, GuestError};
use crate::guest::GuestState;
use crate::host::adapter_input::RequestHandle;
use crate::options::{Function, Role};
use crate::plugin::Core;

/// A running exchange. After a fault every further call fails the same way.
pub struct Exchange {
    guest: Guest,
    bindings: AdapterPlugin,
    handle: ResourceAny,
    generations_left: u32,
}

impl Exchange {
    pub(crate) fn start(core: &Arc<Core>, request: HttpRequest) -> Result<(Self, Step), CallError> {
        check_text(
            core,
            Role::Adapter,
            request.text.as_ref().map_or(0, String::len),
        )?;
        let mut guest = Guest::open(core, Role::Adapter, request.id.clone())?;
        let lifted = Arc::clone(&request.lifted);
        let left = core.shared.options.generations_max;
        let (bindings, handle, step) = guest.call(Function::Start, |store, instance| {
            let bindings = bindings(core, &mut *store, instance)?;
            store.data_mut().lifted = lifted;
            let request = store.data_mut().table.push(RequestHandle::new(request))?;
            let exchange = bindings.visor_plugin_adapter().exchange();
            let answer = exchange.call_start(&mut *store, request)?;
            let (handle, step) = answer.map_err(|e| Halt::Refused(e.into()))?;
            let step = convert::step(step, &mut store.data_mut().table)?;
            check_step(&step, left).map_err(Halt::Broken)?;
            Ok((bindings, handle, step))
        })?;
        let started = match &step {
            Step::Respond(_) => 0,
            Step::Generate(_, generations) => count(generations.len()),
        };
        Ok((
            Self {
                guest,
                bindings,
                handle,
                generations_left: left - started,
            },
            step,
        ))
    }

    /// Hands events over, at least one, and takes bytes back.
    ///
    /// # Errors
    /// A refusal of the adapter, or its fault.
    pub fn advance(&mut self, events: Vec<Event>) -> Result<Progress, CallError> {
        let events: Vec<wit::Event> = events.into_iter().map(Into::into).collect();
        let Self {
            guest,
            bindings,
            handle,
            generations_left,
        } = self;
        let progress = guest.call(Function::Advance, |store, _| {
            let exchange = bindings.visor_plugin_adapter().exchange();
            let answer = exchange.call_advance(&mut *store, *handle, &events)?;
            let progress = answer.map_err(|e| Halt::Refused(e.into()))?;
            let progress = convert::progress(progress, &mut store.data_mut().table)?;
            if let Next::Generate(generations) = &progress.next {
                checks::generations(generations, *generations_left).map_err(Halt::Broken)?;
            }
            let checked = progress.frame.as_ref().map_or(Ok(()), checks::frame);
            checked.map_err(Halt::Broken)?;
            Ok(progress)
        })?;
        if let Next::Generate(generations) = &progress.next {
            *generations_left -= count(generations.len());
        }
        Ok(progress)
    }

    /// Bytes that keep an idle incremental response alive.
    ///
    /// # Errors
    /// The fault of the adapter.
    pub fn keep_alive(&mut self) -> Result<Vec<u8>, CallError> {
        let Self {
            guest,
            bindings,
            handle,
            ..
        } = self;
        guest.call(Function::KeepAlive, |store, _| {
            let exchange = bindings.visor_plugin_adapter().exchange();
            Ok(exchange.call_keep_alive(store, *handle)?)
        })
    }
}

fn check_step(step: &Step, left: u32) -> checks::Checked {
    match step {
        Step::Respond(response) => checks::response(response),
        Step::Generate(head, generations) => {
            checks::head(head)?;
            checks::generations(generations, left)
        }
    }
}

/// A number that was checked to be at most `generations_max`.
fn count(generations: usize) -> u32 {
    u32::try_from(generations).unwrap_or(u32::MAX)
}

fn bindings(
    core: &Core,
    store: &mut Store<GuestState>,
    instance: &Instance,
) -> Result<AdapterPlugin, Halt> {
    let indices = core.exports.adapter.as_ref();
    let indices = indices.ok_or_else(|| Halt::Broken("is no adapter".to_owned()))?;
    Ok(indices.load(store, instance)?)
}

/// Renders an error in a fresh instance.
pub(crate) fn render_error(
    core: &Arc<Core>,
    error: &GuestError,
    mid_stream: bool,
) -> Result<Response, CallError> {
    let mut guest = Guest::open(core, Role::Adapter, String::new())?;
    let error = error.clone().into();
    guest.call(Function::RenderError, |store, instance| {
        let bindings = bindings(core, &mut *store, instance)?;
        let adapter = bindings.visor_plugin_adapter();
        let response = adapter.call_render_error(store, &error, mid_stream)?.into();
        checks::response(&response).map_err(Halt::Broken)?;
        Ok(response)
    })
}

/// Asks which routes an adapter serves.
pub(crate) fn routes(core: &Arc<Core>) -> Result<Vec<Route>, CallError> {
    let mut guest = Guest::open(core, Role::Adapter, String::new())?;
    guest.call(Function::Routes, |store, instance| {
        let bindings = bindings(core, &mut *store, instance)?;
        let routes = bindings.visor_plugin_adapter().call_routes(store)?;
        let routes: Vec<Route> = routes.into_iter().map(Into::into).collect();
        checks::routes(&routes).map_err(Halt::Broken)?;
        Ok(routes)
    })
}
