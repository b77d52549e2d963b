//! The other dialects: Anthropic's messages, Ollama's chats, OpenAI's responses. One question, whoever
//! asks it, is one prompt and one answer.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::chat::content;
use crate::client::Answer;
use crate::server::{Server, chat, data_url, fixture, pictures, shared, text, with};

const QUESTION: &str = "what is this?";

fn post(path: &str, body: &Value) -> Answer {
    shared().send("POST", path, body.to_string().as_bytes())
}

/// The name of the model that the shared server serves.
pub fn model() -> String {
    let models = shared().get("/v1/models").ok();
    models["data"][0]["id"].as_str().expect("an id").to_owned()
}

/// The photo as base64, without the head of its data URL.
fn base64() -> String {
    let url = photo();
    url.split_once(',').expect("a data URL").1.to_owned()
}

fn photo() -> String {
    data_url("image/jpeg", &fixture("tests/photos/cat.jpg"))
}

/// Text and prompt tokens of the same question in OpenAI's words.
fn expected(max_tokens: u32) -> (String, Value) {
    let body = with(
        chat(&[pictures(&[photo()], QUESTION)]),
        json!({"max_tokens": max_tokens}),
    );
    let answer = shared().chat(&body).ok();
    (content(&answer), answer["usage"]["prompt_tokens"].clone())
}

/// Names and data of the events of a stream, whose data says the name again.
pub fn named_events(answer: &Answer) -> Vec<Value> {
    let event = |event: &str| {
        let (name, data) = event.split_once("\ndata: ").expect("a name and data");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(data["type"], name.strip_prefix("event: ").expect("a name"));
        data
    };
    let text = answer.text();
    assert_eq!(answer.status, 200, "{text}");
    text.split_terminator("\n\n").map(event).collect()
}

fn claude(more: Value) -> Value {
    let source = json!({"type": "base64", "media_type": "image/jpeg", "data": base64()});
    let content = json!([
        {"type": "image", "source": source},
        {"type": "text", "text": QUESTION},
    ]);
    let messages = json!([{"role": "user", "content": content}]);
    let body = json!({"model": model(), "max_tokens": 12, "temperature": 0, "messages": messages});
    with(body, more)
}

#[test]
fn a_message_is_answered_whole_streamed_and_counted() {
    let (answer, prompt_tokens) = expected(12);
    let whole = post("/v1/messages", &claude(json!({}))).ok();
    assert_eq!(whole["content"], json!([{"type": "text", "text": answer}]));
    assert_eq!(
        (&whole["type"], &whole["role"]),
        (&json!("message"), &json!("assistant"))
    );
    let input = |usage: &Value| {
        let tokens = |key: &str| usage[key].as_u64().expect("a count");
        tokens("input_tokens") + tokens("cache_read_input_tokens")
    };
    assert_eq!(json!(input(&whole["usage"])), prompt_tokens);
    assert!(["end_turn", "max_tokens"].contains(&whole["stop_reason"].as_str().expect("a reason")));

    let events = named_events(&post("/v1/messages", &claude(json!({"stream": true}))));
    let deltas = events
        .iter()
        .filter_map(|event| event["delta"]["text"].as_str());
    assert_eq!(deltas.collect::<String>(), answer);
    assert_eq!(events[0]["type"], "message_start");
    assert_eq!(events.last().expect("events")["type"], "message_stop");

    let counted = post("/v1/messages/count_tokens", &claude(json!({}))).ok();
    assert_eq!(counted["input_tokens"], prompt_tokens);
}

#[test]
fn a_message_is_held_to_a_schema_and_says_which_request_it_answers() {
    let schema = json!({"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": false});
    let format = json!({"format": {"type": "json_schema", "schema": schema}});
    let answer = post("/v1/messages", &claude(json!({"output_config": format})));
    let said = answer.ok()["content"][0]["text"].clone();
    let said: Value = serde_json::from_str(said.as_str().expect("text")).expect("JSON");
    assert_eq!(said, json!({"a": 7}));
    assert_eq!(answer.header("request-id"), answer.header("x-request-id"));
    assert!(answer.header("request-id").is_some());
}

#[test]
fn options_of_ollama_are_taken_as_it_takes_them() {
    let options = json!({"top_k": -1, "top_p": 0, "num_predict": 100_000, "temperature": 0});
    let body =
        json!({"model": model(), "messages": [text("x")], "stream": false, "options": options});
    let body = with(body, json!({"format": {"enum": [7]}}));
    for _ in 0..2 {
        let answer = post("/api/chat", &body).ok();
        for duration in ["total_duration", "prompt_eval_duration", "eval_duration"] {
            assert!(answer[duration].as_u64() > Some(0), "{answer}");
        }
    }
    let running = shared().get("/api/ps").ok();
    assert_eq!(running["models"][0]["name"], model());
}

#[test]
fn what_is_at_fault_is_named_as_responses_name_it() {
    let long = json!({"input": "word ".repeat(6000)});
    assert_eq!(post("/v1/responses", &long).error(400)["param"], "input");
}

#[test]
fn errors_of_messages_are_in_their_dialect() {
    for (body, status, kind, says) in [
        (
            claude(json!({"max_tokens": 0})),
            400,
            "invalid_request_error",
            "max_tokens",
        ),
        (
            claude(json!({"model": "gpt-4o"})),
            404,
            "not_found_error",
            "gpt-4o",
        ),
        (
            claude(json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]})),
            400,
            "invalid_request_error",
            "tools[0].type",
        ),
    ] {
        let refused = post("/v1/messages", &body);
        assert_eq!(refused.status, status, "{}", refused.text());
        let error = refused.json();
        assert_eq!(
            (&error["type"], &error["error"]["type"]),
            (&json!("error"), &json!(kind))
        );
        let message = error["error"]["message"].as_str().expect("a message");
        assert!(message.contains(says), "{message}");
    }
    let source = json!({"type": "base64", "media_type": "image/png", "data": "bm90IGFuIGltYWdl"});
    let broken = json!([{"role": "user", "content": [{"type": "image", "source": source}]}]);
    let refused = post("/v1/messages", &claude(json!({"messages": broken})));
    let message = refused.json()["error"]["message"].to_string();
    assert!(
        message.contains("messages[0].content[0].source"),
        "{message}"
    );
    let missing = shared().get("/v1/messages");
    assert_eq!(
        (missing.status, &missing.json()["type"]),
        (405, &json!("error"))
    );
}

fn lines(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let lines = answer.text().lines();
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[test]
fn ollama_is_answered_whole_and_in_lines() {
    let (answer, prompt_tokens) = expected(12);
    let options = json!({"temperature": 0, "num_predict": 12, "num_ctx": 8192});
    let message = json!({"role": "user", "content": QUESTION, "images": [base64()]});
    let ask = |stream: bool| json!({"model": model(), "messages": [message], "stream": stream, "options": options});
    let whole = post("/api/chat", &ask(false)).ok();
    assert_eq!(
        whole["message"],
        json!({"role": "assistant", "content": answer})
    );
    assert_eq!(whole["prompt_eval_count"], prompt_tokens);
    assert_eq!(whole["done"], true);
    let stream = post("/api/chat", &ask(true));
    assert_eq!(stream.header("content-type"), Some("application/x-ndjson"));
    let pieces = lines(&stream);
    let texts = pieces
        .iter()
        .filter_map(|line| line["message"]["content"].as_str());
    assert_eq!(texts.collect::<String>(), answer);
    assert_eq!(pieces.last().expect("lines")["done"], true);

    let generate = json!({
        "model": format!("{}:latest", model()), "prompt": QUESTION, "images": [base64()],
        "stream": false, "options": options,
    });
    assert_eq!(
        post("/api/generate", &generate).ok()["response"],
        answer.as_str()
    );
}

#[test]
fn ollama_tells_of_its_model_and_its_errors() {
    let tags = shared().get("/api/tags").ok();
    assert_eq!(tags["models"][0]["name"], model());
    assert!(tags["models"][0]["size"].as_u64().expect("a size") > 0);
    let show = post("/api/show", &json!({"model": model()})).ok();
    assert_eq!(
        show["capabilities"],
        json!(["completion", "tools", "vision"])
    );
    assert!(shared().get("/api/version").ok()["version"].is_string());
    let load = post("/api/generate", &json!({"model": model()})).ok();
    assert_eq!(load["done_reason"], "load");
    for (body, status, says) in [
        (json!({"model": "llama3", "prompt": "x"}), 404, "llama3"),
        (json!({"prompt": "x"}), 400, "model"),
        (
            json!({"model": model(), "prompt": "x", "format": "xml"}),
            400,
            "format",
        ),
        (
            json!({"model": model(), "prompt": "x", "options": {"min_p": 2}}),
            400,
            "options.min_p",
        ),
    ] {
        let refused = post("/api/generate", &body);
        assert_eq!(refused.status, status, "{}", refused.text());
        let error = refused.json()["error"].to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn ollama_tells_what_its_clients_look_for() {
    let version = shared().get("/api/version").ok();
    assert_eq!(version["version"], "0.14.2");
    let show = post("/api/show", &json!({"model": model()})).ok();
    let info = show["model_info"].as_object().expect("an object");
    let context = info
        .iter()
        .find(|(key, _)| key.ends_with(".context_length"));
    let running = shared().get("/api/ps").ok();
    let told = &running["models"][0]["context_length"];
    assert_eq!(context.map(|(_, length)| length), Some(told));
    for path in ["/api/chat", "/api/generate"] {
        let unload = post(path, &json!({"model": model(), "keep_alive": 0})).ok();
        assert_eq!(unload["done_reason"], "unload");
    }
    let messages = json!([{"role": "developer", "content": "Be brief."}, text("x")]);
    let body = json!({"model": model(), "messages": messages, "stream": false, "think": false});
    let body = with(body, json!({"options": {"num_predict": 1}}));
    post("/api/chat", &body).ok();
    let refused = post("/api/chat", &with(body, json!({"think": true})));
    let error = format!("\"{}\" does not support thinking", model());
    assert_eq!(
        (refused.status, refused.json()),
        (400, json!({"error": error}))
    );
}

/// All that comes back for a request without a body, as text.
fn raw(server: &Server, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(server.address).expect("the server accepts");
    let head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn head_is_answered_as_get_without_the_body() {
    let server = shared();
    for path in [
        "/api/version",
        "/api/tags",
        "/v1/models",
        "/v1/models/nothing",
    ] {
        let (get, head) = (raw(&server, "GET", path), raw(&server, "HEAD", path));
        let (get, body) = get.split_once("\r\n\r\n").expect("a body");
        let head = head.strip_suffix("\r\n\r\n").expect("a head alone");
        assert_eq!(head.lines().next(), get.lines().next());
        let length = format!("content-length: {}", body.len());
        assert!(head.lines().any(|line| line == length), "{length}: {head}");
    }
    let wrong = server.send("DELETE", "/v1/models", b"");
    assert_eq!(
        (wrong.status, wrong.header("allow")),
        (405, Some("GET, HEAD"))
    );
    let wrong = raw(&server, "HEAD", "/v1/chat/completions");
    assert!(
        wrong.starts_with("HTTP/1.1 405") && wrong.contains("allow: POST\r\n"),
        "{wrong}"
    );
}

fn response(more: Value) -> Value {
    let content = json!([
        {"type": "input_text", "text": QUESTION},
        {"type": "input_image", "image_url": photo()},
    ]);
    let input = json!([{"role": "user", "content": content}]);
    with(
        json!({"input": input, "max_output_tokens": 12, "temperature": 0}),
        more,
    )
}

#[test]
fn a_response_is_made_streamed_and_counted() {
    let (answer, prompt_tokens) = expected(12);
    let whole = post("/v1/responses", &response(json!({}))).ok();
    assert_eq!(whole["object"], "response");
    assert_eq!(whole["output"][0]["content"][0]["text"], answer.as_str());
    assert_eq!(whole["usage"]["input_tokens"], prompt_tokens);

    let asked = json!({"stream": true, "include": ["message.output_text.logprobs"]});
    let events = named_events(&post("/v1/responses", &response(asked)));
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let deltas = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta");
    let deltas: Vec<&Value> = deltas.collect();
    let texts = deltas.iter().filter_map(|event| event["delta"].as_str());
    assert_eq!(texts.collect::<String>(), answer);
    let tokens = deltas
        .iter()
        .filter_map(|event| event["logprobs"].as_array());
    let names = tokens.flatten().filter_map(|token| token["token"].as_str());
    assert_eq!(names.collect::<String>(), answer);
    let last = &events.last().expect("events")["response"];
    assert_eq!(last["output"][0]["content"][0]["text"], answer.as_str());

    let counted = post("/v1/responses/input_tokens", &response(json!({}))).ok();
    assert_eq!(counted["input_tokens"], prompt_tokens);
}

#[test]
fn a_response_that_needs_a_store_is_refused() {
    let stored = json!({"input": "hi", "previous_response_id": "resp_1"});
    let error = post("/v1/responses", &stored).error(400);
    assert_eq!(error["param"], "previous_response_id");
    let plain = post(
        "/v1/responses",
        &json!({"input": "hello", "max_output_tokens": 4}),
    )
    .ok();
    let same = shared()
        .chat(&with(chat(&[text("hello")]), json!({"max_tokens": 4})))
        .ok();
    assert_eq!(
        plain["output"][0]["content"][0]["text"],
        content(&same).as_str()
    );
}
