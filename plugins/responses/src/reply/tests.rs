//! Event lists in, bytes out.

use super::*;
use crate::exports::visor::plugin::adapter::{Call, Finish, Total};

const USAGE: Usage = Usage {
    prompt_tokens: 770,
    image_tokens: 757,
    cached_tokens: 3,
    completion_tokens: 2,
};

fn reply(shape: Shape) -> Reply {
    let mut reply = Reply::new(shape, "1".to_owned(), 1_700_000_000, "m".to_owned());
    reply.repeated.insert("temperature".to_owned(), json!(0.5));
    reply
}

fn delta(text: &str) -> Event {
    Event::Delta(Delta {
        generation: 0,
        choice: 0,
        text: text.to_owned(),
        tokens: vec![TokenInfo {
            chosen: TokenChance {
                token: 1,
                bytes: text.as_bytes().to_vec(),
                logprob: -0.5,
            },
            alternatives: Vec::new(),
        }],
    })
}

fn finish(reason: FinishReason) -> Event {
    Event::Finish(Finish {
        generation: 0,
        choice: 0,
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

fn failed() -> Event {
    let error = Error {
        code: ErrorCode::Internal,
        message: "it broke".to_owned(),
        param: None,
        retry_after: None,
    };
    Event::Failed((0, error))
}

fn answer(reason: FinishReason) -> Vec<Event> {
    let started = Event::Started((0, USAGE));
    vec![started, delta("Hé"), delta("llo"), finish(reason), done()]
}

fn run(shape: Shape, events: Vec<Event>) -> String {
    let progress = reply(shape).advance(events).unwrap();
    assert!(matches!(progress.next, Next::End));
    String::from_utf8(progress.bytes).unwrap()
}

fn events(body: &str) -> Vec<Value> {
    let event = |event: &str| {
        let (name, data) = event.split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name.strip_prefix("event: ").unwrap());
        data
    };
    body.split_terminator("\n\n").map(event).collect()
}

#[test]
fn a_response_has_one_message_and_its_counts() {
    let response: Value =
        serde_json::from_str(&run(Shape::Whole, answer(FinishReason::Stop))).unwrap();
    assert_eq!(response["status"], "completed");
    assert_eq!(response["id"], "resp_1");
    assert_eq!(response["temperature"], 0.5);
    let message = &response["output"][0];
    assert_eq!(
        (&message["type"], &message["role"]),
        (&json!("message"), &json!("assistant"))
    );
    let part = &message["content"][0];
    assert_eq!(
        (&part["type"], &part["text"]),
        (&json!("output_text"), &json!("Héllo"))
    );
    assert_eq!(part["logprobs"][0]["bytes"], json!([72, 195, 169]));
    assert_eq!(response["usage"]["total_tokens"], 772);
    assert_eq!(
        response["usage"]["input_tokens_details"],
        json!({ "cached_tokens": 3, "cache_write_tokens": 0, "image_tokens": 757 })
    );
    assert_eq!(response["incomplete_details"], Value::Null);
    let cut: Value =
        serde_json::from_str(&run(Shape::Whole, answer(FinishReason::Length))).unwrap();
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
}

#[test]
fn a_stream_opens_fills_and_closes_in_order() {
    let events = events(&run(Shape::Stream, answer(FinishReason::Stop)));
    let names: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    assert_eq!(events[0]["response"]["status"], "in_progress");
    assert_eq!(events[0]["response"]["usage"], Value::Null);
    assert_eq!(events[6]["text"], "Héllo");
    let whole: Value =
        serde_json::from_str(&run(Shape::Whole, answer(FinishReason::Stop))).unwrap();
    assert_eq!(
        events[9]["response"], whole,
        "the last event is the whole response"
    );
}

#[test]
fn a_count_counts_the_whole_prompt() {
    let counted = vec![Event::Started((0, USAGE)), done()];
    let count: Value = serde_json::from_str(&run(Shape::Count, counted)).unwrap();
    assert_eq!(
        count,
        json!({ "object": "response.input_tokens", "input_tokens": 770 })
    );
}

#[test]
fn a_failure_is_an_error_before_the_stream_and_its_last_event_in_it() {
    assert!(
        reply(Shape::Whole)
            .advance(vec![delta("x"), failed()])
            .is_err()
    );
    assert!(reply(Shape::Stream).advance(vec![failed()]).is_err());
    let last = events(&run(Shape::Stream, vec![delta("x"), failed()]))
        .pop()
        .unwrap();
    assert_eq!(
        (&last["type"], &last["message"]),
        (&json!("error"), &json!("it broke"))
    );
    let half = vec![delta("x"), finish(FinishReason::Cancelled)];
    assert!(reply(Shape::Whole).advance(half).is_err());
}

#[test]
fn errors_have_their_status_and_four_keys() {
    for (code, status) in [
        (ErrorCode::InvalidRequest, 400),
        (ErrorCode::Unsupported, 400),
        (ErrorCode::ContextOverflow, 400),
        (ErrorCode::NotFound, 404),
        (ErrorCode::TooLarge, 413),
        (ErrorCode::Unauthorized, 401),
        (ErrorCode::RateLimited, 429),
        (ErrorCode::Overloaded, 503),
        (ErrorCode::Timeout, 504),
        (ErrorCode::Internal, 500),
    ] {
        let error = Error {
            code,
            message: "too hot".to_owned(),
            param: Some("temperature".to_owned()),
            retry_after: Some(2),
        };
        let response = render_error(&error, false);
        let body: Value = serde_json::from_slice(&response.body).unwrap();
        assert_eq!(response.status, status);
        let mut keys: Vec<&String> = body["error"].as_object().unwrap().keys().collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"]);
        assert!(
            response
                .headers
                .contains(&("retry-after".to_owned(), "2".to_owned()))
        );
    }
}

#[test]
fn calls_are_items() {
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
        let finish = finish(FinishReason::ToolCalls);
        vec![
            Event::Started((0, USAGE)),
            call("1"),
            call("2"),
            finish,
            done(),
        ]
    };
    let response: Value = serde_json::from_str(&run(Shape::Whole, called())).unwrap();
    let item = |id: &str, call_id: &str| {
        json!({
            "id": id, "type": "function_call", "status": "completed", "call_id": call_id,
            "name": "weather", "arguments": "{\"city\": \"Ulm\"}",
        })
    };
    assert_eq!(
        response["output"],
        json!([item("fc_1", "call_1"), item("fc_2", "call_2")])
    );
    assert_eq!(response["status"], "completed");
    let events = events(&run(Shape::Stream, called()));
    let names: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    let one = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ];
    let begun = ["response.created", "response.in_progress"];
    assert_eq!(
        names,
        [&begun[..], &one, &one, &["response.completed"]].concat()
    );
    assert_eq!(events[2]["item"]["arguments"], "");
    assert_eq!(
        (&events[6]["output_index"], &events[6]["item"]["call_id"]),
        (&json!(1), &json!("call_2"))
    );
    assert_eq!(events[10]["response"], response);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
}
