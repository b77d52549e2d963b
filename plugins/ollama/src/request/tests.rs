//! Bodies as clients send them, good and bad.

use serde_json::json;
use visor_plugin_body::Kind;

use super::*;

const MARKER: &str = "blob-7f";

fn chat(body: &Value) -> Result<Wanted, Wrong> {
    parse_chat(&body.to_string(), MARKER)
}

fn generate(body: &Value) -> Result<Wanted, Wrong> {
    parse_generate(&body.to_string(), MARKER)
}

fn messages(wanted: &Wanted) -> &[Message] {
    match &wanted.input {
        Some(Input::Chat(messages)) => messages,
        other => panic!("no chat: {other:?}"),
    }
}

#[test]
fn a_chat_is_read_with_its_images() {
    let wanted = chat(&json!({
        "model": "m",
        "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "What?", "images": ["blob-7f:2", "AAAA"] },
            { "role": "assistant", "content": "A cat." },
            { "role": "user", "content": "And?", "images": null },
            { "role": "developer", "content": "Be briefer." },
        ],
        "keep_alive": "5m", "options": { "num_ctx": 8192 },
    }))
    .unwrap();
    assert!(wanted.stream, "what does not say streams");
    let read = messages(&wanted);
    assert!(matches!(
        read[1].parts[..],
        [Part::Image(0), Part::Image(1), Part::Text(_)]
    ));
    assert!(matches!(read[3].parts[..], [Part::Text(_)]));
    assert!(matches!(read[4].role, Role::System));
    let places: Vec<_> = wanted
        .images
        .iter()
        .map(|image| image.place.clone())
        .collect();
    let short = Place::Url("data:;base64,AAAA".to_owned());
    assert_eq!(places, [Place::Lifted(2), short]);
    assert_eq!(wanted.images[1].param, "messages[1].images[1]");
}

#[test]
fn options_are_read() {
    let wanted = chat(&json!({
        "model": "m", "messages": [{ "role": "user", "content": "hi" }], "stream": false,
        "options": {
            "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repeat_penalty": 1.1,
            "presence_penalty": 1, "frequency_penalty": -1, "seed": 7, "num_predict": 9, "stop": ["a"],
        },
        "logprobs": true, "top_logprobs": 2,
    }))
    .unwrap();
    let s = &wanted.sampling;
    assert_eq!(
        (s.temperature, s.top_p, s.top_k),
        (Some(0.5), Some(0.9), Some(40))
    );
    assert_eq!((s.min_p, s.repetition_penalty), (Some(0.1), Some(1.1)));
    assert_eq!(
        (s.presence_penalty, s.frequency_penalty),
        (Some(1.0), Some(-1.0))
    );
    assert_eq!((s.seed, s.logprobs), (Some(7), Some(2)));
    assert_eq!((wanted.max_tokens, wanted.stream), (Some(9), false));
    assert_eq!(wanted.stop, ["a"]);
    for endless in [json!(-1), json!(-2), json!(-1.0), json!(0), json!(i64::MIN)] {
        let body = json!({ "model": "m", "options": { "num_predict": endless } });
        assert_eq!(chat(&body).unwrap().max_tokens, None);
    }
}

#[test]
fn a_prompt_is_answered_or_gone_on_with() {
    let body =
        json!({ "model": "m", "prompt": "What?", "system": "Be brief.", "images": ["AAAA"] });
    let wanted = generate(&body).unwrap();
    let read = messages(&wanted);
    assert!(matches!(read[0].role, Role::System));
    assert!(matches!(read[1].parts[..], [Part::Image(0), Part::Text(_)]));
    let raw = generate(&json!({ "model": "m", "prompt": "Once", "raw": true })).unwrap();
    assert!(matches!(raw.input, Some(Input::Text(text)) if text == "Once"));
    for (more, param) in [
        (json!({ "system": "Be brief." }), "raw"),
        (json!({ "system": 5 }), "system"),
    ] {
        let mut body = json!({ "model": "m", "prompt": "Once", "raw": true });
        body["system"] = more["system"].clone();
        let wrong = generate(&body).unwrap_err();
        assert_eq!(wrong.param.as_deref(), Some(param));
    }
    let penalty = json!({ "model": "m", "options": { "repeat_penalty": 101 } });
    assert!(generate(&penalty).is_err() && chat(&penalty).is_err());
}

#[test]
fn nothing_to_answer_asks_for_the_model_alone() {
    assert!(chat(&json!({ "model": "m" })).unwrap().input.is_none());
    assert!(
        chat(&json!({ "model": "m", "messages": [] }))
            .unwrap()
            .input
            .is_none()
    );
    assert!(
        generate(&json!({ "model": "m", "prompt": "" }))
            .unwrap()
            .input
            .is_none()
    );
}

#[test]
fn a_model_that_need_not_stay_is_told_to_be_gone() {
    let unloads = |keep_alive: Value| {
        let body = json!({ "model": "m", "keep_alive": keep_alive });
        let (chat, generate) = (chat(&body).unwrap(), generate(&body).unwrap());
        assert_eq!(chat.unloads, generate.unloads);
        chat.unloads
    };
    for none in [
        json!(0),
        json!(0.0),
        json!("0"),
        json!("0s"),
        json!("0h0m0s"),
    ] {
        assert!(unloads(none.clone()), "{none}");
    }
    for some in [
        Value::Null,
        json!(-1),
        json!(300),
        json!("5m"),
        json!("10s"),
        json!(""),
    ] {
        assert!(!unloads(some.clone()), "{some}");
    }
}

#[test]
fn thinking_is_refused_as_ollama_refuses_it() {
    let with = |think: Value| json!({ "model": "m", "prompt": "a", "think": think });
    for think in [json!(true), json!("high")] {
        let wrong = generate(&with(think)).unwrap_err();
        assert_eq!(wrong.message, r#""m" does not support thinking"#);
        assert_eq!(wrong.kind, Kind::Unsupported);
    }
    for none in [json!(false), Value::Null] {
        assert!(generate(&with(none)).is_ok());
    }
}

#[test]
fn what_is_wrong_is_named() {
    let with = |key: &str, value: Value| {
        let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
        body[key] = value;
        body
    };
    let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
    let table = [
        (json!([]), invalid, ""),
        (with("model", Value::Null), invalid, "model"),
        (with("messages", json!("hi")), invalid, "messages"),
        (
            with("messages", json!([{ "role": "king" }])),
            invalid,
            "messages[0].role",
        ),
        (
            with("messages", json!([{ "role": "tool" }])),
            invalid,
            "messages[0].content",
        ),
        (
            with(
                "messages",
                json!([{ "role": "assistant", "images": ["AAAA"] }]),
            ),
            invalid,
            "messages[0].images",
        ),
        (
            with("messages", json!([{ "role": "user", "images": [1] }])),
            invalid,
            "messages[0].images[0]",
        ),
        (with("stream", json!("no")), invalid, "stream"),
        (with("options", json!(5)), invalid, "options"),
        (
            with("options", json!({ "temperature": "hot" })),
            invalid,
            "options.temperature",
        ),
        (
            with("options", json!({ "num_predict": -0.5 })),
            invalid,
            "options.num_predict",
        ),
        (with("format", json!("xml")), invalid, "format"),
        (with("format", json!(5)), invalid, "format"),
        (with("tools", json!([{}])), invalid, "tools[0].function"),
        (with("think", json!(true)), unsupported, "think"),
        (with("top_logprobs", json!(21)), invalid, "top_logprobs"),
    ];
    for (body, kind, param) in table {
        let wrong = chat(&body).unwrap_err();
        let named = wrong.param.as_deref().unwrap_or_default();
        assert_eq!((wrong.kind, named), (kind, param), "{body}");
    }
    let tools = json!({ "model": "m", "prompt": "a", "tools": [{}] });
    assert_eq!(generate(&tools).unwrap_err().kind, Kind::Unsupported);
    for key in ["suffix", "template"] {
        let mut body = json!({ "model": "m", "prompt": "a" });
        body[key] = json!("b");
        assert_eq!(generate(&body).unwrap_err().kind, Kind::Unsupported);
    }
}

#[test]
fn options_out_of_range_are_brought_into_it() {
    let with = |options: Value| json!({ "model": "m", "messages": [], "options": options });
    let options =
        json!({ "top_k": -1, "top_p": 0, "num_predict": 1_000_000, "stop": vec!["x"; 20] });
    let wanted = chat(&with(options)).unwrap();
    let Sampling { top_k, top_p, .. } = wanted.sampling;
    assert_eq!((top_k, top_p), (Some(0), Some(0.0)));
    assert_eq!(
        (wanted.max_tokens, wanted.stop.len()),
        (Some(1_000_000), 20)
    );
    let hint = ("max-tokens".to_owned(), "at-most".to_owned());
    assert!(wanted.extensions.contains(&hint));
    let beyond = chat(&with(json!({ "top_p": 1.5 }))).unwrap();
    assert_eq!(beyond.sampling.top_p, Some(1.0));
    assert!(chat(&with(json!({ "top_k": -0.5 }))).is_err());
}

#[test]
fn a_format_is_a_word_or_a_schema() {
    let text = r#"{ "model": "m", "messages": [], "format": { "z": 1, "a": 2 } }"#;
    let schema = Format::Schema {
        text: r#"{ "z": 1, "a": 2 }"#.to_owned(),
        strict: false,
    };
    assert_eq!(parse_chat(text, MARKER).unwrap().format, schema);
    let mut body = json!({ "model": "m", "prompt": "a", "format": "json" });
    let wanted = generate(&body).unwrap();
    assert_eq!(wanted.format, Format::Json);
    let hint = ("format.param".to_owned(), "format".to_owned());
    assert!(wanted.extensions.contains(&hint));
    for nothing in [json!(""), Value::Null] {
        body["format"] = nothing;
        assert_eq!(generate(&body).unwrap().format, Format::Text);
    }
}
