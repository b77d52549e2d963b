//! Event lists in, bytes out.

use super::*;
use crate::exports::visor::plugin::adapter::{Call, Delta, Finish};
use crate::visor::plugin::types::Usage;

const NOW: &str = "2024-02-29T00:00:00.000Z";

fn delta(text: &str) -> Event {
    let chosen = TokenChance {
        token: 1,
        bytes: text.as_bytes().to_vec(),
        logprob: -0.5,
    };
    Event::Delta(Delta {
        generation: 0,
        choice: 0,
        text: text.to_owned(),
        tokens: vec![TokenInfo {
            alternatives: vec![chosen.clone()],
            chosen,
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
        usage: Usage {
            prompt_tokens: 770,
            image_tokens: 757,
            cached_tokens: 3,
            completion_tokens: 2,
        },
        queue_micros: 1,
        prefill_micros: 20,
        decode_micros: 300,
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

fn answer() -> Vec<Event> {
    vec![
        delta("Hé"),
        delta("llo"),
        finish(FinishReason::Length),
        done(),
    ]
}

fn lines(mut reply: Reply, events: Vec<Event>) -> Vec<Value> {
    let progress = reply.advance(events, NOW).unwrap();
    assert!(matches!(progress.next, Next::End));
    let body = String::from_utf8(progress.bytes).unwrap();
    body.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn reply(shape: Shape, stream: bool) -> Reply {
    Reply::new(shape, "m".to_owned(), stream, false)
}

#[test]
fn a_whole_answer_is_one_object_with_counts_and_times() {
    let whole = lines(reply(Shape::Chat, false), answer());
    let sums = json!({
        "model": "m", "created_at": NOW, "done": true, "done_reason": "length",
        "message": { "role": "assistant", "content": "Héllo" },
        "total_duration": 321_000, "load_duration": 0,
        "prompt_eval_count": 770, "prompt_eval_duration": 20_000,
        "eval_count": 2, "eval_duration": 300_000,
    });
    assert_eq!(whole, [sums]);
    let whole = lines(reply(Shape::Generate, false), answer());
    assert_eq!(whole[0]["response"], "Héllo");
    assert!(whole[0].get("message").is_none());
}

#[test]
fn nobody_divides_by_nothing() {
    let mut kept = reply(Shape::Chat, false);
    kept.spent_ns = 7;
    let mut total = match done() {
        Event::Done(total) => total,
        other => panic!("{other:?}"),
    };
    (
        total.queue_micros,
        total.prefill_micros,
        total.decode_micros,
    ) = (0, 0, 0);
    let last = &lines(kept, vec![delta("x"), Event::Done(total)])[0];
    for duration in ["total_duration", "prompt_eval_duration", "eval_duration"] {
        assert_eq!(last[duration], 7, "{last}");
    }
}

#[test]
fn a_stream_is_a_line_for_each_piece_and_one_that_sums_up() {
    for shape in [Shape::Chat, Shape::Generate] {
        let lines = lines(reply(shape, true), answer());
        let text = |line: &Value| match shape {
            Shape::Chat => line["message"]["content"].as_str().unwrap().to_owned(),
            Shape::Generate => line["response"].as_str().unwrap().to_owned(),
        };
        let (last, others) = lines.split_last().unwrap();
        assert_eq!(others.iter().map(text).collect::<String>(), "Héllo");
        assert_eq!(text(last), "");
        assert_eq!(
            (&last["done"], &last["done_reason"]),
            (&json!(true), &json!("length"))
        );
        assert!(others.iter().all(|line| line["done"] == json!(false)));
    }
}

#[test]
fn probabilities_come_with_their_text() {
    for stream in [false, true] {
        let reply = Reply::new(Shape::Chat, "m".to_owned(), stream, true);
        let lines = lines(reply, answer());
        let tokens: Vec<&Value> = lines
            .iter()
            .filter_map(|line| line["logprobs"].as_array())
            .flatten()
            .collect();
        assert_eq!(tokens.len(), 2);
        assert_eq!(tokens[0]["bytes"], json!([72, 195, 169]));
        assert_eq!(tokens[1]["top_logprobs"][0]["token"], "llo");
    }
}

#[test]
fn a_failure_is_an_error_before_the_first_line_and_the_last_line_after_it() {
    for stream in [false, true] {
        let early = reply(Shape::Chat, stream).advance(vec![failed()], NOW);
        assert_eq!(early.unwrap_err().message, "it broke");
    }
    let lines = lines(reply(Shape::Chat, true), vec![delta("x"), failed()]);
    assert_eq!(lines[1], json!({ "error": "it broke" }));
    let half = vec![delta("x"), finish(FinishReason::Cancelled)];
    assert!(reply(Shape::Chat, false).advance(half, NOW).is_err());
}

#[test]
fn errors_are_one_sentence_that_names_what_is_wrong() {
    let error = Error {
        code: ErrorCode::Overloaded,
        message: "too many".to_owned(),
        param: Some("n".to_owned()),
        retry_after: Some(2),
    };
    let response = render_error(&error, false);
    let body: Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!(
        (response.status, body),
        (503, json!({ "error": "too many" }))
    );
    assert!(
        response
            .headers
            .contains(&("retry-after".to_owned(), "2".to_owned()))
    );
    let mid_stream = render_error(&error, true);
    assert!(mid_stream.body.ends_with(b"\n"));
    assert_eq!(status(ErrorCode::Unauthorized), 401);
    assert_eq!(status(ErrorCode::RateLimited), 429);
}

#[test]
fn a_model_that_is_there_is_loaded_or_unloaded() {
    for (unloads, done_reason) in [(false, "load"), (true, "unload")] {
        let response = reply(Shape::Generate, true).loaded(unloads, NOW);
        let body: Value = serde_json::from_slice(&response.body).unwrap();
        assert_eq!(
            (&body["done"], &body["done_reason"]),
            (&json!(true), &json!(done_reason))
        );
        assert_eq!(body["response"], "");
    }
}

/// A message that names its parameter as a part of a word is not given it twice.
#[test]
fn what_a_model_cannot_do_is_said_as_ollama_says_it() {
    let error = Error {
        code: ErrorCode::Unsupported,
        message: r#""m" does not support thinking"#.to_owned(),
        param: Some("think".to_owned()),
        retry_after: None,
    };
    let response = render_error(&error, false);
    let body: Value = serde_json::from_slice(&response.body).unwrap();
    let said = json!({ "error": "\"m\" does not support thinking" });
    assert_eq!((response.status, body), (400, said));
}

#[test]
fn calls_have_their_arguments_as_objects() {
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
    let told = |id: &str, index: usize| json!({ "id": id, "function": { "index": index, "name": "weather", "arguments": { "city": "Ulm" } } });
    let events = || {
        vec![
            call("1"),
            call("2"),
            finish(FinishReason::ToolCalls),
            done(),
        ]
    };
    let advance = |stream: bool| {
        let mut reply = Reply::new(Shape::Chat, "m".to_owned(), stream, false);
        String::from_utf8(reply.advance(events(), NOW).unwrap().bytes).unwrap()
    };
    let whole: Value = serde_json::from_str(&advance(false)).unwrap();
    assert_eq!(
        whole["message"],
        json!({ "role": "assistant", "content": "", "tool_calls": [told("call_1", 0), told("call_2", 1)] })
    );
    assert_eq!(whole["done_reason"], "stop");
    let lines: Vec<Value> = advance(true)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(
        lines[1]["message"]["tool_calls"],
        json!([told("call_2", 1)])
    );
    assert_eq!(
        (&lines[1]["done"], &lines[2]["done"]),
        (&json!(false), &json!(true))
    );
}
