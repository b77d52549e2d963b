//! What components are linked against: our interfaces, and for those that name WASI an empty one.

use wasmtime::Engine;
use wasmtime::component::{HasSelf, Linker, Resource};
use wasmtime_wasi::p2::DynPollable;

use crate::bindings::{adapter, cache_strategy, image_policy, template};
use crate::error::FaultKind;
use crate::guest::{GuestState, HostFault};

/// The version that wasmtime-wasi registers; imports of any 0.2 version find it.
const WASI_POLL: &str = "wasi:io/poll@0.2.12";

/// Links every interface of `wit/` that the host implements. Which role may import which is
/// checked before, by name.
pub(crate) fn own_interfaces(engine: &Engine) -> wasmtime::Result<Linker<GuestState>> {
    type Own = HasSelf<GuestState>;
    let mut linker = Linker::new(engine);
    let l = &mut linker;
    use adapter::visor::plugin::{adapter_input, clock, log, media, metrics, model, store, types};
    types::add_to_linker::<_, Own>(l, |state| state)?;
    log::add_to_linker::<_, Own>(l, |state| state)?;
    metrics::add_to_linker::<_, Own>(l, |state| state)?;
    clock::add_to_linker::<_, Own>(l, |state| state)?;
    model::add_to_linker::<_, Own>(l, |state| state)?;
    media::add_to_linker::<_, Own>(l, |state| state)?;
    store::add_to_linker::<_, Own>(l, |state| state)?;
    adapter_input::add_to_linker::<_, Own>(l, |state| state)?;
    template::visor::plugin::template_input::add_to_linker::<_, Own>(l, |state| state)?;
    image_policy::visor::plugin::image_policy_input::add_to_linker::<_, Own>(l, |state| state)?;
    cache_strategy::visor::plugin::cache_strategy_input::add_to_linker::<_, Own>(l, |state| state)?;
    Ok(linker)
}

/// The same and WASI 0.2 with nothing granted. Waiting is not granted either: a guest that slept
/// in the host would sleep through its deadline.
pub(crate) fn with_empty_wasi(own: &Linker<GuestState>) -> wasmtime::Result<Linker<GuestState>> {
    let mut linker = own.clone();
    wasmtime_wasi::p2::add_to_linker_sync(&mut linker)?;
    linker.allow_shadowing(true);
    let mut poll = linker.instance(WASI_POLL)?;
    poll.func_wrap(
        "[method]pollable.block",
        |_, _: (Resource<DynPollable>,)| Err::<(), _>(may_not_wait()),
    )?;
    poll.func_wrap("poll", |_, _: (Vec<Resource<DynPollable>>,)| {
        Err::<(Vec<u32>,), _>(may_not_wait())
    })?;
    Ok(linker)
}

fn may_not_wait() -> wasmtime::Error {
    HostFault::new(
        FaultKind::Contract,
        "waits through WASI; plugins may not wait",
    )
    .into()
}
