//! A cache strategy that misbehaves when told to; see `misdeeds.rs`. Main function: `scope`.
//!
//! Left alone, it shares everything with everybody. Deeds of its own: `huge` (a scope of 8 MiB) and
//! `flood` (the log) in any function; `lie` in `victims` (entries nobody has, and one often), in
//! `admit` (answers for candidates nobody named) and in `create` (a plan that samples no hits).

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

use visor_test_guests::{configure, deed, huge_string, main_deed};

wit_bindgen::generate!({ world: "cache-strategy-plugin", path: "../../wit" });

use exports::visor::plugin::cache_strategy::{
    self, Access, Algorithm, Entry, EntryId, Event, Interests, Plan, Scoping, Strategy, Tier,
};
use exports::visor::plugin::lifecycle;
use visor::plugin::cache_strategy_input::Lookup;
use visor::plugin::log;

struct Bad;

#[cfg(target_arch = "wasm32")]
export!(Bad);

impl lifecycle::Guest for Bad {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "bad-strategy".to_owned(),
            version: "1".to_owned(),
            description: "misbehaves when told to".to_owned(),
            config_schema: None,
        }
    }

    fn configure(config: String) -> Result<(), Vec<lifecycle::Issue>> {
        configure(&config);
        deed("configure");
        Ok(())
    }
}

impl cache_strategy::Guest for Bad {
    type Strategy = Shelf;

    fn scope(lookup: &Lookup) -> Scoping {
        let deed = flood_if(main_deed("scope", &lookup.route()));
        let all = Access::READ | Access::WRITE;
        Scoping {
            scope: if deed == "huge" {
                huge_string()
            } else {
                String::new()
            },
            prefix: all,
            embedding: all,
            pixels: all,
            response: all,
            ttl: None,
            weight: 100,
        }
    }
}

struct Shelf;

impl cache_strategy::GuestStrategy for Shelf {
    fn create(_tier: Tier, _capacity_bytes: u64) -> (Strategy, Plan) {
        let hit_sampling = if flood_if(deed("create")) == "lie" {
            0
        } else {
            1
        };
        let stored = Interests::INSERTS | Interests::HITS | Interests::MISSES | Interests::REMOVALS;
        let plan = Plan {
            base: Algorithm::Lru,
            interests: Interests::SCOPE | stored | Interests::VICTIMS | Interests::ADMISSION,
            hit_sampling,
            ttl: None,
            max_entry_permille: 1000,
        };
        (Strategy::new(Self), plan)
    }

    fn observe(&self, _events: Vec<Event>, _used_bytes: u64) {
        flood_if(deed("observe"));
    }

    fn victims(&self, _bytes: u64, _at_most: u32) -> Vec<EntryId> {
        match flood_if(deed("victims")).as_str() {
            "lie" => (0..1_000)
                .map(|index| if index % 2 == 0 { 7 } else { u64::MAX - index })
                .collect(),
            _ => Vec::new(),
        }
    }

    fn admit(&self, candidates: Vec<Entry>) -> Vec<bool> {
        let surplus = if flood_if(deed("admit")) == "lie" {
            99
        } else {
            0
        };
        vec![true; candidates.len() + surplus]
    }
}

fn flood_if(deed: String) -> String {
    if deed == "flood" {
        (0..2_000).for_each(|_| log::emit(log::Level::Error, &"flood ".repeat(2_000), &[]));
    }
    deed
}
