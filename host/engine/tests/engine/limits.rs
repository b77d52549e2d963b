//! Requests that are refused before anything is computed, and memory that is given back when there are none.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use visor_engine::{EngineError, Finish, GenerateRequest};

use crate::heard::*;
use crate::scripted::*;

#[track_caller]
fn refused(engine: &visor_engine::Engine, change: impl FnOnce(&mut GenerateRequest)) -> String {
    let mut request = request_with(&[1]);
    change(&mut request);
    match engine.submit(request) {
        Err(EngineError::Invalid(message)) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_prompt_that_leaves_no_room_is_refused() {
    let engine = start(&Script::saying("x"));
    let mut long = request(1);
    long.prompt.ids = vec![1; 399];
    assert_eq!(ask(&engine, long.clone()).reason(), Some(Finish::Length));
    long.prompt.ids.push(1);
    let error = engine.submit(long).unwrap_err();
    let EngineError::PromptTooLong {
        prompt_tokens: 400,
        context_tokens_max: 400,
    } = error
    else {
        panic!("{error:?}");
    };
    assert!(error.to_string().contains("400 tokens"), "{error}");
}

#[test]
fn a_request_that_contradicts_itself_is_refused() {
    let engine = start(&Script::saying("x"));
    let check = |message: String, want: &str| assert!(message.contains(want), "{message}");
    check(
        refused(&engine, |r| r.prompt.ids.retain(|id| *id == 0)),
        "empty",
    );
    check(refused(&engine, |r| r.images.clear()), "picture 0, of 0");
    check(
        refused(&engine, |r| r.images.push(pixels(2))),
        "picture 1 has 0 slots",
    );
    check(refused(&engine, |r| r.prompt.ids.push(-1)), "image slots");
    check(
        refused(&engine, |r| r.prompt.image_tokens -= 1),
        "announced",
    );
    check(
        refused(&engine, |r| r.prompt.ids.push(i64::MIN)),
        "a slot of picture",
    );
    check(
        refused(&engine, |r| r.sampling.temperature = f64::NAN),
        "temperature",
    );
    check(
        refused(&engine, |r| r.sampling.temperature = -1.0),
        "temperature",
    );
    check(refused(&engine, |r| r.sampling.top_p = 0.0), "top_p");
    check(
        refused(&engine, |r| r.stop_strings = vec!["x".into(); 81]),
        "80 stop strings",
    );
    assert_eq!(engine.stats().submitted, 0);
}

#[test]
fn a_full_queue_refuses_and_then_takes_in_again() {
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let engine = start(&Script::saying("x").on(move |_, call| {
        if matches!(call, Call::Advance { .. }) {
            let _ended = released.lock().unwrap().recv();
        }
        Reply::Go
    }));
    // One runs, four wait.
    let receivers: Vec<_> = (0..5).map(|_| engine.submit(request(1)).unwrap()).collect();
    let error = engine.submit(request(1)).unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::QueueFull {
                queue_requests_max: 4
            }
        ),
        "{error}"
    );
    assert_eq!(engine.stats().rejected, 1);
    drop(release);
    for receiver in &receivers {
        assert_eq!(hear(receiver).reason(), Some(Finish::Length));
        // Whoever has heard of an end finds room.
        assert_eq!(ask(&engine, request(1)).reason(), Some(Finish::Length));
    }
}

#[test]
fn prompts_that_wait_are_limited_in_tokens_too() {
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let script = Script::saying("x").on(move |_, call| {
        if matches!(call, Call::Advance { .. }) {
            let _ended = released.lock().unwrap().recv();
        }
        Reply::Go
    });
    let mut options = options();
    options.queue_tokens_max = 12;
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    let first = engine.submit(request(1)).unwrap();
    while engine.stats().running == 0 {
        std::thread::yield_now();
    }
    // Five positions each: two fit.
    let waiting: Vec<_> = (0..2).map(|_| engine.submit(request(1)).unwrap()).collect();
    let error = engine.submit(request(1)).unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::QueueTokensFull {
                queue_tokens_max: 12
            }
        ),
        "{error}"
    );
    assert_eq!(
        (engine.stats().waiting_tokens, engine.stats().rejected),
        (10, 1)
    );
    drop(release);
    for events in [first].iter().chain(&waiting) {
        assert_eq!(hear(events).reason(), Some(Finish::Length));
    }
    assert_eq!(engine.stats().waiting_tokens, 0);
}

#[test]
fn spare_memory_is_returned_when_nothing_was_asked_for_a_while() {
    let script = Script::saying("x");
    let engine = start(&script);
    ask(&engine, request(1));
    let late = Instant::now() + Duration::from_secs(60);
    while script.returns.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < late, "kept for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
}
