//! What has run is not run again, and is shared only where it may be.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;

use visor_engine::{
    Access, CacheBytes, Caches, Engine, EngineOptions, GenerateRequest, PrefixBlock, Scope, Tier,
};

use crate::heard::*;
use crate::scripted::*;

struct House {
    engine: Engine,
    caches: Caches<ScriptedFeatures, PrefixBlock<Block>>,
    script: Script,
}

fn house(script: Script, prefixes: u64, options: EngineOptions) -> House {
    let caches = Caches::new(CacheBytes {
        features: 1 << 20,
        prefixes,
        ..CacheBytes::default()
    });
    let loader = ScriptedLoader(script.clone());
    let engine = Engine::start(loader, tokenizer(), &caches, options);
    engine.wait_ready(PATIENCE);
    House {
        engine,
        caches,
        script,
    }
}

fn usual() -> House {
    let options = EngineOptions {
        context_tokens_max: 4096,
        prefill_chunk_tokens: 4096,
        ..options()
    };
    house(Script::new(Answer::Hashed(600)), 1 << 20, options)
}

/// BOS and these tokens, with everything shared.
fn saying(ids: &[i64]) -> GenerateRequest {
    let mut request = request(3);
    request.prompt.ids = std::iter::once(1).chain(ids.iter().copied()).collect();
    request.cache.prefix = Access::FULL;
    request
}

fn about(picture: u8, ids: &[i64]) -> GenerateRequest {
    let mut request = request_with(&[picture]);
    request.prompt.ids.extend(ids);
    request.cache.prefix = Access::FULL;
    request.tokens_max = 3;
    request
}

impl House {
    /// Positions that were there already.
    fn cached(&self, request: GenerateRequest) -> u32 {
        let mut plain = request.clone();
        plain.cache.prefix = Access::NONE;
        let want = ask(&self.engine, plain);
        let have = ask(&self.engine, request);
        assert_eq!(have.text, want.text, "the cache changes no answer");
        have.usage().cached_tokens
    }
}

#[test]
fn a_common_beginning_is_run_once() {
    let house = usual();
    let long: Vec<i64> = (10..30).collect();
    assert_eq!(house.cached(saying(&long)), 0);
    assert_eq!(house.cached(saying(&long)), 20, "all but the last");
    let mut other = long.clone();
    other[14] = 999;
    assert_eq!(
        house.cached(saying(&other)),
        15,
        "up to where they differ, in the middle of a block"
    );
    assert_eq!(house.cached(saying(&long[..9])), 9, "a beginning of it");
    assert_eq!(house.cached(saying(&[5, 6])), 1, "only BOS");
    let stats = house.caches.prefixes.stats();
    assert_eq!(stats.tier, Tier::Prefix);
    assert!(stats.hits > 0 && stats.misses > 0 && stats.used_bytes > 0);
    assert_eq!(house.engine.stats().cached_tokens, 20 + 15 + 9 + 1);
}

#[test]
fn a_conversation_goes_on_behind_its_answer() {
    let house = usual();
    let first: Vec<i64> = (10..20).collect();
    let script = &house.script;
    ask(&house.engine, saying(&first));
    // The tokens it said, from what was pushed: all but the last ran.
    let pushed: Vec<i64> = {
        let calls = script.calls.lock().unwrap();
        let pushed = calls.iter().filter_map(|(_, call)| match call {
            Call::Push(token) => Some(i64::from(*token)),
            _ => None,
        });
        pushed.collect()
    };
    assert_eq!(pushed.len(), 2);
    let mut next = first;
    next.extend(&pushed);
    next.extend([7, 8, 9]);
    assert_eq!(house.cached(saying(&next)), 11 + 2);
}

#[test]
fn a_second_question_about_a_picture_needs_no_tower() {
    let house = usual();
    let mut first = about(5, &[10, 11]);
    first.cache.features = Access::NONE;
    assert_eq!(ask(&house.engine, first).usage().cached_tokens, 0);
    assert_eq!(house.script.crops_encoded(), 2);
    let mut second = about(5, &[10, 12, 13]);
    second.cache.features = Access::NONE;
    let heard = ask(&house.engine, second);
    assert_eq!(
        house.script.crops_encoded(),
        2,
        "the picture's slots were there"
    );
    let usage = heard.usage();
    assert_eq!(usage.cached_tokens, 1 + usage.image_tokens + 2);
    // Another picture shares what is before it.
    assert_eq!(house.cached(about(6, &[10, 12, 13])), 1);
    // A new conversation about it has the features, not the prefix.
    let mut new = about(6, &[]);
    new.prompt.ids.insert(1, 77);
    let before = house.script.crops_encoded();
    assert_eq!(ask(&house.engine, new).usage().cached_tokens, 1);
    assert_eq!(house.script.crops_encoded(), before);
}

#[test]
fn nothing_is_shared_across_scopes_or_where_it_may_not_be() {
    let house = usual();
    let ids: Vec<i64> = (10..30).collect();
    let scoped = |scope: &str, read, write| {
        let mut request = saying(&ids);
        request.cache.scope = Scope::named(scope);
        request.cache.prefix = Access { read, write };
        request
    };
    assert_eq!(house.cached(scoped("alice", true, false)), 0);
    assert_eq!(
        house.cached(scoped("alice", true, true)),
        0,
        "nothing was kept"
    );
    assert_eq!(house.cached(scoped("bob", true, true)), 0);
    assert_eq!(house.cached(scoped("alice", false, true)), 0);
    assert_eq!(house.cached(scoped("alice", true, true)), 20);
}

#[test]
fn the_regimes_of_the_rope_do_not_share() {
    let mut script = Script::new(Answer::Hashed(600));
    script.short_positions_max = 16;
    let house = house(script, 1 << 20, options());
    let ids: Vec<i64> = (10..40).collect();
    assert_eq!(house.cached(saying(&ids[..10])), 0);
    assert_eq!(house.cached(saying(&ids)), 0, "long: the keys are others");
    assert_eq!(house.cached(saying(&ids[..11])), 10 + 1);
    assert_eq!(house.cached(saying(&ids[..20])), 20);
}

#[test]
fn what_is_cached_makes_room_for_what_runs() {
    let options = EngineOptions {
        context_tokens_max: 80,
        kv_bytes: 1,
        ..options()
    };
    let house = house(Script::new(Answer::Hashed(600)), 1 << 20, options);
    for beginning in 0..6 {
        let ids: Vec<i64> = (0..60).map(|id| 100 * beginning + id).collect();
        assert_eq!(house.cached(saying(&ids)), u32::from(beginning > 0));
    }
    let stats = house.engine.stats();
    assert_eq!((stats.failed, stats.preempted), (0, 0));
    let used = house.script.blocks_used.load(Ordering::Relaxed);
    assert!(used <= stats.kv_blocks_max as usize);
    assert_eq!(used as u64, house.caches.prefixes.stats().entries);
}

#[test]
fn a_small_cache_keeps_what_it_can_and_gives_everything_back() {
    let options = EngineOptions {
        context_tokens_max: 4096,
        ..options()
    };
    let house = house(Script::new(Answer::Hashed(600)), 5 * 1256, options);
    for beginning in 0..6 {
        let ids: Vec<i64> = (0..60).map(|id| 100 * beginning + id).collect();
        house.cached(saying(&ids));
        assert!(house.caches.prefixes.stats().entries <= 5);
    }
    house.caches.prefixes.invalidate_all();
    assert_eq!(house.script.blocks_used.load(Ordering::Relaxed), 0);
}

/// Two of the same prompt are admitted before one has run all of it; the other waits for its first position until then.
#[test]
fn what_another_has_run_since_is_cached_too() {
    let (admit, admitted) = channel::<()>();
    let admitted = Mutex::new(admitted);
    let script = Script::new(Answer::Hashed(600)).on(move |_, call| {
        if matches!(call, Call::Advance { from: 0, .. }) {
            let _both_are_there = admitted.lock().unwrap().recv();
        }
        Reply::Go
    });
    let options = EngineOptions {
        context_tokens_max: 4096,
        prefill_chunk_tokens: 4,
        sequences_max: 2,
        ..options()
    };
    let house = house(script, 1 << 20, options);
    let prompt = saying(&(10..33).collect::<Vec<_>>());
    let both = [0, 1].map(|_| house.engine.submit(prompt.clone()).unwrap());
    drop(admit);
    let [first, second] = both.map(|events| hear(&events).usage().cached_tokens);
    assert_eq!((first, second), (0, 23));
    assert_eq!(house.engine.stats().cached_tokens, 23);
}

/// A prompt for which there is no room waits; what is cached stays, and is not asked for again at every step.
#[test]
fn who_cannot_start_empties_no_cache() {
    let options = EngineOptions {
        context_tokens_max: 80,
        kv_bytes: 1,
        sequences_max: 2,
        ..options()
    };
    let house = house(Script::new(Answer::Hashed(600)), 1 << 20, options);
    let kept: Vec<i64> = (0..12).map(|id| 100 + id).collect();
    ask(&house.engine, saying(&kept));
    let entries = house.caches.prefixes.stats().entries;
    assert!(entries > 0);
    let long = |first: i64, tokens_max| {
        let mut request = saying(&(0..40).map(|id| first + id).collect::<Vec<_>>());
        request.tokens_max = tokens_max;
        request.cache.prefix = Access {
            read: true,
            write: false,
        };
        request
    };
    let first = house.engine.submit(long(300, 25)).unwrap();
    let second = house.engine.submit(long(500, 2)).unwrap();
    hear(&first);
    hear(&second);
    let stats = house.caches.prefixes.stats();
    assert!(stats.hits + stats.misses < 20, "{stats:?}");
    assert_eq!(house.engine.stats().failed, 0);
}
