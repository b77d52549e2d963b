//! Tools: what the model calls, in every dialect. The weights are random, so that whatever fits a tool is the grammar's doing.

use serde_json::{Value, json};

use crate::chat::content;
use crate::client::{Answer, chunks};
use crate::dialects::{model, named_events};
use crate::server::{Server, chat, shared, text, with};

/// Properties in an order that is not the alphabet's; every call is short.
const WEATHER: &str = r#"{"type": "object", "properties": {
    "unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}
}, "required": ["unit", "days"]}"#;

/// Stands for it in a body: a schema that was parsed may have lost the order of its properties.
const PLACE: &str = "THE SCHEMA";

fn post(path: &str, body: &Value) -> Answer {
    post_to(&shared(), path, body)
}

fn post_to(server: &Server, path: &str, body: &Value) -> Answer {
    let body = body.to_string().replace(&format!("\"{PLACE}\""), WEATHER);
    server.send("POST", path, body.as_bytes())
}

fn function(name: &str, schema: &Value) -> Value {
    let function = json!({"name": name, "description": "tells it", "parameters": schema});
    json!({"type": "function", "function": function})
}

fn tools() -> Value {
    json!([function("weather", &json!(PLACE)), {"type": "function", "function": {"name": "the_time"}}])
}

fn asked(choice: Value, more: Value) -> Value {
    let body = with(
        chat(&[text("Is it warm?")]),
        json!({"tools": tools(), "tool_choice": choice, "max_tokens": 900}),
    );
    with(body, more)
}

/// Arguments as JSON text.
fn check_arguments(name: &str, arguments: &str) {
    let value: Value =
        serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {arguments}"));
    let members = value.as_object().expect("an object");
    if name == "the_time" {
        assert!(members.is_empty(), "{arguments}");
        return;
    }
    assert_eq!((name, members.len()), ("weather", 2), "{arguments}");
    assert!(["C", "F"].contains(&value["unit"].as_str().expect("a unit")));
    assert!((1..=9).contains(&value["days"].as_u64().expect("a count")));
    let places = ["unit", "days"].map(|key| arguments.find(&format!("\"{key}\"")));
    assert!(places.is_sorted(), "not in the schema's order: {arguments}");
}

/// The calls of a chat's choice, each checked.
fn calls(choice: &Value) -> Vec<Value> {
    let calls = choice["message"]["tool_calls"].as_array().cloned();
    let calls = calls.unwrap_or_else(|| panic!("no calls: {choice}"));
    for call in &calls {
        assert_eq!(call["type"], "function");
        assert!(call["id"].as_str().expect("an id").starts_with("call_"));
        let function = &call["function"];
        let [name, arguments] = ["name", "arguments"].map(|key| function[key].as_str().expect(key));
        check_arguments(name, arguments);
    }
    assert_eq!(choice["message"]["content"], Value::Null);
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    calls
}

#[test]
fn a_required_call_is_made_and_fits_streamed_or_not() {
    for temperature in [0.0, 1.0, 2.0] {
        let more = json!({"temperature": temperature, "seed": 5, "n": 2});
        let body = asked(json!("required"), more);
        let whole = post("/v1/chat/completions", &body).ok();
        let streamed = chunks(&post(
            "/v1/chat/completions",
            &with(body, json!({"stream": true})),
        ));
        for (index, choice) in whole["choices"]
            .as_array()
            .expect("choices")
            .iter()
            .enumerate()
        {
            let calls = calls(choice);
            let own = streamed.iter().map(|chunk| &chunk["choices"][0]);
            let own: Vec<&Value> = own.filter(|own| own["index"] == index).collect();
            let told: Vec<&Value> = own
                .iter()
                .map(|own| &own["delta"]["tool_calls"][0])
                .filter(|call| call.is_object())
                .collect();
            assert_eq!(told.len(), 2 * calls.len());
            for (number, call) in calls.iter().enumerate() {
                let (first, rest) = (told[2 * number], told[2 * number + 1]);
                assert_eq!(
                    (&first["index"], &rest["index"]),
                    (&json!(number), &json!(number))
                );
                assert_eq!(first["function"]["name"], call["function"]["name"]);
                assert_eq!(rest["function"]["arguments"], call["function"]["arguments"]);
            }
            assert_eq!(own.last().expect("chunks")["finish_reason"], "tool_calls");
        }
    }
}

#[test]
fn one_tool_is_named_or_one_call_is_allowed() {
    let named = json!({"type": "function", "function": {"name": "the_time"}});
    for seed in 0..4 {
        let more = json!({"temperature": 2.0, "seed": seed});
        let answer = post("/v1/chat/completions", &asked(named.clone(), more.clone())).ok();
        let called = calls(&answer["choices"][0]);
        assert_eq!(
            (called.len(), &called[0]["function"]["name"]),
            (1, &json!("the_time"))
        );
        let alone = with(
            asked(json!("required"), more),
            json!({"parallel_tool_calls": false}),
        );
        let answer = post("/v1/chat/completions", &alone).ok();
        assert_eq!(calls(&answer["choices"][0]).len(), 1);
    }
}

#[test]
fn who_need_not_call_answers_and_no_tools_are_as_none() {
    let more = json!({"temperature": 0, "max_tokens": 12});
    let free = post("/v1/chat/completions", &asked(json!("auto"), more.clone())).ok();
    assert!(!content(&free).is_empty(), "{free}");
    assert_eq!(free["choices"][0]["message"].get("tool_calls"), None);
    let none = post("/v1/chat/completions", &asked(json!("none"), more.clone())).ok();
    let plain = shared()
        .chat(&with(chat(&[text("Is it warm?")]), more))
        .ok();
    assert_eq!(content(&none), content(&plain));
    assert_eq!(
        none["usage"]["prompt_tokens"],
        plain["usage"]["prompt_tokens"]
    );
    assert!(free["usage"]["prompt_tokens"].as_u64() > plain["usage"]["prompt_tokens"].as_u64());
}

#[test]
fn a_kept_answer_is_kept_for_its_tools() {
    let more = json!({"temperature": 0});
    let first = |choice: Value| {
        let answer = post("/v1/chat/completions", &asked(choice, more.clone())).ok();
        calls(&answer["choices"][0])[0].clone()
    };
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let one = first(named("weather"));
    let two = first(named("the_time"));
    let again = first(named("weather"));
    assert_eq!(
        (&one["function"]["name"], &two["function"]["name"]),
        (&json!("weather"), &json!("the_time"))
    );
    assert_eq!(one["function"], again["function"]);
    assert_ne!(
        one["id"], again["id"],
        "a call that was kept is another call"
    );
    // Another schema under the same name.
    let other =
        json!({"type": "object", "properties": {"zone": {"enum": ["UTC"]}}, "required": ["zone"]});
    let body = with(
        asked(json!("required"), more),
        json!({"tools": [function("weather", &other)]}),
    );
    let answer = shared().chat(&body).ok();
    let arguments =
        answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].clone();
    let arguments: Value = serde_json::from_str(arguments.as_str().expect("text")).expect("JSON");
    assert_eq!(arguments, json!({"zone": "UTC"}));
}

#[test]
fn half_a_call_is_not_told() {
    let cut = post(
        "/v1/chat/completions",
        &asked(json!("required"), json!({"max_tokens": 6})),
    )
    .ok();
    let choice = &cut["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("length"), &json!(""))
    );
    assert_eq!(choice["message"].get("tool_calls"), None);
}

#[test]
fn a_conversation_goes_on_with_what_came_of_a_call() {
    let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "weather", "arguments": "{\"unit\": \"C\"}"}});
    let messages = json!([
        text("Is it warm?"),
        {"role": "assistant", "content": null, "tool_calls": [call("call_1"), call("call_2")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "22"}]},
    ]);
    let body = asked(
        json!("auto"),
        json!({"messages": messages, "max_tokens": 4}),
    );
    let with_results = post("/v1/chat/completions", &body).ok();
    let before = post(
        "/v1/chat/completions",
        &asked(json!("auto"), json!({"max_tokens": 4})),
    )
    .ok();
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    assert!(tokens(&with_results) > tokens(&before) + 20);
}

#[test]
fn tools_that_are_wrong_are_named() {
    let deep = json!({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/x"}}});
    let many: Vec<Value> = (0..129)
        .map(|n| function(&format!("t{n}"), &json!({})))
        .collect();
    for (wrong, param) in [
        (
            json!({"tools": [function("a b", &json!({}))]}),
            "tools[0].function.name",
        ),
        (
            json!({"tools": [function("a", &json!({})), function("a", &json!({}))]}),
            "tools[1]",
        ),
        (
            json!({"tools": [function("a", &json!({})), function("b", &deep)]}),
            "tools[1].function.parameters",
        ),
        (
            json!({"tools": [function("a", &json!({"type": "string"}))]}),
            "tools[0].function.parameters.type",
        ),
        (json!({"tools": many}), "tools"),
        (
            json!({"tool_choice": {"type": "function", "function": {"name": "missing"}}}),
            "tool_choice",
        ),
        (
            json!({"tools": [], "tool_choice": "required"}),
            "tool_choice",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "42"}]}),
            "messages[0].tool_call_id",
        ),
    ] {
        let error = post(
            "/v1/chat/completions",
            &with(asked(json!("auto"), json!({})), wrong.clone()),
        )
        .error(400);
        assert_eq!(error["param"], param, "{wrong:.80}: {error}");
    }
}

#[test]
fn the_operator_says_how_many_tools_and_calls() {
    let server = Server::start_with("[formats]\ntools_max = 1\ncalls_max = 1\n");
    let error = post_to(
        &server,
        "/v1/chat/completions",
        &asked(json!("auto"), json!({})),
    )
    .error(400);
    assert!(
        error["message"]
            .as_str()
            .expect("words")
            .contains("1 are allowed")
    );
    let one = json!({"tools": [function("a", &json!({}))], "temperature": 2.0});
    let answer = server
        .chat(&with(asked(json!("required"), json!({})), one))
        .ok();
    let calls = answer["choices"][0]["message"]["tool_calls"]
        .as_array()
        .map(Vec::len);
    assert_eq!(calls, Some(1), "{answer}");
}

#[test]
fn the_demo_calls_what_it_must() {
    let server = Server::start_without_flag("");
    let body = asked(json!("required"), json!({"temperature": 0}));
    let answer = post_to(&server, "/v1/chat/completions", &body).ok();
    calls(&answer["choices"][0]);
}

#[test]
fn messages_of_anthropic_use_tools() {
    let tools = json!([{"name": "weather", "description": "tells it", "input_schema": PLACE}]);
    let body = json!({"model": model(), "max_tokens": 900, "messages": [text("x")], "tools": tools,
        "tool_choice": {"type": "any", "disable_parallel_tool_use": true}});
    let whole = post("/v1/messages", &body).ok();
    assert_eq!(whole["stop_reason"], "tool_use", "{whole}");
    let block = &whole["content"][0];
    assert_eq!(
        (&block["type"], &block["name"]),
        (&json!("tool_use"), &json!("weather"))
    );
    assert_eq!(block["input"].as_object().expect("an object").len(), 2);
    let events = named_events(&post(
        "/v1/messages",
        &with(body.clone(), json!({"stream": true})),
    ));
    let delta = events
        .iter()
        .find(|event| event["type"] == "content_block_delta")
        .expect("a delta");
    check_arguments(
        "weather",
        delta["delta"]["partial_json"].as_str().expect("JSON"),
    );

    let result = json!({"type": "tool_result", "tool_use_id": block["id"], "content": "21"});
    let messages = json!([
        text("x"),
        {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": [result]},
    ]);
    let more = json!({"messages": messages, "tool_choice": {"type": "auto"}, "max_tokens": 4});
    let answer = post("/v1/messages", &with(body, more)).ok();
    assert_eq!(answer["content"][0]["type"], "text");
}

#[test]
fn what_a_schema_says_beyond_us_is_left_out_unless_it_is_strict() {
    let ask = |strict: bool| {
        let parameters = json!({"type": "object", "properties": {"a": {"not": {"type": "null"}}}});
        let function = json!({"name": "odd", "parameters": parameters, "strict": strict});
        let tools = json!([{"type": "function", "function": function}]);
        shared().chat(&asked(
            json!("auto"),
            json!({"tools": tools, "max_tokens": 4}),
        ))
    };
    ask(false).ok();
    let error = ask(true).error(400);
    let message = error["message"].as_str().expect("a message");
    assert!(
        message.contains("`odd`") && message.contains("`not`"),
        "{message}"
    );
    assert_eq!(error["param"], "tools[0].function.parameters");
}

#[test]
fn chats_of_ollama_offer_tools() {
    let call = json!({"function": {"name": "weather", "arguments": {"unit": "C", "days": 1}}});
    let messages = json!([
        text("x"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "21"},
    ]);
    let options = json!({"num_predict": 4, "temperature": 0});
    let body = json!({"model": model(), "messages": messages, "stream": false, "options": options, "tools": tools()});
    let answer = post("/api/chat", &body).ok();
    assert_eq!(answer["message"]["role"], "assistant");
    let without = with(body, json!({"tools": []}));
    let fewer = post("/api/chat", &without).ok();
    assert!(answer["prompt_eval_count"].as_u64() > fewer["prompt_eval_count"].as_u64());
}

#[test]
fn responses_call_functions() {
    let tools =
        json!([{"type": "function", "name": "weather", "parameters": PLACE, "strict": true}]);
    let body = json!({"input": "x", "max_output_tokens": 900, "tools": tools, "tool_choice": "required", "parallel_tool_calls": false});
    let whole = post("/v1/responses", &body).ok();
    let item = whole["output"][0].clone();
    assert_eq!(
        (&item["type"], &item["name"]),
        (&json!("function_call"), &json!("weather"))
    );
    check_arguments("weather", item["arguments"].as_str().expect("JSON"));
    assert_eq!(whole["tool_choice"], "required");
    let events = named_events(&post(
        "/v1/responses",
        &with(body.clone(), json!({"stream": true})),
    ));
    let done = events
        .iter()
        .find(|event| event["type"] == "response.function_call_arguments.done");
    assert_eq!(done.expect("arguments")["name"], "weather");
    let output =
        json!({"type": "function_call_output", "call_id": item["call_id"], "output": "21"});
    let input = json!([text("x"), item, output]);
    let more = json!({"input": input, "tool_choice": "none", "max_output_tokens": 16});
    let answer = post("/v1/responses", &with(body, more)).ok();
    assert_eq!(answer["output"][0]["type"], "message");
}
