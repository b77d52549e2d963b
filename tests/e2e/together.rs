//! Several clients at once, and what the second question about a picture costs.

use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};

use crate::chat::content;
use crate::client::{chunks, joined};
use crate::server::{Server, chat, data_url, fixture, pictures, text, with};

/// A small response cache would answer the same request without the engine.
const NO_RESPONSES: &str = "[cache]\nresponses_mib = 0\n";

fn cached_tokens(answer: &Value) -> u64 {
    let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    cached.as_u64().expect("a number of cached tokens")
}

fn prompt_tokens(answer: &Value) -> u64 {
    let prompt = answer["usage"]["prompt_tokens"].as_u64();
    prompt.expect("a number of prompt tokens")
}

fn cat() -> String {
    data_url("image/jpeg", &fixture("tests/photos/cat.jpg"))
}

#[test]
fn clients_at_once_are_told_what_each_is_told_alone() {
    let questions: Vec<Value> = (0..6)
        .map(|number| {
            let question = format!("question {number}, at some length: what do you know of it?");
            let message = if number % 2 == 0 {
                text(&question)
            } else {
                pictures(&[cat()], &question)
            };
            let ask = json!({"max_tokens": 40, "temperature": 1, "seed": number});
            with(chat(&[message]), ask)
        })
        .collect();
    let alone = Server::start_with("[model]\nsequences_max = 1\n[cache]\nprefixes_mib = 0\n");
    let want: Vec<String> = questions
        .iter()
        .map(|question| content(&alone.chat(question).ok()).to_owned())
        .collect();
    let server = Arc::new(Server::start());
    let threads: Vec<_> = questions
        .into_iter()
        .map(|question| {
            let server = Arc::clone(&server);
            let question = with(question, json!({"stream": true}));
            thread::spawn(move || joined(&chunks(&server.chat(&question))))
        })
        .collect();
    let have: Vec<String> = threads
        .into_iter()
        .map(|thread| thread.join().expect("an answer"))
        .collect();
    assert_eq!(have, want);
    let engine = &server.stats()["engine"];
    let figure = |name: &str| engine[name].as_u64().expect("a count");
    assert!(
        figure("step_sequences") > figure("steps"),
        "some ran together: {engine}"
    );
}

#[test]
fn a_second_question_about_a_picture_computes_what_is_new() {
    let server = Server::start_with(NO_RESPONSES);
    let ask = |question: &str| {
        with(
            chat(&[pictures(&[cat()], question)]),
            json!({"max_tokens": 8}),
        )
    };
    let first = server.chat(&ask("What is this?")).ok();
    assert_eq!(cached_tokens(&first), 0);
    let second = server.chat(&ask("What color is the background?")).ok();
    let new = prompt_tokens(&second) - cached_tokens(&second);
    assert!(new < 20, "{new} positions of {}", prompt_tokens(&second));
    let again = server.chat(&ask("What is this?")).ok();
    assert_eq!(cached_tokens(&again), prompt_tokens(&again) - 1);
    assert_eq!(
        content(&again),
        content(&first),
        "the cache changes nothing"
    );
    let stats = server.stats();
    assert!(
        stats["caches"]["prefixes"]["hits"].as_u64() > Some(0),
        "{stats}"
    );
    assert_eq!(stats["caches"]["features"]["misses"], 1, "one tower run");
}

#[test]
fn a_conversation_goes_on_behind_its_last_answer() {
    let server = Server::start_with(NO_RESPONSES);
    let first = chat(&[pictures(&[cat()], "What is this?")]);
    let answer = server.chat(&first).ok();
    let said = content(&answer).to_owned();
    let next = chat(&[
        pictures(&[cat()], "What is this?"),
        json!({"role": "assistant", "content": said}),
        text("Where is it?"),
    ]);
    let next = server.chat(&next).ok();
    let before = prompt_tokens(&answer);
    assert!(
        cached_tokens(&next) >= before,
        "{} of {}; the first prompt was {before}",
        cached_tokens(&next),
        prompt_tokens(&next)
    );
}

#[test]
fn without_a_prefix_cache_nothing_is_kept() {
    let server = Server::start_with("[cache]\nresponses_mib = 0\nprefixes_mib = 0\n");
    let body = with(chat(&[text("hello there")]), json!({"max_tokens": 4}));
    for _ in 0..2 {
        assert_eq!(cached_tokens(&server.chat(&body).ok()), 0);
    }
    assert_eq!(server.stats()["engine"]["kv_blocks"], 0);
}
