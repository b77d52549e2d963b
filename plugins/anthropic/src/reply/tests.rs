//! Event lists in, bytes out.

use super::*;
use crate::exports::visor::plugin::adapter::{Call, Delta, Finish, Total};

const USAGE: Usage = Usage {
    prompt_tokens: 770,
    image_tokens: 757,
    cached_tokens: 3,
    completion_tokens: 2,
};

/// As many tokens as `USAGE` has, in a context that holds more.
const LIMITS: Limits = Limits {
    max_tokens: 2,
    context_tokens: 4096,
};

fn reply(shape: Shape) -> Reply {
    limited(shape, LIMITS)
}

fn limited(shape: Shape, limits: Limits) -> Reply {
    let stops = vec!["END".to_owned()];
    Reply::new(shape, "msg_1".to_owned(), "m".to_owned(), stops, limits)
}

fn delta(text: &str) -> Event {
    Event::Delta(Delta {
        generation: 0,
        choice: 0,
        text: text.to_owned(),
        tokens: Vec::new(),
    })
}

fn finish(reason: FinishReason, matched_stop: Option<&str>) -> Event {
    Event::Finish(Finish {
        generation: 0,
        choice: 0,
        reason,
        matched_stop: matched_stop.map(str::to_owned),
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

fn failed() -> Event {
    let error = Error {
        code: ErrorCode::Internal,
        message: "it broke".to_owned(),
        param: None,
        retry_after: None,
    };
    Event::Failed((0, error))
}

fn answer(reason: FinishReason, matched_stop: Option<&str>) -> Vec<Event> {
    vec![
        Event::Started((0, USAGE)),
        delta("Hé"),
        delta("llo"),
        finish(reason, matched_stop),
        done(),
    ]
}

fn run(shape: Shape, events: Vec<Event>) -> String {
    written(reply(shape), events)
}

fn written(mut reply: Reply, events: Vec<Event>) -> String {
    let progress = reply.advance(events).unwrap();
    assert!(matches!(progress.next, Next::End));
    String::from_utf8(progress.bytes).unwrap()
}

/// Names and data of a stream's events.
fn events(body: &str) -> Vec<(String, Value)> {
    let event = |event: &str| {
        let (name, data) = event.split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        let name = name.strip_prefix("event: ").unwrap();
        assert_eq!(data["type"], name);
        (name.to_owned(), data)
    };
    body.split_terminator("\n\n").map(event).collect()
}

#[test]
fn a_message_has_every_required_key() {
    let body = run(Shape::Whole, answer(FinishReason::Length, None));
    let message: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        message,
        json!({
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
            "content": [{ "type": "text", "text": "Héllo" }],
            "stop_reason": "max_tokens", "stop_sequence": null,
            "usage": {
                "input_tokens": 767, "output_tokens": 2,
                "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3,
            },
        })
    );
}

#[test]
fn a_stop_sequence_is_told_when_it_is_the_clients() {
    for (matched, reason, told) in [
        (Some("END"), "stop_sequence", json!("END")),
        (Some("template's"), "end_turn", Value::Null),
        (None, "end_turn", Value::Null),
    ] {
        let body = run(Shape::Whole, answer(FinishReason::Stop, matched));
        let message: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(message["stop_reason"], reason);
        assert_eq!(message["stop_sequence"], told);
    }
}

#[test]
fn an_answer_that_fills_the_context_before_its_length_says_so() {
    let (length, context) = (FinishReason::Length, "model_context_window_exceeded");
    for (finish, max_tokens, context_tokens, reason) in [
        (length, 3, 772, context),
        (length, u32::MAX, 772, context),
        (length, 2, 772, "max_tokens"),
        // The operator has a limit, too.
        (length, 3, 773, "max_tokens"),
        (FinishReason::Stop, 3, 772, "end_turn"),
    ] {
        let limits = Limits {
            max_tokens,
            context_tokens,
        };
        let whole = written(limited(Shape::Whole, limits), answer(finish, None));
        let message: Value = serde_json::from_str(&whole).unwrap();
        assert_eq!(message["stop_reason"], reason, "{limits:?}");
        let stream = written(limited(Shape::Stream, limits), answer(finish, None));
        let events = events(&stream);
        assert_eq!(events[0].1["message"]["stop_reason"], Value::Null);
        assert_eq!(events[5].1["delta"]["stop_reason"], reason, "{limits:?}");
    }
}

#[test]
fn a_stream_has_the_events_of_one_block_in_order() {
    let events = events(&run(Shape::Stream, answer(FinishReason::Stop, Some("END"))));
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    );
    assert_eq!(events[0].1["message"]["content"], json!([]));
    assert_eq!(events[0].1["message"]["usage"]["input_tokens"], 767);
    assert_eq!(
        events[3].1["delta"],
        json!({ "type": "text_delta", "text": "llo" })
    );
    assert_eq!(
        events[5].1["delta"],
        json!({ "stop_reason": "stop_sequence", "stop_sequence": "END" })
    );
    assert_eq!(events[5].1["usage"]["output_tokens"], 2);
}

#[test]
fn calls_are_blocks() {
    let call = |id: &str| {
        Event::ToolCall(Call {
            generation: 0,
            choice: 0,
            call: ToolCall {
                id: id.to_owned(),
                name: "weather".to_owned(),
                arguments: r#"{"city": "Ulm"}"#.to_owned(),
            },
        })
    };
    let called = || {
        let finish = finish(FinishReason::ToolCalls, None);
        vec![
            Event::Started((0, USAGE)),
            call("1"),
            call("2"),
            finish,
            done(),
        ]
    };
    let message: Value = serde_json::from_str(&run(Shape::Whole, called())).unwrap();
    assert_eq!(message["stop_reason"], "tool_use");
    let block = |id: &str| json!({ "type": "tool_use", "id": id, "name": "weather", "input": { "city": "Ulm" } });
    assert_eq!(
        message["content"],
        json!([block("toolu_1"), block("toolu_2")])
    );
    let events = events(&run(Shape::Stream, called()));
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let block = [
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
    ];
    let ends = ["message_delta", "message_stop"];
    assert_eq!(
        names,
        [&["message_start"][..], &block, &block, &ends].concat()
    );
    assert_eq!(
        events[1].1["content_block"],
        json!({ "type": "tool_use", "id": "toolu_1", "name": "weather", "input": {} })
    );
    let delta = json!({ "type": "input_json_delta", "partial_json": "{\"city\": \"Ulm\"}" });
    assert_eq!(
        (&events[5].1["delta"], &events[5].1["index"]),
        (&delta, &json!(1))
    );
    assert_eq!(events[7].1["delta"]["stop_reason"], "tool_use");
}

#[test]
fn a_count_counts_the_whole_prompt() {
    let counted = vec![Event::Started((0, USAGE)), done()];
    assert_eq!(run(Shape::Count, counted), r#"{"input_tokens":770}"#);
}

#[test]
fn a_failure_is_an_error_before_the_stream_and_its_last_event_in_it() {
    assert!(
        reply(Shape::Whole)
            .advance(vec![delta("x"), failed()])
            .is_err()
    );
    assert!(reply(Shape::Stream).advance(vec![failed()]).is_err());
    let body = run(
        Shape::Stream,
        vec![Event::Started((0, USAGE)), delta("x"), failed()],
    );
    let (name, data) = events(&body).pop().unwrap();
    assert_eq!(name, "error");
    assert_eq!(
        data["error"],
        json!({ "type": "api_error", "message": "it broke" })
    );
    let half = vec![delta("x"), finish(FinishReason::Cancelled, None)];
    assert!(reply(Shape::Whole).advance(half).is_err());
}

#[test]
fn errors_have_their_status_and_name_what_is_wrong() {
    let response = |code| {
        let error = Error {
            code,
            message: "too hot".to_owned(),
            param: Some("temperature".to_owned()),
            retry_after: Some(2),
        };
        render_error(&error, false)
    };
    let table = [
        (ErrorCode::InvalidRequest, 400, "invalid_request_error"),
        (ErrorCode::Unsupported, 400, "invalid_request_error"),
        (ErrorCode::ContextOverflow, 400, "invalid_request_error"),
        (ErrorCode::NotFound, 404, "not_found_error"),
        (ErrorCode::TooLarge, 413, "request_too_large"),
        (ErrorCode::Unauthorized, 401, "authentication_error"),
        (ErrorCode::RateLimited, 429, "rate_limit_error"),
        (ErrorCode::Overloaded, 529, "overloaded_error"),
        (ErrorCode::Timeout, 504, "timeout_error"),
        (ErrorCode::Internal, 500, "api_error"),
    ];
    for (code, status, kind) in table {
        let response = response(code);
        let body: Value = serde_json::from_slice(&response.body).unwrap();
        assert_eq!(response.status, status);
        let error = json!({ "type": kind, "message": "temperature: too hot" });
        assert_eq!(body, json!({ "type": "error", "error": error }));
        assert!(
            response
                .headers
                .contains(&("retry-after".to_owned(), "2".to_owned()))
        );
    }
}

#[test]
fn a_ping_is_an_event() {
    let ping = String::from_utf8(ping()).unwrap();
    assert_eq!(events(&ping)[0].0, "ping");
}

#[test]
fn a_frame_gives_what_is_written_for_a_text() {
    let mut reply = reply(Shape::Stream);
    let first = reply.advance(vec![delta("Hé")]).unwrap();
    assert!(first.frame.is_none(), "it opens a block, too");
    let next = reply.advance(vec![delta(",")]).unwrap();
    let frame = next.frame.expect("nothing is told beside the text");
    for text in ["", "llo", "\"quoted\"\\\n\u{1}\u{2028}😀"] {
        let written = reply.advance(vec![delta(text)]).unwrap().bytes;
        let text = serde_json::to_vec(text).unwrap();
        assert_eq!(written, [&frame.before[..], &text, &frame.after].concat());
    }
    let over = reply.advance(vec![finish(FinishReason::Stop, None)]);
    assert!(over.unwrap().frame.is_none());
}

#[test]
fn a_message_does_not_change_when_texts_are_written_in_the_frame() {
    let mut whole = answer(FinishReason::Stop, None);
    whole.insert(3, delta("!"));
    let mut framed = reply(Shape::Stream);
    let begun = framed.advance(whole[..2].to_vec()).unwrap();
    let next = framed.advance(vec![whole[2].clone()]).unwrap();
    let frame = next.frame.expect("nothing is told beside the text");
    let text = [&frame.before[..], b"\"!\"", &frame.after].concat();
    let end = framed.advance(whole[4..].to_vec()).unwrap();
    let written = [begun.bytes, next.bytes, text, end.bytes].concat();
    assert_eq!(
        String::from_utf8(written).unwrap(),
        run(Shape::Stream, whole)
    );
}

#[test]
fn a_message_in_one_piece_has_no_frame() {
    let progress = reply(Shape::Whole).advance(vec![delta("a")]);
    assert!(progress.unwrap().frame.is_none());
}
