//! Whatever clients and devices do, every request ends once and nothing is left over.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use visor_engine::{CancelToken, EngineError, EventReceiver};
use visor_model::DeviceKind;

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
