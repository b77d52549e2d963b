//! Tools of a chat: what the model may call, what it called before, and what came of it.

use visor_plugin_body::{Choice, Field, Names, Tool, Tools, Wrong, check_name};

use crate::visor::plugin::types::{Part, ToolCall, ToolResult};

/// Reads `tools`, `tool_choice` and `parallel_tool_calls`; `text` is the whole body.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(body: &Field, text: &str) -> Result<Tools, Wrong> {
    let tool = |tool: &Field| {
        let kind = tool.get("type");
        match kind.string()? {
            "function" => Tool::read(&tool.get("function"), Names::SHORT, "parameters", text),
            _ => Err(kind.unsupported("tools are functions")),
        }
    };
    let place = body.get("tool_choice");
    let choice = choice(&place)?;
    let parallel = body.get("parallel_tool_calls").given();
    let parallel = parallel.map_or(Ok(true), |field| field.boolean())?;
    Tools::read(&body.get("tools"), tool, (&place, choice), parallel)
}

fn choice(field: &Field) -> Result<Choice, Wrong> {
    let Some(field) = field.clone().given() else {
        return Ok(Choice::Auto);
    };
    let wrong = || field.wrong_value("none, auto, required or a function");
    if field.value().is_some_and(serde_json::Value::is_object) {
        let kind = field.get("type");
        return match kind.string()? {
            "function" => {
                let name = field.get("function").object()?.get("name");
                Ok(Choice::Named(name.string()?.to_owned()))
            }
            "allowed_tools" | "custom" => Err(kind.unsupported("one function can be named")),
            _ => Err(wrong()),
        };
    }
    match field.string()? {
        "none" => Ok(Choice::None),
        "auto" => Ok(Choice::Auto),
        "required" => Ok(Choice::Required),
        _ => Err(wrong()),
    }
}

/// Calls that an assistant made.
pub(crate) fn calls(message: &Field) -> Result<Vec<Part>, Wrong> {
    let Some(calls) = message.get("tool_calls").given() else {
        return Ok(Vec::new());
    };
    let call = |call: &Field| {
        let kind = call.object()?.get("type");
        if kind.value().is_some() && !kind.is_one_of(&["function"]) {
            return Err(kind.unsupported("tools are functions"));
        }
        let function = call.get("function");
        let name = function.object()?.get("name");
        check_name(&name, Names::SHORT)?;
        Ok(Part::ToolCall(ToolCall {
            id: call.get("id").string()?.to_owned(),
            name: name.string()?.to_owned(),
            arguments: function.get("arguments").string()?.to_owned(),
        }))
    };
    calls.items()?.iter().map(call).collect()
}

/// What came of a call: a message whose parts are text.
pub(crate) fn result(message: &Field, parts: Vec<Part>) -> Result<Part, Wrong> {
    let text = parts.into_iter().filter_map(|part| match part {
        Part::Text(text) => Some(text),
        _ => None,
    });
    Ok(Part::ToolResult(ToolResult {
        id: message.get("tool_call_id").string()?.to_owned(),
        content: text.collect(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use visor_plugin_body::Kind;

    fn parsed(body: &Value) -> Result<Tools, Wrong> {
        let text = body.to_string();
        parse(&Field::body(body).unwrap(), &text)
    }

    fn weather() -> Value {
        json!([{ "type": "function", "function": {
            "name": "weather", "description": "of a city", "strict": true,
            "parameters": { "type": "object", "properties": { "city": { "type": "string" } } },
        } }])
    }

    #[test]
    fn tools_and_the_choice_among_them_are_read() {
        let choice = |choice: Value| {
            let tools = parsed(&json!({ "tools": weather(), "tool_choice": choice })).unwrap();
            (tools.tools.len(), tools.choice)
        };
        let named = json!({ "type": "function", "function": { "name": "weather" } });
        assert_eq!(choice(Value::Null), (1, Choice::Auto));
        assert_eq!(choice(json!("none")), (0, Choice::None));
        assert_eq!(choice(json!("required")), (1, Choice::Required));
        assert_eq!(choice(named), (1, Choice::Named("weather".to_owned())));
        let body = json!({ "tools": weather(), "parallel_tool_calls": false });
        let tools = parsed(&body).unwrap();
        assert!(!tools.parallel && tools.tools[0].description == "of a city");
        assert_eq!(tools.tools[0].param, "tools[0].function.parameters");
        assert_eq!(parsed(&json!({ "tools": [] })).unwrap().tools, []);
    }

    #[test]
    fn what_is_wrong_with_them_is_named() {
        let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
        let named = |name: &str| json!({ "type": "function", "function": { "name": name } });
        for (key, value, kind, param) in [
            (
                "tools",
                json!([{ "type": "custom" }]),
                unsupported,
                "tools[0].type",
            ),
            (
                "tools",
                json!([{ "type": "function" }]),
                invalid,
                "tools[0].function",
            ),
            ("tool_choice", json!("any"), invalid, "tool_choice"),
            ("tool_choice", json!(1), invalid, "tool_choice"),
            ("tool_choice", named("time"), invalid, "tool_choice"),
            (
                "tool_choice",
                json!({ "type": "function" }),
                invalid,
                "tool_choice.function",
            ),
            (
                "tool_choice",
                json!({ "type": "allowed_tools" }),
                unsupported,
                "tool_choice.type",
            ),
            (
                "parallel_tool_calls",
                json!("no"),
                invalid,
                "parallel_tool_calls",
            ),
        ] {
            let mut body = json!({ "tools": weather() });
            body[key] = value;
            let wrong = parsed(&body).unwrap_err();
            assert_eq!(
                (wrong.kind, wrong.param.as_deref()),
                (kind, Some(param)),
                "{body}"
            );
        }
        let wrong = parsed(&json!({ "tool_choice": "required" })).unwrap_err();
        assert_eq!(wrong.param.as_deref(), Some("tool_choice"));
    }

    #[test]
    fn earlier_calls_and_results_are_parts_of_messages() {
        let message = json!({ "role": "assistant", "tool_calls": [
            { "id": "call_1", "type": "function", "function": { "name": "weather", "arguments": "{\"city\":\"Ulm\"}" } },
            { "id": "call_2", "type": "function", "function": { "name": "weather", "arguments": "{}" } },
        ] });
        let parts = calls(&Field::body(&message).unwrap()).unwrap();
        let [Part::ToolCall(first), Part::ToolCall(_)] = &parts[..] else {
            panic!("{parts:?}")
        };
        assert_eq!(
            (first.id.as_str(), first.arguments.as_str()),
            ("call_1", r#"{"city":"Ulm"}"#)
        );
        let message = json!({ "role": "tool", "tool_call_id": "call_1" });
        let text = ["a", "b"].map(|text| Part::Text(text.to_owned()));
        let part = result(&Field::body(&message).unwrap(), text.into()).unwrap();
        assert!(matches!(&part, Part::ToolResult(r) if r.id == "call_1" && r.content == "ab"));
        for wrong in [
            json!({ "tool_calls": [{ "id": "1", "function": { "name": "a b", "arguments": "" } }] }),
            json!({ "tool_calls": [{ "function": { "name": "a", "arguments": "" } }] }),
            json!({ "tool_calls": [{ "id": "1", "function": { "name": "a", "arguments": {} } }] }),
            json!({ "tool_calls": [{ "id": "1", "type": "custom", "custom": {} }] }),
        ] {
            assert!(calls(&Field::body(&wrong).unwrap()).is_err(), "{wrong}");
        }
    }
}
