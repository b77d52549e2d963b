//! Whatever clients and devices do, every request ends once and nothing is left over.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use visor_engine::{
    Access, CacheAccess, CacheBytes, Caches, CancelToken, Engine, EngineError, EngineOptions,
    EventReceiver, Finish, GenerateRequest, Scope,
};
use visor_model::DeviceKind;

use crate::constraints::Mottled;
use crate::heard::*;
use crate::scripted::*;

/// xorshift64*, so that a failure can be run again.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
    }
}

fn random_request(random: &mut Random) -> visor_engine::GenerateRequest {
    let pictures: Vec<u8> = (0..random.below(3))
        .map(|_| random.below(4) as u8)
        .collect();
    let mut request = request_with(&pictures);
    request.tokens_max = random.below(12) as u32;
    request.sampling.temperature = random.below(2) as f64;
    request.sampling.seed = Some(random.below(5));
    if random.below(3) == 0 {
        request.stop_strings = vec!["e".into(), "the ".into()];
    }
    request
}

#[test]
fn every_request_ends_once_and_is_counted_once() {
    for seed in 1..=6 {
        let mut random = Random(seed * 0x9E37_79B9);
        // Tokens to set, by the call at which they are.
        let cancels: Arc<Mutex<Vec<(u64, CancelToken)>>> = Arc::default();
        let calls = Arc::new(AtomicU64::new(0));
        let (due, count, breaks_at) = (Arc::clone(&cancels), Arc::clone(&calls), random.below(200));
        let cpu_faults = Mutex::new(random.clone());
        let script = Script::new(Answer::Hashed(2000)).on(move |device, call| {
            let now = count.fetch_add(1, Ordering::Relaxed);
            due.lock().unwrap().retain(|(at, token)| {
                if *at <= now {
                    token.cancel();
                }
                *at > now
            });
            match (device, call) {
                (_, Call::Load | Call::WarmUp) => Reply::Go,
                (DeviceKind::Metal, _) if now >= breaks_at => Reply::Panic,
                (DeviceKind::Cpu, _) if cpu_faults.lock().unwrap().below(60) == 0 => Reply::Fail,
                _ => Reply::Go,
            }
        });
        let mut options = options();
        options.devices = vec![DeviceKind::Metal, DeviceKind::Cpu];
        options.context_tokens_max = 4096;
        options.prefill_chunk_tokens = 400;
        let engine = start_with(&script, options);
        engine.wait_ready(PATIENCE);

        let (mut taken, mut heard, mut dropped) = (0, 0, 0);
        let mut open: Vec<EventReceiver> = Vec::new();
        for _ in 0..150 {
            let request = random_request(&mut random);
            if random.below(4) == 0 {
                let at = calls.load(Ordering::Relaxed) + random.below(60);
                cancels.lock().unwrap().push((at, request.cancel.clone()));
            }
            match engine.submit(request) {
                Ok(events) => {
                    taken += 1;
                    open.push(events);
                }
                Err(EngineError::QueueFull { .. }) => {
                    hear(&open.remove(0));
                    heard += 1;
                }
                Err(error) => panic!("{error}"),
            }
            if random.below(10) == 0 && !open.is_empty() {
                open.swap_remove(random.below(open.len() as u64) as usize);
                dropped += 1;
            }
        }
        for events in &open {
            hear(events);
            heard += 1;
        }
        engine.stop(PATIENCE);
        let stats = engine.stats();
        assert_eq!((stats.waiting, stats.running), (0, 0), "seed {seed}");
        assert_eq!(taken, heard + dropped, "seed {seed}");
        assert_eq!(stats.submitted, taken, "seed {seed}");
        assert_eq!(
            stats.finished + stats.aborted + stats.failed,
            taken,
            "seed {seed}"
        );
        assert_eq!(stats.device_fallbacks, 1, "seed {seed}");
    }
}

/// Requests with beginnings in common, answers that depend on every position, some of them cancelled: run together, in little
/// memory, each says what it says alone, as far as it gets.
#[test]
fn whatever_runs_together_says_what_it_says_alone() {
    for answer in [Answer::Hashed(600), Answer::Repeating(5)] {
        says_what_it_says_alone(&answer);
    }
}

fn says_what_it_says_alone(answer: &Answer) {
    let alone = engine_of(Script::new(answer.clone()), |options| {
        options.sequences_max = 1;
    });
    for seed in 1..=6 {
        let mut random = Random(seed * 0x9E37_79B9);
        let script = Script::new(answer.clone());
        let caches: Caches<_, _> = Caches::new(CacheBytes {
            features: random.below(3) * 1500,
            prefixes: random.below(4) * 20_000,
            ..CacheBytes::default()
        });
        let mut options = roomy();
        options.sequences_max = 1 + random.below(5) as usize;
        options.kv_bytes = 1000 * random.below(700);
        options.context_tokens_max = 900;
        options.prefill_chunk_tokens = 1 + random.below(200) as usize;
        options.draft_tokens_max = random.below(3) as usize * 5;
        options.slice = Duration::from_micros(random.below(300));
        let loader = ScriptedLoader(script.clone());
        let engine = Engine::start(loader, tokenizer(), &caches, options);
        engine.wait_ready(PATIENCE);
        let mut open: Vec<(GenerateRequest, EventReceiver)> = Vec::new();
        for _ in 0..60 {
            let request = related_request(&mut random);
            open.push((request.clone(), engine.submit(request).unwrap()));
            if random.below(4) == 0 {
                let (request, _) = &open[random.below(open.len() as u64) as usize];
                request.cancel.cancel();
            }
            while open.len() > 7 {
                let (request, events) = open.remove(random.below(7) as usize);
                check_said(&alone, request, &hear(&events));
            }
        }
        for (request, events) in open {
            check_said(&alone, request, &hear(&events));
        }
        let stats = engine.stats();
        assert_eq!((stats.running, stats.waiting, stats.failed), (0, 0, 0));
        let used = script.blocks_used.load(Ordering::Relaxed) as u64;
        assert!(used <= stats.kv_blocks_max, "seed {seed}");
        assert_eq!(used, caches.prefixes.stats().entries, "seed {seed}");
        caches.prefixes.invalidate_all();
        assert_eq!(script.blocks_used.load(Ordering::Relaxed), 0, "seed {seed}");
    }
}

fn roomy() -> EngineOptions {
    EngineOptions {
        context_tokens_max: 4096,
        queue_requests_max: 64,
        ..options()
    }
}

fn engine_of(script: Script, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options = roomy();
    options.prefill_chunk_tokens = 4096;
    change(&mut options);
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    engine
}

/// One of a few pictures or none, then a walk through a small tree of tokens.
fn related_request(random: &mut Random) -> GenerateRequest {
    let pictures: Vec<u8> = (0..random.below(2))
        .map(|_| random.below(3) as u8)
        .collect();
    let mut request = request_with(&pictures);
    for _ in 0..random.below(25) {
        request.prompt.ids.push(200 + random.below(2) as i64);
    }
    request.tokens_max = random.below(30) as u32;
    request.sampling.temperature = 1.0;
    request.sampling.seed = Some(random.below(5));
    if random.below(3) == 0 {
        request.grammar = Some(Arc::new(Mottled::default()));
    }
    request.cache.prefix = Access::FULL;
    request.cache.scope = Scope::named(["", "alice"][random.below(2) as usize]);
    request
}

fn check_said(alone: &Engine, request: GenerateRequest, heard: &Heard) {
    let plain = GenerateRequest {
        cancel: CancelToken::new(),
        cache: CacheAccess {
            prefix: Access::NONE,
            ..request.cache
        },
        ..request
    };
    let want = ask(alone, plain);
    match heard.reason() {
        // The end may be what was held back: bytes that would have become something else with those behind them.
        Some(Finish::Cancelled) => {
            let settled = heard
                .deltas
                .split_last()
                .map_or(&[][..], |(_, before)| before);
            let settled = settled.concat();
            assert!(
                want.text.starts_with(&settled),
                "{settled:?}, {:?}",
                want.text
            );
        }
        reason => {
            assert_eq!(heard.text, want.text);
            assert_eq!(reason, want.reason());
        }
    }
}
