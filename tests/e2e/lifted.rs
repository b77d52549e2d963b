//! Long base64 in a body, which adapters see a marker of: whoever else is shown it sees the text.

use serde_json::{Value, json};

use crate::client::Answer;
use crate::dialects::{model, named_events};
use crate::server::{chat, data_url, fixture, shared, text, with};

/// The beginning of every marker.
const MARKER: &str = "blob-";

fn post(path: &str, body: &Value) -> Answer {
    shared().send("POST", path, body.to_string().as_bytes())
}

fn long() -> String {
    "QUJD".repeat(500)
}

#[test]
fn a_tokenizer_is_given_the_text() {
    let counted = post("/v1/tokenize", &json!({"prompt": long()})).ok();
    let completion = json!({"prompt": long(), "max_tokens": 1, "temperature": 0});
    let usage = post("/v1/completions", &completion).ok()["usage"].clone();
    assert_eq!(counted["count"], usage["prompt_tokens"], "{counted}");
    let tokens = json!({"tokens": counted["tokens"]});
    let prompt = post("/v1/detokenize", &tokens).ok()["prompt"].clone();
    assert!(prompt.as_str().is_some_and(|text| text.contains(&long())));

    let endless = json!({"prompt": "QUJD".repeat(1 << 20)});
    let error = post("/v1/tokenize", &endless).error(413);
    assert!(error["message"].to_string().contains("4194304"), "{error}");
}

#[test]
fn an_answer_repeats_the_text() {
    let schema = json!({"type": "object", "properties": {}, "additionalProperties": false, "description": long()});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema});
    let body = json!({
        "input": "x", "instructions": long(), "metadata": {"a": long()}, "text": {"format": format},
        "max_output_tokens": 16,
    });
    let check = |response: &Value| {
        assert_eq!(response["instructions"], long());
        assert_eq!(response["metadata"]["a"], long());
        assert_eq!(response["text"]["format"]["schema"]["description"], long());
    };
    check(&post("/v1/responses", &body).ok());
    let streamed = post("/v1/responses", &with(body, json!({"stream": true})));
    assert!(!streamed.text().contains(MARKER));
    let events = named_events(&streamed);
    check(&events[0]["response"]);
    check(&events[events.len() - 1]["response"]);
}

#[test]
fn an_error_repeats_the_text() {
    let named = json!({"type": "function", "function": {"name": long()}});
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for more in [
        json!({"model": long()}),
        json!({"tools": tools, "tool_choice": named}),
    ] {
        let answer = shared().chat(&with(chat(&[text("x")]), more));
        assert!([400, 404].contains(&answer.status), "{}", answer.text());
        let said = answer.text();
        assert!(
            said.contains("QUJDQUJD") && !said.contains(MARKER),
            "{said}"
        );
    }
}

#[test]
fn a_picture_in_a_url_of_anthropic_is_a_picture() {
    let ask = |source: Value| {
        let content = json!([{"type": "image", "source": source}]);
        let messages = json!([{"role": "user", "content": content}]);
        post(
            "/v1/messages/count_tokens",
            &json!({"model": model(), "messages": messages}),
        )
    };
    let url = data_url("image/jpeg", &fixture("tests/photos/cat.jpg"));
    let data = url.split_once(',').expect("a data URL").1;
    let base64 = json!({"type": "base64", "media_type": "image/jpeg", "data": data});
    let counted = ask(base64).ok();
    assert_eq!(ask(json!({"type": "url", "url": url})).ok(), counted);
    let wrong = ask(json!({"type": "url", "url": long()}));
    assert_eq!(wrong.status, 400, "{}", wrong.text());
    let said = wrong.text();
    assert!(
        said.contains("QUJDQUJD") && !said.contains(MARKER),
        "{said}"
    );
}
