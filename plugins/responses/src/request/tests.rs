//! Bodies as clients send them, good and bad.

use serde_json::json;
use visor_plugin_body::Kind;

use super::*;

fn parsed(body: &Value) -> Result<ResponseRequest, Wrong> {
    parse(&body.to_string(), "blob-7f", false)
}

fn with(key: &str, value: Value) -> Value {
    let mut body = json!({ "model": "m", "input": "hi" });
    body[key] = value;
    body
}

fn content(content: Value) -> Value {
    json!({ "input": [{ "role": "user", "content": content }] })
}

#[test]
fn a_question_is_a_conversation_of_one_message() {
    let read = parsed(&with("instructions", json!("Be brief."))).unwrap();
    let roles: Vec<_> = read.messages.iter().map(|m| &m.role).collect();
    assert!(matches!(roles[..], [Role::System, Role::User]));
    assert_eq!((read.max_tokens, read.stream), (None, false));
    assert_eq!(read.repeated["instructions"], "Be brief.");
    assert_eq!(read.repeated["truncation"], "disabled");
    assert_eq!(read.repeated["metadata"], json!({}));
}

#[test]
fn items_are_read_with_their_images() {
    let read = parsed(&json!({
        "input": [
            { "role": "user", "content": [
                { "type": "input_text", "text": "What?" },
                { "type": "input_image", "image_url": "blob-7f:0", "detail": "low" },
            ]},
            { "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
              "content": [{ "type": "output_text", "text": "A cat.", "annotations": [] }] },
            { "role": "user", "content": "And?" },
        ],
        "max_output_tokens": 9, "stream": true, "temperature": 0.5, "store": true,
        "include": ["message.output_text.logprobs"], "top_logprobs": 3, "tools": [], "user": "u",
        "text": { "format": { "type": "text" } }, "reasoning": { "effort": "low" },
    }))
    .unwrap();
    assert!(matches!(
        read.messages[0].parts[..],
        [Part::Text(_), Part::Image(0)]
    ));
    assert!(matches!(read.messages[1].role, Role::Assistant));
    assert_eq!(read.images[0].place, Place::Lifted(0));
    let param = "input[0].content[1].image_url";
    assert_eq!(
        read.extensions[0],
        ("image.0.param".to_owned(), param.to_owned())
    );
    assert_eq!(
        read.extensions[1],
        ("image.0.detail".to_owned(), "low".to_owned())
    );
    assert_eq!((read.max_tokens, read.stream), (Some(9), true));
    assert_eq!(read.sampling.logprobs, Some(3));
    assert_eq!(read.repeated["temperature"], 0.5);
    let counted = parse(r#"{"input":"hi"}"#, "", true).unwrap();
    assert_eq!(counted.max_tokens, Some(0));
}

#[test]
fn reasoning_is_left_out() {
    let reasoning = json!({ "type": "reasoning", "id": "rs_1", "summary": [] });
    let call = |id: &str| json!({ "type": "function_call", "call_id": id, "name": "f", "arguments": "{}" });
    let read = parsed(&json!({ "input": [
        { "role": "user", "content": "hi" }, reasoning, call("1"), reasoning, call("2"),
    ]}))
    .unwrap();
    assert!(matches!(
        read.messages[1].parts[..],
        [Part::ToolCall(_), Part::ToolCall(_)]
    ));
    assert_eq!(read.messages.len(), 2);
}

#[test]
fn the_original_is_looked_at_as_finely_as_can_be() {
    for (detail, hint) in [("original", "high"), ("high", "high"), ("auto", "auto")] {
        let image = json!({ "type": "input_image", "image_url": "blob-7f:0", "detail": detail });
        let read = parsed(&content(json!([image]))).unwrap();
        let hint = ("image.0.detail".to_owned(), hint.to_owned());
        assert!(read.extensions.contains(&hint), "{detail}");
    }
}

#[test]
fn settings_are_repeated_as_they_were_asked_for() {
    let repeated = |body: Value| parsed(&body).unwrap().repeated;
    for word in ["auto", "disabled"] {
        assert_eq!(
            repeated(with("truncation", json!(word)))["truncation"],
            word
        );
    }
    let plain = repeated(with("store", Value::Null));
    assert_eq!(plain["store"], false);
    assert_eq!(plain["text"], json!({ "format": { "type": "text" } }));
    assert_eq!(
        plain["reasoning"],
        json!({ "effort": null, "summary": null })
    );
    assert_eq!(repeated(with("store", json!(true)))["store"], true);
    let low = json!({ "verbosity": "low" });
    assert_eq!(repeated(with("text", low))["text"]["verbosity"], "low");
    let low = json!({ "effort": "low" });
    assert_eq!(
        repeated(with("reasoning", low))["reasoning"]["effort"],
        "low"
    );
}

fn named((body, kind, param): (Value, Kind, &str)) {
    let wrong = parsed(&body).unwrap_err();
    let named = wrong.param.as_deref().unwrap_or_default();
    assert_eq!((wrong.kind, named), (kind, param), "{body}");
}

#[test]
fn input_that_is_wrong_is_named() {
    let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
    let image = |key: &str, value: &str| {
        let mut part = json!({ "type": "input_image" });
        part[key] = json!(value);
        content(json!([part]))
    };
    let table = [
        (json!([]), invalid, ""),
        (json!({}), invalid, "input"),
        (with("input", json!([])), invalid, "input"),
        (
            with("input", json!([{ "role": "king", "content": "a" }])),
            invalid,
            "input[0].role",
        ),
        (
            with("input", json!([{ "type": "web_search_call" }])),
            unsupported,
            "input[0].type",
        ),
        (
            with("input", json!([{ "type": "reasoning" }])),
            invalid,
            "input",
        ),
        (
            content(json!([{ "type": "input_image", "image_url": "data:,", "detail": "ultra" }])),
            invalid,
            "input[0].content[0].detail",
        ),
        (
            content(json!([{ "type": "input_file" }])),
            unsupported,
            "input[0].content[0].type",
        ),
        (
            content(json!([{ "type": "input_image" }])),
            invalid,
            "input[0].content[0].image_url",
        ),
        (
            image("image_url", "/etc/passwd"),
            invalid,
            "input[0].content[0].image_url",
        ),
        (
            image("file_id", "f"),
            unsupported,
            "input[0].content[0].file_id",
        ),
    ];
    table.into_iter().for_each(named);
}

#[test]
fn settings_that_are_wrong_are_named() {
    let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
    let schema = json!({ "format": { "type": "json_schema" } });
    let table = [
        ("max_output_tokens", json!(0), invalid, "max_output_tokens"),
        ("temperature", json!(3), invalid, "temperature"),
        ("top_logprobs", json!(21), invalid, "top_logprobs"),
        ("include", json!(["other"]), unsupported, "include[0]"),
        (
            "previous_response_id",
            json!("r"),
            unsupported,
            "previous_response_id",
        ),
        ("background", json!(true), unsupported, "background"),
        ("tools", json!([{}]), invalid, "tools[0].type"),
        ("store", json!("yes"), invalid, "store"),
        ("reasoning", json!("low"), invalid, "reasoning"),
        (
            "reasoning",
            json!({ "effort": 1 }),
            invalid,
            "reasoning.effort",
        ),
        ("text", json!({ "verbosity": 1 }), invalid, "text.verbosity"),
        ("truncation", json!("most"), invalid, "truncation"),
        ("truncation", json!(true), invalid, "truncation"),
        ("text", schema, invalid, "text.format.schema"),
        ("text", json!([]), invalid, "text"),
    ];
    for (key, value, kind, param) in table {
        named((with(key, value), kind, param));
    }
}

#[test]
fn a_format_is_read_and_repeated() {
    let format = json!({ "type": "json_schema", "name": "n", "schema": { "type": "integer" } });
    let read = parsed(&with("text", json!({ "format": format }))).unwrap();
    let schema = r#"{"type":"integer"}"#.to_owned();
    let strict = false;
    assert_eq!(
        read.format,
        Format::Schema {
            text: schema,
            strict
        }
    );
    assert_eq!(read.repeated["text"]["format"], format);
    let hint = ("format.param".to_owned(), "text.format".to_owned());
    assert!(read.extensions.contains(&hint));
    let plain = parsed(&with("text", json!({ "verbosity": "low" }))).unwrap();
    assert_eq!(plain.format, Format::Text);
    assert_eq!(plain.repeated["text"]["format"]["type"], "text");
}
