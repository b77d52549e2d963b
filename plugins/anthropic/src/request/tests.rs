//! Bodies in, what is wanted out.

use super::*;
use serde_json::json;
use visor_plugin_body::Kind;

const MARKER: &str = "blob-7f";

fn parsed(body: &Value) -> Result<MessagesRequest, Wrong> {
    parse(&body.to_string(), MARKER, false)
}

/// A request of one user message with that content.
fn content(content: Value) -> Value {
    json!({ "model": "m", "max_tokens": 9, "messages": [{ "role": "user", "content": content }] })
}

fn with(key: &str, value: Value) -> Value {
    let mut body = content(json!("hi"));
    body[key] = value;
    body
}

fn image(source: Value) -> Value {
    content(json!([{ "type": "text", "text": "a" }, { "type": "image", "source": source }]))
}

#[test]
fn a_conversation_is_read_with_its_system_prompt_first() {
    let read = parsed(&json!({
        "model": "m", "max_tokens": 9, "system": [{ "type": "text", "text": "Be brief." }],
        "messages": [
            { "role": "user", "content": "hi" },
            { "role": "assistant", "content": [{ "type": "text", "text": "Hello." }] },
            { "role": "user", "content": [{ "type": "text", "text": "bye", "cache_control": {} }] },
        ],
        "stop_sequences": ["x"], "stream": true, "temperature": 1, "top_p": 0.5, "top_k": 3,
        "metadata": { "user_id": "u" }, "service_tier": "auto", "tools": [],
    }))
    .unwrap();
    let roles: Vec<_> = read.messages.iter().map(|m| &m.role).collect();
    assert!(matches!(
        roles[..],
        [Role::System, Role::User, Role::Assistant, Role::User]
    ));
    assert_eq!((read.max_tokens, read.stream), (9, true));
    assert_eq!(read.stop, ["x"]);
    let Sampling {
        temperature,
        top_p,
        top_k,
        ..
    } = read.sampling;
    assert_eq!((temperature, top_p, top_k), (Some(1.0), Some(0.5), Some(3)));
    assert_eq!(
        parsed(&with("system", json!("Be brief.")))
            .unwrap()
            .messages
            .len(),
        2
    );
}

#[test]
fn images_are_lifted_short_or_elsewhere() {
    let place = |source: Value| parsed(&image(source)).unwrap().images[0].place.clone();
    let base64 = |data: &str| json!({ "type": "base64", "media_type": "image/png", "data": data });
    assert_eq!(place(base64("blob-7f:3")), Place::Lifted(3));
    let url = |url: &str| Place::Url(url.to_owned());
    assert_eq!(place(base64("AAAA")), url("data:image/png;base64,AAAA"));
    let elsewhere = json!({ "type": "url", "url": "https://a/b.png" });
    assert_eq!(place(elsewhere), url("https://a/b.png"));
    let read = parsed(&image(base64("AAAA"))).unwrap();
    assert!(matches!(
        read.messages[0].parts[..],
        [Part::Text(_), Part::Image(0)]
    ));
    let hint = (
        "image.0.param".to_owned(),
        "messages[0].content[1].source".to_owned(),
    );
    assert!(read.extensions.contains(&hint));
}

#[test]
fn calls_and_results_are_parts() {
    let read = parsed(&json!({ "model": "m", "max_tokens": 9, "messages": [
        { "role": "assistant", "content": [
            { "type": "text", "text": "a" },
            { "type": "tool_use", "id": "toolu_1", "name": "weather", "input": { "city": "Ulm" } },
        ] },
        { "role": "user", "content": [
            { "type": "tool_result", "tool_use_id": "toolu_1", "content": [
                { "type": "text", "text": "dry" },
                { "type": "image", "source": { "type": "url", "url": "https://a/b.png" } },
            ] },
            { "type": "tool_result", "tool_use_id": "toolu_2", "is_error": true },
        ] },
    ] }))
    .unwrap();
    let [Part::Text(_), Part::ToolCall(call)] = &read.messages[0].parts[..] else {
        panic!("{read:?}")
    };
    assert_eq!(
        (call.id.as_str(), call.name.as_str()),
        ("toolu_1", "weather")
    );
    assert_eq!(call.arguments, r#"{"city":"Ulm"}"#);
    let [
        Part::ToolResult(dry),
        Part::Image(0),
        Part::ToolResult(failed),
    ] = &read.messages[1].parts[..]
    else {
        panic!("{read:?}")
    };
    assert_eq!((dry.id.as_str(), dry.content.as_str()), ("toolu_1", "dry"));
    assert_eq!(failed.content, "error: ");
}

#[test]
fn an_answer_can_be_held_to_a_schema() {
    let format = json!({ "type": "json_schema", "schema": { "type": "object" } });
    let config = json!({ "effort": "low", "format": format });
    for (body, place) in [
        (with("output_config", config), "output_config.format"),
        (with("output_format", format), "output_format"),
    ] {
        let read = parsed(&body).unwrap();
        assert_eq!(
            read.format,
            Format::Schema {
                text: r#"{"type":"object"}"#.to_owned(),
                strict: true,
            }
        );
        let hint = ("format.param".to_owned(), place.to_owned());
        assert!(read.extensions.contains(&hint));
    }
    let effort = with("output_config", json!({ "effort": "low" }));
    assert_eq!(parsed(&effort).unwrap().format, Format::Text);
}

#[test]
fn an_answer_is_at_most_as_long_as_it_may_be() {
    let at_most = ("max-tokens".to_owned(), "at-most".to_owned());
    let read = parsed(&with("max_tokens", json!(128_000))).unwrap();
    assert_eq!((read.max_tokens, read.extensions), (128_000, vec![at_most]));
}

#[test]
fn what_the_model_thought_is_left_out() {
    let thought = json!({ "type": "thinking", "thinking": "Hm.", "signature": "AAAA" });
    let redacted = json!({ "type": "redacted_thinking", "data": "AAAA" });
    let said = json!({ "type": "text", "text": "Hello." });
    let read = parsed(&json!({ "model": "m", "max_tokens": 9, "messages": [
        { "role": "assistant", "content": [thought, redacted, said] },
        { "role": "assistant", "content": [thought] },
        { "role": "user", "content": "hi" },
    ] }))
    .unwrap();
    assert!(
        matches!(&read.messages[0].parts[..], [Part::Text(text)] if text == "Hello."),
        "{read:?}"
    );
    assert!(read.messages[1].parts.is_empty());
}

#[test]
fn the_system_may_speak_in_between() {
    let blocks = json!([{ "type": "text", "text": "Be" }, { "type": "text", "text": " loud." }]);
    let read = parsed(
        &json!({ "model": "m", "max_tokens": 9, "system": "Be brief.", "messages": [
        { "role": "user", "content": "hi" },
        { "role": "system", "content": "Be quiet." },
        { "role": "assistant", "content": "Hello." },
        { "role": "system", "content": blocks },
    ] }),
    )
    .unwrap();
    let roles: Vec<_> = read.messages.iter().map(|m| &m.role).collect();
    assert!(matches!(
        roles[..],
        [
            Role::System,
            Role::User,
            Role::System,
            Role::Assistant,
            Role::System
        ]
    ));
    assert_eq!(read.messages[4].parts.len(), 2);
}

#[test]
fn a_document_of_text_is_its_text() {
    let source = json!({ "type": "text", "media_type": "text/plain", "data": "Pay 5." });
    let text = |title: Value, context: Value| {
        let document = json!({ "type": "document", "source": source, "title": title, "context": context,
            "citations": { "enabled": false }, "cache_control": { "type": "ephemeral" } });
        let read = parsed(&content(json!([document]))).unwrap();
        let [Part::Text(text)] = &read.messages[0].parts[..] else {
            panic!("{read:?}")
        };
        text.clone()
    };
    assert_eq!(text(Value::Null, json!("")), "Pay 5.\n");
    let whole = text(json!("A bill"), json!("of May"));
    assert_eq!(whole, "A bill\nof May\nPay 5.\n");
    let document = json!({ "type": "document", "source": source });
    let result = json!({ "type": "tool_result", "tool_use_id": "1", "content": [document] });
    let read = parsed(&content(json!([result]))).unwrap();
    assert!(
        matches!(&read.messages[0].parts[..], [Part::ToolResult(result)] if result.content == "Pay 5.\n")
    );
}

#[test]
fn counting_needs_no_length() {
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
    assert_eq!(
        parsed(&body).unwrap_err().param.as_deref(),
        Some("max_tokens")
    );
    let read = parse(&body.to_string(), MARKER, true).unwrap();
    assert_eq!(read.max_tokens, 0);
}

#[test]
fn what_is_wrong_is_named() {
    let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
    let table = [
        (json!([]), invalid, ""),
        (with("model", Value::Null), invalid, "model"),
        (with("messages", json!([])), invalid, "messages"),
        (with("max_tokens", json!(0)), invalid, "max_tokens"),
        (with("temperature", json!(1.5)), invalid, "temperature"),
        (with("system", json!(5)), invalid, "system"),
        (
            with("system", json!([{ "type": "image" }])),
            unsupported,
            "system[0].type",
        ),
        (
            with("stop_sequences", json!([""])),
            invalid,
            "stop_sequences[0]",
        ),
        (
            with("output_config", json!({ "format": { "type": "xml" } })),
            invalid,
            "output_config.format.type",
        ),
        (
            with(
                "output_config",
                json!({ "format": { "type": "json_schema" } }),
            ),
            invalid,
            "output_config.format.schema",
        ),
        (
            with("thinking", json!({ "type": "enabled" })),
            unsupported,
            "thinking",
        ),
        (
            with("messages", json!([{ "role": "critic", "content": "x" }])),
            invalid,
            "messages[0].role",
        ),
        (
            with("messages", json!([{ "role": "system" }])),
            invalid,
            "messages[0].content",
        ),
        (
            with(
                "messages",
                json!([{ "role": "system", "content": [{ "type": "image" }] }]),
            ),
            unsupported,
            "messages[0].content[0].type",
        ),
        (
            with("messages", json!([{ "role": "assistant", "content": "x" }])),
            unsupported,
            "messages[0]",
        ),
    ];
    table.into_iter().for_each(named);
}

#[test]
fn blocks_that_are_wrong_are_named() {
    let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
    let part = "messages[0].content[1].source";
    let table = [
        (content(json!([])), invalid, "messages[0].content"),
        (
            content(json!([{ "type": "search_result" }])),
            unsupported,
            "messages[0].content[0].type",
        ),
        (
            content(json!([{ "type": "thinking", "thinking": "", "signature": "" }])),
            unsupported,
            "messages[0].content[0].type",
        ),
        (
            content(json!([{ "type": "tool_use" }])),
            invalid,
            "messages[0].content[0].type",
        ),
        (
            content(json!([{ "type": "tool_result" }])),
            invalid,
            "messages[0].content[0].tool_use_id",
        ),
        (
            content(
                json!([{ "type": "tool_result", "tool_use_id": "1", "content": [{ "type": "tool_result" }] }]),
            ),
            invalid,
            "messages[0].content[0].content[0]",
        ),
        (
            image(json!({ "type": "file" })),
            unsupported,
            &format!("{part}.type"),
        ),
        (
            image(json!({ "type": "base64", "data": "" })),
            invalid,
            &format!("{part}.media_type"),
        ),
        (
            image(json!({ "type": "base64", "media_type": "text/html", "data": "" })),
            invalid,
            &format!("{part}.media_type"),
        ),
    ];
    table.into_iter().for_each(named);
}

#[test]
fn documents_that_are_wrong_are_named() {
    let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
    let block = "messages[0].content[0]";
    let document = |source: Value| json!({ "type": "document", "source": source });
    let text = |media_type: &str| json!({ "type": "text", "media_type": media_type, "data": "x" });
    let mut cited = document(text("text/plain"));
    cited["citations"] = json!({ "enabled": true });
    let mut titled = document(text("text/plain"));
    titled["title"] = json!(5);
    let said = json!([
        { "role": "assistant", "content": [document(text("text/plain"))] },
        { "role": "user", "content": "hi" },
    ]);
    for (body, kind, place) in [
        (content(json!([document(Value::Null)])), invalid, ".source"),
        (
            content(json!([document(
                json!({ "type": "url", "url": "https://a/b.pdf" })
            )])),
            unsupported,
            ".source.type",
        ),
        (
            content(json!([document(text("application/pdf"))])),
            invalid,
            ".source.media_type",
        ),
        (
            content(json!([document(
                json!({ "type": "text", "media_type": "text/plain" })
            )])),
            invalid,
            ".source.data",
        ),
        (content(json!([cited])), unsupported, ".citations"),
        (content(json!([titled])), invalid, ".title"),
        (with("messages", said), invalid, ".type"),
    ] {
        named((body, kind, &format!("{block}{place}")));
    }
}

fn named((body, kind, param): (Value, Kind, &str)) {
    let wrong = parsed(&body).unwrap_err();
    let named = wrong.param.as_deref().unwrap_or_default();
    assert_eq!((wrong.kind, named), (kind, param), "{body}");
}
