//! What a client sees when nothing goes wrong.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use visor_engine::{EngineState, Event, Finish, Sampling};

use crate::heard::*;
use crate::scripted::*;

#[test]
fn events_come_in_order_and_end_once() {
    let engine = start(&Script::saying("It is a crab."));
    let heard = ask(&engine, request(50));
    assert!(heard.started);
    assert_eq!(heard.text, "It is a crab.");
    assert_eq!(heard.reason(), Some(Finish::Stop));
    assert_eq!(heard.matched_stop(), None);
}

#[test]
fn usage_and_times_are_told() {
    let engine = start(&Script::saying("one two"));
    let answer_tokens = tokenizer().count("one two");
    let events = engine.submit(request_with(&[7])).unwrap();
    let Some(Event::Started {
        prompt_tokens,
        image_tokens,
        cached_tokens,
    }) = events.recv()
    else {
        panic!("no Started");
    };
    let slots = pixels(7).image_tokens();
    assert_eq!(
        (prompt_tokens, image_tokens, cached_tokens),
        (slots + 2, slots, 0)
    );
    let last = events.last();
    let Some(Event::Finished { usage, timings, .. }) = last else {
        panic!("{last:?}");
    };
    assert_eq!(
        (usage.prompt_tokens, usage.image_tokens),
        (slots + 2, slots)
    );
    // The stop token was computed, too.
    assert_eq!(usage.completion_tokens, answer_tokens + 1);
    assert!(
        timings.prefill_us > 0 && timings.decode_us > 0,
        "{timings:?}"
    );
    let stats = engine.stats();
    assert_eq!((stats.waiting, stats.running, stats.finished), (0, 0, 1));
    assert_eq!(stats.completion_tokens, u64::from(usage.completion_tokens));
    assert_eq!(stats.image_tokens, u64::from(slots));
}

#[test]
fn an_answer_ends_at_its_length() {
    let engine = start(&Script::saying("one two three four five"));
    let heard = ask(&engine, request(2));
    assert_eq!(heard.reason(), Some(Finish::Length));
    assert_eq!(heard.usage().completion_tokens, 2);
    assert_eq!(heard.text, "one two");
}

#[test]
fn an_answer_is_cut_to_what_the_context_leaves() {
    let engine = start(&Script::new(Answer::Tokens(vec![1000; 1000])));
    let heard = ask(&engine, request(u32::MAX));
    assert_eq!(heard.reason(), Some(Finish::Length));
    assert_eq!(heard.usage().completion_tokens, 400 - 5);
}

#[test]
fn no_tokens_are_computed_when_none_are_asked_for() {
    let script = Script::saying("never");
    let engine = start(&script);
    let heard = ask(&engine, request(0));
    assert_eq!(
        (heard.reason(), heard.text.as_str()),
        (Some(Finish::Length), "")
    );
    let calls = script.calls.lock().unwrap();
    assert!(
        !calls
            .iter()
            .any(|(_, call)| matches!(call, Call::Advance { .. }))
    );
}

#[test]
fn a_character_is_never_split() {
    let text = "crab 🦀, família 👨‍👩‍👧, ဘာသာ, 日本";
    let engine = start(&Script::saying(text));
    let heard = ask(&engine, request(200));
    assert_eq!(heard.text, text);
    assert!(heard.deltas.len() > 5, "it streams: {:?}", heard.deltas);
    assert!(heard.deltas.iter().all(|delta| !delta.contains('\u{FFFD}')));
}

#[test]
fn an_answer_cut_in_a_character_is_the_decode_of_its_tokens() {
    let tokens = tokenizer().encode_text("🦀");
    let cut = tokens[..tokens.len() - 1].to_vec();
    let engine = start(&Script::new(Answer::Tokens(tokens)));
    let heard = ask(&engine, request(cut.len() as u32));
    assert_eq!(heard.text, tokenizer().decode(&cut, true));
}

#[test]
fn equal_seeds_give_equal_answers() {
    let engine = start(&Script::new(Answer::Hashed(500)));
    let text = |seed| {
        let mut request = request(40);
        request.sampling = Sampling {
            temperature: 1.0,
            top_p: 0.95,
            seed,
            ..Sampling::default()
        };
        ask(&engine, request).text
    };
    assert_eq!(text(Some(1)), text(Some(1)));
    assert_ne!(text(Some(1)), text(Some(2)));
    assert_ne!(text(None), text(None));
}

#[test]
fn first_come_is_first_served() {
    let script = Script::saying("x");
    let (entered, at_first) = channel();
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let gated = script.clone().on(move |_, call| {
        if matches!(call, Call::Advance { from: 0, .. }) {
            entered.send(()).unwrap();
            // An error is the end of the test: everything may go.
            let _ended = released.lock().unwrap().recv();
        }
        Reply::Go
    });
    let engine = start(&gated);
    let receivers: Vec<_> = (1..=3)
        .map(|tokens_max| engine.submit(request(tokens_max)).unwrap())
        .collect();
    at_first.recv().unwrap();
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting), (1, 2));
    assert_eq!(stats.running_tokens, 5);
    drop(release);
    for receiver in &receivers {
        assert_eq!(hear(receiver).text, "x");
    }
    // Each prompt was begun when the one before had ended.
    let calls = script.calls.lock().unwrap();
    let begins = calls
        .iter()
        .filter(|(_, call)| matches!(call, Call::Begin { .. }))
        .count();
    assert_eq!(begins, 3);
}

#[test]
fn a_reader_that_does_not_read_stalls_nobody() {
    let engine = start(&Script::new(Answer::Tokens(vec![1000; 300])));
    let unread = engine.submit(request(300)).unwrap();
    let heard = ask(&engine, request(3));
    assert_eq!(heard.reason(), Some(Finish::Length));
    assert_eq!(hear(&unread).usage().completion_tokens, 300);
}

#[test]
fn prefill_comes_in_chunks() {
    let script = Script::saying("x");
    ask(&start(&script), request(1));
    let calls = script.calls.lock().unwrap();
    let chunks: Vec<_> = calls
        .iter()
        .filter_map(|(_, call)| match call {
            Call::Advance { from, positions } => Some((*from, *positions)),
            _ => None,
        })
        .collect();
    assert_eq!(chunks, [(0, 2), (2, 2), (4, 1)]);
}

#[test]
fn work_is_finished_after_the_last_handle_is_gone() {
    let engine = start(&Script::saying("still here"));
    let receivers = [
        engine.submit(request(50)).unwrap(),
        engine.submit(request(50)).unwrap(),
    ];
    drop(engine);
    for receiver in &receivers {
        assert_eq!(hear(receiver).text, "still here");
    }
}

#[test]
fn the_model_is_warmed_up_before_it_is_ready() {
    let script = Script::saying("x");
    let warmed = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&warmed);
    let engine = start(&script.on(move |_, call| {
        *seen.lock().unwrap() += u32::from(*call == Call::WarmUp);
        Reply::Go
    }));
    assert_eq!(*warmed.lock().unwrap(), 1);
    assert!(matches!(engine.state(), EngineState::Ready { .. }));
}
