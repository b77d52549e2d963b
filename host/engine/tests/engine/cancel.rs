//! Requests that end early, at every point where they can.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use visor_engine::{CancelToken, Engine, EngineError, EngineState, EventReceiver, Finish};
use visor_model::DeviceKind;

use crate::heard::*;
use crate::scripted::*;

/// Runs a request that is cancelled while the model takes the first call `when` holds for.
fn cancelled_at(when: fn(&Call) -> bool, pictures: &[u8]) -> (Heard, Vec<Call>) {
    let cancel = CancelToken::new();
    let token = cancel.clone();
    let script = Script::new(Answer::Tokens(vec![1000; 300])).on(move |_, call| {
        if when(call) {
            token.cancel();
        }
        Reply::Go
    });
    let mut options = options();
    options.context_tokens_max = 4096;
    let engine = start_with(&script, options);
    engine.wait_ready(PATIENCE);
    let mut request = if pictures.is_empty() {
        request(300)
    } else {
        request_with(pictures)
    };
    request.tokens_max = 300;
    request.cancel = cancel;
    let heard = ask(&engine, request);
    let stats = engine.stats();
    assert_eq!((stats.waiting, stats.running, stats.aborted), (0, 0, 1));
    let after = ask(&engine, crate::scripted::request(1));
    assert_eq!(after.reason(), Some(Finish::Length), "the engine goes on");
    let calls = script.calls.lock().unwrap();
    let calls = calls.iter().map(|(_, call)| call.clone());
    (
        heard,
        calls
            .filter(|call| !matches!(call, Call::Load | Call::WarmUp))
            .collect(),
    )
}

#[test]
fn a_cancelled_prefill_ends_at_the_next_chunk() {
    let (heard, calls) = cancelled_at(|call| matches!(call, Call::Advance { from: 2, .. }), &[]);
    assert_eq!(heard.reason(), Some(Finish::Cancelled));
    assert_eq!(heard.usage().completion_tokens, 0);
    let third = Call::Advance {
        from: 4,
        positions: 1,
    };
    let thirds = calls.iter().filter(|call| **call == third).count();
    assert_eq!(thirds, 1, "only the request after it got there: {calls:?}");
}

#[test]
fn a_cancelled_picture_ends_at_the_next_crop() {
    let first = |call: &Call| matches!(call, Call::Crop { crop: 0, .. });
    let (heard, calls) = cancelled_at(first, &[1, 2]);
    assert_eq!(heard.reason(), Some(Finish::Cancelled));
    assert_eq!(
        calls[1],
        Call::Crop {
            picture: 1,
            crop: 0
        }
    );
    assert!(
        !calls[2..]
            .iter()
            .any(|call| matches!(call, Call::Crop { .. })),
        "{calls:?}"
    );
}

#[test]
fn a_cancelled_answer_ends_at_the_next_token() {
    let (heard, calls) = cancelled_at(|call| matches!(call, Call::Advance { from: 7, .. }), &[]);
    assert_eq!(heard.reason(), Some(Finish::Cancelled));
    assert_eq!(heard.usage().completion_tokens, 4);
    let last = calls
        .iter()
        .filter(|call| matches!(call, Call::Advance { from: 8, .. }));
    assert_eq!(last.count(), 0);
}

/// An engine that holds its first request in prefill until the returned guard is dropped.
fn held_engine() -> (Engine, std::sync::mpsc::Sender<()>, EventReceiver) {
    let (entered, at_first) = channel();
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let script = Script::new(Answer::Tokens(vec![1000; 300])).on(move |_, call| {
        if matches!(call, Call::Advance { from: 0, .. }) {
            // The test may not look, and ends the wait by dropping its end.
            let _looked = entered.send(());
            let _ended = released.lock().unwrap().recv();
        }
        Reply::Go
    });
    let engine = start(&script);
    let first = engine.submit(request(3)).unwrap();
    at_first.recv().unwrap();
    (engine, release, first)
}

#[test]
fn a_cancelled_request_never_leaves_the_queue() {
    let (engine, release, first) = held_engine();
    let waiting = request(3);
    let cancel = waiting.cancel.clone();
    let second = engine.submit(waiting).unwrap();
    cancel.cancel();
    drop(release);
    let heard = hear(&second);
    assert_eq!(heard.reason(), Some(Finish::Cancelled));
    assert!(!heard.started);
    // It did not wait for the first request to end.
    assert_eq!(hear(&first).reason(), Some(Finish::Length));
    assert_eq!(engine.stats().aborted, 1);
}

#[test]
fn a_dropped_receiver_cancels() {
    let (engine, release, first) = held_engine();
    let queued = engine.submit(request(3)).unwrap();
    drop((first, queued, release));
    let heard = ask(&engine, request(1));
    assert_eq!(heard.reason(), Some(Finish::Length));
    let stats = engine.stats();
    assert_eq!((stats.aborted, stats.finished), (2, 1));
}

#[test]
fn a_deadline_ends_a_request_that_runs_and_one_that_waits() {
    let (engine, release, _first) = held_engine();
    let mut late = request(3);
    late.deadline = Some(Instant::now());
    let waiting = engine.submit(late.clone()).unwrap();
    drop(release);
    let heard = hear(&waiting);
    assert!(matches!(heard.error(), EngineError::DeadlinePassed { .. }));
    assert!(!heard.started);

    // The model takes as long as the request may.
    let deadline: Arc<OnceLock<Instant>> = Arc::default();
    let until = Arc::clone(&deadline);
    let script = Script::new(Answer::Tokens(vec![1000; 300])).on(move |_, call| {
        if let (Call::Advance { from: 6, .. }, Some(until)) = (call, until.get()) {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        Reply::Go
    });
    let engine = start(&script);
    let at = Instant::now() + Duration::from_secs(1);
    deadline.set(at).unwrap();
    let mut slow = request(300);
    slow.deadline = Some(at);
    let heard = ask(&engine, slow);
    assert!(
        matches!(heard.error(), EngineError::DeadlinePassed { .. }),
        "{heard:?}"
    );
    assert!(heard.started && !heard.text.is_empty());
    assert_eq!(engine.stats().failed, 1);
}

#[test]
fn stopping_finishes_what_there_is() {
    let (engine, release, first) = held_engine();
    let second = engine.submit(request(2)).unwrap();
    let stopper = engine.clone();
    let stopping = std::thread::spawn(move || stopper.stop(PATIENCE));
    while !matches!(
        engine.submit(request(1)),
        Err(EngineError::Stopped | EngineError::QueueFull { .. })
    ) {
        std::thread::yield_now();
    }
    drop(release);
    assert_eq!(hear(&first).reason(), Some(Finish::Length));
    assert_eq!(hear(&second).reason(), Some(Finish::Length));
    stopping.join().unwrap();
    assert_eq!(engine.state(), EngineState::Stopped);
    assert!(matches!(
        engine.submit(request(1)),
        Err(EngineError::Stopped)
    ));
}

#[test]
fn stopping_cancels_what_does_not_finish_in_time() {
    let (engine, release, first) = held_engine();
    let second = engine.submit(request(2)).unwrap();
    let stopper = engine.clone();
    let stopping = std::thread::spawn(move || stopper.stop(Duration::ZERO));
    while !matches!(engine.submit(request(1)), Err(EngineError::Stopped)) {
        std::thread::yield_now();
    }
    drop(release);
    assert_eq!(hear(&first).reason(), Some(Finish::Cancelled));
    assert!(matches!(hear(&second).error(), EngineError::Stopped));
    stopping.join().unwrap();
}

#[test]
fn stopping_ends_a_load_before_the_next_device() {
    let (entered, at_load) = channel();
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let script = Script::saying("x").on(move |_, call| {
        if *call == Call::Load {
            entered.send(()).unwrap();
            let _ended = released.lock().unwrap().recv();
            return Reply::Fail;
        }
        Reply::Go
    });
    let mut options = options();
    options.devices = vec![DeviceKind::Metal, DeviceKind::Cpu];
    let engine = start_with(&script, options);
    at_load.recv().unwrap();
    assert_eq!(engine.state(), EngineState::Loading);
    assert!(matches!(
        engine.submit(request(1)),
        Err(EngineError::NotReady)
    ));
    let stopper = engine.clone();
    let stopping = std::thread::spawn(move || stopper.stop(PATIENCE));
    while !matches!(engine.submit(request(1)), Err(EngineError::Stopped)) {
        std::thread::yield_now();
    }
    drop(release);
    stopping.join().unwrap();
    assert_eq!(engine.state(), EngineState::Stopped);
    assert_eq!(
        script.calls.lock().unwrap().len(),
        1,
        "the CPU was not tried"
    );
}
