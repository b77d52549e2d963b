//! Answers that are held to a format. The model's weights are random, so whatever fits is the format's doing.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::chat::content;
use crate::client::{Answer, chunks};
use crate::dialects::model;
use crate::server::{Server, chat, shared, text, with};

fn asked(format: Value, more: Value) -> Value {
    let body = with(
        chat(&[text("Describe it")]),
        json!({"response_format": format, "max_tokens": 900}),
    );
    with(body, more)
}

/// Properties in an order that is not the alphabet's.
const ANIMAL: &str = r#"{"type": "object", "properties": {
    "sure": {"type": "boolean"},
    "count": {"type": "integer", "minimum": 1, "maximum": 99},
    "animal": {"enum": ["cat", "octopus", "gr\u00fcner Frosch"]}
}, "required": ["sure", "count", "animal"], "additionalProperties": false}"#;

/// Stands for it in a body: a schema that was parsed may have lost the order of its properties.
const PLACE: &str = "THE SCHEMA";

fn post(path: &str, body: &Value) -> Answer {
    let body = body.to_string().replace(&format!("\"{PLACE}\""), ANIMAL);
    shared().send("POST", path, body.as_bytes())
}

fn schema_format(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "a", "strict": true, "schema": schema}})
}

fn check_animal(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let members = value.as_object().expect("an object");
    assert_eq!(members.len(), 3, "{text}");
    assert!(value["sure"].is_boolean(), "{text}");
    let count = value["count"].as_u64().expect("a count");
    assert!((1..=99).contains(&count), "{text}");
    let known = ["cat", "octopus", "grüner Frosch"];
    let animal = value["animal"].as_str().expect("an animal");
    assert!(known.contains(&animal), "{text}");
    let places = ["sure", "count", "animal"].map(|key| text.find(&format!("\"{key}\"")));
    assert!(places.is_sorted(), "not in the schema's order: {text}");
}

#[test]
fn a_schema_is_obeyed_by_every_answer_streamed_or_not() {
    let format = schema_format(&json!(PLACE));
    for temperature in [0.0, 1.0, 2.0] {
        let more = json!({"temperature": temperature, "seed": 3, "n": 2});
        let body = asked(format.clone(), more);
        let whole = post("/v1/chat/completions", &body).ok();
        let choices = whole["choices"].as_array().expect("choices");
        for choice in choices {
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
            check_animal(choice["message"]["content"].as_str().expect("a text"));
        }
        let body = with(body, json!({"stream": true}));
        let streamed = chunks(&post("/v1/chat/completions", &body));
        for (index, choice) in choices.iter().enumerate() {
            let own = streamed.iter().map(|chunk| &chunk["choices"][0]);
            let own = own.filter(|own| own["index"] == index);
            let text = own.filter_map(|own| own["delta"]["content"].as_str());
            assert_eq!(choice["message"]["content"], text.collect::<String>());
        }
    }
}

#[test]
fn an_expression_is_obeyed() {
    for (pattern, fits) in [
        (
            "(yes|no){2}-[0-9]{3}",
            (|text: &str| {
                let (words, digits) = text.split_once('-').expect("a dash");
                let words = words.replace("yes", "").replace("no", "");
                words.is_empty() && digits.len() == 3 && digits.parse::<u32>().is_ok()
            }) as fn(&str) -> bool,
        ),
        // What the decoder strips of a first word is none of the format's.
        ("^ two$", |text| text == " two"),
        ("äöü|日本", |text| ["äöü", "日本"].contains(&text)),
        ("", str::is_empty),
    ] {
        for seed in 0..4 {
            let format = json!({"type": "regex", "regex": pattern});
            let more = json!({"temperature": 2.0, "seed": seed});
            let answer = shared().chat(&asked(format, more)).ok();
            let text = answer["choices"][0]["message"]["content"]
                .as_str()
                .unwrap_or_default();
            assert!(fits(text), "{pattern}: {text:?}");
            assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        }
    }
}

#[test]
fn an_expression_that_looks_like_base64_is_the_clients_own() {
    let format = json!({"type": "regex", "regex": "abcd".repeat(500)});
    let answer = shared()
        .chat(&asked(format, json!({"max_tokens": 20})))
        .ok();
    assert!(content(&answer).starts_with("abcdabcd"), "{answer}");
}

#[test]
fn an_object_is_json_as_far_as_it_goes() {
    let server = shared();
    let format = json!({"type": "json_object"});
    let brace = post(
        "/v1/tokenize",
        &json!({"prompt": "}", "add_special_tokens": false}),
    );
    let ids = brace.ok()["tokens"].as_array().expect("tokens").clone();
    // However much the model would like to close it at once, it has to be opened first.
    let bias: serde_json::Map<_, _> = ids
        .iter()
        .map(|id| (id.to_string(), json!(100)))
        .chain([("29913".to_owned(), json!(100))])
        .collect();
    let answer = server
        .chat(&asked(format.clone(), json!({"logit_bias": bias})))
        .ok();
    let value: Value = serde_json::from_str(&content(&answer)).expect("JSON");
    assert!(value.is_object());
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let cut = server.chat(&asked(format, json!({"max_tokens": 3}))).ok();
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert!(content(&cut).trim_start().starts_with('{'));
}

#[test]
fn probabilities_are_told_among_what_may_come() {
    let format = json!({"type": "regex", "regex": "a|b"});
    let more = json!({"logprobs": true, "top_logprobs": 20});
    let answer = shared().chat(&asked(format, more)).ok();
    let tokens = answer["choices"][0]["logprobs"]["content"].clone();
    let mut share = 0.0;
    for chance in tokens[0]["top_logprobs"].as_array().expect("alternatives") {
        let token = chance["token"].as_str().expect("a token");
        assert!(["a", "b", ""].contains(&token.trim()), "{tokens}");
        share += chance["logprob"].as_f64().expect("a number").exp();
    }
    assert!((share - 1.0).abs() < 1e-3, "{share}: {tokens}");
}

#[test]
fn a_kept_answer_is_kept_for_its_format() {
    let ask = |format: Value| {
        let more = json!({"temperature": 0, "max_tokens": 12});
        content(&shared().chat(&asked(format, more)).ok())
    };
    let regex = |pattern: &str| json!({"type": "regex", "regex": pattern});
    let first = [
        ask(json!({"type": "text"})),
        ask(json!({"type": "json_object"})),
        ask(regex("[a-f]{8}")),
        ask(regex("[g-l]{8}")),
    ];
    let mut different = first.to_vec();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), 4, "{first:?}");
    assert_eq!(ask(regex("[a-f]{8}")), first[2]);
    assert_eq!(ask(json!({"type": "text"})), first[0]);
}

#[test]
fn what_is_no_usable_format_is_refused_at_once_and_named() {
    let mut deep = json!({"type": "integer"});
    for _ in 0..100 {
        deep = json!({"type": "array", "items": deep});
    }
    let huge = json!({"enum": (0..20_000).map(|n| format!("value {n}")).collect::<Vec<_>>()});
    let regex = |pattern: &str| json!({"type": "regex", "regex": pattern});
    for format in [
        schema_format(&json!({"type": "no such type"})),
        schema_format(&json!({"$ref": "http://127.0.0.1:1/schema.json"})),
        schema_format(&json!({"$ref": "#/$defs/missing"})),
        schema_format(&json!({"enum": []})),
        schema_format(&json!({"type": "string", "minLength": 5, "maxLength": 2})),
        schema_format(&huge),
        regex("("),
        regex("a(?=b)"),
        regex(r"[^\s\S]"),
        regex(&"a".repeat(70_000)),
    ] {
        let began = Instant::now();
        let error = shared().chat(&asked(format.clone(), json!({}))).error(400);
        assert!(began.elapsed() < Duration::from_secs(60), "{format:.80}");
        assert_eq!(error["param"], "response_format", "{format:.80}: {error}");
        assert!(error["message"].as_str().expect("a message").len() < 600);
    }
    // Too deep for a body is not the format's business.
    let refused = shared().chat(&asked(schema_format(&deep), json!({})));
    assert_eq!(refused.status, 400);
    let more = json!({"max_tokens": 4});
    shared()
        .chat(&with(chat(&[text("still there?")]), more))
        .ok();
}

#[test]
fn the_operator_says_what_a_format_may_cost() {
    let server = Server::start_with("[formats]\nbytes_max = 64\nstep_work_max = 1000\n");
    let small = json!({"type": "regex", "regex": "yes|no"});
    server.chat(&asked(small, json!({}))).ok();
    let large = json!({"type": "regex", "regex": "x".repeat(65)});
    let error = server.chat(&asked(large, json!({}))).error(400);
    assert!(error["message"].as_str().expect("words").contains("64"));
    let hard = json!({"type": "regex", "regex": ".*a.{9}b|.*c.{9}d|.*e.{9}f|.*g.{9}h"});
    let error = server.chat(&asked(hard, json!({}))).error(400);
    let message = error["message"].as_str().expect("words");
    assert!(message.contains("more work"), "{message}");
    let more = json!({"max_tokens": 4});
    server.chat(&with(chat(&[text("still there?")]), more)).ok();
}

#[test]
fn other_dialects_have_formats_too() {
    let options = json!({"num_predict": 900, "temperature": 1.0, "seed": 1});
    let body = json!({"model": model(), "prompt": "x", "stream": false, "format": PLACE, "options": options});
    let answer = post("/api/generate", &body).ok();
    check_animal(answer["response"].as_str().expect("a text"));
    let messages = [text("x")];
    let body = json!({"model": model(), "messages": messages, "stream": false, "format": PLACE, "options": options});
    let answer = post("/api/chat", &body).ok();
    check_animal(answer["message"]["content"].as_str().expect("a text"));
    let wrong = json!({"model": model(), "prompt": "x", "format": {"type": "nothing"}});
    assert_eq!(post("/api/generate", &wrong).status, 400);

    let format = |schema: Value| json!({"type": "json_schema", "name": "a", "schema": schema, "strict": true});
    let body =
        json!({"input": "x", "max_output_tokens": 900, "text": {"format": format(json!(PLACE))}});
    let answer = post("/v1/responses", &body).ok();
    let said = &answer["output"][0]["content"][0]["text"];
    check_animal(said.as_str().expect("a text"));
    assert_eq!(answer["text"]["format"]["schema"]["type"], "object");
    let wrong = format(json!({"type": "nothing"}));
    let error = post(
        "/v1/responses",
        &json!({"input": "x", "text": {"format": wrong}}),
    )
    .error(400);
    assert_eq!(error["param"], "text.format");
}

#[test]
fn a_schema_that_comes_again_is_compiled_once() {
    let server = Server::start();
    let ask = |question: &str| {
        let format = json!({"response_format": schema_format(&json!({"type": "boolean"}))});
        let answer = server.chat(&with(chat(&[text(question)]), format)).ok();
        let said = content(&answer);
        assert!(["true", "false"].contains(&said.as_str()), "{said}");
    };
    for question in ["Is it red?", "Is it blue?", "Is it green?"] {
        ask(question);
    }
    let formats = &server.stats()["formats"];
    assert_eq!(
        (&formats["compiled"], &formats["reused"]),
        (&json!(1), &json!(2)),
        "{formats}"
    );
}

#[test]
fn a_schema_that_takes_too_long_to_compile_is_refused() {
    let server = Server::start_with("[formats]\ncompile_ms_max = 1\n");
    let member = |n: u32| (format!("property_{n}"), json!({"type": "string"}));
    let wide: serde_json::Map<String, Value> = (0..700).map(member).collect();
    let wide = schema_format(&json!({"type": "object", "properties": wide}));
    let error = server.chat(&asked(wide, json!({}))).error(400);
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("more than 1 ms to compile"), "{message}");
    assert_eq!(error["param"], "response_format", "{error}");
}
