//! Devices that break: at load, at warm-up, in the middle of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use visor_engine::{Engine, EngineError, EngineState, Finish, Sampling};
use visor_model::DeviceKind;

use crate::constraints::Mottled;
use crate::heard::*;
use crate::scripted::*;

const METAL: DeviceKind = DeviceKind::Metal;
const CPU: DeviceKind = DeviceKind::Cpu;

fn start_on(devices: &[DeviceKind], script: &Script) -> Engine {
    let mut options = options();
    options.devices = devices.to_vec();
    let engine = start_with(script, options);
    engine.wait_ready(PATIENCE);
    engine
}

#[test]
fn a_device_that_does_not_load_is_passed_over() {
    for broken in [Reply::Fail, Reply::Panic] {
        let script = Script::saying("fine").on(move |device, call| match (device, call) {
            (METAL | DeviceKind::Cuda, Call::Load) => broken,
            _ => Reply::Go,
        });
        let engine = start_on(&[METAL, DeviceKind::Cuda, CPU], &script);
        assert_eq!(engine.state(), EngineState::Ready { device: CPU });
        assert_eq!(engine.stats().device_fallbacks, 2);
        assert_eq!(ask(&engine, request(50)).text, "fine");
    }
}

#[test]
fn a_device_that_cannot_compute_is_passed_over() {
    let script = Script::saying("fine").on(|device, call| match (device, call) {
        (METAL, Call::WarmUp) => Reply::Fail,
        _ => Reply::Go,
    });
    let engine = start_on(&[METAL, CPU], &script);
    assert_eq!(engine.state(), EngineState::Ready { device: CPU });
}

#[test]
fn no_device_is_told_with_every_reason() {
    let script = Script::saying("never").on(|_, call| match call {
        Call::Load => Reply::Fail,
        _ => Reply::Go,
    });
    let engine = start_on(&[METAL, CPU], &script);
    let EngineState::Failed(why) = engine.state() else {
        panic!("{:?}", engine.state());
    };
    assert!(why.contains("metal: ") && why.contains("cpu: "), "{why}");
    let refused = engine.submit(request(1));
    assert!(matches!(refused, Err(EngineError::NoModel(_))));
}

/// Two pictures, one of them twice, and a sampled answer that depends on every position and may not say everything.
fn demanding_request() -> visor_engine::GenerateRequest {
    let mut request = request_with(&[3, 9, 3]);
    request.tokens_max = 12;
    request.grammar = Some(Arc::new(Mottled::default()));
    request.sampling = Sampling {
        temperature: 1.0,
        top_k: 50,
        repetition_penalty: 1.1,
        frequency_penalty: 0.5,
        seed: Some(11),
        ..Sampling::default()
    };
    request
}

/// A script of which the accelerator breaks at its `nth` call after it was ready.
fn breaking_at(nth: usize, how: Reply) -> (Script, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let script = Script::new(Answer::Hashed(600)).on(move |device, call| {
        if device != METAL || matches!(call, Call::Load | Call::WarmUp) {
            return Reply::Go;
        }
        let at = counted.fetch_add(1, Ordering::Relaxed);
        // Once broken, it stays so.
        if at >= nth { how } else { Reply::Go }
    });
    (script, count)
}

#[test]
fn the_client_does_not_notice_wherever_the_device_breaks() {
    let options = |devices: &[DeviceKind]| {
        let mut options = options();
        options.devices = devices.to_vec();
        options.context_tokens_max = 4096;
        options.prefill_chunk_tokens = 300;
        options
    };
    let run = |script: &Script| {
        let engine = start_with(script, options(&[METAL, CPU]));
        engine.wait_ready(PATIENCE);
        let heard = ask(&engine, demanding_request());
        (engine, heard)
    };
    let (healthy, calls) = breaking_at(usize::MAX, Reply::Go);
    let (_, want) = run(&healthy);
    let calls = calls.load(Ordering::Relaxed);
    assert!(calls > 20, "{calls}");
    for how in [Reply::Fail, Reply::Panic, Reply::Nan] {
        for nth in 0..calls {
            let (script, _) = breaking_at(nth, how);
            let (engine, heard) = run(&script);
            assert_eq!(heard.text, want.text, "{how:?} at call {nth}");
            assert_eq!(heard.usage(), want.usage(), "{how:?} at call {nth}");
            // Nan only shows where logits come out; the last call may be a push that has none.
            let fell_back = engine.state() == EngineState::Ready { device: CPU };
            assert!(fell_back || how == Reply::Nan, "{how:?} at call {nth}");
            assert_eq!(engine.stats().device_fallbacks, u64::from(fell_back));
            assert_eq!(engine.stats().failed, 0);
        }
    }
}

#[test]
fn the_cpu_keeps_serving_after_a_fallback() {
    let (script, calls) = breaking_at(2, Reply::Fail);
    let engine = start_on(&[METAL, CPU], &script);
    let first = ask(&engine, request(5));
    let calls_on_metal = calls.load(Ordering::Relaxed);
    let second = ask(&engine, request(5));
    assert_eq!(first.text, second.text);
    assert_eq!(
        calls.load(Ordering::Relaxed),
        calls_on_metal,
        "metal is not asked again"
    );
    assert_eq!(engine.stats().device_fallbacks, 1);
    assert_eq!(engine.stats().finished, 2);
}

#[test]
fn a_cpu_that_cannot_take_over_ends_the_engine_with_its_reason() {
    let script = Script::saying("never").on(|device, call| match (device, call) {
        (METAL, Call::Advance { .. }) | (CPU, Call::Load) => Reply::Fail,
        _ => Reply::Go,
    });
    let engine = start_on(&[METAL, CPU], &script);
    assert_eq!(engine.state(), EngineState::Ready { device: METAL });
    let receivers = [engine.submit(request(5)), engine.submit(request(5))];
    for receiver in receivers.into_iter().flatten() {
        let heard = hear(&receiver);
        assert!(matches!(
            heard.error(),
            EngineError::Forward(_) | EngineError::Stopped
        ));
    }
    let EngineState::Failed(why) = engine.state() else {
        panic!("{:?}", engine.state());
    };
    assert!(
        why.contains("metal broke") && why.contains("scripted"),
        "{why}"
    );
}

#[test]
fn a_device_that_was_insisted_on_is_not_left() {
    let (script, _) = breaking_at(0, Reply::Fail);
    let engine = start_on(&[METAL], &script);
    let heard = ask(&engine, request(5));
    assert!(matches!(heard.error(), EngineError::Forward(_)));
    assert_eq!(engine.state(), EngineState::Ready { device: METAL });
    assert_eq!(engine.stats().device_fallbacks, 0);
}

#[test]
fn what_breaks_on_the_cpu_costs_one_request() {
    for how in [Reply::Fail, Reply::Panic, Reply::Nan] {
        let broken = Arc::new(AtomicUsize::new(0));
        let script = Script::saying("fine again").on(move |_, call| match call {
            Call::Advance { from: 6, .. } if broken.fetch_add(1, Ordering::Relaxed) == 0 => how,
            _ => Reply::Go,
        });
        let engine = start(&script);
        let heard = ask(&engine, request(50));
        assert!(
            matches!(heard.error(), EngineError::Forward(_)),
            "{heard:?}"
        );
        assert!(heard.started);
        let after = ask(&engine, request(50));
        assert_eq!(
            (after.text.as_str(), after.reason()),
            ("fine again", Some(Finish::Stop))
        );
        let stats = engine.stats();
        assert_eq!((stats.failed, stats.finished), (1, 1));
        assert_eq!(stats.model_panics, u64::from(how == Reply::Panic));
    }
}

#[test]
fn the_reason_of_a_failure_is_kept_for_the_log() {
    let engine = start(&Script::saying("x").on(|_, call| match call {
        Call::Advance { .. } => Reply::Panic,
        _ => Reply::Go,
    }));
    let heard = ask(&engine, request(5));
    let source = std::error::Error::source(heard.error())
        .expect("a cause")
        .to_string();
    assert!(source.contains("scripted panic"), "{source}");
}

/// One step gives several sequences what no token can be drawn from: the CPU does the work of all of them.
#[test]
fn nobody_notices_when_the_device_breaks_under_several() {
    let run = |nth: usize, how: Reply| {
        let (script, _) = breaking_at(nth, how);
        let mut options = options();
        options.devices = vec![METAL, CPU];
        options.sequences_max = 4;
        options.prefill_chunk_tokens = 64;
        let engine = start_with(&script, options);
        engine.wait_ready(PATIENCE);
        let events: Vec<_> = (0..4)
            .map(|seed| {
                let mut request = request(9);
                request.sampling.temperature = 1.0;
                request.sampling.seed = Some(seed);
                engine.submit(request).unwrap()
            })
            .collect();
        let texts: Vec<String> = events.iter().map(|events| hear(events).text).collect();
        (texts, engine.stats())
    };
    let (want, _) = run(usize::MAX, Reply::Go);
    for how in [Reply::Fail, Reply::Panic, Reply::Nan] {
        for nth in [3, 10, 25, 40] {
            let (texts, stats) = run(nth, how);
            assert_eq!(texts, want, "{how:?} at call {nth}");
            assert_eq!((stats.failed, stats.finished), (0, 4), "{how:?} at {nth}");
            assert_eq!(stats.device_fallbacks, 1, "{how:?} at {nth}");
        }
    }
}
