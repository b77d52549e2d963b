//! Several answers, probabilities, biases and penalties, through the whole server; and the older API
//! that goes on with a text.

use serde_json::{Value, json};

use crate::chat::content;
use crate::client::{chunks, events};
use crate::server::{Server, chat, shared, text, with};

fn story(more: Value) -> Value {
    with(chat(&[text("Tell me a story")]), more)
}

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().expect("choices");
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
    }
    let texts = choices.iter().map(|choice| &choice["message"]["content"]);
    texts
        .map(|text| text.as_str().expect("a text").to_owned())
        .collect()
}

#[test]
fn several_answers_differ_and_follow_from_the_seed() {
    let server = shared();
    let hot = |n: u32| story(json!({"n": n, "seed": 7, "temperature": 2.0, "max_tokens": 12}));
    let four = server.chat(&hot(4)).ok();
    let answers = texts(&four);
    assert_eq!(answers.len(), 4);
    assert!(
        answers.iter().any(|answer| *answer != answers[0]),
        "{answers:?}"
    );
    assert_eq!(texts(&server.chat(&hot(4)).ok()), answers);
    let one = server.chat(&hot(1)).ok();
    assert_eq!(content(&one), answers[0], "the first has the client's seed");
    assert_eq!(
        four["usage"]["prompt_tokens"],
        one["usage"]["prompt_tokens"]
    );
    let completion = |answer: &Value| {
        answer["usage"]["completion_tokens"]
            .as_u64()
            .expect("a count")
    };
    assert!(completion(&four) >= 4 * completion(&one).min(2));
    assert_eq!(
        four["usage"]["total_tokens"].as_u64().expect("a count"),
        completion(&four) + four["usage"]["prompt_tokens"].as_u64().expect("a count")
    );
}

#[test]
fn a_stream_of_several_answers_adds_up_to_them() {
    let server = shared();
    let body = story(json!({"n": 3, "seed": 1, "temperature": 2.0, "max_tokens": 10}));
    let whole = texts(&server.chat(&body).ok());
    let stream = server.chat(&with(
        body,
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    ));
    let chunks = chunks(&stream);
    for (index, text) in whole.iter().enumerate() {
        let own = chunks.iter().map(|chunk| &chunk["choices"][0]);
        let own: Vec<&Value> = own.filter(|choice| choice["index"] == index).collect();
        let pieces = own.iter().filter_map(|c| c["delta"]["content"].as_str());
        assert_eq!(pieces.collect::<String>(), *text);
        let ends = own.iter().filter(|c| c["finish_reason"].is_string());
        assert_eq!(ends.count(), 1, "choice {index}");
    }
    assert_eq!(chunks.last().expect("chunks")["choices"], json!([]));
    assert_eq!(events(&stream).last().map(String::as_str), Some("[DONE]"));
}

#[test]
fn answers_beyond_the_operators_limit_are_refused() {
    let server = Server::start_with("[server]\ngenerations_per_request_max = 2\n");
    server.chat(&story(json!({"n": 2}))).ok();
    let error = server.chat(&story(json!({"n": 3}))).error(400);
    assert_eq!(error["param"], "n");
    assert!(
        error["message"].as_str().expect("a message").contains('2'),
        "{error}"
    );
}

#[test]
fn probabilities_are_told_and_their_bytes_are_the_text() {
    let server = shared();
    let body = story(json!({"logprobs": true, "top_logprobs": 3, "max_tokens": 12}));
    let whole = server.chat(&body).ok();
    let tokens = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("tokens")
        .clone();
    let mut bytes = Vec::new();
    for token in &tokens {
        assert!(token["logprob"].as_f64().expect("a number") <= 0.0);
        let alternatives = token["top_logprobs"].as_array().expect("alternatives");
        assert_eq!(alternatives.len(), 3);
        assert_eq!(
            alternatives[0]["bytes"], token["bytes"],
            "greedy takes the likeliest"
        );
        let own: Vec<u8> = serde_json::from_value(token["bytes"].clone()).expect("bytes");
        bytes.extend(own);
    }
    assert_eq!(String::from_utf8(bytes).expect("UTF-8"), content(&whole));
    // A kept answer would have no tokens to tell.
    assert_eq!(server.chat(&body).ok()["choices"], whole["choices"]);
    let stream = server.chat(&with(body, json!({"stream": true})));
    let chunks = chunks(&stream);
    let streamed = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(streamed.flatten().cloned().collect::<Vec<_>>(), tokens);
}

#[test]
fn a_bias_bans_a_token_and_no_kept_answer_hides_it() {
    let server = shared();
    let body = story(json!({"logprobs": true, "max_tokens": 1}));
    let first = &server.chat(&body).ok()["choices"][0]["logprobs"]["content"][0];
    let said = first["token"].as_str().expect("a token").to_owned();
    let plain = story(json!({"max_tokens": 1}));
    assert_eq!(content(&server.chat(&plain).ok()), said);
    let bare = json!({"prompt": said, "add_special_tokens": false});
    let ids = server.send("POST", "/v1/tokenize", bare.to_string().as_bytes());
    let ids = ids.ok()["tokens"].as_array().expect("ids").clone();
    let bias: serde_json::Map<_, _> = ids.iter().map(|id| (id.to_string(), json!(-100))).collect();
    let banned = with(plain.clone(), json!({"logit_bias": bias}));
    assert_ne!(content(&server.chat(&banned).ok()), said);
    assert_eq!(content(&server.chat(&plain).ok()), said);
}

#[test]
fn penalties_change_greedy_answers_and_are_part_of_a_kept_answers_key() {
    let server = shared();
    let plain = story(json!({"max_tokens": 40}));
    let unchanged = content(&server.chat(&plain).ok());
    for wish in [
        json!({"repetition_penalty": 10.0}),
        json!({"frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0}),
    ] {
        let body = with(plain.clone(), wish.clone());
        let changed = content(&server.chat(&body).ok());
        assert_ne!(changed, unchanged, "{wish}");
        assert_eq!(content(&server.chat(&body).ok()), changed);
    }
    let neutral = json!({"repetition_penalty": 1.0, "presence_penalty": 0, "min_p": 0.5});
    let neutral = server.chat(&with(plain, neutral)).ok();
    assert_eq!(content(&neutral), unchanged);
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let server = shared();
    let whole = content(&server.chat(&story(json!({"max_tokens": 30}))).ok());
    let second = whole.split_whitespace().nth(1).expect("a second word");
    for stop in [json!(second), json!(["never ever", second])] {
        let answer = server
            .chat(&story(
                json!({"max_tokens": 30, "stop": stop, "logprobs": true}),
            ))
            .ok();
        let text = content(&answer);
        assert!(!text.contains(second) && whole.starts_with(&text), "{text}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

#[test]
fn a_text_is_taken_apart_and_put_together() {
    let server = shared();
    let post = |path: &str, body: Value| server.send("POST", path, body.to_string().as_bytes());
    let text = "A crab 🦀 and <|end|>";
    let told = post("/v1/tokenize", json!({"prompt": text})).ok();
    let ids = told["tokens"].as_array().expect("ids").clone();
    assert_eq!(told["count"], ids.len());
    assert_eq!(ids[0], 1, "<s> begins a prompt");
    assert!(
        !ids.contains(&json!(32007)),
        "a client's text has no control tokens: {ids:?}"
    );
    let back = post("/v1/detokenize", json!({"tokens": &ids[1..]})).ok();
    assert_eq!(back["prompt"], text);
    let error = post("/v1/tokenize", json!({"prompt": 5})).error(400);
    assert_eq!(error["param"], "prompt");
}

fn complete(body: &Value) -> crate::client::Answer {
    shared().send("POST", "/v1/completions", body.to_string().as_bytes())
}

/// Biased towards a word with a space before it: the space is part of what goes on with a text.
#[test]
fn what_goes_on_with_a_text_keeps_its_first_space() {
    let server = shared();
    let bare = json!({"prompt": "the", "add_special_tokens": false});
    let ids = server.send("POST", "/v1/tokenize", bare.to_string().as_bytes());
    let bias = json!({ids.ok()["tokens"][0].to_string(): 100});
    let sampling = json!({"max_tokens": 1, "temperature": 0, "logit_bias": bias});
    let text = complete(&with(json!({"prompt": "I see"}), sampling.clone())).ok();
    assert_eq!(text["choices"][0]["text"], " the");
    let answer = server.chat(&story(sampling)).ok();
    assert_eq!(
        content(&answer),
        "the",
        "an answer begins with its first word"
    );
}

#[test]
fn a_text_is_gone_on_with() {
    let body = json!({"prompt": "I see", "max_tokens": 6, "temperature": 0, "logprobs": 2});
    let whole = complete(&body).ok();
    assert_eq!(whole["object"], "text_completion");
    let choice = &whole["choices"][0];
    let text = choice["text"].as_str().expect("a text");
    let told = &choice["logprobs"];
    let tokens = told["tokens"].as_array().expect("tokens");
    let names = tokens.iter().filter_map(Value::as_str);
    assert_eq!(names.collect::<String>(), text);
    assert_eq!(
        told["text_offset"].as_array().expect("offsets").len(),
        tokens.len()
    );
    assert_eq!(whole["usage"]["completion_tokens"], 6);
    let stream = complete(&with(body, json!({"stream": true})));
    let pieces = chunks(&stream);
    let pieces = pieces
        .iter()
        .filter_map(|c| c["choices"][0]["text"].as_str());
    assert_eq!(pieces.collect::<String>(), text);
    for (wish, param) in [
        (json!({"echo": true}), "echo"),
        (json!({"suffix": "end"}), "suffix"),
        (json!({"prompt": null}), "prompt"),
    ] {
        let refused = complete(&with(json!({"prompt": "x"}), wish));
        assert_eq!(refused.error(400)["param"], param);
    }
}
