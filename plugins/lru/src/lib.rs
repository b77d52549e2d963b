//! Cache strategy: least recently used, shared within a principal.
//!
//! The host keeps the values, the index and the locks, and looks things up without calling anybody.
//! A strategy steers from the side, and may decline each of its three questions:
//!
//! * `scope`, once per request, before anything is looked up: who
//!   shares with whom. It is the decision that matters most. A cache answers faster when it has
//!   seen something before, so whoever shares a scope can find out by timing what another has sent.
//!   Here every principal is alone, unless the operator sets `shared`.
//! * `observe`, in batches: what was stored, used and removed. This is where the list is kept.
//! * `victims`, ahead of need: what to remove next. The host takes them when it needs room, so an
//!   insertion never waits for us; if we are late it uses its own algorithm (`base` of the plan).
//!
//! The order is a list of ids by time of last use, oldest first, with one exception as an example
//! of what a strategy can do with what the host tells it: an entry that took long to make for its
//! size gets one more round before it goes. Vision features are dear and small, pixels are cheap
//! and large, and the plain algorithm cannot tell them apart.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;

use serde::Deserialize;

wit_bindgen::generate!({ world: "cache-strategy-plugin", path: "../../wit" });

use exports::visor::plugin::cache_strategy::{
    self, Access, Algorithm, Entry, EntryId, Event, Interests, Plan, Scoping, Strategy, Tier,
};
use exports::visor::plugin::lifecycle;
use visor::plugin::cache_strategy_input::Lookup;

/// What the host checks `[plugins.lru.config]` against, and `visor plugin check` prints.
const CONFIG_SCHEMA: &str = r#"{
  "type": "object",
  "additionalProperties": false,
  "properties": {
    "shared": {
      "type": "boolean", "default": false,
      "description": "Everybody shares one cache. Faster when many send the same pictures, but one client can find out by timing what another has sent."
    },
    "ttl_s": {
      "type": "integer", "minimum": 1,
      "description": "Seconds an entry lives; without it, until it is evicted."
    },
    "spare_micros_per_kib": {
      "type": "integer", "minimum": 0, "default": 1000,
      "description": "An entry that took at least this long to make, in microseconds per KiB it occupies, is passed over once before it is evicted. 0 spares none: plain LRU."
    }
  }
}"#;

/// Scope of everybody when the operator wants one cache: the public one.
const PUBLIC: &str = "";

/// Scope of those the server does not know by name. Without authentication that is everybody.
const ANONYMOUS: &str = "anonymous";

/// `[plugins.lru.config]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    shared: bool,
    ttl_s: Option<u32>,
    spare_micros_per_kib: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            shared: false,
            ttl_s: None,
            spare_micros_per_kib: 1000,
        }
    }
}

thread_local! {
    static CONFIG: OnceCell<Config> = const { OnceCell::new() };
}

fn config() -> Config {
    CONFIG.with(|cell| cell.get().cloned()).unwrap_or_default()
}

/// The type the exports hang on.
struct Lru;

#[cfg(target_arch = "wasm32")]
export!(Lru);

impl lifecycle::Guest for Lru {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "lru".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            description: env!("CARGO_PKG_DESCRIPTION").to_owned(),
            config_schema: Some(CONFIG_SCHEMA.to_owned()),
        }
    }

    fn configure(config: String) -> Result<(), Vec<lifecycle::Issue>> {
        let config = serde_json::from_str(&config).map_err(|error| {
            vec![lifecycle::Issue {
                path: String::new(),
                message: error.to_string(),
            }]
        })?;
        CONFIG.with(|cell| cell.set(config).ok());
        Ok(())
    }
}

impl cache_strategy::Guest for Lru {
    type Strategy = Shelf;

    fn scope(lookup: &Lookup) -> Scoping {
        scoping(
            lookup.principal().as_deref(),
            lookup.temperature(),
            &config(),
        )
    }
}

/// Who shares, and what may be kept.
fn scoping(principal: Option<&str>, temperature: f32, config: &Config) -> Scoping {
    let scope = match principal {
        _ if config.shared => PUBLIC.to_owned(),
        None => ANONYMOUS.to_owned(),
        // The prefix keeps a principal called `anonymous` from being taken for one.
        Some(name) => format!("principal {name}"),
    };
    let both = Access::READ | Access::WRITE;
    // Only a greedy answer is *the* answer; above 0, a client who asks again wants another.
    let response = if temperature == 0.0 {
        both
    } else {
        Access::empty()
    };
    Scoping {
        scope,
        prefix: both,
        embedding: both,
        pixels: both,
        response,
        ttl: config.ttl_s,
        weight: 100,
    }
}

/// One tier of the cache, as the host sees it: calls come one at a time, through `&self`.
struct Shelf(RefCell<Recency>);

impl cache_strategy::GuestStrategy for Shelf {
    fn create(tier: Tier, _capacity_bytes: u64) -> (Strategy, Plan) {
        let config = config();
        let shelf = Self(RefCell::new(Recency::new(config.spare_micros_per_kib)));
        (Strategy::new(shelf), plan(tier, &config))
    }

    fn observe(&self, events: Vec<Event>, _used_bytes: u64) {
        let mut recency = self.0.borrow_mut();
        events.into_iter().for_each(|event| recency.observe(event));
    }

    fn victims(&self, bytes: u64, at_most: u32) -> Vec<EntryId> {
        self.0.borrow_mut().victims(bytes, at_most)
    }

    fn admit(&self, candidates: Vec<Entry>) -> Vec<bool> {
        // We do not ask for `admission`: whatever was made is kept. The question is answered anyway.
        vec![true; candidates.len()]
    }
}

fn plan(tier: Tier, config: &Config) -> Plan {
    Plan {
        base: Algorithm::Lru,
        interests: Interests::SCOPE
            | Interests::INSERTS
            | Interests::HITS
            | Interests::REMOVALS
            | Interests::VICTIMS,
        hit_sampling: 1,
        ttl: config.ttl_s,
        // One huge picture must not push out everybody's pixels; answers are small anyway.
        max_entry_permille: if matches!(tier, Tier::Pixels) {
            500
        } else {
            1000
        },
    }
}

/// Entries by time of last use.
struct Recency {
    spare_micros_per_kib: u64,
    /// Counts uses; a larger one is more recent.
    clock: u64,
    /// Last use to entry, oldest first.
    by_use: BTreeMap<u64, EntryId>,
    entries: BTreeMap<EntryId, Known>,
}

/// What has to be known of an entry.
struct Known {
    used: u64,
    bytes: u64,
    /// Dear to make, and not passed over yet.
    spare: bool,
}

impl Recency {
    fn new(spare_micros_per_kib: u64) -> Self {
        Self {
            spare_micros_per_kib,
            clock: 0,
            by_use: BTreeMap::new(),
            entries: BTreeMap::new(),
        }
    }

    fn observe(&mut self, event: Event) {
        match event {
            Event::Inserted(entry) => {
                self.forget(entry.id);
                let spare = self.is_dear(&entry);
                self.clock += 1;
                self.by_use.insert(self.clock, entry.id);
                self.entries.insert(
                    entry.id,
                    Known {
                        used: self.clock,
                        bytes: entry.bytes,
                        spare,
                    },
                );
            }
            Event::Hit((id, _)) => self.touch(id),
            Event::Removed((id, _)) => self.forget(id),
            Event::Missed(_) => {}
        }
    }

    /// The oldest entries that make up `bytes`. They stay on the list until the host says that it
    /// removed them: it may not need the room, and then they were not victims.
    fn victims(&mut self, bytes: u64, at_most: u32) -> Vec<EntryId> {
        let mut victims = Vec::new();
        let mut spared = Vec::new();
        let mut freed = 0;
        for id in self.by_use.values() {
            if freed >= bytes || victims.len() >= at_most as usize {
                break;
            }
            let Some(entry) = self.entries.get_mut(id) else {
                continue;
            };
            if entry.spare {
                entry.spare = false;
                spared.push(*id);
            } else {
                freed += entry.bytes;
                victims.push(*id);
            }
        }
        spared.iter().for_each(|id| self.touch(*id));
        if victims.is_empty() && !spared.is_empty() {
            // Everything was dear: then nothing is.
            return self.victims(bytes, at_most);
        }
        victims
    }

    /// Makes an entry the most recent one. Hits are sampled and may be late, so unknown ids come by.
    fn touch(&mut self, id: EntryId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            self.by_use.remove(&entry.used);
            self.clock += 1;
            entry.used = self.clock;
            self.by_use.insert(self.clock, id);
        }
    }

    fn forget(&mut self, id: EntryId) {
        if let Some(entry) = self.entries.remove(&id) {
            self.by_use.remove(&entry.used);
        }
    }

    fn is_dear(&self, entry: &Entry) -> bool {
        let kib = entry.bytes.div_ceil(1024).max(1);
        self.spare_micros_per_kib > 0 && entry.cost_micros / kib >= self.spare_micros_per_kib
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exports::visor::plugin::cache_strategy::RemovalCause;

    /// 1 KiB each; cheap unless said otherwise.
    fn inserted(id: EntryId, cost_micros: u64) -> Event {
        let tier = Tier::Embedding;
        Event::Inserted(Entry {
            id,
            tier,
            scope: 1,
            bytes: 1024,
            cost_micros,
            tokens: 0,
        })
    }

    fn recency(events: impl IntoIterator<Item = Event>) -> Recency {
        let mut recency = Recency::new(1000);
        events.into_iter().for_each(|event| recency.observe(event));
        recency
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut recency = recency((1..=4).map(|id| inserted(id, 0)));
        recency.observe(Event::Hit((1, 3)));
        assert_eq!(recency.victims(2048, 10), [2, 3]);
        assert_eq!(recency.victims(u64::MAX, 10), [2, 3, 4, 1]);
    }

    #[test]
    fn victims_are_worth_what_was_asked_and_no_more_than_allowed() {
        let mut recency = recency((1..=9).map(|id| inserted(id, 0)));
        assert_eq!(recency.victims(1, 10), [1]);
        assert_eq!(recency.victims(1025, 10), [1, 2]);
        assert_eq!(recency.victims(u64::MAX, 3), [1, 2, 3]);
        assert!(recency.victims(0, 10).is_empty());
    }

    #[test]
    fn what_is_dear_for_its_size_is_passed_over_once() {
        let mut recency = recency([inserted(1, 1000), inserted(2, 999), inserted(3, 0)]);
        assert_eq!(recency.victims(1024, 10), [2]);
        recency.observe(Event::Removed((2, RemovalCause::Evicted)));
        assert_eq!(recency.victims(u64::MAX, 10), [3, 1]);
    }

    #[test]
    fn when_everything_is_dear_the_oldest_goes() {
        let mut recency = recency((1..=3).map(|id| inserted(id, 1_000_000)));
        assert_eq!(recency.victims(1024, 10), [1]);
    }

    #[test]
    fn removed_entries_are_forgotten_and_unknown_ones_do_no_harm() {
        let mut recency = recency((1..=2).map(|id| inserted(id, 0)));
        recency.observe(Event::Removed((1, RemovalCause::Evicted)));
        recency.observe(Event::Removed((77, RemovalCause::Expired)));
        recency.observe(Event::Hit((77, 1)));
        recency.observe(Event::Missed((Tier::Pixels, 5)));
        assert_eq!(recency.victims(u64::MAX, 10), [2]);
        recency.observe(inserted(2, 0)); // replayed after a reload
        assert_eq!((recency.entries.len(), recency.by_use.len()), (1, 1));
    }

    #[test]
    fn principals_are_alone_unless_the_operator_shares() {
        let alone = Config::default();
        let scope = |principal, config: &Config| scoping(principal, 0.0, config).scope;
        assert_ne!(scope(Some("a"), &alone), scope(Some("b"), &alone));
        assert_ne!(scope(Some("anonymous"), &alone), scope(None, &alone));
        let shared = Config {
            shared: true,
            ..Config::default()
        };
        assert_eq!(scope(Some("a"), &shared), PUBLIC);
        assert_eq!(scope(None, &shared), PUBLIC);
    }

    #[test]
    fn answers_are_kept_only_at_temperature_zero() {
        let config = Config {
            ttl_s: Some(60),
            ..Config::default()
        };
        let greedy = scoping(None, 0.0, &config);
        assert_eq!(
            (greedy.response, greedy.ttl),
            (Access::READ | Access::WRITE, Some(60))
        );
        let sampled = scoping(None, 0.7, &config);
        assert_eq!(sampled.response, Access::empty());
        assert_eq!(sampled.embedding, Access::READ | Access::WRITE);
    }

    #[test]
    fn the_schema_is_json_and_knows_every_key() {
        let schema: serde_json::Value = serde_json::from_str(CONFIG_SCHEMA).unwrap();
        let default = Config::default();
        assert_eq!(schema["properties"]["shared"]["default"], default.shared);
        assert_eq!(
            schema["properties"]["spare_micros_per_kib"]["default"],
            default.spare_micros_per_kib
        );
        let all = r#"{ "shared": true, "ttl_s": 5, "spare_micros_per_kib": 0 }"#;
        assert!(serde_json::from_str::<Config>(all).unwrap().shared);
        assert!(serde_json::from_str::<Config>(r#"{ "share": true }"#).is_err());
    }
}
