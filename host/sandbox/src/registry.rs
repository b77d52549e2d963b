//! The current plugins: one pointer, swapped at once. A request takes the set once and keeps it.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::plugin::Plugin;

/// A consistent set of plugins.
#[derive(Clone, Default)]
pub struct PluginSet {
    /// Counts the swaps; 0 is the empty set at start.
    pub number: u64,
    /// Plugins by id.
    pub plugins: BTreeMap<String, Arc<Plugin>>,
}

impl PluginSet {
    /// One plugin.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Arc<Plugin>> {
        self.plugins.get(id)
    }
}

/// Holds the current [`PluginSet`].
#[derive(Default)]
pub struct Registry {
    current: ArcSwap<PluginSet>,
}

impl Registry {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The set of now. Requests that hold it finish on it, whatever is swapped meanwhile.
    #[must_use]
    pub fn current(&self) -> Arc<PluginSet> {
        self.current.load_full()
    }

    pub(crate) fn swap(&self, set: Arc<PluginSet>) {
        self.current.store(set);
    }
}
