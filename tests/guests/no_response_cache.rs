//! A cache strategy that keeps pixels and features of everybody together, and no answers: for the
//! tests that swap the shipped one under load.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

wit_bindgen::generate!({ world: "cache-strategy-plugin", path: "../../wit" });

use exports::visor::plugin::cache_strategy::{
    self, Access, Algorithm, Entry, EntryId, Event, Interests, Plan, Scoping, Strategy, Tier,
};
use exports::visor::plugin::lifecycle;
use visor::plugin::cache_strategy_input::Lookup;

struct NoResponses;

#[cfg(target_arch = "wasm32")]
export!(NoResponses);

impl lifecycle::Guest for NoResponses {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "no-response-cache".to_owned(),
            version: "1".to_owned(),
            description: "keeps no answers".to_owned(),
            config_schema: None,
        }
    }

    fn configure(_config: String) -> Result<(), Vec<lifecycle::Issue>> {
        Ok(())
    }
}

impl cache_strategy::Guest for NoResponses {
    type Strategy = Declines;

    fn scope(_lookup: &Lookup) -> Scoping {
        let all = Access::READ | Access::WRITE;
        let response = Access::empty();
        Scoping {
            scope: String::new(),
            prefix: all,
            embedding: all,
            pixels: all,
            response,
            ttl: None,
            weight: 100,
        }
    }
}

/// Leaves every tier to the host's own algorithm.
struct Declines;

impl cache_strategy::GuestStrategy for Declines {
    fn create(_tier: Tier, _capacity_bytes: u64) -> (Strategy, Plan) {
        let plan = Plan {
            base: Algorithm::Sieve,
            interests: Interests::SCOPE,
            hit_sampling: 1,
            ttl: None,
            max_entry_permille: 1000,
        };
        (Strategy::new(Self), plan)
    }

    fn observe(&self, _events: Vec<Event>, _used_bytes: u64) {}

    fn victims(&self, _bytes: u64, _at_most: u32) -> Vec<EntryId> {
        Vec::new()
    }

    fn admit(&self, candidates: Vec<Entry>) -> Vec<bool> {
        vec![true; candidates.len()]
    }
}
