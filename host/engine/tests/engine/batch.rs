//! Several sequences at once: nobody notices the others, but for the time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use visor_engine::{
    EngineError, EngineOptions, EngineState, Event, Finish, GenerateRequest, Sampling,
};
use visor_model::DeviceKind;

use crate::heard::*;
use crate::scripted::*;

fn together(sequences_max: usize) -> EngineOptions {
    EngineOptions {
        sequences_max,
        prefill_chunk_tokens: 64,
        context_tokens_max: 4096,
        queue_requests_max: 64,
        ..options()
    }
}

/// A request of so many positions whose answer depends on all of them.
fn asking(positions: usize, tokens_max: u32) -> GenerateRequest {
    let mut request = request(tokens_max);
    request.prompt.ids = (0..positions as i64).map(|id| id + 1).collect();
    request.sampling = Sampling {
        temperature: 1.0,
        seed: Some(positions as u64),
        ..Sampling::default()
    };
    request
}

#[test]
fn sequences_run_together_and_say_what_each_says_alone() {
    let script = Script::new(Answer::Hashed(600));
    let alone = start_with(&script, together(1));
    alone.wait_ready(PATIENCE);
    let requests: Vec<_> = (0..7)
        .map(|n| asking(3 + 5 * n, 4 + 3 * n as u32))
        .collect();
    let want: Vec<String> = requests
        .iter()
        .map(|request| ask(&alone, request.clone()).text)
        .collect();
    assert_eq!(script.widest.load(Ordering::Relaxed), 1);

    let (script, hold) = Script::new(Answer::Hashed(600)).held_at(0);
    let engine = start_with(&script, together(4));
    engine.wait_ready(PATIENCE);
    let events = submit_all(&engine, &requests);
    drop(hold);
    let have: Vec<String> = events.iter().map(|events| hear(events).text).collect();
    assert_eq!(have, want);
    assert_eq!(script.widest.load(Ordering::Relaxed), 4);
    let stats = engine.stats();
    assert_eq!((stats.finished, stats.running, stats.waiting), (7, 0, 0));
    assert!(stats.step_sequences > stats.steps, "{stats:?}");
}

#[test]
fn a_long_prompt_does_not_stall_who_decodes() {
    let (script, hold) = Script::new(Answer::Tokens(vec![1000; 400])).held_at(10);
    let mut options = together(2);
    // Whatever a step takes, it is longer than this: a decoding sequence shares its steps with as few positions as can be.
    options.slice = Duration::ZERO;
    options.prefill_chunk_tokens = 200;
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    let first = engine.submit(request(300)).unwrap();
    let mut seen = first.by_ref_until_delta();
    let long = engine.submit(asking(400, 1)).unwrap();
    drop(hold);
    seen += hear_rest(&first);
    assert_eq!(seen, 300);
    hear(&long);
    let calls = script.calls.lock().unwrap();
    let chunks = calls.iter().filter_map(|(_, call)| match call {
        Call::Advance { from, positions } if *positions > 1 && *from > 8 => Some(*positions),
        _ => None,
    });
    let largest = chunks.max().unwrap();
    assert!(largest <= 32, "a chunk of {largest} beside a stream");
}

/// Tokens until there is text.
trait UntilDelta {
    fn by_ref_until_delta(&self) -> u32;
}

impl UntilDelta for visor_engine::EventReceiver {
    fn by_ref_until_delta(&self) -> u32 {
        loop {
            if let Event::Delta { tokens, .. } = self.recv_timeout(PATIENCE).unwrap() {
                return tokens;
            }
        }
    }
}

fn hear_rest(events: &visor_engine::EventReceiver) -> u32 {
    let mut tokens = 0;
    loop {
        match events.recv_timeout(PATIENCE).unwrap() {
            Event::Delta { tokens: more, .. } => tokens += more,
            Event::Finished { .. } => return tokens,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn when_blocks_run_out_the_last_one_waits_and_loses_nothing() {
    let script = Script::new(Answer::Hashed(600));
    let alone = start_with(&script, together(1));
    alone.wait_ready(PATIENCE);
    let requests: Vec<_> = (0..3).map(|n| asking(10 + n, 60)).collect();
    let want: Vec<String> = requests
        .iter()
        .map(|request| ask(&alone, request.clone()).text)
        .collect();
    let (script, hold) = Script::new(Answer::Hashed(600)).held_at(0);
    let mut options = together(3);
    // Room for little more than one of them.
    options.context_tokens_max = 80;
    options.kv_bytes = 1;
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    let events = submit_all(&engine, &requests);
    drop(hold);
    for (events, want) in events.iter().zip(&want) {
        let heard = hear(events);
        assert_eq!(&heard.text, want);
        assert_eq!(heard.usage().completion_tokens, 60);
    }
    let stats = engine.stats();
    assert!(stats.preempted > 0, "{stats:?}");
    assert!(
        stats.preempted <= 3,
        "who comes back finds room to go on: {stats:?}"
    );
    assert_eq!(stats.kv_blocks_max, 23);
    assert_eq!((stats.finished, stats.failed), (3, 0));
    assert_eq!(script.blocks_used.load(Ordering::Relaxed), 0);
}

#[test]
fn a_prompt_waits_until_there_are_blocks_for_it() {
    let script = Script::new(Answer::Hashed(600));
    let mut options = together(3);
    options.context_tokens_max = 80;
    options.kv_bytes = 1;
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    let events: Vec<_> = (0..3)
        .map(|_| engine.submit(asking(70, 4)).unwrap())
        .collect();
    for events in &events {
        assert_eq!(hear(events).reason(), Some(Finish::Length));
    }
    assert_eq!(script.widest.load(Ordering::Relaxed), 1);
    assert_eq!(engine.stats().preempted, 0);
}

#[test]
fn who_comes_into_the_other_regime_takes_the_blocks_it_gave_up_at_once() {
    let mut script = Script::new(Answer::Hashed(600));
    script.short_positions_max = 10;
    let (used, seen) = (Arc::clone(&script.blocks_used), Arc::default());
    let told: Arc<Mutex<Vec<usize>>> = Arc::clone(&seen);
    let script = script.on(move |_, call| {
        if matches!(call, Call::Advance { from: 0, .. }) {
            told.lock().unwrap().push(used.load(Ordering::Relaxed));
        }
        Reply::Go
    });
    let engine = start(&script);
    assert_eq!(ask(&engine, request(8)).usage().completion_tokens, 8);
    // Of 5 positions and of 11, two of which run in a step.
    assert_eq!(*seen.lock().unwrap(), [2, 3]);
}

#[test]
fn the_one_that_cannot_be_computed_fails_alone() {
    for how in [Reply::Fail, Reply::Panic, Reply::Nan] {
        let script = Script::new(Answer::Hashed(600)).on(move |_, call| match call {
            // The third token of the one with 40 positions, however it comes about.
            Call::Advance { from, positions } if (*from..from + positions).contains(&41) => how,
            _ => Reply::Go,
        });
        let engine = start_with(&script, together(4));
        engine.wait_ready(PATIENCE);
        let lengths = [5, 40, 12, 20];
        let events: Vec<_> = lengths
            .iter()
            .map(|length| engine.submit(asking(*length, 12)).unwrap())
            .collect();
        for (length, events) in lengths.iter().zip(&events) {
            let heard = hear(events);
            if *length == 40 {
                assert!(matches!(heard.error(), EngineError::Forward(_)), "{how:?}");
            } else {
                assert_eq!(heard.usage().completion_tokens, 12, "{how:?} {length}");
            }
        }
        let stats = engine.stats();
        assert_eq!((stats.finished, stats.failed), (3, 1), "{how:?}");
        assert_eq!(script.blocks_used.load(Ordering::Relaxed), 0, "{how:?}");
    }
}

#[test]
fn who_does_not_fit_at_all_fails_alone_and_the_device_is_kept() {
    let script = Script::new(Answer::Hashed(600)).on(|_, call| match call {
        Call::Advance { from, positions } if (*from..from + positions).contains(&41) => Reply::Full,
        _ => Reply::Go,
    });
    let mut options = together(2);
    options.devices = vec![DeviceKind::Metal, DeviceKind::Cpu];
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    let events = [40, 20].map(|length| engine.submit(asking(length, 12)).unwrap());
    let [large, small] = events.each_ref().map(hear);
    let EngineError::KvFull {
        tokens: 42,
        kv_tokens_max,
    } = large.error()
    else {
        panic!("{large:?}");
    };
    assert!(*kv_tokens_max >= 4096, "{kv_tokens_max}");
    assert_eq!(small.usage().completion_tokens, 12);
    let stats = engine.stats();
    assert_eq!((stats.failed, stats.device_fallbacks), (1, 0));
    let metal = DeviceKind::Metal;
    assert_eq!(engine.state(), EngineState::Ready { device: metal });
}

#[test]
fn who_has_to_run_alone_takes_turns_with_the_others() {
    let (failed, hear_failed) = channel::<()>();
    let (go_on, wait) = channel::<()>();
    let (failed, wait) = (Mutex::new(failed), Mutex::new(wait));
    let first = AtomicBool::new(true);
    let script = Script::new(Answer::Hashed(600)).on(move |_, call| match call {
        // The long prompt's second chunk, beside a token of the short one; where it begins is told by when the two came.
        Call::Advance { from, positions }
            if *from > 0 && *positions > 1 && first.swap(false, Ordering::Relaxed) =>
        {
            failed.lock().unwrap().send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
            Reply::Fail
        }
        _ => Reply::Go,
    });
    let (script, hold) = script.held_at(0);
    let engine = start_with(&script, together(3));
    engine.wait_ready(PATIENCE);
    let suspects = [40, 400].map(|length| engine.submit(asking(length, 30)).unwrap());
    drop(hold);
    hear_failed.recv_timeout(PATIENCE).unwrap();
    let newcomer = engine.submit(asking(5, 30)).unwrap();
    let before = script.calls.lock().unwrap().len();
    go_on.send(()).unwrap();
    for events in suspects.iter().chain([&newcomer]) {
        assert_eq!(hear(events).usage().completion_tokens, 30);
    }
    let calls = script.calls.lock().unwrap();
    let positions: Vec<usize> = calls[before..]
        .iter()
        .filter_map(|(_, call)| match call {
            Call::Advance { positions, .. } => Some(*positions),
            _ => None,
        })
        .collect();
    let long = positions.iter().filter(|positions| **positions > 32);
    assert!(long.count() > 6, "{positions:?}");
    let in_a_row = |pair: &[usize]| pair.iter().all(|positions| *positions > 32);
    assert!(!positions.windows(2).any(in_a_row), "{positions:?}");
}
