//! The vision tower runs once per picture, and shares only where it may.

use visor_engine::{
    Access, CacheAccess, Engine, EngineOptions, Event, GenerateRequest, Scope, Scoping,
};

use crate::scripted::*;

fn roomy() -> EngineOptions {
    EngineOptions {
        context_tokens_max: 4096,
        prefill_chunk_tokens: 4096,
        ..options()
    }
}

fn engine(script: &Script) -> Engine {
    let engine = start_with(script, roomy());
    engine.wait_ready(PATIENCE);
    engine
}

fn scoped(scope: &str, picture: u8) -> GenerateRequest {
    let mut request = request_with(&[picture]);
    request.cache.scope = Scope::named(scope);
    request
}

/// Crops the tower computed for one more request, and the microseconds it says so.
fn crops(engine: &Engine, script: &Script, request: GenerateRequest) -> usize {
    let before = script.crops_encoded();
    let events = engine.submit(request).unwrap();
    let Some(Event::Finished { timings, .. }) = events.last() else {
        panic!("not finished");
    };
    let crops = script.crops_encoded() - before;
    assert!(
        crops > 0 || timings.vision_us == 0,
        "vision time without a crop"
    );
    crops
}

#[test]
fn a_picture_is_encoded_once_whatever_the_prompt() {
    let script = Script::saying("seen");
    let engine = engine(&script);
    assert_eq!(crops(&engine, &script, request_with(&[5])), 2);
    let mut other = request_with(&[5]);
    other.prompt.ids.extend([7, 8, 9]);
    assert_eq!(crops(&engine, &script, other), 0);
    assert_eq!(crops(&engine, &script, request_with(&[6, 5])), 2);
}

#[test]
fn a_picture_sent_twice_is_encoded_once_even_without_a_cache() {
    let script = Script::saying("seen");
    let engine = engine(&script);
    let mut request = request_with(&[5, 5]);
    request.cache.features = Access::NONE;
    assert_eq!(crops(&engine, &script, request.clone()), 2);
    assert_eq!(crops(&engine, &script, request), 2);
}

#[test]
fn scopes_do_not_share() {
    let script = Script::saying("seen");
    let engine = engine(&script);
    assert_eq!(crops(&engine, &script, scoped("alice", 5)), 2);
    assert_eq!(crops(&engine, &script, scoped("bob", 5)), 2);
    assert_eq!(crops(&engine, &script, scoped("", 5)), 2);
    assert_eq!(crops(&engine, &script, scoped("alice", 5)), 0);
}

#[test]
fn a_request_reads_and_writes_only_where_it_may() {
    let script = Script::saying("seen");
    let engine = engine(&script);
    let with = |read, write| {
        let mut request = request_with(&[5]);
        request.cache.features = Access { read, write };
        request
    };
    assert_eq!(crops(&engine, &script, with(true, false)), 2);
    assert_eq!(crops(&engine, &script, with(false, true)), 2);
    assert_eq!(crops(&engine, &script, with(false, false)), 2);
    assert_eq!(crops(&engine, &script, with(true, false)), 0);
}

#[test]
fn access_follows_the_scoping_of_the_strategy() {
    let scoping = Scoping {
        scope: "alice".into(),
        embedding: Access::NONE,
        ttl_s: Some(9),
        weight: 250,
        ..Scoping::default()
    };
    let access = CacheAccess::from(&scoping);
    assert_eq!(access.scope, Scope::named("alice"));
    assert_eq!(access.features, Access::NONE);
    assert_eq!((access.ttl.unwrap().as_secs(), access.weight), (9, 250));
}
