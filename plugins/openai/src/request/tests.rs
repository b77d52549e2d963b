//! Bodies as clients send them, good and bad.

use serde_json::json;
use visor_plugin_body::Kind;

use super::*;

const MARKER: &str = "blob-7f";

fn parsed(body: &Value) -> Result<ChatRequest, Wrong> {
    parse(&body.to_string(), MARKER)
}

/// A request of one user message with that content.
fn content(content: Value) -> Value {
    json!({ "messages": [{ "role": "user", "content": content }] })
}

/// A short request with one more field.
fn with(key: &str, value: Value) -> Value {
    let mut body = content(json!("hi"));
    body[key] = value;
    body
}

fn extension<'a>(chat: &'a ChatRequest, key: &str) -> Option<&'a str> {
    chat.extensions
        .iter()
        .find(|(own, _)| own == key)
        .map(|(_, value)| value.as_str())
}

#[test]
fn a_plain_request_asks_for_nothing_else() {
    let chat = parsed(&with("model", json!("m"))).unwrap();
    assert_eq!(chat.options.model.as_deref(), Some("m"));
    assert!(matches!(&chat.messages[0].parts[..], [Part::Text(text)] if text == "hi"));
    assert!(matches!(chat.messages[0].role, Role::User));
    assert_eq!(
        (
            chat.options.max_tokens,
            chat.options.stop.len(),
            chat.options.stream,
            chat.options.include_usage
        ),
        (None, 0, false, false)
    );
    assert!(chat.images.is_empty() && chat.extensions.is_empty());
}

#[test]
fn images_are_numbered_over_all_messages() {
    let chat = parsed(&json!({ "messages": [
        { "role": "developer", "content": "Be brief." },
        { "role": "user", "content": [
            { "type": "text", "text": "one" },
            { "type": "image_url", "image_url": { "url": "blob-7f:0", "detail": "low" } },
        ]},
        { "role": "assistant", "content": [{ "type": "text", "text": "A cat." }] },
        { "role": "user", "content": [
            { "type": "image_url", "image_url": "data:image/png;base64,AAAA" },
            { "type": "image_url", "image_url": { "url": "HTTPS://example.org/a.png" } },
        ]},
    ]}))
    .unwrap();
    assert!(matches!(chat.messages[0].role, Role::System));
    assert!(matches!(
        &chat.messages[1].parts[..],
        [Part::Text(_), Part::Image(0)]
    ));
    assert!(matches!(
        &chat.messages[3].parts[..],
        [Part::Image(1), Part::Image(2)]
    ));
    let places: Vec<_> = chat.images.iter().map(|picture| &picture.place).collect();
    let url = |text: &str| Place::Url(text.to_owned());
    let expected = [
        &Place::Lifted(0),
        &url("data:image/png;base64,AAAA"),
        &url("HTTPS://example.org/a.png"),
    ];
    assert_eq!(places, expected);
    assert_eq!(extension(&chat, "image.0.detail"), Some("low"));
    assert_eq!(extension(&chat, "image.1.detail"), None);
    assert_eq!(
        extension(&chat, "image.2.param"),
        Some("messages[3].content[1].image_url")
    );
}

#[test]
fn the_original_is_looked_at_as_finely_as_can_be() {
    for (detail, hint) in [("original", "high"), ("high", "high"), ("auto", "auto")] {
        let image = json!({ "url": "blob-7f:0", "detail": detail });
        let chat = parsed(&content(
            json!([{ "type": "image_url", "image_url": image }]),
        ));
        let chat = chat.unwrap();
        assert_eq!(extension(&chat, "image.0.detail"), Some(hint), "{detail}");
    }
}

#[test]
fn a_marker_counts_only_when_it_is_the_hosts() {
    let url = |url: &str| parsed(&content(json!([{ "type": "image_url", "image_url": url }])));
    assert_eq!(
        url("blob-7f:12").unwrap().images[0].place,
        Place::Lifted(12)
    );
    for wrong in [
        "blob-7e:1",
        "blob-7f:",
        "blob-7f:x",
        "blob-7f:-1",
        "blob-7f",
        ":0",
        "",
    ] {
        assert_eq!(url(wrong).unwrap_err().kind, Kind::Invalid, "{wrong}");
    }
    let empty = parse(
        &content(json!([{ "type": "image_url", "image_url": ":0" }])).to_string(),
        "",
    );
    assert_eq!(empty.unwrap_err().kind, Kind::Invalid);
}

#[test]
fn paths_and_other_schemes_are_no_image_urls() {
    for url in ["/etc/passwd", "ftp://host/a.png", "javascript:1", "cat.png"] {
        let error = parsed(&content(
            json!([{ "type": "image_url", "image_url": { "url": url } }]),
        ))
        .unwrap_err();
        assert_eq!(error.kind, Kind::Invalid, "{url}");
        assert_eq!(
            error.param.as_deref(),
            Some("messages[0].content[0].image_url.url")
        );
        assert!(!error.message.contains(url), "{}", error.message);
    }
}

#[test]
fn sampling_and_limits_are_read() {
    let chat = parsed(&json!({
        "messages": [{ "role": "user", "content": "hi" }],
        "temperature": 0.5, "top_p": 1, "top_k": 40, "seed": -1, "max_tokens": 5, "max_completion_tokens": 7,
        "stop": ["a", "b"], "stream": true, "stream_options": { "include_usage": true }, "num_crops": 9,
        "user": "u", "n": 1, "logprobs": false, "tools": [], "response_format": { "type": "text" },
        "presence_penalty": 0, "store": true, "metadata": { "a": "b" }, "nobody_knows": { "this": 1 }, "temperature_is_null": null,
    }))
    .unwrap();
    assert_eq!(
        (
            chat.options.sampling.temperature,
            chat.options.sampling.top_p,
            chat.options.sampling.top_k
        ),
        (Some(0.5), Some(1.0), Some(40))
    );
    assert_eq!(chat.options.sampling.seed, Some(u64::MAX));
    assert_eq!(
        (chat.options.max_tokens, &chat.options.stop[..]),
        (Some(7), &["a".to_owned(), "b".to_owned()][..])
    );
    assert!(chat.options.stream && chat.options.include_usage);
    assert_eq!(extension(&chat, "num_crops"), Some("9"));
    let vllm = parsed(&with("mm_processor_kwargs", json!({ "num_crops": 16 }))).unwrap();
    assert_eq!(extension(&vllm, "num_crops"), Some("16"));
    assert_eq!(
        parsed(&with("max_tokens", json!(1_u64 << 40)))
            .unwrap()
            .options
            .max_tokens,
        Some(u32::MAX)
    );
    assert_eq!(
        parsed(&with("stop", json!("one"))).unwrap().options.stop,
        ["one"]
    );
    assert_eq!(
        parsed(&with("temperature", Value::Null))
            .unwrap()
            .options
            .sampling
            .temperature,
        None
    );
}

#[test]
fn what_only_the_host_can_judge_is_passed_on() {
    let body = json!({
        "messages": [{ "role": "user", "content": "hi" }],
        "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2,
    });
    let sampling = parsed(&body).unwrap().options.sampling;
    assert_eq!(
        (sampling.min_p, sampling.repetition_penalty),
        (Some(0.1), Some(1.5))
    );
    assert_eq!(
        (sampling.presence_penalty, sampling.frequency_penalty),
        (Some(-1.0), Some(2.0))
    );
}

#[test]
fn alternatives_biases_and_probabilities_are_read() {
    let options = |body: Value| parsed(&body).unwrap().options;
    assert_eq!(options(with("n", json!(3))).count, 3);
    let bias = options(with("logit_bias", json!({ "50": -100, "7": 1.5 })));
    let mut bias = bias.sampling.logit_bias;
    bias.sort_by_key(|(token, _)| *token);
    assert_eq!(bias, [(7, 1.5), (50, -100.0)]);
    let mut body = with("logprobs", json!(true));
    assert_eq!(options(body.clone()).sampling.logprobs, Some(0));
    body["top_logprobs"] = json!(20);
    assert_eq!(options(body.clone()).sampling.logprobs, Some(20));
    body["top_logprobs"] = json!(21);
    let error = parsed(&body).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("top_logprobs"));
    let none = options(with("top_logprobs", json!(0)));
    assert_eq!((none.sampling.logprobs, none.count), (None, 1));
}

#[test]
fn wrong_values_are_named() {
    let wrong = [
        ("temperature", json!(2.1), "temperature"),
        ("temperature", json!("hot"), "temperature"),
        ("top_p", json!(-0.1), "top_p"),
        ("top_p", json!(1.5), "top_p"),
        ("seed", json!(1.5), "seed"),
        ("presence_penalty", json!(3), "presence_penalty"),
        ("repetition_penalty", json!(0), "repetition_penalty"),
        ("max_tokens", json!(0), "max_tokens"),
        ("max_tokens", json!(-5), "max_tokens"),
        (
            "max_completion_tokens",
            json!("many"),
            "max_completion_tokens",
        ),
        ("stop", json!(["a", 1]), "stop[1]"),
        ("stop", json!(["", "a"]), "stop[0]"),
        ("stop", json!(["1", "2", "3", "4", "5"]), "stop"),
        ("stream", json!("yes"), "stream"),
        ("stream_options", json!(true), "stream_options"),
        (
            "stream_options",
            json!({ "include_usage": 1 }),
            "stream_options.include_usage",
        ),
        ("model", json!(7), "model"),
        ("num_crops", json!(0), "num_crops"),
        ("n", json!(0), "n"),
        ("n", json!("two"), "n"),
        ("logprobs", json!(1), "logprobs"),
        ("top_logprobs", json!(3), "top_logprobs"),
        ("logit_bias", json!([1]), "logit_bias"),
        ("logit_bias", json!({ "cat": 1 }), "logit_bias"),
        ("logit_bias", json!({ "-1": 1 }), "logit_bias"),
        ("logit_bias", json!({ "5": 101 }), "logit_bias.5"),
        ("min_p", json!(1.5), "min_p"),
    ];
    for (key, value, param) in wrong {
        let error = parsed(&with(key, value.clone())).unwrap_err();
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (Kind::Invalid, Some(param)),
            "{key}: {value}"
        );
    }
}

#[test]
fn wrong_messages_are_named() {
    let wrong = [
        (json!({}), "messages"),
        (json!({ "messages": "hi" }), "messages"),
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": [1] }), "messages[0]"),
        (
            json!({ "messages": [{ "content": "x" }] }),
            "messages[0].role",
        ),
        (
            json!({ "messages": [{ "role": "king", "content": "x" }] }),
            "messages[0].role",
        ),
        (
            json!({ "messages": [{ "role": "user" }] }),
            "messages[0].content",
        ),
        (content(json!(5)), "messages[0].content"),
        (content(json!([])), "messages[0].content"),
        (content(json!(["x"])), "messages[0].content[0]"),
        (
            content(json!([{ "text": "x" }])),
            "messages[0].content[0].type",
        ),
        (
            content(json!([{ "type": "text" }])),
            "messages[0].content[0].text",
        ),
        (
            content(
                json!([{ "type": "text", "text": "a" }, { "type": "image_url", "image_url": 1 }]),
            ),
            "messages[0].content[1].image_url",
        ),
        (
            content(json!([{ "type": "image_url" }])),
            "messages[0].content[0].image_url",
        ),
        (
            content(json!([{ "type": "image_url", "image_url": {} }])),
            "messages[0].content[0].image_url.url",
        ),
        (
            content(
                json!([{ "type": "image_url", "image_url": { "url": "data:,", "detail": "ultra" } }]),
            ),
            "messages[0].content[0].image_url.detail",
        ),
        (
            json!({ "messages": [{ "role": "system", "content": [{ "type": "image_url", "image_url": "data:," }] }] }),
            "messages[0].content[0].type",
        ),
    ];
    for (body, param) in wrong {
        let error = parsed(&body).unwrap_err();
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (Kind::Invalid, Some(param)),
            "{body}"
        );
        assert!(error.message.contains('.'), "{}", error.message);
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_and_not_ignored() {
    let refused = [
        ("functions", json!([{ "name": "f" }])),
        ("function_call", json!({ "name": "f" })),
        ("modalities", json!(["text", "audio"])),
    ];
    for (key, value) in refused {
        let error = parsed(&with(key, value)).unwrap_err();
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (Kind::Unsupported, Some(key))
        );
    }
    let old = json!({ "messages": [{ "role": "function", "name": "f", "content": "42" }] });
    assert_eq!(parsed(&old).unwrap_err().kind, Kind::Unsupported);
    let audio = parsed(&content(
        json!([{ "type": "input_audio", "input_audio": {} }]),
    ))
    .unwrap_err();
    assert_eq!(
        (audio.kind, audio.param.as_deref()),
        (Kind::Unsupported, Some("messages[0].content[0].type"))
    );
}

#[test]
fn a_format_is_read_and_a_wrong_one_named() {
    let read = |format: Value| parsed(&with("response_format", format)).map(|chat| chat.format);
    assert_eq!(parsed(&content(json!("hi"))).unwrap().format, Format::Text);
    assert_eq!(read(json!({ "type": "json_object" })), Ok(Format::Json));
    let schema =
        json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": { "a": 1 } } });
    let expected = Format::Schema {
        text: r#"{"a":1}"#.to_owned(),
        strict: false,
    };
    assert_eq!(read(schema), Ok(expected));
    let strict = json!({ "name": "n", "schema": {}, "strict": true });
    let strict = with(
        "response_format",
        json!({ "type": "json_schema", "json_schema": strict }),
    );
    let hint = ("format.strict".to_owned(), "true".to_owned());
    assert!(parsed(&strict).unwrap().extensions.contains(&hint));
    let regex = json!({ "type": "regex", "regex": "a|b" });
    assert_eq!(read(regex), Ok(Format::Regex("a|b".to_owned())));
    let wrong = read(json!({ "type": "json_schema", "json_schema": {} })).unwrap_err();
    let param = "response_format.json_schema.schema";
    assert_eq!(wrong.param.as_deref(), Some(param));
}

#[test]
fn what_is_no_json_object_is_an_error_and_no_panic() {
    let deep = "[".repeat(10_000);
    for body in [
        "",
        "{",
        "null",
        "[]",
        "\"text\"",
        "{\"messages\":",
        "\u{0}",
        &deep,
    ] {
        let error = parse(body, MARKER).unwrap_err();
        assert_eq!(
            (error.kind, error.param),
            (Kind::Invalid, None),
            "{:.20}",
            body
        );
    }
}
