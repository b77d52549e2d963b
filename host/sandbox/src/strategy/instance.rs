//! One instance of a cache strategy and the strategies it made, by tier.

use std::collections::BTreeMap;
use std::sync::Arc;

use wasmtime::component::{Resource, ResourceAny};

use crate::bindings::cache_strategy::CacheStrategyPlugin;
use crate::bindings::cache_strategy::exports::visor::plugin::cache_strategy as wit;
use crate::call::{Guest, Halt};
use crate::error::CallError;
use crate::options::{Function, Role};
use crate::plugin::Core;
use crate::strategy::convert::check_victims;
use crate::strategy::{CacheEntry, CacheEvent, Lookup, Scoping, StrategyPlan, Tier};

/// A living instance; not shared between threads.
pub(crate) struct StrategyInstance {
    guest: Guest,
    bindings: CacheStrategyPlugin,
    strategies: BTreeMap<Tier, ResourceAny>,
}

impl StrategyInstance {
    pub(crate) fn open(core: &Arc<Core>) -> Result<Self, CallError> {
        let mut guest = Guest::open(core, Role::CacheStrategy, String::new())?;
        let bindings = guest.call(Function::Create, |store, instance| {
            let indices = core.exports.cache_strategy.as_ref();
            let indices = indices.ok_or_else(|| Halt::Broken("is no cache strategy".to_owned()))?;
            Ok(indices.load(store, instance)?)
        })?;
        Ok(Self {
            guest,
            bindings,
            strategies: BTreeMap::new(),
        })
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.guest.is_dead()
    }

    pub(crate) fn create(
        &mut self,
        tier: Tier,
        capacity_bytes: u64,
    ) -> Result<StrategyPlan, CallError> {
        let bindings = &self.bindings;
        let old = self.strategies.remove(&tier);
        let (strategy, plan) = self.guest.call(Function::Create, |store, _| {
            if let Some(old) = old {
                old.resource_drop(&mut *store)?;
            }
            let strategies = bindings.visor_plugin_cache_strategy().strategy();
            let (strategy, plan) = strategies.call_create(store, tier.into(), capacity_bytes)?;
            Ok((
                strategy,
                StrategyPlan::try_from(plan).map_err(Halt::Broken)?,
            ))
        })?;
        self.strategies.insert(tier, strategy);
        Ok(plan)
    }

    pub(crate) fn scope(&mut self, lookup: Lookup) -> Result<Scoping, CallError> {
        let bindings = &self.bindings;
        self.guest.call(Function::Scope, |store, _| {
            let lookup = store.data_mut().table.push(lookup)?;
            let borrowed = Resource::new_borrow(lookup.rep());
            let strategy = bindings.visor_plugin_cache_strategy();
            let scoping = strategy.call_scope(&mut *store, borrowed)?;
            // The instance lives on, so what was lent to it is taken back.
            store.data_mut().table.delete(lookup)?;
            Scoping::try_from(scoping).map_err(Halt::Broken)
        })
    }

    pub(crate) fn observe(
        &mut self,
        tier: Tier,
        events: Vec<CacheEvent>,
        used_bytes: u64,
    ) -> Result<(), CallError> {
        let strategy = self.strategies.get(&tier).copied();
        let bindings = &self.bindings;
        self.guest.call(Function::Observe, |store, _| {
            let strategy = planned(strategy, tier)?;
            let events: Vec<wit::Event> = events.into_iter().map(Into::into).collect();
            let strategies = bindings.visor_plugin_cache_strategy().strategy();
            Ok(strategies.call_observe(store, strategy, &events, used_bytes)?)
        })
    }

    pub(crate) fn victims(
        &mut self,
        tier: Tier,
        bytes: u64,
        at_most: u32,
    ) -> Result<Vec<u64>, CallError> {
        let strategy = self.strategies.get(&tier).copied();
        let bindings = &self.bindings;
        self.guest.call(Function::Victims, |store, _| {
            let strategy = planned(strategy, tier)?;
            let strategies = bindings.visor_plugin_cache_strategy().strategy();
            let victims = strategies.call_victims(store, strategy, bytes, at_most)?;
            check_victims(&victims, at_most).map_err(Halt::Broken)?;
            Ok(victims)
        })
    }

    pub(crate) fn admit(
        &mut self,
        tier: Tier,
        candidates: Vec<CacheEntry>,
    ) -> Result<Vec<bool>, CallError> {
        let strategy = self.strategies.get(&tier).copied();
        let bindings = &self.bindings;
        self.guest.call(Function::Admit, |store, _| {
            let strategy = planned(strategy, tier)?;
            let candidates: Vec<wit::Entry> = candidates.into_iter().map(Into::into).collect();
            let strategies = bindings.visor_plugin_cache_strategy().strategy();
            let admitted = strategies.call_admit(store, strategy, &candidates)?;
            if admitted.len() == candidates.len() {
                return Ok(admitted);
            }
            let (answers, asked) = (admitted.len(), candidates.len());
            Err(Halt::Broken(format!(
                "{answers} answers for {asked} candidates"
            )))
        })
    }
}

fn planned(strategy: Option<ResourceAny>, tier: Tier) -> Result<ResourceAny, Halt> {
    strategy.ok_or_else(|| Halt::Broken(format!("was never asked to plan the tier {tier:?}")))
}
