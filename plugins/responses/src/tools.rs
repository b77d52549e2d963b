//! Tools of a response: what the model may call, what it called before, and what came of it.

use serde_json::Value;
use visor_plugin_body::{Choice, Field, Names, Tool, Tools, Wrong, check_name};

use crate::visor::plugin::types::{Message, Part, Role, ToolCall, ToolResult};

/// Reads `tools`, `tool_choice` and `parallel_tool_calls`; `text` is the whole body.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(body: &Field, text: &str) -> Result<Tools, Wrong> {
    let tool = |tool: &Field| {
        let kind = tool.get("type");
        match kind.string()? {
            "function" => Tool::read(tool, Names::LONG, "parameters", text),
            _ => Err(kind.unsupported("tools are functions, and the client's to run")),
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
    if field.value().is_some_and(Value::is_object) {
        let kind = field.get("type");
        return match kind.string()? {
            "function" => Ok(Choice::Named(field.get("name").string()?.to_owned())),
            _ => Err(kind.unsupported("one function can be named")),
        };
    }
    match field.string()? {
        "none" => Ok(Choice::None),
        "auto" => Ok(Choice::Auto),
        "required" => Ok(Choice::Required),
        _ => Err(field.wrong_value("none, auto, required or a function")),
    }
}

/// An item that is a call belongs to what the assistant said last.
pub(crate) fn call(item: &Field, messages: &mut Vec<Message>) -> Result<(), Wrong> {
    let name = item.get("name");
    check_name(&name, Names::LONG)?;
    let call = Part::ToolCall(ToolCall {
        id: item.get("call_id").string()?.to_owned(),
        name: name.string()?.to_owned(),
        arguments: item.get("arguments").string()?.to_owned(),
    });
    match messages.last_mut() {
        Some(last) if matches!(last.role, Role::Assistant) => last.parts.push(call),
        _ => messages.push(Message {
            role: Role::Assistant,
            parts: vec![call],
        }),
    }
    Ok(())
}

/// An item that says what came of a call.
pub(crate) fn result(item: &Field) -> Result<Message, Wrong> {
    let output = item.get("output");
    let content = match output.value() {
        Some(Value::Array(_)) => {
            let mut content = String::new();
            for part in output.items()? {
                let kind = part.object()?.get("type");
                match kind.string()? {
                    "input_text" | "output_text" => content.push_str(part.get("text").string()?),
                    _ => return Err(kind.unsupported("what comes of a call is text")),
                }
            }
            content
        }
        _ => output.string()?.to_owned(),
    };
    let id = item.get("call_id").string()?.to_owned();
    Ok(Message {
        role: Role::Tool,
        parts: vec![Part::ToolResult(ToolResult { id, content })],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use visor_plugin_body::Kind;

    fn parsed(body: &Value) -> Result<Tools, Wrong> {
        parse(&Field::body(body).unwrap(), &body.to_string())
    }

    fn weather() -> Value {
        json!([{ "type": "function", "name": "weather", "strict": true, "parameters": { "type": "object" } }])
    }

    #[test]
    fn tools_and_the_choice_among_them_are_read() {
        let choice = |choice: Value| {
            let tools = parsed(&json!({ "tools": weather(), "tool_choice": choice })).unwrap();
            (tools.tools.len(), tools.choice)
        };
        assert_eq!(choice(Value::Null), (1, Choice::Auto));
        assert_eq!(choice(json!("none")), (0, Choice::None));
        assert_eq!(choice(json!("required")), (1, Choice::Required));
        let named = json!({ "type": "function", "name": "weather" });
        assert_eq!(choice(named), (1, Choice::Named("weather".to_owned())));
        let tools = parsed(&json!({ "tools": weather(), "parallel_tool_calls": false })).unwrap();
        assert!(!tools.parallel);
        assert_eq!(tools.tools[0].param, "tools[0].parameters");
    }

    #[test]
    fn what_is_wrong_with_them_is_named() {
        let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
        for (key, value, kind, param) in [
            (
                "tools",
                json!([{ "type": "web_search" }]),
                unsupported,
                "tools[0].type",
            ),
            (
                "tools",
                json!([{ "type": "function" }]),
                invalid,
                "tools[0].name",
            ),
            ("tool_choice", json!("any"), invalid, "tool_choice"),
            (
                "tool_choice",
                json!({ "type": "file_search" }),
                unsupported,
                "tool_choice.type",
            ),
            (
                "tool_choice",
                json!({ "type": "function", "name": "a" }),
                invalid,
                "tool_choice",
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
    }

    #[test]
    fn calls_made_at_once_are_one_message() {
        let item = |id: &str| json!({ "type": "function_call", "call_id": id, "name": "weather", "arguments": "{}" });
        let mut messages = Vec::new();
        for id in ["1", "2"] {
            call(&Field::body(&item(id)).unwrap(), &mut messages).unwrap();
        }
        assert_eq!((messages.len(), messages[0].parts.len()), (1, 2));
        for output in [
            json!("dry"),
            json!([{ "type": "input_text", "text": "dry" }]),
        ] {
            let item = json!({ "type": "function_call_output", "call_id": "1", "output": output });
            let message = result(&Field::body(&item).unwrap()).unwrap();
            assert!(
                matches!(&message.parts[..], [Part::ToolResult(r)] if r.id == "1" && r.content == "dry")
            );
        }
        let item = json!({ "call_id": "1" });
        let wrong = result(&Field::body(&item).unwrap()).unwrap_err();
        assert_eq!(wrong.param.as_deref(), Some("output"));
    }
}
