//! Drafts: the same answer in fewer steps.

use std::sync::atomic::{AtomicU64, Ordering};

use visor_engine::{EngineOptions, Finish, GenerateRequest};

use visor_model::DeviceKind;

use crate::heard::*;
use crate::scripted::*;

fn drafting(draft_tokens_max: usize, sequences_max: usize) -> EngineOptions {
    EngineOptions {
        draft_tokens_max,
        sequences_max,
        context_tokens_max: 4096,
        prefill_chunk_tokens: 64,
        queue_requests_max: 64,
        ..options()
    }
}

/// One whose answer comes to repeat itself, at temperature 0, or comes close to it.
fn repeating(index: u64) -> GenerateRequest {
    let mut request = request(3 + 13 * index as u32);
    request.prompt.ids.push(index as i64);
    request.sampling.temperature = (index % 3) as f64 / 2.0;
    request.sampling.seed = Some(index);
    request.sampling.logprobs = index.is_multiple_of(2).then_some(2);
    if index == 5 {
        request.stop_strings = vec!["e".into()];
    }
    request
}

#[test]
fn drafts_change_the_steps_and_nothing_else() {
    let requests: Vec<_> = (0..12).map(repeating).collect();
    let plain = start_with(&Script::new(Answer::Repeating(7)), drafting(0, 1));
    plain.wait_ready(PATIENCE);
    let want: Vec<_> = requests.iter().map(|it| ask(&plain, it.clone())).collect();
    assert_eq!(plain.stats().drafted_tokens, 0);
    for (draft_tokens_max, sequences_max) in [(1, 1), (7, 1), (40, 1), (7, 3), (2, 3)] {
        let script = Script::new(Answer::Repeating(7));
        let engine = start_with(&script, drafting(draft_tokens_max, sequences_max));
        engine.wait_ready(PATIENCE);
        let events = submit_all(&engine, &requests);
        for (events, want) in events.iter().zip(&want) {
            let have = hear(events);
            assert_eq!(
                (&have.text, &have.infos, have.reason(), have.usage()),
                (&want.text, &want.infos, want.reason(), want.usage())
            );
        }
        let stats = engine.stats();
        assert_eq!(stats.completion_tokens, plain.stats().completion_tokens);
        assert!(stats.accepted_tokens > 0, "{stats:?}");
        assert!(stats.accepted_tokens < stats.drafted_tokens, "{stats:?}");
        // A step has a token for whoever takes part and has its prompt behind it, and those of its drafts that came.
        assert!(stats.steps < plain.stats().steps, "{stats:?}");
        assert_eq!(script.blocks_used.load(Ordering::Relaxed), 0);
    }
}

/// 57 tokens that are the same are few steps, as long as the model takes drafts.
#[test]
fn a_run_is_a_few_steps_where_drafts_are_taken() {
    let steps = |drafts_max: usize| {
        let mut script = Script::new(Answer::Tokens(vec![1000; 60]));
        script.drafts_max = drafts_max;
        let engine = start_with(&script, drafting(7, 1));
        engine.wait_ready(PATIENCE);
        let heard = ask(&engine, request(57));
        assert_eq!(heard.reason(), Some(Finish::Length));
        assert_eq!(heard.usage().completion_tokens, 57);
        let stats = engine.stats();
        assert!(stats.accepted_tokens <= stats.drafted_tokens);
        stats.steps
    };
    assert_eq!(steps(0), 57);
    // Four by one, two and two to the end of a block, a block at a time, and the last one.
    assert_eq!(steps(7), 4 + 2 + 12 + 1);
    assert!(steps(1) < 32);
}

#[test]
fn however_long_a_run_is_it_is_drafted() {
    for draft_tokens_max in [1, 7] {
        let script = Script::new(Answer::Tokens(vec![1000; 900]));
        let engine = start_with(&script, drafting(draft_tokens_max, 1));
        engine.wait_ready(PATIENCE);
        assert_eq!(ask(&engine, request(800)).usage().completion_tokens, 800);
        let stats = engine.stats();
        let most = 10 + 800 / (1 + draft_tokens_max).min(BLOCK) as u64;
        assert!(stats.steps < most, "{stats:?}");
        assert_eq!(stats.drafted_tokens, stats.accepted_tokens, "{stats:?}");
    }
}

#[test]
fn a_step_with_drafts_that_fails_runs_again() {
    for how in [Reply::Fail, Reply::Panic, Reply::Nan] {
        let failed = AtomicU64::new(0);
        let script = Script::new(Answer::Tokens(vec![1000; 60]));
        let script = script.on(move |_, call| match call {
            Call::Advance { positions, from } if *positions > 2 && *from > 8 => {
                match failed.fetch_add(1, Ordering::Relaxed) {
                    0 => how,
                    _ => Reply::Go,
                }
            }
            _ => Reply::Go,
        });
        let mut options = drafting(7, 2);
        // Of one the device is to blame, and of two nobody knows which: either way everything runs again.
        options.devices = vec![DeviceKind::Metal, DeviceKind::Cpu];
        let engine = start_with(&script, options);
        engine.wait_ready(PATIENCE);
        let both = [0, 1].map(|_| engine.submit(request(40)).unwrap());
        for events in &both {
            let heard = hear(events);
            assert_eq!(heard.usage().completion_tokens, 40, "{how:?}");
        }
        let stats = engine.stats();
        assert_eq!((stats.finished, stats.failed), (2, 0), "{how:?}: {stats:?}");
        assert_eq!(script.blocks_used.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn a_request_that_is_cancelled_in_a_step_with_drafts_ends_there() {
    let long = request(3000);
    let cancel = long.cancel.clone();
    let script = Script::new(Answer::Tokens(vec![1000; 4000]));
    let script = script.on(move |_, call| {
        if matches!(call, Call::Advance { from, positions } if *from > 50 && *positions > 3) {
            cancel.cancel();
        }
        Reply::Go
    });
    let engine = start_with(&script, drafting(7, 1));
    engine.wait_ready(PATIENCE);
    let heard = ask(&engine, long);
    assert_eq!(heard.reason(), Some(Finish::Cancelled));
    assert!(heard.usage().completion_tokens < 100);
    assert_eq!(script.blocks_used.load(Ordering::Relaxed), 0);
}

#[test]
fn a_draft_ends_with_the_block_that_it_begins_in() {
    let script = Script::new(Answer::Repeating(7)).on(|_, call| match call {
        // The prompt is one piece.
        Call::Advance { from, positions } if *from > 0 => {
            let last = from + positions - 1;
            assert_eq!(from / BLOCK, last / BLOCK, "{call:?}");
            Reply::Go
        }
        _ => Reply::Go,
    });
    let engine = start_with(&script, drafting(40, 1));
    engine.wait_ready(PATIENCE);
    for index in 0..12 {
        assert!(ask(&engine, repeating(index)).reason().is_some());
    }
    assert!(engine.stats().accepted_tokens > 0);
}

#[test]
fn drafts_take_no_block_that_a_sequence_needs() {
    let script = Script::new(Answer::Repeating(7));
    let mut options = drafting(7, 4);
    options.context_tokens_max = 60;
    options.kv_bytes = 1000 * 20;
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    let events: Vec<_> = (0..4)
        .map(|index| engine.submit(repeating(index)).unwrap())
        .collect();
    let plain = start_with(&Script::new(Answer::Repeating(7)), drafting(0, 1));
    plain.wait_ready(PATIENCE);
    for (index, events) in (0..).zip(&events) {
        assert_eq!(hear(events).text, ask(&plain, repeating(index)).text);
    }
    assert_eq!(script.blocks_used.load(Ordering::Relaxed), 0);
}
