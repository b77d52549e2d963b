//! Server-sent events: framing, order, the end, and equality with the whole answer.

use serde_json::{Value, json};

use crate::chat::content;
use crate::client::{chunks, events, joined};
use crate::dialects::model;
use crate::server::{Server, chat, data_url, fixture, pictures, shared, text, with};

fn streamed(body: &Value) -> Value {
    with(body.clone(), json!({"stream": true}))
}

#[test]
fn a_stream_adds_up_to_the_whole_answer() {
    let server = shared();
    let photo = data_url("image/jpeg", &fixture("tests/photos/cat.jpg"));
    for body in [
        chat(&[text("hello")]),
        chat(&[pictures(&[photo], "what is this?")]),
    ] {
        let body = with(body, json!({"max_tokens": 20}));
        let whole = server.chat(&body).ok();
        let stream = server.chat(&streamed(&body));
        assert_eq!(stream.status, 200);
        assert!(
            stream
                .header("content-type")
                .is_some_and(|kind| kind.starts_with("text/event-stream"))
        );
        assert_eq!(joined(&chunks(&stream)), content(&whole));
    }
}

#[test]
fn chunks_have_one_id_one_role_and_one_end() {
    let stream = shared().chat(&streamed(&chat(&[text("hello")])));
    let chunks = chunks(&stream);
    assert!(chunks.len() >= 2);
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        for same in ["id", "created", "model"] {
            assert_eq!(chunk[same], chunks[0][same]);
        }
        assert!(
            chunk.get("usage").is_none_or(Value::is_null),
            "usage was not asked for"
        );
        assert_eq!(chunk["choices"][0]["index"], 0);
    }
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let reasons: Vec<_> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["finish_reason"].as_str())
        .collect();
    assert_eq!(reasons.len(), 1, "exactly one end: {reasons:?}");
    assert!(
        chunks.last().expect("chunks")["choices"][0]["finish_reason"].is_string(),
        "and it is last"
    );
}

#[test]
fn usage_comes_last_and_only_when_asked_for() {
    let server = shared();
    let body = chat(&[text("hello")]);
    let asked = with(
        streamed(&body),
        json!({"stream_options": {"include_usage": true}}),
    );
    let chunks = chunks(&server.chat(&asked));
    let (last, others) = chunks.split_last().expect("chunks");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["id"], others[0]["id"]);
    let whole = server.chat(&body).ok();
    for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][key], whole["usage"][key], "{key}");
    }
    assert!(
        others
            .iter()
            .all(|chunk| chunk.get("usage").is_none_or(Value::is_null))
    );
}

#[test]
fn done_is_the_last_line_and_the_connection_ends_properly() {
    let stream = shared().chat(&streamed(&chat(&[text("bye")])));
    let lines = events(&stream);
    assert_eq!(lines.iter().filter(|line| *line == "[DONE]").count(), 1);
    assert_eq!(lines.last().map(String::as_str), Some("[DONE]"));
}

#[test]
fn pieces_come_as_they_are_made() {
    let body = with(
        streamed(&chat(&[text("slowly")])),
        json!({"max_tokens": 200}),
    );
    let server = shared();
    let mut incoming = server.open_chat(&body);
    assert_eq!(incoming.status, 200);
    let mut pieces = 0;
    while incoming.piece().is_some() {
        pieces += 1;
    }
    assert!(pieces > 5, "200 tokens in {pieces} pieces");
}

/// A question that is answered with much text, to three dialects, and the place of the text in what they stream.
fn asked() -> [(&'static str, &'static str, Value, &'static str); 3] {
    let more = json!({"max_tokens": 200, "stream": true});
    let message = with(chat(&[text("slowly")]), more.clone());
    let named = with(message.clone(), json!({"model": model()}));
    let prompt = json!({"prompt": "slowly: \"a\"\n\u{e9}", "temperature": 0});
    [
        (
            "openai",
            "/v1/chat/completions",
            message,
            "/choices/0/delta/content",
        ),
        (
            "openai",
            "/v1/completions",
            with(prompt, more),
            "/choices/0/text",
        ),
        ("anthropic", "/v1/messages", named, "/delta/text"),
    ]
}

/// The events of a stream that have text at `place`, without it, and all text.
fn texts(server: &Server, path: &str, body: &Value, place: &str) -> (Vec<Value>, String) {
    let answer = server.send("POST", path, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let lines = answer.text().lines();
    let told = lines
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|told| *told != "[DONE]");
    let (mut events, mut all) = (Vec::new(), String::new());
    for told in told {
        let mut event: Value = serde_json::from_str(told).expect("JSON");
        let text = event.pointer_mut(place).map(Value::take);
        let text = text.as_ref().and_then(Value::as_str).unwrap_or_default();
        if !text.is_empty() {
            all.push_str(text);
            events.push(event);
        }
    }
    (events, all)
}

#[test]
fn texts_are_written_without_the_adapter_as_it_writes_them() {
    for (id, path, body, place) in asked() {
        let server = Server::start();
        let calls = || {
            let stats = server.stats();
            let plugins = stats["plugins"].as_array().expect("a list").clone();
            let adapter = plugins.into_iter().find(|plugin| plugin["id"] == id);
            adapter.expect("it ships")["functions"]["advance"]["calls"].as_u64()
        };
        let (framed, all) = texts(&server, path, &body, place);
        assert!(framed.len() > 10, "{path}: 200 tokens in {}", framed.len());
        // That it began, the first text, and its end.
        let framed_calls = calls().expect("a number");
        assert!(
            (2..=4).contains(&framed_calls),
            "{path}: {framed_calls} calls"
        );
        assert!(framed.iter().all(|event| *event == framed[0]), "{path}");
        let whole = with(body, json!({"stream": false}));
        let whole = server.send("POST", path, whole.to_string().as_bytes()).ok();
        let said = [
            "/choices/0/message/content",
            "/choices/0/text",
            "/content/0/text",
        ];
        let said = said.into_iter().find_map(|place| whole.pointer(place));
        assert_eq!(said.and_then(Value::as_str), Some(all.as_str()), "{path}");
    }
}

#[test]
fn an_error_before_the_first_byte_has_its_status_in_a_stream_too() {
    let server = shared();
    let broken = pictures(&["data:image/png;base64,AAAA".to_owned()], "what?");
    server.chat(&streamed(&chat(&[broken]))).error(400);
    let long = chat(&[text(&"word ".repeat(6000))]);
    let error = server.chat(&streamed(&long)).error(400);
    assert_eq!(error["code"], "context_length_exceeded");
}
