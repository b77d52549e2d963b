//! Event lists in, bytes out.

mod frames;

use super::*;
use crate::error::render_error;
use crate::exports::visor::plugin::adapter::{Call, Finish, TokenChance, Total};

const USAGE: Usage = Usage {
    prompt_tokens: 770,
    image_tokens: 757,
    cached_tokens: 3,
    completion_tokens: 2,
};

fn reply(stream: bool, include_usage: bool) -> Reply {
    reply_of(Shape::Chat, 1, stream, include_usage)
}

fn reply_of(shape: Shape, choices: usize, stream: bool, include_usage: bool) -> Reply {
    let mut reply = Reply::new(shape, "chatcmpl-1".to_owned(), 1_700_000_000, (1, choices));
    reply.model = "m".to_owned();
    (reply.stream, reply.include_usage) = (stream, include_usage);
    reply
}

fn delta(text: &str) -> Event {
    delta_of(0, text)
}

/// Text of a choice, one token.
fn delta_of(choice: u32, text: &str) -> Event {
    let chosen = TokenChance {
        token: 1,
        bytes: text.as_bytes().to_vec(),
        logprob: -0.5,
    };
    Event::Delta(Delta {
        generation: 0,
        choice,
        text: text.to_owned(),
        tokens: vec![TokenInfo {
            alternatives: vec![chosen.clone()],
            chosen,
        }],
    })
}

fn finish(reason: FinishReason) -> Event {
    finish_of(0, reason)
}

fn finish_of(choice: u32, reason: FinishReason) -> Event {
    Event::Finish(Finish {
        generation: 0,
        choice,
        reason,
        matched_stop: None,
    })
}

fn done() -> Event {
    Event::Done(Total {
        generation: 0,
        usage: USAGE,
        queue_micros: 0,
        prefill_micros: 0,
        decode_micros: 0,
    })
}

fn failure() -> Error {
    Error {
        code: ErrorCode::Internal,
        message: "it broke".to_owned(),
        param: None,
        retry_after: None,
    }
}

/// Events one by one or all at once must give the same bytes.
fn run(make: impl Fn() -> (Reply, Vec<Event>)) -> String {
    let (mut reply, events) = make();
    let mut bytes = Vec::new();
    let mut ended = false;
    for event in events {
        assert!(!ended, "there are events after the end");
        let progress = reply.advance(vec![event]).unwrap();
        bytes.extend(progress.bytes);
        ended = matches!(progress.next, Next::End);
    }
    assert!(ended);
    let (mut reply, events) = make();
    assert_eq!(reply.advance(events).unwrap().bytes, bytes);
    String::from_utf8(bytes).unwrap()
}

fn chunks(body: &str) -> Vec<Value> {
    let data = body
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "));
    data.filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

fn whole_answer() -> Vec<Event> {
    vec![
        Event::Started((0, USAGE)),
        delta("Hé"),
        delta("llo"),
        finish(FinishReason::Length),
        done(),
    ]
}

#[test]
fn a_completion_has_every_required_key() {
    let body = run(|| (reply(false, false), whole_answer()));
    let completion: Value = serde_json::from_str(&body).unwrap();
    let expected = json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": "m",
        "choices": [{
            "index": 0, "logprobs": null, "finish_reason": "length",
            "message": { "role": "assistant", "content": "Héllo", "refusal": null },
        }],
        "usage": {
            "prompt_tokens": 770, "completion_tokens": 2, "total_tokens": 772,
            "prompt_tokens_details": { "cached_tokens": 3, "audio_tokens": 0, "image_tokens": 757 },
            "completion_tokens_details": {
                "reasoning_tokens": 0, "audio_tokens": 0,
                "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
            },
        },
    });
    assert_eq!(completion, expected);
}

#[test]
fn a_stream_begins_with_the_role_and_has_one_terminal_chunk() {
    let body = run(|| (reply(true, false), whole_answer()));
    assert!(body.ends_with("data: [DONE]\n\n"));
    let chunks = chunks(&body);
    assert_eq!(chunks.len(), 4);
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({ "role": "assistant", "content": "", "refusal": null })
    );
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "Héllo");
    let reasons: Vec<_> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["finish_reason"])
        .collect();
    assert_eq!(
        reasons,
        [&Value::Null, &Value::Null, &Value::Null, &json!("length")]
    );
    for chunk in &chunks {
        assert_eq!(
            (&chunk["id"], &chunk["object"]),
            (&json!("chatcmpl-1"), &json!("chat.completion.chunk"))
        );
        assert!(chunk.get("usage").is_none(), "nobody asked for usage");
    }
}

#[test]
fn usage_is_the_last_chunk_of_a_stream_that_asked() {
    let chunks = chunks(&run(|| (reply(true, true), whole_answer())));
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["total_tokens"], 772);
    assert!(
        others
            .iter()
            .all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some())
    );
}

fn two_answers() -> Vec<Event> {
    vec![
        Event::Started((0, USAGE)),
        delta_of(1, "b"),
        delta_of(0, "a"),
        finish_of(1, FinishReason::Stop),
        delta_of(0, "é"),
        delta_of(0, "!"),
        finish_of(0, FinishReason::Length),
        done(),
    ]
}

#[test]
fn several_answers_have_their_index_however_they_come() {
    let whole = run(|| (reply_of(Shape::Chat, 2, false, false), two_answers()));
    let whole: Value = serde_json::from_str(&whole).unwrap();
    let choices = whole["choices"].as_array().unwrap();
    let told: Vec<_> = choices
        .iter()
        .map(|choice| {
            let text = choice["message"]["content"].as_str().unwrap();
            (&choice["index"], text, &choice["finish_reason"])
        })
        .collect();
    let (first, second) = (json!(0), json!(1));
    let reasons = [json!("length"), json!("stop")];
    assert_eq!(
        told,
        [(&first, "aé!", &reasons[0]), (&second, "b", &reasons[1])]
    );
    let stream = run(|| (reply_of(Shape::Chat, 2, true, false), two_answers()));
    for (index, text) in [(0, "aé!"), (1, "b")] {
        let chunks = chunks(&stream);
        let own = chunks.iter().map(|chunk| &chunk["choices"][0]);
        let own: Vec<&Value> = own.filter(|choice| choice["index"] == index).collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        let texts = own.iter().filter_map(|c| c["delta"]["content"].as_str());
        assert_eq!(texts.collect::<String>(), text);
        let ends = own.iter().filter(|c| !c["finish_reason"].is_null());
        assert_eq!(ends.count(), 1);
    }
}

#[test]
fn tokens_are_told_where_they_were_asked_for() {
    let asked = |shape, stream| {
        let mut reply = reply_of(shape, 2, stream, false);
        reply.logprobs = true;
        reply
    };
    let whole: Value =
        serde_json::from_str(&run(|| (asked(Shape::Chat, false), two_answers()))).unwrap();
    let content = &whole["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), 3);
    assert_eq!(content[1]["bytes"], json!([195, 169]));
    assert_eq!(content[1]["top_logprobs"][0]["token"], "é");
    let stream = chunks(&run(|| (asked(Shape::Chat, true), two_answers())));
    for chunk in &stream {
        let choice = &chunk["choices"][0];
        let text = choice["delta"]["content"].as_str().unwrap_or_default();
        let token = choice["logprobs"]["content"][0]["token"].as_str();
        assert_eq!(token.unwrap_or_default(), text);
    }
    let stream = chunks(&run(|| (asked(Shape::Completion, true), two_answers())));
    let offsets: Vec<&Value> = stream
        .iter()
        .map(|chunk| &chunk["choices"][0])
        .filter(|choice| choice["index"] == 0 && !choice["logprobs"].is_null())
        .map(|choice| &choice["logprobs"]["text_offset"][0])
        .collect();
    assert_eq!(offsets, [&json!(0), &json!(1), &json!(2)]);
}

#[test]
fn a_text_completion_has_no_roles() {
    let whole = run(|| (reply_of(Shape::Completion, 1, false, false), whole_answer()));
    let whole: Value = serde_json::from_str(&whole).unwrap();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(
        whole["choices"],
        json!([{ "index": 0, "text": "Héllo", "logprobs": null, "finish_reason": "length" }])
    );
    let stream = run(|| (reply_of(Shape::Completion, 1, true, true), whole_answer()));
    let chunks = chunks(&stream);
    assert_eq!(chunks.len(), 4);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["object"] == "text_completion")
    );
    let texts = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["text"].as_str());
    assert_eq!(texts.collect::<String>(), "Héllo");
    assert_eq!(chunks[3]["usage"]["prompt_tokens"], 770);
}

/// Events of one of several generations.
fn of(generation: u32, mut event: Event) -> Event {
    match &mut event {
        Event::Started((own, _)) | Event::Failed((own, _)) => *own = generation,
        Event::Delta(delta) => delta.generation = generation,
        Event::ToolCall(call) => call.generation = generation,
        Event::Finish(finish) => finish.generation = generation,
        Event::Done(total) => total.generation = generation,
    }
    event
}

/// Two answers to each of two prompts, the second of which is done first.
fn two_prompts() -> Vec<Event> {
    vec![
        of(1, Event::Started((0, USAGE))),
        of(1, delta_of(0, "c")),
        of(0, Event::Started((0, USAGE))),
        of(0, delta_of(1, "b")),
        of(1, delta_of(1, "d")),
        of(1, finish_of(0, FinishReason::Length)),
        of(1, finish_of(1, FinishReason::Stop)),
        of(1, done()),
        of(0, delta_of(0, "a")),
        of(0, finish_of(1, FinishReason::Length)),
        of(0, delta_of(0, "!")),
        of(0, finish_of(0, FinishReason::Stop)),
        of(0, done()),
    ]
}

#[test]
fn several_prompts_are_one_answer() {
    let make = |stream| {
        let prompts = (2, 2);
        let mut reply = Reply::new(Shape::Completion, "cmpl-1".to_owned(), 1, prompts);
        (reply.stream, reply.include_usage) = (stream, stream);
        (reply, two_prompts())
    };
    let texts = [
        ("a!", "stop"),
        ("b", "length"),
        ("c", "length"),
        ("d", "stop"),
    ];
    let whole: Value = serde_json::from_str(&run(|| make(false))).unwrap();
    let choices = whole["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    let body = run(|| make(true));
    assert_eq!(body.matches("[DONE]").count(), 1);
    let chunks = chunks(&body);
    for (index, (text, reason)) in texts.into_iter().enumerate() {
        assert_eq!(
            choices[index],
            json!({ "index": index, "text": text, "logprobs": null, "finish_reason": reason })
        );
        let own = chunks.iter().map(|chunk| &chunk["choices"][0]);
        let own: Vec<&Value> = own.filter(|choice| choice["index"] == index).collect();
        let pieces = own.iter().filter_map(|choice| choice["text"].as_str());
        assert_eq!(pieces.collect::<String>(), text);
        let ends = own
            .iter()
            .filter_map(|choice| choice["finish_reason"].as_str());
        assert_eq!(ends.collect::<Vec<_>>(), [reason]);
    }
    let usage = &chunks[chunks.len() - 1]["usage"];
    assert_eq!(*usage, whole["usage"], "a stream counts as a whole does");
    let totals = ["prompt_tokens", "completion_tokens", "total_tokens"].map(|key| &usage[key]);
    assert_eq!(totals, [&json!(1540), &json!(4), &json!(1544)]);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 6);
}

#[test]
fn one_prompt_that_fails_ends_the_answer() {
    let prompts = (2, 1);
    let mut reply = Reply::new(Shape::Completion, "cmpl-1".to_owned(), 1, prompts);
    reply.stream = true;
    let events = vec![
        of(0, Event::Started((0, USAGE))),
        of(0, done()),
        of(1, Event::Failed((0, failure()))),
    ];
    let progress = reply.advance(events).unwrap();
    assert!(matches!(progress.next, Next::End));
    let body = String::from_utf8(progress.bytes).unwrap();
    assert!(body.contains("it broke") && !body.contains("[DONE]"));
}

#[test]
fn an_answer_without_text_is_still_an_answer() {
    let none = || {
        vec![
            Event::Started((0, USAGE)),
            finish(FinishReason::Stop),
            done(),
        ]
    };
    let whole: Value = serde_json::from_str(&run(|| (reply(false, false), none()))).unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "");
    assert_eq!(chunks(&run(|| (reply(true, false), none()))).len(), 2);
    // A host that forgets `finish` still gets a terminal chunk out of us.
    let chunks = chunks(&run(|| (reply(true, false), vec![done()])));
    assert_eq!(chunks[1]["choices"][0]["finish_reason"], "stop");
}

#[test]
fn a_failure_before_the_first_byte_is_an_error() {
    for stream in [false, true] {
        let error = reply(stream, false)
            .advance(vec![Event::Failed((0, failure()))])
            .unwrap_err();
        assert_eq!(error.message, "it broke");
    }
    let late = reply(false, false).advance(vec![
        Event::Started((0, USAGE)),
        delta("x"),
        Event::Failed((0, failure())),
    ]);
    assert!(
        late.is_err(),
        "a completion is written at the end, so nothing is out yet"
    );
}

#[test]
fn a_failure_in_a_stream_is_its_last_event() {
    let mut reply = reply(true, true);
    let events = vec![
        Event::Started((0, USAGE)),
        delta("x"),
        Event::Failed((0, failure())),
    ];
    let progress = reply.advance(events).unwrap();
    assert!(matches!(progress.next, Next::End));
    let body = String::from_utf8(progress.bytes).unwrap();
    let last = chunks(&body).pop().unwrap();
    assert_eq!(
        last["error"],
        json!({ "message": "it broke", "type": "server_error", "param": null, "code": "internal_error" })
    );
    assert!(!body.contains("[DONE]"));
}

#[test]
fn half_an_answer_does_not_look_like_a_whole_one() {
    let events = || vec![delta("half"), finish(FinishReason::Cancelled)];
    assert!(reply(false, false).advance(events()).is_err());
    let progress = reply(true, false).advance(events()).unwrap();
    let told = String::from_utf8(progress.bytes).unwrap();
    assert!(told.contains("\"error\""), "{told}");
}

#[test]
fn every_error_code_has_a_status_and_four_keys() {
    use ErrorCode as Code;
    let (invalid, broken) = ("invalid_request_error", "server_error");
    let table = [
        (Code::InvalidRequest, 400, invalid, None),
        (Code::NotFound, 404, invalid, Some("not_found")),
        (Code::Unsupported, 400, invalid, Some("unsupported_value")),
        (Code::TooLarge, 413, invalid, Some("request_too_large")),
        (
            Code::ContextOverflow,
            400,
            invalid,
            Some("context_length_exceeded"),
        ),
        (Code::Unauthorized, 401, invalid, Some("invalid_api_key")),
        (
            Code::RateLimited,
            429,
            "rate_limit_error",
            Some("rate_limit_exceeded"),
        ),
        (
            Code::Overloaded,
            503,
            "overloaded_error",
            Some("overloaded"),
        ),
        (Code::Timeout, 504, broken, Some("timeout")),
        (Code::Internal, 500, broken, Some("internal_error")),
    ];
    for (code, status, kind, word) in table {
        let error = Error {
            code,
            param: Some("p".to_owned()),
            ..failure()
        };
        let response = render_error(&error, false);
        let body: Value = serde_json::from_slice(&response.body).unwrap();
        assert_eq!(response.status, status);
        let expected = json!({ "message": "it broke", "type": kind, "param": "p", "code": word });
        assert_eq!(body, json!({ "error": expected }));
        let mid_stream = render_error(&error, true);
        assert_eq!(mid_stream.body, format!("data: {body}\n\n").into_bytes());
    }
    let missing = Error {
        code: ErrorCode::NotFound,
        param: Some("model".to_owned()),
        ..failure()
    };
    assert!(
        String::from_utf8(render_error(&missing, false).body)
            .unwrap()
            .contains("model_not_found")
    );
}

#[test]
fn overload_says_when_to_come_back() {
    let error = Error {
        code: ErrorCode::Overloaded,
        retry_after: Some(2),
        ..failure()
    };
    assert!(
        render_error(&error, false)
            .headers
            .contains(&("retry-after".to_owned(), "2".to_owned()))
    );
}

fn call(choice: u32, id: &str) -> Event {
    Event::ToolCall(Call {
        generation: 0,
        choice,
        call: ToolCall {
            id: id.to_owned(),
            name: "weather".to_owned(),
            arguments: r#"{"city": "Ulm"}"#.to_owned(),
        },
    })
}

#[test]
fn calls_stand_beside_no_text() {
    let events = || {
        let finish = finish(FinishReason::ToolCalls);
        vec![
            Event::Started((0, USAGE)),
            call(0, "1"),
            call(0, "2"),
            finish,
            done(),
        ]
    };
    let body = run(|| (reply(false, false), events()));
    let answer: Value = serde_json::from_str(&body).unwrap();
    let told = |id: &str| json!({ "id": id, "type": "function", "function": { "name": "weather", "arguments": "{\"city\": \"Ulm\"}" } });
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(
        choice["message"],
        json!({ "role": "assistant", "content": null, "refusal": null, "tool_calls": [told("call_1"), told("call_2")] })
    );
    let chunks = chunks(&run(|| (reply(true, false), events())));
    let deltas: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0])
        .filter(|call| call.is_object())
        .collect();
    assert_eq!(
        *deltas[0],
        json!({ "index": 0, "id": "call_1", "type": "function", "function": { "name": "weather", "arguments": "" } })
    );
    assert_eq!(
        *deltas[1],
        json!({ "index": 0, "function": { "arguments": "{\"city\": \"Ulm\"}" } })
    );
    assert_eq!((deltas.len(), &deltas[2]["index"]), (4, &json!(1)));
    let last = &chunks[chunks.len() - 1]["choices"][0];
    assert_eq!(last["finish_reason"], "tool_calls");
}
